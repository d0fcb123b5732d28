"""A tokenizer as the rest of dsgpt sees it: a folder with tokenizer.json, loaded without importing transformers.

    tokenizer = Tokenizer.load("tokenizers/bpe4k")          # or "hf:openai-community/gpt2"
    tokenizer.decode(tokenizer.encode("def f():\n\treturn 1")) == "def f():\n\treturn 1"

Trade-off: tokenizer.json alone decides the ids. What else a folder holds (sentencepiece model, chat template) is copied
with it but not consulted, except tokenizer_config.json for the names of the BOS and EOS tokens. Text is never read as
markup: "</s>" inside a document becomes the pieces "<", "/", "s", ">" and not the end-of-document id.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from dsgpt.errors import DataError
from dsgpt.tokenizer.sentencepiece_json import cut_at_spaces

# All files by which Hugging Face tokenizers are described, and our record of the training.
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer_training.json",
)


class Tokenizer:
    """Encodes and decodes; `sha256` identifies it everywhere (datasets, checkpoints, exports).

    vocab_size   number of ids a model needs: the highest id in use plus one, added tokens included
    bos_id, eos_id   None where the tokenizer has no such token
    """

    def __init__(self, backend: tokenizers.Tokenizer, special: dict[str, Any], folder: Path | None = None):
        # Ids of a training run must not depend on settings for inference batches.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self._special = {name: content for name, token in special.items() if (content := _content(token)) is not None}
        self._folder = folder
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        source = (folder / "tokenizer.json").read_text("utf-8") if folder else backend.to_str()
        self.sha256 = _canonical_sha256(source)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a folder, or "hf:NAME" for a name on the Hugging Face hub (its cache, then the network).

        A folder without tokenizer.json goes through transformers, or is read as GPT-2's vocab.json + merges.txt.
        Raises DataError where there is no tokenizer or it cannot be read.
        """
        folder = Path(path)
        if str(path).startswith("hf:"):
            return cls._from_transformers(str(path)[3:])
        if (folder / "tokenizer.json").is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
                cut_at_spaces(backend)
                return cls(backend, _special_of(folder), folder)
            except DataError:
                raise
            except Exception as error:  # the library raises plain Exception for a file it cannot parse
                raise _unreadable(folder / "tokenizer.json", error) from error
        if not folder.is_dir():
            raise DataError(
                "there is no such tokenizer folder",
                seen=str(path),
                do="train one with: dsgpt tokenizer train INPUT... --vocab-size N --output DIR; "
                "a name on the Hugging Face hub is written hf:NAME",
            )
        described = any((folder / name).exists() for name in ("tokenizer_config.json", "config.json"))
        if not described and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            try:
                backend = _from_gpt2_files(folder)
            except Exception as error:  # the library raises plain Exception for a file it cannot parse
                raise _unreadable(folder / "vocab.json", error) from error
            return cls(backend, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})
        return cls._from_transformers(str(folder))

    @classmethod
    def _from_transformers(cls, name: str) -> Tokenizer:
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=False)
            backend = found.backend_tokenizer
        except Exception as error:  # from OSError to AttributeError, whatever the tokenizer's own code does
            raise _unreadable(name, error) from error
        # A copy, so that our settings do not leak into an object that transformers may share.
        backend = tokenizers.Tokenizer.from_str(backend.to_str())
        return cls(backend, {"bos_token": found.bos_token, "eos_token": found.eos_token})

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: nothing is added, and nothing in the text counts as a special token."""
        # A batch of one: without the bookkeeping of character offsets this is half as fast again as the plain call.
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode` for each text, on all cores (TOKENIZERS_PARALLELISM=false keeps it to one)."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_document(self, text: str) -> list[int]:
        """[BOS] + ids + [EOS], each where the tokenizer has one: what a document looks like in a dataset."""
        return self.enclose(self.encode(text))

    def enclose(self, ids: list[int]) -> list[int]:
        """[BOS] + ids + [EOS], each where the tokenizer has one."""
        before = [] if self.bos_id is None else [self.bos_id]
        after = [] if self.eos_id is None else [self.eos_id]
        return before + ids + after

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer into `folder`, so that it and transformers' AutoTokenizer load it with equal ids."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        if self._folder is None:
            (target / "tokenizer.json").write_text(self._backend.to_str(), "utf-8")
        else:
            for name in _FILES:
                if (self._folder / name).is_file() and self._folder.resolve() != target.resolve():
                    shutil.copyfile(self._folder / name, target / name)
        if not (target / "tokenizer_config.json").exists():
            # Without a class name AutoTokenizer would look for a model's config.json.
            config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._special}
            (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    def _id_of(self, name: str) -> int | None:
        content = self._special.get(name)
        if content is None:
            return None
        found = self._backend.token_to_id(content)
        if found is None:
            raise DataError(
                f"the tokenizer's {name} is not in its vocabulary",
                seen=f"{name} {content!r} in {self._folder}",
                do="correct tokenizer_config.json, or add the token to tokenizer.json",
            )
        return int(found)


def _content(token: Any) -> str | None:
    """A special token is written as a string, as a dict with its content, or as null."""
    return token.get("content") if isinstance(token, dict) else token


def _special_of(folder: Path) -> dict[str, Any]:
    special: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            raw = json.loads((folder / name).read_text("utf-8"))
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise _unreadable(folder / name, error) from error
        special |= {key: raw[key] for key in ("bos_token", "eos_token") if raw.get(key) is not None}
    return special


def _canonical_sha256(tokenizer_json: str) -> str:
    content = json.loads(tokenizer_json)
    # Inference settings, which are switched off here anyway, do not make it another tokenizer.
    content.pop("truncation", None)
    content.pop("padding", None)
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _from_gpt2_files(folder: Path) -> tokenizers.Tokenizer:
    from tokenizers import decoders, models, pre_tokenizers

    model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


def _unreadable(what: str | Path, error: Exception) -> DataError:
    return DataError(
        "a tokenizer cannot be read",
        seen=f"{what}: {error}",
        do="give a folder with tokenizer.json, or hf:NAME with the name of a tokenizer on the Hugging Face hub",
    )
