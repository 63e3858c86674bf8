"""Generation with a key-value cache: batches, a chat in the terminal, an HTTP server."""
