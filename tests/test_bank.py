"""The memory bank, and InsDis, CMC and PIRL, which draw from it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learning.draws import Draws
from learning.losses import InfoNCE
from learning.methods.bank import MemoryBank
from learning.methods.base import Contrast, StepOutput
from memory.stores import Bank

IMAGES = 40
INDEX = torch.tensor([7, 3, 9, 31])
YES = torch.tensor(True)


class Halves(nn.Module):
    """An encoder whose images are the embeddings of its modalities, side by side."""

    def __init__(self, modalities):
        super().__init__()
        self.modalities = modalities

    def forward(self, x):
        return list(x.chunk(self.modalities, dim=1))


class Recorder(nn.Module):
    """In place of `Contrast`: keeps the tasks it is given."""

    def forward(self, tasks, draws, writes):
        self.tasks = tasks
        return StepOutput(torch.zeros(()), {}, torch.zeros(()), writes)

    def after_step(self, out):
        pass


def written(momentum=0.5):
    """A bank that has seen every image."""
    bank = Bank(IMAGES, 8, momentum)
    bank.seen.fill_(True)
    return bank


def numbered(start):
    """A bank whose rows say where they lie."""
    bank = written()
    bank.rows.copy_(torch.arange(start, start + IMAGES)[:, None].expand(-1, 8))
    return bank


def method(modalities, contrast, seed=3, banks=None, negatives=500):
    banks = banks or [numbered(1000 * m) for m in range(modalities)]
    return MemoryBank(Halves(modalities), banks=banks, negatives=negatives, contrast=contrast, seed=seed)


def batch(modalities, step=5, index=INDEX):
    query = torch.randn(len(index), 8 * modalities, generator=torch.Generator().manual_seed(step))
    return {"query": query, "index": index, "key_draw": index + 100, "step": step}


def drawn(modalities=2, step=5, seed=3, index=INDEX):
    """The bank's rows that every query of this step meets, as each modality sees them."""
    contrast = Recorder()
    method(modalities, contrast, seed)(batch(modalities, step, index))
    return [task.negatives[0].features[:, 0].long() % 1000 for task in contrast.tasks]


def test_rows_begin_as_published():
    """U(-s, s) with s = 1 / sqrt(d / 3): of expected length 1, not normalised."""
    torch.manual_seed(0)
    rows = Bank(4096, 128, 0.5).rows
    limit = 1 / np.sqrt(128 / 3)
    assert rows.abs().max() <= limit and rows.abs().max() > 0.999 * limit
    assert rows.mean().item() == pytest.approx(0, abs=1e-3)
    assert rows.std().item() == pytest.approx(limit / np.sqrt(3), rel=1e-2)
    lengths = rows.norm(dim=1)
    assert (lengths.mean().item(), lengths.std().item()) == pytest.approx((1, 0.04), abs=0.01)


def test_writing_moves_a_row_and_gives_it_unit_length():
    bank, features = written(0.7), F.normalize(torch.randn(4, 8), dim=1)
    before = bank.rows.clone().numpy()
    bank.write(INDEX, features, YES)
    expected = before.copy()
    for i, feature in zip(INDEX.tolist(), features.numpy()):
        row = 0.7 * before[i] + 0.3 * feature
        expected[i] = row / np.linalg.norm(row)
    np.testing.assert_allclose(bank.rows, expected, atol=1e-6)
    others = np.setdiff1d(np.arange(IMAGES), INDEX)
    np.testing.assert_array_equal(bank.rows[others], before[others])


def test_the_first_embedding_of_an_image_replaces_its_random_row():
    bank, features = Bank(IMAGES, 8, momentum=0.7), F.normalize(torch.randn(4, 8), dim=1)
    before = bank.rows.clone()
    bank.write(INDEX, features, YES)
    torch.testing.assert_close(bank.rows[INDEX], features)
    assert bank.seen.nonzero().squeeze(1).tolist() == sorted(INDEX.tolist())
    assert torch.equal(bank.rows[~bank.seen], before[~bank.seen])
    bank.write(INDEX, features.roll(1, 0), YES)
    torch.testing.assert_close(bank.rows[INDEX], F.normalize(0.7 * features + 0.3 * features.roll(1, 0), dim=1))


def test_images_without_a_row_have_no_loss():
    banks = [written(), written()]
    for bank in banks:
        bank.seen[INDEX[:3]] = False
    made, views = method(2, Contrast(InfoNCE(0.2)), banks=banks, negatives=30), batch(2)
    views["query"].requires_grad_()
    made(views).loss.backward()
    assert views["query"].grad.abs().sum(1).gt(0).tolist() == [False, False, False, True]


def test_an_image_that_occurs_repeatedly_counts_as_where_it_is_first():
    features = F.normalize(torch.randn(5, 8), dim=1)
    torch.manual_seed(0)
    once = Bank(IMAGES, 8, 0.5)
    torch.manual_seed(0)
    repeatedly = Bank(IMAGES, 8, 0.5)
    once.write(torch.tensor([7, 3, 9]), features[[0, 1, 3]], YES)
    repeatedly.write(torch.tensor([7, 3, 7, 9, 3]), features, YES)
    assert torch.equal(once.rows, repeatedly.rows)


def test_reading_is_pure_and_gives_a_copy_of_the_positives():
    bank = numbered(0)
    positive, negatives = bank.read(INDEX, torch.tensor([3, 5, 3]))
    positive.zero_()
    negatives.features.zero_()
    assert torch.equal(bank.rows, numbered(0).rows)
    assert negatives.valid.tolist() == [[True] * 3, [False, True, False], [True] * 3, [True] * 3]


def test_a_query_meets_the_other_modality_and_never_its_own_image():
    contrast = Recorder()
    method(2, contrast)(batch(2))
    for m, task in enumerate(contrast.tasks):
        other = 1000 * (1 - m)
        assert torch.equal(task.query, batch(2)["query"][:, 8 * m : 8 * m + 8])
        assert torch.equal(task.positive[:, 0].long(), INDEX + other)
        rows = task.negatives[0].features[:, 0].long()
        assert rows.min() >= other and rows.max() < other + IMAGES
        assert torch.equal(task.negatives[0].valid, rows != INDEX[:, None] + other)
        assert not task.negatives[0].valid.all()
        assert torch.equal(task.weight, torch.ones(4))


def test_one_modality_meets_itself():
    contrast = Recorder()
    method(1, contrast)(batch(1))
    (task,) = contrast.tasks
    assert torch.equal(task.positive[:, 0].long(), INDEX) and task.negatives[0].features.max() < IMAGES


def test_draws_are_a_function_of_seed_and_step_alone():
    one, other = drawn()
    assert torch.equal(one, other) and len(one) == 500  # both modalities meet the same images
    assert len(one.unique()) == IMAGES  # uniform, with replacement
    assert torch.equal(one, drawn(index=INDEX + 1)[0]) and torch.equal(one, drawn(modalities=1)[0])
    for change in ({"step": 6}, {"seed": 4}):
        assert not torch.equal(one, drawn(**change)[0])


def test_the_loss_is_the_sum_of_both_directions_and_trains_the_queries_alone():
    torch.manual_seed(0)
    banks = [written() for _ in range(2)]
    made, views = method(2, Contrast(InfoNCE(0.2)), banks=banks, negatives=30), batch(2)
    views["query"].requires_grad_()
    before = [bank.rows.clone() for bank in banks]
    out = made(views)
    out.loss.backward()
    index = torch.randint(IMAGES, (30,), generator=Draws(3, 5, INDEX).shared("bank"))
    query, expected = views["query"].detach().double().numpy(), 0
    for m in range(2):
        memory = before[1 - m].double().numpy()
        losses = []
        for q, own in zip(query[:, 8 * m : 8 * m + 8], INDEX.tolist()):
            scores = [q @ memory[own], *(q @ memory[j] for j in index.tolist() if j != own)]
            losses.append(np.log(np.exp(np.array(scores) / 0.2).sum()) - scores[0] / 0.2)
        expected += np.mean(losses)
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)
    assert views["query"].grad.abs().sum(1).gt(0).all()
    assert not any(x.requires_grad for x in made.buffers()) and not list(made.parameters())
    assert all(torch.equal(bank.rows, rows) for bank, rows in zip(banks, before))  # until the step is over

    made.after_step(out, 5)
    for m, (bank, rows) in enumerate(zip(banks, before)):
        features = views["query"].detach()[:, 8 * m : 8 * m + 8]
        moved = F.normalize(0.5 * rows[INDEX] + 0.5 * features, dim=1)
        torch.testing.assert_close(bank.rows[INDEX], moved)
        assert not bank.rows.requires_grad
