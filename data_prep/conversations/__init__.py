"""Conversations as training data: reading them, rendering them by a chat template, and marking what bears loss."""
