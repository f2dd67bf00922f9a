"""The candidates of bench_heads: a head's step as PyTorch, torch.compile and the package do it, and float64's truth.

x (N, C, H, W), in a case with C, H = W, N, K, its dtype and a kind; a step makes loss, dx and the weights' gradients.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.head_kinds import KINDS
from nf_engine import ops, reference
from nf_engine.ops import HeadParams, Statistics
from nf_engine.records import HeadSpec

SHAPES = ((64, 32), (128, 16), (256, 8), (512, 4), (512, 2))  # C, H = W: the stages of a VGG at 32x32
POOLS = {"linear q=1": 1, "linear q=2": 2, "linear q=4": 4, "deep d=1 pool 4": 4, "deep d=2": 1}  # by kind
TAIL = "tail"
PEERS = ("compile", "max-autotune")
NAMES = ("eager", *PEERS, "reference", "fused")
SMOOTHING = 0.1
ROTATION = 60e6  # bytes of x below which a GPU would read it from its L2
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02}  # |a - b| / |b|
RELU_TOLERANCE = {torch.float32: 0.05, torch.bfloat16: 0.2}  # one sign in 400 turned by rounding makes 0.05: TF32's

Result = tuple[Tensor, Tensor, list[Tensor]]  # loss, dx, gradients in the order of HeadParams.flat
Step = Callable[[Tensor], Result]


class Case(NamedTuple):
    channels: int
    side: int
    batch: int
    classes: int
    dtype: torch.dtype
    kind: str

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.side, self.side

    @property
    def x_bytes(self) -> int:
        return self.batch * math.prod(self.shape) * self.dtype.itemsize

    @property
    def least_bytes(self) -> int:
        """That a step must move: x, and dx where there is one."""
        return self.x_bytes * (1 if self.kind in ("linear q=1", TAIL) else 2)

    @property
    def spec(self) -> HeadSpec:
        if self.kind.startswith("deep"):
            return HeadSpec("deep", POOLS[self.kind], self.channels, 1 + ("d=2" in self.kind))
        return HeadSpec("linear", POOLS.get(self.kind, 1))

    def names(self) -> dict[str, Any]:
        """The case in a row."""
        return {"shape": f"{self.channels}@{self.side}", "batch": self.batch, "classes": self.classes,
                "dtype": "bf16" if self.dtype == torch.bfloat16 else "fp32", "kind": self.kind}  # fmt: skip


def cases(device: torch.device, quick: bool) -> list[Case]:
    kinds = list(POOLS)
    sizes: list[tuple[int, int, int, int]]  # C, H, N, K
    if device.type == "cuda":
        batches = (256,) if quick else (256, 4096)
        sizes = [(c, h, n, 10) for n in batches for c, h in SHAPES] + [(64, 56, 256, 1000), (64, 224, 64, 1000)]
        dtypes = (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32)
    else:
        batches, dtypes = (64,), (torch.float32,)
        sizes = [(c, h, 64, 10) for c, h in (SHAPES[2:4] if quick else SHAPES)]
        kinds = kinds[2:4] if quick else kinds
    tails = [Case(512, 1, n, k, torch.float32, TAIL) for n in batches for k in (10, 100, 1000)]
    if device.type == "cuda":  # of a 4 x 4 pool: many classes and many features at once
        tails += [Case(8192, 1, n, 200, torch.float32, TAIL) for n in batches]
    listed = [Case(*size, dtype, kind) for dtype in dtypes for size in sizes for kind in kinds]
    return [c for c in listed if c.spec.pool <= c.side] + tails  # a larger pool is clipped: it would be another kind


class Problem:
    """A head, its inputs in rotation, and what float64 says of the step on the first of them."""

    def __init__(self, case: Case, device: torch.device, layout: torch.memory_format = torch.channels_last) -> None:
        generator = torch.Generator().manual_seed(0)
        kind = "linear q=1" if case.kind == TAIL else case.kind
        module = KINDS[kind](case.shape, case.classes, generator)
        linear = next(m for m in module.modules() if isinstance(m, nn.Linear))
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5, generator=generator)  # from zero dx would be 0
        self.module = module.to(device, memory_format=layout)
        self.pool = int(next(m.output_size for m in module.modules() if isinstance(m, nn.AdaptiveAvgPool2d)))
        self.case, self.device = case, device
        copies = math.ceil(2 * ROTATION / case.x_bytes) if device.type == "cuda" and case.x_bytes < ROTATION else 1
        there, shape = torch.Generator(device).manual_seed(0), (case.batch, *case.shape)
        made = (torch.randn(shape, generator=there, device=device, dtype=case.dtype) for _ in range(min(copies, 64)))
        self.xs = [x.to(memory_format=layout).requires_grad_() for x in made]
        self.labels = torch.randint(case.classes, (case.batch,), generator=generator).to(device)
        self.scale = torch.full((1,), 1 / case.batch, device=device)
        self.params = head_params(self.module)
        norms = [m for m in self.module.modules() if isinstance(m, nn.BatchNorm2d)]
        self.running = Statistics(tuple(torch.zeros_like(m.weight.detach()) for m in norms),
                                  tuple(torch.ones_like(m.weight.detach()) for m in norms))  # fmt: skip

    def loss(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
            return F.cross_entropy(self.module(x), self.labels, label_smoothing=SMOOTHING)

    @cached_property
    def exact(self) -> Result:
        module = copy.deepcopy(self.module).double()
        x = self.xs[0].detach().double().requires_grad_()
        loss = F.cross_entropy(module(x), self.labels, label_smoothing=SMOOTHING)
        dx, *grads = torch.autograd.grad(loss, [x, *head_params(module).flat()])
        return loss.detach(), dx, grads

    def error(self, result: Result) -> float:
        """The largest |a - b| / |b| of loss, dx and gradients, as vectors; NaN where there is one."""
        pairs = zip((result[0], result[1], *result[2]), (self.exact[0], self.exact[1], *self.exact[2]), strict=True)
        return float(torch.stack([(a.double() - b).norm() / b.norm() for a, b in pairs]).max())

    def tolerance(self) -> float:
        return (RELU_TOLERANCE if self.case.kind.startswith("deep") else TOLERANCE)[self.case.dtype]


def head_params(module: nn.Module) -> HeadParams:
    """The weights of a plain module as the step without autograd takes them."""
    convs, norms, (linear,) = ([m for m in module.modules() if isinstance(m, kind)]
                               for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Linear))  # fmt: skip
    return HeadParams(
        tuple(m.weight for m in convs),
        tuple(m.weight for m in norms),
        tuple(m.bias for m in norms),
        linear.weight,
        linear.bias,
    )


# --- candidates -----------------------------------------------------------------------------------------------------


def ours(device: torch.device) -> str:
    """The candidate that the engine takes on this device, fallbacks aside."""
    return "fused" if device.type == "cuda" else "reference"


def make_step(name: str, problem: Problem) -> Step:
    if name in ("reference", "fused"):
        return fused_or_reference(name, problem)
    loss = problem.loss
    if name in PEERS:
        mode = "max-autotune-no-cudagraphs" if name == "max-autotune" else "default"
        loss = torch.compile(loss, mode=mode, dynamic=False)
    weights = problem.params.flat()

    def step(x: Tensor) -> Result:
        value = loss(x)
        dx, *grads = torch.autograd.grad(value, [x, *weights])
        return value.detach(), dx, grads

    return step


def fused_or_reference(name: str, problem: Problem) -> Step:
    path = ops.head_path(problem.device, problem.case.dtype)
    arguments = problem.params, problem.running, problem.labels, problem.scale
    if name == "fused" and path.name != name:
        raise RuntimeError(f"not taken: {path.reason}")

    def through_ops(x: Tensor) -> Result:
        params, running, labels, scale = arguments
        done = ops.head_step(x, params, labels, scale, running=running, pool=problem.pool, smoothing=SMOOTHING)
        return done.loss_rows.sum() * scale[0], done.dx, done.grads.flat()

    @torch.no_grad()
    def direct(x: Tensor) -> Result:
        done = reference.head_step(x, *arguments, problem.pool, SMOOTHING)
        return done.loss_rows.sum() * problem.scale[0], done.dx, done.grads.flat()

    return through_ops if path.name == name else direct


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The work of run() as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        kept = run()

    def replay() -> object:
        graph.replay()
        return kept  # its memory is the graph's

    return replay
