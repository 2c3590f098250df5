"""The one door to the data: whose tokenizer it is, what is looked at first, and a mixture row by row."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import settings, small_model, taken, texts, turn, written
from safetensors.numpy import save_file
from small_run import write_tokenizer

from fastsft.config import make_config
from fastsft.data.loader import Layout, stored_steps
from fastsft.errors import UserError
from fastsft.preparation import find_tokenizer, settle_date, show_data, take_in
from fastsft.run import example_order, step_bounds

OTHER = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
OTHER += "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
LAYOUT = Layout(512, 0.0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSFT_CACHE", str(tmp_path / "cache"))


def adapter(folder: Path, template: str | None = None) -> str:
    """An adapter's files, as far as anyone reads them who does not load it."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"base_model.model.x.lora_A.weight": np.zeros((2, 4), np.float32)}
    save_file(tensors, folder / "adapter_model.safetensors")
    if template is not None:
        write_tokenizer(folder, template)
    return str(folder)


# -- tokenizer and template of a continued adapter ----------------------------------------------------


def test_an_adapter_brings_its_tokenizer_and_template(tmp_path: Path) -> None:
    own, none = adapter(tmp_path / "own", OTHER), adapter(tmp_path / "none")
    base = texts(tmp_path)[0]
    assert base.startswith("<|im_start|>user\nhello")
    assert texts(tmp_path, adapter=none)[0] == base
    assert texts(tmp_path, adapter=own)[0].startswith("<|im_start|>user: hello<|im_end|>")
    assert texts(tmp_path, adapter=own, tokenizer=str(tmp_path / "base"))[0] == base
    chosen = texts(tmp_path, adapter=own, chat_template="chatml")[0]
    assert chosen == texts(tmp_path, chat_template="chatml")[0] != texts(tmp_path, adapter=own)[0]


def test_the_report_says_whose_tokenizer_it_is(tmp_path: Path) -> None:
    own, none = adapter(tmp_path / "own", OTHER), adapter(tmp_path / "none")
    for keys, told in (
        ({}, None),
        ({"adapter": none}, None),
        ({"adapter": own}, f"tokenizer: saved with the adapter in {own}"),
        ({"tokenizer": own}, f"tokenizer: {own}"),
    ):
        lines = list(taken(tmp_path, **keys).data.report.lines())
        assert [line for line in lines if line.startswith("tokenizer:")] == [told] * bool(told)


def test_a_tokenizer_that_is_code_runs_only_if_trusted(tmp_path: Path) -> None:
    folder = tmp_path / "own_code"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join("[PAD] [UNK] [CLS] [SEP] [MASK] hello tea".split()))
    auto_map = {"AutoTokenizer": ["own_words.OwnWords", None]}
    values = {"tokenizer_class": "OwnWords", "auto_map": auto_map}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    (folder / "own_words.py").write_text(
        "from transformers import BertTokenizer\nclass OwnWords(BertTokenizer):\n    pass\n"
    )
    given = {"model": str(folder), "data": "x.jsonl"}
    with pytest.raises(UserError, match=r"own_code.* cannot be converted"):
        find_tokenizer(make_config(given), folder)
    tokenizer, _ = find_tokenizer(make_config({**given, "trust_remote_code": True}), folder)
    assert tokenizer.decode(tokenizer.encode("hello tea")) == "hello tea"


# -- what cannot be used is told before the data is read -----------------------------------------------


def test_damaged_weights_are_told_before_the_data_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = small_model(tmp_path / "base") / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    with pytest.raises(UserError, match=r"model\.safetensors should have .* cut short"):
        taken(tmp_path, data="there_is_none.jsonl")
    assert not (tmp_path / "cache").exists()
    weights.unlink()
    show_data(make_config(settings(tmp_path)), examples=1)  # needs no weights
    assert "24 rows in, 24 kept" in capsys.readouterr().out


def test_a_damaged_adapter_is_told_before_the_data_is_read(tmp_path: Path) -> None:
    keys = {"data": "there_is_none.jsonl", "adapter": adapter(tmp_path / "adapter")}
    tensors = tmp_path / "adapter" / "adapter_model.safetensors"
    os.truncate(tensors, tensors.stat().st_size - 1)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors should have .* cut short"):
        taken(tmp_path, **keys)
    tensors.unlink()
    with pytest.raises(UserError, match=r"there is no adapter_model\.safetensors"):
        taken(tmp_path, **keys)
    with pytest.raises(UserError, match=r"there is no adapter_config\.json"):
        taken(tmp_path, **{**keys, "adapter": str(tmp_path / "nowhere")})


# -- a mixture ----------------------------------------------------------------------------------------


def test_each_row_of_a_mixture_comes_as_often_as_its_weight_says(tmp_path: Path) -> None:
    """Counted in the steps themselves, over two epochs: weight 2 is every row twice, 0.5 half of them."""
    chats = [{"messages": [turn("user", f"what {i}"), turn("assistant", "tea")]} for i in range(13)]
    prose = [{"text": f"a line of tea {i}"} for i in range(10)]
    data = [
        {"path": written(tmp_path / "chat.jsonl", *chats), "weight": 2},
        {"path": written(tmp_path / "prose.jsonl", *prose), "weight": 0.5},
    ]
    keys = {"data": data, "epochs": 2, "batch_size": 31}  # 2 · 13 + 0.5 · 10: an epoch is a step
    intake = take_in(settle_date(make_config(settings(tmp_path, **keys))))
    config, prepared = intake.config, intake.data
    order = example_order(config, prepared)
    bounds = step_bounds(config, prepared, order)
    steps = list(stored_steps(prepared.train, order, bounds, LAYOUT))
    assert [step.epoch for step in steps] == [1.0, 2.0]
    halves = []
    for step in steps:
        counts = Counter(step.rows)
        assert all(counts.pop(f"{data[0]['path']}:{n}") == 2 for n in range(1, 14))
        assert set(counts.values()) == {1} and len(counts) == 5
        assert set(counts) <= {f"{data[1]['path']}:{n}" for n in range(1, 11)}
        halves.append(set(counts))
        assert step.trained == sum(len(batch.trained_rows) for batch in step.batches) > 0
    assert halves[0] != halves[1], "the sample is new each epoch"
