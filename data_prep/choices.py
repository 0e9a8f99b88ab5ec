"""Choices of a preparation that options, recipes and settings share. Imports nothing, so that a help page is quick."""

from __future__ import annotations

from typing import Literal

Packing = Literal["concatenate", "best_fit"]
Order = Literal["shuffled", "as_read"]
Engine = Literal["auto", "tokenizers", "gigatoken"]
TokensDtype = Literal["uint16", "uint32", "int32", "int64"]
STAGE_NAMES = ("sample", "tokenize", "merge", "order", "write")
NOT_STATED = "not stated"  # the licence that nobody named
