"""Devices that this machine may not have: the calls that a run makes, observed by mocks."""

import pytest
import torch

from fcmae.train.machine import resolve_precision
from fcmae.train.processes import OnHost, exact_float32, join_world


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp32")])
def test_emulated_bfloat16_is_not_chosen(native, precision, monkeypatch):
    """GPUs without bfloat16 emulate it, slower than float32."""
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported",
        lambda including_emulation=True: including_emulation or native,
    )
    assert resolve_precision("auto", torch.device("cuda")) == precision
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"


def test_one_process_computes_on_its_own_gpu(monkeypatch):
    """Otherwise streams and events would be those of cuda:0."""
    chosen = []
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_world(torch.device("cuda:1")) as world:
        assert world.size == 1
    assert chosen == [torch.device("cuda:1")]


def tf32_settings():
    """What decides how cuBLAS and cuDNN compute in float32, by torch's new and old names."""
    cudnn = torch.backends.cudnn
    new = (torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision)
    old = (torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32)
    return new, old


@pytest.fixture
def tf32():
    """Torch's defaults; with these, cuDNN computes convolutions in TF32."""
    cudnn = torch.backends.cudnn
    cudnn.allow_tf32, cudnn.fp32_precision = True, "none"
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = "none"
    assert tf32_settings() == (("none", "tf32"), (False, True))
    yield
    exact_float32()


def test_a_run_turns_tf32_off(tf32, monkeypatch):
    """Under both names: torch raises where one is read that disagrees with the other."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_world(torch.device("cpu")):
        assert tf32_settings() == (("ieee", "ieee"), (False, False))
        with torch.backends.cudnn.flags(enabled=True):  # reads the old name
            pass


def test_waiting_for_values_uses_their_own_device(monkeypatch):
    recorded = []

    class Event:
        def record(self, stream):
            recorded.append(stream)

        def synchronize(self):
            pass

    class Values:
        is_cuda, device = True, torch.device("cuda:1")

        def to(self, *_, **__):
            return [1.0, 2.0]

    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: f"stream of {device}")
    assert OnHost(Values()).read() == [1.0, 2.0]
    assert recorded == ["stream of cuda:1"]
