"""The published digits, and how they are compared."""

import tomllib
from pathlib import Path

import numpy as np

import rung

PUBLISHED = tomllib.loads((Path(rung.__file__).parent / "mdp" / "figures" / "published.toml").read_text())
LETTERS = {letter: action for action, letter in enumerate("URDLS")}


def rounds_to(values, printed) -> bool:
    """Equal to the printed digits, of which there is one behind the point; half a digit may round either way."""
    return bool((abs(np.ravel(values) - np.ravel(printed)) <= 0.05 + 1e-9).all())
