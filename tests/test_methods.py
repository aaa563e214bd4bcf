"""Every method: two steps in every mode, its tasks, resume, and several processes against one."""

import functools
import itertools
import threading

import pytest
import torch
from torch import nn

from learning import build, checkpoint, engine, parallel
from learning.draws import Draws
from learning.interrupt import Interrupt
from learning.losses import NCE, InfoNCE
from learning.methods.base import Contrast, Rewriting
from learning.methods.simclr import both_ways
from learning.methods.supcon import pairs
from memory import scores
from memory.feature_transform import Coefficient, NegativeTransform, PositiveTransform
from models.heads import JigsawHead
from models.norm import sync_batch_norm
from options.presets import METHODS
from tests.test_bank import Recorder
from tests.test_feature_transform import golden
from tests.test_objectives import swav
from tests.test_objectives import task as nce_task
from tests.test_training import HostReads, assert_same_run, few_pictures, launched, objects, records, train  # noqa: F401

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


def train_epoch(training, batches, first_step):
    engine.train_epoch(
        training.method,
        batches,
        training.optimizer,
        first_step=first_step,
        schedule=training.schedule,
        autocast=build.autocast(training.opt.amp, training.device),
        scaler=training.scaler,
        guard=training.guard,
        progress=training.progress,
        stop=lambda step: False,
    )


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
    # Seeds are made on the host; how many pairs SupCon has depends on the labels.
    excused = {"generator"} | ({"task"} if "SupCon" in kind else set())
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
    losses = [contrast.objective(*task.scores(), 0).rows.mean() for task in tasks]
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
    training = made("SimSiam", "--epochs 2 --lr 0.4")
    train_epoch(training, batches("SimSiam"), first_step=8)
    rates = [group["lr"] for group in training.optimizer.param_groups]
    assert rates[0] == pytest.approx(training.schedule(9)) and rates[0] < 0.2 and rates[1] == 0.4
    sizes = [sum(p.numel() for p in group["params"]) for group in training.optimizer.param_groups]
    assert sizes[1] == sum(p.numel() for p in training.method.predictor.parameters())
    falling = made("SimSiam", "--epochs 2 --lr 0.4 --no_fix_pred_lr")
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


@pytest.mark.parametrize("kind", [*METHODS, "CMC --loss nce"])
def test_resume_inside_an_epoch_equals_an_uninterrupted_run(tmp_path, monkeypatch, kind):
    line = f"{flags(kind, 'scalar')} --epochs 2 --cosine --print_freq 3 --lr 0.01"
    if kind == "SwAV":  # at step 4 the queue has started, is not full yet, and prototypes are frozen
        line += " --queue_size 24 --queue_epoch 1 --freeze_prototypes 5"
    whole = train(tmp_path / "whole", line)
    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "__call__", lambda self, step: step == 4)
        parts = train(tmp_path / "parts", line)
    stopped = checkpoint.load(parts / "current.pth")
    assert stopped["position"]["step"] == 4
    train(tmp_path / "parts", line, "--resume", str(parts))
    assert_same_run(whole, parts)
    if kind == "SwAV":
        prototypes, ended = (
            x["method"]["prototypes.weight"] for x in (stopped, checkpoint.load(parts / "current.pth"))
        )
        assert stopped["method"]["queues.0.written"] == 16 and not torch.equal(prototypes, ended)


def test_resume_takes_back_the_fixed_rate_of_the_predictor(tmp_path):
    folder = train(tmp_path, "--method SimSiam --epochs 2 --cosine --stop_epoch 1")
    train(tmp_path, "--method SimSiam --epochs 2 --cosine --no_fix_pred_lr --resume", str(folder))
    groups = checkpoint.load(folder / "current.pth")["optimizer"]["param_groups"]
    assert groups[0]["lr"] == groups[1]["lr"]


# Several processes


class Ranks:
    """Two processes as two threads of this one, joined in one graph: its gradient is that of what they compute."""

    def __init__(self):
        self.barrier, self.slots, self.own = threading.Barrier(2, timeout=30), [None, None], threading.local()

    def rank(self):
        return getattr(self.own, "rank", 0)

    def world_size(self):
        return 2 if hasattr(self.own, "rank") else 1

    def exchange(self, x):
        self.slots[self.rank()] = x
        self.barrier.wait()
        everything = list(self.slots)
        self.barrier.wait()
        return everything

    def gather(self, x):
        return torch.cat(self.exchange(x)) if self.world_size() > 1 else x

    def mean(self, x):
        return sum(self.exchange(x)) / 2

    def run(self, function):
        """[function(0), function(1)], each in a thread that believes to be this rank."""
        results, errors = [None, None], []

        def work(rank):
            self.own.rank = rank
            try:
                results[rank] = function(rank)
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results


@pytest.fixture
def ranks(monkeypatch):
    two = Ranks()
    monkeypatch.setattr(parallel, "rank", two.rank)
    monkeypatch.setattr(parallel, "world_size", two.world_size)
    monkeypatch.setattr(parallel, "gather", lambda x: two.gather(x.detach()))
    monkeypatch.setattr(parallel, "gather_with_gradient", two.gather)
    return two


LABELS = torch.tensor([0, 1, 2, 0, 3, 0])
REWRITING = Rewriting(
    [PositiveTransform(Coefficient(2.0, "sample")), NegativeTransform(Coefficient(1.6, "dim"))], before=True
)


@pytest.mark.parametrize("rewriting", [Rewriting(), REWRITING])
@pytest.mark.parametrize(
    "make",
    [
        lambda one, other, rows, draws: both_ways("image", one, other, rows),
        lambda one, other, rows, draws: pairs(one, other, LABELS[rows], draws),
    ],
    ids=["SimCLR", "SupCon"],
)
def test_two_ranks_have_the_loss_and_gradient_of_one(ranks, make, rewriting):
    contrast = Contrast(InfoNCE(0.2), rewriting)

    def result(views, rows):
        draws = Draws(0, 0, 50 + rows)
        return contrast(make(*(view[rows] for view in views), rows, draws), draws)

    views = [golden(6, 8, offset).requires_grad_() for offset in (1, 1.3)]
    whole = result(views, torch.arange(6))
    expected = torch.autograd.grad(whole.loss, views)
    parts = ranks.run(lambda rank: result(views, torch.arange(3 * rank, 3 * rank + 3)))
    loss = sum(part.loss for part in parts) / 2
    torch.testing.assert_close(loss, whole.loss)
    for ours, theirs in zip(torch.autograd.grad(loss, views), expected):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.cat([part.scores for part in parts]), whole.scores)


def test_two_ranks_estimate_nces_constant_together(ranks):
    task = nce_task(0)
    whole = NCE(0.2, tasks=1)(*task.scores(), 0)
    parts = ranks.run(lambda rank: NCE(0.2, tasks=1)(*(x[2 * rank : 2 * rank + 2] for x in task.scores()), 0))
    torch.testing.assert_close(torch.cat([part.rows for part in parts]), whole.rows)
    assert all(part.constant.item() == pytest.approx(whole.constant.item()) for part in parts)


@pytest.mark.parametrize("queue", [0, 9])
def test_two_ranks_share_swavs_clusters(ranks, queue):
    views = {"query": golden(6, 8, 1).requires_grad_(), "key": golden(6, 8, 1.3).requires_grad_()}
    rewriting = Rewriting([PositiveTransform(Coefficient(2.0, "sample"), normalize=True)])

    def result(rows):
        method, batch = swav(rewriting=rewriting, queue=queue, **{name: view[rows] for name, view in views.items()})
        for i, memory in enumerate(method.queues):
            memory.keys.copy_(golden(queue, 8, 20 + i))
        return method(batch | {"key_draw": rows}), method

    def after_step(method, out):
        method.after_step(out, 5)
        return method.queues

    (whole, method), parts = result(torch.arange(6)), ranks.run(lambda r: result(torch.arange(3 * r, 3 * r + 3)))
    loss = sum(out.loss for out, _ in parts) / 2
    torch.testing.assert_close(loss, whole.loss)
    torch.testing.assert_close(torch.cat([out.scores for out, _ in parts]), whole.scores)
    expected = torch.autograd.grad(whole.loss, list(views.values()))
    for ours, theirs in zip(torch.autograd.grad(loss, list(views.values())), expected):
        torch.testing.assert_close(ours, theirs)
    after_step(method, whole)
    for queues in ranks.run(lambda rank: after_step(parts[rank][1], parts[rank][0])):
        for ours, theirs in zip(method.queues, queues):
            assert torch.equal(ours.keys, theirs.keys) and ours.written == theirs.written


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind, shape", [(nn.BatchNorm1d, (8, 5)), (nn.BatchNorm2d, (8, 5, 3, 3))])
def test_synchronised_batch_norm_is_that_of_the_whole_batch(ranks, kind, shape, affine):
    torch.manual_seed(0)
    plain, mine = kind(5, affine=affine), [nn.Sequential(kind(5, affine=affine)) for _ in range(2)]
    for p in plain.parameters():
        p.data.uniform_(0.5, 2)
    for norm in mine:
        norm[0].load_state_dict(plain.state_dict())
    mine = [sync_batch_norm(norm, ranks.mean, 2) for norm in mine]
    assert mine[0].state_dict().keys() == nn.Sequential(plain).state_dict().keys()
    weights = torch.randn(shape)
    for x in torch.randn(2, *shape, requires_grad=True).unbind():  # twice: running statistics move on
        expected, outs = plain(x), ranks.run(lambda rank, x=x: mine[rank](x[4 * rank : 4 * rank + 4]))
        torch.testing.assert_close(torch.cat(outs), expected)
    ours = torch.autograd.grad((torch.cat(outs) * weights).sum(), [x, *mine[0].parameters(), *mine[1].parameters()])
    theirs = torch.autograd.grad((expected * weights).sum(), [x, *plain.parameters()])
    count = len(theirs) - 1
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-4)
    for i in range(1, 1 + count):  # every rank has its share of the weights' gradient
        torch.testing.assert_close(ours[i] + ours[i + count], theirs[i], atol=1e-5, rtol=1e-4)
    for norm in mine:
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(norm[0].get_buffer(name), buffer)
    plain.eval(), mine[0].eval()
    torch.testing.assert_close(mine[0](x), plain(x))


@pytest.mark.parametrize(
    "line, one, two",
    [
        ("--method Customize --modal CMC --mem bank --jigsaw --loss nce --temperature 0.2", "--bn_splits 2", ""),
        ("--method SwAV --ft_neg none --small_crops 2 --queue_epoch 0 --prototypes 5", "", "--sync_bn"),
    ],
    ids=["bank", "SwAV"],
)
def test_one_process_equals_two(tmp_path, line, one, two):
    """At a learning rate that lets no rounding grow: losses, memories and, as momentum, the sum of all gradients."""
    shared = "--print_freq 1 --warmup_epochs 0 --optimizer sgd --lr 1e-5"
    whole = launched(tmp_path, "one", [], line, one, shared)
    parts = launched(tmp_path, "two", [], line, two, shared, "--nprocs 2")
    assert len(records(whole, "step")) == 4
    for ours, theirs in zip(records(whole, "step"), records(parts, "step")):
        assert theirs == pytest.approx(ours, abs=1e-4)
    a, b = (checkpoint.load(folder / "current.pth") for folder in (whole, parts))
    for name in (name for name in a["method"] if name.startswith(("banks.", "queues.", "contrast."))):
        torch.testing.assert_close(b["method"][name], a["method"][name], atol=1e-4, rtol=1e-3)
    for i, state in a["optimizer"]["state"].items():
        gradient, other = state["momentum_buffer"], b["optimizer"]["state"][i]["momentum_buffer"]
        assert (other - gradient).norm() <= 0.01 * gradient.norm() + 1e-4  # biases before a batch norm have none
