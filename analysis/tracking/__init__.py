"""Experiment trackers: they read a run's folder and send what is new in it to TensorBoard or another place."""
