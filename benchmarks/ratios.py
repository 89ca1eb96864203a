"""The median of paired ratios, and how well it is known."""

import random
import statistics
from collections.abc import Sequence

RESAMPLED = 10_000


def summary(ratios: Sequence[float]) -> str:
    """Return the median ratio with its 95 % interval from resampled rounds, in words."""
    draw = random.Random(0)
    medians = sorted(
        statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLED)
    )
    low, high = medians[RESAMPLED // 40], medians[-RESAMPLED // 40]
    return f"{statistics.median(ratios):.3f} (95 %: {low:.3f} to {high:.3f}; {len(ratios)} rounds)"
