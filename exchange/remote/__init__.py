"""Runs in object stores: a store behind fsspec, the mirror of a run, and folders opened by their address."""
