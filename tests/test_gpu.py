"""Behaviour on a GPU: the same numbers, steps that never wait for it, memory, compilation."""

import pytest
import torch

from fcmae import FCMAE
from fcmae.commands.bench import BenchConfig
from fcmae.inspect.memory import forecast
from fcmae.inspect.steps import BF16, WHOLE, example, gpu_peak, make_step
from fcmae.train.pretraining import pretrain
from fcmae.train.processes import exact_float32
from sparse.engines import get_engine
from tests.cli import metrics
from tests.test_engines import MASKS, make_mask, random_encoder
from tests.test_pretrain_input import config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def _exact() -> None:
    exact_float32()


@pytest.mark.parametrize("kind", MASKS)
def test_patch_on_the_gpu_equals_dense_on_the_cpu(kind):
    mask = make_mask(kind, 2, 3, 2)
    images = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    found, expected = {}, {}
    for engine, device, results in (("patch", GPU, found), ("dense", "cpu", expected)):
        encoder = random_encoder(engine, 3, model="atto").to(device)
        out = encoder(images.to(device), mask)
        out.square().mean().backward()
        results["out"] = out.detach().cpu()
        results |= {name: p.grad.cpu() for name, p in encoder.named_parameters()}
    for name, tensor in expected.items():
        # Sums run in another order.
        error = (found[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-6)
        assert error < 1e-4, name


def test_a_step_never_waits_for_the_gpu():
    model = FCMAE.from_size("atto", engine="patch").to(GPU)
    images, mask = example(BenchConfig(batch_size=4, img_size=96), GPU)
    model(images, mask).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(images, mask).loss
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cuda_graph_equals_eager(precision):
    model = FCMAE.from_size("atto", engine="patch").to(GPU)
    lay_out, results = get_engine("patch", "cuda").lay_out, []
    for model.cuda_graph in (True, False):
        model.zero_grad(set_to_none=True)
        for _ in range(2):  # the second gradient is added to the first
            images, mask = example(BenchConfig(batch_size=4, img_size=96), GPU)
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
                loss = model(images, mask, layout=lay_out(mask)).loss
            loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert model._graph is not None
    for found, expected in zip(*results, strict=True):
        # Sums over rows add atomically, in any order.
        error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
        assert error < (1e-4 if precision == "fp32" else 2e-2)


def test_patch_takes_less_memory_than_dense():
    images, mask = example(BenchConfig(batch_size=8), GPU)
    peaks = {}
    for engine in ("patch", "dense"):
        step = make_step(engine, "atto", GPU)
        step(images, mask)
        peaks[engine] = gpu_peak(lambda step=step: step(images, mask), GPU)
    assert peaks["patch"] < 0.6 * peaks["dense"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_forecast_is_within_a_fifth_of_the_peak(precision):
    images, mask = example(BenchConfig(batch_size=32), GPU)
    name = f"patch{BF16 if precision == 'bf16' else ''}{WHOLE}"
    step = make_step(name, "tiny", GPU)
    step(images, mask)
    needs = forecast("tiny", 224, GPU, precision)
    measured = 2**20 * gpu_peak(lambda: step(images, mask), GPU)
    assert 0.8 < needs.total(32) / (measured + 3 * needs.weights + images.nbytes) < 1.2


@pytest.mark.slow
def test_compiled_equals_eager():
    encoder = random_encoder("patch", 3, model="atto").to(GPU)
    images, mask = example(BenchConfig(batch_size=4, img_size=96), GPU)
    eager = encoder(images, mask)
    encoder.compile_encode()
    torch.testing.assert_close(encoder(images, mask), eager, rtol=1e-3, atol=1e-3)


def test_a_run_in_bf16_learns(tmp_path, pictures):
    settings = config(pictures, tmp_path / "run", device="cuda", precision="bf16", epochs=20)
    assert pretrain(settings) == 0
    losses = [loss for _, loss in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0]
