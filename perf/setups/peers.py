"""HAProxy, hitch and stunnel as Debian packages them."""

from __future__ import annotations

from perf.setups.base import GROUPS, Setup


class Haproxy(Setup):
    """HAProxy in HTTP mode, its key in a file. It has no way to a key in an HSM that Debian ships."""

    name = "haproxy"

    def prepare(self) -> tuple[list[str], dict[str, str]]:
        """Write haproxy.cfg."""
        configuration = self.directory / "haproxy.cfg"
        configuration.write_text(f"""
global
    nbthread {self.site.workers}
    ssl-default-bind-curves {GROUPS}
defaults
    mode http
    option http-ignore-probes
    timeout connect 5s
    timeout client 1h
    timeout server 1h
frontend perf
    bind 127.0.0.1:{self.port} ssl crt {self.site.credential.combined_file} alpn h2,http/1.1 backlog 4096
    default_backend app
backend app
    http-reuse always
    server app 127.0.0.1:{self.site.backend_port}
""")
        return ["haproxy", "-db", "-f", str(configuration)], {}


class Hitch(Setup):
    """hitch, its key in a file: TLS from the client, plain bytes to the upstream."""

    name = "hitch"

    def prepare(self) -> tuple[list[str], dict[str, str]]:
        """Write hitch.conf."""
        configuration = self.directory / "hitch.conf"
        configuration.write_text(f"""
frontend = "[127.0.0.1]:{self.port}"
backend = "[127.0.0.1]:{self.site.backend_port}"
pem-file = "{self.site.credential.combined_file}"
tls-protos = TLSv1.2 TLSv1.3
ecdh-curve = "{GROUPS}"
workers = {self.site.workers}
backlog = 4096
daemon = off
quiet = on
""")
        return ["hitch", f"--config={configuration}", "--user=root"], {}


class Stunnel(Setup):
    """stunnel, its key in a file: a thread for each connection, plain bytes to the upstream."""

    name = "stunnel"

    def key(self) -> str:
        """What says where the key is."""
        return f"key = {self.site.credential.key_file}"

    def prepare(self) -> tuple[list[str], dict[str, str]]:
        """Write stunnel.conf."""
        configuration = self.directory / "stunnel.conf"
        configuration.write_text(f"""
foreground = quiet
pid =
debug = err
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1
[perf]
accept = 127.0.0.1:{self.port}
connect = 127.0.0.1:{self.site.backend_port}
cert = {self.site.credential.chain_file}
{self.key()}
sslVersionMin = TLSv1.2
curves = {GROUPS}
""")
        return ["stunnel", str(configuration)], {}


class StunnelPkcs11(Stunnel):
    """The same with the key in the HSM, through the engine: the one peer whose threads sign at the same time."""

    name = "stunnel-pkcs11"
    needs_hsm = True

    def key(self) -> str:
        """By the engine, which OpenSSL's configuration has loaded."""
        return f"engineId = pkcs11\nkey = {self.site.hsms[0].uri}"

    def prepare(self) -> tuple[list[str], dict[str, str]]:
        """Add the engine's configuration."""
        command, _ = super().prepare()
        configuration = self.directory / "stunnel.conf"
        configuration.write_text("engine = pkcs11\n" + configuration.read_text())
        return command, self.site.hsms[0].engine_environment()
