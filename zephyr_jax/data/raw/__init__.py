"""Raw rows: readers, schemas, cleaning, filters, binarization."""
