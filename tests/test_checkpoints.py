"""Nothing of a run is ever lost: kills at any moment, damaged files, full disks, two starts at once, other data."""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from datasets.sources import Source
from learning import build, checkpoint, lock, parallel, resume
from learning.meters import Meters
from learning.run import Run
from options import contrast
from tests.test_training import FT, assert_same_run, equal, few_pictures, pretrain_line, records, train  # noqa: F401

FLAGS = f"{FT} --epochs 3 --cosine --print_freq 1"
TIMES = {"step/images_per_second", "step/data_wait"}


def scalars(folder):
    """Tag -> [(step, value), ...] of all TensorBoard events in a folder, in the order of the steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = set(events.Tags()["scalars"]) - TIMES
    return {tag: sorted((event.step, event.value) for event in events.Scalars(tag)) for tag in tags}


def assert_nothing_lost(whole, parts):
    """`parts`, however often it was ended, is `whole` bit for bit, and every record was written once."""
    assert_same_run(whole, parts)
    assert scalars(whole.parent / "tb" / "run") == scalars(parts.parent / "tb" / "run")
    assert [path.name for path in sorted(whole.glob("*.pth"))] == [path.name for path in sorted(parts.glob("*.pth"))]
    assert not list(parts.rglob("*.tmp"))


@pytest.fixture
def start():
    """Start `train` in a forked process."""
    begun = []

    def start(*arguments, target=train):
        begun.append(multiprocessing.get_context("fork").Process(target=target, args=arguments))
        begun[-1].start()
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.join()


def dies(call, *arguments):
    """Train, and be killed just before the `call`-th change of a file."""
    left = [call]

    def watched(function):
        def wrapper(*arguments, **keywords):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return wrapper

    for place, names in ((os, ("fsync", "link", "truncate")), (Path, ("replace", "unlink", "rename"))):
        for name in names:
            setattr(place, name, watched(getattr(place, name)))
    train(*arguments)


def wait_for(path, process):
    while not path.exists():
        assert process.is_alive()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without any trouble."""
    with pytest.MonkeyPatch.context() as patch:
        few_pictures.__wrapped__(patch)
        return train(tmp_path_factory.mktemp("whole"), FLAGS, "--save_every_steps 2 --knn_freq 1")


def test_a_run_killed_at_any_moment_goes_on_as_if_nothing_had_been(whole, tmp_path, start):
    line = f"{FLAGS} --save_every_steps 2 --knn_freq 1 --resume auto"
    for _ in range(2):
        process = start(tmp_path, line)
        wait_for(tmp_path / "run" / "log.jsonl", process)
        time.sleep(random.uniform(0, 0.5))
        process.kill()
        process.join()
    assert_nothing_lost(whole, train(tmp_path, line))


@pytest.mark.parametrize("first, second", [(9, 14), (31, 3), (123, 9)])
def test_a_run_killed_between_two_changes_of_files(whole, tmp_path, start, first, second):
    """In the middle of a checkpoint, of taking back what was written after it, or of throwing old ones away."""
    line = f"{FLAGS} --save_every_steps 2 --knn_freq 1 --resume auto"
    for call in (first, second):
        process = start(call, tmp_path, line, target=dies)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert_nothing_lost(whole, train(tmp_path, line))


def test_a_run_killed_before_its_k_nn_evaluation_makes_up_for_it(whole, tmp_path, monkeypatch):
    def fails(*arguments):
        raise ValueError("no room")

    line = f"{FLAGS} --save_every_steps 2 --knn_freq 1"
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no room"):
        patch.setattr(build, "knn_accuracy", fails)
        train(tmp_path, line)
    assert checkpoint.load(tmp_path / "run")["position"]["step"] == 3  # the epoch is not lost either
    assert_nothing_lost(whole, train(tmp_path, line, "--resume auto"))


def test_events_are_written_once_by_the_other_writer_too(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard_logger", None)
    line = f"{FLAGS} --save_every_steps 2"
    whole = train(tmp_path / "whole", line)
    monkeypatch.setattr(Run, "save", run_save := Killed(Run.save, at=5))  # after steps 2, 3, 4, 6
    with pytest.raises(SystemExit):
        train(tmp_path / "parts", line)
    run_save.at = None
    (tmp_path / "parts" / "tb" / "run" / "events.out.tfevents.1.other").write_bytes(b"another run's")
    assert_nothing_lost(whole, train(tmp_path / "parts", line, "--resume auto"))
    assert (tmp_path / "parts" / "tb" / "run" / "events.out.tfevents.1.other").exists()


class Killed:
    """A method that ends the program instead at its call number `at`."""

    def __init__(self, method, *, at):
        self.method, self.at, self.calls = method, at, 0

    def __get__(self, instance, owner):
        def call(*arguments, **keywords):
            self.calls += 1
            if self.calls == self.at:
                sys.exit()
            return self.method(instance, *arguments, **keywords)

        return call


def test_looking_at_one_of_two_processes_changes_nothing(monkeypatch):
    """Each gets its own running statistics and averages back; of another number of processes, the mean."""
    theirs = torch.tensor([2.0, 4.0])
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(1 / 3)
    norm.running_var.copy_(theirs)
    before, meters = norm.running_mean.clone(), Meters()
    meters.add({"loss": torch.tensor(5.0)})
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "world_size", lambda: 2)
        patch.setattr(parallel, "rank", lambda: 1)
        patch.setattr(parallel, "gather", lambda x: torch.cat([theirs[None, : x.shape[1]], x]))
        patch.setattr(parallel, "all_mean", lambda x: x.add_(theirs).div_(2))
        with parallel.averaged_running_statistics(norm) as rows:
            assert torch.equal(norm.running_mean, (before + theirs) / 2)
        assert torch.equal(norm.running_mean, before) and torch.equal(rows[0], torch.stack([theirs, before]))
        norm.running_mean.zero_()
        parallel.set_running_statistics(norm, rows)
        assert torch.equal(norm.running_mean, before)
        state, ours = meters.state_dict(), Meters()
        ours.load_state_dict(state, torch.device("cpu"))
        assert ours.sums == {"loss": 5.0} and ours.read() == {"loss": 3.5}
    parallel.set_running_statistics(norm, rows)
    assert torch.equal(norm.running_mean, (before + theirs) / 2)
    ours.load_state_dict(state, torch.device("cpu"))
    assert ours.read() == {"loss": 3.5}


# Files


def test_which_checkpoints_stay(tmp_path):
    folder = train(tmp_path, FLAGS, "--save_every_steps 2 --keep 3 --save_freq 2")
    names = ["ckpt_epoch_2.pth", "current.pth", "step_00000006.pth", "step_00000008.pth", "step_00000009.pth"]
    assert sorted(path.name for path in folder.glob("*.pth")) == names
    assert (folder / "current.pth").samefile(folder / "step_00000009.pth")
    assert (folder / "ckpt_epoch_2.pth").samefile(folder / "step_00000006.pth")
    for step in (6, 8, 9):
        assert checkpoint.load(folder / f"step_{step:08}.pth")["position"]["step"] == step


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def link(*arguments):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    folder = train(tmp_path, FLAGS, "--keep 1 --save_freq 3")
    assert sorted(path.name for path in folder.glob("*.pth")) == [
        "ckpt_epoch_3.pth",
        "current.pth",
        "step_00000009.pth",
    ]
    assert len({path.read_bytes() for path in folder.glob("*.pth")}) == 1


def torn(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in the middle of some tensor: PyTorch reads it without a word
    path.write_bytes(content)


def emptied(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage, how", [(torn, "run"), (flipped, "auto"), (emptied, "run")])
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_taken(whole, tmp_path, capsys, damage, how):
    line = f"{FLAGS} --save_every_steps 2 --knn_freq 1"
    run = train(tmp_path, line, "--stop_epoch 2")
    damage(run / "current.pth")  # and thereby step_00000006.pth
    with pytest.raises(ValueError, match=r"current\.pth (is damaged|is empty|cannot be read)"):
        train(tmp_path, line, "--resume", str(run / "current.pth"))
    resumed = train(tmp_path, line, "--resume", str(run) if how == "run" else "auto")
    said = capsys.readouterr().out
    assert f"note: damaged in {run}: current.pth, step_00000006.pth; taking the newest sound checkpoint, " in said
    assert (run / "step_00000006.dropped").exists()
    assert_nothing_lost(whole, resumed)


def test_auto_passes_by_the_runs_of_others(tmp_path, monkeypatch):
    """Root may write everywhere, so who may not is only played."""
    run, options = train(tmp_path, FLAGS, "--stop_epoch 1"), [None]
    monkeypatch.setattr(resume, "_take", lambda path, opt: options.append(path))
    monkeypatch.setattr("os.access", lambda path, how: path != run)
    opt, _, _ = contrast.parse(f"{FLAGS} --resume auto --model_path {tmp_path}".split())
    monkeypatch.setattr(resume, "_equal", lambda folder, opt: True)
    assert resume.find(opt).path is None and options == [None]
    monkeypatch.setattr(lock, "_held", {})
    monkeypatch.setattr(Path, "open", lambda *arguments: (_ for _ in ()).throw(PermissionError()))
    with pytest.raises(ValueError, match="is not yours to write to: begin a run of another --name"):
        lock.hold(run)


def test_a_run_with_nothing_but_damaged_checkpoints(tmp_path, capsys):
    run = train(tmp_path, FLAGS, "--stop_epoch 1")
    torn(run / "current.pth")
    for how in (str(run), "auto"):
        with pytest.raises(
            ValueError, match=r"Every checkpoint in .*run is damaged \(current.pth, step_00000003.pth\)"
        ):
            train(tmp_path, FLAGS, "--resume", how)
    line = f"--model_path {tmp_path} --tb_path {tmp_path}/tb --input_res 8 --num_workers 0 --device cpu --dry_run"
    small = "--width 0.125 --batch_size 16 --queue_size 40 --save_score --seed 3 --lr 0.1 --feat_dim 16"
    pretrain_line(f"{small} {line} {FLAGS} --resume auto")
    said = capsys.readouterr().out
    assert "note: Every checkpoint in" in said and "starting anew" in said


def test_checkpoints_of_older_and_newer_programs(whole, tmp_path):
    line = f"{FLAGS} --print_freq 2 --knn_freq 1"
    run = train(tmp_path, line, "--stop_epoch 1")
    state = checkpoint.load(run / "current.pth")
    checkpoint.save(run / "current.pth", state | {"format": checkpoint.FORMAT + 1})
    for how in (run, run / "current.pth"):
        with pytest.raises(ValueError, match="written by a newer version of this program; update it"):
            train(tmp_path, line, "--resume", str(how))
    later = ("fingerprint", "knn_due", "torch", "threads", "statistics", "events")
    state["position"] = {name: x for name, x in state["position"].items() if name not in later}
    window = state["position"]["progress"]["window"]
    window["sums"] = {name: x[0] for name, x in window["sums"].items()}
    torch.save({name: state[name] for name in checkpoint.KEYS}, run / "current.pth")
    resumed = checkpoint.load(train(tmp_path, line, "--resume", str(run)))
    assert equal(resumed["method"], checkpoint.load(whole)["method"])
    assert records(run, "step")[1]["loss"] == pytest.approx(sum(x["loss"] for x in records(whole, "step")[2:4]) / 2)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    unfinished = folder / "step_00000006.pth.tmp"
    with pytest.MonkeyPatch.context() as patch:
        save = Run.save

        def onto_a_full_disk(self, state, *, epoch):
            if epoch == 2:
                unfinished.symlink_to("/dev/full")
            save(self, state, epoch=epoch)

        patch.setattr(Run, "save", onto_a_full_disk)
        with pytest.raises(
            OSError, match=r"step_00000006.pth could not be written \(No space left on device\); what was"
        ):
            train(tmp_path, FLAGS)
    assert not unfinished.is_symlink()
    assert checkpoint.load(folder)["position"]["step"] == 3
    assert train(tmp_path, FLAGS, "--resume auto") == folder and checkpoint.load(folder)["position"]["step"] == 9


# Starts


def holds(folder):
    lock.hold(folder)
    lock.hold(folder)  # does not let go of it
    (folder / "held").touch()
    time.sleep(100)


def test_a_folder_is_held_until_the_process_ends(tmp_path, start):
    process = start(tmp_path, target=holds)
    wait_for(tmp_path / "held", process)
    with pytest.raises(ValueError, match="is being written to by process"):
        lock.hold(tmp_path)
    process.kill()
    process.join()
    lock.hold(tmp_path)


@pytest.mark.parametrize("how", ["", "--resume auto", "--resume {run}"])
def test_a_second_start_on_a_folder_is_refused(tmp_path, start, how):
    run = tmp_path / "run"
    line = f"{FLAGS} --epochs 1000 --save_every_steps 1"
    process = start(tmp_path, line)
    wait_for(run / ("current.pth" if "{run}" in how else "options.json"), process)
    said = rf"run is being written to by process {process.pid} on .*: wait until it ends, or begin a run of another"
    with pytest.raises(ValueError, match=said if how else f"{said}|already holds a trained run"):
        train(tmp_path, line, how.format(run=run))
    process.kill()
    process.join()
    train(tmp_path, line, "--stop_epoch 1 --resume auto")


@pytest.mark.parametrize("same_number", [True, False])
def test_other_images_are_noticed(tmp_path, monkeypatch, same_number):
    def other(opt, split):
        images = torch.zeros(50 if same_number else 49, 3, 8, 8, dtype=torch.uint8)
        return Source(images, torch.arange(len(images)) % 3, ("a", "b", "c"), mean=(0.5,) * 3, std=(0.2,) * 3)

    run = train(tmp_path, FLAGS, "--stop_epoch 1")
    log = (run / "log.jsonl").read_bytes()
    monkeypatch.setattr(build, "source", other)
    with pytest.raises(ValueError, match="These are 50 images too, but not" if same_number else "is of 50 images in 3"):
        train(tmp_path, FLAGS, "--resume auto")
    assert (run / "log.jsonl").read_bytes() == log


def test_what_cannot_be_exact_is_noted(tmp_path, capsys, monkeypatch):
    train(tmp_path, FLAGS, "--stop_epoch 1")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    train(tmp_path, FLAGS, "--stop_epoch 2 --resume auto")
    assert (
        capsys.readouterr().out.count("note: going on with threads 2 (before 1): sums are taken in another order") == 1
    )
