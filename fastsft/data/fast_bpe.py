"""Byte-level BPE through tiktoken, where that gives the very ids of the `tokenizers` library.

tiktoken merges the adjacent pair whose *concatenation* has the lowest rank; `tokenizers` merges the
lowest-ranked pair *of the merge list*. They differ only if two adjacent tokens (l, r) can arise whose
concatenation t is a token although (l, r) is not a listed merge. A pair that arises inside a text also
arises when its bytes are encoded alone (no merge has crossed their ends, else l and r would not be
whole), and alone it would stay [l, r]. So where every token encodes alone to itself, the two agree.
This is checked once for the whole vocabulary, in a batch. Tokens that do not encode to themselves are
never produced by `tokenizers`, so they are left out of the ranks, which also settles tiktoken's
shortcut for a whole word that is a token; with `ignore_merges` (Llama 3), where `tokenizers` has the
same shortcut, such a token is allowed only if all its splits are listed merges.

What a proof cannot cover, two regex engines over the same pattern, is checked on strings chosen to be
odd and on rows of the data. Ranks are positions in merge order; a table maps them to the model's ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import tiktoken
from tokenizers import Tokenizer as Backend

# The published patterns, with possessive quantifiers where no shorter match could succeed: the same
# pieces with less to backtrack over.
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+"
# `Digits` before `ByteLevel` cuts the text first, so blanks before a digit end their piece.
_DIGITS = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?[^\s\p{L}\p{N}]++|\s+(?![^\s\p{N}])|\s+)"
# Digits of Unicode 17, which the two libraries' tables do not agree on.
_NEW_DIGITS = re.compile("[\U00011de0-\U00011de9\U00016ff4-\U00016ff6]")
LONG = 100_000  # characters; beyond, a regex engine may run out of its backtracking allowance

ODD_STRINGS = (
    "",
    " ",
    "  ",
    "\n",
    "\n\n",
    " \n \n",
    "\t\tx",
    "a  b   c    d",
    "x \n\n  y\r\n\r\nz",
    "trailing  ",
    "don't DON'T we'll I'VE it's'S 'tis ''re",
    "1 12 123 1234 12345 3.14 ١٢٣ ½ Ⅷ",
    "foo_bar::baz->qux()",
    "naïve café cafe\u0301 \u212bngstr\u00f6m",
    "漢字かな交じり文 한국어 ไทย हिन्दी العربية עברית",
    "🙂👩‍👩‍👧‍👦🇪🇺 \ufe0f\u200d",
    "\u00a0\u2003\u3000x\u200b\u2028y\u0085z\ufeff",
    "\x00\x01\x1f\x7f\ue000\ufffd",
    "ſ's 'ſ İ ı ß ẞ",
    "https://a.b/c?d=e&f=%20#g",
    '{"k": [1, 2.5e-3, null]}\n',
    "    if x:\n\t\treturn -1  # no",
    "a" * 300,
    " " * 300 + "b",
    "ab" * 200,
    "." * 200,
    "\n" * 100,
    "=" * 80 + "\n",
    "$$x^2_{ij}$$ \\frac{a}{b}",
    "<|im_start|> </s> [INST] <think> </tool_call>",
    "A.\n\n1) b\n2) c ...\n\n\n- d",
    "I’m “quoted” — yes…",
)


class FastBpe:
    """Text to ids of a byte-level BPE. Pickles to its tables; a worker rebuilds in ~0.1 s."""

    def __init__(
        self, pattern: str, pieces: list[bytes], specials: list[str], ids: np.ndarray
    ) -> None:
        """pieces in merge order, then specials; ids int32[pieces + specials], the model's."""
        self._state = (pattern, pieces, specials, ids)
        self._ids = ids
        self._guard = _NEW_DIGITS if pattern.endswith(_DIGITS) else None
        self._encoding = tiktoken.Encoding(
            "fastsft",
            pat_str=pattern,
            mergeable_ranks={piece: rank for rank, piece in enumerate(pieces)},
            special_tokens={text: len(pieces) + i for i, text in enumerate(specials)},
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return FastBpe, self._state

    def takes(self, text: str) -> bool:
        """Whether this text is among those the check vouches for."""
        if len(text) > LONG:
            return False
        return self._guard is None or text.isascii() or not self._guard.search(text)

    def encode(self, text: str) -> np.ndarray:
        """int32[n]; added tokens in the text are recognised."""
        ranks = self._encoding.encode_to_numpy(text, allowed_special="all", disallowed_special=())
        return self._ids[ranks]

    def agrees(self, backend: Backend, texts: Iterable[str]) -> bool:
        """Whether `tokenizers` gives the same ids for these texts and for the odd ones."""
        asked = [text for text in (*ODD_STRINGS, *texts) if self.takes(text)]
        theirs = backend.encode_batch_fast(asked, add_special_tokens=False)
        return all(
            np.array_equal(self.encode(a), b.ids) for a, b in zip(asked, theirs, strict=True)
        )


def build_fast_bpe(
    spec: dict[str, Any], backend: Backend, alphabet: dict[str, int]
) -> FastBpe | str:
    """From a parsed tokenizer.json; a sentence with the reason where tiktoken cannot stand in.

    alphabet: character of the byte-level alphabet -> byte.
    """
    pattern = _pattern(spec["pre_tokenizer"])
    reason = _unfit(spec, pattern)
    if reason:
        return reason
    assert pattern is not None
    model = spec["model"]
    vocab: dict[str, int] = model["vocab"]
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    single = [char for char in alphabet if char in vocab]
    if len(single) != 256:
        return "its vocabulary lacks some bytes"
    made: dict[str, int] = {}
    for at, (left, right) in enumerate(merges):
        token = left + right
        if token in made and merges[at - 1][0] + merges[at - 1][1] != token:
            return f"it makes {token!r} by merges of different priority"
        made[token] = at
    unreachable = _unreachable(list(made), vocab, backend)
    added = {token["content"] for token in spec["added_tokens"]}
    if model.get("ignore_merges"):
        loose = vocab.keys() - made.keys() - set(single) - added
        listed = {(left, right) for left, right in merges}
        loose |= {t for t in unreachable if not _all_splits(t, vocab, listed)}
        if loose:
            return f"it finds {min(loose)!r} as a whole word only"
    else:
        for token in unreachable:
            del made[token]
    pieces = [bytes([alphabet[char]]) for char in single]
    pieces += [bytes(alphabet[char] for char in token) for token in made]
    specials = [token["content"] for token in spec["added_tokens"]]
    ids = [vocab[token] for token in (*single, *made)] + [backend.token_to_id(t) for t in specials]
    return FastBpe(pattern, pieces, specials, np.array(ids, np.int32))


def _unfit(spec: dict[str, Any], pattern: str | None) -> str:
    """Why a byte-level BPE is outside what tiktoken does; empty if it is inside."""
    model, added = spec["model"], spec["added_tokens"]
    if pattern is None:
        return "its way of cutting words is not one pattern"
    if (spec.get("normalizer") or {}).get("type", "NFC") != "NFC":
        return "it rewrites the text"
    if model.get("dropout") or model.get("byte_fallback") or model.get("unk_token"):
        return "its merges are not plain"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its merges are not plain"
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added):
        return "an added token takes the blanks around it"
    contents = sorted(token["content"] for token in added)
    if any(b.startswith(a) for a, b in zip(contents, contents[1:], strict=False)):
        return "an added token begins another"
    return ""


def _pattern(pre: dict[str, Any] | None) -> str | None:
    """The one regex a pre-tokenizer cuts by; None where there is no such regex."""
    steps = (pre or {}).get("pretokenizers") or [pre or {}]
    if steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    own_regex = steps[-1].get("use_regex", True)
    if len(steps) == 1:
        return _GPT2 if own_regex else None
    if len(steps) > 2:
        return None
    first = steps[0]
    if first["type"] == "Digits" and own_regex:
        return (r"\p{N}|" if first["individual_digits"] else r"\p{N}++|") + _DIGITS
    if first["type"] != "Split" or own_regex or "Regex" not in first["pattern"]:
        return None
    kept = (first["behavior"], first["invert"]) in (("Isolated", False), ("Removed", True))
    return first["pattern"]["Regex"] if kept else None


def _unreachable(tokens: list[str], vocab: dict[str, int], backend: Backend) -> set[str]:
    """Tokens whose own characters the merges do not put together again."""
    model = backend.model
    alone = Backend(model)  # no cutting, no added tokens; shares the model's tables
    shortcut = model.ignore_merges
    model.ignore_merges = False
    encoded = alone.encode_batch_fast(tokens, add_special_tokens=False)
    model.ignore_merges = shortcut
    return {t for t, e in zip(tokens, encoded, strict=True) if e.ids != [vocab[t]]}


def _all_splits(token: str, vocab: dict[str, int], listed: set[tuple[str, str]]) -> bool:
    cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
    return all((a, b) in listed for a, b in cuts if a in vocab and b in vocab)
