"""Planning a run for TPUs that are not here: compiled by their own compiler, then read."""
