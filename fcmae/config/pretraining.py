"""What each command can be asked for. Free of torch, so that `--help` is instant.

The string under a field is its `--help` text. Numbers are checked as far as that needs no data, so
that an object that exists is sane; types are checked by the command line.
"""

from dataclasses import dataclass, field
from typing import Literal

from fcmae.config.values import (
    MAX_PIXELS,
    check_channels,
    check_crop,
    check_optim,
    check_range,
    check_runtime,
    height_width,
)

Engine = Literal["auto", "minkowski", "patch", "dense"]
Precision = Literal["auto", "fp32", "bf16"]


@dataclass
class DecoderConfig:
    """The decoder, thrown away after pretraining."""

    dim: int = 512
    """Width of the decoder in channels. 512 is the paper's; 128 to 1024 differ little."""

    depth: int = 1
    """Number of ConvNeXt V2 blocks. 1 is the paper's: deeper costs time and gains nothing."""

    def __post_init__(self) -> None:
        check_range(self, ["dim", "depth"], at_least=1, prefix="decoder.")


@dataclass
class OptimConfig:
    """AdamW with a warm-up and a cosine to zero, both per step."""

    base_lr: float = 6e-3
    """Learning rate at batch 256; the rate used is base_lr * batch_size / 256. The default suits
    some thousand images; the paper's 1.5e-4 suits batches of 4096."""

    weight_decay: float = 0.05
    """AdamW's weight decay. Biases, norms, GRN and the mask token are exempt."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's two averaging rates, '[FIRST,SECOND]'. 0.95 is the usual choice for masked images."""

    warmup_epochs: float | None = None
    """Epochs of linear warm-up. null takes 10 % of all steps, at most 40 epochs."""

    clip_grad: float | None = None
    """Largest norm of the whole gradient; a longer one is scaled down. null does not clip."""

    def __post_init__(self) -> None:
        check_optim(self)


@dataclass
class AugmentConfig:
    """How a training sample is cut from a picture, and how pixels become numbers."""

    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])
    """Smallest and largest share of the picture's area that a crop takes, '[LOW,HIGH]'."""

    crop_ratio: list[float] = field(default_factory=lambda: [0.75, 1.3333])
    """Narrowest and widest crop, as width / height before it is resized, '[LOW,HIGH]'."""

    hflip: bool = True
    """Mirror half of the samples left to right. Turn off where the two differ, as in text."""

    vflip: bool = False
    """Mirror half of the samples top to bottom. For pictures without an up, such as cells."""

    fast_decode: bool = False
    """Decode a JPEG much larger than the crop wants at 1/2, 1/4 or 1/8 of its size: several times
    as fast on photographs of many megapixels, with slightly other pixels."""

    mean: Literal["imagenet", "data"] | list[float] = "imagenet"
    """Subtracted from each channel, in units of the full range 0 to 1: 'imagenet', 'data' (measured
    on the training images) or one number a channel, '[R,G,B]'."""

    std: Literal["imagenet", "data"] | list[float] = "imagenet"
    """Each channel is divided by it after the mean is subtracted; the same choices as for mean."""

    def __post_init__(self) -> None:
        check_crop(self)


@dataclass
class EpochProbeConfig:
    """Frozen features measured now and then while pretraining, on labelled images."""

    data: str | None = None
    """Labelled images, train/CLASS and val/CLASS, on which nearest neighbours and a linear
    classifier measure the encoder. null measures nothing."""

    val_fraction: float = 0.0
    """Share of one folder of classes kept to measure on. 0 expects the folders train and val."""

    epochs: int = 10
    """Epochs between two measurements."""

    def __post_init__(self) -> None:
        check_range(self, ["val_fraction"], at_least=0, below=1, prefix="probe.")
        check_range(self, ["epochs"], at_least=1, prefix="probe.")


@dataclass
class PretrainConfig:
    """Pretrain a sparse ConvNeXt V2 on unlabeled images by reconstructing hidden patches (FCMAE).

    The fields down to `seed` decide the result; those after it (RUNTIME_KEYS) may change when a run
    is resumed.
    """

    data: str | list[str]
    """Images to learn from: a folder, flat or nested, or a text file of paths; several as
    '[A,B]'."""

    out: str
    """Run folder to write: checkpoints, logs and, at the end, the model for timm. An unfinished run
    that is there is resumed."""

    model: str = "atto"
    """Size of the encoder: atto, femto, pico, nano, tiny, base, large or huge (3.7 to 660 million
    weights)."""

    depths: list[int] | None = None
    """Blocks in each of the four stages, '[2,2,6,2]'. null takes those of model."""

    dims: list[int] | None = None
    """Channels of each of the four stages, '[40,80,160,320]'. null takes those of model."""

    in_chans: int = 3
    """Channels of the images: 1 reads them as grey, 3 as RGB, 4 as RGB and alpha; more
    need .npy."""

    img_size: int | list[int] = 224
    """Side of the square crops in pixels, or '[HEIGHT,WIDTH]'. Multiples of 32."""

    mask_ratio: float = 0.6
    """Share of the 32x32 pixel patches that is hidden, between 0 and 1. 0.6 is the paper's best."""

    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    norm_pix_loss: bool = True
    """Predict each patch normalised by its own mean and deviation. A loss of 1.0 then means that
    only the mean is predicted."""

    use_grn: bool = True
    """Global response normalisation in every block. Off only for ablations."""

    layer_scale: float | None = None
    """Initial value of ConvNeXt V1's layer scale, such as 1e-6. null has none, as in V2."""

    drop_path: float = 0.0
    """Largest share of samples for which a block is skipped; grows linearly with depth."""

    init: Literal["fan_in", "paper"] = "fan_in"
    """Deviation of the encoder's random initial weights. fan_in takes 1/sqrt(fan_in), which keeps
    the signal's variance from layer to layer and learns in hundreds of steps; paper takes 0.02,
    which wants thousands. The decoder starts with 0.02."""

    init_from: str | None = None
    """Start the encoder from these weights instead of random ones: a converted folder, an official
    release or a timm file."""

    epochs: Literal["auto"] | int = "auto"
    """Passes over the images. auto takes 100 to 800, the more the fewer images there are: about 1.2
    million crops in all."""

    batch_size: int = 64
    """Images per step, over all processes and accumulated parts together."""

    accumulate: int = 1
    """Parts that a step is computed in, to save memory. Processes x accumulate divide
    batch_size."""

    optim: OptimConfig = field(default_factory=OptimConfig)

    augment: AugmentConfig = field(default_factory=AugmentConfig)

    holdout: int = 32
    """Images never trained on, for pictures and the held-out loss. Folders under 500 hold out
    none."""

    seed: int = 0
    """Decides the initial weights, the order, the crops and the masks."""

    engine: Engine = "auto"
    """Sparse engine; all give the same numbers. auto is minkowski on the CPU where it is installed,
    else patch."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps or auto, which takes a GPU where there is one."""

    precision: Precision = "auto"
    """fp32, bf16 (autocast; the weights stay float32) or auto, which takes bf16 on GPUs that have
    it. CPUs with AVX512-BF16 or AMX are faster with it too, `fcmae bench` says by how much."""

    recompute: bool = False
    """Compute the widest layer of every block again in the backward pass instead of keeping it: the
    same numbers, for less memory and somewhat more time."""

    compile: bool = False
    """Compile the encoder with torch.compile: minutes at the start of a run for faster steps. Needs
    a C++ compiler, and another engine than minkowski."""

    workers: Literal["auto"] | int = "auto"
    """Processes that read images, per training process; 0 reads in the training process."""

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

    picture_epochs: int = 10
    """Epochs between two reconstructions of held-out images, their loss, and the diversity of every
    block's channels. 0 makes none."""

    probe: EpochProbeConfig = field(default_factory=EpochProbeConfig)

    max_pixels: int = MAX_PIXELS
    """Largest picture that is decoded, in pixels; larger ones count as unreadable. Guards memory
    against decompression bombs."""

    max_bad: float = 0.05
    """Stop once this share of all files has proved unreadable, between 0 and 1."""

    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do about a batch whose loss or gradient is not finite. Its update is never applied,
    and its files are listed in nonfinite.jsonl; skip goes on with the next batch."""

    max_nonfinite: int = 10
    """Updates that nonfinite skip may leave out in a run before it stops after all."""

    def __post_init__(self) -> None:
        check_range(self, ["in_chans", "epochs", "batch_size", "accumulate"], at_least=1)
        check_range(self, ["drop_path"], at_least=0, below=1)
        check_range(self, ["layer_scale"], above=0, below=float("inf"))
        check_range(self, ["holdout", "seed", "picture_epochs"], at_least=0)
        check_runtime(self)
        check_range(self, ["max_bad"], at_least=0, at_most=1)
        height_width(self.img_size)
        check_channels(self.augment, self.in_chans)


RUNTIME_KEYS = frozenset(
    {
        "out",
        "engine",
        "device",
        "precision",
        "recompute",
        "compile",
        "workers",
        "resume",
        "checkpoint_steps",
        "checkpoint_minutes",
        "keep_checkpoints",
        "log_steps",
        "picture_epochs",
        "probe",
        "max_pixels",
        "max_bad",
        "nonfinite",
        "max_nonfinite",
    }
)
"""Keys of PretrainConfig that do not change what is learnt, and may change on a resume."""
