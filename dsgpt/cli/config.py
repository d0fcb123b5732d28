"""`dsgpt config`: look at run configs, shipped ones and one's own, without starting anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from dsgpt.errors import ConfigError, ExitCode, LockedError

_ARGUMENTS = click.argument("arguments", nargs=-1, required=True, metavar="RUN.yaml... [key=value...]")


@click.group()
def config() -> None:
    """List, copy, show, explain and validate run configs."""


@config.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_configs(as_json: bool) -> None:
    """The run configs that come with dsgpt."""
    from dsgpt.config import shipped_configs

    found = {name: {"path": str(path), "about": _about(path)} for name, path in shipped_configs().items()}
    if as_json:
        click.echo(json.dumps(found))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "what it is", box=None)
    for name, entry in found.items():
        table.add_row(name, entry["about"])
    Console().print(table)


def _about(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


@config.command("cp")
@click.argument("name")
@click.argument("destination", type=click.Path(path_type=Path))
def copy(name: str, destination: Path) -> None:
    """Copy the shipped config NAME to DESTINATION, to be edited there."""
    from dsgpt.config import find_config

    source = find_config(name)
    target = destination / source.name if destination.is_dir() else destination
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise ConfigError(f"{target} exists", do="choose another name, or remove the file first") from None
    except OSError as error:
        raise LockedError(f"cannot write {target}", str(error), "choose a folder that exists and is yours") from None
    click.echo(f"copied {name} to {target}; paths in it now count from {target.resolve().parent}")


@config.command()
@_ARGUMENTS
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of YAML.")
def show(arguments: tuple[str, ...], as_json: bool) -> None:
    """The merged config with every default filled in, as YAML."""
    from dsgpt.config import load_config, split_arguments, to_yaml

    loaded = load_config(*split_arguments(arguments))
    _warn(loaded.warnings)
    click.echo(json.dumps(loaded.config.model_dump(mode="json")) if as_json else to_yaml(loaded.config).rstrip())


@config.command()
@_ARGUMENTS
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def explain(arguments: tuple[str, ...], as_json: bool) -> None:
    """Every value and where it comes from."""
    from dsgpt.config import flatten, load_config, split_arguments

    loaded = load_config(*split_arguments(arguments))
    _warn(loaded.warnings)
    values = flatten(loaded.config.model_dump(mode="json"))
    if as_json:
        click.echo(json.dumps({key: {"value": values[key], "origin": loaded.origins[key]} for key in values}))
        return
    texts = {key: json.dumps(value) for key, value in values.items()}
    wide, wider = max(map(len, texts)), min(40, max(map(len, texts.values())))
    for key, text in texts.items():
        click.echo(f"{key:<{wide}}  {text:<{wider}}  {loaded.origins[key]}")


@config.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def changes(as_json: bool) -> None:
    """What happens to each key that is changed before a run is continued: applied, refused or ignored."""
    from dsgpt.cli.common import print_json
    from dsgpt.train.changes import POLICIES

    if as_json:
        print_json({"policies": [vars(policy) for policy in POLICIES]})
        return
    width = max(len(policy.pattern) for policy in POLICIES)
    for policy in POLICIES:
        click.echo(f"{policy.pattern:<{width}}  {policy.on_resume:<8}  {policy.why}".rstrip())


@config.command()
def schema() -> None:
    """JSON Schema of a run's YAML, for editors."""
    from dsgpt.config import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@config.command()
@_ARGUMENTS
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def validate(arguments: tuple[str, ...], as_json: bool) -> None:
    """Check a config and print every problem; exit code 0 or 78."""
    from dsgpt.config import check_deepspeed, load_config, split_arguments

    paths, overrides = split_arguments(arguments)
    problems, warnings = [], []
    try:
        loaded = load_config(paths, overrides)
        problems, warnings = check_deepspeed(loaded.config), loaded.warnings
    except ConfigError as error:
        problems = error.problems
    if as_json:
        seen = [{"what": problem.what, "seen": problem.seen, "do": problem.do} for problem in problems]
        click.echo(json.dumps({"valid": not problems, "problems": seen, "warnings": warnings}))
        sys.exit(ExitCode.CONFIG if problems else ExitCode.DONE)
    _warn(warnings)
    if problems:
        raise ConfigError(problems=problems)
    click.echo(f"{' '.join(paths)}: valid")


def _warn(warnings: list[str]) -> None:
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
