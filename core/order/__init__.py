"""Which sample comes when: pure functions of seeds and counts."""
