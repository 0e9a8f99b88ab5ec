"""Reads runs, checkpoints and machines; never imports a backend (it is handed one)."""
