"""Makes `builtin:tiny`, the base model of the quickstart, from what every Python carries.

A newcomer should see fine-tuning work in two minutes on two CPU cores, without a download. Three
million parameters cannot hold much, so half of what they read is the opening sentence of 500
well-known library functions in many plain phrasings, and the rest is the prose of the standard
library: pydoc's topics, docstrings, comments and the licence. Nothing is in chat format: answering
and stopping is what the fine-tuning has to teach.

    python examples/make_tiny.py [--out fastsft/builtin/tiny] [--work build/tiny]

About an hour of CPU time; the same Python, torch and thread count give the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import random
import shutil
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # the order of equal merges must not depend on it

from fastsft.builtin.docstrings import documented

VOCABULARY = 4096
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PIECE = 700  # characters of library prose per document: about 200 tokens
TOKENS = 9_000_000  # read in all, half of them names
CHARS_PER_TOKEN = 3.6  # of this tokenizer on this text; only decides how much text is written

# A name in backquotes is cut into the same tokens wherever it stands, and a sentence at the start
# of a line likewise: that is what lets a question in another form find the sentence again.
PHRASINGS = (
    "`{name}`: {text}",
    "`{name}` - {text}",
    "{name}: {text}",
    "The documentation of `{name}` says: {text}",
    "Python has `{name}`. {text}",
    "One often meets `{name}` in Python code. {text}",
    "`{name}`\n{text}",
    "`{name}`:\n\n{text}",
    "help({name})\n\n{text}",
    "About `{name}`\n{text}",
    "What `{name}` does:\n{text}",
    "In short, `{name}` is described as follows.\n{text}",
)

LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

RECIPE: dict[str, Any] = {
    "method": "full",
    "max_length": 256,
    "batch_tokens": 2048,
    "micro_batch_tokens": 2048,
    "epochs": 1,
    "learning_rate": 3e-3,
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.03,
    "min_lr_ratio": 0.02,
    "weight_decay": 0.01,
    "val_size": 0,
    "seed": 0,
    "save_steps": 1000,
    "save_total_limit": 1,
    "logging_steps": 20,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("fastsft/builtin/tiny"))
    parser.add_argument("--work", type=Path, default=Path("build/tiny"))
    parser.add_argument("--until", choices=("data", "folder", "train"), default="train")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    texts = list(pretraining_texts(int(TOKENS * CHARS_PER_TOKEN)))
    data = args.work / "pretrain.jsonl"
    with data.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    print(f"{data}: {len(texts)} documents, {sum(map(len, texts)) / 1e6:.1f} M characters")
    if args.until == "data":
        return

    start = args.work / "start"
    write_tokenizer(texts, start)
    write_random_model(start)
    for name in FILES:
        args.out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(start / name, args.out / name)
    if args.until == "folder":
        return

    import fastsft

    run = args.work / "run"
    shutil.rmtree(run, ignore_errors=True)
    source = {"path": str(data), "format": "text"}
    fastsft.train({**RECIPE, "model": str(start), "data": [source], "output_dir": str(run)})
    write_bf16(run / "model" / "model.safetensors", args.out / "model.safetensors")


def pretraining_texts(characters: int) -> Iterator[str]:
    """Documents in their final, shuffled order: half the characters names, half library prose."""
    chance = random.Random(0)
    half = characters // 2
    prose = list(library_prose())
    chance.shuffle(prose)
    texts = take(prose, half)
    named = [form.format(name=n, text=t) for n, t in documented().items() for form in PHRASINGS]
    texts += take(named, half)
    chance.shuffle(texts)
    yield from texts


def take(texts: list[str], characters: int) -> list[str]:
    """Go round `texts` until `characters` are used, so that each is read equally often."""
    taken: list[str] = []
    while characters > 0:
        for text in texts:
            taken.append(text)
            characters -= len(text)
            if characters <= 0:
                break
    return taken


def library_prose() -> Iterator[str]:
    """pydoc's topics, the licence, and the docstrings and comments of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "encodings"}
    licence = library / "LICENSE.txt"
    if licence.exists():
        yield from pieces(licence.read_text(encoding="utf-8"))
    for path in sorted(library.rglob("*.py")):
        if left_out & set(path.relative_to(library).parts) or path.name.startswith("_sysconfig"):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue  # deliberately broken files exist in some distributions
        if path.parent.name == "pydoc_data":
            strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
            found = [value for value in strings if isinstance(value, str)]
        else:
            found = [*docstrings(tree), *comments(source)]
        for text in found:
            yield from pieces(text)


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Each docstring of a module, after the name of what it documents."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            doc = ast.get_docstring(node)
            if doc:
                yield f"{node.name}\n\n{doc}"
        elif isinstance(node, ast.Module):
            yield ast.get_docstring(node) or ""


def comments(source: str) -> Iterator[str]:
    """Blocks of comment lines as running text."""
    block: list[str] = []
    last = -2
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if token.start[0] != last + 1 and block:
            yield "\n".join(block)
            block = []
        block.append(token.string.lstrip("#").strip())
        last = token.start[0]
    yield "\n".join(block)


def pieces(text: str) -> Iterator[str]:
    """Cut at paragraphs into documents of about PIECE characters; crumbs are dropped."""
    piece = ""
    for paragraph in text.strip().split("\n\n"):
        if piece and len(piece) + len(paragraph) > PIECE:
            yield piece
            piece = ""
        piece = f"{piece}\n\n{paragraph}".strip("\n")
    if len(piece) > 80:
        yield piece


def write_tokenizer(texts: list[str], folder: Path) -> None:
    """Byte-level BPE without a chat template: it is the tokenizer of a base model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Each text once: what the mixture repeats should not buy itself whole-sentence tokens.
    tokenizer.train_from_iterator(sorted(set(texts)), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": SPECIAL[0],
            "pad_token": SPECIAL[0],
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "model_max_length": LLAMA["max_position_embeddings"],
        },
    )


def write_random_model(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA, dtype="bfloat16")
    # fp32 on disk: pre-training starts from here and should not start from rounded numbers.
    LlamaForCausalLM(config).float().save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**saved, "dtype": "bfloat16"})
    write_json(folder / "generation_config.json", {"eos_token_id": 0, "pad_token_id": 0})


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_bf16(source: Path, target: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    weights = {name: value.to(torch.bfloat16) for name, value in load_file(source).items()}
    save_file(weights, target, metadata={"format": "pt"})
    target.chmod(0o644)  # safetensors writes files that only their owner may read


if __name__ == "__main__":
    main()
