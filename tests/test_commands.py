"""The published command lines, word for word, on a tiny folder of pictures: only paths filled in and sizes appended."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from learning import checkpoint

ROOT = Path(__file__).parents[1]
FT = """--mixnorm --mixnorm_target posneg --sep_alpha --pos_alpha 2.0 --neg_alpha 1.6 --mask_distribution beta
    --expolation_mask --alpha 0.999 --multiprocessing-distributed --world-size 1 --rank 0 --save_score"""
PRETRAIN_1K = f"""main_contrast.py --method MoCov2 --data_folder your/path/to/imagenet-1K/dataset  --dataset imagenet
    --epochs 200 --input_res 224 --cosine --batch_size 256 --learning_rate 0.03   {FT}"""
LINEAR_1K = """main_linear.py --method MoCov2 --data_folder your/path/to/imagenet-1K/dataset
    --ckpt your/path/to/pretrain_model   --n_class 1000 --multiprocessing-distributed --world-size 1 --rank 0
    --epochs 100 --lr_decay_epochs 60,80"""
PRETRAIN_100 = f"""main_contrast.py --method MoCov2 --data_folder your/path/to/imagenet-1K/dataset
    --dataset imagenet100 --imagenet100path your/path/to/imagenet100.class  --epochs 200 --input_res 224 --cosine
    --batch_size 256 --learning_rate 0.03   {FT}"""
LINEAR_100 = """main_linear.py --method MoCov2 --data_folder your/path/to/imagenet-1K/dataset  --dataset imagenet100
    --imagenet100path your/path/to/imagenet100.class  --n_class 100  --ckpt your/path/to/pretrain_model
    --multiprocessing-distributed --world-size 1 --rank 0"""
WNIDS = ("n01440764", "n02018207", "n02086240", "n03000684")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An ImageFolder of four classes, and a class list that leaves one of them out."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 2)):
        for wnid in WNIDS:
            (root / split / wnid).mkdir(parents=True)
            for i in range(count):
                picture = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(picture).save(root / split / wnid / f"{i}.JPEG")
    (root / "imagenet100.class").write_text("\n".join(WNIDS[1:]) + "\n")
    return root


def run(command, folder, *, ckpt, name, sizes):
    filled = command.replace("your/path/to/imagenet-1K/dataset", str(folder))
    filled = filled.replace("your/path/to/imagenet100.class", str(folder / "imagenet100.class"))
    filled = filled.replace("your/path/to/pretrain_model", str(ckpt))
    paths = f"--model_path {folder}/save --tb_path {folder}/tb --name {name} --num_workers 1"
    program, *flags = f"{filled} {sizes} {paths}".split()
    ended = subprocess.run(
        [sys.executable, str(ROOT / program), *flags], capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    return folder / "save" / name, ended.stdout


@pytest.mark.parametrize("pretraining, probing, classes", [(PRETRAIN_1K, LINEAR_1K, 4), (PRETRAIN_100, LINEAR_100, 3)])
def test_published_commands(folder, pretraining, probing, classes):
    sizes = "--epochs 1 --batch_size 5 --nce_k 8 --input_res 32 --arch resnet18"
    trained, _ = run(pretraining, folder, ckpt="", name=f"pretrained{classes}", sizes=sizes)
    values = checkpoint.load(trained / "current.pth")["options"]
    assert (values["ft_pos"], values["ft_pos_alpha"], values["ft_pos_granularity"]) == ("extrapolate", 2.0, "batch")
    assert (values["ft_neg"], values["ft_neg_alpha"], values["ft_neg_granularity"]) == ("interpolate", 1.6, "batch")
    assert (values["key_momentum"], values["temperature"], values["head"]) == (0.999, 0.2, "mlp")
    with np.load(trained / "scores" / "scores_0001.npz") as scores:
        assert scores["positive"].shape == (classes, 5)

    sizes = "--epochs 2 --batch_size 5"
    probed, said = run(probing, folder, ckpt=trained / "current.pth", name=f"probed{classes}", sizes=sizes)
    assert f"more than the {classes} classes" in said
    results = json.loads((probed / "results.json").read_text())
    assert 0 <= results["linear"]["last"]["top1"] <= results["linear"]["last"]["top5"] <= 100


def test_help_needs_no_torch():
    code = "import sys; sys.argv = ['main_contrast.py', '--help']; import runpy\n"
    code += f"try: runpy.run_path({str(ROOT / 'main_contrast.py')!r}, run_name='__main__')\n"
    code += "except SystemExit: assert 'torch' not in sys.modules and 'numpy' not in sys.modules; print('light')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended.stdout.endswith("light\n")
