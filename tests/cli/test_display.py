"""What is shown of a long job, on a terminal and elsewhere."""

import io
import signal

import pytest

from rung.cli.display import PLAIN_SECONDS, Display, duration, plain_line
from rung.core.progress import Progress


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def train(done, **metrics):
    return Progress(stage="train", done=done, total=100, metrics=metrics, seconds_left=190.4)


def test_a_line_says_stage_count_numbers_and_time_left():
    numbers = {"reward": 0.53125, "accuracy_held_out": 0.614, "tokens_per_second": 1234.5, "gap_max": 3.0}
    assert (
        plain_line(train(12), numbers)
        == "training 12/100  reward 0.531  held-out accuracy 61.4%  tokens/s 1,234  3 min 10 s left"
    )
    assert plain_line(Progress(stage="download", done=12_500_000, total=98_000_000), {}) == "downloading 12.5/98.0 MB"
    assert plain_line(Progress(stage="load"), {}) == "loading the model"


@pytest.mark.parametrize(("seconds", "said"), [(0, "0 s"), (59.4, "59 s"), (61, "1 min 01 s"), (7260, "2 h 01 min")])
def test_durations_are_said_as_a_person_would(seconds, said):
    assert duration(seconds) == said


def test_away_from_a_terminal_there_are_plain_lines_at_a_reader_s_pace():
    stream, clock = io.StringIO(), Clock()
    with Display(stream, clock=clock) as display:
        for step in range(1, 101):
            clock.now += PLAIN_SECONDS / 4
            display(train(step, reward=0.5))
        display(Progress(stage="evaluate", done=0, total=10))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("training 1/100")  # the first of a stage at once
    assert [line.split()[1] for line in lines[1:4]] == ["5/100", "9/100", "13/100"]
    assert lines[-2].startswith("training 100/100")  # and the last
    assert lines[-1] == "measuring 0/10"
    assert "\x1b" not in stream.getvalue()


def test_a_training_line_repeats_the_newest_accuracy_and_another_stage_does_not():
    stream, clock = io.StringIO(), Clock()
    with Display(stream, clock=clock) as display:
        display(Progress(stage="baseline", done=9, total=9, metrics={"accuracy_held_out": 0.125}))
        display(train(1, reward=0.5))
        display(Progress(stage="checkpoint", done=1, total=100))
    lines = stream.getvalue().splitlines()
    assert "reward 0.5  held-out accuracy 12.5%" in lines[1]
    assert lines[2] == "writing a checkpoint 1/100"


def test_an_accuracy_is_named_after_its_problems_and_an_older_one_of_others_goes():
    stream = io.StringIO()
    with Display(stream) as display:
        display(Progress(stage="baseline", done=9, total=9, metrics={"accuracy_held_out": 0.002}))
        display(Progress(stage="evaluate", done=9, total=9, metrics={"accuracy_validation": 0.828}))
        display(train(51, reward=0.5))
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith("held-out accuracy 0.2%")
    assert lines[1] == "measuring 9/9  validation accuracy 82.8%"
    assert "reward 0.5  validation accuracy 82.8%" in lines[2]
    assert "held-out" not in lines[2]


def test_a_terminal_gets_a_panel_that_moves_and_leaves_only_what_was_said():
    stream = Terminal()
    with Display(stream) as display:
        display(train(3, reward=0.25))
        display(Progress(stage="notice", text="careful"))
        display(train(4, accuracy_held_out=0.5))
        display._panel.refresh()
    shown = stream.getvalue()
    assert "\x1b[" in shown
    assert "careful" in shown
    assert "held-out accuracy" in shown
    assert "0.25" in shown.rpartition("50.0%")[0]  # the newest of each number stays


def test_what_a_model_or_a_file_said_cannot_steer_the_terminal():
    for stream in (io.StringIO(), Terminal()):
        with Display(stream) as display:
            display(Progress(stage="notice", text="bad \x1b]0;title\x07 [bold]name[/bold]"))
            display(Progress(stage="\x1b[31m", text=""))
            if display._panel:
                display._panel.refresh()
        assert "␛]0;title␇ [bold]name[/bold]" in stream.getvalue()
        assert "\x1b]0" not in stream.getvalue()
        assert "\x1b[31m" not in stream.getvalue()


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert not Display(Terminal()).live


def test_the_first_ctrl_c_waits_for_the_end_of_the_step_and_the_second_does_not():
    stream = io.StringIO()
    with Display(stream, finish=True) as display:
        signal.raise_signal(signal.SIGINT)
        display(Progress(stage="evaluate", done=1, total=2))  # the step's end, where it is saved, is near
        display(Progress(stage="checkpoint", done=1, total=2))
        with pytest.raises(KeyboardInterrupt):
            display(train(1))
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "Stopping after this step; Ctrl-C again stops at once." in stream.getvalue()


def test_afterwards_ctrl_c_is_what_it_was():
    before = signal.getsignal(signal.SIGINT)
    with Display(io.StringIO(), finish=True):
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
