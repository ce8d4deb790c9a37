"""Rung: reinforcement learning, rung by rung, from the Bellman equation to reasoning language models.

The public names are few, and loaded when they are used:

    load, generate, Model               a language model, and text out of it
    train, resume, evaluate, estimate   a run (`rung.recipes` makes them), its continuation, an accuracy, a forecast
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rung.model.generate import Generation as Generation
    from rung.model.generate import generate as generate
    from rung.model.model import Model as Model
    from rung.model.model import load as load
    from rung.train.estimate import estimate as estimate
    from rung.train.evaluate import evaluate as evaluate
    from rung.train.run import Run as Run
    from rung.train.run import resume as resume

__version__ = "0.1.0"

_PLACES = {
    "load": "rung.model.model",
    "Model": "rung.model.model",
    "generate": "rung.model.generate",
    "Generation": "rung.model.generate",
    "resume": "rung.train.run",
    "Run": "rung.train.run",
    "evaluate": "rung.train.evaluate",
    "estimate": "rung.train.estimate",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name in ("recipes", "train"):  # folders; `rung.train` can be called
        return importlib.import_module(f"rung.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module 'rung' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
