"""Looking at data: records, packed rows and what became of them, on a terminal or as a page."""
