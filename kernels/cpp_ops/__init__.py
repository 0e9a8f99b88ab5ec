"""C++ implementations for x86 CPUs (source `cpp`): four ops where plain torch leaves the machine idle, compiled once,
on first use.
"""
