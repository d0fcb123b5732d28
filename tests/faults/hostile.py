"""Files made to execute code, escape their folder or eat the machine: nothing runs, and what is refused is said.

    python -m tests.faults hostile

`ATTACKS` is the corpus. Each attack changes a copy of a place with everything dsgpt reads (config, dataset, trained run,
Hugging Face folder) and names the commands that meet it. A command must end as the attack says: refused with 65 or 78 and
a word about what was refused, or, where dsgpt never reads the planted file, with 0. Either way the canary, a file that the
planted code would make, must not exist. Commands run in this process through `dsgpt.cli.main`, training in real ranks.
Trade-off: one place and one model, so an attack is as good as its entry in the corpus; controls show that the payloads
are live.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import dsgpt
from dsgpt.checkpoint import commit
from dsgpt.cli import main
from tests.frame import Outcome, Row
from tests.pool import ranks

REFUSED = (65, 78)
Plant = Callable[["Place"], None]


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.canary}'",)


@dataclass(frozen=True)
class Place:
    """Where an attack is tried: run.yaml, data/set, run (steps 2 and 4), hf, text.txt. `canary` lies beside it."""

    folder: Path

    @property
    def canary(self) -> Path:
        return self.folder.with_name(self.folder.name + "-canary")

    @property
    def checkpoint(self) -> Path:
        return self.folder / "run/checkpoints/step-00000004"

    def pickle(self, name: str) -> None:
        (self.folder / name).write_bytes(pickle.dumps(Payload(self.canary)))

    def torch_pickle(self, name: str) -> None:
        import torch

        torch.save({"model.embed_tokens.weight": Payload(self.canary)}, self.folder / name)

    def edit(self, name: str, change: Callable[[Any], Any]) -> None:
        path = self.folder / name
        content = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps(change(content) or content), "utf-8")


CONFIG = """
run: {output_dir: run, seed: 5}
model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
data: {train: [{path: data/set}]}
optimizer: {learning_rate: 3e-3, warmup_steps: 1}
training: {seq_length: 16, global_batch_size: 4, micro_batch_size_per_gpu: 2, max_steps: 4}
deepspeed: zero1
device: cpu
checkpoint: {save_interval: 2}
logging: {log_interval: 1, eval_samples: 2}
"""


def build(folder: Path) -> Place:
    """The place before any attack: everything in it is made by dsgpt."""
    place = Place(folder)
    (folder / "data").mkdir(parents=True)
    text = folder / "text.txt"
    text.write_text((Path(dsgpt.__file__).parent / "errors.py").read_text("utf-8"), "utf-8")
    (folder / "run.yaml").write_text(CONFIG, "utf-8")
    tokenizer, data = folder / "data/tokenizer", folder / "data/set"
    for words in (
        ("tokenizer", "train", text, "--kind", "hf-bpe", "--vocab-size", "300", "--output", tokenizer),
        ("data", "prepare", text, "--documents", "blank-line", "--tokenizer", tokenizer, "--output", data),
        ("train",),
        ("checkpoint", "export", folder / "run", "--output", folder / "hf", "--no-check"),
    ):
        code, told = train(place) if words == ("train",) else command(*map(str, words))
        assert code == 0, told
    return place


def command(*arguments: str) -> tuple[int | str, str]:
    """Exit code and output of a command, run here; an error that is not dsgpt's own has its name instead of a code.

    Whoever asks on the terminal whether to run something is told yes.
    """
    output, yes = io.StringIO(), mock.patch("sys.stdin", io.StringIO("y\n" * 9))
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), yes:
        try:
            main(list(arguments))
        except SystemExit as end:
            return end.code or 0, output.getvalue()  # type: ignore[return-value]
        except Exception as error:
            return f"{type(error).__name__}: {error}", output.getvalue()
    return 0, output.getvalue()


def train_in_rank(world: Any, arguments: list[str]) -> tuple[int | str, str]:
    from dsgpt.config import load_config, split_arguments
    from dsgpt.errors import DsgptError
    from dsgpt.process import StopRequest, new_attempt
    from dsgpt.train.loop import train
    from dsgpt.train.resolve import resolve_run

    world.attempt = world.broadcast_object(new_attempt())
    try:
        plan = resolve_run(load_config(*split_arguments(arguments)).config, world_size=world.size, device="cpu")
        return 0, f"trained to step {train(plan, world, StopRequest()).step}"
    except DsgptError as error:
        return int(error.exit_code), str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}", ""


def train(place: Place, *overrides: str) -> tuple[int | str, str]:
    results = ranks(2).run(train_in_rank, [str(place.folder / "run.yaml"), *overrides])
    return results[0]


def _cli(*words: str) -> Callable[[Place], tuple[int | str, str]]:
    """A command of the place: words with a / are paths in it."""

    def run(place: Place) -> tuple[int | str, str]:
        kinds = [word.rpartition(":") for word in words]
        return command(*(f"{k}{c}{place.folder / w[2:]}" if w.startswith("./") else f"{k}{c}{w}" for k, c, w in kinds))

    return run


COMMANDS: dict[str, Callable[[Place], tuple[int | str, str]]] = {
    "validate": _cli("config", "validate", "./run.yaml"),
    "dry run": _cli("train", "./run.yaml", "--dry-run", "--num-processes", "2"),
    "resume": lambda place: train(place, "training.max_steps=5"),
    "init_from": lambda place: train(
        place, f"model.init_from=hf:{place.folder / 'hf'}", f"run.output_dir={place.folder / 'tuned'}"
    ),
    "evaluate": _cli("evaluate", "./run", "--text", "./text.txt"),
    "evaluate data": _cli("evaluate", "./run", "--data", "./data/set", "--split", "train", "--samples", "2"),
    "generate": _cli("generate", "./run", "--prompt", "def", "--max-new-tokens", "2"),
    "ls": _cli("checkpoint", "ls", "./run"),
    "verify": _cli("checkpoint", "verify", "./run"),
    "diff": _cli("checkpoint", "diff", "./run", "./run"),
    "export": _cli("checkpoint", "export", "./run", "--output", "./exported", "--no-check"),
    "evaluate hf": _cli("evaluate", "hf:./hf", "--text", "./text.txt"),
    "generate hf": _cli("generate", "hf:./hf", "--prompt", "def", "--max-new-tokens", "2"),
    "data verify": _cli("data", "verify", "./data/set"),
    "data inspect": _cli("data", "inspect", "./data/set"),
}
READ_RUN = ("evaluate", "generate", "export")
READ_HF = ("evaluate hf", "generate hf")


@dataclass(frozen=True)
class Attack:
    """`says` is a word of the refusal; "" where the planted file is never read, and every command ends with 0."""

    name: str
    plant: Plant
    commands: tuple[str, ...]
    says: str


def _config(text: str, into: str = "run.yaml") -> Plant:
    def plant(place: Place) -> None:
        planted = text.replace("CANARY", str(place.canary))
        (place.folder / into).write_text((place.folder / into).read_text("utf-8") + planted, "utf-8")

    return plant


def _pickle(*names: str) -> Plant:
    return lambda place: [place.pickle(name) for name in names] and None


def _only_bin(raw: bool = False, index: bool = False) -> Plant:
    def plant(place: Place) -> None:
        name = "hf/pytorch_model.bin"
        (place.pickle if raw else place.torch_pickle)(name)
        (place.folder / "hf/model.safetensors").unlink()
        if index:
            weights = {"model.embed_tokens.weight": "pytorch_model.bin"}
            (place.folder / "hf/model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))

    return plant


def _hf_keys(**keys: Any) -> Plant:
    """Keys in config.json, and the code they name beside it."""

    def plant(place: Place) -> None:
        (place.folder / "hf/evil.py").write_text(f"open({str(place.canary)!r}, 'w')\n", "utf-8")
        place.edit("hf/config.json", lambda raw: {**raw, **keys})

    return plant


def _code_tokenizer(place: Place) -> None:
    code = f"open({str(place.canary)!r}, 'w')\nclass Evil: pass\n"
    (place.folder / "hf/evil.py").write_text(code, "utf-8")
    (place.folder / "hf/tokenizer.json").unlink()
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (place.folder / "hf/tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def _name_in_manifest(name: str) -> Plant:
    """The manifest, whole in itself, claims a file elsewhere, which is there and has the right size and hash."""

    def plant(place: Place) -> None:
        outside = place.folder / "run/checkpoints/outside.safetensors"
        shutil.copyfile(place.checkpoint / "rank-00000.safetensors", outside)

        manifest = commit.read_manifest(place.checkpoint)
        manifest["files"][name.replace("OUTSIDE", str(outside))] = manifest["files"]["rank-00000.safetensors"]
        (place.checkpoint / commit.MANIFEST).write_text(commit.sealed(manifest), "utf-8")

    return plant


def _symlink(place: Place) -> None:
    file = place.checkpoint / "rank-00000.safetensors"
    file.rename(place.folder / "elsewhere")
    file.symlink_to(place.folder / "elsewhere")


def _only_newest(place: Place) -> None:
    shutil.rmtree(place.checkpoint.with_name("step-00000002"))


def _both(*plants: Plant) -> Plant:
    return lambda place: [plant(place) for plant in plants] and None


# Nine levels of ten aliases, of lists as in the textbook and of mappings: a billion leaves once expanded.
LISTS = "\nbomb:\n  a0: &a0 [lol]\n" + "".join(
    f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
MAPS = "\nbomb:\n  a0: &a0 {k: 1}\n" + "".join(
    f"  a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(10))}}}\n" for n in range(1, 10)
)
APPLY = "\nevil: !!python/object/apply:os.system [\"touch 'CANARY'\"]\n"
RUN4 = "run/checkpoints/step-00000004"
AUTO = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
ATTACKS = (
    Attack("T913 python tag in a config", _config(APPLY), ("validate", "dry run"), "python/object/apply:os.system"),
    Attack("T913 python tag in the run's config", _config(APPLY, "run/config.yaml"), ("dry run",), "os.system"),
    Attack("T913 aliases of lists", _config(LISTS), ("validate", "dry run"), "aliases"),
    Attack("T913 aliases of mappings", _config(MAPS), ("validate",), "aliases"),
    Attack("T913 aliases in the run's config", _config(MAPS, "run/config.yaml"), ("dry run", "resume"), "aliases"),
    Attack("T913 a key twice", _config("\ndevice: cuda\n"), ("validate", "dry run"), "stands here twice"),
    Attack("T913 a number of many digits", _config("\nx: " + "9" * 10**5), ("validate",), "x"),
    Attack("T913 deep nesting", _config("\nx: " + "[" * 10**5), ("validate",), "nested too deeply"),
    Attack("T914 pickle as the run's config", _pickle("run/config.yaml"), ("dry run",), "config.yaml"),
    Attack(
        "T914 pickle as a rank's partition",
        _both(_only_newest, _pickle(f"{RUN4}/rank-00000.safetensors")),
        ("resume", "verify", "diff", *READ_RUN),
        "rank-00000.safetensors",
    ),
    Attack(
        "T914 pickle as manifest",
        _both(_only_newest, _pickle(f"{RUN4}/manifest.json")),
        ("resume", "verify", "diff", *READ_RUN),
        "manifest",
    ),
    Attack(
        "T914 pickle as evaluation, rng and optimizer state, starts",
        _pickle(
            *(f"{RUN4}/{name}" for name in ("evaluation.json", "rng-00000.pt", "optimizer.pt", "training_args.bin")),
            "run/starts.jsonl",
        ),
        ("ls", "verify", "diff", "resume", *READ_RUN),
        "",
    ),
    Attack("T914 pickle as the run's tokenizer", _pickle("run/tokenizer/tokenizer.json"), READ_RUN, "tokenizer.json"),
    Attack(
        "T914 pickle beside safetensors",
        _both(
            lambda place: place.torch_pickle("hf/pytorch_model.bin"),
            _pickle("hf/training_args.bin", "hf/optimizer.pt", "hf/rng_state.pth", "hf/tokenizer.model"),
        ),
        ("init_from", *READ_HF),
        "",
    ),
    Attack("T914 weights only as pickle", _only_bin(), ("init_from", *READ_HF), "--trust-checkpoint"),
    Attack("T914 weights only as bare pickle", _only_bin(raw=True), ("evaluate hf",), "--trust-checkpoint"),
    Attack("T914 index that names a pickle", _only_bin(index=True), ("evaluate hf",), "--trust-checkpoint"),
    Attack("T914 pickle as safetensors", _pickle("hf/model.safetensors"), ("init_from", *READ_HF), "model.safetensors"),
    Attack("T914 pickle as config.json", _pickle("hf/config.json"), READ_HF, "config.json"),
    Attack("T914 pickle as tokenizer.json", _pickle("hf/tokenizer.json"), ("init_from", *READ_HF), "tokenizer.json"),
    Attack(
        "T914 pickle as shard",
        _pickle("data/set/train-00000.bin", "data/set/train-00000.idx"),
        ("data verify", "data inspect", "evaluate data", "resume"),
        "train-00000",
    ),
    Attack("T914 pickle in .npy beside shards", _pickle("data/set/train-00000.npy"), ("data verify", "resume"), ""),
    Attack("T914 pickle as dataset.json", _pickle("data/set/dataset.json"), ("data verify", "dry run"), "dataset.json"),
    Attack("T916 auto_map in config.json", _hf_keys(**AUTO), ("init_from", *READ_HF), "auto_map"),
    Attack("T916 trust_remote_code in config.json", _hf_keys(trust_remote_code=True), READ_HF, "trust_remote_code"),
    Attack(
        "T916 _attn_implementation_internal in config.json",
        _hf_keys(_attn_implementation_internal="evil/kernel"),
        READ_HF,
        "_attn_implementation_internal",
    ),
    Attack("T916 code of a tokenizer", _code_tokenizer, ("generate hf",), "tokenizer"),
    Attack(
        "T917 manifest with ../../x",
        _both(_only_newest, _name_in_manifest("../outside.safetensors")),
        ("verify", "resume", *READ_RUN),
        "leaves the checkpoint",
    ),
    Attack("T917 manifest with an absolute path", _name_in_manifest("OUTSIDE"), ("verify", "evaluate"), "leaves"),
    Attack(
        "T917 symlink out of the folder", _both(_only_newest, _symlink), ("verify", "resume", *READ_RUN), "plain file"
    ),
)


def violations(attack: Attack, base: Place, folder: Path) -> list[str]:
    """Try one attack in a copy of the place; what broke the promise."""
    place = Place(folder)
    shutil.copytree(base.folder, folder)
    attack.plant(place)
    found = []
    for name in attack.commands:
        code, told = COMMANDS[name](place)
        if place.canary.exists():
            found.append(f"{name}: the planted code ran")
            place.canary.unlink()
        if attack.says and (code not in REFUSED or attack.says not in told):
            found.append(f"{name}: not refused as it should be: {code} {told[-500:]}")
        if not attack.says and code:
            found.append(f"{name}: ended with {code}: {told[-500:]}")
    return found


def live_payloads(base: Place, folder: Path) -> dict[str, bool]:
    """The controls: the same payloads make their canary where something careless reads them."""
    import torch
    import yaml

    shutil.copytree(base.folder, folder)
    place = Place(folder)
    place.pickle("raw")
    place.torch_pickle("torch")
    careless = {
        "pickle.load": lambda: pickle.loads((folder / "raw").read_bytes()),
        "torch.load": lambda: torch.load(folder / "torch", weights_only=False),
        "yaml.load": lambda: yaml.load(APPLY.replace("CANARY", str(place.canary)), yaml.UnsafeLoader),
    }
    live = {}
    for name, read in careless.items():
        read()
        live[name] = place.canary.exists()
        place.canary.unlink(missing_ok=True)
    return live


def run(trials: int | None, seed: int) -> Outcome:
    """Every attack of the corpus once; there is nothing random, so `trials` and `seed` change nothing."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        base = build(Path(tmp, "base"))
        for name, live in live_payloads(base, Path(tmp, "control")).items():
            rows.append(Row(f"control: {name} runs the payload", int(live), at_least=1))
        for number, attack in enumerate(ATTACKS):
            found = violations(attack, base, Path(tmp, str(number)))
            tried = f"{len(attack.commands)} commands {'refuse' if attack.says else 'never read it'}"
            rows.append(Row(attack.name, len(found), "violations", at_most=0, note="; ".join(found) or tried))
    return Outcome(rows, len(ATTACKS))
