"""Ids of the Hub: what is fetched and what never is, what happens without a network, and what is said."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import Hub, serving

from rung.core.errors import ModelError
from rung.lm.adapters.lora import Adapter
from rung.lm.adapters.peft import save_adapter
from rung.lm.adapters.spec import LoRA
from rung.lm.config import AttentionSpec, BlockSpec, DecoderConfig, MLPSpec
from rung.lm.decoder import Decoder
from rung.lm.weights import sources
from rung.lm.weights.sources import absolute_source, cached_models, forget, locate
from rung.model import load, new_model

constants = pytest.importorskip("huggingface_hub.constants")
REPO = "org/tiny-model"


def model_files(tmp_path: Path, seed: int = 0) -> dict[str, bytes]:
    block = BlockSpec(mixer=AttentionSpec(heads=2, kv_heads=1, head_dim=4), channel=MLPSpec(width=8))
    made = Decoder(DecoderConfig(vocab_size=9, width=6, blocks=(block,), max_positions=16))
    folder = new_model(made.init_(torch.Generator().manual_seed(seed))).save(tmp_path / f"model{seed}")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def point_at(url: str, monkeypatch) -> None:
    """What HF_ENDPOINT does when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    """A Hub with one model, an empty cache, and huggingface_hub pointed at the first."""
    for name in ("RUNG_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with serving(Hub()) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        point_at(hub.url, monkeypatch)
        hub.put(REPO, model_files(tmp_path) | {
            "modeling_tiny.py": b"raise SystemExit", "pytorch_model.bin": b"cos\nsystem", "model.pt": b"x",
            "consolidated.safetensors": b"twice", "onnx/model.safetensors": b"x", "tokenizer_config.json": b"{}",
        })  # fmt: skip
        yield hub


def test_an_id_loads_the_model_and_fetches_only_what_is_read(hub, tmp_path):
    heard = []
    model = load(REPO, dtype="fp32", listener=heard.append)
    expected = load(tmp_path / "model0", dtype="fp32")
    tokens = torch.arange(8)[None]
    assert torch.equal(model.logits(tokens), expected.logits(tokens))
    fetched = {request.split("/")[-1] for request in hub.asked if "/resolve/" in request}
    assert fetched == {"config.json", "model.safetensors", "tokenizer_config.json"}
    folder = locate(REPO)
    assert {path.name for path in folder.iterdir()} == fetched | {"rung_source.json"}
    downloads = [news for news in heard if news.stage == "download"]
    assert downloads[-1].done == downloads[-1].total > 0


def test_what_was_fetched_once_is_not_fetched_again(hub):
    folder = locate(REPO)
    hub.asked.clear()
    assert locate(REPO) == folder
    assert [request for request in hub.asked if "/resolve/" in request] == []
    hub.asked.clear()
    assert locate(f"{REPO}@{folder.name[-40:]}") == folder
    assert hub.asked == []  # a commit is a commit: nobody has to be asked


def test_a_branch_that_moves_is_another_model_and_the_commit_stays_the_old_one(hub, tmp_path):
    pinned = absolute_source(REPO)
    assert re.fullmatch(rf"{REPO}@[0-9a-f]{{40}}", pinned)
    old = load(pinned, dtype="fp32")
    hub.put(REPO, model_files(tmp_path, seed=1))
    new = load(REPO, dtype="fp32")
    assert not torch.equal(new.decoder.embedding.weight, old.decoder.embedding.weight)
    assert torch.equal(load(pinned, dtype="fp32").decoder.embedding.weight, old.decoder.embedding.weight)
    assert absolute_source(REPO) != pinned


def test_branches_and_tags_are_revisions(hub, tmp_path):
    commit = hub.put(REPO, model_files(tmp_path, seed=2), branch="v2/final")
    assert absolute_source(f"{REPO}@v2/final") == f"{REPO}@{commit}"
    with pytest.raises(ModelError, match=rf"{REPO} has no branch, tag or commit 'v3'"):
        locate(f"{REPO}@v3")


@pytest.mark.parametrize("how", ["RUNG_OFFLINE", "HF_HUB_OFFLINE", "no answer"])
def test_without_a_network_the_cache_answers_for_the_revision_it_has_seen(hub, tmp_path, monkeypatch, how):
    hub.put(REPO, model_files(tmp_path, seed=1), branch="other")
    other, folder = locate(f"{REPO}@other"), locate(REPO)
    go_offline(how, monkeypatch)
    heard = []
    assert locate(REPO, heard.append) == folder
    assert locate(f"{REPO}@other") == other
    assert absolute_source(REPO).endswith(folder.name[-40:])
    assert "from the cache" in heard[0].text
    with pytest.raises(ModelError, match=r"offline|OFFLINE|cannot be fetched from"):
        locate("org/never-seen")


def go_offline(how: str, monkeypatch) -> None:
    if how == "RUNG_OFFLINE":
        monkeypatch.setenv("RUNG_OFFLINE", "1")
    elif how == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        point_at("http://127.0.0.1:9", monkeypatch)


def test_a_sharded_model_is_fetched_whole(hub, tmp_path):
    from safetensors.torch import load_file, save_file

    files = model_files(tmp_path, seed=3)
    held = load_file(tmp_path / "model3" / "model.safetensors")
    del files["model.safetensors"]
    names, place = sorted(held), {}
    for number, part in enumerate((names[:4], names[4:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: held[name] for name in part}, tmp_path / file)
        files[file] = (tmp_path / file).read_bytes()
        place |= dict.fromkeys(part, file)
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": place}).encode()
    hub.put("org/sharded", files)
    assert torch.equal(load("org/sharded", dtype="fp32").decoder.embedding.weight, held["model.embed_tokens.weight"])


def test_a_repository_of_an_adapter_alone_is_merged_into_its_base_both_at_their_commits(hub, tmp_path):
    """Its base is an id too, at the commit that is named; tokenizer files beside it are its base's business."""
    base = absolute_source(REPO)
    decoder = load(tmp_path / "model0", dtype="fp32")
    adapter = Adapter(decoder.decoder, decoder.sites, LoRA(rank=2), seed=0)
    for number, parameter in enumerate(adapter.parameters.values()):
        parameter.data = torch.full_like(parameter, 0.1 + number / 100)
    save_adapter(tmp_path / "adapter", adapter.factors(), base=base)
    files = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    hub.put("org/adapter", {**files, "tokenizer.json": b"{}", "README.md": b"", "optimizer.pt": b"x"})
    hub.put(REPO, model_files(tmp_path, seed=1))  # the base's branch moves on
    tokens = torch.arange(8)[None]
    found = load("org/adapter", dtype="fp32").logits(tokens)
    torch.testing.assert_close(found, load(tmp_path / "adapter", dtype="fp32").logits(tokens), atol=0, rtol=0)
    torch.testing.assert_close(found, decoder.logits(tokens))
    assert {path.name for path in locate("org/adapter").iterdir()} == {*files, "rung_source.json"}
    pinned = absolute_source("org/adapter")
    hub.put("org/adapter", {"README.md": b""})
    assert torch.equal(load(pinned, dtype="fp32").logits(tokens), found)
    hub.put("org/half", {"adapter_config.json": b"{}", "adapter_model.bin": b""})
    with pytest.raises(ModelError, match=r"has no safetensors \(it holds adapter_config.json, adapter_model.bin\)"):
        locate("org/half")


def test_a_folder_of_that_name_is_the_folder(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "model0").rename(tmp_path / REPO)
    assert locate(REPO) == Path(REPO)
    assert absolute_source(REPO) == str(tmp_path / REPO)
    assert hub.asked == []


def test_a_path_is_never_asked_of_the_hub(hub):
    for path in (Path("org/no-such-folder"), "./org/x", "/org/x", "~/x", "a/b/c", "../x", "org/..", "org/x@../y"):
        with pytest.raises(ModelError, match="no model"):
            locate(path)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("rest", "meant"), [("", ""), ("/", ""), ("/tree/v2", "@v2"), ("/blob/main/config.json", "@main"), ("?x=1", "")]
)
def test_the_address_of_a_page_is_answered_with_the_id(hub, rest, meant):
    for read in (locate, absolute_source):
        with pytest.raises(ModelError, match=rf"is an address: give the id of the model on the Hub, {REPO}{meant}\.$"):
            read(f"https://hub.example/{REPO}{rest}")
    assert hub.asked == []


REFUSED = {
    403: r"org/closed@main is gated: accept its terms on http://127.*/org/closed, then log in",
    404: r"has no model 'org/closed', or it is private.*There is no folder 'org/closed' here either",
    401: r"has no model 'org/closed', or it is private",
}


@pytest.mark.parametrize("status", REFUSED)
def test_what_the_hub_refuses_is_said_with_the_way_out(hub, status):
    hub.put("org/closed", {})
    hub.refusing["org/closed"] = status
    with pytest.raises(ModelError, match=REFUSED[status]):
        locate("org/closed")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b""}, r"no safetensors .*convert it once: python -c .* org/odd "),
        ({"model-Q4_K_M.gguf": b""}, r"needed config\.json and model\.safetensors.*download it, and give its path"),
        ({"README.md": b""}, r"is no model that Rung reads: needed config\.json .*found README\.md"),
        ({"onnx/model.safetensors": b"", "config.json": b"{}"}, r"is no model that Rung reads"),
    ],
)
def test_a_repository_without_a_model_that_rung_reads_is_refused_before_anything_is_fetched(hub, files, message):
    hub.put("org/odd", files)
    with pytest.raises(ModelError, match=message):
        locate("org/odd")
    assert not [request for request in hub.asked if "/resolve/" in request]


def test_weights_of_another_hash_than_the_hubs_are_thrown_away(hub):
    content = hub.commits[hub.branches[REPO]["main"]]["model.safetensors"]
    hub.lies["model.safetensors"] = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(ModelError, match=r"model\.safetensors of org/tiny-model@main came with another SHA-256"):
        locate(REPO)
    assert cached_models() == []
    del hub.lies["model.safetensors"]
    load(REPO)


def test_an_interrupted_download_leaves_no_model_and_goes_on_later(hub, monkeypatch):
    def interrupt(news):
        if news.stage == "download" and news.done > 700:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        locate(REPO, interrupt)
    assert cached_models() == []
    hub.asked.clear()
    load(REPO)
    assert not [request for request in hub.asked if request.startswith("GET") and "config.json" in request]


def test_a_hub_that_names_no_commit_is_refused(hub):
    hub.branches[REPO]["evil"] = "../../../evil"
    hub.commits["../../../evil"] = {}
    with pytest.raises(ModelError, match=r"is the commit '\.\./\.\./\.\./evil', which is none"):
        locate(f"{REPO}@evil")


def test_without_the_library_the_message_names_the_extra(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match=r"needs huggingface_hub: `pip install rung\[hub\]`"):
        locate(REPO)


def test_the_cache_is_listed_and_a_model_is_removed_from_it(hub):
    folder = locate(REPO)
    (held,) = cached_models()
    assert (held.name, held.folder) == (f"{REPO}@{folder.name[-40:]}", folder)
    assert held.size > 500
    with pytest.raises(ModelError, match=r"the cache has no model 'org/other'.*It has: org/tiny-model@"):
        forget("org/other")
    assert forget(f"{REPO}@{folder.name[-40:-30]}") == held
    assert not folder.exists()


def test_the_environment_alone_points_at_another_hub(hub, tmp_path):
    """As a user has it: HF_ENDPOINT is read when the process starts."""
    code = f"from rung.lm.weights.sources import locate; print(locate({REPO!r}))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "model.safetensors").is_file()
    assert sources.cache_folder() == tmp_path / "cache"
