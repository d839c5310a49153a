r"""
Training and measuring the pipelines
====================================
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import warnings
from collections.abc import Callable

import deepinv as dinv
import torch
from deepinv.datasets import TensorDataset
from pipelines import TEST, TRAIN, Pipeline, images
from torch import Tensor, nn
from torch.utils.data import DataLoader

BATCH, SEED = 4, 0


def build(function: Callable[[bool], Pipeline], swapped: bool) -> Pipeline:
    r"""A pipeline with an untrained model, the same at each call."""
    torch.manual_seed(SEED)
    return function(swapped)


def train(pipeline: Pipeline, steps: int) -> nn.Module:
    r"""Train with :class:`deepinv.Trainer`; returns the model."""
    torch.manual_seed(SEED)
    operators = pipeline.operators or [pipeline.physics]
    x = images(TRAIN, pipeline.channels, seed=1)
    parts = torch.arange(TRAIN).chunk(len(operators))
    loaders = []
    for operator, rows in zip(operators, parts, strict=True):
        data = TensorDataset(x=x[rows], y=operator(x[rows]), use_dict_output=True)
        loaders.append(DataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(SEED)))
    trainer = dinv.Trainer(
        model=pipeline.model,
        physics=operators,
        optimizer=torch.optim.Adam(pipeline.model.parameters(), lr=pipeline.lr),
        losses=pipeline.losses,
        train_dataloader=loaders,
        epochs=-(-steps * BATCH // TRAIN),
        metrics=None,
        compute_train_metrics=False,
        save_path=None,
        verbose=False,
        show_progress_bar=False,
    )
    trainer.train()
    return trainer.model.eval()


def psnr(reconstruct: Callable[..., Tensor], pipeline: Pipeline) -> float:
    r"""Mean PSNR of the test images, dB."""
    torch.manual_seed(SEED)
    x, physics = images(TEST, pipeline.channels, seed=2), pipeline.physics
    physics.noise_model.rng.manual_seed(2)
    with torch.no_grad():
        return dinv.metric.PSNR()(reconstruct(physics(x), physics), x).mean().item()


def linear(pipeline: Pipeline) -> float:
    r"""PSNR of the better one of :math:`A^\top y` and the pseudo-inverse."""
    pseudo = lambda y, physics: physics.A_dagger(y)  # noqa: E731
    return max(psnr(pseudo, pipeline), psnr(lambda y, physics: physics.A_adjoint(y), pipeline))


def lines_changed(function: Callable[[bool], Pipeline]) -> int:
    r"""Number of statements in the body of ``if swapped:``."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return next(len(node.body) for node in ast.walk(tree) if isinstance(node, ast.If))


def measure(function: Callable[[bool], Pipeline], steps: int, *, theirs: bool = True) -> dict[str, float]:
    r"""PSNRs of one pipeline, dB: linear, untrained, trained, and deepinv's own model after equally many steps."""
    pipeline = build(function, True)
    row = {"lines": lines_changed(function), "steps": steps}
    row["linear"] = linear(pipeline)
    row["untrained"] = psnr(pipeline.model.eval(), pipeline)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="deepinv")
        row["trained"] = psnr(train(pipeline, steps), pipeline)
        if theirs:
            own = build(function, False)
            row["deepinv"] = psnr(train(own, steps), own)
    return row
