"""What holds the keys of a token: one module for each kind, used only inside a worker process."""
