"""torch.compile compiles the encoder to one graph that gives the same numbers."""

import pytest
import torch

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
