"""Kinds of labels: losses by hand, scores against torchmetrics and numpy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import (
    MulticlassConfusionMatrix,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)

from fcmae.data.sample import Batch
from fcmae.data.statistics import Preprocessing
from fcmae.train.processes import ALONE
from finetune.config import FinetuneAugmentConfig, FinetuneConfig
from finetune.figures import SHOWN, Examples
from finetune.tasks.base import LabelKind, Measurement
from finetune.tasks.classify import Classify
from finetune.tasks.multilabel import Multilabel, best_threshold
from finetune.tasks.regress import Regress
from finetune.tasks.segment import Segment
from sparse.errors import InputError

CPU = torch.device("cpu")


def prepared(kind: LabelKind, labels: Any, **changes: Any) -> LabelKind:
    kind.prepare(FinetuneConfig("data", "out", **changes), np.array(labels), CPU)
    return kind


def loss_of(kind: LabelKind, outputs: Tensor, targets: Tensor) -> Tensor:
    return kind.loss(nn.Identity(), outputs, targets)


def measured(kind: LabelKind, outputs: Tensor, targets: Tensor, parts: int = 3) -> Measurement:
    measurement = kind.measurement(ALONE, final=bool(kind.state))
    for some, true in zip(outputs.chunk(parts), targets.chunk(parts), strict=True):
        measurement.update(some, true)
    return measurement


def test_balanced_classes_weigh_the_same_in_any_parts() -> None:
    """Weights are N / (classes · count): 8 / (2 · 6) and 8 / (2 · 2)."""
    plain = FinetuneAugmentConfig(label_smoothing=0.0)
    labels = [0] * 6 + [1] * 2
    kind = prepared(Classify(("a", "b")), labels, class_weights="balanced", augment=plain)
    outputs, targets = torch.randn(8, 2), torch.tensor(labels)
    losses = F.cross_entropy(outputs, targets, reduction="none")
    expected = (losses * torch.tensor([2 / 3] * 6 + [2.0] * 2)).mean()
    torch.testing.assert_close(loss_of(kind, outputs, targets), expected)
    halves = [loss_of(kind, outputs[part], targets[part]) for part in (slice(3), slice(3, 6))]
    six = loss_of(kind, outputs[:6], targets[:6])
    torch.testing.assert_close(sum(halves) / 2, six)


def test_several_labels_are_binary_cross_entropies() -> None:
    labels = [[True, False], [False, False], [True, True], [True, False]]
    outputs, targets = torch.randn(4, 2), torch.tensor(labels)
    chances = outputs.sigmoid()
    each = -torch.where(targets, chances.log(), (1 - chances).log())
    kind = prepared(Multilabel(("a", "b")), labels)
    torch.testing.assert_close(loss_of(kind, outputs, targets), each.mean())
    kind = prepared(Multilabel(("a", "b")), labels, class_weights="balanced")
    expected = (each * torch.where(targets, torch.tensor([1 / 3, 3.0]), 1.0)).mean()
    torch.testing.assert_close(loss_of(kind, outputs, targets), expected)


@pytest.mark.parametrize("name", ["huber", "squared"])
def test_missing_numbers_are_not_learned_and_targets_count_the_same(name: str) -> None:
    labels = np.array([[1.0, 10.0], [2.0, np.nan], [6.0, 30.0], [np.nan, np.nan]])
    kind = prepared(Regress(("a", "b")), labels, regress_loss=name)
    assert kind.state["mean"] == [3.0, 20.0]
    assert kind.state["std"] == pytest.approx([math.sqrt(14 / 3), 10.0])
    targets = torch.from_numpy(kind.encode(labels))
    outputs = torch.tensor([[0.0, 3.0], [0.5, 1.0], [-2.0, 0.5], [9.0, 9.0]], requires_grad=True)
    standard = (labels - [3, 20]) / [math.sqrt(14 / 3), 10]
    error = np.abs(outputs.detach().numpy() - standard)
    each = np.where(error < 1, error**2 / 2, error - 0.5) if name == "huber" else error**2
    loss = loss_of(kind, outputs, targets)
    assert float(loss.detach()) == pytest.approx(np.nanmean(each, 0).mean(), rel=1e-6)
    loss.backward()
    assert outputs.grad is not None
    assert (outputs.grad == 0).tolist() == np.isnan(labels).tolist()


def test_classes_against_torchmetrics() -> None:
    kind = Classify(tuple("abcdefg"))
    outputs, targets = torch.randn(50, 7), torch.randint(0, 6, (50,))
    measurement = measured(kind, outputs, targets)
    scores = measurement.compute()
    assert scores["top1"] == pytest.approx(
        100 * float((outputs.argmax(1) == targets).float().mean())
    )
    confusion = MulticlassConfusionMatrix(7)(outputs, targets)
    result = measurement.result()
    recalls = (100 * confusion.diagonal() / confusion.sum(1))[:6]
    assert [entry["top1"] for entry in result["per_class"].values()] == pytest.approx(
        recalls.tolist()
    )
    assert result["not_measured"] == ["g"]
    assert result["top5"] == scores["top5"]


def test_several_labels_against_torchmetrics() -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(40, 4), torch.rand(40, 4) < 0.4
    targets[:, 3] = False
    measurement = measured(Multilabel(("a", "b", "c", "none")), outputs, targets)
    scores, result = measurement.compute(), measurement.result()
    true = targets[:, :3].long()
    wanted = MultilabelAveragePrecision(3, average="macro")(outputs[:, :3], true)
    assert scores["map"] == pytest.approx(100 * float(wanted), rel=1e-6)
    thresholds = measurement.state["thresholds"]
    guessed = (outputs[:, :3].sigmoid() >= torch.tensor(thresholds[:3])).long()
    wanted = MultilabelF1Score(3, average="macro")(guessed, true)
    assert result["f1"] == pytest.approx(100 * float(wanted), rel=1e-6)
    assert result["not_measured"] == ["none"]
    assert thresholds[3] == 0.5
    again = measured(Multilabel(("a", "b", "c", "none"), measurement.state), outputs, targets)
    assert again.compute() == scores
    fixed = measured(
        Multilabel(("a", "b", "c", "none"), {"thresholds": [0.9] * 4}), outputs, targets
    )
    assert fixed.compute()["f1"] < scores["f1"]


def test_one_label_is_enough() -> None:
    outputs, targets = torch.tensor([[2.0], [-1.0], [0.5]]), torch.tensor([[1], [0], [1]])
    measurement = measured(Multilabel(("defect",)), outputs, targets)
    scores = measurement.compute()
    assert (scores["map"], scores["f1"]) == (100.0, 100.0)
    assert measurement.result()["per_class"]["defect"]["n"] == 2


def test_the_best_threshold_lies_midway() -> None:
    chances = torch.tensor([0.1, 0.4, 0.6, 0.8])
    assert best_threshold(chances, torch.tensor([0, 0, 1, 1])) == pytest.approx(0.5)
    assert best_threshold(chances, torch.tensor([0, 1, 0, 1])) == pytest.approx(0.25)
    assert best_threshold(chances, torch.tensor([1, 1, 1, 1])) == pytest.approx(0.05)
    assert best_threshold(chances, torch.zeros(4, dtype=torch.long)) == 0.5


def test_numbers_against_numpy_in_their_own_units() -> None:
    rng = np.random.default_rng(0)
    labels = rng.normal([5, 1e6], [1, 3], (30, 2))
    labels[::4, 0] = np.nan
    kind = Regress(("a", "b"))
    prepared(kind, labels)
    outputs = torch.from_numpy(rng.normal(size=(30, 2))).float()
    measurement = measured(kind, outputs, torch.from_numpy(kind.encode(labels)))
    scores, result = measurement.compute(), measurement.result()
    assert result["values"] == {"a": 22, "b": 30}
    for place, name in enumerate(("a", "b")):
        there = ~np.isnan(labels[:, place])
        errors = kind.decode(outputs)[there, place] - labels[there, place]
        spread = np.square(labels[there, place] - labels[there, place].mean()).sum()
        assert result["mae"][name] == pytest.approx(np.abs(errors).mean(), rel=1e-6)
        assert result["rmse"][name] == pytest.approx(np.sqrt(np.square(errors).mean()), rel=1e-6)
        assert result["r2"][name] == pytest.approx(1 - np.square(errors).sum() / spread, rel=1e-6)
    assert scores["r2"] == pytest.approx(sum(result["r2"].values()) / 2)
    assert scores["mae/a"] == result["mae"]["a"]


def test_scores_that_do_not_exist_are_null() -> None:
    """One number has no R², and none has no error; constant targets keep their own unit."""
    kind = prepared(Regress(("a", "b", "c")), [[1.0, 2.0, 0.1], [3.0, 4.0, 0.1]])
    assert kind.state["std"] == [1.0, 1.0, 1.0]
    targets = torch.tensor([[1.0, np.nan, 0.0]])
    measurement = measured(kind, torch.zeros(1, 3), targets, parts=1)
    scores, result = measurement.compute(), measurement.result()
    assert result["mae"] == {"a": 1.0, "b": None, "c": 0.0}
    assert result["r2"] == dict.fromkeys("abc")
    assert "r2" not in scores
    assert scores["loss"] == pytest.approx(0.25)


def test_a_diverged_model_is_still_scored() -> None:
    outputs = torch.full((6, 2), torch.nan)
    kinds: list[tuple[LabelKind, Tensor]] = [
        (Multilabel(("a", "b")), torch.tensor([[True, False]] * 3 + [[False, True]] * 3)),
        (prepared(Regress(("a", "b")), np.arange(12.0).reshape(6, 2)), torch.randn(6, 2)),
    ]
    for kind, targets in kinds:
        measurement = measured(kind, outputs, targets)
        scores = measurement.compute()
        assert math.isnan(scores["loss"])
        assert kind.rank(scores) < kind.rank({"map": 1.0, "loss": 1.0})
        measurement.draw()


def test_predictions_as_cells_and_words() -> None:
    several = Multilabel(("a", "b"), {"thresholds": [0.4, 0.9]})
    outputs = torch.tensor([[0.0, 2.0], [3.0, 3.0]])
    assert several.cells(outputs, 5) == [["0.500000", "0.880797"], ["0.952574", "0.952574"]]
    assert [several.describe_output(row) for row in outputs] == ["a 0.50", "a 0.95, b 0.95"]
    assert several.describe_target(np.array([False, False])) == "none"
    numbers = Regress(("age", "height"), {"mean": [40.0, 170.0], "std": [10.0, 8.0]})
    assert numbers.cells(torch.tensor([[0.5, -1.0]]), 5) == [["45", "162"]]
    assert numbers.describe_output(torch.tensor([0.5, -1.0])) == "age 45, height 162"
    assert numbers.describe_target(np.array([np.nan, 0], np.float32)) == "age ?, height 170"


def test_guessing_is_recognised() -> None:
    has = np.arange(40).reshape(-1, 1) % 4 == 0
    several = Multilabel(("a",))
    assert "that of guessing 25.0 %" in str(several.chance([{"map": 24.0}, {"map": 30.0}], has))
    assert several.chance([{"map": 40.0}], has) is None
    numbers = Regress(("a",))
    assert "R² is -0.10" in str(numbers.chance([{"r2": -0.1}, {"r2": -0.2}], has))
    assert numbers.chance([{"r2": 0.1}], has) is None


@pytest.mark.parametrize("kind", [Multilabel, Regress])
def test_settings_for_one_class_per_image_are_refused(kind: type[LabelKind]) -> None:
    with pytest.raises(InputError, match="mixup and cutmix blend classes"):
        prepared(kind(("a",)), [[1.0], [0.0]], augment=FinetuneAugmentConfig(cutmix=0.5))


def test_numbers_that_cannot_be_learned_are_refused() -> None:
    with pytest.raises(InputError, match="class_weights balanced is for classes"):
        prepared(Regress(("a",)), [[1.0], [0.0]], class_weights="balanced")
    with pytest.raises(InputError, match="no training image has a number in 'b'"):
        prepared(Regress(("a", "b")), [[1.0, np.nan], [0.0, np.nan]])


def test_the_examples_shown_are_the_chosen_ones_and_the_worst() -> None:
    """Losses that are not numbers are the worst; of equal ones, the first image."""
    kind, count = Classify(("a", "b")), 40
    how = Preprocessing((2, 2), (0.0,) * 3, (1.0,) * 3)
    losses = torch.rand(count, generator=torch.Generator().manual_seed(0))
    losses[[7, 8, 30]] = torch.tensor([math.nan, losses.max() + 1, losses.max() + 1])
    found = Examples(kind, how, [3, 39])
    for part in torch.arange(count).split(7):
        marked = part.float().div(255).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        outputs = torch.stack([part, -part], 1).float()
        found.add(Batch(marked, part, targets=part % 2), marked, outputs, losses[part])
    assert [np.asarray(image)[0, 0, 0] for image, _, _ in found.chosen] == [3, 39]
    order = torch.argsort(losses.nan_to_num(math.inf), descending=True, stable=True)
    worst = found.worst()
    indices = [int(np.asarray(image)[1, 1, 2]) for image, _, _ in worst]
    assert indices == order[:SHOWN].tolist()
    for index, (_, output, target) in zip(indices, worst, strict=True):
        assert (output.tolist(), int(target)) == ([index, -index], index % 2)


def test_an_images_loss_is_that_of_its_labels() -> None:
    """Returned by a measurement, by hand for each kind."""
    outputs = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    classes = measured_losses(Classify(("a", "b")), outputs, torch.tensor([0, 0]))
    assert classes == pytest.approx([math.log1p(math.exp(-2)), math.log1p(math.e)])
    labels = measured_losses(Multilabel(("a", "b")), outputs, torch.tensor([[1, 0], [1, 1]]))
    log_half, softplus = math.log(2), [math.log1p(math.exp(-x)) for x in (2, 1)]
    expected = [(softplus[0] + log_half) / 2, (log_half + softplus[1]) / 2]
    assert labels == pytest.approx(expected)
    state = {"mean": [0.0] * 2, "std": [1.0] * 2, "loss": "squared"}
    targets = torch.tensor([[1.0, math.nan], [math.nan, math.nan]])
    assert measured_losses(Regress(("a", "b"), state), outputs, targets) == [1.0, 0.0]
    pixels = outputs.view(2, 2, 1, 1).expand(-1, -1, 2, 2)
    masks = torch.tensor([[[0, 0], [1, 255]], [[0, 0], [0, 0]]])
    segment = measured_losses(Segment(("a", "b")), pixels, masks)
    one, other = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    assert segment == pytest.approx([(2 * one + other) / 4, math.log1p(math.e)])


def measured_losses(kind: LabelKind, outputs: Tensor, targets: Tensor) -> list[float]:
    return kind.measurement(ALONE).update(outputs, targets).tolist()
