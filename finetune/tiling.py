"""Maps of large images, computed window by window and blended where windows overlap."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Scores = Callable[[int, int, int, int], Tensor]
"""Maps (top, left, height, width) of a window to scores (K, height, width)."""


def blended(
    scores: Scores, size: tuple[int, int], window: tuple[int, int], overlap: float
) -> Iterator[Tensor]:
    """Yield the scores of an image in strips (K, rows, W), from top to bottom.

    Neighbouring windows share at least the part `overlap` of their sides. There, scores are
    averaged with weights that fall linearly towards each window's edge. An image that fits into one
    window gets its scores unchanged. Holds the scores of one row of windows.

    Args:
        scores: computes a window.
        size: (H, W) of the image.
        window: the largest (height, width) of a window.
        overlap: from 0 up to below 1.
    """
    h, w = (min(pair) for pair in zip(size, window, strict=True))
    tops, lefts = (starts(length, side, overlap) for length, side in zip(size, (h, w), strict=True))
    if len(tops) == len(lefts) == 1:
        yield scores(0, 0, h, w)
        return
    weight_hw = torch.outer(_ramp(h, overlap), _ramp(w, overlap))
    total = weights = None
    for top, following in zip(tops, [*tops[1:], size[0]], strict=True):
        for left in lefts:
            part = scores(top, left, h, w)
            if total is None or weights is None:
                total, weights = part.new_zeros(len(part), h, size[1]), part.new_zeros(h, size[1])
                weight_hw = weight_hw.to(part)
            total[:, :, left : left + w] += part * weight_hw
            weights[:, left : left + w] += weight_hw
        assert total is not None
        assert weights is not None
        done = following - top  # no later window reaches these rows
        yield total[:, :done] / weights[:done]
        for kept in (total, weights):
            rest = kept[..., done:, :].clone()
            kept.zero_()
            kept[..., : h - done, :] = rest


def starts(length: int, side: int, overlap: float) -> list[int]:
    """Return where windows start along a side; the last one ends at its end."""
    step = max(1, int(side * (1 - overlap)))
    return [*range(0, length - side, step), length - side]


def _ramp(side: int, overlap: float) -> Tensor:
    """Weights along a window's side: positive, and 1 where it does not overlap."""
    from_edge = torch.arange(1, side + 1, dtype=torch.float32)
    from_edge = torch.minimum(from_edge, from_edge.flip(0))
    return (from_edge / max(1.0, side * overlap)).clamp(max=1)
