"""The server, asked by OpenAI's own client, by many at once, and by those that misbehave."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn
from tokenizers import Tokenizer

from weftrain.analysis.evaluation.generation import Generator, load_model
from weftrain.analysis.serving import protocol
from weftrain.analysis.serving.engine import Engine
from weftrain.analysis.serving.http import Server
from weftrain.analysis.serving.model import ServedModel
from weftrain.core.parameters import Role, parameter_specs
from weftrain.core.recipe_file import load_recipe
from weftrain.data_prep.conversations.prompts import open_prompts
from weftrain.data_prep.tokens.training import train_encoder

POSITIONS = 96


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    folder = tmp_path_factory.mktemp("served")
    encoder = train_encoder(["the cat sat on the mat and said how are you today, user and assistant"] * 3, 300)
    (folder / "tokenizer.json").write_bytes(encoder.data)
    small = [
        "hidden_size=48",
        "num_layers=2",
        "num_heads=4",
        "rotary_dim=12",
        "intermediate_size=64",
        f"vocab_size={encoder.vocab_size}",
    ]
    small.append(f"max_position_embeddings={POSITIONS}")
    more = ["data.sequence_length=64", "precision.compute=float32"]
    recipe = load_recipe("amber_demo", [*(f"model.{one}" for one in small), *more]).recipe
    config = recipe.model
    generator = torch.Generator().manual_seed(0)
    weights = {
        spec.name: (spec.role is Role.NORM_WEIGHT) + 0.35 * torch.randn(spec.shape, generator=generator)
        for spec in parameter_specs(config)
    }
    loaded = load_model(weights, config)
    file = folder / "tokenizer.json"
    tokenizer, chat = Tokenizer.from_file(str(file)), open_prompts(file, None, "chatml")
    return ServedModel("demo", config, lambda: loaded, tokenizer, False, tokenizer.token_to_id("</s>"), chat)


class Running:
    """A server on a port of its own, in a thread."""

    def __init__(self, model: ServedModel, rows: int = 32, waiting: int = 256) -> None:
        self.model = model
        self.engine = Engine(model.load(), rows, POSITIONS, waiting)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        config = uvicorn.Config(Server(model, self.engine).app(), log_level="warning", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> Running:
        self.engine.__enter__()
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        self.engine.__exit__(None, None, None)
        self._socket.close()

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=60)

    def post(self, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def running(model: ServedModel) -> Iterator[Running]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with Running(model) as found:
        yield found
    torch.set_num_threads(before)


def greedy(model: ServedModel, prompt: list[int], most: int, chat: bool = False) -> str:
    stop_ids = model.chat_stop_ids if chat else model.stop_ids
    [row] = Generator(model.load()).generate([prompt], most, stop_ids=stop_ids)
    text = model.decode([*prompt, *row])[len(model.decode(prompt)) :]
    return text.lstrip() if chat else text


def test_models_are_listed(running: Running) -> None:
    assert [one.id for one in running.client.models.list()] == ["demo"]


def test_a_completion_and_its_usage(running: Running) -> None:
    answer = running.client.completions.create(model="demo", prompt="the cat", max_tokens=20, temperature=0)
    ids = running.model.text_ids("the cat")
    assert answer.choices[0].text == greedy(running.model, ids, 20)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens <= 20


def test_a_chat_answer_is_the_models_own_by_its_template(running: Running) -> None:
    said = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "how are you?"}]
    answer = running.client.chat.completions.create(
        model="demo", messages=said, temperature=0, max_completion_tokens=15
    )
    prompt = running.model.conversation_ids(said)
    assert running.model.decode(prompt).endswith("<|im_start|>assistant\n")
    assert answer.choices[0].message.content == greedy(running.model, prompt, 15, chat=True)
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_a_stream_has_the_same_text(running: Running) -> None:
    said = [{"role": "user", "content": "the mat"}]
    whole = running.client.chat.completions.create(model="demo", messages=said, temperature=0, max_tokens=20)
    stream = running.client.chat.completions.create(
        model="demo", messages=said, temperature=0, max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    pieces = running.client.completions.create(model="demo", prompt="the", max_tokens=9, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == greedy(running.model, running.model.text_ids("the"), 9)


def test_seeds_and_several_choices(running: Running) -> None:
    def ask(seed: int) -> list[str]:
        answer = running.client.completions.create(model="demo", prompt="a", max_tokens=12, seed=seed, n=3)
        return [choice.text for choice in answer.choices]

    assert ask(5) == ask(5)
    assert len(set(ask(5))) == 3
    assert ask(5) != ask(6)


def test_a_stop_word_ends_the_text(running: Running) -> None:
    whole = running.client.completions.create(model="demo", prompt="the cat", max_tokens=30, temperature=0)
    text = whole.choices[0].text
    stop = text[4:7]
    answer = running.client.completions.create(
        model="demo", prompt="the cat", max_tokens=30, temperature=0, stop=[stop, "never there"]
    )
    assert answer.choices[0].text == text[: text.find(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_32_at_once_get_each_their_own_answer(running: Running) -> None:
    prompts = [f"the cat {number} sat on {number * 7}" for number in range(32)]

    def ask(prompt: str) -> str:
        answer = running.client.completions.create(model="demo", prompt=prompt, max_tokens=24, temperature=0)
        return answer.choices[0].text

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, prompts))
    assert answers == [greedy(running.model, running.model.text_ids(prompt), 24) for prompt in prompts]


@pytest.mark.parametrize(
    ("path", "body", "status", "why"),
    [
        ("completions", b"{", 400, "is no JSON"),
        ("completions", b"[]", 400, "dictionary"),
        ("completions", b"{}", 400, "prompt: Field required"),
        ("completions", b'{"prompt": "a", "temperature": "hot"}', 400, "temperature"),
        ("completions", b'{"prompt": "a", "n": 1000}', 400, "n: Input should be less than or equal to 16"),
        ("completions", b'{"prompt": "a", "logprobs": 3}', 400, "'logprobs' is not done by this server"),
        ("completions", b'{"prompt": "a", "model": "other"}', 404, "model 'other' is not here: this is 'demo'"),
        ("completions", b'{"prompt": []}', 400, "is empty"),
        ("completions", b'{"prompt": [99999]}', 400, "outside the model's vocabulary"),
        ("completions", b'{"prompt": "a", "max_tokens": 1000}', 400, "positions"),
        ("completions", json.dumps({"prompt": "a", "stop": ["x"] * 10_000}).encode(), 400, "at most 16"),
        ("chat/completions", b'{"messages": []}', 400, "at least 1"),
        ("chat/completions", b'{"messages": [{"role": "narrator", "content": "a"}]}', 400, "the roles are"),
        ("chat/completions", b'{"messages": [{"role": "user", "content": "a"}], "tools": [{}]}', 400, "'tools' is not"),
        ("chat/completions", b"[" * 100_000, 400, "is no JSON"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_answered_is_told_why_in_one_line(
    running: Running, path: str, body: bytes, status: int, why: str
) -> None:
    found, text = running.post(f"/v1/{path}", body)
    message = json.loads(text)["error"]["message"]
    assert found == status
    assert why in message
    assert "\n" not in message
    assert len(message) < 400


def test_ten_megabytes_are_too_many(running: Running) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        running.client.completions.create(model="demo", prompt="a" * (10 << 20))
    assert caught.value.status_code == 413
    assert f"more than {protocol.MAX_BODY_BYTES:,} bytes" in str(caught.value)


def test_another_hosts_name_is_refused(running: Running) -> None:
    assert running.post("/v1/completions", b'{"prompt": "a"}', Host="evil.example")[0] == 400


def test_a_client_that_goes_away_frees_its_row(model: ServedModel) -> None:
    with Running(model, rows=1) as alone:
        body = json.dumps({"prompt": "a", "max_tokens": 90, "stream": True, "temperature": 0}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", alone.port)) as rude:
            rude.sendall(head.encode() + body)
            rude.recv(100)
        answer = alone.client.completions.create(model="demo", prompt="the cat", max_tokens=5, temperature=0)
        assert answer.choices[0].text == greedy(model, model.text_ids("the cat"), 5)


def test_too_many_are_told_to_come_again(model: ServedModel) -> None:
    with Running(model, rows=1, waiting=1) as small:
        statuses: list[int] = []

        def ask(_: int) -> None:
            body = json.dumps({"prompt": "a", "max_tokens": 90, "temperature": 0, "n": 2}).encode()
            statuses.append(small.post("/v1/completions", body)[0])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(8)))
        assert set(statuses) <= {200, 503}
        assert 503 in statuses
        assert small.post("/v1/completions", b'{"prompt": "a", "max_tokens": 2}')[0] == 200


def test_a_model_without_a_template_completes_only(model: ServedModel, tmp_path: Path) -> None:
    import dataclasses

    with Running(dataclasses.replace(model, chat=None)) as plain:
        status, text = plain.post("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a"}]}')
        assert (status, "has no chat template" in text) == (400, True)
        assert plain.post("/v1/completions", b'{"prompt": "a", "max_tokens": 2}')[0] == 200
