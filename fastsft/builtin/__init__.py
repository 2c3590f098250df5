"""What ships inside the package, so that `fastsft train` works with no file and no download.

`builtin:tiny` is a folder like any other model folder; `builtin:docstrings` are chat rows made on
the spot from the documentation of the Python that runs. Names are resolved here and nowhere else.
"""

from __future__ import annotations

from pathlib import Path

from fastsft.errors import UserError

PREFIX = "builtin:"
MODELS = ("tiny",)


def model_path(name: str = "builtin:tiny") -> Path:
    """The folder of a built-in model; its weights are made by examples/make_tiny.py."""
    short = name.removeprefix(PREFIX)
    if short not in MODELS:
        known = ", ".join(PREFIX + model for model in MODELS)
        raise UserError(f"model: no built-in model is called {name!r}; use {known}")
    return Path(__file__).parent / short


def quickstart_path() -> Path:
    """The config that `fastsft train` runs when it is given neither a file nor model and data."""
    return Path(__file__).parent / "quickstart.yaml"
