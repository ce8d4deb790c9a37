import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from rung.core.checkpoint import DTYPES, load_newest, save, verify
from rung.core.errors import RunError

VALUES = {"step": 7, "seconds": 0.1, "names": ["a", "ü"], "big": 2**70}


def tensors(seed=0):
    noise = torch.Generator().manual_seed(seed)
    weight_NM = torch.randn(5, 3, generator=noise)
    return {
        "weights": {"b": weight_NM.t(), "a": weight_NM, "every second": weight_NM.flatten()[::2]},
        "moments": {str(dtype): torch.randint(0, 2, (4, 2), generator=noise).to(dtype) for dtype in DTYPES}
        | {"scalar": torch.tensor(3), "empty": torch.zeros(0, 4), "nan": torch.tensor([float("nan"), -0.0])},
    }


def bits(tensor):
    flat_N = tensor.contiguous().reshape(-1)
    return str(tensor.dtype), tuple(tensor.shape), flat_N.view(torch.uint8).tolist()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back_bit_for_bit_whatever_its_dtype_and_strides(tmp_path):
    save(tmp_path, 7, tensors(), VALUES, score=0.5)
    found = load_newest(tmp_path)
    assert (found.step, found.score, found.values, found.warnings) == (7, 0.5, VALUES, ())
    for file, expected in tensors().items():
        assert {k: bits(t) for k, t in found.tensors(file).items()} == {k: bits(t) for k, t in expected.items()}


def test_a_parameter_that_learns_can_be_saved_and_its_file_is_plain_safetensors(tmp_path):
    weight_NM = torch.nn.Parameter(torch.full((3, 2), 0.5, dtype=torch.bfloat16))
    folder = save(tmp_path, 1, {"w": {"x": weight_NM}}, {})
    (loaded_NM,) = load_file(folder / "w.safetensors").values()
    assert torch.equal(loaded_NM, weight_NM)


def test_equal_states_make_equal_bytes(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / name, 3, tensors(), VALUES)
    for file in names(tmp_path / "a" / "step-00000003"):
        assert len({(tmp_path / name / "step-00000003" / file).read_bytes() for name in ("a", "b")}) == 1


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a flipped bit": flip,
    "a torn file": lambda path, at: path.write_bytes(path.read_bytes()[: at % path.stat().st_size]),
    "a byte too many": lambda path, at: path.write_bytes(path.read_bytes() + b"\0"),
    "a missing file": lambda path, at: path.unlink(),
    "an empty file": lambda path, at: path.write_bytes(b""),
}
FILES = ["weights.safetensors", "moments.safetensors", "values.json", "manifest.json"]


@settings(max_examples=40, deadline=None)
@given(damage=st.sampled_from(sorted(DAMAGES)), file=st.sampled_from(FILES), at=st.integers(0, 10_000))
def test_any_damage_to_the_newest_falls_back_to_the_one_before_with_a_warning(tmp_path_factory, damage, file, at):
    folder = tmp_path_factory.mktemp("c")
    for step in (1, 2):
        save(folder, step, tensors(step), {"step": step})
    path = folder / "step-00000002" / file
    if damage == "a byte too many" and file == "manifest.json":
        path.write_bytes(path.read_bytes() + b" ")  # which JSON allows: not a damage
        return
    DAMAGES[damage](path, at)
    found = load_newest(folder)
    assert (found.step, found.values) == (1, {"step": 1})
    (warning,) = found.warnings
    assert "step-00000002 cannot be used" in warning
    assert file in warning


def test_where_no_checkpoint_can_be_used_the_run_is_refused_and_where_none_is_there_it_begins(tmp_path):
    assert load_newest(tmp_path / "absent") is None
    for step in (1, 2):
        save(tmp_path, step, tensors(), {})
        (tmp_path / f"step-{step:08d}" / "values.json").unlink()
    with pytest.raises(RunError, match=r"no checkpoint .*step-00000002.*step-00000001"):
        load_newest(tmp_path)


@settings(max_examples=40, deadline=None)
@given(scores=st.lists(st.none() | st.integers(0, 3).map(float), min_size=1, max_size=6), keep=st.integers(1, 3))
def test_the_newest_and_the_best_are_kept_and_nothing_else(tmp_path_factory, scores, keep):
    folder = tmp_path_factory.mktemp("c")
    for step, score in enumerate(scores):
        save(folder, step, {"w": {"x": torch.tensor(step)}}, {}, keep=keep, score=score)
    known = [(score, step) for step, score in enumerate(scores) if score is not None]
    kept = {*range(len(scores))[-keep:]} | ({max(known)[1]} if known else set())  # of equal scores the newest
    assert names(folder) == [f"step-{step:08d}" for step in sorted(kept)]


def test_a_score_that_is_not_a_number_is_no_score(tmp_path):
    for step, score in enumerate([0.5, float("nan"), float("inf"), 0.1]):
        save(tmp_path, step, {}, {}, keep=1, score=score)
    assert names(tmp_path) == ["step-00000000", "step-00000003"]


def test_a_step_saved_again_replaces_a_damaged_one_and_its_abandoned_future(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, tensors(), {"try": 1}, keep=3)
    for step in (20, 30):
        (tmp_path / f"step-{step:08d}" / "values.json").write_text("{}")
    assert load_newest(tmp_path).step == 10
    save(tmp_path, 20, tensors(), {"try": 2}, keep=3)
    assert names(tmp_path) == ["step-00000010", "step-00000020.1"]
    assert load_newest(tmp_path).values == {"try": 2}
    save(tmp_path, 20, tensors(), {"try": 3}, keep=3)
    assert (load_newest(tmp_path).values, load_newest(tmp_path).warnings) == ({"try": 3}, ())


def test_what_a_killed_writer_left_is_not_read_and_is_removed_by_the_next(tmp_path):
    save(tmp_path, 1, tensors(), {})
    (tmp_path / ".tmp-00000002").mkdir()
    (tmp_path / ".tmp-00000002" / "weights.safetensors").write_bytes(b"half")
    (tmp_path / "step-notes").mkdir()  # a person's own
    assert (load_newest(tmp_path).step, load_newest(tmp_path).warnings) == (1, ())
    save(tmp_path, 2, tensors(), {})
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-notes"]


def test_a_failed_save_leaves_the_old_checkpoint_and_nothing_else(tmp_path):
    save(tmp_path, 1, tensors(), {})
    with pytest.raises(ValueError, match="JSON"):
        save(tmp_path, 2, tensors(), {"x": float("nan")})
    assert names(tmp_path) == ["step-00000001"]


def script(code, *args):
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


FULL = """
import resource, sys
from pathlib import Path
import torch
from rung.core.checkpoint import save
from rung.core.errors import RunError
folder = Path(sys.argv[1])
save(folder, 1, {"w": {"x": torch.ones(1000)}}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    save(folder, 2, {"w": {"x": torch.ones(1000)}, "m": {"x": torch.ones(500_000)}}, {})
except RunError as error:
    print(error)
"""


def test_a_full_disk_says_how_much_was_needed_and_leaves_the_old_checkpoint(tmp_path):
    """2.0 MB against files of at most 1 MiB: the system refuses the write with EFBIG, as a full disk with ENOSPC."""
    message = script(FULL, tmp_path)
    assert "the checkpoint of step 2 needs 2.0 MB in" in message
    assert "(File too large): make room and resume; the earlier checkpoints are intact" in message
    assert names(tmp_path) == ["step-00000001"]
    assert verify(tmp_path / "step-00000001") == ""


MEMORY = """
import resource, sys
from pathlib import Path
import torch
from rung.core.checkpoint import load_newest, save
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
save(Path(sys.argv[1]), 1, {"w": {"x": torch.ones(1000)}}, {})
state = {"w": {str(i): torch.ones(1000, 1000) for i in range(25)}}
before = peak()
save(Path(sys.argv[1]), 2, state, {})
print(peak() - before)
"""


def test_saving_takes_no_second_copy_of_the_tensors(tmp_path):
    assert float(script(MEMORY, tmp_path)) < 20  # MB, for 100 MB of tensors


KILLS = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from rung.core.checkpoint import load_newest, save
torch.set_num_threads(1)
folder = Path(sys.argv[1])
state = lambda step: {name: {str(i): torch.full((100, 1000), float(step)) for i in range(8)} for name in "ab"}
save(folder, 0, state(0), {"step": 0})
hits, last = 0, 0
for delay in json.loads(sys.argv[2]):
    child = os.fork()
    if child == 0:
        for step in range(last + 1, 10_000):
            save(folder, step, state(step), {"step": step}, keep=1, score=None)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    hits += any(path.name.startswith(".tmp-") for path in folder.iterdir())
    found = load_newest(folder)
    assert not found.warnings, found.warnings
    assert found.step >= last and found.values == {"step": found.step}
    assert all((t == found.step).all() for name in "ab" for t in found.tensors(name).values())
    last = found.step
print(json.dumps([hits, last]))
"""


def test_kill_9_at_any_moment_of_a_save_leaves_a_sound_checkpoint(tmp_path):
    """keep=1 is the hardest: the only old checkpoint is removed as soon as the new one is in place."""
    delays = [0.003 * 1.25**i for i in range(20)]  # 3 ms to 200 ms; a save takes tens
    hits, last = json.loads(script(KILLS, tmp_path, json.dumps(delays)))
    assert hits >= 5  # killed in the middle of writing
    assert last >= 3  # and some saves went through
