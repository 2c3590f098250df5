"""`fastsft eval`: the loss of a run, adapter or model on data, weighted by token.

The data goes through the same door as in training (preparation.py), with the run's own settings where the
name leads to a run, so the figure is the one training would have logged. Sums are kept, never logits, and
the micro-batch size does not move the result.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fastsft.config import Config, load_config, make_config
from fastsft.console import RunConsole
from fastsft.data.loader import Layout, evaluation_batches
from fastsft.data.prepare import Prepared
from fastsft.data.tokenizer import holds_tokenizer
from fastsft.errors import UserError
from fastsft.metrics import EvalSums
from fastsft.model.compat import CompatEngine
from fastsft.model.context import StepContext
from fastsft.model.engine import CPU_MICRO_BATCH
from fastsft.model.inference import Subject, load_subject, locate
from fastsft.preparation import settle_date, take_in

# What a run's config says about how its data is read; the rest of it is about training.
READING = (
    "trust_remote_code chat_template_kwargs date system stop train_on multi_turn max_length overlong "
    "on_bad_row dtype"
).split()
GIVEN = [*READING, "data", "tokenizer", "chat_template", "micro_batch_tokens"]


def evaluate(name: str, overrides: list[str]) -> dict[str, Any]:
    """Print and return eval_loss, eval_perplexity, eval_token_accuracy and eval_tokens on `data=...`.

    Raises UserError where `name` or the data cannot be used.
    """
    subject = locate(name)
    config = _config(subject, overrides)
    subject = replace(subject, trusted=config.trust_remote_code)
    model, _, _ = load_subject(subject)
    with RunConsole() as console:
        intake = take_in(settle_date(config), console.rich, model_folder=subject.base_folder())
        assert isinstance(intake.data, Prepared)
        for line in intake.data.report.lines():
            console.print(line)
        engine = CompatEngine(model, StepContext())
        sums = EvalSums(model.device)
        store = intake.data.train
        wanted = config.micro_batch_tokens
        budget = max(CPU_MICRO_BATCH if wanted == "auto" else wanted, int(store.lengths.max()))
        layout = Layout(budget, 0.0, 1, model.device)
        for batch in evaluation_batches(store, np.arange(len(store)), layout):
            output = engine.evaluate(batch)
            sums.add(output.loss_sum, output.correct, len(batch.trained_rows))
        record = sums.record(0)
        del record["step"]
        for key, value in record.items():
            console.print(
                f"{key}: {value:,.6g}" if isinstance(value, float) else f"{key}: {value:,}"
            )
    return record


def _config(subject: Subject, overrides: list[str]) -> Config:
    """The reading half of the run's config, under the words of the command line."""
    if not any(word.startswith("data=") for word in overrides):
        raise UserError("eval needs data=..., a file or hub id to evaluate on")
    known = subject.config.model_dump() if subject.config else {}
    values = {key: known[key] for key in READING if key in known}
    values["model"] = subject.base or str(subject.folder)
    values["revision"] = subject.revision
    if holds_tokenizer(subject.folder):
        values["tokenizer"] = str(subject.folder)
    given = load_config(None, ["model=unused", *overrides])
    idle = sorted(given.model_fields_set - {"model", *GIVEN})
    if idle:
        raise UserError(
            f"eval has no use for {', '.join(idle)}; it takes {', '.join(sorted(GIVEN))}"
        )
    plain = given.model_dump()
    changed = {key: plain[key] for key in given.model_fields_set - {"model"}}
    return make_config({**values, **changed}, "command line")
