"""nginx: as the back end of every run, with its key in a file, and with its key in an HSM through the engine."""

from __future__ import annotations

import abc
import socket

from perf.setups.base import GROUPS, Setup

BULK_BYTES = 10_000_000
SMALL_BODY = b"x" * 99 + b"\n"


class Nginx(Setup):
    """One server, no access log, connections that live on."""

    @abc.abstractmethod
    def server(self) -> str:
        """The `server` block, and whatever else stands at its level."""

    def prepare(self) -> tuple[list[str], dict[str, str]]:
        """Write nginx.conf."""
        configuration = self.directory / "nginx.conf"
        paths = "".join(
            f"{kind}_temp_path {self.directory}/{kind};"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        # Started as root its workers would become www-data, who may neither read the directory nor open the token.
        configuration.write_text(f"""
            user root; daemon off; worker_processes {self.site.workers};
            pid {self.directory}/nginx.pid; error_log stderr error;
            events {{ worker_connections 15000; }}
            http {{
                access_log off; keepalive_requests 1000000000; {paths}
                {self.server()}
            }}
        """)
        return ["nginx", "-p", str(self.directory), "-c", str(configuration)], {}


class Backend(Nginx):
    """Plain HTTP: 100 bytes at `/`, 10 MB at `/bulk`; `/sink` answers once it has a body of up to 16 MiB."""

    name = "backend"

    def server(self) -> str:
        """Small answers from memory, large ones by sendfile().

        nginx answers by itself before it has read a body; before it passes a request on, it reads all of it.
        """
        (self.directory / "bulk").write_bytes(bytes(BULK_BYTES))
        return f"""
            server {{
                listen 127.0.0.1:{self.port} backlog=4096; root {self.directory}; sendfile on; keepalive_timeout 1h;
                location / {{ return 200 "{SMALL_BODY.decode().strip()}\\n"; }}
                location = /bulk {{ }}
                location = /sink {{
                    client_max_body_size 16m; client_body_buffer_size 16m; proxy_pass_request_body off;
                    proxy_method GET; proxy_set_header Content-Length ""; proxy_pass http://127.0.0.1:{self.port}/;
                }}
            }}
        """

    def _check(self, connection: socket.socket) -> None:
        """That it accepts is enough."""


class NginxKeyFile(Nginx):
    """A reverse proxy with the key in a file, and so in its memory: what most of the world runs."""

    name = "nginx"

    def certificate_key(self) -> str:
        """The argument of ssl_certificate_key."""
        return str(self.site.credential.key_file)

    def server(self) -> str:
        """Tickets, ciphers and buffers as by default; keep-alive to the upstream; nothing spooled to disk."""
        return f"""
            upstream app {{ server 127.0.0.1:{self.site.backend_port}; keepalive 64; keepalive_requests 1000000000; }}
            server {{
                listen 127.0.0.1:{self.port} ssl http2 backlog=4096;
                ssl_certificate {self.site.credential.chain_file}; ssl_certificate_key {self.certificate_key()};
                ssl_protocols TLSv1.2 TLSv1.3; ssl_ecdh_curve {GROUPS};
                location / {{
                    proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection "";
                    proxy_set_header Host $host; proxy_max_temp_file_size 0;
                    proxy_request_buffering off; client_max_body_size 0;
                }}
            }}
        """


class NginxPkcs11(NginxKeyFile):
    """The same with the key in the HSM, through Debian's libengine-pkcs11-openssl."""

    name = "nginx-pkcs11"
    needs_hsm = True

    def certificate_key(self) -> str:
        """By the engine."""
        return f'"engine:pkcs11:{self.site.hsms[0].uri}"'

    def prepare(self) -> tuple[list[str], dict[str, str]]:
        """Add the engine's configuration."""
        command, _ = super().prepare()
        return command, self.site.hsms[0].engine_environment()
