import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from fcmae.data.decode import read_image
from fcmae.data.image import BadImage, Reading

H, W = 40, 56
LIMIT = 10**7

Array = npt.NDArray[Any]


def colours() -> Array:
    """Blocks of JPEG's size, (H, W, 3), whose colours distinguish all orientations."""
    y, x = np.mgrid[:H, :W] // 8 * 8
    bands = (40 + 4 * y, 230 - 3 * x, 60 + 2 * x + y)
    return np.stack(bands, axis=-1).astype(np.uint8)


def grey() -> Array:
    return colours()[:, :, 0]


def luma(rgb: Array) -> Array:
    """ITU-R 601 grey of an image."""
    return rgb @ np.array([0.299, 0.587, 0.114])


def whole(path: Path, in_chans: int = 3) -> Array:
    """Return a whole image, not resized, (H, W, C) float in [0, 1] (or as stored)."""
    picture = read_image(os.fsencode(path), Reading(in_chans, LIMIT))
    width, height = picture.size
    pixels = picture.resized((0, 0, width, height), (height, width)).pixels.transpose(1, 2, 0)
    assert pixels.dtype in (np.uint8, np.float32)
    return pixels / 255 if pixels.dtype == np.uint8 else pixels.astype(np.float64)


def assert_close(got: Array, expected: Array) -> None:
    """Compare to within 2/255; `expected` is in [0, 1], with or without a channel axis."""
    expected = np.broadcast_to(expected.reshape(*expected.shape[:2], -1), got.shape)
    assert np.abs(got - expected).max() <= 2 / 255


def alpha() -> Array:
    return np.tile(np.linspace(0, 255, W).astype(np.uint8), (H, 1))


def save(tmp_path: Path, image: Image.Image, form: str, **options: Any) -> Path:
    path = tmp_path / "picture"
    image.save(path, form, **options)
    return path


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000", "JPEG"])
def test_colour(tmp_path: Path, form: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "WEBP": {"lossless": True},
        "JPEG": {"quality": 100, "subsampling": 0},
    }
    path = save(tmp_path, Image.fromarray(colours()), form, **options.get(form, {}))
    assert_close(whole(path), colours() / 255)
    assert_close(whole(path, 1), luma(colours()) / 255)
    with_alpha = whole(path, 4)
    assert_close(with_alpha[..., :3], colours() / 255)
    assert (with_alpha[..., 3] == 1).all()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "PPM"])
def test_grey(tmp_path: Path, form: str) -> None:
    options = {"quality": 100} if form == "JPEG" else {}
    path = save(tmp_path, Image.fromarray(grey()), form, **options)
    for in_chans in (1, 3):
        assert_close(whole(path, in_chans), grey() / 255)
    both = whole(path, 2)
    assert_close(both[..., :1], grey() / 255)
    assert (both[..., 1] == 1).all()


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_dropped_or_kept_but_never_multiplied(tmp_path: Path, form: str) -> None:
    image = Image.fromarray(np.dstack([colours(), alpha()]))
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    path = save(tmp_path, image, form, **options)
    assert_close(whole(path), colours() / 255)
    assert_close(whole(path, 4), np.dstack([colours(), alpha()]) / 255)


def test_grey_with_alpha(tmp_path: Path) -> None:
    path = save(tmp_path, Image.fromarray(np.dstack([grey(), alpha()]), "LA"), "PNG")
    assert_close(whole(path), grey() / 255)
    assert_close(whole(path, 1), grey() / 255)
    assert_close(whole(path, 2), np.dstack([grey(), alpha()]) / 255)
    assert_close(whole(path, 4), np.dstack([grey()] * 3 + [alpha()]) / 255)


@pytest.mark.parametrize("transparent", [None, 3, bytes(range(16))])
@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_palette(tmp_path: Path, form: str, transparent: int | bytes | None) -> None:
    if form == "GIF" and isinstance(transparent, bytes):
        pytest.skip("a GIF has one transparent colour")
    table = np.random.default_rng(0).integers(0, 256, (16, 3), dtype=np.uint8)
    indices = np.arange(H * W, dtype=np.uint8).reshape(H, W) % 16
    image = Image.fromarray(indices, "P")
    image.putpalette(table.tobytes())
    options = {} if transparent is None else {"transparency": transparent}
    path = save(tmp_path, image, form, **options)
    assert_close(whole(path), table[indices] / 255)
    assert_close(whole(path, 1), luma(table[indices]) / 255)
    opacity = np.full(16, 255)
    if isinstance(transparent, int):
        opacity[transparent] = 0
    elif transparent is not None:
        opacity = np.frombuffer(transparent, np.uint8)
    assert_close(whole(path, 4)[..., 3:], opacity[indices] / 255)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP", "PPM"])
def test_one_bit(tmp_path: Path, form: str) -> None:
    bits = (grey() // 16 % 2).astype(bool)
    path = save(tmp_path, Image.fromarray(bits), form)
    assert_close(whole(path), bits.astype(float))
    assert_close(whole(path, 1), bits.astype(float))


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk(tmp_path: Path, form: str) -> None:
    ink = np.dstack([colours(), grey() // 3])
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    path = save(tmp_path, Image.fromarray(ink, "CMYK"), form, **options)
    paper = (255 - ink[..., :3].astype(float)) * (255 - ink[..., 3:].astype(float)) / 255**2
    assert_close(whole(path), paper)


def test_ycck(tmp_path: Path) -> None:
    """Adobe's inverted YCCK: a CMYK file whose marker says that its first three bands are YCC."""
    stored = np.dstack([128 + colours() // 4, grey() // 2])  # read as Y, Cb, Cr and K
    buffer = io.BytesIO()
    Image.fromarray(255 - stored, "CMYK").save(buffer, "JPEG", quality=100)
    content = bytearray(buffer.getvalue())
    content[content.index(b"Adobe") + 11] = 2
    (tmp_path / "x.jpg").write_bytes(content)
    y, cb, cr, k = np.moveaxis(stored.astype(float), -1, 0)
    red = y + 1.402 * (cr - 128)
    green = y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128)
    blue = y + 1.772 * (cb - 128)
    ink = 255 - np.stack([red, green, blue], axis=-1).clip(0, 255)  # libjpeg's YCCK → CMYK
    expected = ink * k[..., None] / 255**2  # inverted: 0 is full ink
    assert_close(whole(tmp_path / "x.jpg"), expected)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bit_grey_is_divided_not_clipped(tmp_path: Path, form: str) -> None:
    values = np.linspace(0, 65535, H * W).reshape(H, W).astype(np.uint16)
    path = save(tmp_path, Image.fromarray(values), form)
    for in_chans in (1, 3):
        got = whole(path, in_chans)
        assert np.abs(got - values[..., None] / 65535).max() < 1e-5
    assert (whole(path, 4)[..., 3] == 1).all()


def png(values: Array, colour_type: int) -> bytes:
    """Build a 16-bit PNG by hand, since Pillow cannot write one in colour."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(("bands", "colour_type"), [(3, 2), (4, 6), (2, 4)])
def test_sixteen_bit_colour_is_scaled(tmp_path: Path, bands: int, colour_type: int) -> None:
    values = np.random.default_rng(1).integers(0, 65536, (H, W, bands)).astype(np.uint16)
    (tmp_path / "x.png").write_bytes(png(values, colour_type))
    expected = values[..., : 3 if bands > 2 else 1] / 65535
    assert_close(whole(tmp_path / "x.png"), expected)


def test_float_tiff_is_read_unscaled(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(0, 3, (H, W)).astype(np.float32)
    path = save(tmp_path, Image.fromarray(values), "TIFF")
    assert np.abs(whole(path, 1)[..., 0] - values).max() < 1e-5
    values[3, 4] = np.nan
    path = save(tmp_path, Image.fromarray(values), "TIFF")
    box = (0, 0, W, H)
    pixels, valid = read_image(str(path), Reading(1)).resized(box, (H, W))
    assert valid is not None
    assert np.argwhere(~valid).tolist() == [[3, 4]]
    assert pixels[0, 3, 4] == 0
    with pytest.raises(BadImage, match="not finite"):
        read_image(str(path), Reading(1, nodata="none")).resized(box, (H, W))


def test_32_bit_integers_are_kept(tmp_path: Path) -> None:
    values = np.arange(H * W, dtype=np.int32).reshape(H, W) - 1000
    path = save(tmp_path, Image.fromarray(values), "TIFF")
    pytest.importorskip("tifffile")
    assert np.array_equal(whole(path, 1)[..., 0], values)


TURNED: dict[int, Callable[[Array], Array]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}
"""How a viewer shows the stored pixels (EXIF 2.3, tag 274)."""


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, dict[str, Any]] = {
        "WEBP": {"lossless": True},
        "JPEG": {"quality": 100, "subsampling": 0},
    }
    path = save(tmp_path, Image.fromarray(colours()), form, exif=exif, **options.get(form, {}))
    shown = TURNED[orientation](colours())
    assert_close(whole(path), shown / 255)

    picture = read_image(str(path), Reading(3, LIMIT))
    assert picture.size == (shown.shape[1], shown.shape[0])
    left, top, width, height = 5, 9, 20, 14
    for flip_h, flip_v in ((False, False), (True, False), (False, True)):
        got = picture.resized((left, top, width, height), (height, width), flip_h, flip_v).pixels
        part = shown[top : top + height, left : left + width]
        part = part[:: -1 if flip_v else 1, :: -1 if flip_h else 1]
        assert_close(got.transpose(1, 2, 0) / 255, part / 255)


def test_broken_exif_and_unknown_orientations_leave_the_image_unchanged(tmp_path: Path) -> None:
    for exif in (b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\x63\0\0"):
        path = save(
            tmp_path, Image.fromarray(colours()), "JPEG", quality=100, subsampling=0, exif=exif
        )
        assert_close(whole(path), colours() / 255)


def test_colour_profiles_are_ignored(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    path = save(tmp_path, Image.fromarray(colours()), "PNG", icc_profile=profile)
    assert_close(whole(path), colours() / 255)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF"])
def test_only_the_first_frame_is_read(tmp_path: Path, form: str) -> None:
    other = Image.new("RGB", (W, H), (0, 0, 0))
    first = Image.new("RGB", (W, H), (200, 100, 50))
    options = {"lossless": True} if form == "WEBP" else {}
    path = save(tmp_path, first, form, save_all=True, append_images=[other, other], **options)
    assert_close(whole(path), np.full((H, W, 3), (200, 100, 50)) / 255)


def test_content_decides_the_format_not_the_name(tmp_path: Path) -> None:
    for name in ("x.jpg", "x.npy", "x.tif", "x"):
        Image.fromarray(colours()).save(tmp_path / name, "PNG")
        assert_close(whole(tmp_path / name), colours() / 255)
    np.save(tmp_path / "y.npy", colours())
    (tmp_path / "y.npy").rename(tmp_path / "y.jpg")
    assert_close(whole(tmp_path / "y.jpg"), colours() / 255)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("kind", ["u1", "<u2", ">u2", "f2", "f4", ">f8"])
def test_arrays(tmp_path: Path, channels: int, kind: str) -> None:
    values = np.random.default_rng(0).integers(0, 200, (H, W, channels)).astype(kind)
    scale = {"u1": 255, "u2": 65535}.get(kind[-2:], 1)
    np.save(tmp_path / "x.npy", np.asfortranarray(values))
    assert np.abs(whole(tmp_path / "x.npy", channels) - values / scale).max() < 1e-4
    if channels == 1:
        np.save(tmp_path / "x.npy", values[..., 0])
        assert np.abs(whole(tmp_path / "x.npy", 1) - values / scale).max() < 1e-4


def test_unsuitable_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    for array, words in (
        (np.zeros((4, 4, 3), np.uint8), "bands"),
        (np.zeros((3, 4, 6), np.uint8), "last"),
        (np.zeros(4, np.uint8), "shape"),
        (np.zeros((0, 4, 5), np.uint8), "shape"),
        (np.zeros((4, 4, 5), np.int64), "int64"),
        (np.zeros((4000, 4000, 5), np.uint8), "max_pixels"),
        (np.array([[None]]), "object"),
    ):
        np.save(path, array, allow_pickle=True)
        with pytest.raises(BadImage, match=words):
            read_image(str(path), Reading(5, LIMIT))
    content = path.read_bytes()
    for length in (3, 7, 20, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(BadImage):
            read_image(str(path), Reading(5, LIMIT))


def test_image_files_have_at_most_four_channels(tmp_path: Path) -> None:
    path = save(tmp_path, Image.fromarray(colours()), "PNG")
    with pytest.raises(BadImage, match=r"\.npy"):
        whole(path, 5)


def bomb(form: str, side: int) -> bytes:
    """Build a file whose header declares side x side pixels, with almost no data."""
    if form == "PNG":
        return png(np.zeros((1, 1), np.uint16), 0).replace(
            struct.pack(">II", 1, 1), struct.pack(">II", side, side), 1
        )
    buffer = io.BytesIO()
    Image.new("L" if form == "JPEG" else "RGB", (48, 80)).save(buffer, form)
    content = bytearray(buffer.getvalue())
    if form == "JPEG":
        start = content.index(b"\xff\xc0") + 5
        content[start : start + 4] = struct.pack(">HH", side, side)
    elif form == "TIFF":
        for tag, old in ((256, 48), (257, 80)):
            start = content.index(struct.pack("<HHII", tag, 4, 1, old))
            content[start + 8 : start + 12] = struct.pack("<I", side)
    elif form == "BMP":
        content[18:26] = struct.pack("<ii", side, side)
    elif form == "GIF":
        content[6:10] = struct.pack("<HH", side, side)
    return bytes(content)


def png_with_crc(content: bytes) -> bytes:
    header = content[12:29]
    return content[:29] + struct.pack(">I", zlib.crc32(header)) + content[33:]


@pytest.mark.parametrize("side", [3300, 5000, 31_622])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP", "GIF"])
def test_bombs_are_refused_by_their_header(tmp_path: Path, form: str, side: int) -> None:
    content = bomb(form, side)
    (tmp_path / "x").write_bytes(png_with_crc(content) if form == "PNG" else content)
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage, match="max_pixels 10000000"):
            read_image(str(tmp_path / "x"), Reading(3, LIMIT))
    assert limit == Image.MAX_IMAGE_PIXELS


def test_the_limit_may_exceed_pillows_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert_close(whole(save(tmp_path, Image.fromarray(colours()), "PNG")), colours() / 255)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (1, 1), (1, 3), (2, 300)])
@pytest.mark.parametrize("deep", [False, True])
def test_thin_images(tmp_path: Path, size: tuple[int, int], deep: bool) -> None:
    top = 65535 if deep else 255
    values = np.linspace(0, top, size[0] * size[1]).reshape(size[::-1])
    image = Image.fromarray(values.astype(np.uint16 if deep else np.uint8))
    picture = read_image(str(save(tmp_path, image, "PNG")), Reading(3, LIMIT))
    for box in ((0, 0, *size), (0, 0, 1, 1)):
        part = values[: box[3], : box[2]].astype(np.float32) / top
        for img_size in ((64, 96), (32, 1), (1, 32)):
            got = picture.resized(box, img_size).pixels
            expected = Image.fromarray(part).resize(img_size[::-1], Image.Resampling.BICUBIC)
            assert_close(
                got.transpose(1, 2, 0) / (1 if deep else 255), np.asarray(expected).clip(0, 1)
            )


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (1, 1)])
def test_thin_jpegs(tmp_path: Path, size: tuple[int, int]) -> None:
    path = save(tmp_path, Image.new("RGB", size, (9, 99, 199)), "JPEG")
    for fast in (False, True):
        got = (
            read_image(str(path), Reading(3, LIMIT))
            .resized((0, 0, *size), (64, 96), fast=fast)
            .pixels
        )
        assert np.abs(got - np.array([9, 99, 199]).reshape(3, 1, 1)).max() <= 2


@pytest.mark.parametrize("img_size", [(96, 128), (32, 352), (320, 416)])
def test_an_image_narrowed_in_strips_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, img_size: tuple[int, int]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    box = (10, 20, 401, 270)
    for values in (pixels, pixels[..., 0].astype(np.uint16) * 256):
        picture = read_image(str(save(tmp_path, Image.fromarray(values), "PNG")), Reading(3, LIMIT))
        at_once = picture.resized(box, img_size).pixels
        with monkeypatch.context() as patch:
            patch.setattr("fcmae.data.resize._STRIP_BYTES", 4 * 391 * 7)
            in_strips = picture.resized(box, img_size).pixels
        assert np.abs(at_once.astype(float) - in_strips).max() < 1e-5


def test_fast_decoding_of_a_large_jpeg_is_close(tmp_path: Path) -> None:
    image = Image.fromarray(colours()).resize((1060, 740), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    for in_chans in (1, 3):
        picture = read_image(
            str(save(tmp_path, image, "JPEG", exif=exif)), Reading(in_chans, LIMIT)
        )
        exact = picture.resized((13, 40, 700, 900), (96, 64)).pixels.astype(int)
        fast = picture.resized((13, 40, 700, 900), (96, 64), fast=True).pixels.astype(int)
        assert 0 < np.abs(exact - fast).mean() < 2


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "JPEG2000"])
def test_truncated_files_are_bad(tmp_path: Path, form: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    path = save(tmp_path, Image.fromarray(noise), form)
    content = path.read_bytes()
    for part in (0, 0.01, 0.1, 0.5, 0.9):
        path.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(BadImage) as caught:
            whole(path)
        assert "\n" not in str(caught.value)


def test_a_file_that_is_not_an_image_is_bad(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture\n")
    (tmp_path / "zeros.jpg").write_bytes(bytes(5000))
    (tmp_path / "code.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, words in (
        ("text.jpg", "known format"),
        ("zeros.jpg", "known format"),
        ("code.eps", "known format"),
        ("missing.jpg", "No such file"),
        ("pipe.jpg", "regular"),
        ("", "regular"),
    ):
        with pytest.raises(BadImage, match=words):
            read_image(str(tmp_path / name), Reading(3, LIMIT))


@pytest.mark.parametrize(
    "error", [MemoryError(), zlib.error("cut"), LookupError("mode"), OSError("x")]
)
def test_any_exception_of_a_decoder_is_a_bad_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(self: Image.Image) -> None:
        raise error

    path = save(tmp_path, Image.fromarray(colours()), "PNG")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(BadImage, match=type(error).__name__):
        read_image(str(path), Reading(3, LIMIT))


def test_an_interrupt_while_decoding_is_not_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Image.Image) -> None:
        raise KeyboardInterrupt

    path = save(tmp_path, Image.fromarray(colours()), "PNG")
    limit = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read_image(str(path), Reading(3, LIMIT))
    assert limit == Image.MAX_IMAGE_PIXELS


def small_files() -> list[bytes]:
    files = []
    for form in ("JPEG", "PNG", "TIFF", "GIF", "WEBP", "BMP", "PPM", "JPEG2000", "AVIF"):
        buffer = io.BytesIO()
        Image.fromarray(colours()).save(buffer, form)
        files.append(buffer.getvalue())
    buffer = io.BytesIO()
    np.save(buffer, colours())
    return [*files, buffer.getvalue()]


FILES = small_files()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_gives_pixels_or_bad_image_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(data.draw(st.sampled_from(FILES)))
    reach = data.draw(st.sampled_from([64, 400, len(content)]))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(reach, len(content)) - 1))] = data.draw(
            st.integers(0, 255)
        )
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    try:
        picture = read_image(str(path), Reading(3, 10**6))
        pixels = picture.resized((0, 0, *picture.size), (32, 64)).pixels
    except BadImage:
        return
    assert pixels.shape == (3, 32, 64)
