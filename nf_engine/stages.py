"""Stages: cuts any CNN that torch.fx can trace into the pieces that local learning trains.

A cut may lie wherever exactly one value is live: a (N, C, H, W) tensor that nothing after the cut writes to, with no
parameter used on both sides. Each stage holds at least one convolution; the norm, activation and pooling that follow
a convolution belong to its stage. What remains after the last one, from global pooling on, is the classifier.
The pieces hold the model's own submodules and parameters under their own names, so training a stage trains the model.

How: `tracing` gives one graph with the shapes of all values; the list of its nodes is cut here.
Shapes: images (N, C, H, W), between stages (N, C, H, W), logits (N, K).
Source: stages as in NeuroFlux, https://arxiv.org/abs/2402.14139; the cutting rules are ours.
"""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd

from nf_engine.errors import ConfigError, UnsupportedModelError
from nf_engine.tracing import BATCH, Traced, function_name, is_batch, trace

__all__ = ["Cut", "Stage", "split"]

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose")  # torch.nn.functional's, by how their names start
_OPEN_CLASSIFIER = ("adaptive_", "mean", "flatten", "reshape", "view", "linear")  # functions and methods, likewise
_MODULES_OPEN_CLASSIFIER = (_AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, nn.Linear, nn.Flatten)


@dataclass(frozen=True, slots=True)
class Stage:
    """The smallest piece between two cuts.

    `name` is the innermost module path that holds as much of the stage as possible, "layer1.0" or "features.0";
    `module` maps (N, C, H, W) to (N, *output_shape); `output_shape` is (C, H, W) of one sample.
    """

    name: str
    module: nn.Module
    output_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """A model in pieces: its stages in order, then `classifier`, from the last stage's output to logits (N, classes).

    `input_shape` is (C, H, W) of one image.
    """

    stages: tuple[Stage, ...]
    classifier: nn.Module
    input_shape: tuple[int, ...]
    classes: int


def split(model: nn.Module, sample: Tensor | tuple[int, ...], *, split_points: Sequence[str] = ()) -> Cut:
    """Cuts a CNN into stages that share its modules and parameters; the model itself stays as it is.

    Running the stages and then the classifier computes exactly what the model does, gradients included. Functional
    dropout and the like (`training=self.training`) follow train() and eval() of the stage. A buffer that the forward
    of a composite module reads directly stays shared with the model only until one of the two moves to a device.

    Args:
        model: maps images (N, C, H, W) to logits (N, K), on any device, "meta" included.
        sample: images (N, C, H, W), one image (C, H, W), or the shape (C, H, W); only shape and dtype are used.
        split_points: names of modules; if given, the stages end exactly after these modules' outputs.

    Returns:
        The stages and the classifier. Their state_dict() keys together are the model's.

    Raises:
        UnsupportedModelError: the model cannot be traced, run on the sample or cut; names the module and why.
        ConfigError: a split point does not exist, or no cut is possible there, or a stage would have no convolution.
    """
    shape = _sample_shape(sample)
    traced = trace(model, shape, sample.dtype if isinstance(sample, Tensor) else None)
    classes = _check_output(traced)
    gaps = _gaps(traced)
    end = _classifier_start(traced, gaps)
    ends = _requested_ends(traced, gaps, split_points, end) if split_points else _stage_ends(traced, gaps, end)
    return _build(traced, gaps, ends, shape, classes)


def _sample_shape(sample: Tensor | tuple[int, ...]) -> tuple[int, ...]:
    shape = tuple(sample.shape) if isinstance(sample, Tensor) else tuple(sample)
    if isinstance(sample, Tensor) and len(shape) == 4:
        shape = shape[1:]
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        given = f"a tensor of shape {tuple(sample.shape)}" if isinstance(sample, Tensor) else f"{sample!r}"
        raise UnsupportedModelError(
            f"expected images (N, C, H, W), one image (C, H, W) or its shape as three positive integers; got {given}"
        )
    return shape


def _check_output(traced: Traced) -> int:
    """K, where the model's output is logits (N, K)."""
    output = traced.nodes[-1].args[0]
    value = traced.values[output] if isinstance(output, fx.Node) else output
    if isinstance(value, Tensor) and value.ndim == 2 and is_batch(value):
        return int(value.shape[1])
    found = f"a {type(value).__name__.removeprefix('immutable_')}"  # fx's own lists and dicts
    if isinstance(value, Tensor):
        sizes = ("N" if n == BATCH else str(n) for n in value.shape)
        found = f"a tensor of shape ({', '.join(sizes)})"
    raise UnsupportedModelError(
        f"{type(traced.model).__name__}: expected the output to be one tensor of logits (N, K), found {found}; "
        "wrap the model in a module that returns the logits alone"
    )


# --- cuts ------------------------------------------------------------------------------------------------------------
# A position p stands for the gap right after node p of the graph.


@dataclass(frozen=True, slots=True)
class _Gap:
    """What lies between one node and the next: the node whose value alone is live there, or why there is no cut."""

    live: fx.Node | None
    reason: str = ""


def _gaps(traced: Traced) -> list[_Gap]:
    """One gap for each node but the output."""
    nodes = traced.nodes
    position = {node: p for p, node in enumerate(nodes)}
    last_use = {node: max((position[user] for user in node.users), default=-1) for node in nodes}
    shared = _shared_state(traced)
    gaps = []
    live: list[fx.Node] = []
    for p, node in enumerate(nodes[:-1]):
        live = [n for n in (*live, node) if last_use[n] > p]
        gaps.append(_gap(traced, live, position, shared, p))
    return gaps


def _gap(
    traced: Traced, live: list[fx.Node], position: dict[fx.Node, int], shared: list[tuple[int, int, str]], p: int
) -> _Gap:
    if len(live) != 1:
        names = ", ".join(traced.where(n) for n in live)
        return _Gap(None, f"{len(live)} values are live there: {names}")
    (node,) = live
    value = traced.values[node]
    if not (is_batch(value) and value.ndim == 4):
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        return _Gap(None, f"{traced.where(node)} is not a (N, C, H, W) tensor but {found} (with N = {BATCH})")
    writer = traced.written.get(node)
    if writer is not None and position[writer] > p:
        return _Gap(None, f"{traced.where(writer)} writes to the same tensor afterwards, in place; cut after that")
    for first, last, name in shared:
        if first <= p < last:
            return _Gap(None, f"{name} is used both before and after")
    return _Gap(node)


def _shared_state(traced: Traced) -> list[tuple[int, int, str]]:
    """(first use, last use, name) of each parameter or buffer that is used more than once."""
    uses: dict[int, tuple[int, int, str]] = {}
    for p, node in enumerate(traced.nodes):
        if node.op not in ("call_module", "get_attr"):
            continue
        owned = traced.lookup(str(node.target))
        tensors = [*owned.parameters(), *owned.buffers()] if isinstance(owned, nn.Module) else [owned]
        for tensor in tensors:
            first, _, name = uses.get(id(tensor), (p, p, str(node.target)))
            uses[id(tensor)] = (first, p, name)
    return sorted({use for use in uses.values() if use[0] < use[1]})


def _classifier_start(traced: Traced, gaps: list[_Gap]) -> int:
    """The gap before the classifier: the first after the last convolution that pooling or flattening follows."""
    convolutions = _convolutions(traced)
    last = convolutions[-1]
    usable = [p for p in range(last, len(gaps)) if gaps[p].live is not None]
    if not usable:
        raise UnsupportedModelError(
            f"{traced.where(traced.nodes[last])}: no single-tensor point between this last convolution and the "
            f"output; right after it, {gaps[last].reason or 'nothing is live'}"
        )
    nodes = traced.nodes
    for here, after in pairwise(usable):
        if any(_opens_classifier(traced, node) for node in nodes[here + 1 : after + 1]):
            return here
    return usable[-1]


def _convolutions(traced: Traced) -> list[int]:
    found = [p for p, node in enumerate(traced.nodes) if _is_convolution(traced, node)]
    if not found:
        raise UnsupportedModelError(
            f"{type(traced.model).__name__}: no convolution with parameters in its forward(); "
            "nf_engine trains convolutional networks"
        )
    return found


def _is_convolution(traced: Traced, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = traced.lookup(str(node.target))
        kernel = module.kernel_size if isinstance(module, _ConvNd) else None  # .weight would step a spectral norm
    elif node.op == "call_function" and function_name(node).startswith(_CONVOLUTIONS):
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        kernel = None
        if isinstance(weight, fx.Node) and _depends_on_parameter(traced, weight):
            kernel = traced.values[weight].shape[2:]
    else:
        return False
    # A 1x1 kernel on a 1x1 image is a linear layer by another name; some classifiers are written so.
    return kernel is not None and {*kernel, *traced.values[node.all_input_nodes[0]].shape[2:]} != {1}


def _depends_on_parameter(traced: Traced, node: fx.Node) -> bool:
    pending, seen = [node], {node}
    while pending:
        node = pending.pop()
        if node.op == "get_attr" and isinstance(traced.lookup(str(node.target)), nn.Parameter):
            return True
        if node.op == "call_module" and any(True for _ in traced.lookup(str(node.target)).parameters()):
            return True
        fresh = [n for n in node.all_input_nodes if n not in seen]
        seen.update(fresh)
        pending += fresh
    return False


def _opens_classifier(traced: Traced, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = traced.lookup(str(node.target))
        if isinstance(module, _MODULES_OPEN_CLASSIFIER):
            return True
        average = isinstance(module, nn.AvgPool2d)
    else:
        if function_name(node).startswith(_OPEN_CLASSIFIER):
            return True
        average = function_name(node) == "avg_pool2d"
    return average and tuple(traced.values[node].shape[2:]) == (1, 1)  # a global average, written as a fixed window


def _stage_ends(traced: Traced, gaps: list[_Gap], end: int) -> list[int]:
    """The last usable gap before each convolution, where it lies after the one before; then the classifier's."""
    usable = [p for p in range(end) if gaps[p].live is not None]
    convolutions = _convolutions(traced)
    ends = []
    for before, convolution in pairwise(convolutions):
        i = bisect_left(usable, convolution) - 1
        if i >= 0 and usable[i] >= before:
            ends.append(usable[i])
    return [*ends, end]


def _requested_ends(traced: Traced, gaps: list[_Gap], split_points: Sequence[str], end: int) -> list[int]:
    if isinstance(split_points, str):
        raise ConfigError(f"split_points must be a list of module names, got the string {split_points!r}")
    ends = sorted({_end_of(traced, gaps, name, end) for name in split_points} | {end})
    convolutions = _convolutions(traced)
    start = 0
    for stop in ends:
        if not any(start < p <= stop for p in convolutions):
            raise ConfigError(
                f"split_points {list(split_points)}: the stage that ends after {traced.where(traced.nodes[stop])} "
                "would have no convolution; leave that point out"
            )
        start = stop
    return ends


def _end_of(traced: Traced, gaps: list[_Gap], name: str, end: int) -> int:
    """The gap after a module's output."""
    names = [path for path, _ in traced.model.named_modules() if path]
    if name not in names:
        close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)
        raise ConfigError(f"split_points: no module {name!r}" + "".join(f"; the closest name is {c!r}" for c in close))
    output = traced.outputs.get(name)
    if not isinstance(output, fx.Node):
        what = "is never called by forward()" if name not in traced.outputs else "does not return one tensor"
        raise ConfigError(f"split_points: {name!r} {what}; name a module that returns one tensor")
    p = traced.nodes.index(output)
    if gaps[p].live is None:
        raise ConfigError(f"split_points: no cut after {name!r}: {gaps[p].reason}")
    if gaps[p].live is gaps[end].live:
        return end
    if p > end:
        raise ConfigError(
            f"split_points: {name!r} lies in the classifier, which starts after {traced.where(traced.nodes[end])}"
        )
    return p


# --- pieces ----------------------------------------------------------------------------------------------------------


def _build(traced: Traced, gaps: list[_Gap], ends: list[int], shape: tuple[int, ...], classes: int) -> Cut:
    nodes = traced.nodes
    inputs = [nodes[0], *(cast(fx.Node, gaps[p].live) for p in ends)]
    outputs = [*inputs[1:], cast(fx.Node, nodes[-1].args[0])]
    bounds = [0, *ends, len(nodes) - 2]
    pieces = [
        _piece(traced, nodes[start + 1 : stop + 1], source, result)
        for (start, stop), source, result in zip(pairwise(bounds), inputs, outputs, strict=True)
    ]
    whole = traced.model.state_dict(keep_vars=True)
    _adopt_unused(whole, pieces)
    stages = tuple(
        Stage(_stage_name(piece, whole, traced.outputs), piece, tuple(traced.values[result].shape[1:]))
        for piece, result in zip(pieces[:-1], outputs, strict=False)
    )
    return Cut(stages, pieces[-1], shape, classes)


def _piece(traced: Traced, nodes: list[fx.Node], source: fx.Node, result: fx.Node) -> fx.GraphModule:
    """The nodes as a module from source to result, around the model's own submodules."""
    graph = fx.Graph()
    copies = {source: graph.placeholder("x")}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[result])
    targets = {str(node.target): node for node in nodes if node.op in ("call_module", "get_attr")}
    piece = fx.GraphModule({target: traced.lookup(target) for target in targets}, graph)
    modules = dict(traced.model.named_modules())
    for path, module in piece.named_modules():  # the copies of composite modules start in train mode
        if path in modules:
            module.training = modules[path].training
    for target, node in targets.items():
        if target in traced.extras:
            traced.extras[target].training = modules[node.meta["owner"]].training
    return piece


def _adopt_unused(whole: dict[str, Any], pieces: list[fx.GraphModule]) -> None:
    """Gives each entry that forward() never uses a home: beside its other name, its siblings, or in the classifier."""
    states = [piece.state_dict(keep_vars=True) for piece in pieces]
    kept = set().union(*states)
    for key, tensor in whole.items():
        if key in kept or not isinstance(tensor, Tensor):
            continue
        parent = key.rpartition(".")[0] + "."
        twins = [p for p, state in zip(pieces, states, strict=True) if any(t is tensor for t in state.values())]
        siblings = [p for p, state in zip(pieces, states, strict=True) if any(k.startswith(parent) for k in state)]
        owner: nn.Module = [*twins, *siblings, pieces[-1]][0]
        *path, name = key.split(".")
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(name, tensor)
        else:
            owner.register_buffer(name, tensor)


def _stage_name(piece: fx.GraphModule, whole: dict[str, Any], called: Collection[str]) -> str:
    """The innermost called module that holds the stage's first parameter, nothing outside the stage, and the most."""
    keys = piece.state_dict().keys()
    parameters = dict(piece.named_parameters(remove_duplicate=False))
    targets = (str(node.target) for node in piece.graph.nodes if node.op in ("call_module", "get_attr"))
    first = next(t for t in targets if any(key == t or key.startswith(t + ".") for key in parameters))
    name, size = first, 0
    parts = first.split(".")
    for depth in range(len(parts), 0, -1):
        prefix = ".".join(parts[:depth])
        inside = {key for key in whole if key == prefix or key.startswith(prefix + ".")}
        if not inside <= keys:
            break
        if len(inside) > size and prefix in called:
            name, size = prefix, len(inside)
    return name
