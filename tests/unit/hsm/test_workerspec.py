from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from hsm.workerspec import WorkerSpec, WorkerSpecError

SOFT = WorkerSpec(
    token="local", kind="soft", path="/t", pin_file="/p", listen_fd=4, status_fd=5, metrics_fd=6, allowed_uid=1000
)
PKCS11 = WorkerSpec(
    token="hsm-a", kind="pkcs11", module="/m.so", token_label="a", pin_env="P", listen_fd=4, status_fd=5, allowed_uid=0
)


@pytest.mark.parametrize("spec", [SOFT, PKCS11, replace(PKCS11, slot=0, token_label=None, sessions=64)])
def test_what_is_written_is_read_again(spec: WorkerSpec) -> None:
    assert WorkerSpec.from_json(spec.to_json()) == spec
    assert "\n" not in spec.to_json()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sessions": 0}, "sessions: expected 1 to 1024; got 0"),
        ({"sessions": True}, "sessions: expected int; got True"),
        ({"sessions": 1.5}, "sessions: expected int; got 1.5"),
        ({"listen_fd": -1}, "listen_fd: expected 0 to"),
        ({"listen_fd": "4"}, "listen_fd: expected int; got '4'"),
        ({"allowed_uid": 1 << 32}, "allowed_uid: expected 0 to"),
        ({"max_in_flight": 0}, "max_in_flight: expected 1 to 1024"),
        ({"hang_limit_s": 0}, "hang_limit_s: expected 0.1 to"),
        ({"hang_limit_s": float("nan")}, "hang_limit_s: expected 0.1 to"),
        ({"kind": "cloud"}, "kind: expected 'soft' or 'pkcs11' or 'awskms'; got 'cloud'"),
        ({"kind": ["soft"]}, "kind: expected 'soft' or 'pkcs11'"),
        ({"kind": "pkcs11"}, "module: expected the PKCS#11 library"),
        ({"kind": "pkcs11", "module": "/m.so"}, "token_label, token_serial, slot: expected at least one"),
        ({"path": None}, "path: expected the token's file; got nothing"),
        ({"pin_env": "P"}, "pin_file, pin_env: expected exactly one of them"),
        ({"pin_file": None}, "pin_file, pin_env: expected exactly one of them"),
        ({"pin": "1234"}, "pin: unknown field"),
    ],
    ids=str,
)
def test_names_the_field_that_is_wrong(change: dict[str, Any], expected: str) -> None:
    document = json.loads(SOFT.to_json()) | change
    with pytest.raises(WorkerSpecError) as caught:
        WorkerSpec.from_json(json.dumps(document))
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("missing", ["token", "kind", "listen_fd", "status_fd", "allowed_uid"])
def test_names_the_field_that_is_missing(missing: str) -> None:
    document = json.loads(SOFT.to_json())
    del document[missing]
    with pytest.raises(WorkerSpecError, match=f"{missing}: expected a value; got nothing"):
        WorkerSpec.from_json(json.dumps(document))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"1", b"\xff", b"[" * 60_000])
def test_refuses_what_is_no_json_object(text: bytes) -> None:
    with pytest.raises(WorkerSpecError, match="expected"):
        WorkerSpec.from_json(text)
