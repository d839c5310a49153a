r"""The deep equilibrium model as a deepinv reconstructor."""

from __future__ import annotations

import os
from typing import Any

import torch
from deepinv.models import Reconstructor
from deepinv.physics import Physics
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from deepinv_deq import compat, pretrained
from deepinv_deq.callbacks import Callbacks, OnSolve
from deepinv_deq.certificate import Certificate, certify
from deepinv_deq.checks import Init, check_finite, check_types, own_start, starting_point
from deepinv_deq.course import Course
from deepinv_deq.implicit import ModularIDHook
from deepinv_deq.implicit.forward_mode import refusing_vmap
from deepinv_deq.iterations import FixedPointIteration
from deepinv_deq.iterations.terms import measurements
from deepinv_deq.maps import Map, as_map
from deepinv_deq.solvers import ConvergenceError, Solver, SolverStat
from deepinv_deq.states import State
from deepinv_deq.warm_starts import WarmStarts


class _Solving(Reconstructor):
    r"""What a model shows of its solves."""

    solver: Solver
    hook: ModularIDHook
    _warm_starts: WarmStarts

    @property
    def forward_stat(self) -> SolverStat | None:
        r"""Statistic of the last forward solve."""
        return self.__dict__.setdefault("_stats", {}).get("forward")

    @forward_stat.setter
    def forward_stat(self, stat: SolverStat | None) -> None:
        self.__dict__.setdefault("_stats", {})["forward"] = stat  # torch.nn.DataParallel: replicas share the dictionary

    def extra_repr(self) -> str:
        r"""Solver, hook and number of warm starts."""
        return f"solver={self.solver},\nhook={self.hook},\nwarm_starts={self._warm_starts.capacity}"


class DEQReconstructor(_Solving):
    r"""Deep equilibrium model: :math:`\hat x` is the fixed point of a learned iteration (eq. 4).

    .. math::

        \hat x = F_\theta(\hat x; y)

    It takes the place of any :class:`deepinv.models.Reconstructor`: give it to a :class:`deepinv.Trainer` as ``model``,
    with any loss. Gradients are those of Proposition 1 (:class:`ModularIDHook`), for parameters, measurements and physics.

    :param FixedPointIteration iteration: the iteration :math:`F_\theta`, such as :class:`DEProx` or :class:`DEGrad`.
    :param Solver, None solver: forward solver; default ``Solver("anderson", max_iter=50, tol=1e-4)``.
    :param ModularIDHook, None hook: how the fixed point is differentiated; default implicit, with GMRES.
    :param int warm_starts: number of training samples whose fixed points are kept. From the third epoch on, solves of these samples
        start there. The solution is the same. Each takes the memory of one image, and the oldest are dropped first. Copies and
        checkpoints keep none, so a resumed run matches an uninterrupted one to solver tolerance, not bitwise. Default 0: none.

    :raises TypeError: if a part is not of its class.
    :raises ValueError: if ``warm_starts`` is not a non-negative integer.

    The attributes ``forward_stat`` and ``hook.stat`` hold the :class:`SolverStat` of the last forward and backward solve.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv.physics import MRI
    >>> from deepinv_deq import DEProx, DEQReconstructor, EquilibriumUNet
    >>> physics = MRI(mask=torch.ones(1, 2, 16, 16), img_size=(2, 16, 16))
    >>> model = DEQReconstructor(DEProx(EquilibriumUNet(in_channels=2, channels=(4, 8)), stepsize=0.5))
    >>> model(physics(torch.rand(1, 2, 16, 16)), physics).shape
    torch.Size([1, 2, 16, 16])
    """

    def __init__(
        self,
        iteration: FixedPointIteration,
        *,
        solver: Solver | None = None,
        hook: ModularIDHook | None = None,
        warm_starts: int = 0,
    ):
        super().__init__()
        self.solver = Solver("anderson", max_iter=50, tol=1e-4) if solver is None else solver
        self.iteration, self.hook = iteration, ModularIDHook() if hook is None else hook
        check_types(self, iteration=FixedPointIteration, solver=Solver, hook=ModularIDHook)
        self._warm_starts, self._callbacks = WarmStarts(warm_starts), Callbacks()
        self.forward_stat = None

    def on_solve(self, callback: OnSolve) -> RemovableHandle:
        r"""Call a function after every solve of this model, as for logging.

        :param Callable callback: called as ``callback(which, stat)`` with ``"forward"``, ``"backward"`` (an adjoint solve) or
            ``"tangent"`` (forward mode) and the :class:`SolverStat`, in the thread of the solve, also before a
            :class:`ConvergenceError`. Exceptions in the callback are not caught. Copies and saved models have no callbacks.
        :return: a handle; ``handle.remove()`` ends it.
        """
        return self._callbacks.add(callback)

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, device: torch.device | str = "cpu", **settings: Any
    ) -> DEQReconstructor:
        r"""A trained model, in one line.

        :param str, os.PathLike name: a file written by :meth:`save_pretrained`, or a model that ships with the package, trained without
            ground truth on images in [0, 1]. ``"ct-ei"``: ``Tomography(50, 128, normalize=True)``, ``(B, 1, 128, 128)``; ``"ct-ei-small"``:
            30 views, 64×64 pixels; ``"mri-ei"``: 8x ``MRI`` with a Gaussian mask and noise 0.05, ``(B, 2, 256, 256)``, real and imaginary.
        :param str, torch.device device: where to put it.
        :param settings: ``solver=``, ``hook=`` or ``warm_starts=`` in the place of the saved ones.
        :return: the model, in evaluation mode.
        :raises FileNotFoundError: if there is no such model.
        :raises ValueError: if the file is broken, or of something else.
        """
        return pretrained.load(cls, name, **settings).to(device).eval()

    def save_pretrained(self, path: str | os.PathLike[str], **about: Any) -> None:
        r"""Save the model with all that is needed to build it again, for :meth:`from_pretrained`.

        :param str, os.PathLike path: file to write, at once or not at all.
        :param about: plain values to keep with it, such as what it was trained on.
        :raises TypeError: if it is not an iteration of this package with an :class:`EquilibriumUNet`: then save ``state_dict()``.
        """
        pretrained.save(self, path, about)

    @property
    def params_algo(self) -> dict[str, list[Any]]:
        r"""Stepsize and the other numbers of the iteration, as ``deepinv.utils.plot_parameters`` wants them: lists of one value."""
        return {k: [v.detach() if isinstance(v, Tensor) else v] for k, v in self.iteration.numbers().items()}

    @compat.outside_of_compiled_graphs
    def forward(
        self,
        y: Tensor,
        physics: Physics,
        init: Init | None = None,
        *,
        sigma: float | Tensor | None = None,
        x_gt: Tensor | None = None,
        compute_metrics: bool = False,
        **kwargs: Any,
    ) -> Any:
        r"""Reconstruct.

        :param torch.Tensor, list[torch.Tensor] y: measurements as ``physics.A`` returns them; a list for a stacked physics.
        :param deepinv.physics.Physics physics: forward operator.
        :param torch.Tensor, tuple[torch.Tensor, ...], dict, Callable, None init: first point, of shape ``(B, C, H, W)``; a tuple for
            several variables; ``{"est": (x, z)}``, as deepinv's optimisers take it; or a function of ``y`` and ``physics`` that
            returns one of these. Default: ``iteration.init``, or what ``warm_starts`` remembers.
        :param float, torch.Tensor, None sigma: noise level for the denoiser in this call, in units of the image: one number, or one
            per sample of shape ``(B,)``. Default: that of the iteration. Denoisers without a noise level do not get it.
        :param torch.Tensor, None x_gt: ground truth of shape ``(B, C, H, W)``, for the PSNR of the iterates.
        :param bool compute_metrics: whether to return the course of the solve too, as deepinv's optimisation models do.
        :param kwargs: ignored, as deepinv's models must.
        :return: reconstruction of shape ``(B, C, H, W)``; with ``compute_metrics``, also a dictionary with lists
            ``"residual"`` and, given ``x_gt``, ``"psnr"``: one list per sample, one number per evaluation.
        :raises ValueError: if ``y`` has NaN or Inf, or does not fit ``physics``; if ``init`` or ``sigma`` does not fit.
        :raises TypeError: if ``physics`` has no adjoint, or ``init`` is no state.
        :raises RuntimeError: inside of :func:`torch.vmap`, :func:`torch.func.grad`, :func:`torch.func.vjp` or :func:`torch.func.jacrev`.
        :raises ConvergenceError: if a solve misses its tolerance and its solver was told to raise.
        """
        with refusing_vmap():
            check_finite(y := measurements(y, physics))
            level = {} if sigma is None else {"sigma": sigma}  # subclasses may override bind(y, physics)
            f = as_map(self.iteration.bind(y, physics, **level))
            course = Course(f, x_gt, self.iteration.output) if compute_metrics else None
            x_star, stat = _solve(self, f, course, y, physics, init)
            x_hat = self.iteration.output(self.hook(f, x_star, on_solve=self._callbacks, stat=stat))
        return x_hat if course is None else (x_hat, course.metrics(stat["rel_trace"], len(x_hat)))

    def certify(
        self, y: Any, physics: Physics, *, x_gt: Tensor | None = None, products: int = 30, metric: Any = None
    ) -> Certificate:
        r"""Measure whether the reconstruction is *the* fixed point: contraction, distance, and spread over starts.

        It solves from all starts, and to a tenth and a thirtieth of the tolerance, and computes the spectral radius of
        :meth:`FixedPointIteration.contractive_part`. The cost is that of some ten reconstructions.

        :param torch.Tensor, list[torch.Tensor] y: measurements as ``physics.A`` returns them.
        :param deepinv.physics.Physics physics: forward operator.
        :param torch.Tensor, None x_gt: ground truth of shape ``(B, C, H, W)``: one more start, and the PSNR of every solve.
        :param int products: number of vector-Jacobian products for the spectral radius.
        :param torch.nn.Module, None metric: metric of the PSNRs, such as ``deepinv.metric.PSNR(complex_abs=True)``.
        :return: the certificate; its ``outcome`` says in one sentence what was found.
        :raises ValueError: for batch norm or dropout in training mode, NaN in ``y``, or an ``x_gt`` or ``products`` that does not fit.
        """
        y = measurements(y, physics)
        return certify(self.iteration, self.solver, y, physics, x_gt=x_gt, products=products, metric=metric)


def _solve(
    model: DEQReconstructor, f: Map, course: Course | None, y: Any, physics: Physics, init: Init | None
) -> tuple[State, SolverStat]:
    r"""The fixed point, without a graph and without tangents."""
    memory, called = model._warm_starts, model._callbacks
    # torch.func hides the numbers of the measurements
    keys = memory.keys(y) if init is None and model.training and not compat.transforms() else []
    try:
        with compat.tangents(False):
            if init is None:
                x0 = memory.start(keys, own_start(f, model.iteration, y, physics))
            else:
                x0 = starting_point(init, f, model.iteration, y, physics)
            x_star, stat = model.solver(course or f, x0)
    except ConvergenceError as error:
        if error.stat is not None:
            called("forward", error.stat)
        raise
    memory.keep(keys, x_star, stat.residual)
    model.forward_stat = stat
    called("forward", stat)
    return x_star, stat
