"""The README shows what was measured, and nothing else."""

from bench import report


def test_the_readme_shows_the_rows_as_they_are():
    shown = report.BLOCK.search(report.README.read_text(encoding="utf-8"))
    assert shown and shown.group(0) == report.block(), "run: python -m bench.report"


def test_what_was_not_measured_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.block() == "not measured yet\n"
    (tmp_path / "training.json").write_text(
        '[{"bench": "training", "who": "trl", "error": "no such module", "cpu": "c", "cores": 2,'
        ' "versions": {"trl": "1", "transformers": "5"}}]'
    )
    assert "data preparation: not measured" in report.block()
    assert "| trl | failed: no such module | |" in report.block()
