"""TLS servers that a run can start for itself: this proxy and its peers, each in a directory of its own."""
