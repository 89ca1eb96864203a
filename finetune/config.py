"""What fine-tuning, evaluation and prediction can be asked for. Free of torch.

The string under a field is its `--help` text; see fcmae/config.py.
"""

from dataclasses import dataclass, field
from typing import Literal

from fcmae.config.pretraining import Precision
from fcmae.config.values import (
    MAX_PIXELS,
    check_channels,
    check_crop,
    check_optim,
    check_range,
    check_runtime,
    height_width,
)


@dataclass
class FinetuneOptimConfig:
    """AdamW with layer-wise rates, a warm-up and a cosine to zero, both per step."""

    base_lr: float = 1.6e-2
    """Learning rate of the head at batch 256; the rate used is base_lr * batch_size / 256, so 2e-3
    at batch 32. The default suits small data; the paper's 2e-4 to 1.25e-3 suits ImageNet."""

    weight_decay: float = 0.05
    """AdamW's weight decay. Biases, norms and GRN are exempt."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's two averaging rates, '[FIRST,SECOND]'."""

    layer_decay: float = 1.0
    """Factor on the learning rate from each layer to the one before it, which spares the early
    layers; 1 treats all alike. Weights that saw a million pictures want less, such as 0.9."""

    layer_group: Literal["single", "group"] = "single"
    """What layer_decay counts as a layer: a block, or a group of three blocks (the paper's choice
    for base and large)."""

    warmup_epochs: float | None = None
    """Epochs of linear warm-up. null takes 10 % of all steps, at most 40 epochs."""

    clip_grad: float | None = None
    """Largest norm of the whole gradient; a longer one is scaled down. null does not clip."""

    def __post_init__(self) -> None:
        check_optim(self)
        check_range(self, ["layer_decay"], above=0, at_most=1, prefix="optim.")


@dataclass
class FinetuneAugmentConfig:
    """How a training sample is made from a picture, and how pixels become numbers."""

    crop_scale: list[float] = field(default_factory=lambda: [0.35, 1.0])
    """Smallest and largest share of the picture's area that a crop takes, '[LOW,HIGH]'."""

    crop_ratio: list[float] = field(default_factory=lambda: [0.75, 1.3333])
    """Narrowest and widest crop, as width / height before it is resized, '[LOW,HIGH]'."""

    hflip: bool = True
    """Mirror half of the samples left to right. Turn off where the two differ, as in text."""

    vflip: bool = False
    """Mirror half of the samples top to bottom. For pictures without an up, such as cells."""

    fast_decode: bool = False
    """Decode a JPEG much larger than the crop wants at 1/2, 1/4 or 1/8 of its size: several times
    as fast on photographs of many megapixels, with slightly other pixels. Training only."""

    randaugment: str = ""
    """timm's RandAugment string, such as rand-m9-mstd0.5-inc1 (the paper's); '' is off."""

    color_jitter: float = 0.0
    """Strength of random brightness, contrast and saturation, 0 to 1. Not used with randaugment."""

    mixup: float = 0.0
    """Alpha of mixup, which blends two images and their labels; 0 is off, 0.8 is strong."""

    cutmix: float = 0.0
    """Alpha of cutmix, which pastes a part of another image; 0 is off, 1 is strong."""

    random_erasing: float = 0.0
    """Share of the samples in which a random box is erased, 0 to 1. The paper takes 0.25."""

    label_smoothing: float = 0.1
    """Share of the label spread evenly over all classes, 0 to 1."""

    mean: Literal["weights", "imagenet", "data"] | list[float] = "weights"
    """Subtracted from each channel, in units of the full range 0 to 1: 'weights' (what the weights
    were pretrained with, else imagenet), 'imagenet', 'data' (measured) or one number a channel."""

    std: Literal["weights", "imagenet", "data"] | list[float] = "weights"
    """Each channel is divided by it after the mean is subtracted; the same choices as for mean."""

    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How pictures are resized."""

    crop_pct: float = 0.875
    """Share of the resized picture's side that evaluation keeps, from its centre, 0 to 1."""

    def __post_init__(self) -> None:
        check_crop(self)
        shares = ["color_jitter", "random_erasing"]
        check_range(self, shares, at_least=0, at_most=1, prefix="augment.")
        check_range(self, ["mixup", "cutmix"], at_least=0, below=float("inf"), prefix="augment.")
        check_range(self, ["label_smoothing"], at_least=0, below=1, prefix="augment.")
        check_range(self, ["crop_pct"], above=0, at_most=1, prefix="augment.")


@dataclass
class FinetuneConfig:
    """Train a timm model on labelled images, from pretrained weights or from scratch.

    The fields down to `seed` decide the result; those after it (RUNTIME_KEYS) may change when a run
    is resumed.
    """

    data: str
    """Labelled images: a folder with train/CLASS and val/CLASS, or one folder of classes together
    with val_fraction."""

    out: str
    """Run folder to write: checkpoints, logs and the model for timm. An unfinished run that is
    there is resumed."""

    weights: str = "none"
    """Pretrained weights: a converted folder, a run folder of pretraining (converted on the way) or
    of fine-tuning (its best weights), or none, which trains from scratch."""

    model: str | None = None
    """Size of the ConvNeXt V2 (atto to huge) or the name of any timm model, such as resnet50. null
    takes that of the weights, and atto from scratch."""

    in_chans: int = 3
    """Channels of the images: 1 reads them as grey, 3 as RGB, 4 as RGB and alpha; more
    need .npy."""

    img_size: int | list[int] = 224
    """Side of the square crops in pixels, or '[HEIGHT,WIDTH]'."""

    val_fraction: float = 0.0
    """Share of one folder of classes kept for validation, chosen by a hash of the path. 0 expects
    the folders train and val."""

    freeze: Literal["none", "backbone"] = "none"
    """backbone trains the head alone; none trains everything."""

    epochs: Literal["auto"] | int = "auto"
    """Passes over the training images. auto takes 20 to 200, the more the fewer images there are:
    about 60,000 crops in all."""

    batch_size: int = 32
    """Images per step, over all processes and accumulated parts together."""

    accumulate: int = 1
    """Parts that a step is computed in, to save memory. Processes x accumulate divide
    batch_size."""

    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)

    augment: FinetuneAugmentConfig = field(default_factory=FinetuneAugmentConfig)

    drop_path: float = 0.1
    """Largest share of samples for which a block is skipped; grows linearly with depth."""

    init: Literal["fan_in", "model"] = "fan_in"
    """How a ConvNeXt starts without pretrained weights. fan_in keeps the signal's variance from
    layer to layer, and learns in hundreds of steps; model leaves timm's weights of deviation 0.02
    (the paper's), which want thousands."""

    head_init_scale: float | None = None
    """Factor on the initial weights of the head. null takes the paper's 0.001 with pretrained
    weights, which it spares the head's first errors, and 1 from scratch, where 0.001 costs a
    hundred steps."""

    val_epochs: Literal["auto"] | int = "auto"
    """Epochs between two measurements on the validation images, among which the best weights are
    chosen. auto measures some 30 times in all."""

    ema_decay: float | None = 0.998
    """Decay a step of the averaged weights that are evaluated too, 0 to 1; starts lower and rises.
    null keeps none. Longer training wants a longer memory: the paper takes 0.9999."""

    seed: int = 0
    """Decides the initial weights, the order and the augmentation."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps or auto, which takes a GPU where there is one."""

    precision: Precision = "auto"
    """fp32, bf16 (autocast; the weights stay float32) or auto, which takes bf16 where it is
    faster."""

    workers: Literal["auto"] | int = "auto"
    """Processes that read images, per training process; 0 reads in the training process."""

    compile: bool = False
    """Compile training's forward and backward with torch.compile: a minute at the start of a run
    for faster steps. Needs a C++ compiler."""

    resume: str = "auto"
    """auto goes on from the newest good checkpoint in out; never wants an empty out; or the path of
    a checkpoint."""

    checkpoint_steps: int | None = None
    """Save every so many steps. null saves by time only."""

    checkpoint_minutes: float = 10.0
    """Save every so many minutes: the most that a crash can cost. 0 saves by steps only. Further
    apart where saving would take more than 5 % of the time."""

    keep_checkpoints: int = 2
    """Newest verified checkpoints to keep, at least 2, so that a damaged one loses no run."""

    log_steps: int = 10
    """Steps between two lines of metrics.jsonl."""

    near_duplicates: str | None = None
    """Folder of pictures, such as the unlabeled ones of pretraining, to search for near-duplicates
    of val: they would flatter the result. They are listed in near_duplicates.jsonl; null searches
    none."""

    max_pixels: int = MAX_PIXELS
    """Largest picture that is decoded, in pixels; larger ones count as unreadable. Guards memory
    against decompression bombs."""

    max_bad: float = 0.05
    """Stop once this share of all files has proved unreadable, between 0 and 1."""

    nonfinite: Literal["stop", "skip"] = "stop"
    """After a batch whose loss or gradient is not finite, which is listed and never applied."""

    max_nonfinite: int = 10
    """Updates that nonfinite skip may leave out in a run before it stops after all."""

    def __post_init__(self) -> None:
        check_range(
            self, ["in_chans", "epochs", "batch_size", "accumulate", "val_epochs"], at_least=1
        )
        check_range(self, ["val_fraction", "drop_path"], at_least=0, below=1)
        check_range(self, ["head_init_scale"], at_least=0, below=float("inf"))
        check_range(self, ["seed"], at_least=0)
        check_range(self, ["ema_decay"], above=0, below=1)
        check_runtime(self)
        height_width(self.img_size, multiple=1)
        check_channels(self.augment, self.in_chans)


RUNTIME_KEYS = frozenset(
    {
        *("out", "device", "precision", "workers", "compile"),
        "resume",
        "checkpoint_steps",
        "checkpoint_minutes",
        "keep_checkpoints",
        "log_steps",
        "near_duplicates",
        "max_pixels",
        "max_bad",
        "nonfinite",
        "max_nonfinite",
    }
)
"""Keys of FinetuneConfig that do not change what is learnt, and may change on a resume."""
