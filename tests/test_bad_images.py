"""Images that are corrupt or gone: replaced by others, the same ones in every run; listed, counted, never too many."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_contrast
from datasets.colours import colours
from datasets.decode import read_image
from datasets.keyed import sample_keys
from datasets.loader import EvalLoader, KeyedSampler, TrainLoader
from datasets.recipes import evaluation, training
from datasets.sources import open_source
from learning import checkpoint
from learning.bad_images import BadImages
from learning.interrupt import Interrupt
from learning.run import Run
from tests.test_training import assert_same_run, records

SMALL = "--arch resnet18 --width 0.125 --feat_dim 8 --input_res 8 --num_workers 0 --device cpu --seed 3 --print_freq 2"


def spoil(path, how):
    """Make an image file unreadable in one of several ways."""
    path = Path(path)
    if how == "deleted":
        path.unlink()
    elif how == "text":
        path.write_text("no picture")
    else:
        path.write_bytes(path.read_bytes()[:30])


def write_images(folder, numbers, side=8):
    """Every other one a JPEG; returns their paths."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(folder / f"{i:03}.{'jpg' if i % 2 else 'png'}") for i in numbers]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def files(tmp_path):
    write_images(tmp_path / "val" / "a", range(1))
    for name, numbers in (("a", range(10)), ("b", range(10, 24))):
        write_images(tmp_path / "train" / name, numbers, side=40)
    return open_source("folder", "train", folder=str(tmp_path))


def recipe(source):
    seen = colours("RGB", "Lab", source.mean, source.std)
    return training("mocov2", views=("query", "key"), input_res=32, crop_min=0.2, colours=seen, jigsaw=True)


def loader(source, **more):
    return TrainLoader(source, recipe(source), **{"batch_size": 8, "seed": 5, "replace_bad": True} | more)


def assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for one, other in zip(batches, others):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def spoiled(files):
    """The numbers of three spoiled images."""
    for number, how in ((2, "text"), (7, "truncated"), (15, "deleted")):
        spoil(files.images[number], how)
    return torch.tensor([2, 7, 15])


def test_another_image_takes_the_place(files):
    sound = torch.cat([batch["index"] for batch in loader(files)])
    bad = spoiled(files)
    batches = list(loader(files))
    batch = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    replaced = torch.isin(sound, bad)
    assert replaced.sum() == 3 and not torch.isin(batch["index"], bad).any()
    assert torch.equal(batch["index"][~replaced], sound[~replaced])
    assert torch.equal(batch["label"], files.labels[batch["index"]])
    assert torch.equal(batch["key_draw"], sample_keys(5, 0, sound)), "the draws stay those of the sample"
    row = int(replaced.nonzero()[0])
    key, views = batch["key_draw"][row : row + 1], recipe(files)
    crops = views.crop([read_image(files.images[batch["index"][row]])], key)
    expected = views.finish({name: crop[0][None] for name, crop in crops.items()}, key)
    assert all(torch.equal(batch[name][row], view[0]) for name, view in expected.items())
    replacements = []
    for epoch in range(9):
        again = loader(files)
        again.set_epoch(epoch)
        found = torch.cat([batch["index"] for batch in again])
        assert again.bad.keys() == {files.images[number] for number in bad}
        replacements += (index for index in found.tolist() if (found == index).sum() > 1)
    assert len(set(replacements)) > 9, "every time another one"


def test_it_is_the_same_one_for_any_workers_and_ranks_and_after_a_resume(files):
    spoiled(files)
    reference = loader(files)
    batches = list(reference)
    assert len(reference.bad) == 3 and "\n" not in "".join(reference.bad.values())
    assert any("No such file" in reason for reason in reference.bad.values())
    for workers in (1, 2):
        other = loader(files, num_workers=workers)
        assert_same(batches, list(other))
        assert other.bad == reference.bad
    parts = [loader(files, rank=rank, world_size=2) for rank in range(2)]
    halves = [{name: torch.cat([x[name] for x in rows]) for name in rows[0]} for rows in zip(*parts)]
    assert all(torch.equal(one["index"], both["index"]) for one, both in zip(batches, halves))
    assert parts[0].bad | parts[1].bad == reference.bad and parts[0].bad.keys().isdisjoint(parts[1].bad)
    reference.set_epoch(0, start_step=1)
    assert_same(batches[1:], list(reference))


def test_reasons_come_with_their_batches(files):
    """Workers run ahead, but a checkpoint must hold what training has met."""
    order = torch.cat([batch["index"] for batch in loader(files)])
    for number in order[[13, 20]].tolist():
        spoil(files.images[number], "text")
    met = []
    for workers in (0, 2):
        images = loader(files, num_workers=workers)
        met.append([len(images.bad) for _ in images])
    assert met == [[0, 1, 2]] * 2


def test_the_host_never_waits_for_the_device(files):
    spoiled(files)
    assert all({x.device.type for x in batch.values()} == {"meta"} for batch in loader(files, device="meta"))


def test_without_replacement_it_is_an_error(files):
    spoil(files.images[2], "text")
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"002.png cannot be read as an image .*; convert, repair or remove it"):
            list(loader(files, replace_bad=False, num_workers=workers))
    with pytest.raises(ValueError, match=r"002.png cannot be read as an image .*; convert, repair or remove it"):
        list(EvalLoader(files, evaluation(32, recipe(files).colours), batch_size=4))


def test_the_first_images(files):
    spoil(files.images[0], "text")
    assert len(list(loader(files))) == 3
    with pytest.raises(ValueError, match=r"000.png cannot be read as an image .*; convert"):
        loader(files, replace_bad=False)
    rest = loader(files, num_workers=1)
    for path in files.images[1:]:
        spoil(path, "deleted")
    with pytest.raises(ValueError, match=r"000.png cannot .* nor can others in its place; .* still where they were"):
        loader(files)
    with pytest.raises(ValueError, match=r"\(.*\), nor can others in its place"):
        list(rest)


def new_run(folder):
    return Run(folder / "run", folder / "tb", keep=2, save_freq=0, position={"step": 0, "log_bytes": 0, "events": {}})


def test_list_notes_and_limit(tmp_path, capsys):
    run, paths = new_run(tmp_path), [f"{i}.png" for i in range(500)]
    listing, found = tmp_path / "run" / "bad_images.txt", {}
    images = BadImages(found, paths)
    assert images.count(run) == {} and not listing.exists()
    found |= {"2.png": "torn", "1.png": "empty"}
    assert images.count(run) == {"bad_images": 2} and not found
    found |= {"1.png": "empty", os.fsdecode(b"\xff.png"): "gone", "3.png": "torn", "4.png": "torn"}
    assert len(images.state_dict(run)) == 5
    assert listing.read_bytes() == b"1.png\tempty\n2.png\ttorn\n3.png\ttorn\n4.png\ttorn\n\xff.png\tgone\n"
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert [line.split()[1] for line in said] == ["1.png", "2.png", "3.png", "further"] and str(listing) in said[-1]
    assert images.count(run) == {"bad_images": 5}
    images.check(run)
    found |= {"6.png": "torn", "7.png": "torn"}
    assert images.count(run) == {"bad_images": 7}
    with pytest.raises(ValueError, match=r"7 of the 500 images could not be read, .* 1 %; .*bad_images.txt: repair"):
        images.check(run)
    images.load_state_dict(images.state_dict(run))
    assert images.count(run) == {}, "they may have been repaired"
    few = BadImages({"1.png": "torn", "2.png": "torn"}, paths[:9])
    few.count(run)
    few.check(run)
    few.found["3.png"] = "torn"
    few.count(run)
    with pytest.raises(ValueError, match="3 of the 9 images"):
        few.check(run)


def test_what_a_checkpoint_knows(tmp_path):
    strange = os.fsdecode(b"\xff.png")
    state = {"method": {}, "optimizer": {}, "scaler": {}, "position": {"1.png": "torn", strange: "?"}, "options": {}}
    checkpoint.save(tmp_path / "a.pth", state)
    images = BadImages({}, [strange, "0.png"])
    images.load_state_dict(checkpoint.load(tmp_path / "a.pth")["position"])
    run = new_run(tmp_path)
    assert images.count(run) == {"bad_images": 1}, "1.png has been removed"
    assert (tmp_path / "run" / "bad_images.txt").read_bytes() == b"\xff.png\t?\n"


# Whole runs


def contrast(monkeypatch, line):
    monkeypatch.setattr(sys, "argv", ["main_contrast.py", *line.split()])
    main_contrast.main()


def flags(folder, more):
    paths = f"--data_folder {folder}/images --model_path {folder} --tb_path {folder}/tb --name run"
    return f"{SMALL} {paths} --batch_size 8 --queue_size 8 {more}"


def test_a_run_goes_on_without_them_and_resumes_exactly(tmp_path, monkeypatch, capsys):
    """One image goes while training runs; in its place there is an empty file when the run is resumed."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, ends in ((whole, (0,)), (parts, (4, 7, 0))):
        paths = write_images(tmp_path / "images", range(320))
        spoil(paths[4], "truncated")
        spoil(paths[161], "text")
        Path(paths[8]).write_bytes(Path(paths[8]).read_bytes()[:150])  # used as far as it goes
        for end in ends:

            def after(self, step, end=end, path=paths[200]):
                if step == 2:
                    spoil(path, "deleted")
                return step == end

            monkeypatch.setattr(Interrupt, "__call__", after)
            line = f"--batch_size 64 --queue_size 64 --epochs 2 --save_score --resume auto --model_path {folder}"
            contrast(monkeypatch, flags(tmp_path, line))
            Path(paths[200]).touch()
    assert_same_run(whole / "run", parts / "run")
    listed = (whole / "run" / "bad_images.txt").read_text()
    assert (parts / "run" / "bad_images.txt").read_text() == listed
    listed = dict(line.split("\t") for line in listed.splitlines())
    assert list(listed) == [paths[4], paths[161], paths[200]] and "No such file" in listed[paths[200]]
    assert checkpoint.load(whole / "run" / "current.pth")["position"]["progress"]["bad_images"] == listed
    assert records(whole / "run", "epoch")[1]["bad_images"] == 3
    said = capsys.readouterr().out
    assert said.count("another one takes its place") == 6 and "further" not in said


def test_its_evaluations_go_on_too(tmp_path, monkeypatch):
    for part in ("train", "val"):
        for name in "ab":
            paths = write_images(tmp_path / "images" / part / name, range(8))
        spoil(paths[3], "text")
    contrast(monkeypatch, flags(tmp_path, "--epochs 1 --knn_freq 1"))
    assert len((tmp_path / "run" / "bad_images.txt").read_text().splitlines()) == 2
    assert len(records(tmp_path / "run", "knn")) == 1


def test_a_bank_files_what_was_seen_under_the_image_that_it_was(tmp_path, monkeypatch):
    paths = write_images(tmp_path / "images", range(16))
    spoil(paths[3], "text")
    contrast(monkeypatch, flags(tmp_path, "--epochs 1 --method InsDis"))
    assert [line["bad_images"] for line in records(tmp_path / "run", "epoch")] == [1]
    bank = checkpoint.load(tmp_path / "run" / "current.pth")["method"]
    assert bank["banks.0.seen"].nonzero().flatten().tolist() == [*range(3), *range(4, 16)]


@pytest.mark.parametrize("more", ["", "--nprocs 2"])
def test_too_many_end_the_run_on_all_ranks(tmp_path, monkeypatch, capfd, more):
    paths = write_images(tmp_path / "images", range(32))
    for number in (3, 8, 9, 10, 24):
        spoil(paths[number], "text")
    line = flags(tmp_path, f"--epochs 9 --print_freq 100 {more}")
    with pytest.raises(SystemExit, match="1"):
        contrast(monkeypatch, line)
    listing, said = tmp_path / "run" / "bad_images.txt", capfd.readouterr()
    assert (
        "main_contrast.py: 5 of the 32 images could not be read, which is more than 1 %; they are listed in "
        f"{listing}: repair them and go on, or remove them and start again."
    ) in said.err
    assert [line.split("\t")[0] for line in listing.read_text().splitlines()] == [paths[i] for i in (3, 8, 9, 10, 24)]
    assert said.out.count("another one takes its place") == 3 and said.out.count("further images") == 1
    assert checkpoint.load(tmp_path / "run" / "current.pth")["position"]["step"] == 4


def test_what_was_trained_before_there_were_too_many_is_kept(tmp_path, monkeypatch):
    paths = write_images(tmp_path / "images", range(32))
    for number in range(3, 8):
        spoil(paths[number], "text")
    with pytest.raises(SystemExit, match="1"):
        contrast(monkeypatch, flags(tmp_path, "--epochs 3 --print_freq 3"))
    assert checkpoint.load(tmp_path / "run" / "current.pth")["position"]["step"] == 3
    write_images(tmp_path / "images", range(32))
    contrast(monkeypatch, flags(tmp_path, "--epochs 3 --print_freq 3 --resume auto"))
    assert checkpoint.load(tmp_path / "run" / "current.pth")["position"]["step"] == 12


@pytest.mark.parametrize("more", ["--num_workers 0", "--num_workers 1"])
def test_what_was_trained_before_the_loader_gives_up_is_kept(tmp_path, monkeypatch, more):
    paths = write_images(tmp_path / "images", range(32))
    order = KeyedSampler(32, batch_size=8, rank=0, world_size=1, seed=3).order()
    spoil(paths[order[20]], "text")  # of the third batch
    line = flags(tmp_path, f"--epochs 1 --seed 3 --on_bad_image stop {more}")
    with pytest.raises(SystemExit, match="1"):
        contrast(monkeypatch, line)
    assert checkpoint.load(tmp_path / "run" / "current.pth")["position"]["step"] == 2
    write_images(tmp_path / "images", range(32))
    contrast(monkeypatch, f"{line} --resume auto")
    assert checkpoint.load(tmp_path / "run" / "current.pth")["position"]["step"] == 4


def test_stop_ends_at_the_first_one(tmp_path, monkeypatch, capsys):
    paths = write_images(tmp_path / "images", range(16))
    spoil(paths[3], "text")
    line = flags(tmp_path, "--epochs 9 --on_bad_image stop")
    with pytest.raises(SystemExit, match="1"):
        contrast(monkeypatch, line)
    assert f"main_contrast.py: {paths[3]} cannot be read as an image (" in capsys.readouterr().err
