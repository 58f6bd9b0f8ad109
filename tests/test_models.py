import copy
import hashlib
import math

import pytest
import torch
from torch import fx, nn

from companion.runs.models import ModelName, build, parse, resnet, torchvision, vgg
from companion.runs.models.layers import ChannelNorm
from repairlib.corrections import fold_batchnorms

NAMES = [
    "mlp1-plain-w7", "mlp10-bn-w16", "mlp3-fused-w16", "vgg11-plain-w0.125", "vgg13-bn-w0.125", "vgg16-bn-w0.125",
    "vgg19-fused-w0.125", "resnet8-bn-w0.5", "resnet20-plain-w0.25", "resnet32-bn-w0.25-sc1", "resnet110-bn-w0.25",
    "resnet18-bn-w0.125", "resnet18-plain-w0.125", "mlp2-ln-w8", "mlp2-plain-w8-nobias", "vgg11-ln-w0.125",
    "vgg16-plain-w0.125-nobias", "tiny10-ln-w0.5", "tiny10-bn-w0.5", "resnet8-ln-w0.5", "resnet20-ln-w0.25-sc1",
    "resnet18-ln-w0.125", "resnet8-fixup-w0.5", "resnet20-fixup-w0.25-sc1", "resnet18-fixup-w0.125",
    "resnet20-plain-w0.25-sc1-nobias", "resnet26-bn-w0.125", "resnet26-ln-w0.125", "resnet26-plain-w0.125-nobias",
    "resnet50-bn-w0.0625",
]  # fmt: skip


def count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


def set_statistics(model):
    """Give BatchNorms the statistics and gains of a trained network, one channel of them nearly dead."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.1, 4)
            module.running_var[0] = 1e-9
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32), (1, 28, 28)])
def test_built_networks_run_and_trace(name, shape):
    model = build(name, shape, classes=7).eval()
    x = torch.randn(2, *shape)
    out = model(x)
    assert out.shape == (2, 7) and out.isfinite().all()
    assert torch.equal(fx.symbolic_trace(model)(x), out)


@pytest.mark.parametrize("name,digest", [
    ("mlp10-fused-w128", "614cdbad0047b92c"), ("vgg11-plain-w0.25", "dddd1a0f0ed87751"),
    ("resnet20-bn-w1", "63491eb4de1d69ee"), ("resnet8-plain-w0.5", "20bafcf0231a0998"),
    ("resnet18-bn-w0.25", "eb37379511ec6cce"), ("resnet20-bn-w0.5-sc1", "680724402d7f90b6"),
])  # fmt: skip
def test_initial_weights_are_those_of_the_first_release(name, digest):
    """Stored networks and committed figures began from them; keys, shapes and every bit count."""
    torch.manual_seed(1)
    found = hashlib.sha256()
    for key, value in build(name, (1, 16, 16), 10).state_dict().items():
        found.update(key.encode() + value.numpy().tobytes())
    assert found.hexdigest()[:16] == digest


@pytest.mark.parametrize("name,parameters", [
    # CIFAR-10, from the layer sizes of the papers: He et al. 2016 give 0.27M (20), 0.46M (32), 1.7M (110) without
    # convolutions on shortcuts; with 1x1 convolutions and their BatchNorms come 2,752 more, with 3x3 23,232 more.
    ("resnet20-bn-w1-sc1", 269_722 + 2_752), ("resnet20-bn-w1", 269_722 + 23_232),
    ("resnet32-bn-w1-sc1", 464_154 + 2_752), ("resnet110-bn-w1-sc1", 1_727_962 + 2_752),
    ("resnet18-bn-w1", 11_173_962), ("vgg11-bn-w1", 9_228_362), ("vgg16-bn-w1", 14_728_266 - 4_224),  # without biases
    ("mlp3-plain-w128", (3072 + 1) * 128 + 2 * 129 * 128 + 129 * 10),
    # LayerNorm has as many parameters as BatchNorm. Zhang et al. 2019: five scalars a block and two beside them, in
    # place of 21 norms with 1,376 channels (1,568 with those of shortcuts).
    ("resnet20-ln-w1-sc1", 269_722 + 2_752), ("resnet20-fixup-w1-sc1", 269_722 + 2_752 - 2 * (688 + 96) + 9 * 5 + 2),
    ("resnet20-plain-w1-sc1-nobias", 269_722 + 2_752 - 2 * (688 + 96) - 10),
    ("mlp2-plain-w8-nobias", 3072 * 8 + 8 * 8 + 80),
    # Csiszarik et al. 2023, Table A.1: 3x3 convolutions, then a 1x1 and a linear layer; weight and bias of LayerNorms.
    ("tiny10-ln-w1", 9 * (3 * 16 + 16 * 16 + 16 * 32 + 2 * 32 * 32 + 32 * 64 + 64 * 64) + 64 * 64 + 650 + 2 * 320),
    # torchvision's, with a 3x3 convolution of the images in place of its 7x7.
    ("resnet50-bn-w1", 25_557_032 - 990 * 2049 - 64 * 3 * (49 - 9)),
    # First blocks: 18 or 23 times the square of a stage's channels c; second ones: 17 c^2; norms: 16 c channels.
    ("resnet26-bn-w1", 27 * 64 + 35 * 64**2 + 40 * (128**2 + 256**2 + 512**2) + 2 * (64 + 16 * 960) + 2049 * 10),
    ("resnet26-plain-w1", 27 * 64 + 35 * 64**2 + 40 * (128**2 + 256**2 + 512**2) + 64 + 16 * 960 + 2049 * 10),
    ("torchvision-resnet18", 11_689_512 - 990 * 513), ("torchvision-resnet50", 25_557_032 - 990 * 2049),
    ("torchvision-wide_resnet50_2", 68_883_240 - 990 * 2049),
])  # fmt: skip
def test_number_of_parameters(name, parameters):
    assert sum(p.numel() for p in build(name).parameters()) == parameters


@pytest.mark.parametrize("depth", tuple(vgg.LAYOUT) + resnet.DEPTHS)
def test_depth_counts_weight_layers(depth):
    family = "vgg" if depth in vgg.LAYOUT else "resnet"
    model = build(f"{family}{depth}-bn-w0.125")
    layers = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    if family == "resnet":
        layers = [name for name in layers if "shortcut" not in name]
        assert len(layers) == depth
    else:
        assert len(layers) == depth - 2  # one linear layer where the paper has three


def test_norms_and_biases():
    for name in ("mlp4-{}-w16", "vgg11-{}-w0.125"):
        plain, bn, fused = (build(name.format(norm), (1, 16, 16)) for norm in ("plain", "bn", "fused"))
        assert count(plain, nn.modules.batchnorm._BatchNorm) == count(fused, nn.modules.batchnorm._BatchNorm) == 0
        assert count(bn, nn.modules.batchnorm._BatchNorm) == count(bn, (nn.Conv2d, nn.Linear)) - 1
        assert plain.state_dict().keys() == fused.state_dict().keys()
        for model in (plain, bn):
            for key, module in model.named_modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    assert (module.bias is None) == (model is bn and key != "head")


@pytest.mark.parametrize("name", ["mlp4-{}-w16", "vgg11-{}-w0.125", "resnet8-{}-w0.5", "tiny10-{}-w0.5"])
def test_layernorm_stands_where_batchnorm_does_and_nobias_means_none(name):
    bn, ln, bare = (build(name.format(norm) + end) for norm, end in (("bn", ""), ("ln", ""), ("plain", "-nobias")))
    assert count(ln, nn.LayerNorm) == count(bn, nn.modules.batchnorm._BatchNorm) > 0
    assert sum(p.numel() for p in ln.parameters()) == sum(p.numel() for p in bn.parameters())
    assert [key for key, m in ln.named_modules() if getattr(m, "bias", None) is not None][-1] == "head"
    assert not any(isinstance(m, (nn.Conv2d, nn.Linear)) and m.bias is not None for m in bare.modules())
    assert all(m.eps == 1e-5 for m in ln.modules() if isinstance(m, nn.LayerNorm))


def test_channel_norm_normalises_channels_at_each_position():
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64) * 3 + 1
    norm = ChannelNorm(6).double()
    nn.init.normal_(norm.ln.weight)
    nn.init.normal_(norm.ln.bias)
    mean, var = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    expected = (x - mean) / (var + 1e-5).sqrt() * norm.ln.weight.view(-1, 1, 1) + norm.ln.bias.view(-1, 1, 1)
    assert torch.allclose(norm(x), expected, rtol=1e-12)


def test_fixup_starts_with_empty_branches_and_scaled_weights():
    """Zhang et al. 2019, Sec. 3: L^(-1/(2m-2)) with L = 9 branches of m = 2 layers."""
    torch.manual_seed(0)
    model = build("resnet20-fixup-w4")
    blocks = [m for m in model.modules() if isinstance(m, resnet.FixupBlock)]
    assert len(blocks) == 9 and not model.head.weight.any() and not model.head.bias.any()
    for block in blocks:
        assert not block.conv2.weight.any() and block.scale == 1 and not block.bias1.any()
        fan_in = block.conv1.weight[0].numel()
        assert float(block.conv1.weight.detach().std()) == pytest.approx((2 / fan_in / 9) ** 0.5, rel=0.03)
    x = torch.randn(2, 64, 8, 8).relu()
    assert torch.equal(blocks[1](x), x)


def test_fixup_block_is_its_formula():
    torch.manual_seed(0)
    block = resnet.FixupBlock(4, 6, 2, parse("resnet8-fixup")).double()
    a, b, c, d, s = block.bias1, block.bias2, block.bias3, block.bias4, block.scale
    for parameter in (a, b, c, d, s):
        nn.init.normal_(parameter)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    branch = s * block.conv2(torch.relu(block.conv1(x + a) + b) + c) + d
    assert torch.allclose(block(x), torch.relu(branch + block.shortcut(x + a)), rtol=1e-12)


def test_strides_of_tiny_10():
    model = build("tiny10-ln-w0.5").eval()
    sides = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, args, out: sides.append(out.shape[-1]))
    model(torch.zeros(1, 3, 32, 32))
    assert sides == [32, 32, 16, 16, 16, 8, 8, 8]


@pytest.mark.parametrize("name", torchvision.SIZES)
def test_torchvisions_networks_keep_their_own_initial_weights(name):
    from torchvision.models import get_model

    torch.manual_seed(3)
    model = build(f"torchvision-{name}", (3, 32, 32), 7)
    torch.manual_seed(3)
    expected = get_model(name, weights=None, num_classes=7).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="3 channels, not 1"):
        build(f"torchvision-{name}", (1, 16, 16))


@pytest.mark.parametrize("depth", resnet.BOTTLENECKS)
def test_bottlenecks_are_torchvisions(depth):
    """The same function of the same weights, in the same order, once torchvision's stem is ours."""
    from torchvision.models.resnet import Bottleneck, ResNet

    torch.manual_seed(0)
    theirs = ResNet(Bottleneck, resnet.FOUR_STAGES[depth], num_classes=7)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    set_statistics(theirs)
    ours = build(f"resnet{depth}-bn", (3, 16, 16), 7)
    # torchvision's blocks name all norms before the shortcut as ours do, so the state dicts differ in keys only.
    values = dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True))
    ours.load_state_dict(values)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    ours, theirs = ours.double().eval(), theirs.double().eval()
    assert torch.allclose(ours(x), theirs(x), rtol=1e-9)


def test_bottlenecks_of_narrow_networks_still_widen():
    model = build("resnet26-ln-w0.125")
    sizes = [
        [(conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0])
         for conv in (block.conv1, block.conv2, block.conv3, *block.shortcut) if isinstance(conv, nn.Conv2d)]
        for block in model.stages[1]
    ]  # fmt: skip
    assert sizes == [
        [(32, 16, 1, 1), (16, 16, 3, 2), (16, 64, 1, 1), (32, 64, 1, 2)],
        [(64, 16, 1, 1), (16, 16, 3, 1), (16, 64, 1, 1)],
    ]
    assert len(model.stages[0][0].shortcut) and model.head.in_features == 256


@pytest.mark.parametrize("width,channels", [(0.25, [16, 32, 64, 128]), (1, [64, 128, 256, 512]), (1e-3, [1] * 4)])
def test_width_multiplies_channels(width, channels):
    model = build(f"resnet18-bn-w{width:g}")
    assert [stage[-1].conv2.out_channels for stage in model.stages] == channels


def test_pools_stop_at_one_pixel():
    pools = {side: count(build("vgg11-plain-w0.125", (1, side, side)), nn.MaxPool2d) for side in (1, 8, 16, 28, 32, 64)}
    assert pools == {1: 0, 8: 3, 16: 4, 28: 4, 32: 5, 64: 5}
    assert build("vgg11-plain-w0.125", (1, 64, 64)).head.in_features == 64 * 2 * 2


def test_activations_keep_their_scale_through_deep_plain_networks():
    torch.manual_seed(0)
    x = torch.randn(32, 3, 32, 32)
    for name in ("mlp30-plain-w256", "vgg19-plain-w0.5", "resnet110-plain-w0.5", "resnet18-plain-w0.5",
                 "resnet50-plain-w0.25", "resnet50-ln-w0.25",
                 "resnet110-ln-w0.5", "vgg19-ln-w0.5", "tiny10-ln-w2", "vgg19-plain-w0.5-nobias"):  # fmt: skip
        with torch.no_grad():
            std = float(build(name)(x).std())
        assert 0.03 < std < 30, name


def test_seed_decides_the_weights():
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(torch.cat([p.flatten() for p in build("resnet8-bn-w0.5").parameters() if p.ndim > 1]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# fusing


@pytest.mark.parametrize("name", ["mlp20-bn-w32", "vgg16-bn-w0.125", "resnet20-bn-w0.5", "resnet18-bn-w0.125",
                                  "resnet26-bn-w0.125"])  # fmt: skip
def test_fused_network_computes_the_same(name):
    torch.manual_seed(0)
    model = build(name, (3, 16, 16)).double()
    set_statistics(model)
    model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    fused = fold_batchnorms(model, x[:2])
    with torch.no_grad():
        expected, out = model(x), fused(x)
    assert (out - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert count(fused, nn.modules.batchnorm._BatchNorm) == 0
    assert fused.state_dict().keys() == build(name.replace("bn", "plain"), (3, 16, 16)).state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_fusing_rounds_once():
    """In float32 every fused weight is the nearest to the exact one."""
    model = build("mlp1-bn-w64", (1, 4, 4)).eval()
    set_statistics(model)
    x = torch.zeros(2, 1, 4, 4)
    exact, fused = fold_batchnorms(copy.deepcopy(model).double(), x).float(), fold_batchnorms(model, x)
    assert torch.equal(fused.fc1.weight, exact.fc1.weight) and torch.equal(fused.fc1.bias, exact.fc1.bias)


def test_fusing_keeps_the_bias_of_the_layer_and_works_without_affine():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False)).double().eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    x = torch.randn(5, 4, dtype=torch.float64)
    assert torch.allclose(fold_batchnorms(model, x)(x), model(x), rtol=1e-12)


@pytest.mark.parametrize("model,name", [
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.BatchNorm2d(2)), "'2'"),
    (nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 2, 3)), "'0'"),
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)), "'1'"),
])  # fmt: skip
def test_what_cannot_be_fused_is_named(model, name):
    with pytest.raises(ValueError, match=f"cannot fold {name}"):
        fold_batchnorms(model, torch.zeros(2, 1, 6, 6))


def test_layers_used_twice_are_not_fused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.layer(self.norm(self.layer(x))))

    class Fork(Twice):
        def forward(self, x):
            y = self.layer(x)
            return y + self.norm(y)

    for model in (Twice(), Fork()):
        with pytest.raises(ValueError, match="cannot fold 'norm'"):
            fold_batchnorms(model, torch.zeros(2, 3))


# names


@pytest.mark.parametrize("name,parsed", [
    ("mlp10-fused-w128", ModelName("mlp", 10, "fused", 128)), ("mlp35-plain", ModelName("mlp", 35, "plain", 128)),
    ("vgg11-bn-w0.25", ModelName("vgg", 11, "bn", 0.25)),
    ("resnet20-bn-w4-sc1", ModelName("resnet", 20, "bn", 4, ("sc1",))),
    ("resnet18-bn", ModelName("resnet", 18, "bn", 1)), ("resnet26-ln", ModelName("resnet", 26, "ln", 1)),
    ("resnet50-bn-w0.25", ModelName("resnet", 50, "bn", 0.25)),
    ("resnet110-plain-w1.50", ModelName("resnet", 110, "plain", 1.5)),
    ("resnet20-plain-w2-sc1-nobias", ModelName("resnet", 20, "plain", 2, ("sc1", "nobias"))),
    ("resnet20-fixup", ModelName("resnet", 20, "fixup", 1)), ("tiny10-ln", ModelName("tiny", 10, "ln", 1)),
    ("vgg16-plain-nobias", ModelName("vgg", 16, "plain", 1, ("nobias",))),
    ("torchvision-resnet18", ModelName("torchvision", 18, "bn", 1)),
    ("torchvision-wide_resnet50_2", ModelName("torchvision", 50, "bn", 2)),
])  # fmt: skip
def test_parse(name, parsed):
    assert parse(name) == parsed
    assert parse(str(parsed)) == parsed


@pytest.mark.parametrize("name,nearest", [
    ("resnet21-bn-w4", "resnet20-bn-w4"), ("resnet20-batch-w4", "resnet20-bn-w4"), ("resnet20-w4", "resnet20-bn-w4"),
    ("vgg17-plain", "vgg16-plain"), ("mpl10-fused-w64", "mlp10-fused-w64"), ("resnet20-fused", "resnet20-bn"),
    ("mlp10-bn-w2.5", "mlp10-bn"), ("mlp0-bn", "mlp10-bn"), ("vgg11-bn-w0", "vgg11-bn"), ("VGG11-BN", "vgg11-bn"),
    ("resnet18-bn-w2-sc1", "resnet18-bn-w2"), ("vgg11-bn-sc1", "vgg11-bn"), ("resnet8-bn-sc1-w2", "resnet8-bn-w2-sc1"),
    ("", "mlp10-bn"), ("resnext20-bn", "resnet20-bn"), ("mlp10-fused-w128 ", "mlp10-fused"),
    ("vgg11-fixup-w2", "vgg11-bn-w2"), ("vgg11-bn-nobias", "vgg11-bn"), ("resnet20-fixup-nobias", "resnet20-fixup"),
    ("resnet20-plain-nobias-w2", "resnet20-plain-w2-nobias"), ("resnet20-l2n", "resnet20-ln"),
    ("tiny8-ln-w16", "tiny10-ln-w16"), ("tiny10-ln-sc1", "tiny10-ln"), ("resnet20-nobias", "resnet20-bn"),
    ("torchvision-resnet34", "torchvision-resnet18"), ("torchvision", "torchvision-resnet18"),
    ("torchvision-wide_resnet50", "torchvision-wide_resnet50_2"), ("torchvision-resnet50-w2", "torchvision-resnet50"),
    ("resnet50-bn-w2-sc1", "resnet50-bn-w2"), ("resnet50-fixup-w2", "resnet50-bn-w2"), ("resnet34-bn", "resnet32-bn"),
    ("resnet27-ln", "resnet26-ln"), ("resnet101-bn", "resnet110-bn"), ("resnet26-fused", "resnet26-bn"),
])  # fmt: skip
def test_unknown_name_gives_the_nearest_valid_one(name, nearest):
    with pytest.raises(ValueError, match="unknown model") as caught:
        build(name)
    assert f"{name!r}" in str(caught.value) and f"name is {nearest!r}" in str(caught.value)
    parse(nearest)


@pytest.mark.parametrize("name,why", [
    ("resnet50-fixup", "Fixup is for blocks of two convolutions, and resnet50's have three"),
    ("resnet26-bn-sc1", "resnet26 always has 1x1 shortcuts"), ("vgg16-bn-sc1", "vgg has no -sc1;"),
])  # fmt: skip
def test_what_bottlenecks_do_not_have_is_said(name, why):
    with pytest.raises(ValueError, match=why):
        parse(name)


def test_width_survives_the_name():
    for width in (1e6, 0.001, 1 / 3, 123456789):
        name = str(ModelName("vgg", 11, "bn", width))
        assert math.isclose(parse(name).width, width, rel_tol=1e-11)


def test_what_a_recipe_may_depend_on():
    names = ("vgg16-plain-w8-nobias", "resnet20-ln-sc1", "torchvision-resnet50", "resnet26-plain-nobias", "vgg16-bn")
    kinds = ["vgg-plain-nobias", "resnet-ln", "torchvision-bn", "resnet-plain-bottleneck-nobias", "vgg-bn"]
    assert [parse(name).kind for name in names] == kinds
