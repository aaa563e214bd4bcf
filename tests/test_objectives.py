"""Objectives and what methods make of them, against golden values and loops in numpy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learning import build
from learning.draws import Draws
from learning.losses import NCE, Cosine, InfoNCE
from learning.methods.base import Contrast, Rewriting
from learning.methods.byol import BYOL
from learning.methods.simsiam import SimSiam
from learning.methods.supcon import tasks as supcon_tasks
from learning.methods.swav import SwAV, sinkhorn
from memory.feature_transform import Coefficient, NegativeTransform, PositiveTransform
from memory.stores import Bank, Queue
from memory.task import Negatives, Task
from options.contrast import ContrastOptions
from tests.test_feature_transform import Fixed, golden

CLASSES = torch.tensor([0, 1, 2, 0])
DRAWS = Draws(3, 5, torch.arange(4))


class Same(nn.Module):
    """An encoder whose images are embeddings already."""

    def forward(self, x):
        return [x]


class Told(nn.Module):
    """A network that knows its few answers by heart."""

    def __init__(self, answers, listed=False):
        super().__init__()
        self.answers, self.listed = answers, listed

    def forward(self, x):
        (answer,) = (y for known, y in self.answers if torch.equal(known, x))
        return [answer] if self.listed else answer


def numpy(*tensors):
    return [x.detach().double().numpy() for x in tensors]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def moved(query, positive, lam):
    return lam * query + (1 - lam) * positive, lam * positive + (1 - lam) * query


def info_nce(query, positive, negatives, temperature):
    logits = np.array([query @ positive, *(query @ n for n in negatives)]) / temperature
    return math.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[0]


# SupCon


def supcon(one, other, temperature, rewriting=None, classes=CLASSES, every_pair=True):
    found = supcon_tasks(one, other, classes, DRAWS, every_pair=every_pair)
    return Contrast(InfoNCE(temperature), rewriting)(found, DRAWS)


EITHER_WAY = pytest.mark.parametrize("every_pair", [True, False])


@EITHER_WAY
@pytest.mark.parametrize("temperature, mean", [(0.07, 2.4074655736), (0.1, 1.7031475406)])
def test_supcon_golden(temperature, mean, every_pair):
    out = supcon(golden(4, 8, 1), golden(4, 8, 1.3), temperature, every_pair=every_pair)
    assert out.loss.item() == pytest.approx(mean, abs=1e-9)
    assert out.scores.shape == (4, 6)
    torch.testing.assert_close(
        out.scores[:, 0].double(), (golden(4, 8, 1) * golden(4, 8, 1.3)).sum(1), atol=1e-6, rtol=0
    )


@EITHER_WAY
def test_supcon_without_equal_labels_is_nt_xent(every_pair):
    out = supcon(golden(4, 8, 1), golden(4, 8, 1.3), 0.1, classes=torch.tensor([4, 2, 3, 1]), every_pair=every_pair)
    assert out.loss.item() == pytest.approx(0.0228005060, abs=1e-9)


@EITHER_WAY
def test_supcon_has_the_gradient_of_its_formula(every_pair):
    one, other = golden(4, 8, 1).requires_grad_(), golden(4, 8, 1.3).requires_grad_()
    supcon(one, other, 0.3, every_pair=every_pair).loss.backward()
    z, label = torch.cat([one, other]).detach().requires_grad_(), CLASSES.repeat(2)
    log = (z @ z.T / 0.3).fill_diagonal_(-math.inf).log_softmax(1)
    alike = (label[:, None] == label) & ~torch.eye(8, dtype=torch.bool)
    (-log.where(alike, 0).sum(1) / alike.sum(1)).mean().backward()
    torch.testing.assert_close(torch.cat([one.grad, other.grad]), z.grad)


@pytest.mark.parametrize("append", [False, True])
def test_supcon_under_ft_against_a_loop_over_pairs(append):
    """A row extrapolates anchor and positive; mixtures are of two other classes; the own class stays as it is."""
    one, other, lam, mu, temperature = golden(4, 8, 1), golden(4, 8, 1.3), 1.4, 0.7, 0.2
    rewriting = Rewriting([PositiveTransform(Fixed(lam - 1)), NegativeTransform(Fixed(mu), append=append)])
    out = supcon(one, other, temperature, rewriting)

    (z,), label = numpy(torch.stack([one, other], 1).flatten(0, 1)), CLASSES.repeat_interleave(2).tolist()
    order = {
        name: torch.randperm(8, generator=DRAWS.shared(f"{name}/0/permutation")).tolist() for name in ("image", "class")
    }
    anchors = []
    for i in range(8):
        losses = []
        for p in (p for p in range(8) if p != i and label[p] == label[i]):
            query, positive = moved(z[i], z[p], lam)
            partner = order["image" if i % 2 == 0 and p == i + 1 else "class"]
            apart = [j for j in range(8) if label[j] != label[i]]
            unmixed = [j for j in range(8) if j not in (i, p) and (append or j not in apart)]
            mixed = [mu * z[j] + (1 - mu) * z[partner[j]] for j in apart if partner[j] in apart]
            losses.append(info_nce(query, positive, [*z[unmixed], *mixed], temperature))
        anchors.append(np.mean(losses))
    assert out.loss.item() == pytest.approx(np.mean(anchors), abs=1e-9)


def test_supcon_draws_for_a_pair_whatever_the_batch():
    def keys(one, other, draws):
        tasks = supcon_tasks(one, other, torch.zeros(len(one)), draws, every_pair=True)
        rows = (row for task in tasks for row in zip(task.query.tolist(), task.positive.tolist(), task.keys.tolist()))
        return {(*query, *positive): key for query, positive, key in rows}

    one, other = golden(4, 8, 1), golden(4, 8, 1.3)
    whole, part = keys(one, other, DRAWS), keys(one[2:], other[2:], Draws(3, 9, DRAWS.keys[2:]))
    assert len(set(whole.values())) == len(whole) == 8 * 7
    assert len(part) == 4 * 3 and part.items() <= whole.items()
    rows = supcon_tasks(one, other, torch.zeros(4), DRAWS, every_pair=True)[1]
    lam = Coefficient(2.0, "sample").keyed(rows, DRAWS, "x")
    assert lam.shape == (8 * 7 - 4, 1) and len(lam.unique()) > 40


# SimSiam and BYOL


def simsiam(rewriting=None):
    """p = F(4, 8, 2) and F(4, 8, 2.5) of z = F(4, 8, 1) and F(4, 8, 1.3), none of them of unit length yet."""
    z = [3 * golden(4, 8, offset).float() for offset in (1, 1.3)]
    p = [(0.5 * golden(4, 8, offset).float()).requires_grad_() for offset in (2, 2.5)]
    z = [x.requires_grad_() for x in z]
    contrast = Contrast(Cosine(0, 1), rewriting)
    method = SimSiam(Same(), predictor=Told(list(zip(z, p))), fix_predictor=True, contrast=contrast, seed=3)
    return method({"query": z[0], "key": z[1], "key_draw": DRAWS.keys, "step": 5}), z, p


def byol(rewriting=None):
    """The same, with z said by the target and views that are only names."""
    views = [torch.full((4, 1), float(i)) for i in range(2)]
    z = [3 * golden(4, 8, offset).float() for offset in (1, 1.3)]
    p = [(0.5 * golden(4, 8, offset).float()).requires_grad_() for offset in (2, 2.5)]
    contrast = Contrast(Cosine(2, 2), rewriting)
    encoder, predictor = Told([], listed=True), nn.Identity()
    method = BYOL(encoder, predictor=predictor, key_momentum=lambda step: 0.5, contrast=contrast, seed=3)
    method.encoder.answers = list(zip(views, p))
    method.momentum_encoder.encoder.answers = list(zip(views, z))
    return method({"query": views[0], "key": views[1], "key_draw": DRAWS.keys, "step": 5}), z, p


def test_simsiam_golden_and_its_stopped_gradient():
    out, z, p = simsiam()
    assert out.loss.item() == pytest.approx(-0.4333545672, abs=1e-6)
    assert out.scores.shape == (4, 1)
    assert out.stats["feature_std"].item() == pytest.approx(golden(4, 8, 1.3).std(0).mean().item(), abs=1e-6)
    out.loss.backward()
    assert all(x.grad is None for x in z) and all(x.grad.isfinite().all() for x in p)


def test_byol_golden_is_four_plus_four_times_simsiam():
    out, _, p = byol()
    assert out.loss.item() == pytest.approx(2.2665817311, abs=1e-6)
    assert out.loss.item() == pytest.approx(4 + 4 * simsiam()[0].loss.item(), abs=1e-5)
    out.loss.backward()
    assert all(x.grad.isfinite().all() for x in p)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("made, offset, scale", [(simsiam, 0, 0.5), (byol, 4, 2)])
def test_ft_without_negatives_against_a_loop(made, offset, scale, normalize):
    """offset - scale * (the mean of both directions' extrapolated scores, added)."""
    lam = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
    out, z, p = made(Rewriting([PositiveTransform(Fixed(lam), normalize=normalize)], before=True))
    z, p, lam = [unit(x) for x in numpy(*z)], [unit(x) for x in numpy(*p)], 1 + lam.double().numpy()
    scores = []
    for prediction, target in ((p[0], z[1]), (p[1], z[0])):
        for i in range(4):
            query, positive = moved(prediction[i], target[i], lam[i])
            scores.append(unit(query) @ unit(positive) if normalize else query @ positive)
    assert out.loss.item() == pytest.approx(offset - scale * 2 * np.mean(scores), abs=1e-5)
    np.testing.assert_allclose(out.scores[:, 0], scores[:4], atol=1e-5)
    np.testing.assert_allclose(out.scores[:, 1], (p[0] * z[1]).sum(1), atol=1e-5)  # before


def test_byol_momentum_golden():
    opt = ContrastOptions(key_momentum=0.996, key_schedule="cosine", epochs=2)
    momentum = build._key_momentum(opt, steps_per_epoch=2)
    assert [momentum(step) for step in range(5)] == pytest.approx([0.996, 0.99658579, 0.998, 0.99941421, 1], abs=1e-8)
    constant = build._key_momentum(ContrastOptions(key_momentum=0.9, epochs=2), steps_per_epoch=2)
    assert {constant(step) for step in range(5)} == {0.9}


# SwAV


def swav(small=0, rewriting=None, queue=0, queue_start=0, **views):
    """SwAV with the prototypes F(5, 8, 9), of which `views` are the embeddings."""
    method = SwAV(
        Same(),
        dim=8,
        prototypes=5,
        small=small,
        temperature=0.1,
        epsilon=0.05,
        iterations=3,
        freeze=2,
        queues=[Queue(queue, 8) for _ in range(2) if queue],
        queue_start=queue_start,
        queue_full=queue_start + -(-queue // 6),
        rewriting=rewriting or Rewriting(),
        seed=3,
    ).double()
    method.prototypes.weight.data.copy_(golden(5, 8, 9))
    return method, views | {"key_draw": torch.arange(6), "step": 5}


def balanced(similarity, epsilon=0.05, iterations=3):
    """Sinkhorn-Knopp on the exponentials themselves, as published: (N, clusters)."""
    q = np.exp(similarity / epsilon).T
    clusters, samples = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdims=True) / clusters
        q = q / q.sum(0, keepdims=True) / samples
    return (q * samples).T


def swapped(codes, similarity, temperature=0.1):
    """Cross entropy of every row."""
    logits = similarity / temperature
    return -(codes * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum(1)


PROTOTYPES = golden(5, 8, 9)


def test_sinkhorn_golden():
    similarity = golden(6, 8, 1) @ PROTOTYPES.T
    codes = sinkhorn(similarity, 0.05, 3)
    np.testing.assert_allclose(codes[0], [1e-8, 0, 0.0005997, 0.99940029, 0], atol=5e-9)
    np.testing.assert_allclose(
        codes.sum(0) * 5 / 6, [0.83335045, 0.83333381, 0.83383309, 1.66614985, 0.8333328], atol=1e-8
    )
    np.testing.assert_allclose(codes.sum(1), np.ones(6))
    many = sinkhorn(similarity, 0.05, 100)
    np.testing.assert_allclose(many[0], [0.00065318, 0.0000052, 0.21272956, 0.78661185, 2.1e-7], atol=5e-9)
    np.testing.assert_allclose(sinkhorn(similarity, 0.05, 2000).sum(0), np.full(5, 6 / 5), rtol=1e-2)
    np.testing.assert_allclose(codes, balanced(similarity.numpy()), atol=1e-12)
    loss = swapped(codes.numpy(), (golden(6, 8, 1.3) @ PROTOTYPES.T).numpy()).mean()
    assert loss == pytest.approx(0.1612210004, abs=1e-9)


def test_sinkhorn_overflows_at_no_epsilon():
    codes = sinkhorn(golden(6, 8, 1).float() @ PROTOTYPES.float().T, 1e-3, 3)
    assert codes.isfinite().all()
    torch.testing.assert_close(codes.sum(1), torch.ones(6))


SMALL_VIEWS = {"small0": golden(6, 8, 2), "small1": golden(6, 8, 2.4)}


@pytest.mark.parametrize("small", [{}, SMALL_VIEWS])
@pytest.mark.parametrize("lam", [None, 1.4])
def test_swav_against_a_loop_over_assigned_and_predicting_views(small, lam):
    views = {"query": golden(6, 8, 1), "key": golden(6, 8, 1.3)} | small
    rewriting = Rewriting([PositiveTransform(Fixed(lam - 1), normalize=True)]) if lam else None
    method, batch = swav(len(small), rewriting, **views)
    out = method(batch)
    prototypes, z = PROTOTYPES.numpy(), dict(zip(views, numpy(*views.values())))
    losses, first = [], None
    for assigned in ("query", "key"):
        codes = balanced(z[assigned] @ prototypes.T)  # of the embeddings as they are
        for predicting in (name for name in z if name != assigned):
            query = z[predicting]
            if lam:
                query = unit(moved(query, z[assigned], lam)[0])
            similarity = query @ prototypes.T
            losses.append(swapped(codes, similarity).mean())
            if (predicting, assigned) == ("query", "key"):
                first = codes.argmax(1), similarity
    assert out.loss.item() == pytest.approx(np.mean(losses), abs=1e-9)

    # Score rows: the query and its key's cluster, against all other clusters.
    best, similarity = first
    positive = similarity[np.arange(6), best]
    others = np.stack([np.delete(row, b) for row, b in zip(similarity, best)])
    expected = [positive, others.mean(1), others.var(1, ddof=1), others.max(1)]
    expected += [np.log(np.exp(others / 0.1).mean(1)), positive / 0.1]
    np.testing.assert_allclose(out.scores, np.stack(expected, 1), rtol=1e-5, atol=1e-6)


def test_swav_codes_carry_no_gradient():
    """Only predictions are trained: the gradient is that of the loop with constant codes."""
    query, key = golden(6, 8, 1).requires_grad_(), golden(6, 8, 1.3).requires_grad_()
    method, batch = swav(query=query, key=key)
    method(batch).loss.backward()
    ours = query.grad.clone(), key.grad.clone(), method.prototypes.weight.grad.clone()
    loss, weight = 0, PROTOTYPES.clone().requires_grad_()
    for predicting, assigned in ((query, key), (key, query)):
        codes = torch.from_numpy(balanced(*numpy(assigned @ PROTOTYPES.T)))
        loss = loss + F.cross_entropy(F.normalize(predicting, dim=1) @ weight.T / 0.1, codes) / 2
    for a, b in zip(ours, torch.autograd.grad(loss, (query, key, weight))):
        torch.testing.assert_close(a, b)


def test_swav_balances_over_its_queue_once_that_is_full():
    """Of 12 places, written from step 5 on with 6 embeddings a step: full at step 7."""
    method, batch = swav(query=golden(6, 8, 1), key=golden(6, 8, 1.3), queue=12, queue_start=5)
    fresh = [queue.keys.clone() for queue in method.queues]
    before = method(batch | {"step": 4})
    method.after_step(before, 4)
    assert all(torch.equal(queue.keys, keys) for queue, keys in zip(method.queues, fresh))
    losses = []
    for step in (5, 6):
        out = method(batch | {"step": step})
        method.after_step(out, step)
        losses.append(out.loss.item())
    assert losses == pytest.approx([before.loss.item()] * 2)  # not used yet
    assert all(queue.fill() == 1 for queue in method.queues)
    loss = 0
    for i, queue in enumerate(method.queues):
        queue.keys.copy_(golden(12, 8, 20 + i))
    for i, (assigned, predicting) in enumerate((("query", "key"), ("key", "query"))):
        everything = torch.cat([batch[assigned], golden(12, 8, 20 + i)])
        codes = balanced(*numpy(everything @ PROTOTYPES.T))[:6]
        loss += swapped(codes, *numpy(batch[predicting] @ PROTOTYPES.T)).mean() / 2
    assert method(batch | {"step": 7}).loss.item() == pytest.approx(loss, abs=1e-9)


def test_swav_prototypes_stay_for_a_while_and_always_have_unit_length():
    method, batch = swav(query=golden(6, 8, 1), key=golden(6, 8, 1.3))
    for step in range(4):
        out = method(batch | {"step": step})
        method.zero_grad()
        out.loss.backward()
        method.after_backward(step)
        assert (method.prototypes.weight.grad is None) == (step < 2)
    method.prototypes.weight.data.mul_(3)
    method.after_step(out, 3)
    torch.testing.assert_close(method.prototypes.weight.norm(dim=1), torch.ones(5).double())


def test_swavs_transformed_embeddings_return_to_the_sphere():
    (transform,) = build.transforms(ContrastOptions(method="SwAV", ft_pos="extrapolate"))
    assert transform.normalize
    (plain,) = build.transforms(ContrastOptions(method="SimSiam", ft_pos="extrapolate"))
    assert not plain.normalize


# NCE


def task(seed, n=4, k=16, d=8):
    generator = torch.Generator().manual_seed(seed)
    q, positive, negatives = (F.normalize(torch.randn(m, d, generator=generator).double(), dim=1) for m in (n, n, k))
    return Task(f"image{seed}", q, positive, (Negatives(negatives, torch.rand(n, k, generator=generator) > 0.2),))


def mean_exp(task, temperature):
    """What a batch says of Z / N: the mean of exp(s / T) over its positives and those negatives that count."""
    q, positive, negatives = numpy(task.query, task.positive, task.negatives[0].features)
    valid = task.negatives[0].valid.numpy()
    values = [math.exp(a @ b / temperature) for a, b in zip(q, positive)]
    values += [math.exp(q[i] @ negatives[j] / temperature) for i, j in zip(*valid.nonzero())]
    return np.mean(values)


def nce(task, temperature, constant, data=1000):
    """Number by number, as published: P(data | s) = p / (p + K / data), p = exp(s / T) / (data * constant)."""
    q, positive, negatives = numpy(task.query, task.positive, task.negatives[0].features)
    valid, noise = task.negatives[0].valid.numpy(), len(negatives) / data
    losses = []
    for i in range(len(q)):
        p = math.exp(q[i] @ positive[i] / temperature) / (data * constant)
        loss = -math.log(p / (p + noise))
        for j in range(len(negatives)):
            if valid[i, j]:
                p = math.exp(q[i] @ negatives[j] / temperature) / (data * constant)
                loss -= math.log(noise / (p + noise))
        losses.append(loss)
    return np.mean(losses)


def test_nce_against_a_loop_with_a_constant_for_each_task():
    """The first batch uses its own estimate, afterwards a running mean of momentum .99 that knows only the past."""
    contrast, expected = Contrast(NCE(0.2, tasks=2)).double(), None
    for step in range(3):
        tasks = [task(10 * step), task(10 * step + 1)]
        out = contrast(tasks, Draws(0, step, torch.arange(4)))
        seen = np.array([mean_exp(each, 0.2) for each in tasks])
        used = seen if step == 0 else expected
        losses = sum(nce(each, 0.2, constant) for each, constant in zip(tasks, used))
        assert out.loss.item() == pytest.approx(losses, abs=1e-6)
        contrast.after_step(out)
        expected = seen if step == 0 else 0.99 * expected + 0.01 * seen
        np.testing.assert_allclose(contrast.objective.constants.exp(), expected, rtol=1e-6)
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)


def test_nce_only_learns_its_constant_after_the_step():
    contrast = Contrast(NCE(0.2, tasks=1))
    out = [contrast([task(i)], DRAWS) for i in (0, 1, 0)]
    assert contrast.objective.constants.isnan().all() and torch.equal(out[0].loss, out[2].loss)


def test_nce_of_rewritten_tasks_goes_on_with_the_same_constant():
    """What is learnt is about the scores that are trained on; those before FT are recorded and nothing more."""
    transform = PositiveTransform(Fixed(0.4))
    contrast = Contrast(NCE(0.2, tasks=1), Rewriting([transform], begin_step=1, before=True)).double()
    first, second = task(0), task(1)
    contrast.after_step(contrast([first], Draws(0, 0, torch.arange(4))))
    out = contrast([second], Draws(0, 1, torch.arange(4)))
    rewritten, constant = transform(second, DRAWS), mean_exp(first, 0.2)
    assert out.loss.item() == pytest.approx(nce(rewritten, 0.2, constant), abs=1e-6)
    contrast.after_step(out)
    constant = 0.99 * constant + 0.01 * mean_exp(rewritten, 0.2)
    assert contrast.objective.constants.exp().item() == pytest.approx(constant, rel=1e-6)


def test_nce_constant_of_a_random_bank():
    """E exp(x / T) for x ~ N(0, 1/d) with d = 128 and T = .07 is about 2.22."""
    torch.manual_seed(0)
    bank, query = Bank(4096, 128, 0.5), F.normalize(torch.randn(256, 128), dim=1)
    positive, negatives = bank.read(torch.arange(256), torch.arange(256, 4096))
    losses = NCE(0.07, tasks=1)(Task("image", query, positive, (negatives,)), 0)
    assert losses.constant.exp().item() == pytest.approx(2.22, abs=0.03)
    assert losses.rows.mean().item() == pytest.approx(math.log(3841) + 1.5, abs=0.6)


def test_nce_of_equal_scores_knows_nothing():
    """Then the constant is exp(s / T), and every one of K + 1 samples is the data's with probability 1 / (K + 1)."""
    one, score = torch.ones(3, 1).double(), torch.full((7, 1), 0.3).double()
    equal = Task("image", one, score[:3], (Negatives(score),))
    losses = NCE(0.1, tasks=1).double()(equal, 0)
    expected = math.log(8) + 7 * math.log(8 / 7)
    torch.testing.assert_close(losses.rows, torch.full((3,), expected).double())
    torch.testing.assert_close(InfoNCE(0.1)(equal, 0).rows, torch.full((3,), math.log(8)).double())
