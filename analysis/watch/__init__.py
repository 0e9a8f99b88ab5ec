"""Watching runs: webhooks for their alerts, a live view in the terminal, and the report in a browser."""
