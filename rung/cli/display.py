"""What a person sees of a long job, on stderr: a live panel on a terminal, plain lines anywhere else.

`Display` is a listener (`rung.core.progress`).  Whatever it is told is shown with control characters made visible.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from rung.core.progress import Progress
from rung.report.visible import one_line, visible

PLAIN_SECONDS = 2.0  # between two plain lines of one stage
BYTES_STAGES = ("download",)  # what these count is bytes
NEAR_THE_END_OF_A_STEP = ("evaluate", "checkpoint")  # the trainer tells of the step itself, and saves it, after these
STAGE_WORDS = {
    "download": "downloading",
    "load": "loading the model",
    "self_test": "self-test",
    "baseline": "measuring before training",
    "train": "training",
    "evaluate": "measuring",
    "checkpoint": "writing a checkpoint",
    "report": "writing the report",
}
METRIC_WORDS = {
    "reward": "reward",
    "accuracy_held_out": "held-out accuracy",
    "accuracy_validation": "validation accuracy",
    "accuracy_train": "accuracy on training problems",
    "tokens_per_second": "tokens/s",
    "length": "length",
}
ACCURACIES = tuple(name for name in METRIC_WORDS if name.startswith("accuracy_"))  # shown in per cent


class Display:
    """A context manager and a listener.

    stream: a text stream, where lines go (default: stderr)
    live:   draw a panel that moves (default: when the stream is a terminal)
    finish: a first Ctrl-C lets the job come to a good end; else it stops at once
    clock:  seconds, for the pace of plain lines only
    """

    def __init__(
        self,
        stream: Any = None,
        *,
        live: bool | None = None,
        finish: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty() and os.environ.get("TERM") != "dumb" if live is None else live
        self.finish, self.clock = finish, clock
        self.metrics: dict[str, float] = {}  # the newest value of each
        self._panel: Any = None
        self._stage, self._shown_at, self._stopping = "", float("-inf"), False
        self._previous_handler: Any = None

    def __enter__(self) -> "Display":
        if self.live:
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self.stream, highlight=False, markup=False)
            self._panel = Live(console=console, refresh_per_second=4, transient=True)
            self._panel.start()
        if self.finish:
            self._previous_handler = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *_: object) -> None:
        if self.finish:
            signal.signal(signal.SIGINT, self._previous_handler)
        if self._panel is not None:
            self._panel.stop()
            self._panel = None

    def __call__(self, news: Progress) -> None:
        """Show it.  After a first Ctrl-C the job stops here, unless a step's end, where it can be saved, is near."""
        if any(name in news.metrics for name in ACCURACIES):  # one set of problems at a time: the other's is older
            self.metrics = {name: value for name, value in self.metrics.items() if name not in ACCURACIES}
        self.metrics |= news.metrics
        if news.text:
            self.say(visible(news.text))
        if self._panel is not None:
            self._panel.update(_panel(news, self.metrics))
        elif news.stage != "notice":
            self._plain(news)
        if self._stopping and news.stage not in NEAR_THE_END_OF_A_STEP:
            raise KeyboardInterrupt

    def say(self, line: str) -> None:
        """One line that stays."""
        if self._panel is not None:
            from rich.text import Text

            self._panel.console.print(Text(line))
        else:
            print(line, file=self.stream, flush=True)

    def _plain(self, news: Progress) -> None:
        """A line at the start and at the end of a stage, and every PLAIN_SECONDS between."""
        now = self.clock()
        starts, ends = news.stage != self._stage, news.total > 0 and news.done >= news.total
        if starts or ends or now - self._shown_at >= PLAIN_SECONDS:
            self._stage, self._shown_at = news.stage, now
            self.say(plain_line(news, self.metrics if news.stage == "train" else news.metrics))

    def _interrupted(self, *_: object) -> None:
        if self._stopping:
            raise KeyboardInterrupt
        self._stopping = True
        self.say("Stopping after this step; Ctrl-C again stops at once.")


def plain_line(news: Progress, metrics: Mapping[str, float]) -> str:
    """One piece of news and these numbers on one line."""
    parts = [STAGE_WORDS.get(news.stage, one_line(news.stage))]
    if news.total or news.done:
        parts[0] += f" {_count(news)}"
    parts += [f"{METRIC_WORDS[name]} {_number(name, value)}" for name, value in _known(metrics)]
    if news.seconds_left is not None:
        parts.append(f"{duration(news.seconds_left)} left")
    return "  ".join(parts)


def duration(seconds: int | float) -> str:
    """Seconds as a person says them: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _panel(news: Progress, metrics: Mapping[str, float]) -> Any:
    """The live picture: the stage with its bar, and under it the newest numbers."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    top = Table.grid(padding=(0, 2))
    left = "" if news.seconds_left is None else f"{duration(news.seconds_left)} left"
    stage = Text(STAGE_WORDS.get(news.stage, one_line(news.stage)), style="bold")
    if news.total or news.done:
        bar = ProgressBar(total=news.total or None, completed=news.done, width=32, pulse=not news.total)
        top.add_row(stage, bar, Text(_count(news)), Text(left, style="dim"))
    else:
        top.add_row(stage, Text(left, style="dim"))
    numbers = Text("   ").join(
        Text.assemble((f"{METRIC_WORDS[name]} ", "dim"), _number(name, value)) for name, value in _known(metrics)
    )
    return Group(top, numbers)


def _known(metrics: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(name, metrics[name]) for name in METRIC_WORDS if name in metrics]


def _count(news: Progress) -> str:
    if news.stage in BYTES_STAGES:
        done, total = f"{news.done / 1e6:.1f}", f"{news.total / 1e6:.1f} MB"
    else:
        done, total = str(news.done), str(news.total)
    return f"{done}/{total}" if news.total else done


def _number(name: str, value: float) -> str:
    if name in ACCURACIES:
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
