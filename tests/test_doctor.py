"""The doctor: each finding is provoked once and kept silent once; told once, also across a pause."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from datasets.sources import Source
from learning import build, doctor
from learning.losses import NCE, InfoNCE
from learning.pretraining import pretrain
from memory.task import Negatives, Task
from options import contrast

ROOT = Path(__file__).parents[1]
TINY = """--width 0.125 --batch_size 16 --queue_size 24 --input_res 8 --feat_dim 16 --print_freq 1 --seed 3
    --num_workers 0 --device cpu --save_freq 0 --name run"""


def case(line="", *, images=100_000, processes=1, rows=(), **same):
    """Of a command line, with an epoch for each of `rows`, dicts that hold a loss; `same` is in every one."""
    opt, origins, _ = contrast.parse(line.split())
    opt, _ = build.resolve(opt, origins, n_data=images)
    told = doctor.Case(opt, contrast.usual(opt), images, processes)
    for epoch, row in enumerate(rows, start=1):
        told._add({"kind": "epoch", "epoch": epoch, "step": 100 * epoch, **same, **row})
    return told


def losses(*values):
    return [{"loss": value} for value in values]


def names(found):
    return [finding.name for finding in found]


FOLDER = "--data_folder images --arch resnet18 --dataset folder --queue_size 4096 --no_warm"
CHANCE = math.log(4097)
FT = f"{FOLDER} --ft_pos extrapolate --ft_begin_epoch 2"


@pytest.mark.parametrize(
    "line, images, name",
    [
        (FOLDER, 8191, "long queue"),
        (f"{FOLDER} --batch_size 64", 100_000, "unscaled rate"),
        (f"{FOLDER} --batch_size 1024", 100_000, "unscaled rate"),
        (f"{FOLDER} --learning_rate 0.2", 100_000, "unscaled rate"),
        (f"{FOLDER} --temperature 1", 100_000, "high temperature"),
        (f"{FOLDER} --bn_splits 1", 100_000, "whole batch"),
        (f"{FOLDER} --warmup_epochs 9 --epochs 9", 100_000, "long warm-up"),
        (f"{FOLDER} --ft_neg interpolate --ft_begin_epoch 9 --epochs 9", 100_000, "late FT"),
        (f"{FOLDER} --ft_pos extrapolate", 20_000, "early FT"),
        ("--method SwAV --queue_epoch 9 --epochs 9", 5000, "idle queue"),
    ],
)
def test_what_options_alone_tell(line, images, name):
    assert names(doctor.at_start(case(line, images=images))) == [name]


@pytest.mark.parametrize(
    "line, images, processes",
    [
        (FOLDER, 8192, 1),
        (f"{FOLDER} --ft_pos extrapolate", 100_000, 1),
        (f"{FOLDER} --ft_pos extrapolate --ft_begin_epoch 2", 20_000, 1),
        (f"{FOLDER} --batch_size 64 --learning_rate 0.0075", 100_000, 1),
        (f"{FOLDER} --batch_size 128 --learning_rate 0.04", 100_000, 1),
        (f"{FOLDER} --method SimCLR --queue_size 0 --batch_size 4096 --learning_rate 4.8", 100_000, 1),
        (f"{FOLDER} --bn_splits 1", 100_000, 2),
        (f"{FOLDER} --ft_neg interpolate --ft_begin_epoch 8 --epochs 9", 100_000, 1),
        *((f"--method {method}", 5000, 1) for method in contrast.METHODS),
        *((f"--dataset cifar10 --data_folder x --method {method}", 50_000, 1) for method in contrast.METHODS),
    ],
)
def test_presets_and_what_fits_them_are_left_alone(line, images, processes):
    assert not names(doctor.at_start(case(line, images=images, processes=processes)))


@pytest.mark.parametrize(
    "line, chance",
    [
        (FOLDER, CHANCE),
        (f"{FOLDER} --method CMCv2", 2 * CHANCE),
        (f"{FOLDER} --method InfoMin --ft_neg append", math.log(8193)),
        (f"{FOLDER} --method SimCLR --batch_size 64", math.log(127)),
        (f"{FOLDER} --method SupCon --batch_size 64 --accumulate 2", math.log(63)),
        (f"{FOLDER} --method SimCLR --batch_size 64 --ft_neg append", math.log(253)),
        ("--method SwAV --prototypes 300", math.log(300)),
        (f"{FOLDER} --method InsDis --loss nce", CHANCE + 4096 * math.log(4097 / 4096)),
    ],
)
def test_chance_is_the_loss_of_equal_scores(line, chance):
    about = case(line)
    assert about.chance == pytest.approx(chance) and f"{chance:.2f}" in doctor.expectation(about)


def test_chance_and_the_first_loss_are_those_of_the_objectives():
    about, noise = case(f"{FOLDER} --method MoCov2"), case(f"{FOLDER} --method InsDis --loss nce")
    query, *keys = F.normalize(torch.randn(4097, 128, generator=torch.Generator().manual_seed(0)), dim=1).split(
        [1, 4096]
    )

    def loss(objective, keys):
        return objective(Task("image", query, query, (Negatives(keys),)), 0).rows.item()

    assert about.ideal == pytest.approx(loss(InfoNCE(0.2), *keys), abs=0.05)
    assert f"begins near {about.ideal:.1f}" in doctor.expectation(about)
    alike = query.repeat(4096, 1)
    assert about.chance == pytest.approx(loss(InfoNCE(0.2), alike), rel=1e-4)
    assert noise.chance == pytest.approx(loss(NCE(0.07, tasks=1), alike), rel=1e-4)


def test_methods_without_negatives_are_told_what_to_watch():
    assert "feature_std is 0.022 where embeddings spread" in doctor.expectation(case("--method SimSiam"))
    assert "only fills the bank" in doctor.expectation(case(f"{FOLDER} --method InsDis"))


POINT = {"positive_mean": 0.99, "negative_mean": 0.98}
SPREAD = {"positive_mean": 0.99, "negative_mean": 0.1, "feature_std": 0.08, "effective_rank": 30.0, "queue_fill": 1.0}
FALLING = losses(7.0, 6.0, 5.5, 5.0)
FLAT = losses(8.3, 8.31, 8.29, 8.3)


@pytest.mark.parametrize(
    "line, rows, same, name",
    [
        (FOLDER, FLAT, SPREAD, "stuck"),
        ("--method SwAV --prototypes 300 --no_warm", losses(5.7, 5.7, 5.7), {}, "stuck"),
        (FOLDER, FLAT, POINT, "collapse"),
        (FOLDER, FLAT, SPREAD | {"effective_rank": 1.1}, "collapse"),
        (FOLDER, FLAT, SPREAD | {"feature_std": 0.008}, "collapse"),
        ("--method SimSiam --no_warm", losses(-0.99, -1.0, -1.0), {"feature_std": 0.001}, "collapse"),
        ("--method BYOL --no_warm", losses(0.01, 0.0, 0.0, 0.0, 0.0), {"feature_std": 0.001}, "collapse"),
        (FT, losses(7.0, 6.5, 8.3, 8.3, 8.3), POINT, "FT stalled"),
        (FT, losses(7.0, 6.0, 6.5, 6.1), {}, "jumps with FT"),
        (FOLDER, losses(6.7, 7.1, 7.0), {}, "rises first"),
        (f"{FOLDER} --bn_splits 1", losses(0.2, 0.1, 0.1), {"contrast_acc": 0.999}, "batch-norm leak"),
        (FOLDER, losses(0.2, 0.1, 0.1), {"contrast_acc": 0.999}, "too easy"),
    ],
)
def test_what_the_log_tells(line, rows, same, name):
    assert names(doctor.from_log(case(line, rows=rows, **same))) == [name]


@pytest.mark.parametrize(
    "line, rows, same",
    [
        (FOLDER, FALLING, SPREAD),
        (FOLDER, FALLING, {"feature_std": 0.004}),  # on its way out
        (FOLDER, losses(8.4, 8.3, 8.28), POINT),  # the same
        (FOLDER, FLAT[:2], POINT),  # too early
        (f"{FOLDER} --warmup_epochs 2 --warm", FLAT, POINT),  # the same: two epochs since
        (FOLDER, FLAT, {"queue_fill": 0.9}),  # against random vectors
        (FOLDER, losses(8.3, 8.3, 8.3, 7.9), {}),  # not any more
        (FOLDER, FALLING, {"contrast_acc": 0.97}),
        (f"{FOLDER} --bn_splits 1", FALLING, {"contrast_acc": 0.97}),
        (f"{FOLDER} --method MoCo_wo_norm", FALLING, POINT | {"feature_std": 1e-3}),  # of any length
        ("--method SimSiam --no_warm", losses(-0.1, -0.7, -0.8), {"feature_std": 0.013, "positive_mean": 0.99}),
        ("--method SimSiam --no_warm", losses(-0.1, -0.7, -0.8), {}),  # a log of before there was a spread
        (FT, losses(7.0, 6.9, 6.7), {}),
        (f"{FT} --ft_begin_epoch 0", losses(9.5, 9.1, 8.8, 8.5), {}),  # above chance and falling
        (FOLDER, losses(6.7, 6.72, 6.6), {}),  # noise
        (FOLDER, losses(6.7, 6.6, 6.5, 6.4, 6.3, 7.5), {}),  # not first
    ],
)
def test_what_is_no_finding(line, rows, same):
    assert not names(doctor.from_log(case(line, rows=rows, **same)))


def test_ft_is_not_to_blame_for_what_was_so_before():
    rows = losses(8.3, 8.3, 8.3, 8.31, 8.3)
    assert names(doctor.from_log(case(FT, rows=rows))) == ["stuck"]


@pytest.mark.parametrize("lines, wait, found", [(10, 0.5, ["data-bound"]), (9, 0.5, []), (10, 0.3, [])])
def test_waiting_for_images(lines, wait, found):
    about = case(FOLDER)
    for step in range(lines):
        about._add({"kind": "step", "epoch": 1, "step": step, "loss": 7.0, "data_wait": wait})
    about._add({"kind": "epoch", "epoch": 1, "step": lines, "loss": 7.0})
    assert names(doctor.from_log(about)) == found


def test_a_log_that_grows_is_read_once_and_half_a_line_later(tmp_path):
    log, about = tmp_path / "log.jsonl", case(FOLDER)
    whole = [json.dumps({"kind": "epoch", "epoch": 1 + i, "step": i, **row, **POINT}) for i, row in enumerate(FLAT)]
    log.write_text("\n".join(whole[:3]) + "\n" + whole[3][:20])
    assert names(doctor.news(about, log)) == ["collapse"] and len(about.epochs) == 3
    log.write_text("\n".join(whole) + "\n")
    assert not doctor.news(about, log) and len(about.epochs) == 4
    told = json.dumps({"kind": "diagnosis", "epoch": 3, "step": 2, "name": "collapse"})
    log.write_text("\n".join([*whole, told]) + "\n")
    assert not doctor.news(case(FOLDER), log)


# Whole runs


@pytest.fixture
def few_pictures(monkeypatch):
    """Sixty-four random pictures in place of the built-in set."""

    def source(opt, split):
        images = torch.randint(256, (64, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
        return Source(images, torch.arange(64) % 3, ("a", "b", "c"), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))

    monkeypatch.setattr(build, "source", source)


def train(folder, line):
    """What main_contrast.py does; the run's folder."""
    options, origins, notes = contrast.parse(f"{TINY} --model_path {folder} --tb_path {folder}/tb {line}".split())
    assert pretrain(options, origins=origins, notes=notes) == 0
    return folder / "run"


def ask(*folders, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["doctor.py", *map(str, folders)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts/doctor.py"), run_name="__main__")
    return end.value.code


def diagnoses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "diagnosis"]


HOT = "--queue_size 32 --warmup_epochs 0 --lr 0.001 --epochs 5 --temperature 5"


def test_a_run_that_learns_nothing_is_told_once(tmp_path, monkeypatch, capsys, few_pictures):
    whole = train(tmp_path / "whole", HOT)
    said = capsys.readouterr().out
    (found,) = diagnoses(whole)
    assert (found["name"], found["epoch"], found["step"]) == ("stuck", 4, 16) and "since epoch 2" in found["evidence"]
    assert said.count(f"doctor: stuck: {found['evidence']}; {found['advice']}") == 1
    assert "doctor: high temperature" in said and "guessing gives a loss of 3.50, log(33)" in said
    train(tmp_path / "parts", f"{HOT} --stop_epoch 4")
    parts = train(tmp_path / "parts", f"{HOT} --resume auto")
    assert diagnoses(parts) == diagnoses(whole)
    assert capsys.readouterr().out.count("doctor: stuck") == 1
    assert ask(whole, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "doctor: stuck" in printed and "nothing wrong" not in printed and "mean positive score" in printed


def test_a_sound_run(tmp_path, monkeypatch, capsys, few_pictures):
    folder = train(tmp_path, "--method SimSiam --feat_dim 64 --lr 0.4 --epochs 3 --warmup_epochs 0 --knn_freq 3")
    assert not diagnoses(folder) and ask(folder, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "3 of 3 epochs" in printed and "feature_std" in printed and "k-NN on the head" in printed
    assert printed.rstrip().endswith("nothing wrong found")


def test_a_run_that_has_just_begun(tmp_path, monkeypatch, capsys, few_pictures):
    folder = train(tmp_path, "--lr 0.0075 --epochs 2 --stop_epoch 1")
    (folder / "log.jsonl").write_text("")
    assert ask(folder, monkeypatch=monkeypatch) == 0
    assert "nothing wrong found yet" in capsys.readouterr().out


def test_no_run_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys):
    assert ask(tmp_path, monkeypatch=monkeypatch) == 2
    message = capsys.readouterr().err
    assert "is no run of main_contrast.py" in message and "options.json" in message  # what was looked for


def test_it_needs_nothing_but_the_standard_library():
    without = "import sys; sys.modules |= dict.fromkeys(['torch', 'numpy']); import learning.doctor, options.contrast"
    assert subprocess.run([sys.executable, "-c", without], cwd=ROOT, check=False).returncode == 0
