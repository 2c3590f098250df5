"""The encoder: which ids, which of them trained, and what it refuses."""

from __future__ import annotations

import pickle
from importlib import resources

import numpy as np
import pytest
from golden_masks import CALL, CASES, DATE, ONE, WEATHER, template_for, tokenizer_for, turn
from tiny_tokenizers import byte_level, folder, metaspace

from fastsft.data.encode import Encoded, Encoder, encode_prompt
from fastsft.data.rows import BadRow, Conversation, Converter
from fastsft.data.templates import OURS, resolve_template
from fastsft.data.tokenizer import Tokenizer
from fastsft.errors import UserError

UNTAGGED_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THREE = CASES["3 turns"][0]


def tokenizer_with(
    path, backend=None, *, control=("<|im_start|>", "<|im_end|>"), **more
) -> Tokenizer:
    more = {"eos_token": "<|endoftext|>", **more}
    return Tokenizer.load(folder(path, backend or byte_level(), control=control, **more))


def encoder_with(tokenizer, choice="chatml", *, template_kwargs=None, **options) -> Encoder:
    template = resolve_template(choice, tokenizer, kwargs=template_kwargs or {}, date=DATE)
    return Encoder(tokenizer, template, **options)


def chat(messages, tools=None, **more) -> Conversation:
    return Conversation("chat", "data.jsonl:7", messages, tools, **more)


def one(encoder, row) -> Encoded:
    (result,) = encoder.encode([row])
    assert isinstance(result, Encoded), result
    return result


def learned(encoder, row) -> list[list[str]]:
    """The trained runs of every sequence, decoded."""
    out = []
    for ids, trained in one(encoder, row).sequences:
        assert ids.dtype == np.int32 and trained.dtype == bool and len(ids) == len(trained)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], trained.astype(int), [0]])))
        runs = zip(edges[::2], edges[1::2], strict=True)
        out.append([encoder.tokenizer.decode(ids[a:b]) for a, b in runs])
    return out


def own_template(path, source, **more) -> Tokenizer:
    return tokenizer_with(path, template=source, **more)


# -- what is learned --------------------------------------------------------------------------------


def test_untagged_is_found_to_be_what_the_tags_say(tmp_path):
    tagged = encoder_with(tokenizer_with(tmp_path / "a"))
    found = encoder_with(own_template(tmp_path / "b", UNTAGGED_CHATML), "auto")
    for case in ("1 turn", "3 turns", "system", "padded answer", "ends with user"):
        row = chat(CASES[case][0])
        for (a, b), (c, d) in zip(
            one(tagged, row).sequences, one(found, row).sequences, strict=True
        ):
            assert a.tolist() == c.tolist() and b.tolist() == d.tolist(), case


@pytest.mark.parametrize("name", [*OURS, "tagged", "untagged"])
def test_the_prompt_at_inference_is_a_prefix_of_what_is_trained(name, tmp_path):
    tokenizer = tokenizer_for(name, tmp_path)
    template = template_for(name, tokenizer)
    encoder = Encoder(tokenizer, template)
    for answer in ("Two.", "\n\nTwo.", "  two", "\ttwo", "12", "</think>x", "é漢🙂", "'s", "a  "):
        for question in ("What?", "x  ", "x\n", "x\n\n", "1"):
            messages = [turn("user", question), turn("assistant", answer)]
            ids, trained = one(encoder, chat(messages)).sequences[0]
            prompt = tokenizer.encode(
                template.render(messages[:1], add_generation_prompt=True).text
            )
            first = int(trained.argmax())
            assert ids[:first].tolist() == prompt, (question, answer)
            end = len(ids) - int(trained[::-1].argmax())
            assert ids[:end][-1] in (*template.stop_ids, *tokenizer.encode("\n")[-1:])


def test_each_turn_alone_where_a_template_rewrites_the_past(tmp_path):
    """Mistral's way: the tools stand before the last question, so no turn's prompt is a common prefix."""
    source = (
        "{% for m in messages %}{% if tools and loop.index0 == (messages | map(attribute='role') | list"
        " | join(' ')).split('user') | length * 2 - 4 %}<|im_start|>tools {{ tools | tojson }}{% endif %}"
        "<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    encoder = encoder_with(own_template(tmp_path, source), "auto")
    result = one(encoder, chat(THREE, [WEATHER]))
    assert learned(encoder, chat(THREE, [WEATHER])) == [
        ["Two.<|im_end|>"], ["Four.<|im_end|>"], ["No.<|im_end|>"]
    ]  # fmt: skip
    lengths = [len(ids) for ids, _ in result.sequences]
    assert result.extra_tokens == sum(lengths) - max(lengths)
    assert result.notes == ("one sequence per trained turn",)
    assert len(one(encoder, chat(THREE)).sequences) == 1  # without tools nothing moves
    with pytest.raises(UserError, match="multi_turn: joint would not train what inference sees"):
        one(encoder_with(encoder.tokenizer, "auto", multi_turn="joint"), chat(THREE, [WEATHER]))


def test_an_answer_that_cannot_be_told_from_its_prompt_is_an_error(tmp_path):
    source = (
        "{{ messages | length }}{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    encoder = encoder_with(own_template(tmp_path, source), "auto")
    with pytest.raises(UserError) as caught:
        one(encoder, chat(ONE))
    message = str(caught.value)
    assert (
        "data.jsonl:7" in message and "message 2" in message and "chat_template: chatml" in message
    )
    assert (
        "'1<|im_start|>user What is 1+1" in message and "'2<|im_start|>user What is 1+1" in message
    )


def test_multi_turn_per_turn(tmp_path):
    expected = [["Two.<|im_end|>"], ["Four.<|im_end|>"], ["No.<|im_end|>"]]
    for source in (None, UNTAGGED_CHATML):
        tokenizer = tokenizer_with(tmp_path / str(source is None), template=source)
        encoder = encoder_with(tokenizer, "auto", multi_turn="per_turn")
        assert learned(encoder, chat(THREE)) == expected
    with pytest.raises(UserError, match="per_turn with train_on: all"):
        encoder_with(tokenizer, "auto", multi_turn="per_turn", train_on="all")


def test_a_tagged_template_that_drops_thoughts_gives_each_turn_its_own_sequence(tmp_path):
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {% if m.role == 'assistant' %}{% generation %}"
        "{% if loop.last %}{{ m.reasoning_content }};{% endif %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    encoder = encoder_with(own_template(tmp_path, source), "auto")
    assert learned(encoder, chat(CASES["thinking"][0])) == [
        ["Add them.;Two.<|im_end|>"], ["Count again.;Yes.<|im_end|>"]
    ]  # fmt: skip


def flagged(*flags) -> list[dict]:
    messages = [dict(m) for m in THREE]
    for i, flag in flags:
        messages[i]["train"] = flag
    return messages


@pytest.mark.parametrize("source", [None, UNTAGGED_CHATML], ids=["tagged", "untagged"])
def test_train_on(source, tmp_path):
    tokenizer = tokenizer_with(tmp_path, template=source)
    everything = encoder_with(tokenizer, "auto", train_on="all")
    (all_runs,) = learned(everything, chat(THREE))
    (_, trained) = one(everything, chat(THREE)).sequences[0]
    assert not trained[0] and trained[1:].all() and len(all_runs) == 1
    last = encoder_with(tokenizer, "auto", train_on="last")
    assert learned(last, chat(THREE)) == [["No.<|im_end|>"]]
    assistant = encoder_with(tokenizer, "auto")
    off = chat(flagged((1, False), (3, True)))
    assert learned(assistant, off) == [["Four.<|im_end|>", "No.<|im_end|>"]]
    (first, second) = learned(everything, off)[0]
    assert "Two." not in first + second and second.startswith("\n<|im_start|>user\nAnd")
    silent = chat(flagged((1, False), (3, False), (5, False)))
    assert assistant.encode([silent])[0].reason == "nothing to train"
    assert last.encode([chat(flagged((5, False)))])[0].reason == "nothing to train"


@pytest.mark.parametrize("source", [None, UNTAGGED_CHATML], ids=["tagged", "untagged"])
def test_rows_without_an_answer_are_for_train_on_all(source, tmp_path):
    tokenizer = tokenizer_with(tmp_path, template=source)
    everything = encoder_with(tokenizer, "auto", train_on="all")
    rows = [{"messages": THREE[:1]}, {"messages": [{**m, "weight": 0} for m in THREE[:2]]}]
    asked, silent = (Converter.make("messages")(row, "data.jsonl:7") for row in rows)
    _, trained = one(everything, asked).sequences[0]
    assert not trained[0] and trained[1:].all()
    (refused,) = everything.encode([silent])
    assert refused.reason == "nothing to train" and "No message" in refused.detail
    for train_on in ("assistant", "last"):
        encoder = encoder_with(tokenizer, "auto", train_on=train_on)
        for result in encoder.encode([asked, silent]):
            assert result.reason == "nothing to train" and "No assistant" in result.detail


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_only_an_answer_can_be_asked_to_be_trained(role, tmp_path):
    """What else `train: true` might mean nobody can say: no template marks where a question ends."""
    tokenizer = tokenizer_with(tmp_path, template=UNTAGGED_CHATML)
    messages = [turn("user", "Hello."), turn(role, "Hi.", weight=1), turn("assistant", "Two.")]
    row = Converter.make("messages")({"messages": messages}, "data.jsonl:7")
    for train_on in ("assistant", "last"):
        (refused,) = encoder_with(tokenizer, "auto", train_on=train_on).encode([row])
        assert isinstance(refused, BadRow)
        assert refused.reason == "only an assistant's message can be trained"
        assert f"Message 2 ({role})" in refused.detail
    assert one(encoder_with(tokenizer, "auto", train_on="all"), row).sequences[0][1][1:].all()


def test_train_on_all_leaves_out_every_bos(tmp_path):
    tokenizer = tokenizer_for("llama2", tmp_path)
    ids, trained = one(encoder_with(tokenizer, "llama2", train_on="all"), chat(THREE)).sequences[0]
    assert (ids == tokenizer.bos_id).sum() == 3
    assert (trained == (ids != tokenizer.bos_id)).all()


def test_a_user_message_can_be_left_out_of_all(tmp_path):
    tokenizer = tokenizer_with(tmp_path, template=UNTAGGED_CHATML)
    runs = learned(encoder_with(tokenizer, "auto", train_on="all"), chat(flagged((2, False))))[0]
    assert len(runs) == 2 and "And 2+2?" not in "".join(runs)


# -- nothing is lost --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, messages, tools, what",
    [
        ("<|im_start|>{{ messages[0].content }}", ONE, None, "message 2: its content is"),
        (UNTAGGED_CHATML, CASES["tools"][0], None, "message 2: its tool calls are"),
        (UNTAGGED_CHATML, ONE, [WEATHER], "the row's tools are"),
        (UNTAGGED_CHATML, CASES["thinking"][0], None, "content or reasoning_content is"),
        ("{{ messages[1].content[:3] }}<|im_end|>", ONE, None, "message 1: its content is"),
    ],
)
def test_what_a_template_leaves_out_is_an_error(source, messages, tools, what, tmp_path):
    encoder = encoder_with(own_template(tmp_path, source), "auto", train_on="all")
    if "thinking" in what or "reasoning" in what:
        encoder = encoder_with(encoder.tokenizer, "auto")
    with pytest.raises(UserError, match=f"data.jsonl:7: .*{what} missing from what chat template"):
        one(encoder, chat(messages, tools))


@pytest.mark.parametrize("multi_turn", ["joint", "auto", "per_turn"])
@pytest.mark.parametrize("tagged", [True, False])
def test_a_lost_message_is_an_error_with_or_without_tags(tagged, multi_turn, tmp_path):
    """The conversation ends with a question, and the template does not write it."""
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>a {% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% elif add_generation_prompt or not loop.last %}<|im_start|>u "
        "{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>a {% endif %}"
    )
    if not tagged:
        source = source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    encoder = encoder_with(own_template(tmp_path, source), "auto", multi_turn=multi_turn)
    assert learned(encoder, chat(THREE[:2])) == [["Two.<|im_end|>"]]
    with pytest.raises(UserError, match=r"data\.jsonl:7: message 3: its content is missing"):
        one(encoder, chat(THREE[:3]))


def test_tool_calls_are_looked_for_in_every_shape_of_conversation(tmp_path):
    """A template may write calls, but not beside words."""
    source = UNTAGGED_CHATML.replace(
        "m.content", "(m.content or (m.tool_calls[0].function | tojson if m.tool_calls else ''))"
    )
    encoder = encoder_with(own_template(tmp_path, source), "auto")
    calls = [turn("user", "x"), turn("assistant", "", tool_calls=[CALL])]
    assert '"Oslo"' in learned(encoder, chat(calls))[0][0]
    calls[1]["content"] = "Let me see."
    with pytest.raises(UserError, match="its tool calls are missing"):
        one(encoder, chat(calls))


def test_refused_rows_come_back_in_their_place(tmp_path):
    tokenizer = tokenizer_for("gemma", tmp_path)
    bad = BadRow("x:1", "unknown role", "...")
    rows = [chat(ONE), bad, chat([ONE[1]]), chat(ONE)]
    first, second, third, fourth = encoder_with(tokenizer, "gemma").encode(rows)
    assert isinstance(first, Encoded) and isinstance(fourth, Encoded) and second is bad
    assert third.reason == "template refused" and "user and assistant in turn" in third.detail


# -- control tokens in people's words ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "metaspace"])
@pytest.mark.parametrize("source", [None, UNTAGGED_CHATML], ids=["tagged", "untagged"])
def test_control_tokens_in_a_text_are_text(kind, source, tmp_path):
    backend = metaspace() if kind == "metaspace" else byte_level(kind)
    tokenizer = tokenizer_with(tmp_path, backend, template=source)
    encoder = encoder_with(tokenizer, "auto")
    messages = [
        turn("user", "Say <|im_end|> and é<|im_start|>!"),
        turn("assistant", "<|im_end|>\n<think>x</think> <|im_start|>user"),
    ]
    ids, trained = one(encoder, chat(messages)).sequences[0]
    start, end, think = (tokenizer.id_of(t) for t in ("<|im_start|>", "<|im_end|>", "<think>"))
    assert (ids == start).sum() == 2 and (ids == end).sum() == 2 and (ids == think).sum() == 1
    text = encoder.template.render(messages).text
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
    answer = tokenizer.decode(ids[trained])
    assert answer.replace(" ", "") == "<|im_end|>\n<think>x</think><|im_start|>user<|im_end|>"
    # Between the template's own control tokens the ids are those of ordinary text.
    tokenizer.backend.encode_special_tokens = True
    if kind != "metaspace":
        words = tokenizer.encode("user\nSay <|im_end|> and é<|im_start|>!")
        assert ids[1 : 1 + len(words)].tolist() == words


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "metaspace"])
@pytest.mark.parametrize("source", [None, UNTAGGED_CHATML], ids=["tagged", "untagged"])
def test_at_inference_they_are_the_same_text(kind, source, tmp_path):
    """Whoever asks, and whether the control tokens are in the question or only in the answer."""
    backend = metaspace() if kind == "metaspace" else byte_level(kind)
    tokenizer = tokenizer_with(tmp_path, backend, template=source)
    encoder = encoder_with(tokenizer, "auto")
    for system, question, answer in (
        ("Be brief.", "Say <|im_end|> and é<|im_start|>!", "No."),
        ("<|im_end|> ends it.", "Hello", " <|im_start|>user"),
        ("Be brief.", "Hello  ", "<|im_end|>"),
    ):
        messages = [turn("system", system), turn("user", question), turn("assistant", answer)]
        ids, trained = one(encoder, chat(messages)).sequences[0]
        prompt = encode_prompt(tokenizer, encoder.template, messages[:2])
        assert ids[: int(trained.argmax())].tolist() == prompt, (system, question, answer)


def test_characters_kept_for_this_are_refused(tmp_path):
    encoder = encoder_with(tokenizer_with(tmp_path))
    for text in ("x\U00100003", "x\U0010fff2", "\ud800"):
        with pytest.raises(UserError, match="the prompt cannot be read: It holds"):
            encode_prompt(encoder.tokenizer, encoder.template, [turn("user", text)])
        (result,) = encoder.encode([chat([turn("user", text), ONE[1]])])
        assert isinstance(result, BadRow) and result.reason == "not text"


# -- text and prompt/completion ---------------------------------------------------------------------


def text(words) -> Conversation:
    return Conversation("text", "data.jsonl:7", text=words)


def completion(prompt, answer) -> Conversation:
    return Conversation("completion", "data.jsonl:7", prompt=prompt, completion=answer)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_documents(adds_bos, tmp_path):
    tokenizer = tokenizer_with(tmp_path, adds_bos=adds_bos, bos_token="<s>")
    encoder = Encoder(tokenizer, None)
    words = tokenizer.encode("The capital of France")
    head = [tokenizer.bos_id] if adds_bos else []
    for given in ("The capital of France", "The capital of France<|endoftext|>"):
        ids, trained = one(encoder, text(given)).sequences[0]
        assert ids.tolist() == [*head, *words, tokenizer.eos_id]
        assert trained.tolist() == [False] + [True] * (len(ids) - 1)
    if adds_bos:
        with_bos, without = (one(encoder, text(words)).sequences[0] for words in ("<s>The", "The"))
        assert with_bos[0].tolist() == without[0].tolist()
    ids, trained = one(encoder, completion("The capital", " of France")).sequences[0]
    parts = [*tokenizer.encode("The capital"), *tokenizer.encode(" of France")]
    assert ids.tolist() == [*head, *parts, tokenizer.eos_id]
    assert tokenizer.decode(ids[trained]) == " of France<|endoftext|>"


@pytest.mark.parametrize("kind", ["gpt2", "metaspace"])
def test_a_token_astride_the_answers_start_is_split(kind, tmp_path):
    tokenizer = tokenizer_with(tmp_path, metaspace() if kind == "metaspace" else byte_level())
    encoder = Encoder(tokenizer, None)
    whole = tokenizer.encode("The capital")
    prompt = tokenizer.encode("The cap")
    assert whole[: len(prompt)] != prompt
    ids, trained = one(encoder, completion("The cap", "ital")).sequences[0]
    assert ids[: len(prompt)].tolist() == prompt and not trained[: len(prompt)].any()
    assert tokenizer.decode(ids[trained]) == "ital<|endoftext|>"
    assert tokenizer.decode(ids) == "The capital<|endoftext|>"


def test_completion_trained_as_a_whole(tmp_path):
    encoder = Encoder(tokenizer_with(tmp_path), None, train_on="all")
    _, trained = one(encoder, completion("The capital", " of")).sequences[0]
    assert not trained[0] and trained[1:].all()


def test_a_tokenizer_without_an_end_is_an_error(tmp_path):
    tokenizer = tokenizer_with(tmp_path)
    tokenizer.eos_id, tokenizer.stop_ids = None, ()
    with pytest.raises(UserError, match="names no eos_token"):
        Encoder(tokenizer, None).encode([text("x")])


# -- length -------------------------------------------------------------------------------------------


def test_overlong_conversations(tmp_path):
    tokenizer = tokenizer_with(tmp_path)
    whole = one(encoder_with(tokenizer), chat(THREE)).sequences[0]
    n = len(whole[0])
    assert one(encoder_with(tokenizer, max_length=n), chat(THREE))
    for policy in ("auto", "drop", "error"):
        (bad,) = encoder_with(tokenizer, max_length=n - 1, overlong=policy).encode([chat(THREE)])
        assert bad.reason == "too long" and f"{n} tokens, over max_length {n - 1}" in bad.detail
    cut = one(encoder_with(tokenizer, max_length=n - 3, overlong="truncate"), chat(THREE))
    assert cut.notes == ("truncated",)
    assert cut.sequences[0][0].tolist() == whole[0][: n - 3].tolist()  # no EOS invented
    assert cut.sequences[0][1].tolist() == whole[1][: n - 3].tolist()
    (bad,) = encoder_with(tokenizer, max_length=5, overlong="truncate").encode([chat(THREE)])
    assert bad.reason == "nothing to train"


@pytest.mark.parametrize("limit", [2, 7, 10])
def test_a_split_document_learns_every_token_once(limit, tmp_path):
    tokenizer = tokenizer_with(tmp_path)
    words = "The capital of France is Paris. " * 3
    ids, trained = one(Encoder(tokenizer, None), text(words)).sequences[0]
    rows = Encoder(tokenizer, None, max_length=limit).encode([text(words), text("x")])
    parts = [row.sequences[0] for row in rows[:-1]]
    assert all(1 < len(part) <= limit for part, _ in parts) and len(parts) > 1
    assert [i for part, mask in parts for i in part[mask]] == ids[trained].tolist()
    joined = [*parts[0][0], *(i for part, _ in parts[1:] for i in part[1:])]
    assert joined == ids.tolist()
    assert all(row.notes == ("split",) for row in rows[:-1]) and rows[-1].notes == ()


# -- the same by every road ---------------------------------------------------------------------------


def test_tiktoken_or_not_the_examples_are_the_same(tmp_path):
    tokenizer = tokenizer_with(tmp_path)
    rows = [chat(*case) for case in CASES.values()] + [text("x\n\n y"), completion("a ", "b")]
    rows.append(chat([turn("user", "a" * 150_000), ONE[1]]))
    fast = encoder_with(tokenizer)
    fast.encode(rows)
    assert tokenizer.fast is not None
    again = pickle.loads(pickle.dumps(fast))
    assert again.tokenizer.fast is not None and "backend" not in vars(again.tokenizer)
    slow = encoder_with(Tokenizer.load(tokenizer.folder))
    slow.tokenizer.fast_reason = "asked not to"
    for a, b, c in zip(fast.encode(rows), again.encode(rows), slow.encode(rows), strict=True):
        for (x, y), (p, q), (r, s) in zip(a.sequences, b.sequences, c.sequences, strict=True):
            assert x.tolist() == p.tolist() == r.tolist() and y.tolist() == q.tolist() == s.tolist()
    assert fast.fingerprint() == again.fingerprint() == slow.fingerprint()


def test_a_tokenizer_that_normalises(tmp_path):
    from tokenizers import normalizers

    backend = byte_level()
    backend.normalizer = normalizers.NFC()
    tokenizer = tokenizer_with(tmp_path, backend)
    encoder = encoder_with(tokenizer)
    messages = [turn("user", "cafe\u0301 \u212b"), turn("assistant", "e\u0301te\u0301")]
    ids, trained = one(encoder, chat(messages)).sequences[0]
    assert ids.tolist() == tokenizer.encode(encoder.template.render(messages).text)
    assert tokenizer.decode(ids[trained]) == "été<|im_end|>"


def test_every_fact_that_changes_ids_changes_the_fingerprint(tmp_path):
    tokenizer = tokenizer_with(tmp_path / "a")
    prints = [encoder_with(tokenizer, **more).fingerprint() for more in (
        {}, {"choice": "qwen"}, {"train_on": "last"}, {"multi_turn": "per_turn"}, {"max_length": 5},
        {"overlong": "drop"}, {"template_kwargs": {"x": 1}},
    )]  # fmt: skip
    prints.append(encoder_with(tokenizer_with(tmp_path / "b", byte_level("llama3"))).fingerprint())
    assert len(set(prints)) == len(prints)


def test_bos_twice_is_an_error(tmp_path):
    source = "{{ bos_token }}{{ bos_token }}" + UNTAGGED_CHATML
    encoder = encoder_with(own_template(tmp_path, source, bos_token="<s>"), "auto")
    with pytest.raises(UserError, match="begins with BOS twice"):
        one(encoder, chat(ONE))


def test_bos_is_not_added_to_rendered_text(tmp_path):
    encoder = encoder_with(tokenizer_with(tmp_path, bos_token="<s>", adds_bos=True))
    assert encoder.tokenizer.bos_id not in one(encoder, chat(ONE)).sequences[0][0]


# TRL's own training templates, as files: text and mask as transformers has them.
TRL_TAGGED = {
    "qwen2_5_training": ("chatml", {"thinking"}),
    "qwen3_training": ("chatml", {"system"}),
    "llama3_training": ("llama3", {"thinking", "tools"}),
    "phi3_training": ("phi3", {"thinking", "tools"}),
    "gemma3_training": ("gemma", {"thinking", "tools"}),
}


@pytest.mark.parametrize("name", TRL_TAGGED)
def test_masks_of_trl_templates(name, tmp_path):
    from transformers import AutoTokenizer

    kind, left_out = TRL_TAGGED[name]
    tokenizer = tokenizer_for(kind, tmp_path / "t")
    source = resources.files("trl") / "chat_templates" / f"{name}.jinja"
    encoder = encoder_with(tokenizer, str(source))
    theirs = AutoTokenizer.from_pretrained(str(tokenizer.folder), chat_template=source.read_text())
    for case, (messages, tools) in CASES.items():
        if case in left_out or case == "padded answer":
            continue
        got = theirs.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, trained = one(encoder, chat(messages, tools)).sequences[0]
        assert ids.tolist() == got["input_ids"], case
        assert trained.astype(int).tolist() == got["assistant_masks"], case
