"""Ids are those of the tokenizer's own chat template, and what bears loss is what the assistant wrote."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from weftrain.core.errors import DataError
from weftrain.data_prep.conversations.encode import ConversationEncoder, control_names
from weftrain.data_prep.conversations.messages import Conversation, Message
from weftrain.data_prep.conversations.template import ChatTemplate, TemplateError, load_template
from weftrain.data_prep.tokens.markers import Markers
from weftrain.data_prep.tokens.tokenization import TextEncoder, make_encoder

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|sys_start|>", "<|sys_end|>"]
TEXTS = [
    "the assistant gives helpful answers to the user's questions",
    "how are you? USER: ASSISTANT: so it is",
    "«ünï»",
]
GENERATION = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>"
    "\n{% endif %}{% endfor %}"
)
TALK = (Message("system", "be brief"), Message("user", "how are you?"), Message("assistant", "so it is"),
        Message("user", "the user's"), Message("assistant", "helpful"))  # fmt: skip


@functools.cache
def made(kind: str) -> TextEncoder:
    """Small tokenizers of the three kinds that the families have: bytes, LLaMA 2's, and a first word that is apart."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind != "bytes", unk_token=None if kind == "bytes" else "<unk>"))
    alphabet: list[str] = []
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    if kind != "bytes":
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [] if kind == "bytes" else [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(bytes_), special_tokens=[*SPECIAL, *bytes_], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tree = json.loads(tokenizer.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if not token["content"].startswith("<0x")]
    return make_encoder(json.dumps(tree).encode(), kind, Markers("</s>", "<s>"), engine="tokenizers")


def encoder_of(kind: str, template: ChatTemplate | str = "amberchat", **more: object) -> ConversationEncoder:
    chosen = load_template(template) if isinstance(template, str) else template
    return ConversationEncoder(made(kind), chosen, **more)  # type: ignore[arg-type]


def shown(encoder: TextEncoder, ids: np.ndarray, loss: np.ndarray) -> list[str]:
    """The stretches that bear loss, as text."""
    borders = np.flatnonzero(np.diff(loss.astype(int))) + 1
    parts = zip(np.split(ids, borders), np.split(loss, borders), strict=True)
    return [encoder.decode(part).strip() for part, bears in parts if bears[0]]


@pytest.mark.parametrize("kind", ["bytes", "llama", "first"])
@pytest.mark.parametrize("template", ["amberchat", "crystalchat", "chatml", GENERATION])
def test_ids_and_mask_are_those_of_transformers(kind: str, template: str) -> None:
    from transformers import PreTrainedTokenizerFast

    chosen = ChatTemplate(template, "own") if template == GENERATION else load_template(template)
    made_ = encoder_of(kind, chosen)
    [found] = made_.encode(Conversation(TALK))
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(made(kind).data.decode()), bos_token="<s>", eos_token="</s>"
    )
    messages = [{"role": one.role, "content": one.content} for one in TALK]
    expected = other.apply_chat_template(
        messages,
        chat_template=chosen.text,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=template == GENERATION,
    )
    assert found.ids.tolist() == expected["input_ids"]
    if template == GENERATION:
        assert found.loss.astype(int).tolist() == expected["assistant_masks"]
    prompt = other.apply_chat_template(
        messages[:2], chat_template=chosen.text, tokenize=True, add_generation_prompt=True, return_dict=True
    )
    assert made_.prompt(TALK[:2]).tolist() == prompt["input_ids"]


@pytest.mark.parametrize("kind", ["bytes", "llama", "first"])
def test_the_answers_bear_loss_with_the_token_that_ends_them(kind: str) -> None:
    for template, ends in (("amberchat", ["</s>"] * 2), ("chatml", ["<|im_end|>"] * 2), ("crystalchat", ["", "</s>"])):
        [found] = encoder_of(kind, template).encode(Conversation(TALK))
        stretches = shown(made(kind), found.ids, found.loss)
        # LLaMA's kind has no words: a token that begins before the answer and ends in it bears loss
        expected = [f"so it is{ends[0]}", f"helpful{ends[1]}"]
        assert [one[-len(end) :] for one, end in zip(stretches, expected, strict=True)] == expected
        assert template != "chatml" or stretches == expected
    own = ChatTemplate(load_template("crystalchat").text, "own", ("<|im_start|>", "</s>"))
    [found] = encoder_of(kind, own).encode(Conversation(TALK))
    assert shown(made(kind), found.ids, found.loss) == ["so it is<|im_start|>", "helpful</s>"]


def test_the_last_answer_or_every_token() -> None:
    [last] = encoder_of("llama", "chatml", loss="last").encode(Conversation(TALK))
    assert shown(made("llama"), last.ids, last.loss) == ["helpful<|im_end|>"]
    [every] = encoder_of("llama", "chatml", loss="all").encode(Conversation(TALK))
    assert every.loss.all()
    assert every.ids.tolist() == last.ids.tolist()


@pytest.mark.parametrize("kind", ["bytes", "llama", "first"])
def test_a_control_token_that_a_message_spells_stays_text(kind: str) -> None:
    names = "</s> <s>x</s> <|im_end|> <unk>"
    [found] = encoder_of(kind, "chatml").encode(
        Conversation((Message("user", names), Message("assistant", f"{names} done")))
    )
    control = [token for token in made(kind).names_of(found.ids.tolist()) if token in SPECIAL]
    assert control == ["<|im_start|>", "<|im_end|>"] * 2
    assert made(kind).decode(found.ids).count("<s>x</s>") == 2
    assert shown(made(kind), found.ids, found.loss) == [f"{names} done<|im_end|>"]


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), min_size=2, max_size=4),
       st.sampled_from(["bytes", "llama", "first"]))  # fmt: skip
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_text_is_encoded_with_its_answers_exactly_or_refused(texts: list[str], kind: str) -> None:
    messages = tuple(Message("assistant" if number % 2 else "user", text) for number, text in enumerate(texts))
    try:
        [found] = encoder_of(kind, "chatml").encode(Conversation(messages))
    except TemplateError:
        return
    stretches = shown(made(kind), found.ids, found.loss)
    answers = [text for text in texts[1::2] if text.strip()]
    assert len(stretches) == len(answers)
    if kind == "bytes":
        assert stretches == [f"{text.strip()}{text[len(text.rstrip()) :]}<|im_end|>" for text in answers]


def turns(count: int) -> Conversation:
    said = [(Message("user", f"how are you? {number}"), Message("assistant", "so it is")) for number in range(count)]
    return Conversation((Message("system", "be brief"), *(message for pair in said for message in pair)))


def test_a_conversation_longer_than_a_row_is_cut_divided_or_refused() -> None:
    [whole] = encoder_of("bytes", "chatml").encode(turns(5))
    [two] = encoder_of("bytes", "chatml").encode(turns(2))
    width = len(two.ids) + 3
    [cut] = encoder_of("bytes", "chatml", width=width).encode(turns(5))
    assert cut.cut
    assert cut.ids.tolist() == whole.ids[:width].tolist()
    assert cut.loss.tolist() == whole.loss[:width].tolist()
    parts = encoder_of("bytes", "chatml", width=width, too_long="split").encode(turns(5))
    assert [part.cut for part in parts] == [False] * 3
    assert parts[0].ids.tolist() == two.ids.tolist()
    text = [made("bytes").decode(part.ids) for part in parts]
    assert [one.count("be brief") for one in text] == [1, 1, 1]
    assert [[number for number in range(5) if f"you? {number}" in one] for one in text] == [[0, 1], [2, 3], [4]]
    with pytest.raises(TemplateError, match=f"is {len(whole.ids)} tokens long, and a row has {width}"):
        encoder_of("bytes", "chatml", width=width, too_long="drop").encode(turns(5))


def test_a_part_that_is_too_long_alone_is_cut_and_one_without_an_answer_is_left_out() -> None:
    long = Conversation((Message("user", "how?"), Message("assistant", "so it is " * 30), Message("user", "and?")))
    [part] = encoder_of("bytes", "chatml", width=40, too_long="split").encode(long)
    assert part.cut
    assert len(part.ids) == 40
    assert part.loss.any()


def test_a_conversation_that_loses_its_answer_is_refused() -> None:
    asked = Conversation((Message("user", "how? " * 50), Message("assistant", "so")))
    for too_long in ("cut", "split"):
        with pytest.raises(TemplateError, match="the first 30, which fit in a row, hold nothing of an answer"):
            encoder_of("bytes", "chatml", width=30, too_long=too_long).encode(asked)
    dropped = ChatTemplate("{{ messages[0].content }}</s>", "own")
    with pytest.raises(TemplateError, match="has 1 answers, and its template shows 0 of them whole"):
        encoder_of("bytes", dropped).encode(asked)
    halved = ChatTemplate("{{ messages[0].content }}{{ messages[1].content[:1] }}", "own")
    with pytest.raises(TemplateError, match="shows 0 of them whole"):
        encoder_of("bytes", halved).encode(asked)
    twice = ChatTemplate("{{ messages[1].content }}{{ messages[1].content }}", "own")
    with pytest.raises(TemplateError, match="shows 2 of them"):
        encoder_of("bytes", twice).encode(asked)


def test_a_turn_end_that_the_tokenizer_lacks_is_refused() -> None:
    with pytest.raises(DataError, match="--turn-end <end>: is no control token"):
        control_names(made("bytes"), ("<end>",))


def test_the_pieces_of_crystalchat_are_encoded_one_by_one(tmp_path: Path) -> None:
    """Its preparation encoded each message alone and put ids between: the same ids, for LLaMA's kind of tokenizer."""
    [found] = encoder_of("llama", "crystalchat").encode(Conversation(TALK))
    encoder = made("llama")
    pieces = [encoder.encode([message.content], ["m"])[0].tolist() for message in TALK]
    name = {token: index for index, token in enumerate(encoder.names_of(range(encoder.vocab_size)))}
    expected = [name["<s>"], name["<|sys_start|>"], *pieces[0], name["<|sys_end|>"]]
    for asked, answered in ((pieces[1], pieces[2]), (pieces[3], pieces[4])):
        expected += [name["<|im_start|>"], *asked, name["<|im_end|>"], *answered]
    assert found.ids.tolist() == [*expected, name["</s>"]]
    loss = [0, 0, *[0] * len(pieces[0]), 0]
    for asked, answered in ((pieces[1], pieces[2]), (pieces[3], pieces[4])):
        loss += [0, *[0] * len(asked), 0, *[1] * len(answered)]
    assert found.loss.astype(int).tolist() == [*loss, 1]


def weighted(*weights: float) -> Conversation:
    """TALK's two answers, and one more turn for each further weight."""
    said = []
    for number, weight in enumerate(weights):
        said += [Message("user", f"how are you? {number}"), Message("assistant", f"so it is {number}", weight)]
    return Conversation(tuple(said))


@pytest.mark.parametrize("template", ["amberchat", "crystalchat", "chatml", GENERATION])
@pytest.mark.parametrize("kind", ["bytes", "llama", "first"])
def test_a_weight_is_of_the_tokens_that_bear_the_loss_of_its_answer(kind: str, template: str) -> None:
    chosen = ChatTemplate(template, "own") if template == GENERATION else load_template(template)
    encoder = encoder_of(kind, chosen)
    [plain] = encoder.encode(weighted(1, 1, 1))
    [found] = encoder.encode(weighted(0.5, 1, 2))
    assert plain.weights is None
    assert found.weights is not None
    assert found.weights.dtype == np.float32
    assert found.ids.tolist() == plain.ids.tolist()
    assert found.loss.tolist() == plain.loss.tolist()
    assert (found.weights[~found.loss] == 1).all()
    runs = np.flatnonzero(np.diff(found.loss.astype(int), prepend=0) == 1)
    assert found.weights[runs].tolist() == [0.5, 1, 2]
    assert len(np.flatnonzero(np.diff(found.weights[found.loss]))) == 2  # each answer has one weight throughout
    [last] = encoder_of(kind, chosen, loss="last").encode(weighted(0.5, 1, 2))
    assert last.weights is not None
    assert set(last.weights[last.loss].tolist()) == {2.0}


def test_an_answer_of_weight_zero_is_masked_and_ones_alone_are_no_weights() -> None:
    encoder = encoder_of("bytes", "chatml")
    [found] = encoder.encode(weighted(1, 0, 1))
    assert found.weights is None
    assert shown(made("bytes"), found.ids, found.loss) == ["so it is 0<|im_end|>", "so it is 2<|im_end|>"]
    with pytest.raises(TemplateError, match="has no token that bears loss"):
        encoder.encode(weighted(0, 0))
    with pytest.raises(TemplateError, match="has weights, and with --loss all every token bears loss"):
        encoder_of("bytes", "chatml", loss="all").encode(weighted(1, 0))


def test_weights_are_cut_and_divided_with_their_answers() -> None:
    [whole] = encoder_of("bytes", "chatml").encode(weighted(0.5, 2, 0, 4))
    [cut] = encoder_of("bytes", "chatml", width=len(whole.ids) - 30).encode(weighted(0.5, 2, 0, 4))
    assert cut.cut
    assert cut.weights is not None
    assert whole.weights is not None
    assert cut.weights.tolist() == whole.weights[: len(cut.ids)].tolist()
    width = len(whole.ids) // 4 + 8  # a turn each
    parts = encoder_of("bytes", "chatml", width=width, too_long="split").encode(weighted(0.5, 2, 0, 4))
    assert [set(part.weights[part.loss].tolist()) for part in parts if part.weights is not None] == [{0.5}, {2}, {4}]
    assert len(parts) == 3  # of the turn of weight 0 there is nothing to learn


def test_a_template_that_marks_its_own_answers_must_mark_as_many_as_have_weights() -> None:
    text = GENERATION.replace("{% for m in messages %}", "{% for m in messages[-2:] %}")
    encoder = encoder_of("bytes", ChatTemplate(text, "own"))
    assert encoder.encode(weighted(1, 1))
    with pytest.raises(
        TemplateError, match="has weights, and 2 messages of the assistant, of which its template marks 1"
    ):
        encoder.encode(weighted(1, 2))
