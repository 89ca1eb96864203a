"""What fine-tuning can be asked for. Free of torch, so that `--help` is instant."""

from dataclasses import dataclass
from math import inf
from typing import Literal

from fcmae.config.fields import DATA, IMAGES, MODEL, OPTIMISATION, WEIGHTS, runtime, setting
from fcmae.config.training import AugmentBase, OptimBase, TrainingConfig


@dataclass
class FinetuneOptimConfig(OptimBase):
    """AdamW with layer-wise rates, a warm-up and a cosine to zero, both per step."""

    base_lr: float = 1.6e-2
    """Learning rate of the head at batch 256; the rate used is base_lr * batch_size / 256, so 2e-3
    at batch 32. The default suits small data; the paper's 2e-4 to 1.25e-3 suits ImageNet."""

    betas: list[float] = setting([0.9, 0.999])

    warmup_epochs: float | None = None
    """Epochs of linear warm-up. null takes 10 % of all steps, at most 40 epochs, but at least 100
    steps, or half of a run of fewer than 200. A run of N steps, fewer than 50, reaches N / 50 of
    the learning rate. freeze backbone takes 10 % at any length."""

    layer_decay: float = setting(1.0, above=0, at_most=1)
    """Factor on the learning rate from each layer to the one before it, which preserves the early
    layers; 1 treats all equally. Weights trained on a million images prefer less, such as 0.9."""

    layer_group: Literal["single", "group"] = "single"
    """What layer_decay counts as a layer: a block, or a group of three blocks (the paper's choice
    for base and large)."""


@dataclass
class FinetuneAugmentConfig(AugmentBase):
    """How a training sample is made from an image, and how pixels become numbers."""

    crop_scale: list[float] = setting([0.35, 1.0])

    randaugment: str = ""
    """timm's RandAugment string, such as rand-m9-mstd0.5-inc1 (the paper's); '' is off."""

    color_jitter: float = setting(0.0, at_least=0, at_most=1)
    """Strength of random brightness, contrast and saturation, 0 to 1. Not used with randaugment."""

    mixup: float = setting(0.0, at_least=0, below=inf)
    """Alpha of mixup, which blends two images and their labels; 0 is off, 0.8 is strong."""

    cutmix: float = setting(0.0, at_least=0, below=inf)
    """Alpha of cutmix, which pastes a part of another image; 0 is off, 1 is strong."""

    random_erasing: float = setting(0.0, at_least=0, at_most=1)
    """Share of the samples in which a random box is erased, 0 to 1. The paper takes 0.25."""

    label_smoothing: float = setting(0.1, at_least=0, below=1)
    """Share of the label spread evenly over all classes, 0 to 1."""

    mean: Literal["weights", "imagenet", "data"] | list[float] = "weights"
    """Subtracted from each channel, in units of the full range 0 to 1: 'weights' (what the weights
    were pretrained with, else imagenet), 'imagenet', 'data' (measured) or one number per
    channel."""

    std: Literal["weights", "imagenet", "data"] | list[float] = "weights"

    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How images are resized."""

    crop_pct: float = setting(0.875, above=0, at_most=1)
    """Share of the resized image's side that evaluation keeps, from its centre, 0 to 1."""


@dataclass
class FinetuneConfig(TrainingConfig):
    """Train a timm model on labelled images, from pretrained weights or from scratch."""

    data: str
    """Labelled images: a folder with train/CLASS and val/CLASS, or one folder of classes together
    with val_fraction."""

    weights: str = setting("none", path=f"none, {WEIGHTS}", words=("none",), group=MODEL)
    """Pretrained weights: a converted folder, a run folder of pretraining (converted automatically)
    or of fine-tuning (its best weights), or none, which trains from scratch."""

    model: str | None = setting(None, group=MODEL)
    """Size of the ConvNeXt V2 (atto to huge) or the name of any timm model, such as resnet50. null
    takes that of the weights, and atto from scratch."""

    img_size: int | list[int] = setting(224, multiple=1)
    """Side of the square crops in pixels, or '[HEIGHT,WIDTH]'."""

    val_fraction: float = setting(0.0, at_least=0, below=1, example="0.2", group=DATA)
    """Share of one folder of classes kept for validation, chosen by a hash of the path. 0 expects
    the folders train and val."""

    freeze: Literal["none", "backbone"] = setting("none", group=MODEL)
    """backbone trains the head alone; none trains everything."""

    epochs: Literal["auto"] | int = "auto"
    """Passes over the training images. auto takes 20 to 200, the more the fewer images there are:
    about 60,000 crops in all."""

    batch_size: int = 32

    optim: FinetuneOptimConfig = setting(FinetuneOptimConfig)

    augment: FinetuneAugmentConfig = setting(FinetuneAugmentConfig)

    drop_path: float = 0.1

    init: Literal["fan_in", "model"] = setting("fan_in", group=MODEL)
    """How a ConvNeXt starts without pretrained weights. fan_in keeps the signal's variance from
    layer to layer, and learns in hundreds of steps; model keeps timm's weights of deviation 0.02
    (the paper's), which need thousands."""

    head_init_scale: float | None = setting(None, at_least=0, below=inf, example="1", group=MODEL)
    """Factor on the initial weights of the head. null takes the paper's 0.001 with pretrained
    weights, which protects them from the head's first errors, and 1 from scratch, where 0.001 costs
    a hundred steps."""

    val_epochs: Literal["auto"] | int = setting("auto", at_least=1, group=OPTIMISATION)
    """Epochs between two measurements on the validation images, among which the best weights are
    chosen. auto measures about 30 times in all."""

    ema_decay: float | None = setting(0.998, above=0, below=1, group=OPTIMISATION)
    """Decay per step of the averaged weights that are evaluated too, 0 to 1; starts lower and
    rises. null keeps none. Longer training needs a longer memory: the paper takes 0.9999."""

    compile: bool = False
    """Compile training's forward and backward with torch.compile: a minute at the start of a run
    for faster steps. Needs a C++ compiler."""

    near_duplicates: str | None = runtime(None, path=IMAGES, group=DATA)
    """Folder of images, such as the unlabeled ones of pretraining, to search for near-duplicates of
    val: they would flatter the result. They are listed in near_duplicates.jsonl; null searches
    none."""
