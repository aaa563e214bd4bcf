from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datasets import recipes
from datasets.loader import EvalLoader, TrainLoader
from datasets.sources import Source
from learning import parallel
from learning.evaluations.features import Cached, Live, extract
from learning.evaluations.knn import evaluate, knn
from learning.evaluations.linear import Probe, hits
from learning.schedule import Schedule
from models.encoder import Encoder


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def source(n, classes=3, seed=0, size=16):
    """Pictures of one colour per class plus noise."""
    labels = torch.arange(n) % classes
    noise = torch.randint(0, 60, (n, 3, size, size), generator=torch.Generator().manual_seed(seed))
    images = (noise + 60 * labels.view(-1, 1, 1, 1)).byte()
    return Source("test", images, labels, tuple("abcdefgh"[:classes]), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def encoder():
    torch.manual_seed(0)
    return Encoder(arch="resnet18", width=0.125, stem="small", head="mlp", feat_dim=8).eval()


def eval_loader(data, **options):
    return EvalLoader(data, recipes.evaluation(16, data.mean, data.std), batch_size=7, **options)


# --- features


def test_extract_is_complete_and_in_order():
    data, network = source(20), encoder()
    features, labels = extract(network.features, eval_loader(data))
    images = (data.images / 255 - 0.5) / 0.25
    with torch.no_grad():
        torch.testing.assert_close(features, network.features(images))
    assert torch.equal(labels, data.labels) and not features.requires_grad


def test_cached_features_are_dealt_like_images():
    data = source(20)
    loader = TrainLoader(data, recipes.probe(16, (1.0, 1.0), data.mean, data.std), batch_size=6, seed=3)
    cached = Cached(torch.arange(20.0)[:, None], data.labels, batch_size=6, seed=3)
    for epoch in range(2):
        loader.set_epoch(epoch)
        cached.set_epoch(epoch)
        dealt = [features[:, 0].long().tolist() for features, _ in cached]
        assert dealt == [batch["index"].tolist() for batch in loader]
    assert len(cached) == len(loader) == 3


# --- k-NN


def knn_by_hand(train, train_y, test, test_y, *, k, temperature, n_class):
    """One test image at a time, in numpy."""
    train, test = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train.double().numpy(), test.double().numpy())
    )
    top1 = top5 = 0
    for x, y in zip(test, test_y.numpy()):
        cosine = train @ x
        nearest = np.argsort(-cosine)[:k]
        votes = np.zeros(n_class)
        for i in nearest:
            votes[train_y[i]] += np.exp(cosine[i] / temperature)
        ranked = np.argsort(-votes)
        top1 += ranked[0] == y
        top5 += y in ranked[:5] and votes[y] > 0
    return {"top1": 100 * top1 / len(test), "top5": 100 * top5 / len(test)}


def random_sets(n_class):
    g = torch.Generator().manual_seed(1)
    centres = torch.randn(n_class, 6, generator=g)
    train_y, test_y = torch.randint(n_class, (90,), generator=g), torch.randint(n_class, (41,), generator=g)
    train, test = (centres[y] + 1.5 * torch.randn(len(y), 6, generator=g) for y in (train_y, test_y))
    return train, train_y, test, test_y


@pytest.mark.parametrize("k", [1, 5, 500])
@pytest.mark.parametrize("n_class", [3, 12])
def test_knn_equals_the_definition(k, n_class, monkeypatch):
    monkeypatch.setattr("learning.evaluations.knn.CHUNK", 90 * 16)  # three chunks
    sets = random_sets(n_class)
    settings = {"k": k, "temperature": 0.1, "n_class": n_class}
    found = knn(*sets, **settings)
    assert found == pytest.approx(knn_by_hand(*sets, **settings))
    assert found["top1"] < found["top5"] or k == 1


def test_knn_at_a_low_temperature_is_the_nearest_neighbour():
    sets = random_sets(5)
    nearest = knn(*sets, k=1, temperature=1.0, n_class=5)["top1"]
    assert knn(*sets, k=90, temperature=1e-4, n_class=5)["top1"] == nearest


def test_a_class_without_votes_is_no_answer():
    train, test = torch.eye(2), torch.eye(2)
    found = knn(train, torch.tensor([0, 0]), test, torch.tensor([3, 4]), k=2, temperature=0.1, n_class=5)
    assert found == {"top1": 0, "top5": 0}


def test_knn_of_an_encoder_reports_trunk_and_head():
    network, train, test = encoder().train(), source(30), source(12, seed=1)
    found = evaluate(network, eval_loader(train), eval_loader(test), k=5, temperature=0.1, n_class=3)
    assert network.training
    network.eval()
    for name, forward in (("backbone", network.features), ("head", lambda images: network(images)[0])):
        sets = (*extract(forward, eval_loader(train)), *extract(forward, eval_loader(test)))
        assert found[name] == pytest.approx(knn_by_hand(*sets, k=5, temperature=0.1, n_class=3))
    assert found["backbone"]["top1"] > 60


# --- linear probe


def probe(dim, *, epochs=3, steps=4, n_class=3, lr=1.0, **changes):
    schedule = Schedule(base=lr, epochs=epochs, steps_per_epoch=steps, cosine=False, milestones=(2,))
    options = {"momentum": 0.9, "weight_decay": 0.0, "seed": 5, "device": torch.device("cpu"), **changes}
    return Probe(dim, n_class, schedule=schedule, **options)


def fit(p, train, test, every=1000):
    reports = []
    for _ in p.epochs(train, test, report=lambda *line: reports.append(line), every=every):
        pass
    return reports


def blobs(n=24, n_class=3):
    g = torch.Generator().manual_seed(2)
    labels = torch.arange(n) % n_class
    return torch.randn(n_class, 5, generator=g)[labels] + 0.5 * torch.randn(n, 5, generator=g), labels


def test_probe_equals_hand_written_sgd():
    x, y = blobs()
    p = probe(5)
    weight, bias = p.classifier.weight.detach().clone(), p.classifier.bias.detach().clone()
    assert 0.005 < weight.std() < 0.02 and bias.eq(0).all()
    cached = Cached(x, y, batch_size=6, seed=0)
    fit(p, cached, [(x, y)])

    speed_w, speed_b = torch.zeros_like(weight), torch.zeros_like(bias)
    for epoch in range(3):
        cached.set_epoch(epoch)
        losses = []
        for features, labels in cached:
            probabilities = (features @ weight.T + bias).softmax(1)
            losses.append(-probabilities[torch.arange(6), labels].log().mean())
            error = (probabilities - F.one_hot(labels, 3)) / 6
            speed_w, speed_b = 0.9 * speed_w + error.T @ features, 0.9 * speed_b + error.sum(0)
            lr = 1.0 if epoch < 2 else 0.1
            weight, bias = weight - lr * speed_w, bias - lr * speed_b
        assert p.history[epoch]["train_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    torch.testing.assert_close(p.classifier.weight.detach(), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(p.classifier.bias.detach(), bias, rtol=1e-4, atol=1e-5)
    logits = x @ weight.T + bias
    assert p.history[-1]["test_acc"] == pytest.approx(100 * (logits.argmax(1) == y).float().mean().item())
    assert p.history[-1]["test_loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-4)
    assert p.history[-1]["test_acc5"] == 100


def test_probe_on_live_images_leaves_the_encoder_alone():
    data, network = source(24), encoder()
    before = {name: x.clone() for name, x in network.state_dict().items()}
    loader = TrainLoader(data, recipes.probe(16, (0.5, 1.0), data.mean, data.std), batch_size=8, seed=0)
    p = probe(network.feature_dim, steps=3, lr=30.0, epochs=5)
    reports = fit(p, Live(network.features, loader), Live(network.features, eval_loader(data)), every=2)
    assert [line[:2] for line in reports] == [(1, 2), (2, 4), (2, 6), (3, 8), (4, 10), (4, 12), (5, 14)]
    assert p.history[-1]["test_acc"] > 60
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())


def test_resumed_probe_equals_an_uninterrupted_one():
    x, y = blobs()
    whole, first, second = probe(5), probe(5), probe(5, seed=99)
    cached = Cached(x, y, batch_size=6, seed=0)
    fit(whole, cached, [(x, y)])
    next(first.epochs(cached, [(x, y)], report=print, every=1000))
    second.load_state_dict(first.state_dict())
    fit(second, cached, [(x, y)])
    assert second.history == whole.history
    assert torch.equal(second.classifier.weight, whole.classifier.weight)


def test_best_is_the_first_epoch_of_highest_accuracy():
    p = probe(5)
    p.history = [{"epoch": e, "test_acc": acc} for e, acc in ((1, 10.0), (2, 30.0), (3, 30.0), (4, 20.0))]
    assert p.best["epoch"] == 2


def test_a_diverging_probe_is_a_sentence():
    x, y = blobs()
    with pytest.raises(FloatingPointError, match="lower --learning_rate"):
        fit(probe(5, lr=1e30), Cached(1e10 * x, y, batch_size=6, seed=0), [(x, y)])


def test_hits():
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]])
    assert hits(logits, torch.tensor([0, 0])).tolist() == [1, 1]
    assert hits(logits, torch.tensor([4, 5])).tolist() == [1, 2]
    assert hits(logits[:, :3], torch.tensor([1, 2])).tolist() == [1, 2]


# --- several processes


def _measure(path):
    rank, world = parallel.rank(), parallel.world_size()
    data, test, network = source(24), source(13, seed=1), encoder()
    share = {"rank": rank, "world_size": world}
    features, labels = extract(network.features, eval_loader(test, **share))
    train = extract(network.features, eval_loader(data, **share))
    nearest = knn(*train, features, labels, k=5, temperature=0.1, n_class=3)
    p = probe(network.feature_dim, lr=5.0)
    fit(p, Cached(*train, batch_size=6, seed=0, **share), list(Live(network.features, eval_loader(test, **share))))
    weight = p.classifier.weight.detach()
    torch.save({"features": features, "labels": labels, "knn": nearest, "history": p.history, "weight": weight}, path)


def _measure_as_rank(options):
    torch.set_num_threads(1)
    _measure(f"{options.folder}/{parallel.rank()}.pth")


def test_two_processes_measure_the_same_as_one(tmp_path):
    _measure(tmp_path / "alone.pth")
    options = {"nprocs": 2, "world_size": 1, "node_rank": 0, "dist_url": "", "dist_backend": "gloo", "device": "cpu"}
    parallel.launch(_measure_as_rank, SimpleNamespace(**options, gpu=None, folder=str(tmp_path)))
    alone, *ranks = (torch.load(tmp_path / f"{name}.pth") for name in ("alone", 0, 1))
    for found in ranks:
        assert torch.equal(found["labels"], alone["labels"])
        torch.testing.assert_close(found["features"], alone["features"])
        assert found["knn"] == pytest.approx(alone["knn"])
        torch.testing.assert_close(found["weight"], alone["weight"])
        assert len(found["history"]) == 3
        for one, two in zip(alone["history"], found["history"]):
            assert two == pytest.approx(one, rel=1e-4)
