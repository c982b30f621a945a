"""The only package that does I/O: supervisor, proxy workers, listeners, connections, upstreams, admin port."""
