"""From what a person names to a model that answers: a run, a checkpoint, an adapter, a model, a hub id.

    run/                        adapter/ or model/, else the newest checkpoint
    run/checkpoints/step-N/     adapter/ or model/ inside
    run/adapter/, any adapter   its base is named in adapter_config.json
    any model folder, hub id    as it is

A run's config.yaml says what an adapter cannot: whether its base was quantised, which the adapter was
trained to correct, and the system message and template arguments of its chats. It counts only where it
names the same base model.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastsft.device import check_device, choose_dtype
from fastsft.disk import STEP_NAME
from fastsft.errors import UserError
from fastsft.model.adapter import load_adapter
from fastsft.model.context import StepContext
from fastsft.model.files import read_adapter_config
from fastsft.model.load import is_prequantized, load_model, resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastsft.config import Config
    from fastsft.data.templates import Template
    from fastsft.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Subject:
    """What a name led to. `folder`: the model, or the adapter on the model called `base`.

    trusted: whoever asks lets the Python code beside the model run; a run's config may have said so too.
    """

    folder: Path
    base: str | None
    revision: str | None
    config: Config | None
    trusted: bool = False

    @property
    def trust_remote_code(self) -> bool:
        return self.trusted or (self.config is not None and self.config.trust_remote_code)

    def base_folder(self) -> Path:
        """The folder of the weights the adapter (if any) sits on."""
        return self.folder if self.base is None else resolve_model(self.base, self.revision)

    def quantized(self) -> bool:
        """Whether the base is to be in NF4: it was in training, or is so in its files."""
        if self.config is not None and self.base is not None and self.config.method == "qlora":
            return True
        return is_prequantized(self.base_folder())


def locate(name: str, *, trust_remote_code: bool = False) -> Subject:
    """Find out what `name` is. Raises UserError where it is none of the things above."""
    trusted = trust_remote_code
    path = Path(name).expanduser()
    if not path.is_dir():
        return Subject(resolve_model(name), None, None, None, trusted)
    product = _product(path)
    config = _run_config(product)
    if not (product / "adapter_config.json").is_file():
        return Subject(product, None, None, config, trusted)
    settings = read_adapter_config(product)
    base = settings.get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"{product}/adapter_config.json names no base model; add base_model_name_or_path"
        )
    if config is not None and config.model != base:
        config = None
    return Subject(product, base, settings.get("revision"), config, trusted)


def _product(path: Path) -> Path:
    """The adapter or model folder that `path` is, holds, or has a checkpoint of."""
    checkpoints = [p for p in path.glob("checkpoints/step-*") if STEP_NAME.fullmatch(p.name)]
    newest = sorted(checkpoints, key=lambda p: int(p.name.removeprefix("step-")))[-1:]
    for folder in (path, *(p / kind for p in (path, *newest) for kind in ("adapter", "model"))):
        if any((folder / file).is_file() for file in ("adapter_config.json", "config.json")):
            return folder
    raise UserError(
        f"{path} holds neither a run (adapter/, model/ or checkpoints/), nor an adapter "
        "(adapter_config.json), nor a model (config.json)"
    )


def _run_config(product: Path) -> Config | None:
    """The config of the run that `product` lies in, if it lies in one."""
    from fastsft.config import load_config

    run = product.absolute().parent
    if STEP_NAME.fullmatch(run.name):
        run = run.parent.parent
    written = run / "config.yaml"
    if product.name not in ("adapter", "model") or not written.is_file():
        return None
    return load_config(written)


def load_subject(
    subject: Subject, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, Tokenizer, Template | None]:
    """Model (evaluation mode, adapter applied but not merged), tokenizer, and template if there is one.

    device: default the GPU if there is one; one that torch cannot use is a UserError.
    """
    device = check_device() if device is None else torch.device(device)
    wanted = subject.config.dtype if subject.config is not None else "auto"
    base = subject.base_folder()
    model = load_model(
        base,
        quantize=subject.quantized(),
        dtype=answer_dtype(wanted, device),
        device=device,
        trust_remote_code=subject.trust_remote_code,
    )
    if subject.base is not None:
        load_adapter(subject.folder, model, StepContext())
    model.eval()
    tokenizer = load_tokenizer(subject)
    return model, tokenizer, load_template(subject, tokenizer)


def answer_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The run's dtype, else bf16 on a card that has it and fp32 elsewhere.

    A run trained in bf16 answers in fp32, which holds all its values, on a card without bf16.
    """
    return choose_dtype("auto" if wanted == "bf16" and device.type == "cuda" else wanted, device)


def load_tokenizer(subject: Subject) -> Tokenizer:
    """The tokenizer that was saved with the adapter; an adapter without one uses its base's."""
    from fastsft.data.tokenizer import Tokenizer, holds_tokenizer

    folder = subject.folder if holds_tokenizer(subject.folder) else subject.base_folder()
    return Tokenizer.load(folder, trust_remote_code=subject.trust_remote_code)


def load_template(subject: Subject, tokenizer: Tokenizer) -> Template | None:
    """The template saved with the tokenizer, filled in as in training; None for a model without one."""
    if tokenizer.chat_template is None:
        return None
    from fastsft.data.templates import resolve_template

    config = subject.config
    stop = [] if config is None or config.stop == "auto" else config.stop
    date = datetime.date.today().isoformat()
    if config is not None and config.date != "auto":
        date = config.date
    return resolve_template(
        "auto",
        tokenizer,
        kwargs=config.chat_template_kwargs if config else {},
        date=date,
        extra_stop=stop if isinstance(stop, list) else [stop],
    )


def load_for_inference(name: str) -> tuple[PreTrainedModel, Tokenizer, Template | None]:
    """`locate` and `load_subject` in one: for whoever needs a model and not where it came from."""
    return load_subject(locate(name))
