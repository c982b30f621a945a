"""A reverse proxy that ends TLS without ever holding a private key."""
