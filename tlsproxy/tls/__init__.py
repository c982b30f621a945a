"""TLS as bytes in, events out: OpenSSL's engine with the private-key signature suspended."""
