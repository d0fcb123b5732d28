"""Tasks of lm-evaluation-harness, through its own interface for models.

    results = run_tasks(loaded, ["hellaswag", "arc_easy"], folder=None, limit=None)

The tasks, their prompts and their metrics are the harness's; dsgpt gives log-likelihoods and greedy texts. Texts begin
with BOS where the tokenizer's own settings say so, as in the harness's model of transformers: Llama's do, GPT-2's do not,
those that dsgpt trains do. Tasks whose data lie on the Hub need it in the cache (HF_HUB_OFFLINE=1), or a task file in
`folder` that names local files.
"""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dsgpt.checkpoint.inference import Loaded
from dsgpt.errors import ConfigError
from dsgpt.generate.decoder import Decoder
from dsgpt.generate.sampling import Sampling
from dsgpt.generate.text import Prompt, complete, text_prompt

_DEFAULT_NEW_TOKENS = 256  # as the harness's own models
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def run_tasks(
    loaded: Loaded, tasks: Sequence[str], folder: Path | None = None, limit: int | None = None, batch_size: int = 16
) -> dict[str, Any]:
    """The harness's results by task: each metric and its standard error. Of several ranks, only those with LOCAL_RANK 0
    have any. Raises ConfigError for tasks that are not there."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ConfigError("lm-eval is not installed", do="pip install 'dsgpt[eval]'") from error
    manager = TaskManager(include_path=str(folder) if folder else None)
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        do = "lm_eval ls tasks lists those of the harness; --harness-folder names a folder with task files of your own"
        raise ConfigError("there is no such task", seen=", ".join(unknown), do=do)
    model = _harness_model(loaded, batch_size)
    with contextlib.redirect_stdout(sys.stderr):  # it prints of its progress, and stdout may be JSON
        done = lm_eval.simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False
        )
    return dict(done["results"]) if done else {}


def _harness_model(loaded: Loaded, batch_size: int) -> Any:
    """A model as the harness wants it; its base class is imported with the harness."""
    from lm_eval.api.model import LM

    tokenizer = loaded.tokenizer

    class Model(LM):  # type: ignore[misc]
        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return [_of_continuation(loaded, *request.args) for request in requests]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return [_of_text(loaded, request.args[0]) for request in requests]

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return _texts(loaded, [request.args for request in requests], batch_size)

        @property
        def tokenizer_name(self) -> str:
            return str(tokenizer.sha256)

    return Model()


def _with_begin(loaded: Loaded, text: str) -> list[int]:
    """Ids after BOS where the tokenizer adds it; without a text, after BOS or the end of another text."""
    tokenizer = loaded.tokenizer
    return tokenizer.encode(text) if text and not tokenizer.adds_bos else text_prompt(tokenizer, text).ids


def _of_continuation(loaded: Loaded, before: str, text: str) -> tuple[float, bool]:
    """(nats of `text` after `before`, whether it is what greedy decoding says)."""
    # Spaces between both belong to the second: tokenizers put them at the beginning of words.
    spaces = len(before) - len(before.rstrip())
    if spaces:
        before, text = before[:-spaces], before[-spaces:] + text
    begin = _with_begin(loaded, before)
    whole = begin + loaded.tokenizer.encode(text) if not before else _with_begin(loaded, before + text)
    known = max(1, min(len(begin), len(whole) - 1))
    context = loaded.model.config.max_position_embeddings
    left_out = max(0, len(whole) - 1 - context)  # of the beginning
    losses, is_greedy = _losses(loaded, whole[left_out:])
    wanted = slice(max(0, known - 1 - left_out), None)
    return -float(losses[wanted].sum()), bool(is_greedy[wanted].all())


def _of_text(loaded: Loaded, text: str) -> float:
    """Nats of all tokens of a text, in the harness's windows: without overlap, the last one with all that fits before it."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    begin, *ids = _with_begin(loaded, "") + loaded.tokenizer.encode(text)
    context, total = loaded.model.config.max_position_embeddings, 0.0
    for before, wanted in map(make_disjoint_window, get_rolling_token_windows(ids, begin, context, 1)):
        total += float(_losses(loaded, before + wanted)[0][-len(wanted) :].sum())
    return -total


@torch.no_grad()
def _losses(loaded: Loaded, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(nats of each id but the first (T - 1,), whether each is the likeliest)."""
    there = torch.tensor([ids], device=next(loaded.model.parameters()).device)
    logits = loaded.model(there[:, :-1])[0].float()
    return F.cross_entropy(logits, there[0, 1:], reduction="none"), logits.argmax(-1) == there[0, 1:]


def _texts(loaded: Loaded, requests: Sequence[tuple[str, dict[str, Any]]], batch_size: int) -> list[str]:
    """Continuations; those that are asked for in the same way are decoded together."""
    found: dict[int, str] = {}
    alike: dict[Sampling, list[int]] = defaultdict(list)
    for number, (_, options) in enumerate(requests):
        alike[_sampling(options)].append(number)
    context = Decoder(loaded.model).context
    for sampling, numbers in alike.items():
        room = context - sampling.max_new_tokens
        if room <= 0:
            do = "a task that generates less (generation_kwargs: max_gen_toks), or a model with a longer context"
            seen = f"{sampling.max_new_tokens} tokens to generate, context {context}"
            raise ConfigError("the task leaves no room for its prompts in the model's context", seen=seen, do=do)
        prompts = [
            # Of a prompt that is longer its end counts, as with the harness's own models.
            Prompt(_with_begin(loaded, requests[number][0])[-room:], loaded.tokenizer.end_ids)
            for number in numbers
        ]
        done = complete(loaded.model, loaded.tokenizer, prompts, sampling, batch_size)
        found |= {number: one.text for number, one in zip(numbers, done, strict=True)}
    return [found[number] for number in range(len(requests))]


def _sampling(options: dict[str, Any]) -> Sampling:
    """As the harness reads its generation_kwargs."""
    lengths = [options[name] for name in _LENGTHS if options.get(name) is not None]
    stop = options.get("until") or []
    return Sampling(
        max_new_tokens=int(lengths[0]) if lengths else _DEFAULT_NEW_TOKENS,
        temperature=float(options.get("temperature", 0.0)) if options.get("do_sample", True) else 0.0,
        top_k=0,
        top_p=float(options.get("top_p", 1.0)),
        stop=tuple([stop] if isinstance(stop, str) else stop),
    )
