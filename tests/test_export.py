"""Exports are read back by the libraries they are for, with the very lines of Python that the script prints."""

import pickle

import pytest
import safetensors.torch
import torch
import torchvision

from learning import build, checkpoint
from models.encoder import Encoder
from models.resnet import resnet
from options import contrast
from scripts import export

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def save(path, **changes):
    """A checkpoint of this program, its momentum encoder with other weights; returns both encoders."""
    shape = {"arch": "resnet18", "width": 1.0, "stem": "imagenet", "head": "mlp", "feat_dim": 8} | changes
    options, _, _ = contrast.parse(["--input_res", "64"])
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks.append(Encoder(**shape))
        for name, x in networks[-1].named_buffers():
            if "running" in name:
                x.uniform_(0.5, 2)
    shape["modal"] = "CMC" if "channels" in changes else "RGB"
    weights = {f"encoder.{name}": x for name, x in networks[0].state_dict().items()}
    weights |= {f"momentum_encoder.encoder.{name}": x for name, x in networks[1].state_dict().items()}
    values = vars(options) | shape | {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 0.2)}
    path.mkdir()
    state = {"method": weights, "optimizer": {}, "scaler": {}, "position": {}, "options": values}
    checkpoint.save(path / "current.pth", state)
    return [network.eval() for network in networks]


def under_torchvisions_names():
    return resnet("resnet18", width=1.0, small_stem=False).state_dict()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "first"
    return folder, *save(folder)


def exported(capsys, *argv):
    """Run the script; returns what the printed code defines."""
    export.main(list(map(str, argv)))
    said = capsys.readouterr().out
    code = said.split("Read it with:\n")[1].split("It expects RGB")[0]
    scope = {"images": IMAGES.numpy()}
    exec(code, scope)
    return scope, said


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_torchvision_reads_the_backbone_and_the_head(run, capsys):
    folder, encoder, momentum = run
    scope, said = exported(capsys, folder, "--to", "torchvision")
    same(scope["net"].eval()(IMAGES), encoder.features(IMAGES))
    assert (folder / "current_torchvision.pth").exists() and "minus mean 0.1, 0.2, 0.3, divided by std 0.5" in said
    scope, _ = exported(capsys, folder, "--to", "torchvision", "--ema", "--head", "-o", folder / "head.pth")
    embedding = torch.nn.functional.normalize(scope["net"].eval()(IMAGES))
    same(embedding, momentum(IMAGES)[0])
    assert {"fc.0.weight", "fc.2.bias"} < torch.load(folder / "head.pth").keys()


@torch.no_grad()
def test_timm_reads_the_backbone(run, capsys):
    folder, encoder, _ = run
    import timm

    exported(capsys, folder, "--to", "timm")
    net = timm.create_model("resnet18", num_classes=0, checkpoint_path=folder / "current_timm.pth")
    same(net.eval()(IMAGES), encoder.features(IMAGES))


@torch.no_grad()
@pytest.mark.parametrize("to", ["torchvision", "timm"])
def test_the_printed_code_rebuilds_the_small_stem(tmp_path, capsys, to):
    encoder, _ = save(tmp_path / "small", stem="small", arch="resnet50")
    scope, _ = exported(capsys, tmp_path / "small", "--to", to)
    same(scope["net"].eval()(IMAGES), encoder.features(IMAGES))


@torch.no_grad()
def test_timm_builds_narrow_networks(tmp_path, capsys):
    encoder, _ = save(tmp_path / "narrow", stem="small", width=0.25)
    scope, said = exported(capsys, tmp_path / "narrow", "--to", "timm")
    assert "channels=(16, 32, 64, 128)" in said
    same(scope["net"].eval()(IMAGES), encoder.features(IMAGES))


@torch.no_grad()
def test_safetensors_carry_what_it_takes_to_use_them(tmp_path, capsys):
    encoder, _ = save(tmp_path / "narrow", stem="small", width=0.25)
    scope, _ = exported(capsys, tmp_path / "narrow", "--to", "safetensors", "--head")
    assert {"conv1.weight", "layer4.1.bn2.running_var", "fc.0.weight"} < scope["weights"].keys()
    path = tmp_path / "narrow" / "current_safetensors_head.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        about = file.metadata()
    wanted = {"arch": "resnet18", "width": "0.25", "stem": "small", "mean": "0.1,0.2,0.3", "std": "0.5,0.25,0.2"}
    assert about == wanted | {"input_res": "64", "source": "narrow/current.pth", "format": "pt"}
    again, values, _ = build.load_encoder(str(path), use_ema=False)
    same(again.features(IMAGES), encoder.features(IMAGES))
    assert values["mean"] == (0.1, 0.2, 0.3)


@torch.no_grad()
@pytest.mark.parametrize("head", [False, True])
def test_onnx_gives_the_same_for_batches_of_any_size(tmp_path, capsys, head):
    pytest.importorskip("onnxscript")
    encoder, _ = save(tmp_path / "run", width=0.25, head="mlp_bn")
    scope, _ = exported(capsys, tmp_path / "run", "--to", "onnx", *["--head"] * head)
    for batch in (IMAGES[:1], IMAGES.repeat(3, 1, 1, 1)):
        found = torch.from_numpy(scope["net"].run(None, {"images": batch.numpy()})[0])
        same(found, encoder(batch)[0] if head else encoder.features(batch))


def test_detectron2_gets_its_names_and_settings(tmp_path, capsys):
    encoder, _ = save(tmp_path / "run", arch="resnet50")

    class Config(dict):
        __getattr__ = dict.__getitem__
        __setattr__ = dict.__setitem__

    export.main([str(tmp_path / "run"), "--to", "detectron2"])
    code = capsys.readouterr().out.split("Read it with:\n")[1].split("It expects")[0]
    cfg = Config(MODEL=Config(RESNETS=Config()), INPUT=Config())
    exec(code, {"cfg": cfg})
    assert cfg.MODEL.RESNETS == {"DEPTH": 50, "NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64, "STEM_OUT_CHANNELS": 64,
        "RES2_OUT_CHANNELS": 256, "STRIDE_IN_1X1": False}  # fmt: skip
    assert cfg.MODEL.PIXEL_MEAN == [25.5, 51.0, 76.5] and cfg.INPUT.FORMAT == "RGB"
    file = pickle.loads((tmp_path / "run" / "current_detectron2.pkl").read_bytes())
    assert file["matching_heuristics"] is True and file["__author__"]
    arrays, trunk = file["model"], encoder.backbones[0]
    pairs = {
        "stem.conv1.weight": trunk.conv1.weight, "stem.conv1.norm.running_mean": trunk.bn1.running_mean,
        "res2.0.shortcut.weight": trunk.layer1[0].downsample[0].weight,
        "res2.0.shortcut.norm.bias": trunk.layer1[0].downsample[1].bias,
        "res5.2.conv3.norm.running_var": trunk.layer4[2].bn3.running_var,
    }  # fmt: skip
    for name, x in pairs.items():
        assert torch.equal(torch.from_numpy(arrays[name]), x.detach())
    counters = sum(name.endswith("num_batches_tracked") for name in trunk.state_dict())
    assert len(arrays) == len(trunk.state_dict()) - counters
    assert not any(word in name for name in arrays for word in ("layer", "bn", "downsample", "num_batches"))


def test_another_librarys_file_is_converted_directly(tmp_path, capsys):
    net = torchvision.models.resnet18()
    state = {f"module.encoder_q.{name}": x for name, x in net.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "moco.pth.tar")
    scope, said = exported(capsys, tmp_path / "moco.pth.tar", "--to", "torchvision")
    assert said.startswith("MoCo layout") and (tmp_path / "moco_torchvision.pth").exists()
    with torch.no_grad():
        net.fc = torch.nn.Identity()
        same(scope["net"].eval()(IMAGES), net.eval()(IMAGES))


@pytest.mark.parametrize(
    ("changes", "argv", "message"),
    [
        ({"width": 0.25}, ["--to", "torchvision"], "torchvision builds no resnet18 of width 0.25"),
        ({"arch": "resnet18x2"}, ["--to", "timm"], "timm builds no resnet18 of width 2 .*; export --to"),
        ({"arch": "resnext152_64x4d", "width": 0.25}, ["--to", "timm"], "timm builds no resnext152_64x4d"),
        ({"stem": "small", "width": 0.25}, ["--to", "detectron2"], "builds no .* with small stem"),
        ({"arch": "alexnet", "width": 0.125}, ["--to", "detectron2"], "detectron2 builds no alexnet"),
        ({"arch": "alexnet", "width": 0.125}, ["--to", "onnx"], "onnx builds no alexnet .* instead"),
        ({"arch": "alexnet"}, ["--to", "torchvision"], "torchvision builds no alexnet of width 1"),
        ({"width": 0.25, "channels": (1, 2)}, ["--to", "onnx"], "two modalities, which no other library builds"),
        ({"width": 0.25}, ["--to", "detectron2", "--head"], "no place for a projection head; leave --head out"),
        ({"width": 0.25, "head": "none"}, ["--to", "onnx", "--head"], "no projection head that can be read"),
    ],
)  # fmt: skip
def test_what_a_library_cannot_hold_is_refused(tmp_path, changes, argv, message):
    save(tmp_path / "run", **changes)
    with pytest.raises(SystemExit, match=f"^export.py: .*{message}"):
        export.main([str(tmp_path / "run"), *argv])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["current.pth"]


def test_every_checkpoint_has_its_own_default_name(tmp_path, capsys):
    names = {"my.a.pth": "my.a", "my.b.pth.tar": "my.b", "v1.2": "v1.2", "c.d.safetensors": "c.d"}
    state = under_torchvisions_names()
    for name in names:
        (safetensors.torch.save_file if name.endswith("tensors") else torch.save)(state, tmp_path / name)
        export.main([str(tmp_path / name), "--to", "safetensors"])
        assert (tmp_path / f"{names[name]}_safetensors.safetensors").exists()


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    torch.save(under_torchvisions_names(), tmp_path / "a.pth")
    (tmp_path / "link.pth").symlink_to("a.pth")
    before = (tmp_path / "a.pth").read_bytes()
    monkeypatch.chdir(tmp_path)
    for output, message in {
        "nowhere/x.pth": "in a folder that exists", ".": "in a folder that exists",
        "a.pth": "is the checkpoint itself", "link.pth": "is the checkpoint itself",
    }.items():  # fmt: skip
        with pytest.raises(SystemExit, match=f"^export.py: -o {output} .*{message}"):
            export.main(["a.pth", "--to", "torchvision", "-o", output])
    assert (tmp_path / "a.pth").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth", "link.pth"}


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    torch.save(under_torchvisions_names(), tmp_path / "a.pth")
    (tmp_path / "out.pth").write_bytes(b"old")

    def crash(state, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(SystemExit, match="^export.py: .*out.pth could not be written .No space left"):
        export.main([str(tmp_path / "a.pth"), "--to", "torchvision", "-o", str(tmp_path / "out.pth")])
    assert (tmp_path / "out.pth").read_bytes() == b"old"


def test_onnx_without_its_packages_is_one_sentence(run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(SystemExit, match="--to onnx needs onnxscript: pip install onnx onnxscript onnxruntime"):
        export.main([str(run[0]), "--to", "onnx"])
