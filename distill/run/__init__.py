"""A run as a folder: manifests, tables, journals, rows, and what is said on the way. Knows no stage, imports no torch."""
