"""Notebooks run from top to bottom: on a fresh clone, on one real run, and on what scripts/small_runs.sh makes."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from options import contrast
from tests.test_visualization import COLUMNS, write_run

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SCRIPT = (ROOT / "scripts" / "small_runs.sh").read_text()


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A checkout in which nothing was trained yet."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "visualization").symlink_to(ROOT / "visualization")
    monkeypatch.setattr(sys, "path", sys.path[:])
    return tmp_path


def execute(notebook, clone, monkeypatch):
    """Run the code cells as a kernel started beside the notebook; returns the figures they show."""
    monkeypatch.chdir(clone / "notebooks")
    shown = []
    names = {"display": shown.append}
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            *lines, last = [line for line in cell["source"] if not line.startswith("%")]
            exec(compile("".join(lines) + last, cell["id"], "exec"), names)
            if last.startswith("figures."):
                shown.append(eval(last, names))
    return [figure for figure in shown if isinstance(figure, Figure)]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_fresh_clone_is_told_which_command_makes_runs(notebook, clone, monkeypatch, capsys):
    assert execute(notebook, clone, monkeypatch) == []
    assert "bash scripts/demo.sh" in capsys.readouterr().out


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_one_real_run_is_enough(notebook, clone, monkeypatch, capsys):
    monkeypatch.chdir(clone)
    size = "--width 0.25 --data_fraction 0.02 --batch_size 16 --queue_size 16 --epochs 2 --device cpu --no_warm"
    ft = "--ft_pos extrapolate --ft_neg interpolate --ft_begin_epoch 1 --save_score --knn_freq 2 --name demo"
    monkeypatch.setattr(sys, "argv", ["main_contrast.py", *size.split(), *ft.split()])
    runpy.run_path(str(ROOT / "main_contrast.py"), run_name="__main__")
    figures = execute(notebook, clone, monkeypatch)
    assert len(figures) >= 3 and all(figure.axes for figure in figures)
    for figure in figures:
        figure.draw_without_rendering()
    assert "demo" in capsys.readouterr().out


def small_runs():
    """Name -> arguments of every run of the script, as bash reads it."""
    found, shared = {}, re.search(r"python main_contrast.py (.*?) \"\$@\"", SCRIPT.replace("\\\n", " "), re.DOTALL)[1]
    for variable, values, body in re.findall(r"^for (\w+) in (.*?); do\n(.*?)^done", SCRIPT, re.MULTILINE | re.DOTALL):
        for value in values.split():
            name, *flags = shlex.split(body.strip().removeprefix("train ").replace(f"${variable}", value))
            found[name] = flags
    for line in re.findall(r"^train (.*)", SCRIPT, re.MULTILINE):
        name, *flags = shlex.split(line)
        found[name] = flags
    return {name: [*shlex.split(shared.replace("$name", name)), *flags] for name, flags in found.items()}


def test_the_small_runs_are_what_the_analysis_looks_for(clone, monkeypatch, capsys):
    runs = small_runs()
    assert len(runs) == 10
    for name, arguments in runs.items():
        opt, _, notes = contrast.parse(arguments)
        assert opt.name == name and opt.save_score and opt.knn_freq == opt.epochs and not notes
        ft = (opt.ft_pos, opt.ft_neg) != ("none", "none")
        about = {"ft_pos": opt.ft_pos, "ft_neg": opt.ft_neg, "key_momentum": opt.key_momentum}
        folder = clone / opt.model_path / name
        columns = (*COLUMNS, "negative_max")
        write_run(folder, ft=ft, before=ft, columns=columns, ft_begin_epoch=opt.ft_begin_epoch, **about)
    figures = execute(ROOT / "notebooks" / "analysis.ipynb", clone, monkeypatch)
    legends = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in figures]
    sweep = [f"momentum-{m}" for m in ("0", "0.5", "0.9", "0.99", "0.999", "1")]
    assert legends[0][:6] == legends[1][:6] == sweep
    effect = [axes.get_ylabel() for axes in figures[2].axes[::3]]
    assert effect == ["momentum-0.99", "ft-from-2", "neg-from-2", "pos-from-2"]
    assert legends[3][:4] == effect and legends[4][0] == "ft-from-2"
    assert legends[5][:3] == ["momentum-0.99", "ft-from-0", "ft-from-2"]
    assert capsys.readouterr().out.count("ft-from-2") == 2
