"""Answers and choices of a model against what is computed from its logits in one pass; long inputs; lm-evaluation-harness."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dsgpt.checkpoint.inference import load_for_use
from dsgpt.cli import cli
from dsgpt.data.chat_template import ChatTemplate
from dsgpt.errors import ConfigError, DataError
from dsgpt.evaluate.answers import AnswerReport, write_answers
from dsgpt.evaluate.choices import evaluate_choices
from dsgpt.evaluate.likelihood import log_likelihoods, reference_losses
from dsgpt.evaluate.questions import PromptWriter, Question, read_questions
from dsgpt.generate.chat import Chat
from dsgpt.generate.sampling import Sampling
from dsgpt.generate.text import complete
from dsgpt.tokenizer.tokenizer import Tokenizer
from tests.chat_folder import CONTEXT
from tests.model import test_gpt, test_hf


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def loaded(model_folder):
    return load_for_use(str(model_folder), "cpu")


@pytest.fixture
def writer(loaded):
    return PromptWriter(loaded.tokenizer, Chat(loaded.tokenizer), CONTEXT, 12)


def one_pass(model, prompt, answer):
    """Nats of an answer after a prompt, without a cache."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        scores = model(ids[:, :-1]).float().log_softmax(-1)[0]
    return float(scores[len(prompt) - 1 :].gather(1, torch.tensor(answer)[:, None]).sum())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "hf-mistral", "hf-opt"])
def test_likelihoods_are_those_of_one_pass_over_prompt_and_answer(kind):
    native = test_gpt.KINDS.get(kind)
    model = test_gpt.make(native).eval() if native else test_hf.ours(test_hf.reference(kind[3:]))
    prompt, answers = [5, 9, 1, 33, 7, 2], [[4], [8, 8, 1], [60, 2], [1, 2, 3, 4, 5, 6, 7], [9, 9]]
    sums = log_likelihoods(model, prompt, answers, batch_size=2)
    assert sums == pytest.approx([one_pass(model, prompt, answer) for answer in answers], abs=1e-4)


def taught(loaded, question, answer, prompt):
    """The tokens of an answer in training: those that are learned from."""
    asked = {"role": "user", "content": question.asked(question.input), "train": False}
    said = {"role": "assistant", "content": answer, "train": True}
    encoded = ChatTemplate(loaded.tokenizer).encode([asked, said], [])
    assert encoded.ids[: len(prompt.ids)].tolist() == prompt.ids
    return encoded.ids[encoded.learned].tolist()


@pytest.mark.parametrize("template", [None, "[INST] {{ messages[0].content }} [/INST]{% if messages|length > 1 %}"
                                            " {{ messages[1].content }}</s>{% endif %}"])  # fmt: skip
def test_what_is_scored_is_what_training_teaches(template, dataset):
    tokenizer = Tokenizer.load(dataset.parent / "tokenizer")
    writer = PromptWriter(tokenizer, Chat(tokenizer, template or "chatml"), CONTEXT, 12)
    question = Question((), "", "Is it so?", "Yes")
    dropped, (ids,) = writer.continuations(question, ["Yes"])
    messages = [
        {"role": "user", "content": "Is it so?", "train": False},
        {"role": "assistant", "content": "Yes", "train": True},
    ]
    encoded = ChatTemplate(tokenizer, template).encode(messages, [])
    prompt = writer.write(question, question.input).ids
    whole = prompt[: len(prompt) - dropped] + ids
    assert whole == encoded.ids[: len(whole)].tolist() and "Yes" in tokenizer.decode(ids)
    assert encoded.learned[len(whole) :].sum() == 0


def test_the_likeliest_choice_is_taken_of_the_records_or_of_the_files_answers(loaded, writer, tmp_path):
    labels = ["lost card", "exchange rate", "x"]
    records = [{"instruction": "Route:", "input": f"text {i}", "output": labels[i % 3]} for i in range(7)]
    questions = read_questions(write(tmp_path / "q.jsonl", records))
    report = evaluate_choices(loaded.model, loaded.tokenizer, questions, writer)
    assert report.chance == pytest.approx(1 / 3) and report.majority == pytest.approx(3 / 7)
    for question, chosen, loss in zip(questions, report.chosen, report.losses, strict=True):
        prompt = writer.prompts(question)[0]
        scores = {one: one_pass(loaded.model, prompt.ids, taught(loaded, question, one, prompt)) for one in labels}
        assert chosen == max(scores, key=scores.get) and loss == pytest.approx(-scores[question.answer], abs=1e-4)
    alone = writer.write(questions[0], "")
    prior = {one: one_pass(loaded.model, alone.ids, taught(loaded, questions[0], one, writer.prompts(questions[0])[0]))
             for one in labels}  # fmt: skip
    gains = {one: scores[one] - prior[one] for one in labels}
    assert report.chosen_pmi[-1] == max(gains, key=gains.get)
    assert len(report.chosen_pmi) == 7 and report.accuracy_pmi.value == pytest.approx(
        sum(one == two for one, two in zip(report.chosen_pmi, report.answers, strict=True)) / 7
    )
    for record in records:
        record["choices"] = ["x", record["output"]] if record["output"] != "x" else ["x"]
    own = evaluate_choices(loaded.model, loaded.tokenizer, read_questions(write(tmp_path / "c.jsonl", records)), writer)
    assert own.chance == pytest.approx((5 * 0.5 + 2 * 1) / 7)
    assert [one for one, two in zip(own.chosen, own.answers, strict=True) if two == "x"] == ["x"] * 2


def test_the_loss_of_a_reference_is_that_of_what_training_teaches(loaded, writer, tmp_path):
    long = " ".join(f"word{i}" for i in range(2 * CONTEXT))
    records = [{"instruction": "Say", "input": word, "output": f"{word} it is, said he"} for word in ("a", "b", "c")]
    records += [{"instruction": "Say", "input": "d", "output": long}]
    questions = read_questions(write(tmp_path / "q.jsonl", records))
    losses, tokens = reference_losses(loaded.model, questions, writer)
    for question, loss, count in zip(questions[:3], losses, tokens, strict=False):
        prompt = writer.write(question, question.input)
        ids = taught(loaded, question, question.answer, prompt)
        assert count == len(ids) and loss == pytest.approx(-one_pass(loaded.model, prompt.ids, ids), abs=1e-4)
    assert tokens[3] == 0 and losses[3] != losses[3]
    report = AnswerReport(["x"] * 4, {}, 0, losses, tokens)
    assert report.perplexity.value == pytest.approx(math.exp(sum(losses[:3]) / sum(tokens)))
    assert writer.counts == {}, "it does not count as asked"


def test_every_chat_format_is_a_question(tmp_path, writer):
    records = {
        "messages": {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                                  {"role": "assistant", "content": "a"}]},
        "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "alpaca": {"instruction": "do", "input": "q", "output": "a"},
        "completion": {"prompt": "q", "completion": "a"},
        "pairs": {"document": "q", "summary": "a"},
    }  # fmt: skip
    for name, record in records.items():
        (question,) = read_questions(write(tmp_path / f"{name}.jsonl", [record]))
        assert (question.input, question.answer) == ("q", "a"), name
        assert len(question.messages) == (name == "messages")
        assert question.asked("q") == ("do\n\nq" if name == "alpaca" else "q")


@pytest.mark.parametrize(
    "record, seen",
    [
        ({"messages": [{"role": "user", "content": "q"}]}, "no assistant turn"),
        ({"instruction": "i", "output": ""}, "empty"),
        ({"instruction": "i", "output": "a", "choices": ["b"]}, "not among"),
        ({"instruction": "i", "output": "a", "choices": "a"}, "list of texts"),
        ({"text": "plain"}, "format"),
    ],
)
def test_a_record_that_is_no_question_is_named(record, seen, tmp_path):
    with pytest.raises(DataError, match=seen):
        read_questions(write(tmp_path / "q.jsonl", [record]))


LONG = " ".join(f"word{i} is here," for i in range(120))


def test_a_long_input_is_refused_cut_or_read_in_pieces(loaded, tmp_path):
    records = [{"instruction": "Sum up:", "input": text, "output": "a"} for text in ("short", LONG)]
    questions = read_questions(write(tmp_path / "q.jsonl", records))
    chat = Chat(loaded.tokenizer)
    make = {
        way: PromptWriter(loaded.tokenizer, chat, CONTEXT, 12, way) for way in ("refuse", "lead", "chunk_and_merge")
    }
    with pytest.raises(DataError, match="does not fit"):
        write_answers(loaded.model, loaded.tokenizer, questions, make["refuse"], 4)
    lead = make["lead"].prompts(questions[1])
    text = loaded.tokenizer.decode(lead[0].ids)
    assert len(lead) == 1 and CONTEXT - 12 - 8 <= len(lead[0].ids) <= CONTEXT - 12
    assert "Sum up:" in text and "word0 is here" in text and "word119" not in text
    pieces = make["chunk_and_merge"].prompts(questions[1])
    parts = [loaded.tokenizer.decode(one.ids).partition("Sum up:\n\n")[2].partition("<|im_end|>")[0] for one in pieces]
    assert len(pieces) > 3 and "".join(parts) == LONG, "every word is in one piece"
    answers, _ = write_answers(loaded.model, loaded.tokenizer, questions, make["chunk_and_merge"], 4)
    said = [one.text.strip() for one in complete(loaded.model, loaded.tokenizer, pieces, Sampling(12, temperature=0))]
    merged = make["chunk_and_merge"].write(questions[1], "\n".join(filter(None, said)))
    if make["chunk_and_merge"].fits(merged):
        (last,) = complete(loaded.model, loaded.tokenizer, [merged], Sampling(12, temperature=0))
        assert answers[1] == last.text.strip()
    mute = PromptWriter(Tokenizer.load(loaded.location.tokenizer), chat, CONTEXT, 12, "chunk_and_merge")
    silent = Chat(loaded.tokenizer)
    silent._end_ids = tuple(range(loaded.model.config.vocab_size))
    mute.chat = silent
    assert write_answers(loaded.model, loaded.tokenizer, questions, mute, 4) == (["", ""], 0), (
        "nothing said of any piece"
    )
    assert "2 of 3 inputs (67%)" in make["chunk_and_merge"].told(), "one of the two that were long was asked twice here"
    assert "1 of 1 inputs (100%) are longer than the context: their lead is used" in make["lead"].told()
    short = PromptWriter(loaded.tokenizer, chat, CONTEXT, 12)
    assert write_answers(loaded.model, loaded.tokenizer, questions[:1], short, 4)[0] == answers[:1]


def test_a_long_conversation_is_asked_without_its_oldest_exchanges(loaded, tmp_path):
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i} of a talk"} for i in range(80)]
    messages = [{"role": "system", "content": "Be kind"}, *turns]
    (question,) = read_questions(write(tmp_path / "q.jsonl", [{"messages": messages}]))
    chat = Chat(loaded.tokenizer)
    with pytest.raises(DataError, match="does not fit"):
        PromptWriter(loaded.tokenizer, chat, CONTEXT, 12).prompts(question)
    for way in ("lead", "chunk_and_merge"):
        writer = PromptWriter(loaded.tokenizer, chat, CONTEXT, 12, way)
        (prompt,) = writer.prompts(question)
        longest = max(
            (start for start in range(0, 80, 2)
             if len(chat.prompt([messages[0], *turns[start:79]]).ids) <= CONTEXT - 12), key=lambda start: -start)  # fmt: skip
        assert prompt.ids == chat.prompt([messages[0], *turns[longest:79]]).ids and longest > 0
        assert "1 of 1 conversations (100%) lost their oldest exchanges" in writer.told()


def test_a_question_that_leaves_no_room_is_an_error(loaded, tmp_path):
    records = [{"instruction": LONG, "input": "x" * 50, "output": "a"}]
    questions = read_questions(write(tmp_path / "q.jsonl", records))
    with pytest.raises(DataError, match="question alone"):
        PromptWriter(loaded.tokenizer, Chat(loaded.tokenizer), CONTEXT, 12, "lead").prompts(questions[0])
    with pytest.raises(ConfigError, match="all of the model's context"):
        PromptWriter(loaded.tokenizer, None, CONTEXT, CONTEXT)


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_the_command_prints_numbers_and_writes_each_question(model_folder, tmp_path):
    records = [{"instruction": "Say", "input": word, "output": f"{word} it is"} for word in ("a", "b", "c", "d")]
    path, output = write(tmp_path / "q.jsonl", records), tmp_path / "out.jsonl"
    told = json.loads(
        run("evaluate", model_folder, "--answers", path, "--max-new-tokens", 8, "--output", output, "--json").stdout
    )
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert told["questions"] == 4 == len(rows) and told["long_inputs"] == {"asked": 4}
    assert told["rougeL"]["value"] == pytest.approx(sum(row["rougeL"] for row in rows) / 4)
    shown = run("evaluate", model_folder, "--choices", path).stdout
    assert "by chance 0.250" in shown and "macro-F1" in shown and "all 4 inputs fit" in shown
    plain = json.loads(run("evaluate", model_folder, "--choices", path, "--chat-template", "none", "--json").stdout)
    assert plain["loss"] != json.loads(run("evaluate", model_folder, "--choices", path, "--json").stdout)["loss"]
    assert run("evaluate", model_folder, "--choices", path, "--answers", path).exit_code == 2


TASK = """\
task: ours_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{q}}}}"
"""


@pytest.mark.slow
@pytest.mark.parametrize("adds_bos", [True, False])
def test_tasks_of_the_harness_agree_with_its_own_model_of_transformers(adds_bos, model_folder, tmp_path, monkeypatch):
    """Also of texts longer than the context, and with a tokenizer that begins texts with nothing, as GPT-2's."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    told = json.loads((folder / "tokenizer.json").read_text())
    assert told["post_processor"]
    if not adds_bos:
        (folder / "tokenizer.json").write_text(json.dumps(told | {"post_processor": None}))
    assert Tokenizer.load(folder).adds_bos == adds_bos
    words = ["def", "return", "import", "class", "self", "value", "None", "True", "for", "in"]
    texts = [" ".join(words[i:]) for i in range(8)] + [" ".join(words * 25)]
    assert len(Tokenizer.load(folder).encode(texts[-1])) > 2 * CONTEXT
    rows = [{"q": text, "c": [f" {w}" for w in words[:4]], "a": i % 4} for i, text in enumerate(texts)]
    path, tasks = write(tmp_path / "rows.jsonl", rows), tmp_path / "tasks"
    tasks.mkdir()
    choice = TASK.format(kind="multiple_choice", path=path) + 'doc_to_choice: "{{c}}"\ndoc_to_target: "{{a}}"\n'
    metric = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    (tasks / "choice.yaml").write_text(choice + metric)
    rolling = TASK.format(kind="loglikelihood_rolling", path=path).replace('"{{q}}"', '""') + 'doc_to_target: "{{q}}"\n'
    (tasks / "rolling.yaml").write_text(rolling + "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n")
    until = TASK.format(kind="generate_until", path=path) + 'doc_to_target: "{{q}}"\n'
    until += "generation_kwargs: {until: ['e'], max_gen_toks: 9, do_sample: false}\n"
    (tasks / "until.yaml").write_text(
        until + "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    names = ["ours_multiple_choice", "ours_loglikelihood_rolling", "ours_generate_until"]
    done = run("evaluate", folder, "--harness", ",".join(names), "--harness-folder", tasks, "--json")
    ours = json.loads(done.stdout)["results"]
    for name in names:
        # Of whole texts it would put a BOS before what has one already.
        begin = False if "rolling" in name else None
        model = HFLM(pretrained=str(folder), device="cpu", batch_size=1, dtype="float32", add_bos_token=begin)
        theirs = lm_eval.simple_evaluate(
            model=model, tasks=[name], task_manager=TaskManager(include_path=str(tasks)), log_samples=False,
            bootstrap_iters=0,
        )["results"]  # fmt: skip
        numbers = {
            key: value for key, value in theirs[name].items() if isinstance(value, float) and "stderr" not in key
        }
        assert numbers and {key: ours[name][key] for key in numbers} == pytest.approx(numbers, rel=1e-4), name
    wrong = run("evaluate", folder, "--harness", "no_such_task")
    assert isinstance(wrong.exception, ConfigError) and "no_such_task" in str(wrong.exception)
