"""`rung figures`: the page and its path, what fails and how it is told, and names that nothing has."""

from rung.cli.main import main
from rung.mdp.figures import page


def test_a_page_of_some_figures_is_written_and_its_path_alone_printed(capsys, tmp_path):
    assert main(["figures", "--folder", str(tmp_path), "--only", "zhao_2_4"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'figures.html'}\n"
    assert "figures 1/1" in said.err
    text = (tmp_path / "figures.html").read_text()
    assert "every number and claim holds" in text
    assert "<svg" in text


def test_a_wrong_number_is_an_error_that_names_it(capsys, tmp_path, monkeypatch):
    (tmp_path / "planted.toml").write_text(page.PUBLISHED.read_text().replace("[8.5, 10, 10, 10]", "[8.6, 10, 10, 10]"))
    monkeypatch.setattr(page, "PUBLISHED", tmp_path / "planted.toml")
    assert main(["figures", "--folder", str(tmp_path), "--only", "zhao_2_4"]) == 1
    assert "error: these do not hold: zhao_2_4: second: off by 0.1 at most" in capsys.readouterr().err


def test_a_name_that_no_figure_has_is_answered_with_the_nearest(capsys, tmp_path):
    assert main(["figures", "--folder", str(tmp_path), "--only", "zaho_2_4"]) == 2
    assert "Did you mean 'zhao_2_4'?" in capsys.readouterr().err
