"""Queue, score statistics and score files."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from learning.losses import InfoNCE
from memory import scores
from memory.stores import Queue
from memory.task import CHUNK, Negatives, Task
from tests.test_feature_transform import golden

YES = torch.tensor(True)


def info_nce(q, k, queue, temperature, one_pass=True):
    losses = InfoNCE(temperature, one_pass)(Task("image", q, k, (Negatives(queue),)), 0)
    return losses.rows, losses.scored


def test_queue_wraps_around_at_any_size_and_keeps_the_newest():
    queue, reference = Queue(10, 3), []
    for step in range(7):
        keys = torch.full((4, 3), float(step)) + torch.arange(4)[:, None] / 10
        queue.write(keys, YES)
        reference += list(keys)
        slot = {i % 10: key for i, key in enumerate(reference)}
        for i, key in slot.items():
            assert torch.equal(queue.keys[i], key)
    assert queue.fill() == 1.0 and queue.written == 28


def test_queue_keeps_the_last_keys_of_a_batch_larger_than_itself():
    queue = Queue(3, 2)
    queue.write(torch.arange(8.0).reshape(4, 2), YES)
    queue.write(torch.arange(100.0, 110.0).reshape(5, 2), YES)
    assert sorted(queue.keys[:, 0].tolist()) == [104.0, 106.0, 108.0]


def test_queue_reads_without_copying_and_starts_with_unit_vectors():
    queue = Queue(16, 8)
    assert queue.read().features.data_ptr() == queue.keys.data_ptr()
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(16))
    assert queue.fill() == 0.0


def test_queue_position_survives_a_checkpoint():
    queue, restored = Queue(8, 2), Queue(8, 2)
    queue.write(torch.ones(5, 2), YES)
    restored.load_state_dict(queue.state_dict())
    for each in (queue, restored):
        each.write(torch.full((5, 2), 7.0), YES)
    assert torch.equal(queue.keys, restored.keys)


BOTH = pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "all scores"])


def unit(*shape, seed=0, **kind):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kind), dim=1)


@BOTH
@pytest.mark.parametrize("temperature, mean", [(0.07, 1.4221601005), (0.2, 1.5507913509)])
def test_info_nce_golden(temperature, mean, one_pass):
    q, k, queue = golden(4, 8, 1), golden(4, 8, 1.3), golden(16, 8, 50)
    losses, scored = info_nce(q, k, queue, temperature, one_pass)
    assert losses.mean().item() == pytest.approx(mean, abs=1e-9)
    torch.testing.assert_close(scored.log_sum_exp, (q @ queue.T / temperature).exp().sum(1).log())
    if temperature == 0.07:
        rows = torch.tensor([1.3288299, 1.34100705, 1.29525144, 1.72355202], dtype=torch.float64)
        torch.testing.assert_close(losses, rows, atol=1e-7, rtol=0)


@BOTH
@pytest.mark.parametrize("size", [40, CHUNK, 2 * CHUNK + 1])
def test_info_nce_equals_cross_entropy_with_its_gradient(size, one_pass):
    q, k, queue = unit(6, 16).requires_grad_(), unit(6, 16, seed=1).requires_grad_(), unit(size, 16, seed=2)
    losses, _ = info_nce(q, k, queue, 0.1, one_pass)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.1
    reference = F.cross_entropy(logits, torch.zeros(6, dtype=torch.long), reduction="none")
    torch.testing.assert_close(losses, reference, rtol=1e-5, atol=1e-5)
    weights = torch.arange(6.0)
    ours = torch.autograd.grad((losses * weights).sum(), (q, k))
    for a, b in zip(ours, torch.autograd.grad((reference * weights).sum(), (q, k))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@BOTH
def test_first_loss_against_a_random_queue(one_pass):
    """With q = k and random negatives the loss is about ln(K) + 1 / (2 D T^2) - 1 / T: 6.19 for MoCo v2's settings."""
    q = unit(32, 128)
    losses, _ = info_nce(q, q, unit(65536, 128, seed=1), 0.2, one_pass)
    assert losses.mean().item() == pytest.approx(6.19, abs=0.02)


@BOTH
@pytest.mark.parametrize("size, spread", [(300, 1.0), (CHUNK + 7, 1.0), (CHUNK + 7, 1e-3)])
def test_statistics_against_numpy(size, spread, one_pass):
    """Also where all embeddings have nearly collapsed: the variance is no difference of large squares."""
    centre = unit(1, 16, seed=3)
    q, k, queue = (F.normalize(centre + spread * unit(n, 16, seed=n), dim=1) for n in (5, 6, size))
    _, scored = info_nce(q, k[:5], queue, 0.07, one_pass)
    positive = (q * k[:5]).sum(1)
    rows = scores.statistics(positive, scored, 0.07).numpy()
    p, n = positive.double().numpy(), (q.double() @ queue.double().T).numpy()
    expected = [p, n.mean(1), n.var(1, ddof=1), n.max(1), np.log(np.exp(n / 0.07).mean(1)), p / 0.07]
    np.testing.assert_allclose(rows, np.stack(expected, 1), rtol=2e-4, atol=1e-5 * spread**2)


@BOTH
def test_statistics_of_unnormalised_embeddings_stay_finite(one_pass):
    q, queue = 40 * unit(1, 16), 40 * unit(64, 16, seed=1)
    losses, scored = info_nce(q, q, queue, 0.07, one_pass)
    assert losses.isfinite().all() and scores.statistics((q * q).sum(1), scored, 0.07).isfinite().all()


def test_one_pass_without_a_gradient_scores_alike():
    q, queue = unit(5, 16).requires_grad_(), unit(CHUNK + 7, 16, seed=1)
    found = info_nce(q, q, queue, 0.07)[1]
    with torch.no_grad():
        for a, b in zip(found, info_nce(q, q, queue, 0.07)[1]):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_summary_averages_into_what_the_whole_would_give():
    rows = torch.randn(40, 12)
    parts = [scores.summary(part) for part in rows.split(10)]
    mean = {name: sum(part[name].item() for part in parts) / 4 for name in parts[0]}
    shown = scores.derived(mean)
    assert shown["positive_var"] == pytest.approx(rows[:, 0].var(unbiased=False).item(), rel=1e-4)
    assert shown["before_gap"] == pytest.approx((rows[:, 6].mean() - rows[:, 7].mean()).item(), abs=1e-5)
    assert shown["contrast_acc"] == pytest.approx((rows[:, 0] >= rows[:, 3]).float().mean().item())
    assert not any("square" in name for name in shown)


def test_score_file_holds_named_columns_without_pickle(tmp_path):
    rows = np.random.default_rng(0).normal(size=(3, 4, 12)).astype(np.float32)
    path = tmp_path / "scores_0001.npz"
    index, step = np.arange(12).reshape(3, 4), np.array([1, 2, 3])
    with path.open("wb") as file:
        scores.write_file(file, rows, index=index, step=step, epoch=1, queue_size=64, temperature=0.2)
    with np.load(path, allow_pickle=False) as file:
        assert set(file) == {*scores.COLUMNS, *(f"before_{c}" for c in scores.COLUMNS)} | {
            "step", "index", "epoch", "queue_size", "temperature",
        }  # fmt: skip
        np.testing.assert_array_equal(file["before_negative_var"], rows[..., 8])
        assert file["positive"].dtype == np.float32 and math.isclose(file["temperature"], 0.2)
