"""A run on disk.  Whoever trains holds the lock; anybody may read.

    NAME/
      VERSION            the format of this folder; another one is refused
      config.json        what the run is                 (`rung.core.config`)
      environment.json   what it ran on                  (`rung.core.environment`)
      metrics.jsonl      one record per step             }
      samples.jsonl      what was sampled, with rewards  } cut back to the checkpoint on resume
      evals.jsonl        evaluations, with their answers }
      grades.jsonl       journal of the verifier's grades: never cut (`rung.core.journal`)
      checkpoints/       (`rung.core.checkpoint`)
      model/             what was learnt, as a Hugging Face folder
      adapter/           of a run with LoRA: what was learnt alone, as a folder of PEFT's
      log.txt            what the run was doing, a word a line
      report.html
      lock

A record counts once its line ends in a newline: what a killed writer left of a line is ignored by readers and removed
by the next writer.
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from rung.core import config as configs
from rung.core.errors import ConfigError, RunError

FORMAT = "rung-run 1"
LOCK_PATIENCE = 0.5  # seconds: a reader that asks `owner` holds the lock for an instant

Log = Literal["metrics", "samples", "evals", "grades"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class RunDir:
    """One run folder; `create` makes it, `open_run` opens it."""

    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def config(self, cls: type[_T]) -> _T:
        """The run's configuration.  Raises RunError where it cannot be read."""
        try:
            return configs.load(self.folder / "config.json", cls)
        except ConfigError as error:
            raise RunError(str(error)) from error

    def environment(self) -> dict[str, Any]:
        """What the run goes on now; what it ran on before, oldest first, under "earlier"."""
        return _read_json(self.folder / "environment.json")

    def move(self, environment: Mapping[str, Any]) -> None:
        """The run goes on on another machine, or with another task file."""
        before = self.environment()
        moved = {**environment, "earlier": [*before.pop("earlier", []), before]}
        write_atomic(self.folder / "environment.json", _environment(moved))

    def append(self, name: Log, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records to a log in one write, on disk when this returns.  Not-finite numbers are written as null."""
        data = "".join(_line(record) for record in records).encode()
        if not data:
            return
        try:
            with open(self._log(name), "ab+") as file:
                _drop_torn_tail(file)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"{self._log(name)} could not take {len(data)} bytes: {error.strerror}") from error

    def read(self, name: Log) -> list[dict[str, Any]]:
        """All records of a log; a torn last line is ignored.  Raises RunError for a broken line elsewhere."""
        return [record for _, record in self._records(name)]

    def cut(self, name: Literal["metrics", "samples", "evals"], step: int) -> int:
        """Remove the records whose "step" is `step` or later, all at once.  Returns how many were removed.

        Grades have no place here: they are replayed on resume.  Every record of a log that is cut has a "step"."""
        return self.drop(name, lambda record: record["step"] >= step)

    def drop(self, name: Literal["metrics", "samples", "evals"], unwanted: Callable[[Mapping[str, Any]], bool]) -> int:
        """Remove the records that are unwanted, all at once.  Returns how many were removed."""
        number = sum(unwanted(record) for _, record in self._records(name))
        if number:
            write_atomic(self._log(name), (line for line, record in self._records(name) if not unwanted(record)))
        return number

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for writing.  The kernel gives the lock back when the process ends, however it ends.

        Raises RunError while another process holds it.
        """
        try:
            file = open(self.folder / "lock", "a+b")  # noqa: SIM115 (closed below, which gives the lock back)
        except OSError as error:
            raise RunError(f"{self.folder} cannot be written ({error.strerror}): a run is locked there") from error
        with file:
            deadline = time.monotonic() + LOCK_PATIENCE
            while not _try_flock(file, fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    raise RunError(
                        f"{self.folder} is in use by process {_pid(file)}: wait for it to end, or stop it, "
                        f"before starting another on the same run"
                    )
                time.sleep(0.02)
            file.truncate(0)
            file.write(f"{os.getpid()}\n".encode())
            file.flush()
            yield

    def owner(self) -> int | None:
        """Process that holds the lock, None where the run is not being written."""
        path = self.folder / "lock"
        if not path.exists():
            return None
        with open(path, "rb") as file:
            return None if _try_flock(file, fcntl.LOCK_SH) else _pid(file)

    def _log(self, name: Log) -> Path:
        return self.folder / f"{name}.jsonl"

    def _records(self, name: Log) -> Iterator[tuple[bytes, dict[str, Any]]]:
        path = self._log(name)
        if not path.exists():
            return
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise RunError(
                        f"{path}, line {number} is not a JSON record ({error}): restore or remove it"
                    ) from error
                yield line, record


def create(folder: str | Path, config: Any, environment: Mapping[str, Any]) -> RunDir:
    """A new run folder, there whole or not at all.  Raises RunError where one exists."""
    folder = Path(folder)
    aside = folder.parent / f".tmp-{folder.name}-{os.getpid()}"
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(f"{folder} exists already: resume it, choose another name, or remove it")
        (aside / "checkpoints").mkdir(parents=True)
        write_atomic(aside / "VERSION", f"{FORMAT}\n".encode())
        write_atomic(aside / "config.json", configs.dumps_json(config).encode())
        write_atomic(aside / "environment.json", _environment(environment))
        os.rename(aside, folder)  # replaces an empty folder, refuses another
        fsync_folder(folder.parent)
    except OSError as error:
        raise RunError(f"the run folder {folder} could not be made: {error.strerror}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return RunDir(folder)


def _environment(environment: Mapping[str, Any]) -> bytes:
    return (json.dumps(configs.encode(environment), indent=2) + "\n").encode()


def open_run(folder: str | Path) -> RunDir:
    """An existing run folder.  Raises RunError where there is none, or one of another format."""
    folder = Path(folder)
    try:
        found = (folder / "VERSION").read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise RunError(
            f"{folder} is not a run folder: it has no readable file VERSION ({error.strerror}). "
            "`rung runs` lists what lies under runs/"
        ) from error
    if found != FORMAT:
        raise RunError(
            f"{folder} was written in the format {found[:40]!r}, and this version of Rung reads {FORMAT!r}: "
            f"open it with the version of Rung that wrote it (named in environment.json)"
        )
    return RunDir(folder)


def write_atomic(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file (whole or in parts) aside, bring it to the disk, rename it: readers see old or new, never half.

    Raises RunError where that fails.
    """
    aside = path.with_name(f".tmp-{path.name}")
    try:
        with open(aside, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise RunError(f"{path} could not be written ({error.strerror or error}): make room there") from error
    finally:
        aside.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk (a rename is durable only then)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _line(record: Mapping[str, Any]) -> str:
    try:
        return json.dumps(record, allow_nan=False) + "\n"
    except ValueError:
        return json.dumps(_without_nan(record), allow_nan=False) + "\n"


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_torn_tail(file: Any) -> None:
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    file.truncate(end)
    file.seek(end)


def _try_flock(file: Any, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _pid(file: Any) -> int | None:
    file.seek(0)
    text = file.read().decode(errors="replace").strip()
    return int(text) if text.isdigit() else None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error})") from error
