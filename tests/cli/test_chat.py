"""`weftrain chat` and `weftrain serve` from a run that was trained on conversations."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from click.testing import CliRunner, Result

from weftrain.cli.main import main
from weftrain.data_prep.tokens.training import train_encoder

Chat = Callable[..., Result]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset of conversations and a run of 2 steps on it."""
    folder = tmp_path_factory.mktemp("chat")
    said = [{"prompt": f"how are you, {number}?", "completion": f"well, {number}."} for number in range(80)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in said))
    (folder / "tokenizer.json").write_bytes(train_encoder([json.dumps(said)], 300).data)
    prep = ["prep", "chats.jsonl", "--name", "chats", "--output", "datasets", "--tokenizer", "tokenizer.json"]
    prep += ["--chat-template", "chatml", "--sequence-length", "64", "--heldout-fraction", "0"]
    small = ["hidden_size=32", "num_layers=1", "num_heads=2", "rotary_dim=16", "intermediate_size=32"]
    train = ["train", "amber_demo", "--run", "talker", "data.sources.0.path=chats", "data.sources.0.name=chats"]
    train += ["data.sequence_length=64", "schedule.steps=2", "model.vocab_size=332", "batch.global_batch_size=4"]
    train += ["batch.micro_batch_size=4", "log.evaluate_every_steps=0", "log.tensorboard=false"]
    train += [*(f"model.{one}" for one in small), "backend.options.compile=false"]
    before = Path.cwd()
    os.chdir(folder)
    try:
        for words in (prep, train):
            result = CliRunner().invoke(main, words)
            assert result.exit_code == 0, result.output
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def chat(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    monkeypatch.chdir(trained)

    def run(*words: str, said: str | None = None) -> Result:
        return CliRunner().invoke(main, ["chat", "runs/talker", "--max-new-tokens", "8", *words], input=said)

    return run


def test_messages_are_answered_in_turn(chat: Chat) -> None:
    result = chat("--message", "how are you, 3?", "--message", "and 4?")
    assert result.exit_code == 0, result.output
    assert result.output == chat("--message", "how are you, 3?", "--message", "and 4?").output
    assert "<|im_end|>" not in result.output


def test_a_dialogue_goes_on_after_what_cannot_be_answered_and_begins_again(chat: Chat) -> None:
    one = chat("--message", "hello").output
    result = chat(said="hello\n\n/again\n/new\nhello\n" + "too long " * 500 + "\n/what\nhello\n/quit\nnot read\n")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(one * 3)
    assert "positions" in result.stderr
    assert "there is /new, /again" in result.stderr
    assert "nothing was answered yet" in chat(said="/again\n").stderr


def test_a_system_message_changes_the_prompt(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    from weftrain.analysis.serving.model import ServedModel

    prompts = []
    ids = ServedModel.conversation_ids

    def kept(self: ServedModel, messages: list[dict[str, str]]) -> list[int]:
        prompts.append(self.decode(ids(self, messages)))
        return ids(self, messages)

    monkeypatch.setattr(ServedModel, "conversation_ids", kept)
    chat("--system", "be kind", said="a\n/system be brief\nb\n")
    assert prompts[0] == "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert prompts[1].startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nb<|im_end|>")


def test_a_model_without_a_template_says_what_to_do(chat: Chat) -> None:
    other = chat("--tokenizer", "tokenizer.json", "--message", "a")
    assert other.exit_code == 2
    assert "has no chat template: name one with --chat-template" in other.output
    named = chat("--tokenizer", "tokenizer.json", "--chat-template", "amberchat", "--message", "a")
    assert named.exit_code == 0, named.output


def test_serve_answers_a_client_on_loopback_until_it_is_interrupted(trained: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "weftrain.cli", "serve", "runs/talker", "--port", "0", "--rows", "2"],
        cwd=trained,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        address = ""
        for line in process.stdout:
            if found := re.search(r"model talker at (http://127\.0\.0\.1:\d+/v1): chats by", line):
                address = found[1]
            if "of cache" in line:
                break
        client = openai.OpenAI(base_url=address, api_key="none", timeout=60)
        answer = client.chat.completions.create(
            model="talker", messages=[{"role": "user", "content": "how are you, 3?"}], temperature=0, max_tokens=4
        )
        assert answer.usage is not None
        assert 0 <= answer.usage.completion_tokens <= 4
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert "tokens were made" in output
        assert "Traceback" not in output
    finally:
        process.kill()


def test_a_port_that_is_taken(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.chdir(trained)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(main, ["serve", "runs/talker", "--port", str(port)])
    assert result.exit_code == 2
    assert f"port {port}: Address already in use: name another with --port" in result.output
