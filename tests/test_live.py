"""What a run shows while it trains: every statistic against its formula, the names, and when the device is asked."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import pdist
from scipy.stats import mannwhitneyu

from learning.draws import Draws
from learning.interrupt import Interrupt
from learning.losses import Cosine, InfoNCE
from learning.methods.base import Contrast, Rewriting
from learning.progress import GradientNorms
from memory import look
from memory.feature_transform import Coefficient, NegativeTransform, PositiveTransform
from memory.stores import Queue
from memory.task import CHUNK, Negatives, Task
from tests.test_checkpoints import scalars
from tests.test_training import FT, ROOT, HostReads, few_pictures, objects, records, train, train_epoch  # noqa: F401

DRAWS = Draws(0, 4, torch.arange(6))
TRANSFORMS = [PositiveTransform(Coefficient(2.0, "sample")), NegativeTransform(Coefficient(1.6, "dim"))]


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def task(k=40, masked=True):
    valid = torch.rand(6, k, generator=torch.Generator().manual_seed(5)) > 0.3 if masked else None
    return Task("image0", unit(6, 8, seed=1), unit(6, 8, seed=2), (Negatives(unit(k, 8, seed=3), valid),))


def looked(task, **rewriting):
    return Contrast(InfoNCE(0.2), Rewriting(look_every=5, **rewriting))([task], DRAWS).looked


def assert_distributions(values, prefix, positive, negative):
    """positive (N,), negative (M,): those that count."""
    low, high = values["histogram_range"]
    for name, x in (("positive", positive), ("negative", negative)):
        counts, _ = np.histogram(x.clip(low, high), look.BINS, (low, high))
        np.testing.assert_allclose(values[f"{prefix}{name}_histogram"], counts / len(x), atol=1e-5)
        np.testing.assert_allclose(values[f"{prefix}{name}_quantiles"], np.quantile(x, look.QUANTILES), atol=1e-5)
    above = mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative))
    assert values[f"{prefix}auc"] == pytest.approx(above, abs=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_distributions_before_and_after_the_transformation(masked):
    original = task(masked=masked)
    values = look.measured(looked(original, transforms=TRANSFORMS, before=True))
    for prefix, version in (("before_", original), ("", Rewriting(TRANSFORMS)(original, DRAWS))):
        positive, negative = (x.double().numpy() for x in version.scores())
        assert_distributions(values, prefix, positive, negative[np.isfinite(negative)])


def test_embeddings_are_those_before_the_transformation():
    values, original = look.measured(looked(task(), transforms=TRANSFORMS)), task()
    q, k = original.query.double().numpy(), original.positive.double().numpy()
    assert values["alignment"] == pytest.approx(((q - k) ** 2).sum(1).mean(), abs=1e-5)
    assert values["uniformity"] == pytest.approx(np.log(np.exp(-2 * pdist(q, "sqeuclidean")).mean()), abs=1e-5)
    share = np.linalg.svd(q, compute_uv=False)
    share /= share.sum()
    assert values["effective_rank"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), abs=1e-4)
    assert not any(name.startswith("before") for name in values)


def test_embeddings_of_any_length_are_compared_on_the_sphere():
    plain = task()
    longer = Task("image0", 9 * plain.query, 3 * plain.positive, plain.negatives)
    ours, theirs = look.measured(looked(longer)), look.measured(looked(plain))
    for name in ("alignment", "uniformity", "effective_rank"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-4)
    assert ours["histogram_range"] == [-16, 16] and theirs["histogram_range"] == [-1, 1]


@pytest.mark.parametrize("n, d", [(30, 8), (8, 30)])
def test_extremes_of_uniformity_and_rank(n, d):
    same, apart = unit(1, d).expand(n, d), torch.eye(n, d)
    assert look.uniformity(same).item() == pytest.approx(0, abs=1e-5)
    assert look.effective_rank(same).item() == pytest.approx(1, abs=1e-3)
    assert look.effective_rank(apart).item() == pytest.approx(min(n, d), abs=1e-4)
    assert look.uniformity(unit(2000, 128)).item() == pytest.approx(-4 + 8 / 128, abs=0.01)


def test_scores_that_are_all_equal_have_an_auc_of_one_half():
    same = unit(1, 8).expand(6, 8)
    values = look.measured(looked(Task("image0", same, same, (Negatives(same),))))
    assert values["auc"] == 0.5 and values["histogram_range"] == [-1, 1] and values["positive_histogram"][-1] == 1


def test_without_negatives_there_is_nothing_about_them():
    alone = Contrast(Cosine(0, 1), Rewriting(look_every=5))
    values = look.measured(alone([Task("image", unit(6, 8), unit(6, 8, seed=1))], DRAWS).looked)
    assert not any("negative" in name or "auc" in name for name in values) and values["alignment"] > 0


@pytest.mark.parametrize("k", [7, 100, CHUNK + 1, 3 * CHUNK - 5])
def test_a_thinned_task_has_evenly_spaced_negatives(k):
    original = task(k)
    for version in (original, NegativeTransform(Coefficient(1.6, "dim"))(original, DRAWS)):
        _, negative = version.scores()
        _, few = version.thinned(60).scores()
        assert k / 2 <= few.shape[1] * math.ceil(k / 60) < 2 * k and few.shape[1] <= 60
        torch.testing.assert_close(few, negative[:, :: math.ceil(k / 60)])


@pytest.mark.parametrize("masked", [True, False])
def test_gradient_of_the_positive_score(masked):
    """By autograd, and from the columns of a score file."""
    original = task(masked=masked)
    positive, negative = original.scores()
    positive.requires_grad_()
    logits = torch.cat([positive[:, None], negative], 1) / 0.2
    (gradient,) = torch.autograd.grad(-logits.log_softmax(1)[:, 0].sum(), positive)
    out = Contrast(InfoNCE(0.2))([original], DRAWS)
    assert out.stats["positive_gradient"].item() == pytest.approx(gradient.abs().mean().item(), rel=1e-5)
    count = negative.isfinite().sum(1)
    share = 1 / (1 + count * (out.scores[:, 4] - out.scores[:, 5]).exp())
    torch.testing.assert_close((1 - share) / 0.2, -gradient)
    assert out.stats["negative_max"].item() == pytest.approx(negative.amax(1).mean().item())


@pytest.mark.parametrize("size, n", [(10, 4), (12, 4), (4, 4)])
def test_queue_age(size, n):
    queue = Queue(size, 2)
    for step in range(8):
        queue.write(torch.full((n, 2), float(step)), torch.tensor(True))
        written = [queue.keys[i, 0].item() for i in range(min((step + 1) * n, size))]
        assert queue.age(n).item() == pytest.approx(np.mean([step + 1 - when for when in written]))


def test_gradient_norms_are_of_layers_without_the_scale_and_finite():
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    guard = SimpleNamespace(scaler=scaler, optimizer=torch.optim.SGD(layer.parameters(), 0.0))
    norms = GradientNorms(2)
    for step, factor in enumerate((3, 1, 3, math.inf)):
        guard.optimizer.zero_grad()
        scaler.scale(layer(torch.ones(5, 3)).sum() * factor).backward()
        norms.observe(step, layer, guard)
        scaler.step(guard.optimizer)
        scaler.update()
    loss = layer(torch.ones(5, 3)).sum()
    expected = torch.autograd.grad(loss, layer[0].parameters())
    ((step, found),) = norms.take()
    assert step == 2 and found.keys() == {"0", "1"} and not norms.seen
    assert found["0"] == pytest.approx(torch.cat([x.flatten() for x in expected]).norm().item())


SCORES = {"positive_histogram", "positive_quantiles", "alignment", "uniformity", "effective_rank", "histogram_range"}
CONTRASTIVE = {"negative_histogram", "negative_quantiles", "auc"}


def test_log_and_tensorboard_have_the_same_names(tmp_path):
    folder = train(tmp_path, FT, "--epochs 2 --grad_norms 3")
    steps, looks, gradients = (records(folder, kind) for kind in ("step", "scores", "gradients"))
    assert [line["step"] for line in looks] == [line["step"] for line in steps] == [2, 4, 6]
    assert [(line["step"], line["epoch"]) for line in gradients] == [(3, 1), (6, 2)]
    before = {f"before_{name}" for name in CONTRASTIVE | {"positive_histogram", "positive_quantiles"}}
    assert looks[0].keys() == {"kind", "epoch", "step"} | SCORES | CONTRASTIVE | before
    assert {"negative_max", "before_negative_max", "positive_gradient", "queue_age", "feature_std"} <= steps[0].keys()
    assert [line["queue_age"] for line in steps] == pytest.approx([1.25, (1.8 + 1.8) / 2, 1.8])
    page = (ROOT / "docs" / "running.md").read_text()
    assert not [name for line in (*steps, *looks) for name in line if f"`{name.removeprefix('before_')}`" not in page]
    tags = scalars(tmp_path / "tb" / "run")
    for kind, lines in (("step", steps), ("scores", looks)):
        for name in lines[0].keys() - {"kind", "epoch", "step"}:
            numbers = [line[name] for line in lines]
            if name.endswith("_quantiles"):
                name, numbers = name.replace("quantiles", "q05"), [x[0] for x in numbers]
            if isinstance(numbers[0], float):
                assert tags[f"{kind}/{name}"] == [(s, pytest.approx(x)) for s, x in zip((2, 4, 6), numbers)]
    assert {f"gradients/norms/{layer}" for layer in gradients[0]["norms"]} <= tags.keys()
    assert {"encoder.backbones.0.conv1", "encoder.heads.0.0"} <= gradients[0]["norms"].keys()


@pytest.mark.parametrize(
    "flags, contrastive",
    [
        ("--method SimSiam --ft_pos extrapolate", False),
        ("--method BYOL", False),
        ("--method SwAV --ft_pos extrapolate --prototypes 10 --small_crops 0 --queue_size 0", True),
        (f"--method SupCon {FT}", True),
        (f"--method SimCLR {FT}", True),
        ("--method InsDis --loss nce", True),
        ("--method CMC", True),
        ("--head linear_wo_norm --amp bf16 --accumulate 2", True),
    ],
)
def test_every_kind_of_method_shows_its_scores(tmp_path, flags, contrastive):
    (line,) = records(train(tmp_path, flags, "--epochs 1 --warmup_epochs 0"), "scores")
    assert line.keys() >= SCORES | (CONTRASTIVE if contrastive else set())
    assert ("auc" in line) == contrastive and ("before_positive_histogram" in line) == ("ft_pos" in flags)
    numbers = [x for value in line.values() if isinstance(value, list) for x in value]
    assert np.isfinite([*numbers, line["alignment"], line["uniformity"], line["effective_rank"]]).all()
    assert all(sum(x) == pytest.approx(1, abs=1e-3) for name, x in line.items() if name.endswith("histogram"))


def test_a_large_batch_is_looked_at_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(look, "QUERIES", 5)
    (line,) = records(train(tmp_path, "--epochs 1 --print_freq 3"), "scores")
    shares = 4 * np.array(line["positive_histogram"])  # 16 queries, of which every fourth
    assert shares.sum() == 4 and (shares == shares.round()).all()


@pytest.mark.parametrize("stopped_at", [2, 4])
def test_a_stop_between_a_gradient_and_its_log_line_loses_nothing(tmp_path, monkeypatch, stopped_at):
    flags = f"{FT} --epochs 2 --print_freq 3 --grad_norms 2"
    whole = train(tmp_path / "whole", flags)
    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "__call__", lambda self, step: step == stopped_at)
        train(tmp_path / "parts", flags)
    parts = train(tmp_path / "parts", flags, "--resume", str(tmp_path / "parts" / "run"))
    assert [line["step"] for line in records(whole, "gradients")] == [2, 4, 6]
    for kind in ("scores", "gradients"):
        assert records(whole, kind) == records(parts, kind)
    assert scalars(whole.parent / "tb" / "run") == scalars(parts.parent / "tb" / "run")


def test_how_often_a_run_is_looked_at_changes_nothing(tmp_path):
    seldom, often = (train(tmp_path / freq, FT, f"--epochs 1 --print_freq {freq} --grad_norms {freq}") for freq in "31")
    states = [torch.load(folder / "current.pth")["method"] for folder in (seldom, often)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert [records(folder, "scores")[-1] for folder in (seldom, often)] == [records(seldom, "scores")[0]] * 2


def test_the_device_is_asked_at_log_lines_alone():
    training = objects(FT, "--print_freq 2 --grad_norms 1")
    training.loader.set_epoch(0)
    batches = list(training.loader)
    with HostReads() as reads:
        train_epoch(training, batches)
    names = [{frame.name for frame in stack} for _, stack in reads.seen]
    elsewhere = [stack for stack in names if not stack & {"generator", "_log_line"}]
    assert not elsewhere and any("measured" in stack for stack in names)
