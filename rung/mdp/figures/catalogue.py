"""Every figure by its name, which is that of its table in the file of published numbers, if it has one."""

from collections.abc import Mapping

from rung.mdp.figures import sutton_barto, sutton_barto_sampled, zhao, zhao_sampled
from rung.mdp.figures.base import Maker

EXACT: Mapping[str, Maker] = {**zhao.FIGURES, **sutton_barto.FIGURES}  # without chance: a second or less each
SAMPLED: Mapping[str, Maker] = {**zhao_sampled.FIGURES, **sutton_barto_sampled.FIGURES}
FIGURES: Mapping[str, Maker] = {**EXACT, **SAMPLED}
