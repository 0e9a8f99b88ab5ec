"""What lies on disk: its layout, and reading and writing it without trust."""
