"""fastsft: supervised fine-tuning of language models. `fastsft.train(config)` is `fastsft train`.

Importing this costs nothing: the trainer, and torch with it, is imported by the first call. (The module
is called trainer, not train, because importing a submodule `train` would put it in the function's place.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsft.config import Config
    from fastsft.trainer import Result

__version__ = "0.1.0"
__all__ = ["train"]


def train(config: Config | dict[str, Any]) -> Result:
    """Train as `config` says (a Config, or a mapping with the same keys) and return what was left.

    Raises fastsft.errors.UserError, a ValueError, for whatever the caller can mend.
    """
    from fastsft.trainer import train as run

    return run(config)
