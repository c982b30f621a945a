from __future__ import annotations

from pathlib import Path

import pytest

from hsm.backends.soft import SoftBackend
from hsm.errors import PinRefused, TokenFileError
from hsm.keys import is_signature_valid, load_public_key
from hsm.messages import KeyType
from tests.tokens import CERTIFICATE_VERIFY, PIN, make_soft_token


def test_signs_with_every_scheme_of_every_kind_of_key(tmp_path: Path) -> None:
    files = make_soft_token(tmp_path, {kind.value: kind for kind in KeyType})
    backend = SoftBackend(str(files.path), bytearray(PIN.encode()))
    (signer,) = backend.signers
    assert [key.label for key in backend.keys] == [kind.value for kind in KeyType]
    for key in backend.keys:
        for scheme in key.schemes:
            signature = signer.sign(key.number, scheme, CERTIFICATE_VERIFY)
            assert is_signature_valid(load_public_key(key.public_key), scheme, CERTIFICATE_VERIFY, signature)
    backend.close()


def test_opens_with_the_right_pin_only(tmp_path: Path) -> None:
    files = make_soft_token(tmp_path)
    with pytest.raises(PinRefused):
        SoftBackend(str(files.path), b"guess")
    with pytest.raises(TokenFileError):
        SoftBackend(str(tmp_path / "other"), PIN.encode())
