import dataclasses
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datasets import recipes
from datasets.colours import colours
from datasets.loader import EvalLoader, TrainLoader
from datasets.sources import IMAGENET, Source
from learning import checkpoint, launch, parallel, subject
from learning.evaluation import evaluate as run_evaluation
from learning.evaluations.features import Cached, Live, extract
from learning.evaluations.knn import evaluate, knn
from learning.evaluations.linear import Probe, hits
from learning.schedule import Schedule
from models.encoder import Encoder
from options import contrast, linear
from options.presets import METHODS


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def source(n, classes=3, seed=0, size=16):
    """Pictures of one colour per class plus noise."""
    labels = torch.arange(n) % classes
    noise = torch.randint(0, 60, (n, 3, size, size), generator=torch.Generator().manual_seed(seed))
    images = (noise + 60 * labels.view(-1, 1, 1, 1)).byte()
    return Source(images, labels, tuple("abcdefgh"[:classes]), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def encoder(**changes):
    torch.manual_seed(0)
    shape = {"arch": "resnet18", "width": 0.125, "stem": "small", "head": "mlp", "feat_dim": 8}
    return Encoder(**shape | changes).eval()


def rgb(data):
    return colours("RGB", "", data.mean, data.std)


def eval_loader(data, **options):
    return EvalLoader(data, recipes.evaluation(16, rgb(data)), batch_size=7, **options)


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
    loader = TrainLoader(data, recipes.probe(16, (1.0, 1.0), rgb(data)), batch_size=6, seed=3)
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


@pytest.mark.parametrize("layer", [None, "layer2", "pool"])
@pytest.mark.parametrize("channels", [(3,), (1, 2)])
def test_knn_of_an_encoder_reports_trunk_and_head(layer, channels):
    network, train, test = encoder(channels=channels).train(), source(30), source(12, seed=1)
    found = evaluate(network, eval_loader(train), eval_loader(test), k=5, temperature=0.1, n_class=3, layer=layer)
    assert network.training
    network.eval()
    forwards = {
        "backbone": lambda images: network.features(images, layer),
        "head": lambda images: torch.cat(network(images), dim=1),
    }
    for name, forward in forwards.items():
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
    loader = TrainLoader(data, recipes.probe(16, (0.5, 1.0), rgb(data)), batch_size=8, seed=0)
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
    forward = partial(network.features, layer="layer3")
    features, labels = extract(forward, eval_loader(test, **share))
    train = extract(forward, eval_loader(data, **share))
    nearest = knn(*train, features, labels, k=5, temperature=0.1, n_class=3)
    p = probe(features.shape[1], lr=1.0)
    fit(p, Cached(*train, batch_size=6, seed=0, **share), list(Live(forward, eval_loader(test, **share))))
    weight = p.classifier.weight.detach()
    torch.save({"features": features, "labels": labels, "knn": nearest, "history": p.history, "weight": weight}, path)


def _measure_as_rank(options):
    torch.set_num_threads(1)
    _measure(f"{options.folder}/{parallel.rank()}.pth")


def test_two_processes_measure_the_same_as_one(tmp_path):
    _measure(tmp_path / "alone.pth")
    options = {"nprocs": 2, "world_size": 1, "node_rank": 0, "dist_url": "", "dist_backend": "gloo", "device": "cpu"}
    launch.launch(_measure_as_rank, SimpleNamespace(**options, gpu=None, folder=str(tmp_path)))
    alone, *ranks = (torch.load(tmp_path / f"{name}.pth") for name in ("alone", 0, 1))
    for found in ranks:
        assert torch.equal(found["labels"], alone["labels"])
        torch.testing.assert_close(found["features"], alone["features"])
        assert found["knn"] == pytest.approx(alone["knn"])
        torch.testing.assert_close(found["weight"], alone["weight"])
        assert len(found["history"]) == 3
        for one, two in zip(alone["history"], found["history"]):
            assert two == pytest.approx(one, rel=1e-4)


# --- the program


@pytest.fixture
def data(tmp_path):
    """A data set of 40 + 15 small pictures in one file."""
    arrays = {}
    for name, part in (("train", source(40)), ("test", source(15, seed=1))):
        arrays[f"{name}_images"] = part.images.permute(0, 2, 3, 1).numpy()
        arrays[f"{name}_labels"] = part.labels.numpy()
    np.savez(tmp_path / "data.npz", **arrays)
    return tmp_path / "data.npz"


def pretrained(folder, data, *argv, **shape):
    """A checkpoint of an encoder of some `shape`, as if it had been trained with `argv` on the data set."""
    sizes = ["--input_res", "16", "--width", "0.125", "--feat_dim", "8"]
    options, _, _ = contrast.parse(["--data_folder", str(data), *sizes, *argv])
    query, key = encoder(**shape).state_dict(), encoder(**shape).state_dict()
    next(iter(key.values())).neg_()
    weights = {f"encoder.{name}": x for name, x in query.items()}
    weights |= {f"momentum_encoder.encoder.{name}": x for name, x in key.items()}
    values = dataclasses.asdict(options) | {"stem": "small"}
    state = {"method": weights, "optimizer": {}, "scaler": {}, "position": {}, "options": values}
    folder.mkdir()
    checkpoint.save(folder / "current.pth", state)
    return folder / "current.pth"


@pytest.fixture
def trained(tmp_path, data):
    return pretrained(tmp_path / "trained", data)


def main_linear(folder, *argv):
    """What main_linear.py does with these arguments; returns the results it wrote."""
    paths = ["--model_path", str(folder / "save"), "--tb_path", str(folder / "tb"), "--num_workers", "0"]
    options, origins, notes = linear.parse([*map(str, argv), *paths])
    run_evaluation(options, origins=origins, notes=notes)
    newest = max((folder / "save").glob("*/results.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text())


PROBE = (
    "--batch_size",
    "10",
    "--epochs",
    "4",
    "--lr_decay_epochs",
    "2,3",
    "--lr",
    "3",
    "--seed",
    "0",
    "--save_freq",
    "1",
)


@pytest.mark.parametrize("cached", [False, True])
def test_linear_probe_of_a_checkpoint(trained, tmp_path, cached):
    ckpt = trained.parent if cached else trained  # the run folder stands for its newest checkpoint
    results = main_linear(tmp_path, "--ckpt", ckpt, *PROBE, *(["--cache_features"] if cached else []))
    folder = tmp_path / "save" / "trained_linear-1"
    assert results["dataset"] == "npz" and results["input_res"] == 16
    assert results["encoder_sha256"] == subject.fingerprint(encoder())
    found = results["linear"]
    assert found["last"]["epoch"] == 4 and found["last"].keys() == {"epoch", "top1", "top5"}
    assert found["best"]["top1"] >= found["last"]["top1"] and "flatters" in found["note"]
    steps = [f"step_{4 * epoch:08}.pth" for epoch in (3, 4)]
    assert sorted(path.name for path in folder.glob("*.pth")) == ["ckpt_epoch_1.pth", "ckpt_epoch_2.pth",
        "ckpt_epoch_3.pth", "ckpt_epoch_4.pth", "current.pth", *steps]  # fmt: skip
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    tags = {"train_acc", "train_acc5", "train_loss", "test_acc", "test_acc5", "test_loss", "learning_rate"}
    assert len(epochs) == 4 and epochs[-1].keys() == tags | {"kind", "epoch", "step"}
    assert [line["learning_rate"] for line in epochs] == pytest.approx([3, 3, 0.3, 0.03])
    assert "quote the last" in (folder / "log.txt").read_text()


def test_the_probe_is_the_same_without_fast_paths(trained, tmp_path, monkeypatch):
    fast = main_linear(tmp_path, "--ckpt", trained, *PROBE)
    monkeypatch.setattr("datasets.augment.separable", None)
    monkeypatch.setattr("learning.evaluation.keep_freed_memory", None)
    monkeypatch.setattr(torch, "channels_last", None)
    off = ("--no_fast_images", "--no_channels_last", "--no_keep_memory")
    slow = main_linear(tmp_path, "--ckpt", trained, *PROBE, *off)
    losses = []
    for folder in ("trained_linear-1", "trained_linear-2"):
        lines = (tmp_path / "save" / folder / "log.jsonl").read_text().splitlines()
        losses += [[line["train_loss"] for line in map(json.loads, lines) if line["kind"] == "epoch"]]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert slow["linear"]["last"] == fast["linear"]["last"]


@pytest.mark.parametrize("cached", [(), ("--cache_features",)])
def test_a_resumed_evaluation_equals_an_uninterrupted_one(trained, tmp_path, cached):
    whole = main_linear(tmp_path, "--ckpt", trained, *PROBE, *cached)
    folder = tmp_path / "save" / "trained_linear-1"
    log = (folder / "log.jsonl").read_text()
    shutil.copy(folder / "ckpt_epoch_2.pth", folder / "current.pth")
    assert main_linear(tmp_path, "--ckpt", trained, *PROBE, *cached, "--resume", "auto") == whole
    assert (folder / "log.jsonl").read_text() == log
    assert [path.name for path in (tmp_path / "save").iterdir()] == ["trained_linear-1"]


def test_of_a_run_folder_the_newest_sound_checkpoint_is_evaluated(trained, tmp_path, capsys):
    shutil.copy(trained, trained.with_name("step_00000007.pth"))
    trained.write_bytes(trained.read_bytes()[:-100])
    main_linear(tmp_path, "--ckpt", trained.parent, "--eval", "knn")
    said = capsys.readouterr().out
    assert (
        f"note: damaged in {trained.parent}: current.pth; taking the newest sound checkpoint, step_00000007.p" in said
    )
    assert (tmp_path / "save" / "trained_knn-1").is_dir()
    with pytest.raises(ValueError, match="current.pth cannot be read as a checkpoint"):
        main_linear(tmp_path, "--ckpt", trained, "--eval", "knn")


def test_knn_of_a_checkpoint_and_of_its_momentum_encoder(trained, tmp_path):
    found = main_linear(tmp_path, "--ckpt", trained, "--eval", "knn")
    assert found["knn"]["k"] == 40  # no more than there are images
    assert found["knn"]["backbone"].keys() == found["knn"]["head"].keys() == {"top1", "top5"}
    other = main_linear(tmp_path, "--ckpt", trained, "--eval", "knn", "--use_ema", "--name", "momentum")
    assert other["encoder_sha256"] != found["encoder_sha256"] == subject.fingerprint(encoder())


@pytest.mark.parametrize("cached", [(), ("--cache_features",)])
def test_a_probe_of_another_layer(trained, tmp_path, cached):
    whole = main_linear(tmp_path, "--ckpt", trained, *PROBE, *cached, "--layer", "3")
    folder = tmp_path / "save" / "trained_layer2_linear-1"
    state = checkpoint.load(folder / "current.pth")
    assert whole["layer"] == "layer2" and state["method"]["weight"].shape == (3, 4 * 4 * 16)
    shutil.copy(folder / "ckpt_epoch_2.pth", folder / "current.pth")
    again = main_linear(tmp_path, "--ckpt", trained, *PROBE, *cached, "--layer", "layer2", "--resume", "auto")
    assert again == whole and [path.name for path in (tmp_path / "save").iterdir()] == [folder.name]
    with pytest.raises(ValueError, match="--layer pool contradicts .*, begun with layer2; resume with its options"):
        main_linear(tmp_path, "--ckpt", trained, *PROBE, *cached, "--resume", folder)


def test_knn_on_another_layer(trained, tmp_path, capsys):
    found = main_linear(tmp_path, "--ckpt", trained, "--eval", "knn", "--layer", "stem")
    network, parts = encoder(), {}
    for name, data in (("train", source(40)), ("test", source(15, seed=1))):
        data = dataclasses.replace(data, mean=IMAGENET[0], std=IMAGENET[1])
        parts[name] = extract(partial(network.features, layer="stem"), eval_loader(data))
    assert found["knn"]["backbone"] == knn(*parts["train"], *parts["test"], k=40, temperature=0.1, n_class=3)
    assert "--eval knn: 4096 features of layer stem\n" in capsys.readouterr().out


def test_an_unknown_layer_is_a_sentence(trained, tmp_path):
    for layer in ("7", "0", "conv5"):
        says = f"resnet18 has no --layer {layer}; choose one of stem, layer1, layer2, layer3, layer4, pool, or 1 to 6."
        with pytest.raises(ValueError, match=says):
            main_linear(tmp_path, "--ckpt", trained, "--layer", layer)


@pytest.mark.parametrize(
    ("argv", "rate"),
    [
        ("--arch resnet50 --width 1", 30),
        ("--arch alexnet --width 1 --layer 5", 0.1),
        ("--method CMC --arch resnet50v2 --width 1", 30),
        ("--method CMC --arch resnet50v3 --width 1", 50),
        ("--arch resnet50x2 --width 2 --layer pool", 50),
        ("--arch resnet50x4 --width 1 --layer layer4", 30),
        ("--arch resnet50x4 --width 1 --lr 2", 2),
    ],
)
def test_the_learning_rate_is_the_published_one(argv, rate):
    options, _, _ = linear.parse(["--dataset", "shapes", *argv.split()])
    options, origins = subject.complete(options, subject.encoder(options)[1])
    assert options.learning_rate == rate
    assert origins.get("learning_rate", "auto: published for").startswith("auto: published for")


def test_features_too_large_to_hold_are_pointed_out(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("learning.evaluation.LARGE", 4 * 55 * 4096 - 1)
    for flags, said in ((["--eval", "knn", "--layer", "1"], True), (["--eval", "knn"], False)):
        main_linear(tmp_path, "--ckpt", trained, *flags)
        assert ("the features of all images take 0 GB of memory, in every process" in capsys.readouterr().out) == said


@pytest.mark.parametrize("arch", ["resnet18", "alexnet"])
def test_an_encoder_of_two_modalities_is_evaluated_in_its_colours(tmp_path, data, arch, capsys):
    argv = ("--method", "CMC", "--view", "Lab", "--arch", arch)
    ckpt = pretrained(tmp_path / "cmc", data, *argv, arch=arch, head="linear", channels=(1, 2))
    found = main_linear(tmp_path, "--ckpt", ckpt, "--modal", "CMC", "--view", "Lab", "--eval", "knn", "--use_ema")
    assert found["colours"] == "Lab" and found["knn"].keys() == {"k", "backbone", "head"}
    assert f"{arch}, width 0.125, small stem, 16 px Lab" in capsys.readouterr().out
    probed = main_linear(tmp_path, "--ckpt", ckpt, *PROBE, "--layer", "2", "--lr", "0.1")
    assert probed["layer"] in ("layer1", "conv2") and probed["linear"]["last"]["top1"] > 60
    with pytest.raises(ValueError, match="--view YCbCr contradicts the checkpoint, trained with Lab"):
        main_linear(tmp_path, "--ckpt", ckpt, "--view", "YCbCr")


def test_colours_of_a_probe_are_those_of_the_encoder(tmp_path, data, monkeypatch):
    seen = {}
    features = Encoder.features
    monkeypatch.setattr(Encoder, "features", lambda self, x, layer=None: seen.update(x=x) or features(self, x, layer))
    ckpt = pretrained(tmp_path / "cmc", data, "--method", "CMC", "--view", "HSV", head="linear", channels=(1, 2))
    main_linear(tmp_path, "--ckpt", ckpt, *PROBE, "--epochs", "1", "--cache_features", "--batch_size", "15")
    images = source(15, seed=1).images / 255
    torch.testing.assert_close(seen["x"], colours("CMC", "HSV", (), ())(images))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arch", "resnet50"], "--arch resnet50 contradicts the checkpoint"),
        (["--method", "MoCo"], "--method MoCo contradicts the checkpoint"),
        (["--modal", "CMC"], "--modal CMC contradicts the checkpoint, trained with RGB"),
        (["--view", "Lab"], "--view Lab contradicts the checkpoint, trained without it"),
        (["--n_class", "2"], "--n_class 2 is below the 3 classes"),
        (["--resume", "TRAINED"], "is not a checkpoint of main_linear.py"),
    ],
)
def test_what_does_not_fit_is_refused(trained, tmp_path, argv, message):
    with pytest.raises(ValueError, match=message):
        main_linear(tmp_path, "--ckpt", trained, *PROBE, *(str(trained) if a == "TRAINED" else a for a in argv))


def test_what_agrees_with_the_checkpoint_is_accepted(trained, tmp_path, capsys):
    main_linear(
        tmp_path, "--ckpt", trained, "--eval", "knn", "--method", "MoCov2", "--arch", "resnet18", "--n_class", "9"
    )
    assert "--n_class 9 is more than the 3 classes" in capsys.readouterr().out


def test_checkpoints_from_before_there_were_colour_spaces_are_of_rgb(trained, tmp_path):
    state = checkpoint.load(trained)
    for name in ("view", "mem", "jigsaw"):
        del state["options"][name]
    checkpoint.save(trained, state)
    found = main_linear(tmp_path, "--ckpt", trained, "--eval", "knn", "--modal", "RGB")
    assert found["colours"] == "RGB" and found["encoder_sha256"] == subject.fingerprint(encoder())


def test_a_learning_rate_beyond_the_features_is_pointed_out(trained, tmp_path, capsys):
    main_linear(tmp_path, "--ckpt", trained, *PROBE, "--lr", "0.001")
    assert "is too large for these features" not in capsys.readouterr().out
    main_linear(tmp_path, "--ckpt", trained, *PROBE, "--lr", "1e6")
    assert "--learning_rate 1e+06 is too large for these features" in capsys.readouterr().out


def test_a_probe_does_not_go_on_with_another_encoder(trained, tmp_path):
    main_linear(tmp_path, "--ckpt", trained, *PROBE)
    state = checkpoint.load(trained)
    state["method"]["encoder.backbones.0.bn1.running_mean"] += 1
    checkpoint.save(trained, state)
    with pytest.raises(ValueError, match="not the encoder this probe was begun on"):
        main_linear(tmp_path, "--ckpt", trained, *PROBE, "--resume", "auto")


def test_images_without_labels_are_refused(trained, monkeypatch):
    options, _, _ = linear.parse(["--ckpt", str(trained)])
    _, values, _ = subject.encoder(options)
    options, _ = subject.complete(options, values)
    unlabelled = dataclasses.replace(source(5), labels=None)
    monkeypatch.setattr("learning.build.source", lambda opt, split: unlabelled)
    with pytest.raises(ValueError, match="has no labels"):
        subject.images(options, values)


def test_other_images_are_normalised_as_in_training(trained):
    options, _, _ = linear.parse(["--ckpt", str(trained), "--dataset", "shapes"])
    _, values, _ = subject.encoder(options)
    options, origins = subject.complete(options, values)
    assert (options.dataset, options.input_res, options.data_folder) == ("shapes", 16, None)
    assert origins.pop("learning_rate").startswith("auto") and origins.pop("layer") == "the last"
    assert origins == {"input_res": "checkpoint"}
    train, test = subject.images(options, values | {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]})
    assert train.mean == test.mean == (0.1, 0.2, 0.3) and train.std == test.std == (0.4, 0.5, 0.6)


def test_an_untrained_encoder_is_the_one_training_starts_from():
    options = linear.LinearOptions(dataset="shapes", width=0.125, head="mlp_bn", seed=7)
    build_encoder, values, _ = subject.encoder(options)
    assert (values["arch"], values["stem"], values["input_res"]) == ("resnet18", "small", 32)
    torch.manual_seed(7)
    start = Encoder(arch="resnet18", width=0.125, stem="small", head="mlp_bn", feat_dim=128)
    assert subject.fingerprint(build_encoder(7)) == subject.fingerprint(start) != subject.fingerprint(build_encoder(8))
    with pytest.raises(ValueError, match="--temperature is about a trained encoder"):
        subject.encoder(dataclasses.replace(options, temperature=0.2))


@pytest.mark.parametrize("method", METHODS)
def test_there_is_an_untrained_encoder_for_every_method(method):
    argv = ["--dataset", "shapes", "--width", "0.125", "--method", method]
    build_encoder, values, _ = subject.encoder(linear.parse(argv)[0])
    network, images = build_encoder(3), torch.zeros(2, 3, 32, 32)
    assert network.channels == ((1, 2) if "CMC" in method else (3,))
    assert [x.shape for x in network(images)] == [(2, values["feat_dim"])] * len(network.channels)


def test_modality_and_view_choose_an_untrained_encoder(tmp_path, data):
    argv = ["--data_folder", data, "--eval", "knn", "--arch", "alexnet", "--width", "0.125", "--input_res", "16"]
    found = main_linear(tmp_path, *argv, "--modal", "CMC", "--view", "YIQ", "--layer", "conv3")
    assert (found["colours"], found["arch"], found["layer"]) == ("YIQ", "alexnet", "conv3")
    assert (tmp_path / "save" / "Scratch_conv3_knn-1").exists()


def test_a_missing_checkpoint_is_one_line(tmp_path):
    command = [sys.executable, Path(__file__).parents[1] / "main_linear.py", "--ckpt", tmp_path / "none.pth"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("main_linear.py: There is no checkpoint at") and ended.stderr.count("\n") == 1
