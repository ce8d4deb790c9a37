"""`rung solve`: every kind of model, the answer on stdout, the proof on stderr, and messages for what cannot be."""

import pytest

from rung.cli.main import main


def solved(capsys, *args: str) -> tuple[str, str]:
    assert main(["solve", *args]) == 0
    said = capsys.readouterr()
    return said.out, said.err


def test_a_model_of_the_zoo_with_its_own_options(capsys):
    out, err = solved(capsys, "zhao", "--gamma", "0.9", "--model.forbidden-reward", "-10", "--method", "policy")
    assert out.splitlines()[0].split()[:3] == ["3.49", "→", "3.87"]
    assert "25 states, 125 pairs, gamma 0.9: policy" in err
    assert "(proved)" in err


def test_a_drawn_grid_an_environment_and_a_function_of_a_file(capsys, tmp_path):
    (tmp_path / "grid.txt").write_text("..T\n.#.\n")
    assert "10.00T" in solved(capsys, str(tmp_path / "grid.txt"), "--gamma", "0.9")[0]
    assert "500 states" in solved(capsys, "Taxi-v4", "--gamma", "0.9")[1]
    (tmp_path / "mine.py").write_text(
        "from rung.mdp.finite import from_dict\n\n\ndef coin(pays: float = 1.0):\n"
        "    return from_dict({'toss': {'it': [(0.5, 'toss', pays), (0.5, None, 0.0)]}}, 1.0)\n"
    )
    out, _ = solved(capsys, f"{tmp_path / 'mine.py'}:coin", "--model.pays", "4")
    assert out.split()[2] == "4.00"


def test_pictures_are_written_where_asked(capsys, tmp_path):
    solved(capsys, "zhao", "--picture", str(tmp_path / "grid.svg"))
    solved(capsys, "zhao", "--method", "value", "--epsilon", "1", "--picture", str(tmp_path / "sweeps.gif"))
    assert (tmp_path / "grid.svg").stat().st_size > 1000
    assert (tmp_path / "sweeps.gif").read_bytes()[:3] == b"GIF"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["zhoa"], "the zoo has none. Did you mean 'zhao'?"),
        (["zhao", "--method", "valve"], "unknown method 'valve'"),
        (["zhao", "--model.forbiden-reward", "-3"], "no option --model.forbiden-reward"),
        (["chain"], "chain needs --model.length"),
        (["garnet", "--model.states", "5", "--model.actions", "2", "--model.branching", "2"], "garnet needs --gamma"),
        (["maze", "--model.rows", "1", "--model.columns", "1"], "a maze has at least two cells; got 1 x 1"),
        (["maze", "--model.rows", "1000000", "--model.columns", "100000"], "100,000,000,000 states need at least"),
        (["zhao", "--picture", "x.bmp"], "--picture ends in .svg"),
        (["zhao", "--picture", "nowhere/x.svg"], "there is no folder nowhere"),
        (["./my-very.txt"], "no file has this name"),
        (["zhao", "--horizon", "-3"], "--horizon is a number of steps; got -3"),
        (["Nothing-v9"], "Gymnasium makes no Nothing-v9"),
        ([], "needs MODEL as its first word"),
        (["missing.py:f"], "there is no file missing.py"),
        (["zhao", "--gamma", "2"], "gamma is between 0 and 1; got 2.0"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(capsys, args, message):
    assert main(["solve", *args]) in (1, 2)
    assert message in capsys.readouterr().err


def test_other_criteria(capsys):
    """FrozenLake's published optimum within 100 steps; the forest's gain."""
    assert "0.744190 from the start" in solved(capsys, "FrozenLake-v1", "--gamma", "1", "--horizon", "100")[1]
    assert "<= reward a step <=" in solved(capsys, "forest", "--method", "average")[1]
    assert "-0.04" in solved(capsys, "Blackjack-v1", "--horizon", "30")[1]


def test_a_file_that_makes_no_model_is_refused(capsys, tmp_path):
    (tmp_path / "mine.py").write_text("def none():\n    return 3\n\n\nnumber = 4\n")
    assert main(["solve", f"{tmp_path / 'mine.py'}:none"]) in (1, 2)
    assert "returned int, and not a FiniteMDP" in capsys.readouterr().err
    assert main(["solve", f"{tmp_path / 'mine.py'}:number"]) in (1, 2)
    assert "number of" in capsys.readouterr().err
    (tmp_path / "grid").write_bytes(b"\xff\xfe\x00")
    assert main(["solve", str(tmp_path / "grid")]) in (1, 2)
    assert "is no text" in capsys.readouterr().err


def test_help_lists_the_models_and_their_options(capsys):
    assert main(["solve", "--help"]) == 0
    assert "open_maze" in capsys.readouterr().out
    assert main(["solve", "garnet", "--help"]) == 0
    assert "--model.branching" in capsys.readouterr().out
