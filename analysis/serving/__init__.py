"""Answering requests with a model: continuous batching over a key-value cache, and OpenAI's protocol on loopback."""
