import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models.encoder import Encoder
from models.heads import head
from models.momentum import MomentumEncoder
from models.norm import SplitBatchNorm, split_batch_norm
from models.resnet import resnet
from models.trunks import layers, trunk

CHANNELS_LAST = torch.channels_last


def small_encoder(**changes):
    return Encoder(**{"arch": "resnet18", "width": 0.25, "stem": "small", "head": "mlp", "feat_dim": 16, **changes})


# --- trunks


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_torchvision_weights_load_and_give_the_same_features(arch):
    theirs = getattr(torchvision.models, arch)(weights=None)
    theirs.fc = nn.Identity()
    for module in theirs.modules():  # trained-looking statistics, so that batch norm matters
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    ours = resnet(arch)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, features = theirs.eval()(images), ours.eval()(images)
    assert features.shape == (2, ours.feature_dim)
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize(
    ("arch", "millions", "feature_dim"),
    [
        ("resnet18", 11.18, 512),
        ("resnet50", 23.51, 2048),
        ("resnet50x2", 93.9, 4096),
        ("resnet50x4", 375.4, 8192),
        ("resnet101", 42.5, 2048),
        ("resnet152", 58.1, 2048),
        ("resnext50", 22.98, 2048),
        ("resnext101v1", 42.1, 2048),
        ("resnext101v2", 86.7, 2048),
        ("resnext101v3", 81.4, 2048),
        ("resnext152v1", 57.9, 2048),
    ],
)
def test_sizes_are_the_published_ones(arch, millions, feature_dim):
    with torch.device("meta"):
        built = trunk(arch)
    assert size(built, millions) == millions
    assert built.feature_dim == feature_dim


def size(network, like):
    """Millions of parameters, to as many digits."""
    return round(sum(p.numel() for p in network.parameters()) / 1e6, len(str(like).split(".")[1]))


def pair(arch, **changes):
    with torch.device("meta"):
        return Encoder(arch=arch, width=1.0, stem="imagenet", head="linear", feat_dim=128, channels=(1, 2), **changes)


@pytest.mark.parametrize(
    ("arch", "millions", "feature_dim"),
    [
        ("resnet50v1", 12.06, 2048),
        ("resnet50v2", 47.53, 4096),
        ("resnet50v3", 188.84, 8192),  # with PyContrast's stem of 128 channels; CMC keeps 64: 188.75
        ("resnet18v1", 5.69, 512),
        ("resnet101v1", 21.58, 2048),
        ("alexnet", 29.69, 4096),
    ],
)
def test_pairs_have_the_sizes_of_cmc(arch, millions, feature_dim):
    encoder = pair(arch)
    assert size(encoder, millions) == millions and encoder.feature_dim == feature_dim
    assert [next(trunk.parameters()).shape[1] for trunk in encoder.backbones] == [1, 2]


def test_the_trunks_of_a_pair_and_the_convolutions_of_alexnet_have_the_published_sizes():
    assert size(pair("resnet50").backbones, 11.8) == 11.8
    convolutions = nn.ModuleList(getattr(half, f"conv{i}") for half in pair("alexnet").backbones for i in range(1, 6))
    assert size(convolutions, 1.88) == 1.88


@pytest.mark.parametrize(("name", "width"), [("resnet18x2", 2), ("resnet18v2", 2), ("resnet18v3", 4), ("alexnetx2", 2)])
def test_width_can_be_typed_either_way(name, width):
    with torch.device("meta"):
        by_name, by_number = trunk(name), trunk(name[:-2], width=width)
    assert [p.shape for p in by_name.parameters()] == [p.shape for p in by_number.parameters()]


def test_small_stem_keeps_the_resolution():
    network = resnet("resnet18", width=0.25, in_channels=2, small_stem=True)
    assert network.conv1.weight.shape == (64, 2, 3, 3)
    assert network(torch.zeros(1, 2, 32, 32), "stem").shape == (1, 64, 32, 32)


def test_initial_values():
    torch.manual_seed(0)
    network = resnet("resnet18")
    weight = network.layer2[0].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert all(bn.weight.eq(1).all() for bn in network.modules() if isinstance(bn, nn.BatchNorm2d))


def test_unknown_architecture_is_a_sentence():
    with pytest.raises(ValueError, match="unknown architecture 'vgg16'; choose one of resnet18, .*, alexnet, "):
        trunk("vgg16")


# --- layers


@pytest.mark.parametrize(
    ("arch", "wanted"),
    [
        ("alexnet", [9600, 9216, 9600, 9600, 9216, 4096, 4096]),
        ("resnet50v1", [8192, 9216, 8192, 9216, 100352, 2048]),
        ("resnet50v2", [8192, 2 * 9216, 2 * 8192, 2 * 9216, 2 * 100352, 4096]),
        ("resnet18v1", [8192, 2304, 2048, 2304, 25088, 512]),
    ],
)
def test_the_linear_probes_of_cmc_have_the_published_inputs(arch, wanted):
    encoder = pair(arch).eval()
    images = torch.zeros(2, 3, 224, 224, device="meta")
    assert [encoder.features(images, layer).shape for layer in encoder.layers] == [(2, n) for n in wanted]


@pytest.mark.parametrize(("arch", "side"), [("resnet18", 32), ("resnet18", 96), ("alexnet", 32), ("alexnet", 100)])
def test_maps_are_pooled_as_published_and_never_enlarged(arch, side):
    encoder = small_encoder(arch=arch, stem="small" if side == 32 else "imagenet", channels=(1, 2)).eval()
    images = torch.randn(2, 3, side, side)
    pool = F.adaptive_max_pool2d if arch == "alexnet" else F.adaptive_avg_pool2d
    to = {"conv1": 10, "conv2": 6, "conv3": 5, "conv4": 5, "stem": 8, "layer1": 6, "layer2": 4, "layer3": 3}
    for layer in encoder.layers:
        maps = torch.cat([b(part, layer) for b, part in zip(encoder.backbones, images.split((1, 2), 1))], dim=1)
        wanted = pool(maps, to[layer]) if layer in to and maps.shape[-1] > to[layer] else maps
        assert torch.equal(encoder.features(images, layer), wanted.flatten(1))
    assert torch.equal(encoder.features(images, layer), encoder.features(images))
    assert encoder.layers == layers(arch) and layers("resnet50x2")[1] == "layer1"


def test_the_last_pool_of_alexnet_is_the_published_one_at_224_pixels():
    maps = torch.randn(2, 4, 13, 13)
    network = trunk("alexnet", width=0.03125)
    assert torch.equal(network.conv5[-1](maps), F.max_pool2d(maps, 3, 2))


@pytest.mark.parametrize(("side", "small"), [(16, True), (32, True), (64, True), (32, False), (300, False)])
def test_alexnet_takes_pictures_of_any_size(side, small):
    network = trunk("alexnet", width=0.03125, in_channels=2, small_stem=small)
    assert network(torch.randn(3, 2, side, side)).shape == (3, 128)
    assert network(torch.randn(3, 2, side, side), "conv1").shape[-1] >= (7 if small else 3)


def test_a_layer_is_what_the_published_network_computes_there():
    network, images = resnet("resnet18", width=0.25).eval(), torch.randn(2, 3, 64, 64)
    children = [network.conv1, network.bn1, network.relu, network.maxpool]
    maps = nn.Sequential(*children, network.layer1, network.layer2)(images)
    assert torch.equal(network(images, "layer2"), maps)
    assert torch.equal(network(images), network.layer4(network.layer3(maps)).mean((2, 3)))


# --- heads and encoder


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("linear", ["Linear", "UnitLength"]),
        ("linear_wo_norm", ["Linear"]),
        ("mlp", ["Linear", "ReLU", "Linear", "UnitLength"]),
        ("mlp_bn", ["Linear", "BatchNorm1d", "ReLU", "Linear", "UnitLength"]),
        ("2mlp_bn", ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "UnitLength"]),
    ],
)
def test_heads(kind, layers):
    built = head(kind, 24, 8)
    assert [type(layer).__name__ for layer in built] == layers
    linears = [layer for layer in built if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linears] == [(24, 24)] * (len(linears) - 1) + [(8, 24)]
    lengths = built(torch.randn(5, 24)).norm(dim=1)
    assert torch.allclose(lengths, torch.ones(5)) == (kind != "linear_wo_norm")


def test_unknown_head_is_a_sentence():
    with pytest.raises(ValueError, match="unknown head 'deep'; choose one of linear"):
        head("deep", 8, 8)


@pytest.mark.parametrize("channels", [(3,), (1, 2)])
def test_encoder_gives_one_embedding_per_modality(channels):
    encoder = small_encoder(channels=channels)
    images = torch.randn(4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        embeddings, features = encoder(images), encoder.features(images)
    assert [e.shape for e in embeddings] == [(4, 16)] * len(channels)
    assert features.shape == (4, encoder.feature_dim) == (4, 128)
    assert {e.dtype for e in (*embeddings, features)} == {torch.float32}
    assert all(torch.allclose(e.norm(dim=1), torch.ones(4)) for e in embeddings)


def test_features_are_the_trunks_outputs_side_by_side():
    encoder = small_encoder(channels=(1, 2)).eval()
    images = torch.randn(2, 3, 16, 16)
    parts = [encoder.backbones[0](images[:, :1]), encoder.backbones[1](images[:, 1:])]
    assert torch.equal(encoder.features(images), torch.cat(parts, dim=1))
    assert torch.equal(encoder(images)[1], F.normalize(encoder.heads[1][:-1](parts[1]), dim=1))


# --- split batch norm


def randomised(norm):
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return norm


def by_hand(norm, x, splits):
    """Each chunk through its own copy of an ordinary batch norm with the same parameters."""
    copies = [copy.deepcopy(norm) for _ in range(splits)]
    for each in copies:
        each.weight, each.bias = norm.weight, norm.bias
    out = torch.cat([each(part) for each, part in zip(copies, x.tensor_split(splits))])
    mean = torch.stack([each.running_mean for each in copies]).mean(0)
    var = torch.stack([each.running_var for each in copies]).mean(0)
    return out, mean, var


@pytest.mark.parametrize("splits", [1, 3, 4])
@pytest.mark.parametrize("layout", ["vectors", "contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_batch_norm_equals_batch_norm_per_chunk(splits, layout, dtype):
    torch.manual_seed(0)
    norm = randomised(nn.BatchNorm1d(6) if layout == "vectors" else nn.BatchNorm2d(6))
    split = split_batch_norm(copy.deepcopy(norm), splits)
    x = torch.randn(14, 6) if layout == "vectors" else torch.randn(14, 6, 5, 3)  # 14 = 5 + 5 + 4 = 4 + 4 + 3 + 3
    if layout == "channels_last":
        x = x.contiguous(memory_format=CHANNELS_LAST)
    ours, theirs = (x.to(dtype).requires_grad_() for _ in range(2))
    out, (expected, mean, var) = split(ours), by_hand(norm, theirs, splits)
    weights = torch.randn_like(out)
    out.backward(weights)
    expected.backward(weights)

    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    assert out.dtype == ours.grad.dtype == dtype
    torch.testing.assert_close(out, expected, **tolerance)
    torch.testing.assert_close(ours.grad, theirs.grad, **tolerance)
    torch.testing.assert_close(split.weight.grad, norm.weight.grad, **tolerance)
    torch.testing.assert_close(split.bias.grad, norm.bias.grad, **tolerance)
    torch.testing.assert_close(split.running_mean, mean)
    torch.testing.assert_close(split.running_var, var)
    assert split.num_batches_tracked == 1
    if layout == "channels_last":
        assert out.is_contiguous(memory_format=CHANNELS_LAST) and ours.grad.is_contiguous(memory_format=CHANNELS_LAST)


def test_split_batch_norm_gradient_numerically():
    torch.manual_seed(0)
    split = SplitBatchNorm(randomised(nn.BatchNorm1d(3).double()), 2)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def run(x, weight, bias):
        return torch.func.functional_call(split, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, split.weight, split.bias))


def test_split_batch_norm_in_an_encoder():
    encoder = small_encoder(head="mlp_bn")
    names, images = list(encoder.state_dict()), torch.randn(6, 3, 16, 16)
    before = encoder.eval()(images)[0]
    split = split_batch_norm(encoder, 2)
    assert not any(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in split.modules())
    assert list(split.state_dict()) == names
    assert torch.equal(split(images)[0], before)  # evaluation is ordinary batch norm

    split.train()
    parts = torch.cat([split_by_one(split)(part)[0] for part in images.split(3)])
    torch.testing.assert_close(split(images)[0], parts)


def split_by_one(encoder):
    """The same encoder with one chunk, which is ordinary batch norm."""
    ordinary = copy.deepcopy(encoder)
    for module in ordinary.modules():
        if isinstance(module, SplitBatchNorm):
            module.splits = 1
    return ordinary


def test_split_batch_norm_under_autocast_in_channels_last():
    encoder = split_batch_norm(small_encoder(), 3).to(memory_format=CHANNELS_LAST)
    images = torch.randn(9, 3, 16, 16).contiguous(memory_format=CHANNELS_LAST)
    with torch.autocast("cpu", torch.bfloat16):
        loss = encoder(images)[0].sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


def test_too_few_rows_for_the_splits_is_a_sentence():
    with pytest.raises(ValueError, match="4 images are too few for 8 chunks: lower --bn_splits"):
        SplitBatchNorm(nn.BatchNorm2d(2), 8)(torch.zeros(4, 2, 3, 3))


# --- momentum encoder


def test_momentum_update_is_the_formula_on_parameters_only():
    source = small_encoder(head="mlp_bn")
    momentum = MomentumEncoder(source)
    start = copy.deepcopy(momentum.encoder)
    for p in source.parameters():
        p.data.normal_()
    for buffer in source.buffers():
        buffer.add_(1)
    momentum.update(source, 0.9)
    for ours, old, theirs in zip(momentum.encoder.parameters(), start.parameters(), source.parameters()):
        torch.testing.assert_close(ours, 0.9 * old + 0.1 * theirs)
    assert all(torch.equal(a, b) for a, b in zip(momentum.encoder.buffers(), start.buffers()))


def test_momentum_encoder_never_receives_gradients_but_has_its_own_statistics():
    source = small_encoder()
    momentum = MomentumEncoder(source)
    keys = momentum(torch.randn(4, 3, 16, 16))
    assert not keys[0].requires_grad and not any(p.requires_grad for p in momentum.parameters())
    assert momentum.encoder.backbones[0].bn1.num_batches_tracked == 1
    assert source.backbones[0].bn1.num_batches_tracked == 0


@pytest.mark.parametrize(("momentum", "same_as"), [(1.0, "start"), (0.0, "source")])
def test_momentum_at_its_ends(momentum, same_as):
    source = nn.Linear(3, 2)
    key = MomentumEncoder(source)
    start = copy.deepcopy(source)
    source.weight.data.normal_()
    key.update(source, momentum)
    assert torch.equal(key.encoder.weight, {"start": start, "source": source}[same_as].weight)
