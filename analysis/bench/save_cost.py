"""Cost of a checkpoint over plain safetensors: `python -m weftrain.analysis.bench.save_cost FOLDER`.

Interleaved, on the disk of FOLDER: safetensors' `save_file` with fsync of file and folder, and `core.checkpoint.save`,
which also hashes every tensor and writes a manifest. The disk's cache decides single rounds, so the result is the
median ratio, without the first round, which meets cold files.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from weftrain.core import checkpoint
from weftrain.core.backend import State
from weftrain.core.formats import fsops


def rounds_of(folder: Path, mib: int, rounds: int) -> Iterator[tuple[float, float, float]]:
    """Seconds of plain safetensors, of a checkpoint and of its verification, for each round after a warm-up round."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"weights/layers.{layer}": torch.randn(-(-mib // 32), 1 << 18, generator=generator) for layer in range(32)
    }
    claims = {
        "recipe": {},
        "dataset_id": "none",
        "fingerprint": {},
        "tokens": 0,
        "position": 0,
        "parent": None,
        "kernels": {},
    }
    for number in range(rounds + 1):
        start = time.perf_counter()
        save_file(tensors, folder / "plain.safetensors")
        fsops.sync_file(folder / "plain.safetensors")
        fsops.sync_dir(folder)
        plain_s = time.perf_counter() - start
        fsops.remove_file(folder / "plain.safetensors")
        start = time.perf_counter()
        saved = checkpoint.save(folder, State(number, number, tensors), **claims)
        save_s = time.perf_counter() - start
        start = time.perf_counter()
        checkpoint.verify(saved.path)
        verify_s = time.perf_counter() - start
        fsops.remove_tree(saved.path)
        if number:
            yield plain_s, save_s, verify_s


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mib", type=int, default=960)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="weftrain-save-cost-") as folder:
        found = list(rounds_of(Path(folder), given.mib, given.rounds))
    plain, save, verify = (statistics.median(column) for column in zip(*found, strict=True))
    ratio = statistics.median(save_s / plain_s for plain_s, save_s, _ in found)
    print(
        f"plain {plain:.3f} s, checkpoint {save:.3f} s: {ratio:.2f} x (median of {len(found)}); verification "
        f"{verify:.3f} s"
    )


if __name__ == "__main__":
    main()
