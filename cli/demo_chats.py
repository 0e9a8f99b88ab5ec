"""The demonstration of docs/chat-demo.md: `python -m weftrain.cli.demo_chats make FOLDER` writes its conversations and
preferences, and `… score DATASET RUN…` says how often models keep to the rule of the preferred answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from weftrain.cli.arguments import NamedPath

if TYPE_CHECKING:
    from weftrain.core.formats.shard_set import ShardSet


@click.group()
def main() -> None:
    """Conversations and preferences made of the embedded corpus, and a score of models that learned them."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def make(folder: Path) -> None:
    """Write FOLDER/conversations.jsonl and FOLDER/preferences.jsonl."""
    from weftrain.core.formats import fsops
    from weftrain.data_prep.demo_chats import demo_records

    fsops.make_dirs(folder)
    for name, records in zip(("conversations", "preferences"), demo_records(), strict=True):
        path = folder / f"{name}.jsonl"
        fsops.write_bytes(path, "".join(json.dumps(record) + "\n" for record in records).encode())
        click.echo(f"{path}: {len(records):,} records")


@main.command()
@click.argument("dataset", type=NamedPath(path_type=Path, exists=True))
@click.argument("runs", type=NamedPath(path_type=Path, exists=True), nargs=-1, required=True)
@click.option("--prompts", type=click.IntRange(min=1), default=64, show_default=True, help="Prompts to answer.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=48, show_default=True, help="Length of answers.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a model instead of lines.")
def score(dataset: Path, runs: tuple[Path, ...], prompts: int, max_new_tokens: int, as_json: bool) -> None:
    """Score RUNS (or checkpoints' folders) on the held-out pairs of DATASET: how many chosen answers are likelier than
    the rejected, by how much, and how many answers drawn at temperature 1 obey the rule.
    """
    from weftrain.analysis.evaluation.generation import Generator
    from weftrain.analysis.evaluation.pair_scores import pair_log_probabilities
    from weftrain.cli.opened_model import opened_model
    from weftrain.core.formats.dataset import TOKENIZER
    from weftrain.core.formats.shard_set import open_set
    from weftrain.data_prep.demo_chats import obeys
    from weftrain.data_prep.tokens.markers import recorded_markers
    from weftrain.data_prep.tokens.tokenization import load_encoder

    manifest, shards = open_set(dataset, "heldout")
    encoder = load_encoder(dataset / TOKENIZER, recorded_markers(manifest), engine="tokenizers")
    asked = _prompts(shards, min(prompts, shards.num_rows))
    stops = frozenset(encoder.control_ids.tolist())
    for run in runs:
        model = opened_model(run, (), "cpu").load()
        pairs = pair_log_probabilities(model, shards, 32)
        generator = Generator(model)
        answers = generator.generate(asked, max_new_tokens, temperature=1.0, stop_ids=stops)
        texts = [encoder.decode(np.array(answer, np.int64)) for answer in answers]
        found = {
            "model": str(run),
            "pairs": len(pairs),
            "chosen_likelier": float((pairs[:, 0] > pairs[:, 1]).mean()),
            "log_ratio": float((pairs[:, 0] - pairs[:, 1]).mean()),
            "answers": len(texts),
            "obey": sum(map(obeys, texts)) / len(texts),
        }
        if as_json:
            click.echo(json.dumps(found))
            continue
        click.echo(
            f"{run}: of {len(pairs)} held-out pairs the chosen answer is likelier in {found['chosen_likelier']:.1%}, "
            f"log-ratio {found['log_ratio']:.2f} nats; of {len(texts)} answers {found['obey']:.1%} obey the rule"
        )
        click.echo(f"  {texts[0]!r}")


def _prompts(shards: ShardSet, count: int) -> list[list[int]]:
    """The prompts of the first pairs: the ids of the chosen side before the first that bears loss."""
    ids, mask = shards.rows(np.arange(count))
    assert mask is not None
    return [row[: int(np.argmax(bears)) + 1].tolist() for row, bears in zip(ids, mask, strict=True)]


if __name__ == "__main__":
    main()
