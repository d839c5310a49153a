r"""Parts of :mod:`deepinv.distributed` in a deep equilibrium model that several processes evaluate together.

Distributed physics (``distribute(physics, context)``) can be used as they are. A denoiser whose tiles are distributed needs
:class:`SynchronisedDenoiser`. To train with a part of every batch in each process, use PyTorch's
:class:`torch.nn.parallel.DistributedDataParallel` instead.
"""

from __future__ import annotations

from typing import Any

from deepinv.distributed.framework import DistributedProcessing, DistributedReplicatedParameters
from deepinv.distributed.framework.distributed_utils import DistributedGradientSync
from torch import Tensor, nn


class SynchronisedDenoiser(nn.Module):
    r"""A distributed denoiser whose gradients are the same in all processes.

    deepinv leaves the gradient of a denoiser's input, and of weights that are not leaves of the graph, as the part of the
    process' own tiles, and averages later. An adjoint equation is solved with such gradients, so they must be complete in
    every process: else each would solve another equation, and stop at another iteration, while the others wait.

    :param torch.nn.Module tiles: what ``deepinv.distributed.distribute(denoiser, context)`` returns.

    :raises TypeError: for anything else.
    """

    def __init__(self, tiles: nn.Module):
        super().__init__()
        if not isinstance(tiles, DistributedProcessing):
            raise TypeError(
                f"tiles must come from deepinv.distributed.distribute(denoiser, ...), got {type(tiles).__name__}."
            )
        self.tiles = tiles
        DistributedReplicatedParameters(tiles.ctx, list(tiles.parameters()))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        r"""Denoise.

        :param torch.Tensor x: image of shape ``(B, C, H, W)``, the same in all processes.
        :param args: handed on.
        :param kwargs: handed on, such as the noise level.
        :return: image of the same shape.
        """
        return self.tiles(DistributedGradientSync.apply(x, self.tiles.ctx), *args, **kwargs)
