"""From a config to tokens: the tokenizer, the template, the encoder, and what they make of the data.

`fastsft train`, `fastsft data` and `fastsft eval` see the data through this one door, so what one shows the
other trains on. Neither torch nor transformers is imported on the way.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastsft.config import Config
from fastsft.data.encode import Encoder
from fastsft.data.prepare import Prepared, Streamed, prepare, prepare_stream
from fastsft.data.templates import Template, resolve_template
from fastsft.data.tokenizer import Tokenizer, holds_tokenizer
from fastsft.errors import UserError
from fastsft.model.files import (
    adapter_weights,
    check_weights,
    read_adapter_config,
    read_config,
    read_header,
    resolve_model,
)

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Intake:
    """Data ready to train on, and what made it so. `config` has its open ends settled."""

    config: Config
    tokenizer: Tokenizer
    template: Template | None
    data: Prepared | Streamed


def take_in(
    config: Config,
    console: Console | None = None,
    *,
    examples: int = 1,
    model_folder: Path | None = None,
    weights: bool = True,
) -> Intake:
    """Prepare the config's data. model_folder: where the model is, if that is known already.

    weights: first make sure that the model's files are whole, which data alone does not need.
    Raises UserError for a model, tokenizer, template or data that cannot be used.
    """
    folder = model_folder or resolve_model(config.model, config.revision)
    config = fit_length(config, folder)
    check_start(config, folder, weights)
    tokenizer, origin = find_tokenizer(config, folder)
    template, why_none = find_template(config, tokenizer)
    encoder = Encoder(
        tokenizer,
        template,
        train_on=config.train_on,
        multi_turn=config.multi_turn,
        max_length=config.max_length,
        overlong=config.overlong,
        no_template=why_none,
    )
    make = prepare_stream if config.streaming else prepare
    data = make(config, tokenizer, encoder, console, examples=examples)
    data.report.tokenizer = origin
    return Intake(config, tokenizer, template, data)


def check_start(config: Config, folder: Path, weights: bool) -> None:
    """Raises UserError now for files that would end the run only after all data is prepared."""
    if weights:
        check_weights(folder)
    if config.adapter is not None:
        read_adapter_config(Path(config.adapter))
        if weights:
            read_header(adapter_weights(Path(config.adapter)))


def find_tokenizer(config: Config, folder: Path) -> tuple[Tokenizer, str]:
    """The config's tokenizer, and where it is from if not from the model in `folder`.

    A continued adapter was trained on the tokenizer and the template saved with it, which need not be
    its base's; both are taken from there unless the config names others.
    """
    origin = ""
    if config.tokenizer is not None:
        folder, origin = resolve_model(config.tokenizer), config.tokenizer
    elif config.adapter is not None and holds_tokenizer(Path(config.adapter)):
        folder, origin = Path(config.adapter), f"saved with the adapter in {config.adapter}"
    return Tokenizer.load(folder, trust_remote_code=config.trust_remote_code), origin


def find_template(config: Config, tokenizer: Tokenizer) -> tuple[Template | None, str]:
    """The config's template, or None and why: a base model may train on plain text without one."""
    try:
        template = resolve_template(
            config.chat_template,
            tokenizer,
            kwargs=config.chat_template_kwargs,
            date=config.date,
            extra_stop=extra_stops(config),
            new_tokens=config.new_tokens,
        )
    except UserError as error:
        if config.chat_template != "auto" or tokenizer.chat_template is not None:
            raise
        return None, str(error)
    return template, ""


def fit_length(config: Config, folder: Path) -> Config:
    """A `max_length` beyond the model's positions is an error; the default gives way to them."""
    values = read_config(folder)
    limit = (values.get("text_config") or values).get("max_position_embeddings")
    if not isinstance(limit, int) or config.max_length <= limit:
        return config
    if "max_length" not in config.model_fields_set:
        return config.model_copy(update={"max_length": limit})
    raise UserError(
        f"max_length: {config.max_length} is beyond the {limit} positions {config.model} was made for; "
        f"set max_length={limit} or less"
    )


def extra_stops(config: Config) -> list[str]:
    """The config's own stop tokens, beyond those of tokenizer and template."""
    if config.stop == "auto":
        return []
    return [config.stop] if isinstance(config.stop, str) else list(config.stop)


def settle_date(config: Config, known: str | None = None) -> Config:
    """Fix the date a template may print: `known` (a resumed run's), else today."""
    if config.date != "auto":
        return config
    return config.model_copy(update={"date": known or datetime.date.today().isoformat()})


def show_data(config: Config, *, examples: int) -> int:
    """`fastsft data`: what the trainer will see, with `examples` rows coloured by mask."""
    from rich.console import Console

    console = Console()
    intake = take_in(settle_date(config), console, examples=examples, weights=False)
    intake.data.report.render(console, examples=examples)
    return 0
