"""Objects: their files, what is wrong with them, and how they follow a crop."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as v2
from torchvision.tv_tensors import BoundingBoxes, Mask

from fcmae.data.augment import Geometry, jittered_geometry
from fcmae.data.image import BadImage
from fcmae.data.loader import padded
from fcmae.data.object_files import find_objects, find_place, image_ids, read_split
from fcmae.data.objects import (
    ObjectLabels,
    decode,
    enclosing,
    encode_part,
    moved,
    moved_boxes,
)
from fcmae.data.sample import Sample, collate, each_target
from fcmae.train.run_paths import RunPaths
from finetune.config import FinetuneAugmentConfig
from finetune.labels import resolve_task, save_labels
from finetune.tasks.classify import Classify
from finetune.tasks.detect import Detect, Instances
from sparse.errors import InputError
from tests.conftest import write_classes

SIZE = (60, 40)
"""(width, height) of the images that `write_objects` makes."""

THINGS = {
    "0.png": [("cell", (10, 5, 30, 25)), ("dust", (40, 20, 46, 26))],
    "1.png": [],
    "2.png": [("cell", (0, 0, 12, 9))],
}
"""The objects of each image, rectangles: classes and boxes."""


def picture(index: int) -> Image.Image:
    pixels = np.full((*SIZE[::-1], 3), 40, np.uint8)
    for name, (left, top, right, bottom) in THINGS[f"{index}.png"]:
        pixels[top:bottom, left:right] = (200, 60 + 90 * (name == "dust"), 60)
    return Image.fromarray(pixels)


def write_images(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(3):
        picture(index).save(folder / f"{index}.png")
    return folder


def coco_file(masks: bool = True) -> dict[str, Any]:
    """A COCO file of `THINGS`, with gaps in the numbers of categories."""
    images = [
        {"id": 10 + n, "file_name": name, "width": SIZE[0], "height": SIZE[1]}
        for n, name in enumerate(THINGS)
    ]
    things: list[dict[str, Any]] = []
    for n, inside in enumerate(THINGS.values()):
        for name, (left, top, right, bottom) in inside:
            polygon = [left, top, right, top, right, bottom, left, bottom]
            things.append({
                "id": len(things) + 1, "image_id": 10 + n,
                "category_id": {"dust": 3, "cell": 17}[name],
                "bbox": [left, top, right - left, bottom - top],
                "iscrowd": 0, **({"segmentation": [polygon]} if masks else {}),
            })  # fmt: skip
    categories = [{"id": 3, "name": "dust"}, {"id": 17, "name": "cell"}]
    return {"images": images, "annotations": things, "categories": categories}


def write_coco(root: Path, file: dict[str, Any] | None = None) -> Path:
    for split in ("train", "val"):
        folder = write_images(root / split)
        (folder / "_annotations.coco.json").write_text(json.dumps(file or coco_file()))
    return root


def write_coco_2017(root: Path) -> Path:
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        write_images(root / f"{split}2017")
        file = root / "annotations" / f"instances_{split}2017.json"
        file.write_text(json.dumps(coco_file()))
    return root


def write_voc(root: Path) -> Path:
    write_images(root / "JPEGImages")
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for name, inside in THINGS.items():
        things = "".join(
            f"<object><name>{kind}</name><bndbox><xmin>{box[0] + 1}</xmin><ymin>{box[1] + 1}</ymin>"
            f"<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
            for kind, box in inside
        )
        size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height></size>"
        text = f"<annotation>{size}{things}</annotation>"
        (root / "Annotations" / f"{Path(name).stem}.xml").write_text(text)
    for split in ("train", "val"):
        (root / "ImageSets/Main" / f"{split}.txt").write_text("0\n1\n2\n")
    return root


def write_yolo(root: Path, outside: bool = True) -> Path:
    for split in ("train", "val"):
        places = ("images", split) if outside else (split, "images")
        write_images(root.joinpath(*places))
        labels = root.joinpath(*(part.replace("images", "labels") for part in places))
        labels.mkdir(parents=True)
        for name, inside in THINGS.items():
            lines = [
                f"{int(kind == 'cell')} {(box[0] + box[2]) / 2 / SIZE[0]} "
                f"{(box[1] + box[3]) / 2 / SIZE[1]} {(box[2] - box[0]) / SIZE[0]} "
                f"{(box[3] - box[1]) / SIZE[1]}\n"
                for kind, box in inside
            ]
            if lines:
                (labels / f"{Path(name).stem}.txt").write_text("".join(lines))
    (root / "data.yaml").write_text("names: [dust, cell]\nnc: 2\n")
    return root


def write_label_images(root: Path) -> Path:
    for split in ("train", "val"):
        write_images(root / split / "images")
        (root / split / "instances").mkdir()
        for name, inside in THINGS.items():
            numbers = np.zeros(SIZE[::-1], np.uint16)
            for number, (_, box) in enumerate(inside):
                numbers[box[1] : box[3], box[0] : box[2]] = 300 * (number + 1)
            Image.fromarray(numbers).save(root / split / "instances" / name)
    return root


WRITERS: dict[str, Callable[[Path], Path]] = {
    "coco": write_coco,
    "coco 2017": write_coco_2017,
    "voc": write_voc,
    "yolo": write_yolo,
    "roboflow": lambda root: write_yolo(root, outside=False),
    "label images": write_label_images,
}


def found(root: Path, masks: bool = False, **changes: Any) -> ObjectLabels:
    given = {"val_fraction": 0.0, "max_bad": 0.05} | changes
    return find_objects(str(root), masks=masks, **given).train.labels


def whole(labels: ObjectLabels, index: int) -> dict[str, Any]:
    return labels.cut(index, Geometry(SIZE, (0, 0, *SIZE)), None)


@pytest.mark.parametrize("name", WRITERS)
def test_all_formats_have_the_same_objects(name: str, tmp_path: Path) -> None:
    root = WRITERS[name](tmp_path / "data")
    masks = name in ("coco", "coco 2017", "label images")
    labels = found(root, masks)
    one_class = name == "label images"
    assert labels.names == (("object",) if one_class else ("cell", "dust"))
    assert len(labels) == 3
    for index, (file, inside) in enumerate(THINGS.items()):
        assert labels.files.name(index) == file
        there = whole(labels, index)
        expected = np.array([box for _, box in inside], np.float32).reshape(-1, 4)
        np.testing.assert_allclose(there["boxes"], expected, atol=1e-4)
        classes = [1 if one_class or kind == "cell" else 2 for kind, _ in inside]
        assert there["labels"].tolist() == classes
        assert there["size"].tolist() == [[40, 60]]
        assert not there["crowd"].any()
        assert ("masks" in there) is masks
        for rle, (_, (left, top, right, bottom)) in zip(
            there.get("masks", [None] * len(inside)), inside, strict=True
        ):
            filled = np.zeros(SIZE[::-1], np.uint8)
            filled[top:bottom, left:right] = 1
            assert rle is None or (decode(rle) == filled).all()
    if masks:
        assert labels.has_masks
    else:
        with pytest.raises(InputError, match="have no masks: use --task detect"):
            found(root, masks=True)
    if name.startswith("coco"):
        images = root / ("train" if name == "coco" else "train2017")
        assert image_ids(str(images)) == {b"0.png": 10, b"1.png": 11, b"2.png": 12}
    else:
        assert image_ids(str(root)) == {}


def test_auto_takes_the_kind_of_the_layout(tmp_path: Path) -> None:
    plain = write_coco(tmp_path / "plain", coco_file(masks=False))
    assert resolve_task("auto", plain) is Detect
    for name in ("voc", "yolo", "roboflow"):
        assert resolve_task("auto", WRITERS[name](tmp_path / name)) is Detect
    both = write_coco(tmp_path / "both")
    with pytest.raises(InputError, match=r"several kinds.*--task detect .*; --task instances"):
        resolve_task("auto", both)
    for kind in (Detect, Instances):
        assert resolve_task(kind.task, both) is kind
    assert resolve_task("auto", write_classes(tmp_path / "classes")) is Classify


def test_a_part_of_a_folder_is_held_out(tmp_path: Path) -> None:
    """Also of one split without a folder of its own; some images keep their objects."""
    root = write_coco(tmp_path) / "train"
    data = find_objects(str(root), 0.34, 0.05, masks=True)
    assert (len(data.train.labels), len(data.val.labels)) == (2, 1)
    kept = {}
    for split in data[:2]:
        for index in range(len(split.labels)):
            kept[split.source.name(index)] = whole(split.labels, index)
    every = read_split(root, "", None, masks=True)
    for index in range(3):
        one, other = whole(every, index), kept[every.files.name(index)]
        assert one["boxes"].tolist() == other["boxes"].tolist()
        assert one["masks"] == other["masks"]
    with pytest.raises(InputError, match=r"has its own val: leave val_fraction at 0, not 0.5"):
        find_objects(str(tmp_path), 0.5, 0.05, masks=False)
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(InputError, match="has no val: add it, or give --val_fraction"):
        find_objects(str(tmp_path), 0.0, 0.05, masks=False)


def test_labels_are_stored(tmp_path: Path) -> None:
    for name in ("coco", "yolo", "label images"):
        labels = found(WRITERS[name](tmp_path / name), masks=name != "yolo")
        np.savez(tmp_path / "stored.npz", **labels.arrays())
        with np.load(tmp_path / "stored.npz") as arrays:
            again = ObjectLabels.stored(labels.files, labels.names, arrays)
        for index in range(3):
            for one, other in zip(
                whole(labels, index).values(), whole(again, index).values(), strict=True
            ):
                assert np.array_equal(one, other)


# What is wrong with labels


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    file = coco_file()
    change(file)
    return file


@pytest.mark.parametrize(
    ("change", "reason", "left"),
    [
        (lambda f: f["annotations"][0].update(bbox=[30, 25, -20, -20]), "corners are swapped", 3),
        (lambda f: f["annotations"][0].update(bbox=[50, 30, 20, 20]), "partly outside", 3),
        (lambda f: f["annotations"][0].update(bbox=[70, 30, 20, 20]), "no area inside", 2),
        (lambda f: f["annotations"][0].update(bbox=[5, 5, 0, 9]), "no area inside", 2),
        (lambda f: f["annotations"][0].update(bbox=[5, float("nan"), 5, 9]), "not finite", 2),
        (lambda f: f["annotations"][0].update(image_id=99), "image is missing", 2),
        (lambda f: f["annotations"][0].update(category_id=1), "category is missing", 2),
        (lambda f: f["annotations"][0].update(segmentation=[[1, 1, 5, 5]]), "fewer than three", 2),
        (lambda f: f["annotations"][0].update(segmentation=[]), "has no mask", 2),
        (
            lambda f: f["annotations"][0].update(segmentation={"size": [9, 9], "counts": [0, 81]}),
            "another size than the image", 2,
        ),
        (lambda f: f["annotations"][0].update(segmentation={"counts": 1}), "can't be read", 2),
        (
            lambda f: f["annotations"][0].update(segmentation={"size": [40, 60], "counts": "zzz"}),
            "can't be read", 2,
        ),
        (
            lambda f: f["annotations"][0].update(segmentation={"size": [40, 60], "counts": [3, 9]}),
            "can't be read", 2,
        ),
    ],
)  # fmt: skip
def test_faults_are_counted(
    change: Any, reason: str, left: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Boxes are put right or objects left out; the log says how many, and labels list them."""
    labels = found(write_coco(tmp_path, changed(change)), masks=True)
    assert len(labels.boxes) == left
    assert any("1 objects in " in line and reason in line for line in caplog.messages)
    ((_, what),) = labels.faults
    assert reason in what
    for index in range(3):
        boxes = whole(labels, index)["boxes"]
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert ((boxes >= 0) & (boxes <= [*SIZE, *SIZE])).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: f.pop("categories"), "is not a COCO file .*categories"),
        (lambda f: f.update(annotations=[{}]), "is not a COCO file"),
        (lambda f: f.update(annotations=[]), "has no object: label some"),
        (lambda f: f.update(images=[], annotations=[]), "names no images"),
        (lambda f: [a.update(iscrowd=1) for a in f["annotations"]], "is a crowd"),
        (lambda f: f["images"][1].update(file_name="0.png"), "has the file_name '0.png' twice"),
        (lambda f: f["categories"][0].update(name="CELL"), "similar classes"),
        (
            lambda f: [i.update(file_name=f"a{i['id']}") for i in f["images"]],
            "3 of 3 images .* are",
        ),
    ],
)
def test_files_that_cant_be_used(change: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason):
        found(write_coco(tmp_path, changed(change)))


def test_images_that_are_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_coco(tmp_path)
    (root / "train/1.png").unlink()
    with pytest.raises(InputError, match=r"1 of 3 images of .* are not there: '1.png'"):
        found(root)
    assert len(found(root, max_bad=0.5)) == 3
    assert any("are not there: '1.png'" in line for line in caplog.messages)


def test_other_classes_in_val(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    file = changed(lambda f: f["categories"].append({"id": 4, "name": "worm"}))
    (root / "val/_annotations.coco.json").write_text(json.dumps(file))
    with pytest.raises(InputError, match="classes that training does not have: 'worm'"):
        found(root)


def test_voc_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Swapped corners are counted, difficult objects are crowds, the image's size must agree."""
    root = write_voc(tmp_path)
    file = root / "Annotations/0.xml"
    text = file.read_text()
    swapped = text.replace("<xmin>11</xmin>", "<xmin>30</xmin>").replace(
        "<xmax>30</xmax>", "<xmax>11</xmax>", 1
    )
    file.write_text(
        swapped.replace("<name>dust</name>", "<name>dust</name><difficult>1</difficult>")
    )
    labels = found(root)
    there = whole(labels, 0)
    assert there["boxes"][0].tolist() == [10, 5, 30, 25]
    assert there["crowd"].tolist() == [False, True]
    assert any("corners are swapped" in line for line in caplog.messages)
    file.write_text(text.replace("<width>60</width>", "<width>61</width>"))
    with pytest.raises(BadImage, match="the labels are for 61×40 pixels, the image has 60×40"):
        whole(found(root), 0)
    file.write_text(text[:-20])
    with pytest.raises(InputError, match=r"0.xml is not a Pascal VOC file"):
        found(root)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("0 0.5 0.5 0.2", "expected a class and the box's centre and sides"),
        ("x 0.5 0.5 0.2 0.1", "'x 0.5 0.5 0.2 0.1': expected a class"),
        ("2 0.5 0.5 0.2 0.1", "0.txt, line 1 has class 2: the classes are 0, 1"),
        ("0 30 20 10 10", "has pixels, not shares of the image's sides, in 1 of 1 boxes"),
    ],
)
def test_yolo_files_that_cant_be_used(line: str, reason: str, tmp_path: Path) -> None:
    root = write_yolo(tmp_path)
    for file in (root / "labels/train").iterdir():
        file.unlink()
    (root / "labels/train/0.txt").write_text(line)
    with pytest.raises(InputError, match=reason):
        found(root)


def test_yolo_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Boxes beyond the image are clamped; polygons count as the box around them."""
    root = write_yolo(tmp_path)
    file = root / "labels/train/0.txt"
    file.write_text("0 0.9 0.5 0.4 0.5\n1 0.1 0.1 0.5 0.1 0.5 0.6\n")
    there = whole(found(root), 0)
    np.testing.assert_allclose(there["boxes"], [[42, 10, 60, 30], [6, 4, 30, 24]], atol=1e-4)
    assert any("clamped" in line for line in caplog.messages)
    (root / "data.yaml").unlink()
    assert found(root).names == ("0", "1")
    (root / "classes.txt").write_text("dust\ncell\n")
    assert found(root).names == ("cell", "dust")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("{0: dust, 2: cell}", "the classes are 0, 2"),
        ("{'0': dust, '1': cell, '10': worm}", None),
        ("dust", "data.yaml has no list of names"),
        ("", "data.yaml has no list of names"),
        ("5", "data.yaml has no list of names"),
    ],
)
def test_names_of_yolo(names: str, expected: str | None, tmp_path: Path) -> None:
    """By number, also where these are texts or have gaps; data.yaml before other files."""
    root = write_yolo(tmp_path)
    (root / "augment.yaml").write_text("hsv: 0.1\n")
    (root / "data.yaml").write_text(f"names: {names}\n")
    if expected is None:
        (root / "labels/train/1.txt").write_text("10 0.5 0.5 0.2 0.1\n")
        assert found(root).names == ("cell", "dust", "worm")
        assert whole(found(root), 1)["labels"].tolist() == [3]
    else:
        with pytest.raises(InputError, match=expected):
            found(root)


def test_labels_of_images_that_are_not_there(tmp_path: Path) -> None:
    root = write_yolo(tmp_path)
    (root / "images/train/0.png").unlink()
    with pytest.raises(InputError, match=r"1 files in .* have no image in .*: '0'"):
        found(root)


def test_other_splits_do_not_leak(tmp_path: Path) -> None:
    """A divided folder is not taken as a whole, nor trainval as train."""
    voc = write_voc(tmp_path / "voc")
    (voc / "ImageSets/Main/train.txt").rename(voc / "ImageSets/Main/trainval.txt")
    yolo = write_yolo(tmp_path / "yolo")
    for part in ("images", "labels"):
        (yolo / part / "train").rename(yolo / part / "training")
    coco_2017 = write_coco_2017(tmp_path / "coco")
    files = coco_2017 / "annotations"
    (files / "instances_train2017.json").rename(files / "instances_trainval2017.json")
    for root in (voc, yolo, coco_2017):
        with pytest.raises(InputError, match="no objects of split"):
            found(root)


def test_folders_called_valid(tmp_path: Path) -> None:
    for name in ("coco", "roboflow", "label images"):
        root = WRITERS[name](tmp_path / name)
        (root / "val").rename(root / "valid")
        assert len(found(root, masks=name != "roboflow")) == 3


def test_numbers_written_as_text(tmp_path: Path) -> None:
    file = coco_file()
    for image in file["images"]:
        image["id"] = str(image["id"])
    for thing in file["annotations"]:
        thing |= {key: str(thing[key]) for key in ("image_id", "category_id", "iscrowd")}
    labels = found(write_coco(tmp_path, file))
    assert not labels.faults
    assert whole(labels, 0)["labels"].tolist() == [1, 2]
    assert not labels.crowd.any()


def test_masks_of_another_size_than_the_image(tmp_path: Path) -> None:
    """Where the file does not say how large an image is, each mask is checked when it is read."""
    file = changed(lambda f: [image.pop("width") for image in f["images"]])
    file["annotations"][0]["segmentation"] = {"size": [9, 9], "counts": [0, 81]}
    with pytest.raises(BadImage, match="a mask is for 9×9 pixels"):
        whole(found(write_coco(tmp_path, file), masks=True), 0)


def test_boxes_of_label_images(tmp_path: Path) -> None:
    """Without masks if none are wanted; their folder is found from any working directory."""
    labels = found(write_label_images(tmp_path), masks=False)
    assert Path(labels.folder).is_absolute()
    crop = labels.cut(0, Geometry(SIZE, (0, 0, *SIZE)), (40, 60))
    for there in (whole(labels, 0), crop):
        assert "masks" not in there
        assert there["boxes"].tolist() == [[10, 5, 30, 25], [40, 20, 46, 26]]
    for file in (tmp_path / "train/instances").iterdir():
        Image.new("RGB", SIZE).save(file)
    with pytest.raises(InputError, match=r"has no object: .*0.png: the mask is RGB"):
        found(tmp_path, masks=True)


def test_faults_follow_their_images(tmp_path: Path) -> None:
    file = changed(lambda f: f["annotations"][0].update(bbox=[70, 30, 20, 20]))
    data = find_objects(str(write_coco(tmp_path, file) / "train"), 0.34, 0.05, masks=False)
    faults = [split.labels.faults for split in data[:2]]
    assert sorted(map(len, faults)) == [0, 1]


def test_stored_labels_that_do_not_fit(tmp_path: Path) -> None:
    labels = found(write_coco(tmp_path))
    arrays = labels.arrays()
    for changes in ({"starts": arrays["starts"][:-1]}, {"classes": arrays["classes"][:-1]}):
        with pytest.raises(ValueError, match="do not fit together"):
            ObjectLabels.stored(labels.files, labels.names, {**arrays, **changes})


def test_several_files_of_a_split(tmp_path: Path) -> None:
    root = write_coco_2017(tmp_path)
    shutil.copy(
        root / "annotations/instances_val2017.json", root / "annotations/instances_val.json"
    )
    with pytest.raises(InputError, match=r"several files for 'val'"):
        found(root)
    assert find_place(root, "test") is None


# Crops


@given(
    seed=st.integers(0, 2**31), size=st.tuples(st.integers(4, 70), st.integers(4, 70)),
    low=st.floats(0.2, 1), high=st.floats(1, 3), pad=st.booleans(),
)  # fmt: skip
def test_objects_follow_the_crop(
    seed: int, size: tuple[int, int], low: float, high: float, pad: bool
) -> None:
    """As torchvision's transforms of tv_tensors do, and images as their pixels."""
    img_size, augment = (32, 48), FinetuneAugmentConfig(vflip=True)
    cut = jittered_geometry(seed, 0, 0, size, img_size, augment, 1.0, (low, high), pad=pad)
    (width, height), (left, top, across, down) = size, cut.box
    assert 0 <= left <= width - across
    assert 0 <= top <= height - down
    shape = cut.shape or img_size
    assert pad or cut.shape is None
    stream = np.random.default_rng(seed)
    corners = np.sort(stream.uniform(0, 1, (5, 2, 2)), axis=1) * size
    boxes = corners.reshape(5, 4)
    numbers = stream.integers(0, 9, (height, width)).astype(np.uint16)

    def transformed(value: Any) -> torch.Tensor:
        value = v2.crop(value, top, left, down, across)
        value = v2.resize(value, list(shape), v2.InterpolationMode.NEAREST_EXACT)
        value = v2.horizontal_flip(value) if cut.flip_h else value
        value = v2.vertical_flip(value) if cut.flip_v else value
        return v2.pad(value, [0, 0, img_size[1] - shape[1], img_size[0] - shape[0]])

    expected = transformed(Mask(torch.from_numpy(numbers.astype(np.int32))))
    assert (moved(numbers, cut, img_size) == expected.numpy()).all()
    given_boxes = torch.from_numpy(boxes).float()
    given_boxes = BoundingBoxes(given_boxes, format="XYXY", canvas_size=(height, width))
    cropped = v2.clamp_bounding_boxes(v2.crop(given_boxes, top, left, down, across))
    cropped = v2.resize(cropped, list(shape))
    cropped = v2.horizontal_flip(cropped) if cut.flip_h else cropped
    cropped = v2.vertical_flip(cropped) if cut.flip_v else cropped
    np.testing.assert_allclose(moved_boxes(boxes, cut, img_size), cropped, atol=2e-3)


def test_crops_of_images_are_padded_with_the_mean() -> None:
    image = np.arange(24, dtype=np.uint8).reshape(3, 2, 4)
    whole_image = padded(image, (3, 6), (0.5, 0.25, 0.1))
    assert (whole_image[:, :2, :4] == image).all()
    assert whole_image[:, 2, 5].tolist() == [128, 64, 26]
    half = padded(image / np.float32(255), (3, 6), (0.5, 0.25, 0.1))
    assert half.dtype == np.float32
    assert half[:, 2, 5].tolist() == pytest.approx([0.5, 0.25, 0.1])


def test_a_crop_has_the_objects_it_shows(tmp_path: Path) -> None:
    """Masks and boxes around them, in one class; objects outside, slivers and crowds are gone."""
    file = changed(lambda f: f["annotations"][1].update(iscrowd=1))
    cut = Geometry(SIZE, (20, 0, 40, 40), flip_h=True)
    for labels in (
        found(write_coco(tmp_path / "coco", file), masks=True),
        found(write_label_images(tmp_path / "labels"), masks=True),
    ):
        there = labels.cut(0, cut, (40, 40))
        assert there["boxes"][0].tolist() == [30, 5, 40, 25]
        assert (enclosing(there["masks"][0]) == there["boxes"][0]).all()
        assert there["masks"].dtype == np.uint8
        assert len(there["boxes"]) == (1 if not labels.folder else 2)
    plain = found(write_coco(tmp_path / "plain", coco_file(masks=False)))
    assert plain.cut(0, cut, (40, 40))["boxes"].tolist() == [[30, 5, 40, 25], [14, 20, 20, 26]]
    sliver = replace(cut, box=(29, 0, 20, 40), flip_h=False)
    assert plain.cut(0, sliver, (20, 10))["boxes"].tolist() == [[5.5, 10, 8.5, 13]]
    for labels in (plain, found(tmp_path / "labels", masks=True)):
        empty = labels.cut(1, cut, (40, 40))
        assert empty["boxes"].shape == (0, 4)
        assert len(empty["labels"]) == 0


def test_label_images_of_another_size(tmp_path: Path) -> None:
    root = write_label_images(tmp_path)
    Image.new("L", (20, 20)).save(root / "train/instances/0.png")
    with pytest.raises(BadImage, match="the label image has 20×20 pixels, its image 60×40"):
        whole(found(root, masks=True), 0)
    for file in (root / "val/instances").iterdir():
        Image.new("L", SIZE).save(file)
    with pytest.raises(InputError, match=r"val of .* has no object"):
        found(root, masks=True)
    (root / "train/instances/0.png").unlink()
    with pytest.raises(InputError, match=r"1 images in .* have no masks in"):
        found(root, masks=True)


def test_batches_of_objects(tmp_path: Path) -> None:
    labels = found(write_coco(tmp_path), masks=True)
    image = np.zeros((3, 40, 60), np.uint8)
    cut = Geometry(SIZE, (0, 0, *SIZE))
    samples = [Sample(image, n, target=labels.cut(n, cut, (40, 60))) for n in range(3)]
    batch = collate(samples, share=True)
    assert batch.targets["boxes"].is_shared()
    parts = each_target(batch.targets_on(torch.device("cpu")))
    for sample, part in zip(samples, parts, strict=True):
        assert set(part) == {"boxes", "labels", "masks"}
        assert all((part[name].numpy() == sample.target[name]).all() for name in part)
    whole_images = [Sample(image, n, target=labels.cut(n, cut, None)) for n in range(3)]
    for part, sample in zip(each_target(collate(whole_images).targets), whole_images, strict=True):
        assert part["masks"] == sample.target["masks"]
        assert part["size"].tolist() == [[40, 60]]


@given(seed=st.integers(0, 2**31), filled=st.floats(0, 1))
def test_masks_are_encoded_in_their_box(seed: int, filled: float) -> None:
    stream = np.random.default_rng(seed)
    h, w = stream.integers(1, 9, 2).tolist()
    left, top = stream.integers(0, 4, 2).tolist()
    size = top + h + int(stream.integers(0, 3)), left + w + int(stream.integers(0, 3))
    part = stream.uniform(size=(h, w)) < filled
    mask = np.zeros(size, np.uint8, order="F")
    mask[top : top + h, left : left + w] = part
    assert encode_part(part, left, top, size) == coco.encode(mask)


@given(seed=st.integers(0, 2**31))
def test_boxes_enclose_their_numbers(seed: int) -> None:
    numbers = np.random.default_rng(seed).integers(0, 5, (7, 9))
    expected = []
    for number in np.unique(numbers[numbers > 0]):
        down, across = np.nonzero(numbers == number)
        expected.append([across.min(), down.min(), across.max() + 1, down.max() + 1])
    assert enclosing(numbers).tolist() == expected


def test_faults_are_listed_in_the_run(tmp_path: Path) -> None:
    """`bad_labels.jsonl` names each image and what is wrong."""
    file = changed(lambda f: f["annotations"][0].update(bbox=[70, 30, 20, 20]))
    data = find_objects(str(write_coco(tmp_path / "data", file)), 0.0, 0.05, masks=False)
    (tmp_path / "run").mkdir()
    save_labels(data, RunPaths(tmp_path / "run"))
    lines = map(json.loads, (tmp_path / "run/bad_labels.jsonl").read_text().splitlines())
    for line, split in zip(lines, ("train", "val"), strict=True):
        assert (line["split"], line["image"]) == (split, "0.png")
        assert "no area inside the image" in line["reason"]
