"""The preview: the very views that training sees, and numbers from which they can be made again."""

import json

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image

from learning import build
from options import contrast
from scripts import preview_views

BIT = 1 / 255  # a crop is rounded to 8 bits, and adjusting its colours makes more of that
METHODS = {
    "MoCov2": ["query", "key"],
    "PIRL": ["query", "jigsaw"],
    "SwAV": ["query", "key", "small0"],
    "InfoMin": ["query", "key", "jigsaw"],
    "CMC": ["query"],
}


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(9):
        smooth = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize((100 + i, 90))
        path = tmp_path / "photos/train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth.save(path)
    (tmp_path / "photos/val").mkdir()
    return ["--data_folder", str(tmp_path / "photos"), "--input_res", "72", "--seed", "5", "--batch_size", "4"]


def opened(flags):
    """The options, training images and loader of a run."""
    opt, origins, _ = contrast.parse([*flags, "--device", "cpu"])
    data = build.source(opt, "train")
    opt, _ = build.resolve(opt, origins, n_data=len(data))
    return data, build.train_loader(opt, data, torch.device("cpu"))


def trained_on(loader, epoch):
    """What an epoch of training shows: index -> view -> tensor, where views that are dealt out anew are put back."""
    seen = {}
    loader.set_epoch(epoch)
    for batch in loader:
        back = batch["order"].argsort() if "order" in batch else ...
        for name in loader.recipe.views:
            of_all = batch[name][back] if name == "key" else batch[name]
            for index, view in zip(batch["index"].tolist(), of_all):
                seen.setdefault(index, {})[name] = view
    return seen


@pytest.mark.parametrize("where", ["files", "memory"])
@pytest.mark.parametrize("method", METHODS)
def test_views_are_those_of_training(method, where, photos, monkeypatch):
    flags = photos if where == "files" else ["--seed", "5", "--batch_size", "64", "--data_fraction", "0.03"]
    small = ["--small_crops", "1"] if method == "SwAV" else []
    _, loader = opened([*flags, "--method", method, *small])
    seen = trained_on(loader, epoch=2)
    batch = loader.of(torch.tensor([*seen][5:2:-1]))
    assert batch["index"].tolist() == [*seen][5:2:-1] and list(loader.recipe.views) == METHODS[method]
    for row, index in enumerate(batch["index"].tolist()):
        for name, view in seen[index].items():
            assert torch.equal(batch[name][row], view), name


def cropped(data, index, drawn, side):
    """The picture as `drawn` says, float 0..1 (3, side, side)."""
    view = F.resize(F.crop(F.pil_to_tensor(data.picture(index)), *drawn["crop"]), [side, side], antialias=True)
    return (F.hflip(view) if drawn["flip"] else view) / 255


def test_the_numbers_make_the_view_again(photos):
    """By torchvision's functions, one after another, as the caption reads."""
    data, loader = opened([*photos, "--method", "SimCLR"])
    batch = loader.of(torch.arange(9))
    done = set()
    for row, sample in enumerate(preview_views.describe(loader, data, batch)):
        for name, drawn in sample["views"].items():
            view = cropped(data, sample["index"], drawn, 72)
            for adjusted, factor in drawn.get("jitter", {}).items():
                view = getattr(F, f"adjust_{adjusted}")(view, factor)
            view = F.rgb_to_grayscale(view, 3) if "gray" in drawn else view
            if "blur" in drawn:
                view = F.gaussian_blur(view, [25, 25], [drawn["blur"]] * 2)
            ours = loader.recipe.colours.shown(batch[name][row])[0]
            torch.testing.assert_close(ours, view, atol=12 * BIT, rtol=0)
            done |= {*drawn, *drawn.get("jitter", {})}
    assert done == {"crop", "flip", "jitter", "brightness", "contrast", "saturation", "hue", "gray", "blur"}


def test_pieces_of_a_jigsaw_lie_where_they_are_said_to(photos):
    data, loader = opened([*photos, "--method", "PIRL", "--recipe", "mocov2"])
    batch, plain = loader.of(torch.arange(9)), 0
    for row, sample in enumerate(preview_views.describe(loader, data, batch)):
        drawn, side = sample["views"]["jigsaw"], 3 * round(72 * 255 / 224 / 3)
        whole = cropped(data, sample["index"], drawn, side)
        size = batch["jigsaw"].shape[-1]
        for number, piece in enumerate(drawn["pieces"]):
            if [*piece] == ["corner"]:
                shown = loader.recipe.colours.shown(batch["jigsaw"][row, number])[0]
                torch.testing.assert_close(shown, F.crop(whole, *piece["corner"], size, size), atol=BIT + 1e-6, rtol=0)
                plain += 1
    assert plain > 4


def test_command_writes_picture_and_numbers(photos, tmp_path, capsys):
    out = tmp_path / "new" / "pirl.png"
    arguments = [*photos, "--method", "PIRL", "--epoch", "3", "--indices", "7,2", "-o", str(out)]
    assert preview_views.main(arguments) == 0
    said = capsys.readouterr().out
    assert "2 of 9 images in epoch 3" in said and "note" not in said
    assert out.read_bytes().startswith(b"\x89PNG")
    told = json.loads(out.with_suffix(".json").read_text())
    data, loader = opened([*photos, "--method", "PIRL"])
    assert (told["seed"], told["epoch"]) == (5, 3)
    assert [(x["index"], x["file"], x["class"]) for x in told["samples"]] == [
        (i, data.images[i], data.classes[data.labels[i]]) for i in (7, 2)
    ]
    loader.set_epoch(2)
    assert told["samples"] == preview_views.describe(loader, data, loader.of(torch.tensor([7, 2])))
    assert len(told["samples"][0]["views"]["jigsaw"]["pieces"]) == 9


def test_without_a_seed_it_says_which_one_and_shows_the_first_of_the_epoch(photos, tmp_path, capsys):
    unseeded = [flag for flag in photos if flag not in ("--seed", "5")]
    assert preview_views.main([*unseeded, "--samples", "3", "-o", str(tmp_path / "v.png")]) == 0
    told = json.loads((tmp_path / "v.json").read_text())
    assert f"--seed {told['seed']}" in capsys.readouterr().out
    _, loader = opened([*unseeded, "--seed", str(told["seed"])])
    assert [x["index"] for x in told["samples"]] == next(iter(loader))["index"][:3].tolist()


def test_a_preview_needs_no_whole_batch(photos, tmp_path):
    assert preview_views.main([*photos, "--batch_size", "256", "-o", str(tmp_path / "v.png")]) == 0


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--indices", "2,9"], "0 and 8"),
        (["--indices", "2,x"], "2,x"),
        (["--samples", "0"], "1 or more"),
        (["-o", "views.doc"], "png"),
        (["--epok", "3"], "--epochs"),
    ],
)
def test_mistakes_are_sentences(arguments, said, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = preview_views.main([*photos, *arguments])
    except SystemExit as end:
        code = end.code
    assert code in (1, 2) and said in capsys.readouterr().err
    assert not (tmp_path / "views.png").exists()


def test_colour_spaces_are_shown_as_grey_and_two_colours():
    flags = ["--method", "CMC", "--view", "YDbDr", "--seed", "5", "--data_fraction", "0.03", "--batch_size", "16"]
    _, loader = opened(flags)
    view = loader.of(torch.arange(4))["query"]
    shown = loader.recipe.colours.shown(view)
    assert shown.shape == (4, 3, 32, 64) and shown.min() >= 0 and shown.max() <= 1
    grey, pair = shown.split(32, dim=3)
    torch.testing.assert_close(grey, (view[:, :1] / 2 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1))
    torch.testing.assert_close(pair[:, ::2], (view[:, 1:] / 2 + 0.5).clamp(0, 1))
