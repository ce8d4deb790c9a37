"""What a long job says while it runs.  A library function takes a `Listener`; only the command line draws anything."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One piece of news.

    stage:   download, load, self_test, baseline, train, evaluate, checkpoint, report, or notice
    done, total: units finished and expected in this stage (problems, steps, bytes); total 0 where nobody knows
    metrics: what has just been measured (`reward`, `accuracy`, `tokens_per_second`, ...)
    text:    a sentence for a person (a warning, where the report lies)
    seconds_left: estimate for the whole run, None where there is none
    """

    stage: str
    done: int = 0
    total: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    text: str = ""
    seconds_left: float | None = None


Listener = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """The listener that ignores everything."""
