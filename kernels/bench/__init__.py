"""Measuring kernels: how fast each implementation is, against what the machine could do."""
