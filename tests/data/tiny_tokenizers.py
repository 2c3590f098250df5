"""Small tokenizers built in a test: byte-level BPE of the GPT-2, Llama 3 and digit kinds, and one like
Llama 2's (Metaspace, byte fallback). Trained on a few lines, the same on every machine."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

LINES = [
    "What is the capital of France? The capital of France is Paris.",
    "Below is an instruction that describes a task. Write a response that completes the request.",
    "A chat between a curious user and an assistant. The assistant gives helpful answers.",
    "user assistant system tool function name arguments parameters description weather city",
    "Is it sunny in Oslo? It is raining, 12 degrees and a 40% chance of snow.\n\nHello there!  two blanks",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 23))\n",
] * 4
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PLAIN_ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # added, not special


def pre_tokenizer(kind: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "llama3")
    if kind == "llama3":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), byte_level]
        )
    if kind == "digits":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return byte_level


def byte_level(kind: str = "gpt2", vocab_size: int = 420) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(kind)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def metaspace(vocab_size: int = 520) -> Tokenizer:
    """Llama 2's kind: blanks as ▁, one in front of the text, unknown characters as bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = Tokenizer(models.BPE())  # merges that, like Llama's, stop at a blank
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(head), show_progress=False)
    words.train_from_iterator([line.replace("\n", " ") for line in LINES], trainer)
    spec = json.loads(words.to_str())["model"]
    learned = sorted(spec["vocab"], key=spec["vocab"].__getitem__)
    vocab = {token: i for i, token in enumerate([*head, *learned])}
    tokenizer.model = models.BPE(
        vocab=vocab,
        merges=[tuple(merge) for merge in spec["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    return tokenizer


def folder(
    path: Path,
    backend: Tokenizer,
    *,
    control: tuple[str, ...] = (),
    added: tuple[str, ...] = PLAIN_ADDED,
    adds_bos: bool = False,
    template: str | None = None,
    generation: dict | None = None,
    **named: str,
) -> Path:
    """Write a tokenizer folder. named: bos_token, eos_token, ... (made control tokens)."""
    path.mkdir(parents=True, exist_ok=True)
    special = dict.fromkeys([*named.values(), *control])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in added])
    if adds_bos:
        bos = named["bos_token"]
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    backend.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **named,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path
