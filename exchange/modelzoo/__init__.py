"""Cerebras Model Zoo files: params.yaml and checkpoints."""
