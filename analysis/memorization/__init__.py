"""Which training sequences a checkpoint repeats."""
