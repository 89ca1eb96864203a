"""A replayed pass: where it is used, and that its gradients are those of the eager pass.

Recording needs a GPU; here a replay computes the recorded function anew, in the graph's memory.
"""

import pytest
import torch

from fcmae.model.fcmae import FCMAE
from fcmae.model.graph import Graph
from fcmae.model.mask import random_masks
from sparse.engines import get_engine
from sparse.engines.base import Layout


class Recomputed(Graph):
    """Replays as a graph does: into the same memory each time."""

    def _record(self) -> None:
        self._found = self._compute()

    def replay(self, inputs):
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        with torch.enable_grad():
            loss, other, gradients = self._compute()
        for own, new in zip(
            [*self._found[:2], *self._found[2]], [loss, other, *gradients], strict=True
        ):
            own.copy_(new)
        return self._found


def batch_of(seed: int) -> tuple[torch.Tensor, torch.Tensor, Layout]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(3, 3, 96, 64, generator=generator)
    mask = random_masks(3, (3, 2), 0.6, generator)
    lay_out = get_engine("patch", "cpu").lay_out
    assert lay_out is not None
    return images, mask, lay_out(mask)


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> FCMAE:
    monkeypatch.setattr("fcmae.model.fcmae.Graph", Recomputed)
    monkeypatch.setattr("fcmae.model.fcmae.GRAPH_DEVICES", ("cpu",))
    torch.manual_seed(0)
    model = FCMAE.from_size("atto", depths=[1, 1, 1, 1], dims=[4, 8, 16, 32], engine="patch")
    model.cuda_graph = True
    return model


def gradients_of(model: FCMAE, seeds: list[int]) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = []
    model.zero_grad(set_to_none=True)
    for seed in seeds:
        images, mask, layout = batch_of(seed)
        loss = model(images, mask, layout=layout).loss / len(seeds)
        loss.backward()
        losses.append(float(loss.detach()))
    return losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradients_add_up_as_without_a_graph(replaying: FCMAE) -> None:
    # The second pass must not overwrite what the parameters keep of the first.
    losses, found = gradients_of(replaying, [1, 2, 3])
    assert replaying._graph is not None
    replaying.cuda_graph = False
    expected_losses, expected = gradients_of(replaying, [1, 2, 3])
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    assert found.keys() == expected.keys() == dict(replaying.named_parameters()).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_weights_are_read_anew(replaying: FCMAE) -> None:
    before, _ = gradients_of(replaying, [1])
    with torch.no_grad():
        for weight in replaying.parameters():
            weight.mul_(1.1)
    after, _ = gradients_of(replaying, [1])
    replaying.cuda_graph = False
    assert after == pytest.approx(gradients_of(replaying, [1])[0], rel=1e-6)
    assert after != pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("case", ["off", "no gradient", "no layout", "images differ"])
def test_passes_that_a_graph_does_not_fit_are_eager(replaying: FCMAE, case: str) -> None:
    images, mask, layout = batch_of(1)
    if case == "images differ":
        mask[0], mask[1:] = True, False
        mask[0, 0, 0] = False
        lay_out = get_engine("patch", "cpu").lay_out
        assert lay_out is not None
        layout = lay_out(mask)
    replaying.cuda_graph = case != "off"
    with torch.set_grad_enabled(case != "no gradient"):
        replaying(images, mask, layout=None if case == "no layout" else layout)
    assert replaying._graph is None


def test_another_shape_is_eager(replaying: FCMAE) -> None:
    gradients_of(replaying, [1])
    images, mask, _ = batch_of(2)
    whole = replaying(images[:2], mask[:2]).loss
    lay_out = get_engine("patch", "cpu").lay_out
    assert lay_out is not None
    assert replaying(images[:2], mask[:2], layout=lay_out(mask[:2])).loss == whole


def test_another_precision_is_eager(replaying: FCMAE) -> None:
    images, mask, layout = batch_of(1)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = replaying(images, mask, layout=layout).loss
    assert replaying._graph is not None
    assert coarse != replaying(images, mask).loss == replaying(images, mask, layout=layout).loss


def test_moved_weights_are_eager(replaying: FCMAE) -> None:
    images, mask, layout = batch_of(1)
    replaying(images, mask, layout=layout)
    assert replaying._graph_for(images, layout) is not None
    replaying.double().float()
    assert replaying._graph_for(images, layout) is None


def test_a_backward_pass_that_is_too_late_is_refused(replaying: FCMAE) -> None:
    images, mask, layout = batch_of(1)
    early = replaying(images, mask, layout=layout).loss
    replaying(images, mask, layout=layout).loss.backward()
    with pytest.raises(RuntimeError, match="after another forward pass"):
        early.backward()
