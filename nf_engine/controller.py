"""Controller: takes a run from its last commit to its end, one block after another.

    train, score the exits, commit | write the outputs, commit the caches | next block

Only the block in training (and, where a tier is "recompute", the frozen stages before it) is on the device; the next
one takes its place while the last outputs are written. A crash
between any two commits leaves a folder that `run` goes on from: the position in the manifest says where.
Source: NeuroFlux, https://arxiv.org/abs/2402.14139 (Controller).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import psutil
import torch

from nf_engine.chain import Chain, Inputs
from nf_engine.checkpoint import SCORES, check_finite, fill, parse, scores_of, state_of, to_bytes
from nf_engine.device import TensorBytes
from nf_engine.errors import BudgetExceededError, CacheCorruptError, CacheIncompleteError, CacheStaleError
from nf_engine.interrupt import Stopped
from nf_engine.job import BlockMemory, Job
from nf_engine.local_step import Unit
from nf_engine.manifest import Position
from nf_engine.records import format_bytes
from nf_engine.recovery import device_lost
from nf_engine.run_folder import NewFile
from nf_engine.trainer import Trainer
from nf_engine.worker import Score

BLOCK_FORMAT = "nf-block/1"
DAMAGED = (CacheCorruptError, CacheIncompleteError, CacheStaleError)

Pair = tuple[Inputs, Inputs]


class Controller:
    """Runs a job.

    Attributes:
        scores: of the exits of all finished blocks, in order.
        memory: of the blocks that this process has trained.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.scores: list[Score] = []
        self.memory: list[BlockMemory] = []
        self._chain = Chain(job)
        self._trainer = Trainer(job, self._chain)

    def run(self) -> None:
        """Trains what is left of all blocks.

        Raises:
            Stopped: the run was asked to end; a later one goes on from there.
            DeviceLostError: CUDA reported anything but too little memory; nothing was committed after it.
        """
        job = self.job
        if job.device.type == "cuda":
            job.before = torch.cuda.memory_allocated(job.device), torch.cuda.memory_reserved(job.device)
        self._load_finished()
        made_again: set[int] = set()
        handed: Pair | None = None
        devices = [job.device] if job.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), device_lost():
            while (number := job.folder.manifest_now.position.block) < len(job.plan.blocks):
                try:
                    handed = self._block(number, handed)
                except DAMAGED as error:
                    now = job.folder.manifest_now.position.block
                    if now in made_again:
                        raise
                    made_again.add(now)
                    handed = None
                    job.folder.cut_metrics()  # first: a commit counts all lines that are there
                    del job.history[len(job.folder.metrics()) :]
                    self._chain.forget(now, error)
            self._chain.evict()

    def _load_finished(self) -> None:
        """Weights and scores of the blocks that an earlier process has trained."""
        job = self.job
        for entry in job.folder.manifest_now.of_role("block"):
            state = parse(job.folder.read(entry), entry.name)
            found = scores_of(state, len(job.names(entry.block)), entry.name)
            self.scores += [Score(accuracy, loss) for accuracy, loss in found]
            fill(job.parts(entry.block), state, entry.name)

    def _block(self, number: int, handed: Pair | None) -> Pair | None:
        """Trains one block and commits it; returns the inputs of the next one, None after the last."""
        inputs, held = handed or self._chain.inputs(number)
        units: list[Unit] = []
        following: int | None = None
        try:
            self._chain.place(inputs)
            units, counter = self._trainer.train(number, inputs, held)
            scores = self._scored(number, units, held, counter)
            self._commit(number, units, scores)
            started = time.perf_counter()
            last = number + 1 == len(self.job.plan.blocks)
            after = None if last else self._chain.after(number, units, inputs, held, counter)
            self.job.seconds["cache_write"] += time.perf_counter() - started
            self._end(number, scores, counter)
            following = None if last else number + 1
        finally:
            self._chain.release(inputs, held)
            self.job.leave(units, following)  # last: it fails where the device was lost
        try:
            self._check_budget()
        except BudgetExceededError:
            self._chain.release(*(after or ()))
            self.job.leave(())
            raise
        return after

    def _scored(self, number: int, units: Sequence[Unit], held: Inputs, counter: TensorBytes | None) -> list[Score]:
        started = time.perf_counter()
        try:
            scores = self._chain.score(units, held, self.job.plan.blocks[number].batch, counter)
        except Stopped:
            self._trainer.commit_end(number, units)
            raise
        self.job.seconds["score"] += time.perf_counter() - started
        return scores

    def _commit(self, number: int, units: Sequence[Unit], scores: Sequence[Score]) -> None:
        """The block is finished: a later run does not train it again."""
        state = state_of(self.job.parts(number))
        check_finite(state, f"block {number}")
        found = torch.tensor([[s.accuracy, s.loss] for s in scores], dtype=torch.float64)
        data = to_bytes(state | {SCORES: found}, {"format": BLOCK_FORMAT})
        self.job.folder.commit(Position(number + 1), [NewFile("block", data, number)], drop=("train",))
        self.scores += scores

    def _end(self, number: int, scores: Sequence[Score], counter: TensorBytes | None) -> None:
        job = self.job
        reserved = torch.cuda.max_memory_reserved(job.device) - job.before[1] if job.device.type == "cuda" else 0
        peak = job.now(counter)[1]
        memory = BlockMemory(number, job.plan.blocks[number].peak, peak, reserved, psutil.Process().memory_info().rss)
        self.memory.append(memory)
        job.folder.log("block", number=number, predicted=memory.predicted, allocated=peak, reserved=reserved)
        job.observer.block_ended(number, scores, memory)

    def _check_budget(self) -> None:
        memory, budget = self.memory[-1], self.job.plan.budget
        if memory.allocated > budget:
            raise BudgetExceededError(
                f"block {memory.block} used {format_bytes(memory.allocated)} ({memory.allocated} bytes) of tensors, "
                f"the budget is {format_bytes(budget)}; it is saved in {self.job.folder.path}; raise memory_margin",
                stage=f"block {memory.block}",
                need=memory.allocated,
                budget=budget,
            )
