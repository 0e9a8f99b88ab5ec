"""Whether two runs hold bitwise identical state: `python -m weftrain.analysis.compare.same_state RUN RUN`.

Compares the tensor hashes of the newest checkpoints, and the losses of the steps that both have. The checkpoints' roots
differ all the same, since a manifest names the backend that made it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from weftrain.core import checkpoint
from weftrain.core.errors import WeftrainError
from weftrain.core.run.metrics import effective_records


def compare(first: Path, second: Path) -> tuple[str, bool]:
    """One line, and whether all is equal. Raises WeftrainError where a run has no whole checkpoint."""
    manifests, losses = [], []
    for run in (first, second):
        newest = checkpoint.newest(run / "checkpoints", print)
        if newest is None:
            raise WeftrainError(f"{run}: no whole checkpoint")
        manifests.append(checkpoint.load(newest, verified=True)[1])
        losses.append({record["step"]: record["loss"] for record in effective_records(run) if record["kind"] == "step"})
    a, b = manifests
    names = sorted(a["tensors"].keys() | b["tensors"].keys())
    hashes = [{name: entry["sha256"] for name, entry in manifest["tensors"].items()} for manifest in manifests]
    different = [name for name in names if hashes[0].get(name) != hashes[1].get(name)]
    common = sorted(losses[0].keys() & losses[1].keys())
    apart = [step for step in common if losses[0][step] != losses[1][step]]
    same = not different and not apart and a["step"] == b["step"]
    what = (
        f"steps {a['step']} and {b['step']}; {len(names) - len(different)} of {len(names)} tensors and "
        f"{len(common) - len(apart)} of "
    )
    what += f"{len(common)} losses are equal bit for bit"
    return what + (f"; first to differ: {(different or apart)[0]}" if different or apart else ""), same


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m weftrain.analysis.compare.same_state RUN RUN", file=sys.stderr)
        return 2
    try:
        line, same = compare(Path(arguments[0]), Path(arguments[1]))
    except WeftrainError as error:
        print(error, file=sys.stderr)
        return 2
    print(("the same: " if same else "NOT the same: ") + line)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
