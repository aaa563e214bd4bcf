"""The benchmark: every group of rows runs, both sides of a row do the same work, and mistakes are sentences."""

import pytest
import torch

from scripts import benchmark

CPU = torch.device("cpu")
TINY = ["--tiny", "--rounds", "1", "--device", "cpu"]


@pytest.fixture
def pairs():
    torch.manual_seed(0)
    return benchmark.Pairs(6, 5000, 16, CPU)


@pytest.mark.parametrize("flags", ["", "--no_one_pass"])
def test_both_sides_of_the_head_have_the_same_loss_and_gradient(pairs, flags):
    found = []
    for side in (pairs.published, pairs.here(flags)):
        found.append((side(), pairs.query.grad))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_the_head_without_statistics_has_the_same_loss_and_gradient(pairs):
    found = [(side(), pairs.query.grad) for side in (pairs.here(f"{benchmark.FT} --no_pre_scores"), pairs.bare)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", ["batch", "dim"])
def test_the_published_recipe_transforms_as_the_program_does(pairs, level):
    """With lambda no more than one number, and that of the mixture 1, which leaves the permutation without effect."""
    lam = benchmark.NEGATIVE  # what `beta` is asked for tells the two masks apart

    def beta(alpha, _, size=None):
        value = 1.0 if alpha == lam else 0.25
        return value if size is None else benchmark.np.full(size, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark.np.random, "beta", beta)
        loss = pairs.published(level)
    query, positive = (1.25 * a - 0.25 * b for a, b in ((pairs.query, pairs.positive), (pairs.positive, pairs.query)))
    scores = torch.cat([(query * positive).sum(1, keepdim=True), query @ pairs.keys.T], 1) / benchmark.TEMPERATURE
    torch.testing.assert_close(loss, (scores.logsumexp(1) - scores[:, 0]).mean().detach())


def _unmade():
    raise RuntimeError("no such thing")


def _failing():
    return _unmade


def test_a_reference_that_fails_apart_is_one_sentence():
    for apart in [benchmark.Apart(make) for make in (_unmade, _failing)]:
        with pytest.raises(ValueError, match="the reference failed: .*no such thing"):
            apart()


@pytest.mark.parametrize("name, count", [("head", 11), ("statistics", 4), ("data", 6), ("training", 2)])
def test_rows(name, count, capsys):
    assert benchmark.main([name, *TINY]) == 0
    table, advice = capsys.readouterr().out.split("\nWhat would be faster here:\n")
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + count and {row.count("|") for row in rows} == {6}
    assert "`--amp`" in advice


def test_a_step_that_looks_measures_what_it_sees(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(benchmark.SilentRun, "record", lambda self, kind, **values: seen.append(kind))
    step = benchmark.Here(benchmark.CIFAR, benchmark.Setting(CPU, 1, True, tmp_path))
    for _ in range(12):
        step()
    assert not seen
    step(print_freq=1)
    assert seen == ["step", "scores"]


def test_shares_are_of_the_whole(capsys):
    benchmark.main(["shares", *TINY])
    rows = [line for line in capsys.readouterr().out.splitlines() if "one core" in line]
    assert len(rows) == 2
    for row in rows:
        parts = [float(part.split()[-1]) for part in row.split("%")[:-1]]
        assert len(parts) == 8 and 70 < sum(parts) <= 100.5


def test_start_and_scaling(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "logged", lambda flags: iter([(3.0, "10"), (4.0, "20")]))
    assert benchmark.main(["start", "scaling", *TINY]) == 0
    out = capsys.readouterr().out
    assert "| main_contrast.py, first step, built-in pictures |  | 3.0 s |  | < 10 s |" in out
    assert out.count("| 20 images/s |") == 2 and out.count(" ms, ") == 3


def test_steps_of_the_program_are_timed_and_it_ends():
    small = "--width 0.125 --batch_size 8 --queue_size 16 --feat_dim 16 --print_freq 1 --num_workers 0 --device cpu"
    lines = benchmark.logged(small)
    (first, _), (second, speed) = next(lines), next(lines)
    lines.close()
    assert 0 < first < second and float(speed) > 0


def test_memory_that_a_call_takes():
    found = benchmark.extra_bytes(lambda: torch.ones(5_000_000).add_(1), CPU)
    assert 18e6 < found < 30e6


def test_times_are_medians_after_a_warm_up(monkeypatch):
    times = iter([0, 100, 100, 200, 0, 1, 0, 5, 0, 2, 0, 6, 0, 3, 0, 70])
    monkeypatch.setattr(benchmark, "clock", lambda: next(times))
    assert benchmark.alternate({"a": list, "b": list}, 3) == {"a": 2, "b": 6}


def test_goals():
    assert benchmark.faster("x", {"reference": 2, "here": 1}, goal=2) == "| x | 2,000 ms | 1,000 ms | 2.0 x | >= 2 x |"
    assert [benchmark.digits(x) for x in (0.0123, 999.4, 999.6, 12345.6)] == ["0.0123", "999", "1,000", "12,346"]
    missed = benchmark.faster("x", {"reference": 2, "here": 1}, images=8, goal=3)
    assert missed == "| x | 4 images/s | 8 images/s | 2.0 x | >= 3 x, missed |"
    assert benchmark.share("x", 0.04, 1, 0.03).endswith("| 4.00% | <= 3.0%, missed |")


def test_mistakes_are_sentences(tmp_path, capsys):
    for argv, said in ((["heads"], "no row heads"), (["--rounds", "0"], "--rounds 0")):
        with pytest.raises(SystemExit) as end:
            benchmark.main(argv)
        assert end.value.code == 2 and said in capsys.readouterr().err
    assert benchmark.main(["data", "--data_folder", str(tmp_path / "nowhere"), *TINY]) == 1
    assert "benchmark.py: " in capsys.readouterr().err
