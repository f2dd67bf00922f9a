"""Micro benches: a head's step, CRC32C, the activation cache, a recomputed prefix, and the preprocessing of a batch.

    python -m pytest bench/test_micro.py --benchmark-json=build/bench/micro.json

Each case checks its result before it is timed: a fast wrong answer is no result. The two candidates of a head are one
group, and so are the two of CRC32C. Shapes: x (N, C, H, W).
"""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nf_engine import _cache
from nf_engine.heads import build_head
from nf_engine.models import build
from nf_engine.preprocess import Normalisation, Preprocess
from nf_engine.records import HeadSpec
from nf_engine.stages import split
from nf_engine.storage import ActivationCache, CacheGeometry
from nf_engine.worker import forward_prefix

SHAPES = [(128, 64, 32, 32), (128, 128, 8, 8)]
HEADS = {
    "linear q=1": HeadSpec("linear", 1),
    "linear q=4": HeadSpec("linear", 4),
    "deep d=2": HeadSpec("deep", 1, width=32, depth=2),
}
CLASSES = 10
SMOOTHING = 0.1
CACHE = CacheGeometry(sample_shape=(64, 16, 16), dtype="fp16", samples=2048)  # 32 KiB a sample, 64 MiB
BATCH = 128


def measure(benchmark, call, **options):
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    return benchmark.pedantic(call, rounds=5, warmup_rounds=1, **options)


# --- heads ----------------------------------------------------------------------------------------------------------


def head_case(head, shape):
    """A head's parameters are as after some steps, all random; x, labels, and the scale 1 / N."""
    torch.manual_seed(0)
    module = build_head(HEADS[head], shape[1:], CLASSES, smoothing=SMOOTHING, seed=0)
    torch.nn.init.normal_(module.linear_weight, std=0.05)
    return module, torch.randn(shape), torch.randint(CLASSES, shape[:1]), torch.tensor(1 / shape[0])


def without_autograd(module, x, labels, scale):
    """Mean loss, the gradients of x and of each parameter."""
    module.zero_grad()
    loss, dx = module.step(x, labels, scale)
    return loss, [dx, *(p.grad for p in module.parameters())]


def autograd(module, x, labels):
    """The same by autograd through torch's own layers."""
    leaf = x.detach().requires_grad_()
    h = leaf
    for conv, norm in zip(module.convs, module.norms, strict=True):
        h = norm(conv(h)).relu()
    logits = F.linear(F.adaptive_avg_pool2d(h, module.spec.pool).flatten(1), module.linear_weight, module.linear_bias)
    loss = F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
    return loss.detach(), torch.autograd.grad(loss, [leaf, *module.parameters()])


@pytest.mark.parametrize("candidate", ["step", "autograd"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("head", HEADS)
def test_head(benchmark, head, shape, candidate):
    module, x, labels, scale = head_case(head, shape)
    step, plain = partial(without_autograd, module, x, labels, scale), partial(autograd, module, x, labels)

    (loss, found), (expected, gradients) = step(), plain()
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)

    benchmark.group = f"head {head}, {'x'.join(map(str, shape))}"
    measure(benchmark, step if candidate == "step" else plain)


# --- cache ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["table", "serial", "streams"])
def test_crc32c(benchmark, code):
    data = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8)
    assert _cache.crc32c(b"123456789", code=code) == 0xE3069283  # the check value of its definition

    benchmark.group = "CRC32C of 1 MiB"
    benchmark.extra_info["hardware"] = _cache.build_info()["crc32c"]
    crc = measure(benchmark, partial(_cache.crc32c, data, code=code), iterations=5)
    assert crc == _cache.crc32c(data)


def samples():
    torch.manual_seed(0)
    x = torch.randn(CACHE.samples, *CACHE.sample_shape).half()
    return x, torch.arange(CACHE.samples)


def filled(folder, tier, x, ids):
    """A finished cache of these samples, labelled with their numbers modulo 10, in place of an earlier round's."""
    (folder / "micro.nfc").unlink(missing_ok=True)
    cache = ActivationCache.create(folder, "micro.nfc", CACHE, tier=tier)
    for part in ids.split(BATCH):
        cache.append(x[part], part % 10, part)
    cache.finish()
    return cache


def read(cache):
    """Reads all in shuffled order; the last batch."""
    for batch in cache.batches(0, BATCH, key=1):
        last = batch
    return last


def check_contents(cache, x):
    seen = torch.zeros(len(x), dtype=torch.int64)
    for batch in cache.batches(0, BATCH, key=2, out_dtype=torch.float16):
        assert torch.equal(batch.x, x[batch.ids])
        assert torch.equal(batch.labels, batch.ids % 10)
        seen[batch.ids] += 1
    assert bool((seen == 1).all())


@pytest.mark.parametrize("tier", ["disk", "ram"])
def test_cache_write(benchmark, tmp_path, tier):
    x, ids = samples()
    with filled(tmp_path, tier, x, ids) as cache:
        check_contents(cache, x)

    benchmark.group = "cache of 64 MiB"
    measure(benchmark, lambda: filled(tmp_path, tier, x, ids).close())


@pytest.mark.parametrize("tier", ["disk", "ram"])
def test_cache_shuffled_read(benchmark, tmp_path, tier):
    x, ids = samples()
    with filled(tmp_path, tier, x, ids) as cache:
        check_contents(cache, x)

        benchmark.group = "cache of 64 MiB"
        benchmark.extra_info["past the page cache"] = cache.stats().direct
        measure(benchmark, partial(read, cache))


# --- inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
def test_recompute_of_the_first_stages(benchmark, count):
    torch.manual_seed(0)
    cut = split(build("vgg16", width=0.25), (3, 32, 32))
    prefix = [stage.module.eval() for stage in cut.stages[:count]]
    x = torch.randn(BATCH, 3, 32, 32)
    call = partial(forward_prefix, prefix, lambda _: x, BATCH, BATCH, "fp16")

    exact = x.double()
    with torch.no_grad():
        for stage in copy.deepcopy(prefix):
            exact = stage.double()(exact)
    torch.testing.assert_close(call().double(), exact, rtol=2e-3, atol=1e-3)  # the result is rounded to float16

    benchmark.group = "recompute, vgg16 width 1/4, batch 128"
    measure(benchmark, call)


def test_preprocess_crop_flip(benchmark):
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (BATCH, 3, 32, 32), dtype=np.uint8))
    mean, std = (110.0, 120.0, 130.0), (50.0, 60.0, 70.0)
    preprocess = Preprocess(Normalisation(mean, std), "crop-flip", seed=1)
    call = partial(preprocess, x, torch.arange(BATCH), stream=3)

    plain = (x.float() - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    for image, augmented in zip(plain[:8], call()[:8], strict=True):
        assert any(torch.allclose(augmented, view) for view in views(image))

    benchmark.group = "preprocess, batch 128"
    measure(benchmark, call)


def views(image):
    """All 9 x 9 shifts of an image (3, 32, 32) and of its mirror image, zeros beyond the border."""
    for version in (image, image.flip(2)):
        padded = F.pad(version, (4, 4, 4, 4))
        for row in range(9):
            for column in range(9):
                yield padded[:, row : row + 32, column : column + 32]
