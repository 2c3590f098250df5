"""From a config to stores with the real sources, tokenizer, template and encoder, and in real processes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fastsft.builtin import model_path
from fastsft.config import Config, make_config
from fastsft.data.encode import Encoded, Encoder
from fastsft.data.prepare import Prepared, prepare, prepare_stream
from fastsft.data.sources import open_source
from fastsft.data.templates import resolve_template
from fastsft.data.tokenizer import Tokenizer
from fastsft.errors import UserError

WORDS = "the of a module returns value string list path file open close read écrit 漢字 🙂".split()


def chat_rows(count: int, seed: int = 0) -> list[dict]:
    draw = np.random.default_rng(seed)

    def words(most: int) -> str:
        return " ".join(draw.choice(WORDS, draw.integers(1, most)).tolist())

    rows = []
    for n in range(count):
        turns = [(f"{n} {words(8)}?", words(20)) for _ in range(1 + n % 3)]
        messages = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        rows.append({"messages": messages})
    return rows


def write(path: Path, rows: list) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def encoder(config: Config) -> Encoder:
    tokenizer = Tokenizer.load(model_path())
    template = resolve_template("alpaca", tokenizer, kwargs={}, date="2026-01-01")
    return Encoder(
        tokenizer,
        template,
        train_on=config.train_on,
        multi_turn=config.multi_turn,
        max_length=config.max_length,
        overlong=config.overlong,
    )


def config_of(**values: object) -> Config:
    return make_config({"model": "builtin:tiny", "max_length": 256, **values})


def run(config: Config, cache: Path, processes: int = 1, **options: object) -> Prepared:
    made = encoder(config)
    return prepare(config, made.tokenizer, made, cache_dir=cache, processes=processes, **options)


def direct(config: Config) -> list[Encoded]:
    """The same examples without chunks, processes, files or cache."""
    rows = []
    for spec in config.data:
        source = open_source(spec, system=config.system)
        for chunk in source.chunks():
            rows += source.parse(chunk)
    return [item for item in encoder(config).encode(rows) if isinstance(item, Encoded)]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_store_holds_what_the_encoder_says(tmp_path: Path, processes: int) -> None:
    chats = write(tmp_path / "chats.jsonl", chat_rows(2100))
    texts = write(
        tmp_path / "texts.jsonl", [{"text": "the value of a path " * n} for n in range(1, 150)]
    )
    config = config_of(data=[{"path": chats, "weight": 2.0}, texts])
    prepared = run(config, tmp_path / "cache", processes)
    store, expected = prepared.train, direct(config)
    assert len(store) == len(expected) and prepared.sizes[0] == 2100
    assert prepared.sizes[1] > 149, "no text was split, so the test does not test that"
    for number, example in enumerate(expected):
        sequences = store.sequences(number)
        assert store.where(number) == example.where and len(sequences) == len(example.sequences)
        for (ids, trained), (ids_, trained_) in zip(sequences, example.sequences, strict=True):
            assert np.array_equal(ids, ids_) and np.array_equal(trained, trained_)
    report = prepared.report
    split_rows = {example.where for example in expected if example.notes}
    assert report.sources[1].notes == {"split": len(split_rows)} and split_rows
    assert report.train.trained_tokens == sum(t.sum() for e in expected for _, t in e.sequences)
    assert store.lengths.max() <= 256 and report.train.length_max == store.lengths.max()


def test_bad_rows_by_policy(tmp_path: Path) -> None:
    rows: list = chat_rows(60)
    rows[36] = '{"messages": ['
    rows[40] = {
        "messages": [{"role": "wizard", "content": "x"}, {"role": "assistant", "content": "y"}]
    }
    rows[41] = {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]
    }
    rows[42] = {"messages": [{"role": "user", "content": "x"}]}
    rows[50]["messages"][-1]["content"] = "file " * 400
    data = write(tmp_path / "train.jsonl", rows)
    with pytest.raises(UserError, match=r"train\.jsonl:37: malformed JSON: .*on_bad_row: drop"):
        run(config_of(data=data), tmp_path / "cache")
    source = run(config_of(data=data, on_bad_row="drop"), tmp_path / "cache").report.sources[0]
    assert (source.rows, source.kept, source.examples) == (60, 55, 55)
    assert source.dropped == {
        "malformed JSON": 1,
        "unknown role": 1,
        "empty answer": 1,
        "nothing to train": 1,
        "too long": 1,
    }
    with pytest.raises(
        UserError, match=r"train\.jsonl:51: too long: It has .* tokens, over max_length 256"
    ):
        run(config_of(data=data, on_bad_row="drop", overlong="error"), tmp_path / "cache")
    with pytest.raises(UserError, match=r"nothing left to train on: of 60 rows(.|\n)*too long 5"):
        run(config_of(data=data, on_bad_row="drop", max_length=4), tmp_path / "cache")
    unanswered = write(tmp_path / "eval.jsonl", [rows[42]])
    config = config_of(data=data, eval_data=unanswered, on_bad_row="drop")
    with pytest.raises(
        UserError, match=r"nothing left to evaluate on: of 1 rows(.|\n)*eval\.jsonl"
    ):
        run(config, tmp_path / "cache")


def test_cache_follows_data_options_and_tokenizer(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    write(data, chat_rows(30))
    cache = tmp_path / "cache"
    base = {"data": str(data)}

    def made(**values: object) -> bool:
        said = run(config_of(**{**base, **values}), cache).report.cache
        assert str(cache) in said and ("prepared in" in said) != (
            "prepared by an earlier run" in said
        )
        return "prepared in" in said

    assert made() and not made()
    assert not made(seed=3) and not made(val_size=5) and not made(batch_size=2)
    assert made(train_on="last") and made(max_length=100) and made(system="Be brief.")
    assert made(data=[{"path": str(data), "max_rows": 7}])
    rows = chat_rows(30)
    rows[29]["messages"][-1]["content"] += "!"
    write(data, rows)
    assert made() and not made()


def test_val_size_and_eval_data(tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", chat_rows(100))
    held = write(tmp_path / "eval.jsonl", chat_rows(20, seed=1))
    whole = run(config_of(data=data), tmp_path / "cache")
    assert whole.eval is None and whole.report.eval is None
    drawn = run(config_of(data=data, val_size=0.2), tmp_path / "cache")
    assert drawn.eval is not None and len(drawn.train) == 80 and len(drawn.eval) == 20
    rows = sorted([*drawn.train.row.tolist(), *drawn.eval.row.tolist()])
    assert rows == list(range(1, 101)) and drawn.sizes == (80,)
    assert drawn.report.eval is not None and drawn.report.eval.examples == 20
    given = run(config_of(data=data, eval_data=held), tmp_path / "cache")
    assert given.eval is not None and len(given.train) == 100 and len(given.eval) == 20
    assert given.eval.where(3) == f"{held}:4" and given.report.eval_sources[0].rows == 20


def test_streaming_gives_the_same_examples(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [*chat_rows(40), "", "", *chat_rows(30, seed=2)])
    second = write(tmp_path / "b.jsonl", chat_rows(50, seed=3))
    values: dict = {"data": [{"path": first, "weight": 2.0}, {"path": second, "weight": 0.5}]}
    stored = run(config_of(**values), tmp_path / "cache").train
    config = config_of(**values, streaming=True, max_steps=3, eval_data=second)
    made = encoder(config)
    streamed = prepare_stream(
        config, made.tokenizer, made, cache_dir=tmp_path / "cache", processes=1
    )
    assert streamed.eval is not None and len(streamed.eval) == 50
    assert "first 1,024 examples" in streamed.report.partial and streamed.report.previews
    start = streamed.stream.state()
    examples = list(islice(streamed.stream, 350))
    seen = Counter(example.where for example in examples)
    assert Counter(where.rpartition(":")[0] for where in seen.elements()) == {
        first: 280,
        second: 70,
    }
    by_where = {stored.where(i): stored.sequences(i) for i in range(len(stored))}
    assert {where: n for where, n in seen.items() if where.startswith(first)} == {
        where: 4 for where in by_where if where.startswith(first)
    }
    for example in examples:
        for (ids, trained), (ids_, trained_) in zip(
            example.sequences, by_where[example.where], strict=True
        ):
            assert np.array_equal(ids, ids_) and np.array_equal(trained, trained_)
    streamed.stream.restore(json.loads(json.dumps(start)))
    assert [e.where for e in islice(streamed.stream, 350)] == [e.where for e in examples]


def test_previews_spread_over_the_data_and_show_the_mask(tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", chat_rows(50))
    report = run(config_of(data=data), tmp_path / "cache", examples=3).report
    assert [p.where.rpartition(":")[2] for p in report.previews] == ["1", "25", "50"]
    row = chat_rows(50)[24]["messages"]
    answers = [message["content"] for message in row[1::2]]
    trained = [text for text, learned in report.previews[1].pieces if learned]
    assert len(trained) == len(answers) == 1 + 24 % 3
    assert all(answer in text for answer, text in zip(answers, trained, strict=True))


def test_more_previews_than_rows(tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", chat_rows(2))
    assert len(run(config_of(data=data), tmp_path / "cache", examples=9).report.previews) == 2


def test_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsft.data.cache.TELL_SECONDS", 0.0)
    data = write(tmp_path / "train.jsonl", chat_rows(30))
    config, out = config_of(data=data), io.StringIO()
    made = encoder(config)
    prepare(
        config, made.tokenizer, made, Console(file=out), cache_dir=tmp_path / "cache", processes=1
    )
    assert "preparing data: 30 rows" in out.getvalue()


def test_fastsft_data_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", chat_rows(30))
    script = (
        "import sys\n"
        "from fastsft.cli import main\n"
        f"code = main(['data', 'model=builtin:tiny', 'data={data}', 'chat_template=alpaca'])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "FASTSFT_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "30 rows in, 30 kept" in done.stdout and "⟦" in done.stdout
