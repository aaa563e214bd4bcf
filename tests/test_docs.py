"""Every command of the pages in docs/ runs: word for word, on small pictures, with small sizes appended."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from models.resnet import resnet

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").glob("*.md") if page.stem != "results")]
NETWORK = {"arch": "resnet18", "width": "0.25", "feat_dim": "16", "input_res": "32", "queue_size": "8"}
SIZES = {"epochs": "1", "batch_size": "4", "num_workers": "0", "device": "cpu", "print_freq": "1"}


def commands(page):
    """The lines of the page's ```bash blocks; a backslash goes on in the next one."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def pictures(folder, names, ending):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(names))
    for name in names:
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / f"{name}.{ending}")


def small(arguments):
    """The program's arguments with a small network before the typed ones and small sizes behind, which win."""
    program, *typed = arguments
    if program == "scripts/benchmark.py":
        return [*arguments, "--tiny", "--rounds", "1"]
    if program not in ("main_contrast.py", "main_linear.py", "scripts/preview_views.py"):
        return arguments
    network = NETWORK if program != "main_linear.py" and "--resume" not in typed else {}
    sizes = {name: value for name, value in SIZES.items() if name != "epochs" or "--stop_epoch" not in typed}
    return [program, *flags(network), *typed, *flags(sizes)]


def flags(values):
    return [part for name, value in values.items() for part in (f"--{name}", value)]


def run(line, monkeypatch):
    """In this process, unless the command starts processes itself."""
    program, *arguments = shlex.split(line, comments=True)
    split = next(i for i, part in enumerate(arguments) if part.endswith(".py"))
    arguments[split:] = small(arguments[split:])
    if program == "torchrun" or "--nprocs" in arguments:
        launcher = ["-m", "torch.distributed.run"] * (program == "torchrun")
        command = [sys.executable, *launcher, *arguments[:split], str(ROOT / arguments[split]), *arguments[split + 1 :]]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert ended.returncode == 0, f"{line}\n{ended.stderr}"
        return
    assert program == "python", f"do not know how to run: {line}"
    monkeypatch.setattr(sys, "argv", arguments)
    try:
        runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
    except SystemExit as end:
        assert not end.code, f"{line}\n{end.code}"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with everything the pages speak of, in which the commands run."""
    monkeypatch.chdir(tmp_path)
    classes = ("cat", "dog", "owl")
    for name in classes:
        pictures(tmp_path / "my/images/train" / name, [f"{name}{i}" for i in range(4)], "jpg")
        pictures(tmp_path / "my/images/val" / name, [f"{name}{i}" for i in range(2)], "jpg")
        pictures(tmp_path / "my/classes" / name, [f"{name}{i}" for i in range(7)], "png")
    pictures(tmp_path / "my/photos", [f"photo{i}" for i in range(9)], "jpg")
    listed = [f"classes/{name}/{name}{i}.png {name}\n" for name in classes for i in range(7)]
    (tmp_path / "my/list.txt").write_text("".join(listed))
    rng, labels = np.random.default_rng(0), np.arange(24) % 3
    images = rng.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    arrays = {f"{part}_{kind}": x for part in ("train", "test") for kind, x in (("images", images), ("labels", labels))}
    np.savez(tmp_path / "my/cifar10.npz", **arrays)
    weights = resnet("resnet18").state_dict()
    moco = {f"module.encoder_{which}.{name}": x for which in "qk" for name, x in weights.items()}
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": moco}, tmp_path / "moco_v2_200ep_pretrain.pth.tar")
    save_file(weights, tmp_path / "resnet18.safetensors")
    run("python main_contrast.py --data_folder my/images --save_score --name first --seed 1", monkeypatch)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page, workplace, monkeypatch):
    assert commands(page)
    for line in commands(page):
        run(line, monkeypatch)
