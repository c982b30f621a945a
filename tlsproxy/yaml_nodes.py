"""Reads typed values out of a YAML document and remembers where each stood.

PyYAML's nodes are read, not its constructed objects: only nodes know their line and column, and nothing is ever
constructed from a tag. A value that is not what was asked for is noted as a Problem and reading goes on with a
placeholder, so that one run finds everything; whoever reads must look at `Document.problems` before using the result.
"""

from __future__ import annotations

import contextlib
import difflib
import enum
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import yaml

from tlsproxy.config import Origin
from tlsproxy.errors import ConfigError, Problem

MAX_FILE_BYTES = 1 << 20
MAX_VALUES = 20_000
"""Values read from one document. Aliases can make a small file a huge tree."""
_MAX_SHOWN = 60

T = TypeVar("T")
E = TypeVar("E", bound=enum.Enum)

_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)(ms|s|m|h|d)")
_DURATION_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(\d{1,15})(B|KiB|MiB|GiB)?")
_SIZE_UNITS = {None: 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_INTEGER = re.compile(r"-?\d{1,18}")
_SHARE = re.compile(r"[01](?:\.[0-9]{1,9})?")


class InvalidValueError(Exception):
    """The value at hand is of no use; a Problem has been noted."""


class Document:
    """One YAML file and what is wrong with it."""

    def __init__(self, file: str, directory: Path) -> None:
        self.file = file
        """As given by the user, for messages."""
        self.directory = directory
        """What relative paths in the file are relative to."""
        self.problems: list[Problem] = []
        self._values = 0

    def parse(self, content: bytes) -> Value:
        """Return the document's root. Raises ConfigError where it isn't YAML at all."""
        if len(content) > MAX_FILE_BYTES:
            raise self._not_yaml(1, 1, f"expected at most {MAX_FILE_BYTES} bytes; got {len(content)}")
        try:
            node = yaml.compose(content.decode("utf-8"), Loader=yaml.SafeLoader)
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            column = error.start - content.rfind(b"\n", 0, error.start)
            raise self._not_yaml(line, column, f"expected UTF-8; got byte 0x{content[error.start]:02x}") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
            raise self._not_yaml(line, column, f"expected YAML; {error.problem}") from None
        except yaml.reader.ReaderError as error:
            raise self._not_yaml(1, 1, f"expected YAML; got character U+{error.character:04X}") from None
        except RecursionError:
            raise self._not_yaml(1, 1, "expected a configuration; got too deep a nesting") from None
        if node is None:
            raise self._not_yaml(1, 1, "expected a configuration; got an empty file")
        return Value(self, node, "")

    def count_value(self) -> None:
        """Raises ConfigError once there are more than MAX_VALUES."""
        self._values += 1
        if self._values > MAX_VALUES:
            raise self._not_yaml(1, 1, f"expected at most {MAX_VALUES} values, aliases expanded; got more")

    def _not_yaml(self, line: int, column: int, message: str) -> ConfigError:
        return ConfigError([Problem(self.file, line, column, "(file)", message)])


class Value:
    """A value somewhere in the document. Every reading method raises InvalidValueError after noting what is wrong."""

    __slots__ = ("_document", "_node", "path")

    def __init__(self, document: Document, node: yaml.Node, path: str) -> None:
        document.count_value()
        self._document = document
        self._node = node
        self.path = path
        """Dotted, as in messages: `listeners[0].tls`."""

    @property
    def position(self) -> tuple[int, int]:
        """Line and column, from 1."""
        mark = self._node.start_mark
        return mark.line + 1, mark.column + 1

    @property
    def origin(self) -> Origin:
        """Where the value stands, with the places of its keys if it is a mapping."""
        keys = {}
        if isinstance(self._node, yaml.MappingNode):
            for key_node, value_node in self._node.value:
                mark = value_node.start_mark
                keys[str(key_node.value)] = (mark.line + 1, mark.column + 1)
        return Origin(self._document.file, *self.position, self.path, keys)

    def note(self, message: str) -> None:
        """Note a Problem at this place."""
        line, column = self.position
        self._document.problems.append(Problem(self._document.file, line, column, self.path or "(file)", message))

    def invalid(self, expected: str, *, secret: bool = False) -> InvalidValueError:
        """Note that something else was expected here and return the exception to raise.

        A `secret` value, or what may be one by mistake, is not shown.
        """
        self.note(f"expected {expected}; got {self._kind() if secret else self._shown()}")
        return InvalidValueError()

    def mapping(self, expected: str = "a mapping") -> MappingReader:
        """Return a reader of the keys."""
        if not isinstance(self._node, yaml.MappingNode):
            raise self.invalid(expected)
        return MappingReader(self._document, self, self._node)

    def items(self, at_least: int = 0) -> list[Value]:
        """Return the items of a list."""
        if not isinstance(self._node, yaml.SequenceNode):
            raise self.invalid("a list")
        if len(self._node.value) < at_least:
            raise self.invalid(f"a list of at least {at_least}")
        return [Value(self._document, node, f"{self.path}[{i}]") for i, node in enumerate(self._node.value)]

    def each(self, parse: Callable[[Value], T], at_least: int = 0) -> tuple[T, ...]:
        """Return the parsed items of a list, without those that are invalid."""
        parsed = []
        for item in self.items(at_least):
            with contextlib.suppress(InvalidValueError):
                parsed.append(parse(item))
        return tuple(parsed)

    def text(self, expected: str = "text", pattern: re.Pattern[str] | None = None, *, secret: bool = False) -> str:
        """Return a non-empty string without control characters, wholly matched by `pattern` if there is one."""
        text = self._scalar(expected, secret=secret)
        if self._node.tag == "tag:yaml.org,2002:null" or not text.isprintable() or not text:
            raise self.invalid(expected, secret=secret)
        if pattern is not None and not pattern.fullmatch(text):
            raise self.invalid(expected, secret=secret)
        return text

    def path_name(self, *, secret: bool = False) -> Path:
        """Return an absolute path; a relative one in the file is relative to the file."""
        return self._document.directory / self.text("a path", secret=secret)

    def file_content(self, max_bytes: int) -> bytes:
        """Return what is in the file named here."""
        path = self.path_name()
        try:
            with path.open("rb") as file:
                content = file.read(max_bytes + 1)
        except OSError as error:
            self.note(f"{path}: expected a readable file; got {error.strerror}")
            raise InvalidValueError from None
        if len(content) > max_bytes:
            self.note(f"{path}: expected at most {max_bytes} bytes; got more")
            raise InvalidValueError
        return content

    def integer(self, low: int, high: int, or_else: str = "") -> int:
        """Return a number in [low, high]; `or_else` is for the message: what else the caller takes."""
        expected = f"a number from {low} to {high}{or_else}"
        text = self._scalar(expected)
        if not _INTEGER.fullmatch(text) or not low <= int(text) <= high:
            raise self.invalid(expected)
        return int(text)

    def duration(self, low_s: float, high_s: float) -> float:
        """Return seconds in [low_s, high_s]: `500ms`, `2s`, `1h`."""
        expected = f"a duration such as 500ms, 2s or 1h, from {_duration_text(low_s)} to {_duration_text(high_s)}"
        match = _DURATION.fullmatch(self._scalar(expected))
        if match is None:
            raise self.invalid(expected)
        seconds = float(match[1]) * _DURATION_UNITS_S[match[2]]
        if not low_s <= seconds <= high_s:
            raise self.invalid(expected)
        return seconds

    def size(self, low: int, high: int) -> int:
        """Return bytes in [low, high]: `65536`, `64KiB`, `1GiB`."""
        expected = f"a size such as 64KiB or 1GiB, from {low} to {high} bytes"
        match = _SIZE.fullmatch(self._scalar(expected))
        if match is None:
            raise self.invalid(expected)
        size = int(match[1]) * _SIZE_UNITS[match[2]]
        if not low <= size <= high:
            raise self.invalid(expected)
        return size

    def share(self) -> float:
        """Return a number in [0, 1]: `0.1`."""
        expected = "a number from 0 to 1, such as 0.1"
        text = self._scalar(expected)
        if not _SHARE.fullmatch(text) or float(text) > 1:
            raise self.invalid(expected)
        return float(text)

    def boolean(self) -> bool:
        """Return a truth value: `true` or `false`."""
        text = self._scalar("true or false")
        if text not in ("true", "false"):
            raise self.invalid("true or false")
        return text == "true"

    def scalar_is(self, text: str) -> bool:
        """Tell whether just `text` stands here, where something else may stand as well."""
        return isinstance(self._node, yaml.ScalarNode) and self._node.value == text

    def entries(self) -> list[tuple[str, Value]]:
        """Return keys and values of a mapping whose keys are the user's own."""
        if not isinstance(self._node, yaml.MappingNode):
            raise self.invalid("a mapping")
        return [
            (str(key.value), Value(self._document, value, f"{self.path}.{key.value}"))
            for key, value in self._node.value
            if isinstance(key, yaml.ScalarNode)
        ]

    def choice(self, choices: type[E]) -> E:
        """Return the member whose value stands here."""
        expected = " or ".join(str(member.value) for member in choices)
        text = self._scalar(expected)
        for member in choices:
            if member.value == text:
                return member
        raise self.invalid(expected)

    def _scalar(self, expected: str, *, secret: bool = False) -> str:
        if not isinstance(self._node, yaml.ScalarNode):
            raise self.invalid(expected, secret=secret)
        return str(self._node.value)

    def _kind(self) -> str:
        if isinstance(self._node, yaml.MappingNode):
            return "a mapping"
        if isinstance(self._node, yaml.SequenceNode):
            return f"a list of {len(self._node.value)}" if self._node.value else "an empty list"
        if self._node.tag == "tag:yaml.org,2002:null":
            return "nothing"
        return "other text"

    def _shown(self) -> str:
        kind = self._kind()
        if kind != "other text":
            return kind
        text = str(self._node.value)
        return repr(text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "...")


class MappingReader:
    """Takes the keys of a mapping one by one. After the last, `finish` notes those nobody asked for."""

    def __init__(self, document: Document, whole: Value, node: yaml.MappingNode) -> None:
        self.whole = whole
        self._document = document
        self._start_mark = node.start_mark
        self._values: dict[str, Value] = {}
        self._keys: dict[str, Value] = {}
        self._known: list[str] = []
        for key_node, value_node in node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else ""
            path = f"{whole.path}.{key}" if whole.path else key
            key_value = Value(document, key_node, path)
            if not key:
                key_value.note("expected a key; got something else")
            elif key in self._values:
                line, _ = self._keys[key].position
                key_value.note(f"expected each key once; got this one on line {line} already")
            else:
                self._keys[key] = key_value
                self._values[key] = Value(document, value_node, path)

    def get(self, key: str) -> Value | None:
        """Return the value of `key`, or None where it was left out."""
        if key not in self._known:
            self._known.append(key)
        return self._values.get(key)

    def optional(self, key: str, parse: Callable[[Value], T], default: T) -> T:
        """Return the parsed value of `key`, or `default` where it was left out or is invalid."""
        value = self.get(key)
        if value is None:
            return default
        try:
            return parse(value)
        except InvalidValueError:
            return default

    def required(self, key: str, parse: Callable[[Value], T], placeholder: T) -> T:
        """As `optional`, but note a Problem where `key` was left out."""
        if key not in self._values:
            self.whole.note(f"expected the key {key!r}; got none")
        return self.optional(key, parse, placeholder)

    def section(self, key: str) -> MappingReader:
        """Return a reader of the mapping under `key`; an empty one where it was left out or is invalid."""
        empty = yaml.MappingNode("tag:yaml.org,2002:map", [], self._start_mark)
        path = f"{self.whole.path}.{key}" if self.whole.path else key
        return self.optional(
            key, Value.mapping, MappingReader(self._document, Value(self._document, empty, path), empty)
        )

    def finish(self) -> None:
        """Note the unknown keys."""
        for key, key_value in self._keys.items():
            if key in self._known:
                continue
            close = difflib.get_close_matches(key, self._known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            key_value.note(f"expected one of {', '.join(sorted(self._known))}; got an unknown key{hint}")


def _duration_text(seconds: float) -> str:
    for unit in ("d", "h", "m", "s"):
        count = seconds / _DURATION_UNITS_S[unit]
        if count >= 1 and count.is_integer():
            return f"{count:.0f}{unit}"
    return f"{seconds * 1000:.0f}ms"
