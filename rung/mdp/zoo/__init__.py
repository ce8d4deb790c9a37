"""Finite models with known answers, by name: grids, textbook models, generated ones."""

from importlib import import_module
from typing import Any

_WHERE = {
    "classics": ("baird car_rental chain forest gambler lqr maximization_bias puterman random_walk short_corridor"),
    "cards": "blackjack",
    "generated": "garnet maze open_maze",
    "grids": "cliff grid special_grid square windy zhao",
}
_FILES = {name: file for file, names in _WHERE.items() for name in names.split()}
__all__ = sorted(_FILES)


def __getattr__(name: str) -> Any:
    """A model is loaded when it is asked for: its name alone costs nothing."""
    if name in _FILES:
        return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
    raise AttributeError(f"the zoo has no {name}")
