r"""Fewer evaluations from a learned start: a network that predicts the fixed point from the linear reconstruction.

The start changes no fixed point, only the way there. It is a model of deepinv's, trained by deepinv's trainer on fixed points.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import deepinv as dinv
import torch
from deepinv.datasets import TensorDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from deepinv_deq import EquilibriumUNet, Solver
from deepinv_deq._digest import digest
from tests.benchmarks import limits, tasks
from tests.benchmarks.peers import Settings, ours
from tests.benchmarks.tasks import CACHE, Task

EPOCHS = 60
POINTS = Settings(forward_tol=1e-4, forward_iter=100)  # of the fixed points to learn


class Start(dinv.models.Reconstructor):
    r"""A network after the iteration's own start.

    :param Task task: whose start it is.
    :param torch.nn.Module network: from image to image.
    """

    def __init__(self, task: Task, network: nn.Module):
        super().__init__()
        self._init, self.network = task.iteration.init, network

    def forward(self, y: Tensor, physics: Any, **kwargs: Any) -> Tensor:
        return self.network(self._init(y, physics))


def cached(task: Task, name: str, data: Path | None, test: int) -> Path:
    r"""File of a trained start. Its name holds a digest of the model and the settings that the training depends on."""
    made_of = digest([task.iteration.state_dict(), test, EPOCHS, POINTS.forward_tol, POINTS.forward_iter])[:16]
    return CACHE / f"start-{name}-{'data' if data else 'phantoms'}-{made_of}.pt"


def learned(task: Task, name: str, data: Path | None, test: int) -> Start:
    r"""Train a start on the fixed points of all images but the last ``test`` ones."""
    path = cached(task, name, data, test)
    start = Start(task, EquilibriumUNet(task.x.shape[1], channels=(16, 32, 64)))
    if path.exists():
        start.load_state_dict(torch.load(path, weights_only=True))
        return start.eval()
    others = tasks.contracting(name, data=data, batch=10_000)
    y = others.y[:-test]
    model = ours(task, POINTS)
    with torch.no_grad():
        points = torch.cat([model(part, task.physics) for part in y.split(1)])
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(start.parameters(), lr=1e-3)
    trainer = dinv.Trainer(
        model=start,
        physics=task.physics,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS),
        train_dataloader=DataLoader(TensorDataset(x=points, y=y), batch_size=2, shuffle=True),
        losses=dinv.loss.SupLoss(),
        epochs=EPOCHS,
        metrics=[],
        save_path=None,
        verbose=False,
        show_progress_bar=False,
    )
    trainer.train()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(start.state_dict(), path)
    return start.eval()


def count(task: Task, exact: Tensor, name: str, data: Path | None) -> list[dict[str, Any]]:
    r"""Evaluations until 1e-3 of the fixed point, from the usual start and from the learned one, mean over the images."""
    start = learned(task, name, data, test=10)
    solver = Solver("anderson", tol=1e-7, max_iter=300, on_failure="ignore")
    rows: dict[str, dict[str, list[float]]] = {
        which: {"error": [], "evaluations": []} for which in ("linear reconstruction", "learned start")
    }
    for i in range(len(task.x)):
        f, x0, x_star = limits.of_image(task, exact, i)
        with torch.no_grad():
            given = {"linear reconstruction": x0, "learned start": start(task.y[i : i + 1], task.physics)}
        for which, point in given.items():
            rows[which]["error"].append(float((point.double() - x_star).norm() / x_star.norm()))
            rows[which]["evaluations"].append(limits.evaluations(task, exact, i, solver, start=point))
    means = {which: {key: statistics.mean(values) for key, values in found.items()} for which, found in rows.items()}
    return [{"task": name, "start": which, "images": len(task.x), **mean} for which, mean in means.items()]
