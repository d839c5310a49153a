r"""Parts of :mod:`deepinv.distributed` in a deep equilibrium model that several processes evaluate together.

Distributed physics (``distribute(physics, context)``) can be used as they are. A denoiser whose tiles are distributed needs
:class:`SynchronisedDenoiser`. To train with a part of every batch in each process, use PyTorch's
:class:`torch.nn.parallel.DistributedDataParallel` instead.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deepinv_deq import compat


class SynchronisedDenoiser(nn.Module):
    r"""A distributed denoiser whose gradients are the same in all processes.

    In deepinv, each process holds only its tiles' part of the input gradient until a later average. The same holds for weights
    that are not leaves of the graph. The adjoint solve needs the complete gradient. Otherwise each process solves another
    equation, and stops at another iteration while the others wait.

    :param torch.nn.Module tiles: what ``deepinv.distributed.distribute(denoiser, context)`` returns.

    :raises TypeError: for anything else.
    :raises RuntimeError: if this version of deepinv has other distributed classes than version 0.5.
    """

    def __init__(self, tiles: nn.Module):
        super().__init__()
        processing, replicated_parameters, synchronise = compat.distributed_framework()
        if None in (processing, replicated_parameters, synchronise):
            raise RuntimeError("This version of deepinv lacks what SynchronisedDenoiser needs; version 0.5 has it.")
        if not isinstance(tiles, processing):
            raise TypeError(
                f"tiles must come from deepinv.distributed.distribute(denoiser, ...), got {type(tiles).__name__}."
            )
        self.tiles = tiles
        replicated_parameters(tiles.ctx, list(tiles.parameters()))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        r"""Denoise.

        :param torch.Tensor x: image of shape ``(B, C, H, W)``, the same in all processes.
        :param args: handed on.
        :param kwargs: handed on, such as the noise level.
        :return: image of the same shape.
        """
        synchronise = compat.distributed_framework()[2]
        return self.tiles(synchronise.apply(x, self.tiles.ctx), *args, **kwargs)
