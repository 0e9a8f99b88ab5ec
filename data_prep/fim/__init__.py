"""Fill-in-the-middle transformations."""
