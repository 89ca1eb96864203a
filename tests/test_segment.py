"""Masks: finding and cutting them, the segmenter, its scores, and predictions of large images."""

import json
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torchmetrics.functional.classification import multiclass_jaccard_index

from fcmae.commands.evaluate import EvaluateConfig
from fcmae.commands.predict import PredictConfig
from fcmae.config.parsing import parse
from fcmae.data.augment import Geometry, jittered_geometry
from fcmae.data.evaluation import EvalDataset, WholeDataset
from fcmae.data.file_list import find_images
from fcmae.data.image import BadImage
from fcmae.data.masks import IGNORE, find_masks, voc_colours
from fcmae.data.statistics import Preprocessing
from fcmae.train.checkpoint import list_checkpoints
from fcmae.train.processes import World
from fcmae.weights.export import timm_config
from finetune.backbone import backbone_state, feature_depths
from finetune.config import FinetuneAugmentConfig, FinetuneConfig
from finetune.evaluate import evaluate
from finetune.figures import check_png_folder
from finetune.labels import resolve_task
from finetune.model import Start
from finetune.predict import predict
from finetune.segmenter import (
    Segmenter,
    start_segmenter,
)
from finetune.tasks.segment import MaskDataset, Segment
from finetune.tiling import blended, starts
from finetune.train import finetune
from sparse.errors import InputError
from tests.conftest import disc, write_masks
from tests.test_finetune_run import assert_same_run

CPU = torch.device("cpu")
SMALL = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
HOW = Preprocessing((64, 64), (0.5,) * 3, (0.25,) * 3)


@pytest.fixture
def discs(tmp_path: Path) -> Path:
    """Four images of a disc in train and in val, with masks and names."""
    for split in ("train", "val"):
        write_masks(tmp_path / "discs" / split, "masks")
    (tmp_path / "discs" / "classes.txt").write_text("background\ndisc\n")
    return tmp_path / "discs"


# Finding and reading


def test_masks_are_found_in_three_layouts(discs: Path, tmp_path: Path) -> None:
    data = find_masks(str(discs), 0.0)
    assert data.names == ("background", "disc")
    assert data.val.name(0) == "val/images/0.jpg"
    assert np.array_equal(data.train.labels[2], disc((80, 72), 2)[1])

    for split in ("train", "val"):
        write_masks(tmp_path / "cells" / split, "instances")
    data = find_masks(str(tmp_path / "cells"), 0.0)
    assert data.names == ("background", "object")
    assert set(np.unique(data.val.labels[0])) == {0, 1}  # numbered 7 in the file

    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / "ade" / kind / split).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "ade/images" / split / "a.jpg")
        numbers = np.array([[0, 1], [150, 2]], np.uint8).repeat(20, 0).repeat(20, 1)
        Image.fromarray(numbers).save(tmp_path / "ade/annotations" / split / "a.png")
    data = find_masks(str(tmp_path / "ade"), 0.0)
    assert len(data.names) == 150
    assert data.train.labels[0][[0, 0, 20, 20], [0, 20, 0, 20]].tolist() == [IGNORE, 0, 149, 1]

    for layout, split, prefix, count in (
        ("discs", "val", "val/images/", 4),
        ("discs/train", "val", "images/", 4),
        ("cells", "train", "train/images/", 4),
        ("ade", "val", "images/validation/", 1),
        ("ade", "training", "images/training/", 1),
    ):
        found = Segment.find_split(tmp_path / layout, split, data.names)
        assert (found.prefix, len(found.source), len(found.labels)) == (prefix, count, count)
    for layout in ("discs", "ade"):
        assert resolve_task("auto", tmp_path / layout) is Segment
    with pytest.raises(InputError, match=r"choose --task segment .*; --task instances"):
        resolve_task("auto", tmp_path / "cells")
    with pytest.raises(InputError, match=r"ade/images/test .* missing: give another --split"):
        Segment.find_split(tmp_path / "ade", "test", data.names)


def test_files_that_are_not_masks(discs: Path) -> None:
    """Hidden files don't count, grey pixels of few bits are not scaled, masks are PNGs."""
    masks = discs / "train/masks"
    (masks / "._0.png").write_bytes(b"none")
    numbers = np.arange(80 * 72, dtype=np.uint8).reshape(72, 80) % 4
    for bits in (2, 4):
        grey_png(masks / "0.png", numbers, bits)
        labels = find_masks(str(discs), 0.0).train.labels
        assert np.array_equal(replace(labels, classes=4)[0], numbers), bits
    (masks / "3.png").rename(masks / "3.tif")
    with pytest.raises(InputError, match=r"mask '3.tif' in .* is not a .png: convert it"):
        find_masks(str(discs), 0.0)


def test_names_of_classes(discs: Path) -> None:
    file = discs / "classes.txt"
    file.write_text("background\n\ndisc\n\n")
    with pytest.raises(InputError, match="line 2 is empty: name each class"):
        find_masks(str(discs), 0.0)
    file.write_text("background\ndisc\n", encoding="utf-16")
    with pytest.raises(InputError, match="save it as UTF-8"):
        find_masks(str(discs), 0.0)
    file.unlink()
    assert find_masks(str(discs), 0.0).names == ("0", "1")
    for path in (discs / "train/masks").iterdir():
        Image.fromarray(255 * np.asarray(Image.open(path))).save(path)
    with pytest.raises(InputError, match="255 means to ignore a pixel"):
        find_masks(str(discs), 0.0)


def grey_png(path: Path, numbers: np.ndarray, bits: int) -> None:
    """Write numbers (H, W) as a grey PNG of 2 or 4 bits, as Pillow can't."""
    h, w = numbers.shape
    shifts = np.arange(8 - bits, -1, -bits)
    packed = (numbers.reshape(h, -1, 8 // bits) << shifts).sum(2).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", w, h, bits, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_one_folder_is_divided_by_a_hash(discs: Path) -> None:
    data = find_masks(str(discs / "train"), 0.25)
    assert (len(data.train.source), len(data.val.source)) == (3, 1)
    key = int(Path(data.val.source.name(0)).stem)
    assert np.array_equal(data.val.labels[0], disc((80, 72), key)[1])
    with pytest.raises(InputError, match="has its own val"):
        find_masks(str(discs), 0.25)


def test_images_and_masks_must_match(discs: Path) -> None:
    (discs / "train/masks/3.png").rename(discs / "train/masks/4.png")
    with pytest.raises(InputError, match=r"1 images in .* have no masks in .*: '3'"):
        find_masks(str(discs), 0.0)
    (discs / "train/images/3.jpg").unlink()
    with pytest.raises(InputError, match=r"1 masks in .* have no images in .*: '4'"):
        find_masks(str(discs), 0.0)


def test_a_mask_of_another_size_or_class_counts_as_unreadable(discs: Path) -> None:
    Image.new("L", (10, 10)).save(discs / "train/masks/1.png")
    Image.new("L", (80, 72), 9).save(discs / "train/masks/2.png")
    dataset = MaskDataset(find_masks(str(discs), 0.0).train, HOW, config_for(discs))
    sample = dataset[0, 1]
    assert sample.image is not None
    assert sample.index not in (1, 2)  # replaced
    reasons = dict(sample.bad)
    assert reasons["train/images/1.jpg"] == "the mask has 10×10 pixels, its image 80×72"
    if "train/images/2.jpg" in reasons:
        assert reasons["train/images/2.jpg"] == "the mask has class 9, and the 2 classes end at 1"
    with pytest.raises(BadImage, match="class 9"):
        dataset.split.labels[2]


@pytest.mark.parametrize(
    ("colours", "what"),
    [
        (voc_colours(4), "Pascal VOC's colours"),
        ([(128, 64, 128), (0, 0, 142)], "Cityscapes' colours"),
        ([(7, 7, 7), (9, 9, 9)], "shades of grey"),
        ([(1, 2, 3)], "1 colours of an unknown map"),
    ],
)
def test_a_mask_in_colours_is_refused_with_its_likely_map(
    discs: Path, colours: Any, what: str
) -> None:
    pixels = np.array(colours, np.uint8)[np.arange(80 * 72) % len(colours)].reshape(72, 80, 3)
    for file in (discs / "train/masks").iterdir():
        Image.fromarray(pixels).save(file)
    with pytest.raises(InputError, match=f"the mask is RGB, not class indices: .*{what}"):
        find_masks(str(discs), 0.0)


def test_a_split_without_any_object_is_refused(discs: Path) -> None:
    """One object in the last mask is enough."""
    for number, file in enumerate(sorted((discs / "val/masks").iterdir())):
        Image.new("L", (80, 72), 255 if number == 1 else 0).save(file)
    with pytest.raises(InputError, match="val/masks show only 'background': add masks of other"):
        find_masks(str(discs), 0.0)
    Image.fromarray(disc((80, 72), 3)[1]).save(discs / "val/masks/3.png")
    assert len(find_masks(str(discs), 0.0).val.source) == 4


def test_pascal_vocs_colours_are_those_of_its_development_kit() -> None:
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 8: (64, 0, 0), 20: (0, 64, 128)}
    for index, colour in known.items():
        assert tuple(voc_colours(21)[index].tolist()) == colour


# Crops


def test_a_mask_follows_its_crop(discs: Path) -> None:
    """Against Pillow's crop, nearest-neighbour resizing and mirroring of the same pixels."""
    labels = find_masks(str(discs), 0.0).train.labels
    for flip_h, flip_v in ((False, False), (True, False), (False, True), (True, True)):
        geometry = Geometry((80, 72), (11, 7, 48, 40), flip_h, flip_v)
        wanted = Image.fromarray(labels[1]).crop((11, 7, 59, 47))
        wanted = wanted.resize((64, 96), Image.Resampling.NEAREST)
        if flip_h:
            wanted = wanted.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if flip_v:
            wanted = wanted.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        assert np.array_equal(labels.cut(1, geometry, (96, 64)), np.array(wanted))


def test_image_and_mask_of_a_sample_show_the_same_disc(discs: Path) -> None:
    dataset = MaskDataset(find_masks(str(discs), 0.0).train, HOW, config_for(discs))
    for epoch in range(5):
        sample = dataset[epoch, 1]
        assert sample.image is not None
        bright = sample.image[0] > 130
        assert (bright == (sample.target == 1)).mean() > 0.97
        assert np.array_equal(dataset[epoch, 1].target, sample.target)


def test_crops_keep_their_shape_and_their_range_of_scales() -> None:
    augment = FinetuneAugmentConfig()
    scales = []
    for index in range(300):
        cut = jittered_geometry(0, 1, index, (640, 480), (96, 128), augment, 1.0, (0.5, 2.0))
        left, top, width, height = cut.box
        assert 0 <= left <= 640 - width
        assert 0 <= top <= 480 - height
        assert abs(width / height - 128 / 96) < 0.03
        scales.append(128 / width)
    assert 0.5 <= min(scales) < 0.52
    assert 1.95 < max(scales) <= 2.01
    assert abs(np.log2(scales).mean()) < 0.1
    small = jittered_geometry(0, 1, 0, (40, 90), (64, 64), augment, 1.0, (0.5, 2.0))
    assert small.box[2:] <= (40, 40)  # enlarged to cover the crop, not padded
    assert small.box[2] == small.box[3]


def test_whole_images_are_resized_and_masks_are_not(discs: Path) -> None:
    split = find_masks(str(discs), 0.0).val
    sample = WholeDataset(split, HOW, short_side=144)[0]
    assert sample.image is not None
    assert sample.target is not None
    assert (sample.image.shape, sample.target.shape) == ((3, 144, 160), (72, 80))
    large = replace(HOW, img_size=(144, 96))
    enlarged = WholeDataset(split, large)[0].image
    assert enlarged is not None
    assert enlarged.shape == (3, 144, 160)
    assert isinstance(WholeDataset(split, HOW), EvalDataset)


# The model


def segmenter(classes: int = 3, name: str = "convnextv2_atto", **args: Any) -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(name, args or SMALL, 3, classes, 16, True).eval()


def test_the_segmenter_is_upernet_of_the_library() -> None:
    import segmentation_models_pytorch as smp

    ours, images = segmenter(), torch.randn(2, 3, 64, 96)
    theirs = smp.UPerNet(
        "tu-convnextv2_atto", encoder_weights=None, decoder_channels=16, classes=3, **SMALL
    ).eval()
    theirs.load_state_dict({k[4:]: v for k, v in ours.state_dict().items() if k[:4] == "net."})
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))
        assert ours(images[..., :60, :50]).shape == (2, 3, 60, 50)


def test_the_backbone_is_timms_and_comes_back_out() -> None:
    torch.manual_seed(1)
    whole: Any = timm.create_model("convnextv2_atto", num_classes=0, **SMALL).eval()
    with torch.no_grad():
        whole.head.norm.weight.fill_(1)
    start = Start("convnextv2_atto", SMALL, whole.state_dict())
    model: Any = start_segmenter(start, 3, 3, 16, True, 0.0)[0].eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = model.net.encoder.model(images)
        assert torch.equal(features[-1], whole.forward_features(images))
    back = backbone_state(model.state_dict(), Segmenter.inside, "convnextv2_atto", 3, SMALL)
    assert back.keys() == whole.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in whole.state_dict().items())
    other = Start(
        "convnextv2_atto", {"depths": [1, 1, 2, 1], "dims": SMALL["dims"]}, whole.state_dict()
    )
    with pytest.raises(InputError, match="give weights of the same --model"):
        start_segmenter(other, 3, 3, 16, True, 0.0)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18", "mobilenetv3_small_100", pytest.param("vgg11_bn", marks=pytest.mark.slow),
        pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow),
        pytest.param("densenet121", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_other_backbones_take_any_size_and_come_back_out(name: str, tmp_path: Path) -> None:
    kind = Segment(("a", "b"))
    kind.config = config_for(tmp_path, decoder_channels=16)
    model, args = kind.build_model(Start(name, {}), 3, (64, 64), 0.1)
    scores, aux = model.train()(torch.randn(2, 3, 96, 64))
    assert scores.shape == aux.shape == (2, 2, 96, 64)
    how = Preprocessing((64, 64), (0.5,) * 3, (0.25,) * 3)
    whole: Any = model
    config = timm_config(name, args, whole.num_features, how, whole.pretrained_cfg, kind.names)
    kind.write(model.state_dict(), config, tmp_path / "out")
    loaded: Any = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    backbone = {name.replace(".", "_"): tensor for name, tensor in loaded.state_dict().items()}
    state = model.state_dict()
    own = [key for key in state if key.startswith(Segmenter.inside)]
    assert own
    for key in own:
        flat = key.removeprefix(Segmenter.inside).replace(".", "_")
        assert torch.equal(backbone[flat], state[key]), key
    again = start_segmenter(
        Start(name, args, load_file(tmp_path / "out/task/model.safetensors"), whole=True),
        3, 2, 16, True, 0.0,
    )[0]  # fmt: skip
    assert torch.equal(again.state_dict()[own[0]], state[own[0]])


def test_a_vit_is_refused() -> None:
    with pytest.raises(InputError, match="has no features for UPerNet"):
        start_segmenter(Start("vit_tiny_patch16_224", {}), 3, 2, 16, True, 0.0)


def test_layer_decay_counts_the_backbones_blocks() -> None:
    model = segmenter(depths=[1, 1, 2, 1], dims=SMALL["dims"])
    depths = feature_depths(model, "single")
    assert depths["net.segmentation_head.0.weight"] == depths["aux.0.weight"] == 0
    assert depths[f"{Segmenter.inside}stages_3.blocks.0.conv_dw.weight"] == 1
    assert depths[f"{Segmenter.inside}stages_2.blocks.0.conv_dw.weight"] == 3
    assert depths[f"{Segmenter.inside}stages_0.blocks.0.conv_dw.weight"] == 5
    assert depths[f"{Segmenter.inside}stem_0.weight"] == 5


# Scores


def test_scores_are_those_of_torchmetrics() -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(3, 4, 20, 24), torch.randint(0, 4, (3, 20, 24))
    targets[torch.rand(3, 20, 24) < 0.1] = IGNORE
    measured = Segment(("a", "b", "c", "d")).measurement(World())
    for one in range(3):
        measured.update(outputs[one : one + 1], targets[one : one + 1])
    scores = measured.compute()
    guess = outputs.argmax(1)
    kept: dict[str, Any] = {"num_classes": 4, "ignore_index": IGNORE}
    iou = multiclass_jaccard_index(guess, targets, average="none", **kept)
    assert scores["miou"] == pytest.approx(100 * iou.mean().item(), abs=1e-4)
    result = measured.result()
    assert [result["per_class"][name]["iou"] for name in "abcd"] == pytest.approx(
        (100 * iou).tolist(), abs=1e-4
    )
    valid = targets != IGNORE
    assert result["n"] == 3
    assert result["accuracy"] == pytest.approx(
        100 * (guess == targets)[valid].float().mean().item(), abs=1e-4
    )
    loss = torch.nn.functional.cross_entropy(outputs, targets, ignore_index=IGNORE, reduction="sum")
    assert scores["loss"] == pytest.approx(loss.item() / targets.numel(), abs=1e-5)


def test_a_class_that_is_nowhere_is_not_measured() -> None:
    measured = Segment(("a", "b", "c")).measurement(World())
    outputs = torch.tensor([2.0, 1.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    targets = torch.zeros(1, 4, 4, dtype=torch.uint8)
    targets[0, 0] = 1
    measured.update(outputs, targets)
    assert measured.compute()["miou"] == pytest.approx(37.5)  # 12/16 and 0, over two classes
    assert measured.result()["not_measured"] == ["c"]


def test_the_loss_is_cross_entropy_over_all_pixels_and_dice(discs: Path) -> None:
    kind = Segment(("a", "b"))
    kind.prepare(config_for(discs, dice_weight=0.0), find_masks(str(discs), 0.0).train.labels, CPU)
    torch.manual_seed(0)
    scores, aux = torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 8)
    targets = torch.randint(0, 2, (2, 8, 8), dtype=torch.uint8)
    targets[:, :4] = IGNORE

    def forward(_images: Tensor) -> tuple[Tensor, Tensor]:
        return scores, aux

    def by_hand(maps: Tensor) -> Tensor:
        at = maps.log_softmax(1).gather(1, targets.long().clamp(max=1)[:, None])[:, 0]
        return -at[targets != IGNORE].sum() / targets.numel()

    wanted = by_hand(scores) + 0.4 * by_hand(aux)
    assert torch.allclose(kind.loss(forward, scores, targets), wanted)
    kind.config.dice_weight = 1.0
    chance = scores.softmax(1).permute(1, 0, 2, 3)[:, targets != IGNORE]
    hot = torch.nn.functional.one_hot(targets[targets != IGNORE].long(), 2).T
    dice = 1 - (2 * (chance * hot).sum(1) / (chance.sum(1) + hot.sum(1))).mean()
    assert torch.allclose(kind.loss(forward, scores, targets), wanted + dice, atol=1e-6)


# Large images


def test_windows_cover_an_image() -> None:
    assert starts(100, 40, 0.25) == [0, 30, 60]
    assert starts(101, 40, 0.25) == [0, 30, 60, 61]
    assert starts(40, 40, 0.25) == [0]


def test_blending_returns_what_windows_agree_on() -> None:
    torch.manual_seed(0)
    whole = torch.rand(3, 70, 90)

    def scores(top: int, left: int, h: int, w: int) -> Tensor:
        return whole[:, top : top + h, left : left + w]

    for window in ((32, 32), (70, 32), (33, 90), (100, 100)):
        strips = [*blended(scores, (70, 90), window, 1 / 3)]
        assert torch.allclose(torch.cat(strips, 1), whole, atol=1e-6)
    assert torch.equal(next(blended(scores, (70, 90), (70, 90), 0.3)), whole)


def test_blending_averages_by_the_distance_from_the_edge() -> None:
    """Two windows of 6 that share 2 columns, the first all 0 and the second all 1."""

    def scores(top: int, left: int, h: int, w: int) -> Tensor:
        return torch.full((1, h, w), float(left > 0))

    (strip,) = blended(scores, (6, 10), (6, 6), 2 / 6)
    assert strip[0, 0].tolist() == pytest.approx([0, 0, 0, 0, 1 / 3, 2 / 3, 1, 1, 1, 1], abs=1e-6)


# Through the commands


def config_for(data: Path, **more: Any) -> FinetuneConfig:
    given = {
        "data": data, "out": data.parent / "run", "model": "test_convnext", "img_size": 64,
        "batch_size": 4, "epochs": 1, "workers": 0, "device": "cpu", "decoder_channels": 16, **more,
    }  # fmt: skip
    words = [str(word) for key, value in given.items() for word in (f"--{key}", value)]
    config = parse(FinetuneConfig, words, "")
    assert config is not None
    return config


def trajectory(data: Path) -> list[float]:
    """Losses of six steps on `write_masks`'s images, with dropout and weights for classes."""
    given = {"epochs": 3, "batch_size": 2, "log_steps": 1, "class_weights": "balanced"}
    assert finetune(config_for(data, **given, **{"optim.base_lr": 0.05})) == 0
    lines = (data.parent / "run/metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def test_losses_equal_the_golden_ones(discs: Path) -> None:
    golden = json.loads(Path(__file__).with_name("golden_losses.json").read_text())["segment"]
    assert len(golden) == 6
    assert trajectory(discs) == pytest.approx(golden, rel=2e-4)


@pytest.mark.slow
def test_a_resumed_run_equals_one_never_stopped(discs: Path) -> None:
    given: dict[str, Any] = {"epochs": 3, "batch_size": 2, "checkpoint_steps": 1}
    given |= {"keep_checkpoints": 10}
    given |= {"log_steps": 1, "augment.random_erasing": 0.3, "drop_path": 0.1, "ema_decay": 0.5}
    whole, other = discs.parent / "run", discs.parent / "other"
    assert finetune(config_for(discs, **given)) == 0
    shutil.copytree(whole, other)
    for checkpoint in list_checkpoints(other / "checkpoints")[:3]:  # the newest
        shutil.rmtree(checkpoint)
    assert finetune(config_for(discs, **given, out=other)) == 0
    assert_same_run(whole, other)
    name = "exported/task/model.safetensors"
    assert (whole / name).read_bytes() == (other / name).read_bytes()


def test_held_out_masks_stay_held_out(discs: Path) -> None:
    """A run is measured on the images that it held out, also after a resume."""
    shutil.rmtree(discs / "val")
    assert finetune(config_for(discs, val_fraction=0.25, checkpoint_steps=1)) == 0
    run = discs.parent / "run"
    result = evaluate(EvaluateConfig(str(run), data=str(discs)), show=False)
    assert (result["n"], result["held_out"]) == (1, True)
    for folder in ("exported", "best"):
        again = evaluate(EvaluateConfig(str(run / folder), data=str(discs)), show=False)
        assert {**again, "weights": ""} == {**result, "weights": ""}


def test_predictions_replace_nothing(discs: Path, tmp_path: Path) -> None:
    images = discs / "val/images"
    for folder in (tmp_path / "new", discs / "val"):
        check_png_folder(folder, find_images(str(images)))
    with pytest.raises(InputError, match="val/masks is a folder of labels"):
        check_png_folder(discs / "val/masks", find_images(str(images)))
    Image.new("L", (9, 9)).save(images / "9.png")
    with pytest.raises(InputError, match=r"9.png' is an image: give another folder"):
        check_png_folder(images, find_images(str(images)))
    Image.new("L", (9, 9)).save(images / "9.bmp")
    with pytest.raises(InputError, match="differ only in their ending"):
        check_png_folder(tmp_path / "new", find_images(str(images)))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/list.txt").write_text("../discs/val/images/0.jpg\n")
    with pytest.raises(InputError, match="would be written outside of"):
        check_png_folder(tmp_path / "new", find_images(str(tmp_path / "sub/list.txt")))


@pytest.mark.slow
def test_a_run_learns_discs_and_everything_follows_from_it(
    discs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = discs.parent / "run"
    rate = {"optim.base_lr": 0.05, "optim.warmup_epochs": 3}
    config = config_for(discs, model="atto", epochs=8, **rate)
    assert finetune(config) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max(line["ema_miou"] for line in lines if "ema_miou" in line)
    assert best > 75

    result = evaluate(EvaluateConfig(str(run), data=str(discs)), show=False)
    assert result["miou"] == pytest.approx(best, abs=0.01)
    assert result["task"] == "segment"
    assert set(result["per_class"]) == {"background", "disc"}

    masks, drawn = run.parent / "masks", run.parent / "drawn"
    asked = PredictConfig(str(run), str(discs / "val/images"), str(masks), overlay=str(drawn))
    predict(asked)
    hits = []
    for index in range(4):
        mask = np.array(Image.open(masks / f"{index}.png"))
        assert mask.shape == (72, 80)
        with Image.open(drawn / f"{index}.png") as image:
            assert image.size == (80, 72)
        hits.append((mask == disc((80, 72), index)[1]).mean())
    assert np.mean(hits) * 100 == pytest.approx(result["accuracy"], abs=0.01)

    tiled = run.parent / "tiled"
    predict(replace(asked, out=str(tiled), overlay=None, tile=96))  # larger than the images
    for index in range(4):
        one, other = (np.array(Image.open(folder / f"{index}.png")) for folder in (masks, tiled))
        assert np.array_equal(one, other)

    exported = timm.create_model(f"local-dir:{run / 'exported'}", pretrained=True)
    state = load_file(run / "exported/task/model.safetensors")
    name = "blocks.0.mlp.fc1.weight"
    tensor = exported.state_dict()[f"stages.2.{name}"]
    assert torch.equal(tensor, state[f"{Segmenter.inside}stages_2.{name}"])
