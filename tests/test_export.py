"""Exports: what other programs load computes what the source computes."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.layers.mlp import GlobalResponseNormMlp
from torch import Tensor, nn

from fcmae.commands.export import ExportConfig
from fcmae.data.evaluation import EvalDataset
from fcmae.data.file_list import find_images
from fcmae.data.labelled import Split
from fcmae.data.sample import normalise
from fcmae.data.statistics import Preprocessing
from fcmae.weights.export import export_folder, timm_config
from fcmae.weights.graphs import Exportable, HalfPrecision, read_description, write_onnx
from finetune.exporting import export
from finetune.model import Start
from finetune.tasks import TASKS
from finetune.tasks.regress import InUnits
from finetune.tasks.segment import Segment
from finetune.tuned import STATE, TASK, load_tuned
from sparse import SparseConvNeXtV2
from sparse.errors import InputError
from sparse.layouts import infer_architecture
from tests.cli import run
from tests.conftest import write_pictures
from tests.test_segment import config_for

onnx_reference = pytest.importorskip("onnx.reference")
onnxruntime = pytest.importorskip("onnxruntime")
HOW = Preprocessing((64, 96), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
SMALL = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
STATES: dict[str, dict[str, Any]] = {
    "classify": {},
    "multilabel": {"thresholds": [0.5, 0.5]},
    "regress": {"mean": [100.0, -3.0], "std": [20.0, 0.5], "loss": "mse"},
    "segment": {"short_side": None, "decoder_channels": 16},
}


def randomise(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of random weights for each kind of label, and for a backbone."""
    root = tmp_path_factory.mktemp("folders")
    found = {"backbone": root / "backbone"}
    encoder = SparseConvNeXtV2(engine="patch", **SMALL)
    randomise(encoder)
    state = encoder.state_dict()
    export_folder(state, infer_architecture(state), found["backbone"], HOW)
    for task, own in STATES.items():
        kind = TASKS[task](("a", "b"), own)
        if task == "segment":
            assert isinstance(kind, Segment)
            kind.config = config_for(root, decoder_channels=16)
        model: Any
        model, args = kind.build_model(Start("convnextv2_atto", SMALL), 3, HOW.img_size)
        randomise(model)
        config = timm_config(
            "convnextv2_atto", args, model.num_features, HOW, model.pretrained_cfg, kind.names
        )
        kind.write(model.state_dict(), {**config, TASK: task, STATE: own}, root / task)
        found[task] = root / task
    return found


def expected(folder: Path, task: str, images: Tensor) -> Tensor:
    """What timm, or the model that `fcmae predict` uses, computes."""
    with torch.no_grad():
        if task in ("backbone", "classify", "multilabel"):
            timms: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
            out: Tensor = timms.eval()(images)
            return out
        tuned = load_tuned(str(folder), torch.device("cpu"))
        values: Tensor = tuned.model(images)
        if task == "regress":
            return torch.from_numpy(tuned.kind.decode(values))  # type: ignore[attr-defined]
        return values


def examples(task: str) -> list[Tensor]:
    sizes = [(64, 96)] if task == "segment" else [(64, 96), (128, 64)]
    return [torch.randn(batch, 3, *size) for batch in (1, 70) for size in sizes]


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4


@pytest.mark.parametrize("task", ["backbone", *STATES])
def test_onnx_and_pt2_compute_what_the_source_does(
    folders: dict[str, Path], task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = [tmp_path / "a.onnx", tmp_path / "a.pt2"]
    for out in outs:
        assert export(ExportConfig(str(folders[task]), out.suffix[1:], out=str(out))) == out
        described = read_description(out)
        assert described is not None
        assert described["task"] == task
        assert described["outputs"] == ([] if task == "backbone" else ["a", "b"])
        assert described["mean"] == list(HOW.mean)
        assert described["img_size"] == [64, 96]
    assert "within" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(outs[0], providers=["CPUExecutionProvider"])
    name = {"backbone": "features", "regress": "numbers"}.get(task, "logits")
    assert [output.name for output in session.get_outputs()] == [name]
    with outs[1].open("rb") as file:
        graph = torch.export.load(file).module()
    for images in examples(task):
        wanted = expected(folders[task], task, images)
        found = session.run([name], {"images": images.numpy()})[0]
        assert_close(torch.from_numpy(found), wanted)
        assert_close(graph(images).detach(), wanted)


@pytest.mark.parametrize("task", ["backbone", "classify"])
def test_transformers_computes_what_the_source_does(
    folders: dict[str, Path], task: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    for _ in range(2):  # an earlier export is replaced
        export(ExportConfig(str(folders[task]), "transformers", out=str(out), img_size=96))
    auto = transformers.AutoModelForImageClassification if task == "classify" else None
    model = (auto or transformers.AutoModel).from_pretrained(out).eval()
    for images in examples(task):
        with torch.no_grad():
            output = model(images)
        found = output.logits if task == "classify" else output.pooler_output
        assert_close(found, expected(folders[task], task, images))
    if task == "classify":
        assert model.config.id2label == {0: "a", 1: "b"}
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    assert tuple(processor.image_mean) == HOW.mean
    file = write_pictures(tmp_path / "photo", 1, size=180) / "0000.png"
    with Image.open(file) as photo:
        found = processor(photo, return_tensors="pt")["pixel_values"][0]
    dataset = EvalDataset(Split(find_images(str(file.parent))), replace(HOW, img_size=(96, 96)))
    pixels = torch.from_numpy(dataset[0].image)[None]
    wanted = normalise(pixels, HOW.mean, HOW.std, torch.device("cpu"))[0]
    # It cuts at whole pixels of the resized image, and rounds to 8 bits before it normalises.
    assert float((found - wanted).abs().mean()) < 0.05
    assert float((found - wanted.flip(2)).abs().mean()) > 0.5


class Naive(nn.Module):
    """A model in float16 with inputs and outputs in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).half()

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.model(images.half())
        return out.float()


def test_float16_is_finite_where_a_naive_export_is_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    block = GlobalResponseNormMlp(8, 16, use_conv=True).eval()
    nn.init.constant_(block.grn.weight, 0.5)
    what = Exportable(block, (8, 64, 64), False, "out", {})
    loud = 5000 * torch.randn(1, 8, 64, 64)
    found = {}
    for name in ("wide", "naive"):
        out = tmp_path / f"{name}.onnx"
        write_onnx(what, out, 20, half=True)
        # onnxruntime computes most of it in float32 on a CPU; this rounds after every operator.
        exact = onnx_reference.ReferenceEvaluator(str(out))
        with np.errstate(all="ignore"):
            found[name] = torch.from_numpy(exact.run(None, {"images": loud.numpy()})[0])
        monkeypatch.setattr("fcmae.weights.graphs.HalfPrecision", Naive)
    assert found["naive"].isnan().any()
    wanted = block(loud).detach()
    assert float((found["wide"] - wanted).abs().max() / wanted.abs().max()) < 1e-2


def test_a_float16_file_is_close(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "half.onnx"
    export(ExportConfig(str(folders["classify"]), "onnx", out=str(out), half=True))
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    images = torch.randn(2, 3, 64, 96)
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    wanted = expected(folders["classify"], "classify", images)
    assert found.dtype == torch.float32
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 2e-2


def test_large_numbers_survive_float16() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    scaled = InUnits(model, {"mean": [1e6, 30000.0], "std": [1.0, 0.5]}).eval()
    images = torch.randn(3, 1, 2, 2)
    with torch.no_grad():
        error = (HalfPrecision(scaled)(images) - scaled(images)).abs() / scaled.std_K
    assert error.max() < 0.1  # 1e6 in float32 is exact to 0.06


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "pt2", "--out", "x.onnx"], "must be a file ending in .pt2"),
        (["--to", "onnx", "--out", "x.onnx", "--opset", "9"], "opset 9"),
        (["--to", "pt2", "--out", "x.pt2", "--half", "true"], "half is for onnx"),
        (["--to", "onnx", "--out", "note.onnx"], "is not such an export"),
        (["--to", "transformers", "--out", "full"], "is not such an export"),
        (["--to", "transformers", "--out", "new"], "images are square"),
        (["--to", "tensorrt", "--out", "x"], "tensorrt"),
    ],
)
def test_wrong_input_is_one_line(
    folders: dict[str, Path], options: list[str], words: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note.onnx").write_text("a note")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    said = run("export", folders["classify"], *options, code=2).stderr
    assert words in said
    assert said.count("\n") == 1
    assert (tmp_path / "note.onnx").read_text() == "a note"


def test_what_cannot_be_exported_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is for segment: use --to onnx or pt2"):
        export(ExportConfig(str(folders["segment"]), "transformers", out=str(tmp_path / "x")))
    with pytest.raises(InputError, match="no weights"):
        export(ExportConfig(str(tmp_path), "pt2", out=str(tmp_path / "x.pt2")))
    kind = TASKS["detect"](("a",), {})
    with pytest.raises(InputError, match="task detect"):
        kind.exported(nn.Identity())
    assert [*tmp_path.iterdir()] == []
