"""Our templates and masks: frozen, and against transformers and TRL's copies of published templates."""

from __future__ import annotations

import os
import pickle
from importlib import resources

import numpy as np
import pytest
from golden_masks import CASES, DATE, GOLDEN, NAMES, ONE, template_for, tokenizer_for, turn, written
from tiny_tokenizers import byte_level, folder

from fastsft.data.encode import Encoder
from fastsft.data.rows import Conversation
from fastsft.data.templates import OURS, Template, TemplateRefused, our_source, resolve_template
from fastsft.data.tokenizer import Tokenizer
from fastsft.errors import UserError


@pytest.mark.parametrize("name", NAMES)
def test_golden(name, tmp_path):
    file = GOLDEN / f"{name}.txt"
    text = written(name, tmp_path)
    if os.environ.get("FASTSFT_UPDATE_GOLDEN"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("tagged", "untagged")])
def test_text_and_mask_as_transformers_has_them(name, tmp_path):
    """The same Jinja through apply_chat_template: same text, same ids, same assistant mask."""
    from transformers import AutoTokenizer

    tokenizer = tokenizer_for(name, tmp_path)
    template = template_for(name, tokenizer)
    tokenizer.save(tmp_path / "saved", template)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    encoder = Encoder(tokenizer, template)
    compared = 0
    for case, (messages, tools) in CASES.items():
        try:
            mine = template.render(messages, tools)
        except TemplateRefused:
            continue
        assert mine.text == theirs.apply_chat_template(messages, tools=tools, tokenize=False), case
        prompt = template.render(messages[:1], tools, add_generation_prompt=True).text
        assert prompt == theirs.apply_chat_template(
            messages[:1], tools=tools, tokenize=False, add_generation_prompt=True
        )
        if case in ("tools", "thinking", "padded answer"):
            continue  # may be refused, or split at the answer's start on purpose
        got = theirs.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, trained = encoder.encode([Conversation("chat", "row", messages, tools)])[0].sequences[
            0
        ]
        assert ids.tolist() == got["input_ids"], case
        assert trained.astype(int).tolist() == got["assistant_masks"], case
        compared += 1
    assert compared == 4


# Files TRL carries for recognising published templates -> ours, and what differs on purpose.
PUBLISHED = {
    "qwen2_5": ("qwen", {"thinking"}),
    "qwen3_instruct_2507": ("qwen3", {"thinking"}),
    "llama3": ("llama3", {"tools"}),
    "gemma": ("gemma", {"system"}),
    "gemma3": ("gemma", {"padded answer"}),
    "phi3": ("phi3", {"tools"}),
}


@pytest.mark.parametrize("published", PUBLISHED)
def test_our_text_is_the_published_text(published):
    name, other = PUBLISHED[published]
    constants = {
        "special_tokens": {"bos_token": "<s>", "eos_token": ""},
        "kwargs": {},
        "date": DATE,
    }
    theirs_source = (resources.files("trl") / "chat_templates" / f"{published}.jinja").read_text()
    theirs = Template(published, theirs_source, **constants)
    ours = Template(name, our_source(name), **constants)
    compared = 0
    for case, (messages, tools) in CASES.items():
        if case in other:
            continue
        try:
            expected = theirs.render(messages, tools).text
        except TemplateRefused:
            continue
        assert ours.render(messages, tools).text == expected, case
        compared += 1
    assert compared >= 4


def test_every_template_of_ours_is_tagged_and_ends_its_spans_with_the_stop(tmp_path):
    for name in OURS:
        template = template_for(name, tokenizer_for(name, tmp_path / name))
        rendered = template.render(ONE)
        (start, end) = rendered.spans[0]
        assert template.tagged and rendered.text[start:end].endswith(template.stop[0]), name
        assert rendered.text[start:end].strip().startswith("Two."), name
        prompt = template.render(ONE[:1], add_generation_prompt=True).text
        assert prompt == rendered.text[:start], name
        assert not template.notes


def chat_tokenizer(
    path, *, template=None, control=("<|im_start|>", "<|im_end|>"), **more
) -> Tokenizer:
    where = folder(
        path, byte_level(), control=control, eos_token="<|endoftext|>", template=template, **more
    )
    return Tokenizer.load(where)


def resolve(choice, tokenizer, **more) -> Template:
    return resolve_template(choice, tokenizer, **{"kwargs": {}, "date": DATE, **more})


def test_auto_is_the_tokenizers_own_template(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, template="{{ messages[0]['content'] }}<|im_end|>")
    assert resolve("auto", tokenizer).source == tokenizer.chat_template


@pytest.mark.parametrize("name", [name for name, layout in OURS.items() if layout.automatic])
def test_auto_finds_ours_by_control_tokens(name, tmp_path):
    assert resolve("auto", tokenizer_for(name, tmp_path)).name == name


def test_auto_without_a_fitting_template_lists_the_names(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, control=("<|im_start|>",))
    with pytest.raises(UserError, match=r"no chat template.*alpaca, chatml, gemma"):
        resolve("auto", tokenizer)


def test_names(tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "a")
    assert resolve("smollm", tokenizer).name == "chatml"
    with pytest.raises(UserError, match="did you mean chatml"):
        resolve("chatlm", tokenizer)
    with pytest.raises(UserError, match=r"cannot read .*none\.jinja"):
        resolve(str(tmp_path / "none.jinja"), tokenizer)
    phi = chat_tokenizer(tmp_path / "b", control=OURS["phi4"].tokens)
    assert resolve("phi", phi).name == "phi4"
    assert (
        resolve("phi", chat_tokenizer(tmp_path / "c", control=OURS["phi3"].tokens)).name == "phi3"
    )


def test_missing_control_tokens_are_an_error_or_new_tokens(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, control=())
    with pytest.raises(
        UserError, match=r"chatml needs <\|im_start\|>, <\|im_end\|>.*new_tokens: train"
    ):
        resolve("chatml", tokenizer)
    size = tokenizer.vocab_size
    template = resolve("chatml", tokenizer, new_tokens="train")
    assert template.stop_ids[0] == size + 1 and tokenizer.vocab_size == size + 2


def test_stops_of_a_foreign_template_are_observed(tmp_path):
    foreign = (GOLDEN / "untagged.jinja").read_text()
    tokenizer = chat_tokenizer(tmp_path, template=foreign)
    template = resolve("auto", tokenizer)
    end = tokenizer.id_of("<|im_end|>")
    assert template.stop_ids == (end, tokenizer.eos_id)
    assert template.stop == ("<|im_end|>", "<|endoftext|>")
    more = resolve("auto", tokenizer, extra_stop=["<|im_start|>"])
    assert more.stop_ids[0] == tokenizer.id_of("<|im_start|>")
    with pytest.raises(UserError, match="stop: 'two words' is not one token"):
        resolve("auto", tokenizer, extra_stop=["two words"])


def test_a_stop_outside_the_tags_is_noted(tmp_path):
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>{% endfor %}"
    template = resolve("auto", chat_tokenizer(tmp_path, template=source))
    assert len(template.notes) == 1 and "no stop token stands inside" in template.notes[0]


def test_the_date_is_the_runs(tmp_path):
    source = "{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}"
    template = resolve("auto", chat_tokenizer(tmp_path, template=source))
    assert template.render(ONE).text.startswith("31 Jan 2025")
    other = resolve("auto", chat_tokenizer(tmp_path, template=source), date="2025-02-01")
    assert other.fingerprint() != template.fingerprint()


def test_kwargs_of_run_and_row(tmp_path):
    source = "{{ tone }}{{ messages[0].content }}{{ '!' if loud }}"
    template = resolve("auto", chat_tokenizer(tmp_path, template=source), kwargs={"tone": "x"})
    assert template.render(ONE).text == "xWhat is 1+1?"
    assert template.render(ONE, loud=True, tone="y").text == "yWhat is 1+1?!"
    again = pickle.loads(pickle.dumps(template))
    assert (
        again.render(ONE).text == "xWhat is 1+1?" and again.fingerprint() == template.fingerprint()
    )


def test_refusals_and_wrong_jinja(tmp_path):
    constants = {"special_tokens": {}, "kwargs": {}, "date": DATE}
    with pytest.raises(UserError, match="chat template broken, line 2"):
        Template("broken", "{{ x }}\n{% for %}", **constants)
    with pytest.raises(TemplateRefused, match="turns must alternate"):
        Template("t", "{{ raise_exception('turns must alternate') }}", **constants).render(ONE)
    with pytest.raises(TemplateRefused, match="TypeError"):
        Template("t", "{{ messages[0].content + none }}", **constants).render(ONE)
    with pytest.raises(TemplateRefused):  # the sandbox
        Template("t", "{{ messages.append(1) }}", **constants).render(list(ONE))


def test_empty_thought_of_qwen3_is_part_of_the_prompt(tmp_path):
    tokenizer = chat_tokenizer(tmp_path)
    template = resolve("qwen3", tokenizer, kwargs={"enable_thinking": False})
    rendered = template.render(ONE)
    assert (
        rendered.text[: rendered.spans[0][0]]
        == template.render(ONE[:1], add_generation_prompt=True).text
    )
    assert rendered.text[: rendered.spans[0][0]].endswith("<think>\n\n</think>\n\n")


def test_alpaca_writes_the_two_fields_apart(tmp_path):
    tokenizer = chat_tokenizer(tmp_path)
    messages = [turn("user", "Add.\n1 2", instruction="Add.", input="1 2"), turn("assistant", "3")]
    template = resolve("alpaca", tokenizer)
    text = template.render(messages).text
    assert "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3<" in text
    encoded = Encoder(tokenizer, template).encode([Conversation("chat", "row", messages)])[0]
    ids, trained = encoded.sequences[0]
    assert tokenizer.decode(ids[trained]) == "3<|endoftext|>" and isinstance(trained, np.ndarray)


def test_the_sandbox_renders_as_transformers_does(tmp_path):
    """Block trimming, loop controls, helpers, thoughts under other names: what real templates lean on."""
    from transformers import AutoTokenizer

    source = """
    {%- set state = namespace(n=0) %}
    {% for m in messages %}
        {% if m.role == 'system' %}
            {% continue %}
        {% endif %}
  {{ loop.index }} {{ m.role }} {{ m.content | tojson }} {{ {'a': '<é>'} | tojson(indent=2) }}
        {% set state.n = state.n + 1 %}
        {% if m.thinking %}[{{ m.thinking }}|{{ m.reasoning_content }}]
        {% endif %}
    {% endfor %}
    {# a comment #}
    {{ state.n }} {{ bos_token }}{{ eos_token }}{{ pad_token }} {{ documents is none }} {{ tools | length }}
    {% for key, value in tools[0].function | items %}
        {{ key }}{% if loop.index == 2 %}{% break %}{% endif %}
    {% endfor %}

"""
    tokenizer = chat_tokenizer(tmp_path, template=source, bos_token="<s>")
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    messages = [turn("system", "x"), *CASES["thinking"][0], turn("user", "<b>\n")]
    tools = CASES["tools"][1]
    expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
    assert resolve("auto", tokenizer).render(messages, tools).text == expected
