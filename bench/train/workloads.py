"""Rows of token ids with the lengths of real data sets, from a seeded generator.

What a trainer makes of a data set depends on its lengths: many short rows reward packing, long ones
reward attention and memory. Three shapes, of log-normal parts whose parameters were set by hand so
that medians and tails come near the data sets they are named after; none of their text is used:

    alpaca     one short question, one answer of a sentence to a page
    sharegpt   a few turns, answers of a page each, cut at 4,096 tokens
    long       documents of thousands of tokens, every token trained, cut at 16,384
    text       chats of documentation sentences (bench.data) for builtin:tiny, which can read

Ids are phrases of eight tokens out of 256, so that there is something to learn: a loss that stays
where it began shows a trainer that does not train.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PHRASES, PHRASE = 256, 8
FIRST_ID = 3  # after the control tokens


@dataclass(frozen=True)
class Workload:
    """Medians and sigmas of log-normal lengths in tokens; `turns` is a mean, geometric.

    batch: examples a step. peer_rows: rows a padded trainer takes at once, about as many tokens as
    16,384 with their padding. longest: where a row is cut.
    """

    prompt: tuple[float, float]
    answer: tuple[float, float]
    turns: float
    longest: int
    batch: int
    peer_rows: int


WORKLOADS = {
    "alpaca": Workload((52, 0.5), (75, 1.0), 1, 1024, 128, 32),
    "sharegpt": Workload((45, 1.2), (230, 0.9), 3.5, 4096, 32, 4),
    "long": Workload((0, 0), (6000, 0.6), 1, 16384, 8, 1),
}
# The same shapes an eighth as long, for a CPU.
TINY = {
    name: Workload(
        (w.prompt[0] / 8, w.prompt[1]),
        (w.answer[0] / 8, w.answer[1]),
        w.turns,
        w.longest // 8,
        8,
        {"alpaca": 8, "sharegpt": 4, "long": 1}[name],
    )
    for name, w in WORKLOADS.items()
}


@dataclass(frozen=True)
class Rows:
    """ids int32[tokens] and trained bool[tokens] of all rows side by side, lengths int64[rows]."""

    ids: np.ndarray
    trained: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        end = int(self.lengths[: row + 1].sum())
        part = slice(end - int(self.lengths[row]), end)
        return self.ids[part], self.trained[part]

    @property
    def targets(self) -> np.ndarray:
        """Tokens of each row that bear loss, int64[rows]: the first has no predecessor."""
        starts = np.cumsum(self.lengths) - self.lengths
        return np.add.reduceat(self.trained.astype(np.int64), starts) - self.trained[starts]

    def save(self, path: Path) -> None:
        np.savez(path, ids=self.ids, trained=self.trained, lengths=self.lengths)

    @classmethod
    def load(cls, path: Path) -> Rows:
        with np.load(path) as found:
            return cls(found["ids"], found["trained"], found["lengths"])

    def shape(self) -> dict[str, float]:
        """What the rows are like, for a row of results."""
        p50, p95 = (float(x) for x in np.quantile(self.lengths, [0.5, 0.95]))
        share = float(self.targets.sum() / self.lengths.sum())
        longest = int(self.lengths.max())
        return {"length_p50": p50, "length_p95": p95, "length_max": longest, "trained_share": share}


def generate(shape: Workload, rows: int, vocabulary: int, seed: int = 0) -> Rows:
    """`rows` rows with ids below `vocabulary`."""
    rng = np.random.default_rng(seed)
    phrases = rng.integers(FIRST_ID, vocabulary, (PHRASES, PHRASE)).astype(np.int32)
    ids, masks = [], []
    for _ in range(rows):
        parts: list[np.ndarray] = []
        for _ in range(int(rng.geometric(1 / shape.turns))):
            for (median, sigma), learned in ((shape.prompt, False), (shape.answer, True)):
                length = int(np.ceil(median * np.exp(sigma * rng.standard_normal())))
                parts.append(np.full(length, learned))
        mask = np.concatenate(parts)[: shape.longest]
        mask[-1] = True  # a row whose answer was cut away would bear no loss
        mask = mask if len(mask) > 1 else np.array([False, True])
        chosen = rng.integers(PHRASES, size=-(-len(mask) // PHRASE))
        ids.append(phrases[chosen].ravel()[: len(mask)])
        masks.append(mask)
    lengths = np.array([len(m) for m in masks], np.int64)
    return Rows(np.concatenate(ids), np.concatenate(masks), lengths)


def documentation(tokenizer: Path, rows: int, longest: int, seed: int = 0) -> Rows:
    """Chats about the standard library's documentation, as a folder's tokenizer.json reads them."""
    from tokenizers import Tokenizer

    from bench.data import chat

    encode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode
    draw, ids, masks = random.Random(seed), [], []
    for _ in range(rows):
        question, answer = (encode(text).ids for text in chat(draw))
        whole = (question + answer)[:longest]
        trained = np.arange(len(whole)) >= min(len(question), len(whole) - 1)
        ids.append(np.array(whole, np.int32))
        masks.append(trained)
    lengths = np.array([len(m) for m in masks], np.int64)
    return Rows(np.concatenate(ids), np.concatenate(masks), lengths)


def vocabulary_of(folder: Path) -> int:
    """Rows of the embedding of the checkpoint in `folder`."""
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])
