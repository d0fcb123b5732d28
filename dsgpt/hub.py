"""The door to the Hugging Face hub: what it has, downloading a file of it, and what of it is on this disk already.

Only `list_files` and `download` use the network, for `dsgpt fetch` alone. Tokens are read and sent by huggingface_hub; no
message holds one. Torch-free, and huggingface_hub itself is imported where it is used.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from dsgpt.errors import ConfigError, DsgptError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

# The first of these that a model has is read: (one file, its pieces).
WEIGHTS = (
    ("model.safetensors", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin"),
)
# What says under which terms a model or a data set may be used, by the names it usually has.
LICENCE_FILES = ("LICEN[CS]E*", "NOTICE*", "*USE_POLICY*")
_KINDS = {"hf": "model", "dataset": "dataset"}
_TIMEOUT_SECONDS = 30


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub describes it. `digest` is the sha256 of a large file, and git's sha1 of a small one."""

    name: str
    size: int
    digest: str

    @classmethod
    def of(cls, sibling: RepoSibling) -> RemoteFile:
        if sibling.lfs is not None:
            return cls(sibling.rfilename, sibling.lfs.size, sibling.lfs.sha256)
        return cls(sibling.rfilename, sibling.size or 0, sibling.blob_id or "")


def list_files(source: str, revision: str | None) -> tuple[str, list[RemoteFile]]:
    """The commit behind a revision of hf:NAME or dataset:NAME, and its files.

    Left out are hidden files, and names that would lie outside of a folder. Raises ConfigError for what cannot be had, and
    DsgptError where the hub does not answer.
    """
    from huggingface_hub import HfApi

    kind, name = _kind_and_name(source)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings hold signed addresses
    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    with _telling(source):
        info = ask(name, revision=revision, files_metadata=True, timeout=_TIMEOUT_SECONDS)
    files = [RemoteFile.of(sibling) for sibling in info.siblings or ()]
    return info.sha or "", [
        file for file in files if not any(part.startswith((".", "/")) for part in PurePosixPath(file.name).parts)
    ]


def download(source: str, commit: str, name: str, folder: Path) -> None:
    """Write a file of a commit to folder/name. Raises what `list_files` does, and OSError of this disk."""
    from huggingface_hub import hf_hub_download

    kind, repository = _kind_and_name(source)
    with _telling(source):
        hf_hub_download(repository, name, repo_type=kind, revision=commit, local_dir=folder)


def locate_hf(text: str) -> Path:
    """The folder behind hf:TEXT: a folder as it is, or the copy of a model in the hub's cache (HF_HOME, HF_HUB_CACHE).

    Nothing is downloaded, also where there is internet: a job must not fetch a model as often as it has ranks, nor hang on
    a network that its nodes do not have. Raises ConfigError with the command that fetches it, where it is not on this disk. A
    text that cannot be a name of the hub comes back as a path; whoever opens it says what is missing.
    """
    folder = Path(text)
    if folder.is_dir():
        return folder
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(text, "config.json")
    except HFValidationError:
        return folder
    if isinstance(config, str) and _has_weights(Path(config).parent):
        return Path(config).parent
    raise ConfigError(
        f"the model {text} is not on this disk, and nothing is downloaded while a job starts",
        seen=f"no folder {text}; {'only parts of it' if isinstance(config, str) else 'nothing of it'} in the hub's cache, "
        f"{constants.HF_HUB_CACHE}",
        do=f"dsgpt fetch hf:{text} --output DIR, where there is internet; then hf:DIR (model.init_from=hf:DIR)",
    )


def _has_weights(folder: Path) -> bool:
    """Whether a model is there whole: whoever downloads only a tokenizer leaves a folder in the cache as well."""
    for whole, _ in WEIGHTS:
        index = folder / f"{whole}.index.json"
        if (folder / whole).is_file():
            return True
        if index.is_file():
            pieces = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            return all((folder / piece).is_file() for piece in pieces)
    return False


def _kind_and_name(source: str) -> tuple[str, str]:
    scheme, _, name = source.partition(":")
    if scheme not in _KINDS or not name:
        raise ConfigError("not a source", seen=source, do="write hf:NAME for a model, dataset:NAME for a data set")
    return _KINDS[scheme], name


@contextlib.contextmanager
def _telling(source: str) -> Iterator[None]:
    """Errors of huggingface_hub and of the libraries below it, which have no base in common, as ours."""
    from huggingface_hub import errors

    token = "set HF_TOKEN to a token of an account that may read it, then run the command again"
    try:
        yield
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"{source} is gated: its owners want a licence accepted first",
            seen=_first_line(error),
            do=f"open its page on the hub, ask for access and accept the licence; {token}",
        ) from error
    except errors.RevisionNotFoundError as error:
        do = "another --revision: a branch, a tag or a commit of it"
        raise ConfigError(f"{source} has no such revision", seen=_first_line(error), do=do) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"{source} is not on the hub, or it is private",
            seen=_first_line(error),
            do=f"check the name (OWNER/NAME); if it is private: {token}",
        ) from error
    except errors.HFValidationError as error:
        raise ConfigError("not a name of the hub", seen=source, do="hf:OWNER/NAME or dataset:OWNER/NAME") from error
    except errors.OfflineModeIsEnabled as error:
        do = "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, where there is internet"
        raise ConfigError("the hub is switched off", seen=_first_line(error), do=do) from error
    except Exception as error:
        if type(error) in (OSError, PermissionError, FileNotFoundError) and getattr(error, "errno", None):
            raise  # of this disk: full, read-only, ...
        if getattr(getattr(error, "response", None), "status_code", 0) == 401:
            raise ConfigError("the hub does not accept the token", seen=_first_line(error), do=token) from error
        raise DsgptError(
            f"{source} could not be fetched: the hub cannot be reached, or broke off",
            seen=_first_line(error.__cause__ or error),
            do="run the command again: what has arrived whole is kept; check the network and its proxy",
        ) from error


def _first_line(error: BaseException) -> str:
    """What an error says, without what an address may carry: signatures are as good as tokens."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"\?[^\s'\"]+", "?…", text)
