"""Settings that pretraining and fine-tuning share. Does not import torch."""

from dataclasses import KW_ONLY, dataclass
from math import inf
from typing import Literal

from fcmae.config.fields import DATA, IMAGES, OPTIMISATION, Config, DeviceConfig, runtime, setting
from fcmae.config.values import MAX_PIXELS
from sparse.errors import InputError
from sparse.sizes import PATCH


@dataclass
class OptimConfig(Config):
    """AdamW with warm-up, and decay after it, both per step."""

    PREFIX = "optim."

    base_lr: float = setting(6e-3, above=0, below=inf)
    """Learning rate for a batch of 256; the actual rate is base_lr * batch_size / 256. The default
    suits a few thousand images; the paper's 1.5e-4 suits batches of 4096."""

    weight_decay: float = setting(0.05, at_least=0, below=inf)
    """AdamW's weight decay. Biases, norms, GRN and the mask token are exempt."""

    betas: list[float] = setting([0.9, 0.95], length=2, at_least=0, below=1)
    """AdamW's betas, '[FIRST,SECOND]'. The second is usually 0.95 for masked images and 0.999 for
    labels."""

    warmup_epochs: float | None = setting(None, at_least=0, below=inf)
    """Epochs of linear warm-up. null uses 10 % of all steps, at most 40 epochs."""

    schedule: Literal["cosine", "linear", "step"] = "cosine"
    """How the learning rate falls after warm-up: to zero, or with step to a tenth at 3/4 and at
    11/12 of the run. The papers use linear for masks and step for boxes."""

    clip_grad: float | None = setting(None, above=0, below=inf, example="1.0")
    """Clip the gradient to this norm, over all parameters. null does not clip."""


@dataclass
class AugmentBase(Config):
    """Training crops, and normalisation of pixels."""

    PREFIX = "augment."

    crop_scale: list[float] = setting([0.2, 1.0], length=2, ascending=True, above=0, at_most=1)
    """Smallest and largest fraction of the image's area that a crop covers, '[LOW,HIGH]'."""

    crop_ratio: list[float] = setting([0.75, 1.3333], length=2, ascending=True, above=0, below=inf)
    """Smallest and largest width / height of a crop before it is resized, '[LOW,HIGH]'."""

    hflip: bool = True
    """Flip half of the samples horizontally. Turn off if left and right differ, as in text."""

    vflip: bool = False
    """Flip half of the samples vertically. For images without top and bottom, such as cells."""

    clip: list[float] | None = setting(
        None, length=2, ascending=True, at_least=0, at_most=100, example="'[1,99]'"
    )
    """Percentiles that each channel's values are clipped to, '[LOW,HIGH]', measured on the training
    images. null does not clip."""

    fast_decode: bool = False
    """Decode JPEGs that are much larger than the crop needs at 1/2, 1/4 or 1/8 of their size:
    several times faster on photographs of many megapixels, with slightly different pixels. Training
    only."""

    mean: str | list[float] = setting("imagenet", above=-inf, below=inf)
    """Mean to subtract from each channel, for pixels between 0 and 1: 'imagenet', 'data' (measured
    on the training images) or one number per channel, '[R,G,B]'."""

    std: str | list[float] = setting("imagenet", above=0, below=inf)
    """Standard deviation to divide each channel by; the same choices as for mean."""


@dataclass
class TrainingConfig(DeviceConfig):
    """A training run: its data, its schedule and its checkpoints.

    Raises:
        InputError: a number is out of range, or a mean or std does not have one number per channel.
    """

    data: str | list[str] = setting(path=IMAGES, positional=True, group=DATA)
    """Images: a folder, flat or nested, a text file of paths, tar shards, or a dataset as
    hf:PATH_OR_NAME, also under URLs; several as A B or '[A,B]'."""

    out: str = setting(runtime=True, group=DATA)
    """Run folder for checkpoints, logs and the model for timm. An unfinished run in it resumes."""

    _: KW_ONLY

    in_chans: int = setting(3, at_least=1, group=DATA)
    """Input channels: 1 reads images as grey, 3 as RGB, 4 as RGB and alpha; more need a format with
    bands, such as GeoTIFF, OME-TIFF, zarr or .npy."""

    bands: list[int] | None = setting(None, at_least=1, group=DATA, example="'[4,3,2]'")
    """Bands of the images that become the channels, from 1, such as '[4,3,2]'. null takes all."""

    nodata: Literal["auto", "none", "alpha"] | float = setting("auto", group=DATA)
    """Pixels without a value, which take no part in anything: auto, those that the files mark, and
    NaN; alpha, transparent ones too; a number, those with this value; none, no pixels."""

    img_size: int | list[int] = setting(224, multiple=PATCH, group=DATA)
    """Side of the square crops in pixels, or '[HEIGHT,WIDTH]'. Multiples of 32."""

    epochs: Literal["auto"] | int = setting("auto", at_least=1, group=OPTIMISATION)

    batch_size: int = setting(64, at_least=1, group=OPTIMISATION)
    """Images per step, in total over all processes and accumulated parts."""

    accumulate: int = setting(1, at_least=1, group=OPTIMISATION)
    """Parts to split each step into, to save memory. Processes x accumulate must divide
    batch_size."""

    drop_path: float = setting(0.0, at_least=0, below=1, group=OPTIMISATION)
    """Probability of skipping the last block for a sample; it increases linearly with depth."""

    seed: int = setting(0, at_least=0, group=OPTIMISATION)
    """Seed of the initial weights, the order, the augmentation and the masks."""

    optim: OptimConfig = setting(OptimConfig)

    augment: AugmentBase = setting(AugmentBase)

    precision: Literal["auto", "fp32", "bf16"] = runtime("auto")
    """fp32, bf16 (autocast; the weights stay float32) or auto, which uses bf16 on GPUs that support
    it. It is also faster on CPUs with AVX512-BF16 or AMX; `fcmae bench` measures by how much."""

    compile: bool = runtime(False)

    workers: Literal["auto"] | int = runtime("auto", at_least=0)
    """Data workers per training process; 0 reads images in the training process."""

    cache: str | None = runtime(None)
    """Folder for copies of what is read from URLs, which processes and runs may share. null keeps
    none: every epoch reads everything again."""

    cache_gb: float = runtime(100.0, above=0, below=inf)
    """Gigabytes that the cache may take, about; what was unused for longest is deleted."""

    resume: str = runtime("auto", path="auto, never or a checkpoint", words=("auto", "never"))
    """auto resumes from the newest intact checkpoint in out; never requires an empty out; a path
    resumes from that checkpoint."""

    checkpoint_steps: int | None = runtime(None, at_least=1)
    """Steps between two checkpoints. null saves by time only."""

    checkpoint_minutes: float = runtime(10.0, at_least=0)
    """Minutes between two checkpoints: the most that a crash can cost. 0 saves by steps only. The
    interval is longer if saving would take more than 5 % of the time."""

    keep_checkpoints: int = runtime(2, at_least=2)
    """Number of newest verified checkpoints to keep, at least 2 in case one is damaged."""

    log_steps: int = runtime(10, at_least=1)
    """Steps between two lines in metrics.jsonl."""

    trackers: list[str] = runtime(["tensorboard"])
    """Where metrics and figures go besides the run folder's files: any of tensorboard, wandb and
    mlflow, or none, '[]'."""

    max_pixels: int = runtime(MAX_PIXELS, at_least=1)
    """Largest image to decode, in pixels; larger ones count as unreadable. Protects memory from
    decompression bombs."""

    max_bad: float = runtime(0.05, at_least=0, at_most=1)
    """Stop when more than this fraction of all files is unreadable, between 0 and 1."""

    nonfinite: Literal["stop", "skip"] = runtime("stop")
    """What to do after a batch whose loss or gradient is not finite. Its update is never applied,
    and its files are listed in nonfinite.jsonl; skip continues with the next batch."""

    max_nonfinite: int = runtime(10, at_least=0)
    """Number of updates that nonfinite skip may skip before it stops the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bands is not None and len(self.bands) != self.in_chans:
            count = len(self.bands)
            raise InputError(
                f"bands {self.bands} are {count}, not in_chans {self.in_chans}: "
                f"give --in_chans {count}"
            )
        for name in ("mean", "std"):
            values = getattr(self.augment, name)
            if not isinstance(values, str) and len(values) != self.in_chans:
                rule = f"must have one number for each of the {self.in_chans} channels (in_chans)"
                example = ",".join(["0.5"] * self.in_chans)
                raise InputError(f"augment.{name} {values} {rule}, such as [{example}]")
