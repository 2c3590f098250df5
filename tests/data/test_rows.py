"""Rows of the five formats -> Conversations: what is accepted, and every way of being refused."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from fastsft.data.rows import BadRow, Conversation, Converter

WHERE = "data/train.jsonl:37"
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello."}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def good(format: Any, row: Any, **options: Any) -> Conversation:
    result = Converter.make(format, **options)(row, WHERE)
    assert isinstance(result, Conversation), result
    assert result.where == WHERE
    return result


def bad(format: Any, row: Any, **options: Any) -> BadRow:
    result = Converter.make(format, **options)(row, WHERE)
    assert isinstance(result, BadRow), result
    assert result.where == WHERE and result.detail.endswith(".")
    return result


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def said(result: Conversation) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in result.messages]


# -- alpaca ---------------------------------------------------------------------------------------


def test_alpaca_with_input_system_and_history():
    row = {
        "instruction": "And now?",
        "input": "5",
        "output": "Six.",
        "system": "Count.",
        "history": [["One?", "Two."], ["Three?", "Four."]],
    }
    result = good("alpaca", row)
    assert result.kind == "chat"
    assert said(result) == [
        ("system", "Count."),
        ("user", "One?"),
        ("assistant", "Two."),
        ("user", "Three?"),
        ("assistant", "Four."),
        ("user", "And now?\n5"),
        ("assistant", "Six."),
    ]
    # The parts, for prompt layouts that place them apart.
    assert (result.messages[5]["instruction"], result.messages[5]["input"]) == ("And now?", "5")
    assert (result.messages[1]["instruction"], result.messages[1]["input"]) == ("One?", "")


@pytest.mark.parametrize("given", [{}, {"input": ""}, {"input": None}])
def test_alpaca_without_input_adds_nothing(given):
    result = good("alpaca", {"instruction": "Go", "output": "Gone", **given})
    assert said(result) == [("user", "Go"), ("assistant", "Gone")]


def test_alpaca_columns_are_mapped():
    row = {"question": "Go", "answer": "Gone", "output": "not this"}
    result = good("alpaca", row, columns={"instruction": "question", "output": "answer"})
    assert said(result) == [("user", "Go"), ("assistant", "Gone")]


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        ({"output": "x"}, "missing field", "'instruction'"),
        ({"instruction": "x"}, "missing field", "'output'"),
        ({"instruction": None, "output": "x"}, "null field", "'instruction'"),
        ({"instruction": "x", "output": None}, "empty answer", "null"),
        ({"instruction": "x", "output": " \n"}, "empty answer", "empty"),
        ({"instruction": "x", "output": 5}, "wrong type", "a number"),
        ({"instruction": ["x"], "output": "y"}, "wrong type", "a list"),
        ({"instruction": "x", "output": "y", "input": {}}, "wrong type", "an object"),
        ({"instruction": "x", "output": "y", "history": "no"}, "wrong type", "JSON"),
        ({"instruction": "x", "output": "y", "history": {"a": 1}}, "wrong type", "an object"),
        ({"instruction": "x", "output": "y", "history": [["q"]]}, "wrong type", "Entry 1"),
        ({"instruction": "x", "output": "y", "history": [["q", None]]}, "empty answer", "null"),
        ({"instruction": "", "input": "", "output": ""}, "empty row", "nothing"),
        ({}, "empty row", "nothing"),
    ],
)
def test_alpaca_refused(row, reason, words):
    result = bad("alpaca", row)
    assert result.reason == reason and words in result.detail


# -- messages -------------------------------------------------------------------------------------


def test_messages_pass_and_are_not_copied_needlessly():
    row = chat({"role": "system", "content": "S"}, USER, ANSWER)
    result = good("messages", row)
    assert result.messages == row["messages"] and result.tools is None
    assert result.messages[1] is row["messages"][1]


def test_developer_is_system_and_roles_can_be_mapped():
    row = chat({"role": "developer", "content": "S"}, {"role": "Kunde", "content": "Hi"}, ANSWER)
    assert said(good("messages", row, roles={"Kunde": "user"}))[:2] == [
        ("system", "S"),
        ("user", "Hi"),
    ]
    assert "'Kunde'" in bad("messages", row).detail


def test_configured_system_only_where_a_row_has_none():
    assert said(good("messages", chat(USER, ANSWER), system="S"))[0] == ("system", "S")
    own = chat({"role": "system", "content": "Own"}, USER, ANSWER)
    assert said(good("messages", own, system="S"))[0] == ("system", "Own")
    assert len(good("messages", own, system="S").messages) == 3
    column = chat(USER, ANSWER, system="Row")
    assert said(good("messages", column, system="S"))[0] == ("system", "Row")
    # An empty system message is a system message: it silences a template's default.
    silent = chat({"role": "system", "content": ""}, USER, ANSWER)
    assert said(good("messages", silent, system="S"))[0] == ("system", "")


def test_text_parts_are_joined_and_images_refused():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert said(good("messages", chat({"role": "user", "content": parts}, ANSWER)))[0][1] == "a b"
    for other in ({"type": "image_url", "image_url": {}}, {"type": "thinking", "text": "x"}, "x"):
        result = bad("messages", chat({"role": "user", "content": [*parts, other]}, ANSWER))
        kind = f"of type {other['type']!r}" if isinstance(other, dict) else "text in its list"
        assert result.reason == "not text" and kind in result.detail


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        json.dumps([CALL]),
        [json.dumps(CALL)],
        [{"name": "f", "arguments": {"a": 1}}],
        {"name": "f", "arguments": '{"a": 1}'},
        [{"function": {"name": "f", "arguments": '{"a": 1}'}, "index": None}],
    ],
)
def test_tool_calls_in_every_spelling(calls):
    tools = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    row = chat(USER, {"role": "assistant", "content": None, "tool_calls": calls}, tools=[tools])
    result = good("messages", row)
    assert result.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_tool_call_ids_names_and_unknown_keys_stay():
    call = {"id": "c1", "name": "f", "arguments": ""}
    reply = {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "f", "tool_calls": None}
    answer = {**ANSWER, "reasoning_content": "Hm.", "mood": "calm"}
    asked = {"role": "assistant", "tool_calls": [call]}
    result = good("messages", chat(USER, asked, reply, answer))
    assert result.messages[1]["tool_calls"][0] == {
        "type": "function",
        "id": "c1",
        "function": {"name": "f", "arguments": {}},
    }
    assert result.messages[2] == {k: v for k, v in reply.items() if k != "tool_calls"}
    assert result.messages[3] == answer


def test_legacy_function_call_and_function_role():
    asked = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "f", "arguments": "{}"},
    }
    result = good("messages", chat(USER, asked, {"role": "function", "content": "1"}, ANSWER))
    assert result.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    assert result.messages[2]["role"] == "tool" and "function_call" not in result.messages[1]


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        json.dumps([TOOL]),
        [json.dumps(TOOL)],
        [TOOL["function"]],
        [{"name": "f", "parameters": '{"type": "object"}'}],
    ],
)
def test_tools_in_every_spelling(tools):
    assert good("messages", chat(USER, ANSWER, tools=tools)).tools == [TOOL]


@pytest.mark.parametrize("tools", [None, "", [], "[]"])
def test_no_tools_is_none(tools):
    assert good("messages", chat(USER, ANSWER, tools=tools)).tools is None


@pytest.mark.parametrize(
    ("given", "train"),
    [
        ({"weight": 0}, False),
        ({"weight": 1}, True),
        ({"weight": 1.0}, True),
        ({"train": False}, False),
        ({"train": True, "weight": 0}, False),
        ({"train": False, "weight": 1}, False),
        ({"weight": None, "train": None}, None),
    ],
)
def test_weight_becomes_train(given, train):
    answer = good("messages", chat(USER, {**ANSWER, **given}, USER, ANSWER)).messages[1]
    assert "weight" not in answer and answer.get("train") is train


def test_template_kwargs_and_message_lists_as_json_text():
    row = {"messages": json.dumps([USER, ANSWER]), "chat_template_kwargs": '{"thinking": false}'}
    result = good("messages", row)
    assert result.messages == [USER, ANSWER] and result.template_kwargs == {"thinking": False}


def assistant(**given: Any) -> dict[str, Any]:
    return chat(USER, {"role": "assistant", **given})


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        ("text", "not an object", "text"),
        ([USER, ANSWER], "not an object", "a list"),
        (None, "not an object", "null"),
        ({"messages": []}, "empty row", "nothing"),
        ({"messages": [], "id": 1}, "empty row", "no messages"),
        ({"id": 1}, "missing field", "it has 'id'"),
        ({"messages": None, "id": 1}, "null field", "'messages'"),
        ({"messages": 5}, "wrong type", "a number"),
        ({"messages": "oops"}, "wrong type", "not JSON"),
        ({"messages": [5]}, "wrong type", "Message 1 is a number"),
        (chat({"content": "x"}, ANSWER), "missing field", "Message 1"),
        (
            chat(USER, {"role": "bot", "content": "x"}),
            "unknown role",
            "Message 2 has the role 'bot'",
        ),
        (chat({"role": ["user"], "content": "x"}, ANSWER), "unknown role", "['user']"),
        (chat({"role": "user", "content": None}, ANSWER), "null content", "Message 1"),
        (chat({"role": "user"}, ANSWER), "null content", "Message 1"),
        (chat({"role": "tool", "content": {"a": 1}}, ANSWER), "wrong type", "an object"),
        (assistant(content=None), "empty answer", "Message 2 (assistant) is null"),
        (assistant(), "empty answer", "null"),
        (assistant(content=""), "empty answer", "empty"),
        (assistant(content=[]), "empty answer", "empty"),
        (assistant(content="", tool_calls=[]), "empty answer", "empty"),
        (assistant(content="x", weight=0.5), "bad weight", "0.5"),
        (assistant(content="x", weight="1"), "bad weight", "'1'"),
        (assistant(content="x", train="no"), "bad train flag", "'no'"),
        (assistant(content="x", train=1), "bad train flag", "1"),
        (assistant(content="x", weight=1, train="no"), "bad train flag", "'no'"),
        (assistant(tool_calls=[{"id": "c"}]), "malformed tool call", "without a name"),
        (assistant(tool_calls="{"), "malformed tool call", "not JSON"),
        (
            assistant(tool_calls=[{"name": "f", "arguments": "{"}]),
            "malformed tool call",
            "arguments of 'f'",
        ),
        (assistant(tool_calls=[{"name": "f", "arguments": [1]}]), "malformed tool call", "a list"),
        (chat({**USER, "tool_calls": [CALL]}, ANSWER), "malformed tool call", "only an assistant"),
        (chat(USER, ANSWER, tools={"a": 1}), "wrong type", "'tools'"),
        (chat(USER, ANSWER, tools=[{"a": 1}]), "malformed tool", "name"),
        (chat(USER, ANSWER, chat_template_kwargs=[1]), "wrong type", "chat_template_kwargs"),
        *(
            (chat(USER, ANSWER, chat_template_kwargs={name: True}), "reserved name", repr(name))
            for name in ("add_generation_prompt", "messages", "tools", "self")
        ),
        (
            chat({"role": "system", "content": "A"}, USER, ANSWER, system="B"),
            "two system messages",
            "",
        ),
    ],
)
def test_messages_refused(row, reason, words):
    result = bad("messages", row)
    assert (result.reason, words in result.detail) == (reason, True), result


# -- ShareGPT -------------------------------------------------------------------------------------


def turns(*pairs: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": what} for who, what in pairs], **more}


def test_sharegpt_roles():
    row = turns(
        ("system", "S"),
        ("human", "a"),
        ("gpt", "b"),
        ("user", "c"),
        ("chatgpt", "d"),
        ("bing", "e"),
    )
    assert said(good("sharegpt", row)) == [
        ("system", "S"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
        ("assistant", "e"),
    ]


def test_sharegpt_tools():
    call = json.dumps({"name": "f", "arguments": {"a": 1}})
    row = turns(
        ("human", "a"),
        ("function_call", call),
        ("observation", "1"),
        ("gpt", "b"),
        tools=json.dumps([TOOL["function"]]),
        system="S",
    )
    result = good("sharegpt", row)
    assert [m["role"] for m in result.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert result.messages[2]["tool_calls"] == [CALL] and result.tools == [TOOL]


def test_sharegpt_roles_override_and_flags():
    row = turns(("Q", "a"), ("A", "b"), ("Q", "c"), ("A", "d"))
    row["conversations"][1]["weight"] = 0
    result = good("sharegpt", row, roles={"Q": "user", "A": "assistant"})
    assert [m.get("train") for m in result.messages] == [None, False, None, None]


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        (turns(("human", "a"), ("robot", "b")), "unknown role", "'robot'"),
        (turns(("human", "a"), ("gpt", None)), "empty answer", "null"),
        (turns(("human", None), ("gpt", "b")), "null content", "Message 1"),
        (turns(("human", "a"), ("function_call", "f(1)")), "malformed tool call", "not JSON"),
        ({"conversations": [{"value": "a"}]}, "missing field", "'from'; it has 'value'"),
        ({"conversations": [7]}, "wrong type", "Message 1"),
        ({"conversations": {"a": 1}}, "wrong type", "not a list"),
        (turns(), "empty row", "nothing"),
    ],
)
def test_sharegpt_refused(row, reason, words):
    result = bad("sharegpt", row)
    assert (result.reason, words in result.detail) == (reason, True), result


# -- completion and text --------------------------------------------------------------------------


def test_completion_of_strings():
    result = good("completion", {"prompt": "2 + 2 =", "completion": " 4"}, system="not for these")
    assert (result.kind, result.prompt, result.completion) == ("completion", "2 + 2 =", " 4")
    assert result.messages == []
    assert good("completion", {"prompt": "", "completion": "x"}).prompt == ""


def test_completion_of_messages_trains_the_completion_alone():
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER], "tools": [TOOL]}
    result = good("completion", row, system="S")
    assert result.kind == "chat" and result.tools == [TOOL]
    assert [(m["role"], m.get("train")) for m in result.messages] == [
        ("system", None),
        ("user", None),
        ("assistant", False),
        ("user", None),
        ("assistant", None),
    ]


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        ({"completion": "x"}, "missing field", "'prompt'"),
        ({"prompt": "x"}, "missing field", "'completion'"),
        ({"prompt": None, "completion": "x"}, "null field", "'prompt'"),
        ({"prompt": "x", "completion": None}, "empty answer", "null"),
        ({"prompt": "x", "completion": ""}, "empty answer", "empty"),
        ({"prompt": "x", "completion": [ANSWER]}, "wrong type", "both"),
        ({"prompt": {}, "completion": {"a": 1}}, "wrong type", "'prompt' is an object"),
        ({"prompt": [USER], "completion": []}, "empty row", "'completion'"),
    ],
)
def test_completion_refused(row, reason, words):
    result = bad("completion", row)
    assert (result.reason, words in result.detail) == (reason, True), result


def test_text():
    result = good("text", {"body": " Once upon"}, columns={"text": "body"}, system="unused")
    assert (result.kind, result.text, result.messages) == ("text", " Once upon", [])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"id": 1}, "missing field"),
        ({"text": None, "id": 1}, "empty row"),
        ({"text": " \n"}, "empty row"),
        ({"text": 3}, "wrong type"),
    ],
)
def test_text_refused(row, reason):
    assert bad("text", row).reason == reason


def test_a_converter_pickles():
    converter = pickle.loads(pickle.dumps(Converter.make("messages", system="S")))
    assert said(converter(chat(USER, ANSWER), WHERE))[0] == ("system", "S")
