"""What `rung train` and `rung resume` share: a long job with its display, its mirror, and what is said at its end."""

import contextlib
import importlib.util
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rung.cli.display import Display
from rung.core.errors import ConfigError
from rung.core.progress import Listener, Progress
from rung.report import page
from rung.report.load import read_run
from rung.report.visible import visible


def follow(folder: Path, job: Callable[[Listener], Any], *, tensorboard: bool = False) -> None:
    """Do a job that fills the run folder; write its report, and say on stdout what came out and where it lies.

    KeyboardInterrupt passes through, after a word on how to go on.
    """
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("--tensorboard needs the package tensorboard: pip install 'rung[tensorboard]'.")
    with contextlib.ExitStack() as stack:
        mirror = stack.enter_context(_mirror(folder)) if tensorboard else None
        display = stack.enter_context(Display(finish=True))

        def listener(news: Progress) -> None:
            if mirror is not None:
                mirror()
            display(news)

        try:
            job(listener)
        except KeyboardInterrupt:
            if (folder / "VERSION").exists():
                display.say(f"To go on: rung resume {shlex.quote(visible(str(folder)))}")
            raise
        if mirror is not None:
            mirror()
    tell(folder)


def tell(folder: Path) -> None:
    """Write the report of a run, and print its result and where everything lies."""
    path = page.write(folder)
    print(visible(page.headline(read_run(folder))))
    if (folder / "model").is_dir():
        print(f"model:  {visible(str(folder / 'model'))}")
    print(f"report: {visible(str(path))}")


@contextlib.contextmanager
def _mirror(folder: Path) -> Iterator[Callable[[], None]]:
    """A function that brings `tensorboard/` of a run folder up to date with its metrics.jsonl."""
    from torch.utils.tensorboard import SummaryWriter

    writer: SummaryWriter | None = None
    read = 0  # bytes of metrics.jsonl that are mirrored

    def update() -> None:
        nonlocal writer, read
        log = folder / "metrics.jsonl"
        if not log.is_file():
            return
        if writer is None or log.stat().st_size < read:  # new, or cut back by a resume: begin again
            if writer is not None:
                writer.close()
            # a TensorBoard that is looking forgets what it has read; if files vanished it would go on showing them
            writer, read = SummaryWriter(str(folder / "tensorboard"), purge_step=0), 0
        with log.open("rb") as file:
            file.seek(read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                read += len(line)
                row = json.loads(line)
                for name, value in row.items():
                    if name != "step" and isinstance(value, int | float):
                        writer.add_scalar(f"{row.get('kind', 'train')}/{name}", value, row.get("step", 0))
        writer.flush()

    try:
        yield update
    finally:
        if writer is not None:
            writer.close()
