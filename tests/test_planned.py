"""The README shows what the planner says, and the planner keeps what the design promised."""

import json

from bench import planned


def test_the_readme_says_what_the_planner_says():
    rows = planned.contexts() + planned.speeds()
    kept = json.loads((planned.RESULTS / "llama-3.1-8b.json").read_text(encoding="utf-8"))
    shown = planned.BLOCK.search(planned.README.read_text(encoding="utf-8"))
    assert rows == kept and shown and shown.group(0) == planned.block(kept), (
        "run: python -m bench.planned"
    )


def test_contexts_are_twice_the_published_ones():
    """The aim up to 48 GB, whatever host memory it takes; and 15k tokens on a card of 8 GB."""
    for row in planned.contexts():
        assert row["peak_bytes"] <= row["gb"] * 10**9
        assert row["tokens"] >= 2 * row["unsloth_published"]
        if row["gb"] == 8:
            assert row["tokens"] >= 15_000
