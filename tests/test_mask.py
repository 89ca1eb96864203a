import numpy as np
import pytest

from fcmae import rng
from fcmae.config.values import height_width
from fcmae.model.mask import check_mask_ratio, grid_of, keep_count, random_mask
from sparse.errors import InputError


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"),
    [(49, 0.6, 19), (16, 0.6, 6), (49, 0.5, 24), (100, 0.9, 9), (2, 0.5, 1), (144, 0.75, 36)],
)
def test_keep_count(patches: int, ratio: float, kept: int) -> None:
    assert keep_count(patches, ratio) == kept


def test_image_sizes() -> None:
    assert height_width(224) == (224, 224)
    assert height_width([96, 160]) == (96, 160)
    assert grid_of((96, 160)) == (3, 5)


@pytest.mark.parametrize(
    ("size", "named"), [(100, ("96", "128")), ([224, 230], ("224", "256")), (0, ("32", "64"))]
)
def test_wrong_image_sizes_name_the_nearest_two(
    size: int | list[int], named: tuple[str, str]
) -> None:
    with pytest.raises(InputError) as caught:
        height_width(size)
    assert all(side in str(caught.value) for side in named)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 2.0, 0.99, float("nan")])
def test_ratios_that_show_or_hide_everything_are_refused(ratio: float) -> None:
    with pytest.raises(InputError, match=r"try 0\.6"):
        check_mask_ratio(ratio, (7, 7))


@pytest.mark.parametrize("grid", [(1, 2), (1, 3), (2, 2), (7, 7), (3, 5), (32, 32)])
def test_the_ratios_that_the_message_names_work(grid: tuple[int, int]) -> None:
    with pytest.raises(InputError) as caught:
        check_mask_ratio(1.5, grid)
    message = str(caught.value)
    for text in (message.split("at most ")[1].split(" ")[0], message.rsplit(" ", 1)[1]):
        check_mask_ratio(float(text), grid)


def test_a_single_patch_has_no_ratio() -> None:
    with pytest.raises(InputError, match="64"):
        check_mask_ratio(0.6, (1, 1))


def test_a_mask_keeps_exactly_the_patches_with_the_smallest_hashes() -> None:
    mask = random_mask(4, 2, 17, (7, 7), 0.6)
    assert mask.shape == (7, 7)
    assert mask.dtype == np.bool_
    assert (~mask).sum() == 19
    hashes = rng.bits(4, rng.MASK, 2, 17, np.arange(49)).reshape(7, 7)
    assert hashes[~mask].max() < hashes[mask].min()


def test_masks_depend_on_everything_they_are_drawn_from() -> None:
    base = (0, 0, 0, (7, 7), 0.6)
    mask = random_mask(*base)
    assert (random_mask(*base) == mask).all()
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert (random_mask(*other, (7, 7), 0.6) != mask).any()
    assert (random_mask(*base, stream=rng.HOLDOUT_MASK) != mask).any()


def test_every_patch_is_hidden_equally_often() -> None:
    hidden = np.mean([random_mask(0, 0, index, (4, 4), 0.6) for index in range(4000)], axis=0)
    assert np.abs(hidden - 10 / 16).max() < 0.03
