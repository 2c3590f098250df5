"""The command line: words, exit codes, and what each command calls."""

import pytest

from fastsft import cli
from fastsft.errors import UserError


def test_words_are_a_path_and_overrides():
    assert cli.split_words(["c.yaml", "lora.r=8", "data=a.jsonl"]) == (
        "c.yaml",
        ["lora.r=8", "data=a.jsonl"],
    )
    assert cli.split_words([]) == (None, [])
    with pytest.raises(UserError, match="expected one config file; got a"):
        cli.split_words(["a.yaml", "b.yaml"])


def test_no_command_and_unknown_command_exit_with_2(capsys):
    for argv in ([], ["tarin"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 2
    assert "tarin" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "none.yaml"], "config file none.yaml does not exist"),
        (["train", "data=rows.jsonl"], "model: this key is required"),
        (["data", "model=m", "data=a", "cutoff_len=3"], "here it is max_length"),
        (["eval", "somewhere", "rows.jsonl"], "name the data as data=rows.jsonl"),
        (["eval", "/nonexistent/run", "data=a.jsonl"], "/nonexistent/run"),
        (["merge", "/nonexistent/adapter", "--out", "x"], "/nonexistent/adapter"),
        (["chat", "/nonexistent/run", "--prompt", "hi"], "/nonexistent/run"),
    ],
)
def test_what_the_user_can_mend_is_one_message_and_exit_2(
    argv, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastsft: ") and message in error and "Traceback" not in error


def test_a_bug_is_not_dressed_up_as_advice(monkeypatch):
    """Anything but a UserError leaves with a traceback, so that it is reported and mended."""
    import fastsft.doctor

    def broken():
        raise RuntimeError("a bug")

    monkeypatch.setattr(fastsft.doctor, "doctor", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["doctor"])
