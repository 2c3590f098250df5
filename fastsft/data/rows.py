"""One row of a data file, in any of five shapes -> a Conversation, or the reason why not.

    alpaca      instruction, input, output, system, history
    sharegpt    conversations: [{from, value}], system, tools
    messages    messages: [{role, content, tool_calls, ...}], system, tools, chat_template_kwargs
    completion  prompt, completion: two strings, or two lists of messages
    text        text

Rows come as parsed JSON, from wherever. A row that cannot be learned from becomes a BadRow with a
short reason that can be counted and a sentence that can be shown; it is never mended by guessing
and never skipped. Where data sets in the wild agree on what they mean, both spellings are taken:
JSON text where a list or an object belongs (tools, tool calls, their arguments), OpenAI's lists of
text parts (joined as they are), `developer` for system, a bare function where OpenAI wraps it in
{"type": "function"} (wrapped here, as servers do before they render). Keys of a message that this
module does not know stay on it, since templates may read them. `weight: 0` becomes `train: False`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Format = Literal["alpaca", "sharegpt", "messages", "completion", "text"]

# Every field a format reads, the needed ones first; REQUIRED says how many those are.
FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "system", "tools", "chat_template_kwargs"),
    "sharegpt": ("conversations", "system", "tools", "chat_template_kwargs"),
    "alpaca": ("instruction", "output", "input", "system", "history"),
    "completion": ("prompt", "completion", "tools", "chat_template_kwargs"),
    "text": ("text",),
}
REQUIRED = {"messages": 1, "sharegpt": 1, "alpaca": 2, "completion": 2, "text": 1}

# The roles of messages and ShareGPT alike. `function_call` is a message whose text is the call.
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "function_response", "observation", "ipython"), "tool"),
    "function_call": "function_call",
}
_CALL = "malformed tool call"  # said in several places, counted as one
TARGET_ROLES = ("system", "user", "assistant", "tool", "function_call")


@dataclass(slots=True)
class Conversation:
    """A row that can be learned from. chat: messages, tools; completion: prompt, completion; text.

    `where` is "file:number", the number 1-based: the line of a JSONL or CSV file, else the row.
    Messages are {"role": system|user|assistant|tool, "content": str, ...}; the content may be
    empty next to `tool_calls`. An assistant's `train` is there only where the row says so. The
    user message of an Alpaca row also holds its parts, as `instruction` and `input`.
    """

    kind: Literal["chat", "completion", "text"]
    where: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    prompt: str = ""
    completion: str = ""
    text: str = ""
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class BadRow:
    """A row that is not trained on. `reason` is a category to count, `detail` a full sentence."""

    where: str
    reason: str
    detail: str


class _Refused(Exception):
    """Unwinds from anywhere inside one row to the BadRow it becomes."""

    def __init__(self, reason: str, detail: str):
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Converter:
    """Rows of one format -> Conversations. Picklable, so that worker processes can hold one.

    columns: our field -> their column, for every field of the format. roles: their role -> ours.
    """

    format: Format
    columns: dict[str, str]
    roles: dict[str, str]
    system: str | None = None

    @classmethod
    def make(
        cls,
        format: Format,
        columns: dict[str, str] | None = None,
        roles: dict[str, str] | None = None,
        system: str | None = None,
    ) -> Converter:
        named = {name: name for name in FIELDS[format]} | (columns or {})
        return cls(format, named, ROLES | (roles or {}), system)

    def __call__(self, row: Any, where: str) -> Conversation | BadRow:
        try:
            if type(row) is not dict:
                raise _Refused("not an object", f"The row is {_kind(row)}, not an object.")
            return getattr(self, "_" + self.format)(row, where)
        except _Refused as refused:
            if type(row) is dict and not any(value or value == 0 for value in row.values()):
                return BadRow(where, "empty row", "The row holds nothing.")
            return BadRow(where, refused.reason, refused.detail)

    # -- the five formats ---------------------------------------------------------------------

    def _messages(self, row: dict[str, Any], where: str) -> Conversation:
        column = self.columns["messages"]
        messages = self._message_list(_json(_needed(row, column), column), column)
        return self._chat(row, where, messages)

    def _sharegpt(self, row: dict[str, Any], where: str) -> Conversation:
        column = self.columns["conversations"]
        turns = _json(_needed(row, column), column)
        if type(turns) is list:
            turns = [_from_value(turn, at) for at, turn in enumerate(turns, 1)]
        return self._chat(row, where, self._message_list(turns, column))

    def _alpaca(self, row: dict[str, Any], where: str) -> Conversation:
        instruction = _string(_needed(row, self.columns["instruction"]), "instruction")
        given = row.get(self.columns["input"])
        given = "" if given is None else _string(given, "input")
        output = row.get(self.columns["output"])
        if output is None and self.columns["output"] not in row:
            raise _missing(row, self.columns["output"])
        messages: list[dict[str, Any]] = []
        for question, answer in self._history(row):
            messages.append(
                {"role": "user", "content": question, "instruction": question, "input": ""}
            )
            messages.append({"role": "assistant", "content": answer})
        content = f"{instruction}\n{given}" if given and instruction else instruction or given
        messages.append(
            {"role": "user", "content": content, "instruction": instruction, "input": given}
        )
        messages.append({"role": "assistant", "content": output})
        for message in messages[1::2]:
            message["content"] = _answer(message["content"], "The answer")
        return self._chat(row, where, messages)

    def _completion(self, row: dict[str, Any], where: str) -> Conversation:
        names = self.columns["prompt"], self.columns["completion"]
        prompt, completion = _needed(row, names[0]), row.get(names[1])
        if completion is None:
            if names[1] not in row:
                raise _missing(row, names[1])
            raise _Refused("empty answer", f"The field {names[1]!r} is null.")
        if type(prompt) is not type(completion):
            raise _Refused(
                "wrong type",
                f"{names[0]!r} is {_kind(prompt)} but {names[1]!r} is {_kind(completion)}; "
                "both must be text, or both lists of messages.",
            )
        if type(prompt) is list:
            before = self._message_list(prompt, names[0], complete=False)
            # Only the completion is to be learned, whatever was said by the assistant before it.
            before = [{**m, "train": False} if m["role"] == "assistant" else m for m in before]
            return self._chat(row, where, before + self._message_list(completion, names[1]))
        prompt = _string(prompt, names[0])
        completion = _answer(_string(completion, names[1]), f"The field {names[1]!r}")
        return Conversation("completion", where, prompt=prompt, completion=completion)

    def _text(self, row: dict[str, Any], where: str) -> Conversation:
        column = self.columns["text"]
        text = row.get(column)
        if text is None and column not in row:
            raise _missing(row, column)
        if text is None or not _string(text, column) or text.isspace():
            raise _Refused("empty row", f"The field {column!r} is empty.")
        return Conversation("text", where, text=text)

    # -- their parts --------------------------------------------------------------------------

    def _chat(
        self, row: dict[str, Any], where: str, messages: list[dict[str, Any]]
    ) -> Conversation:
        """The checks and additions that every kind of chat row shares."""
        own = next((m["content"] for m in messages if m["role"] == "system"), None)
        given = row.get(self.columns["system"]) if "system" in self.columns else None
        if given is not None:
            given = _string(given, self.columns["system"])
            if given and own is not None and own != given:
                raise _Refused(
                    "two system messages", "The row and its messages have different system texts."
                )
        system = given or self.system
        if own is None and system:
            messages = [{"role": "system", "content": system}, *messages]
        if self.format == "alpaca":
            return Conversation("chat", where, messages)
        kwargs = _json(row.get(self.columns["chat_template_kwargs"]), "chat_template_kwargs") or {}
        if type(kwargs) is not dict:
            raise _Refused(
                "wrong type", f"'chat_template_kwargs' is {_kind(kwargs)}, not an object."
            )
        if kwargs:
            _leave_ours_alone(kwargs)
        tools = _tools(row.get(self.columns["tools"]))
        return Conversation("chat", where, messages, tools, template_kwargs=kwargs)

    def _history(self, row: dict[str, Any]) -> Iterable[tuple[str, Any]]:
        column = self.columns["history"]
        history = _json(row.get(column), column) or []
        if type(history) is not list:
            raise _Refused("wrong type", f"{column!r} is {_kind(history)}, not a list.")
        for position, pair in enumerate(history, 1):
            if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
                raise _Refused(
                    "wrong type",
                    f"Entry {position} of {column!r} is not a pair [question, answer].",
                )
            yield pair[0], pair[1]

    def _message_list(
        self, messages: Any, column: str, *, complete: bool = True
    ) -> list[dict[str, Any]]:
        """Normalised messages. complete=False: a prompt, which need not end in an answer."""
        if type(messages) is not list:
            raise _Refused(
                "wrong type", f"{column!r} is {_kind(messages)}, not a list of messages."
            )
        if not messages and complete:
            raise _Refused("empty row", f"{column!r} holds no messages.")
        return [self._message(message, at) for at, message in enumerate(messages, 1)]

    def _message(self, message: Any, at: int) -> dict[str, Any]:
        message = _json(message, f"message {at}")
        if type(message) is not dict:
            raise _Refused("wrong type", f"Message {at} is {_kind(message)}, not an object.")
        said = message.get("role")
        role = self.roles.get(said) if isinstance(said, str) else None
        content = message.get("content")
        if role is None:
            if "role" not in message:
                raise _missing(message, "role", f"Message {at}")
            known = ", ".join(sorted(self.roles))
            raise _Refused(
                "unknown role",
                f"Message {at} has the role {said!r}; known are {known}. Map it with `roles`.",
            )
        if len(message) == 2 and type(content) is str and role != "function_call":
            # The common row: nothing but a role and a text.
            if role == "assistant":
                _answer(content, f"Message {at} (assistant)")
            return message if role == said else {"role": role, "content": content}
        return self._full_message(message, role, content, at)

    def _full_message(
        self, message: dict[str, Any], role: str, content: Any, at: int
    ) -> dict[str, Any]:
        who = f"Message {at} ({role})"
        out = {key: value for key, value in message.items() if value is not None}
        calls = _json(out.pop("tool_calls", None), f"{who}: tool_calls", _CALL)
        if not calls and "function_call" in out:
            calls = [out.pop("function_call")]
        if role == "function_call":
            role, calls, content = "assistant", _json(content, f"{who}: the call", _CALL), ""
        content = _text_of(content, who)
        if "weight" in out:
            weight = out.pop("weight")
            if weight not in (0, 1):
                raise _Refused(
                    "bad weight", f"{who} has weight {weight!r}; only 0 and 1 are known."
                )
            out["train"] = weight == 1 and out.get("train", True)
        if type(out.get("train", True)) is not bool:
            raise _Refused(
                "bad train flag", f"{who} has train: {out['train']!r}, not true or false."
            )
        if calls:
            if role != "assistant":
                raise _Refused(_CALL, f"{who} calls a tool; only an assistant can.")
            out["tool_calls"] = _tool_calls(calls, who)
        elif role == "assistant":
            _answer(content, who)
        elif content is None:
            raise _Refused("null content", f"{who} has no content.")
        out["role"], out["content"] = role, content or ""
        return out


def _leave_ours_alone(kwargs: dict[str, Any]) -> None:
    """Refuse what would take the place of an argument that the trainer gives a template."""
    from fastsft.config import TEMPLATE_ARGUMENTS  # pydantic is slow to import; few rows need this

    taken = next((name for name in TEMPLATE_ARGUMENTS if name in kwargs), None)
    if taken:
        raise _Refused(
            "reserved name",
            f"'chat_template_kwargs' sets {taken!r}, which the trainer itself sets.",
        )


def _from_value(turn: Any, at: int) -> Any:
    """A ShareGPT turn in the words of messages; what is already a message stays one."""
    turn = _json(turn, f"message {at}")
    if type(turn) is not dict:
        return turn
    if "from" not in turn and "role" not in turn:
        raise _missing(turn, "from", f"Message {at}")
    if len(turn) == 2 and "from" in turn and "value" in turn:
        return {"role": turn["from"], "content": turn["value"]}
    names = {"from": "role", "value": "content"}
    return {names.get(key, key): value for key, value in turn.items() if value is not None}


def _answer(content: Any, who: str) -> str:
    if content is None:
        raise _Refused("empty answer", f"{who} is null.")
    if type(content) is not str:
        raise _Refused("wrong type", f"{who} is {_kind(content)}, not text.")
    if not content or content.isspace():
        raise _Refused("empty answer", f"{who} is empty.")
    return content


def _text_of(content: Any, who: str) -> str | None:
    """Text as it is; a list of text parts joined; None stays None; anything else is refused."""
    if content is None or type(content) is str:
        return content
    if type(content) is not list:
        raise _Refused("wrong type", f"{who}: content is {_kind(content)}, not text.")
    texts = []
    for part in content:
        kind = part.get("type", "text") if type(part) is dict else None
        if kind != "text" or type(part.get("text")) is not str:
            found = f"a part of type {kind!r}" if kind else f"{_kind(part)} in its list of parts"
            raise _Refused("not text", f"{who} holds {found}; only text parts are read.")
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(calls: Any, who: str) -> list[dict[str, Any]]:
    """OpenAI's form, arguments as an object (templates write it out as JSON themselves)."""
    out = []
    for call in calls if type(calls) is list else [calls]:
        call = _json(call, f"{who}: a tool call", _CALL)
        function = call.get("function", call) if type(call) is dict else None
        if type(function) is not dict or type(function.get("name")) is not str:
            raise _Refused(_CALL, f"{who} calls a tool without a name.")
        what = f"{who}: the arguments of {function['name']!r}"
        arguments = _json(function.get("arguments"), what, _CALL)
        if arguments and type(arguments) is not dict:
            raise _Refused(_CALL, f"{what} are {_kind(arguments)}, not an object.")
        inner = {"name": function["name"], "arguments": arguments or {}}
        wrapper = {k: v for k, v in call.items() if v is not None and k not in inner}
        out.append({"type": "function", **wrapper, "function": inner})
    return out


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    tools = _json(tools, "tools")
    if not tools:
        return None
    if type(tools) is not list:
        raise _Refused("wrong type", f"'tools' is {_kind(tools)}, not a list.")
    out = []
    for tool in tools:
        tool = _json(tool, "a tool")
        function = tool.get("function", tool) if type(tool) is dict else None
        if type(function) is not dict or type(function.get("name")) is not str:
            raise _Refused("malformed tool", "A tool of the row is not an object with a name.")
        if isinstance(function.get("parameters"), str):
            parameters = _json(function["parameters"], f"the parameters of {function['name']!r}")
            function = {**function, "parameters": parameters}
        wrapper = tool if "function" in tool else {}
        out.append({"type": "function", **wrapper, "function": function})
    return out


def _json(value: Any, what: str, reason: str = "wrong type") -> Any:
    """Text where a list or an object belongs is JSON of it; anything else stays as it is."""
    if type(value) is not str:
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise _Refused(reason, f"{what} is text that is not JSON: {error}.") from None


def _needed(row: dict[str, Any], column: str) -> Any:
    value = row.get(column)
    if value is not None:
        return value
    if column in row:
        raise _Refused("null field", f"The field {column!r} is null.")
    raise _missing(row, column)


def _missing(row: dict[str, Any], column: str, who: str = "The row") -> _Refused:
    has = ", ".join(map(repr, row)) or "nothing"
    return _Refused("missing field", f"{who} has no field {column!r}; it has {has}.")


def _string(value: Any, column: str) -> str:
    if type(value) is not str:
        raise _Refused("wrong type", f"The field {column!r} is {_kind(value)}, not text.")
    return value


def _kind(value: Any) -> str:
    """What a JSON value is, in words for a message."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), f"of type {type(value).__name__}")
