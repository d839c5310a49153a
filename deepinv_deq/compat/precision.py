r"""What PyTorch may round further than the types of tensors say."""

from __future__ import annotations

import torch


def rounds_convolutions(device: torch.device) -> bool:
    r"""Whether convolutions in float32 may be computed in TF32 on a device, as PyTorch allows by default."""
    try:
        return device.type == "cuda" and torch.backends.cudnn.allow_tf32
    except RuntimeError:  # newer settings than this flag were used
        settings = getattr(torch.backends.cudnn, "conv", None)
        return getattr(settings, "fp32_precision", "ieee") == "tf32"


def rounds_matrix_products() -> bool:
    r"""Whether matrix products in float32 may be computed in TF32 or bfloat16, where the hardware can."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # newer settings than this one were used, for some devices
        return True


def unit_roundoff(dtype: torch.dtype, device: torch.device) -> float:
    r"""The relative rounding of an operation on tensors of a type, which may be that of TF32 for float32."""
    if dtype == torch.float32 and (rounds_convolutions(device) or rounds_matrix_products()):
        return 2.0**-10
    return torch.finfo(dtype).eps
