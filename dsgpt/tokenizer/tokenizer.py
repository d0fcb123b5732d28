"""A tokenizer as the rest of dsgpt sees it: a folder with tokenizer.json, loaded without importing transformers.

    tokenizer = Tokenizer.load("tokenizers/bpe4k")          # or "hf:openai-community/gpt2"
    tokenizer.decode(tokenizer.encode("def f():\n\treturn 1")) == "def f():\n\treturn 1"

Trade-off: tokenizer.json alone decides the ids. What else a folder holds (sentencepiece model, chat template) is copied
with it but not consulted, except tokenizer_config.json for the names of the BOS and EOS tokens. A folder or file without
one (sentencepiece's .model, GPT-2's vocab.json and merges.txt) is converted on loading, and saved as tokenizer.json. Text
is never read as markup: "</s>" inside a document becomes the pieces "<", "/", "s", ">" and not the end-of-document id.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from dsgpt.errors import DataError
from dsgpt.tokenizer.sentencepiece_json import convert, cut_at_spaces
from dsgpt.tokenizer.sentencepiece_model import read_model

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
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
# Any of these makes a folder one that transformers may know a tokenizer in.
_TOKENIZER_FILES = ("*token*", "*vocab*", "*merges*", "*.model", "*.bpe")
# What they are called in transformers, and as GPT-2 was published.
_GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


class Tokenizer:
    """Encodes and decodes; `sha256` identifies it everywhere (datasets, checkpoints, exports).

    vocab_size   number of ids a model needs: the highest id in use plus one, added tokens included
    bos_id, eos_id   None where the tokenizer has no such token
    end_ids          what ends a text: eos_id, and what the model that it is loaded with says besides
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: dict[str, Any],
        folder: Path | None = None,
        template: str | None = None,
    ):
        # Ids of a training run must not depend on settings for inference batches.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self._special = {name: content for name, token in special.items() if (content := _content(token)) is not None}
        self._folder = folder
        self._chat_template = template
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        self.end_ids: tuple[int, ...] = () if self.eos_id is None else (self.eos_id,)

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The library's object: not to be changed."""
        return self._backend

    @property
    def special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token and others, as text, where there are such."""
        return dict(self._special)

    def special_id(self, text: str) -> int | None:
        """The id of a special token, None where there is none of that name."""
        number = self._backend.token_to_id(text)
        token = None if number is None else self._backend.get_added_tokens_decoder().get(number)
        return None if token is None or not token.special else int(number)

    @cached_property
    def adds_bos(self) -> bool:
        """Whether other libraries begin every text with BOS, as the tokenizer's file says. `encode` never does."""
        return self.bos_id is not None and self._backend.encode("a").ids[:1] == [self.bos_id]

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja program of the folder (chat_template.jinja, or in tokenizer_config.json), if there is one."""
        if self._folder is None:
            return self._chat_template
        with suppress(FileNotFoundError):
            return (self._folder / "chat_template.jinja").read_text("utf-8")
        try:
            found = json.loads((self._folder / "tokenizer_config.json").read_text("utf-8")).get("chat_template")
        except FileNotFoundError:
            return None
        if isinstance(found, list):  # several by name
            found = {one["name"]: one["template"] for one in found}.get("default")
        return found if isinstance(found, str) else None

    @cached_property
    def sha256(self) -> str:
        folder = self._folder
        return _canonical_sha256((folder / "tokenizer.json").read_text("utf-8") if folder else self._backend.to_str())

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a folder, a sentencepiece .model file, or "hf:NAME" on the Hugging Face hub (its cache, then the network).

        Without tokenizer.json, a folder that says what it is (tokenizer_config.json, config.json) goes through
        transformers; else its sentencepiece model is converted, or GPT-2's vocab.json and merges.txt. Raises DataError
        where there is no tokenizer or it cannot be read.
        """
        folder = Path(path)
        if str(path).startswith("hf:"):
            return cls._from_transformers(str(path)[3:])
        if (folder / "tokenizer.json").is_file():
            with _readable(folder / "tokenizer.json"):
                backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
                cut_at_spaces(backend)
                return cls(backend, _special_of(folder), folder)
        if folder.is_file() and folder.suffix == ".model":
            return cls._from_sentencepiece(folder)
        if not folder.is_dir():
            raise DataError(
                "there is no such tokenizer folder",
                seen=str(path),
                do="train one with: dsgpt tokenizer train INPUT... --vocab-size N --output DIR; "
                "a name on the Hugging Face hub is written hf:NAME",
            )
        if not [file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)]:
            raise DataError(
                "the folder holds no tokenizer",
                seen=f"{folder}: {', '.join(sorted(one.name for one in folder.iterdir())[:8]) or 'nothing'}",
                do="copy there the tokenizer files (tokenizer.json, tokenizer_config.json) of the model it was made from",
            )
        if not any((folder / name).exists() for name in ("tokenizer_config.json", "config.json")):
            for vocabulary, merges in _GPT2_FILES:
                if (folder / vocabulary).is_file() and (folder / merges).is_file():
                    with _readable(folder / vocabulary):
                        backend, end = _from_gpt2_files(folder / vocabulary, folder / merges)
                    return cls(backend, {"bos_token": end, "eos_token": end})
            if len(found := sorted(folder.glob("*.model"))) == 1:
                return cls._from_sentencepiece(found[0])
        return cls._from_transformers(str(folder))

    @classmethod
    def _from_sentencepiece(cls, path: Path) -> Tokenizer:
        with _readable(path):
            model = read_model(path.read_bytes())
            backend = convert(model)
        names = {"bos_token": model.bos_id, "eos_token": model.eos_id}
        return cls(backend, {name: model.pieces[i] for name, i in names.items() if i is not None})

    @classmethod
    def _from_transformers(cls, name: str) -> Tokenizer:
        from transformers import AutoTokenizer

        with _readable(name):  # from OSError to AttributeError, whatever the tokenizer's own code does
            found = AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=False)
            backend = found.backend_tokenizer
        # A copy, so that our settings do not leak into an object that transformers may share.
        backend = tokenizers.Tokenizer.from_str(backend.to_str())
        template = found.chat_template if isinstance(found.chat_template, str) else None
        special = {name: token for name, token in found.special_tokens_map.items() if isinstance(token, str)}
        return cls(backend, special, template=template)

    def with_special_tokens(self, texts: Sequence[str]) -> Tokenizer:
        """This one, where it lacks none; else one in which those it lacks come after its own, each a single token."""
        known = {token.content for token in self._backend.get_added_tokens_decoder().values() if token.special}
        if known.issuperset(texts):
            return self
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in texts])
        return Tokenizer(backend, self._special, template=self.chat_template)

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
        """Copy the tokenizer into `folder`, so that it and transformers' AutoTokenizer load it with equal ids.

        Of a copied tokenizer_config.json the class is replaced: most classes of transformers set tokenizer.json aside
        and build a tokenizer of their own from its vocabulary, with other ids.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        if self._folder is None:
            (target / "tokenizer.json").write_text(self._backend.to_str(), "utf-8")
            if self._chat_template is not None:
                (target / "chat_template.jinja").write_text(self._chat_template, "utf-8")
        else:
            for name in _FILES:
                if (self._folder / name).is_file() and self._folder.resolve() != target.resolve():
                    shutil.copyfile(self._folder / name, target / name)
        self._describe(target / "tokenizer_config.json")

    def _describe(self, path: Path) -> None:
        found = self._special if self._folder is None or not path.exists() else json.loads(path.read_text("utf-8"))
        # Without a class name AutoTokenizer would look for a model's config.json.
        fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config = {key: value for key, value in found.items() if key != "auto_map"} | fixed
        if config != found:
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")

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
        special |= {key: raw[key] for key in _SPECIAL if raw.get(key) is not None}
    return special


def _canonical_sha256(tokenizer_json: str) -> str:
    content = json.loads(tokenizer_json)
    # Inference settings, which are switched off here anyway, do not make it another tokenizer.
    content.pop("truncation", None)
    content.pop("padding", None)
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _from_gpt2_files(vocabulary: Path, merges: Path) -> tuple[tokenizers.Tokenizer, str | None]:
    """The tokenizer, and the token that stands between documents, if its vocabulary has one."""
    from tokenizers import decoders, models, pre_tokenizers

    backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    end = next((token for token in ("<|endoftext|>", "</s>") if backend.token_to_id(token) is not None), None)
    if end is not None:
        backend.add_special_tokens([end])
    return backend, end


@contextmanager
def _readable(what: str | Path) -> Iterator[None]:
    """Whatever a library raises for a file that it cannot parse, plain Exception among it, becomes a DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise _unreadable(what, error) from error


def _unreadable(what: str | Path, error: Exception) -> DataError:
    return DataError(
        "a tokenizer cannot be read",
        seen=f"{what}: {error}",
        do="give a folder with tokenizer.json, or hf:NAME with the name of a tokenizer on the Hugging Face hub; for a "
        "sentencepiece model in a folder with a tokenizer_config.json, install protobuf",
    )
