"""`dsgpt generate` and `dsgpt chat` as one types them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from dsgpt.checkpoint.inference import load_for_use
from dsgpt.cli import cli
from dsgpt.errors import CheckpointError, DataError, OutOfMemoryError
from dsgpt.generate.chat import Chat
from dsgpt.generate.sampling import Sampling
from dsgpt.generate.text import Prompt, complete, text_prompt
from tests.chat_folder import CONTEXT

GREEDY = ("--temperature", "0", "--max-new-tokens", "12")


def run(*arguments, **options):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], **options)


@pytest.fixture(scope="module")
def loaded(model_folder):
    return load_for_use(str(model_folder), "cpu")


def expected(loaded, prompts):
    return [one.text for one in complete(loaded.model, loaded.tokenizer, prompts, Sampling(12, temperature=0))]


def test_prompts_come_as_options_as_lines_and_as_records(loaded, model_folder, tmp_path):
    texts = ["import os", "def f(x):", "class A"]
    ways = expected(loaded, [text_prompt(loaded.tokenizer, text) for text in texts])
    one = json.loads(run("generate", model_folder, "--prompt", texts[0], *GREEDY, "--json").stdout)
    assert (one["prompt"], one["text"], one["tokens"], one["finish"]) == (texts[0], ways[0], 12, "length")
    (tmp_path / "p.txt").write_text("\n\n".join(texts))
    shown = run("generate", model_folder, "--prompts", tmp_path / "p.txt", *GREEDY, "--json").stdout.splitlines()
    assert [json.loads(line)["text"] for line in shown] == ways
    given = [word for text in texts for word in ("--prompt", text)]
    shown = run("generate", model_folder, *given, *GREEDY, "--batch-size", 2).stdout
    assert shown == "".join(f"{text}{way}\n" for text, way in zip(texts, ways, strict=True))
    messages = [{"role": "user", "content": "Hello"}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": messages, "id": 7}) + "\n")
    record = json.loads(run("generate", model_folder, "--prompts", tmp_path / "p.jsonl", *GREEDY, "--json").stdout)
    own = run(
        "generate", model_folder, "--prompts", tmp_path / "p.jsonl", "--chat-template", "chatml", *GREEDY, "--json"
    )
    assert json.loads(own.stdout)["text"] == record["text"], "the template of this model is the shipped one"
    assert record["id"] == 7 and [record["text"]] == expected(loaded, [Chat(loaded.tokenizer).prompt(messages)])


@pytest.mark.parametrize(
    "content, seen",
    [
        ("p.jsonl", b"{"),
        ("p.jsonl", b'{"text": "x"}'),
        ("p.txt", b"\xff\xfe"),
        ("p.txt", b"\n \n"),
        ("p.jsonl", b'{"messages": []}'),
        ("p.txt", b"short\n" + b"word " * 500),
    ],
    ids=["json", "record", "utf-8", "empty", "no-message", "too-long"],
)
def test_prompts_that_are_none_say_why(content, seen, model_folder, tmp_path):
    (tmp_path / content).write_bytes(seen)
    done = run("generate", model_folder, "--prompts", tmp_path / content)
    assert isinstance(done.exception, DataError)
    told = (
        "is not JSON",
        "is no prompt",
        "not UTF-8",
        "no message",
        "there are no prompts",
        "prompt 2 of 2 does not fit",
    )
    assert any(word in str(done.exception) for word in told)


def test_what_ends_a_text_is_read_as_transformers_reads_it(loaded, model_folder, tmp_path):
    """Instruction models name several tokens in generation_config.json; without that file it is config.json that counts."""
    ids = text_prompt(loaded.tokenizer, "import os").ids
    (free,) = complete(loaded.model, loaded.tokenizer, [Prompt(ids)], Sampling(12, temperature=0))
    said = loaded.tokenizer.encode(free.text)
    for name in ("generation_config.json", "config.json"):
        folder = Path(shutil.copytree(model_folder, tmp_path / name))
        (folder / "generation_config.json").unlink(missing_ok=True)
        told = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(told | {"eos_token_id": [loaded.tokenizer.eos_id, said[5]]}))
        theirs = (
            AutoModelForCausalLM.from_pretrained(folder)
            .generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0, len(ids) :]
            .tolist()
        )
        assert theirs[-1] == said[5] and len(theirs) < 12
        told = json.loads(run("generate", folder, "--prompt", "import os", *GREEDY, "--json").stdout)
        assert (told["tokens"], told["finish"]) == (len(theirs) - 1, "stop")
        assert load_for_use(str(folder), "cpu").tokenizer.end_ids == (loaded.tokenizer.eos_id, said[5])
    (folder / "generation_config.json").write_text("{")
    done = run("generate", folder, "--prompt", "x")
    assert isinstance(done.exception, CheckpointError) and "generation_config.json" in str(done.exception)


def test_lines_end_where_lines_end(loaded, model_folder, tmp_path):
    """Not at the other characters that Python calls line ends."""
    texts = ["a\u2028b", "c\u0085d"]
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in texts)
    )
    shown = run("generate", model_folder, "--prompts", tmp_path / "p.jsonl", *GREEDY, "--json").stdout.split("\n")
    assert [json.loads(line)["prompt"] for line in shown if line] == texts
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n\n{\n')
    done = run("generate", model_folder, "--prompts", tmp_path / "bad.jsonl")
    assert "bad.jsonl:3" in str(done.exception)


def test_a_chat_goes_on_after_an_answer_of_nothing(model_folder, loaded):
    first = run("chat", model_folder, *GREEDY, input="Hello\n").stdout
    done = run("chat", model_folder, *GREEDY, "--stop", first[:1], input="Hello\nHello\n")
    assert done.exit_code == 0 and done.stdout == "\n\n"


def test_options_that_cannot_be_are_refused_at_once(model_folder):
    for wrong in (
        ("--top-p", "0"),
        ("--top-k", "-1"),
        ("--repetition-penalty", "0"),
        ("--stop", ""),
        ("--prompts", "x"),
    ):
        done = run("generate", model_folder, "--prompt", "x", *wrong)
        assert done.exit_code == 2, (wrong, done.output)
    assert run("generate", model_folder).exit_code == 2


def test_a_chat_remembers_and_begins_anew(loaded, model_folder):
    talk, system = Chat(loaded.tokenizer), {"role": "system", "content": "Be brief."}
    lines = ["Hello", "And now?", "/reset", "Hello"]
    done = run("chat", model_folder, "--system", "Be brief.", *GREEDY, input="\n".join(lines) + "\n")
    first = {"role": "user", "content": "Hello"}
    (one,) = expected(loaded, [talk.prompt([system, first])])
    said = [system, first, {"role": "assistant", "content": one}, {"role": "user", "content": "And now?"}]
    (two,) = expected(loaded, [talk.prompt(said)])
    assert done.stdout == f"{one}\n{two}\n{one}\n".replace("\r\n", "\n") and one != two


def test_a_question_beyond_the_context_takes_nothing_of_the_conversation(loaded, model_folder, monkeypatch):
    monkeypatch.setattr("dsgpt.cli.chat._typed", lambda: True)
    first = {"role": "user", "content": "Hello"}
    lines = ["Hello", "word " * CONTEXT, "And now?"]
    monkeypatch.setattr("builtins.input", lambda prompt: lines.pop(0) if lines else "/exit")
    done = run("chat", model_folder, *GREEDY)
    (one,) = expected(loaded, [Chat(loaded.tokenizer).prompt([first])])
    said = [first, {"role": "assistant", "content": one}, {"role": "user", "content": "And now?"}]
    (two,) = expected(loaded, [Chat(loaded.tokenizer).prompt(said)])
    assert done.stdout == f"{one}\n\n{two}\n" and "does not fit" in done.stderr


def test_a_chat_that_outgrows_the_context_leaves_out_its_oldest_turns_and_says_so(model_folder):
    line = "word " * 12
    done = run("chat", model_folder, *GREEDY, input=f"{line}\n" * 6)
    assert done.exit_code == 0 and "oldest" in done.stderr
    assert len(done.stdout.splitlines()) >= 6
    done = run("chat", model_folder, *GREEDY, input="word " * CONTEXT)
    assert isinstance(done.exception, DataError) and "does not fit" in str(done.exception)


def test_templates_are_the_tokenizers_or_given_never_guessed(model_folder, tmp_path):
    template = model_folder / "chat_template.jinja"
    text = template.read_text()
    template.unlink()
    try:
        done = run("chat", model_folder, *GREEDY, input="Hello\n")
        assert isinstance(done.exception, DataError) and "--chat-template" in str(done.exception)
        assert run("chat", model_folder, "--chat-template", "chatml", *GREEDY, input="Hello\n").exit_code == 0
        (tmp_path / "own.jinja").write_text(text)
        given = ("--chat-template", tmp_path / "own.jinja")
        assert run("chat", model_folder, *given, *GREEDY, input="Hello\n").exit_code == 0
        done = run("chat", model_folder, "--chat-template", "mistral", input="Hello\n")
        assert done.exit_code == 2 and "neither chatml nor" in done.output
    finally:
        template.write_text(text)


def test_a_model_that_does_not_fit_is_refused_with_what_to_do(model_folder, monkeypatch):
    monkeypatch.setattr("dsgpt.checkpoint.inference.available_memory_bytes", lambda: 1000)
    done = run("generate", model_folder, "--prompt", "x", "--device", "cpu")
    assert isinstance(done.exception, OutOfMemoryError) and "use a server that divides models" in str(done.exception)


@pytest.mark.parametrize(
    "verb",
    [("generate", "--prompt", "x"), ("chat",), ("serve",), ("evaluate", "--text", "README.md")],
    ids=lambda v: v[0],
)
def test_a_model_without_tokenizer_is_named_with_what_is_there(verb, model_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    done = run(verb[0], tmp_path, *verb[1:], "--device", "cpu", input="Hello\n")
    assert isinstance(done.exception, DataError) and "holds no tokenizer" in str(done.exception)
    assert "config.json, model.safetensors" in str(done.exception)
