"""The papers' recipes for masks and of ConvNeXt V1: numbers, commands, and a step of each."""

import json
import math
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fcmae.config.parsing import parse
from fcmae.config.pretraining import PretrainConfig
from fcmae.data.order import check_parts
from fcmae.train.plan import asked_rate, make_plan
from finetune.backbone import feature_depths
from finetune.config import FinetuneConfig
from finetune.detector import Detector, Pyramid
from finetune.model import Start, timm_name
from finetune.segmenter import AUX_CHANNELS, Segmenter
from finetune.tasks.segment import Segment
from finetune.train import finetune

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
ADE_IMAGES, ADE_CLASSES = 20_210, 150
IMAGENET_IMAGES = 1_281_167

# Official configs of V1; middles of the ranges of V2 (arXiv 2301.00808, appendix A.4).
# rate, layer decay, drop path, side, millions of weights of the backbone, blocks of each stage
ADE20K: dict[str, tuple[float, float, float, int, float, tuple[int, ...]]] = {
    "convnext_tiny": (1e-4, 0.9, 0.4, 512, 27.8, (3, 3, 9, 3)),
    "convnext_small": (1e-4, 0.9, 0.3, 512, 49.5, (3, 3, 27, 3)),
    "convnext_base": (1e-4, 0.9, 0.4, 512, 87.6, (3, 3, 27, 3)),
    "convnext_base_22k": (1e-4, 0.9, 0.4, 640, 87.6, (3, 3, 27, 3)),
    "convnext_large": (1e-4, 0.9, 0.4, 640, 196.2, (3, 3, 27, 3)),
    "convnext_xlarge": (8e-5, 0.9, 0.4, 640, 348.1, (3, 3, 27, 3)),
    "convnextv2_base": (2e-4, 0.85, 0.25, 512, 87.7, (3, 3, 27, 3)),
    "convnextv2_large": (2e-4, 0.85, 0.25, 512, 196.4, (3, 3, 27, 3)),
    "convnextv2_huge": (2e-4, 0.85, 0.25, 512, 657.5, (3, 3, 27, 3)),
}

# arXiv 2201.03545, appendix A, and the official commands.
# epochs, batch, rate, weight decay, layer decay, warm-up, mixup, drop path, head's scale, average
V1: dict[str, tuple[Any, ...]] = {
    "tiny": (300, 4096, 4e-3, 0.05, 1.0, 20, 0.8, 0.1, 1, 0.9999),
    "small": (300, 4096, 4e-3, 0.05, 1.0, 20, 0.8, 0.4, 1, 0.9999),
    "base": (300, 4096, 4e-3, 0.05, 1.0, 20, 0.8, 0.5, 1, 0.9999),
    "large": (300, 4096, 4e-3, 0.05, 1.0, 20, 0.8, 0.5, 1, 0.9999),
    "22k/base": (90, 4096, 4e-3, 0.05, 1.0, 5, 0.8, 0.1, 1, None),
    "22k/large": (90, 4096, 4e-3, 0.05, 1.0, 5, 0.8, 0.1, 1, None),
    "22k/xlarge": (90, 4096, 4e-3, 0.05, 1.0, 5, 0.8, 0.2, 1, None),
    "22k_1k/base": (30, 512, 5e-5, 1e-8, 0.8, 0, 0.0, 0.2, 0.001, None),
    "22k_1k/large": (30, 512, 5e-5, 1e-8, 0.8, 0, 0.0, 0.3, 0.001, None),
    "22k_1k/xlarge": (30, 512, 5e-5, 1e-8, 0.8, 0, 0.0, 0.4, 0.001, 0.9999),
}

# Official configs of V1, of which the last columns are published: millions of weights, AP of boxes
# and of masks; middles of the ranges of V2 (arXiv 2301.00808, appendix A.3). 0: not known here.
# rate, layer decay, drop path, batch, side, weights, boxes, masks
COCO: dict[str, tuple[float, ...]] = {
    "mask_convnext_tiny": (1e-4, 0.95, 0.4, 16, 1344, 48, 46.2, 41.7),
    "cascade_convnext_tiny": (2e-4, 0.7, 0.4, 16, 1344, 86, 50.4, 43.7),
    "cascade_convnext_small": (2e-4, 0.7, 0.6, 16, 1344, 108, 51.9, 45.0),
    "cascade_convnext_base": (2e-4, 0.8, 0.7, 16, 1344, 146, 52.7, 45.6),
    "cascade_convnext_base_22k": (1e-4, 0.8, 0.6, 16, 1344, 146, 54.0, 46.9),
    "cascade_convnext_large": (1e-4, 0.7, 0.7, 16, 1344, 255, 54.8, 47.6),
    "cascade_convnext_xlarge": (1e-4, 0.7, 0.8, 16, 1344, 407, 55.2, 47.7),
    "mask_convnextv2_base": (1e-4, 0.925, 0.35, 32, 1024, 0, 52.9, 46.4),
    "mask_convnextv2_large": (1e-4, 0.925, 0.35, 32, 1024, 0, 0, 0),
    "mask_convnextv2_huge": (1e-4, 0.925, 0.35, 32, 1024, 0, 0, 0),
}
COCO_IMAGES, COCO_CLASSES = 118_287, 80

SUBSTITUTES = {"convnext_xlarge": "convnext_atto", "convnextv2_huge": "atto"}
"""Models too large to train here, and what is trained instead: weights, gradients and optimizer
take 5.6 and 11 GB, and the checkpoint of three such copies minutes on a slow disk."""


def command(path: Path) -> list[str]:
    """The command in the first lines of a config, as a shell splits it."""
    lines = path.read_text(encoding="utf-8").split("\n#\n")[0].splitlines()
    assert all(line.startswith("# ") and line.endswith("\\") for line in lines[:-1])
    return shlex.split(" ".join(line[2:].rstrip("\\") for line in lines))


def load(path: Path, *more: str, kind: Any = FinetuneConfig) -> Any:
    argv = ["--data", "photos", "--out", "run", "--config", str(path), *more]
    return parse(kind, argv, "usage")


COMMANDS = {
    path: command(path)
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if path.read_text(encoding="utf-8").startswith("# torchrun")
}


def parsed(argv: list[str]) -> Any:
    """The config of a `torchrun … -m fcmae COMMAND …` in the repository's root."""
    argv = [str(ROOT / word) if word.startswith("configs/") else word for word in argv]
    module = argv.index("-m")
    assert argv[module + 1] == "fcmae"
    kind = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}[argv[module + 2]]
    return parse(kind, argv[module + 3 :], "usage")


@pytest.fixture(scope="module")
def models() -> dict[str, str]:
    """The model of each run that a command makes."""
    configs = [parsed(argv) for argv in COMMANDS.values()]
    assert len({config.out for config in configs}) == len(configs)
    return {config.out: config.model for config in configs}


def test_all_recipes_are_here() -> None:
    for folder, names in (("ade20k", ADE20K), ("v1", V1), ("coco", COCO)):
        found = (CONFIGS / "finetune" / folder).rglob("*.yaml")
        assert {path.relative_to(CONFIGS / "finetune" / folder) for path in found} == {
            Path(f"{name}.yaml") for name in names
        }


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_a_command_runs_its_config(path: Path, models: dict[str, str]) -> None:
    """It parses, its processes divide the batch, and its weights are another recipe's."""
    argv = COMMANDS[path]
    assert argv[:2] == ["torchrun", "--nproc_per_node"]
    config = parsed(argv)
    assert argv[argv.index("--config") + 1] == path.relative_to(ROOT).as_posix()
    check_parts(config.batch_size, int(argv[2]), config.accumulate)
    text = path.read_text(encoding="utf-8")
    v1 = config.model.startswith("convnext_")
    assert f"arXiv {'2201.03545' if v1 else '2301.00808'}" in text
    weights = getattr(config, "weights", "none")
    assert weights == "none" or models[weights] == config.model
    plain = load(path, kind=type(config))
    assert (plain.optim, plain.augment, plain.epochs) == (
        config.optim, config.augment, config.epochs,
    )  # fmt: skip


@pytest.mark.parametrize("name", ADE20K)
def test_recipe_for_ade20k_equals_the_papers(name: str) -> None:
    config = load(CONFIGS / "finetune/ade20k" / f"{name}.yaml")
    optim, augment = config.optim, config.augment
    rate, decay, drop_path, side, _, _ = ADE20K[name]
    assert asked_rate(config) == pytest.approx(rate)
    assert (optim.layer_decay, config.drop_path) == (decay, drop_path)
    assert (config.img_size, augment.short_side, augment.scale_jitter) == (side, side, [0.5, 2.0])
    assert (optim.weight_decay, optim.betas, optim.clip_grad) == (0.05, [0.9, 0.999], None)
    assert (config.task, config.batch_size, config.decoder_channels) == ("segment", 16, 512)
    assert (config.aux_weight, config.dice_weight, config.ema_decay) == (0.4, 0, None)

    plan = make_plan(config, ADE_IMAGES, config.epochs)
    assert 160_000 <= plan.total_steps < 160_000 + plan.steps_per_epoch
    assert plan.warmup == 1500
    middle = (plan.warmup + plan.total_steps) // 2
    assert plan.learning_rate(middle) == pytest.approx(rate / 2)
    assert plan.learning_rate((middle + plan.total_steps) // 2) == pytest.approx(rate / 4)


@pytest.mark.parametrize("name", COCO)
def test_recipe_for_coco_equals_the_papers(name: str) -> None:
    path = CONFIGS / "finetune/coco" / f"{name}.yaml"
    config, text = load(path), path.read_text(encoding="utf-8")
    optim, augment = config.optim, config.augment
    rate, decay, drop_path, batch, side, _, boxes, masks = COCO[name]
    assert asked_rate(config) == pytest.approx(rate)
    assert (optim.layer_decay, config.drop_path, config.batch_size) == (decay, drop_path, batch)
    assert (optim.weight_decay, optim.betas, optim.clip_grad) == (0.05, [0.9, 0.999], None)
    assert (config.task, config.head, config.img_size) == ("instances", name.split("_")[0], side)
    assert (config.decoder_channels, config.anchor_size, config.ema_decay) == (256, 32, None)
    jitter = (800, [0.6, 1.0]) if batch == 16 else (768, [0.1, 2.0])
    assert (augment.short_side, augment.scale_jitter) == jitter
    if boxes:
        assert f"{boxes} % AP of boxes, {masks} % of masks" in text
    plan = make_plan(config, COCO_IMAGES, config.epochs)
    assert (plan.epochs, plan.warmup) == (36, 500 if batch == 16 else 250)
    rates = [plan.learning_rate(epoch * plan.steps_per_epoch) for epoch in (26, 27, 32, 33, 35)]
    assert rates == pytest.approx([rate, rate / 10, rate / 10, rate / 100, rate / 100])


@pytest.mark.parametrize("name", COCO)
def test_model_for_coco_has_the_papers_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, against the published number in millions."""
    monkeypatch.setattr("timm.models.convnext.trunc_normal_", lambda *_, **__: None)  # slow
    config = load(CONFIGS / "finetune/coco" / f"{name}.yaml")
    with torch.device("meta"):
        pyramid = Pyramid(timm_name(config.model), {}, 3, config.decoder_channels)
        model = Detector(pyramid, COCO_CLASSES, config.head, True, config.anchor_size)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(COCO[name][5] or millions, abs=1)
    depths = feature_depths(model, config.optim.layer_group)
    assert max(depths.values()) == (6 if name.endswith("convnext_tiny") else 12) + 1


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images to train on and one to validate on, in COCO 2017's layout, with 80 classes."""
    root, rng = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    (root / "annotations").mkdir()
    categories = [{"id": 1 + n + n // 10, "name": f"class {n}"} for n in range(COCO_CLASSES)]
    for split, count in (("train", 2), ("val", 1)):
        images, things = [], []
        (root / f"{split}2017").mkdir()
        for number in range(count):
            name = f"{number:012}.jpg"
            pixels = rng.integers(0, 256, (72, 80, 3), np.uint8)
            Image.fromarray(pixels).save(root / f"{split}2017" / name)
            images.append({"id": number, "file_name": name, "width": 80, "height": 72})
            things += [
                {"id": 2 * number + n + 1, "image_id": number, "iscrowd": 0,
                 "category_id": categories[7 * n]["id"], "bbox": [10, 8, 40, 30],
                 "segmentation": [[10, 8, 50, 8, 50, 38, 10, 38]]}
                for n in range(2)
            ]  # fmt: skip
        content = {"images": images, "annotations": things, "categories": categories}
        file = root / "annotations" / f"instances_{split}2017.json"
        file.write_text(json.dumps(content))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", COCO)
def test_recipe_for_coco_trains_a_step(name: str, coco: Path, tmp_path: Path) -> None:
    """The larger models are replaced by small ones; the test above makes them."""
    run, path = tmp_path / "run", CONFIGS / "finetune/coco" / f"{name}.yaml"
    argv = [
        "--config", str(path), "--data", str(coco), "--out", str(run), "--device", "cpu",
        "--img_size", "64", "--augment.short_side", "64", "--batch_size", "2", "--epochs", "1",
        "--decoder_channels", "16", "--workers", "0", "--trackers", "[]", "--log_steps", "1",
    ]  # fmt: skip
    if not name.endswith("convnext_tiny"):
        argv += ["--model", "atto" if "v2" in name else "convnext_atto"]
    config = parse(FinetuneConfig, argv, "usage")
    assert config is not None
    assert finetune(config) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (step,) = (row for row in rows if "grad_norm" in row)
    guessing = math.log(COCO_CLASSES + 1)  # the head's classes; a cascade has 1.75 heads
    assert guessing < step["loss"] < 5 * guessing
    assert step["grad_norm"] > 0
    exported = json.loads((run / "exported/task/config.json").read_text())
    assert (exported["num_classes"], exported["task_state"]["head"]) == (COCO_CLASSES, config.head)


@pytest.mark.parametrize("name", V1)
def test_recipe_of_v1_equals_the_papers(name: str) -> None:
    config = load(CONFIGS / "finetune/v1" / f"{name}.yaml")
    optim, augment = config.optim, config.augment
    assert V1[name] == (
        config.epochs,
        config.batch_size,
        pytest.approx(asked_rate(config)),
        optim.weight_decay,
        optim.layer_decay,
        optim.warmup_epochs,
        augment.mixup,
        config.drop_path,
        config.head_init_scale,
        config.ema_decay,
    )
    assert augment.cutmix == (1.0 if augment.mixup else 0.0)
    assert (augment.randaugment, augment.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (config.model, config.img_size) == (f"convnext_{Path(name).name}", 224)
    assert optim.layer_decay == 1 or optim.layer_group == "group"
    assert (optim.schedule, config.init, augment.label_smoothing) == ("cosine", "paper", 0.1)


@pytest.mark.parametrize("name", ADE20K)
def test_model_for_ade20k_has_the_papers_shape_and_layers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device: widths, number of weights, and layers of three blocks."""
    monkeypatch.setattr("timm.models.convnext.trunc_normal_", lambda *_, **__: None)  # slow
    config = load(CONFIGS / "finetune/ade20k" / f"{name}.yaml")
    kind = Segment([f"class {number}" for number in range(ADE_CLASSES)])
    kind.config = config
    with torch.device("meta"):
        model, _ = kind.build_model(
            Start(timm_name(config.model), {}), 3, (config.img_size,) * 2, config.drop_path
        )
    millions, blocks = ADE20K[name][-2:]
    backbone: Any = model.get_submodule(Segmenter.inside[:-1])
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    state = model.state_dict()
    assert state["net.segmentation_head.0.weight"].shape[:2] == (ADE_CLASSES, 512)
    assert state["aux.4.weight"].shape[:2] == (ADE_CLASSES, AUX_CHANNELS)
    assert state["aux.0.weight"].shape[1] == backbone.feature_info.channels()[2]
    last_block = backbone.get_submodule(f"stages_3.blocks.{blocks[3] - 1}")
    assert last_block.drop_path.drop_prob == pytest.approx(config.drop_path)

    depths = kind.layer_depths(model, config.optim.layer_group)
    layers = sum(blocks) // 3
    assert layers == (6 if name == "convnext_tiny" else 12)
    assert depths[f"{Segmenter.inside}stem_0.weight"] == layers + 1
    of_blocks = [
        depths[f"{Segmenter.inside}stages_{stage}.blocks.{block}.conv_dw.weight"]
        for stage in range(4)
        for block in range(blocks[stage])
    ]
    assert of_blocks == [layers - block // 3 for block in range(sum(blocks))]
    assert {depth for key, depth in depths.items() if not key.startswith(Segmenter.inside)} == {0}


@pytest.fixture(scope="module")
def ade20k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images to train on and one to validate on, in ADE20K's layout: masks of 0 to 150."""
    root, rng = tmp_path_factory.mktemp("ade20k"), np.random.default_rng(0)
    for split, count in (("training", 2), ("validation", 1)):
        images, masks = root / "images" / split, root / "annotations" / split
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for index in range(count):
            name = f"ADE_{split[:5]}_{index + 1:08}"
            pixels = rng.integers(0, 256, (72, 80, 3), np.uint8)
            Image.fromarray(pixels).save(images / f"{name}.jpg")
            classes = rng.integers(0, ADE_CLASSES + 1, (9, 10), np.uint8)
            Image.fromarray(classes.repeat(8, 0).repeat(8, 1)).save(masks / f"{name}.png")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", ADE20K)
def test_recipe_for_ade20k_trains_a_step(name: str, ade20k: Path, tmp_path: Path) -> None:
    run, path = tmp_path / "run", CONFIGS / "finetune/ade20k" / f"{name}.yaml"
    argv = [
        "--config", str(path), "--data", str(ade20k), "--out", str(run), "--device", "cpu",
        "--img_size", "64", "--augment.short_side", "64", "--batch_size", "2", "--epochs", "1",
        "--decoder_channels", "16", "--workers", "0", "--trackers", "[]", "--log_steps", "1",
    ]  # fmt: skip
    if name in SUBSTITUTES:
        argv += ["--model", SUBSTITUTES[name]]
    config = parse(FinetuneConfig, argv, "usage")
    assert config is not None
    try:
        assert finetune(config) == 0
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        (step,) = (row for row in rows if "grad_norm" in row)
        guessing = math.log(ADE_CLASSES) * (1 + config.aux_weight)
        assert step["loss"] == pytest.approx(guessing, rel=0.1)
        assert step["lr"] == pytest.approx(config.optim.base_lr * 2 / 256)
        assert step["grad_norm"] > 0
        exported = json.loads((run / "exported/config.json").read_text())
        assert exported["architecture"] == timm_name(config.model or "")
        assert exported["num_classes"] == 0
        head = load_file(run / "exported/task/model.safetensors")["net.segmentation_head.0.weight"]
        assert head.shape[:2] == (ADE_CLASSES, 16)
    finally:
        shutil.rmtree(run, ignore_errors=True)  # gigabytes
