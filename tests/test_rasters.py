"""Large images and those with bands: which reader, which pixels, which of them count."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import tifffile
import zarr
from PIL import Image
from rasterio import Affine

from fcmae.config.pretraining import AugmentConfig, PretrainConfig
from fcmae.data import decode
from fcmae.data.decode import read_image
from fcmae.data.file_list import find_images
from fcmae.data.image import BadImage, MissingReader, Reading
from fcmae.data.statistics import Preprocessing, measure_mean_std, resolve_preprocessing
from sparse.errors import InputError

H, W = 150, 200
BOX = (30, 40, 100, 64)
"""Left, top, width and height of the crop that is compared."""


def values(bands: int, dtype: Any = np.uint8, seed: int = 0) -> np.ndarray:
    """Random pixels (bands, H, W), none of them 0."""
    high = 1 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    random = np.random.default_rng(seed).uniform(0.01, 1, (bands, H, W)) * high
    return random.astype(dtype)


def write_map(path: Path, pixels: np.ndarray, mask: Any = None, **options: Any) -> Path:
    """Write a tiled GeoTIFF of (bands, H, W), with a mask inside."""
    profile = {
        "driver": "GTiff", "count": len(pixels), "height": pixels.shape[1],
        "width": pixels.shape[2], "dtype": pixels.dtype, "crs": "EPSG:32633", "tiled": True,
        "blockxsize": 64, "blockysize": 64, "transform": Affine(10, 0, 5e5, 0, -10, 5e6),
    }  # fmt: skip
    inside = rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True)
    with inside, rasterio.open(path, "w", **(profile | options)) as data:
        data.write(pixels)
        if mask is not None:
            data.write_mask(mask)
    return path


def crop(path: Path, how: Reading, box: Any = BOX) -> Any:
    return read_image(str(path), how).resized(box, (box[3], box[2]))


def part(pixels: np.ndarray) -> np.ndarray:
    left, top, width, height = BOX
    return pixels[..., top : top + height, left : left + width]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.uint32, np.float32])
def test_maps_are_read_in_the_bands_asked_for(tmp_path, dtype):
    pixels = values(6, dtype)
    path = write_map(tmp_path / "map.jpg", pixels)  # the name says nothing
    opened = read_image(str(path), Reading(6))
    name = np.dtype(dtype).name
    assert (opened.size, opened.kind) == ((W, H), f"GTiff, 6 bands of {name}")
    unit = np.iinfo(dtype).max if name in ("uint16", "uint32") else 1
    got, valid = crop(path, Reading(6))
    assert valid is None
    assert got.dtype == (np.uint8 if dtype == np.uint8 else np.float32)
    assert np.allclose(got, part(pixels) / unit, rtol=1e-6)
    chosen, _ = crop(path, Reading(3, bands=(4, 3, 2)))
    assert np.array_equal(chosen, got[[3, 2, 1]])
    inside = crop(path, Reading(6), (0, 0, W, H))[0]
    view = opened.window((20, 10, 120, 100))
    assert view.size == (120, 100)
    assert np.array_equal(view.resized((10, 30, 100, 64), (64, 100)).pixels, got)
    assert np.array_equal(part(inside), got)


def test_the_bytes_of_a_map_are_read_like_its_file(tmp_path):
    path = write_map(tmp_path / "a.tif", values(3), nodata=7)
    with path.open("rb") as file:
        content, valid = read_image(file, Reading(3)).resized(BOX, (64, 100))
    expected, expected_valid = crop(path, Reading(3))
    assert np.array_equal(content, expected)
    assert (valid is None) == (expected_valid is None)


STACKS = {
    "CYX": ((4, H, W), lambda a: a),
    "YXS": ((H, W, 3), lambda a: a.transpose(2, 0, 1)),
    "TCZYX": ((2, 3, 5, H, W), lambda a: a[0, :, 2]),
    "ZYX": ((4, H, W), lambda a: a[2:3]),
}


@pytest.mark.parametrize("axes", STACKS)
@pytest.mark.parametrize("form", ["ome.tif", "zarr", "ome.zarr"])
def test_stacks_give_one_plane(tmp_path, axes, form):
    shape, plane = STACKS[axes]
    array = np.random.default_rng(1).integers(0, 65536, shape, np.uint16)
    path = tmp_path / f"x.{form}"
    if form == "ome.tif":
        photometric = "rgb" if axes == "YXS" else "minisblack"
        tifffile.imwrite(
            path, array, tile=(64, 64), photometric=photometric, metadata={"axes": axes}
        )
    elif form == "zarr":
        if axes == "ZYX":
            pytest.skip("three axes without names are bands")
        zarr.save_array(path, array)
    else:
        group = zarr.open_group(path, mode="w")
        group.create_array("0", data=array, chunks=(1,) * (array.ndim - 2) + (64, 64))
        names = axes.lower().replace("s", "c")
        described = [{"datasets": [{"path": "0"}], "axes": [{"name": name} for name in names]}]
        group.attrs["ome"] = {"multiscales": described}
    expected = plane(array)
    got, valid = crop(path, Reading(len(expected)))
    assert valid is None
    assert np.allclose(got, part(expected) / 65535, atol=1e-6)
    (only,) = (find_images(str(tmp_path)).name(index) for index in range(1))
    assert only == path.name
    assert find_images(str(path)).name(0) == path.name


@pytest.mark.parametrize(
    ("options", "large", "kind"),
    [
        ({}, 0, "TIFF, 3 bands of 8 bits"),
        ({"tile": (64, 64)}, H * W, "TIFF, 3 bands of 8 bits"),
        ({"tile": (64, 64)}, H * W - 1, "TIFF stack, 3 bands of uint8"),
        ({"bigtiff": True}, 0, "TIFF, 3 bands of 8 bits"),
        ({"bigtiff": True, "tile": (64, 64)}, 0, "TIFF stack, 3 bands of uint8"),
    ],
)
def test_the_content_of_a_tiff_chooses_the_reader(tmp_path, monkeypatch, options, large, kind):
    monkeypatch.setattr(decode, "LARGE", large)
    pixels = values(3).transpose(1, 2, 0)
    tifffile.imwrite(tmp_path / "x.png", pixels, photometric="rgb", metadata=None, **options)
    opened = read_image(str(tmp_path / "x.png"), Reading(3))
    assert opened.kind == kind
    got = opened.resized(BOX, (64, 100)).pixels
    assert np.array_equal(got, part(pixels.transpose(2, 0, 1)))


def test_what_a_stack_means_by_its_values(tmp_path, monkeypatch):
    """As for other TIFF files: turned, without alpha; what is not grey or colour is refused."""
    monkeypatch.setattr(decode, "LARGE", 0)
    pixels, path = values(4).transpose(1, 2, 0), tmp_path / "x.tif"
    tifffile.imwrite(
        path, pixels, tile=(64, 64), photometric="rgb", extrasamples=["unassalpha"], metadata=None,
        extratags=[(274, "H", 1, 6, True)],
    )  # fmt: skip
    opened = read_image(str(path), Reading(3))
    assert opened.size == (H, W)
    whole = opened.resized((0, 0, H, W), (W, H)).pixels
    assert np.array_equal(whole, np.rot90(pixels, -1)[..., :3].transpose(2, 0, 1))
    tifffile.imwrite(
        path, pixels[..., 0], tile=(64, 64), photometric="palette", metadata=None,
        colormap=np.zeros((3, 256), np.uint16),
    )  # fmt: skip
    with pytest.raises(BadImage, match="TIFF stack of PALETTE values: convert it"):
        read_image(str(path), Reading(3))


def test_a_large_map_is_read_in_parts_or_not_at_all(tmp_path):
    write_map(tmp_path / "x.tif", values(3))
    source, images = find_images(str(tmp_path)), Preprocessing((64, 64), (0.5,) * 3, (0.5,) * 3)
    assert images.read(source, 0, H * W - 1, parts=True).size == (W, H)
    with pytest.raises(BadImage, match="200x150 pixels are over max_pixels 29999: read parts"):
        images.read(source, 0, H * W - 1)


def test_values_that_pillow_does_not_read(tmp_path):
    pixels = values(1, np.int32)[0] - 2**30
    tifffile.imwrite(tmp_path / "x.tif", pixels)
    assert np.allclose(crop(tmp_path / "x.tif", Reading(1))[0][0], part(pixels), rtol=1e-6)


@pytest.mark.parametrize(("package", "extra"), [("rasterio", "geo"), ("tifffile", "bio")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, extra):
    path = tmp_path / "x.tif"
    if package == "rasterio":
        write_map(path, values(3))
    else:
        tifffile.imwrite(path, values(3), tile=(64, 64), metadata={"axes": "CYX"}, ome=True)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingReader, match=rf"{package}: pip install 'fcmae\[{extra}\]'"):
        read_image(str(path), Reading(3))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (Reading(3), r"5 bands, not 3: pretrain and .* take --in_chans 5, or --bands '\[1,2,3\]'$"),
        (Reading(8), "5 bands, not 8: pretrain and finetune take --in_chans 5$"),
        (Reading(2, bands=(1, 6)), r"bands \[1, 6\] must be at most 5"),
        (Reading(5, max_pixels=99), "100x64 pixels are over max_pixels 99"),
    ],
)
def test_bands_and_sizes_that_do_not_suit(tmp_path, how, words):
    with pytest.raises(BadImage, match=words):
        crop(write_map(tmp_path / "x.tif", values(5)), how)


def test_one_band_is_repeated_and_a_fourth_alpha_is_dropped(tmp_path):
    grey = crop(write_map(tmp_path / "a.tif", values(1)), Reading(3))[0]
    assert np.array_equal(grey, np.repeat(part(values(1)), 3, 0))
    with pytest.raises(BadImage, match="1 bands, not 4"):
        crop(tmp_path / "a.tif", Reading(4))
    pixels = values(4)
    pixels[3] = 255
    path = write_map(tmp_path / "b.tif", pixels, photometric="rgb", alpha="yes")
    assert np.array_equal(crop(path, Reading(3))[0], part(pixels)[:3])


@pytest.mark.parametrize("form", ["png", "jpg", "npy"])
def test_bands_of_other_images(tmp_path, form):
    pixels = values(3).transpose(1, 2, 0)
    path = tmp_path / f"x.{form}"
    if form == "npy":
        np.save(path, pixels)
    else:
        Image.fromarray(pixels).save(path, quality=100)
    whole = crop(path, Reading(3))[0]
    assert np.array_equal(crop(path, Reading(2, bands=(3, 1)))[0], whole[[2, 0]])
    with pytest.raises(BadImage, match=r"bands \[4\] must be at most 3"):
        crop(path, Reading(1, bands=(4,)))


# Which pixels count


def holes(form: str, folder: Path, garbage: float) -> tuple[Path, str | float, np.ndarray]:
    """An image of 3 bands with `garbage` where no pixel counts, how to read it, and which do."""
    valid = np.random.default_rng(2).random((H, W)) < 0.8
    valid[50:80, 60:100] = False
    folder.mkdir()
    path, pixels = folder / f"x.{form.split()[0]}", values(3)
    nodata: str | float = "auto"
    if form == "tif mask":
        pixels[:, ~valid] = garbage
        write_map(path, pixels, valid)
    elif form == "tif nodata":
        pixels[:, ~valid] = 0
        write_map(path, pixels, nodata=0)
    elif form == "npy NaN":
        floats = values(3, np.float32)
        floats[:, ~valid] = garbage
        floats[1, ~valid] = np.nan
        np.save(path, floats.transpose(1, 2, 0))
    elif form == "png value":
        nodata, pixels[:, ~valid] = 0, 0
        Image.fromarray(pixels.transpose(1, 2, 0)).save(path)
    elif form == "png alpha":
        nodata, pixels[:, ~valid] = "alpha", garbage
        alpha = np.where(valid, 255, 0).astype(np.uint8)[None]
        Image.fromarray(np.concatenate([pixels, alpha]).transpose(1, 2, 0)).save(path)
    else:
        pixels[:, ~valid] = garbage
        Image.fromarray(pixels.transpose(1, 2, 0)).save(path)
        Image.fromarray(valid.astype(np.uint8) * 255).save(f"{path}.msk", format="PNG")
    return path, nodata, valid


FORMS = ["tif mask", "tif nodata", "npy NaN", "png value", "png alpha", "png beside"]


@pytest.mark.parametrize("form", FORMS)
def test_pixels_without_a_value_change_nothing(tmp_path, form):
    found = []
    for garbage in (0, 99):
        path, nodata, valid = holes(form, tmp_path / str(garbage), garbage)
        opened = read_image(str(path), Reading(3, nodata=nodata))
        same = opened.resized(BOX, (64, 100), flip_h=True)
        assert same.valid is not None
        assert np.array_equal(same.valid, part(valid)[:, ::-1])
        assert not same.pixels[:, ~same.valid].any()
        found.append(
            (same, opened.resized(BOX, (32, 50)), opened.resized((0, 0, W, H), (224, 224)))
        )
        with_all = read_image(str(path), Reading(3, nodata="none"))
        if form == "npy NaN":
            with pytest.raises(BadImage, match="not finite"):
                with_all.resized(BOX, (64, 100))
        else:
            assert with_all.resized(BOX, (64, 100)).valid is None
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one.pixels, other.pixels)
        assert np.array_equal(one.valid, other.valid)


def test_a_mask_of_another_size_is_bad(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "x.png")
    Image.new("L", (30, 40)).save(tmp_path / "x.png.msk", format="PNG")
    with pytest.raises(BadImage, match=r"its mask \.msk has 30×40, the image 40×30 pixels"):
        read_image(str(tmp_path / "x.png"), Reading(3))


def test_a_constant_image_stays_constant_up_to_its_edge(tmp_path):
    """Of a filter that takes pixels without a value as zeros, the rim would be dark."""
    pixels = np.full((3, H, W), 173, np.uint8)
    valid = np.add.outer(np.arange(H), np.arange(W)) < 170
    path = write_map(tmp_path / "x.tif", pixels, valid)
    got, counts = read_image(str(path), Reading(3)).resized((0, 0, W, H), (64, 64))
    assert counts is not None
    assert 0.2 < counts.mean() < 0.8
    assert set(got[:, counts].tolist()[0]) == {173}
    nearest = np.asarray(Image.fromarray(valid).resize((64, 64), Image.Resampling.BOX))
    assert np.mean(nearest == counts) > 0.97


def test_eight_bits_have_nodata_in_all_bands_deeper_ones_in_any(tmp_path):
    for dtype, expected in ((np.uint8, [[3, 4]]), (np.uint16, [[1, 2], [3, 4]])):
        pixels = values(3, dtype)
        pixels[0, 1, 2] = pixels[:, 3, 4] = 0
        path = write_map(tmp_path / "x.tif", pixels, nodata=0)
        valid = crop(path, Reading(3), (0, 0, W, H)).valid
        assert np.argwhere(~valid).tolist() == expected


def test_mean_std_and_percentiles_are_those_of_pixels_that_count(tmp_path):
    pixels, mask = values(2, np.float32), np.random.default_rng(3).random((H, W)) < 0.7
    pixels[:, ~mask] = 1e6
    pixels[0, 0, 0], mask[0, 0] = 500, True
    write_map(tmp_path / "x.tif", pixels, mask)
    source, expected = find_images(str(tmp_path)), pixels[:, mask].astype(np.float64)
    images = Preprocessing((H, W), (0.0,) * 2, (1.0,) * 2)
    config = PretrainConfig(
        "", "", in_chans=2, augment=AugmentConfig(mean="data", std="data", clip=[2.0, 98.0])
    )
    mean, std = measure_mean_std(config, images, source)
    assert np.allclose([mean, std], [expected.mean(1), expected.std(1)], rtol=1e-5)
    how = resolve_preprocessing(config, (H, W), source, {})
    low, high = np.percentile(expected, [2, 98], axis=1)
    assert how.clip is not None
    assert np.allclose(how.clip, [low, high], atol=5e-3)
    clipped = expected.clip(np.array(how.clip[0])[:, None], np.array(how.clip[1])[:, None])
    assert np.allclose([how.mean, how.std], [clipped.mean(1), clipped.std(1)], rtol=1e-5)
    assert how.recorded() == {"clip": how.clip}


def test_an_image_without_a_value_can_not_be_measured(tmp_path):
    write_map(tmp_path / "x.tif", np.zeros((3, H, W), np.uint8), nodata=0)
    config = PretrainConfig("", "", augment=AugmentConfig(mean="data"))
    with pytest.raises(InputError, match="no pixel has a value, nodata is auto"):
        resolve_preprocessing(config, (64, 64), find_images(str(tmp_path)), {})


def test_bands_have_to_be_as_many_as_channels():
    with pytest.raises(
        InputError, match=r"bands \[4, 3\] are 2, not in_chans 3: give --in_chans 2"
    ):
        PretrainConfig("", "", bands=[4, 3])


def test_damaged_files_are_bad(tmp_path):
    stack = tmp_path / "y.tif"
    tifffile.imwrite(stack, values(3), tile=(64, 64), metadata={"axes": "CYX"}, ome=True)
    for path in (write_map(tmp_path / "x.tif", values(3), compress="deflate"), stack):
        content = path.read_bytes()
        for length in (12, 200, len(content) // 2):
            path.write_bytes(content[:length])
            with pytest.raises(BadImage):
                crop(path, Reading(3), (0, 0, W, H))
    (tmp_path / "z.zarr").mkdir()
    (tmp_path / "z.zarr" / "zarr.json").write_text(json.dumps({"zarr_format": 3}))
    with pytest.raises(BadImage):
        read_image(str(tmp_path / "z.zarr"), Reading(3))
