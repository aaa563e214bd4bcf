"""Steps whose loss or weights are not finite: they change nothing, and the run stops, or goes on without them."""

import copy
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from datasets.loader import TrainLoader
from learning import build, checkpoint, parallel
from learning.guard import NotFinite
from learning.interrupt import Interrupt
from learning.methods.base import StepOutput
from memory.stores import Bank, Queue
from tests.test_methods import TINY, batches, flags, made, train_epoch  # noqa: F401
from tests.test_training import ROOT, SMALL, HostReads, equal, few_pictures, records, train  # noqa: F401

KINDS = ["MoCov2", "CMC --loss nce", "SimCLR --optimizer lars", "BYOL", "SwAV"]
NO, YES = torch.tensor(False), torch.tensor(True)


def spoilt(batch, view="query"):
    """The batch with one image that is no number."""
    return batch | {view: batch[view].index_fill(0, torch.tensor([0]), torch.nan)}


@pytest.fixture
def spoil(monkeypatch):
    """A function of global steps whose batches come spoilt from every loader."""
    plain = TrainLoader.__iter__

    def spoil(*steps, view="query"):
        def batches(loader):
            first = loader.sampler.epoch * len(loader) + loader.sampler.start_step
            for step, batch in enumerate(plain(loader), first):
                yield spoilt(batch, view) if step in steps else batch

        monkeypatch.setattr(TrainLoader, "__iter__", batches)

    return spoil


def everything(training):
    """What a step that does not count must leave as it is; a momentum that is not there yet is one of 0."""
    state = copy.deepcopy([training.method.state_dict(), training.optimizer.state_dict()["state"]])
    momenta = {k: x["momentum_buffer"] for k, x in state[1].items() if x["momentum_buffer"].any()}
    kept = {name: x.nan_to_num(7) for name, x in state[0].items()}  # NCE's constants begin as nan
    return kept, momenta, training.progress.epoch.state_dict()["sums"], training.progress.scores.state_dict()


def loop(kind, *arguments):
    """Objects of a run, and a function that trains for the batches given, from the first step given."""
    training = made(kind, "--print_freq 1000", *arguments)

    def run(*given, first_step):
        with HostReads() as reads:
            train_epoch(training, given, first_step)
        assert all(any(frame.name == "generator" for frame in stack) for _, stack in reads.seen)

    return training, run


@pytest.mark.parametrize("kind, amp", [*((kind, "off") for kind in KINDS), ("MoCov2", "bf16")])
def test_without_bad_steps_nothing_is_different(kind, amp):
    training, run = loop(kind, f"--amp {amp}")
    run(*batches(kind), first_step=0)
    plain = made(kind, f"--amp {amp}")
    for step, batch in enumerate(batches(kind)):
        for group in plain.optimizer.param_groups:
            group["lr"] = plain.schedule(step)
        with build.autocast(amp, plain.device)():
            out = plain.method(batch | {"step": step})
        plain.optimizer.zero_grad()
        out.loss.backward()
        plain.method.after_backward(step)
        plain.optimizer.step()
        plain.method.after_step(out, step)
    assert equal(everything(training)[:2], everything(plain)[:2])


@pytest.mark.parametrize("kind, amp", [*((kind, "off") for kind in KINDS), ("MoCov2", "bf16"), ("SwAV", "bf16")])
def test_a_bad_step_changes_nothing(kind, amp):
    """Nor do those after it where it is to stop; where not, they do what they would have done without it."""
    one, two = batches(kind)
    for mode, bad_step in (("stop", 1), ("skip", 1), ("skip", 0)):
        training, run = loop(kind, f"--amp {amp} --on_nan {mode}")
        other, run_other = loop(kind, f"--amp {amp}")
        if bad_step:
            run(one, first_step=0)
            run_other(one, first_step=0)
        before = everything(training)
        run(spoilt(one), first_step=bad_step)
        assert equal(everything(training), before)
        run(two, first_step=bad_step + 1)
        if mode == "skip":
            run_other(two, first_step=bad_step + 1)
            training.guard.check()
        assert equal(everything(training), everything(other))
        if mode == "stop":
            with pytest.raises(NotFinite, match="after step 1 .*task .* nan, positive_mean nan") as trouble:
                training.guard.check()
            assert trouble.value.step == 1 and torch.equal(trouble.value.index, one["index"])
            training.guard.check()  # everything is sound, and may be saved


@pytest.mark.parametrize("kind", ["MoCov2", "SimCLR --optimizer lars"])
def test_weights_that_are_not_finite_are_never_kept(kind):
    one, two = batches(kind)
    training, run = loop(kind)
    run(one, first_step=0)
    before = everything(training)
    training.schedule = lambda step: float("inf")
    run(two, two, first_step=1)
    assert equal(everything(training), before)
    with pytest.raises(NotFinite, match="weights became infinite or nan after step 1 .loss [0-9]"):
        training.guard.check()


@pytest.mark.parametrize("mode, counts", [("stop", [True, False, False]), ("skip", [True, False, True])])
def test_ranks_agree(monkeypatch, mode, counts):
    """The loss is not finite on the other one only."""
    guard, given = made("MoCov2", f"--on_nan {mode}").guard, []
    for step in range(3):
        other = torch.tensor([step != 1])
        monkeypatch.setattr(parallel, "gather", lambda x, other=other: torch.cat([x, other]))
        guard.begin()
        out = StepOutput(torch.tensor(1.0), {}, torch.zeros(()))
        given.append(guard.step(out, step, torch.arange(4)).ok.item())
    assert given == counts


@pytest.mark.parametrize("write", ["queue", "bank"])
def test_memories_write_only_what_counts(write):
    memory = Queue(6, 3) if write == "queue" else Bank(6, 3, 0.5)
    where = () if write == "queue" else (torch.tensor([4, 1, 4, 0]),)
    before = copy.deepcopy(memory.state_dict())
    memory.write(*where, torch.full((4, 3), torch.nan), NO)
    assert equal(memory.state_dict(), before)
    memory.write(*where, torch.ones(4, 3), YES)
    assert not equal(memory.state_dict(), before)


# Whole runs


def moment(path):
    """A checkpoint without what tells of its run folder, of its last learning rate and of trouble."""
    state = checkpoint.load(path)
    for name in ("log_bytes", "events", "nonfinite"):
        state["position"].pop(name, None)
    for name in ("model_path", "tb_path", "name", "resume"):
        state["options"].pop(name)
    for group in state["optimizer"]["param_groups"]:
        group.pop("lr")
    return state


@pytest.mark.parametrize("kind, print_freq", [("MoCov2", 3), ("MoCov2", 1000), ("CMC --loss nce", 3), ("SwAV", 3)])
def test_the_moment_before_is_saved(tmp_path, monkeypatch, spoil, kind, print_freq):
    line = f"{flags(kind)} {TINY} --epochs 2 --print_freq {print_freq}"  # 6 steps an epoch
    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "__call__", lambda self, step: step == 7)
        sound = train(tmp_path / "sound", line)
    spoil(7)
    with pytest.raises(FloatingPointError, match="The loss became nan after step 7 .loss nan, task .*; take a sm"):
        train(tmp_path, line)
    names = {path.name for path in (tmp_path / "run").glob("*.pth")}
    assert names == {"step_00000006.pth", "current.pth", "nonfinite_step_7.pth"}
    saved = tmp_path / "run" / "nonfinite_step_7.pth"
    assert equal(moment(saved), moment(sound / "current.pth"))
    assert checkpoint.load(tmp_path / "run" / "current.pth")["position"]["step"] == 6
    facts = checkpoint.load(saved)["position"]["nonfinite"]
    assert np.isnan(facts["values"]["loss"]) and len(facts["index"]) == 8


def test_the_saved_moment_can_be_gone_on_from(tmp_path, spoil, monkeypatch):
    line = f"{flags('MoCov2', 'scalar')} {TINY} --epochs 2 --print_freq 3"
    whole = train(tmp_path / "whole", line)
    with monkeypatch.context():
        spoil(7)
        with pytest.raises(FloatingPointError, match="after step 7"):
            train(tmp_path / "first", line)
    spoil()
    second = train(tmp_path / "second", line, f"--resume {tmp_path}/first/run/nonfinite_step_7.pth")
    assert equal(moment(second / "current.pth"), moment(whole / "current.pth"))
    assert records(second, "epoch") == records(whole, "epoch")[1:]
    third = train(tmp_path / "third", line, f"--lr 0.01 --resume {tmp_path}/first/run/nonfinite_step_7.pth")
    assert checkpoint.load(third / "current.pth")["options"]["learning_rate"] == 0.01


def test_the_task_is_named(tmp_path, spoil):
    spoil(1, view="jigsaw")
    with pytest.raises(FloatingPointError, match=r"after step 1 .loss nan, task image0 [0-9.]+, task jigsaw0 nan, "):
        train(tmp_path, "--method InfoMin", TINY, "--epochs 1")


def test_skipped_steps_are_counted_and_left_out(tmp_path, spoil, capsys):
    spoil(1, 2, 7)
    folder = train(tmp_path, TINY, "--method MoCov2 --epochs 2 --print_freq 3 --on_nan skip")
    assert [line.get("skipped") for line in records(folder, "step")] == [2, None, 1, None]
    assert [line.get("skipped") for line in records(folder, "epoch")] == [2, 1]
    assert all(np.isfinite(value) for line in records(folder, "epoch") for value in list(line.values())[1:])
    shown = capsys.readouterr().out
    assert re.search(r"step 3/12 .* skipped 2 ", shown) and len(re.findall(r" skipped \d ", shown)) == 4
    for epoch, steps in ((1, [1, 4, 5, 6]), (2, [7, 9, 10, 11, 12])):
        with np.load(folder / "scores" / f"scores_{epoch:04}.npz") as scores:
            assert scores["step"].tolist() == steps and np.isfinite(scores["positive"]).all()
    written = checkpoint.load(folder / "current.pth")["method"]["queues.0.written"]
    assert written == (12 - 3) * 8


def test_skipped_steps_survive_a_pause(tmp_path, spoil, monkeypatch):
    line = f"{TINY} --method BYOL --epochs 2 --print_freq 4 --on_nan skip"
    spoil(1, 3, 7)
    whole = train(tmp_path / "whole", line)
    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "__call__", lambda self, step: step == 2)
        parts = train(tmp_path / "parts", line)
    train(tmp_path / "parts", line, f"--resume {parts}")
    assert equal(moment(parts / "current.pth")["method"], moment(whole / "current.pth")["method"])
    assert records(parts, "step") == records(whole, "step") and records(parts, "epoch") == records(whole, "epoch")


@pytest.mark.parametrize("print_freq, bad, stops", [(1, 10, 14), (3, 14, 24), (1000, 30, 24)])
def test_skipping_ends_where_nothing_counts(tmp_path, spoil, print_freq, bad, stops):
    """Between two log lines, of at least ten steps, or in a whole epoch. What an epoch has skipped is past."""
    line = "--batch_size 4 --method SimCLR --on_nan skip --epochs 3"  # 12 steps an epoch
    spoil(*range(14, 14 + bad))
    with pytest.raises(FloatingPointError, match=f"after step {stops} "):
        train(tmp_path, line, f"--print_freq {print_freq}")
    saved = checkpoint.load(tmp_path / "run" / f"nonfinite_step_{stops}.pth")["position"]
    assert saved["step"] == stops


def test_few_bad_steps_are_waited_for_whatever_the_lines(tmp_path, spoil):
    spoil(3, 4, 5, 6)
    folder = train(tmp_path, "--batch_size 4 --method SimCLR --on_nan skip --epochs 1 --print_freq 1")
    assert [(line["step"], line.get("skipped")) for line in records(folder, "step")][2:5] == [
        (3, None),
        (8, 4),
        (9, None),
    ]


def test_two_processes_stop_together_and_save_once(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), np.uint8)
    splits = {
        f"{split}_{name}": x
        for split in ("train", "test")
        for name, x in (("images", images), ("labels", images[:, 0, 0, 0]))
    }
    np.savez(tmp_path / "tiny.npz", **splits)
    paths = f"--data_folder {tmp_path}/tiny.npz --model_path {tmp_path} --tb_path {tmp_path}/tb --name run"
    line = f"{SMALL} {paths} --nprocs 2 --device cpu --arch resnet18 --input_res 16 --head linear_wo_norm --lr 1e30"
    command = [sys.executable, str(ROOT / "main_contrast.py"), *line.split()]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 1 and len(ended.stderr.splitlines()) == 1, ended.stderr
    (saved,) = (tmp_path / "run").glob("nonfinite_step_*.pth")
    assert str(saved) in ended.stderr and ended.stderr.startswith("main_contrast.py: The ")
    state = checkpoint.load(saved)
    assert all(x.isfinite().all() for x in state["method"].values())
    assert len(state["position"]["nonfinite"]["index"]) == 16
