"""The harness of the benches: who is compared with whom, in what order, and what a ratio means."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench import gpu, harness, workload
from bench.harness import Options, Side, SideFailedError, Worker, compare
from rung.lm.decoder import Decoder
from rung.lm.weights.families import from_hugging_face

ROOT = Path(__file__).parent.parent
GIVEN = Options(model="-", repeats=3, threads=1, quick=False)
OURS = Side(name="ours", job="-", spec={"seconds": 2.0})
SLOW = Side(name="slow peer", job="-", spec={"seconds": 9.0})
FAST = Side(name="fast peer", job="-", spec={"seconds": 6.0})
BROKEN = Side(name="broken peer", job="-", spec={})


@pytest.fixture
def turns(monkeypatch, tmp_path):
    """Sides that answer what their specification says; the list of (side, turn) as it happens."""
    seen: list[tuple[str, int]] = []

    class Scripted:
        def __init__(self, side: Side, threads: int) -> None:
            self.side = side

        def turn(self, number: int) -> dict[str, float]:
            if not self.side.spec:
                raise SideFailedError("it broke")
            seen.append((self.side.name, number))
            return {"seconds": self.side.spec["seconds"] + (100 if number == 0 else number), "tokens": 12}

        def jiffies(self) -> int:
            return 0

        def close(self) -> None:
            seen.append((self.side.name, -1))

    monkeypatch.setattr(harness, "Worker", Scripted)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    return seen


def _compared(peers, **options):
    return compare("x", OURS, peers, harness.seconds, unit="s", bar="-", given=GIVEN, **options)


def test_sides_take_turns_after_a_warm_up_that_is_not_counted(turns):
    result = _compared([FAST], higher_is_better=False)
    assert [turn for turn in turns if turn[1] >= 0] == [
        (name, number) for number in range(4) for name in ("ours", "fast peer")
    ]
    assert [turn["seconds"] for turn in result["turns"]["ours"]] == [3.0, 4.0, 5.0]


def test_the_ratio_is_how_many_times_less_time_ours_takes(turns):
    result = _compared([FAST], higher_is_better=False)
    assert result["ratio"] == pytest.approx(8.0 / 4.0)  # medians of 7, 8, 9 and of 3, 4, 5
    assert result["pairs"] == pytest.approx([7 / 3, 8 / 4, 9 / 5])


def test_the_ratio_is_how_many_times_more_tokens_ours_makes(turns):
    result = compare("x", OURS, [FAST], harness.tokens_per_second, unit="tokens/s", bar="-", given=GIVEN)
    assert result["ratio"] == pytest.approx((12 / 4.0) / (12 / 8.0))


@pytest.mark.parametrize("peers", [[SLOW, FAST, BROKEN], [BROKEN, FAST, SLOW]])
def test_only_the_fastest_peer_goes_on_and_a_broken_one_is_left_out(turns, peers):
    result = _compared(peers, higher_is_better=False)
    assert result["peer"] == "fast peer"
    assert result["warm_up"].keys() == {"ours", "slow peer", "fast peer"}
    assert turns.index(("slow peer", -1)) < turns.index(("ours", 1)), "it would still hold its memory"


def test_a_peer_that_lost_is_gone_before_the_next_one_starts(turns):
    third = Side(name="third peer", job="-", spec={"seconds": 7.0})
    _compared([SLOW, FAST, third], higher_is_better=False)
    assert turns.index(("slow peer", -1)) < turns.index(("third peer", 0)), "together they may not fit into memory"
    assert turns.index(("third peer", -1)) < turns.index(("ours", 1))


def test_the_highest_value_is_the_fastest_where_higher_is_better(turns):
    result = compare("x", OURS, [SLOW, FAST], harness.tokens_per_second, unit="tokens/s", bar="-", given=GIVEN)
    assert result["peer"] == "fast peer"


def test_without_our_own_side_there_is_no_comparison(turns):
    with pytest.raises(SideFailedError):
        compare("x", BROKEN, [FAST], harness.seconds, unit="s", bar="-", given=GIVEN)
    with pytest.raises(SideFailedError, match="no peer answered"):
        _compared([BROKEN])


def test_a_result_is_one_json_line_that_names_the_machine(turns, tmp_path):
    _compared([FAST], higher_is_better=False)
    [line] = (tmp_path / "results.jsonl").read_text().splitlines()
    assert {"when", "machine", "what", "ratio", "turns", "others_busy"} <= json.loads(line).keys()


def test_a_worker_answers_turns_and_reports_why_it_failed():
    side = Side(name="sampler", job="bench.ours:sampling", spec={"rows": 2, "vocabulary": 300, "temperature": 1.0})
    with Worker(side, 1) as worker:
        answer = worker.turn(0)
    assert answer["tokens"] == 2
    assert answer["peak_bytes"] > 50e6  # an interpreter with torch
    with pytest.raises(SideFailedError, match="no_such_job"):
        Worker(Side(name="nobody", job="bench.ours:no_such_job"), 1)


def test_work_of_others_beside_a_turn_is_seen_and_a_sides_own_is_not(monkeypatch, capsys):
    class Busy:
        used = 0

        def jiffies(self) -> int:
            return self.used

        def turn(self, number: int) -> dict[str, float]:
            self.used += 150  # of the 200 ticks that two cores had
            return {}

    for busy, idle, verdict in ((155, 45, ": idle"), (195, 5, "NOT IDLE")):
        ticks = iter([(1000, 0, 5000), (1000 + busy, 0, 5000 + busy + idle)])
        monkeypatch.setattr(harness, "_jiffies", lambda ticks=ticks: next(ticks))
        load = harness.Load()
        load.watched(Busy(), 1)
        assert load.summary()["others_busy"] == [pytest.approx((busy - 150) / 200)]
        assert verdict in capsys.readouterr().out


def test_both_sides_of_the_learner_get_one_batch_with_uneven_lengths():
    spec = workload.uneven(2, 3, (5, 9), (4, 8))
    assert workload.batch(spec, 2000) == workload.batch(spec, 2000)
    sizes = [[len(ids) for ids in completions] for _, completions, _ in workload.batch(spec, 2000)]
    assert all(max(group) == 8 and min(group) < 8 for group in sizes)


def test_the_reward_of_the_step_benches_gives_every_group_a_signal():
    rewards = [workload.reward({}, text) for text in ("12", "13", "12.", "a", "")]
    assert len(set(rewards)) == len(rewards)


def test_without_a_gpu_its_bench_says_so_and_fails(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.gpu"])
    with pytest.raises(SystemExit, match="needs a CUDA GPU") as end:
        gpu.main()
    assert end.value.code, "a word as the code is exit 1"


@pytest.mark.parametrize(
    ("name", "parameters"), [("0.5b", 494_032_768), ("1.5b", 1_543_714_304), ("7b", 7_615_616_512)]
)
def test_the_shapes_of_the_gpu_bench_are_the_published_ones_on_both_sides(name, parameters):
    """The numbers are those of the published weights: 0.49, 1.54 and 7.61 billion in the report."""
    shape = gpu.SHAPES[name]
    decoder = Decoder(from_hugging_face(shape, where="here"), torch.bfloat16, "meta")
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16)
    assert decoder.footprint().parameters == theirs.num_parameters() == parameters


@pytest.mark.parametrize("tied", [True, False])
def test_the_floor_of_a_step_is_its_weights_and_the_live_rows(tied):
    decoder = Decoder(from_hugging_face(gpu.TINY | {"tie_word_embeddings": tied}, where="here"), torch.bfloat16)
    weights = sum(p.numel() for name, p in decoder.named_parameters() if tied or name != "embedding.weight")
    steps = [3 * (5 + k) for k in range(1, 4)]  # 3 streams, prompts of 5, 4 tokens of which the prefill makes one
    row = 2 * 2 * 2 * 16  # layers, keys and values, heads of them, their size
    assert gpu.floor_bytes(decoder, 3, 5, 4) == 2 * (weights + row * sum(steps) / len(steps))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["planning", "sampling", "parted", "rollout", "learner", "step", "memory", "gpu"])
def test_every_bench_runs_from_end_to_end(name):
    command = [sys.executable, "-m", f"bench.{name}", "--quick", "--threads", "1"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "left out" not in ran.stdout
    assert "did not finish" not in ran.stdout
