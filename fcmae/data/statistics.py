"""The mean and std that images are normalised with, in units of the full range 0 to 1."""

from collections.abc import Callable, Mapping, Sequence

MeanStd = tuple[list[float], list[float]]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def imagenet_mean_std(in_chans: int) -> MeanStd:
    """Return ImageNet's numbers; for other than 3 channels, their average for each channel."""
    if in_chans == 3:
        return list(IMAGENET_MEAN), list(IMAGENET_STD)
    return [sum(IMAGENET_MEAN) / 3] * in_chans, [sum(IMAGENET_STD) / 3] * in_chans


def resolve_mean_std(
    mean: str | Sequence[float],
    std: str | Sequence[float],
    sources: Mapping[str, Callable[[], MeanStd]],
) -> MeanStd:
    """Return what a config asks for: numbers as given, or those of a source by its name.

    A source is asked once, and only if it is named, since measuring reads pictures.
    """
    named = {value for value in (mean, std) if isinstance(value, str)}
    known = {name: sources[name]() for name in named}
    return (
        known[mean][0] if isinstance(mean, str) else [float(value) for value in mean],
        known[std][1] if isinstance(std, str) else [float(value) for value in std],
    )
