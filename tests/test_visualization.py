"""Reading run folders, the figures drawn from them, the command line and the notebook."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts import plot_scores
from visualization import figures, runs

ROOT = Path(__file__).resolve().parents[1]
STEPS, BATCH = 5, 4
COLUMNS = tuple(runs.COLUMNS.values())
KNN = {"knn": {"backbone": {"top1": 61.26, "top5": 90.0}, "head": {"top1": 50.0}}}
LINEAR = {"linear": {"last": {"top1": 56.2, "top5": 80.0}, "best": {"top1": 57.0, "top5": 81.0, "epoch": 3}}}


def write_run(folder, *, epochs=3, ft=True, before=True, results=None, columns=COLUMNS, **options):
    """A run folder as training leaves it, with random scores; the scores before FT are those after it plus 1."""
    (folder / "scores").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for epoch in range(1, epochs + 1):
        step = np.arange((epoch - 1) * STEPS, epoch * STEPS) + 1
        after = {name: draw.random((STEPS, BATCH), np.float32) for name in columns}
        earlier = {f"before_{name}": after[name] + 1 for name in columns} if before else {}
        path = folder / "scores" / f"scores_{epoch:04}.npz"
        np.savez(path, step=step, index=draw.integers(0, 9, (STEPS, BATCH)), epoch=epoch, **after, **earlier)
    flags = {"ft_pos": "extrapolate" if ft else "none", "ft_neg": "none", "ft_begin_epoch": 0, "cosine": True}
    (folder / "options.json").write_text(json.dumps({"values": flags | options, "sources": {}}))
    log = [{"kind": "step", "epoch": 1, "step": s, "loss": 7 / s, "learning_rate": 0.03} for s in (2, 4)]
    log.append({"kind": "knn", "epoch": 1, "step": 5, "backbone_top1": 30.0})
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    for evaluation, found in (results or {}).items():
        beside = folder.with_name(f"{folder.name}_{evaluation}-1")
        beside.mkdir()
        about = {"ckpt": f"/somewhere/{folder.name}/current.pth", "use_ema": False}
        (beside / "results.json").write_text(json.dumps({evaluation: found} | about))
    return folder


@pytest.fixture
def pair(tmp_path):
    ft = write_run(tmp_path / "ft", results=LINEAR | KNN, ft_begin_epoch=1)
    return [ft, write_run(tmp_path / "moco", ft=False, before=False)]


def saved(folder, column):
    """The column of all epochs, (S, B)."""
    return np.concatenate([np.load(path)[column] for path in sorted(folder.glob("scores/*.npz"))])


def test_curves_are_batch_means_of_the_saved_columns(pair):
    run, baseline = runs.read_runs(pair)
    assert run.steps.tolist() == list(range(1, 3 * STEPS + 1))
    for statistic, column in runs.COLUMNS.items():
        np.testing.assert_allclose(run.curve(statistic), saved(pair[0], column).mean(1), rtol=1e-6)
        np.testing.assert_allclose(run.curve(statistic, before=True), run.curve(statistic) + 1, rtol=1e-6)
        np.testing.assert_array_equal(baseline.curve(statistic, before=True), baseline.curve(statistic))
    np.testing.assert_allclose(run.curve("gap"), run.curve("positive_mean") - run.curve("negative_mean"))
    assert run.shows_before and not baseline.shows_before


def test_scores_that_were_not_recorded_have_no_curve(tmp_path):
    without_before = write_run(tmp_path / "a", before=False)
    without_negatives = write_run(tmp_path / "b", columns=["positive"])
    first, second = runs.read_runs([without_before, without_negatives])
    assert first.curve("gap") is not None and first.curve("gap", before=True) is None
    assert second.curve("positive_mean") is not None and second.curve("gap") is None
    assert second.curve("positive_mean", before=True) is not None


def titles(figure):
    return [axes.get_title("left") or axes.get_title() for axes in figure.axes]


@pytest.fixture
def without_negatives(tmp_path):
    """A run of SimSiam with FT."""
    folder = write_run(tmp_path / "simsiam", columns=["positive"])
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"kind": "step", "epoch": 1, "step": 5, "loss": -0.9, "feature_std": 0.02}\n')
    return folder


def test_a_panel_without_data_is_not_drawn(pair, without_negatives):
    (alone,), both = runs.read_runs([without_negatives]), runs.read_runs([*pair, without_negatives])
    positive = figures.TITLES["positive_mean"]
    measured = [positive, "Training loss", "k-NN accuracy (%)", "Spread of the embeddings"]
    assert titles(figures.overview([alone])) == measured
    assert titles(figures.compare([alone])) == titles(figures.waterfall([alone])) == [positive]
    assert titles(figures.grid([alone])) == [positive, positive]
    assert len(figures.overview([alone]).axes[0].lines) > len(figures.overview([alone]).axes[1].lines)
    assert [len(figure(both).axes) for figure in (figures.overview, figures.compare, figures.waterfall)] == [6, 3, 3]
    assert not any(axes.texts for axes in figures.overview(both).axes)
    assert [bool(axes.texts) for axes in figures.grid(both[:2], both[2:]).axes] == [False] * 3 + [True, True, False]


@pytest.mark.parametrize("draw", [figures.compare, figures.waterfall])
def test_asking_for_what_no_run_has_is_one_sentence(without_negatives, draw):
    with pytest.raises(ValueError, match="negative_mean was not recorded .*: draw positive_mean$"):
        draw(runs.read_runs([without_negatives]), "positive_mean", "negative_mean")


def test_all_figures_of_a_run_without_negatives(without_negatives, tmp_path, capsys):
    assert plot_scores.main([str(without_negatives), "--figure", "all", "-o", str(tmp_path / "s.png")]) == 0
    drawn = [Path(line).stem for line in capsys.readouterr().out.split()]
    assert drawn == ["s_overview", "s_comparison", "s_positive_mean", "s_grid", "s_waterfall", "s_distributions"]
    assert plot_scores.main([str(without_negatives), "--figure", "negative_mean"]) == 2
    assert "draw positive_mean" in capsys.readouterr().err


def test_only_the_drawn_columns_are_read(pair, monkeypatch):
    read = []
    load = runs._read_scores
    monkeypatch.setattr(runs, "_read_scores", lambda path, column: read.append(column) or load(path, column))
    opened = runs.read_runs(pair)
    assert set(read) == {"step"}
    figures.compare(opened, "negative_mean")
    figures.compare(opened, "negative_mean")
    assert read.count("negative_mean") == 6 and set(read) == {"step", "negative_mean"}


@pytest.mark.parametrize(
    "results, legend", [(LINEAR | KNN, "run  |  linear 56.2%"), (KNN, "run  |  k-NN 61.3%"), (None, "run")]
)
def test_legend_tells_the_accuracy(tmp_path, results, legend):
    assert runs.read_runs([write_run(tmp_path / "run", results=results)])[0].legend == legend


def test_labels_tell_the_folders_apart(tmp_path):
    long = "MoCov2_resnet18_RGB_mlp_0.2_ncek65536_epoch100_bs256"
    names = {
        ("seed1/demo", "seed2/demo"): ["seed1/demo", "seed2/demo"],
        (f"{long}_alpha0.99", f"{long}_alpha0.9"): ["alpha0.99", "alpha0.9"],
    }
    for folders, labels in names.items():
        paths = [write_run(tmp_path / folder) for folder in folders]
        assert [run.label for run in runs.read_runs(paths)] == labels
    assert runs.read_runs(paths[:1])[0].label == "MoCov2_resnet18_RGB_mlp_0.2_\nncek65536_epoch100_bs256_\nalpha0.99"
    assert runs.find_runs(tmp_path) == sorted(tmp_path / name for folders in names for name in folders)


def test_marks_follow_the_schedule(tmp_path):
    options = {"cosine": False, "lr_decay_epochs": [2, 9], "ft_begin_epoch": 1}
    run = runs.read_runs([write_run(tmp_path / "run", **options)])[0]
    assert run.marks() == {
        "end of epoch 1": (STEPS,),
        "learning-rate drop": (2 * STEPS,),
        "transformation starts": (STEPS,),
    }


def test_a_half_written_log_line_is_passed_over(tmp_path):
    folder = write_run(tmp_path / "run")
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"kind": "step", "epo')
    steps, losses = runs.read_runs([folder])[0].logged("step", "loss")
    assert steps.tolist() == [2, 4] and losses.tolist() == [3.5, 1.75]


def test_lines_hold_the_curves_and_the_legend_fits(pair):
    opened = runs.read_runs(pair)
    figure = figures.compare(opened)
    for axes, statistic in zip(figure.axes, figures.STATISTICS):
        assert axes.get_title("left") == figures.TITLES[statistic] and axes.get_xlabel() == "Iterations"
        for line, run in zip(axes.lines, opened):
            np.testing.assert_array_equal(line.get_ydata(), run.curve(statistic))
            np.testing.assert_array_equal(line.get_xdata(), run.steps)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[:2] == ["ft  |  linear 56.2%", "moco"] and "transformation starts" in legend


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize(
    "draw", [figures.overview, figures.compare, figures.grid, figures.waterfall, figures.distributions]
)
def test_nothing_leaves_the_page_or_covers_the_legend(pair, draw, count):
    labels = [f"a rather long name of run number {i}" for i in range(count)]
    figure = draw(runs.read_runs((pair * 5)[:count], labels=labels))
    figure.draw_without_rendering()
    legend, page = figure.legends[0].get_window_extent(), figure.bbox.padded(1)
    for box in [legend, *(axes.get_tightbbox() for axes in figure.axes)]:
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        assert box is legend or box.y0 >= legend.y1 - 1


def test_grid_rows_are_after_and_before_or_groups(pair):
    run, baseline = runs.read_runs(pair)
    after, before = figures.grid([run]).axes[0], figures.grid([run]).axes[3]
    np.testing.assert_allclose(before.lines[0].get_ydata(), after.lines[0].get_ydata() + 1, rtol=1e-6)
    assert len(figures.grid([baseline]).axes) == 3
    groups = figures.grid([run], [baseline])
    np.testing.assert_array_equal(groups.axes[3].lines[0].get_ydata(), baseline.curve("negative_variance"))


def heights(drawn):
    """Of a histogram, in whichever of the two ways it was drawn."""
    return np.unique(drawn.get_xy()[:, 1].round(3))


def test_distributions_are_of_the_queries_of_the_last_epoch(pair):
    run, baseline = runs.read_runs(pair)
    figure = figures.distributions([run, baseline])
    assert titles(figure)[:2] == ["Score of the positive", "Variance of a query's negatives"] and len(figure.axes) == 4
    positive, _, alone, _ = figure.axes
    after, before = (np.load(pair[0] / "scores" / "scores_0003.npz")[name] for name in ("positive", "before_positive"))
    low, high = np.quantile([after, before], (0.001, 0.999))
    edges = np.linspace(low - 1e-3, high + 1e-3, 81)
    for drawn, values in zip(positive.patches, (after, before)):
        expected = np.unique(np.histogram(values, edges, density=True)[0].round(3))
        np.testing.assert_allclose(heights(drawn), expected, atol=2e-3)
    assert len(alone.patches) == 1 and alone.get_ylabel() == "moco"


def test_overview_overlays_before_and_logs(pair):
    positive, *_, loss, accuracy = figures.overview(runs.read_runs(pair[:1])).axes
    assert [line.get_linestyle() for line in positive.lines[:2]] == ["--", "-"]
    assert loss.lines[0].get_ydata().tolist() == [3.5, 1.75]
    assert accuracy.get_title("left") == "k-NN accuracy (%)" and accuracy.lines[0].get_ydata().tolist() == [30.0]


def test_long_lines_keep_their_extremes_and_gaps():
    steps, values = np.arange(1, 100_001), np.zeros(100_000)
    values[[12_345, 67_890]] = 1, -1
    x, y = figures.drawable(steps, values)
    assert len(x) <= figures.POINTS + 2 and x[-1] == 100_000
    assert x[y == 1].tolist() == [12_346] and x[y == -1].tolist() == [67_891]
    x, y = figures.drawable(np.array([1, 2, 11, 12]), np.ones(4))
    assert np.isnan(y[2]) and x[3] == 11


def test_smoothing_is_a_centred_mean():
    values = np.array([0.0, 3.0, 6.0, 0.0])
    np.testing.assert_allclose(figures._smoothed(values, 3), [1.5, 3, 3, 3])
    np.testing.assert_allclose(figures._smoothed(np.ones(5), 50), np.ones(5))
    assert figures._smoothed(values, None) is values


def test_command_line_writes_every_figure(pair, tmp_path, capsys):
    arguments = [str(folder) for folder in pair]
    assert (
        plot_scores.main([*arguments, "--figure", "all", "--smooth", "3", "-o", str(tmp_path / "new/scores.png")]) == 0
    )
    expected = [tmp_path / "new" / f"scores_{name}.png" for name in plot_scores.FIGURES]
    assert capsys.readouterr().out.split() == [str(path) for path in expected]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in expected)
    assert plot_scores.main([*arguments[:1], "-o", str(tmp_path / "one.pdf")]) == 0
    assert (tmp_path / "one.pdf").read_bytes().startswith(b"%PDF")


def damage(folder, how):
    path = folder / "scores" / "scores_0002.npz"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif how == "pickle":
        np.savez(path, step=np.array([object()]))
    elif how == "column":
        np.savez(path, other=np.zeros(3))
    elif how == "json":
        (folder / "options.json").write_text("{")
    elif how == "no scores":
        [score.unlink() for score in folder.glob("scores/*")]


@pytest.mark.parametrize(
    "how, said",
    [
        ("truncated", "scores_0002.npz is damaged"),
        ("pickle", "scores_0002.npz is damaged"),
        ("column", "scores_0002.npz is damaged"),
        ("json", "options.json is damaged"),
        ("no scores", "--save_score"),
    ],
)
def test_damage_is_one_sentence_and_exit_code_2(pair, tmp_path, capsys, how, said):
    damage(pair[0], how)
    assert plot_scores.main([str(pair[0]), "-o", str(tmp_path / "x.png")]) == 2
    message = capsys.readouterr().err.strip()
    assert said in message and str(pair[0]) in message and "\n" not in message


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nowhere"], "no run folder"),
        ([str(Path(__file__).parent)], "is no run"),
        (["nowhere", "-o", "x.doc"], ".png"),
        (["nowhere", "--smooth", "0"], "--smooth 0"),
    ],
)
def test_wrong_arguments(arguments, said, capsys):
    try:
        code = plot_scores.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and said in capsys.readouterr().err


def test_one_label_per_run(pair):
    with pytest.raises(ValueError, match="1 labels for 2 runs"):
        runs.read_runs(pair, labels=["a"])


def test_script_runs_from_anywhere_without_torch_or_pyplot(pair, tmp_path):
    code = f"""
import runpy, sys
sys.argv = ["plot_scores.py", {str(pair[0])!r}, "--figure", "positive_mean"]
try:
    runpy.run_path({str(ROOT / "scripts" / "plot_scores.py")!r}, run_name="__main__")
except SystemExit as stop:
    assert stop.code == 0
assert not {{"torch", "matplotlib.pyplot"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "scores.png").exists()


def run_notebook(folder, monkeypatch, folders="[]"):
    """Execute the code cells in order, as a kernel started in `folder` would; `folders` is what a user typed there."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", sys.path[:])
    notebook = json.loads((ROOT / "notebooks" / "visualize_scores.ipynb").read_text())
    assert notebook["nbformat"] == 4
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            source = "".join(line for line in cell["source"] if not line.startswith("%"))
            exec(compile(source.replace("folders = []", f"folders = {folders}"), cell["id"], "exec"), names)
    return names


def test_notebook_draws_the_listed_runs(pair, monkeypatch, capsys):
    names = run_notebook(ROOT / "notebooks", monkeypatch, folders=[str(folder) for folder in pair])
    assert names["root"] == ROOT and [run.folder for run in names["runs"]] == pair
    assert "ft  |  linear 56.2%: 3 epochs, 15 iterations" in capsys.readouterr().out


def test_notebook_of_a_fresh_clone_says_how_to_get_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "visualization").symlink_to(ROOT / "visualization")
    assert run_notebook(tmp_path / "notebooks", monkeypatch)["runs"] == []
    assert "scripts/demo.sh" in capsys.readouterr().out


def test_a_run_without_transformation_is_not_called_unrecorded(tmp_path):
    run = write_run(tmp_path / "plain", ft=False, before=False)
    figure = figures.overview(runs.read_runs([run]))
    said = [text.get_text() for axes in figure.axes[:4] for text in axes.texts]
    assert "not recorded" not in said and all(axes.lines for axes in figure.axes[:4])
