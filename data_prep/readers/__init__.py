"""Reading input files: one module a format, and the registry of them."""
