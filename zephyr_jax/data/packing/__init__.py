"""Token ids to packed rows on disk, and from there to batches."""
