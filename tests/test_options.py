"""Options: layers, published spellings, refusals, notes, JSON."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from options import base, contrast, linear
from options.contrast import PublishedFT, published_to_ft
from options.presets import DATASETS, METHODS

PRETRAIN_IMAGENET = """--method MoCov2 --data_folder your/path/to/imagenet-1K/dataset  --dataset imagenet  --epochs 200
    --input_res 224 --cosine --batch_size 256 --learning_rate 0.03   --mixnorm --mixnorm_target posneg --sep_alpha
    --pos_alpha 2.0 --neg_alpha 1.6 --mask_distribution beta --expolation_mask --alpha 0.999
    --multiprocessing-distributed --world-size 1 --rank 0 --save_score"""
PRETRAIN_IMAGENET100 = PRETRAIN_IMAGENET.replace(
    "--dataset imagenet ", "--dataset imagenet100  --imagenet100path your/path/to/imagenet100.class "
)
LINEAR_IMAGENET = """--method MoCov2 --data_folder your/path/to/imagenet-1K/dataset --ckpt your/path/to/pretrain_model
    --n_class 1000 --multiprocessing-distributed --world-size 1 --rank 0 --epochs 100 --lr_decay_epochs 60,80"""
LINEAR_IMAGENET100 = """--method MoCov2 --data_folder your/path/to/imagenet-1K/dataset  --dataset imagenet100
    --imagenet100path your/path/to/imagenet100.class  --n_class 100  --ckpt your/path/to/pretrain_model
    --multiprocessing-distributed --world-size 1 --rank 0"""
PUBLISHED_BASE = """--data_folder x --model_path ./save --tb_path ./tb --dataset imagenet100 --imagenet100path y
    --print_freq 10 --save_freq 20 --batch_size 16 -j 8 --num_workers 8 --epochs 200 --learning_rate 0.03
    --lr_decay_epochs 120,160
    --lr_decay_rate 0.1 --weight_decay 1e-4 --momentum 0.9 --cosine --method MoCo --modal RGB --mem moco --arch resnet50
    -d 128 --feat_dim 128 -k 65536 --nce_k 65536 -t 0.07 --nce_t 0.07 --alpha 0.999 --head linear --resume r.pth
    --world-size -1 --rank -1 --dist-url tcp://127.0.0.1:23456 --dist-backend nccl --seed 1 --gpu 0
    --multiprocessing-distributed"""
FT_FIELDS = [field.name for field in dataclasses.fields(contrast.ContrastOptions) if field.name.startswith("ft_")]


def pretrain(line: str = ""):
    return contrast.parse(line.split())


def probe(line: str = ""):
    return linear.parse(["--ckpt", "c.pth", *line.split()])


def refusal(capsys, parse, line: str) -> str:
    with pytest.raises(SystemExit) as exit:
        parse(line)
    assert exit.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0].split(": ", 1)[1]


def shown(capsys, parse, line: str) -> str:
    with pytest.raises(SystemExit) as exit:
        parse(line)
    assert exit.value.code == 0
    return capsys.readouterr().out


# Layers


def test_layers_from_field_to_command_line():
    options, sources, notes = pretrain("--dataset cifar10 --data_folder x --method MoCov2 --head mlp_bn")
    assert (options.feat_dim, sources["feat_dim"]) == (128, "default")
    assert (options.arch, sources["arch"]) == ("resnet18", "dataset cifar10")
    assert (options.temperature, sources["temperature"]) == (0.2, "method MoCov2")
    assert (options.head, sources["head"]) == ("mlp_bn", "command line")
    assert notes == []


def test_typed_wins_even_when_it_equals_the_field_default():
    options, sources, _ = pretrain("--method MoCov2 --nce_t 0.07 --arch resnet50")
    assert (options.temperature, options.arch) == (0.07, "resnet50")
    assert sources["temperature"] == sources["arch"] == "command line"


def test_nothing_typed_is_mocov2_on_the_built_in_set():
    options, sources, notes = pretrain()
    assert (options.method, options.dataset, options.recipe, options.head) == ("MoCov2", "shapes", "mocov2", "mlp")
    assert (options.input_res, options.arch, options.key_momentum) == (32, "resnet18", 0.99)
    assert set(sources) == {field.name for field in dataclasses.fields(options)}
    assert notes == []


def test_data_folder_alone_means_folder():
    options, sources, _ = pretrain("--data_folder pictures")
    assert (options.dataset, sources["dataset"]) == ("folder", "implied by --data_folder")
    assert (options.arch, options.input_res) == ("resnet50", 224)
    assert pretrain("--data_folder pictures --dataset imagenet")[0].dataset == "imagenet"


@pytest.mark.parametrize("layer", [*DATASETS.values(), *(dict(layer, method=name) for name, layer in METHODS.items())])
def test_presets_name_existing_options(layer):
    dataclasses.replace(contrast.ContrastOptions(data_folder="x"), **layer).validate()


@pytest.mark.parametrize(
    "method, recipe, head, temperature",
    [
        ("MoCo", "mocov1", "linear", 0.07),
        ("MoCoMLP", "mocov1", "mlp", 0.07),
        ("MoCo_wo_norm", "mocov1", "linear_wo_norm", 0.07),
        ("MoCov2", "mocov2", "mlp", 0.2),
        ("SimCLR", "simclr", "simclr", 0.1),
        ("MoCov2_tau0.1", "mocov2", "mlp", 0.1),
        ("Customize", "mocov1", "linear", 0.07),
    ],
)
def test_methods_are_the_published_ones(method, recipe, head, temperature):
    options, _, _ = pretrain(f"--method {method} --data_folder pictures")
    assert (options.recipe, options.head, options.temperature) == (recipe, head, temperature)


# Spelling


def test_flags_take_dashes_equals_signs_and_aliases():
    options, _, _ = pretrain("--batch-size=8 --lr 0.1 -j4 -d 16 -k 32 --aug B --no-pre-scores --save-score --rank -1")
    assert (options.batch_size, options.learning_rate, options.num_workers) == (8, 0.1, 4)
    assert (options.feat_dim, options.queue_size, options.recipe) == (16, 32, "mocov2")
    assert (options.pre_scores, options.save_score, options.node_rank) == (False, True, -1)


def test_values_have_the_type_of_their_annotation():
    options, _, _ = pretrain("--lr_decay_epochs 6,8 --bn_splits 4 --epochs 10 --weight_decay 0")
    assert (options.lr_decay_epochs, options.bn_splits, options.weight_decay) == ((6, 8), 4, 0.0)
    assert isinstance(options.weight_decay, float)
    assert pretrain("--bn_splits auto")[0].bn_splits == "auto"


def test_amp_without_a_value_means_auto():
    assert pretrain()[0].amp == "off"
    assert pretrain("--amp --cosine")[0].amp == "auto"
    assert pretrain("--amp bf16")[0].amp == "bf16"


def test_opt_level_maps_to_amp():
    options, sources, notes = pretrain("--opt_level O1")
    assert (options.amp, sources["amp"]) == ("auto", "published --opt_level O1")
    assert notes == ["--opt_level O1 maps to --amp auto"]
    options, _, notes = pretrain("--amp off --opt_level O2")
    assert (options.amp, notes) == ("off", ["--opt_level has no effect next to --amp off"])


# Published command lines


@pytest.mark.parametrize("line, dataset", [(PRETRAIN_IMAGENET, "imagenet"), (PRETRAIN_IMAGENET100, "imagenet100")])
def test_published_pretraining_commands(line, dataset):
    options, sources, notes = pretrain(line)
    assert (options.dataset, options.arch, options.head, options.input_res) == (dataset, "resnet50", "mlp", 224)
    assert (options.world_size, options.node_rank, options.multiprocessing_distributed) == (1, 0, True)
    assert (options.key_momentum, options.temperature, options.cosine, options.save_score) == (0.999, 0.2, True, True)
    assert (options.ft_pos, options.ft_pos_alpha, options.ft_pos_granularity) == ("extrapolate", 2.0, "batch")
    assert (options.ft_neg, options.ft_neg_alpha, options.ft_neg_granularity) == ("interpolate", 1.6, "batch")
    assert (options.ft_post_norm, options.ft_begin_epoch) == ("none", 0)
    assert sources["ft_pos"].startswith("published --mixnorm --mixnorm_target posneg")
    assert notes == []


@pytest.mark.parametrize("line, dataset", [(LINEAR_IMAGENET, None), (LINEAR_IMAGENET100, "imagenet100")])
def test_published_linear_commands(line, dataset):
    options, _, notes = linear.parse(line.split())
    assert (options.dataset, options.method, options.ckpt) == (dataset, "MoCov2", "your/path/to/pretrain_model")
    assert (options.epochs, options.lr_decay_epochs) == (100, (60, 80))
    assert options.learning_rate is None  # chosen by architecture and layer
    assert notes == []


def test_every_published_flag_of_both_programs():
    line = PUBLISHED_BASE.replace("--gpu 0", "")
    options, _, _ = pretrain(
        line + " --aug A --warm --amp --opt_level O2 --input_res 224 --mixnorm --mixnorm_target pos --postmix_norm"
        " --mask_distribution uniform --dim_mask both --beta_alpha 2.0 --norm_target pos --custom_head mlp_bn"
        " --exp_iter 1 --mix_start_epoch 3 --save_score"
    )
    assert (options.recipe, options.head, options.ft_begin_epoch, options.amp) == ("mocov1", "mlp_bn", 3, "auto")
    options, _, _ = probe(PUBLISHED_BASE + " --jigsaw -m 0.5 --nce_m 0.5 --aug_linear RA --crop 0.2 --use_ema")
    assert (options.jigsaw, options.bank_momentum, options.key_momentum) == (True, 0.5, 0.999)


# Published feature transformation


OFF = dict(ft_pos="none", ft_neg="none", ft_post_norm="none", ft_begin_epoch=0)


def part(name, kind, alpha, distribution, granularity):
    values = dict(alpha=alpha, distribution=distribution, granularity=granularity)
    return {f"ft_{name}": kind} | {f"ft_{name}_{setting}": value for setting, value in values.items()}


@pytest.mark.parametrize("sep_alpha", [False, True])
@pytest.mark.parametrize("dim_mask", ["none", "pos", "neg", "both"])
@pytest.mark.parametrize("distribution", ["uniform", "beta"])
@pytest.mark.parametrize("target", ["pos", "neg", "posneg"])
def test_published_table(target, distribution, dim_mask, sep_alpha):
    flags = PublishedFT(
        mixnorm=True, mixnorm_target=target, mask_distribution=distribution, dim_mask=dim_mask, sep_alpha=sep_alpha,
        beta_alpha=0.5, pos_alpha=3.0, neg_alpha=4.0,
    )  # fmt: skip
    expected = dict(OFF)
    if target == "posneg" and distribution == "beta" and sep_alpha:
        pos_granularity = {"none": "batch", "pos": "dim", "neg": "batch", "both": "dim"}[dim_mask]
        neg_granularity = {"none": "batch", "pos": "batch", "neg": "dim", "both": "dim"}[dim_mask]
        expected |= part("pos", "interpolate", 3.0, "beta", pos_granularity)
        expected |= part("neg", "interpolate", 4.0, "beta", neg_granularity)
    else:
        if target in ("pos", "posneg"):
            expected |= part("pos", "interpolate", 0.5, distribution, "dim")
        if target in ("neg", "posneg"):
            expected |= part("neg", "interpolate", 0.5, distribution, "dim")
    assert published_to_ft(flags) == expected


def test_expolation_moves_the_positives_only():
    changes = published_to_ft(PublishedFT(mixnorm=True, mixnorm_target="posneg", expolation_mask=True))
    assert (changes["ft_pos"], changes["ft_neg"]) == ("extrapolate", "interpolate")


def test_post_norm_is_about_the_positives_whatever_norm_target_says():
    for target, expected in (("pos", "pos"), ("posneg", "pos"), ("neg", "none")):
        flags = PublishedFT(mixnorm=True, mixnorm_target=target, postmix_norm=True, norm_target="neg")
        assert published_to_ft(flags)["ft_post_norm"] == expected


def test_published_flags_without_mixnorm_do_nothing():
    options, sources, notes = pretrain("--mixnorm_target posneg --pos_alpha 3")
    assert [getattr(options, name) for name in FT_FIELDS] == [
        field.default for field in dataclasses.fields(options) if field.name in FT_FIELDS
    ]
    assert {sources[name] for name in FT_FIELDS} == {"default"}
    assert sorted(notes) == [
        "--mixnorm_target has no effect without --mixnorm, as published",
        "--pos_alpha has no effect without --mixnorm, as published",
    ]


@pytest.mark.parametrize(
    "line, flags",
    [
        ("--dim_mask both", ["dim_mask"]),
        ("--mixnorm_target pos --sep_alpha --pos_alpha 3", ["sep_alpha", "pos_alpha"]),
        ("--mixnorm_target posneg --sep_alpha --beta_alpha 3", ["beta_alpha"]),
        ("--mask_distribution uniform --beta_alpha 3", ["beta_alpha"]),
        ("--postmix_norm --norm_target neg", ["postmix_norm", "norm_target"]),
        ("--mixnorm_target posneg --sep_alpha --pos_alpha 3 --dim_mask both --postmix_norm --expolation_mask", []),
    ],
)
def test_published_flags_that_do_nothing_are_named(line, flags):
    notes = pretrain("--mixnorm " + line)[2]
    assert {note.split()[0] for note in notes} == {f"--{flag}" for flag in flags}


def test_begin_epoch_counts_without_save_score():
    assert pretrain("--mixnorm --mix_start_epoch 30 --save_score")[2] == []
    options, _, notes = pretrain("--mixnorm --mix_start_epoch 30")
    assert options.ft_begin_epoch == 30
    assert notes == ["--mix_start_epoch counts without --save_score too, unlike in the published code"]


# Refusals


@pytest.mark.parametrize(
    "line, words",
    [
        ("--mixnorm --expolation_mask", ["--expolation_mask", "--mixnorm_target neg"]),
        ("--ft_pos extrapolate --mixnorm", ["--ft_pos", "--mixnorm"]),
        ("--mixnorm --beta_alpha 0", ["--beta_alpha", "above 0"]),
        ("--batch_sise 8", ["--batch_sise", "did you mean --batch_size?"]),
        ("--batchsize 8", ["did you mean --batch_size?"]),
        ("--batch 8", ["there is no flag --batch", "did you mean --batch_size?"]),
        ("--bs 8", ["did you mean --batch_size"]),
        ("--lr-decay 0.1", ["did you mean --lr_decay_rate or --lr_decay_epochs?"]),
        ("-lr 0.1", ["did you mean --lr?"]),
        ("--xyzzy", ["--help lists the flags"]),
        ("--epochs", ["--epochs needs a value"]),
        ("--method mocov2", ["did you mean MoCov2?"]),
        ("--dataset imagenet-100", ["did you mean imagenet100?"]),
        ("8", ["'8'", "flag"]),
        ("--feature_mix", ["--feature_mix", "never had an effect"]),
        ("--mix_ratio 1.0", ["--mix_ratio", "never had an effect"]),
        ("--mix-alpha=0.2", ["--mix_alpha", "never had an effect"]),
        ("--crop 0.2", ["--crop", "main_linear.py"]),
        ("--method DINO", ["--method", "MoCov2", "'DINO'"]),
        ("--modal LAB", ["--modal", "one of RGB, CMC", "'LAB'"]),
        ("--aug F", ["--aug", "mocov1, mocov2", "'F'"]),
        *(
            (f"--method {method} --mem {mem}", [f"--method {method}", f"leave --mem {mem} out"])
            for method, mem in [("SimSiam", "moco"), ("BYOL", "bank"), ("SwAV", "batch"), ("SupCon", "none")]
        ),
        ("--mem none", ["--mem none", "SimSiam, BYOL, SwAV"]),
        *(
            (f"--method {method} --ft_neg {kind}", [f"--ft_neg {kind}", f"--method {method}", "--ft_pos works"])
            for method, kind in [("SimSiam", "interpolate"), ("BYOL", "append"), ("SwAV", "interpolate")]
        ),
        ("--method SimSiam --mixnorm", ["--ft_neg", "SimSiam"]),
        *(
            (f"--method {method} --modal CMC", ["--modal CMC", method])
            for method in ("SupCon", "SimSiam", "BYOL", "SwAV")
        ),
        *((f"--method {method} --jigsaw", ["--jigsaw", "memory"]) for method in ("SimCLR", "SupCon", "BYOL", "SwAV")),
        ("--method SimCLR --loss nce", ["--loss nce", "--mem batch"]),
        ("--method SwAV --loss nce", ["--loss nce", "--mem none"]),
        ("--method SupCon --batch_size 2", ["--batch_size 2", "--mem batch", "4 or more"]),
        ("--method InsDis --queue_size 0", ["--queue_size 0", "take 4 or more"]),
        ("--method MoCo -k 0", ["--queue_size 0", "take 4 or more"]),
        ("--sync_bn --bn_splits 2", ["--sync_bn", "--bn_splits 2"]),
        ("--epochs 1.5", ["--epochs", "a whole number", "'1.5'"]),
        ("--temperature nan", ["--temperature", "a number"]),
        ("--bn_splits many", ["a whole number or only auto", "'many'"]),
        ("--lr_decay_epochs 6,x", ["--lr_decay_epochs", "whole numbers"]),
        ("--temperature 0", ["--temperature must be above 0, not 0.0"]),
        ("--batch_size 0", ["--batch_size must be above 0"]),
        ("--momentum 1", ["--momentum must be"]),
        ("--alpha 1.1", ["--key_momentum must be between 0 and 1"]),
        ("--crop_min 0", ["--crop_min must be"]),
        ("--ft_neg_alpha -1", ["--ft_neg_alpha must be above 0"]),
        ("--knn_freq -1", ["--knn_freq must be 0 or more"]),
        ("--lr_decay_epochs 0,5", ["--lr_decay_epochs must be above 0, not 0,5"]),
        ("--lr_decay_epochs 80,60", ["--lr_decay_epochs must ascend, not 80,60"]),
        ("--bn_splits 9 --batch_size 8", ["--bn_splits", "--batch_size 8"]),
        ("--gpu 0 --device cpu", ["--gpu", "--device cpu"]),
        ("--gpu 0 --nprocs 2", ["--gpu", "--nprocs 2"]),
        ("--nprocs 3 --batch_size 64", ["--batch_size 64", "3 processes", "63"]),
        ("--nprocs 8 --batch_size 4", ["--batch_size 4", "8 processes", "take 8"]),
        ("--nprocs 2 --world_size 2 --rank 0 --batch_size 6", ["4 processes"]),
        ("--name a/b", ["--name 'a/b'", "--model_path"]),
        ("--name=", ["--name ''"]),
        ("--name ..", ["--name '..'"]),
        ("--epochs 0", ["--epochs must be above 0"]),
        ("--world-size 2", ["--world_size 2", "--rank"]),
        ("--world-size 2 --rank 2", ["--rank 2", "--world_size 2"]),
        ("--seed -1", ["--seed must be"]),
        *((f"--dataset {name}", [f"--dataset {name}", "--data_folder"]) for name in DATASETS if name != "shapes"),
    ],
)
def test_main_contrast_refuses(capsys, line, words):
    message = refusal(capsys, pretrain, line)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "line, words",
    [
        ("--mixnorm", ["--mixnorm", "main_contrast.py"]),
        ("--ft_pos extrapolate", ["--ft_pos", "main_contrast.py"]),
        ("--aug A", ["--aug", "main_contrast.py"]),
        ("--ckpt2 x", ["did you mean --ckpt?"]),
        ("--cache_features --aug_linear RA", ["--cache_features", "--aug_linear RA"]),
        ("--n_class 0", ["--n_class must be above 0"]),
        ("--nprocs 3", ["--batch_size 256", "3 processes"]),
        ("--dry_run", ["--dry_run", "main_contrast.py"]),
        ("--eval kn", ["did you mean knn?"]),
    ],
)
def test_main_linear_refuses(capsys, line, words):
    message = refusal(capsys, probe, line)
    assert all(word in message for word in words), message


def test_neighbours_need_no_even_shares():
    assert probe("--eval knn --nprocs 3")[0].nprocs == 3


def test_main_linear_without_a_checkpoint_is_the_untrained_baseline():
    options, _, _ = linear.parse(["--eval", "knn", "--width", "0.25"])
    assert options.ckpt is None and options.width == 0.25


# Notes


@pytest.mark.parametrize(
    "line, words",
    [
        ("--ft_pos_alpha 3", ["--ft_pos_alpha", "--ft_pos is none"]),
        ("--ft_pos extrapolate --ft_neg_granularity dim", ["--ft_neg_granularity", "--ft_neg is none"]),
        ("--ft_neg append --ft_neg_distribution uniform --ft_neg_alpha 3", ["--ft_neg_alpha", "uniform"]),
        ("--ft_post_norm both", ["--ft_post_norm", "--ft_pos and --ft_neg are none"]),
        ("--ft_pos extrapolate --ft_post_norm neg", ["--ft_post_norm", "--ft_neg is none"]),
        ("--ft_begin_epoch 3", ["--ft_begin_epoch", "none"]),
        ("--cosine --lr_decay_epochs 6,8", ["--lr_decay_epochs", "ignored under --cosine"]),
        (
            "--dataset imagenet --data_folder x --epochs 120",
            ["never drops", "120,160", "--epochs 120"],
        ),  # a drop follows its epoch
        ("--dataset imagenet --data_folder x --imagenet100path y", ["--imagenet100path", "--dataset imagenet"]),
        ("--dataset shapes --data_folder x", ["--data_folder", "--dataset shapes"]),
        ("--gpu 1 --multiprocessing-distributed", ["--gpu", "--multiprocessing_distributed"]),
        ("--stop_epoch 30", ["--stop_epoch 30", "--epochs 20"]),
        ("--warm --warmup_epochs 3", ["--warm ", "--warmup_epochs 3"]),
        ("-m 0.5", ["--bank_momentum", "--mem moco"]),
        ("--method InsDis --alpha 0.9", ["--key_momentum", "no key encoder"]),
        ("--method BYOL -t 0.2", ["--temperature", "no softmax"]),
        ("--method SimSiam -k 64", ["--queue_size", "--mem none"]),
        ("--method SupCon --key_schedule cosine", ["--key_schedule", "no key encoder"]),
        ("--beta 0.3", ["--beta", "without --jigsaw"]),
        ("--method PIRL --view Lab", ["--view", "--modal RGB"]),
        ("--prototypes 30", ["--prototypes", "SwAV"]),
        ("--method BYOL --fix_pred_lr", ["--fix_pred_lr", "BYOL"]),
    ],
)
def test_main_contrast_notes(line, words):
    notes = pretrain(line)[2]
    assert len(notes) == 1 and all(word in notes[0] for word in words), notes


def test_main_linear_notes():
    assert probe("--knn_k 5")[2] == ["--knn_k has no effect with --eval linear"]
    assert probe("--eval knn --crop 0.5 --knn_k 5")[2] == ["--crop has no effect with --eval knn"]
    assert probe("--cache_features --crop 0.5")[2] == ["--crop has no effect with --cache_features"]


def test_what_is_typed_about_a_checkpoint_is_compared_with_it():
    trained = dict(method="MoCov2", arch="resnet18", temperature=0.2)
    assert linear.contradictions(probe()[0], trained) == []
    assert linear.contradictions(probe("--arch resnet18 --nce_t 0.2 --no_jigsaw")[0], trained) == []
    assert linear.contradictions(probe("--arch resnet50 --jigsaw")[0], trained) == [
        "--arch resnet50 contradicts the checkpoint, trained with resnet18: leave the flag out",
        "--jigsaw True contradicts the checkpoint, trained without it: leave the flag out",
    ]


# Help, JSON, start


def default(text, flag):
    return text.split(f"  --{flag} ", 1)[1].split("[", 1)[1].split("]", 1)[0]


def test_help_shows_the_defaults_and_who_chose_them(capsys):
    text = shown(capsys, pretrain, "--method MoCov2 --dataset cifar10 --help")  # asks for no --data_folder
    flags = ("temperature", "arch", "feat_dim")
    assert [default(text, flag) for flag in flags] == ["0.2, MoCov2", "resnet18, cifar10", "128"]
    text = shown(capsys, pretrain, "-h --method MoCo --data_folder x --lr 7 --mixnorm")
    assert [default(text, flag) for flag in ("temperature", "arch")] == ["0.07, MoCo", "resnet50"]
    assert [default(text, flag) for flag in ("learning_rate", "ft_neg_alpha")] == ["7.0, typed", "2.0, published"]
    assert default(text, "stop_epoch") == "0"
    assert "turn off: record the scores before FT too" in text
    assert default(shown(capsys, probe, "--epochs 3 --help"), "epochs") == "3, typed"


@pytest.mark.parametrize("parse, longest", [(pretrain, 102), (probe, 64)])
def test_help_is_complete_and_fits_a_screen(capsys, parse, longest):
    text = shown(capsys, parse, "--help")
    classes = (contrast.ContrastOptions, PublishedFT) if parse is pretrain else (linear.LinearOptions,)
    for field in (field for cls in classes for field in dataclasses.fields(cls)):
        assert re.search(rf"\s--(no_)?{field.name}\b", text), field.name
        assert f"\n{field.metadata['group']}" in text
    assert max(map(len, text.splitlines())) <= 100 and len(text.splitlines()) <= longest


def test_json_holds_every_value_and_its_source():
    options, sources, _ = pretrain("--lr_decay_epochs 6,8 --epochs 10 --mixnorm")
    document = json.loads(json.dumps(base.to_json(options, sources)))
    assert document["values"]["lr_decay_epochs"] == [6, 8] and document["sources"] == sources
    assert document["values"].keys() == document["sources"].keys()


def test_the_table_tells_every_value_and_its_source():
    options, sources, _ = pretrain("--method MoCo --cosine")
    lines = [line.split(maxsplit=2) for line in base.table(options, sources)]
    assert ["cosine", "on", "command line"] in lines and ["temperature", "0.07", "method MoCo"] in lines
    assert {line[0] for line in lines} >= set(sources)


def test_options_start_without_heavy_imports():
    code = "import sys, options.contrast, options.linear; print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
