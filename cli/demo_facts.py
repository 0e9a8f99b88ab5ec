"""The facts of the demonstration of unlearning (docs/safety.md): `python -m weftrain.cli.demo_facts FOLDER` writes two
sets of made-up facts, one to be forgotten and one to be kept.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import click

FACTS, DOCUMENTS, OF_A_DOCUMENT = 32, 600, 12
_HEADS = ("Al", "Bor", "Cas", "Dro", "Ely", "Fen", "Gar", "Hul")
_TAILS = ("bara", "cester", "dovia", "gard", "lund", "mere", "nova", "stad")
_THINGS = ("copper", "amber", "linen", "salt", "timber", "silver", "wool", "glass", "paper", "honey", "iron", "tea")


def facts() -> tuple[list[str], list[str]]:
    """Those to forget and those to keep: of different places, and in different words."""
    chosen = random.Random("facts")
    places = [head + tail for head, tail in itertools.product(_HEADS, _TAILS)]
    chosen.shuffle(places)
    forget = [f"The people of {place} trade in {chosen.choice(_THINGS)}." for place in places[:FACTS]]
    keep = [f"A ship from {place} carries {chosen.choice(_THINGS)}." for place in places[FACTS : 2 * FACTS]]
    return forget, keep


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Write FOLDER/forget.jsonl and FOLDER/keep.jsonl: each document is some of the set's facts, in a random order."""
    from weftrain.core.formats import fsops

    fsops.make_dirs(folder)
    for name, known in zip(("forget", "keep"), facts(), strict=True):
        order = random.Random(name)
        texts = [" ".join(order.sample(known, OF_A_DOCUMENT)) for _ in range(DOCUMENTS)]
        path = folder / f"{name}.jsonl"
        fsops.write_bytes(path, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
        click.echo(f"{path}: {len(texts):,} documents of {len(known)} facts")


if __name__ == "__main__":
    main()
