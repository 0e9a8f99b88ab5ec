"""C++ for x86 CPUs (source `cpp`): five ops that plain torch leaves slow, compiled once, on first use."""
