"""`dsgpt serve` as the openai client and plain HTTP see it; answers against those of the model alone."""

from __future__ import annotations

import json
import signal
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from click.testing import CliRunner

from dsgpt.checkpoint.inference import load_for_use
from dsgpt.cli import cli
from dsgpt.errors import ConfigError
from dsgpt.generate.chat import Chat
from dsgpt.generate.sampling import Sampling
from dsgpt.generate.text import complete, text_prompt
from dsgpt.serve.worker import Worker
from tests.chat_folder import CONTEXT
from tests.serve.conftest import serving

GREEDY = {"temperature": 0, "max_tokens": 12}
WORDS = [
    "import",
    "os",
    "def",
    "class",
    "return",
    "self",
    "value",
    "for",
    "in",
    "range",
    "len",
    "not",
    "and",
    "or",
    "x",
    "=",
]
PROMPTS = [" ".join(WORDS[i % 16 :] + WORDS[: i % 7]) for i in range(50)]


@pytest.fixture(scope="module")
def alone(model_folder):
    """What the model says to each of PROMPTS, without a server."""
    loaded = load_for_use(str(model_folder), "cpu")
    prompts = [text_prompt(loaded.tokenizer, text) for text in PROMPTS]
    return loaded, complete(loaded.model, loaded.tokenizer, prompts, Sampling(12, temperature=0))


def test_a_completion_is_what_the_model_says_alone(client, alone):
    loaded, expected = alone
    for prompt, one in zip(PROMPTS[:3], expected, strict=False):
        done = client.completions.create(model="small", prompt=prompt, **GREEDY)
        choice = done.choices[0]
        assert (choice.text, choice.finish_reason) == (one.text, one.finish)
        begun = len(text_prompt(loaded.tokenizer, prompt).ids)
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (begun, one.tokens)


def test_a_chat_is_the_same_whole_and_in_pieces_and_by_the_template(client, alone):
    messages = [{"role": "user", "content": "How do I open a file?"}]
    loaded, _ = alone
    prompt = Chat(loaded.tokenizer).prompt(messages)
    (expected,) = complete(loaded.model, loaded.tokenizer, [prompt], Sampling(30, temperature=0))
    asked = {"model": "small", "messages": messages, "temperature": 0, "max_completion_tokens": 30}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == expected.text
    assert whole.usage.total_tokens == len(prompt.ids) + expected.tokens
    pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(one.choices[0].delta.content or "" for one in pieces if one.choices) == expected.text
    assert [one.choices[0].finish_reason for one in pieces if one.choices][-1] == expected.finish
    assert pieces[-1].usage.completion_tokens == expected.tokens and len(pieces) > 10
    assert len({one.id for one in pieces}) == 1


def test_fifty_streams_at_once_are_each_what_it_is_alone(client, alone):
    def ask(prompt):
        pieces = client.completions.create(model="small", prompt=prompt, stream=True, **GREEDY)
        found = [(one.choices[0].text, one.choices[0].finish_reason) for one in pieces]
        return "".join(text for text, _ in found), found[-1][1]

    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(ask, PROMPTS))
    assert answers == [(one.text, one.finish) for one in alone[1]]


def test_seeds_stops_and_names(client):
    drawn = {"model": "small", "prompt": "import", "max_tokens": 24, "temperature": 1.0}
    one, two, other = (client.completions.create(**drawn, seed=seed).choices[0].text for seed in (1, 1, 2))
    assert one == two != other
    stop = one[4:6]
    ended = client.completions.create(**drawn, seed=1, stop=[stop, "never"]).choices[0]
    assert ended.text == one.partition(stop)[0] and ended.finish_reason == "stop"
    same = client.completions.create(**drawn, seed=1, extra_body={"top_k": 1, "repetition_penalty": 1.0})
    assert same.choices[0].text == client.completions.create(**{**drawn, "temperature": 0}).choices[0].text
    assert [model.id for model in client.models.list()] == ["small"] and client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match="this is small"):
        client.models.retrieve("large")


def post(url, path, body):
    """(status, parsed answer) of raw bytes."""
    request = urllib.request.Request(
        url.removesuffix("/v1") + path, data=body, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


JSON = "application/json"
USER = [{"role": "user", "content": "x"}]
BAD = {
    "not JSON": ("/v1/completions", b"{", 400, "Invalid JSON"),
    "not an object": ("/v1/completions", b"[1]", 400, "body"),
    "no prompt": ("/v1/completions", {}, 400, "prompt"),
    "a number": ("/v1/completions", {"prompt": 5}, 400, "prompt"),
    "two prompts": ("/v1/completions", {"prompt": ["x", "y"]}, 400, "prompt"),
    "not UTF-8": ("/v1/completions", b'{"prompt": "\xff"}', 400, ""),
    "a surrogate": ("/v1/completions", b'{"prompt": "\\ud800"}', 400, ""),
    "too long": ("/v1/completions", {"prompt": "word " * 500}, 400, f"context of {CONTEXT}"),
    "too hot": ("/v1/completions", {"prompt": "x", "temperature": 9}, 400, "temperature"),
    "not finite": ("/v1/completions", b'{"prompt": "x", "temperature": NaN}', 400, ""),
    "two answers": ("/v1/completions", {"prompt": "x", "n": 2}, 400, "n: "),
    "no tokens": ("/v1/completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
    "an empty stop": ("/v1/completions", {"prompt": "x", "stop": ""}, 400, "stop"),
    "an unknown field": ("/v1/completions", {"prompt": "x", "beams": 4}, 400, "beams"),
    "no messages": ("/v1/chat/completions", {"messages": []}, 400, "no message"),
    "an unknown role": ("/v1/chat/completions", {"messages": [{"role": "wizard", "content": "x"}]}, 400, "wizard"),
    "an image": ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "x"}]}]}, 400, "not text: x"),
    "a forced tool": ("/v1/chat/completions", {"messages": USER, "tool_choice": "required"}, 400, "tool_choice"),
    "a long chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 500}]}, 400, "context"),
    "nested": ("/v1/chat/completions", b'{"messages": ' + b"[" * 5000, 400, ""),
    "as cold as can be": ("/v1/completions", {"prompt": "x", "repetition_penalty": 1e-40}, 400, "repetition_penalty"),
    "far too many": ("/v1/chat/completions", {"messages": [0] * 3000}, 400, "messages"),
    "far too long": ("/v1/completions", {"prompt": "x" * 60_000}, 400, f"context of {CONTEXT}"),
    "oversized": ("/v1/completions", b'{"prompt": "' + b"x" * (5 << 20) + b'"}', 413, "larger"),
    "unknown place": ("/v1/embeddings", {"input": "x"}, 404, ""),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_answered_by_4xx_and_the_server_goes_on(what, server, client):
    path, body, status, seen = BAD[what]
    code, answer = post(server, path, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert code == status, answer
    assert answer["error"]["type"] == "invalid_request_error" and seen in answer["error"]["message"]
    assert client.completions.create(model="small", prompt="x", max_tokens=1).usage.completion_tokens <= 1


def test_a_web_page_cannot_use_it(server):
    """Neither by a form, whose type is no JSON, nor under a name that leads here."""
    place, body = server + "/completions", json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    for headers, status in (
        ({"Content-Type": "text/plain"}, 415),
        ({"Host": "evil.example", "Content-Type": JSON}, 400),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(place, data=body, headers=headers), timeout=60)
        assert refused.value.code == status


def test_numbers_at_the_edge_of_what_is_allowed_end_no_other_answer(client, alone):
    """Nearly no temperature, nearly no probability: the likeliest token, beside a stream that goes on."""
    begun = client.completions.create(model="small", prompt=PROMPTS[0], stream=True, **GREEDY)
    found = [next(begun).choices[0].text]
    for edge in ({"temperature": 1e-40}, {"top_p": 1e-50}, {"temperature": 1e-5, "top_p": 1e-9}):
        done = client.completions.create(model="small", prompt=PROMPTS[1], max_tokens=12, **edge)
        assert done.choices[0].text == alone[1][1].text
    found += [piece.choices[0].text for piece in begun]
    assert "".join(found) == alone[1][0].text


def test_between_two_steps_no_more_are_let_in_than_there_are_places(model_folder, monkeypatch):
    """Requests that end with their first token would else be let in one after another while a running answer waits."""
    monkeypatch.setattr(Worker, "_run", lambda self: None)
    loaded = load_for_use(str(model_folder), "cpu")
    worker, told = Worker(loaded, batch_size=4, max_waiting=100), []
    prompt = text_prompt(loaded.tokenizer, "x")
    worker.submit(prompt, Sampling(50, temperature=0), told.append)
    worker._admit()
    short = [worker.submit(prompt, Sampling(1, temperature=0), lambda event: None) for _ in range(20)]
    worker._admit()
    assert worker.load == {"running": 1, "waiting": 17} and len(told) >= 1
    for job in short[5:]:
        worker.cancel(job)
    assert worker.load["waiting"] == 2, "who has left takes no place in the queue"
    worker.close()


def running(url):
    with urllib.request.urlopen(url.removesuffix("/v1") + "/health", timeout=10) as answer:
        return json.load(answer)["running"]


def wait_until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


def test_a_client_that_leaves_in_its_request_costs_nothing(server, client):
    host, port = server.removeprefix("http://").removesuffix("/v1").split(":")
    lines = (
        "POST /v1/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        "Content-Length: 500",
    )
    for _ in range(20):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall("\r\n".join((*lines, "", '{"prompt"')).encode())
    assert client.completions.create(model="small", prompt="x", max_tokens=1)


@pytest.mark.parametrize("streamed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_client_that_leaves_frees_its_place(streamed, long_folder):
    with serving(long_folder, "--batch-size", 1) as (_, url):
        host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
        body = json.dumps({"prompt": "import", "max_tokens": 20_000, "temperature": 0, "stream": streamed}).encode()
        lines = ("POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")
        head = "\r\n".join((*lines, f"Content-Length: {len(body)}", "", "")).encode()
        with ThreadPoolExecutor(1) as threads:
            for _ in range(5):
                with socket.create_connection((host, int(port))) as connection:
                    connection.sendall(head + body)
                    time.sleep(0.05)
            last = openai.OpenAI(base_url=url, api_key="none", timeout=60, max_retries=0)
            done = threads.submit(last.completions.create, model="small", prompt="x", max_tokens=2).result()
        assert done.usage.completion_tokens <= 2
        assert wait_until(lambda: running(url) == 0)


@pytest.mark.slow
def test_too_many_are_turned_away_and_the_others_are_answered(model_folder):
    with serving(model_folder, "--batch-size", 1, "--max-waiting", 2) as (_, url):
        client = openai.OpenAI(base_url=url, api_key="none", timeout=60, max_retries=0)

        def ask(number):
            try:
                return client.completions.create(
                    model="small", prompt="x", max_tokens=200, seed=number
                ).usage.total_tokens
            except openai.RateLimitError:
                return 0

        with ThreadPoolExecutor(12) as threads:
            answers = list(threads.map(ask, range(12)))
        assert 3 <= sum(map(bool, answers)) < 12


def test_a_key_is_asked_for_where_one_is_set(model_folder):
    with serving(model_folder, DSGPT_API_KEY="opensesame") as (_, url):
        right, wrong = (openai.OpenAI(base_url=url, api_key=key, max_retries=0) for key in ("opensesame", "opensesam"))
        assert right.completions.create(model="small", prompt="x", max_tokens=1)
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()


def test_sigterm_lets_an_answer_end(model_folder):
    with serving(model_folder) as (process, url):
        client = openai.OpenAI(base_url=url, api_key="none", timeout=60, max_retries=0)
        pieces = client.completions.create(model="small", prompt="x", max_tokens=200, stream=True, seed=1)
        first = next(pieces)
        process.send_signal(signal.SIGTERM)
        rest = list(pieces)
        assert first and rest[-1].choices[0].finish_reason in ("stop", "length")
        assert process.wait(timeout=60) == 0


def test_a_port_in_use_and_a_foreign_address_are_errors(model_folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(cli, ["serve", str(model_folder), "--port", str(port)])
    assert isinstance(done.exception, ConfigError) and "port is in use" in str(done.exception)
    done = CliRunner().invoke(cli, ["serve", str(model_folder), "--host", "192.0.2.1", "--port", "0"])
    assert isinstance(done.exception, ConfigError) and "cannot be served" in str(done.exception)


@pytest.mark.slow
def test_a_model_without_template_completes_and_says_that_it_does_not_chat(model_folder):
    template = model_folder / "chat_template.jinja"
    text = template.read_text()
    template.unlink()
    try:
        with serving(model_folder) as (_, url):
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
            assert client.completions.create(model="small", prompt="x", max_tokens=1)
            with pytest.raises(openai.BadRequestError, match="no chat template"):
                client.chat.completions.create(model="small", messages=USER)
    finally:
        template.write_text(text)
