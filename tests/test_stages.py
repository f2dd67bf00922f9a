"""The cut model against the model itself: outputs, all gradients and buffers bit for bit, architecture by architecture.

The models are written as their users write them. Expected stages are listed by hand, from reading the models.
"""

from __future__ import annotations

import copy
import logging
import random
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from nf_engine.errors import ConfigError, UnsupportedModelError
from nf_engine.models import build
from nf_engine.stages import split

SHAPE = (3, 16, 16)  # of one image; the models below have few channels, to keep the tests quick


def conv_bn(inputs, outputs, kernel=3, stride=1, groups=1):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def plain():
    return nn.Sequential(
        nn.BatchNorm2d(3),  # nothing to train a stage by: joins the first convolution
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.GELU(),
        nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )


class DenseLayer(nn.Module):
    def __init__(self, inputs, growth=4):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, 8, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, growth, 3, padding=1, bias=False)

    def forward(self, features):
        x = self.conv1(self.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu(self.norm2(x)))


class DenseBlock(nn.Module):
    def __init__(self, inputs, layers):
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(inputs + 4 * i) for i in range(layers))

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.block1 = DenseBlock(8, 3)
        self.transition = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1), nn.AvgPool2d(2))
        self.block2 = DenseBlock(10, 2)
        self.norm = nn.BatchNorm2d(18)
        self.classifier = nn.Linear(18, 10)

    def forward(self, x):
        x = self.block2(self.transition(self.block1(self.stem(x))))
        x = F.relu(self.norm(x), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class Inception(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.branch1 = conv_bn(inputs, 4, 1)
        self.branch2 = nn.Sequential(conv_bn(inputs, 4, 1), conv_bn(4, 6))
        self.branch3 = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(inputs, 4, 1))

    def forward(self, x):
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x)], dim=1)


class GoogLeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.mixed = nn.Sequential(Inception(8), nn.MaxPool2d(2), Inception(14))
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(14, 10)

    def forward(self, x):
        x = self.mixed(self.stem(x))
        x = self.dropout(x).mean([2, 3])
        return self.fc(x)


class InvertedResidual(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        hidden = 2 * inputs
        self.residual = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            conv_bn(inputs, hidden, 1),
            conv_bn(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            conv_bn(3, 8), InvertedResidual(8, 12, 2), InvertedResidual(12, 12, 1), conv_bn(12, 16, 1)
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 10))

    def forward(self, x):
        x = self.features(x)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).reshape(x.shape[0], -1))


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, 4), nn.Linear(4, channels)

    def forward(self, x):
        n, c, _, _ = x.size()
        scale = x.mean((2, 3))
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(scale)))).view(n, c, 1, 1)


class SENet(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 8), SqueezeExcite(8), nn.MaxPool2d(2), conv_bn(8, 12))
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        n = x.size(0)  # kept from the first line to the last, as many models do
        return self.head(F.avg_pool2d(self.body(x), 8).view(n, -1))


class PreActBlock(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class PreActResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.layers = nn.Sequential(PreActBlock(8, 8), PreActBlock(8, 12, 2), PreActBlock(12, 12))
        self.bn = nn.BatchNorm2d(12)
        self.linear = nn.Linear(12, 10)

    def forward(self, x):
        out = F.relu(self.bn(self.layers(self.conv1(x))))
        out = F.adaptive_avg_pool2d(out, 1)
        return self.linear(out.view(out.size(0), -1))


class FunctionalDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.fc1, self.fc2 = nn.Linear(8 * 6 * 6, 16), nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.dropout2d(x, 0.25, training=self.training)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.dropout(x, p=0.25 if self.training else 0.0)  # the flag stays True, the rate changes
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc2(F.dropout(x, training=self.training))


class Recurrent(nn.Module):
    """One convolution three times: its uses may not be cut apart."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.tied = nn.Conv2d(8, 8, 3, padding=1)
        self.tied.weight = self.last.weight  # another module, the same parameter
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for norm in self.norms:
            x = F.relu(norm(self.shared(x)))
        x = F.relu(self.tied(F.relu(self.last(x))))
        return self.fc(x.mean((2, 3)))


def network_in_network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.5),
        nn.Conv2d(8, 10, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(8),
        nn.Flatten(),
    )


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-5), self.bias, self.stride, self.padding)


class Direct(nn.Module):
    """Parameters, buffers and constants used without a module of their own; a norm over the images first."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.rand(3, 1, 1))
        self.register_buffer("spread", torch.rand(3, 1, 1) + 1, persistent=False)
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.conv = StandardisedConv(8, 8, 3, padding=1)
        self.gamma = nn.Parameter(torch.rand(8, 1, 1))
        self.unused = nn.Linear(2, 2)
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(F.conv2d((x - 2 * self.mean) / self.spread, self.kernel))
        x = x + self.gamma * F.relu(self.conv(x)) * torch.tensor([0.5])
        return self.fc(x.mean((2, 3)))


class ChannelShuffle(nn.Module):
    """In-place activations written as statements, and a five-dimensional reshape between convolutions."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2)
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = self.conv1(x)
        x.view(-1).relu_()  # writes to x through a view, so no cut before it
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        x = self.conv2(x)
        F.relu_(x)
        return self.fc(x.amax((2, 3)))


class FunctionalNorm(nn.BatchNorm2d):
    def forward(self, x):  # leaves num_batches_tracked unused
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class TwoNames(nn.Module):
    """A module under two names, a norm without parameters used twice, a buffer that is never used."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)
        self.b = self.a
        self.norm = nn.BatchNorm2d(4, affine=False)
        self.c, self.d = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 10, 3)
        self.last = FunctionalNorm(10)

    def forward(self, x):
        x = F.relu(self.norm(self.b(x)))
        x = F.relu(self.norm(self.c(x)))
        return self.last(self.d(x)).mean((2, 3))


def convolutional_classifier():
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 16, 1), nn.Hardswish(), nn.Conv2d(16, 10, 1), nn.Flatten()]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(), *pooled)


def spectral_norm():
    """Reading such a weight in train mode changes buffers."""
    convolutions = [parametrizations.spectral_norm(nn.Conv2d(n, 8, 3)) for n in (3, 8)]
    return nn.Sequential(*convolutions, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 10))


# model, names of the stages by hand, names of the classifier's own state
CASES = {
    "plain": (plain, ["0", "5"], ["10.bias", "10.weight"]),
    "vgg11": (
        lambda: build("vgg11", width=0.125, input_size=16),
        [f"features.{i}" for i in (0, 4, 8, 11, 15, 18, 22, 25)],
        ["classifier.bias", "classifier.weight"],
    ),
    "resnet18": (
        lambda: build("resnet18", width=0.125, input_size=16),
        ["conv1", *(f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1))],
        ["fc.bias", "fc.weight"],
    ),
    "resnet50": (
        lambda: build("resnet50", width=0.125, input_size=16),
        ["conv1", *(f"layer{i + 1}.{j}" for i, n in enumerate((3, 4, 6, 3)) for j in range(n))],
        ["fc.bias", "fc.weight"],
    ),
    # the transition's norm and relu follow a convolution of block1, so its stage starts at its convolution
    "densenet": (DenseNet, ["stem", "block1", "transition.2", "block2"], ["classifier.bias", "classifier.weight"]),
    "inception": (GoogLeNet, ["stem", "mixed.0", "mixed.2"], ["fc.bias", "fc.weight"]),
    "mobilenet": (
        MobileNetV2,
        ["features.0", *(f"features.1.conv.{i}" for i in (0, 1, 2)), "features.2.conv", "features.3"],
        ["classifier.1.bias", "classifier.1.weight"],
    ),
    "squeeze-excite": (SENet, ["body.0", "body.3"], ["head.bias", "head.weight"]),
    # layers.1 shortcuts from after its norm and relu, which therefore join layers.0
    "preactivation": (
        PreActResNet,
        ["conv1", "layers.0", "layers.1.shortcut", "layers.2"],
        ["linear.bias", "linear.weight"],
    ),
    "functional dropout": (
        FunctionalDropout,
        ["conv1", "conv2"],
        ["fc1.bias", "fc1.weight", "fc2.bias", "fc2.weight"],
    ),
    "weight sharing": (Recurrent, ["stem", "shared", "last"], ["fc.bias", "fc.weight"]),
    "network in network": (network_in_network, ["0", "2", "6"], []),
    "direct": (Direct, ["kernel", "gamma"], ["fc.bias", "fc.weight", "unused.bias", "unused.weight"]),
    "two names": (TwoNames, ["a", "c", "d"], []),
    "convolutional classifier": (convolutional_classifier, ["0"], ["3.bias", "3.weight", "5.bias", "5.weight"]),
    "spectral norm": (spectral_norm, ["0", "1"], ["4.bias", "4.weight"]),
    "channel shuffle": (ChannelShuffle, ["conv1", "conv2"], ["fc.bias", "fc.weight"]),
}


@pytest.fixture(autouse=True)
def one_thread_and_one_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def run(pieces, images, upstream, seed=1):
    torch.manual_seed(seed)
    images = images.clone().requires_grad_()
    x = images * 1  # a model may write to its input in place
    for piece in pieces:
        x = piece(x)
    (x * upstream).sum().backward()
    return x.detach(), images.grad


def assert_equal(found, expected, what):
    assert (found is None) == (expected is None), what
    if expected is not None:
        assert torch.equal(found, expected), what


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_the_pieces_compute_what_the_model_does_bit_for_bit(name, mode):
    model = CASES[name][0]()
    whole = copy.deepcopy(model).train(mode)
    cut = split(model.train(not mode), SHAPE)  # the mode at the time of the split must not stick
    pieces = [*(stage.module for stage in cut.stages), cut.classifier]
    for piece in pieces:
        piece.train(mode)
    images, upstream = torch.randn(4, *SHAPE), torch.randn(4, 10)

    logits, dimages = run(pieces, images, upstream)
    expected, expected_dimages = run([whole], images, upstream)

    assert_equal(logits, expected, "logits")
    assert_equal(dimages, expected_dimages, "gradient of the images")
    for (key, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert_equal(p.grad, q.grad, key)
    for (key, p), q in zip(model.named_buffers(), whole.buffers(), strict=True):
        assert_equal(p, q, key)
    x = images
    for stage in cut.stages:
        x = stage.module(x)
        assert tuple(x.shape[1:]) == stage.output_shape
    assert (cut.input_shape, cut.classes) == (SHAPE, 10)


@pytest.mark.parametrize("name", CASES)
def test_stages_lie_where_a_reader_would_cut(name):
    model, names, classifier = CASES[name]
    cut = split(model(), SHAPE)
    assert [stage.name for stage in cut.stages] == names
    assert sorted(cut.classifier.state_dict()) == classifier


@pytest.mark.parametrize("model", [network_in_network, SENet])
def test_a_global_average_over_a_fixed_window_belongs_to_the_classifier(model):
    assert split(model(), SHAPE).stages[-1].output_shape[1:] == (8, 8)


@pytest.mark.parametrize("name", CASES)
def test_the_pieces_hold_the_models_own_tensors_under_their_own_names(name):
    model = CASES[name][0]()
    cut = split(model, SHAPE)
    whole = model.state_dict(keep_vars=True)
    parts = {}
    for piece in [*(stage.module for stage in cut.stages), cut.classifier]:
        state = piece.state_dict(keep_vars=True)
        assert not parts.keys() & state.keys()
        parts |= state
    assert parts.keys() == whole.keys()
    assert all(parts[key] is whole[key] for key in whole)


@pytest.mark.parametrize("name", CASES)
def test_split_leaves_model_random_state_and_modes_alone(name):
    model = CASES[name][0]()
    next(m for m in model.modules() if not list(m.children())).eval()  # one module in another mode than the rest
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    torch.manual_seed(5)
    random.seed(5)
    split(model, torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1)))
    drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert random.random() == random.Random(5).random()
    assert [m.training for m in model.modules()] == modes
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_modules_of_a_stage_keep_the_mode_they_had():
    model = MobileNetV2()
    model.features[1].eval()
    cut = split(model, SHAPE)
    norms = [m for stage in cut.stages for m in stage.module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m.training for m in norms] == [True, False, False, False, True, True, True, True]


def test_functional_dropout_starts_in_the_models_mode_and_follows_the_stage():
    x = torch.ones(2, *SHAPE)
    cut = split(FunctionalDropout().eval(), SHAPE)
    stage = cut.stages[0].module
    assert not any(module.training for module in stage.modules())
    assert torch.equal(stage(x), stage(x))
    stage.train()
    assert not torch.equal(stage(x), stage(x))
    stage.eval()
    assert torch.equal(stage(x), stage(x))


def test_a_stage_survives_deepcopy():
    stage = split(Direct(), SHAPE).stages[1].module.eval()
    twin = copy.deepcopy(stage)
    x = torch.randn(2, 8, 14, 14)
    assert torch.equal(twin(x), stage(x))
    assert twin.state_dict().keys() == stage.state_dict().keys()


@pytest.mark.parametrize("sample", [SHAPE, torch.zeros(SHAPE), torch.zeros(5, *SHAPE), torch.Size(SHAPE)])
def test_shape_image_and_batch_are_equivalent_samples(sample):
    cut = split(SENet(), sample)
    assert (cut.input_shape, len(cut.stages)) == (SHAPE, 2)


def test_a_model_on_the_meta_device_is_cut_without_memory():
    with torch.device("meta"):
        model = build("vgg16", classes=1000, input_size=224)
    cut = split(model, (3, 224, 224))
    assert len(cut.stages) == 13
    assert cut.stages[-1].output_shape == (512, 7, 7)
    assert all(p.device.type == "meta" for stage in cut.stages for p in stage.module.parameters())


def test_a_model_in_double_or_half_precision_is_cut():
    for dtype in (torch.float64, torch.bfloat16):
        assert len(split(plain().to(dtype), SHAPE).stages) == 2


def test_vgg19_is_cut_in_less_than_a_second_of_cpu_time():
    model = build("vgg19", width=0.125)
    split(model, (3, 32, 32))  # the first call imports fake tensors
    start = time.process_time()
    split(model, (3, 32, 32))
    assert time.process_time() - start < 1


def test_training_the_stages_trains_the_model():
    model = plain()
    before = model[1].weight.detach().clone()
    cut = split(model, SHAPE)
    optimiser = torch.optim.SGD(cut.stages[0].module.parameters(), lr=0.1)
    cut.stages[0].module(torch.randn(2, *SHAPE)).square().sum().backward()
    optimiser.step()
    assert not torch.equal(model[1].weight, before)


# --- split points


def test_split_points_are_the_only_cuts_before_the_classifier():
    model = build("resnet18", width=0.125)
    cut = split(model, (3, 32, 32), split_points=["layer3", "layer1.0"])
    assert [stage.name for stage in cut.stages] == ["conv1", "layer1.1", "layer4"]
    assert [stage.output_shape for stage in cut.stages] == [(8, 32, 32), (32, 8, 8), (64, 4, 4)]
    x = torch.randn(2, 3, 32, 32)
    y = x
    for piece in [*(stage.module for stage in cut.stages), cut.classifier]:
        y = piece.eval()(y)
    assert torch.equal(y, model.eval()(x))


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (["layer1.9"], r"no module 'layer1\.9'; the closest name is 'layer1\.\d'"),
        (["layer1.0.conv1"], r"2 values are live there: maxpool, layer1\.0\.conv1"),
        (["relu", "maxpool"], "stage that ends after maxpool would have no convolution"),
        (["fc"], r"fc is not a \(N, C, H, W\) tensor"),
        (["avgpool"], r"'avgpool' lies in the classifier, which starts after layer4\.1\.relu"),
        (["layer1.0.downsample"], "no module 'layer1.0.downsample'"),
        (["bn1"], "relu writes to the same tensor afterwards, in place"),
        ("layer1", "list of module names, got the string 'layer1'"),
    ],
)
def test_a_split_point_that_cannot_be_kept_is_an_error(points, message):
    with pytest.raises(ConfigError, match=message):
        split(build("resnet18", width=0.125), (3, 32, 32), split_points=points)


def test_a_split_point_where_the_classifier_starts_anyway_changes_nothing():
    cut = split(FunctionalDropout(), SHAPE, split_points=["conv1"])
    assert [stage.name for stage in cut.stages] == ["conv1", "conv2"]
    model = build("resnet18", width=0.125)
    cut = split(model, (3, 32, 32), split_points=["layer2", "layer4"])
    assert [stage.name for stage in cut.stages] == ["conv1", "layer3"]


def test_sizes_read_after_the_last_convolution_do_not_hide_its_split_point():
    def sizes_and_mean(self, x):
        x = self.conv(x)
        _n, _c, _h, _w = x.shape
        return x

    cut = split(Outer(sizes_and_mean), SHAPE, split_points=["blocks.1.conv"])
    assert [stage.name for stage in cut.stages] == ["blocks.1.conv"]


def test_a_split_point_that_is_never_called_is_an_error():
    with pytest.raises(ConfigError, match="'norms' is never called"):
        split(Recurrent(), SHAPE, split_points=["norms"])


def test_a_split_point_before_a_write_through_a_view_is_an_error():
    with pytest.raises(ConfigError, match=r"ChannelShuffle \(relu_\) writes to the same tensor afterwards"):
        split(ChannelShuffle(), SHAPE, split_points=["conv1"])


def test_a_split_point_between_two_uses_of_a_module_is_an_error():
    with pytest.raises(ConfigError, match="shared is used both before and after"):
        split(Recurrent(), SHAPE, split_points=["norms.0"])


# --- models that cannot be cut


class Inner(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


class Outer(nn.Module):
    """A model with a body of its own inside `blocks.1`."""

    def __init__(self, forward):
        super().__init__()
        self.blocks = nn.Sequential(nn.Identity(), Inner(forward))

    def forward(self, x):
        x = self.blocks(x)
        return x.mean((2, 3)) if isinstance(x, torch.fx.Proxy | torch.Tensor) else x


def branches_on_values(self, x):
    return self.conv(x) if x.sum() > 0 else x


def no_gradients(self, x):
    with torch.no_grad():
        return self.conv(x)


def another_net_in_eval(self, x):
    return self.conv(x) if self.training else self.conv(x).relu()


def another_module_in_eval(self, x):
    return self.conv(x).relu() if self.training else self.conv(x).sigmoid()


def noise(self, x):
    return self.conv(x) * torch.rand(1)


def hidden_parameter(self, x):
    if not hasattr(self, "hidden"):
        self.hidden = [nn.Parameter(torch.rand(1))]
    return self.conv(x) * self.hidden[0]


def two_outputs(self, x):
    return self.conv(x), x


def a_dict(self, x):
    return {"logits": self.conv(x)}


def no_convolution(self, x):
    return x


def wrong_channels(self, x):
    return self.conv(torch.cat([x, x], 1))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (branches_on_values, r"^blocks\.1: torch\.fx cannot trace .*TraceError: symbolically traced variables"),
        (no_gradients, r"^blocks\.1\.conv: torch\.fx cannot trace .*gradients or autocast"),
        (another_net_in_eval, "different things in train and eval .*: first Outer .mean., then blocks.1 .relu.;"),
        (another_module_in_eval, "different things .*: first blocks.1 .relu., then blocks.1 .sigmoid.;"),
        (noise, "or each time it runs: first blocks.1 "),
        (hidden_parameter, r"^blocks\.1: .*no registered parameter"),
        (two_outputs, r"^Outer: expected the output to be one tensor of logits \(N, K\), found a tuple"),
        (a_dict, r"^Outer: expected the output .* found a dict"),
        (no_convolution, "^Outer: no convolution"),
        (wrong_channels, r"^blocks\.1\.conv: cannot run on images \(N, 3, 16, 16\): .*6 channels"),
    ],
)
def test_a_model_that_cannot_be_cut_names_the_module_and_why(forward, message):
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        split(Outer(forward), SHAPE)
    assert "\n" not in str(caught.value)


def test_numbers_that_a_forward_draws_while_it_is_traced_are_given_back():
    torch.manual_seed(5)
    with pytest.raises(UnsupportedModelError):
        split(Outer(noise), SHAPE)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    Outer(noise)  # the numbers that its weights take
    assert torch.equal(drawn, torch.rand(1))


def test_an_output_that_is_no_matrix_of_logits_is_an_error():
    with pytest.raises(UnsupportedModelError, match=r"found a tensor of shape \(N, 4, 14, 14\)"):
        split(nn.Sequential(nn.Conv2d(3, 4, 3)), SHAPE)


def test_a_torchscript_module_is_an_error_that_names_it():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit itself is on its way out
        scripted = torch.jit.script(nn.Conv2d(3, 4, 3))
    with pytest.raises(UnsupportedModelError, match=r"^0: TorchScript cannot be traced"):
        split(nn.Sequential(scripted, nn.Flatten()), SHAPE)


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 5, 3)

    def forward(self, x):
        return torch.cat([self.left(x).mean((2, 3)), self.right(x).mean((2, 3))], 1)


def test_no_single_tensor_point_before_the_classifier_is_an_error_that_names_the_tensors():
    with pytest.raises(
        UnsupportedModelError, match=r"^right: no single-tensor point .*2 values are live there: .*mean"
    ):
        split(TwoTowers(), SHAPE)


@pytest.mark.parametrize(
    ("sample", "found"),
    [
        (torch.zeros(4, 48), r"a tensor of shape \(4, 48\)"),
        ((16, 16), r"\(16, 16\)"),
        ((3, 0, 16), r"\(3, 0, 16\)"),
        ((3.0, 16, 16), r"\(3.0, 16, 16\)"),
    ],
)
def test_a_sample_that_is_no_image_is_an_error(sample, found):
    with pytest.raises(UnsupportedModelError, match=rf"expected images \(N, C, H, W\).*got {found}"):
        split(plain(), sample)


def test_a_sample_of_another_size_than_the_model_takes_is_one_error_without_a_log():
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # torch itself would log a traceback
    logger.addHandler(handler)
    with pytest.raises(UnsupportedModelError, match=r"^fc1: cannot run on images \(N, 3, 32, 32\)"):
        split(FunctionalDropout(), (3, 32, 32))
    logger.removeHandler(handler)
    assert records == []
    assert not logger.disabled
