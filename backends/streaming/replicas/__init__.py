"""Runs of several processes: how they find each other, what they send, and what stores divided over them need."""
