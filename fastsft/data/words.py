"""Words that spell a control token stay words.

A person may write <|im_end|> in a message. Before rendering, such words become one private character
each, so that every control token in the rendering is the template's own (one character, so that no
`split` or `trim` of a template can take it apart). Afterwards the words are spelled out again and the
template's tokens wrapped, which is how Tokenizer.guarded tells the two apart.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fastsft.data.spans import Marked
from fastsft.data.tokenizer import Tokenizer

_FIRST = 0x100000  # the stand-in for the first control token
_KEPT = re.compile("[\U00100000-\U0010fffd]")  # ours, and the wrapping and tag characters


class Words:
    """The control tokens of one tokenizer, in the texts of messages and of templates."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer_wrap = tokenizer.wrap
        self._tokens = sorted(filter(None, tokenizer.control), key=len, reverse=True)
        pattern = "|".join(map(re.escape, self._tokens)) or "(?!)"
        self._control = re.compile(pattern)
        self._either = re.compile(f"[{chr(_FIRST)}-{chr(_FIRST + len(self._tokens))}]|{pattern}")

    def hold_control(self, strings: Iterable[str]) -> bool:
        return any(self._control.search(text) for text in strings)

    def stand_in(self, value: Any) -> Any:
        """The same value with a private character for each control token in its strings."""
        if isinstance(value, str):
            return self._control.sub(lambda m: chr(_FIRST + self._tokens.index(m[0])), value)
        if isinstance(value, list):
            return [self.stand_in(one) for one in value]
        if isinstance(value, dict):
            return {self.stand_in(key): self.stand_in(one) for key, one in value.items()}
        return value

    def spell_out(self, marked: Marked) -> Marked:
        """Stand-ins become bare words, the template's control tokens are wrapped; spans follow."""
        parts: list[str] = []
        at, length, before, after = 0, 0, [0], [0]
        for match in self._either.finditer(marked.text):
            stood_in = ord(match[0][0]) - _FIRST
            written = self._tokens[stood_in] if stood_in >= 0 else self._tokenizer_wrap(match[0])
            parts += marked.text[at : match.start()], written
            length += match.start() - at + len(written)
            at = match.end()
            before.append(at)
            after.append(length)
        parts.append(marked.text[at:])

        def moved(place: int) -> int:
            i = bisect.bisect_right(before, place) - 1
            return after[i] + place - before[i]

        spans = [(moved(start), moved(end)) for start, end in marked.spans]
        return Marked("".join(parts), spans, guarded=True)


def strings_in(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from strings_in(one)
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from strings_in(key)
            yield from strings_in(one)


def unfit(strings: Sequence[str]) -> str:
    """A sentence on what no tokenizer can take, or what would be mistaken for ours; else empty."""
    for text in strings:
        if text.isascii():
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"It holds half a character, {text[error.start]!a}, so it is not valid text."
        found = _KEPT.search(text)
        if found:
            return f"It holds {found[0]!a}, a private character that is kept for internal use."
    return ""
