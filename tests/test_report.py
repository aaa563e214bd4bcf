"""The page about runs: its arrays against their formulas, its HTML and SVG, what it says where something is missing."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from learning import build
from options import contrast
from scripts import plot_scores, report
from tests.test_training import SMALL, few_pictures, train  # noqa: F401  (fifty pictures in place of the built-in set)
from tests.test_visualization import KNN, LINEAR, write_run
from visualization import distributions, runs, svg

COLUMNS = ("positive", "negative_mean", "negative_var", "negative_max", "negative_logmeanexp", "positive_logit")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HEADLESS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"


class Page(HTMLParser):
    """A page's tags, the addresses it refers to, ids and text."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text()
        self.addresses, self.ids, self.text = [], [], ""
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("href", "src")]
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_data(self, data):
        self.text += data

    @property
    def drawings(self):
        return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", self.source, re.DOTALL)]


def log(folder, *records):
    with (folder / "log.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def scores_record(step, *, before=False):
    """As a run writes it: positives in the third quarter of the range, negatives in the second."""
    shares = {"positive_histogram": [0, 0, 1, 0], "negative_histogram": [0, 1, 0, 0]}
    shares |= {f"before_{name}": x for name, x in shares.items()} if before else {}
    geometry = {"auc": 0.9, "alignment": 0.3, "uniformity": -2.0, "effective_rank": 12.5}
    return {"kind": "scores", "epoch": 1, "step": step, "histogram_range": [-1, 1], **shares, **geometry}


@pytest.fixture
def pair(tmp_path):
    ft = write_run(tmp_path / "ft", results=LINEAR | KNN, ft_begin_epoch=1, columns=COLUMNS, queue_size=8)
    plain = write_run(tmp_path / "moco", ft=False, before=False, columns=COLUMNS)
    norms = {"stem": 0.1, "head": 2.0}
    log(ft, *(scores_record(s, before=True) for s in (5, 10)), {"kind": "gradients", "step": 5, "norms": norms})
    log(ft, {"kind": "diagnosis", "epoch": 1, "step": 5, "name": "stuck", "evidence": "loss > 5", "advice": "wait"})
    return [ft, plain]


def made(path, *arguments):
    assert report.main([*map(str, arguments), "-o", str(path)]) == 0
    return Page(path)


def test_a_page_refers_to_nothing_outside_and_its_drawings_are_sound(pair, tmp_path):
    for name, folders in {"one": pair[:1], "two": pair}.items():
        page = made(tmp_path / f"{name}.html", *folders)
        assert len(page.source) < 1e6
        assert all(address.startswith(("#", "data:")) for address in page.addresses)
        assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", page.source)
        assert {address[1:] for address in page.addresses if address.startswith("#")} == set(page.ids)
        assert {"results", "curves", "scores-over-time", "paper-figures", "gradient-landscape"} <= set(page.ids)
        assert page.drawings and "nan" not in page.source.split("<script>")[0].split("</style>")[1].lower()


def test_results_are_told_apart_and_options_that_matter_shown(pair, tmp_path):
    one, two = made(tmp_path / "one.html", pair[0]), made(tmp_path / "two.html", *pair)
    for said in ("linear, last", "56.2", "linear, best", "57", "knn, backbone", "stuck", "loss > 5", "wait"):
        assert said in one.text
    told, folded = two.source.split("All other options")
    assert "ft_pos" in told and "cosine" not in told and "cosine" in folded
    assert "ft_begin_epoch" in told  # 1 and 0


def test_a_name_is_not_taken_for_html(pair, tmp_path):
    assert "<b>&" in made(tmp_path / "x.html", pair[0], "--labels", "<b>&").text


def test_nor_is_any_other_word_of_a_run_folder(pair, tmp_path):
    folder = pair[0]
    stored = json.loads((folder / "options.json").read_text())
    (folder / "options.json").write_text(json.dumps(stored | {"values": stored["values"] | {"<u>": "<u>"}}))
    log(folder, scores_record(11) | {"<u>_histogram": [0, 0, 1, 0]}, {"kind": "epoch", "step": 5, "epoch": 1, "<u>": 1})
    (folder.with_name("ft_linear-2")).mkdir()
    about = {"ckpt": f"/somewhere/{folder.name}/current.pth", "use_ema": False}
    (folder.with_name("ft_linear-2") / "results.json").write_text(json.dumps(about | {"<u>": {"<u>": {"top1": 1.0}}}))
    for name, folders in {"one": pair[:1], "two": pair}.items():
        page = made(tmp_path / f"{name}.html", *folders, "--no_pictures")
        assert "<u>" in page.text and "<u>, <u>" in page.text and "<u>" not in page.source


def test_without_scores_the_log_is_drawn_and_without_checkpoint_one_sentence_said(tmp_path, pair):
    shutil.rmtree(pair[0] / "scores")
    page = made(tmp_path / "x.html", pair[0])
    assert "curves" in page.ids and "scores-over-time" in page.ids and "paper-figures" not in page.ids
    assert "no pictures:" in page.text and "current.pth" in page.text
    assert "pictures" not in made(tmp_path / "y.html", pair[0], "--no_pictures").ids
    shutil.rmtree(pair[0])
    assert report.main([str(pair[0])]) == 2


def test_distributions_come_from_the_log_or_from_score_files(pair):
    ft, plain = runs.read_runs(pair)
    (step, bins, shares), _ = distributions.moments(ft)
    assert step == 5 and bins.tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert shares["before_positive"].tolist() == [0, 0, 1, 0]
    path = plain.files[2]
    np.savez(path, **(dict(np.load(path)) | {"negative_var": np.full((5, 4), 1e-3)}))
    step, bins, shares = distributions.moments(plain)[1]
    positive, mean = plain.scores(2, "positive"), plain.scores(2, "negative_mean")
    assert step == 10 and all(np.isclose(share.sum(), 1) for share in shares.values())
    assert abs(bins @ shares["positive"] - positive.mean()) < 0.0125  # half a bin
    assert abs(bins @ shares["negative"] - mean.mean()) < 0.0125


def test_the_landscape_is_the_mean_gradient_of_the_formula(tmp_path):
    folder = write_run(tmp_path / "run", epochs=1, ft=False, before=False, temperature=0.5, queue_size=8)
    positive = np.array([[0.2, 0.9]] * 4, np.float32)
    hard = np.float32([[0.1, 0.1], [0.1, 0.1], [0.7, 0.7], [0.7, 0.7]]) / 0.5
    arrays = {"positive": positive, "positive_logit": positive / 0.5, "negative_logmeanexp": hard}
    np.savez(folder / "scores" / "scores_0001.npz", step=np.arange(1, 5), **arrays)
    grid, steps, scores = distributions.gradient_landscape(runs.read_runs([folder])[0])
    assert steps == (0.5, 4.5) and grid.shape[1] == 4 and scores[0] < 0.21 and scores[1] > 0.89
    wanted = (1 - np.exp(positive / 0.5) / (np.exp(positive / 0.5) + 8 * np.exp(hard))) / 0.5
    np.testing.assert_allclose(grid[[0, -1]].T, wanted, rtol=1e-5)
    assert np.isnan(grid[1:-1]).all()
    assert distributions.gradient_landscape(runs.read_runs([write_run(tmp_path / "other")])[0]) is None


def test_there_is_no_landscape_of_another_loss(tmp_path):
    for name, flags in {"nce": {"loss": "nce"}, "swav": {"method": "SwAV"}}.items():
        folder = write_run(tmp_path / name, ft=False, columns=COLUMNS, temperature=0.5, queue_size=8, **flags)
        assert distributions.gradient_landscape(runs.read_runs([folder])[0]) is None


def test_a_layer_without_a_gradient_at_first_has_empty_cells(tmp_path):
    folder = write_run(tmp_path / "swav")
    trunk = {"encoder.backbones.0.layer1.0.bn1": 1.0, "encoder.backbones.0.layer1.0.conv1": 10.0}
    log(folder, {"kind": "gradients", "step": 1, "norms": trunk})
    log(folder, {"kind": "gradients", "step": 2, "norms": trunk | {"prototypes": 100.0}})
    grid, steps, layers, parts = distributions.layer_gradients(runs.read_runs([folder])[0])
    np.testing.assert_array_equal(grid, [[0, 0], [1, 1], [np.nan, 2]])
    assert steps == (1, 3) and layers == (0.5, 3.5) and parts == {"layer1": 1.5, "prototypes": 3}
    assert ">layer1<" in svg.heat(grid, steps, layers, parts) and ">layer1<" not in svg.heat(grid, steps, layers)


def test_names_that_would_run_into_each_other_are_left_out():
    drawn = svg.heat(np.zeros((100, 2)), (0, 1), (0, 100), {"conv1": 0.5, "bn1": 1.5, "layer1": 17})
    assert ">conv1<" in drawn and ">layer1<" in drawn and ">bn1<" not in drawn


def reference(folder, epochs=2, steps=3, batch=4):
    """Score files as the published program writes them, where a batch is never short."""
    folder.mkdir()
    mean, variance, positive = np.random.default_rng(0).uniform(0.1, 0.9, (3, epochs, steps, batch))
    rows = np.stack([mean, variance, positive, np.exp(mean / 0.07), np.exp(positive / 0.07)], -1).astype(np.float32)
    for epoch in range(epochs):
        np.save(folder / f"score_{epoch + 1:03}.npy", rows[epoch])
    return rows.reshape(-1, batch, 5)


@pytest.mark.parametrize("inside", ["", "scores"])
def test_score_files_of_the_published_program_are_a_run(tmp_path, inside):
    folder = tmp_path / "published"
    folder.mkdir(exist_ok=not inside)
    if not inside:
        folder.rmdir()
    rows = reference(folder / inside)
    (run,) = runs.read_runs([folder])
    assert run.steps.tolist() == [1, 2, 3, 4, 5, 6]
    for statistic, place in {"negative_mean": 0, "negative_variance": 1, "positive_mean": 2}.items():
        np.testing.assert_allclose(run.curve(statistic), rows[..., place].mean(1), rtol=1e-6)
    grid, _, _ = distributions.gradient_landscape(run)
    chance = rows[..., 4] / (rows[..., 4] + distributions.PUBLISHED_QUEUE * rows[..., 3].astype(float))
    assert np.nanmin(grid) >= (1 - chance).min() / 0.07 * 0.999 and np.nanmax(grid) <= 1.001 / 0.07
    assert plot_scores.main([str(folder), "-o", str(tmp_path / "x.png")]) == 0
    assert "paper-figures" in made(tmp_path / "x.html", folder).ids


@pytest.mark.parametrize("rows", [np.array([np.zeros((4, 5)), np.zeros((2, 5))], object), np.zeros((6, 5))])
def test_other_arrays_are_refused_with_a_sentence(tmp_path, capsys, rows):
    np.save(tmp_path / "score_001.npy", rows)
    assert plot_scores.main([str(tmp_path)]) == 2
    message = capsys.readouterr().err.strip()
    assert "score_001.npy" in message and "(steps, batch, 5)" in message and "\n" not in message


def test_pictures_of_a_run_show_exactly_the_views_of_training(tmp_path):
    folder = train(tmp_path, "--epochs 1 --recipe simclr")
    found = report.pictures(folder)
    assert found.points.shape == (50, 2) and set(found.labels) == {0, 1, 2} and found.classes == ("a", "b", "c")
    assert all(sheet[8:12] == b"WEBP" for sheet in found.sheets)
    line = f"{SMALL} --input_res 8 --device cpu --recipe simclr"
    opt, origins, _ = contrast.parse([*line.split(), "--num_workers", "0"])
    data = build.source(opt, "train")
    opt, _ = build.resolve(opt, origins, n_data=len(data))
    batch = next(iter(build.train_loader(opt, data, torch.device("cpu"))))
    keys = batch["key"][batch["order"].argsort()]
    images, query, key = report._views(opt, data)
    for shown, trained in ((query, batch["query"]), (key, keys)):
        assert torch.equal(shown, report._thumbs(trained[: report.SAMPLES], data))
    assert torch.equal(images, report._originals(opt, data, batch["index"][: report.SAMPLES]))


def test_lines_break_at_holes_and_dots_stand_alone():
    steps, values = np.array([1.0, 2, np.nan, 11, 12]), np.array([1.0, 2, np.nan, 3, 1])
    drawing = svg.chart([svg.Line("a & b", "r0", steps, values)])
    path = ElementTree.fromstring(drawing).find("path[@data-label]").get("d")
    assert path.count("M") == 2 and path.startswith(f"M{svg.LEFT} ") and f"L{svg.RIGHT} " in path
    assert "dot" in svg.chart([svg.Line("a", "r0", np.array([3.0]), np.array([0.5]))])
    assert [svg.number(x) for x in (1234.5, 0.0345, 7.0, -65536, 5e6)] == ["1.23k", "0.0345", "7", "−65.5k", "5M"]
    assert svg.number(999.7) == "1k"


def test_marks_stay_within_the_chart():
    line = svg.Line("a", "r0", np.array([300.0, 390]), np.array([0.5, 0.6]))
    assert svg.chart([line], {"FT": {78, 350}, "drop": {1e4}}).count("<title>") == 1


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_script_shows_values_and_hides_runs(pair, tmp_path):
    page = made(tmp_path / "page.html", *pair, "--no_pictures")
    (tmp_path / "page.html").write_text(
        page.source
        + """<script>
const svg = document.querySelector("svg.chart"), box = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 12, clientY: box.top + 50}));
const shown = svg.parentNode.querySelector(".tip").innerText;
document.querySelector("button[value=r1]").click();
const hidden = [...document.querySelectorAll(".line.r1")].every(line => line.style.display === "none");
document.title = "found " + shown.replaceAll("\\n", " ") + " hidden " + hidden;
</script>"""
    )
    command = [CHROMIUM, *HEADLESS.split(), f"--user-data-dir={tmp_path / 'user'}", "--dump-dom"]
    ended = subprocess.run([*command, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=60)
    title = re.search(r"<title>(found.*?)</title>", ended.stdout)[1]
    assert "step 4" in title and re.search(r"1\.75\d* +ft", title) and "moco" in title and title.endswith("hidden true")
