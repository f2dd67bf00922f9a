"""Models: VGG-11/13/16/19 and ResNet-18/34/50, built from a name and a handful of numbers.

The names of parameters and buffers are torchvision's, so its checkpoints load. Images up to 64 pixels get the small
form: VGG ends in global average pooling and one linear layer, ResNet starts with a 3x3 stride-1 convolution and has no
max-pool. Larger images get torchvision's stem and classifier.
Shapes: images (N, C, H, W) with H = W = input_size, to logits (N, K).
Source: VGG, https://arxiv.org/abs/1409.1556, with batch norm; ResNet, https://arxiv.org/abs/1512.03385, with the stride
of a bottleneck on its 3x3 convolution.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from torch import Tensor, nn

from nf_engine.errors import ConfigError

__all__ = ["MODELS", "ModelSpec", "build"]

SMALL_INPUT = 64  # up to this many pixels the small stems and classifiers are used

_VGG = {  # convolutions of each of the five steps between poolings
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
_RESNET = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
MODELS = (*_VGG, *_RESNET)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a model is rebuilt from: `name` in MODELS, classes K, width factor, input_size in pixels, image channels.

    Raises:
        ConfigError: the name is unknown (the closest is named), or a number is out of range.
    """

    name: str
    classes: int = 10
    width: float = 1.0
    input_size: int = 32
    channels: int = 3

    def __post_init__(self) -> None:
        if self.name not in MODELS:
            close = difflib.get_close_matches(str(self.name), MODELS, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"model must be one of {', '.join(MODELS)}; got {self.name!r}; the closest name is {close!r}"
            )
        for field in ("classes", "input_size", "channels"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{field} must be an integer of at least 1, got {value!r}")
        if not 0 < self.width < float("inf"):
            raise ConfigError(f"width must be positive and finite, got {self.width!r}; 1.0 is the published width")

    def build(self) -> nn.Module:
        """A freshly initialised model of this description, in train mode; it carries this spec as `nf_spec`."""
        model: _VGGNet | _ResNet = _VGGNet(self) if self.name in _VGG else _ResNet(self)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        return model


def build(name: str, *, classes: int = 10, width: float = 1.0, input_size: int = 32, channels: int = 3) -> nn.Module:
    """A freshly initialised VGG or ResNet; `model.nf_spec` is the ModelSpec that rebuilds it.

    Args:
        name: one of MODELS.
        classes: K, number of logits.
        width: factor on every layer's channels, rounded to multiples of 8, at least 8.
        input_size: height and width of the images in pixels; up to 64 the small form is built.
        channels: C of the images.

    Returns:
        A module from images (N, C, H, W) to logits (N, K), in train mode, on torch's default device.

    Raises:
        ConfigError: the name is unknown or a number is out of range.
    """
    return ModelSpec(name, classes=classes, width=width, input_size=input_size, channels=channels).build()


def _scaled(channels: int, width: float) -> int:
    return max(8, int(channels * width / 8 + 0.5) * 8)


class _VGGNet(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.nf_spec = spec
        small = spec.input_size <= SMALL_INPUT
        self.features, channels = _vgg_features(spec)
        self.avgpool = nn.AdaptiveAvgPool2d(1 if small else 7)
        hidden = _scaled(4096, spec.width)
        self.classifier: nn.Module = (
            nn.Linear(channels, spec.classes)
            if small
            else nn.Sequential(
                nn.Linear(channels * 7 * 7, hidden),
                nn.ReLU(inplace=True),
                nn.Dropout(),
                nn.Linear(hidden, hidden),
                nn.ReLU(inplace=True),
                nn.Dropout(),
                nn.Linear(hidden, spec.classes),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)  # (N, C, H / 32, W / 32)
        x = self.avgpool(x).flatten(1)
        logits: Tensor = self.classifier(x)  # (N, K)
        return logits


def _vgg_features(spec: ModelSpec) -> tuple[nn.Sequential, int]:
    """The convolutions, and how many channels they end with."""
    layers: list[nn.Module] = []
    channels, size = spec.channels, spec.input_size
    for step, repeats in enumerate(_VGG[spec.name]):
        out = _scaled(min(64 * 2**step, 512), spec.width)
        for _ in range(repeats):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            channels = out
        # Below 32 pixels the last poolings would find 1x1 left; an Identity keeps the numbering of the parameters.
        layers.append(nn.MaxPool2d(2) if size > 1 else nn.Identity())
        size = max(1, size // 2)
    return nn.Sequential(*layers), channels


class _ResNet(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.nf_spec = spec
        small = spec.input_size <= SMALL_INPUT
        block = _Bottleneck if spec.name == "resnet50" else _BasicBlock
        stem = _scaled(64, spec.width)
        self.conv1 = nn.Conv2d(
            spec.channels, stem, 3 if small else 7, stride=1 if small else 2, padding=1 if small else 3, bias=False
        )
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        channels = stem
        for step, repeats in enumerate(_RESNET[spec.name]):
            planes = _scaled(64 * 2**step, spec.width)
            layer = nn.Sequential()
            for i in range(repeats):
                layer.append(block(channels, planes, stride=2 if step > 0 and i == 0 else 1))
                channels = planes * block.expansion
            self.add_module(f"layer{step + 1}", layer)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, spec.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for step in range(1, 5):
            x = self.get_submodule(f"layer{step}")(x)
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))  # (N, K)
        return logits


def _downsample(channels: int, out: int, stride: int) -> nn.Module | None:
    """The shortcut's convolution where the shape changes, else None: the input itself is added."""
    if stride == 1 and channels == out:
        return None
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))


class _BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _downsample(channels, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        out: Tensor = self.relu(h + (x if self.downsample is None else self.downsample(x)))
        return out


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(channels, planes * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        out: Tensor = self.relu(h + (x if self.downsample is None else self.downsample(x)))
        return out
