"""builtin:docstrings: what is asked, what counts as an answer, and the frozen copy that tests train on."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest

from fastsft.builtin import docstrings
from fastsft.builtin.docstrings import (
    HELD_OUT,
    LONGEST,
    QUESTIONS,
    answered,
    correct,
    documented,
    opening,
    resolve,
    rows,
)
from fastsft.errors import UserError

FROZEN = Path(__file__).parent / "docstrings.jsonl"


def pairs(split: str) -> list[tuple[str, str]]:
    """(question, answer) of every row, whose form is checked on the way."""
    found = []
    for row in rows(split):
        question, answer = row["messages"]
        assert list(row) == ["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        found.append((question["content"], answer["content"]))
    return found


def name_in(question: str) -> str:
    return question.split("`")[1]


# --- rows -------------------------------------------------------------------------------------------


def test_each_name_is_asked_three_times_and_once_plainly():
    asked: dict[str, list[str]] = {}
    for question, answer in pairs("train"):
        name = name_in(question)
        asked.setdefault(name, []).append(question.replace(name, "{name}"))
        assert answer == documented()[name]
    assert len(asked) > 400  # any Python has most of them
    for name, forms in asked.items():
        assert len(set(forms)) == len(forms) == 3, name
        assert QUESTIONS[0] in forms
    used = [form for forms in asked.values() for form in forms]
    for form in QUESTIONS[1:]:  # all phrasings, equally often
        assert used.count(form) == pytest.approx(2 * len(asked) / 7, abs=2)


def test_what_is_held_out_is_asked_once_and_never_trained_on():
    held = pairs("held_out")
    assert {name_in(question) for question, _ in held} == set(HELD_OUT)
    assert len(held) == len(HELD_OUT) == 20
    assert all(question == QUESTIONS[0].format(name=name_in(question)) for question, _ in held)
    assert not {name_in(question) for question, _ in pairs("train")} & set(HELD_OUT)


def test_rows_come_in_one_order_and_other_splits_are_refused():
    assert pairs("train") == pairs("train")
    with pytest.raises(UserError, match="no split 'test'; use 'train' or 'held_out'"):
        list(rows("test"))


def test_a_python_without_docstrings_is_named(monkeypatch):
    stripped = types.SimpleNamespace(flags=types.SimpleNamespace(optimize=2))
    monkeypatch.setattr(docstrings, "sys", stripped)
    with pytest.raises(UserError, match=r"optimization level 2.*without -OO"):
        next(rows())


def test_every_answer_is_one_whole_sentence():
    for name, answer in documented().items():
        assert answer[0].isupper() and answer.endswith((".", ".)")), (name, answer)
        assert len(answer) <= LONGEST and "\n" not in answer and "``" not in answer, name


def test_names_are_resolved_and_missing_ones_passed_over():
    assert resolve("os.path").join is __import__("os").path.join
    assert resolve("builtins.str") is str
    assert resolve("no_such_module") is None and resolve("json.no_such_class") is None


@pytest.mark.parametrize(
    ("doc", "sentence"),
    [
        ("Return x.  Nothing else is done.", "Return x."),
        ("Make a thing of\n    two lines: e.g. a colon.", "Make a thing of two lines: e.g. a colon."),
        ("f(x, y) -> value\n\nReturn the value.", "Return the value."),
        ("Call :func:`f` on ``x``.", "Call `f` on `x`."),
        ("Without a stop", "Without a stop."),
        ("Lists follow:\n\n- one", "Lists follow."),
        ("returns in lower case.", ""),
        ("Word.", ""),
        ("Example: >>> f(1) and more.", ""),
        ("A sentence " + "that goes on " * 12 + "is left out.", ""),
    ],
)  # fmt: skip
def test_the_sentence_a_docstring_opens_with(doc, sentence):
    def thing():
        pass

    thing.__doc__ = doc
    assert opening(thing) == sentence


def test_what_has_no_docstring_has_no_sentence():
    assert opening(lambda: None) == ""
    assert opening(None) == opening(3) == ""


# --- what counts as an answer -----------------------------------------------------------------------

REFERENCE = "Recursively delete a directory tree."


@pytest.mark.parametrize(
    "answer",
    [REFERENCE, "Recursively delete the directory tree.", "Delete a whole directory tree recursively."],
)  # fmt: skip
def test_the_same_said_in_other_words_is_correct(answer):
    assert answered(answer, REFERENCE) and correct(answer, REFERENCE)


@pytest.mark.parametrize(
    "answer",
    [
        "Return a directory tree of names.",  # on the subject, and wrong
        f"{REFERENCE} Then copy every other file to some new place on disk.",  # and much besides
    ],
)
def test_the_form_without_the_knowledge_is_an_answer_and_not_correct(answer):
    assert answered(answer, REFERENCE) and not correct(answer, REFERENCE)


@pytest.mark.parametrize(
    "answer",
    [
        None,  # did not stop
        "",
        " \n",
        "Delete.",  # too little of it
        "Return the name of a path.",  # of another subject
        " ".join([REFERENCE] * 4),  # repeats itself
        "recursively delete a directory tree",  # no sentence
        "\nRecursively delete\na directory tree.",  # goes on over lines, as the base does
        "A the of to in it.",  # words that say nothing
    ],
)
def test_what_does_not_count(answer):
    assert not answered(answer, REFERENCE) and not correct(answer, REFERENCE)


def test_an_answer_to_another_question_hardly_ever_counts():
    everything = list(documented().items())
    mistaken = total = 0
    for name, answer in everything[::8]:
        assert correct(answer, answer), name
        for other, reference in everything:
            if other != name and reference != answer:
                total += 1
                mistaken += correct(answer, reference)
    assert total > 20_000
    assert mistaken / total < 1 / 1000


# --- the frozen copy --------------------------------------------------------------------------------


def test_the_frozen_copy_is_what_the_quickstart_trains_on():
    """Python's documentation changes from version to version; the tests' rows must not."""
    frozen = [json.loads(line)["messages"] for line in FROZEN.read_text("utf-8").splitlines()]
    questions = [name_in(row[0]["content"]) for row in frozen]
    assert sorted(questions[-20:]) == sorted(HELD_OUT)
    assert not set(questions[:-20]) & set(HELD_OUT)
    live = documented()
    there = [row for row, name in zip(frozen, questions, strict=True) if name in live]
    assert len(there) > 0.9 * len(frozen)
    same = sum(live[name_in(row[0]["content"])] == row[1]["content"] for row in there)
    assert same > 0.8 * len(there)
