"""Costs: the bytes and seconds of units and blocks of a profile, as sums over stages. Arithmetic only; no torch.

The bytes of a unit of stages i..j at batch b, all from the profile's lines, weights and optimizer state apart:

    x_i + max( kept_i + .. + kept_j + output + the head's step,
               kept_i + .. + kept_l + transient_l + gradients of l+1 .. j and the head + output and its gradient, any l,
               all gradients + output )

transient_l was measured with the stage's output and its gradient alive to the end; of stages before the last the first
is gone by then, and the second is freed as it is used: both are taken off.
A unit that recomputes is cut into segments. While one of them is in backward, the inputs of those before it wait, and
of the stages only its own keep anything: the same maximum over the segments, each beside the inputs before it.
A block adds the weights and optimizer state of all its units once, and takes its largest unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nf_engine.records import ENGINE_SLOTS, IMAGE_SLOTS, HeadProfile, Line, Profile, StageProfile, stored_bytes

TIGHTER = (1.0, 0.95, 0.9)  # of a limit: sums over stages may miss the peak of a whole unit by so much


class Span(NamedTuple):
    """Stages first..last of a unit; starts: where its segments after the first begin, () if it recomputes nothing."""

    first: int
    last: int
    starts: tuple[int, ...] = ()


Spans = tuple[Span, ...]


def head_of(profile: Profile, last: int) -> HeadProfile:
    return profile.stages[last].head


@dataclass(frozen=True)
class Costs:
    """Bytes and seconds of units and blocks of one profile.

    Args:
        profile: measured stages.
        together: the weights of all stages lie in the memory that is budgeted (training on the CPU).
        exact: unit peaks measured whole: they replace the sum over stages.
        dtype: as which cached inputs wait: on a device of its own the engine's slots hold batches of them.
    """

    profile: Profile
    together: bool
    exact: Mapping[Span, Line]
    dtype: str = "fp32"

    def _kept(self, first: int, last: int, batch: int) -> float:
        stages = self.profile.stages[first : last + 1]
        return stages[0].input.at(batch) + sum(s.kept.at(batch) for s in stages)

    def _head(self, first: int, last: int, batch: int) -> float:
        """Bytes while the head takes its step."""
        loose = self.profile.stages[last].loose.at(batch)
        return self._kept(first, last, batch) + loose + head_of(self.profile, last).transient.at(batch)

    def _gradients(self, first: int, last: int) -> float:
        """Bytes of the gradients of some stages of a unit and of the head at its end."""
        return sum(s.gradients for s in self.profile.stages[first : last + 1]) + head_of(self.profile, last).gradients

    def _backward(self, first: int, end: int, last: int, batch: int) -> float:
        """Peak of the backward of stages first..end of a unit that ends at `last`."""
        stages = self.profile.stages
        output = 2 * stages[last].output * batch  # and its gradient
        gradients = self._gradients(end + 1, last)
        kept = self._kept(first, end, batch)
        peak = 0.0
        for k in range(end, first - 1, -1):
            held = 0 if k == last else output - stages[k].loose.at(batch) - stages[k].output * batch
            peak = max(peak, kept + stages[k].transient.at(batch) + gradients + held)
            kept -= stages[k].kept.at(batch)
            gradients += stages[k].gradients
        return peak

    def _update(self, first: int, last: int, batch: int) -> float:
        output = self.profile.stages[last].output * batch
        return self.profile.stages[first].input.at(batch) + self._gradients(first, last) + output

    def unit(self, span: Span, batch: int) -> float:
        """Peak bytes of one step of the unit, weights and optimizer state apart."""
        if span in self.exact:
            return self.exact[span].at(batch)
        first, last, starts = span
        peak, waiting = self._update(first, last, batch), 0.0
        for start, end in zip((first, *starts[:-1]), starts, strict=False):
            peak = max(peak, waiting + self._backward(start, end - 1, last, batch))
            waiting += self.input_bytes(start) * batch
        start = starts[-1] if starts else first
        whole = max(self._backward(start, last, last, batch), self._head(start, last, batch))
        return max(peak, waiting + whole)

    def recomputation(self, first: int, last: int, batch: int, limit: float) -> Span | None:
        """The unit of stages first..last that stays below `limit` bytes and runs the fewest stages twice, None if none.

        Exact but for `exact`: the segments before the last hold the least input bytes with which each of them fits.
        """
        if self.unit(Span(first, last), batch) <= limit:
            return Span(first, last)
        for share in TIGHTER:
            found = self._segments(first, last, batch, share * limit)
            for start in range(first + 1, last + 1):
                if start in found:
                    span = Span(first, last, (*found[start][1][1:], start))
                    if self.unit(span, batch) <= limit:
                        return span
        return None

    def _segments(self, first: int, last: int, batch: int, limit: float) -> dict[int, tuple[float, tuple[int, ...]]]:
        """For each stage up to which segments that fit can be cut: the least bytes of their inputs and their starts."""
        found: dict[int, tuple[float, tuple[int, ...]]] = {first: (0.0, ())}
        for end in range(first + 1, last + 1):
            for start in range(first, end):
                if start not in found:
                    continue
                waiting, starts = found[start]
                if waiting + self._backward(start, end - 1, last, batch) > limit:
                    continue
                made = waiting + self.input_bytes(start) * batch, (*starts, start)
                if end not in found or made[0] < found[end][0]:
                    found[end] = made
        return found

    def overhead(self, units: Spans) -> int:
        """Bytes beside every block: on the CPU the resting weights share the memory."""
        if not self.together:
            return 0
        return sum(s.weights for s in self.profile.stages) + sum(head_of(self.profile, u.last).weights for u in units)

    def fixed(self, units: Spans) -> int:
        """Weights (where they are not in the overhead) and optimizer state of a block of these units."""
        total = 0
        for u in units:
            parts: list[StageProfile | HeadProfile] = [*self.profile.stages[u.first : u.last + 1]]
            parts.append(head_of(self.profile, u.last))
            total += sum(p.optimizer + (0 if self.together else p.weights) for p in parts)
        return total

    def input_bytes(self, first: int) -> int:
        """Bytes of one sample of a block's inputs."""
        return self.profile.stages[first - 1].output if first else self.profile.input

    def _beside(self, units: Spans, batch: int) -> list[float]:
        """Bytes beside the step of each unit of a block: buffers of its inputs.

        On a device of its own batches arrive in slots, of the feed or of the cache engine; on the CPU there are none,
        or they are not budgeted. The input of a block that reads a cache outlives unit 0.
        """
        first = units[0].first
        if first == 0:
            return [self._feed(batch)] * len(units)
        shape = self.profile.stages[first - 1].output_shape
        slots = 0 if self.together else ENGINE_SLOTS * batch * stored_bytes(shape, self.dtype)
        return [slots, *[slots + self.input_bytes(first) * batch] * (len(units) - 1)]

    def _feed(self, batch: int) -> float:
        """Bytes on a device of its own: images on their way, and a batch beside the one that a recorded step reads."""
        return 0.0 if self.together else batch * (IMAGE_SLOTS * self.profile.image + self.profile.input)

    def _loading(self, units: Spans, batch: int) -> float:
        """Bytes while the next images arrive, where the block reads images, and its last output is alive."""
        if units[0].first:
            return 0.0
        arriving = self.profile.loading.at(batch) + self._feed(batch)
        arriving += 0 if self.together else self.profile.input * batch
        return arriving + self.profile.stages[units[-1].last].output * batch

    def block(self, units: Spans, batch: int, overhead: int) -> float:
        """Peak bytes of training a block of these units."""
        peaks = [self.unit(u, batch) + b for u, b in zip(units, self._beside(units, batch), strict=True)]
        return overhead + self.fixed(units) + max(*peaks, self._loading(units, batch))

    def fitted(self, units: Spans, batch: int, overhead: int, allowed: float) -> Spans | None:
        """The block with units that recompute as little as they can; None where it does not fit at all."""
        room = allowed - overhead - self.fixed(units)
        if self._loading(units, batch) > room:
            return None
        fits = []
        for unit, beside in zip(units, self._beside(units, batch), strict=True):
            span = self.recomputation(unit.first, unit.last, batch, room - beside)
            if span is None:
                return None
            fits.append(span)
        return tuple(fits)

    def largest_batch(self, units: Spans, allowed: float, overhead: int, high: int) -> int:
        """The largest batch in 1..high whose block fits, 0 if none; bytes grow with the batch."""
        low = 0
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.block(units, middle, overhead) <= allowed else (low, middle - 1)
        return low

    def seconds(self, units: Spans, batch: int) -> float | None:
        """Of one step of these units; None where the profile holds no times."""
        stages = self.profile.stages
        lines = [s.seconds for u in units for s in stages[u.first : u.last + 1]]
        lines += [head_of(self.profile, u.last).seconds for u in units]
        lines += [s.rerun_seconds for s in self.recomputed(units)]
        timed = [line.at(batch) for line in lines if line is not None]
        return sum(timed) if len(timed) == len(lines) else None

    def work(self, units: Spans, batch: int) -> float:
        """What plans are compared by: seconds of one sample, or FLOPs where nothing was timed."""
        seconds = self.seconds(units, batch)
        if seconds is not None:
            return seconds / batch
        stages = self.profile.stages
        once = sum(s.flops for u in units for s in stages[u.first : u.last + 1])
        once += sum(head_of(self.profile, u.last).flops for u in units)
        return float(3 * once + sum(s.flops for s in self.recomputed(units)))  # backward is two forwards

    def recomputed(self, units: Spans) -> Sequence[StageProfile]:
        """Stages whose forward runs twice."""
        return [s for u in units if u.starts for s in self.profile.stages[u.first : u.starts[-1]]]


def checkpointed_peak(costs: Costs, batch: int) -> float:
    """Peak of backpropagation checkpointed at the best set of stage boundaries: the honest rival at equal batch.

    Segment inputs are kept; one segment at a time is recomputed and differentiated; all gradients wait for the step.
    """
    stages, count = costs.profile.stages, len(costs.profile.stages)
    gradients = sum(s.gradients for s in stages) + head_of(costs.profile, count - 1).gradients
    segment = {}
    for i in range(count):
        kept = 0.0
        worst = 0.0
        for j in range(i, count):
            kept += stages[j].kept.at(batch)
            worst = max(worst, kept + stages[j].transient.at(batch))
            segment[i, j] = worst
    sizes = [costs.input_bytes(i) * batch for i in range(count)]
    best = float("inf")
    for limit in sorted(set(segment.values())):
        least = [0.0] + [float("inf")] * count  # bytes of segment inputs kept, over the first j stages
        for j in range(1, count + 1):
            for i in range(j):
                if segment[i, j - 1] <= limit:
                    least[j] = min(least[j], least[i] + sizes[i])
        best = min(best, least[count] + limit)
    return best + gradients
