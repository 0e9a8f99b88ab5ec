"""Input files as they lie: paths and addresses, folders and patterns, compression, standard input."""
