"""Two runs side by side in the terminal: what differs, what was measured, nothing else."""

import json

import pytest

from scripts import compare
from tests.test_visualization import KNN, LINEAR, write_run


@pytest.fixture
def pair(tmp_path):
    knn = {"knn": {"backbone": {"top1": 60.26}, "head": {"top1": 50.0}, "k": 200}}
    return [
        write_run(tmp_path / "moco", ft=False, results=knn, name="moco", seed=1, lr_decay_epochs=[4]),
        write_run(tmp_path / "ft", results=LINEAR | KNN, name="ft", seed=1, lr_decay_epochs=[2, 3]),
    ]


def rows(text):
    return {line.split("  ")[0]: line.split()[-2:] for line in text.splitlines() if line}


def test_only_differing_options_and_measures_with_deltas(pair, capsys):
    assert compare.main([str(folder) for folder in pair]) == 0
    options, measures = map(rows, capsys.readouterr().out.split("\n\n"))
    assert list(options) == ["option", "ft_pos", "lr_decay_epochs"]
    assert options["ft_pos"] == ["none", "extrapolate"]
    assert measures["knn, backbone"] == ["61.26", "(+1)"] and measures["knn, head"] == ["50", "(+0)"]
    assert measures["linear, last"] == ["-", "56.2"] and "linear, best" in measures
    assert measures["knn while training, backbone, last"] == ["30", "(+0)"]


def test_an_option_that_an_older_run_did_not_have_is_no_difference(pair, tmp_path, capsys):
    newer = write_run(tmp_path / "newer", name="newer", seed=1, invented=True)
    compare.main([str(folder) for folder in (*pair, newer)])
    assert "invented" not in capsys.readouterr().out


def test_of_several_evaluations_the_last_counts(tmp_path, capsys):
    runs = [write_run(tmp_path / name, name=name) for name in "ab"]
    for number in (2, 10, 9):
        beside = tmp_path / f"a_knn-{number}"
        beside.mkdir()
        found = {"knn": {"backbone": {"top1": number}}, "ckpt": str(runs[0] / "current.pth"), "use_ema": False}
        (beside / "results.json").write_text(json.dumps(found))
    compare.main([*map(str, runs)])
    assert rows(capsys.readouterr().out)["knn, backbone"] == ["10", "-"]


def test_an_evaluation_is_no_run(pair, tmp_path, capsys):
    probe = write_run(tmp_path / "probe", eval="linear")
    assert compare.main([str(pair[0]), str(probe)]) == 2
    assert "is an evaluation: name the run that it is of" in capsys.readouterr().err


def test_columns_line_up(pair, capsys):
    compare.main([str(folder) for folder in pair])
    for table in capsys.readouterr().out.split("\n\n"):
        place = table.splitlines()[0].index("moco")
        assert all(line[place - 1] == " " and line[place] != " " for line in table.splitlines() if line)


@pytest.mark.parametrize("count, said", [(1, "two or more"), (0, "required")])
def test_fewer_than_two_runs_are_refused(pair, capsys, count, said):
    try:
        status = compare.main([str(folder) for folder in pair[:count]])
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and said in capsys.readouterr().err


def test_a_missing_run_is_one_sentence(pair, capsys):
    assert compare.main([str(pair[0]), "nowhere"]) == 2
    assert "no run folder" in capsys.readouterr().err
