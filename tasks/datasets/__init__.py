"""Data sets: one reader per format, and their place in the store."""
