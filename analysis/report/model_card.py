"""The model cards of a release: README.md files with the Hugging Face hub's front matter, entirely from the record.

A score is the record of an evaluation that names its checkpoint's root. Recipe, ledger, datasets and evaluations may
hold any text, so every value passes `plain`, which removes markup and HTML. The release's card names no library, since
none opens that folder; each revision's card lies beside weights that transformers loads.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import yaml

from weftrain.analysis.evaluation.records import read_records, records_folder
from weftrain.core.config import Recipe
from weftrain.core.errors import printable
from weftrain.core.model_config import in_words
from weftrain.core.objectives_section import MEASURES
from weftrain.core.parameters import parameter_specs
from weftrain.core.run.lineage import Lineage
from weftrain.core.run.metrics import effective_records, heldout_label
from weftrain.exchange.huggingface.config import layout_of
from weftrain.exchange.huggingface.files import MODELING
from weftrain.exchange.release.release import CARD_MARK, Release


def model_card(run: Path, release: Release, line: Lineage, recipe: Recipe) -> str:
    """The card of the release of the run in `run`, as Markdown."""
    parts = [
        _front_matter(release),
        f"# {plain(release.name)}\n",
        f"{plain(recipe.description)}\n",
        *_facts(release, line, recipe),
        *_training(run, line, recipe),
    ]
    parts += [*_links(release), *_scores(run), *_use(release), f"\n{CARD_MARK}"]
    return "\n".join(parts) + "\n"


def revision_card(release: Release, name: str, step: int, recipe: Recipe) -> str:
    """The card of one revision's folder, which transformers opens."""
    code = layout_of(recipe.model) == "crystalcoder"
    trust = ", trust_remote_code=True" if code else ""
    lines = [
        _front_matter(release, library_name="transformers"),
        f"# {plain(release.name)}, {plain(name)}\n",
        f"The weights after step {step:,}, in {release.weights_dtype}.\n",
        "```python\nfrom transformers import AutoModelForCausalLM\n",
        f'model = AutoModelForCausalLM.from_pretrained("."{trust})\n```\n',
    ]
    if code:
        lines.append(
            f"`trust_remote_code` runs `{MODELING}` of this folder, which weftrain wrote and `weftrain verify` "
            "compares.\n"
        )
    return "\n".join([*lines, f"{CARD_MARK}\n"])


def plain(value: Any) -> str:
    """A value as one line of Markdown that shows its text and nothing else."""
    text = html.escape(printable(" ".join(str(value).split())), quote=False)
    text = re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", text)
    return re.sub(r"^(?=[-+=])", r"\\", text)  # at the beginning of a line: a list, a rule, a heading


def _front_matter(release: Release, **more: str) -> str:
    fields = {**hub_licence(release.licences.weights), **more, "pipeline_tag": "text-generation"}
    return f"---\n{yaml.safe_dump(fields, sort_keys=True)}---\n"


def hub_licence(expression: str) -> dict[str, str]:
    """The hub's keys for an SPDX expression: single licences in lower case, anything else as 'other' with a name."""
    if re.fullmatch(r"[A-Za-z0-9.+-]+", expression) and not expression.startswith("LicenseRef-"):
        return {"license": expression.lower()}
    return {"license": "other", "license_name": expression}


def _facts(release: Release, line: Lineage, recipe: Recipe) -> list[str]:
    model, tokens, done = recipe.model, recipe.tokens_per_step, line.checkpoints[-1].step
    parameters = sum(spec.size for spec in parameter_specs(model))
    return [
        "| | |\n|---|---|",
        f"| parameters | {parameters:,} |",
        f"| architecture | {in_words(model)} |",
        f"| sequence length | {recipe.data.sequence_length} |",
        f"| batch | {recipe.batch.global_batch_size} sequences, {tokens:,} tokens |",
        f"| training | {done:,} of {recipe.schedule.steps:,} steps, {line.tokens_read(done):,} tokens |",
        f"| optimizer | {plain(recipe.optimizer.name)}, betas {recipe.optimizer.beta1} and {recipe.optimizer.beta2}, "
        f"eps {recipe.optimizer.eps:g}, "
        f"weight decay {recipe.optimizer.weight_decay:g}, clip {recipe.optimizer.clip_norm} |",
        f"| precision | {recipe.precision.compute} compute, float32 weights and optimizer state; revisions in "
        f"{release.weights_dtype} |",
        f"| dataset | {plain(release.dataset_id)} ({release.data}) |",
        *(
            f"| licence of {plain(name)} | {plain(licence)} |"
            for name, licence in sorted(release.licences.data.items())
        ),
        f"| recipe | {release.recipe_sha256} |",
        f"| made with | weftrain {plain(release.weftrain)} |\n",
    ]


def _training(run: Path, line: Lineage, recipe: Recipe) -> list[str]:
    first: dict[str, Any] | None = None
    last: dict[str, Any] = {}
    heldout = dict[str, dict[str, Any]]()
    for record in effective_records(run):
        if record["kind"] == "step" and not record.get("skipped"):
            first, last = first or record, record
        elif record["kind"] == "evaluation":
            heldout[heldout_label(record)] = record
    found = ["## Training\n"]
    if first is not None:
        found.append(
            f"Loss {float(first['loss']):.4f} at step {first['step']}, {float(last['loss']):.4f} at step "
            f"{last['step']}."
        )
    found.append(
        f"Trained in {len(line.segments)} segments, with {len(line.branches)} rollbacks and {len(line.skips)} "
        "skipped steps."
    )
    found += [f"Rolled back to step {branch.step}: {plain(branch.reason)}" for branch in line.branches]
    for entry in line.decisions:
        done = "deferred" if entry["action"] == "defer" else "dropped"
        found.append(f"Chunk {entry['chunk']} {done}: {plain(entry['reason'])}")
    for name, record in sorted(heldout.items()):
        measured = {key: record[key] for key in ("perplexity", *MEASURES) if key in record}
        words = "".join(f", {key.replace('_', ' ')} {value:.3f}" for key, value in measured.items())
        found.append(f"Held-out {plain(name)} at step {record['step']}: loss {record['loss']:.4f}{words}.")
    return [*found, ""]


def _links(release: Release) -> list[str]:
    rows = ["## Checkpoints\n", "| link | chunk | steps | samples | checkpoint root |", "|---|---|---|---|---|"]
    for link in release.links:
        chunk = "" if link.chunk is None else str(link.chunk)
        rows.append(
            f"| {link.link} | {chunk} | {link.first_step}..{link.stop_step} | {link.samples[0]}..{link.samples[1]} | "
            f"`{link.end}` |"
        )
    return [*rows, ""]


def _scores(run: Path) -> list[str]:
    records = sorted(
        read_records(records_folder(run)), key=lambda record: (record["step"], record["task"], str(record["shots"]))
    )
    if not records:
        return ["## Evaluation\n", "None was recorded.\n"]
    rows = [
        "## Evaluation\n",
        "| step | task | version | shots | metric | value | checkpoint root |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        partial = " (partial)" if record.get("partial") else ""
        value = f"{record['value']}" if record["value_percent"] is None else f"{record['value_percent']:.2f} %"
        rows.append(
            f"| {plain(record['step'])} | {plain(record['task'])}{partial} | {plain(record['task_version'])} | "
            f"{plain(record['shots'])} | {plain(record['metric'])} | {plain(value)} | "
            f"`{re.sub('[^0-9a-f]', '', str(record['checkpoint']))[:16]}` |"
        )
    return [*rows, ""]


def _use(release: Release) -> list[str]:
    return [
        "## Check it\n",
        "```bash\nweftrain verify .\nweftrain replay . --sample 0.1\n```\n",
        "`verify` reads every byte; `replay` trains a link again and compares every bit. For the hub: `revisions/`, a "
        "folder a checkpoint.",
    ]
