"""A checkpoint's tokenizer, from its files, over the `tokenizers` library: no transformers, no torch.

tokenizer.json says how text becomes ids, tokenizer_config.json names the special tokens,
generation_config.json may list more ids that end an answer, chat_template.jinja (or an entry of
tokenizer_config.json) is the model's own template. A folder with only a slow tokenizer
(SentencePiece, vocab.json) is converted by transformers, imported for that alone.

What the encoder asks of it beyond ids:
- `byte_lengths`: with a byte-level vocabulary every token stands for a fixed number of bytes, so the
  place of a token in its text is a cumulative sum. Elsewhere offsets are fetched from the library.
- `fast`: tiktoken in place of `tokenizers` where the ids are the same (see fast_bpe.py).
- `guarded`: a twin whose control tokens are spelled differently (wrapped in two private characters),
  so that a text can hold the template's control tokens and the same strings as a person's words.

It pickles as the file's path plus the small tables; the library's object is rebuilt only when asked.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from fastsft.data.fast_bpe import FastBpe, build_fast_bpe
from fastsft.errors import UserError
from fastsft.model.files import read_json

if TYPE_CHECKING:
    from fastsft.data.templates import Template

_WRAP = ("\U0010fff0", "\U0010fff1")  # around control tokens in texts for `guarded`
_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_SLOW = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of the byte-level vocabulary: printable bytes as themselves, others from 256."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


class Tokenizer:
    """Text to ids and back. Built by `load`; see the module's docstring for what it carries.

    bos_id, eos_id, pad_id: int | None. stop_ids: ids that end an answer (EOS and the generation
    config's; a template adds its own, see Template.stop_ids). special_tokens: name -> text, as
    templates see them. control: text -> id of tokens marked special. adds_bos, adds_eos: whether
    the tokenizer itself puts them around plain text. vocab_size: one more than the highest id.
    """

    def __init__(self, folder: Path, source: Path | str, config: dict[str, Any]) -> None:
        """source: tokenizer.json as a path, or its text where the folder has none."""
        self.folder = folder
        self._source = source
        self.special_tokens = {name: text for name in _NAMED if (text := _text(config.get(name)))}
        self.chat_template = _own_template(folder, config)
        self.new_ids: tuple[int, ...] = ()  # control tokens the model has never seen
        self.fast: FastBpe | None = None
        self.fast_reason: str | None = None  # why not `fast`; None while nobody has asked
        self._read_vocabulary()
        named = self.special_tokens.get
        self.bos_id, self.eos_id, self.pad_id = (
            self.id_of(named(name, "")) for name in ("bos_token", "eos_token", "pad_token")
        )
        ends = _read_optional(folder / "generation_config.json").get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        self.stop_ids = tuple(dict.fromkeys(i for i in (self.eos_id, *ends) if i is not None))
        plain = self.backend.encode("a", add_special_tokens=False).ids
        whole = self.backend.encode("a", add_special_tokens=True).ids
        self.adds_bos = whole != plain and whole[0] == self.bos_id
        self.adds_eos = whole != plain and whole[-1] == self.eos_id

    @classmethod
    def load(cls, folder: Path, *, trust_remote_code: bool = False) -> Tokenizer:
        """Raises UserError for a folder without a tokenizer, or with one that cannot be read.

        trust_remote_code: whether the folder's own Python code may run, where that is what reads it.
        """
        folder = Path(folder)
        config = _read_optional(folder / "special_tokens_map.json")
        config |= _read_optional(folder / "tokenizer_config.json")
        if (folder / "tokenizer.json").is_file():
            return cls(folder, folder / "tokenizer.json", config)
        if not holds_tokenizer(folder):
            raise UserError(
                f"no tokenizer in {folder}: expected tokenizer.json (or one of {', '.join(_SLOW)}). "
                "Give a folder or hub id that has one with tokenizer="
            )
        text, named = _convert(folder, trust_remote_code)
        return cls(folder, text, named | config)

    def _read_vocabulary(self) -> None:
        self._vocab = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values()) + 1
        added: dict[int, AddedToken] = self.backend.get_added_tokens_decoder()
        named = set(self.special_tokens.values())
        self.added_tokens = {token.content: i for i, token in added.items()}
        self.control = {t.content: i for i, t in added.items() if t.special or t.content in named}
        self.special_ids = frozenset(self.control.values())
        self.normalizes = self._spec["normalizer"] is not None
        self.byte_lengths = self._byte_lengths(added)

    def _byte_lengths(self, added: dict[int, AddedToken]) -> np.ndarray | None:
        """int32[vocab_size]; None where tokens do not stand for fixed bytes of the text."""
        pre = self._spec["pre_tokenizer"] or {}
        last = (pre.get("pretokenizers") or [pre])[-1]
        steps = pre.get("pretokenizers") or [pre]
        if last.get("type") != "ByteLevel" or any(s.get("add_prefix_space") for s in steps):
            return None
        if any(step.get("behavior") == "Removed" and not step.get("invert") for step in steps):
            return None
        if any(t.lstrip or t.rstrip or t.single_word for t in added.values()):
            return None
        if (self._spec["normalizer"] or {}).get("type", "NFC") != "NFC":
            return None
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, i in self._vocab.items():
            lengths[i] = len(token)  # a character of the byte-level alphabet is a byte
        for i, one in added.items():
            lengths[i] = len(one.content.encode())
        return lengths

    @cached_property
    def _json(self) -> str:
        return self._source if isinstance(self._source, str) else self._source.read_text("utf-8")

    @cached_property
    def _spec(self) -> dict[str, Any]:
        path = self.folder / "tokenizer.json"
        spec = json.loads(self._json) if isinstance(self._source, str) else read_json(path)
        if "model" not in spec:
            raise UserError(f"{path} holds no tokenizer: it has no 'model'. Fetch the file again")
        return spec

    @cached_property
    def backend(self) -> Backend:
        """The library's tokenizer, without truncation or padding."""
        assert self._spec  # a damaged file has its clear error there
        backend = Backend.from_str(self._json)
        backend.no_truncation()
        backend.no_padding()
        return backend

    def __getstate__(self) -> dict[str, Any]:
        rebuilt = ("_json", "_spec", "backend", "guarded")
        return {name: value for name, value in vars(self).items() if name not in rebuilt}

    # -- ids ----------------------------------------------------------------------------------

    def id_of(self, token: str) -> int | None:
        """The id of a token by its exact text; None where it is not one token."""
        return self._vocab.get(token)

    def encode(self, text: str) -> list[int]:
        """Ids of rendered text: control tokens in it are recognised, none are added around it."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def choose_fast(self, texts: Iterable[str]) -> None:
        """Decide, once, whether tiktoken may stand in: proof over the vocabulary, check on `texts`."""
        if self.fast is not None or self.fast_reason is not None:
            return
        if self.byte_lengths is None or self._spec["model"]["type"] != "BPE":
            self.fast_reason = "it is not a byte-level BPE"
            return
        built = build_fast_bpe(self._spec, self.backend, byte_alphabet())
        if isinstance(built, str):
            self.fast_reason = built
        elif not built.agrees(self.backend, texts):
            self.fast_reason = "its ids differ on some text"
        else:
            self.fast = built

    def add_control_tokens(self, tokens: Sequence[str]) -> list[int]:
        """Append special tokens to the vocabulary (the model needs rows for them); their ids."""
        self.backend.add_special_tokens(
            [AddedToken(t, special=True, normalized=False) for t in tokens]
        )
        self._source = self.backend.to_str()
        for name in ("_json", "_spec", "guarded"):
            vars(self).pop(name, None)
        self.fast = self.fast_reason = None
        self._read_vocabulary()
        added = [self._vocab[token] for token in tokens]
        self.new_ids += tuple(added)
        return added

    # -- the same strings as words and as control tokens --------------------------------------

    @staticmethod
    def wrap(token: str) -> str:
        """How `guarded` spells a control token."""
        return _WRAP[0] + token + _WRAP[1]

    @cached_property
    def guarded(self) -> Backend:
        """The twin that takes control tokens only when wrapped, and their bare text as text."""
        spec = json.loads(self._json)
        for token in spec["added_tokens"]:
            if token["content"] in self.control:
                token["content"] = self.wrap(token["content"])
        model = spec["model"]
        if isinstance(model["vocab"], dict):
            vocab = model["vocab"].items()
            model["vocab"] = {self.wrap(t) if t in self.control else t: i for t, i in vocab}
        else:
            model["vocab"] = [
                [self.wrap(t) if t in self.control else t, s] for t, s in model["vocab"]
            ]
        if model.get("unk_token") in self.control:
            model["unk_token"] = self.wrap(model["unk_token"])
        spec["post_processor"] = None
        guarded = Backend.from_str(json.dumps(spec))
        guarded.no_truncation()
        guarded.no_padding()
        for token, i in self.control.items():
            assert guarded.token_to_id(self.wrap(token)) == i, token
        return guarded

    # -- files --------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Changes whenever the ids of some text may change."""
        facts = [self.special_tokens, self.stop_ids, self.adds_bos, self.adds_eos]
        return hashlib.sha256((self._json + json.dumps(facts)).encode()).hexdigest()

    def save(
        self, folder: Path, template: Template | None = None, *, generation: bool = True
    ) -> None:
        """Write the tokenizer's files, the template, and a generation config that names every stop.

        generation: False beside a model, which has a generation config of its own.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            if (self.folder / name).is_file() and self.folder.resolve() != folder.resolve():
                shutil.copyfile(self.folder / name, folder / name)
        (folder / "tokenizer.json").write_text(self._json, encoding="utf-8")
        config = _read_optional(folder / "tokenizer_config.json")
        config.pop("chat_template", None)
        if not isinstance(self._source, Path):  # converted, or with new tokens
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            config.pop("added_tokens_decoder", None)
        _write_json(folder / "tokenizer_config.json", config | self.special_tokens)
        source = template.source if template else self.chat_template
        if source is not None:
            (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
        if not generation:
            return
        stops = list(template.stop_ids if template else self.stop_ids)
        values = _read_optional(self.folder / "generation_config.json")
        if stops:
            values["eos_token_id"] = stops if len(stops) > 1 else stops[0]
        _write_json(folder / "generation_config.json", values)


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer of its own: an adapter's may, or may use its base's."""
    return any((folder / name).is_file() for name in ("tokenizer.json", *_SLOW))


def _text(token: Any) -> str:
    """A token of tokenizer_config.json: text, or an object with its text as `content`."""
    return token.get("content", "") if isinstance(token, dict) else token or ""


def _own_template(folder: Path, config: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name; `default` is the one without a special use
        template = {one["name"]: one["template"] for one in template}.get("default")
    return template


def _read_optional(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no file."""
    return read_json(path) if path.is_file() else {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _convert(folder: Path, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """tokenizer.json and named tokens of a folder that has only a slow tokenizer."""
    from transformers import AutoTokenizer

    try:
        slow = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the tokenizer in {folder} has no tokenizer.json and cannot be converted: {reason}"
        ) from None
    backend = getattr(slow, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"the tokenizer in {folder} ({type(slow).__name__}) has no form the `tokenizers` library "
            "knows; convert it to a tokenizer.json first"
        )
    named = {name: str(token) for name, token in slow.special_tokens_map.items() if name in _NAMED}
    return backend.to_str(), named | {"chat_template": slow.chat_template}
