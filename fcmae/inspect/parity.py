"""Do the engines agree? Every tensor of an encoder, compared with `dense` on the CPU."""

import torch
from torch import Tensor

from sparse import SparseConvNeXtV2


def tolerance(device: torch.device) -> float:
    """Largest relative difference that counts as agreement: a GPU sums in another order."""
    return 1e-5 if device.type == "cpu" else 1e-4


def parity(engine: str, images: Tensor, mask: Tensor) -> float:
    """Largest difference over the output and all gradients, relative per tensor.

    Args:
        engine: what is compared with `dense` on the CPU.
        images: (B, 3, H, W), on the device where `engine` computes.
        mask: (B, H/32, W/32) bool on the CPU, True = hidden.
    """
    torch.manual_seed(0)
    reference = SparseConvNeXtV2.from_size("atto", engine="dense")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0, 0.1)
    other = SparseConvNeXtV2.from_size("atto", engine=engine)
    other.load_state_dict(reference.state_dict())
    other.to(images.device)
    pairs = zip(_outputs(reference, images.cpu(), mask), _outputs(other, images, mask), strict=True)
    return max(float((b.cpu() - a).abs().max() / a.abs().max()) for a, b in pairs)


def _outputs(encoder: SparseConvNeXtV2, images: Tensor, mask: Tensor) -> list[Tensor]:
    """The output and its gradients."""
    images = images.clone().requires_grad_()
    out = encoder(images, mask)
    gradients = torch.autograd.grad(out.square().mean(), [images, *encoder.parameters()])
    return [out.detach(), *gradients]
