"""`fastsft plan`: from a folder with nothing but config.json, for any card, on a machine without a GPU."""

from __future__ import annotations

import json

import pytest
from live_bytes import LLAMA_8B
from transformers import AutoConfig

from fastsft import cli
from fastsft.model.job import Job, ranks_of
from fastsft.model.plan import POLICIES
from fastsft.model.planner import Budget, longest_context
from fastsft.model.spec import read_spec
from fastsft.plan_command import EXAMPLES


def folder(path, model_type="llama", **sizes):
    path.mkdir()
    sizes = sizes or LLAMA_8B
    (path / "config.json").write_text(json.dumps({"model_type": model_type, **sizes}))
    return str(path)


def said(capsys, *words):
    code = cli.main(["plan", *words])
    out = capsys.readouterr()
    return code, " ".join(out.out.split()), out.err


def test_an_8b_model_without_weights(tmp_path, capsys):
    where = folder(tmp_path / "m")
    code, text, _ = said(capsys, f"model={where}", "lora.r=32", "--vram", "24GB")
    assert code == 0 and "qlora, r=32, adamw" in text and "Predicted, not measured" in text
    assert "24 GB of a card such as RTX 4090" in text
    assert all(policy in text for policy in POLICIES)
    spec = read_spec(AutoConfig.for_model("llama", **LLAMA_8B))
    job = Job(spec, "qlora", ranks_of(spec, "all-linear", 32))
    for gb in (12, 24, 80):
        assert f"{longest_context(job, Budget(gb * 10**9)):,}" in text
    assert f"{longest_context(job, Budget(24 * 10**9), 'keep'):,}" in text
    assert all(f"│ {gb:>3} │" in text or f" {gb} " in text for gb in EXAMPLES)
    assert "Its peak" in text and "weights 3.6" in text and "head 1.05 GB" in text
    assert "assumed (rates: datasheet): products at 75%" in text
    assert "8192³ bf16 product measured once" in text  # what the H200's rate is


def test_settings_change_the_plan(tmp_path, capsys):
    where = folder(tmp_path / "m")
    _, plain, _ = said(capsys, f"model={where}", "vram=24GB")
    assert "24 GB of a card" in plain
    _, fixed, _ = said(
        capsys, f"model={where}", "vram=24GB", "activations=recompute_block", "max_length=8192"
    )
    assert "documents of 8,192 tokens" in fixed and "The plan: recompute_block" in fixed
    config = tmp_path / "c.yaml"
    config.write_text(f"model: {where}\ndata: nowhere.jsonl\nmethod: full\noptimizer: adamw_8bit\n")
    code, full, _ = said(capsys, str(config), "--vram", "8GB")
    assert code == 0 and "full, adamw_8bit" in full and "No plan fits" in full


def test_a_model_for_the_compat_engine_says_why(tmp_path, capsys):
    where = folder(tmp_path / "m", "gpt_neox", hidden_size=64)
    code, text, _ = said(capsys, f"model={where}")
    assert code == 0 and "no plan, since the compat engine runs it" in text
    assert "no row for model_type 'gpt_neox'" in text
    code, text, _ = said(capsys, f"model={folder(tmp_path / 'l')}", "engine=compat")
    assert code == 0 and "as asked for" in text
    _, text, _ = said(capsys, f"model={tmp_path / 'l'}", "lora.modules_to_save=[norm]")
    assert "norm trains" in text


def test_the_quickstart_has_a_plan(capsys):
    code, text, _ = said(capsys)
    assert code == 0 and "builtin:tiny" in text


@pytest.mark.parametrize(
    "words,message",
    [
        (["--vram", "lots"], "a size such as 24GB"),
        (["lora.target_modules=[nothing]"], "matches no linear layer"),
        (["model=/nonexistent/model"], "/nonexistent/model"),
    ],
)
def test_what_cannot_be_read_is_one_message(tmp_path, capsys, words, message):
    where = folder(tmp_path / "m")
    code, _, error = said(capsys, f"model={where}", *words)
    assert code == 2 and message in error and "Traceback" not in error


def test_an_adapter_on_the_head_is_compats(tmp_path, capsys):
    where = folder(tmp_path / "m")
    _, text, error = said(capsys, f"model={where}", "lora.target_modules=[q_proj, lm_head]")
    assert "lm_head carries an adapter" in text + error
