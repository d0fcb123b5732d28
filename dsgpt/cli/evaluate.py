"""`dsgpt evaluate MODEL`: loss and bits per byte of texts or data; answers, choices and tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsgpt.cli.using import model_options, with_options

if TYPE_CHECKING:
    from dsgpt.checkpoint.inference import Loaded
    from dsgpt.evaluate.loss import Evaluation
    from dsgpt.evaluate.questions import PromptWriter, Question

_WAYS = ("texts", "data", "answers", "choices", "harness")


@click.command()
@click.argument("model")
@click.option("--text", "texts", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A text file, evaluated as one document; may be given several times.")  # fmt: skip
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A prepared dataset.")
@click.option("--split", default="validation", show_default=True, help="Which split of --data.")
@click.option("--answers", type=click.Path(exists=True, path_type=Path),
              help="Questions with answers, to which the model's are compared: ROUGE, token F1, exact match.")  # fmt: skip
@click.option("--choices", type=click.Path(exists=True, path_type=Path),
              help="The same, but the likeliest is chosen of a record's `choices`, or of all answers there.")  # fmt: skip
@click.option("--harness", metavar="TASK[,TASK…]", help="Tasks of lm-evaluation-harness.")
@click.option("--harness-folder", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="A folder with task files of your own.")  # fmt: skip
@click.option("--num-processes", type=click.IntRange(1),
              help="Divide the model over so many ranks of this machine (ZeRO 3); in srun, over all.")  # fmt: skip
@click.option("--samples", type=click.IntRange(1), help="Only the first so many sequences, questions or samples.")
@click.option("--max-new-tokens", default=100, show_default=True, type=click.IntRange(1), help="Of an answer.")
@click.option("--long-input", type=click.Choice(("refuse", "lead", "chunk_and_merge")), default="refuse", show_default=True,
              help="What to do with an input beyond the context.")  # fmt: skip
@click.option(
    "--chat-template", help="A Jinja file, chatml, or none for plain text.  [default: the tokenizer's, or none]"
)
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1), help="Rows computed together.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path),
              help="Write each question's result here, as JSON lines.")  # fmt: skip
@with_options(model_options)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(model: str, device: str, dtype: str, trust_checkpoint: bool, as_json: bool, **options: Any) -> None:
    """Evaluate MODEL: a run folder (RUN@STEP for an older commit), a checkpoint, or a Hugging Face folder.

    Loss is the mean in nats per token. A document starts with BOS where the tokenizer has one. Answers are greedy;
    intervals are of 95 %, by bootstrap over the questions.
    """
    chosen = [name for name in _WAYS if options[name]]
    if len(chosen) != 1:
        raise click.UsageError("give one of --text, --data, --answers, --choices and --harness")
    _check(options)
    if options["num_processes"]:
        from dsgpt.cli.evaluate_divided import evaluate_divided

        given = {"device": device, "dtype": dtype, "trust_checkpoint": trust_checkpoint, "json": as_json}
        evaluate_divided(model, chosen[0], options | given)
    from dsgpt.cli.common import print_json, waiting
    from dsgpt.cli.using import load

    loaded = load(model, device, dtype, trust_checkpoint)
    with waiting("evaluating"):
        lines, found = EVALUATIONS[chosen[0]](loaded, options)
    if as_json:
        print_json({"model": str(loaded.location.path), **found})
        return
    for name, value in lines:
        click.echo(f"{name:<14} {value}")


def _check(options: dict[str, Any]) -> None:
    """What can be told before a model is loaded and asked for hours."""
    from dsgpt.cli.using import read_template

    if options["chat_template"] != "none":
        read_template(options["chat_template"])
    if options["output"] and not options["output"].parent.is_dir():
        raise click.UsageError(f"--output {options['output']}: there is no such folder")


Result = tuple[list[tuple[str, str]], dict[str, Any]]


def _loss(loaded: Loaded, options: dict[str, Any]) -> Result:
    from dsgpt.evaluate.loss import evaluate_dataset, evaluate_texts

    rows = options["batch_size"]
    if options["data"] is not None:
        split, samples = options["split"], options["samples"]
        result = evaluate_dataset(loaded.model, loaded.tokenizer, options["data"], split, samples, rows)
    else:
        result = evaluate_texts(loaded.model, loaded.tokenizer, [_read(path) for path in options["texts"]], rows)
    return loss_lines(result), result.as_dict()


def loss_lines(result: Evaluation) -> list[tuple[str, str]]:
    """What is printed of a loss."""
    lines = [("loss", f"{result.loss:.4f} nats per token"), ("perplexity", f"{result.perplexity:.3f}")]
    if not math.isnan(result.bits_per_byte):  # chats, and files that do not say how much text they hold, have none
        lines.append(("bits per byte", f"{result.bits_per_byte:.4f}"))
    return [*lines, ("tokens", str(result.tokens))]


def _answers(loaded: Loaded, options: dict[str, Any]) -> Result:
    from dsgpt.evaluate.answers import evaluate_answers

    questions, writer = _questions(loaded, options["answers"], options, options["max_new_tokens"])
    report = evaluate_answers(loaded.model, loaded.tokenizer, questions, writer, options["batch_size"])
    rows = [
        {"answer": answer, "reference": question.answer, **{name: its[i] for name, its in report.scores.items()}}
        | {"loss": None if math.isnan(loss) else loss, "tokens": tokens, "group": question.group}
        for i, (question, answer, loss, tokens) in enumerate(
            zip(questions, report.answers, report.losses, report.reference_tokens, strict=True)
        )
    ]
    _write(options["output"], rows)
    numbers, unmeasured = report.numbers, report.reference_tokens.count(0)
    if report.perplexity is not None:
        numbers["perplexity"] = report.perplexity
    lines = [(name.replace("_", " "), str(number)) for name, number in numbers.items()]
    if unmeasured:
        lines.append(("unmeasured", f"{unmeasured} references are longer than the context: not in the perplexity"))
    lines += [("questions", str(len(questions))), ("long inputs", writer.told()), ("tokens", str(report.tokens))]
    found: dict[str, Any] = {name: vars(number) for name, number in numbers.items()} | {"unmeasured": unmeasured}
    return lines, {**found, "questions": len(questions), "tokens": report.tokens, "long_inputs": dict(writer.counts)}


def _choices(loaded: Loaded, options: dict[str, Any]) -> Result:
    from dsgpt.evaluate.choices import evaluate_choices

    questions, writer = _questions(loaded, options["choices"], options, 1)
    report = evaluate_choices(loaded.model, loaded.tokenizer, questions, writer, options["batch_size"])
    rows = [
        {"choice": one, "choice_pmi": pmi, "answer": two, "loss": loss, "group": question.group}
        for question, one, pmi, two, loss in zip(
            questions, report.chosen, report.chosen_pmi, report.answers, report.losses, strict=True
        )
    ]
    _write(options["output"], rows)
    accuracy, f1 = report.accuracy, report.macro_f1
    accuracy_pmi, f1_pmi = report.accuracy_pmi, report.macro_f1_pmi
    lines = [
        ("accuracy", f"{accuracy}; by chance {report.chance:.3f}, the most frequent always {report.majority:.3f}"),
        ("macro-F1", f"{f1}; the most frequent always {report.majority_macro_f1:.3f}"),
        ("accuracy, PMI", f"{accuracy_pmi}; by how much the input makes a choice likelier"),
        ("macro-F1, PMI", f"{f1_pmi}"),
        ("loss", f"{report.loss:.4f} nats per token of the right answer"),
        ("questions", str(len(questions))),
        ("long inputs", writer.told()),
    ]
    found = {"accuracy": vars(accuracy), "macro_f1": vars(f1), "chance": report.chance, "majority": report.majority}
    found |= {"accuracy_pmi": vars(accuracy_pmi), "macro_f1_pmi": vars(f1_pmi)}
    found |= {"majority_macro_f1": report.majority_macro_f1, "loss": report.loss}
    return lines, {**found, "questions": len(questions), "long_inputs": dict(writer.counts)}


def _harness(loaded: Loaded, options: dict[str, Any]) -> Result:
    from dsgpt.evaluate.harness import run_tasks

    names = [name for name in options["harness"].split(",") if name]
    results = run_tasks(loaded, names, options["harness_folder"], options["samples"], options["batch_size"])
    lines = [
        (task, f"{metric}: {value:.4f}")
        for task, numbers in results.items()
        for metric, value in numbers.items()
        if isinstance(value, float)
    ]
    return lines, {"results": results}


EVALUATIONS = {"texts": _loss, "data": _loss, "answers": _answers, "choices": _choices, "harness": _harness}


def _questions(loaded: Loaded, path: Path, options: dict[str, Any], room: int) -> tuple[list[Question], PromptWriter]:
    from dsgpt.cli.using import read_template
    from dsgpt.evaluate.questions import PromptWriter, read_questions
    from dsgpt.generate.chat import Chat

    given = options["chat_template"]
    has_template = loaded.tokenizer.chat_template is not None if given is None else given != "none"
    chat = Chat(loaded.tokenizer, read_template(given)) if has_template else None
    context = loaded.model.config.max_position_embeddings
    writer = PromptWriter(loaded.tokenizer, chat, context, room, options["long_input"])
    return read_questions(path, options["samples"]), writer


def _write(path: Path | None, rows: list[dict[str, Any]]) -> None:
    if path is not None:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _read(path: Path) -> str:
    from dsgpt.errors import DataError

    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            "the text is not UTF-8", seen=f"{path}: {error}", do="convert it first, e.g. with iconv"
        ) from error
