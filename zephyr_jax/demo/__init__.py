"""The demo: the whole pipeline on a small world that the package makes itself."""
