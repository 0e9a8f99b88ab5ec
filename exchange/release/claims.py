"""What a release claims and how each claim is covered: the table that ends `weftrain verify` and `weftrain replay`.

A claim that nothing covers stays in the table as `not covered`, with what would cover it. A reader then need not know
this program to know what was taken on trust.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

# hash: the bytes are those that release.json, the ledger or a manifest names. derivation: it was computed again from
# what else is there, and is equal. replay: it was trained or measured again. signature: by the key that is named.
Cover = Literal["hash", "derivation", "replay", "signature", "not covered"]

TEXTS = "tokens of the texts"
STATES = "weights and moments of the checkpoints"
LOSSES = "losses, gradient norms, skipped steps"
HELD_OUT = "losses on held-out sets"
BEGINNING = "state that it began from"
SCORES = "scores, evaluations, memorization"
DATASET_SCORES = "scores of datasets while it trained"
PROVENANCE = "statements of provenance"


@dataclass(frozen=True)
class Claim:
    """name: what is claimed. detail: over what, or why it is not covered and what would cover it."""

    name: str
    cover: Cover
    detail: str


def covered_by(claims: Iterable[Claim], others: Iterable[Claim]) -> tuple[Claim, ...]:
    """The claims of `verify`, with those that a replay or the release's parents have covered in their places."""
    found = {claim.name: claim for claim in others}
    return tuple(found.get(claim.name, claim) for claim in claims)
