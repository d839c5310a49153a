r"""Proof that no value of one sample reaches another: NaN in one sample, through operations that all pass NaN on.

Every operation is watched. Listed operations return NaN wherever their result depends on a NaN, even where a weight is zero. So a
result without NaN does not depend on the sample. Other operations, such as comparisons, may lose a NaN: then nothing is proved.
Neither is it where Python code sees a value of a tensor, because the code may then take another way for other values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deepinv_deq import compat

_PASS_ON = frozenset(
    # elementwise; what has no NaN anywhere is not listed, because it needs no proof
    """add sub rsub mul div neg reciprocal addcmul addcdiv lerp abs exp expm1 log log1p log2 sin cos tan tanh sinh cosh atan
    sigmoid logit sqrt rsqrt square erf erfc relu leaky_relu elu celu gelu silu mish softplus hardtanh hardswish relu6 clamp
    clamp_min clamp_max minimum maximum _prelu_kernel _softmax _log_softmax glu _conj real imag conj_physical copy
    _to_copy to clone detach alias lift_fresh positive
    """.split()
    # linear
    + """convolution mm bmm mv dot vdot addmm addmv baddbmm matmul linear einsum _sparse_mm sum mean cumsum var std norm
    linalg_vector_norm _fft_c2c _fft_r2c _fft_c2r avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool2d _adaptive_avg_pool2d
    convolution_backward conv2d conv3d grid_sampler_2d_backward
    """.split()
    # layers
    + """native_group_norm native_layer_norm native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm
    max_pool2d_with_indices max_pool3d_with_indices upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _scaled_dot_product_attention_math
    _scaled_dot_product_flash_attention_for_cpu amax amin
    """.split()
    # shapes and places
    + """view _unsafe_view view_as reshape _reshape_alias view_as_complex view_as_real permute transpose t expand squeeze
    unsqueeze flatten unflatten cat stack split split_with_sizes chunk unbind select slice narrow diagonal unfold as_strided roll
    flip repeat tile pixel_shuffle pixel_unshuffle channel_shuffle constant_pad_nd reflection_pad1d reflection_pad2d
    reflection_pad3d replication_pad1d replication_pad2d replication_pad3d im2col col2im contiguous
    """.split()
)
# A condition or an index may be computed from a tensor that changes later. What a condition does not select now counts, too, and an
# index proves nothing.
_SELECT = frozenset(("where", "masked_fill"))
_OWN_INPUTS = {"grid_sampler_2d": 1, "grid_sampler_3d": 1}  # number of leading arguments that may have NaN
_ONLY_SHAPES = frozenset(
    "ones_like zeros_like empty_like full_like new_empty new_zeros new_ones new_full promote_types".split()
)
_SEE_VALUES = frozenset("_local_scalar_dense is_nonzero nonzero masked_select equal _unique2 unique_dim".split())
_LEAVE_TORCH = frozenset("numpy tolist __array__ __dlpack__ data_ptr untyped_storage storage".split())


class _OutOfTorch(TorchFunctionMode):
    r"""Notices when values go to other libraries."""

    certain = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _LEAVE_TORCH:
            self.certain = False
        return func(*args, **(kwargs or {}))


def passes_nan_on(evaluate: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], bool]:
    r"""Evaluate a map at a point with NaN.

    :param Callable evaluate: evaluates it.
    :return: the image, and whether it has NaN wherever it depends on one.
    """
    watching = compat.dispatch_mode(_listed)
    if watching is None:
        return evaluate(), False
    with _OutOfTorch() as outside, watching as operations:
        image = evaluate()
    return image, outside.certain and operations.certain


def _listed(name: str, args: Any, kwargs: Any) -> bool:
    r"""Whether an operation with these arguments passes NaN on."""
    name = name.removesuffix("_")
    if _caller(_WATCHERS) == "deepinv_deq.states":  # units of samples, each by itself or one that cancels exactly
        return True
    if name in _SEE_VALUES:  # the code of deepinv's physics was read
        return _caller().startswith("deepinv.physics") and not any(_has_nan(t) for t in _tensors((args, kwargs)))
    if name in _SELECT and _keeps_nan(name, *args):
        return True
    if name in _ONLY_SHAPES or (name in _PASS_ON and _stays_floating(name, args, kwargs)):
        return True
    return not any(_has_nan(t) for t in _tensors((args[_OWN_INPUTS.get(name, 0) :], kwargs)))


def _keeps_nan(name: str, x: Tensor, *args: Any) -> bool:
    r"""Whether the result of a selection has every NaN of its arguments."""
    if name == "where":  # x is the condition
        lost = ((x if i else ~x, t) for i, t in enumerate(args) if isinstance(t, Tensor))
        return not any(_has_nan(torch.where(where, t, torch.zeros(()).to(t))) for where, t in lost)
    filled = any(_has_nan(t) for t in args[1:] if isinstance(t, Tensor))
    return not filled and not _has_nan(torch.where(args[0], x, torch.zeros(()).to(x)))


def _stays_floating(name: str, args: Any, kwargs: Any) -> bool:
    r"""Whether a result can hold NaN, which integers cannot."""
    types = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, torch.dtype)]
    types += [args[0].dtype] if name == "copy" else []
    return all(dtype.is_floating_point or dtype.is_complex for dtype in types)


_WATCHERS = ("torch", __name__, compat.dispatch_mode.__module__)


def _caller(skipped: tuple[str, ...] = ("torch", "deepinv_deq")) -> str:
    r"""The module of the code that called PyTorch."""
    frame = sys._getframe(1)
    while frame.f_back is not None and f"{frame.f_globals.get('__name__', '')}.".startswith(
        tuple(f"{m}." for m in skipped)
    ):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", ""))


def _tensors(tree: Any) -> Iterator[Tensor]:
    r"""The tensors in arguments."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple, dict)):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(part)


def _has_nan(t: Tensor) -> bool:
    if not (t.is_floating_point() or t.is_complex()) or not t.numel():
        return False
    return bool(torch.isnan(t if t.layout is torch.strided else t.values()).any())
