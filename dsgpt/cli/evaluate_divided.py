"""`dsgpt evaluate MODEL … --num-processes N`: over several ranks, the model divided among them.

Of a prepared dataset each rank takes its share. All else every rank computes whole, together with the others and of the same
input, so that it takes as long as on one device, and longer by what is sent; it is for models that fit nowhere else.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from dsgpt.launch import slurm
from dsgpt.launch.local_ranks import expected_hosts, run_local_ranks


def evaluate_divided(model: str, way: str, arguments: dict[str, Any]) -> NoReturn:
    """Start the ranks here, or be one of those that a launcher has started; ends the process."""
    slurm.adopt_rank_environment()
    if "RANK" not in os.environ:
        words = [word for name, value in arguments.items() for word in _words(name, value)]
        raise SystemExit(run_local_ranks(["evaluate", model, *words], arguments["num_processes"]))
    code = 0
    try:
        _rank(model, way, arguments)
    except Exception as error:
        code = _tell(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of a broken network may never end


def _words(name: str, value: Any) -> list[str]:
    option = "--text" if name == "texts" else f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return []
    if isinstance(value, tuple):
        return [word for one in value for word in (option, str(one))]
    return [option] if value is True else [option, str(value)]


def _rank(model: str, way: str, arguments: dict[str, Any]) -> None:
    from dsgpt import distributed, engine
    from dsgpt.checkpoint.divided import load_divided
    from dsgpt.checkpoint.inference import Loaded, load_tokenizer
    from dsgpt.checkpoint.weights import find_model
    from dsgpt.cli.common import print_json
    from dsgpt.cli.evaluate import EVALUATIONS, loss_lines
    from dsgpt.device import choose_device
    from dsgpt.evaluate.loss import evaluate_divided as evaluate

    engine.prepare_process()
    device = choose_device(arguments["device"])
    world = distributed.start(device.kind, expected_hosts=expected_hosts())
    engine.init_distributed(world)
    location, rows, dtype = find_model(model), arguments["batch_size"], device.dtype(arguments["dtype"])
    divided = load_divided(location, world, dtype, rows, arguments["trust_checkpoint"])
    tokenizer = load_tokenizer(location)
    if way == "data":
        result = evaluate(divided, tokenizer, Path(arguments["data"]), arguments["split"], arguments["samples"], rows)
        lines, found = loss_lines(result), result.as_dict()
    else:
        output = arguments["output"] if world.is_main else None
        loaded = Loaded(location, divided.as_one(), tokenizer, device.kind, dtype)
        lines, found = EVALUATIONS[way](loaded, {**arguments, "output": output})
    if world.is_main and arguments["json"]:
        print_json({"model": str(location.path), "ranks": world.size, **found})
    elif world.is_main:
        for name, value in lines:
            click.echo(f"{name:<14} {value}")
    distributed.last_barrier()


def _tell(error: Exception) -> int:
    """Say it once where all ranks have it, and the code of the contract."""
    from dsgpt.errors import DsgptError, ExitCode
    from dsgpt.process import complain

    if not isinstance(error, DsgptError) or os.environ["RANK"] == "0":
        complain(f"dsgpt evaluate: {error}")
    return int(error.exit_code if isinstance(error, DsgptError) else ExitCode.INFRASTRUCTURE)
