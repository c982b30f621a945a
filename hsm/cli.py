"""The `hsm` command: tokens and their keys, for the administrator who has the PIN.

Exit codes: 0 done; 2 bad usage, a refused PIN or an unfit file; 1 the token or the system failed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from hsm.backends.base import Backend
from hsm.backends.pkcs11 import Pkcs11Backend, generate_key_on_token
from hsm.backends.pkcs11_keys import TokenKey
from hsm.backends.pkcs11_token import TokenSelector
from hsm.backends.soft import SoftBackend
from hsm.errors import HsmError, KeyNotFound, TokenError
from hsm.keyreference import KeyReference
from hsm.keys import PrivateKey, generate_private_key
from hsm.messages import KeyInfo, KeyType
from hsm.metricstore import MetricStore
from hsm.pin import create_pin_file, read_pin, wipe
from hsm.pki import build_csr
from hsm.seal import forbid_dumps
from hsm.vault import Vault, read_public_keys

_MAX_PEM_BYTES = 1 << 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        forbid_dumps()
        options.run(options)
    except TokenError as error:
        return _fail(str(error), 1)
    except (HsmError, ValueError) as error:
        return _fail(str(error), 2)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 1)
    return 0


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"hsm: {message}\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hsm", description="Make tokens, keys and certificate requests.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    soft = argparse.ArgumentParser(add_help=False)
    soft.add_argument("--token", metavar="FILE", required=True, help="the soft token's file")
    token = argparse.ArgumentParser(add_help=False)
    kind = token.add_mutually_exclusive_group(required=True)
    kind.add_argument("--token", metavar="FILE", help="the soft token's file")
    kind.add_argument("--module", metavar="FILE", help="the library of a PKCS#11 token")
    token.add_argument("--token-label", metavar="LABEL", help="which of the library's tokens: by its label,")
    token.add_argument("--token-serial", metavar="SERIAL", help="by its serial number,")
    token.add_argument("--slot", type=int, metavar="NUMBER", help="or by the slot it is in")
    pin = _pin_arguments(required=True)
    label = argparse.ArgumentParser(add_help=False)
    label.add_argument("--label", required=True, help="the key's label")

    init = commands.add_parser("init", parents=[soft, pin], help="make a soft token, and its PIN file if there is none")
    init.set_defaults(run=_init)
    keygen = commands.add_parser("keygen", parents=[token, pin, label], help="make a key on the token")
    keygen.add_argument("--type", required=True, choices=[kind.value for kind in KeyType], help="the kind of key")
    keygen.set_defaults(run=_keygen)
    import_ = commands.add_parser("import", parents=[soft, pin, label], help="store an existing key on a soft token")
    import_.add_argument("--key", metavar="FILE", required=True, help="the private key: PEM, not encrypted")
    import_.set_defaults(run=_import)
    list_ = commands.add_parser(
        "list",
        parents=[token, _pin_arguments(required=False)],
        help="list the token's keys (a soft token needs no PIN)",
    )
    list_.set_defaults(run=_list)
    csr = commands.add_parser("csr", parents=[token, pin, label], help="make a certificate request signed by the key")
    csr.add_argument("--subject", required=True, help="an RFC 4514 name: CN=www.example.com,O=Example")
    csr.add_argument(
        "--dns", metavar="NAME", action="append", default=[], help="a DNS name to certify; may be repeated"
    )
    csr.add_argument("--out", metavar="FILE", help="where the request goes (default: standard output)")
    csr.set_defaults(run=_csr)
    delete = commands.add_parser("delete", parents=[soft, pin, label], help="delete a soft token's key for good")
    delete.set_defaults(run=_delete)
    return parser


def _pin_arguments(*, required: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    source = parser.add_mutually_exclusive_group(required=required)
    source.add_argument("--pin-file", metavar="FILE", help="a file with the token's PIN, closed to others")
    source.add_argument("--pin-env", metavar="NAME", help="an environment variable with the token's PIN")
    return parser


def _init(options: argparse.Namespace) -> None:
    with contextlib.ExitStack() as undo:
        if options.pin_file is not None and not os.path.lexists(options.pin_file):
            create_pin_file(options.pin_file)
            undo.callback(os.unlink, options.pin_file)
        with _pin(options) as pin:
            Vault.create(options.token, pin)
        undo.pop_all()
    print(f"{options.token}: made, without keys")


def _keygen(options: argparse.Namespace) -> None:
    key_type = KeyType(options.type)
    if options.module is None:
        _print_key(_open_vault(options).add(options.label, generate_private_key(key_type)))
        return
    with _pin(options) as pin:
        _print_key(generate_key_on_token(options.module, _selector(options), pin, options.label, key_type))


def _import(options: argparse.Namespace) -> None:
    _print_key(_open_vault(options).add(options.label, _read_private_key(options.key)))


def _list(options: argparse.Namespace) -> None:
    if options.module is None:
        for key in read_public_keys(options.token):
            _print_key(key)
        return
    if options.pin_file is None and options.pin_env is None:
        raise ValueError("expected --pin-file or --pin-env: a PKCS#11 token shows its keys to who is logged in")
    with _open_backend(options) as backend:
        for key in backend.keys:
            _print_key(key)


@contextlib.contextmanager
def _open_backend(options: argparse.Namespace, *keys: str) -> Iterator[Backend]:
    backend: Backend
    with _pin(options) as pin:
        if options.module is None:
            backend = SoftBackend(options.token, pin)
        else:
            backend = Pkcs11Backend(
                options.module,
                _selector(options),
                pin,
                sessions=1,
                key_references=keys,
                name=options.module,
                store=MetricStore(),
            )
    try:
        yield backend
    finally:
        backend.close()


def _selector(options: argparse.Namespace) -> TokenSelector:
    selector = TokenSelector(options.token_label, options.token_serial, options.slot)
    if selector == TokenSelector():
        raise ValueError("expected --token-label, --token-serial or --slot with --module; got none")
    return selector


def _csr(options: argparse.Namespace) -> None:
    with _open_backend(options, options.label) as backend:
        _write_csr(options, backend)


def _write_csr(options: argparse.Namespace, backend: Backend) -> None:
    wanted = KeyReference.parse(options.label)
    for key in backend.keys:
        if wanted.matches(key):
            break
    else:
        raise KeyNotFound(f"{options.token or options.module}: no key {options.label!r}")
    (signer,) = backend.signers
    request = build_csr(
        key.public_key, lambda scheme, tbs: signer.sign(key.number, scheme, tbs), options.subject, options.dns
    )
    if options.out is None:
        sys.stdout.write(request.decode())
    else:
        with open(options.out, "wb") as stream:
            stream.write(request)


def _delete(options: argparse.Namespace) -> None:
    _open_vault(options).delete(options.label)


def _open_vault(options: argparse.Namespace) -> Vault:
    with _pin(options) as pin:
        return Vault.open(options.token, pin)


@contextlib.contextmanager
def _pin(options: argparse.Namespace) -> Iterator[bytearray]:
    pin = read_pin(options.pin_file, options.pin_env)
    try:
        yield pin
    finally:
        wipe(pin)


def _read_private_key(path: str) -> PrivateKey:
    """Return the key in a PEM file. Raises ValueError, whose message says nothing of the content, and OSError."""
    with open(path, "rb") as stream:
        pem = stream.read(_MAX_PEM_BYTES)
    try:
        key = load_pem_private_key(pem, None)
    except TypeError:
        raise ValueError(f"{path}: expected a private key that is not encrypted; this one is") from None
    except ValueError:
        raise ValueError(f"{path}: expected a private key, PEM; found none") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise ValueError(f"{path}: expected an EC or RSA key; got one of another kind")
    return key


def _print_key(key: KeyInfo | TokenKey) -> None:
    """Print label, type, id and the SHA-256 of the public key, by which a certificate's key can be recognised."""
    print(f"{key.label}\t{key.key_type.value}\t{key.id.hex()}\t{hashlib.sha256(key.public_key).hexdigest()}")


if __name__ == "__main__":
    sys.exit(main())
