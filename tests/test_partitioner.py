"""partition() against brute force, goldens and arithmetic by hand."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from nf_engine.config import TrainConfig
from nf_engine.errors import InfeasibleBudgetError
from nf_engine.partitioner import (
    MIN_STEPS,
    Costs,
    TierProbe,
    checkpointed_peak,
    choose_tier,
    forward_batch,
    partition,
    scaled_lr,
)
from nf_engine.records import HeadProfile, HeadSpec, Line, Plan, Profile, StageProfile

ZERO = Line(0, 0)
SAMPLES = 50_000


def stage(name="s", kept=0.0, entry=0.0, transient=0.0, output=0, fixed=0, head=0.0, head_fixed=0, forward=0.0):
    spec = HeadSpec("linear", 4)
    own = HeadProfile(
        spec, head_fixed, head_fixed, head_fixed, head_fixed // 4, 1, (1,), (Line(0, head),), Line(0, 1e-6)
    )
    return StageProfile(
        name=name,
        output_shape=(1, 1, max(1, output // 4)),
        output=output,
        parameters=fixed // 4,
        weights=fixed,
        gradients=fixed,
        optimizer=fixed,
        kept=Line(0, kept),
        input=Line(0, entry),
        loose=ZERO,
        transient=Line(0, transient),
        forward=Line(0, forward),
        flops=1,
        seconds=Line(0, 1e-3),
        forward_seconds=Line(0, 4e-4),
        head=own,
    )


def profile_of(stages):
    return Profile("m", "none", "2", "sgd", "none", (3, 8, 8), 10, 768, (8, 32, 128), ZERO, tuple(stages))


def random_profile(seed, count):
    draw = random.Random(seed)
    return profile_of(
        stage(
            f"s{k}",
            kept=draw.randint(50, 1000),
            entry=draw.choice([0, draw.randint(10, 300)]),
            transient=draw.randint(20, 800),
            output=4 * draw.randint(5, 100),
            fixed=draw.randint(0, 20_000),
            head=draw.randint(10, 600),
            head_fixed=draw.randint(0, 4_000),
        )
        for k in range(count)
    )


def unit_bytes_by_hand(stages, i, j, b):
    """The docstring's three moments of a step, written out again: head, backward of each stage, optimizer."""
    part, last = stages[i : j + 1], stages[j]
    entry = part[0].input.per_sample * b
    all_kept = sum(s.kept.per_sample for s in part) * b
    moments = [entry + all_kept + last.head.transient[0].per_sample * b]
    for k in range(i, j + 1):
        kept = sum(s.kept.per_sample for s in stages[i : k + 1]) * b
        later = sum(s.gradients for s in stages[k + 1 : j + 1]) + last.head.gradients
        waiting = 0 if k == j else 2 * last.output * b
        moments.append(entry + kept + stages[k].transient.per_sample * b + later + waiting)
    moments.append(entry + sum(s.gradients for s in part) + last.head.gradients + last.output * b)
    return max(moments)


def block_bytes_by_hand(profile, units, b):
    stages = profile.stages
    fixed = sum(s.weights + s.optimizer for i, j in units for s in stages[i : j + 1])
    fixed += sum(stages[j].head.weights + stages[j].head.optimizer for _, j in units)
    first, last = units[0][0], units[-1][1]
    peaks = [unit_bytes_by_hand(stages, i, j, b) for i, j in units]
    if first:
        peaks[1:] = [p + stages[first - 1].output * b for p in peaks[1:]]
    else:
        peaks.append(stages[last].output * b)
    return fixed + max(peaks)


def all_partitions(count):
    """Every way to cut `count` stages into units and group the units into blocks."""
    for unit_cuts in itertools.product((False, True), repeat=count - 1):
        edges = [0, *(k + 1 for k, cut in enumerate(unit_cuts) if cut), count]
        units = [(a, b - 1) for a, b in itertools.pairwise(edges)]
        for block_cuts in itertools.product((False, True), repeat=len(units) - 1):
            at = [0, *(k + 1 for k, cut in enumerate(block_cuts) if cut), len(units)]
            yield [tuple(units[a:b]) for a, b in itertools.pairwise(at)]


def shape_of(plan):
    return [tuple((u.first, u.last) for u in b.units) for b in plan.blocks]


@pytest.mark.parametrize("seed", range(250))
def test_windows_equals_brute_force(seed):
    count = 2 + seed % 4
    profile = random_profile(seed, count)
    config = TrainConfig(batch_size=64, max_units=count, memory_margin=0.0)
    whole = block_bytes_by_hand(profile, [(0, count - 1)], 64)
    budget = int(whole * random.Random(seed).uniform(0.4, 1.1))

    def key(blocks):
        units = [u for b in blocks for u in b]
        stored = sum(profile.stages[b[-1][1]].output // 2 * SAMPLES for b in blocks[:-1])
        heads = sum(profile.stages[j].head.seconds.per_sample * 64 for _, j in units)
        return len(units), stored, heads, max(block_bytes_by_hand(profile, b, 64) for b in blocks)

    keys = [key(b) for b in all_partitions(count)]
    feasible = [k for k in keys if k[3] <= budget]
    if not feasible:
        with pytest.raises(InfeasibleBudgetError):
            partition(profile, config, budget=budget, samples=SAMPLES)
        return
    plan = partition(profile, config, budget=budget, samples=SAMPLES)
    assert key(shape_of(plan)) == pytest.approx(min(feasible))
    assert plan.peak == round(min(feasible)[3])


def min_need(profile):
    """Bytes of the largest stage at min_batch_size, a block of its own."""
    return max(block_bytes_by_hand(profile, [(k, k)], 8) for k in range(len(profile.stages)))


@pytest.mark.parametrize("strategy", ["windows", "layerwise"])
@pytest.mark.parametrize("seed", range(100))
def test_every_stage_once_in_order_and_every_block_within_the_budget(seed, strategy):
    profile = random_profile(1000 + seed, 7)
    whole = block_bytes_by_hand(profile, [(0, 6)], 128)
    budget = int(whole * random.Random(seed).uniform(0.1, 1.2))
    config = TrainConfig(partition=strategy)
    if min_need(profile) > 0.95 * budget:
        with pytest.raises(InfeasibleBudgetError):
            partition(profile, config, budget=budget, samples=SAMPLES)
        return
    plan = partition(profile, config, budget=budget, samples=SAMPLES)
    assert [s for u in plan.units for s in range(u.first, u.last + 1)] == list(range(7))
    for block, units in zip(plan.blocks, shape_of(plan), strict=True):
        assert block_bytes_by_hand(profile, units, block.batch) == pytest.approx(block.peak, abs=1)
        assert block.peak <= 0.95 * budget + 1
        assert block.batch >= 8
    assert plan.bounds.lower <= plan.peak


@pytest.mark.parametrize("seed", range(60))
def test_a_layerwise_batch_is_the_largest_that_fits(seed):
    profile = random_profile(seed, 5)
    config = TrainConfig(partition="layerwise", memory_margin=0.0, grouping_threshold=0.0, max_batch_size=5000)
    budget = int(1.5 * block_bytes_by_hand(profile, [(0, 4)], 64))
    plan = partition(profile, config, budget=budget, samples=10_000_000)
    assert len(plan.blocks) == 5, "threshold 0 joins nothing"
    for block, units in zip(plan.blocks, shape_of(plan), strict=True):
        assert block.batch == 5000 or block_bytes_by_hand(profile, units, block.batch + 1) > budget


# Bytes a sample that the largest single stage saves, one unit a stage (measured for VGG-16 and ResNet-18 at 32 pixels).
VGG_KEPT = (536704, 655488, 327936, 327936, 164352, 131584, 164352, 82944, 66560, 82944, 25600, 17408, 21504)
VGG_INPUT = (0, 262144, 0, 131072, 0, 65536, 65536, 0, 32768, 32768, 0, 8192, 8192)


def test_layerwise_groups_vgg16_as_worked_out_by_hand():
    stages = [stage(f"c{k}", kept=a, entry=b) for k, (a, b) in enumerate(zip(VGG_KEPT, VGG_INPUT, strict=True), 1)]
    config = TrainConfig(partition="layerwise", max_batch_size=10**9)
    plan = partition(profile_of(stages), config, budget=10**10, samples=10**9)
    assert [(b.first + 1, b.last + 1) for b in plan.blocks] == [(1, 1), (2, 2), (3, 4), (5, 7), (8, 10), (11, 13)]


def test_windows_keeps_plain_backpropagation_where_it_fits():
    profile = random_profile(3, 6)
    plan = partition(profile, TrainConfig(), budget=10**9, samples=SAMPLES)
    assert shape_of(plan) == [((0, 5),)]
    assert plan.blocks[0].batch == 128
    assert plan.bounds.plan == plan.bounds.backpropagation == plan.peak


def test_windows_tries_smaller_batches_then_one_unit_a_stage():
    profile = profile_of(stage(f"s{k}", kept=1000, transient=1000) for k in range(6))
    need = block_bytes_by_hand(profile, [(0, 0)], 1)
    quarter = partition(profile, TrainConfig(memory_margin=0.0), budget=int(need * 40), samples=SAMPLES)
    assert quarter.blocks[0].batch == 32, "40 samples of one stage fit, 64 of it do not"
    assert "batch 128 does not fit; trained at 32" in quarter.warnings
    config = TrainConfig(memory_margin=0.0, max_units=1)
    tiny = partition(profile, config, budget=int(need * 17), samples=SAMPLES)
    assert tiny.blocks[0].batch == 17
    assert len(tiny.units) == 6


def test_a_batch_size_asked_for_is_kept_or_refused():
    profile = profile_of(stage(f"s{k}", kept=1000, transient=1000) for k in range(4))
    for strategy in ("windows", "layerwise"):
        config = TrainConfig(partition=strategy, batch_size=48, memory_margin=0.0)
        plan = partition(profile, config, budget=10**8, samples=SAMPLES)
        assert {b.batch for b in plan.blocks} == {48}
        with pytest.raises(InfeasibleBudgetError, match="at batch 48"):
            partition(profile, config, budget=2000 * 40, samples=SAMPLES)


def test_batches_leave_enough_steps_in_an_epoch():
    profile = random_profile(1, 4)
    plan = partition(profile, TrainConfig(partition="layerwise"), budget=10**12, samples=9_500)
    assert max(b.batch for b in plan.blocks) == 9_500 // MIN_STEPS
    few = partition(profile, TrainConfig(), budget=10**12, samples=20)
    assert few.blocks[0].batch == 20


def test_the_error_names_stage_need_budget_and_what_to_try():
    profile = profile_of([stage("small", kept=10), stage("large", kept=100_000, transient=20_000)])
    with pytest.raises(InfeasibleBudgetError) as caught:
        partition(profile, TrainConfig(), budget=1_000_000, samples=SAMPLES)
    error = caught.value
    # 8 samples of 120,000 bytes and the output of batch 8 pass 95 % of 1,000,000; 7 of them do not.
    assert error.stage == "large"
    assert error.budget == 1_000_000
    assert "stage large needs 117.2 KiB (120000 bytes) at batch 1 and 937.5 KiB at batch 8" in str(error)
    assert "the budget is 976.6 KiB (1000000 bytes)" in str(error)
    assert error.suggestions == ("memory_budget=1030737", "min_batch_size=7"), "8 * 120000 * 1.02 / 0.95"
    partition(profile, TrainConfig(min_batch_size=7), budget=1_000_000, samples=SAMPLES)
    with pytest.raises(InfeasibleBudgetError) as hopeless:
        partition(profile, TrainConfig(), budget=100_000, samples=SAMPLES)
    assert hopeless.value.need == 120_000
    assert not any("min_batch_size" in s for s in hopeless.value.suggestions)


@pytest.mark.parametrize("seed", range(80))
def test_the_checkpointed_bound_equals_brute_force_over_segments(seed):
    profile = random_profile(seed, 6)
    stages = profile.stages
    best = float("inf")
    for cuts in itertools.product((False, True), repeat=5):
        edges = [0, *(k + 1 for k, cut in enumerate(cuts) if cut), 6]
        inputs = sum((768 if a == 0 else stages[a - 1].output) * 16 for a in edges[:-1])
        worst = 0.0
        for a, b in itertools.pairwise(edges):
            for k in range(a, b):
                kept = sum(s.kept.per_sample for s in stages[a : k + 1]) * 16
                worst = max(worst, kept + stages[k].transient.per_sample * 16)
        best = min(best, inputs + worst)
    gradients = sum(s.gradients for s in stages) + stages[-1].head.gradients
    assert checkpointed_peak(Costs(profile, False, {}), 16) == pytest.approx(best + gradients)


def test_unit_peaks_measured_whole_replace_the_sums():
    profile = random_profile(5, 3)
    costs = Costs(profile, False, {(0, 2): Line(1000, 10)})
    assert costs.unit(0, 2, 50) == 1500
    assert costs.unit(0, 1, 50) == pytest.approx(unit_bytes_by_hand(profile.stages, 0, 1, 50))


def test_on_the_cpu_all_weights_and_a_batch_as_stored_count_beside_every_block():
    profile = random_profile(7, 4)
    config = TrainConfig(partition="layerwise", batch_size=32, grouping_threshold=0.0)
    apart = partition(profile, config, budget=10**8, samples=SAMPLES)
    joint = partition(profile, config, budget=10**8, samples=SAMPLES, together=True)
    everything = sum(s.weights + s.head.weights for s in profile.stages)
    assert (apart.overhead, joint.overhead) == (0, everything)
    assert len(joint.blocks) == 4
    for k, (one, other) in enumerate(zip(apart.blocks, joint.blocks, strict=True)):
        own = profile.stages[k].weights + profile.stages[k].head.weights
        stored = profile.stages[k - 1].output // 2 * 32 if k else 0
        assert other.peak - one.peak == pytest.approx(everything - own + stored, abs=1)


def test_the_fewest_chunks_that_do_not_raise_the_peak_are_taken():
    base = stage("s", kept=100, transient=300)
    lines = tuple(Line(0, 4800 / n) for n in (1, 2, 4, 8, 16, 32))
    head = replace(base.head, spec=HeadSpec("conv3x3", 4, 64), chunks=(1, 2, 4, 8, 16, 32), transient=lines)
    profile = profile_of([replace(base, head=head), base])
    assert Costs(profile, False, {}).chunks(0, 0, 10)[0] == 16, "4800 / 16 = 300 = the backward's transient"


def test_learning_rates_follow_the_batch():
    assert scaled_lr(TrainConfig(lr=0.1), 128) == 0.1
    assert scaled_lr(TrainConfig(lr=0.1), 512) == pytest.approx(0.4)
    assert scaled_lr(TrainConfig(lr=0.1), 4096) == pytest.approx(0.8), "capped"
    assert scaled_lr(TrainConfig(lr=0.001, optimizer="adamw"), 512) == pytest.approx(0.002)


def plan_of_two_blocks(**fields):
    stages = [stage(f"s{k}", kept=1000, transient=1000, output=400, forward=500, head=100) for k in range(2)]
    profile = profile_of(stages)
    config = TrainConfig(partition="layerwise", grouping_threshold=0.0, **fields)
    return profile, config, partition(profile, config, budget=10**7, samples=1000)


def test_choose_tier_equals_arithmetic_by_hand():
    profile, config, plan = plan_of_two_blocks(epochs=3, batch_size=10, augment="flip")
    probe = TierProbe({"ram": 1e-4, "disk": 2e-4}, {"ram": 1e-4, "disk": 3e-4}, {"ram": 10**9, "disk": 10**9})
    # 1000 samples, 2 copies, 3 epochs; a forward of block 0 takes 0.4 ms a sample.
    ram, disk, again = 2 * (0.4 + 0.1) + 3 * 0.1, 2 * (0.4 + 0.2) + 3 * 0.3, 3 * 0.4
    found = choose_tier(profile, config, plan, 1, probe, 10)
    assert found.seconds == pytest.approx({"ram": ram, "disk": disk, "recompute": again})
    assert (found.tier, found.copies, found.forward_batch) == ("recompute", 1, 10)
    assert "recompute is fastest: ram 1.30 s, disk 2.10 s, recompute 1.20 s" in found.reason
    slow = choose_tier(profile, config, plan, 1, probe, 0)
    assert slow.tier == "ram"
    assert slow.bytes == 1000 * 2 * 400 // 2
    assert "recomputing does not fit the budget" in slow.reason
    full = replace(probe, room={"ram": 10, "disk": 10**9})
    assert choose_tier(profile, config, plan, 1, full, 0).tier == "disk"
    assert choose_tier(profile, config, plan, 1, None, 10).tier == "auto"
    with pytest.raises(InfeasibleBudgetError, match="fits nowhere"):
        choose_tier(profile, config, plan, 1, replace(probe, room={"ram": 10, "disk": 10}), 0)


def test_within_five_percent_the_earlier_tier_wins():
    profile, config, plan = plan_of_two_blocks(epochs=1, batch_size=10)
    probe = TierProbe({"ram": 1.04e-4, "disk": 1e-4}, {"ram": 0, "disk": 0}, {"ram": 10**9, "disk": 10**9})
    assert choose_tier(profile, config, plan, 1, probe, 0).tier == "ram"


def test_recomputation_takes_as_many_samples_as_fit():
    profile, config, plan = plan_of_two_blocks(batch_size=64, cache="recompute")
    costs = Costs(profile, False, {})
    block = plan.blocks[1]
    assert forward_batch(costs, plan, block) == 64
    # One sample: input 768 + forward 500; fixed: inputs twice 400, output 400, image 768, each for the batch of 64.
    fixed = (2 * 400 + 400 + 768) * 64
    tight = replace(plan, allowed=fixed + 16 * (768 + 500))
    assert forward_batch(costs, tight, block) == 16
    assert forward_batch(costs, replace(plan, allowed=fixed), block) == 0
    with pytest.raises(InfeasibleBudgetError, match="set cache='disk'"):
        choose_tier(profile, config, plan, 1, None, 0)


def test_a_plan_round_trips_through_json_and_prints():
    plan = partition(random_profile(2, 5), TrainConfig(partition="layerwise"), budget=10**7, samples=SAMPLES)
    assert Plan.from_json(plan.to_json()) == plan
    text = plan.table()
    assert all(name in text for name in plan.stages)
    assert "lower bound (largest stage at batch 1)" in text
