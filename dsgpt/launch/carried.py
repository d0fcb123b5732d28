"""A job's start as one word of letters, digits, '-' and '_': arguments, folder and environment for another machine.

    word = pack(Carried(...)); Carried.unpack(word)

ssh and pdsh hand a command to a shell on the other side, and DeepSpeed's own front-end quotes only some of it: a `$(…)` in
an argument or in PYTHONPATH runs there, blanks and newlines are lost, pdsh replaces `%h`. So nothing but this word, the
Python's path and numbers goes through a shell; what cannot is refused. Bytes that are no UTF-8 arrive as they are.
Trade-off: the word is seen in `ps`, so variables that look like secrets stay here, and it must fit into one argument.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import dsgpt
from dsgpt.errors import ConfigError

SAFE = re.compile(r"[A-Za-z0-9_@+=:,./-]+")
# Linux ends one argument at 128 KiB, and sshd gives the whole command to a shell as one.
MAX_WORD = 100_000
# What DeepSpeed's front-end sends to other hosts, and what this program and its libraries read. PATH is the host's own.
_CARRIED = (
    *("NCCL_", "UCX_", "MV2_", "GLOO_", "MLFLOW_", "PYTHON", "OMP_", "MKL_", "TORCH_", "CUDA_", "LD_LIBRARY_PATH"),
    *("DSGPT_", "DS_ACCELERATOR", "HF_", "TRANSFORMERS_", "TRITON_", "TOKENIZERS_"),
)
_OF_THIS_HOST = ("CUDA_VISIBLE_DEVICES", "PYTHONHOME")
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|_KEY", re.IGNORECASE)


@dataclass(frozen=True)
class Carried:
    """`world` is host -> its GPUs' numbers, in the order of the ranks; `arguments` are those of dsgpt.train."""

    arguments: list[str]
    folder: str
    log_dir: str
    world: dict[str, list[int]]
    master_addr: str
    master_port: int
    environment: dict[str, str] = field(default_factory=dict)
    version: str = dsgpt.__version__

    @classmethod
    def unpack(cls, word: str) -> Carried:
        """Raises ValueError where the word is not one of `pack`."""
        try:
            fields = json.loads(zlib.decompress(base64.urlsafe_b64decode(word + "=" * (-len(word) % 4))))
            return cls(**fields)
        except (zlib.error, TypeError) as error:
            raise ValueError(f"not a start of a job: {error}") from None


def pack(carried: Carried) -> str:
    """Raises ConfigError where it does not fit into an argument."""
    # ASCII JSON: a surrogate, which stands for a byte that is no UTF-8, is an escape like any other.
    text = json.dumps(asdict(carried), ensure_ascii=True, separators=(",", ":"))
    word = base64.urlsafe_b64encode(zlib.compress(text.encode("ascii"), 9)).decode().rstrip("=")
    if len(word) > MAX_WORD:
        raise ConfigError(
            "the arguments of the run are too long to be sent to other hosts",
            f"{len(word)} characters with the environment, at most {MAX_WORD}",
            "put the overrides into a YAML",
        )
    return word


def carried_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What of this process's environment ranks on other hosts have too."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_CARRIED) and name not in _OF_THIS_HOST and not _SECRET.search(name)
    }


def python_words(environment: Mapping[str, str], executable: str = sys.executable) -> list[str]:
    """The command that starts this Python with this dsgpt elsewhere, of safe characters only. Raises ConfigError."""
    # -P: nothing is imported from the folder a remote shell begins in.
    words = [executable, "-P", "-u", "-m", "dsgpt.launch.node"]
    entries = [os.path.abspath(entry) for entry in environment.get("PYTHONPATH", "").split(":") if entry]
    here = str(Path(dsgpt.__file__).resolve().parent.parent)
    if here == os.getcwd() and here not in entries:  # found because it is the working folder
        entries.append(here)
    path = [f"PYTHONPATH={':'.join(entries)}"] if entries else []
    for what, word in (("the path of Python", executable), *(("PYTHONPATH", entry) for entry in entries)):
        if not SAFE.fullmatch(word):
            raise ConfigError(
                f"{what} has characters that a shell on another host would not leave alone",
                repr(word),
                "use an environment whose path has letters, digits and @+=:,./-_ only",
            )
    return ["env", *path, *words] if path else words
