"""Checkpoints at public tasks, and programs that they wrote, run in a sandbox."""
