"""Models of the Hugging Face Hub, by id: `org/name`, or `org/name@revision`.  (Extra `hub`: huggingface_hub.)

An id is resolved to a commit first, and a cache entry belongs to one commit: what was loaded once is loaded again, with
and without a network.  Only what Rung reads is fetched: safetensors, JSON, tokenizer files; never code, never a pickle.
Where the Hub is (HF_ENDPOINT), who asks (HF_TOKEN) and whether to ask at all (HF_HUB_OFFLINE) is huggingface_hub's.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rung.core.errors import ModelError
from rung.core.progress import Listener, Progress, silent
from rung.core.rundir import write_atomic
from rung.lm.weights.files import ADAPTER, COMPANIONS, INDEX, PICKLED, SINGLE, refusal, sha256

ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]{1,100}))?", re.ASCII)
COMMIT = re.compile("[0-9a-f]{40}")
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
WANTED = ("config.json", *COMPANIONS)
SOURCE = "rung_source.json"  # where a cache entry came from


@dataclass(frozen=True)
class HubId:
    """A repository of the Hub and a branch, tag or commit of it."""

    repo: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}"

    @property
    def entry(self) -> str:
        """The name of a commit's cache entry."""
        return f"hub-{self.repo.replace('/', '--')}-{self.revision}"


def parse(name: str) -> HubId | None:
    """The id that a string may be; whether there is such a repository, only the Hub knows."""
    found = ID.fullmatch(name)
    return HubId(found[1], found[2] or "main") if found and ".." not in name else None


def pinned(asked: HubId, models: Path, listener: Listener = silent) -> HubId:
    """The same repository at the commit that its revision names now, or named when the cache last saw it."""
    if COMMIT.fullmatch(asked.revision):
        return asked
    try:
        with _explained(asked):
            sha = str(_hub().HfApi().model_info(asked.repo, revision=asked.revision).sha)
    except _Unreachable:
        known = [commit for held, commit, _ in cached(models) if held == asked]
        if not known:
            raise
        sha = known[0]
        listener(Progress(stage="notice", text=f"the Hub cannot be asked; taking {asked.repo}@{sha} from the cache"))
    if not COMMIT.fullmatch(sha):
        raise ModelError(f"the Hub says that {asked} is the commit {sha!r}, which is none.")
    return HubId(asked.repo, sha)


def fetch(asked: HubId, models: Path, listener: Listener = silent) -> Path:
    """The model folder of an id in the cache, downloaded if it is not there.  `models`: where the entries lie."""
    commit = pinned(asked, models, listener)
    folder = models / commit.entry
    if folder.is_dir():
        if asked != commit:
            _note(folder, asked, commit)
        return folder
    aside = models / f".{commit.entry}.part"  # kept when interrupted: what is there already is not fetched again
    with _explained(asked):
        info = _hub().HfApi().model_info(commit.repo, revision=commit.revision, files_metadata=True)
    wanted = _wanted(asked, info.siblings or [])
    aside.mkdir(parents=True, exist_ok=True)
    total, done = sum(file.size or 0 for file in wanted), 0
    for file in wanted:
        with _explained(asked):
            bar = _bar(listener, done, total)
            path = _hub().hf_hub_download(
                commit.repo, file.rfilename, revision=commit.revision, local_dir=aside, tqdm_class=bar
            )
        if file.lfs is not None and sha256(Path(path)) != file.lfs.sha256:
            Path(path).unlink()
            raise ModelError(f"{file.rfilename} of {asked} came with another SHA-256 than the Hub's. Fetch it again.")
        done += file.size or 0
    _note(aside, asked, commit)
    shutil.rmtree(aside / ".cache", ignore_errors=True)
    with suppress(OSError):  # another process was faster: its copy is as good
        aside.rename(folder)
    return folder


def cached(models: Path) -> list[tuple[HubId, str, Path]]:
    """(id as it was asked for, commit, folder) of what the cache has, the newest first."""
    found = []
    for path in models.glob("hub-*"):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            source = json.loads((path / SOURCE).read_text(encoding="utf-8"))
            for name, when in source["revisions"].items():
                found.append((when, HubId(source["repo"], name), source["commit"], path))
    return [(held, commit, path) for _, held, commit, path in sorted(found, key=lambda row: row[0], reverse=True)]


def _note(folder: Path, asked: HubId, commit: HubId) -> None:
    """Write down which revision led to this commit, and when; without a network the newest such note counts."""
    path = folder / SOURCE
    with suppress(OSError):  # a cache that is only read
        before = json.loads(path.read_text(encoding="utf-8"))["revisions"] if path.is_file() else {}
        revisions = before | {asked.revision: time.time()}
        text = {"repo": commit.repo, "commit": commit.revision, "revisions": revisions}
        write_atomic(path, json.dumps(text, indent=2).encode())


def _wanted(asked: HubId, files: Sequence[Any]) -> list[Any]:
    """The files to fetch: one set of safetensors weights, and the small files that belong to them; or an adapter."""
    held = {file.rfilename: file for file in files if "/" not in file.rfilename and "\\" not in file.rfilename}
    shards = [name for name in held if SHARD.fullmatch(name)]
    if "config.json" in held and SINGLE in held:
        weights = [SINGLE]
    elif "config.json" in held and INDEX in held and shards:
        weights = [INDEX, *sorted(shards)]
    elif set(ADAPTER) <= held.keys():
        return [held[name] for name in ADAPTER]
    else:
        listed = ", ".join(sorted(held)[:8]) or "nothing"
        if any(name.endswith(PICKLED) for name in held):
            raise ModelError(f"{asked} has no safetensors (it holds {listed}). {refusal(asked.repo)}")
        hint = " For a .gguf file: download it, and give its path." if ".gguf" in listed else ""
        raise ModelError(f"{asked} is no model that Rung reads: needed config.json and {SINGLE}, found {listed}.{hint}")
    return [held[name] for name in WANTED if name in held] + [held[name] for name in weights]


class _Unreachable(ModelError):
    """The Hub did not answer at all: an answer from the cache is as good as any."""


@contextmanager
def _explained(asked: HubId) -> Iterator[None]:
    """What huggingface_hub raises, as a sentence with the way out."""
    errors, where = _hub().errors, os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    path = f"There is no folder {asked.repo!r} here either, if that was meant."
    try:
        yield
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise _Unreachable(
            f"{asked} is not in the cache, and the Hub is not asked or does not answer (HF_HUB_OFFLINE, or no "
            f"network). Fetch it where there is one, and copy the folder. {path}"
        ) from error
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{asked} is gated: accept its terms on {where}/{asked.repo}, then log in (`hf auth login`, or HF_TOKEN)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{asked.repo} has no branch, tag or commit {asked.revision!r}.") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"the Hub ({where}) has no model {asked.repo!r}, or it is private: check the id, or log in "
            f"(`hf auth login`, or HF_TOKEN). {path}"
        ) from error
    except errors.HfHubHTTPError as error:
        raise ModelError(f"the Hub ({where}) refused {asked}: {error}. Try again later.") from error
    except (KeyboardInterrupt, SystemExit, ModelError):
        raise
    except Exception as error:  # each version of the library has another HTTP client, with errors of its own
        raise _Unreachable(
            f"{asked} cannot be fetched from {where} ({type(error).__name__}: {error}). Check the network and the free "
            f"space, then try again. {path}"
        ) from error


def _hub() -> Any:
    """huggingface_hub, where it may be asked."""
    if os.environ.get("RUNG_OFFLINE"):
        raise _Unreachable(
            "the Hub is not asked, because RUNG_OFFLINE is set, and the cache has no such model. Unset it, or give the "
            "path of a folder (./org/name); `rung models` lists the cache."
        )
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise ModelError(
            "an id of the Hugging Face Hub needs huggingface_hub: `pip install rung[hub]`. For a folder, give its path "
            "(./org/name)."
        ) from error
    return huggingface_hub


def _bar(listener: Listener, before: int, total: int) -> Callable[..., Any]:
    """What huggingface_hub takes for a progress bar, passing on the bytes that have come."""

    class Heard:
        def __init__(self, *_: Any, initial: int = 0, **__: Any) -> None:
            self.done = before + initial

        def update(self, count: int | float | None = 1) -> None:
            self.done += int(count or 0)
            listener(Progress(stage="download", done=self.done, total=total))

        def __enter__(self) -> "Heard":
            return self

        def __exit__(self, *_: object) -> None: ...

        def close(self) -> None: ...

        def refresh(self) -> None: ...

        def set_description(self, *_: Any, **__: Any) -> None: ...

    return Heard
