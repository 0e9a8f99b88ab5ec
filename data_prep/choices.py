"""Choices of a preparation that options, recipes and settings share. Imports nothing, so that a help page is quick."""

from __future__ import annotations

from typing import Literal

# One stream cut into rows; rows filled with whole documents; or each document in rows of its own.
Packing = Literal["concatenate", "best_fit", "separate"]
Order = Literal["shuffled", "as_read"]
Engine = Literal["auto", "tokenizers", "gigatoken"]
TokensDtype = Literal["uint16", "uint32", "int32", "int64"]
# What of a conversation bears loss: the assistant's answers; the last of them; or every token.
Loss = Literal["answers", "last", "all"]
# What becomes of a conversation that is longer than a row: its end is cut off; its turns are divided over several rows,
# each with the system message; or it is a failure.
TooLong = Literal["cut", "split", "drop"]
# Rows of preferences: both answers of a pair, for objective dpo; or the chosen one alone, a row each, for next_token.
PreferenceRows = Literal["pairs", "chosen"]
# Which end of a prompt that is too long stays.
KeepPrompt = Literal["end", "start"]
STAGE_NAMES = ("sample", "tokenize", "merge", "order", "write")
NOT_STATED = "not stated"  # the licence that nobody named
