"""The whole pipeline on this machine, as the commands a user would type, on Python's own standard library.

    corpus -> tokenizer train -> data prepare -> train (stopped half way, resumed) -> evaluate -> export -> generate

Every stage is a real `dsgpt` command in its own process, printed before it runs, so that what is seen here is what can be
typed on one's own text. A stage whose result exists is skipped and says so; running twice therefore continues.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsgpt.checkpoint import commit
from dsgpt.errors import DsgptError, ExitCode
from dsgpt.process import die_with_parent
from dsgpt.quickstart.corpus import build_corpus
from dsgpt.train.state import read_metrics
from dsgpt.units import format_bytes, format_count, format_seconds

VOCAB_SIZE = 2048
PROMPT = "def read_lines(path):\n    "


@dataclass
class Quickstart:
    """The run in `folder`; `steps` and `device` override the shipped config's."""

    folder: Path
    steps: int | None = None
    device: str = "auto"
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def run(self) -> dict[str, Any]:
        """All stages; returns the numbers of the final table. Raises DsgptError when a command fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        corpus = self._corpus()
        self._tokenizer()
        self._dataset("data", "train.jsonl")
        self._dataset("heldout", "heldout.jsonl")
        interrupted = self._train()
        step = commit.list_committed(self.run_dir / "checkpoints")[-1][0]
        evaluation = self._json(
            "evaluating on the held-out packages", "evaluate", self.run_dir, "--data", self.folder / "heldout",
            "--split", "train", "--json",
        )  # fmt: skip
        export = self._export(step)
        sample = self._json(
            "writing some Python with the export", "generate", export["path"], "--prompt", PROMPT,
            "--max-new-tokens", "80", "--json",
        )  # fmt: skip
        return {
            "corpus": corpus,
            "training": self._training_numbers(step),
            "interrupted_at": interrupted,
            "evaluation": evaluation,
            "export": export,
            "sample": sample["prompt"] + sample["text"],
            "seconds": self.timings,
        }

    # ---- stages --------------------------------------------------------------------------------------------------

    def _corpus(self) -> dict[str, Any]:
        record = self.folder / "corpus" / "summary.json"
        if record.exists():
            self._say(f"corpus: exists ({record.parent})")
            return dict(json.loads(record.read_text("utf-8")))
        began = time.perf_counter()
        self._say("collecting Python's standard library as text")
        summary = asdict(build_corpus(record.parent))
        self._say(
            f"  {summary['train_files']} files, {format_bytes(summary['train_bytes'])} to train on; "
            f"{', '.join(summary['heldout_packages'])} held out ({format_bytes(summary['heldout_bytes'])}); "
            f"{summary['duplicate_files']} near copies left out"
        )
        record.write_text(json.dumps(summary, default=str, indent=2) + "\n", encoding="utf-8")
        self.timings["corpus"] = time.perf_counter() - began
        return dict(json.loads(record.read_text("utf-8")))

    def _tokenizer(self) -> None:
        output = self.folder / "tokenizer"
        if (output / "tokenizer_training.json").exists():
            return self._say(f"tokenizer: exists ({output})")
        corpus = self.folder / "corpus" / "train.jsonl"
        self._command("tokenizer", "tokenizer", "train", corpus, "--vocab-size", VOCAB_SIZE, "--output", output)

    def _dataset(self, name: str, source: str) -> None:
        output = self.folder / name
        if (output / "dataset.json").exists():
            return self._say(f"{name}: exists ({output})")
        tokenizer = self.folder / "tokenizer"
        text = self.folder / "corpus" / source
        self._command(name, "data", "prepare", text, "--tokenizer", tokenizer, "--output", output)

    def _train_arguments(self) -> list[str]:
        overrides: dict[str, Any] = {
            "run.output_dir": self.run_dir,
            "data.train": f"[{{path: {json.dumps(str(self.folder / 'data'))}}}]",
            "data.validation": f"[{{path: {json.dumps(str(self.folder / 'heldout'))}}}]",
        }
        if self.device != "auto":
            overrides["device"] = self.device
        if self.steps:
            overrides["training.max_steps"] = str(self.steps)
            overrides["optimizer.warmup_steps"] = str(min(40, self.steps // 4))
        return ["train", "quickstart", *(f"{key}={value}" for key, value in overrides.items())]

    def _train(self) -> int | None:
        """Train; from scratch, stop half way with SIGTERM from here and continue in a new process.

        Returns the step it was stopped at, None where an earlier call had trained already.
        """
        interrupted = None
        if not commit.list_committed(self.run_dir / "checkpoints"):
            self._say("half way, this run is stopped by a SIGTERM from outside, as a cluster would, and then resumed")
            code = self._command("training until stopped", *self._train_arguments(), stop_half_way=True)
            if code == ExitCode.PREEMPTED:
                interrupted = commit.list_committed(self.run_dir / "checkpoints")[-1][0]
                self._say(f"stopped with code {int(code)} at step {interrupted}; continuing with the same command")
        self._command("training to the end", *self._train_arguments())
        return interrupted

    def _export(self, step: int) -> dict[str, Any]:
        output = self.folder / f"export-{step:08d}"
        record = self.folder / f"{output.name}.json"
        if output.exists() and record.exists():
            self._say(f"export: exists ({output})")
            return dict(json.loads(record.read_text("utf-8")))
        report = self._json(
            "exporting to Hugging Face format, and comparing logits with plain transformers",
            "checkpoint", "export", self.run_dir, "--output", output, "--json",
        )  # fmt: skip
        record.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        return report

    def _training_numbers(self, step: int) -> dict[str, Any]:
        entries = [entry for entry in read_metrics(self.run_dir / "metrics.jsonl") if entry["step"] <= step]
        config = json.loads((self.run_dir / "environment.json").read_text("utf-8"))
        return {
            "steps": step,
            "first_loss": entries[0]["loss"],
            "last_loss": entries[-1]["loss"],
            "tokens": entries[-1]["consumed_tokens"],
            "tokens_per_second": statistics.median(entry["tokens_per_second"] for entry in entries[1:] or entries),
            "peak_memory_bytes": max(entry["peak_memory_bytes"] for entry in entries),
            "device": config["device"],
            "ranks": config["world_size"],
        }

    # ---- running commands ----------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        print(text, flush=True)

    def _command(self, label: str, *words: Any, stop_half_way: bool = False) -> int:
        """Run `dsgpt WORDS…` with its progress visible; returns its exit code, which is 0 or, if stopped, 75."""
        began = time.perf_counter()
        arguments = [str(word) for word in words]
        self._say(f"\n$ dsgpt {shlex.join(arguments)}")
        process = subprocess.Popen([sys.executable, "-m", "dsgpt", *arguments], preexec_fn=die_with_parent)
        try:
            if stop_half_way:
                self._stop_half_way(process)
            code = process.wait()
        except KeyboardInterrupt:
            code = process.wait()  # the terminal's Ctrl-C reached it too: it commits and says how to continue
            steps = f" --steps {self.steps}" if self.steps else ""
            text = f"dsgpt quickstart --output-dir {self.folder}{steps} continues"
            raise _failed(code or ExitCode.PREEMPTED, "interrupted", f"dsgpt {shlex.join(arguments)}", text) from None
        self.timings[label] = time.perf_counter() - began
        if code not in (0, ExitCode.PREEMPTED) or (code and not stop_half_way):
            raise _failed(
                code,
                f"{label} failed with code {code}",
                f"dsgpt {shlex.join(arguments)}",
                "its message is above; the same quickstart command continues from here",
            )
        return code

    def _stop_half_way(self, process: subprocess.Popen[bytes]) -> None:
        """Send SIGTERM to `dsgpt train` when its metrics pass half of the steps."""
        metrics = self.run_dir / "metrics.jsonl"
        earlier = metrics.stat().st_size if metrics.exists() else 0  # of a start that never committed
        while process.poll() is None:
            time.sleep(0.1)
            lines = metrics.read_bytes()[earlier:].splitlines() if metrics.exists() else []
            try:
                latest = json.loads(lines[-1]) if lines else None
            except ValueError:
                continue  # the last line is being written
            if latest and "step" in latest and latest["step"] * 2 >= latest["max_steps"]:
                process.send_signal(signal.SIGTERM)
                return

    def _json(self, label: str, *words: Any) -> dict[str, Any]:
        """Run `dsgpt WORDS… --json` and return what it printed."""
        began = time.perf_counter()
        arguments = [str(word) for word in words]
        self._say(f"\n$ dsgpt {shlex.join(arguments)}")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "dsgpt", *arguments]
        with _Waiting(label):
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise _failed(done.returncode, f"{label} failed with code {done.returncode}", done.stderr.strip()[-2000:])
        self.timings[arguments[0]] = time.perf_counter() - began
        return dict(json.loads(done.stdout))


def _failed(code: int, what: str, seen: str, do: str = "") -> DsgptError:
    """The failure of a command, to leave with its own exit code where the contract knows it."""
    error = DsgptError(what, seen, do)
    if code in list(ExitCode):
        error.exit_code = ExitCode(code)
    return error


class _Waiting:
    """A spinner on a terminal, a line elsewhere, while something quick runs."""

    def __init__(self, label: str):
        self.label = label

    def __enter__(self) -> None:
        from rich.console import Console

        self._status = Console().status(self.label)
        if sys.stdout.isatty():
            self._status.start()
        else:
            print(self.label, flush=True)

    def __exit__(self, *exception: object) -> None:
        self._status.stop()


def summary_rows(folder: Path, result: dict[str, Any]) -> list[tuple[str, str]]:
    """The final table: what was measured, and where everything lies."""
    training, evaluation, export = result["training"], result["evaluation"], result["export"]
    xz = result["corpus"]["xz_bits_per_byte"]
    stopped = result["interrupted_at"]
    return [
        ("trained", f"{training['steps']} steps, {format_count(training['tokens'])} tokens, "
                    f"{format_count(export['num_parameters'])} parameters, {training['ranks']} ranks on {training['device']}"),
        ("stopped and resumed", f"at step {stopped}" if stopped else "not in this call"),
        ("loss, first -> last step", f"{training['first_loss']:.3f} -> {training['last_loss']:.3f}"),
        ("validation loss", f"{evaluation['loss']:.4f} nats per token, perplexity {evaluation['perplexity']:.2f}"),
        ("bits per byte", f"{evaluation['bits_per_byte']:.3f} on packages never seen (xz -9e on the same text: {xz:.3f})"),
        ("speed", f"{format_count(training['tokens_per_second'])} tokens/s"),
        ("peak memory", f"{format_bytes(training['peak_memory_bytes'])} per rank"),
        ("export", f"largest logit difference to transformers {export['logit_difference']:.1e}"),
        ("time", format_seconds(sum(result["seconds"].values()))),
        ("tokenizer", str(folder / "tokenizer")),
        ("dataset", str(folder / "data")),
        ("run: checkpoints, metrics, logs", str(folder / "run")),
        ("Hugging Face model", str(export["path"])),
    ]  # fmt: skip


NEXT = """\
On your own text (.txt and .jsonl files in my-text/):

  dsgpt tokenizer train my-text --vocab-size 8000 --output my-tokenizer
  dsgpt data prepare my-text --tokenizer my-tokenizer --output my-data --validation 5%
  dsgpt config cp quickstart my-run.yaml     # then edit it; on GPUs start from gpt2-124m
  dsgpt train my-run.yaml run.output_dir=runs/mine data.train='[{path: my-data}]'
"""
