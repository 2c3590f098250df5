"""The cases of tests/golden/masks and how they are written: text with ⟦trained⟧ parts, then the ids.

⏎ stands for a newline (a line break follows it) and · for a blank at the edge of a marked part.
Written anew by `FASTSFT_UPDATE_GOLDEN=1 pytest tests/data/test_templates.py`; read the difference.
"""

from __future__ import annotations

from pathlib import Path

from tiny_tokenizers import byte_level, folder, metaspace

from fastsft.data.encode import Encoder
from fastsft.data.rows import BadRow, Conversation
from fastsft.data.templates import OURS, Template, resolve_template
from fastsft.data.tokenizer import Tokenizer
from fastsft.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden" / "masks"
FILES = ("tagged", "untagged")
NAMES = (*OURS, *FILES)
DATE = "2025-01-31"


def turn(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


ONE = [turn("user", "What is 1+1?"), turn("assistant", "Two.")]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {
    "id": "callabc12",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Oslo"}},
}
CASES: dict[str, tuple[list[dict], list[dict] | None]] = {
    "1 turn": (ONE, None),
    "3 turns": (
        [
            *ONE,
            turn("user", "And 2+2?"),
            turn("assistant", "Four."),
            turn("user", "5?"),
            turn("assistant", "No."),
        ],
        None,
    ),
    "system": ([turn("system", "Be brief."), *ONE], None),
    "tools": (
        [
            turn("user", "Is it sunny in Oslo?"),
            turn("assistant", "", tool_calls=[CALL]),
            turn("tool", "raining", tool_call_id="callabc12", name="weather"),
            turn("assistant", "No, it is raining."),
        ],
        [WEATHER],
    ),
    "thinking": (
        [
            turn("user", "What is 1+1?"),
            turn("assistant", "Two.", reasoning_content="Add them."),
            turn("user", "Sure?"),
            turn("assistant", "Yes.", reasoning_content="Count again."),
        ],
        None,
    ),
    "padded answer": ([turn("user", "  Hi\n"), turn("assistant", "\n\n  Hello there! \n")], None),
    "ends with user": ([*ONE, turn("user", "Thanks.")], None),
}


def tokenizer_for(name: str, path: Path) -> Tokenizer:
    """A tiny tokenizer with the template's control tokens, of the kind its family has."""
    if name in ("llama2", "mistral-v1", "mistral-v3"):
        control = ("[INST]", "[/INST]", "[TOOL_CALLS]") if name == "mistral-v3" else ()
        where = folder(
            path, metaspace(), control=control, adds_bos=True, bos_token="<s>", eos_token="</s>"
        )
        return Tokenizer.load(where)
    layout = OURS.get(name, OURS["chatml"])
    kind = {"llama3": "llama3", "mistral-tekken": "llama3", "granite": "digits"}.get(name, "gpt2")
    named = {"eos_token": "<|endoftext|>"}
    if name in ("llama3", "gemma", "mistral-tekken", "olmo2", "vicuna"):
        named["bos_token"] = "<s>"
    adds_bos = name in ("llama3", "vicuna")
    return Tokenizer.load(
        folder(path, byte_level(kind), control=layout.tokens, adds_bos=adds_bos, **named)
    )


def template_for(name: str, tokenizer: Tokenizer) -> Template:
    choice = str(GOLDEN / f"{name}.jinja") if name in FILES else name
    return resolve_template(choice, tokenizer, kwargs={}, date=DATE)


def shown(tokenizer: Tokenizer, ids, trained) -> str:
    parts, at = [], 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or trained[i] != trained[at]:
            text = tokenizer.decode(ids[at:i])
            if trained[at]:
                lead = len(text) - len(text.lstrip(" "))
                text = "⟦" + "·" * lead + text[lead:] + "⟧"
            parts.append(text)
            at = i
    return "".join(parts).replace("\n", "⏎\n")


def written(name: str, path: Path) -> str:
    """The golden file's text."""
    tokenizer = tokenizer_for(name, path)
    encoder = Encoder(tokenizer, template_for(name, tokenizer))
    out = []
    for case, (messages, tools) in CASES.items():
        out.append(f"==== {case}")
        try:
            result = encoder.encode([Conversation("chat", "row", messages, tools)])[0]
        except UserError as error:
            out.append(f"error: {error}")
            continue
        if isinstance(result, BadRow):
            out.append(f"bad row: {result.reason}: {result.detail}")
            continue
        for ids, trained in result.sequences:
            out += [shown(tokenizer, ids, trained), "ids: " + " ".join(map(str, ids)), ""]
        if result.notes:
            out.append("notes: " + "; ".join(result.notes))
    return "\n".join(out).rstrip() + "\n"
