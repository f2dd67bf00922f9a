"""Small whole runs in processes of their own: what the tests of kills, signals and faults let happen to a training.

`Program` starts this file, which has torch loaded and forks once a case (fork_server.py); the child loads
nf_engine._cache, which reads its faults from the environment at that time. A case is killed or signalled from outside,
or ends by a fault within; a run takes a quarter of a second. Nothing is profiled: the plan is written here.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import itertools
import json
import os
import select
import signal
import sys
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fork_server import ForkServer, serve

DEFAULTS = {
    signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL
}  # fmt: skip
FIXED = {"LOCK", "log.jsonl", "MANIFEST.json", "MANIFEST.prev.json"}
HELD, SIDE = 20, 8
CHANNELS = (3, 8, 8, 8, 8, 8, 8)


@dataclass(frozen=True)
class Scene:
    """One kind of run: three blocks, their inputs on a tier.

    units: in each block. threads: of the cache engine; 1: operations come in the same order every time. fields: of
    TrainConfig.
    """

    tier: str = "disk"
    units: int = 1
    threads: int = 2
    batch: int = 8
    images: int = 34
    classes: int = 4
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        return {"epochs": 2, "cache": self.tier, "checkpoint_minutes": 0.0, "device": "cpu", **self.fields}

    def with_fields(self, **fields: Any) -> Scene:
        return replace(self, fields={**self.fields, **fields})


# ---- The run -----------------------------------------------------------------------------------------------------


def network(units: int, classes: int) -> Any:
    """A convolution, a norm and dropout a stage, so that weights, buffers and random numbers all have to be right."""
    import torch
    from torch import nn

    stages = 3 * units
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(CHANNELS[: stages + 1]):
        convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
        layers.append(nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU(), nn.Dropout(0.2)))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(*layers)
            self.classifier = nn.Linear(CHANNELS[-1], classes)

        def forward(self, x: Any) -> Any:
            return self.classifier(self.features(x).mean((2, 3)))

    made = Net()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return made


def images(count: int, classes: int, seed: int) -> tuple[Any, Any]:
    """Noise, and labels that a corner's brightness decides."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 200, (count, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % classes
    x[:, :, :4, :4] += (labels * 13).to(torch.uint8)[:, None, None, None]
    return x, labels


def plan_of(scene: Scene, stages: Sequence[str]) -> Any:
    """Three blocks by hand; the budget is one that nothing reaches."""
    from nf_engine.records import BlockPlan, Bounds, CachePlan, HeadSpec, Plan, TierProbe, UnitPlan

    budget, last = 1 << 26, 3 * scene.units - 1
    copies = scene.fields.get("augment_copies", 1)

    def unit(stage: int) -> Any:
        head = HeadSpec("classifier") if stage == last else HeadSpec("linear", 2)
        return UnitPlan(stage, stage, head, "autograd" if stage == last else "reference", budget // 2)

    def block(number: int) -> Any:
        units = tuple(unit(number * scene.units + k) for k in range(scene.units))
        tier = scene.tier if number else "images"
        cache = CachePlan(tier, "fp16", copies, 0, {}, "by hand", forward_batch=16, window=8192)
        return BlockPlan(units, scene.batch, 0.2, budget // 2, None, cache)

    probe = TierProbe(1.0, 1.0, 1.0, 1.0, 1.0, 0.0, {"disk": budget}, scene.threads, scene.threads)
    return Plan(
        "Net", "layerwise", "cpu", budget, budget, 1, scene.images, scene.settings["epochs"], tuple(stages),
        tuple(block(k) for k in range(3)), Bounds(scene.batch, budget, budget, budget, 1), 0, None, (), probe,
        optimizer=scene.settings.get("optimizer", "sgd"), precision=scene.settings.get("precision", "32-true"),
    )  # fmt: skip


def train(folder: str, scene: Scene, **more: Any) -> Any:
    """The run of a scene, from whatever the folder holds to its end; always the same call."""
    import torch

    from nf_engine.engine import train

    torch.manual_seed(time.time_ns() % 1000)  # nothing may depend on it
    stages = [f"features.{k}" for k in range(3 * scene.units)]
    return train(
        network(scene.units, scene.classes), images(scene.images, scene.classes, 1), images(HELD, scene.classes, 2),
        output_dir=folder, split_points=tuple(stages[:-1]), plan=plan_of(scene, stages),
        **{"memory_budget": 1 << 26, "progress": "none", **scene.settings, **more},
    )  # fmt: skip


# ---- The child ---------------------------------------------------------------------------------------------------


def stop_at(block: int, step: int, number: int, ready: int) -> Any:
    """An observer of the training that sends it a signal before this step of all of the block's, and says so."""
    from nf_engine.progress import Silent

    class Stopper(Silent):
        now = -1

        def block_started(self, number: int, _: Any) -> None:
            self.now = number

        def step(self, done: int, _: int) -> None:
            if (self.now, done) == (block, step):
                os.write(ready, b"r")
                signal.raise_signal(number)

    return Stopper()


def digest_of_tensors(model: Any) -> str:
    """Weights and buffers of all exits, bit for bit."""
    digest = hashlib.sha256()
    for key, value in itertools.chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def say_when_listening(ready: int) -> None:
    """Once the handlers of signals are in place."""
    from nf_engine.interrupt import Interrupt

    enter = Interrupt.__enter__

    def entered(interrupt: Interrupt) -> Interrupt:
        made = enter(interrupt)
        os.write(ready, b"r")
        return made

    Interrupt.__enter__ = entered  # type: ignore[method-assign]


def held() -> dict[str, Any]:
    """What a process must not hold more of after a run."""
    return {
        "files": [os.readlink(fd) for fd in sorted(Path("/proc/self/fd").iterdir()) if fd.exists()],  # noqa: PTH115
        "threads": len(os.listdir("/proc/self/task")),  # noqa: PTH208
        "handlers": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "shared": sum(" /dev/shm/" in line for line in Path("/proc/self/maps").read_text().splitlines()),
    }


def run(case: dict[str, Any]) -> dict[str, Any]:
    """One case in this process, which loads the module with its faults here. What came of it."""
    load_faulty_module()
    engine = importlib.import_module("nf_engine.engine")
    from nf_engine.errors import NFError

    if case["stop"]:
        engine.make_observer = lambda _: stop_at(*case["stop"], case["ready"])
    if case["begin"] == "handlers":
        say_when_listening(case["ready"])
    elif case["begin"] == "train":
        os.write(case["ready"], b"r")
    before = held()
    started = time.monotonic()
    try:
        result = train(case["folder"], Scene(**case["scene"]), **case["call"])
        facts = {
            "result": result.status,
            "weights": digest_of_tensors(result.model),
            "exits": [[e.accuracy, e.loss] for e in result.exits],
        }
    except NFError as error:
        facts = {"result": type(error).__name__, "text": str(error), "exit_code": error.exit_code}
    after, deadline = held(), time.monotonic() + 3
    while after["threads"] > before["threads"] and time.monotonic() < deadline:
        time.sleep(0.01)  # a thread that was joined is listed until the kernel has taken it apart
        after = held()
    facts["took"] = time.monotonic() - started
    return {**facts, "left": {name: [before[name], after[name]] for name in before if before[name] != after[name]}}


def answer(case: dict[str, Any], _: int) -> dict[str, Any]:
    """`run`, with signals as in a program that a shell has started."""
    for number, handler in DEFAULTS.items():  # whoever started this may have had them ignored
        signal.signal(number, handler)
    try:
        return run(case)
    except KeyboardInterrupt:  # as the interpreter itself ends
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        raise


def deliver(case: dict[str, Any], pid: int, ready: int) -> dict[str, float]:
    """Sends signals, each so many seconds after the one before; the first after the start of the training. Seconds
    from the first one to the end of the process."""
    if not os.read(ready, 1):
        return {"seconds": 0.0}
    end = os.pidfd_open(pid)
    sent = 0.0
    for delay, number in case["signals"]:
        if select.select([end], [], [], delay)[0]:
            break
        sent = sent or time.monotonic()
        signal.pidfd_send_signal(end, number)
    select.select([end], [], [])
    os.close(end)
    return {"seconds": time.monotonic() - sent if sent else 0.0}


STAND_IN = types.ModuleType("nf_engine._cache")


def load() -> None:
    """All that a run uses but the module that reads the faults; what torch loads at its first use, too."""
    import torch

    import nf_engine

    torch.set_num_threads(1)
    # Of 16-mixed: a loss scale that overflows, and moves, every other step.
    scaler: Any = torch.amp.GradScaler
    scaler.__init__ = functools.partialmethod(scaler.__init__, init_scale=2.0**19, growth_interval=2)
    sys.modules[STAND_IN.__name__] = STAND_IN
    nf_engine._cache = STAND_IN  # type: ignore[attr-defined]
    importlib.import_module("nf_engine.engine")
    from nf_engine.instruments import flops_of
    from nf_engine.stages import split

    cut = split(network(1, 4), (3, SIDE, SIDE), split_points=("features.0",))
    stage = cut.stages[0].module
    flops_of(stage, cut.input_shape)
    for optimizer in (torch.optim.SGD, torch.optim.AdamW):
        stage(torch.zeros(2, *cut.input_shape)).sum().backward()
        optimizer(stage.parameters(), lr=0.1).step()


def load_faulty_module() -> None:
    """The real module in the place of its stand-in."""
    del sys.modules[STAND_IN.__name__]
    real = importlib.import_module(STAND_IN.__name__)
    for module in list(sys.modules.values()):
        if vars(module).get("_cache") is STAND_IN:
            module._cache = real  # type: ignore[attr-defined]


# ---- The tests' side ---------------------------------------------------------------------------------------------


def manifest_of(folder: Path, name: str = "MANIFEST.json") -> dict[str, Any]:
    """Read without the code under test."""
    return dict(json.loads((folder / name).read_bytes()))


def position(folder: Path) -> tuple[int, int, int]:
    """Block, epoch and step of the last commit."""
    at = manifest_of(folder)["position"]
    return at["block"], at["epoch"], at["step"]


def contents(folder: Path) -> dict[str, str]:
    """Digest of each durable file that the manifest lists, by role and block; the test fails where one is not so."""
    found = {}
    for entry in manifest_of(folder)["files"]:
        if entry["role"] == "cache":  # its digest is that of a table within
            assert (folder / entry["name"]).stat().st_size == entry["bytes"]
            continue
        data = (folder / entry["name"]).read_bytes()
        data = data[: entry["bytes"]] if entry["role"] == "metrics" else data
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], f"{entry['name']} is not what the manifest lists"
        found[f"{entry['role']} {entry['block']}"] = entry["sha256"]
    return found


def listed(folder: Path) -> set[str]:
    """All names that may be in a run folder but after a crash."""
    names = set(FIXED)
    for name in ("MANIFEST.json", "MANIFEST.prev.json"):
        files = manifest_of(folder, name)["files"] if (folder / name).exists() else []
        names |= {e["name"] for e in files if name == "MANIFEST.json" or e["role"] != "cache"}
    return names


def names_in(folder: Path) -> set[str]:
    return set(os.listdir(folder))  # noqa: PTH208


def events(folder: Path, event: str) -> list[dict[str, Any]]:
    """Lines of log.jsonl; a process that was killed may have left half a line."""
    lines = []
    for text in (folder / "log.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return [line for line in lines if line["event"] == event]


def result_of(folder: Path, ended: Ended) -> dict[str, Any]:
    """All that a run leaves and that no interruption may change; nothing else is left."""
    assert ended.result == "completed", f"{ended}"
    assert ended.facts["left"] == {}, "descriptors, threads, handlers or shared memory"
    assert manifest_of(folder)["done"]
    assert names_in(folder) <= listed(folder), "stray files"
    (metrics,) = (entry for entry in manifest_of(folder)["files"] if entry["role"] == "metrics")
    assert (folder / metrics["name"]).stat().st_size == metrics["bytes"]
    files = {key: digest for key, digest in contents(folder).items() if not key.startswith(("config", "plan", "exits"))}
    return {**files, "weights": ended.facts["weights"], "exits": ended.facts["exits"]}


@dataclass
class Ended:
    """How a child ended: the status of its run, the name of an error, or that of a signal.

    facts: weights (digest), exits (accuracy and loss each), left (what it held at its end and not before), took
    (seconds), text and exit_code of an error. seconds: from the first signal to the end. told: its standard error.
    """

    result: str
    seconds: float
    told: str
    facts: dict[str, Any] = field(default_factory=dict)


class Program(ForkServer):
    """This file as a program, asked one case after the other."""

    def __init__(self) -> None:
        super().__init__(__file__, OMP_NUM_THREADS="1")

    def __call__(
        self,
        folder: Path,
        scene: Scene,
        *,
        fault: str = "",
        log: str = "",
        signals: Sequence[tuple[float, int]] = (),
        begin: str = "train",
        stop: tuple[int, ...] | None = None,
        **call: Any,
    ) -> Ended:
        """One call of `train`.

        Args:
            fault, log: NF_FAULT, and a file for NF_FAULT_LOG.
            signals: seconds after the beginning, or after the one before, and number of each.
            begin: "train", the call; "handlers": when those of signals are in place; "stop": when that has come.
            stop: block, step of all its steps, and number of the signal (SIGTERM) that comes before that step.
            call: further arguments.
        """
        facts = self.ask(
            fault, log, folder=str(folder), scene=asdict(scene), call=call, signals=signals, begin=begin,
            stop=(*stop, signal.SIGTERM)[:3] if stop else None,
        )  # fmt: skip
        del facts["said"]
        return Ended(facts.pop("result"), facts.pop("seconds"), facts.pop("told"), facts)


def programs() -> Iterator[Program]:
    """For a fixture."""
    program = Program()
    yield program
    program.close()


if __name__ == "__main__":
    load()
    serve(answer, deliver)
