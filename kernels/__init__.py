"""Kernels: one op = one reference and N implementations. This folder imports nothing else of weftrain's."""
