"""What happens to each config key that was changed since the last start of a run. Torch-free.

`POLICIES` is the table: the first pattern that fits a dotted key counts. *applied*: from the next step on. *refused*: it
would not be the same run any more (78; start another one, or fork this one with model.init_from=fork:RUN@STEP). *ignored*:
without effect on a run that continues; a warning says so. `dsgpt config changes` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from dsgpt.config import flatten
from dsgpt.config.source import parse_yaml, plain
from dsgpt.errors import ConfigError, Problem
from dsgpt.train.resolve import ResolvedRun

Class = Literal["applied", "refused", "ignored"]


@dataclass(frozen=True)
class Policy:
    """`pattern` is a shell pattern over dotted keys."""

    pattern: str
    on_resume: Class
    why: str


POLICIES = (
    Policy("run.seed", "refused", "sample order and dropout follow from it"),
    Policy("run.*", "applied", ""),
    Policy("device", "applied", "the state is read by any device"),
    Policy("resume", "applied", "it is about one start"),
    Policy("model.init_from", "ignored", "the checkpoint has the weights"),
    Policy("model.trust_checkpoint", "applied", "it is about reading what init_from names"),
    Policy("model.dropout.*", "applied", ""),
    Policy("model.implementation", "ignored", "the checkpoint says which"),
    Policy("model.attention", "applied", "the same result up to rounding"),
    Policy("model.*", "refused", "the saved tensors have these shapes and meanings"),
    Policy("fine_tuning.lora.*", "refused", "the saved adapters have these shapes and meanings"),
    Policy("fine_tuning.*", "applied", "what is trained from here on begins with moments of zero; a start says so"),
    Policy("tokenizer.path", "ignored", "the data's tokenizer counts; another one is refused by its hash"),
    Policy("data.document_mask", "refused", "the samples would be others"),
    Policy("data.append_sources", "applied", "it lets sources be added at the end of data.train"),
    Policy(
        "data.*", "applied", "paths may change; contents, shares and the list of sources not: they are refused (65)"
    ),
    Policy("optimizer.name", "refused", "its state is another one"),
    Policy("optimizer.momentum", "refused", "its state is another one"),
    Policy("optimizer.*", "applied", "the learning rate may jump; a start says so"),
    Policy("training.seq_length", "refused", "the samples would be others"),
    Policy("training.global_batch_size", "refused", "the samples of a step would be others"),
    Policy("training.max_steps", "applied", "the schedule stretches or shrinks with the run; a start says so"),
    Policy("training.num_epochs", "applied", "as max_steps"),
    Policy("training.max_tokens", "applied", "as max_steps"),
    Policy("training.*", "applied", ""),
    Policy("parallel.*", "applied", ""),
    Policy("parallel", "applied", ""),
    Policy("deepspeed", "applied", "the state is read at any ZeRO stage and number of ranks"),
    Policy("checkpoint.*", "applied", ""),
    Policy("logging.*", "applied", ""),
)


def policy_of(key: str) -> Policy:
    """The row of the table for a dotted key."""
    return next(policy for policy in POLICIES if fnmatchcase(key, policy.pattern))


def changed_keys(folder: Path, run: ResolvedRun) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value in the folder's config.yaml, value now). Empty where the folder has none yet."""
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    problems: list[Problem] = []
    try:
        tree = parse_yaml(path.read_text("utf-8"), path.name, folder, problems)
    except UnicodeDecodeError as error:
        tree, problems = None, [Problem(f"{path} is not a text", str(error))]
    if problems or not isinstance(tree, dict):
        do = "remove that file: it is written anew from the config you give"
        seen = "; ".join(f"{problem.what}: {problem.seen}" for problem in problems) or "it has no keys"
        raise ConfigError(f"{path} cannot be read", seen=seen, do=do)
    before, now = flatten(plain(tree)), flatten(run.config.model_dump(mode="json"))
    # A key that the older config did not have yet was at its default then: no change that anybody made.
    # Nor is the folder's own place one: it is written as "." there, so that the folder can be moved.
    # `resume` is about one start.
    keys = sorted(before.keys() - {"run.output_dir", "resume"})
    return {key: (before[key], now.get(key)) for key in keys if before[key] != now.get(key)}


def check_same_run(run: ResolvedRun) -> list[str]:
    """Compare with the config.yaml already in the output folder; list what is applied and ignored.

    Raises ConfigError, with all of them, where a change is refused.
    """
    changed = changed_keys(run.output_dir, run)
    refused = [key for key in changed if policy_of(key).on_resume == "refused"]
    if refused:
        raise ConfigError(
            problems=[
                Problem(
                    f"{run.output_dir} holds another run: {key} differs ({policy_of(key).why})",
                    seen=f"there {changed[key][0]!r}, now {changed[key][1]!r}",
                    do="use another run.output_dir, or the value the run was started with",
                )
                for key in refused
            ]
        )
    lines = []
    for key, (before, now) in changed.items():
        ignored = policy_of(key).on_resume == "ignored"
        note = f" (ignored: {policy_of(key).why})" if ignored else ""
        lines.append(f"{key}: {before!r} -> {now!r}{note}")
    return lines
