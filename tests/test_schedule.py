"""Learning rates against published values."""

import pytest

from learning.schedule import Schedule, cosine


def test_cosine_of_moco_v2():
    rates = [cosine(e / 200, 0.03) for e in (0, 1, 50, 100, 150, 199)]
    assert rates == pytest.approx([0.03, 0.02999815, 0.0256066, 0.015, 0.0043934, 0.00000185], abs=1e-8)


def test_cosine_per_epoch_counts_from_one_and_ends_at_its_floor():
    schedule = Schedule(base=0.5, epochs=1000, steps_per_epoch=3, cosine=True, per="epoch")
    rates = [schedule(3 * (epoch - 1) + i) for epoch in (10, 500, 1000) for i in (0, 2)]
    assert rates == pytest.approx([0.49987676] * 2 + [0.25025] * 2 + [0.0005] * 2, abs=1e-8)


def test_cosine_per_step_moves_with_every_step_from_the_full_rate():
    schedule = Schedule(base=0.03, epochs=10, steps_per_epoch=7, cosine=True)
    rates = [schedule(step) for step in range(70)]
    assert rates[0] == 0.03 and all(later < earlier for earlier, later in zip(rates, rates[1:]))
    assert schedule(70) == pytest.approx(0.03e-3)


def test_steps_drop_after_their_epoch():
    schedule = Schedule(base=30, epochs=100, steps_per_epoch=2, cosine=False, milestones=(60, 80))
    assert [schedule(2 * epoch) for epoch in (0, 59, 60, 79, 80, 99)] == pytest.approx([30, 30, 3, 3, 0.3, 0.3])


@pytest.mark.parametrize("is_cosine", [True, False])
def test_warm_up_is_linear_from_a_tenth_and_joins_the_schedule(is_cosine):
    plain = Schedule(base=0.1, epochs=20, steps_per_epoch=4, cosine=is_cosine, milestones=(10,))
    schedule = Schedule(base=0.1, epochs=20, steps_per_epoch=4, cosine=is_cosine, milestones=(10,), warmup_epochs=5)
    rates = [schedule(step) for step in range(80)]
    assert rates[0] == pytest.approx(0.01) and rates[20:] == [plain(step) for step in range(20, 80)]
    gaps = [later - earlier for earlier, later in zip(rates[:20], rates[1:20])]
    assert gaps == pytest.approx([gaps[0]] * 19) and gaps[0] > 0
    assert rates[19] + gaps[0] == pytest.approx(plain(19))
