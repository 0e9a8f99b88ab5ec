"""Names, roles and counts of parameters, and the FLOP formula, against the published numbers."""

from __future__ import annotations


