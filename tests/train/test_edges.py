"""What goes wrong in the middle of a run, or is true only between two events of it."""

import json

import pytest
from runs import run, small_model, write_rows
from small_run import write_model

from fastsft.errors import UserError
from fastsft.metrics import read_metrics


def losses(result):
    records = read_metrics(result.output_dir / "metrics.jsonl")
    return {r["step"]: (r["loss"], r["total_tokens"]) for r in records if "loss" in r}


def test_a_logging_window_goes_on_through_a_resume(tmp_path):
    """Saved at step 4, logged at 3 and 6: the record of step 6 is of steps 4 to 6 all the same."""
    keys = {"max_steps": 6, "logging_steps": 3, "save_steps": 4}
    whole = run(tmp_path, **keys)
    expected = losses(whole)
    again = run(tmp_path, **keys, resume=str(whole.output_dir / "checkpoints" / "step-000004"))
    assert again.output_dir == whole.output_dir and losses(again) == expected


def test_a_bad_row_late_in_a_stream_leaves_what_was_learned(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 1100)
    with rows.open("a") as file:
        file.write("{torn\n")
    keys = {"streaming": True, "max_steps": 9, "batch_size": 256, "shuffle": False}
    with pytest.raises(UserError) as error:
        run(tmp_path, **keys, output_dir="run")
    newest = "run/checkpoints/step-000004/adapter"
    assert "rows.jsonl:1101: malformed JSON" in str(error.value)
    assert f"start a new run from there: adapter={newest}" in str(error.value)
    mended = write_rows(tmp_path / "mended.jsonl", 8)
    assert run(tmp_path, data=str(mended), adapter=newest).steps == 3


def test_a_stream_says_at_the_end_what_it_dropped(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 1100)
    rows.write_text(rows.read_text() + "{torn\n" * 5)
    result = run(tmp_path, streaming=True, max_steps=5, batch_size=256, on_bad_row="drop")
    report = json.loads((result.output_dir / "data_report.json").read_text())
    assert report["sources"][0]["dropped"] == {"malformed JSON": 5}


def test_a_token_beyond_the_embedding_is_named(tmp_path):
    """On a GPU it would be an assertion without a name."""
    small_model(tmp_path / "base")
    write_model(tmp_path / "small", vocab_size=200)
    (tmp_path / "small" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"the data holds token \d+, but .*small has 200 rows"):
        run(tmp_path, model=str(tmp_path / "small"), tokenizer=str(tmp_path / "base"))
