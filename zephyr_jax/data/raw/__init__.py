"""Raw rows: sources, schemas, cleaning, filters, binarization."""
