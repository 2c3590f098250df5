"""Bad input gets one clear message, and nothing is lost: what a person reads, through the command line.

Every message names the file, row or key, says what was found there and what to do about it.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import SMALL, same, small_model, write_rows
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_run import write_model

from fastsft import cli
from fastsft.checkpoint import list_checkpoints, verify
from fastsft.model import adapter as adapter_files
from fastsft.model.build import Built

WORDS = ["model=base", "method=lora", "batch_size=4", "learning_rate=0.01", "date=2026-01-31"]
DEV_FULL = Path("/dev/full")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model and good rows, in a folder that also holds the token cache."""
    folder = tmp_path_factory.mktemp("bad")
    small_model(folder / "base")
    write_rows(folder / "rows.jsonl")
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("FASTSFT_CACHE", str(place / "cache"))


def command(*words: str) -> int:
    """`fastsft train` with the usual words, those given behind them."""
    given = {word.split("=")[0] for word in words}
    usual = [*WORDS, "data=rows.jsonl"]
    if not {"max_steps", "epochs"} & given:
        usual.append("max_steps=2")
    return cli.main(["train", *(w for w in usual if w.split("=")[0] not in given), *words])


def things() -> set[Path]:
    """All that lies here, but for the token cache and the empty parent of runs that were named by us."""
    return {p for p in Path().rglob("*") if p.parts[0] != "cache" and p != Path("runs")}


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message of a command that must be refused and leave nothing behind."""
    before = things()
    assert command(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastsft: ") and "Traceback" not in error
    assert things() == before
    return error


def check(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


# --- the config -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("learning_rat=1", ["unknown key 'learning_rat'", "did you mean 'learning_rate'?"]),
        ("lora.dropuot=0", ["unknown key 'lora.dropuot'", "did you mean 'dropout'?"]),
        ("gradient_accumulation_steps=2", ["here it is batch_size (examples per optimizer step"]),
        ("lora_r=8", ["unknown key 'lora_r'", "here it is lora.r"]),
        ("packing=true", ["packing is always on and never changes the result"]),
        ("epochs=many", ["epochs: expected a valid number; got 'many'"]),
        ("batch_size=2.5", ["batch_size: expected a valid integer; got 2.5"]),
        ("method=dora", ["method: expected 'lora', 'qlora' or 'full'; got 'dora'"]),
        ("lora=8", ["lora: expected key: value pairs of r, alpha, dropout", "got 8"]),
    ],
)
def test_keys_and_their_types(capsys, word, parts):
    check(refused(capsys, word), *parts)


# --- the data ---------------------------------------------------------------------------------------

GOOD = {"instruction": "hello", "output": "world"}


def jsonl(*rows: Any) -> bytes:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows).encode()


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


BROKEN = '{"instruction": "a", "output": '
HI = ("user", "hi")
RENAME = ["is not what its ending says", "rename it"]
MEND = "Mend the row, or set on_bad_row: drop"
FILES: dict[str, tuple[bytes, list[str]]] = {
    "empty.jsonl": (b"", ["empty.jsonl is empty", "name another file"]),
    "blank.jsonl": (b"\n\n", ["blank.jsonl holds no rows", "name another file"]),
    "none.json": (b"[]", ["none.json holds no rows"]),
    "packed.jsonl": (gzip.compress(jsonl(GOOD)), [*RENAME, "gzip", "should end in .gz"]),
    "table.jsonl": (parquet([GOOD]), [*RENAME, "a Parquet file"]),
    "text.parquet": (jsonl(GOOD), [*RENAME, "text.parquet"]),
    "text.arrow": (jsonl(GOOD), [*RENAME, "text.arrow"]),
    "text.jsonl.gz": (jsonl(GOOD), ["text.jsonl.gz cannot be unpacked as gzip", "make it again"]),
    "json.csv": (jsonl(GOOD), [*RENAME, "it holds JSON"]),
    "csv.jsonl": (
        b"instruction,output\nhello,world\n",
        ["csv.jsonl:1: malformed JSON", "Is the file what its ending says?"],
    ),
    "line.jsonl": (
        jsonl(*[GOOD] * 36, BROKEN, GOOD),
        ["line.jsonl:37: malformed JSON: Expecting value at column 32", MEND],
    ),
    "array.json": (
        b"[" + b",\n".join([json.dumps(GOOD).encode()] * 36 + [BROKEN.encode()]) + b"]",
        ["array.json: malformed JSON in line 37", "mend it, or write one object per line"],
    ),
    "field.jsonl": (
        jsonl(*[GOOD] * 11, {"instruction": "x"}),
        ["field.jsonl:12: missing field", "no field 'output'; it has 'instruction'", MEND],
    ),
    "columns.jsonl": (
        jsonl({"question": "a", "reply": "b"}),
        ["columns found: question, reply", "Name yours with columns: {our_field: your_column}"],
    ),
    "role.jsonl": (
        jsonl(turns(HI, ("assistant", "a")), turns(HI, ("narrator", "b"))),
        ["role.jsonl:2: unknown role", "Message 2", "'narrator'", "Map it with `roles`", MEND],
    ),
    "null.jsonl": (
        jsonl(GOOD, {"instruction": "x", "output": None}),
        ["null.jsonl:2: empty answer: The answer is null", MEND],
    ),
    "null_turn.jsonl": (
        jsonl(turns(HI, ("assistant", "a")), turns(HI, ("assistant", None))),
        ["null_turn.jsonl:2: empty answer: Message 2 (assistant) is null", MEND],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_data_files_and_rows(capsys, place, name):
    content, parts = FILES[name]
    (place / name).write_bytes(content)
    check(refused(capsys, f"data={name}"), *parts)


def test_a_missing_file_and_its_nearest_name(capsys):
    check(refused(capsys, "data=row.jsonl"), "row.jsonl does not exist", "did you mean rows.jsonl?")
    check(refused(capsys, "eval_data=far/rows.jsonl"), "nor does the folder far")
    check(
        refused(capsys, "model=./nowhere"), "model: no folder ./nowhere", "give an existing folder"
    )


# --- the template -----------------------------------------------------------------------------------

TEMPLATES = {
    # The first characters change with every message: no text is a beginning of the next.
    "count.jinja": (
        "{{ messages|length }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
        ["rows.jsonl:1", "count.jinja message 2 cannot be told", "generation tags", "chatml"],
    ),
    "mute.jinja": (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        ["rows.jsonl:1: message 2: its content is missing", "mute.jinja", "Choose a template"],
    ),
    "open.jinja": (
        "{% for m in messages %}",
        ["open.jinja, line 1: Unexpected end of template", "Mend it"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_that_do_not_show_the_answers(capsys, place, name):
    source, parts = TEMPLATES[name]
    (place / name).write_text(source)
    check(refused(capsys, f"chat_template={name}"), *parts)


def test_templates_that_are_not_there(capsys):
    check(
        refused(capsys, "chat_template=gone.jinja"), "cannot read gone.jinja", "give a .jinja file"
    )
    check(refused(capsys, "chat_template=chatmll"), "'chatmll'", "did you mean chatml?")


# --- the model and its adapter ----------------------------------------------------------------------


def copied(source: Path, name: str) -> Path:
    """A copy to damage."""
    shutil.rmtree(name, ignore_errors=True)
    return Path(shutil.copytree(source, name))


def test_a_model_folder_without_weights_or_config(capsys, place):
    (copied(place / "base", "bare") / "model.safetensors").unlink()
    check(refused(capsys, "model=bare"), "bare has no weights (neither model.safetensors", "fetch")
    config = copied(place / "base", "unsaid") / "config.json"
    config.write_text("{")
    check(refused(capsys, "model=unsaid"), "unsaid/config.json is not valid JSON", "fetch the file")
    config.unlink()
    check(refused(capsys, "model=unsaid"), "unsaid has no config.json", "give a folder")


@pytest.mark.parametrize("left", [100, -1000])
def test_a_truncated_safetensors_file(capsys, place, left):
    weights = copied(place / "base", "short") / "model.safetensors"
    size = weights.stat().st_size
    os.truncate(weights, left % size)
    check(refused(capsys, "model=short"), "short/model.safetensors", "cut short", "fetch it again")
    check(refused(capsys, "model=short"), f"{left % size}" if left > 0 else f"{size} bytes")


@pytest.fixture(scope="module")
def adapter(place, tmp_path_factory):
    """An adapter of rank 16 for the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("FASTSFT_CACHE", str(place / "cache"))
        assert command("output_dir=made", "max_steps=1") == 0
    return place / "made" / "adapter"


def test_an_adapter_for_another_model(capsys, place, adapter):
    layers = SMALL | {"num_hidden_layers": 1}
    for name, options in (("wide", SMALL | {"hidden_size": 64}), ("flat", layers)):
        write_model(place / name, template="{{ messages }}", **options)
    capsys.readouterr()
    words = (f"adapter={adapter}", "chat_template=chatml")
    message = refused(capsys, "model=wide", *words)
    check(message, f"adapter {adapter} is for another model", "is [64, 48] here and [32, 48] in")
    message = refused(capsys, "model=flat", *words)
    check(message, "is for another model: this one has no linear layer model.layers.1.")
    check(refused(capsys, f"model={adapter}"), "holds an adapter, not a model", "give its base")
    check(
        refused(capsys, "adapter=base"),
        "there is no adapter_config.json",
        "give a folder that PEFT",
    )


def test_a_rank_that_does_not_match(capsys, place, adapter):
    message = refused(capsys, f"adapter={adapter}", "lora.r=4")
    check(message, "lora.r is 4", f"the adapter {adapter} has 16", "leave the key out")
    config = copied(adapter, "rank") / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 4}))
    message = refused(capsys, "adapter=rank")
    check(message, "has rank 16 in adapter_model.safetensors and 4 in adapter_config.json")


def test_a_truncated_adapter(capsys, place, adapter):
    weights = copied(adapter, "cut") / "adapter_model.safetensors"
    os.truncate(weights, weights.stat().st_size - 50)
    check(
        refused(capsys, "adapter=cut"),
        "cut/adapter_model.safetensors",
        "cut short",
        "fetch it again",
    )


# --- the folder and the resume ----------------------------------------------------------------------


def test_an_output_folder_that_cannot_be_taken(capsys, adapter):
    message = refused(capsys, "output_dir=made")
    check(message, "output_dir: made already holds a run", "Name another folder", "resume=auto")
    check(refused(capsys, "output_dir=rows.jsonl"), "rows.jsonl is a file; name a folder")
    message = refused(capsys, "output_dir=rows.jsonl/run")
    check(message, "output_dir: the folder rows.jsonl/run cannot be made", "Name another place")


def test_a_changed_key_on_resume(capsys, place, adapter):
    resume = ("output_dir=made", "resume=auto", "max_steps=3")
    message = refused(capsys, *resume, "lora.r=8", "learning_rate=0.02")
    check(message, "learning_rate was 0.01 and is 0.02", "lora.r was 16 and is 8")
    check(
        message,
        "Set the old value again, or drop resume",
        "These may change: early_stopping_patience, epochs",
    )
    write_rows(place / "more.jsonl", 3)
    message = refused(capsys, *resume, "data=more.jsonl")
    check(message, "data.0.path was 'rows.jsonl' and is 'more.jsonl'")
    check(refused(capsys, *resume[:2], "max_steps=1"), "nothing is left to train", "Raise epochs")
    message = refused(capsys, "resume=gone", "max_steps=3")
    check(message, "resume: there is no folder gone", "Give a checkpoint")


# --- while it runs ----------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite(capsys, place):
    words = ["learning_rate=1e30", "lr_scheduler=constant", "warmup_steps=0", "shuffle=false"]
    assert command(*words, "output_dir=burnt", "max_steps=9") == 2
    error = capsys.readouterr().err
    rows = ", ".join(f"rows.jsonl:{row}" for row in range(5, 9))
    check(error, "step 2: the loss or its gradient is not finite", f"Rows of that step: {rows};")
    check(
        error, "the last good checkpoint is burnt/checkpoints/step-000001.", "Lower learning_rate"
    )
    assert "Traceback" not in error
    (kept,) = list_checkpoints(place / "burnt")
    assert verify(kept) is None
    weights = load_file(kept / "adapter" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert not (place / "burnt" / "adapter").exists()


def checkpoint_write(patch: pytest.MonkeyPatch) -> None:
    """The second checkpoint's tensors go to a device that is full."""
    write = Built.write

    def onto_a_full_disk(built: Built, folder: Path, *, masters: bool) -> None:
        if folder.name.endswith("step-000002"):
            (folder / "tensors.pt").symlink_to(DEV_FULL)
        write(built, folder, masters=masters)

    patch.setattr(Built, "write", onto_a_full_disk)


def adapter_write(patch: pytest.MonkeyPatch, number: int) -> None:
    """What safetensors says of a full disk, when an adapter is written for the `number`th time."""
    said = "Error while serializing: I/O error: No space left on device (os error 28)"
    saved: list[Path] = []

    def onto_a_full_disk(tensors: Any, path: Path, **options: Any) -> None:
        saved.append(path)
        if len(saved) == number:
            raise SafetensorError(said)
        save_file(tensors, path, **options)

    patch.setattr(adapter_files, "save_file", onto_a_full_disk)


@pytest.mark.parametrize("where", ["moments", "weights", "product"])
def test_no_space_left_while_saving(capsys, place, monkeypatch, where):
    """The checkpoint before it stays whole, and the run goes on from there to the same end."""
    if where == "moments" and not DEV_FULL.exists():
        pytest.skip("a device that is always full is there on Linux alone")
    name = f"full-{where}"
    with monkeypatch.context() as patch:
        if where == "moments":
            checkpoint_write(patch)
        else:
            adapter_write(patch, 2 if where == "weights" else 3)
        assert command(f"output_dir={name}") == 2
    error = capsys.readouterr().err
    step = 2 if where == "product" else 1
    check(error, "no space left", f"{name}/checkpoints/step-{step:06d}", "is kept", "resume=auto")
    assert "Traceback" not in error
    kept = list_checkpoints(place / name)
    assert [path.name for path in kept] == [f"step-{i:06d}" for i in range(1, step + 1)]
    assert [verify(path) for path in kept] == [None] * step
    assert not list((place / name / "checkpoints").glob(".*"))
    assert command(f"output_dir={name}", "resume=auto") == 0
    assert command(f"output_dir={name}-never") == 0
    ends = [
        place / run / "adapter" / "adapter_model.safetensors" for run in (name, f"{name}-never")
    ]
    assert same(*map(load_file, ends))


@pytest.mark.skipif(not DEV_FULL.exists(), reason="such a device is there on Linux alone")
def test_no_space_left_before_the_first_step(capsys, place):
    (place / "stuffed").mkdir()
    (place / "stuffed" / "data_report.json").symlink_to(DEV_FULL)
    assert command("output_dir=stuffed") == 2
    error = capsys.readouterr().err
    check(
        error, "no space left on the device of stuffed", "there is no checkpoint yet", "Free some"
    )
