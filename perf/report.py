"""A report of many measurements: Markdown, a self-contained HTML page, and the raw data."""

from __future__ import annotations

import dataclasses
import datetime
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from perf.machine import describe_machine
from perf.parts import Part, Table
from perf.targets import Target, targets_table

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2730; }
table { border-collapse: collapse; font-size: 14px; margin: 1rem 0; }
th, td { border-bottom: 1px solid #d5dce1; padding: 4px 12px 4px 0; text-align: left; vertical-align: top; }
svg { width: 640px; max-width: 100%; display: block; margin: 1rem 0; font: 12px system-ui, sans-serif; fill: #1c2730; }
svg .grid { stroke: #e3e8eb; }
code { background: #f1f4f6; padding: 1px 4px; overflow-wrap: anywhere; }
"""
_BEGIN, _END = "<!-- figures: begin -->", "<!-- figures: end -->"


@dataclass(slots=True)
class Run:
    """One command and what came of it."""

    command: str
    parts: list[Part] = field(default_factory=list)
    error: str = ""
    """Why there are no more parts, if it failed."""


@dataclass(slots=True)
class Report:
    """All runs of one session on one machine."""

    command: str
    machine: Mapping[str, str] = field(default_factory=describe_machine)
    begun: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc))
    runs: dict[str, Run] = field(default_factory=dict)
    targets: Sequence[Target] = ()

    def markdown(self) -> str:
        """Targets, machine, and every table under the command that made it."""
        sections = [f"Measured {self.begun:%Y-%m-%d} by `{self.command}`.\n"]
        if self.targets:
            sections.append(f"### Targets\n\n{targets_table(self.targets).markdown()}")
        for name, run in self.runs.items():
            sections += [f"{part.markdown(name)}\n`{run.command}`\n" for part in run.parts]
            if run.error:
                sections.append(f"`{run.command}` failed: {run.error}\n")
        facts = "\n".join(f"- {name}: {value}" for name, value in self.machine.items())
        sections.append(f"### Machine and versions\n\n{facts}\n")
        return "\n".join(sections)

    def html(self) -> str:
        """The same with charts, in one file."""
        body = [
            f"<h1>tlsproxy: performance</h1><p>Measured {self.begun:%Y-%m-%d} by {_inline(f'`{self.command}`')}.</p>"
        ]
        if self.targets:
            body.append(f"<h2>Targets</h2>{_html_table(targets_table(self.targets))}")
        for name, run in self.runs.items():
            if run.error:
                body.append(f"<p><code>{html.escape(run.command)}</code> failed: {html.escape(run.error)}</p>")
            for part in run.parts:
                body.append(f"<h2>{html.escape(part.heading(name))}</h2><p>{_inline(part.note + part.warnings())}</p>")
                body += [_html_table(part.table), *part.charts, f"<p><code>{html.escape(run.command)}</code></p>"]
        facts = "".join(f"<li>{html.escape(name)}: {html.escape(value)}</li>" for name, value in self.machine.items())
        body.append(f"<h2>Machine and versions</h2><ul>{facts}</ul>")
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>tlsproxy: performance</title>'
            f"<style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
        )

    def as_json(self) -> dict[str, object]:
        """Every turn of every run."""
        return {
            "begun": self.begun.isoformat(),
            "command": self.command,
            "machine": dict(self.machine),
            "targets": [dataclasses.asdict(target) | {"met": target.met} for target in self.targets],
            "runs": {
                name: {"command": run.command, "error": run.error, "parts": [part.as_json() for part in run.parts]}
                for name, run in self.runs.items()
            },
        }

    def write(self, directory: Path) -> None:
        """Write report.md, report.html and data.json."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "report.md").write_text(f"# tlsproxy: performance\n\n{self.markdown()}")
        (directory / "report.html").write_text(self.html())
        (directory / "data.json").write_text(json.dumps(self.as_json()) + "\n")


def update_marked(path: Path, figures: str) -> None:
    """Put the figures between the markers in a Markdown file. Raises RuntimeError if it has not one pair of them."""
    before, begin, rest = path.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise RuntimeError(f"{path}: expected a line {_BEGIN} and a later line {_END}")
    path.write_text(f"{before}{_BEGIN}\n{figures}\n{_END}{after}")


def _inline(text: str) -> str:
    """Bold and code of Markdown, as HTML."""
    text = re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
