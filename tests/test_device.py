"""The cap of torch's allocator: never above the budget, restored whatever happens. torch.cuda is a stand-in here."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nf_engine.device import capped, deterministic, free_bytes, room_bytes
from nf_engine.errors import ConfigError

CUDA = torch.device("cuda", 0)
GIB = 2**30
WORKSPACES = 64 * 2**20


class FakeStream:
    def __init__(self, device=None, priority=0):
        self.waited, self.priority = [], priority

    def wait_stream(self, other):
        self.waited.append(other)


class FakeCuda:
    """The part of torch.cuda that a cap touches; `allowed` is computed as the allocator does."""

    def __init__(self, total, reserved=0, fraction=1.0):
        self.total, self.reserved, self.fraction = total, reserved, fraction
        self.default, self.current, self.lowered = FakeStream(), None, fraction < 1
        self.current = self.default
        self.emptied = 0

    def install(self, patch):
        for name, value in {
            "empty_cache": self.empty_cache,
            "memory_reserved": lambda device: self.reserved,
            "mem_get_info": lambda device: (self.total - self.reserved - 300 * 2**20, self.total),
            "get_device_properties": lambda device: SimpleNamespace(total_memory=self.total),
            "get_per_process_memory_fraction": lambda device: self.fraction,
            "set_per_process_memory_fraction": self.set_fraction,
            "current_stream": lambda device: self.current,
            "Stream": FakeStream,
            "stream": self.stream,
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr("nf_engine.device.take_workspaces", self.take_workspaces)
        patch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self.clear_workspaces, raising=False)

    def take_workspaces(self, device):
        """On the stream that the run has, and before the cap: they are held, not the budget's."""
        assert self.current.priority == -1
        assert self.fraction == 1.0 or self.lowered
        self.reserved += WORKSPACES

    def clear_workspaces(self):
        self.reserved -= WORKSPACES

    def empty_cache(self):
        self.emptied += 1

    def set_fraction(self, fraction, device):
        assert isinstance(fraction, float)
        assert 0 <= fraction <= 1
        self.fraction = fraction

    @property
    def allowed(self):
        return int(self.fraction * self.total)

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


@given(st.integers(2**20, 2**40), st.integers(0, 2**34), st.integers(2**30, 2**40))
def test_the_cap_is_never_above_the_budget_and_less_than_a_byte_per_gib_below(budget, held, total):
    with pytest.MonkeyPatch.context() as patch:
        cuda = FakeCuda(total, held)
        cuda.install(patch)
        patch.setattr("nf_engine.device.gc.collect", lambda: 0)  # a tenth of a second for each example
        with capped(CUDA, budget) as cap:
            assert cuda.allowed <= budget + held + WORKSPACES
            assert cuda.allowed >= min(budget + held + WORKSPACES, total) - 1
            assert cap == (budget + held + WORKSPACES, held + WORKSPACES, 300 * 2**20)
        assert cuda.reserved == held
        assert cuda.fraction == 1.0


def test_the_cap_is_lifted_also_after_an_error_and_the_callers_stream_waits(monkeypatch):
    cuda = FakeCuda(16 * GIB)
    cuda.install(monkeypatch)
    streams = []

    def fail():
        with capped(CUDA, GIB):
            streams.append(cuda.current)
            assert cuda.allowed == GIB + WORKSPACES
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        fail()
    (own,) = streams
    assert own is not cuda.default, "a graph cannot be recorded on the default stream"
    assert own.waited == [cuda.default]
    assert cuda.fraction == 1.0
    assert cuda.default.waited == [own]
    assert cuda.emptied == 2


def test_a_lower_cap_that_was_there_stays_and_comes_back(monkeypatch):
    cuda = FakeCuda(16 * GIB, fraction=0.25)
    cuda.install(monkeypatch)
    with capped(CUDA, 8 * GIB):
        assert cuda.allowed == 4 * GIB
    with capped(CUDA, 2 * GIB):
        assert cuda.allowed == 2 * GIB + WORKSPACES
    assert cuda.fraction == 0.25


def test_room_is_what_the_cap_leaves_or_the_device_if_that_is_less(monkeypatch):
    cuda = FakeCuda(16 * GIB, reserved=GIB, fraction=0.25)
    cuda.install(monkeypatch)
    assert room_bytes(CUDA) == 3 * GIB
    cuda.fraction = 1.0
    assert room_bytes(CUDA) == 15 * GIB - 300 * 2**20 == free_bytes(CUDA)


def test_on_the_cpu_there_is_no_cap():
    with capped(torch.device("cpu"), 1) as cap:
        assert cap is None
    assert room_bytes(torch.device("cpu")) == pytest.approx(free_bytes(torch.device("cpu")), rel=0.2)


def test_an_operator_that_is_never_deterministic_is_a_matter_of_the_configuration(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with pytest.raises(ConfigError, match="deterministic=True: put_ does not have"), deterministic(CUDA, True):
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))
    with pytest.raises(RuntimeError, match="another"), deterministic(CUDA, True):
        raise RuntimeError("another")
    assert not torch.are_deterministic_algorithms_enabled()
