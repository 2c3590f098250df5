"""The tokenizer against transformers' and `tokenizers`' own results, and tiktoken's ids against both."""

from __future__ import annotations

import json
import pickle
import random
import re

import numpy as np
import pytest
from tiny_tokenizers import byte_level, folder, metaspace

from fastsft.data.fast_bpe import ODD_STRINGS, FastBpe, build_fast_bpe
from fastsft.data.tokenizer import Tokenizer, byte_alphabet
from fastsft.errors import UserError

CHATML = ("<|im_start|>", "<|im_end|>")


@pytest.fixture(params=["gpt2", "llama3", "digits", "metaspace"])
def tokenizer(request, tmp_path):
    backend = metaspace() if request.param == "metaspace" else byte_level(request.param)
    where = folder(
        tmp_path / "tok",
        backend,
        control=CHATML,
        bos_token="<s>",
        eos_token="</s>",
        adds_bos=request.param in ("metaspace", "llama3"),
        generation={"eos_token_id": [backend.token_to_id("a"), 5]},
    )
    return Tokenizer.load(where)


def test_same_ids_and_facts_as_transformers(tokenizer):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(tokenizer.folder))
    for text in ODD_STRINGS:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert tokenizer.decode(tokenizer.encode(text)) == theirs.decode(
            theirs.encode(text, add_special_tokens=False)
        )
    assert (tokenizer.bos_id, tokenizer.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert tokenizer.vocab_size == len(theirs)
    assert tokenizer.adds_bos == (theirs.encode("a")[0] == theirs.bos_token_id)
    assert not tokenizer.adds_eos
    assert tokenizer.stop_ids == (
        tokenizer.eos_id,
        *json.loads((tokenizer.folder / "generation_config.json").read_text())["eos_token_id"],
    )
    assert tokenizer.special_ids >= {tokenizer.id_of(t) for t in CHATML}
    assert tokenizer.id_of("<think>") not in tokenizer.special_ids


def random_texts(count: int) -> list[str]:
    draw = random.Random(0)
    alphabet = "  \n\n\t'sStreéß12漢🙂.,_-<>|aAbB the in capital of"
    return ["".join(draw.choices(alphabet, k=draw.randint(0, 60))) for _ in range(count)]


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "digits"])
def test_tiktoken_gives_the_same_ids(kind, tmp_path):
    where = folder(tmp_path, byte_level(kind), control=CHATML, eos_token="<|endoftext|>")
    tokenizer = Tokenizer.load(where)
    texts = [*ODD_STRINGS, *random_texts(2000), "<|im_start|>user\nhi<|im_end|>\n<think> x</think>"]
    expected = [tokenizer.encode(text) for text in texts]
    tokenizer.choose_fast(texts)
    assert tokenizer.fast is not None, tokenizer.fast_reason
    again = pickle.loads(pickle.dumps(tokenizer))
    assert "backend" not in vars(again)  # not parsed until asked for
    for text, ids in zip(texts, expected, strict=True):
        got = again.fast.encode(text)
        assert got.dtype == np.int32 and got.tolist() == ids, text
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


def with_spec(path, change) -> Tokenizer:
    where = folder(path, byte_level(), eos_token="<|endoftext|>")
    spec = json.loads((where / "tokenizer.json").read_text())
    change(spec)
    (where / "tokenizer.json").write_text(json.dumps(spec))
    return Tokenizer.load(where)


def test_a_token_the_merges_cannot_reach_is_left_out(tmp_path):
    """tiktoken would make it, as a whole word and by another merge; `tokenizers` never does."""

    def change(spec):  # "capi" + "tal" -> a token, but "capital" is built as other pairs first
        model = spec["model"]
        for token in ("xy", "yz", "xyz"):
            model["vocab"][token] = max(model["vocab"].values()) + 10
        model["merges"] += [["y", "z"], ["x", "y"], ["xy", "z"]]

    tokenizer = with_spec(tmp_path, change)
    ids = [tokenizer.id_of(token) for token in ("x", "yz")]
    assert tokenizer.encode("xyz") == ids
    tokenizer.choose_fast(["xyz", "wxyz"])
    assert tokenizer.fast is not None
    assert tokenizer.fast.encode("xyz").tolist() == ids
    # With Llama 3's shortcut the whole word is found, but nowhere else: no tiktoken then.
    spec = json.loads((tokenizer.folder / "tokenizer.json").read_text())
    spec["model"]["ignore_merges"] = True
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(json.dumps(spec))
    assert "xyz" in build_fast_bpe(spec, backend, byte_alphabet())
    assert backend.model.ignore_merges is True  # as it was


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda s: s["added_tokens"][0].update(lstrip=True), "byte-level"),
        (lambda s: s.update(normalizer={"type": "Lowercase"}), "byte-level"),
        (lambda s: s["model"].update(unk_token="<|endoftext|>"), "not plain"),
        (
            lambda s: s["added_tokens"].append(
                {**s["added_tokens"][0], "id": 900, "content": "<|endoftext|>x"}
            ),
            "begins another",
        ),
        (
            lambda s: s.update(
                pre_tokenizer={
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Punctuation", "behavior": "Isolated"},
                        s["pre_tokenizer"],
                    ],
                }
            ),
            "one pattern",
        ),
        (lambda s: s["model"]["merges"].extend([s["model"]["merges"][0]]), "different priority"),
    ],
)
def test_where_tiktoken_may_not_stand_in(change, reason, tmp_path):
    tokenizer = with_spec(tmp_path, change)
    tokenizer.choose_fast(["hello"])
    assert tokenizer.fast is None and reason in tokenizer.fast_reason


def test_a_difference_on_the_data_itself_turns_tiktoken_off(tmp_path):
    tokenizer = Tokenizer.load(folder(tmp_path, byte_level(), eos_token="<|endoftext|>"))
    built = build_fast_bpe(tokenizer._spec, tokenizer.backend, byte_alphabet())
    assert isinstance(built, FastBpe)
    assert built.agrees(tokenizer.backend, ["The capital"])
    pattern, pieces, specials, ids = built._state
    wrong = FastBpe(pattern.replace(r"| ?\p{L}", r"|\p{L}"), pieces, specials, ids)
    assert not wrong.agrees(tokenizer.backend, ["The capital"])


def test_long_runs_go_round_tiktoken(tmp_path):
    tokenizer = Tokenizer.load(folder(tmp_path, byte_level(), eos_token="<|endoftext|>"))
    tokenizer.choose_fast([])
    assert not tokenizer.fast.takes(" " * 200_000 + "x")
    assert tokenizer.fast.takes("x" * 1000)


def test_control_tokens_as_words_and_as_tokens_in_one_text(tokenizer):
    end = tokenizer.id_of("<|im_end|>")
    text = "a <|im_end|> b" + tokenizer.wrap("<|im_end|>") + "\n"
    ids = tokenizer.guarded.encode(text, add_special_tokens=False).ids
    assert ids.count(end) == 1
    assert tokenizer.decode(ids).strip() == "a <|im_end|> b<|im_end|>"
    at = ids.index(end)
    control_free = tokenizer.backend
    control_free.encode_special_tokens = True
    words = control_free.encode("a <|im_end|> b", add_special_tokens=False).ids
    assert ids[:at] == words


def test_added_control_tokens(tokenizer):
    size = tokenizer.vocab_size
    before = tokenizer.fingerprint()
    ids = tokenizer.add_control_tokens(["<|new|>", "<|newer|>"])
    assert ids == [size, size + 1] and tokenizer.vocab_size == size + 2
    assert tokenizer.encode("x<|new|>")[-1] == size
    assert tokenizer.special_ids >= set(ids)
    assert tokenizer.fingerprint() != before
    assert pickle.loads(pickle.dumps(tokenizer)).encode("<|newer|>")[-1] == size + 1


def test_saved_folder_loads_in_transformers(tokenizer, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.add_control_tokens(["<|new|>"])
    tokenizer.save(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    for text in (*ODD_STRINGS, "<|new|>"):
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert theirs.chat_template == tokenizer.chat_template
    generation = GenerationConfig.from_pretrained(str(tmp_path / "out"))
    assert tuple(generation.eos_token_id) == tokenizer.stop_ids


def test_a_slow_tokenizer_is_converted(tmp_path):
    """vocab.json and merges.txt without tokenizer.json, as GPT-2 was published."""
    spec = json.loads(byte_level().to_str())["model"]
    eos = "<|endoftext|>"
    spec["vocab"][eos] = len(spec["vocab"])
    (tmp_path / "vocab.json").write_text(json.dumps(spec["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(m) for m in spec["merges"]))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "GPT2Tokenizer",
                "eos_token": eos,
                "bos_token": eos,
                "unk_token": eos,
            }
        )
    )
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = Tokenizer.load(tmp_path)
    backend = byte_level()
    assert tokenizer.encode("The capital of France") == backend.encode("The capital of France").ids
    assert tokenizer.eos_id == spec["vocab"][eos]
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("The capital") == tokenizer.encode("The capital")
    tokenizer.save(tmp_path / "out")
    assert Tokenizer.load(tmp_path / "out").encode("It's 12") == tokenizer.encode("It's 12")


def test_several_named_templates(tmp_path):
    where = folder(tmp_path, byte_level(), eos_token="</s>")
    config = json.loads((where / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "tool_use", "template": "T"},
        {"name": "default", "template": "D"},
    ]
    (where / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(where).chat_template == "D"
    (where / "chat_template.jinja").write_text("J")
    assert Tokenizer.load(where).chat_template == "J"


def test_errors_name_the_file(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"no tokenizer in {tmp_path}")):
        Tokenizer.load(tmp_path)
    where = folder(tmp_path / "t", byte_level(), eos_token="</s>")
    whole = (where / "tokenizer.json").read_text()
    (where / "tokenizer.json").write_text(whole[:1000])
    with pytest.raises(UserError, match=r"tokenizer\.json is not valid JSON"):
        Tokenizer.load(where)
    (where / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="holds no tokenizer"):
        Tokenizer.load(where)


def test_the_module_imports_neither_torch_nor_transformers():
    import subprocess
    import sys

    code = (
        "import sys, fastsft.data.encode as e; print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
