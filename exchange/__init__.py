"""What comes in from other projects and what goes out: foreign weights, configurations and releases."""
