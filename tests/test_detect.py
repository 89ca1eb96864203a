"""Detectors: their parts, COCO's scores, and whole runs on boxes and on objects with masks."""

import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import timm
import torch
from faster_coco_eval.core import mask as coco
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FasterRCNN, MaskRCNN, roi_heads
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align

from fcmae.commands.evaluate import EvaluateConfig
from fcmae.commands.predict import PredictConfig
from fcmae.commands.report import ReportConfig
from fcmae.data.objects import decode
from fcmae.inspect.reporting import report
from fcmae.train.checkpoint import list_checkpoints
from fcmae.train.processes import ALONE
from finetune.config import FinetuneConfig
from finetune.detector import CODERS, Anchors, Detector, StagedHeads, start_detector
from finetune.evaluate import evaluate
from finetune.found import (
    Part,
    _pasted,
    average_precision,
    certain,
    entries,
    errors,
    fitted,
    kept,
    label_image,
    merged,
)
from finetune.model import Start
from finetune.predict import predict
from finetune.tasks.detect import ANCHORS, Detect, Instances, ObjectMeasurement, _anchor
from finetune.train import finetune
from finetune.tuned import load_tuned
from sparse.errors import InputError
from tests.test_finetune_run import assert_same_run, metrics
from tests.test_objects import SIZE, coco_file, found, write_coco, write_label_images, write_voc
from tests.test_rasters import write_map

CPU = torch.device("cpu")
SMALL = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
HEADS = [("faster", False), ("mask", True), ("cascade", False), ("cascade", True)]


def detector(head: str = "faster", masks: bool = False, **changes: Any) -> Detector:
    given: dict[str, Any] = {
        "start": Start("convnextv2_atto", SMALL), "in_chans": 3, "classes": 2, "head": head,
        "masks": masks, "width": None, "anchor": 8, "drop_path": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    return start_detector(**{**given, **changes})[0]


def targets(count: int = 2, masks: bool = True, width: int = 96) -> list[dict[str, torch.Tensor]]:
    """Rectangles in images of 64 × width pixels; the last image has none."""
    result = []
    for n in range(count):
        boxes = torch.tensor([[8.0, 4, 40, 36], [50, 20, 90, 60]])[: 0 if n == count - 1 else 2]
        maps = torch.zeros(len(boxes), 64, width, dtype=torch.uint8)
        for map_, box in zip(maps, boxes.int().tolist(), strict=True):
            map_[box[1] : box[3], box[0] : box[2]] = 1
        entry = {"boxes": boxes, "labels": torch.tensor([1, 2])[: len(boxes)]}
        result.append({**entry, "masks": maps} if masks else entry)
    return result


# The model


@pytest.mark.parametrize(("head", "masks"), HEADS)
def test_every_parameter_learns(head: str, masks: bool) -> None:
    """Also with an image without objects; the loss is finite, and evaluation finds boxes inside."""
    model, images = detector(head, masks), torch.randn(2, 3, 64, 96)
    loss = model.train()(images, targets(masks=masks))
    loss.backward()
    assert loss.ndim == 0
    assert loss.isfinite()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.heads.score_thresh = 0.0
    found_in = model.eval()(torch.randn(2, 3, 50, 70))
    assert len(found_in) == 2
    for part in found_in:
        assert 0 < len(part["scores"]) <= 500
        assert ((part["boxes"] >= 0) & (part["boxes"] <= torch.tensor([70, 50, 70, 50]))).all()
        assert set(part["labels"].tolist()) <= {1, 2}
        assert ("masks" in part) is masks


@pytest.mark.parametrize("masks", [False, True])
def test_the_loss_is_that_of_torchvision(masks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torchvision's whole model with the same weights, which prepares the images itself; there,
    masks are half a pixel off."""

    def centred(masks: Any, boxes: Any, matched: Any, size: int) -> Any:
        rois = torch.cat([matched[:, None].to(boxes), boxes], 1)
        return roi_align(masks[:, None].to(boxes), rois, size, 1.0, -1, True)[:, 0]

    monkeypatch.setattr(roi_heads, "project_masks_on_boxes", centred)
    model = detector("mask" if masks else "faster", masks).train()
    plain = (MaskRCNN if masks else FasterRCNN)(
        model.pyramid, image_mean=[0] * 3, image_std=[1] * 3, min_size=64, max_size=128,
        box_head=model.heads.box_heads[0], box_predictor=model.heads.predictors[0],
        **({"mask_head": model.heads.mask_heads[0], "mask_predictor":
            model.heads.mask_predictors[0]} if masks else {}),
    )  # fmt: skip
    plain.rpn = model.rpn
    plain.roi_heads.detections_per_img = 500
    plain.transform.torch_choice = lambda sides: sides[0]  # it draws from torch's stream
    images, wanted = torch.randn(2, 3, 64, 128), targets(masks=masks, width=128)
    torch.manual_seed(1)
    own = model(images, wanted)
    torch.manual_seed(1)
    expected = sum(plain.train()([*images], wanted).values())
    assert own.item() == pytest.approx(expected.item(), rel=1e-6)
    for heads in (model.heads, plain.roi_heads):
        heads.score_thresh = 0.0
    model.eval()
    plain.eval()
    with torch.no_grad():
        for one, other in zip(model(images), plain([*images]), strict=True):
            assert len(one["boxes"]) > 0
            torch.testing.assert_close(one["boxes"], other["boxes"])
            torch.testing.assert_close(one["scores"], other["scores"])


def test_masks_begin_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first loss of masks is that of guessing, ln 2, for any number of classes."""
    model = detector("mask", True).train()
    own, seen = model.heads._mask_loss, []

    def watched(*args: Any) -> torch.Tensor:
        seen.append(own(*args).item())
        return own(*args)

    monkeypatch.setattr(model.heads, "_mask_loss", watched)
    model(torch.randn(2, 3, 64, 96), targets())
    assert seen == [pytest.approx(math.log(2), abs=0.01)]


def test_boxes_stay_float32_in_bfloat16() -> None:
    model = detector("mask", True).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(2, 3, 64, 96), targets())
        assert loss.dtype == torch.float32
        model.eval().heads.score_thresh = 0.0
        (part,) = model(torch.randn(1, 3, 64, 96))
    assert part["boxes"].dtype == part["masks"].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "args"),
    [("resnet18", {}), ("swin_tiny_patch4_window7_224", {"strict_img_size": False})],
)
def test_other_backbones(name: str, args: dict[str, Any]) -> None:
    model = detector(start=Start(name, args), width=32)
    assert model.eval()(torch.randn(1, 3, 64, 96))[0]["boxes"].shape[1] == 4
    state = timm.create_model(name, num_classes=0, **args).state_dict()
    loaded = detector(start=Start(name, args, state), width=32)
    for key, tensor in loaded.backbone.state_dict().items():
        assert any(torch.equal(tensor, given) for given in state.values()), key


def test_backbones_without_features() -> None:
    with pytest.raises(InputError, match="has no features for a feature pyramid"):
        detector(start=Start("vit_tiny_patch16_224", {}))


def iou(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """IoU of two boxes, and the area of the box around both, by hand."""
    low, high = torch.maximum(one[:2], other[:2]), torch.minimum(one[2:], other[2:])
    shared = float((high - low).clamp(min=0).prod())
    both = sum(float((box[2:] - box[:2]).prod()) for box in (one, other)) - shared
    low, high = torch.minimum(one[:2], other[:2]), torch.maximum(one[2:], other[2:])
    return shared / both, float((high - low).prod()) - both


def decoded(box: torch.Tensor, deltas: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    """A box moved by deltas (arXiv 1311.2524, appendix C), by hand."""
    x, y, w, h = (deltas / torch.tensor(weights)).tolist()
    width, height = (box[2:] - box[:2]).tolist()
    centre = (box[:2] + box[2:]) / 2 + torch.tensor([x * width, y * height])
    half = torch.tensor([width * math.exp(w), height * math.exp(h)]) / 2
    return torch.cat([centre - half, centre + half])


def test_the_stages_of_a_cascade(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matches, losses and refined boxes of each stage equal a computation by hand."""
    heads = detector("cascade").train().heads
    assert isinstance(heads, StagedHeads)
    generator = torch.Generator().manual_seed(3)
    outputs = [
        (torch.randn(9, 3, generator=generator), torch.randn(9, 12, generator=generator))
        for _ in CODERS
    ]
    seen: list[torch.Tensor] = []

    def stage(number: int, _features: Any, boxes: list[torch.Tensor], _sizes: Any) -> Any:
        seen.append(boxes[0].clone())
        return tuple(part[: len(boxes[0])] for part in outputs[number])

    monkeypatch.setattr(heads, "_stage", stage)
    truth = torch.tensor([[10.0, 10, 50, 40]])
    proposals = torch.tensor([[12.0, 12, 52, 40], [14, 10, 60, 44], [60, 30, 90, 60]])
    wanted = [{"boxes": truth, "labels": torch.tensor([2])}]
    _, losses = heads({}, [proposals], [(64, 96)], wanted)
    boxes = torch.cat([proposals, truth])
    for number, (least, weights, weight) in enumerate(
        zip((0.5, 0.6, 0.7), CODERS, (1.0, 0.5, 0.25), strict=True)
    ):
        torch.testing.assert_close(seen[number], boxes)
        scores, deltas = (part[: len(boxes)] for part in outputs[number])
        labels = [2 if iou(box, truth[0])[0] >= least else 0 for box in boxes]
        assert number or labels == [2, 2, 0, 2]
        entropy = [
            -float(row.log_softmax(0)[label]) for row, label in zip(scores, labels, strict=True)
        ]
        assert float(losses[f"class_{number}"]) == pytest.approx(
            weight * sum(entropy) / len(labels), rel=1e-5
        )
        giou, refined = 0.0, []
        for row, (box, label) in enumerate(zip(boxes, labels, strict=True)):
            chosen = label or 1 + int(scores[row, 1:].argmax())
            moved = decoded(box, deltas[row, 4 * chosen : 4 * chosen + 4], weights)
            if label:
                shared, empty = iou(moved, truth[0])
                around = torch.maximum(moved[2:], truth[0, 2:]) - torch.minimum(
                    moved[:2], truth[0, :2]
                )
                giou += 1 - shared + empty / float(around.prod())
            if not torch.equal(box, truth[0]):
                refined.append(moved.clamp(min=0).minimum(torch.tensor([96.0, 64, 96, 64])))
        assert float(losses[f"box_{number}"]) == pytest.approx(
            weight * 10 * giou / len(labels), rel=1e-4
        )
        boxes = torch.cat([torch.stack(refined), truth])
    assert all(not box.requires_grad for box in seen)


def test_a_cascade_averages_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = detector("cascade").eval().heads
    logits = [torch.tensor([[0.0, 1, 3]]), torch.tensor([[0.0, 2, 1]]), torch.tensor([[1.0, 0, 4]])]
    monkeypatch.setattr(heads, "_stage", lambda number, *_: (logits[number], torch.zeros(1, 12)))
    box = torch.tensor([[10.0, 10, 50, 40]])
    (part,), _ = heads({}, [box], [(64, 96)])
    scores = torch.stack(logits).mean(0).softmax(1)
    assert part["labels"].tolist() == [2, 1]
    torch.testing.assert_close(part["scores"], scores[0, [2, 1]])
    torch.testing.assert_close(part["boxes"], box.repeat(2, 1))


# Scores


def some(seed: int, images: int = 4) -> tuple[list[Any], list[Any]]:
    """Random objects, and what a model could have found of them: moved, doubled, or elsewhere."""
    stream, guesses, wanted = np.random.default_rng(seed), [], []
    for _ in range(images):
        corners = stream.integers(0, 40, (6, 2))
        truth = np.concatenate([corners, corners + stream.integers(4, 24, (6, 2))], 1).astype(float)
        labels = stream.integers(1, 4, 6)
        boxes = np.concatenate([truth + stream.normal(0, 2, truth.shape), truth[:2] + 25])
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        size = (70, 80)
        wanted.append({
            "boxes": truth, "labels": labels, "crowd": stream.uniform(size=6) < 0.15,
            "size": np.array([size]), "masks": [filled(box, size) for box in truth],
        })  # fmt: skip
        given = np.concatenate([labels, labels[:2]])
        guesses.append({
            "boxes": boxes, "labels": np.where(stream.uniform(size=8) < 0.1, 1, given),
            "scores": stream.uniform(0.05, 1, 8).astype(np.float32),
            "masks": [Part(0, 0, decode(filled(box, size)) > 0) for box in boxes],
        })  # fmt: skip
    return guesses, wanted


def filled(box: Any, size: tuple[int, int]) -> Any:
    mask = np.zeros(size, np.uint8, order="F")
    left, top, right, bottom = (max(0, round(side)) for side in box)
    mask[top : bottom + 1, left : right + 1] = 1
    return coco.encode(mask)


def written(guesses: list[Any]) -> list[list[dict[str, Any]]]:
    return [entries(guess, (70, 80), {"image_id": n}) for n, guess in enumerate(guesses)]


def by_pycocotools(guesses: list[Any], wanted: list[Any], kind: str, most: int = 500) -> Any:
    """COCO's own precision (10, 101, classes) and scores."""
    truth, result = COCO(), COCO()
    things = [
        {"id": 100 * image + n + 1, "image_id": image, "category_id": int(target["labels"][n]),
         "iscrowd": int(target["crowd"][n]), "segmentation": target["masks"][n],
         "bbox": [*box[:2], box[2] - box[0], box[3] - box[1]],
         "area": (box[2] - box[0]) * (box[3] - box[1])}
        for image, target in enumerate(wanted)
        for n, box in enumerate(target["boxes"].tolist())
    ]  # fmt: skip
    truth.dataset = {
        "info": {}, "images": [{"id": n, "height": 70, "width": 80} for n in range(len(wanted))],
        "annotations": things, "categories": [{"id": n, "name": str(n)} for n in (1, 2, 3)],
    }  # fmt: skip
    truth.createIndex()
    found_in = [entry for part in written(guesses) for entry in part]
    result = truth.loadRes(json.loads(json.dumps(found_in)))
    judge = COCOeval(truth, result, kind)
    judge.params.maxDets = [1, 10, most]
    judge.evaluate()
    judge.accumulate()
    return (judge.eval[name][:, :, :, 0, -1] for name in ("precision", "scores"))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("masks", [False, True])
def test_precision_is_that_of_coco(
    seed: int, masks: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    guesses, wanted = some(seed)
    own = average_precision(written(guesses), wanted, 3, masks)
    assert capsys.readouterr() == ("", "")
    precision, scores = by_pycocotools(guesses, wanted, "segm" if masks else "bbox")
    np.testing.assert_allclose(own.precision, precision, atol=1e-6)
    np.testing.assert_allclose(own.scores, scores, atol=1e-6)
    assert own.mean() == pytest.approx(100 * precision[precision > -1].mean(), abs=1e-6)
    # Its own thresholds are rounded to float32, which decides where an IoU is exactly 0.6.
    metric = MeanAveragePrecision(
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
        iou_type="segm" if masks else "bbox", backend="faster_coco_eval", class_metrics=True,
        max_detection_thresholds=[1, 10, 500],
    )  # fmt: skip
    for guess, target in zip(guesses, wanted, strict=True):
        maps = [
            torch.from_numpy(np.stack(masks)).bool()
            for masks in (
                [part.mask for part in guess["masks"]],
                [decode(rle) for rle in target["masks"]],
            )
        ]
        given = {key: torch.from_numpy(guess[key]) for key in ("boxes", "labels", "scores")}
        truth = {key: torch.from_numpy(target[key]) for key in ("boxes", "labels")}
        truth["iscrowd"] = torch.from_numpy(target["crowd"])
        metric.update([{**given, "masks": maps[0]}], [{**truth, "masks": maps[1]}])
    expected = metric.compute()
    assert own.mean() == pytest.approx(100 * float(expected["map"]), abs=1e-4)
    assert own.mean(0) == pytest.approx(100 * float(expected["map_50"]), abs=1e-4)
    assert own.mean(5) == pytest.approx(100 * float(expected["map_75"]), abs=1e-4)
    for place, value in enumerate(expected["map_per_class"].tolist()):
        assert own.mean(place=place) == pytest.approx(100 * value, abs=1e-4)


def test_nothing_found_and_nothing_to_find() -> None:
    guesses, wanted = some(0)
    nothing = [kept(guess, np.zeros(0, np.int64)) for guess in guesses]
    own = average_precision(written(nothing), wanted, 4, masks=False)
    assert own.mean() == own.mean(0, 0) == 0
    assert own.mean(place=3) is None  # a class without an object
    assert own.thresholds() == [0.5] * 4
    assert average_precision(written(guesses), wanted, 4, masks=False).mean(place=3) is None


def test_thresholds_have_the_best_f1() -> None:
    """Of the scores at COCO's recalls: found by trying each."""
    guesses, wanted = some(5, images=12)
    own = average_precision(written(guesses), wanted, 3, masks=False)
    for place, threshold in enumerate(own.thresholds()):
        values = []
        for score in np.unique(own.scores[0, :, place]):
            if score > 0:
                values.append((f1_at(guesses, wanted, place + 1, score), score))
        best = max(value for value, _ in values)
        assert f1_at(guesses, wanted, place + 1, threshold) == pytest.approx(best, abs=0.03)


def f1_at(guesses: list[Any], wanted: list[Any], label: int, score: float) -> float:
    """F1 of a class in all images, matched at an IoU of 0.5."""
    hits = total = 0
    for guess, target in zip(guesses, wanted, strict=True):
        sure = kept(guess, (guess["scores"] >= score) & (guess["labels"] == label))
        truth = target["boxes"][(target["labels"] == label) & ~target["crowd"]]
        free = [True] * len(truth)
        for n in np.argsort(-sure["scores"]):
            values = [
                iou(*map(torch.from_numpy, (sure["boxes"][n], box)))[0] * is_free
                for box, is_free in zip(truth, free, strict=True)
            ]
            if values and max(values) >= 0.5:
                free[int(np.argmax(values))] = False
                hits += 1
        total += len(sure["labels"]) + len(truth)
    return 2 * hits / max(total, 1)


def test_errors_of_an_image() -> None:
    boxes = np.array([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 0, 50, 10]])
    target = {"boxes": boxes, "labels": np.array([1, 1, 2]), "crowd": np.zeros(3, bool)}
    guess = {
        "boxes": np.array([[0.0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 30], [40, 0, 50, 10]]),
        "labels": np.array([1, 1, 2, 2]), "scores": np.array([0.9, 0.8, 0.7, 0.4]),
    }  # fmt: skip
    # One hit of three that are sure; the second box of the same object and the wrong class miss.
    assert errors(guess, target) == pytest.approx(1 - 2 * 1 / (3 + 3))
    nothing = kept(guess, np.zeros(0, np.int64))
    assert errors(nothing, target) == 1
    empty = {name: value[:0] for name, value in target.items()}
    assert errors(nothing, empty) == 0


# From the model's pixels to the image's


def test_found_objects_are_fitted_to_the_image() -> None:
    boxes = torch.tensor([[0.0, 0, 12.3, 20], [10.5, 4.25, 30, 39.5], [50, 30, 64, 48]])
    masks = torch.zeros(3, 1, 28, 28)
    masks[..., :14] = 1  # the left half of each box
    output = {
        "boxes": boxes, "labels": torch.tensor([1, 2, 1]), "scores": torch.tensor([0.9, 0.6, 0.3]),
        "masks": masks, "shape": (48, 64),
    }  # fmt: skip
    large = fitted(output, (96, 192))
    np.testing.assert_allclose(large["boxes"], boxes.numpy() * [3, 2, 3, 2], rtol=1e-6)
    same = fitted(output, (48, 64))
    down, across = np.mgrid[:48, :64] + 0.5
    for part, (left, top, right, bottom) in zip(same["masks"], boxes.tolist(), strict=True):
        mask = np.zeros((48, 64), bool)
        part.within(mask)[:] = part.mask
        inside = (down >= top) & (down <= bottom) & (across >= left)
        assert (mask == (inside & (across < (left + right) / 2))).all()
    sure = certain(same, None)
    assert sure["labels"].tolist() == [1, 2]
    assert certain(same, [0.2, 0.7])["labels"].tolist() == [1, 1]
    numbers = label_image(sure, (48, 64))
    assert set(np.unique(numbers)) == {0, 1, 2}
    first = sure["masks"][0]
    assert (first.within(numbers)[first.mask] == 1).all()


@pytest.mark.parametrize("radius", [4, 8, 20])
def test_masks_are_neither_moved_nor_enlarged(radius: int) -> None:
    """A head that gives exactly what it is trained on finds discs in boxes between pixels."""
    stream, shared = np.random.default_rng(radius), []
    for _ in range(20):
        x, y = stream.uniform(24, 40, 2)
        down, across = np.mgrid[:64, :64] + 0.5
        disc = (down - y) ** 2 + (across - x) ** 2 < radius**2
        box = torch.tensor([[x - radius, y - radius, x + radius, y + radius]]).float()
        box += torch.tensor([-1.0, -1, 1, 1]) * torch.from_numpy(stream.uniform(0, 1, 4)).float()
        rois = torch.cat([torch.zeros(1, 1), box], 1)
        learned = roi_align(torch.from_numpy(disc[None, None]).float(), rois, 28, aligned=True)
        part = _pasted(learned[0], box[0], (64, 64))
        mask = np.zeros((64, 64), bool)
        part.within(mask)[:] = part.mask
        shared.append((mask & disc).sum() / (mask | disc).sum())
    assert np.mean(shared) >= 0.99


def test_anchors_are_float32_in_bfloat16() -> None:
    anchors = Anchors(((4,), (8,)), ((1.0,),) * 2)
    maps = [torch.zeros(1, 8, 16, 264, dtype=torch.bfloat16), torch.zeros(1, 8, 8, 132)]
    (found_in,) = anchors(ImageList(torch.zeros(1, 3, 64, 1056), [(64, 1056)]), maps)
    assert found_in.dtype == torch.float32
    assert ((found_in[:, 2:] - found_in[:, :2]) >= 4).all()
    assert found_in[:, 2].max() > 1050


def test_more_classes_than_colours() -> None:
    kind = Detect([f"class {number}" for number in range(400)], {"thresholds": [0.1] * 400})
    guess = {"boxes": np.array([[2.0, 2, 30, 30]]), "labels": np.array([400]),
             "scores": np.array([0.5])}  # fmt: skip
    assert np.asarray(kind.overlay(Image.new("RGB", (40, 40)), guess)).any()


def test_a_resumed_run_keeps_its_anchors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_coco(tmp_path / "data", coco_file(masks=False))
    assert finetune(config_for(data, epochs=1)) == 0
    run = tmp_path / "run"
    state = json.loads((list_checkpoints(run / "checkpoints")[0] / "state.json").read_text())
    assert (state["settings"]["anchor_size"], state["asked"]["anchor_size"]) == (4, "auto")
    shutil.rmtree(list_checkpoints(run / "checkpoints")[0])
    monkeypatch.setattr("finetune.tasks.detect._anchor", lambda *_: 32)
    assert finetune(config_for(data, epochs=1)) == 0
    again = json.loads((run / "exported/task/config.json").read_text())
    assert again["task_state"]["anchor_size"] == 4


def test_objects_of_several_windows_are_merged_once() -> None:
    def seen(boxes: list[list[int]], labels: list[int], scores: list[float]) -> Any:
        return {
            "boxes": np.array(boxes, float).reshape(-1, 4), "labels": np.array(labels),
            "scores": np.array(scores),
            "masks": [Part(box[0], box[1], np.ones((box[3] - box[1], box[2] - box[0]), bool))
                      for box in boxes],
        }  # fmt: skip

    one = seen([[10, 10, 40, 30], [2, 40, 12, 50], [60, 5, 70, 15]], [1, 1, 1], [0.9, 0.8, 0.3])
    # Its first is the rest of one's first; the second is of another class; the third touches only.
    two = seen([[20, 10, 55, 30], [2, 40, 12, 50], [69, 5, 79, 15]], [1, 2, 1], [0.7, 0.6, 0.5])
    whole = merged([one, two])
    assert whole["boxes"].tolist() == [
        [10, 10, 55, 30], [2, 40, 12, 50], [2, 40, 12, 50], [69, 5, 79, 15], [60, 5, 70, 15],
    ]  # fmt: skip
    assert whole["scores"].tolist() == [0.9, 0.8, 0.6, 0.5, 0.3]
    assert whole["masks"][0][:2] == (10, 10)
    assert whole["masks"][0].mask.shape == (20, 45)
    assert whole["masks"][0].mask.all()
    assert whole["masks"][4] is one["masks"][2]
    assert len(merged([one])["labels"]) == 3
    assert merged([kept(one, np.zeros(0, np.int64))])["boxes"].shape == (0, 4)


def test_anchors_suit_the_objects(tmp_path: Path) -> None:
    labels = found(write_coco(tmp_path / "coco"))
    sides = np.sqrt([20 * 20, 6 * 6, 12 * 9])
    expected = max(side for side in ANCHORS if side <= np.quantile(sides, 0.1))
    config = config_for(tmp_path)
    assert _anchor(labels, config) == expected == 4
    large = config_for(tmp_path, augment={"short_side": 160})
    assert _anchor(labels, large) == 16  # images of 40 pixels four times as large
    assert _anchor(found(write_label_images(tmp_path / "numbers"), masks=True), config) == 4


# Runs


def config_for(data: Path, **changes: Any) -> FinetuneConfig:
    given: dict[str, Any] = {
        "out": data.parent / "run", "task": "detect", "img_size": 64, "epochs": 2, "batch_size": 2,
        "model": "test_convnext", "workers": 0, "ema_decay": 0.5, "decoder_channels": 16,
        "log_steps": 1, "checkpoint_steps": 1, "keep_checkpoints": 10, "max_bad": 0.4,
        "trackers": [], "device": "cpu", "optim": {"base_lr": 0.1},
    }  # fmt: skip
    parts = {**given, **changes}
    from finetune.config import FinetuneAugmentConfig, FinetuneOptimConfig

    parts["optim"] = FinetuneOptimConfig(**parts["optim"])
    parts["augment"] = FinetuneAugmentConfig(**parts.get("augment", {}))
    parts["out"] = str(parts["out"])
    return FinetuneConfig(data=str(data), **parts)


def write_data(root: Path, kind: str) -> Path:
    return write_label_images(root) if kind == "instances" else write_coco(root)


@pytest.fixture(scope="module", params=["detect", "instances"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of each kind, with its `data` beside it; read-only."""
    data = write_data(tmp_path_factory.mktemp(request.param) / "data", request.param)
    assert finetune(config_for(data, task=request.param)) == 0
    return data.parent / "run"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def kind_of(run: Path) -> str:
    return json.loads((run / "exported/task/config.json").read_text())["task"]


def test_a_run_writes_all_its_files(run: Path) -> None:
    ends = [line for line in metrics(run) if "val_ap" in line]
    assert len(ends) == 2
    wanted = {"ap", "ap50", "ap75", "loss"} | ({"box_ap"} if kind_of(run) == "instances" else set())
    assert {f"{name}_{key}" for name in ("val", "ema") for key in wanted} <= ends[0].keys()
    config = json.loads((run / "exported/task/config.json").read_text())
    head = "mask" if kind_of(run) == "instances" else "faster"
    state = config["task_state"]
    assert (state["head"], state["anchor_size"], state["short_side"]) == (head, 4, None)
    names = ["object"] if kind_of(run) == "instances" else ["cell", "dust"]
    assert config["label_names"] == names
    assert len(state["thresholds"]) == len(names)
    assert (run / "figures/scores.png").is_file()
    assert (run / "figures/worst.png").is_file()
    backbone = timm.create_model(f"local-dir:{run / 'exported'}", pretrained=True, num_classes=0)
    tuned = load_tuned(str(run), CPU)
    model: Any = tuned.model
    own = model.backbone.state_dict()
    for name, tensor in backbone.state_dict().items():
        flat = name.replace(".", "_")
        match = [value for key, value in own.items() if key.replace(".", "_") == flat]
        assert not match or torch.equal(match[0], tensor)
    assert tuned.kind.names == tuple(names)


def test_scores_equal_those_of_the_written_results(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`evaluate` against pycocotools on what `predict` writes, to 1e-6."""
    task, data = kind_of(run), run.parent / "data"
    result = evaluate(EvaluateConfig(str(run), data=str(data)), show=False)
    assert result["task"] == task
    images = data / "val/images" if task == "instances" else data / "val"
    out = tmp_path / "results.json"
    predict(PredictConfig(str(run), images=str(images), out=str(out), overlay=str(tmp_path / "o")))
    written = json.loads(out.read_text())
    assert {entry["file_name"] for entry in written} <= {"0.png", "1.png", "2.png"}
    assert all(entry["bbox"][2] > 0 and 0.05 < entry["score"] <= 1 for entry in written)
    file = coco_file()
    if task == "instances":
        first = 0  # the sorted position
        file["categories"] = [{"id": 1, "name": "object"}]
    else:
        first = 10  # the number in the COCO file
        file["categories"] = [{"id": 1, "name": "cell"}, {"id": 2, "name": "dust"}]
    for image in file["images"]:
        image["id"] += first - 10
    for thing in file["annotations"]:
        thing["image_id"] += first - 10
        is_dust = thing["category_id"] == 3 and task == "detect"
        thing |= {"category_id": 2 if is_dust else 1, "area": 1}
    truth = COCO()
    truth.dataset = {"info": {}, **file}
    truth.createIndex()
    kind = "segm" if task == "instances" else "bbox"
    judge = COCOeval(truth, truth.loadRes(written), kind)
    judge.params.maxDets = [1, 10, 500]
    judge.evaluate()
    judge.accumulate()
    precision = judge.eval["precision"][:, :, :, 0, -1]
    assert result["ap"] == pytest.approx(100 * precision[precision > -1].mean(), abs=1e-6)
    assert result["ap50"] == pytest.approx(100 * precision[0].mean(), abs=1e-6)
    for place, scores in enumerate(result["per_class"].values()):
        assert scores["ap"] == pytest.approx(100 * precision[:, :, place].mean(), abs=1e-6)
    total = [scores["objects"] for scores in result["per_class"].values()]
    assert total == ([3] if task == "instances" else [2, 1])
    assert ("box_ap" in result) is (task == "instances")
    # What comes with the results.
    with (tmp_path / "results.counts.csv").open(newline="") as opened:
        heads, *rows = csv.reader(opened)
    assert heads == ["path", *load_tuned(str(run), CPU).kind.names]
    assert len(rows) == 3
    for index, row in enumerate(rows):
        assert pixels(tmp_path / "o" / f"{index}.png").shape == (*SIZE[::-1], 3)
        if task == "instances":
            numbers = pixels(tmp_path / "results.instances" / f"{index}.png")
            assert numbers.shape == SIZE[::-1]
            assert len(np.unique(numbers)) - 1 <= int(row[1])


def test_evaluation_is_drawn_and_reported(run: Path, tmp_path: Path) -> None:
    data = str(run.parent / "data")
    for name in ("scores.png", "scores.csv"):
        evaluate(EvaluateConfig(str(run), data=data, out=str(tmp_path / name)), show=False)
    with (tmp_path / "scores.csv").open(newline="") as opened:
        rows = [*csv.reader(opened)]
    assert rows[0] == ["name", "ap", "ap50", "objects", "n"]
    assert pixels(tmp_path / "scores.png").std() > 0
    page = report(ReportConfig([str(run)], out=str(tmp_path / "page.html"))).read_text()
    assert page.count("data:image/jpeg") == 3  # scores, some images, those with the highest loss
    assert "validation AP %" in page


def test_windows_find_what_the_whole_image_has(run: Path, tmp_path: Path) -> None:
    """An image that fits into one window is computed alike; others get each object once."""
    images, results = tmp_path / "images", {}
    images.mkdir()
    Image.effect_noise((150, 90), 60).convert("RGB").save(images / "large.png")
    for tile in (None, 160, 64):
        out = tmp_path / f"{tile}.json"
        predict(PredictConfig(str(run), images=str(images), out=str(out), tile=tile))
        results[tile] = json.loads(out.read_text())
    assert len(results[None]) == len(results[160])
    for one, other in zip(results[None], results[160], strict=True):
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-2)
    for entry in results[64]:
        left, top, width, height = entry["bbox"]
        assert left >= 0
        assert left + width <= 150
        assert top + height <= 90
        assert entry.get("segmentation", {"size": [90, 150]})["size"] == [90, 150]


def test_objects_of_a_map_are_written_with_its_coordinates(run: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    noise = np.asarray(Image.effect_noise((150, 90), 60).convert("RGB"))
    write_map(images / "a.tif", noise.transpose(2, 0, 1))
    for tile in (None, 64):
        out = tmp_path / f"{tile}.json"
        predict(PredictConfig(str(run), images=str(images), out=str(out), tile=tile))
        lines = out.with_suffix(".counts.csv").read_text().splitlines()
        (count,) = [*csv.DictReader(lines)]
        found = json.loads((out.with_suffix(".geojson") / "a.tif.geojson").read_text())
        assert len(found["features"]) == sum(int(count[name]) for name in count if name != "path")
        if kind_of(run) == "instances":
            with rasterio.open(out.with_suffix(".instances") / "a.tif") as labels:
                assert labels.crs.to_epsg() == 32633
                assert labels.shape == (90, 150)


@pytest.mark.slow
def test_a_resumed_run_equals_one_never_stopped(run: Path, tmp_path: Path) -> None:
    """Also without the labels, which the run has stored."""
    shutil.copytree(run, tmp_path / "run")
    for checkpoint in list_checkpoints(tmp_path / "run/checkpoints")[:2]:  # the newest
        shutil.rmtree(checkpoint)
    data, hidden = run.parent / "data/train/_annotations.coco.json", None
    if data.is_file():
        hidden = data.rename(data.with_suffix(".hidden"))
    try:
        given = config_for(run.parent / "data", out=tmp_path / "run", task=kind_of(run))
        assert finetune(given) == 0
    finally:
        if hidden:
            hidden.rename(data)
    assert_same_run(run, tmp_path / "run")
    name = "exported/task/model.safetensors"
    assert (run / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_measure_the_same(run: Path, tmp_path: Path) -> None:
    """The sampler of each process draws its own proposals, so losses are alike, not equal. That of
    masks is a mean over the objects of a process: of one without objects it is 0."""
    one, two = run, tmp_path / "two"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = ["-m", "fcmae", "finetune", "--config", str(one / "config.yaml"), "--out", str(two)]
    done = subprocess.run([sys.executable, *launch, *command], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    losses = [[line["loss"] for line in metrics(out) if "loss" in line] for out in (one, two)]
    if kind_of(run) == "detect":
        assert losses[1] == pytest.approx(losses[0], rel=0.3)
    assert len(losses[1]) == len(losses[0])
    result = evaluate(EvaluateConfig(str(two), data=str(run.parent / "data")), show=False)
    logged = [line for line in metrics(two) if "ema_ap" in line]
    assert max(line["ema_ap"] for line in logged) == pytest.approx(result["ap"], abs=1e-6)


def trajectory(kind: str, folder: Path) -> list[float]:
    """Losses of twelve steps on rectangles."""
    data = write_data(folder / "data", kind)
    given = {"epochs": 6, "val_epochs": 6, "checkpoint_steps": None, "task": kind}
    assert finetune(config_for(data, **given, optim={"base_lr": 0.05})) == 0
    return [line["loss"] for line in metrics(folder / "run") if "loss" in line]


@pytest.mark.parametrize("kind", ["detect", "instances"])
def test_losses_equal_the_golden_ones(kind: str, tmp_path: Path) -> None:
    golden = json.loads(Path(__file__).with_name("golden_losses.json").read_text())[kind]
    assert len(golden) == 12
    # Wider than for other kinds: where a rounding moves a box past a threshold, a sample changes.
    assert trajectory(kind, tmp_path) == pytest.approx(golden, rel=5e-3)


def test_bad_input(run: Path, tmp_path: Path) -> None:
    data, task = run.parent / "data", kind_of(run)
    other = {"detect": "mask", "instances": "faster"}[task]
    for changes, reason in (
        ({"class_weights": "balanced"}, f"class_weights balanced is not for task {task}"),
        ({"head": other}, f"head {other} is not for task {task}: use auto"),
        ({"augment": {"mixup": 0.2}}, "mixup and cutmix blend classes"),
        ({"augment": {"randaugment": "rand-m5-inc1"}}, "moves pixels, but neither masks nor boxes"),
        ({"optim": {"layer_decay": 0.9}, "model": "resnet18"}, "use --optim.layer_decay 1"),
    ):
        with pytest.raises(InputError, match=reason):
            finetune(config_for(data, task=task, out=tmp_path / "new", **changes))
    images = str(data / "val")
    with pytest.raises(InputError, match=r"must be a file ending in .json"):
        predict(PredictConfig(str(run), images=images, out=str(tmp_path / "x.csv")))
    with pytest.raises(InputError, match="has no objects of split 'night'"):
        evaluate(EvaluateConfig(str(run), data=str(data), split="night"))
    other_data = write_voc(tmp_path / "voc")
    with pytest.raises(InputError, match="has no objects of split 'night'"):
        evaluate(EvaluateConfig(str(run), data=str(other_data), split="night"))
    if task == "detect":
        numbers = str(write_label_images(tmp_path / "numbers"))
        with pytest.raises(InputError, match="classes that training does not have: 'object'"):
            evaluate(EvaluateConfig(str(run), data=numbers))


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    data = write_coco(tmp_path / "data", coco_file(masks=False))
    with pytest.raises(InputError, match=r"pip install 'fcmae\[detect\]'"):
        finetune(config_for(data))


def test_measurements_without_images() -> None:
    for kind in (Detect(["a"]), Instances(["a"])):
        empty = kind.measurement(ALONE)
        assert isinstance(empty, ObjectMeasurement)
        assert math.isnan(empty.compute()["ap"])
        assert empty.result()["per_class"] == {}
        assert empty.draw() is not None


def test_the_predictor_is_replaced_by_float32() -> None:
    """A hook on each layer whose outputs are boxes, scores or masks."""
    model = detector("cascade", True)
    parts = [part for part in model.modules() if isinstance(part, FastRCNNPredictor)]
    assert len(parts) == 3
    assert all(part._forward_hooks for part in [*parts, model.rpn.head])
