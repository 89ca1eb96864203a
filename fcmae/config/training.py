"""Settings that pretraining and fine-tuning share. Free of torch."""

from dataclasses import KW_ONLY, dataclass
from math import inf
from typing import Literal

from fcmae.config.fields import DATA, IMAGES, OPTIMISATION, Config, DeviceConfig, runtime, setting
from fcmae.config.values import MAX_PIXELS
from sparse.errors import InputError
from sparse.sizes import PATCH


@dataclass
class OptimBase(Config):
    """AdamW with a warm-up and a cosine to zero, both per step."""

    PREFIX = "optim."

    base_lr: float = setting(above=0, below=inf)
    """Learning rate at batch 256; the rate used is base_lr * batch_size / 256."""

    weight_decay: float = setting(0.05, at_least=0, below=inf)
    """AdamW's weight decay. Biases, norms, GRN and the mask token are exempt."""

    betas: list[float] = setting([0.9, 0.95], length=2, at_least=0, below=1)
    """Averaging rates, '[FIRST,SECOND]'. 0.95 is usual for masked images, 0.999 for labels."""

    warmup_epochs: float | None = setting(None, at_least=0, below=inf)
    """Epochs of linear warm-up. null takes 10 % of all steps, at most 40 epochs."""

    clip_grad: float | None = setting(None, above=0, below=inf, example="1.0")
    """Largest norm of the whole gradient; a longer one is scaled down. null does not clip."""


@dataclass
class AugmentBase(Config):
    """How a training sample is cut from an image, and how pixels become numbers."""

    PREFIX = "augment."

    crop_scale: list[float] = setting([0.2, 1.0], length=2, ascending=True, above=0, at_most=1)
    """Smallest and largest share of the image's area that a crop covers, '[LOW,HIGH]'."""

    crop_ratio: list[float] = setting([0.75, 1.3333], length=2, ascending=True, above=0, below=inf)
    """Narrowest and widest crop, as width / height before it is resized, '[LOW,HIGH]'."""

    hflip: bool = True
    """Mirror half of the samples left to right. Turn off where the two differ, as in text."""

    vflip: bool = False
    """Mirror half of the samples top to bottom. For images without an up, such as cells."""

    fast_decode: bool = False
    """Decode a JPEG much larger than the crop needs at 1/2, 1/4 or 1/8 of its size: several times
    as fast on photographs of many megapixels, with slightly different pixels. Training only."""

    mean: str | list[float] = setting("imagenet", above=-inf, below=inf)
    """Subtracted from each channel, in units of the full range 0 to 1: 'imagenet', 'data' (measured
    on the training images) or one number per channel, '[R,G,B]'."""

    std: str | list[float] = setting("imagenet", above=0, below=inf)
    """Each channel is divided by it after the mean is subtracted; the same choices as for mean."""


@dataclass
class TrainingConfig(DeviceConfig):
    """A run of training: what it reads, how long it learns, and how it is kept.

    Raises:
        InputError: a number is out of range, or a mean or std does not have one number per channel.
    """

    data: str | list[str] = setting(path=IMAGES, positional=True, group=DATA)

    out: str = setting(runtime=True, group=DATA)
    """Run folder to write: checkpoints, logs, the model for timm. Resumes an unfinished run."""

    _: KW_ONLY

    in_chans: int = setting(3, at_least=1, group=DATA)
    """Channels: 1 reads images as grey, 3 as RGB, 4 as RGB and alpha; more need .npy."""

    img_size: int | list[int] = setting(224, multiple=PATCH, group=DATA)
    """Side of the square crops in pixels, or '[HEIGHT,WIDTH]'. Multiples of 32."""

    epochs: Literal["auto"] | int = setting("auto", at_least=1, group=OPTIMISATION)

    batch_size: int = setting(64, at_least=1, group=OPTIMISATION)
    """Images per step, over all processes and accumulated parts together."""

    accumulate: int = setting(1, at_least=1, group=OPTIMISATION)
    """Parts of a step, to save memory. Processes x accumulate have to divide batch_size."""

    drop_path: float = setting(0.0, at_least=0, below=1, group=OPTIMISATION)
    """Largest share of samples for which a block is skipped; grows linearly with depth."""

    seed: int = setting(0, at_least=0, group=OPTIMISATION)
    """Decides the initial weights, the order, the augmentation and the masks."""

    optim: OptimBase = setting(OptimBase)

    augment: AugmentBase = setting(AugmentBase)

    precision: Literal["auto", "fp32", "bf16"] = runtime("auto")
    """fp32, bf16 (autocast; the weights stay float32) or auto, which takes bf16 on GPUs that have
    it. CPUs with AVX512-BF16 or AMX are faster with it too; `fcmae bench` measures by how much."""

    compile: bool = runtime(False)

    workers: Literal["auto"] | int = runtime("auto", at_least=0)
    """Processes that read images, per training process; 0 reads in the training process."""

    resume: str = runtime("auto", path="auto, never or a checkpoint", words=("auto", "never"))
    """auto resumes from the newest good checkpoint in out; never requires an empty out; or the path
    of a checkpoint."""

    checkpoint_steps: int | None = runtime(None, at_least=1)
    """Save every so many steps. null saves by time only."""

    checkpoint_minutes: float = runtime(10.0, at_least=0)
    """Save every so many minutes: the most that a crash can cost. 0 saves by steps only. Further
    apart where saving would take more than 5 % of the time."""

    keep_checkpoints: int = runtime(2, at_least=2)
    """Newest verified checkpoints to keep, at least 2, so that a damaged one loses no run."""

    log_steps: int = runtime(10, at_least=1)
    """Steps between two lines of metrics.jsonl."""

    max_pixels: int = runtime(MAX_PIXELS, at_least=1)
    """Largest image that is decoded, in pixels; larger ones count as unreadable. Guards memory
    against decompression bombs."""

    max_bad: float = runtime(0.05, at_least=0, at_most=1)
    """Stop once this share of all files has proved unreadable, between 0 and 1."""

    nonfinite: Literal["stop", "skip"] = runtime("stop")
    """What to do about a batch whose loss or gradient is not finite. Its update is never applied,
    and its files are listed in nonfinite.jsonl; skip continues with the next batch."""

    max_nonfinite: int = runtime(10, at_least=0)
    """Updates that nonfinite skip may skip in a run before it stops after all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mean", "std"):
            values = getattr(self.augment, name)
            if not isinstance(values, str) and len(values) != self.in_chans:
                rule = f"must have a number for each of the {self.in_chans} channels (in_chans)"
                example = ",".join(["0.5"] * self.in_chans)
                raise InputError(f"augment.{name} {values} {rule}, such as [{example}]")
