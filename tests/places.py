"""Where the project is, and where larger sample files may lie beside it (tests that need them are skipped without)."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
