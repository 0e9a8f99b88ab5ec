"""C++ for x86 CPUs (source `cpp`): six ops that plain torch leaves slow, compiled once, on first use."""
