"""Every server that a run can start, by name, and how the servers of a run are brought up together."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from hsm.messages import KeyType
from perf.setups.base import Setup, Site, make_credential
from perf.setups.nginx import Backend, NginxKeyFile, NginxPkcs11
from perf.setups.peers import Haproxy, Hitch, Stunnel, StunnelPkcs11
from perf.setups.python_peers import HypercornHttpx, Mitmdump
from perf.setups.slow_hsm import SlowHsm
from perf.setups.tlsproxy import TlsproxyPkcs11, TlsproxySoft, TlsproxyTcp

SETUPS: dict[str, type[Setup]] = {
    setup.name: setup
    for setup in (
        TlsproxySoft,
        TlsproxyTcp,
        TlsproxyPkcs11,
        NginxKeyFile,
        NginxPkcs11,
        Haproxy,
        Hitch,
        Stunnel,
        StunnelPkcs11,
        Mitmdump,
        HypercornHttpx,
    )
}


class Servers(list[Setup]):
    """The running servers of one site, in the order asked for."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    def set_hsm_latency(self, seconds: float) -> None:
        """Make every HSM of the site take so much longer for a signature."""
        for hsm in self.site.hsms:
            hsm.set_latency(seconds)


@contextlib.contextmanager
def running(
    names: Sequence[str], key_type: KeyType, *, workers: int = 1, tokens: int = 1, sessions: int = 64
) -> Iterator[Servers]:
    """Start these servers, the back end behind them and, if one of them needs any, `tokens` HSMs with the key.

    Raises RuntimeError if one of them does not come up.
    """
    setups = [SETUPS[name] for name in names]
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="perf-")))
        credential = make_credential(directory / "credential", key_type)
        needed = tokens if any(setup.needs_hsm for setup in setups) else 0
        labels = [f"perf-{number}" for number in range(needed)]
        hsms = [SlowHsm(directory / label, credential.key_file, label) for label in labels]
        backend = Backend(Site(directory, credential, 0, (), 1, sessions))
        site = Site(directory, credential, backend.port, hsms, workers, sessions)
        stack.enter_context(backend)
        servers = Servers(site)
        for setup in setups:
            servers.append(stack.enter_context(setup(site)))
        yield servers
