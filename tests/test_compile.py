"""torch.compile compiles the encoder to one graph that gives the same numbers."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from fcmae import FCMAE
from fcmae.model.mask import random_masks
from sparse.engines.patch import lay_out_patches
from sparse.errors import InputError
from tests.test_engines import make_mask, needs_minkowski, random_encoder


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("engine", ["patch", "dense"])
def test_the_encoder_compiles_to_one_graph_without_breaks(engine, recompute):
    """`fullgraph` raises at the first graph break, in the forward and in the backward pass."""
    encoder = random_encoder(
        engine, 3, model="atto", depths=[1, 1, 1, 1], recompute=recompute, drop_path=0.1
    ).eval()
    images = torch.randn(2, 3, 96, 64)
    torch._dynamo.reset()
    compiled = torch.compile(encoder.encode, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        mask = make_mask("random", 2, 3, 2)[:, torch.randperm(3)]
        results = []
        for encode in (encoder.encode, compiled):
            out = encode(images + seed, encoder.engine_on(images.device).sites(mask, images.device))
            out.square().sum().backward()
            results.append([out.detach(), *(p.grad for p in encoder.parameters())])
            encoder.zero_grad()
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-5)


def train_eager_and_compiled(rank: int, address: str) -> None:
    """One of two processes: it takes the same steps twice, and compares the losses."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.compile = partial(torch.compile, backend="aot_eager")
    losses: list[list[float]] = []
    for compiled in (False, True):
        encoder = random_encoder("patch", 3, model="atto", depths=[1, 1, 1, 1])
        torch.manual_seed(0)
        model = FCMAE(encoder, decoder_dim=32, norm_pix_loss=False)
        if compiled:
            encoder.compile_encode()
        forward = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        losses.append([])
        for step in range(3):
            generator = torch.Generator().manual_seed(2 * step + rank)
            images = 2 + torch.randn(2, 3, 96, 64, generator=generator)
            masks = random_masks(2, (3, 2), 0.5, generator)
            layout = lay_out_patches(masks)
            loss = forward(images, masks, layout=layout).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    eager, traced = losses
    assert eager[-1] < eager[0] - 0.01, eager
    assert traced == pytest.approx(eager, rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"], counters["graph_break"]
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_compile_one_graph_and_learn_the_same(tmp_path):
    address = f"file://{tmp_path / 'store'}"
    torch.multiprocessing.spawn(train_eager_and_compiled, (address,), nprocs=2)


def test_auto_chooses_an_engine_that_compiles(monkeypatch):
    """Even if MinkowskiEngine, the default without compilation, is installed."""
    monkeypatch.setattr("torch.compile", lambda encode, **_: encode)
    encoder = random_encoder("auto", 3, model="atto", depths=[1, 1, 1, 1])
    encoder.compile_encode()
    assert encoder.engine_on(torch.device("cpu")).name == "patch"


@needs_minkowski
def test_compiling_minkowski_is_refused():
    encoder = random_encoder("minkowski", 3, model="atto", depths=[1, 1, 1, 1])
    with pytest.raises(InputError, match="use engine 'patch'"):
        encoder.compile_encode()


def test_a_missing_compiler_is_reported(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    encoder = random_encoder("patch", 3, model="atto", depths=[1, 1, 1, 1])
    with pytest.raises(InputError, match="needs a C\\+\\+ compiler"):
        encoder.compile_encode()
