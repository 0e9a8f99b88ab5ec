"""What a release lets others do, item by item: present, partial or absent, with the files that show it and what an
absence prevents.

The items are those by which LLM360 compared releases (arXiv 2312.06550, table 1), with order, record and environment
added. A folder is either a release of ours or one in the style of the Hugging Face hub: weights, a card, a folder or
git branch for each checkpoint. Only names and headers are read, and they are believed: whether a file is what it says
is shown by `verify` and `replay` alone, for releases of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from weftrain.core.errors import RecipeError, ReleaseError, RemoteError
from weftrain.core.formats.plain_file import LIMIT_BYTES, read_plain
from weftrain.core.formats.strict_yaml import LineMap, parse_mapping
from weftrain.exchange.audit.audit import open_series, same_weights
from weftrain.exchange.audit.clone import is_clone
from weftrain.exchange.audit.hub import HubSeries
from weftrain.exchange.release.release import CARD, RELEASE, read_release

Status = Literal["present", "partial", "absent"]
_MAX_FILES = 200_000


@dataclass(frozen=True)
class Item:
    """One line of the table. evidence: the files by which it was judged, or what was looked for."""

    name: str
    status: Status
    evidence: str
    prevents: str  # what cannot be done if it is absent


DISTINCT = "distinct revisions"
_SAME = "the same weights: "
# name -> what its absence prevents
PREVENTS = {
    "final weights": "using the model at all",
    "intermediate checkpoints": "studying how anything was learned; finding where it went wrong",
    DISTINCT: "saying at which step a revision was taken; any curve over steps",
    "optimizer state": "continuing the training, and replaying any step",
    "training data": "attributing an output to what was read; measuring memorization and contamination",
    "data order": "saying which samples a checkpoint had seen, and replaying",
    "data preparation": "making the same dataset again, or the same kind of it",
    "training code": "training a model like it without guessing",
    "recipe": "training a model like it without guessing numbers",
    "metrics": "seeing loss spikes, and comparing a run of one's own step by step",
    "record of restarts": "knowing what really happened: restarts, skips, rollbacks",
    "environment": "expecting the same bits",
    "analyses": "checking the published scores against a checkpoint",
    "licence": "using any of it without asking",
    "proof": "knowing that the states were trained as it says",
}


def openness(folder: Path) -> tuple[str, list[Item]]:
    """What kind of folder it is, and its items in a fixed order. Raises ReleaseError for a folder that is neither
    kind.
    """
    if not folder.is_dir():
        raise ReleaseError(f"{folder}: is no folder: name a release's, or a model's from the hub")
    if (folder / RELEASE).exists():
        return "weftrain release", _of_release(folder)
    files = _files(folder)
    if not any(_matches(files, pattern) for pattern in (r"(^|/)config\.json$", *_WEIGHTS)):
        raise ReleaseError(
            f"{folder}: holds neither {RELEASE} nor a model's config.json or weights: name a release, or a model's "
            "folder"
        )
    card = _card(folder / CARD)
    return "folder in the style of the Hugging Face hub", _of_hub(files, _branches(folder), card, _distinct(folder))


def hub_openness(series: HubSeries) -> tuple[str, list[Item]]:
    """The same of a repository on the hub, by the files of its main branch and the names of the others. Raises
    RemoteError.
    """
    names = series.refs()
    main = "main" if "main" in names else next(iter(names), None)
    if main is None:
        raise RemoteError(f"{series.where}: has no branches: check the name")
    files = sorted(series.identities(main))
    card: dict[str, object] = {}
    if CARD in files:
        text = series.read(series.revision(main), CARD, 0, LIMIT_BYTES["card"])
        card = _front_matter(text, f"{series.where}: {CARD}")
    try:
        distinct = _told(*same_weights(series))
    except ReleaseError as error:
        distinct = "absent", f"not every revision can be compared: {error}"
    return series.kind, _of_hub(files, [f"{name}/" for name in names], card, distinct)


def repeats(items: list[Item]) -> bool:
    """Whether the items say that two revisions hold the same weights."""
    return any(item.name == DISTINCT and item.evidence.startswith(_SAME) for item in items)


def _of_release(folder: Path) -> list[Item]:
    release = read_release(folder)
    names = list(release.files)
    evaluations, memorization = (_under(names, f"analyses/{kind}/") for kind in ("evaluations", "memorization"))
    by_kind: dict[str, tuple[Status, str]] = {
        "shards": ("present", f"data/, {len(_under(names, 'data/'))} files"),
        "manifest": ("partial", "data/: hashes and preparation of every shard, not the shards"),
        "none": ("present", "synthetic rows that follow from the seed"),
    }
    data = by_kind[release.data]
    both = [kind for kind, found in (("evaluations", evaluations), ("memorization", memorization)) if found]
    checkpoints = len(release.links)
    found: dict[str, tuple[Status, str]] = {
        "final weights": ("present", f"revisions/ in {release.weights_dtype}"),
        "intermediate checkpoints": ("present" if checkpoints > 2 else "partial", f"checkpoints/, {checkpoints} links"),
        DISTINCT: ("present", "a checkpoint root each, in the links of release.json"),
        "optimizer state": ("present", "checkpoints/*/, exp_avg and exp_avg_sq of every parameter"),
        "training data": data,
        "data order": ("present", "a function of recipe and datasets; weftrain log --samples"),
        "data preparation": ("present", "data/*/manifest.json" if release.data != "none" else data[1]),
        "training code": ("present", f"weftrain {release.weftrain}"),
        "recipe": ("present", "recipe.json, and in every checkpoint"),
        "metrics": ("present", "metrics.jsonl, in digests in the ledger")
        if "metrics.jsonl" in names
        else ("absent", "no metrics.jsonl"),
        "record of restarts": ("present", "ledger.jsonl"),
        "environment": ("present", "environment.json, and the fingerprint of every checkpoint"),
        "analyses": (
            "present" if len(both) == 2 else "partial" if both else "absent",
            ", ".join(both) or "no analyses/",
        ),
        "licence": (
            "present",
            f"weights {release.licences.weights}; "
            + "; ".join(f"{name} {text}" for name, text in release.licences.data.items()),
        ),
        "proof": ("present", "weftrain verify, weftrain replay"),
    }
    return _items(found)


_WEIGHTS = (r"(^|/)(model|pytorch_model)[^/]*\.(safetensors|bin)$",)
_OPTIMIZER = r"(^|/)(optimizer[^/]*\.(pt|bin|safetensors)|[^/]*optim_states\.pt|exp_avg[^/]*)$"
_REVISION = re.compile(r"(^|.*[/_-])(step|ckpt|checkpoint|global_step|iter)[-_]?([0-9]+)[^/]*")
_DATA = r"\.(h5|parquet|arrow|bin\.idx|idx|mds|npy|jsonl\.zst)$"
_METRICS = (
    r"(^|/)(metrics\.jsonl|trainer_state\.json|events\.out\.tfevents[^/]*|wandb[^/]*"
    r"|[^/]*train[^/]*log[^/]*\.(csv|jsonl|txt))$"
)
_CONFIGS = r"(^|/)(training_args\.(json|bin)|recipe\.(json|yaml)|hparams[^/]*|[^/]*config[^/]*\.ya?ml|[^/]*\.gin)$"
_CODE = r"(^|/)(train[^/]*\.py|pretrain[^/]*\.py|modeling_[^/]*\.py)$"
_RESULTS = r"(^|/)(eval[^/]*|results?)([/_-][^/]*)*\.json$"


def _of_hub(files: list[str], branches: list[str], card: dict[str, object], distinct: tuple[Status, str]) -> list[Item]:
    weights = _matches(files, _WEIGHTS[0])
    pickled = [name for name in weights if name.endswith(".bin")]
    revisions = sorted(
        {match[3] for name in [*files, *branches] if (match := _REVISION.match(name.rpartition("/")[0] or name))},
        key=int,
    )
    optimizer, data, metrics = (_matches(files, pattern) for pattern in (_OPTIMIZER, _DATA, _METRICS))
    configs, code, results = (_matches(files, pattern) for pattern in (_CONFIGS, _CODE, _RESULTS))
    licence = str(card.get("license") or "") or next(
        (name for name in files if re.fullmatch(r"LICEN[SC]E[^/]*", name)), ""
    )
    datasets = card.get("datasets")
    found: dict[str, tuple[Status, str]] = {
        "final weights": (
            ("partial" if len(pickled) == len(weights) else "present"),
            _shown(weights) + (", pickled" if pickled else ""),
        )
        if weights
        else ("absent", "no model*.safetensors, no pytorch_model*.bin"),
        "intermediate checkpoints": ("present", f"{len(revisions)} revisions, {revisions[0]} .. {revisions[-1]}")
        if len(revisions) > 2
        else (
            ("partial", f"{len(revisions)} revisions")
            if revisions
            else ("absent", "no folder and no branch named step or ckpt with a number")
        ),
        DISTINCT: distinct,
        "optimizer state": _judged(optimizer, "no optimizer file"),
        "training data": _judged(data, "no token file")
        if data or not datasets
        else ("partial", f"README.md names {datasets}"),
        "data order": (
            "absent",
            "nothing from which a sample's step follows: no index of the order, no function of a seed",
        ),
        "data preparation": ("absent", "no manifest"),
        "training code": ("partial", _shown(code)) if code else ("absent", "no training script"),
        "recipe": ("partial", _shown(configs)) if configs else ("absent", "config.json tells the architecture alone"),
        "metrics": _judged(metrics, "no log of losses"),
        "record of restarts": ("absent", "no ledger"),
        "environment": ("absent", "no versions, threads, instruction set"),
        "analyses": ("partial", f"{_shown(results)}: no checkpoint hash binds them")
        if results
        else ("absent", "no result file"),
        "licence": ("present", licence) if licence else ("absent", "no licence in README.md, no LICENSE"),
        "proof": ("absent", "no chain of hashes, and nothing to replay"),
    }
    return _items(found)


def _items(found: dict[str, tuple[Status, str]]) -> list[Item]:
    return [Item(name, *found[name], prevents) for name, prevents in PREVENTS.items()]


def _distinct(folder: Path) -> tuple[Status, str]:
    """Whether the revisions that lie here, as folders or in a clone, differ in their weights."""
    try:
        count, groups = same_weights(open_series(str(folder)))
    except ReleaseError as error:
        if not is_clone(folder):
            raise
        return "absent", f"its branches cannot be compared: {error}"
    return _told(count, groups)


def _told(count: int, groups: list[str]) -> tuple[Status, str]:
    if count < 2:
        return "absent", "no two revisions lie here as folders: fetch them to compare their weights"
    return ("absent", f"{_SAME}{'; '.join(groups)}") if groups else ("present", f"{count} revisions, no two alike")


def _judged(names: list[str], missing: str) -> tuple[Status, str]:
    return ("present", _shown(names)) if names else ("absent", missing)


def _shown(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _under(names: Iterable[str], prefix: str) -> list[str]:
    return [name for name in names if name.startswith(prefix)]


def _matches(files: list[str], pattern: str) -> list[str]:
    return [name for name in files if re.search(pattern, name)]


def _files(folder: Path) -> list[str]:
    """Names of a folder's files; git's own are left out, links are not followed."""
    found: list[str] = []
    folders = [folder]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            if path.is_dir() and not path.is_symlink():
                if path.name not in (".git", ".cache"):
                    folders.append(path)
            else:
                found.append(path.relative_to(folder).as_posix())
            if len(found) > _MAX_FILES:
                raise ReleaseError(f"{folder}: holds more than {_MAX_FILES:,} files: name one model's folder")
    return sorted(found)


def _branches(folder: Path) -> list[str]:
    """Names of the branches that a clone of a hub repository knows, read from git's files."""

    def read(path: Path) -> str:
        return read_plain(path, "record").decode(errors="replace") if path.is_file() else ""

    names = [
        line.split()[-1]
        for line in read(folder / ".git" / "packed-refs").splitlines()
        if line[:1] not in ("#", "^", "")
    ]
    refs = folder / ".git" / "refs"
    names += [path.relative_to(refs).as_posix() for path in refs.rglob("*") if path.is_file()] if refs.is_dir() else []
    return [f"{name}/" for name in names]


def _card(path: Path) -> dict[str, object]:
    """The front matter of README.md; empty where there is none that can be read."""
    try:
        return _front_matter(read_plain(path, "card"), str(path))
    except OSError:
        return {}


def _front_matter(data: bytes, where: str) -> dict[str, object]:
    match = re.match(r"---\n(.*?)\n---\n", data.decode(errors="replace"), re.DOTALL)
    if match is None or len(match[1]) > LIMIT_BYTES["recipe"]:
        return {}
    try:
        return dict(parse_mapping(match[1], LineMap(where)))
    except RecipeError:
        return {}
