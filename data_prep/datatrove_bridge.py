"""datatrove's filters and deduplication between our readers and our writer, as steps of a datatrove pipeline.

`WeftrainReader` yields the documents of parts in every format that `weftrain prep` reads; `WeftrainWriter` writes JSON
lines that record the file and line of each document. Rank r of a pipeline does part r, so the result does not depend on
the number of workers.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weftrain.core.errors import DataError, one_line
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json, sha256_json
from weftrain.core.formats.line_table import Lines
from weftrain.data_prep.inputs.files import local_file
from weftrain.data_prep.quality import Quality
from weftrain.data_prep.readers.documents import Document, Failure, FileRead, InputFile, Part, Share
from weftrain.data_prep.readers.listing import Wanted, by_reason, find_inputs
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.readers.shares import read_part, records_before, split_parts
from weftrain.data_prep.stages.settings import Inputs

try:
    from datatrove.data import Document as TroveDocument
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise DataError(f"filters and deduplication need datatrove ({error}): pip install 'weftrain[quality]'") from None

QUALITY = "quality.json"
_PART_BYTES = 64 << 20
_READ = ReadOptions(text_key="text", source_key="source")


class WeftrainReader(PipelineStep):  # type: ignore[misc]
    """Yields the documents of part `rank`, with source, file and record as metadata. Raises DataError for a failure."""

    type = "weft - READER"
    name = "weftrain"

    def __init__(self, files: Lines[InputFile], parts: tuple[Part, ...], options: ReadOptions) -> None:
        super().__init__()
        self.files, self.parts, self.options = files, parts, options

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        if data is not None:
            yield from data
        for index in range(rank, len(self.parts), world_size):
            part = self.parts[index]
            before = {share.file: records_before(self.files[share.file], share) for share in part.shares}
            for item in read_part(self.files, part, self.options):
                if isinstance(item, FileRead):
                    continue
                place = (self.files[item.file].name, item.record + before[item.file])
                if isinstance(item, Failure):
                    raise DataError(f"{place[0]}:{place[1] + 1}: {item.reason}")
                self.stat_update("documents")
                metadata = {"source": item.source, "from_file": place[0], "from_record": place[1]}
                yield TroveDocument(text=item.text or "", id=f"{place[0]}:{place[1]}", metadata=metadata)


class WeftrainWriter(PipelineStep):  # type: ignore[misc]
    """Writes `folder/NNNNN.jsonl`, one file per rank, atomically: text, source, from_file, from_record."""

    type = "weft - WRITER"
    name = "weftrain"

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        folder = Path(self.folder)
        fsops.make_dirs(folder)
        path = folder / f"{rank:05d}.jsonl"
        temporary = fsops.temporary_beside(path)
        with fsops.FileWriter(temporary) as file:
            for document in data:
                kept = {key: document.metadata.get(key) for key in ("source", "from_file", "from_record")}
                line = {"text": document.text, **kept, "source": kept["source"] or "unknown"}
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                self.stat_update("written")
                yield document
            file.sync()
        fsops.rename(temporary, path)


@dataclass(frozen=True)
class Filtered:
    """The remaining inputs, and how many documents each step dropped."""

    inputs: Inputs
    dropped: dict[str, int]


def filter_inputs(inputs: Inputs, quality: Quality, folder: Path, workers: int = 1) -> Filtered:
    """Filter text inputs into JSON lines in `folder`, unless it holds the result for these inputs. Raises DataError."""
    parts = tuple(split_parts(inputs.files, _PART_BYTES))
    against = _evaluation_sets(quality)
    listed = [list(dataclasses.asdict(file).values()) for file in (*inputs.files, *against)]
    options = dataclasses.asdict(inputs.options)
    wanted = sha256_json({"quality": quality.model_dump(mode="json"), "options": options, "files": listed})
    record = folder / QUALITY
    if not (record.is_file() and parse_json(record.read_bytes())["key"] == wanted):
        fsops.remove_tree(folder)
        fsops.make_dirs(folder)
        with tempfile.TemporaryDirectory(prefix="weftrain-quality-") as scratch:
            reader = WeftrainReader(inputs.files, parts, inputs.options)
            dropped = _run_steps(reader, len(parts), quality, folder, Path(scratch), workers)
        fsops.write_bytes(record, canonical_json({"key": wanted, "dropped": dropped}) + b"\n")
    files = _written(folder, len(parts))
    record_of_quality = canonical_json(quality.model_dump(mode="json")).decode()
    left = Inputs(files, inputs.description, inputs.licence, _READ, record_of_quality, inputs.skipped)
    return Filtered(left, parse_json(record.read_bytes())["dropped"])


def _written(folder: Path, tasks: int) -> tuple[InputFile, ...]:
    """The files that a pass wrote, one per task; some are empty."""
    names = [f"{index:05d}.jsonl" for index in range(tasks)]
    return tuple(local_file(str(folder / name), name, name, "jsonl") for name in names)


def _run_steps(
    reader: WeftrainReader, tasks: int, quality: Quality, folder: Path, scratch: Path, workers: int
) -> dict[str, int]:
    """Run the filters, then MinHash in its four passes if asked for; the last pass writes into `folder`."""
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    filters = _filters(quality, scratch)
    dropped: dict[str, int] = {}
    kept = scratch / "kept" if quality.minhash is not None else folder
    dropped |= _run([reader, *filters, WeftrainWriter(str(kept))], tasks, scratch / "log-filter", workers)
    if quality.minhash is None:
        return dropped
    wanted = quality.minhash
    config = MinhashConfig(
        n_grams=wanted.ngrams,
        num_buckets=wanted.buckets,
        hashes_per_bucket=wanted.hashes,
        seed=wanted.seed,
        hash_config=HashConfig(precision=64, hash_fc="sha1"),
    )
    files = _written(kept, tasks)
    parts = tuple(Part((Share(index, 0, file.num_bytes),)) for index, file in enumerate(files))
    again = WeftrainReader(files, parts, ReadOptions(text_key="text", source_key="source"))
    signatures, buckets, removed = (str(scratch / name) for name in ("signatures", "buckets", "removed"))
    language = quality.language
    _run(
        [again, MinhashDedupSignature(signatures, config=config, language=language)],
        tasks,
        scratch / "log-signatures",
        workers,
    )
    _run([MinhashDedupBuckets(signatures, buckets, config=config)], wanted.buckets, scratch / "log-buckets", workers)
    _run([MinhashDedupCluster(buckets, removed, config=config)], 1, scratch / "log-cluster", 1)
    origins = _Origins(str(kept))
    return dropped | _run(
        [again, MinhashDedupFilter(removed), origins, WeftrainWriter(str(folder))],
        tasks,
        scratch / "log-dedup",
        workers,
    )


class _Origins(PipelineStep):  # type: ignore[misc]
    """Restores the origin of each document, which the intermediate file `folder/NNNNN.jsonl` records."""

    type = "weft - ORIGINS"
    name = "weftrain"

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        with open(Path(self.folder) / f"{rank:05d}.jsonl", "rb") as file:
            lines = enumerate(file)
            for document in data:  # in the order of the file, some left out
                line = next(text for number, text in lines if number == document.metadata["from_record"])
                kept = json.loads(line)
                document.metadata |= {key: kept[key] for key in ("from_file", "from_record")}
                yield document


def _filters(quality: Quality, scratch: Path) -> list[Any]:
    from datatrove.pipeline import filters

    steps: list[Any] = []
    language = {"language": quality.language}
    if quality.length is not None:
        off = dict.fromkeys(
            ("min_avg_word_length", "max_avg_word_length", "max_symbol_word_ratio", "max_bullet_lines_ratio")
        )
        off |= dict.fromkeys(("max_ellipsis_lines_ratio", "max_non_alpha_words_ratio", "min_stop_words"))
        words = {"min_doc_words": quality.length.min_words, "max_doc_words": quality.length.max_words}
        steps.append(_named("length", filters.GopherQualityFilter(**words, **off, **language)))
    if quality.languages is not None:
        try:
            step = filters.LanguageFilter(list(quality.languages.languages), quality.languages.threshold)
        except ImportError as error:
            raise DataError(f"quality.languages: {one_line(error)}") from None
        steps.append(_named("languages", step))
    if quality.gopher_quality:
        steps.append(_named("gopher_quality", filters.GopherQualityFilter(**language)))
    if quality.gopher_repetition:
        steps.append(_named("gopher_repetition", filters.GopherRepetitionFilter(**language)))
    if quality.decontaminate is not None:
        steps.append(_named("decontaminate", _decontamination(quality, scratch / "index")))
    return steps


def _evaluation_sets(quality: Quality) -> tuple[InputFile, ...]:
    """The files to decontaminate against. Raises DataError where a file would be missed."""
    if quality.decontaminate is None:
        return ()
    listed = find_inputs([Wanted(quality.decontaminate.against)])
    missed = [
        one
        for one in listed.skipped
        if one.reason not in ("hidden file", "hidden folder", "marker file", "marker folder")
    ]
    if missed or listed.json_texts:
        found = "; ".join([*by_reason(missed), *(f"JSON without a field 'text': {name}" for name in listed.json_texts)])
        raise DataError(f"quality.decontaminate.against: not read: {found}; name the files themselves, or remove these")
    return listed.files


def _named(name: str, step: Any) -> Any:
    step.name = name
    return step


def _decontamination(quality: Quality, folder: Path) -> Any:
    """datatrove's filter over an index of the evaluation sets' n-grams, hashed as it hashes a document's. datatrove's
    own indexer is for another library's registry of evaluation sets; ours are files.
    """
    from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
    from datatrove.utils.hashing import HashConfig, create_hash_func
    from datatrove.utils.text import ngrams, simplify_text
    from datatrove.utils.word_tokenizers import load_word_tokenizer

    wanted = quality.decontaminate
    assert wanted is not None
    config = NGramsDecontConfig(n_grams=wanted.ngrams, hash_config=HashConfig(precision=64, hash_fc="sha1"))
    hash_of, words = create_hash_func(config.hash_config), load_word_tokenizer(quality.language)
    fsops.make_dirs(folder)
    files = _evaluation_sets(quality)
    for index, file in enumerate(files):
        hashes: set[int] = set()
        for part in split_parts([file], 1 << 62):
            for item in read_part([file], part, ReadOptions()):
                if isinstance(item, Failure):
                    raise DataError(f"{file.name}:{item.record + 1}: {item.reason}")
                if isinstance(item, Document):
                    tokens = words.word_tokenize(simplify_text(item.text or "", config.norm_config))
                    hashes |= {hash_of(" ".join(gram)) for gram in ngrams(tokens, wanted.ngrams)}
        if not hashes:
            raise DataError(
                f"{file.address}: no text of {wanted.ngrams} words to decontaminate against; give a smaller ngrams"
            )
        fsops.write_bytes(folder / f"{index:03d}.index.hashes", np.array(sorted(hashes), np.uint64).tobytes())
    return NGramsDecontFilter(str(folder), config=config, language=quality.language)


def _run(pipeline: list[Any], tasks: int, log: Path, workers: int) -> dict[str, int]:
    """Run one pass. Returns how many documents each named filter dropped."""
    from datatrove.executor import LocalPipelineExecutor
    from loguru import logger

    logger.disable("datatrove")
    try:
        stats = LocalPipelineExecutor(
            pipeline, tasks=tasks, workers=workers, logging_dir=str(log), start_method="spawn"
        ).run()
    except DataError:
        raise
    except Exception as error:  # whatever a step of theirs raises
        raise DataError(f"datatrove: {type(error).__name__}: {one_line(error)}") from error
    dropped: dict[str, int] = {}
    for step, counted in zip(pipeline, stats.stats, strict=True):
        total = counted.stats.get("dropped")
        if total is not None:
            name = "minhash" if type(step).__name__ == "MinhashDedupFilter" else step.name
            dropped[name] = dropped.get(name, 0) + int(total.total)
        elif type(step).__module__.startswith("datatrove.pipeline.filters") or type(step).__name__.endswith("Filter"):
            dropped.setdefault("minhash" if "Minhash" in type(step).__name__ else step.name, 0)
    return dropped
