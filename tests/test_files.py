import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcmae.data.file_list import FileList, find_images
from fcmae.data.sources import split_holdout
from sparse.errors import InputError

EXAMPLES = settings(max_examples=60, deadline=None)


def touch(root: Path, *names: str | bytes) -> None:
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb"):
            pass


def names(files: FileList) -> list[bytes]:
    return [files.key(i) for i in range(len(files))]


def paths(files: FileList) -> list[bytes]:
    return [files.path(i) for i in range(len(files))]


def a_list(*paths: bytes, roots: tuple[str, ...] = ("/data",)) -> FileList:
    lengths = np.array([len(path) for path in paths], np.uint16)
    blob = np.frombuffer(b"".join(paths), np.uint8)
    return FileList(roots, blob, lengths, np.zeros(len(paths), np.uint16))


def test_a_tree_is_read_in_the_byte_order_of_its_paths(tmp_path: Path) -> None:
    touch(tmp_path, "b.jpg", "a/z.PNG", "a/c/1.webp", "a-b/x.tif", "a.jpeg", "B.npy", "é.bmp")
    touch(tmp_path, "notes.txt", ".hidden.jpg", ".git/x.jpg", "a/.x/y.jpg", "jpg", "a/x.jpg.part")
    files = find_images(str(tmp_path))
    expected = ["B.npy", "a-b/x.tif", "a.jpeg", "a/c/1.webp", "a/z.PNG", "b.jpg", "é.bmp"]
    assert names(files) == sorted(os.fsencode(name) for name in expected)
    assert files.roots == (str(tmp_path),)
    assert files.path(0) == os.fsencode(tmp_path / "B.npy")
    assert files.name(3) == "a/c/1.webp"


def test_names_may_be_any_bytes(tmp_path: Path) -> None:
    odd = [b"a b.jpg", b"line\nbreak.png", b"\xff\xfe.jpg", b"dir\n\xe9/ x .jpg", b"'\".gif"]
    touch(tmp_path, *odd)
    files = find_images(str(tmp_path))
    assert names(files) == sorted(odd)
    assert all(os.path.exists(files.path(i)) for i in range(len(files)))
    files.save(tmp_path / "list")
    assert paths(FileList.load(tmp_path / "list")) == paths(files)


def test_links_are_followed_and_each_folder_is_read_once(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    touch(root, "a/1.jpg", "b/2.jpg", "b/c/3.jpg")
    touch(elsewhere, "4.jpg", "5.jpg")
    (root / "a" / "up").symlink_to(root)  # to the top
    (root / "b" / "self").symlink_to(root / "b")  # to its own folder
    (root / "b" / "c" / "cross").symlink_to(root / "a")  # to a sibling
    (root / "me").symlink_to(root / "me")  # to itself
    (root / "p").symlink_to(root / "q")  # to each other
    (root / "q").symlink_to(root / "p")
    (root / "p.jpg").symlink_to(root / "p.jpg")
    (root / "gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    (root / "out").symlink_to(elsewhere)
    (root / "same.jpg").symlink_to(root / "a" / "1.jpg")
    (root / "one.jpg").symlink_to(elsewhere / "5.jpg")
    (root / "z.jpg").symlink_to(tmp_path / "6.jpg")
    (root / "zz.jpg").symlink_to(tmp_path / "6.jpg")
    touch(tmp_path, "6.jpg")
    files = find_images(str(root))
    folders = [b"a/1.jpg", b"b/2.jpg", b"b/c/3.jpg", b"out/4.jpg", b"out/5.jpg"]
    assert names(files) == sorted([*folders, b"one.jpg", b"same.jpg", b"z.jpg", b"zz.jpg"])


def test_links_to_files_count_as_images(tmp_path: Path) -> None:
    """Content-addressed stores link to files in hidden folders or with other names."""
    touch(tmp_path, "root/.git/objects/1.jpg", "root/blobs/2", "root/run/3.jpg", "root/a/4.jpg")
    root = tmp_path / "root"
    (root / "one.jpg").symlink_to(".git/objects/1.jpg")
    (root / "two.jpg").symlink_to(root / "blobs" / "2")
    (root / "three.jpg").symlink_to(root / "run" / "3.jpg")
    (root / "four.jpg").symlink_to("a/../a/4.jpg")
    files = find_images(str(root), exclude=str(root / "run"))
    assert names(files) == [b"a/4.jpg", b"four.jpg", b"one.jpg", b"three.jpg", b"two.jpg"]


def test_several_sources_keep_their_order_and_their_roots(tmp_path: Path) -> None:
    touch(tmp_path, "x/2.jpg", "x/1.jpg", "w/1.jpg")
    files = find_images([str(tmp_path / "x"), str(tmp_path / "w")])
    assert names(files) == [b"1.jpg", b"2.jpg", b"1.jpg"]
    assert files.path(2) == os.fsencode(tmp_path / "w" / "1.jpg")
    assert files.name(2) == str(tmp_path / "w" / "1.jpg")
    assert files.select([2, 0]).path(0) == files.path(2)


def test_a_source_given_twice_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "2.jpg")
    with pytest.raises(InputError, match="named already"):
        find_images([str(tmp_path), str(tmp_path / "a")])
    files = find_images([str(tmp_path / "a"), str(tmp_path)])
    assert names(files) == [b"1.jpg", b"2.jpg"]


def test_a_text_file_lists_paths(tmp_path: Path) -> None:
    listing = tmp_path / "train.txt"
    absolute = os.fsencode(tmp_path / "deep" / "3.jpg")
    listing.write_bytes(
        b"\xef\xbb\xbf# pictures\n\nb.jpg\r\n  # not this\nsub dir/a.jpg\n\xff.jpg\nb.jpg\n"
        + absolute
    )
    files = find_images(str(listing))
    assert names(files) == sorted([b"b.jpg", b"sub dir/a.jpg", b"\xff.jpg", absolute])
    assert files.path(names(files).index(absolute)) == absolute
    assert files.path(names(files).index(b"b.jpg")) == os.fsencode(tmp_path / "b.jpg")


def test_a_single_image_is_a_source(tmp_path: Path) -> None:
    touch(tmp_path, "one.JPG")
    assert names(find_images(str(tmp_path / "one.JPG"))) == [b"one.JPG"]


def test_the_run_folder_is_skipped(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "runs/a/grid.png", "runs/b/2.png")
    assert names(find_images(str(tmp_path), exclude=str(tmp_path / "runs" / "a"))) == [
        b"1.jpg",
        b"runs/b/2.png",
    ]
    assert len(find_images(str(tmp_path), exclude=str(tmp_path / "not there"))) == 3


def test_bad_sources_name_what_would_work(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.txt").write_text("")
    (tmp_path / "binary").write_bytes(b"\x7fELF\0\0")
    for source, words in (
        (str(tmp_path / "missing"), "No such file"),
        (str(tmp_path / "missing.jpg"), "No such file"),
        (str(tmp_path / "empty"), "jpg, jpeg"),
        (str(tmp_path / "empty" / "x.txt"), "no images"),
        (str(tmp_path / "binary"), "text file"),
        ([], "no source"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            find_images(source)
        assert "\n" not in str(caught.value)


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/1.jpg", "closed/2.jpg")
    scandir = os.scandir

    def refuse(path: bytes) -> object:
        if path.rstrip(b"/").endswith(b"closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"closed.*Permission denied"):
        find_images(str(tmp_path))


def test_the_holdout_depends_on_the_paths_alone() -> None:
    paths = [f"c{i % 7}/{i}.jpg".encode() for i in range(1000)]
    files = a_list(*sorted(paths))
    train, held = split_holdout(files, 32)
    assert len(held) == 32
    assert sorted([*train, *held]) == list(range(1000))
    chosen = {files.key(i) for i in held}

    shuffled = a_list(*reversed(paths))
    assert {shuffled.key(i) for i in split_holdout(shuffled, 32)[1]} == chosen
    fewer = a_list(*[path for path in paths if path in chosen or int(path[3:-4]) % 2])
    assert {fewer.key(i) for i in split_holdout(fewer, 32)[1]} == chosen


@pytest.mark.parametrize(("files", "count"), [(499, 32), (1000, 0), (500, 500)])
def test_small_data_sets_hold_out_nothing(files: int, count: int) -> None:
    train, held = split_holdout(a_list(*[b"%d.jpg" % i for i in range(files)]), count)
    assert len(train) == files
    assert len(held) == 0


def test_a_selection_shares_the_names_and_is_saved_completely(tmp_path: Path) -> None:
    files = a_list(*[b"%d.jpg" % i for i in range(100_000)])
    picked = files.select(np.arange(99_999, 0, -3))
    assert np.shares_memory(picked.names, files.names)
    picked.save(tmp_path / "list")
    loaded = FileList.load(tmp_path / "list")
    assert paths(loaded) == paths(picked)
    assert loaded.path(0) == b"/data/99999.jpg"
    assert loaded.fingerprint() == picked.fingerprint() != files.fingerprint()


def test_memory_per_file() -> None:
    files = a_list(*[b"n01440764/n01440764_%08d.JPEG" % i for i in range(10_000)])
    arrays = (files.names, files.lengths, files.root_ids, files._starts)
    assert sum(array.nbytes for array in arrays) <= 10_000 * (33 + 12)


@EXAMPLES
@given(
    st.lists(st.binary(min_size=1, max_size=40), max_size=20),
    st.binary(min_size=1).filter(lambda root: b"\0" not in root),  # as in any path
)
def test_any_names_survive_saving(
    tmp_path_factory: pytest.TempPathFactory, keys: list[bytes], root: bytes
) -> None:
    files = a_list(*keys, roots=(os.fsdecode(root),))
    target = tmp_path_factory.mktemp("list") / "files"
    files.save(target)
    loaded = FileList.load(target)
    assert names(loaded) == keys
    assert paths(loaded) == paths(files)
    assert loaded.fingerprint() == files.fingerprint()


@EXAMPLES
@given(st.data())
def test_a_damaged_list_is_refused_or_unchanged(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Some bytes of an archive, such as dates, do not affect its content."""
    target = tmp_path_factory.mktemp("list") / "files"
    files = a_list(b"a.jpg", b"b.jpg")
    files.save(target)
    content = bytearray(target.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if cut := data.draw(st.booleans()):
        del content[position:]
    else:
        content[position] ^= data.draw(st.integers(1, 255))
    target.write_bytes(content)
    if cut:
        with pytest.raises(InputError, match="damaged"):
            FileList.load(target)
        return
    with suppress(InputError):
        assert paths(FileList.load(target)) == paths(files)


@pytest.mark.parametrize(
    "change",
    [
        {"lengths": np.array([5, 6], np.uint16)},
        {"lengths": np.array([10], np.uint16)},
        {"lengths": np.array([5.0, 5.0])},
        {"root_ids": np.array([0, 1], np.uint16)},
        {"names": np.zeros(10, np.int64)},
        {"roots": np.array([None])},
        {"roots": np.array(["/data"])},
    ],
    ids=lambda change: "-".join(f"{name} {value.dtype}" for name, value in change.items()),
)
def test_a_list_with_inconsistent_parts_is_refused(
    tmp_path: Path, change: dict[str, np.ndarray]
) -> None:
    a_list(b"a.jpg", b"b.jpg").save(tmp_path / "list")
    with np.load(tmp_path / "list") as stored:
        parts = dict(stored) | change
    with open(tmp_path / "list", "wb") as file:
        np.savez(file, **parts)
    with pytest.raises(InputError, match="damaged"):
        FileList.load(tmp_path / "list")


@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY\x01\0"])
def test_a_file_that_is_not_a_list_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        FileList.load(tmp_path / "list")


def test_a_missing_list_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        FileList.load(tmp_path / "none")
