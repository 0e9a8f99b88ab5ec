"""Measuring training throughput."""
