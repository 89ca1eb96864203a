"""Faster, Mask and Cascade R-CNN of torchvision's parts over a timm backbone."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import (
    FasterRCNN,
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference
from torchvision.ops import (
    FeaturePyramidNetwork,
    MultiScaleRoIAlign,
    clip_boxes_to_image,
    generalized_box_iou_loss,
    roi_align,
)
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from finetune.backbone import start_on_features
from finetune.model import Start

STRIDES = (4, 8, 16, 32)
LAST_STRIDE = 64
WIDEST = 256
"""Channels of the pyramid in the papers."""

HIDDEN = 1024
"""Units of the box head in the papers, for a pyramid of `WIDEST` channels."""

MOST_FOUND = 500
"""Largest number of objects found in an image."""

RATIOS = (0.5, 1.0, 2.0)

IOUS = (0.5, 0.6, 0.7)
CODERS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
LOSS_WEIGHTS = (1.0, 0.5, 0.25)
GIOU = 10.0
"""Settings of the three stages of a cascade, and the weight of its box loss (arXiv 2201.03545,
appendix A.3: those of the official configs)."""

MASK_STD = 0.001
"""Standard deviation of the initial weights of a mask's scores."""


class Pyramid(nn.Module):
    """Feature pyramid over the stages of a timm model, each normalised first (LayerNorm over the
    channels, as in the papers' code for detection).

    Args:
        name: timm's name of the backbone.
        args: its arguments that differ from timm's defaults.
        in_chans: channels of the images.
        width: channels of the pyramid; None takes twice the first stage's, at most 256.

    Attributes:
        body: the backbone.
        out_channels: the width.

    Raises:
        ValueError: the backbone has no features of strides 4 to 32.
    """

    def __init__(
        self, name: str, args: Mapping[str, Any], in_chans: int, width: int | None
    ) -> None:
        super().__init__()
        with torch.device("meta"):
            every: Any = timm.create_model(name, features_only=True, in_chans=in_chans, **args)
        strides = every.feature_info.reduction()
        levels = [n for n, stride in enumerate(strides) if stride in STRIDES]
        if len(levels) != len(STRIDES):
            raise ValueError(f"its strides are {strides}")
        self.body: Any = timm.create_model(
            name, features_only=True, in_chans=in_chans, out_indices=levels, **args
        )
        channels = [every.feature_info.channels()[level] for level in levels]
        self.out_channels = width or min(2 * channels[0], WIDEST)
        self.norms = nn.ModuleList(nn.LayerNorm(c, eps=1e-6) for c in channels)
        self.fpn = FeaturePyramidNetwork(channels, self.out_channels, LastLevelMaxPool())

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Return the levels by name: 0 to 3 of strides 4 to 32, and pool of 64."""
        maps = OrderedDict()
        for level, (norm, map_) in enumerate(zip(self.norms, self.body(images_BCHW), strict=True)):
            last = map_ if self.body.output_fmt == "NHWC" else map_.permute(0, 2, 3, 1)
            maps[str(level)] = norm(last).permute(0, 3, 1, 2)
        return self.fpn(maps)


class Detector(nn.Module):
    """A detector of objects' boxes, and of their masks if the head is to.

    Args:
        pyramid: the features.
        classes: their number, without the background.
        head: faster, mask or cascade; the first two differ in `masks` only.
        masks: whether to predict masks.
        anchor: side in pixels of the smallest anchors; those of the next level are twice as large.

    Attributes:
        inside: what precedes the names of the backbone's parameters.
        num_features, pretrained_cfg: those of the backbone, for its timm folder; set by
            `start_detector`.
    """

    inside = "pyramid.body."

    def __init__(self, pyramid: Pyramid, classes: int, head: str, masks: bool, anchor: int) -> None:
        super().__init__()
        self.pyramid = pyramid
        width, outputs = pyramid.out_channels, classes + 1
        hidden = HIDDEN * width // WIDEST
        sizes = tuple((anchor << level,) for level in range(len(STRIDES) + 1))
        net = FasterRCNN(
            pyramid,
            rpn_anchor_generator=Anchors(sizes, (RATIOS,) * len(sizes)),
            box_head=nn.Identity(),  # `StagedHeads` has them
            box_predictor=nn.Identity(),
            box_detections_per_img=MOST_FOUND,
        )
        self.rpn = net.rpn
        self.heads = StagedHeads(net.roi_heads, head == "cascade", masks, width, hidden, outputs)
        # In bfloat16, differences of boxes would be rounded once more.
        for part in self.modules():
            if part is self.rpn.head or isinstance(part, FastRCNNPredictor | MaskRCNNPredictor):
                part.register_forward_hook(_as_float)
        self.num_features = 0
        self.pretrained_cfg: dict[str, Any] = {}

    @property
    def backbone(self) -> nn.Module:
        """The timm model that gives features."""
        return self.pyramid.body

    def forward(self, images_BCHW: Tensor, targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Return the loss, if the model is training; else what it finds in each image.

        Sides that are not multiples of 64, the stride of the last level, are padded with zeros.

        Args:
            images_BCHW: normalised.
            targets: of each image `boxes` (N, 4), `labels` (N,) from 1, and perhaps `masks`.

        Returns:
            The sum of all losses; or of each image `boxes` (N, 4), `labels`, `scores`, and with
            masks `masks` (N, 1, 28, 28), probabilities inside the boxes.
        """
        h, w = images_BCHW.shape[2:]
        padded = F.pad(images_BCHW, (0, -w % LAST_STRIDE, 0, -h % LAST_STRIDE))
        levels, sizes = self.pyramid(padded), [(h, w)] * len(images_BCHW)
        proposals, losses = self.rpn(ImageList(padded, sizes), levels, targets)
        found, further = self.heads(levels, proposals, sizes, targets)
        if not self.training:
            return found
        return torch.stack([*losses.values(), *further.values()]).sum()


class Anchors(AnchorGenerator):
    """Anchors in float32, whatever the features are in: bfloat16 has 8 bits for a position."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        empty = feature_maps[0].new_empty((), dtype=torch.float32)
        return super().forward(image_list, [empty.expand(map_.shape) for map_ in feature_maps])


def _as_float(_module: nn.Module, _args: Any, outputs: Any) -> Any:
    """Return outputs of a layer, of any nesting, in float32."""
    if isinstance(outputs, Tensor):
        return outputs.float()
    return type(outputs)(_as_float(_module, _args, part) for part in outputs)


class StagedHeads(RoIHeads):
    """Box and mask heads in stages, each trained on the boxes of the one before it.

    One stage is that of Faster and Mask R-CNN, with torchvision's box head and losses. Three are a
    cascade (Cascade R-CNN, arXiv 1712.00726): each with a higher threshold for a match, and with
    the papers' settings, four convolutions and a layer of units, GIoU loss on decoded boxes, a box
    for each class. Scores before softmax, and masks, are averaged over the stages.

    Args:
        plain: torchvision's heads, whose pooling, sampling and limits are kept.
        cascade: whether there are three stages.
        masks: whether there are mask heads.
        width: channels of the pyramid.
        hidden: units of the last layer before the outputs.
        outputs: classes and the background.
    """

    def __init__(
        self,
        plain: RoIHeads,
        cascade: bool,
        masks: bool,
        width: int,
        hidden: int,
        outputs: int,
    ) -> None:
        sampler = plain.fg_bg_sampler
        super().__init__(
            plain.box_roi_pool, None, None, IOUS[0], IOUS[0], sampler.batch_size_per_image,
            sampler.positive_fraction, None, plain.score_thresh, plain.nms_thresh,
            plain.detections_per_img,
        )  # fmt: skip
        self.cascade = cascade
        self.pool_masks = MultiScaleRoIAlign(plain.box_roi_pool.featmap_names, 14, 2)
        self.stages = [*zip(IOUS, CODERS, LOSS_WEIGHTS, strict=True)][: None if cascade else 1]
        self.coders = [BoxCoder(weights) for _, weights, _ in self.stages]
        self.box_heads, self.predictors = nn.ModuleList(), nn.ModuleList()
        self.mask_heads, self.mask_predictors = nn.ModuleList(), nn.ModuleList()
        for _ in self.stages:
            self.box_heads.append(
                FastRCNNConvFCHead((width, 7, 7), [width] * 4, [hidden], nn.BatchNorm2d)
                if cascade
                else TwoMLPHead(width * 7**2, hidden)
            )
            self.predictors.append(FastRCNNPredictor(hidden, outputs))
            if masks:
                self.mask_heads.append(MaskRCNNHeads(width, (width,) * 4, 1))
                predictor = MaskRCNNPredictor(width, width, outputs)
                # As in Detectron: torchvision's are larger, the fewer the classes.
                nn.init.normal_(predictor.mask_fcn_logits.weight, std=MASK_STD)
                nn.init.zeros_(predictor.mask_fcn_logits.bias)
                self.mask_predictors.append(predictor)

    def has_mask(self) -> bool:
        return len(self.mask_heads) > 0

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """See torchvision's `RoIHeads`."""
        if self.training:
            assert targets is not None
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._found(features, proposals, image_shapes), {}

    def _losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        losses = {}
        for stage, (iou, _, weight) in enumerate(self.stages):
            self.proposal_matcher = Matcher(iou, iou, allow_low_quality_matches=False)
            self.box_coder = self.coders[stage]
            boxes, matched, labels, moves = self.select_training_samples(proposals, targets)
            scores, deltas = self._stage(stage, features, boxes, image_shapes)
            if self.has_mask():
                losses[f"mask_{stage}"] = weight * self._mask_loss(
                    stage, features, boxes, image_shapes, targets, labels, matched
                )
            if not self.cascade:
                losses["class_0"], losses["box_0"] = fastrcnn_loss(scores, deltas, labels, moves)
                break
            every = torch.cat(labels)
            decoded = self._decoded(stage, deltas, torch.cat(boxes))
            pos = every > 0
            wanted = torch.cat([
                target["boxes"][index] if len(target["boxes"]) else part
                for target, index, part in zip(targets, matched, boxes, strict=True)
            ])  # fmt: skip
            guessed = decoded[pos, every[pos]]
            giou = generalized_box_iou_loss(guessed, wanted[pos], reduction="sum") / len(every)
            losses[f"class_{stage}"] = weight * F.cross_entropy(scores, every)
            losses[f"box_{stage}"] = weight * GIOU * giou
            # A box of the background is refined as the most probable class.
            best = torch.where(pos, every, scores[:, 1:].argmax(1) + 1)
            counts = [len(part) for part in boxes]
            refined = self._refined(decoded, best, counts, image_shapes)
            # The true boxes are added again in the next stage.
            proposals = [
                part[~_among(own, target["boxes"])]
                for part, own, target in zip(refined, boxes, targets, strict=True)
            ]
        return losses

    def _found(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        total: Tensor | float = 0.0
        for stage in range(len(self.stages)):
            scores, deltas = self._stage(stage, features, proposals, image_shapes)
            total = total + scores / len(self.stages)
            if stage + 1 < len(self.stages):
                decoded = self._decoded(stage, deltas, torch.cat(proposals))
                best = scores[:, 1:].argmax(1) + 1
                counts = [len(part) for part in proposals]
                proposals = self._refined(decoded, best, counts, image_shapes)
        self.box_coder = self.coders[-1]
        assert isinstance(total, Tensor)
        found = self.postprocess_detections(total, deltas, proposals, image_shapes)
        result = [
            {"boxes": boxes, "scores": scores, "labels": labels}
            for boxes, scores, labels in zip(*found, strict=True)
        ]
        if self.has_mask():
            boxes, labels = found[0], found[2]
            pooled = self.pool_masks(features, boxes, image_shapes)
            parts = [
                maskrcnn_inference(predictor(head(pooled)), labels)
                for head, predictor in zip(self.mask_heads, self.mask_predictors, strict=True)
            ]
            for entry, *stages in zip(result, *parts, strict=True):
                entry["masks"] = torch.stack(stages).mean(0)
        return result

    def _stage(
        self,
        stage: int,
        features: dict[str, Tensor],
        boxes: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[Tensor, Tensor]:
        pooled = self.box_roi_pool(features, boxes, image_shapes)
        return self.predictors[stage](self.box_heads[stage](pooled))

    def _decoded(self, stage: int, deltas: Tensor, boxes: Tensor) -> Tensor:
        """The box of each class (N, K, 4)."""
        return self.coders[stage].decode(deltas, [boxes]).reshape(len(boxes), -1, 4)

    def _refined(
        self,
        decoded: Tensor,
        labels: Tensor,
        counts: Sequence[int],
        image_shapes: list[tuple[int, int]],
    ) -> list[Tensor]:
        """The boxes of one class each, per image, without a gradient."""
        chosen = decoded.detach()[torch.arange(len(labels), device=labels.device), labels]
        parts = zip(chosen.split(list(counts)), image_shapes, strict=True)
        return [clip_boxes_to_image(part, shape) for part, shape in parts]

    def _mask_loss(
        self,
        stage: int,
        features: dict[str, Tensor],
        boxes: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
        labels: list[Tensor],
        matched: list[Tensor],
    ) -> Tensor:
        there = [label > 0 for label in labels]
        kept = [part[pos] for part, pos in zip(boxes, there, strict=True)]
        own = [part[pos] for part, pos in zip(matched, there, strict=True)]
        pooled = self.pool_masks(features, kept, image_shapes)
        logits = self.mask_predictors[stage](self.mask_heads[stage](pooled))
        classes = torch.cat([
            target["labels"][index] for target, index in zip(targets, own, strict=True)
        ])  # fmt: skip
        # torchvision's own loss samples masks half a pixel off their centres.
        wanted = torch.cat([
            roi_align(
                target["masks"][:, None].to(part), torch.cat([index[:, None].to(part), part], 1),
                logits.shape[-1], aligned=True,
            )[:, 0]
            for target, index, part in zip(targets, own, kept, strict=True)
        ])  # fmt: skip
        if not len(wanted):
            return logits.sum() * 0  # the mean of nothing is not finite
        every = torch.arange(len(classes), device=classes.device)
        return F.binary_cross_entropy_with_logits(logits[every, classes], wanted)


def _among(boxes: Tensor, others: Tensor) -> Tensor:
    """Which boxes (N, 4) are exactly one of the others (M, 4)."""
    return (boxes[:, None] == others).all(2).any(1)


def start_detector(
    start: Start,
    in_chans: int,
    classes: int,
    head: str,
    masks: bool,
    width: int | None,
    anchor: int,
    drop_path: float,
) -> tuple[Detector, dict[str, Any]]:
    """Build a detector with its initial weights; see `start_on_features`."""

    def build(name: str, args: Mapping[str, Any]) -> Detector:
        pyramid = Pyramid(name, args, in_chans, width)
        model = Detector(pyramid, classes, head, masks, anchor)
        with torch.device("meta"):
            whole: Any = timm.create_model(name, num_classes=0, in_chans=in_chans, **args)
        model.num_features, model.pretrained_cfg = whole.num_features, whole.pretrained_cfg
        return model

    return start_on_features(start, in_chans, drop_path, build, "a feature pyramid")
