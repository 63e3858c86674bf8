"""Records, token masks and packed rows to look at."""
