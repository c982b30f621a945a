"""HTTP/1.1 as bytes in, events out: messages, forwarding rules and routing."""
