"""Other people's files: every layout gives the same trunk; what cannot be read is refused in one sentence."""

import argparse
import dataclasses
import json
import os
import pickle
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from learning import build, checkpoint, evaluation, subject, weights
from models.layouts import find_trunk
from models.resnet import resnet
from options import contrast, linear

SIZES = {"width": 0.125, "small_stem": True}


def trunk(seed=0, arch="resnet18", **sizes):
    torch.manual_seed(seed)
    network = resnet(arch, **(sizes or SIZES))
    for name, x in network.state_dict().items():
        if "running" in name:
            x.uniform_(0.5, 2)
    return network.state_dict()


def under(prefix, names):
    return {prefix + name: x for name, x in names.items()}


def head(prefix, last=2):
    return {f"{prefix}{i}.{kind}": torch.zeros(2) for i in range(0, last + 1, 2) for kind in ("weight", "bias")}


def numbered(names, stages=(4, 5, 6, 7)):
    """As in an nn.Sequential of a torchvision network's children."""
    new = {"conv1": "0", "bn1": "1", **{f"layer{i}": str(stage) for i, stage in enumerate(stages, 1)}}
    return {".".join([new[name.split(".")[0]], *name.split(".")[1:]]): x for name, x in names.items()}


def shortcuts(names):
    return {name.replace("downsample", "shortcut"): x for name, x in names.items()}


A, B = trunk(0), trunk(1)  # encoder and moving average
ONE = torch.ones(3)
OPT = argparse.Namespace(model="resnet18", nce_k=16384)
FILES = {
    "MoCo": {"epoch": 200, "arch": "resnet18", "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}},
             "state_dict": under("module.encoder_q.", A | head("fc.")) | under("module.encoder_k.", B | head("fc."))
             | {"module.queue": torch.zeros(8, 4), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}},
    "MoCo, CIFAR notebook": {"state_dict": under("encoder_q.net.", numbered(A, (3, 4, 5, 6)))
                             | under("encoder_k.net.", numbered(B, (3, 4, 5, 6))) | {"encoder_q.net.9.weight": ONE}},
    "MoCo v3": {"state_dict": under("module.base_encoder.", A | head("fc.")) | under("module.momentum_encoder.", B)
                | under("module.predictor.", head(""))},
    "PyContrast": {
        "model": under("module.encoder.", A) | under("module.head.", head("")), "contrast": {"memory": ONE},
        "model_ema": under("encoder.", B) | under("head.", head(""))},
    "CMC InsDis": {"opt": OPT, "model": under("encoder.module.", A | head("fc.", 0)),
                   "model_ema": under("encoder.module.", B)},
    "CMC MoCo": {"opt": OPT, "model": under("module.encoder.module.", A), "contrast": {"memory": ONE}},
    "SupCon": {"opt": OPT, "model": under("encoder.module.", shortcuts(A)) | under("head.", head(""))},
    "SwAV": under("module.", A | under("projection_head.", head("")) | {"prototypes.weight": ONE}),
    "SwAV, nested": {"state_dict": under("module.", A | head("projection_head."))},
    "SimSiam": {"state_dict": under("module.encoder.", A | head("fc.", 6)) | under("module.predictor.", head(""))},
    "VISSL": {"phase_idx": 3, "classy_state_dict": {"base_model": {"model": {
        "trunk": under("_feature_blocks.", A), "heads": {"0.clf.0.weight": torch.ones(2)}}}}},
    "VISSL, extracted": {"model_state_dict": under("_feature_blocks.", A)},
    "solo-learn": {"state_dict": under("backbone.", A) | under("momentum_backbone.", B) | head("projector."),
                   "optimizer_states": [{"state": {}}], "pytorch-lightning_version": "1.6"},
    "solo-learn (older)": {"state_dict": under("encoder.", A) | under("momentum_encoder.", B) | head("projector.")},
    "lightly": {"state_dict": under("backbone.", numbered(A)) | under("backbone_momentum.", numbered(B))
                | head("projection_head.layers.")},
    "lightly, bare": {"state_dict": under("backbone.", shortcuts(numbered(A)))},
    "mmselfsup": {"state_dict": under("backbone.", A) | head("neck.")},
    "OpenSelfSup": {"state_dict": under("encoder_q.0.", A) | head("encoder_q.1.mlp.") | under("encoder_k.0.", B)
                    | {f"backbone.{name}": x.clone() for name, x in A.items()}},
    "DINO": {"student": under("module.backbone.", A), "teacher": under("backbone.", B), "args": OPT},
    "torchvision": A | head("fc.", 0),
    "torchvision, averaged": {"model": under("module.", A), "model_ema": under("module.", B) | {"n_averaged": ONE}},
    "timm": {"state_dict": A, "state_dict_ema": B},
    "timm, with classifiers": {"state_dict": A | head("fc.", 0), "state_dict_ema": B | head("fc.", 0)},
    "torchvision, compiled": under("_orig_mod.module.", A),
    "torchvision, ordered": OrderedDict(A),
}  # fmt: skip
WITH_EMA = [n for n, state in FILES.items() if any(x is B["conv1.weight"] for x in
            torch.utils._pytree.tree_leaves(state))]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_layout_gives_the_same_encoder(name, tmp_path):
    torch.save(FILES[name], tmp_path / "file.bin")
    network, values, remarks = build.load_encoder(str(tmp_path / "file.bin"), use_ema=False)
    found = network.backbones[0].state_dict()
    assert all(torch.equal(found[key], x) for key, x in A.items()) and found.keys() == A.keys()
    assert (values["arch"], values["width"], values["stem"], values["head"]) == ("resnet18", 0.125, "small", "none")
    assert len(remarks) == 1 and f"{len(A)} tensors used" in remarks[0]
    assert name.split()[0].strip(",") in remarks[0].split(" layout (")[0]
    assert not network.training


def test_the_printed_line_tells_what_was_recognised_and_what_was_left():
    said = str(find_trunk(FILES["MoCo"]))
    assert said == (
        "MoCo layout (state_dict.module.encoder_q.): resnet18 of width 0.125, small stem, 126 tensors used; "
        "not used: state_dict.module.encoder_k. (130 tensors), state_dict.module.encoder_q.fc. (4 tensors), "
        "state_dict.module.queue, state_dict.module.queue_ptr"
    )


@pytest.mark.parametrize("name", FILES)
def test_use_ema_takes_the_moving_average(name):
    if name not in WITH_EMA:
        with pytest.raises(ValueError, match="without a momentum encoder; leave --use_ema or --ema out"):
            find_trunk(FILES[name], ema=True)
        return
    found = find_trunk(FILES[name], ema=True)
    assert all(torch.equal(found.weights[f"0.{key}"], x) for key, x in B.items())


@pytest.mark.parametrize(
    ("arch", "sizes"),
    [
        ("resnet50", {"width": 1.0}), ("resnet50", {"width": 0.5}), ("resnet50", {"width": 2.0}),
        ("resnet50", {"width": 0.125}),  # of which there is no ResNeXt
        ("resnet34", {"width": 0.3}), ("resnet101", {"width": 0.25, "small_stem": True}),
        ("resnext50_32x4d", {"width": 1.0}), ("resnext101_32x8d", {"width": 0.25}),
    ],
)  # fmt: skip
def test_the_architecture_is_read_from_the_shapes(arch, sizes):
    with torch.device("meta"):
        names = resnet(arch, **sizes).state_dict()
    found = find_trunk(names)
    assert (found.arch, found.stem) == (arch, "small" if sizes.get("small_stem") else "imagenet")
    assert int(64 * found.width) == int(64 * sizes["width"])


# --- a trunk for each modality


def half(channels, seed):
    return trunk(seed, width=0.125, in_channels=channels, small_stem=True)


L, AB, L2, AB2 = half(1, 2), half(2, 3), half(1, 4), half(2, 5)
PAIRS = {
    "CMC": {"opt": OPT, "contrast": {"memory_l": ONE}, "model": under("encoder.module.", under("l_to_ab.", L) |
            under("ab_to_l.", AB) | head("l_to_ab.fc.", 0) | head("ab_to_l.fc.", 0))},
    "PyContrast": {"model": under("module.", under("encoder1.", L) | under("encoder2.", AB) | head("head1.") |
                   head("head2.")), "model_ema": under("encoder1.", L2) | under("encoder2.", AB2)},
}  # fmt: skip


@pytest.mark.parametrize(("name", "view"), [("CMC", "Lab"), ("PyContrast", "YDbDr")])
def test_a_pair_of_trunks_is_an_encoder_of_two_modalities(name, view, tmp_path):
    torch.save(PAIRS[name], tmp_path / "pair.pth")
    argv = ["--ckpt", str(tmp_path / "pair.pth"), "--dataset", "shapes"]
    get_encoder, values, (recognised, guessed) = subject.encoder(linear.parse(argv)[0])
    network = get_encoder(0)
    for backbone, wanted in zip(network.backbones, (L, AB), strict=True):
        assert all(torch.equal(backbone.state_dict()[key], x) for key, x in wanted.items())
    assert network.channels == (1, 2) and network.features(torch.zeros(1, 3, 16, 16)).shape == (1, 128)
    assert (values["arch"], values["width"], values["modal"], values["view"]) == ("resnet18", 0.25, "CMC", view)
    assert recognised.startswith(f"{name} layout (") and "resnet18 of width 0.25, small stem, two modal" in recognised
    rest = {"CMC": "module. (4 tensors), contrast.memory_l", "PyContrast": "model_ema. (252 tensors), model.module. (8"}
    assert f"{2 * len(A)} tensors used; not used: " in recognised and rest[name] in recognised
    assert guessed.endswith(f"does not tell its colour space, taken to be {view} as published: --view changes it")

    _, values, remarks = subject.encoder(linear.parse([*argv, "--view", "HSV", "--modal", "CMC"])[0])
    assert values["view"] == "HSV" and remarks == [recognised]
    with pytest.raises(ValueError, match="holds a resnet18 of width 0.25 for --modal CMC, which --modal RGB contradi"):
        subject.encoder(linear.parse([*argv, "--modal", "RGB"])[0])


def test_the_moving_average_of_a_pair():
    found = find_trunk(PAIRS["PyContrast"], ema=True)
    assert found.weights.keys() == (under("0.", L2) | under("1.", AB2)).keys()
    assert all(torch.equal(found.weights[key], x) for key, x in (under("0.", L2) | under("1.", AB2)).items())
    assert found.where == "model_ema.encoder1. and model_ema.encoder2."


def test_files_without_step_counters_are_complete():
    old = {name: x for name, x in A.items() if not name.endswith("num_batches_tracked")}
    assert find_trunk(old).weights.keys() == under("0.", A).keys()


def without(*names):
    return {name: x for name, x in A.items() if name not in names}


REFUSED = {
    "the AlexNet of CMC": ({"model": under("encoder.module.l_to_ab.conv_block_1.0.", {"weight": ONE}) |
                            under("encoder.module.ab_to_l.conv_block_1.0.", {"weight": ONE})}, "the AlexNet of CMC"),
    "two RGB trunks": ({"model": under("encoder1.", A) | under("encoder2.", A)}, "expects 3 input channels, not 1"),
    "a ViT": ({"cls_token": torch.ones(1), "blocks.0.attn.qkv.weight": torch.ones(2)}, "vision transformer"),
    "resnet50d": ({"conv1.0.weight": torch.ones(2), **without("conv1.weight")}, "another stem"),
    "a wide ResNet": (torchvision.models.wide_resnet50_2().state_dict(), "nearest to a resnext50_32x4d .* lacks 16 of"),
    "missing": (without("layer3.1.bn2.weight", "layer4.0.conv1.weight"), "nearest to a resnet18 of width 0.125, but "
                r"lacks 2 of its tensors .layer3.1.bn2.weight \(32,\), layer4.0.conv1.weight \(64, 32, 3, 3\)."),
    "too many": (A | {"layer2.0.se.fc1.weight": torch.ones(2)}, r"but has 1 others \(layer2.0.se.fc1.weight \(2,\)"),
    "no second convolution": (without("layer1.0.conv2.weight"), r"lacks 1 of its tensors .layer1.0.conv2.weight"),
    "one block less": ({n: x for n, x in A.items() if not n.startswith("layer4.1")}, "lacks 10 of its tensors"),
    "other channels": (A | {"conv1.weight": torch.ones(64, 1, 3, 3)}, "expects 1 input channels, not 3"),
    "wider stem": (A | {"conv1.weight": torch.ones(80, 3, 3, 3)}, r"has 1 others \(conv1.weight \(80, 3, 3, 3"),
    "two networks": ({"model": A, "state_dict": B}, "several networks, under model. and state_dict.; save the one"),
    "two numbered": ({"model": numbered(A), "net": numbered(B)}, "several networks, under model. and net.;"),
    "two layouts": (under("encoder.", A) | under("backbone.", B), "several networks, under encoder. and backbone.;"),
    "two spellings": (A | under("encoder.", numbered(B)), "several networks, under no prefix and encoder.;"),
    "a last stage trained further": ({"model": A, "net": A | {"layer4.1.bn2.weight": B["layer4.1.bn2.bias"]}},
                                     "several networks, under model. and net.;"),
    "nan": (A | {"layer2.0.bn1.weight": torch.full((16,), torch.nan)}, "holds nan or inf in layer2.0.bn1.weight: "),
    "lightly's own": ({"state_dict": under("backbone.", shortcuts(numbered(A, (2, 3, 4, 5))))}, "without the ReLU"),
    "unknown": ({"net.foo.bar." + n: x for n, x in A.items()} | head("head."),
                r"foo.bar. \(126 tensors\), head. \(4 tensors\).* nearest known one is that of .*such as "),
    "misspelt": (under("encoder_qq.", A), r"nearest known one is that of MoCo, .* encoder_q.layer1.0.conv1.weight"),
    "optimizer": ({"optimizer": {"state": {0: torch.ones(2)}}, "epoch": 3}, "no weights .* not the optimizer"),
    "one tensor": (torch.ones(3), "holds no weights of a network"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_known_resnet_is_refused_in_one_sentence(name, tmp_path):
    state, message = REFUSED[name]
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message) as refused:
        build.load_encoder(str(tmp_path / "file.pth"), use_ema=False)
    assert str(refused.value).startswith(f"{tmp_path}/file.pth ") and "\n" not in str(refused.value)


def test_files_that_are_no_checkpoints_are_refused_in_one_sentence(tmp_path):
    (tmp_path / "page.pth").write_text("\n<!DOCTYPE html><html></html>")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save(A, tmp_path / "whole.pth")
    safetensors.torch.save_file(A, tmp_path / "whole.safetensors")
    for name in ("whole.pth", "whole.safetensors"):
        (tmp_path / f"cut.{name}").write_bytes((tmp_path / name).read_bytes()[:3000])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "program.pt")
    (tmp_path / "long.pth").write_bytes(b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little"))  # bytes that are not there
    answers = {"page.pth": "is a web page", "empty.pth": "is empty", "none.pth": "There is no checkpoint at",
               "cut.whole.pth": "cannot be read", "cut.whole.safetensors": "cannot be read",
               "program.pt": "is a TorchScript program.* model.state_dict", "long.pth": "cannot be read"}  # fmt: skip
    for name, message in answers.items():
        with pytest.raises(ValueError, match=message) as refused:
            checkpoint.read(tmp_path / name)
        assert "\n" not in str(refused.value)


def test_a_header_as_long_as_a_web_page_begins_is_safetensors(tmp_path):
    header = {"conv1.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    length = int.from_bytes(b" <", "little")
    content = length.to_bytes(8, "little") + json.dumps(header).encode().ljust(length) + bytes(4)
    (tmp_path / "a.safetensors").write_bytes(content)
    assert checkpoint.read(tmp_path / "a.safetensors")["conv1.weight"].tolist() == [0]


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_file_that_would_run_code_runs_nothing(tmp_path):
    state = {"state_dict": dict(list(A.items())[:2]), "opt": argparse.Namespace(hook=Harm(tmp_path / "harmed"))}
    torch.save(state, tmp_path / "zipped.pth")
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    for protocol in (2, 4):
        (tmp_path / f"plain{protocol}.pkl").write_bytes(pickle.dumps({"a": Harm(tmp_path / "harmed")}, protocol))
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=rf"{path.name} wants to call \w+.system, .*torch.save\(state_dict"):
            checkpoint.read(path)
    assert not (tmp_path / "harmed").exists()


def test_a_pickled_network_is_refused_by_name(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(ValueError, match="wants to call torch.nn.modules.linear.Linear"):
        checkpoint.read(tmp_path / "whole.pth")


def foreign(tmp_path, name="MoCo"):
    torch.save(FILES[name], tmp_path / "foreign.pth.tar")
    return str(tmp_path / "foreign.pth.tar")


def evaluated(*argv):
    options, _, _ = linear.parse(list(map(str, argv)))
    _, values, _ = subject.encoder(options)
    return subject.complete(options, values)


def test_data_options_of_a_foreign_file_come_from_the_data_set(tmp_path):
    path = foreign(tmp_path)
    options, origins = evaluated("--ckpt", path, "--data_folder", tmp_path, "--method", "MoCov2")
    assert (options.dataset, options.input_res, origins["input_res"]) == ("folder", 224, "dataset folder")
    options, _ = evaluated("--ckpt", path, "--dataset", "shapes")
    assert (options.dataset, options.input_res) == ("shapes", 32)
    options, _ = evaluated(
        "--ckpt", path, "--dataset", "shapes", "--input_res", 48, "--arch", "resnet18", "--width", 0.125
    )
    assert options.input_res == 48
    with pytest.raises(ValueError, match="does not say which images it is for: add --data_folder"):
        evaluated("--ckpt", path)


@pytest.mark.parametrize(
    "typed", [("--arch", "resnet50"), ("--arch", "resnet18"), ("--arch", "alexnet"), ("--width", "2.0"),
              ("--modal", "CMC")]
)  # fmt: skip
def test_another_architecture_typed_is_refused(tmp_path, typed):
    with pytest.raises(ValueError, match=f"holds a resnet18 of width 0.125 .*, which {' '.join(typed)} contradicts"):
        evaluated("--ckpt", foreign(tmp_path), "--dataset", "shapes", *typed)


def test_what_a_foreign_file_tells_nothing_about_is_noted(tmp_path):
    typed = [
        "--method",
        "MoCov2",
        "--arch",
        "resnet18",
        "--head",
        "mlp",
        "--width",
        "0.125",
        "--jigsaw",
        "-k",
        "8",
        "--view",
        "Lab",
    ]
    path = foreign(tmp_path)
    options, _, _ = linear.parse(["--ckpt", path, "--dataset", "shapes", *typed])
    _, _, (recognised, *notes) = subject.encoder(options)
    why = f"has no effect with {path}, of which only the backbone is read"
    assert recognised.startswith("MoCo layout")
    assert notes == [f"--{name} {why}" for name in ("head", "queue_size", "view", "jigsaw")]


def normalisation(path, *argv):
    options, _, _ = linear.parse(["--ckpt", str(path), "--dataset", "shapes", *argv])
    _, values, _ = subject.encoder(options)
    options, _ = subject.complete(options, values)
    return [(part.mean, part.std) for part in subject.images(options, values)]


def test_images_are_normalised_by_imagenet_unless_told_otherwise(tmp_path, monkeypatch):
    imagenet, other = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert normalisation(foreign(tmp_path)) == [imagenet] * 2
    typed = normalisation(foreign(tmp_path), "--mean", "0.1,0.2,0.3", "--std", "0.4,0.5,0.6")
    about = {"mean": "0.1,0.2,0.3", "std": "0.4,0.5,0.6"}
    safetensors.torch.save_file(A, tmp_path / "a.safetensors", about)
    assert typed == normalisation(tmp_path / "a.safetensors") == [other] * 2


def test_main_linear_reports_the_backbone_of_a_foreign_file(tmp_path, capsys):
    rng = np.random.default_rng(0)
    arrays = {f"{part}_images": rng.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "data.npz", **arrays, train_labels=np.arange(12) % 3, test_labels=np.arange(12) % 3)
    argv = ["--ckpt", foreign(tmp_path), "--data_folder", tmp_path / "data.npz", "--input_res", 16, "--eval", "knn"]
    paths = ["--model_path", tmp_path / "save", "--tb_path", tmp_path / "tb", "--num_workers", 0, "--name", "a"]
    options, origins, notes = linear.parse(list(map(str, [*argv, *paths])))
    evaluation.evaluate(options, origins=origins, notes=notes)
    results = json.loads((tmp_path / "save" / "a" / "results.json").read_text())
    assert results["knn"].keys() == {"k", "backbone"} and results["dataset"] == "npz"
    assert "MoCo layout (state_dict.module.encoder_q.)" in capsys.readouterr().out


# --- --init


def ours(folder, **changes):
    """A run folder of this program; returns it and the weights of its backbones."""
    shape = {"arch": "resnet18", "width": 0.125, "stem": "small", "head": "linear", "feat_dim": 8, "modal": "RGB"}
    options, _, _ = contrast.parse(["--epochs", "1"])
    torch.manual_seed(6)
    network = build.encoder(shape | changes)
    values = vars(options) | shape | changes | {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    state = {"method": under("encoder.", network.state_dict()), "optimizer": {}, "scaler": {}, "position": {}}
    folder.mkdir()
    checkpoint.save(folder / "current.pth", state | {"options": values})
    return folder, network.backbones.state_dict()


def started(path, wanted, *argv):
    typed = ["--init", str(path), "--width", "0.125", "--stem", "small", "--feat_dim", "8", *argv]
    options, _, _ = contrast.parse(typed)
    options = dataclasses.replace(options, seed=5, queue_size=8, bn_splits=1, key_momentum=0.9)
    start = build.starting_trunk(options)
    begun, fresh = build.method(options, 1, 10, start), build.method(options, 1, 10)
    assert all(torch.equal(begun.encoder.heads.state_dict()[k], x) for k, x in fresh.encoder.heads.state_dict().items())
    for network in (begun.encoder, begun.momentum_encoder.encoder):
        assert all(torch.equal(network.backbones.state_dict()[name], x) for name, x in wanted.items())
    return str(start)


def test_init_takes_the_backbone_and_leaves_the_head(tmp_path):
    assert started(foreign(tmp_path), under("0.", A)).startswith("MoCo layout")
    run, wanted = ours(tmp_path / "run")
    said = started(run, wanted, "--head", "mlp_bn")
    assert said.startswith("contrast-ft layout (method.encoder.backbones.)") and "not used: method.encoder.h" in said
    assert started(run / "current.pth", wanted).startswith("contrast-ft layout")


@pytest.mark.parametrize("arch", ["resnet18", "alexnet"])
def test_init_takes_two_halves_of_any_architecture(tmp_path, arch):
    run, wanted = ours(tmp_path / "run", arch=arch, modal="CMC", view="Lab")
    cmc = ("--method", "CMCv2", "--arch", arch)
    assert "two modalities" in started(run, wanted, *cmc)
    with pytest.raises(ValueError, match="--modal CMC"):
        started(run, wanted, "--arch", arch)
    if arch == "resnet18":
        torch.save(PAIRS["CMC"], tmp_path / "pair.pth")
        started(tmp_path / "pair.pth", under("0.", L) | under("1.", AB), *cmc, "--width", "0.25")


def test_init_with_another_architecture_says_what_the_file_holds(tmp_path):
    options, _, _ = contrast.parse(["--init", foreign(tmp_path), "--arch", "resnet50", "--stem", "imagenet"])
    with pytest.raises(ValueError, match="add --arch resnet18 --width 0.125 --stem small"):
        build.starting_trunk(options)


def test_a_linear_probe_is_no_encoder(tmp_path):
    state = dict.fromkeys(checkpoint.KEYS, {}) | {"options": {"eval": "linear"}, "method": {"weight": torch.ones(2, 2)}}
    checkpoint.save(tmp_path / "current.pth", state)
    with pytest.raises(ValueError, match="is a checkpoint of main_linear.py and holds no encoder"):
        weights.read(tmp_path)
