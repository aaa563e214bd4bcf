"""SimCLR: NT-Xent against its formula, what counts as a negative under FT, processes, resume, LARS."""

import math

import pytest
import torch

from learning import build, checkpoint
from learning.draws import Draws
from learning.losses import InfoNCE
from learning.methods.base import Contrast, Rewriting
from learning.methods.simclr import both_ways
from memory import scores
from memory.feature_transform import NegativeTransform, PositiveTransform
from memory.task import Negatives, Task
from tests.test_feature_transform import Fixed, golden
from tests.test_training import FT, assert_same_run, few_pictures, objects, records, train  # noqa: F401

SIMCLR = "--method SimCLR --feat_dim 16"


def pair():
    return golden(4, 8, 1).requires_grad_(), golden(4, 8, 1.3).requires_grad_()


@pytest.mark.parametrize("temperature, mean", [(0.1, 0.0228005060), (0.5, 0.5726174019)])
def test_nt_xent_golden(temperature, mean):
    one, other = pair()
    tasks = both_ways("image", one, other, torch.tensor([7, 3, 9, 1]))
    out = Contrast(InfoNCE(temperature))(tasks, Draws(0, 0, torch.arange(4)))
    assert out.loss.item() == pytest.approx(mean, abs=1e-9)
    assert out.scores.shape == (4, len(scores.COLUMNS))


def test_gradients_are_those_of_the_formula():
    """Both views get gradients, as anchor, as positive and as everybody else's negative."""
    one, other = pair()
    contrast = Contrast(InfoNCE(0.5))
    contrast(both_ways("image", one, other, torch.arange(4)), Draws(0, 0, torch.arange(4))).loss.backward()
    z = torch.cat([one, other]).detach().requires_grad_()
    similarity = (z @ z.T / 0.5).fill_diagonal_(-math.inf)
    torch.nn.functional.cross_entropy(similarity, torch.arange(8).roll(4)).backward()
    torch.testing.assert_close(torch.cat([one.grad, other.grad]), z.grad)


def test_ft_mixes_no_negative_from_the_own_image():
    """Against a loop over anchors and mixtures that leaves out each mixture with a part of the anchor's image."""
    one, other = pair()
    index, draws, lam, mu, temperature = torch.tensor([7, 3, 9, 1]), Draws(3, 5, torch.arange(4)), 1.4, 0.7, 0.2
    tasks = both_ways("image", one, other, index)
    rewriting = Rewriting((PositiveTransform(Fixed(lam - 1)), NegativeTransform(Fixed(mu))))
    out = Contrast(InfoNCE(temperature), rewriting)(tasks, draws)

    z, owner = torch.stack([one, other], 1).flatten(0, 1).detach(), index.repeat_interleave(2)
    losses, rows = [], []
    for name, anchors, positives in (("image", one, other), ("image/back", other, one)):
        order = torch.randperm(8, generator=draws.shared(f"{name}/0/permutation"))
        for i in range(4):
            q, k = anchors[i].detach(), positives[i].detach()
            hard_q, hard_k = lam * q + (1 - lam) * k, lam * k + (1 - lam) * q
            kept = [(j, int(order[j])) for j in range(8) if index[i] not in (owner[j], owner[order[j]])]
            negatives = torch.stack([hard_q @ (mu * z[a] + (1 - mu) * z[b]) for a, b in kept])
            logits = torch.cat([(hard_q @ hard_k)[None], negatives]) / temperature
            losses.append(logits.logsumexp(0) - logits[0])
            logmeanexp = (negatives / temperature).logsumexp(0) - math.log(len(negatives))
            moments = negatives.mean(), negatives.var(), negatives.max()
            rows.append(torch.stack([hard_q @ hard_k, *moments, logmeanexp, logits[0]]))
    torch.testing.assert_close(out.loss, torch.stack(losses).mean())
    torch.testing.assert_close(out.scores, torch.stack(rows[:4]).float())


def test_appended_mixtures_keep_both_masks():
    valid = torch.rand(4, 16, generator=torch.Generator().manual_seed(0)) > 0.3
    task = Task("image", golden(4, 8, 1), golden(4, 8, 1.3), (Negatives(golden(16, 8, 50), valid),))
    draws = Draws(0, 0, torch.arange(4))
    doubled = NegativeTransform(Fixed(0.5), append=True)(task, draws)
    order = torch.randperm(16, generator=draws.shared("image/0/permutation"))
    assert torch.equal(doubled.valid, torch.cat([valid, valid & valid[:, order]], 1))
    assert torch.equal(doubled.scores()[1].isfinite(), doubled.valid)


@pytest.mark.parametrize("ft", ["", FT, f"{FT} --ft_neg append --ft_pos_granularity dim --ft_neg_granularity dim"])
def test_gradients_reach_every_weight(ft):
    training = objects(SIMCLR, ft)
    out = training.method(next(iter(training.loader)) | {"step": 0})
    out.loss.backward()
    assert out.loss.isfinite() and out.scores.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in training.method.parameters())
    assert not hasattr(training.method, "queues") and training.opt.queue_size == 0 and training.opt.bn_splits == 1


def test_lars_adapts_weights_and_leaves_biases_and_norms_alone():
    training = objects(SIMCLR, "--lr 0.5 --weight_decay 0.1 --momentum 0")
    before = {name: p.detach().clone() for name, p in training.method.named_parameters()}
    training.method(next(iter(training.loader)) | {"step": 0}).loss.backward()
    training.optimizer.step()
    for name, p in training.method.named_parameters():
        w, g = before[name], p.grad
        if p.ndim > 1:
            g = g + 0.1 * w
            trust = 0.001 * w.norm() / (p.grad.norm() + 0.1 * w.norm())
            g = g * trust
        torch.testing.assert_close(p.detach(), w - 0.5 * g, atol=1e-6, rtol=1e-4)


def test_resuming_lars_under_another_weight_decay_keeps_biases_free_of_it(tmp_path):
    folder = train(tmp_path, SIMCLR, "--epochs 1")
    train(tmp_path, SIMCLR, "--epochs 2 --weight_decay 0.25 --resume", str(folder))
    groups = checkpoint.load(folder / "current.pth")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]


def test_sgd_is_the_other_choice():
    assert isinstance(objects(SIMCLR, "--optimizer sgd").optimizer, torch.optim.SGD)
    assert type(build.optimizer(objects("--optimizer lars").opt, objects().method)).__name__ == "Lars"
