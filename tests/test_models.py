"""Models against published parameter counts and torchvision's names, both written down here by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nf_engine.errors import ConfigError
from nf_engine.models import MODELS, ModelSpec, build

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def on_meta(name, **settings):
    with torch.device("meta"):
        return build(name, **settings)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def logits_shape(name, size, **settings):
    model = on_meta(name, input_size=size, **settings)
    return tuple(model(torch.empty(2, settings.get("channels", 3), size, size, device="meta")).shape)


# Millions of parameters at 32 pixels and 10 classes, at width 1 and 1/4.
@pytest.mark.parametrize(
    ("name", "full", "quarter"),
    [("vgg11", 9.231, 0.580), ("vgg16", 14.728, 0.924), ("vgg19", 20.041, 1.257), ("resnet18", 11.174, 0.701)],
)
def test_small_models_have_the_parameter_counts_of_the_literature(name, full, quarter):
    assert round(parameters(on_meta(name)) / 1e6, 3) == full
    assert round(parameters(on_meta(name, width=0.25)) / 1e6, 3) == quarter


# From torchvision's table of weights: vgg11_bn, ..., resnet50.
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vgg11", 132868840),
        ("vgg13", 133053736),
        ("vgg16", 138365992),
        ("vgg19", 143678248),
        ("resnet18", 11689512),
        ("resnet34", 21797672),
        ("resnet50", 25557032),
    ],
)
def test_imagenet_models_have_torchvisions_parameter_counts(name, count):
    assert parameters(on_meta(name, classes=1000, input_size=224)) == count


# Positions of the convolutions in torchvision's vgg*_bn().features.
@pytest.mark.parametrize(
    ("name", "convolutions"),
    [
        ("vgg11", [0, 4, 8, 11, 15, 18, 22, 25]),
        ("vgg16", [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40]),
        ("vgg19", [0, 3, 7, 10, 14, 17, 20, 23, 27, 30, 33, 36, 40, 43, 46, 49]),
    ],
)
@pytest.mark.parametrize(("size", "linear"), [(16, [""]), (32, [""]), (224, [".0", ".3", ".6"])])
def test_vgg_has_torchvisions_names(name, convolutions, size, linear):
    expected = [f"features.{i}.{field}" for i in convolutions for field in ("weight", "bias")]
    expected += [f"features.{i + 1}.{field}" for i in convolutions for field in NORM]
    expected += [f"classifier{i}.{field}" for i in linear for field in ("weight", "bias")]
    assert sorted(on_meta(name, input_size=size).state_dict()) == sorted(expected)


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize(
    ("name", "repeats", "convolutions", "downsampled"),
    [
        ("resnet18", (2, 2, 2, 2), 2, (2, 3, 4)),
        ("resnet34", (3, 4, 6, 3), 2, (2, 3, 4)),
        ("resnet50", (3, 4, 6, 3), 3, (1, 2, 3, 4)),
    ],
)
def test_resnet_has_torchvisions_names_in_its_order(name, repeats, convolutions, downsampled, size):
    expected = ["conv1.weight", *(f"bn1.{field}" for field in NORM)]
    for layer, blocks in enumerate(repeats, start=1):
        for block in range(blocks):
            prefix = f"layer{layer}.{block}"
            for i in range(1, convolutions + 1):
                expected += [f"{prefix}.conv{i}.weight", *(f"{prefix}.bn{i}.{field}" for field in NORM)]
            if block == 0 and layer in downsampled:
                expected += [f"{prefix}.downsample.0.weight", *(f"{prefix}.downsample.1.{field}" for field in NORM)]
    expected += ["fc.weight", "fc.bias"]
    assert list(on_meta(name, input_size=size).state_dict()) == expected


@pytest.mark.parametrize("size", [8, 28, 65, 224])
@pytest.mark.parametrize("name", MODELS)
def test_logits_have_a_row_per_image_at_any_size(name, size):
    assert logits_shape(name, size, classes=7, width=0.25, channels=1) == (2, 7)


def test_the_stem_of_a_small_resnet_keeps_the_resolution():
    for size, expected in ((32, 32), (64, 64), (224, 56)):
        model = on_meta("resnet18", input_size=size)
        x = model.maxpool(model.conv1(torch.empty(1, 3, size, size, device="meta")))
        assert x.shape[2:] == (expected, expected)


def test_resnet50_strides_its_3x3_convolution():
    block = on_meta("resnet50").layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))


@pytest.mark.parametrize(("width", "channels"), [(0.01, 8), (0.2, 16), (0.3, 16), (0.32, 24), (1.5, 96)])
def test_width_rounds_channels_to_multiples_of_eight(width, channels):
    assert on_meta("vgg11", width=width).features[0].out_channels == channels


def test_convolutions_start_with_kaimings_fan_out_variance():
    torch.manual_seed(0)
    model = build("vgg11", width=0.5)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (module.out_channels * 9))
            assert abs(module.weight.std().item() / expected - 1) < 0.1  # the first layer draws only 864 numbers
            assert not module.bias.any()


def test_a_residual_block_adds_its_input():
    block = build("resnet18", width=0.125).eval().layer1[0]
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(block(x), x.relu())


def test_a_model_is_rebuilt_from_its_spec():
    model = build("resnet34", classes=7, width=0.25, input_size=96, channels=1)
    assert model.nf_spec == ModelSpec("resnet34", classes=7, width=0.25, input_size=96, channels=1)
    rebuilt = model.nf_spec.build()
    rebuilt.load_state_dict(model.state_dict())  # strict: same names and shapes
    assert rebuilt.nf_spec == model.nf_spec
    assert model.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "vg16"}, "got 'vg16'; the closest name is 'vgg16'"),
        ({"name": "ResNet-18"}, "closest name is 'resnet18'"),
        ({"name": "vgg16", "classes": 0}, "classes must be an integer of at least 1, got 0"),
        ({"name": "vgg16", "input_size": 32.0}, "input_size must be an integer of at least 1, got 32.0"),
        ({"name": "vgg16", "channels": True}, "channels must be"),
        ({"name": "vgg16", "width": 0}, "width must be positive and finite, got 0"),
        ({"name": "vgg16", "width": math.nan}, "width must be positive and finite, got nan"),
    ],
)
def test_a_setting_out_of_range_is_an_error_that_names_it(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(**settings)
