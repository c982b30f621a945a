"""This proxy: with the soft token and with HSMs, speaking HTTP or passing bytes on."""

from __future__ import annotations

import abc
import subprocess
import sys

from perf.setups.base import PROXY_ROLE, Setup
from perf.setups.slow_hsm import KEY_LABEL, PIN


class Tlsproxy(Setup):
    """One listener, one certificate, one upstream."""

    mode = "http"

    @abc.abstractmethod
    def tokens(self) -> dict[str, str]:
        """Make what is missing; return each token's YAML by its name."""

    def prepare(self) -> tuple[list[str], dict[str, str]]:
        """Write config.yaml."""
        tokens = self.tokens()
        listed = "\n".join(f"    - {yaml}" for yaml in tokens.values())
        goal = "upstream: app"
        if self.mode == "http":
            goal = 'http2: true\n    routes: [{host: "*", path: /, upstream: app}]'
        configuration = self.directory / "config.yaml"
        configuration.write_text(f"""
workers: {self.site.workers}
runtime_dir: run
log: {{level: error, format: text}}
hsm:
  tokens:
{listed}
certificates:
  - {{name: perf, chain_file: {self.site.credential.chain_file}, key: {KEY_LABEL}, tokens: [{", ".join(tokens)}]}}
listeners:
  - address: 127.0.0.1:{self.port}
    mode: {self.mode}
    certificates: [perf]
    {goal}
upstreams:
  - {{name: app, servers: [{{address: 127.0.0.1:{self.site.backend_port}}}]}}
""")
        return [sys.executable, "-m", "tlsproxy", "run", "--config", str(configuration)], {}

    def role(self, command_line: str) -> str:
        """Proxy and HSM workers have their module in the command line; what is left is the supervisor."""
        if "hsm.worker" in command_line:
            return "hsm"
        return PROXY_ROLE if "tlsproxy.serve.worker" in command_line else "supervisor"


class TlsproxySoft(Tlsproxy):
    """With the embedded soft token."""

    name = "tlsproxy"

    def tokens(self) -> dict[str, str]:
        """Import the key into a new token file."""
        pin_file, token = self.directory / "token.pin", self.directory / "token"
        pin_file.touch(mode=0o600)
        pin_file.write_text(PIN)
        hsm = [sys.executable, "-m", "hsm.cli"]
        at = ["--token", str(token), "--pin-file", str(pin_file)]
        key = ["--label", KEY_LABEL, "--key", str(self.site.credential.key_file)]
        subprocess.run([*hsm, "init", *at], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([*hsm, "import", *at, *key], check=True, stdout=subprocess.DEVNULL)
        return {"perf": "{name: perf, kind: soft, path: token, pin_file: token.pin, workers: 1}"}


class TlsproxyTcp(TlsproxySoft):
    """The same, passing bytes to the upstream and back."""

    name = "tlsproxy-tcp"
    mode = "tcp"


class TlsproxyPkcs11(Tlsproxy):
    """With all HSMs of the run."""

    name = "tlsproxy-pkcs11"
    needs_hsm = True

    def tokens(self) -> dict[str, str]:
        """Each by its label."""
        return {
            hsm.label: f"{{name: {hsm.label}, kind: pkcs11, module: {hsm.module}, token_label: {hsm.label}, "
            f"pin_file: {hsm.pin_file}, sessions: {self.site.sessions}}}"
            for hsm in self.site.hsms
        }
