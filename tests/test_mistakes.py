"""What a user can get wrong ends in one sentence and a non-zero code, before training, and leaves nothing behind."""

import pickle
import shutil
import signal
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image

import main_contrast
import main_linear
from learning import build
from learning.signals import Ended

MAINS = {"contrast": main_contrast.main, "linear": main_linear.main}
SMALL = "--data_folder images --arch resnet18 --width 0.125 --input_res 32 --batch_size 4 --num_workers 0 --feat_dim 8"
CONTRAST = f"{SMALL} --queue_size 4 --device cpu --epochs 1"
LINEAR = "--ckpt save/run --device cpu --epochs 1 --batch_size 4 --num_workers 0"


class Evil:
    """A pickle of this calls open("stolen", "w") when it is read carelessly."""

    def __reduce__(self):
        return open, ("stolen", "w")


def write_images(folder, count=4):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def run(program, line):
    """The program in this process, in the current folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"/somewhere/main_{program}.py", *line.split()])
        MAINS[program]()


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A working folder: images, things that are none, a finished run, files that are no checkpoints."""
    root = tmp_path_factory.mktemp("work")
    for split in ("train", "val"):
        for name in ("n1", "n2"):
            write_images(root / "images" / split / name)
            (root / "broken" / split / name).mkdir(parents=True)
            (root / "broken" / split / name / "0.png").write_text("no picture")
    write_images(root / "flat", 16)
    (root / "empty").mkdir()
    (root / "texts").mkdir()
    (root / "texts" / "a.txt").write_text("a")
    (root / "classes.txt").write_text("n1\nn3\n")
    (root / "junk.pth").write_bytes(b"junk")
    (root / "evil.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run("contrast", f"{CONTRAST} --name run")
    return root


@pytest.fixture
def work(everything, monkeypatch):
    """Inside that folder, of which nothing may change, but which process has held the run's `lock`."""
    monkeypatch.chdir(everything)
    before = tree(everything)
    yield everything
    assert tree(everything) == before


def tree(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.name != "lock"} | (
        dict.fromkeys(path for path in root.rglob("*") if path.is_dir())
    )


def sentence(program, line, capsys, *, code=1):
    """What the program says on stderr before it ends with `code`."""
    with pytest.raises(SystemExit) as exit:
        run(program, line)
    said = exit.value.code if isinstance(exit.value.code, str) else capsys.readouterr().err.removesuffix("\n")
    assert code == (1 if isinstance(exit.value.code, str) else exit.value.code)
    assert said.startswith(f"main_{program}.py: ") and "\n" not in said, said
    return said.split(": ", 1)[1]


@pytest.mark.parametrize(
    "line, words",
    [
        ("--data_folder nowhere", ["nowhere", "does not exist"]),
        ("--data_folder empty", ["empty"]),
        ("--data_folder texts", ["texts", ".txt"]),
        ("--data_folder broken --batch_size 2 --queue_size 4", ["broken/train/n1/0.png", "image"]),
        ("--dataset imagenet100 --imagenet100path classes.txt", ["1 of the 2 classes", "n3"]),
        ("--dataset imagenet100 --imagenet100path none.txt", ["none.txt"]),
        ("--dataset npz", ["images", ".npz"]),
        ("--dataset cifar10", ["CIFAR", "--download"]),
        ("--data_folder flat --knn_freq 1", ["label"]),
        ("--batch_size 100 --queue_size 100", ["--batch_size 100", "8 images"]),
        ("--batch_size 8 --queue_size 8 --bn_splits 5", ["--batch_size 8", "5 parts"]),
        ("--width 0.001", ["--width"]),
        ("--arch resnet17", ["resnet17"]),
        ("--name run", ["already holds a trained run", "--resume"]),
        ("--resume nowhere", ["no checkpoint at nowhere"]),
        ("--resume empty", ["no checkpoint at empty/current.pth"]),
        ("--resume junk.pth", ["junk.pth"]),
        ("--resume evil.pth", ["evil.pth", "open"]),
        ("--resume save/run --arch resnet34", ["--arch resnet34", "resnet18"]),
        ("--resume save/run --width 0.25", ["--width 0.25", "0.125"]),
        ("--model_path junk.pth/save", ["junk.pth/save", "--model_path"]),
        ("--model_path junk.pth", ["junk.pth", "--model_path"]),
        ("--model_path /proc/save", ["/proc/save", "--model_path"]),
        ("--tb_path junk.pth/tb", ["junk.pth/tb", "--tb_path"]),
        ("--tb_path /proc/tb --dry_run", ["/proc/tb", "--tb_path"]),
    ],
)
def test_main_contrast(work, capsys, line, words):
    said = sentence("contrast", f"{CONTRAST} {line}", capsys)
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    "line, words",
    [
        ("--ckpt nowhere", ["no checkpoint at nowhere"]),
        ("--ckpt junk.pth", ["junk.pth"]),
        ("--ckpt evil.pth", ["evil.pth", "open"]),
        ("--arch resnet34", ["--arch resnet34", "resnet18"]),
        ("--n_class 1", ["--n_class 1", "2 classes"]),
        ("--batch_size 100", ["--batch_size 100", "8 images"]),
        ("--batch_size 100 --cache_features", ["--batch_size 100", "8 images"]),
        ("--data_folder nowhere", ["nowhere"]),
        ("--data_folder flat", ["label"]),
        ("--data_folder broken --batch_size 2", ["broken/train/n1/0.png"]),
        ("--resume nowhere", ["no checkpoint at nowhere"]),
        ("--resume save/run", ["is not a checkpoint of main_linear.py"]),
        ("--model_path junk.pth/save", ["--model_path"]),
        ("--tb_path junk.pth/tb --eval knn", ["--tb_path"]),
    ],
)
def test_main_linear(work, capsys, line, words):
    said = sentence("linear", f"{LINEAR} {line}", capsys)
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    "line",
    ["--queue_size 2", "--nprocs 3", "--batchsize 8", "--epochs 0", "--name a/b", "--mean 123,116,103", "extra"],
)
def test_a_wrong_command_line_ends_with_code_2(work, capsys, line):
    assert sentence("contrast", f"{CONTRAST} {line}", capsys, code=2)


@pytest.mark.parametrize("line", ["--device cuda", "--gpu 0", "--dist_backend nccl", "--device cuda --nprocs 2"])
@pytest.mark.parametrize("program", MAINS)
def test_a_gpu_that_is_not_there(work, capsys, monkeypatch, program, line):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = "" if program == "linear" else SMALL
    assert f"{' '.join(line.split()[:2])} asks for a GPU" in sentence(program, f"{flags} {line}", capsys)


def test_a_full_disk(work, capsys, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2_000_000))
    said = sentence("contrast", CONTRAST, capsys)
    size = (work / "save" / "run" / "current.pth").stat().st_size
    needed = float(said.split("take ")[1].split(" MB")[0]) * 1e6
    assert "Only 2 MB are free" in said and 2.8 * size < needed < 3.2 * size + 1e6


@pytest.mark.parametrize(
    "error, word",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."), "--amp"),
        (MemoryError(), "--num_workers"),
        (None, "--batch_size"),
        (Ended(signal.SIGINT), "--resume auto"),
    ],
)
def test_full_memory_and_ctrl_c(work, capsys, monkeypatch, error, word):
    def method(*arguments):
        if error is None:
            torch.empty(1 << 57, dtype=torch.uint8)
        raise error

    monkeypatch.setattr(build, "method", method)
    assert word in sentence("contrast", CONTRAST, capsys, code=getattr(error, "status", 1))


def test_other_errors_keep_their_traceback(work, monkeypatch):
    def method(*arguments):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(build, "method", method)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run("contrast", CONTRAST)


# Dry run, start and end of a run


def test_a_dry_run_tells_everything_and_leaves_nothing(work, capsys):
    run(
        "contrast", f"{CONTRAST} --dry_run --ft_neg interpolate --ft_begin_epoch 1 --epochs 3 --save_score --knn_freq 1"
    )
    said = capsys.readouterr().out
    for line in (
        "  temperature                  0.2                  method MoCov2",
        "stem                         small                auto: --input_res 32",
        "images: 8, 2 classes",
        "steps: 6 = 3 x 2, 2 of them warm-up",
        "feature transformation: from step 3 on",
        "run folder: save/MoCov2-ft-folder-resnet18-1",
        "epoch 1  step 2/6  loss",
    ):
        assert line in said, said
    assert "step 3/6" not in said
    size = float(said.split("checkpoint: about ")[1].split(" MB")[0]) * 1e6
    assert size == pytest.approx((work / "save" / "run" / "current.pth").stat().st_size, rel=0.1)


def test_a_dry_run_of_a_resume_leaves_the_run_as_it_is(work, capsys):
    run("contrast", "--resume save/run --dry_run --epochs 3 --data_folder images --num_workers 0")
    said = capsys.readouterr().out
    assert "run folder: save/run," in said and "step 4/6" in said and "note: going on from save/run" in said


def test_a_dry_run_on_two_processes(work, capfd):
    run("contrast", f"{CONTRAST} --dry_run --nprocs 2")
    said = capfd.readouterr().out
    assert said.count("step 2/2") == 1 and "2 x cpu" in said


def test_start_and_end_of_a_run_are_short(everything, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = f"{CONTRAST.replace('images', str(everything / 'images'))} --epochs 2 --stop_epoch 9 --name run"
    run("contrast", line)
    before, after = capsys.readouterr().out.split("epoch 1/2 done  loss ")
    assert "note: --stop_epoch 9 lies beyond --epochs 2" in before
    assert "MoCov2 on 8 images of folder at 32 px" in before and "run folder save/run" in before
    assert "batch norm sees the whole batch" in before  # four images cannot be split
    assert "epoch 2/2 done" in after and "Done." in after
    run("contrast", f"{line} --resume save/run")
    assert "Already complete: 2 of 2 epochs." in capsys.readouterr().out
    run("linear", f"{LINEAR} --name probe --save_freq 0")
    assert "encoder of save/run/current.pth" in capsys.readouterr().out
    run("linear", f"{LINEAR} --resume save/probe")
    assert "Already complete: 1 of 1 epochs." in capsys.readouterr().out


def test_other_images_under_a_resumed_run_leave_no_folder_and_no_log(work, capsys):
    for flags in ("--resume save/run/current.pth --name other", "--resume save/run"):
        said = sentence("contrast", f"{flags} --epochs 9 --data_folder flat --num_workers 0", capsys)
        assert "is of 8 images in 2 steps per epoch, this run has 16 in 4" in said
