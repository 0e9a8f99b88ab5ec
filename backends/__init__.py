"""Backends: one file or folder each, found by its name (see README.md here and core/backend.py for the protocol)."""
