"""A run's folder: its recipe, ledger, measurements and branches."""
