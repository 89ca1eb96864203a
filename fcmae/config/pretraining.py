"""What pretraining can be asked for. Free of torch, so that `--help` is instant."""

from dataclasses import dataclass
from math import inf
from typing import Literal

from fcmae.config.fields import DATA, IMAGES, MODEL, WEIGHTS, Config, runtime, setting
from fcmae.config.training import AugmentBase, OptimBase, TrainingConfig


@dataclass
class DecoderConfig(Config):
    """The decoder, discarded after pretraining."""

    PREFIX = "decoder."

    dim: int = setting(512, at_least=1)
    """Width of the decoder in channels. 512 is the paper's; 128 to 1024 differ little."""

    depth: int = setting(1, at_least=1)
    """Number of ConvNeXt V2 blocks. 1 is the paper's: deeper costs time and gains nothing."""


@dataclass
class OptimConfig(OptimBase):
    """AdamW with a warm-up and a cosine to zero, both per step."""

    base_lr: float = 6e-3
    """Learning rate at batch 256; the rate used is base_lr * batch_size / 256. The default suits
    some thousand images; the paper's 1.5e-4 suits batches of 4096."""


@dataclass
class AugmentConfig(AugmentBase):
    """How a training sample is cut from an image, and how pixels become numbers."""

    mean: Literal["imagenet", "data"] | list[float] = "imagenet"

    std: Literal["imagenet", "data"] | list[float] = "imagenet"


@dataclass
class EpochProbeConfig(Config):
    """Frozen features measured at intervals during pretraining, on labelled images."""

    PREFIX = "probe."

    data: str | None = setting(None, path=IMAGES)
    """Labelled images, train/CLASS and val/CLASS, on which nearest neighbours and a linear
    classifier measure the encoder. null measures nothing."""

    val_fraction: float = setting(0.0, at_least=0, below=1, example="0.2")
    """Share of one folder of classes kept to measure on. 0 expects the folders train and val."""

    epochs: int = setting(10, at_least=1)
    """Epochs between two measurements."""


@dataclass
class PretrainConfig(TrainingConfig):
    """Pretrain a sparse ConvNeXt V2 on unlabeled images by reconstructing hidden patches."""

    data: str | list[str]
    """Images: a folder, flat or nested, or a text file of paths; several as A B or '[A,B]'."""

    model: str = setting("atto", group=MODEL)
    """Encoder: atto, femto, pico, nano, tiny, base, large or huge (3.7 to 660 M weights)."""

    depths: list[int] | None = setting(None, group=MODEL, example="'[2,2,6,2]'")
    """Blocks in each of the four stages, '[2,2,6,2]'. null takes those of model."""

    dims: list[int] | None = setting(None, group=MODEL, example="'[40,80,160,320]'")
    """Channels of each of the four stages, '[40,80,160,320]'. null takes those of model."""

    mask_ratio: float = setting(0.6, group=MODEL)
    """Share of the 32x32 pixel patches that is hidden, between 0 and 1. 0.6 is the paper's best."""

    decoder: DecoderConfig = setting(DecoderConfig)

    norm_pix_loss: bool = setting(True, group=MODEL)
    """Normalise each patch by its mean and deviation. Predicting the mean alone gives loss 1.0."""

    use_grn: bool = setting(True, group=MODEL)
    """Global response normalisation in every block. Off only for ablations."""

    layer_scale: float | None = setting(None, above=0, below=inf, group=MODEL, example="1e-6")
    """Initial value of ConvNeXt V1's layer scale, such as 1e-6. null has none, as in V2."""

    init: Literal["fan_in", "paper"] = setting("fan_in", group=MODEL)
    """Deviation of the encoder's random initial weights. fan_in takes 1/sqrt(fan_in), which keeps
    the signal's variance from layer to layer and learns in hundreds of steps; paper takes 0.02,
    which needs thousands. The decoder starts with 0.02."""

    init_from: str | None = setting(None, path=WEIGHTS, group=MODEL)
    """Initial weights of the encoder: a converted folder, an official release or a timm file."""

    optim: OptimConfig = setting(OptimConfig)

    augment: AugmentConfig = setting(AugmentConfig)

    epochs: Literal["auto"] | int = "auto"
    """Passes over the images. auto takes 100 to 800, the more the fewer images there are: about 1.2
    million crops in all."""

    holdout: int = setting(32, at_least=0, group=DATA)
    """Images never trained on, for figures and a loss. Folders under 500 hold out none."""

    engine: Literal["auto", "minkowski", "patch", "dense"] = runtime("auto")
    """All give the same numbers. auto is minkowski on the CPU where installed, else patch."""

    recompute: bool = runtime(False)
    """Compute the widest layer of every block again in the backward pass: the same numbers,
    for less memory and somewhat more time."""

    compile: bool = False
    """Compile the encoder with torch.compile: minutes at the start of a run for faster steps. Needs
    a C++ compiler, and another engine than minkowski."""

    picture_epochs: int = runtime(10, at_least=0)
    """Epochs between two reconstructions of held-out images, their loss, and the diversity of every
    block's channels. 0 makes none."""

    probe: EpochProbeConfig = setting(EpochProbeConfig, runtime=True)
