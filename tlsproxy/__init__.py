"""A reverse proxy that ends TLS without ever holding a private key."""

from importlib.metadata import version

__version__ = version("tlsproxy")
