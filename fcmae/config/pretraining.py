"""Settings of pretraining. Does not import torch, so `--help` is instant."""

from dataclasses import dataclass
from math import inf
from typing import Literal

from fcmae.config.fields import DATA, IMAGES, MODEL, WEIGHTS, Config, runtime, setting
from fcmae.config.training import AugmentBase, TrainingConfig
from sparse.sizes import PATCH


@dataclass
class DecoderConfig(Config):
    """The decoder, discarded after pretraining."""

    PREFIX = "decoder."

    dim: int = setting(512, at_least=1)
    """Width of the decoder in channels. The paper uses 512; 128 to 1024 differ little."""

    depth: int = setting(1, at_least=1)
    """Number of ConvNeXt V2 blocks. The paper uses 1; more blocks cost time and gain nothing."""


@dataclass
class AugmentConfig(AugmentBase):
    """Training crops, and normalisation of pixels."""

    mean: Literal["imagenet", "data"] | list[float] = "imagenet"

    std: Literal["imagenet", "data"] | list[float] = "imagenet"


@dataclass
class EpochProbeConfig(Config):
    """Evaluation of frozen features during pretraining, on labelled images."""

    PREFIX = "probe."

    data: str | None = setting(None, path=IMAGES)
    """Labelled images, train/CLASS and val/CLASS, for evaluating the encoder's features by nearest
    neighbours and a linear classifier. null disables this evaluation."""

    val_fraction: float = setting(0.0, at_least=0, below=1, example="0.2")
    """Fraction of a single folder of classes held out as val. 0 expects folders train and val."""

    epochs: int = setting(10, at_least=1)
    """Epochs between two evaluations."""


@dataclass
class PretrainConfig(TrainingConfig):
    """Pretrain a sparse ConvNeXt V2 on unlabelled images by reconstructing hidden patches."""

    model: str = setting("atto", group=MODEL)
    """Encoder: atto, femto, pico, nano, tiny, base, large or huge (3.7 to 660 M parameters)."""

    depths: list[int] | None = setting(None, group=MODEL, example="'[2,2,6,2]'")
    """Blocks in each of the four stages, such as '[2,2,6,2]'. null uses those of model."""

    dims: list[int] | None = setting(None, group=MODEL, example="'[40,80,160,320]'")
    """Channels of each of the four stages, such as '[40,80,160,320]'. null uses those of model."""

    patch_size: int = setting(PATCH, at_least=8, at_most=PATCH, group=MODEL)
    """Side of a hidden patch in pixels, and the encoder's total stride: 32, the paper's, or for
    small images 16 or 8. The stem's stride is an eighth of it."""

    mask_ratio: float = setting(0.6, group=MODEL)
    """Fraction of the patches to hide, between 0 and 1. The paper's best is 0.6."""

    decoder: DecoderConfig = setting(DecoderConfig)

    norm_pix_loss: bool = setting(True, group=MODEL)
    """Normalise each target patch to mean 0 and standard deviation 1. A model that predicts only
    the mean has a loss of 1.0."""

    use_grn: bool = setting(True, group=MODEL)
    """Use global response normalisation in every block. Turn off only for ablations."""

    layer_scale: float | None = setting(None, above=0, below=inf, group=MODEL, example="1e-6")
    """Initial value of ConvNeXt V1's layer scale, such as 1e-6. null uses none, as in V2."""

    init: Literal["fan_in", "paper"] = setting("fan_in", group=MODEL)
    """Standard deviation of the encoder's random initial weights. fan_in uses 1/sqrt(fan_in), which
    keeps the signal's variance from layer to layer and learns in hundreds of steps; paper uses
    0.02, which needs thousands. The decoder always uses 0.02."""

    init_from: str | None = setting(None, path=WEIGHTS, group=MODEL)
    """Initial weights of the encoder: a converted folder, an official release or a timm file."""

    augment: AugmentConfig = setting(AugmentConfig)

    epochs: Literal["auto"] | int = "auto"
    """Passes over the images. auto chooses 100 to 800, more for fewer images: about 1.2 million
    crops in total."""

    holdout: int = setting(32, at_least=0, group=DATA)
    """Images held out for figures and a validation loss, or windows of them; none of fewer than 500
    images, times crops_per_image."""

    window: int | None = setting(None, at_least=32, group=DATA, example="1024")
    """Side in pixels of a random square that is cut out of an image first, and the crop out of it:
    of a large raster, only the tiles it touches are read. null crops the whole image."""

    crops_per_image: int = setting(1, at_least=1, group=DATA)
    """Crops of each image in an epoch, for few large images."""

    min_valid: float = setting(0.5, at_least=0, at_most=1, group=DATA)
    """Share of the pixels of a patch that must have a value for it to be visible or a target, and
    of the patches of a crop for it to be used."""

    engine: str = runtime("auto")
    """Engine of the encoder; all give the same numbers. auto uses minkowski on the CPU if it is
    installed, otherwise patch."""

    recompute: bool = runtime(False)
    """Recompute the widest layer of every block in the backward pass: the same numbers with less
    memory and slightly more time."""

    compile: bool = False
    """Compile the encoder with torch.compile: steps are faster, but a run takes minutes to start.
    Needs a C++ compiler and an engine other than minkowski."""

    cuda_graph: bool = runtime(True)
    """On a single GPU, launch the forward and the backward pass as one CUDA graph: faster steps
    where the host is slower than the GPU. Not with stochastic depth or compile."""

    picture_epochs: int = runtime(10, at_least=0)
    """Epochs between two evaluations on held-out images: reconstructions, their loss, and the
    diversity of every block's channels. 0 disables them."""

    probe: EpochProbeConfig = setting(EpochProbeConfig, runtime=True)
