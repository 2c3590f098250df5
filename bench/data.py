"""Data preparation, cold, against TRL's own pipeline on the same rows.

    python -m bench.data [--quick] [--limit SECONDS] [--out DIR]      writes bench/results/cpu/data.json

11,400 seeded chat rows of about 3.0 M tokens (sentences of the standard library's documentation), two
byte-level BPE tokenizers trained on them, one that tiktoken can run with identical ids and one it cannot,
and a ChatML template with generation tags. Each measurement is a process of its own: it imports, loads
the tokenizer, says it is ready, and is then timed from the JSONL file to the token arrays (TRL: the
`_prepare_dataset` of an SFTTrainer; reading the JSONL is timed apart and not counted against it). Peak
memory is the resident memory of the whole process tree, sampled, less that of the process when ready.
Both must give the same ids and the same trained tokens, or the bench fails.

Axolotl and LLaMA-Factory are looked for and not driven: each pins a transformers of its own (0.21: 5.20.1;
0.9.5: 5.6 at most), so neither can be installed beside the TRL that is the oracle here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bench import ledger
from bench.ledger import Ledger
from bench.train.job import last_error

ROWS, TOKENS_A_ROW = 11_400, 263
VOCABULARY = 16_000
MAX_LENGTH = 4096
KEY = ("kind", "who", "tokenizer", "processes")
SOURCES = (("fastsft/data", "*.py"),)
OTHERS = {"Axolotl": "axolotl", "LLaMA-Factory": "llamafactory"}

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\\n' }}{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# One pattern, which tiktoken can take; and the same cut preceded by another, which it cannot.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
PATTERNS = {"tiktoken": [WORDS], "tokenizers": [r"\p{N}{1,3}", WORDS]}


# --- the rows and the tokenizers --------------------------------------------------------------------


@cache
def sentences() -> list[str]:
    """Sentences of the documentation every Python carries."""
    found: dict[str, None] = {}
    skip = {"antigravity", "this", "idlelib", "turtledemo", "test", "lib2to3"}
    for module in sorted(
        m.name for m in pkgutil.iter_modules() if m.name in sys.stdlib_module_names
    ):
        if module in skip or module.startswith("_"):
            continue
        path = importlib.util.find_spec(module)
        origin = Path(path.origin) if path and path.origin and path.origin.endswith(".py") else None
        if origin is None:
            continue
        text = origin.read_text(encoding="utf-8", errors="replace")
        for block in re.findall(r'"""(.*?)"""', text, flags=re.DOTALL):
            for sentence in re.split(r"(?<=[.:!?])\s+(?=[A-Z])", block.strip()):
                if 20 < len(sentence) < 600:
                    found[sentence] = None
    return list(found)


def chat(draw: random.Random) -> tuple[str, str]:
    """A short question, now and then with an input, and a longer answer."""
    pool = sentences()
    question = draw.choice(pool)
    if draw.random() < 0.4:
        question += "\n" + " ".join(draw.choices(pool, k=draw.randint(1, 3)))
    return question, " ".join(draw.choices(pool, k=min(60, 1 + int(draw.expovariate(1 / 8.5)))))


def write_rows(path: Path, rows: int, seed: int = 0) -> None:
    """Alpaca-like chats, one a line."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            question, answer = chat(draw)
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def make_tokenizer(folder: Path, data: Path, patterns: list[str], vocabulary: int) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with data.open(encoding="utf-8") as file:
        texts = (m["content"] for line in file for m in json.loads(line)["messages"])
        tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
                "chat_template": TEMPLATE,
            }
        )
    )


# --- what a measuring process does ------------------------------------------------------------------


def ready() -> None:
    """Tell the parent that imports are done, and wait to be told to go."""
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()


def run_ours(data: Path, tokenizer_folder: Path, out: Path, processes: int) -> dict[str, Any]:
    from fastsft.config import make_config
    from fastsft.data.encode import Encoder
    from fastsft.data.prepare import prepare
    from fastsft.data.templates import resolve_template
    from fastsft.data.tokenizer import Tokenizer

    config = make_config({"model": "unused", "data": str(data), "max_length": MAX_LENGTH})
    tokenizer = Tokenizer.load(tokenizer_folder)
    template = resolve_template("auto", tokenizer, kwargs={}, date="2026-01-01", extra_stop=())
    encoder = Encoder(
        tokenizer,
        template,
        train_on="assistant",
        multi_turn="auto",
        max_length=MAX_LENGTH,
        overlong="auto",
    )
    ready()
    started = time.perf_counter()
    store = prepare(
        config, tokenizer, encoder, cache_dir=out / "cache", processes=processes or None
    ).train
    seconds = time.perf_counter() - started
    print_arrays(out, store.ids, store.trained)
    return {"seconds": seconds, "rows": len(store), "tokens": len(store.ids)}


def run_trl(data: Path, tokenizer_folder: Path, out: Path, processes: int) -> dict[str, Any]:
    os.environ |= {"HF_DATASETS_CACHE": str(out / "hf"), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    from datasets import Dataset, load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    taken: list[float] = []

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            prepared = super()._prepare_dataset(*args, **kwargs)
            taken.append(time.perf_counter() - started)
            return prepared

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    arguments = SFTConfig(
        output_dir=str(out / "run"),
        max_length=MAX_LENGTH,
        assistant_only_loss=True,
        dataset_num_proc=processes or None,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    ready()
    started = time.perf_counter()
    dataset = load_dataset("json", data_files=str(data), split="train")
    reading = time.perf_counter() - started
    trainer = Timed(model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    prepared = trainer.train_dataset
    assert isinstance(prepared, Dataset)
    table = prepared.with_format("arrow")[:]
    ids, labels = (
        table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        for name in ("input_ids", "labels")
    )
    print_arrays(out, ids, labels != -100)
    return {
        "seconds": taken[0],
        "reading_seconds": reading,
        "rows": len(prepared),
        "tokens": len(ids),
    }


def print_arrays(out: Path, ids: np.ndarray, trained: np.ndarray) -> None:
    np.save(out / "ids.npy", np.asarray(ids, np.int32))
    np.save(out / "trained.npy", np.asarray(trained, bool))


# --- measuring from outside -------------------------------------------------------------------------


def tree_bytes(pid: int) -> int:
    """Resident bytes of a process and its descendants; shared pages count in each."""
    total, todo = 0, [pid]
    while todo:
        at = todo.pop()
        try:
            total += int(Path(f"/proc/{at}/statm").read_text().split()[1]) * os.sysconf(
                "SC_PAGE_SIZE"
            )
            for task in Path(f"/proc/{at}/task").iterdir():
                todo += [int(child) for child in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it left while we looked
    return total


def measure(who: str, data: Path, tokenizer: Path, processes: int, keep: Path) -> dict[str, Any]:
    """One cold run in a process of its own; its arrays are left in `keep`."""
    keep.mkdir(parents=True)
    command = [sys.executable, "-m", "bench.data", "--child", who, "--processes", str(processes)]
    command += ["--data", str(data), "--tokenizer", str(tokenizer), "--out", str(keep)]
    errors = keep / "stderr.txt"
    with errors.open("w") as file:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True
        )
    assert child.stdin is not None and child.stdout is not None
    if not child.stdout.readline().startswith('{"ready"'):
        raise SystemExit(f"{who} failed before it was ready: {last_error(errors, child.wait())}")
    base = peak = tree_bytes(child.pid)
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, tree_bytes(child.pid))

    sampler = threading.Thread(target=sample)
    sampler.start()
    child.stdin.write("go\n")
    child.stdin.flush()
    lines = [line for line in child.stdout if line.startswith('{"seconds"')]
    done.set()
    sampler.join()
    if child.wait() or not lines:
        raise SystemExit(f"{who} failed: {last_error(errors, child.returncode)}")
    return {**json.loads(lines[-1]), "peak_bytes_over_imports": peak - base}


def same_arrays(a: Path, b: Path) -> None:
    for name in ("ids.npy", "trained.npy"):
        ours, theirs = np.load(a / name), np.load(b / name)
        assert len(ours) == len(theirs), f"{name}: {len(ours)} tokens here, {len(theirs)} in TRL"
        assert np.array_equal(ours, theirs), (
            f"{name}: first difference at {np.argmax(ours != theirs)}"
        )


def compare(book: Ledger, work: Path, quick: bool, left: Callable[[], float]) -> None:
    """Every way to prepare the same rows, with its ratio to TRL in one process."""
    data, rows = work / "rows.jsonl", ROWS // 20 if quick else ROWS
    write_rows(data, rows)
    kinds = ["tiktoken"] if quick else list(PATTERNS)
    ways = [("trl", 0), ("trl", 2), ("ours", 1), ("ours", 2)]
    for kind in kinds:
        patterns = PATTERNS[kind]
        tokenizer = work / f"tokenizer-{kind}"
        make_tokenizer(tokenizer, data, patterns, VOCABULARY)
        for who, processes in ways[::2] if quick else ways:
            key = {"kind": "data", "who": who, "tokenizer": kind, "processes": processes or 1}
            oracle = work / f"{kind}-trl-0-0"
            if book.find(**key) and (processes or who == "ours"):
                continue  # TRL's own arrays are needed again, to compare with
            left()
            runs = []
            for repeat in range(1 if who == "trl" or quick else 3):
                keep = work / f"{kind}-{who}-{processes}-{repeat}"
                runs.append(measure(who, data, tokenizer, processes, keep))
                same_arrays(keep, oracle)
            if book.find(**key):
                continue
            result = {**runs[0], **_spread([run["seconds"] for run in runs])}
            first = book.find(**key | {"who": "trl", "processes": 1}) or result
            runs_on = kind if who == "ours" else "transformers"
            row = key | {"tokenizer_runs_on": runs_on} | result
            row["tokens_per_second"] = result["tokens"] / result["seconds"]
            row["times_trl"] = first["seconds"] / result["seconds"]
            book.add(row)
            print(line(row), flush=True)


def _spread(seconds: list[float]) -> dict[str, float]:
    """The median counts; p20 and p80 where there are several runs."""
    median = statistics.median(seconds)
    if len(seconds) < 2:
        return {"seconds": median, "repeats": 1}
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    spread = {"p20": deciles[1], "p50": median, "p80": deciles[7]}
    return {"seconds": median, "repeats": len(seconds)} | spread


def others(book: Ledger) -> None:
    """Trainers whose preparation is not driven from here: what there is to say is said in a row."""
    for who, package in OTHERS.items():
        found = importlib.util.find_spec(package)
        says = "installed, and not driven by this benchmark yet" if found else "not installed"
        book.add({"kind": "data", "who": who, "error": says})
        print(f"{who}: {says}", flush=True)


def memory(book: Ledger, work: Path, quick: bool) -> None:
    """Peak memory of preparing 200 MB."""
    key = {"kind": "data memory", "who": "ours"}
    if book.find(**key):
        return
    data, wanted = work / "large.jsonl", 2_000_000 if quick else 200_000_000
    rows = (work / "rows.jsonl").read_bytes()
    with data.open("wb") as file:
        while file.tell() < wanted:
            file.write(rows)
    result = measure("ours", data, work / "tokenizer-tiktoken", 0, work / "memory")
    book.add(key | result | {"file_bytes": data.stat().st_size})
    peak = result["peak_bytes_over_imports"] / 1e6
    size = data.stat().st_size / 1e6
    print(f"{size:.0f} MB prepared in {result['seconds']:.1f} s, peak {peak:.0f} MB over imports")


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['tokenizer']:<10} {row['who']:<4} {row['processes']} process(es)  {row['seconds']:7.2f} s  "
        f"{row['tokens_per_second'] / 1e6:6.2f} M tokens/s  {row['times_trl']:5.1f} x TRL  "
        f"{row['peak_bytes_over_imports'] / 1e6:6.0f} MB over imports"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a twentieth; writes only into --out")
    parser.add_argument("--limit", type=float, default=540, help="seconds this command may take")
    parser.add_argument("--child", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=0, help=argparse.SUPPRESS)
    for name in ("--data", "--tokenizer", "--out"):
        parser.add_argument(
            name, type=Path, help="a folder for the rows" if name == "--out" else argparse.SUPPRESS
        )
    given = parser.parse_args(argv)
    if given.child:
        run = run_ours if given.child == "ours" else run_trl
        print(json.dumps(run(given.data, given.tokenizer, given.out, given.processes)), flush=True)
        return 0
    ends = time.monotonic() + given.limit

    def left() -> float:
        if time.monotonic() > ends:
            raise SystemExit("the time is up; the same command goes on from here")
        return ends - time.monotonic()

    with tempfile.TemporaryDirectory() as folder:
        out = given.out or (Path(folder) if given.quick else ledger.RESULTS)
        book = ledger.opened(out, "data", KEY, SOURCES)
        compare(book, Path(folder), given.quick, left)
        memory(book, Path(folder), given.quick)
        others(book)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
