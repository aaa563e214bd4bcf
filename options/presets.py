"""What a data set and a method fix: option name -> default. Whatever is not named keeps the default of its field.

The published code lets a method's preset override the command line; here presets only move defaults, so typed wins.
"""

_SMALL = dict(input_res=32, arch="resnet18", key_momentum=0.99)
# A queue begins with random vectors. At full rate small data teach the network to tell those from pictures and little
# else: on 5,000 pictures it was still collapsed after 20 epochs, and with warm-up it was not.
_WARM = dict(warm=True)

HEADS = ("linear", "linear_wo_norm", "mlp", "mlp_bn", "2mlp_bn", "simclr", "simsiam", "byol")
VIEWS = ("Lab", "Luv", "YCbCr", "YDbDr", "YPbPr", "YIQ", "YUV", "XYZ", "CIERGB", "HSV", "HED")

DATASETS = {
    # Ten thousand small steps would be a waste on 5,000 drawings, and a queue much longer than the batch a trap: at
    # this size the network soon tells fresh keys from stale ones instead of pictures from each other.
    "shapes": _SMALL | _WARM | dict(width=0.25, batch_size=64, queue_size=256, queue_epoch=1, epochs=20, cosine=True),
    "cifar10": _SMALL | dict(crop_min=0.08, queue_size=4096),
    "cifar100": _SMALL | dict(crop_min=0.08, queue_size=4096),
    "stl10": dict(input_res=96, arch="resnet18", crop_min=0.08),
    "npz": _SMALL | dict(crop_min=0.08) | _WARM,
    "imagenet": dict(key_momentum=0.999),
    "imagenet100": dict(key_momentum=0.999, queue_size=65536),
    "folder": _WARM,
}

_LARS = dict(optimizer="lars", decay_all=False, cosine=True, warm=True)
_BANK = dict(mem="bank", head="linear", temperature=0.07, crop_min=0.08)

METHODS = {
    "MoCo": dict(recipe="mocov1", head="linear", temperature=0.07),
    "MoCoMLP": dict(recipe="mocov1", head="mlp", temperature=0.07),
    "MoCo_wo_norm": dict(recipe="mocov1", head="linear_wo_norm", temperature=0.07),
    "MoCov2": dict(recipe="mocov2", head="mlp", temperature=0.2),
    "MoCov2_tau0.1": dict(recipe="mocov2", head="mlp", temperature=0.1),
    # Wu et al., CVPR 2018; Tian et al., ECCV 2020; Misra & van der Maaten, CVPR 2020; Tian et al., NeurIPS 2020:
    # modality, memory, jigsaw, views, head and temperature as PyContrast combines them.
    "InsDis": _BANK | dict(recipe="mocov1"),
    "CMC": _BANK | dict(recipe="cmc", modal="CMC"),
    "PIRL": _BANK | dict(recipe="mocov1", jigsaw=True),
    "CMCv2": dict(recipe="cmcv2", head="mlp", temperature=0.2, modal="CMC"),
    "InfoMin": dict(recipe="infomin", head="mlp", temperature=0.15, jigsaw=True),
    # Chen et al., ICML 2020: LARS, warm-up, cosine, weight decay 1e-6. Of their two rules for the learning rate that
    # for small batches and short runs, .075 x sqrt(batch); 4,096 images take .3 x batch / 256.
    "SimCLR": dict(
        recipe="simclr",
        head="simclr",
        temperature=0.1,
        mem="batch",
        crop_min=0.08,
        learning_rate=1.2,
        weight_decay=1e-6,
        sync_bn=True,
        **_LARS,
    ),
    # Khosla et al., NeurIPS 2020.
    "SupCon": dict(recipe="mocov2", head="mlp", temperature=0.1, mem="batch", learning_rate=0.05, cosine=True),
    # Chen & He, CVPR 2021: the rate is .05 for a batch of 256; the predictor's does not fall.
    "SimSiam": dict(
        recipe="mocov2",
        head="simsiam",
        feat_dim=2048,
        mem="none",
        learning_rate=0.05,
        cosine=True,
        fix_pred_lr=True,
        sync_bn=True,
    ),
    # Grill et al., NeurIPS 2020: of 100 epochs; .45 for a batch of 256.
    "BYOL": dict(
        recipe="byol",
        head="byol",
        feat_dim=256,
        mem="none",
        crop_min=0.08,
        learning_rate=0.45,
        weight_decay=1e-6,
        key_momentum=0.99,
        key_schedule="cosine",
        sync_bn=True,
        **_LARS,
    ),
    # Caron et al., NeurIPS 2020: .6 for a batch of 256.
    "SwAV": dict(
        recipe="swav",
        head="mlp_bn",
        temperature=0.1,
        mem="none",
        crop_min=0.14,
        queue_size=None,
        learning_rate=0.6,
        weight_decay=1e-6,
        sync_bn=True,
        **_LARS,
    ),
    "Customize": {},
}

# What a data set needs of a method, above both. In a run of some hundred steps on the narrow network of the built-in
# pictures, a linear head or a half of it alone maps everything to one point, unless the head has batch norm, and
# SwAV's assignments are all alike unless they are sharper. PIRL learns more from what its bank saw last than from
# averages over its few epochs.
TOGETHER = {
    ("shapes", "InsDis"): dict(head="mlp_bn"),
    ("shapes", "CMC"): dict(head="mlp_bn", learning_rate=0.06),
    ("shapes", "PIRL"): dict(head="mlp_bn", bank_momentum=0.1),
    ("shapes", "MoCo"): dict(head="mlp_bn"),
    ("shapes", "CMCv2"): dict(head="mlp_bn"),
    ("shapes", "SimSiam"): dict(learning_rate=1.5, weight_decay=1e-6, **_LARS),
    ("shapes", "BYOL"): dict(learning_rate=1.5),
    ("shapes", "SwAV"): dict(epsilon=0.03, queue_size=256),
}


def presets(dataset: str, method: str) -> list[tuple[str, dict]]:
    """The layers of defaults that a data set and a method bring, lowest first, each with its name."""
    return [
        (f"dataset {dataset}", DATASETS[dataset]),
        (f"method {method}", METHODS[method]),
        (f"method {method} on {dataset}", TOGETHER.get((dataset, method), {})),
    ]
