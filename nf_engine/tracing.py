"""Tracing: turns a model into one checked torch.fx graph.

Trace the model in train and in eval mode, merge the two graphs, run the graph on fake tensors (shapes and versions
only, nothing is computed), then read the batch size N near its uses.
Shapes: fake images (BATCH, C, H, W) in; each node's value is a fake tensor, a size or a structure of these.
Source: torch.fx, Reed et al., https://arxiv.org/abs/2112.08429; merging the two modes is ours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate, map_arg

from nf_engine.errors import UnsupportedModelError

__all__ = ["BATCH", "Traced", "function_name", "is_batch", "trace"]

BATCH = 13  # of the fake images: a prime that no channel or pixel count is likely to be, so a batch dimension shows


@dataclass(slots=True)
class Traced:
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


def trace(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Traced:
    """Traces a model, right in train and in eval mode, with the shape of every value; the model stays as it is.

    Args:
        model: maps images (N, C, H, W) to anything, on any device, "meta" included.
        shape: (C, H, W) of one image.
        dtype: of the images; None: that of the first floating-point parameter.

    Raises:
        UnsupportedModelError: the model cannot be traced or run on such images; names the module and why.
    """
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"{path or type(model).__name__}: TorchScript cannot be traced; pass the nn.Module it was made from"
            )
    with _left_as_it_is(model):
        traced = _trace_modes(model)
        _propagate(traced, shape, dtype)
    _anchor_batch_size(traced)
    return traced


def is_batch(value: Any) -> bool:
    """Whether a value of `Traced.values` is a tensor (N, ...), N being BATCH, of any other sizes."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == BATCH


def function_name(node: fx.Node) -> str:
    """Name of the function or method that the node calls, "" for other nodes."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return str(getattr(node.target, "__name__", node.target))


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


# --- graph -----------------------------------------------------------------------------------------------------------


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


def _trace_modes(model: nn.Module) -> Traced:
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


def _trace_once(model: nn.Module, training: bool) -> Traced:
    root, tracer = _Root(model), _Tracer()
    root.train(training)
    try:
        traced = Traced(model, tracer.trace(root), tracer.returned)
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


def _name_as_in_model(traced: Traced, node: fx.Node, root: _Root) -> None:
    """Drops the root from a node's target; a tensor outside the state_dict becomes a module of its own."""
    path = str(node.target)
    inside = path == "model" or path.startswith("model.")
    if inside:
        node.target = _own_name(path)
    value = traced.lookup(str(node.target)) if inside else getattr(root, path)
    if isinstance(value, Tensor) and not (inside and node.target in traced.model.state_dict()):
        node.replace_all_uses_with(_call_extra(traced, node, "constant", _Constant(value)))
        traced.graph.erase_node(node)


def _call_extra(traced: Traced, node: fx.Node, kind: str, module: nn.Module) -> fx.Node:
    """A call, before the node, of a module that the model does not have."""
    name = f"_nf_{kind}_{len(traced.extras)}"
    traced.extras[name] = module
    with traced.graph.inserting_before(node):
        call = traced.graph.create_node("call_module", name)
    call.meta["owner"] = node.meta.get("owner", "")
    return call


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")


def _same_call(traced: Traced, node: fx.Node, twin: Traced, other: fx.Node) -> bool:
    """Whether two nodes differ in their arguments only; a random tensor made by forward() differs in each trace."""
    if node.op != other.op or node.target != other.target:
        return False
    first, second = traced.extras.get(str(node.target)), twin.extras.get(str(other.target))
    return not (isinstance(first, _Constant) and isinstance(second, _Constant)) or _equal(first.value, second.value)


def _equal(first: Tensor, second: Tensor) -> bool:
    if first is second or first.is_meta:
        return True
    return (first.dtype, first.device) == (second.dtype, second.device) and torch.equal(first, second)


def _merge_arguments(traced: Traced, node: fx.Node, other: fx.Node, partner: dict[fx.Node, fx.Node]) -> bool:
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


def _modes_differ(traced: Traced, node: fx.Node | None, twin: Traced, other: fx.Node | None) -> UnsupportedModelError:
    here, there = (t.where(n) if n is not None else "nothing more" for t, n in ((traced, node), (twin, other)))
    return UnsupportedModelError(
        f"forward() does different things in train and eval mode, or each time it runs: first {here}, then {there}; "
        "expected the same operations, with at most other constants, such as dropout's `training`"
    )


# --- shapes ----------------------------------------------------------------------------------------------------------


def _propagate(traced: Traced, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
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


def _run_node(traced: Traced, node: fx.Node, images: Tensor, mode: FakeTensorMode, shape: tuple[int, ...]) -> Any:
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


def _anchor_batch_size(traced: Traced) -> None:
    """Reads N, where it is used, from a tensor used there too: `n = x.size(0)` kept for later would forbid all cuts."""
    for node in traced.nodes:
        source = _batch_size_of(traced, node)
        for user in list(node.users) if source is not None else ():
            near = [n for n in user.all_input_nodes if is_batch(traced.values[n]) and n is not source]
            if user.op == "output" or not near:
                continue
            with traced.graph.inserting_before(user):
                size = traced.graph.create_node("call_method", "size", (near[0], 0))
            size.meta["owner"] = user.meta.get("owner", "")
            traced.values[size] = BATCH
            user.replace_input_with(node, size)


def _batch_size_of(traced: Traced, node: fx.Node) -> fx.Node | None:
    """The tensor whose dimension 0 the node reads, if that is what it does."""
    if node.op == "call_method" and node.target == "size" and (*node.args[1:], *node.kwargs.values()) == (0,):
        source = node.args[0]
    elif function_name(node) == "getitem" and node.args[1:] == (0,):
        sizes = node.args[0]
        is_shape = isinstance(sizes, fx.Node) and isinstance(traced.values[sizes], torch.Size)
        source = sizes.args[0] if isinstance(sizes, fx.Node) and is_shape and sizes.args else None
    else:
        return None
    return source if isinstance(source, fx.Node) and is_batch(traced.values[source]) else None
