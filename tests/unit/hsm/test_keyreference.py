from __future__ import annotations

import pytest

from hsm.keyreference import KeyReference
from hsm.messages import KeyInfo, KeyType

KEY = KeyInfo(0, "www key", KeyType.ECDSA_P256, b"spki", b"\x01\xff")


@pytest.mark.parametrize(
    "text",
    [
        "www key",
        "pkcs11:object=www%20key",
        "pkcs11:id=%01%FF",
        "pkcs11:object=www%20key;id=%01%ff;type=private",
    ],
)
def test_names_the_key(text):
    assert KeyReference.parse(text).matches(KEY)


@pytest.mark.parametrize(
    "text", ["www", "pkcs11:object=www", "pkcs11:id=%01", "pkcs11:object=www%20key;id=%02", "pkcs11:object=x;id=%01%ff"]
)
def test_names_another_key(text):
    assert not KeyReference.parse(text).matches(KEY)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty string"),
        ("pkcs11:", "got ''"),
        ("pkcs11:type=private", "got neither"),
        ("pkcs11:token=a;object=b", "got 'token=a'"),
        ("pkcs11:object=a;object=b", "got 'object=b'"),
        ("pkcs11:object=", "got 'object='"),
        ("pkcs11:object=a?pin-value=1", "expected no query"),
        ("pkcs11:id=%1", "two hexadecimal digits"),
        ("pkcs11:id=%zz", "two hexadecimal digits"),
        ("pkcs11:object=%ff", "utf-8"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        KeyReference.parse(text)
