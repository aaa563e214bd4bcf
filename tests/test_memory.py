"""Queue, score statistics and score files."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from learning.losses import InfoNCE
from memory import scores
from memory.stores import Queue
from tests.test_feature_transform import golden

YES = torch.tensor(True)


def info_nce(positive, negative, temperature):
    losses = InfoNCE(temperature)(positive, negative, 0)
    return losses.rows, losses.log_sum_exp


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


@pytest.mark.parametrize("temperature, mean", [(0.07, 1.4221601005), (0.2, 1.5507913509)])
def test_info_nce_golden(temperature, mean):
    q, k, queue = golden(4, 8, 1), golden(4, 8, 1.3), golden(16, 8, 50)
    losses, lse = info_nce((q * k).sum(1), q @ queue.T, temperature)
    assert losses.mean().item() == pytest.approx(mean, abs=1e-9)
    torch.testing.assert_close(lse, (q @ queue.T / temperature).exp().sum(1).log())
    if temperature == 0.07:
        rows = torch.tensor([1.3288299, 1.34100705, 1.29525144, 1.72355202], dtype=torch.float64)
        torch.testing.assert_close(losses, rows, atol=1e-7, rtol=0)


def test_info_nce_equals_cross_entropy_with_its_gradient():
    positive, negative = torch.randn(6, requires_grad=True), torch.randn(6, 40, requires_grad=True)
    losses, _ = info_nce(positive, negative, 0.1)
    reference = F.cross_entropy(torch.cat([positive[:, None], negative], 1) / 0.1, torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(losses.mean(), reference)
    ours = torch.autograd.grad(losses.mean(), (positive, negative))
    for a, b in zip(ours, torch.autograd.grad(reference, (positive, negative))):
        torch.testing.assert_close(a, b)


def test_first_loss_against_a_random_queue():
    """With q = k and random negatives the loss is about ln(K) + 1 / (2 D T^2) - 1 / T: 6.19 for MoCo v2's settings."""
    torch.manual_seed(0)
    q, queue = F.normalize(torch.randn(32, 128), dim=1), F.normalize(torch.randn(65536, 128), dim=1)
    losses, _ = info_nce((q * q).sum(1), q @ queue.T, 0.2)
    assert losses.mean().item() == pytest.approx(6.19, abs=0.02)


def test_statistics_against_numpy():
    positive, negative = torch.randn(5) * 0.1, torch.randn(5, 300) * 0.1
    _, lse = info_nce(positive, negative, 0.07)
    rows = scores.statistics(positive, negative, lse, 0.07).numpy()
    p, n = positive.double().numpy(), negative.double().numpy()
    expected = [p, n.mean(1), n.var(1, ddof=1), n.max(1), np.log(np.exp(n / 0.07).mean(1)), p / 0.07]
    np.testing.assert_allclose(rows, np.stack(expected, 1), rtol=2e-4, atol=1e-5)


def test_statistics_of_unnormalised_embeddings_stay_finite():
    positive, negative = torch.tensor([40.0]), torch.randn(1, 64) * 40
    losses, lse = info_nce(positive, negative, 0.07)
    assert losses.isfinite().all() and scores.statistics(positive, negative, lse, 0.07).isfinite().all()


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
