"""The whole pipeline on this machine, as the commands a user would type, on Python's own standard library.

    corpus -> tokenizer train -> data prepare -> train (stopped half way, resumed) -> evaluate -> export -> generate

Every stage is a real `dsgpt` command in its own process, printed before it runs, so that what is seen here is what can be
typed on one's own text. A stage whose result exists is skipped and says so; running twice therefore continues.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dsgpt.checkpoint import commit
from dsgpt.commands import Commands
from dsgpt.errors import ExitCode
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

    @cached_property
    def _commands(self) -> Commands:
        steps = f" --steps {self.steps}" if self.steps else ""
        return Commands(f"dsgpt quickstart --output-dir {self.folder}{steps}")

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
        evaluation = self._commands.json(
            "evaluating on the held-out packages", "evaluate", self.run_dir, "--data", self.folder / "heldout",
            "--split", "train", "--json",
        )  # fmt: skip
        export = self._export(step)
        sample = self._commands.json(
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
            "seconds": self._commands.timings,
        }

    # ---- stages --------------------------------------------------------------------------------------------------

    def _corpus(self) -> dict[str, Any]:
        record = self.folder / "corpus" / "summary.json"
        if record.exists():
            self._commands.say(f"corpus: exists ({record.parent})")
            return dict(json.loads(record.read_text("utf-8")))
        began = time.perf_counter()
        self._commands.say("collecting Python's standard library as text")
        summary = asdict(build_corpus(record.parent))
        self._commands.say(
            f"  {summary['train_files']} files, {format_bytes(summary['train_bytes'])} to train on; "
            f"{', '.join(summary['heldout_packages'])} held out ({format_bytes(summary['heldout_bytes'])}); "
            f"{summary['duplicate_files']} near copies left out"
        )
        record.write_text(json.dumps(summary, default=str, indent=2) + "\n", encoding="utf-8")
        self._commands.timings["corpus"] = time.perf_counter() - began
        return dict(json.loads(record.read_text("utf-8")))

    def _tokenizer(self) -> None:
        output = self.folder / "tokenizer"
        if (output / "tokenizer_training.json").exists():
            return self._commands.say(f"tokenizer: exists ({output})")
        corpus = self.folder / "corpus" / "train.jsonl"
        self._commands.run("tokenizer", "tokenizer", "train", corpus, "--vocab-size", VOCAB_SIZE, "--output", output)

    def _dataset(self, name: str, source: str) -> None:
        output = self.folder / name
        if (output / "dataset.json").exists():
            return self._commands.say(f"{name}: exists ({output})")
        tokenizer = self.folder / "tokenizer"
        text = self.folder / "corpus" / source
        self._commands.run(name, "data", "prepare", text, "--tokenizer", tokenizer, "--output", output)

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
            self._commands.say(
                "half way, this run is stopped by a SIGTERM from outside, as a cluster would, and then resumed"
            )
            code = self._commands.run("training until stopped", *self._train_arguments(), meanwhile=self._stop_half_way)
            if code == ExitCode.PREEMPTED:
                interrupted = commit.list_committed(self.run_dir / "checkpoints")[-1][0]
                self._commands.say(
                    f"stopped with code {int(code)} at step {interrupted}; continuing with the same command"
                )
        self._commands.run("training to the end", *self._train_arguments())
        return interrupted

    def _export(self, step: int) -> dict[str, Any]:
        output = self.folder / f"export-{step:08d}"
        record = self.folder / f"{output.name}.json"
        if output.exists() and record.exists():
            self._commands.say(f"export: exists ({output})")
            return dict(json.loads(record.read_text("utf-8")))
        report = self._commands.json(
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
