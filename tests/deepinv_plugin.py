r"""A pytest plugin for deepinv's own tests: whoever reconstructs there, a deep equilibrium model does it instead.

``python -m pytest -p tests.deepinv_plugin <site-packages>/deepinv/tests/test_loss.py``; :mod:`tests.test_deepinv_suite` runs it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import deepinv as dinv
import pytest
import torch
from torch import nn

from deepinv_deq import DEProx, DEQReconstructor, EquilibriumUNet, FromOptim, ModularIDHook, Solver


def deq(denoiser: nn.Module) -> DEQReconstructor:
    r"""A model of which deepinv's tests can ask anything; physics of any norm are theirs, so that a solve may fail."""
    solver = Solver("anderson", max_iter=10, tol=1e-3, on_failure="ignore")
    hook = ModularIDHook(Solver("gmres", max_iter=10, tol=1e-2, on_failure="ignore"))
    return DEQReconstructor(DEProx(denoiser), solver=solver, hook=hook)


class Scale(nn.Module):
    r"""The smallest denoiser that can be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x


def unet(channels: int) -> EquilibriumUNet:
    r"""A network that is quick and can contract."""
    return EquilibriumUNet(channels, channels=(4, 8))


class Shrinking(nn.Module):
    r"""A network whose iteration has one fixed point from the first step on, also where the physics sees nothing."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.8 * self.network(x)


class Counting(DEQReconstructor):
    r"""Counts its passes, as the model of deepinv's test_model_forward_passes does."""

    def __init__(self) -> None:
        model = deq(Scale())
        super().__init__(model.iteration, solver=model.solver, hook=model.hook)
        self.train_count = self.eval_count = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.train_count += self.training
        self.eval_count += not self.training
        return super().forward(*args, **kwargs)


def artifact_removal(backbone: nn.Module, *args: Any, device: Any = "cpu", **kwargs: Any) -> DEQReconstructor:
    r"""In the place of ``deepinv.models.ArtifactRemoval``; an autoencoder, which turns any image into noise, gives way to a U-Net."""
    if isinstance(backbone, dinv.models.UNet):
        backbone = Shrinking(backbone)
    elif isinstance(backbone, dinv.models.AutoEncoder):
        pixels = 15 * 10  # of test_loss.py's images
        channels = next(m for m in backbone.modules() if isinstance(m, nn.Linear)).in_features // pixels
        backbone = Shrinking(unet(channels))
    return deq(backbone).to(device)


def from_optim(algorithm: Any) -> Any:
    r"""In the place of an algorithm of ``deepinv.optim`` that was to be a DEQ: one prior and one value of each parameter."""

    def build(
        *, prior: Any, DEQ: Any, trainable_params: Any, anderson_acceleration: Any, **kwargs: Any
    ) -> DEQReconstructor:
        kwargs.pop("params_algo", None)
        first = {k: v[:1] if isinstance(v, list) else v for k, v in kwargs.items()}
        plain = algorithm(prior=prior[0], **first)
        solver = Solver(
            "anderson" if anderson_acceleration else "fixed_point_iter", max_iter=50, tol=1e-4, on_failure="ignore"
        )
        mode = "jfb" if DEQ.jacobian_free else "implicit"
        backward = Solver("anderson" if DEQ.anderson_acceleration_backward else "gmres", tol=1e-3, on_failure="ignore")
        return DEQReconstructor(
            FromOptim(plain, trainable=trainable_params), solver=solver, hook=ModularIDHook(backward, mode=mode)
        )

    return build


@pytest.fixture(autouse=True)
def _swapped(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    module = request.module
    monkeypatch.setattr(dinv.models, "ArtifactRemoval", artifact_removal)
    if module.__name__ == "test_trainer":
        monkeypatch.setattr(module, "DummyModel", Counting)
    if module.__name__ == "test_models":
        monkeypatch.setattr(module, "choose_denoiser", lambda name, imsize: unet(imsize[0]))
        monkeypatch.setattr(
            module, "choose_restoration_model", lambda name, in_channels, **_: deq(Shrinking(unet(in_channels)))
        )
        # what follows the test of RAM's quality, the backward pass, is for us, too
        shim = SimpleNamespace(**{name: getattr(pytest, name) for name in dir(pytest)})
        shim.skip = lambda reason, **_: None if reason.startswith("Skipping PSNR test") else pytest.skip(reason)
        monkeypatch.setattr(module, "pytest", shim)
    if module.__name__ == "test_unfolded":
        # the module itself, as test_unfolded asks it for its algorithms
        monkeypatch.setattr(
            module, "optim", SimpleNamespace(**{name: from_optim(getattr(dinv.optim, name)) for name in ("PGD", "HQS")})
        )


@pytest.hookimpl(hookwrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Any:
    r"""Fixtures that are models cannot be replaced by others of the same name in a plugin, but their values can."""
    if "dummy_model" in pyfuncitem.funcargs:
        pyfuncitem.funcargs["dummy_model"] = deq(Scale())
    yield
