r"""The loss that keeps an iteration contracting in training, so that its fixed point is unique."""

from __future__ import annotations

import math
from typing import Any

import torch
from deepinv.loss import Loss
from deepinv.physics import Physics
from torch import Tensor, nn

from deepinv_deq.implicit.context import as_in_forward, usable
from deepinv_deq.iterations.starts import noise_like, state_of
from deepinv_deq.metrics import solving_model
from deepinv_deq.spectra import jacobian_norm, root_mean_square
from deepinv_deq.states import State, as_tuple, minus, plus, times

_STEPS = 3  # largest number of plain steps before the Jacobian is measured


class ContractionLoss(Loss):
    r"""Penalises the norm of the Jacobian, which must be below 1 for the fixed point to be unique.

    .. math::

        w \, \tfrac{1}{n} \big(\|\hat x\| + \|x - \hat x\|\big)^2 \max\big(\|P^{1/2} J P^{1/2}\|_2 - \mathrm{bound}, 0\big)^2

    :math:`J` is the Jacobian of the contractive part of the iteration (:meth:`FixedPointIteration.contractive_part
    <deepinv_deq.FixedPointIteration.contractive_part>`): that of the denoiser with :math:`P \approx (\lambda A^\top A + I)^{-1}`
    for DE-Grad, that of the whole iteration with :math:`P = I` for the other iterations. The norm is estimated from below in the
    Krylov subspace of a few vector-Jacobian products, only the last of which has a graph. Each call measures one random point per
    sample, on the line between the reconstruction :math:`\hat x` and a second point. The second point is a usual start (zeros, the
    linear reconstruction, noise) after zero to three iterations. A solver reaches the same fixed point from every start only if the
    bound holds wherever the solver goes. The first search directions are this line and noise.

    Add it to the losses of a Trainer: ``Trainer(losses=[SupLoss(), ContractionLoss(bound=0.85)])``. The factor before the maximum,
    in which :math:`n` is the number of pixels, has the unit of a squared error of images, so one weight is right at any scale. The
    weight assumes that the other losses count a squared image error once. If they count it :math:`c` times, pass
    ``weight=0.1 * c``. With ``mode="jfb"``, multiply by the stepsize, too. The factor is larger far from the reconstruction,
    because contracting there costs the reconstruction little. A smaller bound gives a fixed point that takes fewer evaluations, and a less expressive model.

    :param float bound: largest norm without a penalty, in :math:`(0, 1)`.
    :param float weight: weight :math:`w > 0`, no unit.
    :param int iterations: number of vector-Jacobian products.
    :param torch.Generator, None rng: random numbers of points and directions, on the CPU. Default: a generator with seed 0.
    :param float probability: probability that a call measures anything, in :math:`(0, 1]`. The other calls return zero and cost nothing,
        and the weight is divided by it. One measurement may cost as much as a supervised training step.

    :raises TypeError: if ``rng`` is not a generator.
    :raises ValueError: for a setting out of range, or a model without a :class:`~deepinv_deq.DEQReconstructor`.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv.physics import Denoising
    >>> from deepinv_deq import DEProx, DEQReconstructor, EquilibriumUNet
    >>> from deepinv_deq.losses import ContractionLoss
    >>> model = DEQReconstructor(DEProx(EquilibriumUNet(channels=(4, 8)), stepsize=0.5))
    >>> y = torch.rand(2, 1, 8, 8)
    >>> ContractionLoss(bound=0.85)(x_net=model(y, Denoising()), y=y, physics=Denoising(), model=model).tolist()
    [0.0, 0.0]
    """

    def __init__(
        self,
        bound: float = 0.85,
        *,
        weight: float = 0.1,
        iterations: int = 6,
        rng: torch.Generator | None = None,
        probability: float = 1.0,
    ):
        super().__init__()
        if not 0 < bound < 1:
            raise ValueError(f"bound must be in (0, 1): with a norm of 1 an iteration need not contract; got {bound}.")
        if not 0 < weight < math.inf:
            raise ValueError(f"weight must be positive and finite, got {weight}.")
        if not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f"iterations counts vector-Jacobian products: an integer of at least 1, got {iterations}.")
        if not isinstance(rng, torch.Generator | None):
            raise TypeError(f"rng must be a torch.Generator, got {type(rng).__name__}.")
        if not 0 < probability <= 1:
            raise ValueError(f"probability must be in (0, 1], got {probability}.")
        self.bound, self.weight, self.iterations, self.probability = bound, weight, iterations, probability
        self.rng = torch.Generator().manual_seed(0) if rng is None else rng

    def forward(self, x_net: Tensor, y: Any, physics: Physics, model: nn.Module, **kwargs: Any) -> Tensor:
        r"""Compute the penalty of every sample.

        :param torch.Tensor x_net: reconstructions, of shape ``(B, C, H, W)``.
        :param torch.Tensor y: measurements.
        :param deepinv.physics.Physics physics: forward operator.
        :param torch.nn.Module model: a :class:`~deepinv_deq.DEQReconstructor`, or a model that wraps one.
        :param kwargs: ignored.
        :return: penalties, of shape ``(B,)``.
        """
        if (deq := solving_model(model)) is None:
            raise ValueError(f"ContractionLoss needs a DEQReconstructor, and {type(model).__name__} holds none.")
        if self.probability < 1 and float(torch.rand((), generator=self.rng)) >= self.probability:
            return x_net.detach().real.new_zeros(len(x_net))
        with as_in_forward([]):
            penalty = self._penalty(deq.iteration.bind(y, physics), usable((x_net.detach(),))[0], y)
        return penalty if torch.is_grad_enabled() else penalty.detach()

    def _penalty(self, f: Any, x_hat: Tensor, y: Any) -> Tensor:
        start = f.init(y)
        here, end = state_of(x_hat, start), self._end(f, x_hat, start)
        share, away = torch.rand(len(x_hat), generator=self.rng).to(x_hat.device), as_tuple(minus(end, here))
        part = tuple(times(share, t) for t in away)
        norm = jacobian_norm(f, plus(here, part), iterations=self.iterations, rng=self.rng, direction=away[0])
        size = root_mean_square(x_hat) + root_mean_square(part[0])
        return self.weight / self.probability * size.square() * (norm - self.bound).relu().square()

    @torch.no_grad()
    def _end(self, f: Any, x_hat: Tensor, start: State) -> State:
        r"""Where a solve may have come to: without the steps, solves from noise stall far away."""
        ends = (x_hat, as_tuple(start)[0], torch.zeros_like(x_hat), noise_like(x_hat, self.rng))
        chosen = int(torch.randint(len(ends), (), generator=self.rng))
        state = start if chosen == 1 else state_of(ends[chosen], start)
        natural = f.natural(state) or (lambda step: step)
        for _ in range(int(torch.randint(_STEPS + 1, (), generator=self.rng))):
            state = plus(state, natural(f.step(state)))
        return state
