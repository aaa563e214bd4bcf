"""Every method: two steps in every mode, its tasks, resume, and several processes against one."""

import functools
import itertools
import random

import pytest
import torch

from learning import build, checkpoint
from learning.draws import Draws
from learning.interrupt import Interrupt
from memory import scores
from models.heads import JigsawHead
from options.presets import METHODS
from tests.test_bank import Recorder
from tests.test_training import HostReads, assert_same_run, few_pictures, objects, records, train, train_epoch  # noqa: F401

WITHOUT_NEGATIVES = ("SimSiam", "BYOL", "SwAV")
# Not smaller: of a 1 x 1 map PyTorch's CPU gradient of a convolution with stride 2 is no number in bfloat16.
TINY = "--batch_size 8 --input_res 16"
SETTINGS = {"SwAV": "--queue_epoch 0 --freeze_prototypes 1 --small_crops 2"}
CELLS = [
    f"Customize --modal {modal} --mem {mem} {jigsaw}"
    for modal in ("RGB", "CMC")
    for mem in ("bank", "moco")
    for jigsaw in ("", "--jigsaw")
]
KINDS = [*METHODS, *CELLS, "InsDis --loss nce", "SimCLR --modal CMC"]
JIGSAWS = [cell for cell in CELLS if "--jigsaw" in cell]
FT = {
    "": "",
    "scalar": "--ft_pos extrapolate --ft_neg interpolate",
    "dim": "--ft_pos extrapolate --ft_pos_granularity dim --ft_neg append --ft_neg_granularity dim --ft_post_norm both",
}


def flags(kind, ft=""):
    """A command line, with as much of FT as the method has room for."""
    method = kind.split()[0]
    line = FT[ft] if method not in WITHOUT_NEGATIVES else FT[ft].split(" --ft_neg ")[0]
    return f"--method {kind} {SETTINGS.get(method, '')} {line}"


def made(kind, *arguments):
    """The objects of a run; a bank is past its first epoch, in which nothing is learned."""
    training = objects(flags(kind), TINY, *arguments)
    for bank in getattr(training.method, "banks", []):
        bank.seen.fill_(True)
    return training


@functools.cache
def batches(kind):
    """Two batches of the method's views: RandAugment would take most of the time."""
    return list(itertools.islice(made(kind).loader, 2))


def memories(method):
    """What only `after_step` may change."""
    kept = ("queues.", "banks.", "contrast.", "momentum_encoder.")
    tensors = itertools.chain(method.named_parameters(), method.named_buffers())
    moving = ("running_mean", "running_var", "num_batches_tracked")
    return {name: x.detach().clone() for name, x in tensors if name.startswith(kept) and not name.endswith(moving)}


def same(one, other):
    return all(torch.equal(x.nan_to_num(7), other[name].nan_to_num(7)) for name, x in one.items())


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("ft", FT)
@pytest.mark.parametrize("kind", KINDS)
def test_two_steps(kind, ft, amp):
    training = objects(flags(kind, ft), f"{TINY} --print_freq 1000 --amp {amp}")
    method, (batch, second) = training.method, batches(kind)
    given, before = {name: x.clone() for name, x in batch.items()}, memories(method)
    trained = {name: p for name, p in method.named_parameters() if not name.startswith("momentum_encoder.")}
    in_optimizer = [p for group in training.optimizer.param_groups for p in group["params"]]
    assert len(in_optimizer) == len(trained) and {*map(id, in_optimizer)} == {*map(id, trained.values())}

    with build.autocast(amp, training.device)():
        out = method(batch | {"step": 0})
    out.loss.backward()
    width = (1 if method.__class__.__name__ in ("SimSiam", "BYOL") else 6) * (2 if ft else 1)
    assert out.loss.isfinite() and out.loss.dtype == torch.float32
    assert out.scores.shape == (8, width) == (8, len(scores.columns(width))) and out.scores.isfinite().all()
    assert all(value.isfinite() and not value.requires_grad for value in out.stats.values())
    assert all(torch.equal(x, given[name]) for name, x in batch.items())
    for name, p in method.named_parameters():
        assert (p.grad is not None) == (name in trained), name
        assert p.grad is None or p.grad.isfinite().all(), name
    method.after_backward(0)
    frozen = {name for name, p in trained.items() if p.grad is None}
    assert frozen == ({"prototypes.weight"} if "SwAV" in kind else set())
    training.optimizer.step()
    assert same(before, memories(method))
    method.after_step(out, 0)
    kept = memories(method)
    assert {name.split(".")[0] for name in kept} >= {name.split(".")[0] for name in before}
    assert not before or not same(before, kept)

    with HostReads() as reads:
        train_epoch(training, [second], first_step=1)
    # Seeds are made on the host; how many pairs SupCon has depends on the labels, and FT moves each.
    excused = {"generator"} | ({"tasks"} if "SupCon" in kind and ft else set())
    elsewhere = [stack for _, stack in reads.seen if not any(frame.name in excused for frame in stack)]
    assert not elsewhere, elsewhere
    assert all(x.isfinite().all() for x in method.state_dict().values())
    assert training.progress.scores.state_dict()["rows"].shape == (1, 8, width)


# Tasks


def tasks_of(kind, *arguments):
    """The tasks of one step, the method's own `Contrast`, and its draws."""
    training = made(kind, *arguments)
    contrast, training.method.contrast = training.method.contrast, Recorder()
    batch = batches(kind)[0]
    training.method(batch | {"step": 0})
    return training.method.contrast.tasks, contrast, Draws(training.opt.seed, 0, batch["key_draw"])


@pytest.mark.parametrize("kind", JIGSAWS)
def test_jigsaws_meet_their_own_modality_with_their_own_weight(kind):
    tasks, contrast, draws = tasks_of(kind, "--beta 0.3")
    modalities = 1 + ("CMC" in kind)
    images, jigsaws = tasks[:modalities], tasks[modalities:]
    assert [task.branch for task in tasks] == [""] * modalities + ["jigsaw"] * modalities
    weights = [torch.as_tensor(task.weight).unique().tolist() for task in tasks]
    assert weights == [[pytest.approx(weight)] for weight in [0.7] * modalities + [0.3] * modalities]
    for m, jigsaw in enumerate(jigsaws):  # where images meet the memory of the other modality
        assert jigsaw.positive is images[(m + 1) % modalities].positive
        assert jigsaw.negatives[0].features is images[(m + 1) % modalities].negatives[0].features
        torch.testing.assert_close(jigsaw.query.norm(dim=1), torch.ones(8))
        assert not torch.equal(jigsaw.query, images[m].query)
    losses = [contrast.objective(task, 0).rows.mean() for task in tasks]
    assert contrast(tasks, draws).loss.item() == pytest.approx(
        0.7 * sum(losses[:modalities]).item() + 0.3 * sum(losses[modalities:]).item(), rel=1e-5
    )


@pytest.mark.parametrize("also", ["", "--ft_jigsaw"])
def test_ft_leaves_jigsaws_alone_unless_asked(also):
    (image, jigsaw), contrast, draws = tasks_of("InfoMin", FT["scalar"], also)
    assert contrast.rewriting(image, draws) is not image
    assert (contrast.rewriting(jigsaw, draws) is jigsaw) == (not also)
    out = contrast([image, jigsaw], draws)
    changed = out.stats["jigsaw_positive_mean"] != out.stats["jigsaw_before_positive_mean"]
    assert changed == bool(also) and out.stats["positive_mean"] < out.stats["before_positive_mean"]


def test_pieces_of_a_jigsaw_are_embedded_in_the_order_given():
    torch.manual_seed(0)
    head, features = JigsawHead("mlp", 12, 4), torch.randn(5, 9, 12)
    order = torch.rand(5, 9).argsort(1)
    shuffled = torch.stack([x[o] for x, o in zip(features, order)])
    straight = torch.arange(9).expand(5, 9)
    torch.testing.assert_close(head(features, order), head(shuffled, straight))
    assert not torch.allclose(head(features, order), head(features, straight))
    drawn = Draws(0, 0, torch.arange(50)).per_sample(9, "jigsaw/order").argsort(1)
    assert len(drawn.unique(dim=0)) == 50 and (drawn.sort(1).values == torch.arange(9)).all()


def test_the_key_encoder_sees_no_jigsaw():
    training, seen = made("InfoMin"), []
    training.method.momentum_encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    training.method(batches("InfoMin")[0] | {"step": 0})
    assert seen == [(8, 3, 16, 16)]


def test_two_modalities_meet_each_others_queue():
    kind = "Customize --modal CMC --mem moco "
    tasks, contrast, draws = tasks_of(kind)
    training, batch = made(kind), batches(kind)[0]
    out = training.method(batch | {"step": 0})
    for m, task in enumerate(tasks):
        torch.testing.assert_close(task.positive, out.writes[1 - m])
        assert torch.equal(task.negatives[0].features, training.method.queues[1 - m].keys)
        assert not task.positive.requires_grad
    losses = [contrast([task], draws).loss for task in tasks]
    assert out.loss.item() == pytest.approx(sum(losses).item(), rel=1e-5)
    training.method.after_step(out, 0)
    for queue, keys in zip(training.method.queues, out.writes):
        assert torch.equal(queue.keys[:8], keys)


def test_byols_target_follows_by_its_schedule():
    training = made("BYOL", "--epochs 2 --key_momentum 0.9")  # 12 steps
    method = training.method
    for step, momentum in ((0, 0.9), (6, 0.95), (11, 1 - 0.1 * 0.01703709)):
        target, online = ([p.clone() for p in e.parameters()] for e in (method.momentum_encoder, method.encoder))
        for p in method.encoder.parameters():
            p.data.add_(0.01)
        method.after_step(None, step)
        for p, t, o in zip(method.momentum_encoder.parameters(), target, online):
            torch.testing.assert_close(p, momentum * t + (1 - momentum) * (o + 0.01))


def test_the_predictor_of_simsiam_keeps_its_learning_rate():
    training = made("SimSiam", "--epochs 2 --lr 0.4 --optimizer sgd --decay_all")
    train_epoch(training, batches("SimSiam"), first_step=8)
    rates = [group["lr"] for group in training.optimizer.param_groups]
    assert rates[0] == pytest.approx(training.schedule(9)) and rates[0] < 0.2 and rates[1] == 0.4
    sizes = [sum(p.numel() for p in group["params"]) for group in training.optimizer.param_groups]
    assert sizes[1] == sum(p.numel() for p in training.method.predictor.parameters())
    falling = made("SimSiam", "--epochs 2 --lr 0.4 --optimizer sgd --decay_all --no_fix_pred_lr")
    train_epoch(falling, batches("SimSiam"), first_step=8)
    assert len({group["lr"] for group in falling.optimizer.param_groups}) == 1


def test_supcon_needs_labels(monkeypatch):
    plain = build.source

    def unlabelled(opt, split):
        data = plain(opt, split)
        return type(data)(data.images, None, (), mean=data.mean, std=data.std)

    monkeypatch.setattr(build, "source", unlabelled)
    with pytest.raises(ValueError, match="SupCon learns from labels and shapes has none; sort the images") as refused:
        objects("--method SupCon")
    assert "\n" not in str(refused.value)
    objects("--method SimCLR")


# Resume


@pytest.mark.parametrize("kind", [*KINDS, "CMC --loss nce"])
def test_resume_inside_an_epoch_equals_an_uninterrupted_run(tmp_path, monkeypatch, kind):
    line = f"{flags(kind, 'scalar')} --epochs 2 --cosine --print_freq 3 --lr 0.01"
    if kind == "SwAV":  # at step 4 the queue has started and is not full yet, and prototypes are frozen
        line += " --queue_size 24 --queue_epoch 1 --freeze_prototypes 5"
    stop_at = 4 if kind == "SwAV" else random.Random(kind).choice((1, 2, 4, 5))
    whole = train(tmp_path / "whole", line)
    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "__call__", lambda self, step: step == stop_at)
        parts = train(tmp_path / "parts", line)
    assert checkpoint.load(parts / "current.pth")["position"]["step"] == stop_at
    train(tmp_path / "parts", line, "--resume", str(parts))
    assert_same_run(whole, parts)


def test_resume_takes_back_the_fixed_rate_of_the_predictor(tmp_path):
    folder = train(tmp_path, "--method SimSiam --epochs 2 --cosine --stop_epoch 1")
    train(tmp_path, "--method SimSiam --epochs 2 --cosine --no_fix_pred_lr --resume", str(folder))
    groups = checkpoint.load(folder / "current.pth")["optimizer"]["param_groups"]
    assert groups[0]["lr"] == groups[1]["lr"]
