"""The shard reader under a storm of damage, in a process of its own with limited address space: no signal, no wrong
token.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
import random, resource, sys
from pathlib import Path
import numpy as np
from weftrain.core.errors import DataError
from weftrain.core.formats.shard_format import Documents, num_tokens, write_shard
from weftrain.core.formats.shard_reader import ShardReader

folder, seed, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng, numbers = random.Random(seed), np.random.default_rng(seed)

def make(path, rows, mask, weights):
    tokens = numbers.integers(0, 900, num_tokens(rows, 16, 16))
    ends = np.unique(np.append(numbers.integers(1, len(tokens), 30), len(tokens)))
    zero = np.zeros(len(ends), np.int32)
    ids = numbers.integers(0, 256, (len(ends), 16)).astype(np.uint8)
    mask = numbers.integers(0, 2, len(tokens)) if mask else np.ones(len(tokens), int)
    weight = numbers.uniform(1e-6, 9, len(tokens)).astype(np.float32) * mask if weights else None
    write_shard(path, tokens, Documents(ends, ids, zero, 1, zero, zero), sequence_length=16, row_stride=16, vocab_size=900,
                tokenizer_sha256="ab" * 32, loss_mask=None if mask.all() else mask, token_weights=weight)
    rows_of = lambda stream: None if stream is None else np.lib.stride_tricks.sliding_window_view(stream, 17)[::16]
    return path.read_bytes(), rows_of(tokens), rows_of(weight)

whole = [make(folder / f"{name}.h5", rows, name in "bc", name in "cd") for name, rows in (("a", 60), ("b", 200), ("c", 60), ("d", 60))]
resource.setrlimit(resource.RLIMIT_AS, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + (3 << 30),) * 2)
refused = read = 0
for round in range(rounds):
    (data, *_), (other, *_) = rng.sample(whole, 2)
    damaged = bytearray(data)
    kind = rng.randrange(5)
    if kind == 0:
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del damaged[rng.randrange(len(damaged)):]
    elif kind == 2:
        start = rng.randrange(len(other))
        piece = other[start:start + rng.randint(1, 4000)]
        place = rng.randrange(len(damaged))
        damaged[place:place + len(piece)] = piece
    elif kind == 3:
        place = rng.randrange(len(damaged))
        damaged[place:place + rng.choice([1, 2, 4, 8])] = rng.choice([b"\\xff", b"\\x00", b"\\x7f"]) * rng.choice([1, 2, 4, 8])
    else:
        damaged = bytearray(rng.randbytes(rng.randint(0, 3000))) if rng.random() < 0.3 else damaged + bytearray(rng.randbytes(500))
    path = folder / "damaged.h5"
    path.unlink(missing_ok=True)
    path.write_bytes(damaged)
    try:
        reader = ShardReader(path)
        rows = reader.rows(np.arange(reader.num_rows))
        reader.document_starts(np.arange(reader.num_rows))
        reader.plane("loss_mask", np.arange(reader.num_rows))
        weights = reader.plane("token_weights", np.arange(reader.num_rows))
    except DataError as error:
        assert "damaged.h5" in str(error) and chr(10) not in str(error), str(error)
        refused += 1
    else:
        found = [known for _, wanted, known in whole if rows.shape == wanted.shape and (rows == wanted).all()]
        assert found, (round, kind)
        assert found[0] is weights is None or (weights == found[0][:, 1:]).all(), (round, kind)
        read += 1
print(refused, read)
"""


def storm(folder: str, seed: int, rounds: int) -> tuple[int, int]:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), folder, str(seed), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    refused, read = map(int, done.stdout.split())
    assert refused + read == rounds
    return refused, read


def test_damage_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory) -> None:
    refused, read = storm(str(tmp_path_factory.mktemp("storm")), 1, 400)
    assert refused > 200
    assert read > 5  # bytes that mean nothing, as those between the datasets


@pytest.mark.prove
def test_a_long_storm(tmp_path_factory: pytest.TempPathFactory) -> None:
    storm(str(tmp_path_factory.mktemp("storm")), 2, 3_000)
