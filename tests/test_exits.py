"""The early-exit model against plain loops, the choice of the exit against brute force."""

from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nf_engine.errors import ConfigError
from nf_engine.exits import EarlyExitModel, Scaled, evaluate, exits_table, select_exit
from nf_engine.preprocess import Normalisation
from nf_engine.records import ExitScore
from nf_engine.sources import as_image_data

K = 5
MEAN, STD = (100.0, 120.0, 90.0), (50.0, 60.0, 55.0)


def _stage(channels, out):
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out, momentum=None), nn.ReLU())


def _head(channels):
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(channels * 4, K))


@pytest.fixture(name="model")
def fixture_model():
    """Three exits; the second ends two stages."""
    torch.manual_seed(3)
    bodies = [
        nn.Sequential(_stage(3, 6)),
        nn.Sequential(_stage(6, 8), _stage(8, 8)),
        nn.Sequential(_stage(8, 4)),
    ]
    heads = [_head(6), _head(8), _head(4)]
    for head, std in zip(heads, (0.4, 2.0, 0.7), strict=True):
        nn.init.normal_(head[2].weight, std=std)  # spreads the confidences over 0.2 to 1
    exits = [{"first": 0, "last": 0}, {"first": 1, "last": 2}, {"first": 3, "last": 3}]
    model = EarlyExitModel(Scaled(Normalisation(MEAN, STD)), bodies, heads, {"name": "hand", "exits": exits})
    model.train()
    model(_images(64, 9))  # running statistics that differ from 0 and 1
    return model.eval()


def _images(n, seed):
    """Noise of another brightness in each image and channel, so that confidences differ."""
    generator = torch.Generator().manual_seed(seed)
    brightness = torch.rand(n, 3, 1, 1, generator=generator)
    return (torch.rand(n, 3, 7, 7, generator=generator) * brightness * 255).to(torch.uint8)


def _by_hand(model, x, exit):
    """Normalised and run stage by stage, without the model's own forward."""
    h = (x.float() - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    for body in list(model.bodies)[: exit + 1]:
        for stage in body:
            h = stage(h)
    return model.heads[exit](h)


@torch.no_grad()
def test_forward_normalises_and_runs_only_the_stages_before_the_exit(model):
    x, ran = _images(9, 0), []
    for k, body in enumerate(model.bodies):
        body.register_forward_hook(lambda *_, k=k: ran.append(k))
    for exit in range(3):
        ran.clear()
        assert torch.equal(model(x, exit=exit), _by_hand(model, x, exit))
        assert torch.equal(model(x, exit=exit - 3), model(x, exit=exit))
        assert ran[: exit + 1] == list(range(exit + 1))
        assert max(ran) == exit


@pytest.mark.parametrize("exit", [3, -4, 100])
def test_an_exit_out_of_range_is_an_error(model, exit):
    x = _images(1, 0)
    for call in (
        lambda: model(x, exit=exit),
        lambda: model.truncate(exit),
        lambda: model.predict(x, policy=f"fixed:{exit}"),
    ):
        with pytest.raises(ConfigError, match=rf"0\.\.2.*{exit}"):
            call()


@torch.no_grad()
@pytest.mark.parametrize("exit", [0, 1, 2, -2])
def test_truncate_equals_the_exit_bit_for_bit_and_keeps_nothing_else(model, exit):
    x = _images(9, 1)
    short = model.truncate(exit)
    assert torch.equal(short(x), model(x, exit=exit))
    number = exit % 3
    kept = [*list(model.bodies)[: number + 1], model.heads[number]]
    assert {id(p) for p in short.parameters()} == {id(p) for part in kept for p in part.parameters()}
    assert not short.training
    assert short.facts == {"name": "hand", "exits": [{"first": 0, "last": (0, 2, 3)[number]}]}
    assert len(model.facts["exits"]) == 3
    # Truncated once more it is the same model, keys included.
    assert list(short.truncate(0).state_dict()) == list(short.state_dict())


def test_a_fixed_policy_answers_all_at_that_exit(model):
    x = _images(11, 2)
    found = model.predict(x, policy="fixed:1")
    expected = _by_hand(model, x, 1).softmax(1)
    torch.testing.assert_close(found.probabilities, expected.detach())
    assert found.labels.tolist() == expected.argmax(1).tolist()
    assert found.exits.tolist() == [1] * 11


def _one_at_a_time(model, x, threshold):
    """Label, probabilities and exit of one sample after another, without compaction."""
    for image in x:
        for exit in range(3):
            probabilities = _by_hand(model, image[None], exit).softmax(1)[0].detach()
            if probabilities.max() >= threshold or exit == 2:
                yield int(probabilities.argmax()), probabilities, exit
                break


@pytest.mark.parametrize("threshold", [0.01, 0.55, 0.8, 1.0])
def test_the_confidence_policy_equals_a_loop_over_samples(model, threshold):
    x = _images(60, 4)
    labels, probabilities, exits = zip(*_one_at_a_time(model, x, threshold), strict=True)
    found = model.predict(x, policy=f"confidence:{threshold}")
    assert found.labels.tolist() == list(labels)
    assert found.exits.tolist() == list(exits)
    torch.testing.assert_close(found.probabilities, torch.stack(probabilities))
    if threshold == 0.55:
        assert set(exits) == {0, 1, 2}, "the threshold must split the batch, or this shows nothing"


def test_the_confidence_policy_runs_later_stages_on_the_survivors_only(model):
    x, ran = _images(60, 4), []
    for body in model.bodies:
        body.register_forward_hook(lambda _, inputs, __: ran.append(len(inputs[0])))
    exits = [exit for *_, exit in _one_at_a_time(model, x, 0.55)]
    ran.clear()
    model.predict(x, policy="confidence:0.55")
    assert ran == [60, sum(e >= 1 for e in exits), sum(e == 2 for e in exits)]
    assert ran[2] < ran[1] < 60
    ran.clear()
    model.predict(x, policy="confidence:0.01")
    assert ran == [60], "nobody is left after the first exit"


@pytest.mark.parametrize(
    "policy",
    ["fixed", "fixed:x", "fixed:0.5", "fixed:inf", "fixed:nan", "confidence:0", "confidence:1.1", "patience:2"],
)
def test_an_unknown_policy_is_an_error(model, policy):
    with pytest.raises(ConfigError, match="policy must be"):
        model.predict(_images(1, 0), policy=policy)


@pytest.mark.parametrize("policy", ["fixed:0", "fixed:-1", "confidence:0.55"])
def test_evaluate_equals_a_count_by_hand(model, policy):
    x, y = _images(37, 5), torch.randint(K, (37,), generator=torch.Generator().manual_seed(6))
    threshold = 0.55 if policy.startswith("confidence") else {"fixed:0": 0.0, "fixed:-1": 2.0}[policy]
    labels, probabilities, exits = zip(*_one_at_a_time(model, x, threshold), strict=True)
    right = sum(label == int(wanted) for label, wanted in zip(labels, y, strict=True))
    loss = -sum(p[wanted].double().log() for p, wanted in zip(probabilities, y, strict=True)) / 37
    model.train()  # evaluate has to leave the running statistics alone
    found = evaluate(model, as_image_data((x, y), classes=K), policy=policy, batch_size=8)
    assert found.samples == 37
    assert 0 < right < 37
    assert found.accuracy == pytest.approx(right / 37)
    assert found.loss == pytest.approx(float(loss), rel=1e-4)
    assert found.coverage == pytest.approx([exits.count(k) / 37 for k in range(3)])
    assert found.images_per_second > 0


def _score(exit, accuracy, parameters, flops):
    return ExitScore(
        exit, exit, f"stage{exit}", accuracy, 1.0, parameters=parameters, flops=flops, images_per_second=1234.0, batch=8
    )


_numbers = st.tuples(st.integers(0, 20).map(lambda n: n / 20), st.integers(1, 4), st.integers(1, 3))
_limit = st.none() | st.integers(0, 20).map(lambda n: n / 20)


@settings(max_examples=400, deadline=None)
@given(st.lists(_numbers, min_size=1, max_size=6), _limit, _limit, st.none() | st.integers(0, 5))
def test_select_exit_equals_brute_force(numbers, max_drop, min_accuracy, max_params):
    scores = [_score(k, *row) for k, row in zip(count(), numbers)]
    small = [s for s in scores if max_params is None or s.parameters <= max_params]
    drop = 0.01 if max_drop is None and min_accuracy is None else max_drop
    good = [
        s
        for s in small
        # Accuracies are twentieths: half of one is closer than any two of them.
        if (drop is None or all(s.accuracy >= other.accuracy - drop - 0.001 for other in small))
        and (min_accuracy is None or s.accuracy >= min_accuracy - 0.001)
    ]
    limits = {"max_drop": max_drop, "min_accuracy": min_accuracy, "max_params": max_params}
    if not good:
        with pytest.raises(ConfigError, match="no exit"):
            select_exit(scores, **limits)
        return
    chosen = select_exit(scores, **limits)
    assert chosen in [s.exit for s in good]
    size = (scores[chosen].parameters, scores[chosen].flops)
    assert all(size <= (s.parameters, s.flops) for s in good)


def test_the_table_shows_every_exit_and_marks_the_chosen_one():
    scores = [_score(0, 0.5, 1234567, 2_500_000), _score(1, 0.875, 2, 3)]
    header, first, second = exits_table(scores, 1).splitlines()
    assert header.split()[0] == "exit"
    assert first.split() == ["0", "stage0", "50.00%", "1,234,567", "2.5", "1,234"]
    assert second.split() == ["1", "stage1", "87.50%", "2", "0.0", "1,234", "<-", "chosen"]
