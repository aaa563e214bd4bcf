"""FT against its formulas: invariants, golden values, gradients, distributions."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

from learning.draws import Draws
from learning.losses import InfoNCE
from learning.methods.base import Contrast, Rewriting
from memory.feature_transform import Coefficient, NegativeTransform, PositiveTransform, beta_quantiles
from memory.task import Negatives, Task


def golden(n, d, offset):
    return F.normalize(torch.sin(offset + torch.arange(n * d, dtype=torch.float64)).reshape(n, d), dim=1)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A coefficient that is always `value`, in place of a drawn one."""

    value: float | torch.Tensor

    def keyed(self, task, draws, salt):
        return next(self.shared([task.query], draws, salt))

    def shared(self, chunks, draws, salt):
        return (torch.as_tensor(self.value, dtype=like.dtype) for like in chunks)


@pytest.fixture
def task():
    return Task("image", golden(4, 8, 1), golden(4, 8, 1.3), (Negatives(golden(16, 8, 50)),))


@pytest.fixture
def draws():
    return Draws(0, 5, torch.arange(4))


def positive_scores(task):
    return (task.query * task.positive).sum(1)


def test_golden_positive_scores(task, draws):
    moved = PositiveTransform(Fixed(0.5))(task, draws)  # extrapolation adds one: lambda = 1.5
    expected = torch.tensor([0.91631355, 0.85169983, 0.91424141, 0.86350126], dtype=torch.float64)
    torch.testing.assert_close(positive_scores(moved), expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("lam", [1.0, 1.3, 2.0])
def test_extrapolation_makes_the_pair_harder_by_the_formula(task, draws, lam):
    score = positive_scores(task)
    moved = PositiveTransform(Fixed(lam - 1))(task, draws)
    c = 2 * lam * (lam - 1) * (1 - score)
    torch.testing.assert_close(positive_scores(moved), score - c)
    for side in (moved.query, moved.positive):
        torch.testing.assert_close(side.square().sum(1), 1 + c)
    cosine = PositiveTransform(Fixed(lam - 1), normalize=True)(task, draws)
    torch.testing.assert_close(positive_scores(cosine), (score - c) / (1 + c))
    torch.testing.assert_close(moved.query + moved.positive, task.query + task.positive)  # weights sum to one


def test_interpolation_makes_the_pair_easier(task, draws):
    moved = PositiveTransform(Fixed(0.3), extrapolate=False)(task, draws)
    score = positive_scores(task)
    torch.testing.assert_close(positive_scores(moved), score + 2 * 0.3 * 0.7 * (1 - score))


def test_vector_lambda_follows_the_general_formula(task, draws):
    lam = torch.rand(4, 8, dtype=torch.float64)
    moved = PositiveTransform(Fixed(lam))(task, draws)
    lam = lam + 1
    change = (lam * (1 - lam) * (task.query - task.positive).square()).sum(1)
    torch.testing.assert_close(positive_scores(moved), positive_scores(task) + change)


def test_gradient_reaches_the_query_through_both_factors(task, draws):
    query = task.query.clone().requires_grad_()
    lam = 1.7
    positive_scores(PositiveTransform(Fixed(lam - 1))(dataclasses.replace(task, query=query), draws)).sum().backward()
    q, k = task.query, task.positive
    expected = lam * (lam * k + (1 - lam) * q) + (1 - lam) * (lam * q + (1 - lam) * k)
    torch.testing.assert_close(query.grad, expected)


@pytest.mark.parametrize("granularity", ["batch", "sample", "dim"])
def test_negatives_are_mixed_with_a_permutation_of_themselves(granularity, draws):
    features = F.normalize(torch.randn(4096, 32), dim=1)
    before = features.clone()
    task = Task("image", features[:4], features[4:8], (Negatives(features),))
    mixed = NegativeTransform(Coefficient(1.6, granularity))(task, draws).negatives[0].features
    assert torch.equal(features, before)  # a memory is read, never written
    assert mixed.shape == features.shape
    assert granularity == "dim" or (mixed.norm(dim=1) <= 1 + 1e-6).all()  # between two points of the sphere
    torch.testing.assert_close(mixed.mean(0), features.mean(0), atol=0.05, rtol=0)
    if granularity != "batch":  # the variance of random negatives shrinks by (a + 1) / (2a + 1)
        assert mixed.var().item() / features.var().item() == pytest.approx(2.6 / 4.2, abs=0.03)
    renewed = NegativeTransform(Coefficient(1.6, granularity))(task, dataclasses.replace(draws, step=6))
    assert not torch.equal(renewed.negatives[0].features, mixed)


def test_a_batch_lambda_mixes_each_row_with_exactly_one_other(draws):
    task = Task("image", torch.eye(4), torch.eye(4), (Negatives(torch.eye(64)),))
    mixed = NegativeTransform(Coefficient(1.6))(task, draws).negatives[0].features
    lam = mixed.diagonal()[mixed.diagonal() < 1 - 1e-6]
    assert lam.unique().numel() == 1  # one number for the whole queue
    torch.testing.assert_close(mixed.sum(1), torch.ones(64))
    torch.testing.assert_close(mixed.sum(0), torch.ones(64))  # every row is used once: a permutation


def test_append_keeps_the_originals_and_normalize_makes_unit_vectors(task, draws):
    transformed = NegativeTransform(Coefficient(1.6), append=True, normalize=True)(task, draws)
    original, mixed = transformed.negatives
    assert torch.equal(original.features, task.negatives[0].features)
    torch.testing.assert_close(mixed.features.norm(dim=1), torch.ones(16, dtype=torch.float64))
    assert transformed.scores()[1].shape == (4, 32)


@pytest.mark.parametrize("alpha", [0.2, 0.4, 1.0, 1.6, 2.0, 5.0])
def test_tabulated_beta_passes_a_kolmogorov_smirnov_test(alpha):
    index = torch.randint(2**16, (100_000,), generator=torch.Generator().manual_seed(0))
    sample = beta_quantiles(alpha)[index].numpy()
    if alpha > 0.3:  # below, a visible share of the numbers is so close to 1 that float32 rounds them to it
        assert scipy.stats.kstest(sample, scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    exact = scipy.stats.beta(alpha, alpha).ppf((np.arange(2**16) + 0.5) / 2**16)
    np.testing.assert_allclose(beta_quantiles(alpha).numpy(), exact, atol=2e-6)


def test_granularity_decides_who_shares_a_lambda(draws):
    like = torch.zeros(4, 8)
    task = Task("image", like, like)
    shapes = {g: tuple(Coefficient(2.0, g).keyed(task, draws, "x").shape) for g in ("batch", "sample", "dim")}
    assert shapes == {"batch": (1, 1), "sample": (4, 1), "dim": (4, 8)}
    per_sample = Coefficient(2.0, "sample").keyed(task, draws, "x")
    third = Task("image", like[2:3], like[2:3])
    alone = Coefficient(2.0, "sample").keyed(third, Draws(0, 99, torch.tensor([2])), "x")
    assert torch.equal(per_sample[2:3], alone)  # a sample's lambda depends on neither batch nor step
    named = Coefficient(2.0, "sample").keyed(dataclasses.replace(third, keys=torch.tensor([3])), draws, "x")
    assert torch.equal(per_sample[3:], named)  # rows that are not the batch's samples bring keys of their own
    assert torch.equal(*(next(Coefficient(2.0).shared([like], draws, "x")) for _ in range(2)))


def test_begin_step_and_scores_before(task, draws):
    contrast = Contrast(InfoNCE(0.2), Rewriting([PositiveTransform(Fixed(0.5))], begin_step=6, before=True))
    off, on = contrast([task], draws), contrast([task], dataclasses.replace(draws, step=6))
    assert torch.equal(off.scores[:, :6], off.scores[:, 6:])
    torch.testing.assert_close(on.scores[:, 6:], off.scores[:, :6])
    assert (on.scores[:, 0] < on.scores[:, 6]).all()
    assert on.loss > off.loss


def test_appended_columns_are_scored_once_each(task, draws):
    doubled = dataclasses.replace(task, negatives=task.negatives * 2)
    rows = Contrast(InfoNCE(0.2))([doubled], draws).scores
    single = Contrast(InfoNCE(0.2))([task], draws).scores
    torch.testing.assert_close(rows[:, 4], single[:, 4])  # the mean of exp(neg / T) does not change
