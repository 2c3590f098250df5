"""Every key changes what it says, or is refused with the reason. A key without a case here fails.

Most keys are looked at where they act (the prepared data, the built model, the plan of steps), and only
those about the course of a run take a run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import (
    built,
    lines,
    product,
    run,
    same,
    series,
    settings,
    small_model,
    taken,
    texts,
    turn,
    write_rows,
    written,
)
from small_run import write_tokenizer
from torch import nn

from fastsft.config import Config, DataSource, LoraConfig, make_config
from fastsft.data.batches import micro_batches
from fastsft.data.loader import documents_of
from fastsft.errors import UserError
from fastsft.optim import apply_update, build_optimizer, learning_rate, warmup_steps
from fastsft.run import example_order, step_bounds

CASES: dict[str, list[str]] = {}


def about(*keys: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Marks a test as the one that shows what these keys do."""

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        for key in keys:
            CASES.setdefault(key, []).append(test.__name__)
        return test

    return mark


def test_every_key_has_a_case():
    keys = set(Config.model_fields) - {"lora"}
    keys |= {f"lora.{key}" for key in LoraConfig.model_fields}
    keys |= {f"data.{key}" for key in DataSource.model_fields}
    assert keys - set(CASES) == set(), "keys without a test of what they change"
    assert set(CASES) - keys == set(), "tests of keys that are gone"


# --- looking at a config from outside ---------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(autouse=True)
def cache(place, monkeypatch):
    monkeypatch.setenv("FASTSFT_CACHE", str(place / "cache"))


def plan(place: Path, **keys: Any) -> list[int]:
    """Examples of each step."""
    intake = taken(place, **keys)
    return [
        int(n)
        for n in torch.tensor(
            step_bounds(intake.config, intake.data, example_order(intake.config, intake.data))
        ).diff()
    ]


def rates(count: int = 20, **keys: Any) -> list[float]:
    config = make_config({"model": "m", "data": "d", "learning_rate": 1.0, **keys})
    warmup = warmup_steps(config, count)
    return [learning_rate(step, count, warmup, config) for step in range(count)]


# --- the model --------------------------------------------------------------------------------------


@about("model")
def test_model(place):
    small_model(place / "other", num_hidden_layers=1)
    assert built(place).model.config.num_hidden_layers == 2
    assert built(place, model=str(place / "other")).model.config.num_hidden_layers == 1


@about("revision")
def test_revision(place, monkeypatch):
    asked = []

    def download(name: str, revision: str | None, **_: Any) -> str:
        asked.append((name, revision))
        return settings(place)["model"]

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    adapter = built(place, model="team/base", revision="v9")
    assert set(asked) == {("team/base", "v9")}
    adapter.write(place / "revised", masters=False)
    assert (
        json.loads((place / "revised/adapter/adapter_config.json").read_text())["revision"] == "v9"
    )


@about("tokenizer")
def test_tokenizer(place):
    write_tokenizer(
        place / "words", template="{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    assert texts(place)[0].startswith(
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n⟦hello 0"
    )
    assert texts(place, tokenizer=str(place / "words"))[0] == "hello<|im_end|>⟦hello 0<|im_end|>⟧"


@about("trust_remote_code")
def test_trust_remote_code(place):
    folder = place / "own_code"
    shutil.copytree(settings(place)["model"], folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "own_llama", "architectures": ["OwnModel"]}
    values["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(UserError, match="trust_remote_code"):
        built(place, model=str(folder))
    model = built(place, model=str(folder), trust_remote_code=True).model
    assert type(model).__name__ == "OwnModel"


@about("method")
def test_method(place):
    kinds = {method: built(place, method=method) for method in ("lora", "qlora", "full")}
    assert [k.product for k in kinds.values()] == ["adapter", "adapter", "model"]
    trained = {method: k.counts()[0] for method, k in kinds.items()}
    assert trained["lora"] == trained["qlora"] < trained["full"] == kinds["full"].counts()[1]
    bases = {m: type(k.model.model.layers[0].mlp.up_proj) for m, k in kinds.items()}
    assert bases["full"] is nn.Linear
    assert type(kinds["qlora"].model.model.layers[0].mlp.up_proj.base).__name__ == "NF4Linear"
    assert type(kinds["lora"].model.model.layers[0].mlp.up_proj.base) is nn.Linear


@about("adapter")
def test_adapter(place):
    first = run(place, lora={"r": 3}, max_steps=2).output_dir
    started = built(place, adapter=str(first / "adapter"))
    assert same(
        {n: p.detach() for n, p in started.named_parameters()},
        {
            n.removeprefix("base_model.model.").removesuffix(".weight"): t
            for n, t in product(first).items()
        },
    )
    assert started.config.lora.r == 3


@about("engine")
def test_engine(place):
    names = {
        choice: built(place, engine=choice).engine.name for choice in ("fast", "compat", "auto")
    }
    assert names == {"fast": "fast", "compat": "compat", "auto": "fast"}
    assert built(place, method="full").engine.name == "fast"


@about("lora.r", "lora.alpha", "lora.use_rslora", "lora.dropout")
def test_lora_shape(place):
    def first(**lora: Any) -> Any:
        adapters = built(place, lora=lora).adapters
        assert adapters is not None
        return next(iter(adapters.layers.values()))

    assert first(r=3).lora_A.shape[0] == 3 and first().lora_A.shape[0] == 16
    assert first(r=4, alpha=2).scaling == 0.5
    assert first(r=4, alpha=2, use_rslora=True).scaling == 1.0
    assert first(dropout=0.5).dropout == 0.5
    still = {"max_steps": 2, "learning_rate": 0.1}
    plain = series(run(place, **still).output_dir)
    dropped = series(run(place, **still, lora={"dropout": 0.5}).output_dir)
    assert plain[0] == dropped[0] and plain[1] != dropped[1]  # B starts at zero


@about("lora.target_modules", "lora.modules_to_save")
def test_what_trains(place):
    def names(**lora: Any) -> set[str]:
        return {name for name, _ in built(place, lora=lora).named_parameters()}

    assert len(names()) == 2 * 7 * 2
    assert names(target_modules=["q_proj"]) == {
        f"model.layers.{i}.self_attn.q_proj.lora_{part}" for i in (0, 1) for part in "AB"
    }
    assert len(names(target_modules=r".*layers\.1\.mlp\..*_proj")) == 3 * 2
    assert names(modules_to_save=["lm_head"]) - names() == {"lm_head.weight"}


@about("new_tokens")
def test_new_tokens(place):
    keys: dict[str, Any] = {"chat_template": "gemma"}
    with pytest.raises(UserError, match="new_tokens: train"):
        taken(place, **keys)
    started = built(place, **keys, new_tokens="train")
    assert started.tokenizer.new_ids
    rows = [name for name, _ in started.named_parameters() if name.endswith(".token_rows")]
    assert rows
    assert len(dict(started.named_parameters())[rows[0]]) == len(started.tokenizer.new_ids)


# --- the data ---------------------------------------------------------------------------------------


@about("data", "data.path")
def test_data(place):
    one = written(place / "one.jsonl", {"instruction": "a", "output": "one"})
    two = written(place / "two.jsonl", {"instruction": "b", "output": "two"})
    assert len(texts(place, data=one)) == 1 and "one" in texts(place, data=one)[0]
    both = texts(place, data=[one, {"path": two}])
    assert "one" in both[0] and "two" in both[1]


@about("data.name", "data.split", "data.revision")
def test_what_of_a_hub_data_set(place, monkeypatch):
    import datasets

    asked: list[Any] = []

    def load(*place_: Any, **options: Any) -> Any:
        asked.append((*place_, options["split"], options["revision"]))
        return datasets.Dataset.from_list([{"instruction": "a", "output": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = {"path": "team/rows", "name": "part", "split": "held", "revision": "v2"}
    assert len(texts(place, data=[source])) == 1
    texts(place, data=["team/rows"])
    assert set(asked) == {("team/rows", "part", "held", "v2"), ("team/rows", None, "train", None)}


@about("data.format", "data.columns", "data.roles", "data.max_rows")
def test_how_rows_are_read(place):
    row = {
        "text": "plain words",
        "question": "why",
        "answer": "so",
        "prompt": "p",
        "completion": "c",
    }
    file = written(place / "many.jsonl", row, row, row)
    as_text = texts(place, data=[{"path": file, "format": "text"}])
    assert len(as_text) == 3 and "lain words" in as_text[0]
    assert texts(place, data=[{"path": file}])[0].startswith("p⟦c")
    mapped = {"instruction": "question", "output": "answer"}
    assert "why" in texts(place, data=[{"path": file, "format": "alpaca", "columns": mapped}])[0]
    assert len(texts(place, data=[{"path": file, "max_rows": 2}])) == 2
    talk = {"messages": [turn("person", "hi"), turn("machine", "yes")]}
    file = written(place / "roles.jsonl", talk)
    with pytest.raises(UserError, match="person"):
        texts(place, data=[{"path": file}])
    roles = {"person": "user", "machine": "assistant"}
    assert "user\nhi" in texts(place, data=[{"path": file, "roles": roles}])[0]


@about("data.weight")
def test_weight(place):
    one, two = str(write_rows(place / "w1.jsonl", 10)), str(write_rows(place / "w2.jsonl", 10))
    sources = [{"path": one, "weight": 2.0}, {"path": two, "weight": 0.5}]
    intake = taken(place, data=sources)
    epoch = example_order(intake.config, intake.data).take(0, 25).tolist()
    assert sorted(e for e in epoch if e < 10) == sorted([*range(10)] * 2)
    assert len({e for e in epoch if e >= 10}) == 5


@about("eval_data", "val_size")
def test_evaluation_data(place):
    assert taken(place).data.eval is None
    held = str(write_rows(place / "held.jsonl", 5))
    given = taken(place, eval_data=held).data
    assert (len(given.train), len(given.eval)) == (24, 5)
    for size, rows in ((6, 6), (0.25, 6)):
        split = taken(place, val_size=size).data
        assert (len(split.train), len(split.eval)) == (24 - rows, rows)


@about("on_bad_row")
def test_on_bad_row(place):
    file = written(
        place / "bad.jsonl", {"instruction": "a", "output": "b"}, '{"instruction": "a", '
    )
    with pytest.raises(UserError, match=r"bad\.jsonl:2"):
        taken(place, data=file)
    assert len(taken(place, data=file, on_bad_row="drop").data.train) == 1


@about("streaming")
def test_streaming(place):
    streamed = taken(place, streaming=True).data
    assert not hasattr(streamed, "train") and hasattr(streamed, "stream")


@about("shuffle")
def test_shuffle(place):
    def order(**keys: Any) -> list[int]:
        intake = taken(place, **keys)
        return example_order(intake.config, intake.data).take(0, 24).tolist()

    assert order(shuffle=False) == list(range(24)) != order() and sorted(order()) == list(range(24))
    for shuffle in (True, False):
        stream = taken(place, streaming=True, shuffle=shuffle).data.stream
        numbers = [int(example.where.rpartition(":")[2]) for example, _ in zip(stream, range(24))]  # noqa: B905
        assert (numbers == list(range(1, 25))) is not shuffle


CHAT = {
    "messages": [
        turn("user", "q"),
        turn("assistant", "a"),
        turn("user", "w"),
        turn("assistant", "b"),
    ]
}


@about("chat_template", "chat_template_kwargs", "date")
def test_templates(place):
    chat = written(place / "chat.jsonl", CHAT)
    assert "<|im_start|>user\nq" in texts(place, data=chat)[0]
    assert "<|im_start|>" not in texts(place, data=chat, chat_template="vicuna")[0]
    file = place / "own.jinja"
    file.write_text(
        "{{ strftime_now('%d.%m.%Y') }} {{ mood }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}[{{ m.content }}]{% endif %}"
        "{% endfor %}"
    )
    keys = {"data": chat, "chat_template": str(file), "chat_template_kwargs": {"mood": "merry"}}
    assert texts(place, **keys, date="2024-02-29") == [
        "29.02.2024 merry[q]⟦a<|im_end|>⟧[w]⟦b<|im_end|>⟧"
    ]


@about("system")
def test_system(place):
    rows = {"messages": [turn("system", "mine"), *CHAT["messages"]]}
    file = written(place / "system.jsonl", CHAT, rows)
    without, own = texts(place, data=file, system="be brief")
    assert "<|im_start|>system\nbe brief" in without
    assert "be brief" not in own and "mine" in own


@about("stop")
def test_stop(place):
    assert 1 not in built(place).stop_ids
    assert 1 in built(place, stop="</s>").stop_ids
    assert {0, 1} <= set(built(place, stop=["</s>", "<s>"]).stop_ids)


@about("train_on", "multi_turn")
def test_what_of_a_conversation_is_trained(place):
    chat = written(place / "chat.jsonl", CHAT)
    (joint,) = texts(place, data=chat)
    assert "⟦a<|im_end|>⟧" in joint and "⟦b<|im_end|>⟧" in joint
    (last,) = texts(place, data=chat, train_on="last")
    assert "⟦a" not in last and "⟦b<|im_end|>⟧" in last
    (everything,) = texts(place, data=chat, train_on="all")
    assert everything.startswith("<|im_start|>⟦user") and everything.count("⟦") == 1
    per_turn = texts(place, data=chat, multi_turn="per_turn")
    assert len(per_turn) == 2 and all(text.count("⟦") == 1 for text in per_turn)


@about("max_length", "overlong")
def test_long_rows(place):
    long = {"instruction": "x", "output": "9" * 100}
    chat = written(place / "long.jsonl", long, {"instruction": "x", "output": "short"})
    assert len(texts(place, data=chat)) == 2
    keys = {"data": chat, "max_length": 60}
    assert len(texts(place, **keys)) == 1
    cut = texts(place, **keys, overlong="truncate")
    assert len(cut) == 2 and "<|im_end|>⟧" not in cut[0]
    with pytest.raises(UserError, match=r"long\.jsonl:1"):
        texts(place, **keys, overlong="error")
    text = written(place / "book.jsonl", {"text": "9" * 100})
    assert len(texts(place, data=text, max_length=60)) == 2
    assert len(texts(place, data=text, max_length=60, overlong="truncate")) == 1
    with pytest.raises(UserError, match="max_length: 5000 is beyond the 2048 positions"):
        taken(place, max_length=5000)


# --- the steps --------------------------------------------------------------------------------------


@about("batch_size", "batch_tokens", "epochs", "max_steps")
def test_steps(place):
    assert plan(place, epochs=1, batch_size=10) == [10, 10, 4]
    assert plan(place, epochs=1.5, batch_size=12) == [12, 12, 12]
    assert plan(place, max_steps=5, batch_size=10) == [10] * 5
    by_tokens = plan(place, epochs=1, batch_tokens=200)
    assert sum(by_tokens) == 24 and len(by_tokens) >= 4
    intake = taken(place, epochs=1, batch_tokens=200)
    bounds = step_bounds(intake.config, intake.data, example_order(intake.config, intake.data))
    order = example_order(intake.config, intake.data)
    sums = [
        int(intake.data.train.example_tokens[order.take(int(a), int(b))].sum())
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    assert max(sums) <= 200 and min(sums[:-1]) > 140


@about("micro_batch_tokens")
def test_micro_batch_tokens(place):
    store = taken(place).data.train
    documents = documents_of(store, torch.arange(12).numpy())
    counts = {
        tokens: len(list(micro_batches(documents, built(place, **keys).micro_batch_tokens)))
        for tokens, keys in {n: {"micro_batch_tokens": n} for n in (64, 128, 4096)}.items()
    }
    assert counts[64] > counts[128] > counts[4096] == 1
    assert built(place).micro_batch_tokens == 2048
    assert (
        built(place, micro_batch_tokens=8).micro_batch_tokens == 64
    )  # the longest row has its place


@about("activations")
def test_activations(place):
    with pytest.raises(UserError, match="activations: recompute_mlp needs the fast engine"):
        run(place, activations="recompute_mlp", engine="compat")
    for policy in ("keep", "recompute_mlp", "recompute_block", "offload"):
        assert set(built(place, activations=policy).engine.plan.policies) == {policy}
    compat = {"engine": "compat"}
    assert not built(place, activations="keep", **compat).model.is_gradient_checkpointing
    assert built(place, activations="recompute_block", **compat).model.is_gradient_checkpointing


@about("learning_rate")
def test_learning_rate():
    assert max(rates(learning_rate=0.5)) == 0.5
    assert max(rates(learning_rate="auto")) == 2e-4
    assert max(rates(learning_rate="auto", method="full")) == 1e-5


@about("lr_scheduler", "warmup_ratio", "warmup_steps", "min_lr_ratio", "decay_ratio")
def test_schedules():
    still = {"warmup_steps": 0}
    assert rates(lr_scheduler="constant", **still) == [1.0] * 20
    shapes = [
        tuple(rates(lr_scheduler=name, **still)) for name in ("cosine", "linear", "constant", "wsd")
    ]
    assert len(set(shapes)) == 4
    assert rates(warmup_steps=4)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates(warmup_ratio=0.2)[:5] == rates(warmup_steps=4)[:5]
    assert rates(min_lr_ratio=0.5)[-1] > 0.5 > rates()[-1]
    assert rates(lr_scheduler="wsd", decay_ratio=0.5, **still).count(1.0) == 11
    assert rates(lr_scheduler="wsd", decay_ratio=0.25, **still).count(1.0) == 16


def stepped(gradient: float = 1.0, **keys: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and a vector of ones after an update at rate 0.1."""
    parts = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))]
    config = make_config({"model": "m", "data": "d", **keys})
    optimizer = build_optimizer([("matrix", parts[0]), ("vector", parts[1])], config)
    for part in parts:
        part.grad = torch.full_like(part, gradient)
    apply_update(optimizer, 0.1, config.max_grad_norm)
    return parts[0].detach(), parts[1].detach()


@about("weight_decay")
def test_weight_decay():
    matrix, vector = stepped(gradient=0.0, weight_decay=0.5)
    assert torch.allclose(matrix, torch.full((4, 4), 0.95)) and torch.equal(vector, torch.ones(4))
    assert torch.equal(stepped(gradient=0.0)[0], torch.ones(4, 4))


@about("max_grad_norm")
def test_max_grad_norm():
    # AdamW's first update is blind to the gradient's size, but for eps.
    free, clipped = stepped(1e-7, max_grad_norm=None), stepped(1e-7, max_grad_norm=1e-9)
    assert float(free[0].mean()) < 0.92 and float(clipped[0].mean()) > 0.98


@about("masters", "update_in_backward")
def test_masters(place):
    """What they do to a run is in test_rounding.py."""
    wide, narrow = (built(place, method="full", dtype="bf16", masters=m) for m in ("fp32", "bf16"))
    dtypes = [{p.dtype for _, p in each.named_parameters()} for each in (wide, narrow)]
    assert dtypes == [{torch.float32}, {torch.bfloat16}]
    early = {"masters": "bf16", "max_grad_norm": None, "update_in_backward": True}
    each, shared = narrow, built(place, method="full", dtype="bf16", **early)
    sums = [
        sum({t.data_ptr(): t.nbytes for t in e.engine.sums.values()}.values())
        for e in (each, shared)
    ]
    assert sums[1] < sums[0]


@about("optimizer")
def test_optimizer(place):
    kinds = {"adamw": "AdamW", "adamw_8bit": "AdamW8bit"}
    for name, kind in kinds.items():
        left = run(place, optimizer=name, max_steps=3)
        assert series(left.output_dir)[-1] < series(left.output_dir)[0]
        config = make_config({"model": "m", "data": "d", "optimizer": name})
        optimizer = build_optimizer([("w", nn.Parameter(torch.ones(64, 64)))], config)
        assert type(optimizer).__name__ == kind
    with pytest.raises(
        UserError, match="paged_adamw_8bit pages its state between the GPU and the host"
    ):
        run(place, optimizer="paged_adamw_8bit")


@about("dtype")
def test_dtype(place):
    assert built(place).model.dtype == built(place, dtype="fp32").model.dtype == torch.float32
    assert built(place, dtype="bf16").model.dtype == torch.bfloat16
    masters = built(place, dtype="bf16", method="full")
    assert masters.model.dtype == torch.float32 and masters.engine.dtype == torch.bfloat16
    exact, rounded = (series(run(place, dtype=d).output_dir)[0] for d in ("fp32", "bf16"))
    assert exact != rounded == pytest.approx(exact, rel=1e-2)


@about("vram")
def test_vram(place):
    """A plan that keeps inside it, or a message that says what would fit."""
    free = built(place, micro_batch_tokens=256)
    tight = built(place, micro_batch_tokens=256, vram="0.0018GB")
    assert tight.predicted_memory <= 1_800_000 < free.predicted_memory
    assert set(free.engine.plan.policies) == {"keep"} != set(tight.engine.plan.policies)
    losses = [series(run(place, vram=v).output_dir) for v in ("auto", "0.004GB")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    with pytest.raises(
        UserError, match=r"does not fit into 0.1 MB: weights.* alone take 0.4\d+ MB"
    ):
        built(place, vram="0.0001GB")


@about("seed")
def test_seed(place):
    def start(seed: int) -> Any:
        return {name: p.detach() for name, p in built(place, seed=seed).named_parameters()}

    def order(seed: int) -> list[int]:
        intake = taken(place, seed=seed)
        return example_order(intake.config, intake.data).take(0, 24).tolist()

    assert same(start(3), start(3)) and not same(start(3), start(4))
    assert order(3) == order(3) != order(4)
    where = [
        [taken(place, seed=s, val_size=3).data.eval.where(i) for i in range(3)] for s in (3, 4)
    ]
    assert where[0] != where[1]
    dropped = {"lora": {"dropout": 0.5}, "shuffle": False, "learning_rate": 0.1}
    assert len({tuple(series(run(place, **dropped, seed=s).output_dir)) for s in (3, 4)}) == 2


# --- the run ----------------------------------------------------------------------------------------


@about("logging_steps", "eval_steps", "save_steps", "save_total_limit")
def test_how_often(place):
    held = str(write_rows(place / "held.jsonl", 5))
    keys = {"logging_steps": 4, "eval_steps": 5, "save_steps": 3, "save_total_limit": 2}
    folder = run(place, max_steps=10, eval_data=held, learning_rate=1e-9, **keys).output_dir
    records = lines(folder)
    assert [r["step"] for r in records if "loss" in r] == [1, 4, 8, 10]
    assert [r["step"] for r in records if "eval_loss" in r] == [0, 5, 10]
    kept = {int(p.name[5:]) for p in (folder / "checkpoints").iterdir()}
    best = json.loads((folder / "summary.json").read_text())["best_step"]
    assert kept == {9, 10, best}
    roomy = run(place, max_steps=7, save_steps=3, save_total_limit=9).output_dir
    assert {int(p.name[5:]) for p in (roomy / "checkpoints").iterdir()} == {1, 3, 6, 7}


@about("early_stopping_patience")
def test_early_stopping_patience(place):
    worse = {"learning_rate": 0.5, "lr_scheduler": "constant", "val_size": 4, "eval_steps": 1}
    patient = run(place, **worse, max_steps=12)
    hasty = run(place, **worse, max_steps=12, early_stopping_patience=1)
    assert hasty.steps < patient.steps == 12


@about("sample_prompts")
def test_sample_prompts(place, capsys, monkeypatch):
    monkeypatch.setattr("fastsft.trainer.SAMPLE_TOKENS", 2)
    run(place, max_steps=1, sample_prompts=["what is tea?"])
    assert capsys.readouterr().out.count("what is tea?") == 2


@about("resume", "output_dir", "run_name")
def test_folders(place, monkeypatch):
    named = run(place, output_dir="here", max_steps=2).output_dir
    assert named == place / "here" and (named / "summary.json").exists()
    with pytest.raises(UserError, match="here already holds a run"):
        run(place, output_dir="here")
    assert run(place, run_name="tea").output_dir == place / "runs" / "tea"
    assert run(place, run_name="tea").output_dir == place / "runs" / "tea-2"
    longer = run(place, resume="here", max_steps=4, lr_scheduler="cosine")
    assert longer.output_dir == named
    assert [r["step"] for r in lines(named)] == [1, 2, 3, 4]


@about("report_to")
def test_report_to(place, monkeypatch):
    folder = run(place, report_to=["tensorboard"], max_steps=2).output_dir
    assert list((folder / "tensorboard").glob("events*"))
    assert not (run(place, max_steps=2).output_dir / "tensorboard").exists()
    logged: list[dict[str, Any]] = []
    wandb_run = SimpleNamespace(id="x", log=lambda d, **_: logged.append(d), finish=lambda: None)
    fake = SimpleNamespace(init=lambda **_: wandb_run)
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    run(place, report_to=["wandb"], max_steps=2)
    assert len(logged) == 2
