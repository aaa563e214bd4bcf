"""What a data set and a method fix: option name -> default. Whatever is not named keeps the default of its field.

The published code lets a method's preset override the command line; here presets only move defaults, so typed wins.
"""

_SMALL = dict(input_res=32, arch="resnet18", key_momentum=0.99)
# A queue begins with random vectors. At full rate small data teach the network to tell those from pictures and little
# else: on 5,000 pictures it was still collapsed after 20 epochs, and with warm-up it was not (docs/results.md).
_WARM = dict(warm=True)

DATASETS = {
    # Ten thousand small steps would be a waste on 5,000 drawings, and a queue much longer than the batch a trap: at
    # this size the network soon tells fresh keys from stale ones instead of pictures from each other.
    "shapes": _SMALL | dict(width=0.25, batch_size=64, queue_size=256, epochs=20, cosine=True),
    "cifar10": _SMALL | dict(crop_min=0.08, queue_size=4096),
    "cifar100": _SMALL | dict(crop_min=0.08, queue_size=4096),
    "stl10": dict(input_res=96, arch="resnet18", crop_min=0.08),
    "npz": _SMALL | dict(crop_min=0.08) | _WARM,
    "imagenet": dict(key_momentum=0.999),
    "imagenet100": dict(key_momentum=0.999, queue_size=65536),
    "folder": _WARM,
}

METHODS = {
    "MoCo": dict(recipe="mocov1", head="linear", temperature=0.07),
    "MoCoMLP": dict(recipe="mocov1", head="mlp", temperature=0.07),
    "MoCo_wo_norm": dict(recipe="mocov1", head="linear_wo_norm", temperature=0.07),
    "MoCov2": dict(recipe="mocov2", head="mlp", temperature=0.2),
    "MoCov2_tau0.1": dict(recipe="mocov2", head="mlp", temperature=0.1),
    # Chen et al., ICML 2020: LARS, warm-up, cosine, weight decay 1e-6. Of their two rules for the learning rate that
    # for small batches and short runs, .075 x sqrt(batch); 4,096 images take .3 x batch / 256.
    "SimCLR": dict(
        recipe="simclr",
        head="simclr",
        temperature=0.1,
        mem="batch",
        crop_min=0.08,
        optimizer="lars",
        learning_rate=1.2,
        weight_decay=1e-6,
        cosine=True,
        warm=True,
    ),
    "Customize": {},
}
