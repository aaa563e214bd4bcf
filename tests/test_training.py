"""Whole runs: what training writes, that it resumes exactly, and that many processes compute what one computes."""

import dataclasses
import json
import re
import subprocess
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from datasets import keyed
from datasets.sources import Source
from learning import build, checkpoint, engine, parallel, resume
from learning.interrupt import Interrupt
from learning.pretraining import Pretraining, pretrain
from learning.run import SilentRun
from options import contrast

ROOT = Path(__file__).parents[1]
SMALL = "--width 0.125 --batch_size 16 --queue_size 40 --print_freq 2 --save_score --seed 3 --lr 0.1 --feat_dim 16"
FT = "--ft_pos extrapolate --ft_neg interpolate"


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    """Fifty random pictures in place of the built-in set."""

    def source(opt, split):
        count = {"train": 50, "val": 20}[split]
        images = torch.randint(256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
        labels = torch.arange(count) % 3
        return Source(images, labels, ("a", "b", "c"), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))

    monkeypatch.setattr(build, "source", source)


def train(folder, *arguments):
    """What main_contrast.py does with these arguments and small sizes; returns the run folder of `--name run`."""
    paths = f"--model_path {folder} --tb_path {folder}/tb --name run --input_res 8 --num_workers 0 --device cpu"
    pretrain_line(f"{SMALL} {paths} {' '.join(arguments)}")
    return Path(folder) / "run"


def pretrain_line(line):
    options, origins, notes = contrast.parse(line.split())
    pretrain(options, origins=origins, notes=notes)


def objects(*arguments):
    options, origins, _ = contrast.parse(f"{SMALL} --input_res 8 --device cpu {' '.join(arguments)}".split())
    data = build.source(options, "train")
    resolved, _ = build.resolve(options, origins, n_data=len(data))
    return Pretraining(resolved, data, lambda room: SilentRun(Path("nowhere")))


def train_epoch(training, batches, first_step=0):
    engine.train_epoch(
        training.method,
        batches,
        training.optimizer,
        first_step=first_step,
        schedule=training.schedule,
        autocast=build.autocast(training.opt.amp, training.device),
        guard=training.guard,
        progress=training.progress,
        stop=lambda step: False,
    )


def records(folder, kind):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    times = {"images_per_second", "data_wait"}
    return [{k: v for k, v in line.items() if k not in times} for line in lines if line["kind"] == kind]


def equal(a, b):
    """Whether two checkpoints hold the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_same_run(one, other):
    a, b = (checkpoint.load(folder / "current.pth") for folder in (one, other))
    for state in (a, b):
        for name in ("log_bytes", "events"):  # times have more digits or fewer; files are named after them
            state["position"].pop(name)
        state["options"] = {k: v for k, v in state["options"].items() if k not in resume.HOUSEKEEPING}
    assert equal(a, b)
    for kind in ("step", "epoch", "knn", "diagnosis"):
        assert records(one, kind) == records(other, kind)
    files = [sorted(path.name for path in (folder / "scores").iterdir()) for folder in (one, other)]
    assert files[0] == files[1]
    for name in files[0]:
        assert (one / "scores" / name).read_bytes() == (other / "scores" / name).read_bytes()


def test_a_run_folder_holds_everything(tmp_path):
    folder = train(tmp_path, FT, "--epochs 2 --save_freq 2 --knn_freq 2")
    names = {"options.json", "environment.json", "log.txt", "log.jsonl", "tensorboard.json", "lock", "scores"}
    names |= {"step_00000003.pth", "step_00000006.pth", "current.pth", "ckpt_epoch_2.pth"}
    assert {path.name for path in folder.iterdir()} == names
    options = json.loads((folder / "options.json").read_text())
    assert options["values"]["bn_splits"] == 2 and options["sources"]["bn_splits"].startswith("auto: one process")
    assert options["sources"]["queue_size"] == "command line" and options["sources"]["arch"] == "dataset shapes"
    assert json.loads((folder / "environment.json").read_text())["torch"] == torch.__version__
    state = checkpoint.load(folder / "current.pth")
    assert state.keys() == {*checkpoint.KEYS, "format"} and state["position"]["step"] == 6
    assert state["method"]["queues.0.written"] == 96  # 6 steps of 16 keys
    assert [line["step"] for line in records(folder, "step")] == [2, 4, 6]
    epoch = records(folder, "epoch")[-1]
    assert {"loss", "contrast_acc", "before_contrast_acc", "positive_var", "gap", "queue_fill"} <= epoch.keys()
    assert {"backbone_top1", "head_top1"} <= records(folder, "knn")[0].keys()


def test_a_run_without_fast_paths_is_the_same(tmp_path, monkeypatch):
    folders = [train(tmp_path / "fast", FT, "--epochs 1")]
    for place in ("learning.pretraining.keep_freed_memory", "datasets.augment.separable", "memory.one_pass.score"):
        monkeypatch.setattr(place, None)
    monkeypatch.setattr(torch, "channels_last", None)
    off = "--no_keep_memory --no_fast_images --no_one_pass --no_channels_last"
    folders.append(train(tmp_path / "slow", FT, f"--epochs 1 {off}"))
    fast, slow = ([line["loss"] for line in records(folder, "step")] for folder in folders)
    assert slow == pytest.approx(fast, rel=1e-3) and len(fast) == 1


@pytest.mark.parametrize("native, chosen", [(True, "bf16"), (False, "fp16")])
def test_a_gpu_that_only_emulates_bf16_computes_in_fp16(monkeypatch, native, chosen):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert build._precision(torch.device("cuda"))[0] == chosen


def test_no_memory_for_knn_ends_no_training(tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(build, "knn_accuracy", full)
    folder = train(tmp_path, "--epochs 2 --knn_freq 1")
    assert (folder / "log.txt").read_text().count("no memory for k-NN, which is left out") == 2
    position = checkpoint.load(folder / "current.pth")["position"]
    assert position["step"] == 6 and not position["knn_due"] and not records(folder, "knn")


def test_score_files_say_what_happened(tmp_path):
    folder = train(tmp_path, FT, "--epochs 2 --ft_begin_epoch 1")
    epochs = [dict(np.load(path)) for path in sorted((folder / "scores").iterdir())]
    assert [int(epoch["epoch"]) for epoch in epochs] == [1, 2]
    assert [epoch["step"].tolist() for epoch in epochs] == [[1, 2, 3], [4, 5, 6]]
    for epoch in epochs:
        assert epoch["positive"].shape == epoch["index"].shape == (3, 16)
        assert len(np.unique(epoch["index"])) == 48  # every sample once, the incomplete batch dropped
        assert epoch["queue_size"] == 40 and epoch["temperature"] == 0.2
    off, on = epochs
    assert np.array_equal(off["positive"], off["before_positive"])
    assert (on["positive"] <= on["before_positive"] + 1e-6).all() and (on["positive"] < on["before_positive"]).any()
    summary = records(folder, "epoch")[1]
    assert summary["positive_mean"] == pytest.approx(on["positive"].mean(), abs=1e-5)
    assert summary["positive_var"] == pytest.approx(on["positive"].var(), abs=1e-5)
    assert summary["negative_var"] == pytest.approx(on["negative_var"].mean(), abs=1e-5)


def test_tensorboard_reads_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, "--epochs 1")
    events = EventAccumulator(str(tmp_path / "tb" / "run"))
    events.Reload()
    written = records(tmp_path / "run", "epoch")[0]
    assert events.Scalars("loss")[0].value == pytest.approx(written["loss"])
    assert events.Scalars("loss")[0].step == 1
    assert {"step/loss", "step/learning_rate", "step/positive_mean", "step/queue_fill"} <= set(events.Tags()["scalars"])


def test_resume_at_an_epoch_boundary_equals_an_uninterrupted_run(tmp_path):
    flags = f"{FT} --epochs 3 --ft_begin_epoch 1 --cosine --knn_freq 1 --stem auto"
    whole = train(tmp_path / "whole", flags)
    train(tmp_path / "parts", flags, "--stop_epoch 1")
    train(tmp_path / "parts", flags, "--stop_epoch 2 --resume auto")
    parts = train(tmp_path / "parts", flags, "--resume auto")
    assert_same_run(whole, parts)


def test_going_on_from_an_older_checkpoint_leaves_the_run_as_it_is(tmp_path):
    folder = train(tmp_path, "--epochs 2 --save_freq 1")
    before = (folder / "current.pth").read_bytes()
    line = f"--model_path {tmp_path} --tb_path {tmp_path}/tb --num_workers 0 --device cpu"
    pretrain_line(f"{line} --resume {folder / 'ckpt_epoch_1.pth'}")
    assert (folder / "current.pth").read_bytes() == before
    branch = tmp_path / "MoCov2-shapes-resnet18-1"
    a, b = (checkpoint.load(path / "current.pth") for path in (folder, branch))
    assert equal(a["method"], b["method"]) and [line["epoch"] for line in records(branch, "epoch")] == [2]


def test_a_run_killed_before_its_first_checkpoint_leaves_no_trace_in_the_next_log(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text('{"kind": "step", "epoch": 1, "step": 1}\n')
    assert [line["step"] for line in records(train(tmp_path, "--epochs 1"), "step")] == [2]


@pytest.mark.parametrize("stopped_at", [2, 5])
def test_resume_in_the_middle_of_an_epoch_equals_an_uninterrupted_run(tmp_path, monkeypatch, stopped_at):
    whole = train(tmp_path / "whole", FT, "--epochs 3 --cosine")
    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "__call__", lambda self, step: step == stopped_at)
        parts = train(tmp_path / "parts", FT, "--epochs 3 --cosine")
    assert checkpoint.load(parts / "current.pth")["position"]["step"] == stopped_at
    train(tmp_path / "parts", FT, "--epochs 3 --cosine --resume", str(parts))
    assert_same_run(whole, parts)


def test_auto_resume_starts_anew_where_nothing_fits(tmp_path, capsys):
    train(tmp_path, "--epochs 1")
    line = f"{SMALL} --input_res 8 --device cpu --model_path {tmp_path} --tb_path {tmp_path}/tb --num_workers 0"
    pretrain_line(f"{line} --epochs 1 --lr 0.2 --resume auto")
    assert "starting anew" in capsys.readouterr().out
    pretrain_line(f"{line} --epochs 1 --resume auto")
    assert f"Already complete: 1 of 1 epochs. A larger --epochs trains on. Everything is in {tmp_path / 'run'}." in (
        capsys.readouterr().out
    )
    pretrain_line(f"{line} --epochs 1 --print_freq 3 --resume auto --dry_run")
    assert f"going on from {tmp_path / 'run' / 'current.pth'}" in capsys.readouterr().out


def test_a_complete_run_stays_as_it_is(tmp_path, capsys):
    folder = train(tmp_path, "--epochs 2")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for more, said in [
        ("--seed 8", "Already complete: 2 of 2 epochs"),
        ("--epochs 1", "Nothing to do: 2 epochs are trained, and --epochs is 1. A larger one trains on"),
        ("--epochs 9 --stop_epoch 2", "Nothing to do: 2 epochs are trained, and --stop_epoch is 2"),
        ("--name other", "Already complete"),
    ]:
        pretrain_line(f"{SMALL} --input_res 8 --device cpu --resume {folder} --model_path {tmp_path} {more}")
        assert said in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert not (tmp_path / "other").exists()


def test_a_trained_run_is_never_overwritten(tmp_path):
    train(tmp_path, "--epochs 1")
    with pytest.raises(ValueError, match="already holds a trained run; go on with it by --resume"):
        train(tmp_path, "--epochs 1")


@pytest.mark.parametrize(
    "change, message",
    [
        ("--width 0.25", "--width 0.25 contradicts the checkpoint, which has 0.125"),
        ("--method SimCLR", "--method SimCLR contradicts the checkpoint, which has MoCov2"),
        ("--mem batch", "--mem batch contradicts the checkpoint, which has moco"),
        ("--optimizer lars", "--optimizer lars contradicts"),
        ("--queue_size 80", "--queue_size 80 contradicts"),
        ("--batch_size 10", "--batch_size 10 contradicts"),
    ],
)
def test_resume_refuses_what_does_not_fit(tmp_path, change, message):
    folder = train(tmp_path, "--epochs 1")
    with pytest.raises(ValueError, match=message):
        train(tmp_path, "--epochs 2", change, "--resume", str(folder))


def test_ft_may_be_switched_on_in_the_middle_of_an_epoch(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "__call__", lambda self, step: step == 1)
        folder = train(tmp_path, "--epochs 1")
    train(tmp_path, "--epochs 1", FT, "--resume", str(folder))
    with np.load(folder / "scores" / "scores_0001.npz") as scores:
        assert scores["positive"].shape == (3, 16) and "before_positive" not in scores


def test_resume_notes_a_changed_option(tmp_path, capsys):
    folder = train(tmp_path, "--epochs 1")
    train(tmp_path, "--epochs 2 --resume", str(folder))
    assert "Going on with --epochs 2; the checkpoint was trained with 1." in capsys.readouterr().out
    assert checkpoint.load(folder / "current.pth")["position"]["epoch"] == 2


@pytest.mark.parametrize("print_freq", [2, 1000])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path, print_freq):
    with pytest.raises(FloatingPointError, match="the moment before with --resume .*/run/nonfinite_step_[0-9].pth"):
        train(tmp_path, f"--head linear_wo_norm --epochs 9 --lr 1e30 --print_freq {print_freq}")
    states = [checkpoint.load(path) for path in (tmp_path / "run").glob("*.pth")]
    assert all(x.isfinite().all() for state in states for x in state["method"].values())


class HostReads(TorchDispatchMode):
    """Notes where a tensor's value is read: what .item(), bool() and float() become."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if "_local_scalar_dense" in str(function) or "nonzero" in str(function):
            self.seen.append((str(function), traceback.extract_stack(limit=8)))
        return function(*arguments, **keywords or {})


@pytest.mark.parametrize("method", ["MoCov2", "SimCLR"])
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("granularity", ["batch", "sample", "dim"])
def test_no_host_reads_between_log_lines(method, amp, granularity):
    shared = f"--ft_pos_granularity {granularity} --ft_neg_granularity {granularity}"
    flags = f"--method {method} {FT} {shared} --amp {amp} --print_freq 1000"
    training = objects(flags)
    training.loader.set_epoch(0)
    batches = list(training.loader)  # views are drawn on the host, from keys that never leave it
    with HostReads() as reads:
        train_epoch(training, batches)
    # Seeds of generators are made of integers on the host, whatever the device: no wait for it.
    elsewhere = [stack for _, stack in reads.seen if not any(frame.name == "generator" for frame in stack)]
    assert not elsewhere, elsewhere


class Waits(TorchDispatchMode):
    """Notes copies from the host to the meta device for which the host would wait."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out, keywords = function(*arguments, **keywords or {}), keywords or {}
        if (
            "copy" in str(function)
            and isinstance(out, torch.Tensor)
            and out.is_meta
            and not all(x.is_meta for x in arguments if isinstance(x, torch.Tensor))
        ):
            waits = not (keywords.get("non_blocking") or arguments[-1] is True)
            self.seen += traceback.extract_stack(limit=8) if waits else []
        return out


EVERY_METHOD = ("MoCov2", "InsDis", "PIRL", "CMC", "SimCLR", "SupCon", "SimSiam", "BYOL", "SwAV")


@pytest.mark.parametrize(
    "flags",
    [
        *(f"--method {name}" for name in EVERY_METHOD),
        *(f"{FT} --ft_pos_granularity {level} --ft_neg_granularity {level}" for level in ("sample", "dim")),
        f"{FT} --no_one_pass --no_pre_scores --ft_post_norm both",
        "--method SimCLR --ft_pos interpolate --ft_neg append",
        "--method InsDis --loss nce",
        "--method SwAV --queue_epoch 0 --queue_size 32",
        "--method PIRL --ft_jigsaw --ft_neg interpolate",
        "--accumulate 2 --on_nan skip --optimizer lars",
    ],
)
def test_a_step_asks_nothing_of_its_device(flags, monkeypatch):
    """On the meta device, which has shapes and no values; SupCon under FT has to ask: its shapes hang on the labels.

    It has no random numbers of its own, no autocast and no fused optimizer either: none of those asks.
    """
    meta, generator = torch.device("meta"), keyed.generator
    monkeypatch.setattr(parallel, "device", lambda *wanted: meta)
    monkeypatch.setattr(keyed, "generator", lambda where, *keys: None if where == meta else generator(where, *keys))
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **keywords: nullcontext())
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *arguments, **keywords: None)
    training = objects(flags, "--print_freq 1000 --save_score")
    training.advance(1)  # which sets up a table or two
    with Waits() as waits:
        training.advance(2)
    assert not waits.seen
    assert training.step == 3 and {x.device for x in training.method.state_dict().values()} == {meta}


@pytest.mark.parametrize("method", ["MoCo", "MoCov2", "MoCoMLP", "MoCo_wo_norm", "MoCov2_tau0.1", "Customize"])
@pytest.mark.parametrize("ft", ["", FT, "--ft_pos interpolate --ft_neg append --ft_post_norm both"])
def test_every_preset_trains_with_and_without_ft(method, ft):
    training = objects("--method", method, ft)
    before = {name: p.clone() for name, p in training.method.named_parameters()}
    batch = next(iter(training.loader))
    out = training.method(batch | {"step": 0})
    out.loss.backward()
    for name, p in training.method.named_parameters():
        assert (p.grad is None) == name.startswith("momentum_encoder"), name
    queue = training.method.queues[0].keys.clone()
    training.optimizer.step()
    training.method.after_step(out, 0)
    assert out.loss.isfinite() and out.scores.shape == (16, 12 if ft else 6)
    assert torch.equal(training.method.queues[0].keys[:16], out.writes[0])  # the untransformed keys
    assert torch.equal(training.method.queues[0].keys[16:], queue[16:])
    momentum = training.opt.key_momentum
    for name, p in training.method.momentum_encoder.encoder.named_parameters():
        query = dict(training.method.encoder.named_parameters())[name]
        torch.testing.assert_close(p, momentum * before[f"encoder.{name}"] + (1 - momentum) * query)


def test_keys_are_shuffled_for_batch_norm_and_put_back():
    training = objects()
    training.method.eval()  # then the order cannot matter
    batch, straight = next(iter(training.loader)), objects("--mem batch")
    assert not torch.equal(batch["order"], torch.arange(16))
    out = training.method(batch | {"step": 0})
    keys = next(iter(straight.loader))["key"]
    assert torch.equal(batch["key"], keys[batch["order"]])
    torch.testing.assert_close(out.writes[0], training.method.momentum_encoder(keys)[0])


@pytest.mark.parametrize("mem", ["bank", "moco"])
def test_a_batch_may_be_seen_in_parts(tmp_path, monkeypatch, mem):
    """Images in the same order, exact resume; and for queries parts are what chunks of batch norm are."""
    shared = f"--mem {mem} --ft_neg interpolate --epochs 2 --lr 1e-3 --print_freq 1"
    in_parts = f"{shared} --accumulate 2 --bn_splits 1"
    whole, parts = train(tmp_path / "whole", shared, "--bn_splits 2"), train(tmp_path / "parts", in_parts)
    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "__call__", lambda self, step: step == 2)
        stopped = train(tmp_path / "stopped", in_parts)
    train(tmp_path / "stopped", in_parts, "--resume", str(stopped))
    assert_same_run(stopped, parts)
    with np.load(whole / "scores/scores_0002.npz") as x, np.load(parts / "scores/scores_0002.npz") as y:
        assert np.array_equal(x["index"], y["index"]) and np.array_equal(x["step"], y["step"])
        if mem == "bank":  # keys are dealt within their part
            np.testing.assert_allclose(x["positive"], y["positive"], atol=1e-5)
    one, other = (checkpoint.load(folder)["method"] for folder in (whole, parts))
    for name in (name for name in one if name.startswith(("encoder", "banks")) and "running" not in name):
        if mem == "bank" and "num_batches" not in name:
            torch.testing.assert_close(other[name], one[name], atol=1e-5, rtol=1e-4)


def test_an_error_on_spawned_processes_is_one_sentence(tmp_path):
    """Even where it comes from late, with progress bars and loaders made."""
    (tmp_path / "file").touch()
    command = [sys.executable, str(ROOT / "main_contrast.py"), "--nprocs", "2", "--device", "cpu"]
    paths = ["--model_path", str(tmp_path / "file"), "--tb_path", str(tmp_path / "tb")]
    ended = subprocess.run([*command, *paths], capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 1
    assert re.fullmatch(
        r"main_contrast.py: .*/file/\S+ cannot be written to .* choose another --model_path.\n", ended.stderr
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "junk.pth").write_bytes(b"junk")
    torch.save({"model": {}}, tmp_path / "other.pth")
    answers = {"junk.pth": "cannot be read", "other.pth": "lacks method", "none.pth": "no checkpoint at"}
    for name, message in answers.items():
        with pytest.raises(ValueError, match=message):
            checkpoint.load(tmp_path / name)


def test_resume_adopts_what_was_chosen_automatically():
    options, origins, _ = contrast.parse(
        ["--amp", "--dataset", "npz", "--data_folder", "x", "--lr", "0.5", "--epochs", "9"]
    )
    chosen = {"seed": 5, "amp": "bf16", "queue_size": 64, "bn_splits": 4, "stem": "small", "warmup_epochs": 0}
    stored = dataclasses.asdict(options) | chosen | {"learning_rate": 0.1, "ft_pos": "extrapolate"}
    adopted, sources, notes = resume.adopt(options, origins, stored)
    assert {name: getattr(adopted, name) for name in chosen} == chosen
    assert adopted.ft_pos == "extrapolate"  # not typed, so the checkpoint's
    assert sources.items() >= dict.fromkeys([*chosen, "ft_pos", "temperature"], "checkpoint").items()
    assert not {"dataset", "data_folder", "learning_rate", "epochs", "nprocs", "resume"} & sources.keys()
    assert adopted.learning_rate == 0.5 and notes == [
        "Going on with --learning_rate 0.5; the checkpoint was trained with 0.1."
    ]


def test_resume_keeps_the_habits_of_a_run_but_not_those_of_its_start():
    habits = {"knn_freq": 3, "grad_norms": 7, "save_every_steps": 5, "keep": 4, "num_workers": 9, "tb_path": "there"}
    stored = dataclasses.asdict(contrast.ContrastOptions()) | habits | {"nprocs": 4, "stop_epoch": 1, "name": "old"}
    options, origins, _ = contrast.parse(["--keep", "1"])
    adopted, _, notes = resume.adopt(options, origins, stored)
    assert {name: getattr(adopted, name) for name in habits} == habits | {"keep": 1} and not notes
    assert (adopted.nprocs, adopted.stop_epoch, adopted.name) == (None, 0, None)


def test_a_linear_probe_is_no_run_to_go_on_with():
    options, origins, _ = contrast.parse([])
    with pytest.raises(ValueError, match="is one of main_linear.py, which goes on with it"):
        resume.adopt(options, origins, {"eval": "linear", "method": None})


@pytest.mark.parametrize("n, size", [(5000, 2048), (126_689, 32768), (1_281_167, 65536), (3, 4)])
def test_queue_size_rule(n, size):
    assert build.resolve(contrast.ContrastOptions(), {}, n_data=n)[0].queue_size == size


@pytest.mark.parametrize("n, momentum", [(5000, 0.99), (1_281_167, 0.999)])
def test_key_momentum_rule(n, momentum):
    options, origins, _ = contrast.parse(["--data_folder", "x"])
    assert build.resolve(options, origins, n_data=n)[0].key_momentum == momentum
    options, origins, _ = contrast.parse(["--data_folder", "x", "--dataset", "imagenet100"])
    assert build.resolve(options, origins, n_data=n)[0].key_momentum == 0.999


@pytest.mark.parametrize("batch, splits", [(512, 8), (256, 4), (64, 2), (96, 2), (32, 2), (16, 2), (15, 1), (1, 1)])
def test_split_rule(batch, splits):
    options = contrast.ContrastOptions(batch_size=batch)
    assert build._bn_splits(options)[0] == splits


def test_without_tensorboard_logger_torch_writes_the_same_tags(tmp_path, monkeypatch, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setitem(sys.modules, "tensorboard_logger", None)
    train(tmp_path, "--epochs 1")
    assert capsys.readouterr().out.count("tensorboard_logger cannot be used") == 1
    events = EventAccumulator(str(tmp_path / "tb" / "run"))
    events.Reload()
    assert {"loss", "step/loss", "step/learning_rate"} <= set(events.Tags()["scalars"])


def test_a_mistake_leaves_no_run_folder_behind(tmp_path):
    with pytest.raises(ValueError, match="--batch_size 60 is more than the 50 images"):
        train(tmp_path, "--batch_size 60 --queue_size 64")
    assert not (tmp_path / "run").exists()


def test_synchronised_batch_norm_is_not_split_when_processes_leave():
    options, origins, _ = contrast.parse(["--method", "SimCLR"])
    left = {"position": {"processes": 4}}
    resolved, _ = build.resolve(
        dataclasses.replace(options, bn_splits=1), origins | {"bn_splits": "checkpoint"}, n_data=5000, trained_with=left
    )
    assert resolved.bn_splits == 1


def test_what_older_checkpoints_do_not_mention_stays_as_it_was():
    options, origins, _ = contrast.parse(["--method", "SimCLR", "--device", "cpu"])
    stored = dataclasses.asdict(options)
    del stored["decay_all"], stored["sync_bn"]
    adopted, _, notes = resume.adopt(options, origins, stored)
    assert (adopted.decay_all, adopted.sync_bn, notes) == (False, False, [])


def test_flags_are_checked_against_the_resumed_method(tmp_path):
    paths = f"--model_path {tmp_path} --tb_path {tmp_path}/tb --name run --width 0.125 --input_res 8 --device cpu"
    pretrain_line(f"{paths} --method BYOL --batch_size 16 --epochs 1")
    with pytest.raises(ValueError, match="--method BYOL has none"):
        pretrain_line(f"{paths} --batch_size 16 --ft_neg interpolate --epochs 2 --resume {tmp_path}/run")
