"""A run as a folder that a stranger can verify, replay and continue."""
