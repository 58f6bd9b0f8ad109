import copy
import math

import pytest
import torch
from torch import fx, nn

from repairlib import models
from repairlib.models import ModelName, build, fuse, parse

NAMES = [
    "mlp1-plain-w7", "mlp10-bn-w16", "mlp3-fused-w16", "vgg11-plain-w0.125", "vgg13-bn-w0.125", "vgg16-bn-w0.125",
    "vgg19-fused-w0.125", "resnet8-bn-w0.5", "resnet20-plain-w0.25", "resnet32-bn-w0.25-sc1", "resnet110-bn-w0.25",
    "resnet18-bn-w0.125", "resnet18-plain-w0.125",
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


@pytest.mark.parametrize("name,parameters", [
    # CIFAR-10, from the layer sizes of the papers: He et al. 2016 give 0.27M (20), 0.46M (32), 1.7M (110) without
    # convolutions on shortcuts; with 1x1 convolutions and their BatchNorms come 2,752 more, with 3x3 23,232 more.
    ("resnet20-bn-w1-sc1", 269_722 + 2_752), ("resnet20-bn-w1", 269_722 + 23_232),
    ("resnet32-bn-w1-sc1", 464_154 + 2_752), ("resnet110-bn-w1-sc1", 1_727_962 + 2_752),
    ("resnet18-bn-w1", 11_173_962), ("vgg11-bn-w1", 9_228_362), ("vgg16-bn-w1", 14_728_266 - 4_224),  # without biases
    ("mlp3-plain-w128", (3072 + 1) * 128 + 2 * 129 * 128 + 129 * 10),
])  # fmt: skip
def test_number_of_parameters(name, parameters):
    assert sum(p.numel() for p in build(name).parameters()) == parameters


@pytest.mark.parametrize("depth", models.DEPTHS["vgg"] + models.DEPTHS["resnet"])
def test_depth_counts_weight_layers(depth):
    family = "vgg" if depth in models.DEPTHS["vgg"] else "resnet"
    model = build(f"{family}{depth}-bn-w0.125")
    layers = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    if family == "resnet":
        layers = [name for name in layers if "shortcut" not in name]
        assert len(layers) == depth
    else:
        assert len(layers) == depth - 2  # one linear layer where the paper has three


def test_norms_and_biases():
    for name in ("mlp4-{}-w16", "vgg11-{}-w0.125"):
        plain, bn, fused = (build(name.format(norm), (1, 16, 16)) for norm in models.NORMS)
        assert count(plain, nn.modules.batchnorm._BatchNorm) == count(fused, nn.modules.batchnorm._BatchNorm) == 0
        assert count(bn, nn.modules.batchnorm._BatchNorm) == count(bn, (nn.Conv2d, nn.Linear)) - 1
        assert plain.state_dict().keys() == fused.state_dict().keys()
        for model in (plain, bn):
            for key, module in model.named_modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    assert (module.bias is None) == (model is bn and key != "head")


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
    for name in ("mlp30-plain-w256", "vgg19-plain-w0.5", "resnet110-plain-w0.5", "resnet18-plain-w0.5"):
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


@pytest.mark.parametrize("name", ["mlp20-bn-w32", "vgg16-bn-w0.125", "resnet20-bn-w0.5", "resnet18-bn-w0.125"])
def test_fused_network_computes_the_same(name):
    torch.manual_seed(0)
    model = build(name, (3, 16, 16)).double()
    set_statistics(model)
    model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused = fuse(model)
    x = torch.randn(8, 3, 16, 16, dtype=torch.float64)
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
    exact, fused = fuse(copy.deepcopy(model).double()).float(), fuse(model)
    assert torch.equal(fused.fc1.weight, exact.fc1.weight) and torch.equal(fused.fc1.bias, exact.fc1.bias)


def test_fusing_keeps_the_bias_of_the_layer_and_works_without_affine():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False)).double().eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    x = torch.randn(5, 4, dtype=torch.float64)
    assert torch.allclose(fuse(model)(x), model(x), rtol=1e-12)


@pytest.mark.parametrize("model,name", [
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.BatchNorm2d(2)), "'2'"),
    (nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 2, 3)), "'0'"),
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)), "'1'"),
])  # fmt: skip
def test_what_cannot_be_fused_is_named(model, name):
    with pytest.raises(ValueError, match=f"cannot fuse {name}"):
        fuse(model)


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
        with pytest.raises(ValueError, match="cannot fuse 'norm'"):
            fuse(model)


# names


@pytest.mark.parametrize("name,parsed", [
    ("mlp10-fused-w128", ModelName("mlp", 10, "fused", 128)), ("mlp35-plain", ModelName("mlp", 35, "plain", 128)),
    ("vgg11-bn-w0.25", ModelName("vgg", 11, "bn", 0.25)), ("resnet20-bn-w4-sc1", ModelName("resnet", 20, "bn", 4, 1)),
    ("resnet18-bn", ModelName("resnet", 18, "bn", 1, 1)),
    ("resnet110-plain-w1.50", ModelName("resnet", 110, "plain", 1.5)),
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
])  # fmt: skip
def test_unknown_name_gives_the_nearest_valid_one(name, nearest):
    with pytest.raises(ValueError, match="unknown model") as caught:
        build(name)
    assert f"{name!r}" in str(caught.value) and f"name is {nearest!r}" in str(caught.value)
    parse(nearest)


def test_width_survives_the_name():
    for width in (1e6, 0.001, 1 / 3, 123456789):
        name = str(ModelName("vgg", 11, "bn", width))
        assert math.isclose(parse(name).width, width, rel_tol=1e-11)
