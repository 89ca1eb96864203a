"""Moving tensors between devices without blocking, where that is safe."""

import torch
from torch import Tensor


def to_device(
    tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None
) -> Tensor:
    """Copy a tensor to a device; a copy to or from CUDA does not block the host.

    CUDA stages a copy from pageable memory before it returns, so the source may be a temporary.
    Other devices, such as MPS, may read the source after it is freed, so those copies block.
    """
    cuda = torch.device(device).type == "cuda" or tensor.is_cuda
    return tensor.to(device, dtype, non_blocking=cuda)
