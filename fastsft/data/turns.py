"""Which characters of a rendered conversation the model learns, and in how many sequences.

A template with generation tags says it itself. For any other, each trained turn k is found by asking
the template twice: P, the conversation before it with the generation prompt, and U, the conversation up
to and with it. U must begin with P; what follows, up to the last stop token, is the answer. If the whole
conversation begins with P + answer for every k, one sequence teaches them all. If it does not (a template
that drops earlier thoughts, or moves the tools to the last question), each turn gets its own sequence,
P + answer, exactly as inference will see it. Otherwise the template cannot be trained on as it is.

Nothing a row says may vanish on the way: every message's words must stand in the rendering, and tool
calls and tools are checked with made-up names, once per shape of conversation.

Words that spell a control token stay words (words.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastsft.data.rendering import Rendered, Template, TemplateRefused, thoughts_of
from fastsft.data.rows import BadRow, Conversation
from fastsft.data.spans import Marked
from fastsft.data.templates import OURS
from fastsft.data.tokenizer import Tokenizer
from fastsft.data.words import Words, strings_in, unfit
from fastsft.errors import UserError

TrainOn = Literal["assistant", "last", "all"]
MultiTurn = Literal["auto", "joint", "per_turn"]
_THOUGHTS = re.compile(r"</?think>")
_NO_STOP = "no stop token after the answer"
_PER_TURN = "one sequence per trained turn"


@dataclass(slots=True)
class Plan:
    """The sequences of one example, and short notes to be counted."""

    sequences: list[Marked]
    notes: list[str] = field(default_factory=list)


class Planner:
    """Conversations -> Plans under one template. Picklable."""

    def __init__(
        self, tokenizer: Tokenizer, template: Template, *, train_on: TrainOn, multi_turn: MultiTurn
    ) -> None:
        self.template, self.train_on, self.multi_turn = template, train_on, multi_turn
        self._words = Words(tokenizer)
        self._seen_shapes: set[Any] = set()
        known = (
            n for n, o in OURS.items() if all(tokenizer.id_of(t) is not None for t in o.tokens)
        )
        self._other = next(known, "chatml")

    def plan(self, row: Conversation) -> Plan | BadRow:
        """Raises UserError where the template, not the row, is at fault."""
        strings = [message["content"] for message in row.messages]
        for message in row.messages:
            if len(message) > 2:
                strings += strings_in(list(message.values()))
        if row.tools or row.template_kwargs:
            strings += strings_in([row.tools, row.template_kwargs])
        reason = unfit(strings)
        if reason:
            return BadRow(row.where, "not text", reason)
        given = row.messages, row.tools, row.template_kwargs
        if not self._words.hold_control(strings):
            return _Turns(self, row.where, *given).plan()
        plan = _Turns(self, row.where, *map(self._words.stand_in, given)).plan()
        if isinstance(plan, Plan):
            plan.sequences = [self._words.spell_out(marked) for marked in plan.sequences]
        return plan

    def check_tools(self, turns: _Turns) -> None:
        """Raises UserError where the template leaves out tools or calls of conversations like this one."""
        calling = [i for i, m in enumerate(turns.messages) if m.get("tool_calls")]
        if not calling and not turns.tools:
            return
        told = [
            (m["role"], bool(m["content"]), len(m.get("tool_calls") or ())) for m in turns.messages
        ]
        shape = (bool(turns.tools), tuple(told))
        if shape in self._seen_shapes:
            return
        messages = [_with_named_calls(i, message) for i, message in enumerate(turns.messages)]
        tools = [_named_tool(i, tool) for i, tool in enumerate(turns.tools or [])] or None
        text = turns.render(messages, tools=tools).text
        for i in calling:
            for j in range(len(turns.messages[i]["tool_calls"])):
                if f"probecall{i}x{j}x" not in text or f"probevalue{i}x{j}x" not in text:
                    raise turns.left_out(f"message {i + 1}: its tool calls are")
        for i in range(len(tools or ())):
            if f"probetool{i}x" not in text:
                raise turns.left_out("the row's tools are")
        if len(self._seen_shapes) < 10_000:
            self._seen_shapes.add(shape)

    def advice(self) -> str:
        return f"Choose a template that has generation tags, such as chat_template: {self._other}"


@dataclass(slots=True)
class _Turns:
    """One conversation on its way through the template."""

    planner: Planner
    where: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    kwargs: dict[str, Any]

    def plan(self) -> Plan | BadRow:
        trained = self._trained_turns()
        if isinstance(trained, BadRow):
            return trained
        try:
            full = self.render(self.messages)
            self.planner.check_tools(self)
            if self.planner.train_on == "all":
                return self._everything(full)
            if self.planner.template.tagged:
                return self._tagged(full, trained)
            return self._untagged(full, trained)
        except TemplateRefused as refused:
            name = self.planner.template.name
            return BadRow(
                self.where, "template refused", f"Chat template {name} refuses it: {refused}."
            )

    def render(
        self, messages: Sequence[dict[str, Any]], prompt: bool = False, tools: Any = None
    ) -> Rendered:
        template = self.planner.template
        return template.render(
            messages, tools or self.tools, add_generation_prompt=prompt, **self.kwargs
        )

    def _trained_turns(self) -> list[int] | BadRow:
        """The messages to be trained: never none."""
        turns = list(range(len(self.messages)))
        if self.planner.train_on != "all":
            asked = next((i for i in turns if self._asks_in_vain(self.messages[i])), None)
            if asked is not None:
                role = self.messages[asked]["role"]
                return BadRow(
                    self.where,
                    "only an assistant's message can be trained",
                    f"Message {asked + 1} ({role}) has train: true (or weight: 1); remove it, or set "
                    "train_on: all.",
                )
            turns = [i for i in turns if self.messages[i]["role"] == "assistant"]
        if self.planner.train_on == "last":
            turns = turns[-1:]
        turns = [i for i in turns if self.messages[i].get("train") is not False]
        if not turns:
            kind = "message" if self.planner.train_on == "all" else "assistant message"
            return BadRow(self.where, "nothing to train", f"No {kind} of the row is to be trained.")
        return turns

    @staticmethod
    def _asks_in_vain(message: dict[str, Any]) -> bool:
        """Whether a message that is no answer is to be trained: where it ends no template says."""
        return message["role"] != "assistant" and message.get("train") is True

    # -- templates with tags --------------------------------------------------------------------

    def _tagged(self, full: Rendered, trained: list[int]) -> Plan:
        multi_turn = self.planner.multi_turn
        lost = self._lost(full.text, trained)
        if multi_turn != "per_turn" and lost is None:
            return Plan([Marked(full.text, self._spans_of(full, trained))])
        if lost is not None and (multi_turn == "joint" or lost not in trained):
            raise self.left_out(self._lacking(lost))
        sequences = []
        for k in trained:
            up_to = self.render(self.messages[: k + 1])
            self._hold(up_to.text, k)
            at = len(self.render(self.messages[:k]).spans) if k else 0
            sequences.append(Marked(up_to.text, up_to.spans[at:]))
        return Plan(sequences, [_PER_TURN] if len(sequences) > 1 else [])

    def _spans_of(self, full: Rendered, trained: Sequence[int]) -> list[tuple[int, int]]:
        """The spans of some assistant turns. Almost always a span is a turn; else prefixes are counted."""
        turns = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        if len(trained) == len(turns):
            return full.spans
        if len(full.spans) == len(turns):
            return [span for i, span in zip(turns, full.spans, strict=True) if i in trained]
        spans = []
        for k in trained:
            first = len(self.render(self.messages[:k]).spans) if k else 0
            spans += full.spans[first : len(self.render(self.messages[: k + 1]).spans)]
        return spans

    # -- templates without ----------------------------------------------------------------------

    def _untagged(self, full: Rendered, trained: list[int]) -> Plan:
        answers = [self._answer(k, full) for k in trained]
        joint = all(full.text.startswith(text[:end]) for text, _, end in answers)
        notes = (
            [] if all(text.endswith(self._stop, 0, end) for text, _, end in answers) else [_NO_STOP]
        )
        lost = self._lost(full.text, trained)
        if joint and lost is None and self.planner.multi_turn != "per_turn":
            return Plan([Marked(full.text, [(start, end) for _, start, end in answers])], notes)
        if self.planner.multi_turn == "joint" and not joint:
            raise UserError(
                f"{self.where}: chat template {self.planner.template.name} writes earlier turns otherwise "
                "once the conversation goes on, so multi_turn: joint would not train what inference sees. "
                "Set multi_turn: auto or per_turn"
            )
        if lost is not None and (self.planner.multi_turn == "joint" or lost not in trained):
            raise self.left_out(self._lacking(lost))
        for k, (text, _, _) in zip(trained, answers, strict=True):
            self._hold(text, k)
        if len(answers) > 1:
            notes.append(_PER_TURN)
        return Plan([Marked(text[:end], [(start, end)]) for text, start, end in answers], notes)

    @property
    def _stop(self) -> tuple[str, ...]:
        return self.planner.template.stop

    def _answer(self, k: int, full: Rendered, prompt: bool = True) -> tuple[str, int, int]:
        """(U, start, end): the text up to and with turn k, and the answer in it up to its last stop."""
        before = self.render(self.messages[:k], prompt).text if k or prompt else ""
        text = (
            full.text if k + 1 == len(self.messages) else self.render(self.messages[: k + 1]).text
        )
        if not text.startswith(before):
            raise self._no_prefix(k, before, text)
        ends = [at + len(s) for s in self._stop if (at := text.rfind(s, len(before))) >= 0]
        return text, len(before), max(ends, default=len(text))

    def _no_prefix(self, k: int, before: str, text: str) -> UserError:
        at = next(
            (i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(text)
        )
        return UserError(
            f"{self.where}: in chat template {self.planner.template.name} message {k + 1} cannot be told "
            f"from what stands before it: behind {before[max(0, at - 30) : at]!r} the prompt goes on with "
            f"{before[at : at + 30]!r}, and with the message there it is {text[at : at + 30]!r}. "
            f"{self.planner.advice()}"
        )

    # -- everything -----------------------------------------------------------------------------

    def _everything(self, full: Rendered) -> Plan:
        """All but the messages with `train: false`."""
        lost = self._lost(full.text, [])
        if lost is not None:
            raise self.left_out(self._lacking(lost))
        spans, at = [], 0
        for k in (i for i, m in enumerate(self.messages) if m.get("train") is False):
            for start, end in self._place_of(k, full):
                spans.append((at, start))
                at = end
        spans.append((at, len(full.text)))
        return Plan([Marked(full.text, [(a, b) for a, b in spans if a < b])])

    def _place_of(self, k: int, full: Rendered) -> list[tuple[int, int]]:
        """Where message k stands in the whole conversation; an answer without its prompt."""
        answering = self.messages[k]["role"] == "assistant"
        if self.planner.template.tagged and answering:
            return self._spans_of(full, [k])
        text, start, end = self._answer(k, full, prompt=answering)
        if not full.text.startswith(text[:end]):
            raise self._no_prefix(k, text[:end], full.text)
        return [(start, end)]

    # -- nothing is lost ------------------------------------------------------------------------

    def _lost(self, text: str, trained: Sequence[int]) -> int | None:
        """The first message whose words are not in the text. Untrained turns may lose their thoughts."""
        for i, message in enumerate(self.messages):
            words = message["content"].strip()
            if words and words not in text and not self._in_parts(message, text, i in trained):
                return i
            if i in trained and thoughts_of(message).strip() not in text:
                return i
        return None

    @staticmethod
    def _in_parts(message: dict[str, Any], text: str, with_thoughts: bool) -> bool:
        """Words a template writes apart (thoughts, Alpaca's two fields) or as JSON."""
        if message.get("instruction") is not None:
            parts = [message["instruction"], message.get("input") or ""]
        else:
            parts = _THOUGHTS.split(message["content"])
            if not with_thoughts and message["role"] == "assistant":
                parts = parts[-1:]
        stripped = (part.strip() for part in parts)
        return all(part in text or _escaped(part) in text for part in stripped)

    def _hold(self, text: str, k: int) -> None:
        """Raises UserError unless turn k stands whole in the text."""
        lost = _Turns(
            self.planner, self.where, self.messages[: k + 1], self.tools, self.kwargs
        )._lost(text, [k])
        if lost is not None:
            raise self.left_out(self._lacking(lost))

    def _lacking(self, i: int) -> str:
        thoughts = " or reasoning_content" if thoughts_of(self.messages[i]) else ""
        return f"message {i + 1}: its content{thoughts} is"

    def left_out(self, what: str) -> UserError:
        return UserError(
            f"{self.where}: {what} missing from what chat template {self.planner.template.name} writes. "
            "Choose a template that writes them (chat_template: chatml writes all), or remove them "
            "from the data"
        )


def _escaped(words: str) -> str:
    return json.dumps(words, ensure_ascii=False)[1:-1]


def _with_named_calls(i: int, message: dict[str, Any]) -> dict[str, Any]:
    """The message with made-up names and arguments in its calls."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    named = [
        {
            **c,
            "function": {"name": f"probecall{i}x{j}x", "arguments": {"key": f"probevalue{i}x{j}x"}},
        }
        for j, c in enumerate(calls)
    ]
    return {**message, "tool_calls": named}


def _named_tool(i: int, tool: dict[str, Any]) -> dict[str, Any]:
    if isinstance(tool.get("function"), dict):
        return {**tool, "function": {**tool["function"], "name": f"probetool{i}x"}}
    return {**tool, "name": f"probetool{i}x"}
