"""The commands that have no module of their own: flags to one call each."""
