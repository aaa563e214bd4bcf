"""Comparing methods: which program is told what, what is run again, and the table."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts import compare_methods

ROOT = Path(__file__).resolve().parents[1]


class Programs:
    """Stands in for the two programs: leaves in the run folder what they would, and remembers their command lines."""

    def __init__(self, failing=()):
        self.lines, self.failing = [], failing

    def __call__(self, line):
        self.lines.append(line)
        typed = dict(zip(line, line[1:]))
        folder = Path(typed.get("--model_path", "save")) / typed["--name"]
        folder.mkdir(parents=True, exist_ok=True)
        seed = int(typed["--seed"])
        if line[0] == "main_contrast.py":
            (folder / "options.json").write_text(json.dumps({"values": {"batch_size": 64}}))
            records = [{"kind": "step", "images_per_second": speed} for speed in (10, 640, 320)]
            records += [{"kind": "epoch", "epoch": epoch, "step": 10 * epoch} for epoch in (1, 2)]
            (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        elif typed["--eval"] == "linear":
            (folder / "results.json").write_text(json.dumps({"linear": {"last": {"top1": 70.0 + seed}}}))
        else:
            top1 = (50.0 if "--ckpt" in typed else 20.0) + seed
            found = {"knn": {"backbone": {"top1": top1}, "head": {"top1": top1 + 5}}}
            (folder / "results.json").write_text(json.dumps(found))
        return typed.get("--method") not in self.failing or line[0] != "main_contrast.py"


@pytest.fixture
def programs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    programs = Programs()
    monkeypatch.setattr(compare_methods, "launch", programs)
    return programs


def table(page):
    """The rows as lists of cells."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]


def test_means_and_each_seed(programs, tmp_path, capsys):
    assert compare_methods.compare(["--methods", "MoCov2,BYOL", "--seeds", "0,3", "--linear", "-o", "t.md"])
    heads, _, moco, byol = table(capsys.readouterr().out)
    assert dict(zip(heads, moco)) == {
        "method": "MoCov2",
        "seeds": "0, 3",
        "untrained": "21.5 (20.0, 23.0)",
        "trained": "51.5 (50.0, 53.0)",
        "gain": "30.0 (30.0, 30.0)",
        "head": "56.5 (55.0, 58.0)",
        "linear": "71.5 (70.0, 73.0)",
        "s/epoch": "2.0 (2.0, 2.0)",
    }
    assert byol[0] == "BYOL" and table((tmp_path / "t.md").read_text())[2:] == [moco, byol]


def test_each_program_is_told_what_it_understands(programs, capsys):
    flags = "--data_folder x.npz --mean .5,.5,.5 --width 0.25 -j 0 --amp --ft_pos extrapolate --lr 0.1 --no_download"
    assert compare_methods.compare(["--methods", "SimSiam", "--epochs", "3", "--", *flags.split()])
    untrained, train, knn = programs.lines
    assert train[:5] == ["main_contrast.py", "--method", "SimSiam", "--data_folder", "x.npz"]
    assert {"--epochs", "--ft_pos", "--lr", "auto"} <= set(train)
    for line in (untrained, knn):
        told = dict(zip(line, line[1:]))
        assert told["--mean"] == "0.5,0.5,0.5" and told["--num_workers"] == "0" and told["--amp"] == "auto"
        assert "--no_download" in line and not {"--epochs", "--ft_pos", "--learning_rate"} & set(line)
    assert {"--method", "--width"} <= set(untrained) and "--ckpt" not in untrained
    assert "--ckpt" in knn and "--width" not in knn
    assert f"python {' '.join(train)}" in capsys.readouterr().out


def test_only_what_is_missing_is_run_again(programs):
    line = ["--methods", "MoCov2,SimCLR"]
    compare_methods.compare(line)
    first, programs.lines = programs.lines, []
    compare_methods.compare([*line, "--linear"])
    kinds = [line[line.index("--eval") + 1] if "--eval" in line else "train" for line in programs.lines]
    assert kinds == ["train", "linear"] * 2 and all("auto" in line for line in programs.lines)
    programs.lines = []
    compare_methods.compare([*line, "--epochs", "7"])
    names = [{line[line.index("--name") + 1] for line in lines} for lines in (first, programs.lines)]
    assert len(programs.lines) == 6 and not names[0] & names[1]


def test_a_run_that_fails_does_not_stop_the_others(programs, capsys):
    programs.failing = ["MoCov2"]
    assert not compare_methods.compare(["--methods", "MoCov2,SimCLR"])
    *_, moco, simclr = table(capsys.readouterr().out)
    assert moco[1:3] == ["failed", "–"] and simclr[3] == "50.0"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--methods", "MoCo3"], "did you mean MoCo?"),
        (["--methods", "MoCov2,BYOL", "--", "--ft_neg", "interpolate"], "--method BYOL has none"),
    ],
)
def test_nothing_is_run_when_the_flags_do_not_fit_a_method(programs, capsys, arguments, said):
    with pytest.raises(SystemExit):
        compare_methods.compare(arguments)
    assert said in capsys.readouterr().err and not programs.lines


@pytest.mark.parametrize("flags", ["--seed 1", "--name x", "--resume auto", "--method MoCo"])
def test_what_is_chosen_for_every_run_is_refused(programs, flags):
    with pytest.raises(ValueError, match=f"^{flags.split()[0]} is chosen for every run: leave it out behind --$"):
        compare_methods.compare(["--methods", "BYOL", "--", *flags.split()])


def test_the_programs_understand_these_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def launch(line):
        monkeypatch.setattr(sys, "argv", line)
        try:
            runpy.run_path(str(ROOT / line[0]), run_name="__main__")
        except SystemExit as end:
            return not end.code
        return True

    monkeypatch.setattr(compare_methods, "launch", launch)
    rng, labels = np.random.default_rng(0), np.arange(24) % 3
    images = rng.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    arrays = {f"{part}_{kind}": x for part in ("train", "test") for kind, x in (("images", images), ("labels", labels))}
    np.savez("x.npz", **arrays)
    flags = "--data_folder x.npz --width 0.25 --batch_size 8 --print_freq 1 --device cpu --view Lab"
    assert compare_methods.compare(["--methods", "CMC,SimSiam", "--epochs", "1", "--linear", "--", *flags.split()])
    rows = table(capsys.readouterr().out)
    assert [row[0] for row in rows[-2:]] == ["CMC", "SimSiam"] and not any("–" in row for row in rows[-2:])
