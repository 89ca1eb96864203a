"""GPU-hours of the paper's recipes: computed, not measured.

    python -m benchmarks.gpu_hours [--images 1281167] [--tflops 312] [--share 0.3]

Pretraining computes the visible 19 of 49 patches in the encoder and all 49 positions in the
decoder; forward and backward take three times the MACs of the forward pass, each two operations.
"""

import argparse

from fcmae.config.fields import leaves
from fcmae.config.parsing import read_file
from finetune.config import FinetuneConfig
from sparse.sizes import SIZES

GMACS = {
    "atto": 0.55, "femto": 0.78, "pico": 1.37, "nano": 2.45, "tiny": 4.47, "base": 15.4,
    "large": 34.4, "huge": 115,
}  # fmt: skip
"""For a forward pass at 224 px (arXiv 2301.00808, table 9 and section B)."""

PRETRAINING_EPOCHS = (800, 1600)
VISIBLE = 19 / 49
PLACES, DECODER, PATCH_VALUES = 49, 512, 3 * 32 * 32


def decoder_gmacs(width: int) -> float:
    """GMACs of the projection, one block and the prediction."""
    block = 49 * DECODER + 2 * 4 * DECODER**2
    return PLACES * (width * DECODER + block + DECODER * PATCH_VALUES) / 1e9


def hours(gmacs: float, images: float, flops: float) -> float:
    """Hours on one GPU for `images` steps of one image, forward and backward."""
    return 6 * gmacs * 1e9 * images / flops / 3600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--images", type=int, default=1_281_167, help="ImageNet-1K's by default")
    parser.add_argument("--tflops", type=float, default=312, help="peak in bfloat16; an A100's")
    parser.add_argument("--share", type=float, default=0.3, help="of the peak that is reached")
    options = parser.parse_args()
    flops = options.tflops * 1e12 * options.share
    print("| size | pretraining, 800 epochs | 1600 epochs | fine-tuning, epochs | hours |")
    print("|---|---:|---:|---:|---:|")
    for name in GMACS:
        encoder = GMACS[name] * VISIBLE + decoder_gmacs(SIZES[name].dims[-1])
        cells = [f"{hours(encoder, n * options.images, flops):,.0f}" for n in PRETRAINING_EPOCHS]
        epochs = finetuning_epochs(name)
        cells += [str(epochs), f"{hours(GMACS[name], epochs * options.images, flops):,.0f}"]
        print(f"| {name} | {' | '.join(cells)} |")
    return 0


def finetuning_epochs(size: str) -> int:
    """The paper's fine-tuning epochs for a size, from its recipe."""
    found = read_file(f"configs/finetune/{size}.yaml", leaves(FinetuneConfig))
    return int(found["epochs"])


if __name__ == "__main__":
    raise SystemExit(main())
