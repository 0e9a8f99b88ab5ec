"""The scores in a release's log are those of their records, and of the weights that they name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from weftrain.core.errors import ReleaseError, one_line
from weftrain.core.formats.checkpoint_manifest import weights_sha256_of
from weftrain.core.run.lineage import Lineage
from weftrain.core.run.metrics import METRICS, effective_records, finite
from weftrain.core.run.scores import RECORD, SCORE, score_numbers
from weftrain.exchange.release.claims import DATASET_SCORES, Claim
from weftrain.exchange.release.derived import check_perplexity
from weftrain.exchange.release.release import ANALYSES, read_json


def check_scores(folder: Path, line: Lineage, manifests: Mapping[str, Mapping[str, Any]]) -> Iterator[Claim]:
    """Each score in the log says what its record in analyses/ says, and is of the weights of its step's checkpoint,
    where that is here. Scores of datasets have no record: what they say is left to replay.
    """
    if not line.scores:
        return
    records = dict(_score_records(folder))
    weights = {
        manifest["step"]: weights_sha256_of(manifest)
        for manifest in manifests.values()
        if not any(name.endswith(".lora_a") for name in manifest["tensors"])  # which are evaluated merged
    }
    counts = {"record": 0, "no record": 0, "dataset": 0}
    for one in effective_records(folder, kinds=(SCORE,)):
        where = f"{folder / METRICS}: the score {one['set']} of step {one['step']}"
        try:
            counts[_check_score(folder, one, where, records, weights)] += 1
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ReleaseError(
                f"{where}, or its record, lacks what scores have ({one_line(error, 80)}): altered"
            ) from error
    if counts["record"] or counts["no record"]:
        lacking = f"; of {counts['no record']} the record is not here" if counts["no record"] else ""
        yield Claim("scores in the log", "derivation", f"{counts['record']} say what their records say{lacking}")
    if counts["dataset"]:
        how = f"{counts['dataset']} lines: `weftrain replay` measures them again"
        yield Claim(DATASET_SCORES, "not covered", how)


def _check_score(
    folder: Path, one: Mapping[str, Any], where: str, records: Mapping[str, Any], weights: Mapping[int, str]
) -> str:
    """Check a line of kind score; which of the counts it belongs to. Raises ReleaseError, and KeyError and its like for
    what is no score.
    """
    told = finite(one["metrics"])
    if "problem" not in one and told[one["metric"]] != finite(one["value"]):
        raise ReleaseError(f"{where} is {one['value']}, and its metric {one['metric']} is another: one was altered")
    if RECORD not in one:
        check_perplexity(folder, score_numbers(one))
        return "dataset" if "dataset_id" in one else "no record"
    if (found := records.get(one[RECORD])) is None:
        return "no record"
    recorded = {metric: number["value"] for metric, number in found["metrics"].items()}
    same = all(finite(one[key]) == found[key] for key in ("step", "metric", "value", "samples"))
    if told != recorded or not same:
        raise ReleaseError(f"{where} is not that of its record {one[RECORD][:12]} in {ANALYSES}: one was altered")
    state = found.get("weights_sha256")
    if state is not None and weights.get(one["step"], state) != state:
        raise ReleaseError(f"{where} is of other weights than the checkpoint of that step: one was altered")
    return "record"


def _score_records(folder: Path) -> Iterator[tuple[str, Any]]:
    """Root and content of each record of an evaluation. Their own hashes were checked for the cards."""
    for path in sorted((folder / ANALYSES / "evaluations").glob("[0-9]*.json")):
        record = read_json(path)
        if isinstance(record, dict) and record.get("format") == "weftrain-evaluation":
            yield str(record.get("root")), record
