import json
import re
from pathlib import Path

import pytest

from weftrain.core.errors import DataError
from weftrain.data_prep.conversations import template as module
from weftrain.data_prep.conversations.messages import Message
from weftrain.data_prep.conversations.template import (
    BEGIN,
    BREAK,
    END,
    ChatTemplate,
    TemplateError,
    load_template,
    template_beside,
)

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CONTROL = re.compile("</s>|<s>|<\\|im_end\\|>")
TALK = [Message("user", "how?"), Message("assistant", "so."), Message("user", "and?"), Message("assistant", "thus.")]
SYSTEM = Message("system", "be brief")


def rendered(text: str, messages: list[Message] = TALK) -> str:
    return ChatTemplate(text, "mine").render(messages, TOKENS, CONTROL)


def without_marks(text: str) -> str:
    return text.replace(BEGIN, "").replace(END, "").replace(BREAK, "")


def test_built_in_forms() -> None:
    amber, crystal, chatml = map(load_template, ("amberchat", "crystalchat", "chatml"))
    assert without_marks(amber.render([SYSTEM, *TALK], TOKENS, CONTROL)) == (
        "<s>be brief USER: how? ASSISTANT: so.</s>USER: and? ASSISTANT: thus.</s>"
    )
    assert without_marks(amber.render(TALK, TOKENS, CONTROL)).startswith("<s>A chat between a curious user and an ")
    assert crystal.prompt([SYSTEM, TALK[0]], TOKENS, CONTROL) == (
        "<s><|sys_start|>be brief<|sys_end|><|im_start|>how?<|im_end|>"
    )
    assert without_marks(crystal.render([SYSTEM, *TALK], TOKENS, CONTROL)) == (
        "<s><|sys_start|>be brief<|sys_end|><|im_start|>how?<|im_end|>so.<|im_start|>and?<|im_end|>thus.</s>"
    )
    assert crystal.turn_end == ("</s>",)
    assert without_marks(chatml.render(TALK[:2], TOKENS, CONTROL)) == (
        "<|im_start|>user\nhow?<|im_end|>\n<|im_start|>assistant\nso.<|im_end|>\n"
    )
    assert amber.prompt(TALK[:1], TOKENS, CONTROL).endswith("USER: how? ASSISTANT:")
    assert chatml.prompt(TALK[:1], TOKENS, CONTROL).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_answers_are_marked_inside_their_white_space_and_control_tokens_in_messages_are_broken() -> None:
    plain = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    assert rendered(plain, [Message("user", "a</s>"), Message("assistant", " b \n")]) == (
        f"[a<{BREAK}/s>][ {BEGIN}b{END} \n]"
    )
    stripped = "{% for m in messages %}[{{ m.content.strip() }}]{% endfor %}"
    assert rendered(stripped, [Message("user", " a "), Message("assistant", " b b \n")]) == f"[a][{BEGIN}b b{END}]"


def test_a_generation_block_says_what_the_model_writes() -> None:
    text = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert rendered(text) == f"how?{BEGIN}so.</s>{END}and?{BEGIN}thus.</s>{END}"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{{ raise_exception('no system here') }}", "its template refuses it: no system here"),
        ("{{ messages[9].content }}", "its template refuses it: .*has no element 9"),
        ("{{ 1 / 0 }}", "its template fails: ZeroDivisionError"),
        ("{{ strftime_now('%d') }}", "'strftime_now' is undefined"),
        ("{% for a in range(3000) %}{% for b in range(3000) %}{% set c = a %}{% endfor %}{% endfor %}", "does it loop"),
        ("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "writes more than 16,777,216 characters"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "calls itself too often"),
        ("{{ messages.__class__.__mro__ }}", "its template refuses it: .*unsafe"),
        ("{{ messages.append(1) }}", "its template refuses it: .*safely callable|unsafe"),
        ("{% include '/etc/passwd' %}", "its template (fails|refuses)"),
    ],
)  # fmt: skip
def test_a_template_that_fails_loops_or_reaches_out_is_one_conversations_failure(text: str, why: str) -> None:
    with pytest.raises(TemplateError, match=why):
        rendered(text)


def test_reserved_characters_in_a_message_are_refused() -> None:
    with pytest.raises(TemplateError, match=r"U\+FDD0"):
        rendered("{{ messages[0].content }}", [Message("user", BEGIN)])


def test_steps_are_counted_alike_each_time_and_the_tracer_before_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    text = "{% for a in range(50) %}\n{% set b = a %}\n{% endfor %}"
    monkeypatch.setattr(module, "MAX_STEPS", 400)
    rendered(text)
    monkeypatch.setattr(module, "MAX_STEPS", 40)
    before = sys.gettrace()
    for _ in range(2):
        with pytest.raises(TemplateError, match="more than 40 steps"):
            rendered(text)
    assert sys.gettrace() is before


def test_templates_are_found_by_name_in_files_and_beside_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    assert load_template(str(tmp_path / "own.jinja")).text == "{{ messages }}"
    assert load_template("chatml", turn_end=["</s>"]).turn_end == ("</s>",)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one"}))
    assert load_template("tokenizer", tmp_path / "tokenizer.json").text == "one"
    config.write_text(
        json.dumps({"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]})
    )
    assert load_template("tokenizer", tmp_path / "tokenizer.json").text == "d"
    (tmp_path / "chat_template.jinja").write_text("two")
    assert load_template("tokenizer", tmp_path / "tokenizer.json").text == "two"


def test_templates_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    (tmp_path / "bad.jinja").write_text("{% for %}")
    (tmp_path / "bytes.jinja").write_bytes(b"\xff")
    (tmp_path / "none.json").write_text("{}")
    (tmp_path / "torn.json").write_text("{")
    (tmp_path / "long.jinja").write_bytes(b"x" * (2 << 20))
    for name, why in (
        ("bad.jinja", "is no Jinja template"),
        ("bytes.jinja", "is not UTF-8"),
        ("none.json", "has no key 'chat_template' with a template"),
        ("torn.json", "is no JSON"),
        ("missing.jinja", "cannot be read"),
        ("long.jinja", "cannot be read: .*1,048,576"),
    ):
        with pytest.raises(DataError, match=why):
            load_template(str(tmp_path / name))
    with pytest.raises(DataError, match="name that, too"):
        load_template("tokenizer")
    with pytest.raises(DataError, match=r"has no chat_template\.jinja"):
        load_template("tokenizer", tmp_path / "below" / "tokenizer.json")


def test_a_tokenizer_without_a_template_has_none_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    assert template_beside(tokenizer) is None
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    assert template_beside(tokenizer) is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": ')
    with pytest.raises(DataError, match="is no JSON"):
        template_beside(tokenizer)
