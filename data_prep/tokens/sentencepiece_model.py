"""SentencePiece models (`tokenizer.model`) as a tokenizer.json, compared with SentencePiece's own ids before use.

Features without an exact counterpart in `tokenizers` are refused, and so is a model that gives other ids for one of
some thousand texts: sentences of its own pieces, unusual white space, long repetitions, source code. Two differences
remain, both of Unigram models. Among orders of the same pieces with the same score (runs of one character), rounding
decides. And text that spells a control, unknown or byte piece is taken for that piece by `tokenizers`: such documents
become failures (tokenization.py), never other ids.
"""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from weftrain.core.errors import DataError, one_line
from weftrain.core.formats.tokenizer_file import is_panic
from weftrain.data_prep.tokens.proven_shapes import SPACE

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # ModelProto.SentencePiece.Type
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_REMEDY = "give the tokenizer.json of the same tokenizer"
_PROBES = [
    "",
    " ",
    "  a",
    "a  b",
    "a \u2581b",
    "tail  ",
    "\n\n a\tb\r\n",
    "\u3000wide\u00a0",
    "e\u0301 \ufb01 \u2167",
    "\U0001f600\u200d",
    "\x00\x7f",
]
_SENTENCES, _SENTENCE_PIECES = 2000, 12
_LONGEST_RUN = 40
_CODE_FILES = ("decoder.py", "encoder.py", "scanner.py")


def is_sentencepiece(path: Path, data: bytes) -> bool:
    """Whether a tokenizer's file is a SentencePiece model by its name, and not JSON."""
    return path.suffix == ".model" and data.lstrip()[:1] != b"{"


def tokenizer_json(data: bytes, where: str) -> bytes:
    """The tokenizer.json of a SentencePiece model. Raises DataError, which begins with `where`."""
    try:
        import sentencepiece

        messages: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError:
        raise DataError(
            f"{where}: a SentencePiece model needs its library: pip install 'weftrain[sentencepiece]'; or {_REMEDY}"
        ) from None
    try:
        proto = messages.ModelProto()
        proto.ParseFromString(data)
        original = sentencepiece.SentencePieceProcessor(model_proto=data)
        if not proto.pieces:
            raise ValueError("it has no pieces")
    except Exception as error:  # protobuf's own kinds, RuntimeError
        why = one_line(error, 120)
        raise DataError(f"{where}: is no SentencePiece model ({why}): {_REMEDY}") from error
    try:
        tokenizer = _converted(proto)
        made = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":")).encode()
        _prove(original, Tokenizer.from_str(made.decode()), proto)
    except BaseException as error:  # tokenizers raises nothing narrower than Exception, and panics
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise DataError(f"{where}: {one_line(error)}: {_REMEDY}") from error
    return made


def _converted(proto: Any) -> Tokenizer:
    """Raises ValueError for what has no exact counterpart."""
    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    pieces = [(piece.piece, float(piece.score), piece.type) for piece in proto.pieces]
    if trainer.model_type not in (_UNIGRAM, _BPE):
        raise ValueError("a SentencePiece model of words or characters has no counterpart; only BPE and Unigram have")
    if trainer.treat_whitespace_as_suffix or not spec.escape_whitespaces or any(kind == _UNUSED for *_, kind in pieces):
        raise ValueError(
            "SentencePiece models with white space as a suffix, unescaped, or with unused pieces have no exact "
            "counterpart"
        )
    if proto.denormalizer_spec.precompiled_charsmap:
        raise ValueError("a SentencePiece model that rewrites decoded text has no exact counterpart")
    unknown = next((index for index, (*_, kind) in enumerate(pieces) if kind == _UNKNOWN), None)
    if unknown is None:
        raise ValueError("the SentencePiece model has no unknown piece")
    user_defined = any(kind == _USER_DEFINED for *_, kind in pieces)
    words = False
    if trainer.model_type == _BPE:
        vocab = {piece: index for index, (piece, _, _) in enumerate(pieces)}
        model: Any = models.BPE(
            vocab=vocab,
            merges=_merges(pieces),
            unk_token=pieces[unknown][0],
            fuse_unk=True,
            byte_fallback=bool(trainer.byte_fallback),
        )
    else:
        model = models.Unigram([(piece, score) for piece, score, _ in pieces], unknown, bool(trainer.byte_fallback))
        words = not any(SPACE in piece[1:] for piece, _, _ in pieces)  # then no piece spans the space between two words
    tokenizer = Tokenizer(model)
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    # A normalizer would prepend after each user-defined piece too; but Metaspace does not prepend to a space, so it is
    # for these alone.
    first = bool(spec.add_dummy_prefix and user_defined)
    if spec.add_dummy_prefix and not first:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    if words or first:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=SPACE, prepend_scheme="first" if first else "never", split=words
        )
    tokenizer.normalizer = normalizers.Sequence(steps)
    undo: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else undo)
    for piece, _, kind in pieces:
        if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED):
            # A piece's spaces are written as such only in the normalised text.
            tokenizer.add_tokens([AddedToken(piece, normalized=SPACE in piece, special=kind != _USER_DEFINED)])
    return tokenizer


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """All pairs of pieces that join to a piece, best scores first: SentencePiece joins any two that make one."""
    normal = {piece for piece, _, kind in pieces if kind in (_NORMAL, _USER_DEFINED)}
    if missing := {character for piece, _, kind in pieces if kind == _NORMAL for character in piece} - normal:
        raise ValueError(
            f"the SentencePiece model has pieces with characters that are none ({min(missing)!r}), which has no "
            "counterpart"
        )
    best = sorted(((piece, score) for piece, score, kind in pieces if kind == _NORMAL), key=lambda entry: -entry[1])
    return [
        (piece[:cut], piece[cut:])
        for piece, _ in best
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]


def _prove(original: Any, tokenizer: Tokenizer, proto: Any) -> None:
    """Raises ValueError where a sample text has other ids in SentencePiece."""
    tokenizer.encode_special_tokens = True
    for text in _sample(proto):
        ids, wanted = tokenizer.encode(text, add_special_tokens=False).ids, original.encode(text)
        # the same score, so neither is better
        tied = proto.trainer_spec.model_type == _UNIGRAM and sorted(ids) == sorted(wanted)
        if ids != wanted and not tied:
            place = next(
                (place for place, pair in enumerate(zip(ids, wanted, strict=False)) if pair[0] != pair[1]),
                min(len(ids), len(wanted)),
            )
            raise ValueError(
                f"tokenizers cannot reproduce this SentencePiece model: for {text[:60]!r} token {place} differs of "
                f"{len(wanted)}"
            )


def _sample(proto: Any) -> Iterable[str]:
    """Texts of the vocabulary's own pieces and of source code; the same for the same model and interpreter."""
    normal = [piece.piece for piece in proto.pieces if piece.type == _NORMAL]
    draw = random.Random(0)
    yield from _PROBES
    # Repetitions, which several segmentations make with the same score, and so the rounding of each library decides.
    repeated = sorted({piece[0] for piece in normal if len(piece) > 1 and len(set(piece)) == 1})
    yield from (
        f"a{character.replace(SPACE, ' ') * count}b" for character in repeated for count in range(2, _LONGEST_RUN)
    )
    for _ in range(_SENTENCES):
        pieces = draw.choices(normal, k=draw.randint(1, _SENTENCE_PIECES))
        yield draw.choice(("", "", " ", "\n")).join(pieces).replace(SPACE, " ")
    for name in _CODE_FILES:
        yield from Path(json.__file__).with_name(name).read_text(encoding="utf-8").split("\n\n")
