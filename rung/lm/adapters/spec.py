"""What an adapter is, as a frozen value: part of a run's configuration."""

import math
from dataclasses import dataclass

from rung.core.errors import ConfigError

ALL = "all-linear"  # PEFT's word


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Thin matrices that learn beside weights that rest: W + scaling B A, A [rank, D], B [E, rank].  [Hu 2021]

    rank:    of the products; 0 is no adapter: the weights themselves learn
    alpha:   scaling is alpha / rank
    rslora:  scaling is alpha / sqrt(rank) instead, which suits high ranks  [Kalajdzievski 2023]
    targets: all-linear, or names of layers with commas between them (q_proj,v_proj); never the embedding or the head
    """

    rank: int = 0
    alpha: float = 32.0
    rslora: bool = False
    targets: str = ALL

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError(f"lora.rank must be at least 1, or 0 for no adapter; got {self.rank}.")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ConfigError(
                f"lora.alpha must be a positive number, not {self.alpha}: it scales what the adapter adds."
            )

    @property
    def on(self) -> bool:
        return self.rank > 0

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
