"""Stages: cuts any CNN that torch.fx can trace into the pieces that local learning trains.

A cut may lie wherever exactly one value is live: a (N, C, H, W) tensor that nothing after the cut writes to, with no
parameter used on both sides. Each stage holds at least one convolution; the norm, activation and pooling that follow
a convolution belong to its stage. What remains after the last one, from global pooling on, is the classifier.
The pieces hold the model's own submodules and parameters under their own names, so training a stage trains the model.

How: trace the model in train and in eval mode, merge the two graphs, run the graph on fake tensors (shapes and
versions only, nothing is computed), then cut the list of its nodes.
Shapes: images (N, C, H, W), between stages (N, C, H, W), logits (N, K).
Source: stages as in NeuroFlux, https://arxiv.org/abs/2402.14139; the cutting rules are ours.
"""

from __future__ import annotations

import difflib
import logging
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate, map_arg
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd

from nf_engine.errors import ConfigError, UnsupportedModelError

__all__ = ["Cut", "Stage", "split"]

BATCH = 13  # of the fake images: a prime that no channel or pixel count is likely to be, so a batch dimension shows

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
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"{path or type(model).__name__}: TorchScript cannot be traced; pass the nn.Module it was made from"
            )
    with _left_as_it_is(model):
        traced = _trace(model)
        _propagate(traced, shape, sample.dtype if isinstance(sample, Tensor) else None)
    _anchor_batch_size(traced)
    classes = _check_output(traced)
    gaps = _gaps(traced)
    end = _classifier_start(traced, gaps)
    ends = _requested_ends(traced, gaps, split_points, end) if split_points else _stage_ends(traced, gaps, end)
    return _build(traced, gaps, ends, shape, classes)


@dataclass(slots=True)
class _Traced:
    """A traced model: the graph's nodes in order, what each computes, and where each is last read or written."""

    model: nn.Module
    graph: fx.Graph
    outputs: dict[str, Any]  # what each module's last call returned: a node, or a structure of nodes
    extras: dict[str, nn.Module] = field(default_factory=dict)  # modules that the model itself does not have
    values: dict[fx.Node, Any] = field(default_factory=dict)  # fake tensors, sizes, ...
    written: dict[fx.Node, fx.Node] = field(default_factory=dict)  # the last in-place op that changed it

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.graph.nodes)

    def lookup(self, target: str) -> Any:
        if target in self.extras:
            return self.extras[target]
        *path, name = target.split(".")
        owner = self.model.get_submodule(".".join(path))
        return getattr(owner, name) if name else owner

    def where(self, node: fx.Node) -> str:
        """The module that the node belongs to, for messages."""
        if node.op == "placeholder":
            return "the input"
        target = str(node.target)
        if node.op == "call_module" and target not in self.extras:
            return target or type(self.model).__name__
        name = getattr(node.target, "__name__", target)
        return f"{node.meta.get('owner') or type(self.model).__name__} ({name})"


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


@contextmanager
def _left_as_it_is(model: nn.Module) -> Iterator[None]:
    """Restores attributes, training flags and random state: a traced forward may store proxies or draw numbers."""
    saved = [(module, dict(vars(module))) for module in model.modules()]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for module, attributes in saved:
                vars(module).clear()
                vars(module).update(attributes)


# --- trace -----------------------------------------------------------------------------------------------------------


class _Root(nn.Module):
    """Calls the model with one argument: other arguments keep their defaults, hooks run, constants land here."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images)


class _ByMode(nn.Module):
    """What a constant is in train mode and in eval mode: tracing would keep only one of the two."""

    def __init__(self, in_train: Any, in_eval: Any) -> None:
        super().__init__()
        self.in_train, self.in_eval = in_train, in_eval

    def forward(self) -> Any:
        return self.in_train if self.training else self.in_eval


class _Constant(nn.Module):
    """A tensor that is no part of the state_dict; a module of its own, so that it follows to() and deepcopy()."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    def forward(self) -> Tensor:
        return self.value


class _Tracer(fx.Tracer):
    """torch.fx's tracer; also knows in which module it is, what each returned, and refuses what fx would drop."""

    proxy_buffer_attributes = True  # else arithmetic on buffers alone is done now, and its result frozen

    def __init__(self) -> None:
        super().__init__()
        self.path = [""]  # modules being traced, outermost first; after an error the last one is where it happened
        self.returned: dict[str, Any] = {}
        self.contexts = _contexts()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        depth = len(self.path)
        self.path.append(_own_name(self.path_of_module(m)))
        result = super().call_module(m, forward, args, kwargs)
        self.returned[self.path[depth]] = map_aggregate(result, lambda x: x.node if isinstance(x, fx.Proxy) else x)
        del self.path[depth:]
        return result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _contexts() != self.contexts:
            raise RuntimeError(
                "forward() switches gradients or autocast itself, which a traced graph would drop; "
                "freeze parameters with requires_grad_(False) and open autocast around the training step"
            )
        node = super().create_node(*args, **kwargs)
        node.meta["owner"] = self.path[-1]
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and a.requires_grad and all(a is not p for p in self.root.parameters()):
            raise RuntimeError(
                "uses a trainable tensor that is no registered parameter; "
                "assign it to a module as nn.Parameter, or keep several in nn.ParameterList"
            )
        return super().create_arg(a)


def _contexts() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _own_name(path: str) -> str:
    return path.removeprefix("model").removeprefix(".")


def _trace(model: nn.Module) -> _Traced:
    """The graph of the model, right in train and in eval mode: constants that differ are looked up at run time."""
    traced, twin = _trace_once(model, True), _trace_once(model, False)
    partner: dict[fx.Node, fx.Node] = {}
    for node, other in zip_longest(traced.nodes, twin.nodes):
        if node is None or other is None or not _same_call(traced, node, twin, other):
            raise _modes_differ(traced, node, twin, other)
        partner[other] = node
        if not _merge_arguments(traced, node, other, partner):
            raise _modes_differ(traced, node, twin, other)
    return traced


def _trace_once(model: nn.Module, training: bool) -> _Traced:
    root, tracer = _Root(model), _Tracer()
    root.train(training)
    try:
        traced = _Traced(model, tracer.trace(root), tracer.returned)
    except Exception as error:  # whatever a user's forward() raises when it meets a proxy
        where = tracer.path[-1] or type(model).__name__
        hint = "; control flow must not depend on tensors" if isinstance(error, fx.proxy.TraceError) else ""
        raise UnsupportedModelError(
            f"{where}: torch.fx cannot trace its forward(): {type(error).__name__}: {_first_line(error)}{hint}"
        ) from error
    for node in traced.nodes:
        if node.op in ("call_module", "get_attr"):
            _name_as_in_model(traced, node, root)
    return traced


def _name_as_in_model(traced: _Traced, node: fx.Node, root: _Root) -> None:
    """Drops the root from a node's target; a tensor outside the state_dict becomes a module of its own."""
    path = str(node.target)
    inside = path == "model" or path.startswith("model.")
    if inside:
        node.target = _own_name(path)
    value = traced.lookup(str(node.target)) if inside else getattr(root, path)
    if isinstance(value, Tensor) and not (inside and node.target in traced.model.state_dict()):
        node.replace_all_uses_with(_call_extra(traced, node, "constant", _Constant(value)))
        traced.graph.erase_node(node)


def _call_extra(traced: _Traced, node: fx.Node, kind: str, module: nn.Module) -> fx.Node:
    """A call, before the node, of a module that the model does not have."""
    name = f"_nf_{kind}_{len(traced.extras)}"
    traced.extras[name] = module
    with traced.graph.inserting_before(node):
        call = traced.graph.create_node("call_module", name)
    call.meta["owner"] = node.meta.get("owner", "")
    return call


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")


def _same_call(traced: _Traced, node: fx.Node, twin: _Traced, other: fx.Node) -> bool:
    """Whether two nodes differ in their arguments only; a random tensor made by forward() differs in each trace."""
    if node.op != other.op or node.target != other.target:
        return False
    first, second = traced.extras.get(str(node.target)), twin.extras.get(str(other.target))
    return not (isinstance(first, _Constant) and isinstance(second, _Constant)) or _equal(first.value, second.value)


def _equal(first: Tensor, second: Tensor) -> bool:
    if first is second or first.is_meta:
        return True
    return (first.dtype, first.device) == (second.dtype, second.device) and torch.equal(first, second)


def _merge_arguments(traced: _Traced, node: fx.Node, other: fx.Node, partner: dict[fx.Node, fx.Node]) -> bool:
    """Makes the node's arguments those of both modes; False where they differ in more than constants."""
    leaves: list[Any] = []
    other_leaves: list[Any] = []
    structure = map_aggregate((node.args, node.kwargs), leaves.append)
    if structure != map_aggregate((other.args, other.kwargs), other_leaves.append):
        return False
    merged = []
    for leaf, twin in zip(leaves, other_leaves, strict=True):
        twin = partner[twin] if isinstance(twin, fx.Node) else twin
        same = leaf is twin or (type(leaf) is type(twin) and leaf == twin)
        if not same and not all(value is None or isinstance(value, bool | int | float | str) for value in (leaf, twin)):
            return False
        merged.append(leaf if same else _call_extra(traced, node, "by_mode", _ByMode(leaf, twin)))
    rest = iter(merged)
    node.args, node.kwargs = cast(Any, map_aggregate((node.args, node.kwargs), lambda _: next(rest)))
    return True


def _modes_differ(traced: _Traced, node: fx.Node | None, twin: _Traced, other: fx.Node | None) -> UnsupportedModelError:
    here, there = (t.where(n) if n is not None else "nothing more" for t, n in ((traced, node), (twin, other)))
    return UnsupportedModelError(
        f"forward() does different things in train and eval mode, or each time it runs: first {here}, then {there}; "
        "expected the same operations, with at most other constants, such as dropout's `training`"
    )


# --- shapes ----------------------------------------------------------------------------------------------------------


def _propagate(traced: _Traced, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    """Runs the graph on fake tensors: shapes of all values, and which of them in-place ops write to."""
    parameters = list(traced.model.parameters())
    floating = next((p.dtype for p in parameters if p.is_floating_point()), torch.get_default_dtype())
    device = parameters[0].device if parameters else torch.device("cpu")
    versions: dict[fx.Node, int] = {}
    with _quiet_fake_tensors(), FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        images = torch.empty((BATCH, *shape), dtype=dtype or floating, device=device)
        for node in traced.nodes:
            value = traced.values[node] = _run_node(traced, node, images, mode, shape)
            if isinstance(value, Tensor):
                versions[node] = value._version
            for earlier, version in versions.items():
                if traced.values[earlier]._version != version:
                    versions[earlier] = traced.values[earlier]._version
                    traced.written[earlier] = node


@contextmanager
def _quiet_fake_tensors() -> Iterator[None]:
    """torch logs a traceback for a shape that does not fit; our error says the same in one line."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _run_node(traced: _Traced, node: fx.Node, images: Tensor, mode: FakeTensorMode, shape: tuple[int, ...]) -> Any:
    if node.op == "placeholder":
        return images
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: traced.values[n])
    try:
        if node.op == "get_attr":
            value = traced.lookup(str(node.target))
            return mode.from_tensor(value) if isinstance(value, Tensor) else value
        if node.op == "call_module":
            module = traced.lookup(str(node.target))
            state = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
            return torch.func.functional_call(module, {k: mode.from_tensor(v) for k, v in state}, args, kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return args[0] if node.op == "output" else cast(Callable[..., Any], node.target)(*args, **kwargs)
    except Exception as error:  # a shape that does not fit, an op without a fake version: whatever the module raises
        raise UnsupportedModelError(
            f"{traced.where(node)}: cannot run on images (N, {', '.join(map(str, shape))}): "
            f"{type(error).__name__}: {_first_line(error)}; check the sample's shape"
        ) from error


def _anchor_batch_size(traced: _Traced) -> None:
    """Reads N, where it is used, from a tensor used there too: `n = x.size(0)` kept for later would forbid all cuts."""
    for node in traced.nodes:
        source = _batch_size_of(traced, node)
        for user in list(node.users) if source is not None else ():
            near = [n for n in user.all_input_nodes if _is_batch(traced.values[n]) and n is not source]
            if user.op == "output" or not near:
                continue
            with traced.graph.inserting_before(user):
                size = traced.graph.create_node("call_method", "size", (near[0], 0))
            size.meta["owner"] = user.meta.get("owner", "")
            traced.values[size] = BATCH
            user.replace_input_with(node, size)


def _batch_size_of(traced: _Traced, node: fx.Node) -> fx.Node | None:
    """The tensor whose dimension 0 the node reads, if that is what it does."""
    if node.op == "call_method" and node.target == "size" and (*node.args[1:], *node.kwargs.values()) == (0,):
        source = node.args[0]
    elif _function_name(node) == "getitem" and node.args[1:] == (0,):
        sizes = node.args[0]
        is_shape = isinstance(sizes, fx.Node) and isinstance(traced.values[sizes], torch.Size)
        source = sizes.args[0] if isinstance(sizes, fx.Node) and is_shape and sizes.args else None
    else:
        return None
    return source if isinstance(source, fx.Node) and _is_batch(traced.values[source]) else None


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == BATCH


def _check_output(traced: _Traced) -> int:
    """K, where the model's output is logits (N, K)."""
    output = traced.nodes[-1].args[0]
    value = traced.values[output] if isinstance(output, fx.Node) else output
    if isinstance(value, Tensor) and value.ndim == 2 and _is_batch(value):
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


def _gaps(traced: _Traced) -> list[_Gap]:
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
    traced: _Traced, live: list[fx.Node], position: dict[fx.Node, int], shared: list[tuple[int, int, str]], p: int
) -> _Gap:
    if len(live) != 1:
        names = ", ".join(traced.where(n) for n in live)
        return _Gap(None, f"{len(live)} values are live there: {names}")
    (node,) = live
    value = traced.values[node]
    if not (_is_batch(value) and value.ndim == 4):
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        return _Gap(None, f"{traced.where(node)} is not a (N, C, H, W) tensor but {found} (with N = {BATCH})")
    writer = traced.written.get(node)
    if writer is not None and position[writer] > p:
        return _Gap(None, f"{traced.where(writer)} writes to the same tensor afterwards, in place; cut after that")
    for first, last, name in shared:
        if first <= p < last:
            return _Gap(None, f"{name} is used both before and after")
    return _Gap(node)


def _shared_state(traced: _Traced) -> list[tuple[int, int, str]]:
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


def _classifier_start(traced: _Traced, gaps: list[_Gap]) -> int:
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


def _convolutions(traced: _Traced) -> list[int]:
    found = [p for p, node in enumerate(traced.nodes) if _is_convolution(traced, node)]
    if not found:
        raise UnsupportedModelError(
            f"{type(traced.model).__name__}: no convolution with parameters in its forward(); "
            "nf_engine trains convolutional networks"
        )
    return found


def _is_convolution(traced: _Traced, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = traced.lookup(str(node.target))
        kernel = module.kernel_size if isinstance(module, _ConvNd) else None  # .weight would step a spectral norm
    elif node.op == "call_function" and _function_name(node).startswith(_CONVOLUTIONS):
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        kernel = None
        if isinstance(weight, fx.Node) and _depends_on_parameter(traced, weight):
            kernel = traced.values[weight].shape[2:]
    else:
        return False
    # A 1x1 kernel on a 1x1 image is a linear layer by another name; some classifiers are written so.
    return kernel is not None and {*kernel, *traced.values[node.all_input_nodes[0]].shape[2:]} != {1}


def _depends_on_parameter(traced: _Traced, node: fx.Node) -> bool:
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


def _opens_classifier(traced: _Traced, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = traced.lookup(str(node.target))
        if isinstance(module, _MODULES_OPEN_CLASSIFIER):
            return True
        average = isinstance(module, nn.AvgPool2d)
    else:
        if _function_name(node).startswith(_OPEN_CLASSIFIER):
            return True
        average = _function_name(node) == "avg_pool2d"
    return average and tuple(traced.values[node].shape[2:]) == (1, 1)  # a global average, written as a fixed window


def _function_name(node: fx.Node) -> str:
    """Name of the function or method called, "" for other nodes."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return str(getattr(node.target, "__name__", node.target))


def _stage_ends(traced: _Traced, gaps: list[_Gap], end: int) -> list[int]:
    """The last usable gap before each convolution, where it lies after the one before; then the classifier's."""
    usable = [p for p in range(end) if gaps[p].live is not None]
    convolutions = _convolutions(traced)
    ends = []
    for before, convolution in pairwise(convolutions):
        i = bisect_left(usable, convolution) - 1
        if i >= 0 and usable[i] >= before:
            ends.append(usable[i])
    return [*ends, end]


def _requested_ends(traced: _Traced, gaps: list[_Gap], split_points: Sequence[str], end: int) -> list[int]:
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


def _end_of(traced: _Traced, gaps: list[_Gap], name: str, end: int) -> int:
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


def _build(traced: _Traced, gaps: list[_Gap], ends: list[int], shape: tuple[int, ...], classes: int) -> Cut:
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


def _piece(traced: _Traced, nodes: list[fx.Node], source: fx.Node, result: fx.Node) -> fx.GraphModule:
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
