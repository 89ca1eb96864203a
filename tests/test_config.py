"""Configs: checks, YAML round trips, and the shipped files against the paper's numbers."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fcmae.commands.bench import BenchConfig
from fcmae.commands.evaluate import EvaluateConfig
from fcmae.commands.predict import PredictConfig
from fcmae.commands.probe import ProbeConfig
from fcmae.commands.samples import SamplesConfig
from fcmae.config.fields import leaves, runtime_keys
from fcmae.config.files import build, read_yaml, save_yaml
from fcmae.config.parsing import parse
from fcmae.config.pretraining import (
    AugmentConfig,
    DecoderConfig,
    EpochProbeConfig,
    PretrainConfig,
)
from fcmae.config.training import OptimConfig
from fcmae.config.values import differences, flatten, height_width
from finetune.config import FinetuneAugmentConfig, FinetuneConfig, FinetuneOptimConfig
from sparse.errors import InputError
from sparse.sizes import SIZES, resolve_size

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
SIZE_NAMES = ["atto", "femto", "pico", "nano", "tiny", "base", "large", "huge"]


def load(name: str) -> Any:
    kind = PretrainConfig if name.startswith("pretrain/") else FinetuneConfig
    argv = ["--data", "photos", "--out", "run", "--config", str(CONFIGS / name)]
    return parse(kind, argv, "usage")


def read(path: Path) -> PretrainConfig | None:
    return parse(PretrainConfig, ["--config", str(path)], "usage")


def test_every_size_has_both_recipes() -> None:
    wanted = {f"{kind}/{name}.yaml" for kind in ("pretrain", "finetune") for name in SIZES}
    wanted |= {
        f"{kind}/{name}.yaml" for kind in ("pretrain", "finetune") for name in ("small", "smoke")
    }
    assert wanted <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_shipped_config_loads_and_states_its_command(name: str) -> None:
    config = load(name)
    own = (config.depths, config.dims) if "pretrain" in name else ()
    model, stem = config.model or "atto", Path(name).stem
    if not model.startswith(("convnext_", "roadmap_")):
        size = resolve_size(model, *own)
        assert stem not in SIZES or size == SIZES[stem]
    text = (CONFIGS / name).read_text(encoding="utf-8")
    assert f"--config configs/{name}" in text.splitlines()[0]
    assert "Result" in text
    assert "ime" in text


@pytest.mark.parametrize(
    ("name", "kind"),
    [("pretrain/small.yaml", PretrainConfig), ("finetune/small.yaml", FinetuneConfig)],
)
def test_small_spells_out_the_defaults(name: str, kind: Any) -> None:
    assert load(name) == kind(data="photos", out="run")
    runtime = runtime_keys(kind)
    decides = {key for key in leaves(kind) if key.split(".")[0] not in runtime | {"data"}}
    assert set(flatten(read_yaml(CONFIGS / name))) == decides


@pytest.mark.parametrize("size", SIZE_NAMES)
def test_pretraining_recipe_equals_the_papers(size: str) -> None:
    """Paper, Table 8."""
    config = load(f"pretrain/{size}.yaml")
    assert config.model == size
    assert (config.img_size, config.mask_ratio, config.norm_pix_loss) == (224, 0.6, True)
    assert config.decoder == DecoderConfig(dim=512, depth=1)
    assert (config.epochs, config.batch_size) == (1600, 4096)
    assert config.optim == OptimConfig(1.5e-4, 0.05, [0.9, 0.95], warmup_epochs=40)
    augment = config.augment
    assert (augment.crop_scale, augment.hflip, augment.vflip) == ([0.2, 1.0], True, False)
    assert (augment.mean, augment.std) == ("imagenet", "imagenet")


# Paper, Tables 9 to 11; base_lr of base and large from the official command.
# base_lr, decay, layer decay, grouped by, epochs, warm-up, mixup, cutmix, smoothing, drop path
FINETUNE = {
    "atto": (2e-4, 0.3, 0.9, "single", 600, 0, 0.0, 0.0, 0.2, 0.1),
    "femto": (2e-4, 0.05, 0.9, "single", 600, 0, 0.3, 0.3, 0.2, 0.0),
    "pico": (2e-4, 0.3, 0.9, "single", 600, 0, 0.3, 0.3, 0.2, 0.0),
    "nano": (2e-4, 0.3, 0.9, "single", 600, 0, 0.5, 0.5, 0.2, 0.1),
    "tiny": (8e-4, 0.05, 0.9, "single", 300, 40, 0.8, 1.0, 0.1, 0.2),
    "base": (6.25e-4, 0.05, 0.6, "group", 100, 20, 0.8, 1.0, 0.1, 0.1),
    "large": (6.25e-4, 0.05, 0.6, "group", 100, 20, 0.8, 1.0, 0.1, 0.2),
    "huge": (1.25e-3, 0.05, 0.75, "single", 50, 10, 0.8, 1.0, 0.1, 0.3),
}


@pytest.mark.parametrize("size", SIZE_NAMES)
def test_finetuning_recipe_equals_the_papers(size: str) -> None:
    config = load(f"finetune/{size}.yaml")
    optim, augment = config.optim, config.augment
    assert FINETUNE[size] == (
        optim.base_lr,
        optim.weight_decay,
        optim.layer_decay,
        optim.layer_group,
        config.epochs,
        optim.warmup_epochs,
        augment.mixup,
        augment.cutmix,
        augment.label_smoothing,
        config.drop_path,
    )
    assert (config.model, config.img_size, config.batch_size) == (size, 224, 1024)
    assert (optim.betas, config.head_init_scale, config.ema_decay) == ([0.9, 0.999], 0.001, 0.9999)
    assert (augment.randaugment, augment.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)


# Paper, Tables 12 and 13.
# layer decay, drop path on ImageNet-22K; layer decay, drop path, epochs then on ImageNet-1K
THROUGH_22K = {
    "nano": (0.9, 0.0, 0.9, 0.1, 90),
    "tiny": (0.9, 0.0, 0.9, 0.2, 90),
    "base": (0.8, 0.1, 0.8, 0.2, 30),
    "large": (0.8, 0.1, 0.85, 0.3, 30),
    "huge": (0.8, 0.3, 0.85, 0.5, 30),
}


@pytest.mark.parametrize("size", THROUGH_22K)
def test_recipes_through_22k_equal_the_papers(size: str) -> None:
    middle, last = (load(f"finetune/{folder}/{size}.yaml") for folder in ("22k", "22k_1k"))
    decays = (middle.optim.layer_decay, middle.drop_path, last.optim.layer_decay, last.drop_path)
    assert (*decays, last.epochs) == THROUGH_22K[size]
    assert (middle.model, middle.epochs, middle.batch_size) == (size, 90, 4096)
    optim, augment = middle.optim, middle.augment
    assert (optim.base_lr, optim.weight_decay, optim.warmup_epochs) == (2.5e-4, 0.05, 5)
    assert (augment.mixup, augment.cutmix, middle.ema_decay) == (0.8, 1.0, None)
    assert (last.model, last.batch_size, last.ema_decay) == (size, 512, 0.9999)
    assert (last.optim.base_lr, last.optim.weight_decay) == (2.5e-5, 1e-8)
    assert (last.augment.mixup, last.augment.cutmix) == (0.0, 0.0)


def test_384_changes_only_the_size() -> None:
    base, at_384 = (str(CONFIGS / "finetune" / name) for name in ("22k_1k/base.yaml", "384.yaml"))
    argv = ["--data", "photos", "--out", "run", "--config", base]
    small = parse(FinetuneConfig, argv, "")
    large = parse(FinetuneConfig, [*argv, "--config", at_384], "")
    assert small is not None
    augment = replace(small.augment, crop_pct=1.0)
    assert large == replace(small, img_size=384, augment=augment)


def test_differences_lists_only_settings_that_change_results() -> None:
    stored = PretrainConfig("photos", "run", seed=1)
    runtime = PretrainConfig(
        "photos", "moved", seed=1, engine="dense", device="cpu", precision="fp32", workers=3,
        resume="never", checkpoint_steps=5, checkpoint_minutes=1, keep_checkpoints=3, log_steps=1,
        picture_epochs=0, probe=EpochProbeConfig("x"), max_pixels=10, max_bad=0.5,
    )  # fmt: skip
    assert differences(asdict(runtime), asdict(stored), runtime_keys(PretrainConfig)) == []
    asked = PretrainConfig("other", "run", seed=1, optim=OptimConfig(base_lr=1e-3))
    assert differences(asdict(asked), asdict(stored), runtime_keys(PretrainConfig)) == [
        ("data", "photos", "other"),
        ("optim.base_lr", 6e-3, 1e-3),
    ]


def test_settings_that_may_change_on_resume() -> None:
    shared = {
        "out", "device", "precision", "compile", "workers", "resume", "checkpoint_steps",
        "checkpoint_minutes", "keep_checkpoints", "log_steps", "max_pixels", "max_bad", "nonfinite",
        "max_nonfinite", "trackers", "cache", "cache_gb",
    }  # fmt: skip
    own = {"engine", "recompute", "cuda_graph", "picture_epochs", "probe"}
    assert runtime_keys(PretrainConfig) == shared | own
    assert runtime_keys(FinetuneConfig) == shared | {"near_duplicates"}


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: PretrainConfig("a", "b", img_size=225), ["img_size 225", "32", "224 or 256"]),
        (lambda: PretrainConfig("a", "b", img_size=[96, 100]), ["100", "96 or 128"]),
        (lambda: PretrainConfig("a", "b", img_size=8), ["8", "32 or 64"]),
        (lambda: PretrainConfig("a", "b", img_size=[1, 2, 3]), ["[1, 2, 3]", "[96,160]"]),
        (lambda: PretrainConfig("a", "b", epochs=0), ["epochs 0", "at least 1", "such as auto"]),
        (lambda: PretrainConfig("a", "b", batch_size=-4), ["batch_size -4", "64"]),
        (lambda: PretrainConfig("a", "b", drop_path=1.0), ["drop_path 1.0", "below 1"]),
        (lambda: PretrainConfig("a", "b", workers=-1), ["workers -1", "at least 0"]),
        (
            lambda: PretrainConfig("a", "b", keep_checkpoints=1),
            ["keep_checkpoints 1", "at least 2"],
        ),
        (lambda: PretrainConfig("a", "b", max_bad=1.5), ["max_bad 1.5", "at most 1"]),
        (lambda: PretrainConfig("a", "b", checkpoint_minutes=float("nan")), ["nan"]),
        (
            lambda: PretrainConfig("a", "b", in_chans=4, augment=AugmentConfig(mean=[0.5])),
            ["augment.mean [0.5]", "4 channels", "[0.5,0.5,0.5,0.5]"],
        ),
        (lambda: PretrainConfig("a", "b", layer_scale=float("nan")), ["layer_scale nan"]),
        (lambda: PretrainConfig("a", "b", layer_scale=-1.0), ["layer_scale -1.0", "above 0"]),
        (lambda: FinetuneConfig("a", "b", head_init_scale=float("inf")), ["inf", "finite"]),
        (lambda: AugmentConfig(mean=[float("nan"), 0, 0]), ["augment.mean [nan", "finite"]),
        (lambda: AugmentConfig(std=[float("inf"), 1, 1]), ["augment.std [inf", "finite"]),
        (lambda: DecoderConfig(dim=0), ["decoder.dim 0", "512"]),
        (lambda: OptimConfig(base_lr=0), ["optim.base_lr 0", "above 0"]),
        (lambda: OptimConfig(base_lr=float("inf")), ["inf", "finite"]),
        (lambda: OptimConfig(base_lr=float("nan")), ["nan"]),
        (lambda: OptimConfig(betas=[0.9]), ["optim.betas [0.9]", "[0.9,0.95]"]),
        (lambda: OptimConfig(betas=[0.9, 1.0]), ["optim.betas"]),
        (lambda: AugmentConfig(crop_scale=[0.5, 0.2]), ["augment.crop_scale", "[0.2,1.0]"]),
        (lambda: AugmentConfig(crop_scale=[0.0, 1.0]), ["augment.crop_scale"]),
        (lambda: AugmentConfig(crop_ratio=[1.0]), ["augment.crop_ratio"]),
        (lambda: AugmentConfig(std=[0.2, 0.0, 0.2]), ["augment.std [0.2, 0.0, 0.2]", "above 0"]),
        (lambda: SamplesConfig("a", size=8), ["size 8", "at least 32", "128"]),
        (lambda: BenchConfig(rounds=0), ["rounds 0"]),
        (lambda: ProbeConfig("a", "b", neighbours=[5, 0]), ["neighbours [5, 0]", "[5,20]"]),
        (lambda: ProbeConfig("a", "b", neighbours=[]), ["neighbours []", "at least 1"]),
        (lambda: ProbeConfig("a", "b", batch_size=0), ["batch_size 0", "at least 1", "64"]),
        (lambda: FinetuneOptimConfig(layer_decay=1.1), ["optim.layer_decay 1.1", "at most 1"]),
        (lambda: FinetuneAugmentConfig(mixup=-1), ["augment.mixup -1", "at least 0"]),
        (lambda: FinetuneConfig("a", "b", val_fraction=1.0), ["val_fraction 1.0", "below 1"]),
        (lambda: FinetuneConfig("a", "b", ema_decay=1.0), ["ema_decay 1.0", "0.998"]),
        (lambda: EvaluateConfig("a", "b", img_size=0), ["img_size 0"]),
        (lambda: PredictConfig("a", "b", "c", top=0), ["top 0", "5"]),
    ],
)
def test_a_bad_number_names_a_value_that_works(build: Any, names: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        build()
    message = str(caught.value)
    assert "\n" not in message
    for name in names:
        assert name in message


def test_fine_tuning_accepts_sizes_that_pretraining_does_not() -> None:
    assert FinetuneConfig("a", "b", img_size=100).img_size == 100


def test_height_width() -> None:
    assert height_width(96) == (96, 96)
    assert height_width([96, 160]) == (96, 160)


def test_a_config_is_built_from_dotted_keys() -> None:
    config = PretrainConfig(["a", "b"], "run", optim=OptimConfig(clip_grad=1.0))
    assert build(PretrainConfig, flatten(asdict(config))) == config


def test_unknown_and_missing_keys_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: a\nout: b\nepoch: 1")
    with pytest.raises(InputError, match="'epoch'; did you mean epochs"):
        read(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("data: a")
    with pytest.raises(InputError, match="missing --out"):
        read(tmp_path / "config.yaml")


TEXTS = st.text(min_size=1, max_size=12).filter(lambda text: not text.startswith("["))


@settings(deadline=None, max_examples=20)
@given(TEXTS, TEXTS)
@example("next\x85line", "\u2028")
def test_any_path_survives_the_command_line_and_yaml(
    tmp_path_factory: pytest.TempPathFactory, data: str, out: str
) -> None:
    config = parse(PretrainConfig, [f"--data={data}", f"--out={out}"], "usage")
    assert config == PretrainConfig(data, out)
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    save_yaml(config, path)
    assert read(path) == config


@pytest.mark.parametrize(
    "name", ["a\udcffb", "1e3", "null", "12", "true", "2020-01-01", "~", "- a", "%s"]
)
def test_paths_that_look_like_something_else(name: str, tmp_path: Path) -> None:
    config = PretrainConfig(name, "run")
    save_yaml(config, tmp_path / "config.yaml")
    assert read(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("[A,B]", ["A", "B"]),
        ("['a, b', \"c\"]", ["a, b", "c"]),
        ("[2021,007]", ["2021", "007"]),
        ("[a", "[a"),
        ("[a] b", "[a] b"),
    ],
)
def test_several_folders(text: str, data: str | list[str]) -> None:
    config = parse(PretrainConfig, ["--data", text, "--out", "run"], "usage")
    assert config == PretrainConfig(data, "run")


def test_everything_survives_yaml(tmp_path: Path) -> None:
    shared = [0.5, 0.5, 0.5]  # one object twice: YAML would write an alias
    config = PretrainConfig(
        ["a b", "ü"], "run", depths=[1, 1, 1, 1], img_size=[96, 160], layer_scale=1e-6, workers=3,
        optim=OptimConfig(base_lr=1e-8, warmup_epochs=0.5),
        augment=AugmentConfig(mean=shared, std=shared),
    )  # fmt: skip
    save_yaml(config, tmp_path / "config.yaml")
    assert read(tmp_path / "config.yaml") == config


@settings(deadline=None, max_examples=150)
@given(st.one_of(st.text(max_size=60), st.binary(max_size=60)))
def test_the_yaml_reader_returns_a_mapping_or_raises_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: str | bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    lines = 0
    try:
        read_yaml(path)
    except InputError as error:
        lines = len(str(error).splitlines())
    assert lines <= 1
