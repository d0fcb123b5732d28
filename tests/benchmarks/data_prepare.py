"""Speed and memory of `dsgpt data prepare` against bare gigatoken, the bare reference and `datasets.map`.

The corpus is the source code and documentation that lies around Python itself (up to a gigabyte), in .txt files of about a
megabyte; the tokenizer is trained on a part of it. Each pair is measured A/B/A/B in processes of its own, on two cores.
prepare is timed as a whole, with the start of its workers, reading, writing, hashes and fsync; its rivals are timed from
after their imports to their last id. Outputs are compared byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.frame import Outcome, Row

CLONE = Path(__file__).parents[2]
SUFFIXES = (".py", ".pyi", ".h", ".hpp", ".cuh", ".md", ".rst", ".txt", ".c", ".cpp", ".js", ".html", ".css", ".ipynb")
CORPUS_BYTES, FILE_BYTES = 1 << 30, 1 << 20
SLOW_FILES, RECIPE_FILES = 60, 8  # of these the slow rivals get so many: they take a minute for each 100 MB
MEMORY_BYTES, UNBROKEN_BYTES = 1 << 30, 200 << 20

PREPARE = """
import json, resource, sys, time
from dsgpt.data.prepare import prepare
if __name__ == "__main__":
    sources, tokenizer, output, workers, engine = sys.argv[1:]
    began = time.perf_counter()
    found = prepare(json.loads(sources), tokenizer, output, int(workers), engine=engine)
    seconds = time.perf_counter() - began
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps([seconds, peak * 1024, found.fingerprint, found.engine.name]))
"""
GIGATOKEN = """
import json, sys, time, gigatoken
from pathlib import Path
from dsgpt.tokenizer import Tokenizer
from dsgpt.tokenizer.encoder import _source
tokenizer = gigatoken.Tokenizer.from_json(_source(Tokenizer.load(sys.argv[2])))
import awkward
began = time.perf_counter()
tokenizer.encode_files(json.loads(sys.argv[1]))
print(json.dumps([time.perf_counter() - began]))
"""
REFERENCE = """
import json, sys, time, tokenizers
from pathlib import Path
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[2] + "/tokenizer.json")
texts = [Path(path).read_text() for path in json.loads(sys.argv[1])]
began = time.perf_counter()
tokenizer.encode_batch_fast(texts, add_special_tokens=False)
print(json.dumps([time.perf_counter() - began]))
"""
RECIPE = """
import json, sys, time
from datasets import load_dataset
from transformers import AutoTokenizer
if __name__ == "__main__":
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
    began = time.perf_counter()
    files = json.loads(sys.argv[1])
    found = load_dataset("text", data_files=files, sample_by="document", split="train", cache_dir=sys.argv[3])
    found.map(lambda rows: tokenizer(rows["text"]), batched=True, batch_size=4, num_proc=2, remove_columns=["text"])
    print(json.dumps([time.perf_counter() - began]))
"""


def run(trials: int | None, seed: int) -> Outcome:
    """Two rounds of each pair unless `trials` says otherwise."""
    trials = trials or 2
    with tempfile.TemporaryDirectory(prefix="dsgpt-prepare-") as name:
        folder = Path(name)
        sources, tokenizer = _corpus(folder / "text"), folder / "tokenizer"
        _train(sources, tokenizer)
        ours: dict[str, list[float]] = {"auto": [], "reference": []}
        theirs: dict[str, list[float]] = {"gigatoken": [], "reference": [], "recipe": []}
        prints: dict[str, set[str]] = {"all": set(), "some": set()}
        engines = set()
        some = sources[:SLOW_FILES]
        for trial in range(trials):
            theirs["gigatoken"] += _measure(GIGATOKEN, sources, tokenizer)
            found = _prepare(folder / f"auto-{trial}", sources, tokenizer, 2 - trial % 2 if trial > 1 else 2)
            ours["auto"].append(found[0])
            prints["all"].add(found[2])
            engines.add(found[3])
            theirs["reference"] += _measure(REFERENCE, some, tokenizer)
            found = _prepare(folder / f"reference-{trial}", some, tokenizer, 2, "reference")
            ours["reference"].append(found[0])
            prints["some"].add(found[2])
            theirs["recipe"] += _measure(RECIPE, sources[:RECIPE_FILES], tokenizer, folder / f"cache-{trial}")
        prints["some"].add(_prepare(folder / "one-worker", some, tokenizer, 1)[2])
        prints["all"].add(_prepare(folder / "three-workers", sources, tokenizer, 3)[2])
        rows = _rows(sources, ours, theirs)
        rows.append(
            Row("different outputs", sum(map(len, prints.values())) - 2, at_most=0, note="engines, workers, rounds")
        )
        rows += _memory(folder, sources, tokenizer, seed)
        rows.append(
            Row("load average", os.getloadavg()[0], note=f"{', '.join(sorted(engines))}; {os.cpu_count()} CPUs")
        )
    return Outcome(rows, trials)


def _rows(sources: list[Path], ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> list[Row]:
    total, some, few = (_megabytes(chosen) for chosen in (sources, sources[:SLOW_FILES], sources[:RECIPE_FILES]))
    fast, slow = total / statistics.median(ours["auto"]), some / statistics.median(ours["reference"])
    bare, bare_slow = total / statistics.median(theirs["gigatoken"]), some / statistics.median(theirs["reference"])
    recipe = few / statistics.median(theirs["recipe"])
    return [
        Row("prepare", fast, "MB/s", note=f"{total:.0f} MB, 2 workers: {_spread(ours['auto'])}"),
        Row("gigatoken.encode_files", bare, "MB/s", note=f"the same files: {_spread(theirs['gigatoken'])}"),
        Row("... prepare's share of it", fast / bare, at_least=0.5),
        Row("prepare --engine reference", slow, "MB/s", note=f"{some:.0f} MB: {_spread(ours['reference'])}"),
        Row("tokenizers.encode_batch_fast", bare_slow, "MB/s", note=f"the same files: {_spread(theirs['reference'])}"),
        Row("... prepare's share of it ", slow / bare_slow, at_least=0.9),
        Row("datasets.map(num_proc=2)", recipe, "MB/s", note=f"{few:.0f} MB: {_spread(theirs['recipe'])}"),
        Row("... prepare is so many times as fast", fast / recipe, at_least=15),
    ]


def _memory(folder: Path, sources: list[Path], tokenizer: Path, seed: int) -> list[Row]:
    large, unbroken = folder / "large.jsonl", folder / "unbroken.txt"
    with open(large, "w", encoding="utf-8") as stream:
        while stream.tell() < MEMORY_BYTES:
            for source in sources:
                text = source.read_text("utf-8")
                for start in range(0, len(text), 5000):
                    stream.write(json.dumps({"text": text[start : start + 5000]}) + "\n")
    rng = random.Random(seed)
    words = [word for source in sources[:4] for word in source.read_text("utf-8").split()]
    with open(unbroken, "w", encoding="utf-8") as stream:
        while stream.tell() < UNBROKEN_BYTES:
            stream.write(" ".join(rng.choices(words, k=100_000)) + " ")
    rows = []
    for label, path in (("1 GB of .jsonl", large), ("200 MB without a line break", unbroken)):
        found = _prepare(folder / f"memory-{path.stem}", [path], tokenizer, 2)
        rate = path.stat().st_size / 1e6 / found[0]
        rows.append(
            Row(f"peak memory of a process, {label}", found[1] / 1e6, "MB", at_most=700, note=f"{rate:.0f} MB/s")
        )
    return rows


def _corpus(folder: Path) -> list[Path]:
    """Files of about a megabyte of text each, no two texts equal."""
    folder.mkdir()
    made: list[Path] = []
    pending: list[str] = []
    size = total = 0
    for text in _texts():
        pending.append(text)
        size += len(text)
        if size >= FILE_BYTES:
            made.append(folder / f"{len(made):04d}.txt")
            made[-1].write_text("\n".join(pending), "utf-8")
            total += made[-1].stat().st_size
            pending, size = [], 0
            if total >= CORPUS_BYTES:
                break
    return made


def _texts() -> Iterator[str]:
    seen: set[bytes] = set()
    for root in dict.fromkeys((sys.prefix, sysconfig.get_path("stdlib"), "/usr/lib", "/usr/share", "/usr/include")):
        for path in sorted(Path(root).rglob("*")):
            if path.suffix in SUFFIXES and path.is_file() and path.stat().st_size < 4 * FILE_BYTES:
                content = path.read_bytes()
                digest = hashlib.sha256(content).digest()
                try:
                    text = content.decode("utf-8")
                except UnicodeDecodeError:
                    continue
                if digest not in seen and text.strip():
                    seen.add(digest)
                    yield text


def _train(sources: list[Path], folder: Path) -> None:
    from dsgpt.tokenizer.training import train_on_texts

    texts = [path.read_text("utf-8") for path in sources[:: max(1, len(sources) // 16)]]
    train_on_texts(texts, 32_000, folder, "hf-bpe", {})


def _prepare(
    output: Path, sources: list[Path], tokenizer: Path, workers: int, engine: str = "auto"
) -> tuple[float, float, str, str]:
    """(seconds, peak bytes of a process, fingerprint, engine)."""
    # A file, because workers that are started afresh import the main module.
    program = output.with_suffix(".py")
    program.write_text(PREPARE, "utf-8")
    found = _python(
        [str(program), json.dumps(list(map(str, sources))), str(tokenizer), str(output), str(workers), engine]
    )
    return found[0], found[1], found[2], found[3]


def _measure(program: str, sources: list[Path], tokenizer: Path, *more: Path) -> list[float]:
    return list(_python(["-c", program, json.dumps(list(map(str, sources))), str(tokenizer), *map(str, more)]))


def _python(arguments: list[str]) -> list:
    environment = {**os.environ, "PYTHONPATH": str(CLONE), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True, env=environment)
    return json.loads(ran.stdout.strip().splitlines()[-1])


def _megabytes(paths: list[Path]) -> float:
    return sum(path.stat().st_size for path in paths) / 1e6


def _spread(seconds: list[float]) -> str:
    return ", ".join(f"{one:.2f} s" for one in seconds)
