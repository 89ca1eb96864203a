"""Held-out images in their centre crop."""

from collections.abc import Iterator

from fcmae import rng
from fcmae.config.values import MAX_PIXELS
from fcmae.data.bad import BadImage
from fcmae.data.sample import Batch, Sample, collate
from fcmae.data.sources import Source, key_hash
from fcmae.data.statistics import center_crop
from fcmae.model.mask import grid_of, random_mask


class HoldoutSet:
    """Centre crops of the held-out images, always with the same masks.

    A mask depends on the image's key and the seed, not on the other images or on their order.

    Args:
        source: the held-out images.
        img_size: (height, width) of the crops, multiples of 32.
        in_chans: channels of the crops.
        mask_ratio: share of the patches that a mask hides.
        seed: what the masks depend on, with the keys.
        max_pixels: images with more pixels count as unreadable.

    Attributes:
        bad: (name, reason) of the images that `batches` skipped, since they can't be read.
    """

    def __init__(
        self,
        source: Source,
        img_size: tuple[int, int],
        in_chans: int = 3,
        mask_ratio: float = 0.6,
        seed: int = 0,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.source = source
        self.img_size = img_size
        self.in_chans = in_chans
        self.mask_ratio = mask_ratio
        self.seed = seed
        self.max_pixels = max_pixels
        self.bad: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield the readable images in the order of the source; no batch is empty."""
        self.bad = []
        samples = []
        for index in range(len(self.source)):
            try:
                samples.append(self._sample(index))
            except BadImage as error:
                self.bad.append((self.source.name(index), error.reason))
            if len(samples) == batch_size:
                yield collate(samples)
                samples = []
        if samples:
            yield collate(samples)

    def _sample(self, index: int) -> Sample:
        image = center_crop(self.source, index, self.img_size, self.in_chans, self.max_pixels)
        mask = random_mask(
            self.seed, 0, key_hash(self.source, index), grid_of(self.img_size), self.mask_ratio,
            stream=rng.HOLDOUT_MASK,
        )  # fmt: skip
        return Sample(image, index, mask)
