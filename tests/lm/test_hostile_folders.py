"""Model folders that were made to harm: headers, indexes and configs that lie, links that lead out, pickles."""

import json
import random
import shlex
import subprocess
import sys
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rung.core.errors import ModelError
from rung.lm.config import AttentionSpec, BlockSpec, DecoderConfig, MLPSpec
from rung.lm.decoder import Decoder
from rung.lm.weights.files import MAX_JSON, read_files, read_header, read_json, read_shards
from rung.lm.weights.hf import load_folder
from rung.model import load, new_model

FEW_BYTES, FEW_SECONDS = 8 << 20, 2.0  # a refusal costs no more, whatever the file claims


def shard(header: object, data: bytes = b"", *, length: int | None = None, raw: bytes | None = None) -> bytes:
    text = json.dumps(header).encode() if raw is None else raw
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(**changes: object) -> dict:
    return {"t": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes}


def two(first: tuple[int, int], second: tuple[int, int]) -> dict:
    spans = {"a": first, "b": second}
    return {n: {"dtype": "F32", "shape": [(e - s) // 4], "data_offsets": [s, e]} for n, (s, e) in spans.items()}


DATA = bytes(24)
HOSTILE = {
    "empty": b"",
    "seven bytes": bytes(7),
    "a header of 2^64 - 1 bytes": shard({}, length=2**64 - 1),
    "a header longer than the file": shard(one(), DATA, length=10**6),
    "a header longer than any": shard({}, length=MAX_JSON + 1) + b" ",
    "a header that is no JSON": shard(None, DATA, raw=b"{'t': 1}"),
    "a header that is a list": shard([1]),
    "a header that is not UTF-8": shard(None, raw=b'{"\xff": {}}'),
    "NaN in a header": shard(None, raw=b'{"t": NaN}'),
    "a number of 5000 digits": shard(None, raw=b'{"t": ' + b"9" * 5000 + b"}"),
    "deep nesting": shard(None, raw=b'{"t":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "deep objects": shard(None, raw=b'{"t":' * 200_000 + b"1" + b"}" * 200_000),
    "a name twice": shard(None, DATA, raw=b'{"t":%b,"t":%b}' % ((json.dumps(one()["t"]).encode(),) * 2)),
    "a name that is half a character": shard(None, DATA, raw=b'{"\\ud800":' + json.dumps(one()["t"]).encode() + b"}"),
    "metadata that are no strings": shard({"__metadata__": {"a": 1}}),
    "metadata that are no object": shard({"__metadata__": [1]}),
    "a tensor that is a number": shard({"t": 1}),
    "no shape": shard({"t": {"dtype": "F32", "data_offsets": [0, 24]}}, DATA),
    "another field": shard(one(strides=[1]), DATA),
    "an unknown dtype": shard(one(dtype="F1"), DATA),
    "a dtype that is a list": shard(one(dtype=["F32"]), DATA),
    "a negative dimension": shard(one(shape=[-2, -3]), DATA),
    "a dimension that is a float": shard(one(shape=[2.0, 3]), DATA),
    "a dimension that is true": shard(one(shape=[True, 6]), DATA),
    "a huge dimension": shard(one(shape=[2**62, 2**62, 0], data_offsets=[0, 0])),
    "a thousand dimensions": shard(one(shape=[1] * 1000, data_offsets=[0, 4]), bytes(4)),
    "a shape that does not fit its bytes": shard(one(shape=[2, 4]), DATA),
    "a shape as large as memory": shard(one(shape=[1 << 20, 1 << 20], data_offsets=[0, 1 << 42]), DATA),
    "offsets that run backwards": shard(one(shape=[0], data_offsets=[24, 0]), DATA),
    "offsets of three": shard(one(data_offsets=[0, 12, 24]), DATA),
    "offsets behind the file": shard(one(data_offsets=[24, 48]), DATA),
    "negative offsets": shard(one(data_offsets=[-24, 0]), DATA),
    "tensors that overlap": shard(two((0, 16), (8, 24)), DATA),
    "the same bytes twice": shard(two((0, 24), (0, 24)), DATA),
    "a gap": shard(two((0, 8), (16, 24)), DATA),
    "bytes that nobody has": shard(two((0, 8), (8, 16)), DATA),
    "bytes before the first": shard(two((8, 16), (16, 24)), DATA),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_at_little_cost(tmp_path, case):
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[case])
    with bounded(), pytest.raises(ModelError, match=r"model\.safetensors is truncated or not a safetensors file"):
        read_shards(tmp_path)


def test_a_sound_header_in_another_order_is_read_in_the_order_of_its_bytes(tmp_path):
    (tmp_path / "x").write_bytes(shard(two((16, 24), (0, 16)), DATA))
    assert [entry.name for entry in read_header(tmp_path / "x").entries] == ["b", "a"]


class bounded:
    """Fails where the work inside took more memory or time than a refusal may."""

    def __enter__(self) -> None:
        tracemalloc.start()
        self.begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds, (_, peak) = time.perf_counter() - self.begin, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < FEW_BYTES
        assert seconds < FEW_SECONDS


@pytest.fixture
def folder(tmp_path) -> Path:
    return make(tmp_path / "model")


def make(path: Path) -> Path:
    """A model of a few numbers in one file."""
    block = BlockSpec(mixer=AttentionSpec(heads=2, kv_heads=1, head_dim=4), channel=MLPSpec(width=8))
    made = Decoder(DecoderConfig(vocab_size=9, width=6, blocks=(block,), max_positions=16))
    return new_model(made.init_(torch.Generator().manual_seed(0))).save(path)


def split_in_two(folder: Path) -> dict[str, str]:
    """The folder with two shards and an index; returns the index's map."""
    from safetensors.torch import load_file, save_file

    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(held)
    place = {name: f"model-0000{1 + (i > 3)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(place.values()):
        save_file({name: held[name] for name in names if place[name] == file}, folder / file)
    write_index(folder, place)
    return place


def write_index(folder: Path, weight_map: object) -> None:
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


LEADING_OUT = [
    "../outside/model.safetensors", "/etc/passwd", "/etc/x.safetensors", "sub/model.safetensors", "..", ".", "",
    "..\\outside.safetensors", "./model-00001-of-00002.safetensors", "a\0.safetensors", "a\n.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", LEADING_OUT)
def test_an_index_names_plain_files_of_its_own_folder_only(tmp_path, folder, name):
    place = split_in_two(folder)
    make(tmp_path / "outside")
    write_index(folder, place | {next(iter(place)): name})
    with pytest.raises(ModelError, match=r"needed plain names of \.safetensors files in the same folder"):
        load_folder(folder)


@pytest.mark.parametrize("weight_map", [None, [], "x", {"a": 1}, {"a": ["x.safetensors"]}, {}])
def test_an_index_without_a_map_of_names_is_refused(folder, weight_map):
    split_in_two(folder)
    write_index(folder, weight_map)
    with pytest.raises(ModelError, match=r"needed a weight_map|names no file"):
        load_folder(folder)


def test_an_index_that_names_a_pickle_gets_the_conversion_command(folder):
    place = split_in_two(folder)
    write_index(folder, place | {next(iter(place)): "pytorch_model.bin"})
    with pytest.raises(ModelError, match=r"'pytorch_model\.bin'.*convert it once: python -c"):
        load_folder(folder)


def test_a_tensor_in_two_shards_is_refused(folder):
    place = split_in_two(folder)
    first, second = sorted(set(place.values()))
    (folder / second).write_bytes((folder / first).read_bytes())
    with pytest.raises(ModelError, match=f"{first} and {second} both hold tensor"):
        load_folder(folder)


def test_shards_in_a_folder_of_its_own_are_read(folder):
    split_in_two(folder)
    load_folder(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "LICENSE"])
def test_a_link_that_leads_out_of_the_folder_is_not_followed(tmp_path, folder, name):
    (tmp_path / "secret").write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=rf"{name} leads out of the folder, to .*secret"):
        load_folder(folder)


def test_links_inside_the_folder_and_into_the_hubs_blobs_are_followed(tmp_path, folder):
    hub = tmp_path / "models--org--name"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots" / "abc").mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(hub / "blobs" / str(number))
        (hub / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{number}")
    load_folder(hub / "snapshots" / "abc")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("{}")
    (hub / "snapshots" / "abc" / "NOTICE").symlink_to("../../refs/main")
    with pytest.raises(ModelError, match="NOTICE leads out of the folder"):
        read_files(hub / "snapshots" / "abc", ["NOTICE"])


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path, name, inside):
    place = tmp_path / "it's; $(echo bad)"
    place.mkdir()
    (place / "config.json").write_text(json.dumps({"model_type": "llama"} | fields()))
    (place / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    with pytest.raises(ModelError, match=r"runs code that its author chose") as caught:
        load(place if inside else place / name)
    command = str(caught.value).split("convert it once: ")[1]
    words = shlex.split(command)
    assert words[:2] == ["python", "-c"]
    assert words[3:] == [str(place), f"{place.name}-safetensors"]
    compile(words[2], "command", "exec")


def fields() -> dict:
    return {
        "vocab_size": 9, "hidden_size": 6, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 16, "tie_word_embeddings": True,
    }  # fmt: skip


@pytest.mark.slow
def test_the_conversion_command_converts(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**fields())
    config.save_pretrained(tmp_path / "old")
    model = transformers.LlamaForCausalLM(config)
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    tokenizer = transformers.Qwen2Tokenizer(vocab={"a": 0, "b": 1, "<|endoftext|>": 2}, merges=[])
    tokenizer.save_pretrained(tmp_path / "old")
    with pytest.raises(ModelError) as caught:
        load(tmp_path / "old")
    words = shlex.split(str(caught.value).split("convert it once: ")[1])
    subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, check=True, capture_output=True)
    again = load(tmp_path / "old-safetensors", dtype="fp32")
    assert torch.equal(again.decoder.embedding.weight, model.model.embed_tokens.weight)
    assert again.tokenizer.encode("ab") == [0, 1]


def test_a_config_that_asks_for_code_is_told_that_none_is_run(folder):
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"model_type": "mystery", "auto_map": {"AutoModelForCausalLM": "modeling_mystery.Mystery"}}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "modeling_mystery.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ModelError, match=r"code of its own .*Rung never runs"):
        load_folder(folder)


WRONG = [0, -1, 1, 2**31, 2**63, 10**30, 1.5, "6", "", None, True, [], [6], {}, {"a": 1}, "float('inf')", 1e308]


@pytest.mark.parametrize("name", sorted(fields()))
@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_a_config_with_a_wrong_value_is_refused_or_means_the_same_model(folder, name, value):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {name: value}))
    with bounded(), suppress(ModelError):
        load_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b"\xff", b"[" * 10**6, b"[]", b'{"a":1,"a":2}', b'{"a":Infinity}', b"nul"])
def test_a_json_file_that_is_not_strict_is_refused(folder, name, content):
    (folder / name).write_bytes(content)
    with bounded(), pytest.raises(ModelError, match=rf"{name}( is not JSON|: needed a JSON object)"):
        load_folder(folder)


def test_a_json_file_of_a_gigabyte_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 30)
    with bounded(), pytest.raises(ModelError, match=r"has 1073741824 bytes; at most \d+ are read"):
        read_json(tmp_path / "config.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    folder = make(tmp_path_factory.mktemp("whole") / "model")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), name=st.sampled_from(["model.safetensors", "config.json"]))
def test_a_mutated_folder_loads_or_is_refused(whole, tmp_path_factory, seed, name):
    """Bytes changed, removed, inserted, repeated; numbers replaced by others; keys exchanged."""
    draw, content = random.Random(seed), bytearray(whole[name])
    for _ in range(draw.randint(1, 4)):
        at, span = draw.randrange(len(content)), draw.choice([1, 2, 3, 8, 30])
        kind = draw.randrange(5)
        if kind == 0:
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[at : at + span]
        elif kind == 2:
            content[at:at] = content[draw.randrange(len(content)) :][:span]
        elif kind == 3:
            content[at : at + 1] = draw.choice(
                [b"9" * 20, b"-1", b"1e999", b"null", b'"', b"[", b"{", b"0", b"\\ud800"]
            )
        else:
            digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
            content[(i := draw.choice(digits)) : i + 1] = draw.choice([b"9", b"0", b"99999", b"-3", b"1.5"])
    folder = tmp_path_factory.mktemp("fuzzed")
    for file, old in whole.items():
        (folder / file).write_bytes(content if file == name else old)
    begin = time.perf_counter()
    with suppress(ModelError):
        load_folder(folder)
    assert time.perf_counter() - begin < 20
