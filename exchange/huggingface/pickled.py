"""Converts pickled weights (`pytorch_model.bin`, or shards with an index) to safetensors in a temporary folder, in a
separate process.

Nothing is unpickled in this process: exchange/huggingface/pickled_worker.py does it with
`torch.load(weights_only=True)` and writes plain tensors, which exchange/huggingface/folder.py then checks like any
other folder. This happens only where `--allow-pickle` was given; a folder that has safetensors files too is read from
those.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from weftrain.core.errors import CheckpointError, file_problem
from weftrain.core.formats import fsops
from weftrain.core.formats.plain_file import real_path
from weftrain.core.formats.tensor_file import open_regular
from weftrain.exchange.huggingface.folder import INDEX, PICKLED, PICKLED_INDEX, SINGLE, HuggingFaceWeights, read_index

_WORKER = "weftrain.exchange.huggingface.pickled_worker"


def is_pickled(folder: Path) -> bool:
    """Whether a folder's only weights are pickled."""
    return not any((folder / name).exists() for name in (SINGLE, INDEX)) and any(
        (folder / name).exists() for name in (PICKLED, PICKLED_INDEX)
    )


@contextlib.contextmanager
def open_weights(folder: Path, *, unpickle: bool, scratch: Path) -> Iterator[HuggingFaceWeights]:
    """A folder's weights, for as long as the block runs. `files` of what is given are those that were read from
    `folder` itself.

    scratch: an existing folder with room for the model, where a pickled one is converted. Raises CheckpointError:
    weights are pickled and `unpickle` is false, a file that is damaged or would run code, and all that
    HuggingFaceWeights raises.
    """
    if not is_pickled(folder):
        yield HuggingFaceWeights(folder)
        return
    if not unpickle:
        raise CheckpointError(
            f"{folder}: its weights are pickled ({PICKLED}), and a pickle can be made to run code: get them as "
            "safetensors, or add "
            "--allow-pickle if you trust who made them"
        )
    sources = pickled_files(folder)
    temporary = fsops.temporary_beside(scratch / "pickled")
    try:
        fsops.make_dirs(temporary)
        _convert(folder, sources, temporary)
        weights = HuggingFaceWeights(temporary)
        weights.files = dict.fromkeys(sources)
        yield weights
    finally:  # nothing here is worth keeping after a failure
        with contextlib.suppress(OSError):
            fsops.remove_tree(temporary)


def pickled_files(folder: Path) -> dict[str, set[str] | None]:
    """File name -> the tensors that the index puts there; None where there is no index. Raises CheckpointError."""
    if (folder / PICKLED).exists() and (folder / PICKLED_INDEX).exists():
        raise CheckpointError(
            f"{folder}: holds both {PICKLED} and {PICKLED_INDEX}: move away the one that is not this model's"
        )
    files: dict[str, set[str] | None] = (
        {PICKLED: None} if (folder / PICKLED).exists() else dict(read_index(folder, PICKLED_INDEX, ".bin"))
    )
    for name in files:
        try:
            open_regular(folder / name).close()
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: {name}: {file_problem(error)}: take another copy of the folder"
            ) from error
    return files


def _convert(folder: Path, sources: dict[str, set[str] | None], temporary: Path) -> None:
    """Write the sources' tensors as safetensors into `temporary`, with an index where there was one."""
    needed = sum((folder / name).stat().st_size for name in sources)
    if (free := fsops.free_bytes(temporary)) < needed:
        raise CheckpointError(
            f"{temporary.parent}: {needed:,} bytes are needed to convert {folder}, {free:,} are free: make room"
        )
    targets = {name: f"{name.removesuffix('.bin')}.safetensors" for name in sources}
    if sources.keys() == {PICKLED}:
        targets = {PICKLED: SINGLE}
    jobs = [[str(real_path(folder / name)), str(real_path(temporary / target))] for name, target in targets.items()]
    # -P: what lies in the current folder is not imported.
    command = [sys.executable, "-P", "-m", _WORKER]
    done = subprocess.run(
        command, input=json.dumps({"jobs": jobs, "parent": os.getpid()}), capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"])[-1][:400]
        raise CheckpointError(f"{folder}: refused, nothing of it was run: {reason}: get the weights as safetensors")
    if sources.keys() != {PICKLED}:
        weight_map = {tensor: targets[name] for name, tensors in sources.items() for tensor in tensors or ()}
        fsops.write_bytes(temporary / INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}).encode())
