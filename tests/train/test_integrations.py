"""Our kernels inside transformers' models: the numbers must be those they had without them."""

from __future__ import annotations

import copy
import inspect
import runpy
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from small_batches import (
    FAMILIES,
    IDS,
    LABELS,
    PACKED,
    PADDED_LABELS,
    PADDING,
    assert_close_gradients,
    assert_same_gradients,
    assert_untouched,
    close,
    gradients,
)
from tiny_models import tiny
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from fastsft.integrations import accelerate, acceleration
from fastsft.integrations import attention as our_attention

EXAMPLES = Path(__file__).parents[2] / "examples"


# --- a whole model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_families_compute_what_they_computed(family: str) -> None:
    model = tiny(family).train()
    batches = [
        {"input_ids": IDS, "labels": LABELS},
        {
            "input_ids": IDS,
            "labels": PADDED_LABELS,
            "attention_mask": PADDING,
            "num_items_in_batch": 7,
        },
        {"input_ids": IDS[:1], "labels": LABELS[:1], **PACKED},
    ]
    expected = [gradients(model, **batch) for batch in batches]
    logits = model.eval()(input_ids=IDS).logits
    model.train()
    changes = accelerate(model)
    assert [c for c in changes.left if c.part != "lora"] == []
    assert changes.count("mlp") == 2 and changes.count("attention") == changes.count("loss") == 1
    norms = sum("RMSNorm" in type(module).__name__ for module in model.modules())
    assert changes.count("norm") == norms >= 5
    for batch, (loss, grads) in zip(batches, expected, strict=True):
        found, ours = gradients(model, **batch)
        assert float(found) == pytest.approx(float(loss), rel=1e-5)
        assert_close_gradients(ours, grads)
    assert close(model.eval()(input_ids=IDS).logits, logits)
    changes.undo()
    assert_untouched(model)
    assert torch.equal(model(input_ids=IDS).logits, logits)
    model.train()
    for batch, (loss, grads) in zip(batches, expected, strict=True):
        found, ours = gradients(model, **batch)
        assert torch.equal(found, loss)
        assert_same_gradients(ours, grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_low_precision_is_recognised_too(family: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype=dtype).train()
    exact = tiny(family).train()(input_ids=IDS, labels=LABELS).loss
    with accelerate(model) as changes:
        assert [c for c in changes.left if c.part != "lora"] == []
        loss = model(input_ids=IDS, labels=LABELS).loss
    assert float(loss) == pytest.approx(float(exact), rel=2e-2)
    assert_untouched(model)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_under_autocast(family: str) -> None:
    model = tiny(family).train()

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(model, input_ids=IDS, labels=LABELS)

    loss, grads = run()
    accelerate(model)
    found, ours = run()
    assert float(found) == pytest.approx(float(loss), rel=1e-2)
    assert {n: g.dtype for n, g in ours.items()} == {n: g.dtype for n, g in grads.items()}
    assert_close_gradients(ours, grads, tolerance=0.1)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = tiny("llama").train()
    accelerate(model)
    loss, grads = gradients(model, input_ids=IDS, labels=PADDED_LABELS, attention_mask=PADDING)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        found, ours = gradients(model, input_ids=IDS, labels=PADDED_LABELS, attention_mask=PADDING)
        assert torch.equal(found, loss)
        assert_same_gradients(ours, grads)


def test_a_deep_copy_works_on_its_own_weights() -> None:
    model = tiny("llama").train()
    changes = accelerate(model)
    loss = gradients(model, input_ids=IDS, labels=LABELS)[0]
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert torch.equal(gradients(other, input_ids=IDS, labels=LABELS)[0], loss)
    changes.undo()
    assert float(gradients(other, input_ids=IDS, labels=LABELS)[0]) == pytest.approx(
        float(loss), rel=1e-5
    )


def test_only_the_parts_asked_for() -> None:
    for part in ("norm", "mlp", "attention", "loss"):
        others = {name: name == part for name in ("norm", "mlp", "lora", "attention", "loss")}
        changes = accelerate(tiny("llama"), **others)
        assert {entry.part for entry in changes.entries} == {part} and changes.changed


def test_a_second_time_is_refused_part_by_part() -> None:
    model = tiny("llama")
    first = accelerate(model)
    second = accelerate(model)
    assert not second.changed
    assert {c.why for c in second.left if c.part in ("norm", "mlp", "loss")} == {
        "it was changed before; undo that first"
    }
    second.undo()
    assert first.count("norm") == 5
    first.undo()
    assert_untouched(model)


def test_what_others_wrapped_since_becomes_the_original_again(monkeypatch) -> None:
    model = tiny("llama").train()
    norm = model.model.norm
    expected = norm(torch.ones(2, 32))
    changes = accelerate(model)
    inner = norm.forward
    norm.forward = lambda x: inner(x) + 0
    changes.undo()
    monkeypatch.delattr("fastsft.integrations.norm.rms_norm")
    assert torch.equal(norm(torch.ones(2, 32)), expected)


def test_the_report_can_be_read() -> None:
    model = tiny("cohere")
    report = str(accelerate(model))
    assert report.startswith("fastsft in CohereForCausalLM on cpu\n")
    assert "mlp          2  CohereMLP -> swiglu  (model.layers.0.mlp and 1 more)" in report
    left = report.split("left alone\n")[1]
    assert "CohereLayerNorm: its numbers and ours differ by" in left
    assert "lora         1  CohereForCausalLM: none of a kind known here" in left


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a transformers or PEFT model; got Linear"):
        accelerate(nn.Linear(2, 2))


def test_no_class_is_touched() -> None:
    before = {kind: dict(vars(kind)) for kind in map(type, tiny("llama").modules())}
    model, bystander = tiny("llama").train(), tiny("llama").train()
    expected = gradients(bystander, input_ids=IDS, labels=LABELS)[0]
    accelerate(model)
    gradients(model, input_ids=IDS, labels=LABELS)
    assert all(dict(vars(kind)) == members for kind, members in before.items())
    assert torch.equal(gradients(bystander, input_ids=IDS, labels=LABELS)[0], expected)
    assert_untouched(bystander)


# --- what is left alone -----------------------------------------------------------------------------------


class OddNorm(nn.Module):
    """Looks like an RMSNorm in every respect but what it does."""

    def __init__(self, power: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))
        self.eps, self.power = 1e-6, power

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).pow(-self.power)


class OddGradient(OddNorm):
    """Right forwards, wrong backwards."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt().detach()


class WideEpsilon(OddNorm):
    """Another epsilon than it says."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 3 * self.eps).rsqrt()


@pytest.mark.parametrize("norm", [OddNorm(0.49), OddGradient(0.5), WideEpsilon(0.5)])
def test_a_norm_whose_numbers_differ_is_left(norm: nn.Module) -> None:
    model = tiny("llama")
    model.model.norm = norm
    changes = accelerate(model, attention=False, loss=False)
    assert changes.count("norm") == 4
    left = [c for c in changes.left if c.part == "norm"]
    assert len(left) == 1 and left[0].why.startswith("its numbers and ours differ by")
    assert "forward" not in vars(norm)


def test_an_mlp_with_another_activation_is_left() -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.act_fn = nn.ReLU()
    model.model.layers[1].mlp.act_fn = nn.GELU()
    changes = accelerate(model, loss=False)
    assert [c.now for c in changes.changed if c.part == "mlp"] == ["geglu"]
    assert [c.why for c in changes.left if c.part == "mlp"] == [
        "its activation is neither silu nor gelu"
    ]


def test_weights_that_are_not_here_are_left() -> None:
    with torch.device("meta"):
        model = tiny("llama")
    changes = accelerate(model)
    assert not changes.changed
    assert {c.why for c in changes.left if c.part != "lora"} == {
        "its weights are not here (sharded, or on the meta device)"
    }


@pytest.mark.parametrize(
    "change,why",
    [
        (
            lambda m: setattr(m.lm_head, "bias", nn.Parameter(torch.zeros(96))),
            "its head has a bias",
        ),
        (lambda m: setattr(m.config, "logits_scaling", 3.0), "miss the logits"),
        (lambda m: setattr(m, "loss_function", lambda **_: None), "not transformers' causal one"),
        (lambda m: m.lm_head.register_forward_hook(lambda *_: None), "a hook stands on its head"),
    ],
)
def test_a_loss_that_is_not_ours_is_left(change, why: str) -> None:
    model = tiny("llama", tie_word_embeddings=False)
    change(model)
    assert why in next(c.why for c in accelerate(model).left if c.part == "loss")


def test_attention_with_dropout_or_sinks_is_left() -> None:
    for model, why in (
        (tiny("llama", attention_dropout=0.1), "attention_dropout"),
        (tiny("gpt_oss"), "sinks"),
    ):
        before = model.config._attn_implementation
        left = {c.part: c.why for c in accelerate(model).left}
        assert why in left["attention"]
        assert model.config._attn_implementation == before


class Needy(nn.Module):
    """A gated block that cannot be run on any small input."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            block.gate_proj,
            block.up_proj,
            block.down_proj,
        )
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < 7:
            raise ValueError("at least seven tokens")
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_a_module_that_does_not_run_alone_is_left() -> None:
    model = tiny("llama")
    model.model.layers[0].mlp = Needy(model.model.layers[0].mlp)
    changes = accelerate(model, loss=False)
    assert changes.count("mlp") == 1
    left = {c.part: c.why for c in changes.left}
    assert left["mlp"] == "it does not run on a small input: at least seven tokens"


def test_a_model_that_does_not_run_on_tokens_alone_is_left() -> None:
    config = AutoConfig.for_model(
        "t5", d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=96
    )
    changes = accelerate(AutoModelForSeq2SeqLM.from_config(config))
    left = {c.part: c.why for c in changes.left}
    assert left["loss"].startswith("it does not run on a few tokens: You must specify")
    assert not changes.count("attention") and changes.count("norm")


def test_a_failure_on_the_way_leaves_the_model_as_it_was(monkeypatch) -> None:
    model = tiny("llama")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    places = (
        (acceleration, "rebind_loss"),
        (acceleration, "_compare"),
        (our_attention, "documents_attention"),
    )
    for place, name in places:
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken"):
            patch.setattr(place, name, broken)
            accelerate(model)
        assert_untouched(model)
        assert model.config._attn_implementation == "sdpa"


def test_hooks_of_accelerate_stay_around_ours() -> None:
    model = tiny("llama").train()
    expected = gradients(model, input_ids=IDS, labels=LABELS)[0]
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    changes = accelerate(model)
    assert changes.count("norm") == 5
    norm = model.model.norm
    assert vars(norm)["_old_forward"].__func__.fastsft.active
    found = gradients(model, input_ids=IDS, labels=LABELS)[0]
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    changes.undo()
    for module in model.modules():
        remove_hook_from_module(module)
    assert torch.equal(gradients(model, input_ids=IDS, labels=LABELS)[0], expected)


# --- the loss -----------------------------------------------------------------------------------------------


def test_logits_are_none_while_training_and_there_in_evaluation() -> None:
    model = tiny("llama").train()
    accelerate(model)
    out = model(input_ids=IDS, labels=LABELS, output_hidden_states=True)
    assert out.logits is None and len(out.hidden_states) == 3
    assert model(input_ids=IDS).logits.shape == (3, 17, 96)
    assert model(input_ids=IDS, labels=LABELS, logits_to_keep=17).logits is not None
    assert isinstance(model(input_ids=IDS, labels=LABELS, return_dict=False), tuple)
    assert model(IDS, None, None, None, None, LABELS).logits is None  # labels by position
    model.eval()
    assert model(input_ids=IDS, labels=LABELS).logits.shape == (3, 17, 96)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_items_in_batch": torch.tensor(11)},
        {"shift_labels": LABELS.roll(-1, 1)},
        {"ignore_index": 5},
        {"labels": torch.full_like(LABELS, -100), "num_items_in_batch": 4},
    ],
    ids=["items", "shifted", "ignored", "nothing"],
)
def test_options_of_the_loss_mean_what_they_mean(family: str, options: dict) -> None:
    model = tiny(family).train()
    labels = torch.where(LABELS < 0, 5, LABELS) if "ignore_index" in options else LABELS
    batch = {"input_ids": IDS, "labels": labels, **options}
    loss, grads = gradients(model, **batch)
    accelerate(model, norm=False, mlp=False, attention=False)
    found, ours = gradients(model, **batch)
    assert float(found) == pytest.approx(float(loss), rel=1e-5)
    assert_close_gradients(ours, grads)


def test_router_losses_stay_the_models_own() -> None:
    model = tiny("mixtral", output_router_logits=True, router_aux_loss_coef=0.5).train()
    expected = gradients(model, input_ids=IDS, labels=LABELS)[0]
    accelerate(model)
    out = model(input_ids=IDS, labels=LABELS)
    assert out.aux_loss is not None and float(out.loss) == pytest.approx(float(expected), rel=1e-5)


def test_the_signature_stays() -> None:
    model = tiny("llama")
    before = inspect.signature(model.forward)
    changes = accelerate(model)
    assert inspect.signature(model.forward) == before
    changes.undo()


# --- the examples -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["use_kernels", "use_in_trl"])
def test_examples_run(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1].startswith("ok")
