"""Schedules, against numbers computed by hand."""

from types import SimpleNamespace

import pytest
from torch import nn

from fcmae import FCMAE
from fcmae.train.clock import Clock
from fcmae.train.optimizer import parameter_groups
from fcmae.train.plan import BASE_BATCH, Plan, make_plan
from fcmae.train.pretraining import Pretraining


def plan(asked: float | None, per_epoch: int, epochs: int, least: int = 0) -> Plan:
    """The plan of a run of one image a step whose peak rate is 1 if the warm-up reaches it."""
    optim = SimpleNamespace(base_lr=BASE_BATCH, warmup_epochs=asked, schedule="linear")
    return make_plan(SimpleNamespace(batch_size=1, optim=optim), per_epoch, epochs, least)


def test_warmup_is_a_tenth_at_most_unless_given():
    assert plan(None, 10, 800).warmup == 400  # 40 epochs
    assert plan(None, 10, 100).warmup == 100
    assert plan(None, 3, 1).warmup == 0
    assert plan(2.5, 10, 100).warmup == 25
    assert plan(5, 10, 2).warmup == 20


@pytest.mark.parametrize(
    ("total", "steps", "share"),
    [(1, 0, 0.04), (16, 8, 0.32), (50, 25, 1), (190, 95, 1), (900, 100, 1), (1440, 144, 1)],
)
def test_a_short_run_warms_up_for_half_and_a_tiny_one_reaches_less(total, steps, share):
    short, asked = plan(None, total, 1, least=100), plan(5, 1, total, least=100)
    assert short.warmup == steps
    assert short.peak == pytest.approx(share)
    assert asked.warmup == min(5, total)
    assert asked.peak == plan(None, total, 1).peak == 1


def test_cosine():
    rates = [Plan(12, 1, 2.0, 4).learning_rate(step) for step in range(12)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4] == 2.0
    assert rates[8] == pytest.approx(1.0)
    assert 0 < rates[-1] < 0.1
    assert Plan(1, 1, 1.0, 0).learning_rate(0) == 1.0


def test_linear() -> None:
    """Warm-up to 1 in 4 steps, then a straight line of 8 steps that reaches 0 after the last."""
    rates = [plan(4, 1, 12).learning_rate(step) for step in range(12)]
    assert rates == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    )


def test_no_weight_decay_on_biases_norms_grn_and_mask_token():
    model = FCMAE.from_size("atto", depths=[1, 1, 1, 1], engine="patch", layer_scale=0.1)
    names = {p: n for n, p in model.named_parameters()}
    decayed, spared = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert {names[p].split(".")[-2] for p in decayed["params"]} == {
        "0", "1", "conv_dw", "fc1", "fc2", "proj", "pred"
    }  # fmt: skip
    assert all(names[p].endswith(".weight") and p.ndim > 1 for p in decayed["params"])
    assert {"decoder.mask_token", "encoder.stages.0.blocks.0.mlp.grn.weight"} <= {
        names[p] for p in spared["params"]
    }
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_frozen_parameters_are_skipped():
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    (group,) = parameter_groups(layer, 0.1)
    assert group["params"] == [layer.bias]


@pytest.fixture
def clock(monkeypatch):
    """A clock whose `now` the test sets."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr("fcmae.train.clock.time.perf_counter", lambda: now.seconds)
    clock = Clock()
    clock.now = now
    return clock


def test_saves_by_time_take_at_most_a_twentieth_of_the_time(clock):
    clock.now.seconds = 599
    assert not clock.save_due(10)
    assert not clock.save_due(0)
    clock.now.seconds = 601
    assert clock.save_due(10)
    clock.now.seconds += 60  # one such slow save every 20 minutes, 19 of them training
    clock.saved(601, None)
    clock.now.seconds += 19 * 60 - 1
    assert not clock.save_due(10)
    clock.now.seconds += 2
    assert clock.save_due(10)


def test_slow_saves_by_steps_are_reported_once(clock, caplog):
    for _ in range(3):
        clock.now.seconds += 40  # 100 steps
        began = clock.now.seconds
        clock.now.seconds += 10
        clock.saved(began, 100)
    assert [record.getMessage() for record in caplog.records] == [
        "a save took 10.0 s, 20% of the time: --checkpoint_steps 475 or more keeps it under 5%"
    ]


@pytest.mark.parametrize(
    ("images", "epochs"),
    [(10, 800), (1500, 800), (3036, 400), (6000, 200), (11_000, 110), (12_001, 100), (10**6, 100)],
)
def test_fewer_images_get_more_epochs(images, epochs):
    assert Pretraining.auto_epochs.resolve("auto", images) == epochs
    assert Pretraining.auto_epochs.resolve(7, images) == 7
