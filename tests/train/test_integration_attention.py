"""attn_implementation="fastsft": whatever batch comes, the numbers of transformers' own attention."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from small_batches import (
    FAMILIES,
    IDS,
    PACKED,
    PADDED_LABELS,
    PADDING,
    POSITIONS,
    assert_close_gradients,
    close,
    gradients,
)
from tiny_models import tiny
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask

from fastsft.integrations import attention as our_attention
from fastsft.model.attention import CannotPack


@contextlib.contextmanager
def counting(monkeypatch):
    """Calls of varlen attention and of torch's own while it lasts."""
    calls = {"ours": 0, "torch": 0}

    def count(name, function):
        def counted(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return counted

    with monkeypatch.context() as patch:
        for name, attribute in (
            ("ours", "documents_attention"),
            ("torch", "sdpa_attention_forward"),
        ):
            patch.setattr(our_attention, attribute, count(name, getattr(our_attention, attribute)))
        yield calls


def both(model: PreTrainedModel, run, oracle: str = "eager") -> tuple[Tensor, Tensor]:
    """`run(model)` with our attention and with one of transformers'."""
    model.set_attn_implementation(oracle)
    expected = run(model)
    model.set_attn_implementation("fastsft")
    return run(model), expected


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "deepseek_v3"])
def test_attention_of_batches(family: str, monkeypatch) -> None:
    model = tiny(family).eval()
    runs = {
        "plain": lambda m: m(input_ids=IDS).logits,
        "padded": lambda m: m(input_ids=IDS, attention_mask=PADDING).logits[PADDING.bool()],
        "all ones": lambda m: m(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits,
        "restart": lambda m: m(input_ids=IDS[:1], **PACKED).logits,
        "rows restart": lambda m: (
            m(input_ids=IDS, position_ids=POSITIONS.expand(3, -1), use_cache=False).logits
        ),
    }
    for name, run in runs.items():
        with counting(monkeypatch) as calls:
            found, expected = both(model, run)
        assert close(found, expected), name
        assert calls == {"ours": 2, "torch": 0}, name


def test_cu_seq_lens_alone_tell_documents_apart(monkeypatch) -> None:
    model = tiny("llama").eval()
    model.set_attn_implementation("fastsft")
    packed = model(input_ids=IDS[:1], **PACKED).logits
    ends = torch.tensor([0, 9, 10, 17], dtype=torch.int32)
    options = {"input_ids": IDS[:1], "position_ids": POSITIONS, "cu_seq_lens_q": ends}
    with counting(monkeypatch) as calls:
        assert torch.equal(model(max_length_q=9, **options).logits, packed)
        assert torch.equal(model(**options).logits, packed)
        ones = torch.ones_like(IDS[:1])
        assert torch.equal(model(attention_mask=ones, max_length_q=9, **options).logits, packed)
    assert calls == {"ours": 6, "torch": 0}
    # Positions that run on, as for a cut document, leave only cu_seq_lens_q to tell.
    on = torch.arange(17)[None]
    one = model(input_ids=IDS[:1], position_ids=on).logits
    cut = model(input_ids=IDS[:1], position_ids=on, cu_seq_lens_q=ends, max_length_q=9).logits
    assert close(cut[:, :9], one[:, :9]) and not close(cut[:, 9:], one[:, 9:])


@pytest.mark.parametrize("family", FAMILIES)
def test_restarting_positions_count_in_a_pass_with_a_cache_too(family: str) -> None:
    model = tiny(family).eval()
    model.set_attn_implementation("fastsft")
    with torch.no_grad():
        expected = model(input_ids=IDS[:1], **PACKED).logits
        assert torch.equal(model(input_ids=IDS[:1], position_ids=POSITIONS).logits, expected)
        plain = model(input_ids=IDS[:1], use_cache=False).logits
        assert torch.equal(model(input_ids=IDS[:1]).logits, plain) and not close(plain, expected)


def test_padding_has_no_gradient_and_changes_nothing() -> None:
    model = tiny("llama").train()

    def run(m: PreTrainedModel, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return gradients(m, input_ids=ids, labels=PADDED_LABELS, attention_mask=PADDING)

    model.set_attn_implementation("fastsft")
    loss, grads = run(model, IDS)
    other, theirs = run(model, torch.where(PADDING.bool(), IDS, 7))
    assert torch.equal(loss, other)
    assert_close_gradients(theirs, grads)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gemma3_text"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation(family: str, cache: str | None, monkeypatch) -> None:
    model = tiny(family).eval()
    left = PADDING.flip(0).flip(1)
    left[:, 8:] = 1

    def run(m: PreTrainedModel) -> Tensor:
        out = m.generate(
            IDS,
            attention_mask=left,
            max_new_tokens=5,
            do_sample=False,
            cache_implementation=cache,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return torch.stack(out.logits)

    with counting(monkeypatch) as calls:
        found, expected = both(model, run)
    assert close(found, expected)
    if cache is None:
        assert calls["ours"] == 2  # the prompt; after it the cache has more keys than queries


def test_torchs_attention_where_ours_cannot(monkeypatch) -> None:
    model = tiny("llama").eval()
    middle = torch.ones_like(IDS)
    middle[:, 6:8] = 0
    whole = torch.ones(3, 1, 17, 17, dtype=torch.bool).tril()
    whole[..., 3] = False
    whole[..., 3, 3] = True
    for name, options in {
        "padding in the middle": {"attention_mask": middle},
        "a mask of four dimensions": {"attention_mask": whole},
    }.items():
        with counting(monkeypatch) as calls:
            found, expected = both(
                model,
                lambda m, o=options: (
                    m(input_ids=IDS, position_ids=torch.arange(17)[None], **o).logits
                ),
                "sdpa",
            )
        assert close(found, expected), name
        assert calls == {"ours": 0, "torch": 2}, name


def test_dropout_of_attention_weights_is_torchs(monkeypatch) -> None:
    model = tiny("llama", attention_dropout=0.4).train()
    model.set_attn_implementation("fastsft")
    with counting(monkeypatch) as calls:
        torch.manual_seed(0)
        found = model(input_ids=IDS[:1], **PACKED).logits
    assert calls == {"ours": 0, "torch": 2}
    model.set_attn_implementation("sdpa")
    torch.manual_seed(0)
    assert close(found, model(input_ids=IDS[:1], **PACKED).logits)
    model.set_attn_implementation("fastsft")
    ends = torch.tensor([0, 9, 17], dtype=torch.int32)
    with pytest.raises(CannotPack, match="position_ids that restart would tell it"):
        model(input_ids=IDS[:1], cu_seq_lens_q=ends, max_length_q=9)


def test_bidirectional_blocks_keep_the_whole_mask(monkeypatch) -> None:
    """Images in a text attend both ways: transformers says so by a mask function, which no run can be."""
    model = tiny("llama").eval()
    model.set_attn_implementation("fastsft")
    blocks = torch.full((3, 17), -1)
    blocks[:, 4:9] = 0
    common = {
        "config": model.config,
        "inputs_embeds": torch.zeros(3, 17, 32),
        "attention_mask": None,
        "past_key_values": None,
    }
    layout = create_causal_mask(block_sequence_ids=blocks, **common)
    assert (
        layout.runs is None and bool(layout.mask[0, 0, 4, 8]) and not bool(layout.mask[0, 0, 3, 8])
    )
    custom = create_causal_mask(or_mask_function=lambda b, h, q, k: q == k, **common)
    assert custom.runs is None
    assert create_causal_mask(**common).runs.documents.lengths == [17, 17, 17]


def test_weights_cannot_be_had() -> None:
    model = tiny("llama").eval()
    model.set_attn_implementation("fastsft")
    with pytest.raises(CannotPack, match='use "eager"'):
        our_attention.attention(model, *[torch.zeros(1, 4, 3, 8)] * 3, None, output_attentions=True)


def test_from_pretrained_knows_the_name(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="fastsft")
    assert model.config._attn_implementation == "fastsft"
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=IDS).logits
    assert close(model(input_ids=IDS).logits, expected)
