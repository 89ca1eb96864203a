"""Settings of fine-tuning. Does not import torch, so `--help` is instant."""

from dataclasses import dataclass
from math import inf
from typing import Literal

from fcmae.config.fields import (
    DATA,
    IMAGES,
    MODEL,
    OPTIMISATION,
    WEIGHTS,
    LabelsConfig,
    runtime,
    setting,
)
from fcmae.config.training import AugmentBase, OptimConfig, TrainingConfig


@dataclass
class FinetuneOptimConfig(OptimConfig):
    """AdamW with layer-wise rates, warm-up, and decay after it, both per step."""

    base_lr: float = 1.6e-2
    """Learning rate of the head for a batch of 256; the actual rate is base_lr * batch_size / 256:
    2e-3 for a batch of 32. The default suits small data sets; the paper's 2e-4 to 1.25e-3 suits
    ImageNet."""

    betas: list[float] = setting([0.9, 0.999])

    warmup_epochs: float | None = None
    """Epochs of linear warm-up. null uses 10 % of all steps, at most 40 epochs, but at least 100
    steps, or half of a run of fewer than 200. A run of N steps, fewer than 50, reaches N / 50 of
    the learning rate. With freeze backbone, null always uses 10 %."""

    layer_decay: float = setting(1.0, above=0, at_most=1)
    """Factor on the learning rate from each layer to the one before it, to preserve the early
    layers; 1 treats all equally. Weights trained on a million images work better with less, such as
    0.9."""

    layer_group: Literal["single", "group"] = "single"
    """What counts as a layer for layer_decay: a block (single), or a group of three blocks (group;
    the paper's choice for base and large)."""


@dataclass
class FinetuneAugmentConfig(AugmentBase):
    """Training crops and augmentation, and normalisation of pixels."""

    crop_scale: list[float] = setting([0.35, 1.0])

    randaugment: str = ""
    """timm's RandAugment string, such as rand-m9-mstd0.5-inc1 (the paper's); '' disables it."""

    color_jitter: float = setting(0.0, at_least=0, at_most=1)
    """Strength of random brightness, contrast and saturation, 0 to 1. Not used with randaugment."""

    mixup: float = setting(0.0, at_least=0, below=inf)
    """Alpha of mixup, which blends two images and their classes; 0 disables it, 0.8 is strong."""

    cutmix: float = setting(0.0, at_least=0, below=inf)
    """Alpha of cutmix, which pastes a part of another image; 0 disables it, 1 is strong."""

    scale_jitter: list[float] = setting([0.5, 2.0], above=0, below=inf, length=2, ascending=True)
    """Range of the random factor by which images with masks or objects are resized before they are
    cropped; crop_scale and crop_ratio do not apply to them."""

    short_side: int | None = setting(None, at_least=32)
    """Resize images with masks or objects to this shorter side in pixels, in training and
    evaluation, before scale_jitter. null leaves their size. The papers use 512 for ADE20K and 800
    for COCO."""

    random_erasing: float = setting(0.0, at_least=0, at_most=1)
    """Fraction of the samples in which a random box is erased, 0 to 1. The paper uses 0.25. A mask
    keeps its classes there."""

    label_smoothing: float = setting(0.1, at_least=0, below=1)
    """Fraction of each label to spread evenly over all classes, 0 to 1. Only with one class per
    image."""

    mean: Literal["weights", "imagenet", "data"] | list[float] = "weights"
    """Mean to subtract from each channel, for pixels between 0 and 1: 'weights' (the one used in
    pretraining, else imagenet), 'imagenet', 'data' (measured) or one number per channel."""

    std: Literal["weights", "imagenet", "data"] | list[float] = "weights"

    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Interpolation for resizing images."""

    crop_pct: float = setting(0.875, above=0, at_most=1)
    """Fraction of the resized image's side that evaluation crops from its centre, 0 to 1."""


@dataclass
class FinetuneConfig(LabelsConfig, TrainingConfig):
    """Train a timm model on labelled images, from pretrained weights or from scratch."""

    data: str = setting(path="a folder of labelled images or a CSV file of labels")
    """Labelled images: a folder with train/CLASS and val/CLASS, one folder of classes together with
    val_fraction, a folder of images and masks, a dataset as hf:PATH_OR_NAME, or a CSV file; see
    labels."""

    task: str = setting("auto", group=DATA)
    """Kind of label: classify (a class per image), multilabel (several), regress (numbers), segment
    (a class per pixel), detect (boxes), instances (a mask per object), or auto, which recognises
    the layout of data or labels."""

    weights: str = setting("none", path=f"none, {WEIGHTS}", words=("none",), group=MODEL)
    """Pretrained weights: a converted folder, a pretraining run (converted automatically), a
    fine-tuning run (its best weights), or none, which trains from scratch."""

    model: str | None = setting(None, group=MODEL)
    """Size of the ConvNeXt V2 (atto to huge) or the name of any timm model, such as resnet50. null
    uses that of the weights, or atto from scratch."""

    img_size: int | list[int] = setting(224, multiple=1)
    """Side of the square crops in pixels, or '[HEIGHT,WIDTH]'."""

    val_fraction: float = setting(0.0, at_least=0, below=1, example="0.2", group=DATA)
    """Fraction of a single folder of classes or of images and masks, or of a CSV file without
    splits, held out for validation, chosen by a hash of the path. 0 expects train and val."""

    class_weights: Literal["none", "balanced"] = setting("none", group=OPTIMISATION)
    """balanced weights the loss of classes by the inverse of their frequency; with several labels
    per image, that of present labels by the ratio of images without and with it."""

    regress_loss: Literal["huber", "squared"] = setting("huber", group=OPTIMISATION)
    """Loss of standardised numbers; huber is linear beyond one standard deviation, so it limits the
    effect of outliers."""

    head: Literal["auto", "upernet", "faster", "mask", "cascade"] = setting("auto", group=MODEL)
    """What is put on the backbone: upernet for masks, faster (R-CNN) or cascade for boxes, mask
    (R-CNN) or cascade for objects with masks. auto takes the first of these, and a linear layer for
    the other tasks."""

    decoder_channels: Literal["auto"] | int = setting("auto", at_least=8, group=MODEL)
    """Width of the decoder for masks or of the feature pyramid for objects. auto takes twice that
    of the first stage, at most 512 or 256, which the papers use."""

    anchor_size: Literal["auto"] | int = setting("auto", at_least=4, group=MODEL)
    """Side in pixels of the smallest boxes that a detector starts from; the papers use 32. auto
    takes 4 to 32, so that at most a tenth of the objects are smaller."""

    aux_weight: float = setting(0.4, at_least=0, below=inf, group=OPTIMISATION)
    """Weight of the loss of the auxiliary head for masks; 0 builds none."""

    dice_weight: float = setting(1.0, at_least=0, below=inf, group=OPTIMISATION)
    """Weight of the Dice loss for masks, beside cross-entropy; the papers use 0."""

    freeze: Literal["none", "backbone"] = setting("none", group=MODEL)
    """backbone trains only the head; none trains everything."""

    epochs: Literal["auto"] | int = "auto"
    """Passes over the training images. auto chooses 20 to 200, more for fewer images: about 60,000
    crops in total."""

    batch_size: int = 32

    optim: FinetuneOptimConfig = setting(FinetuneOptimConfig)

    augment: FinetuneAugmentConfig = setting(FinetuneAugmentConfig)

    drop_path: float = 0.1

    init: Literal["fan_in", "paper"] = setting("fan_in", group=MODEL)
    """Initial weights of a ConvNeXt trained from scratch. fan_in keeps the signal's variance from
    layer to layer and learns in hundreds of steps; paper keeps timm's, of standard deviation 0.02,
    which need thousands."""

    head_init_scale: float | None = setting(None, at_least=0, below=inf, example="1", group=MODEL)
    """Factor on the initial weights of the head. null uses the paper's 0.001 with pretrained
    weights, which protects them from the head's first errors, and 1 from scratch, where 0.001 costs
    a hundred steps. Not used for masks."""

    val_epochs: Literal["auto"] | int = setting("auto", at_least=1, group=OPTIMISATION)
    """Epochs between two evaluations on the validation images, which select the best weights. auto
    evaluates about 30 times in total."""

    ema_decay: float | None = setting(0.998, above=0, below=1, group=OPTIMISATION)
    """Decay per step of an exponential moving average of the weights, which is evaluated too, 0 to
    1; it starts lower and rises. null disables it. Longer training needs a slower decay: the paper
    uses 0.9999."""

    compile: bool = False
    """Compile training steps with torch.compile: steps are faster, but a run takes a minute longer
    to start. Needs a C++ compiler."""

    near_duplicates: str | None = runtime(None, path=IMAGES, group=DATA)
    """Folder of images, such as the unlabelled ones of pretraining, to search for near-duplicates
    of val, which would inflate the result. They are listed in near_duplicates.jsonl. null disables
    the search."""
