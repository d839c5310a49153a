r"""
Train and test one cell
=======================
"""

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from data import Task, make_task, metrics
from deepinv.datasets import TensorDataset
from evaluation import commit, evaluate, operator_measures, plain, surroundings
from losses import LOSSES, make_losses
from models import METHODS, make_model
from settings import DEFAULTS, found_settings, settings_of
from torch.utils.data import DataLoader
from weights import weights_of

from deepinv_deq.training import ResumableTrainer


def run_cell(
    task_name: str,
    method: str,
    loss: str,
    scale: str,
    seed: int,
    *,
    data: Path,
    device: str = "cpu",
    override: dict[str, Any] | None = None,
    defaults: bool = False,
    validate: bool = False,
    out: Path | None = None,
    progress: bool = True,
    denoiser: Path | None = None,
) -> tuple[dict[str, Any], Any]:
    r"""Train and test; returns the record and the model.

    :param dict override: hyperparameters in the place of those found.
    :param bool defaults: train with defaults where no search is on record.
    :param Path denoiser: weights of ``pretrain_denoiser.py`` in the place of those that all methods share.
    :param bool validate: test on validation images.
    :param Path out: folder for checkpoints.
    :raises settings.NotSearched: if nothing was searched for this cell.
    """
    set_up()
    code = commit()
    torch.manual_seed(seed)
    task = make_task(task_name, scale, data, validate=validate, device=device)
    s = settings_of(task_name, method, loss, scale, found_settings(), defaults=defaults) | (override or {})
    kind = METHODS[method].weights
    weights = str(denoiser) if denoiser else weights_of(task_name, kind, data, tuple(s["channels"]), device)
    model = make_model(task, method, s, weights).to(device)
    config = {"task": task_name, "method": method, "loss": loss, "scale": scale, "seed": seed, **s}
    config |= {"denoiser": denoiser.name} if denoiser else {}
    resumed = out is not None and out.exists()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trains = LOSSES[loss].build is not None
    untrained = operator_measures(task, model.eval()) if METHODS[method].is_deq and trains else {}
    model.train()
    begun, history, steps = time.time(), {}, 0
    if trains:
        history, steps = train(task, model, method, loss, s, seed, config, out, progress)
    record = {"config": config, "steps": steps, "seconds": round(time.time() - begun, 1), **evaluate(task, model, s)}
    record |= {
        "resumed": resumed,
        "untrained": untrained,
        "curve": history,
        "validation": validate,
        **surroundings(device, code),
    }
    return record, model


def measure_again(record: dict[str, Any], weights: Path, *, data: Path, device: str = "cpu") -> dict[str, Any]:
    r"""The record of a trained model with all measures taken anew, at the test tolerance of :data:`settings.DEFAULTS`.

    :param Path weights: the ``model.pt`` that ``run.py`` left.
    """
    set_up()
    config = record["config"] | {"test_tol": DEFAULTS[record["config"]["task"]]["test_tol"]}
    task = make_task(config["task"], config["scale"], data, validate=record["validation"], device=device)
    kind = METHODS[config["method"]].weights
    model = make_model(
        task, config["method"], config, weights_of(config["task"], kind, data, tuple(config["channels"]))
    )
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    measured = evaluate(task, model.to(device), config)
    return record | measured | {"config": config, "measured_again": surroundings(device, commit())}


def train(
    task: Task,
    model: Any,
    method: str,
    loss: str,
    s: dict[str, Any],
    seed: int,
    config: dict[str, Any],
    out: Any,
    progress: bool,
) -> tuple[dict[str, list[float]], int]:
    r"""Train in place; returns the course of the losses and of PSNR, and the number of steps."""
    x, y = task.x[task.train], task.y[task.train]
    train_set = TensorDataset(x=x if loss == "sup" else None, y=y, use_dict_output=True)
    test_set = TensorDataset(x=task.x[task.test], y=task.y[task.test], use_dict_output=True)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(train_set, batch_size=s["batch"], shuffle=True, generator=order)
    # Adam's epsilon belongs to gradients whose norm is about one
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=s["lr"], eps=1e-8 * s["grad_clip"])
    trainer = ResumableTrainer(
        model=model,
        physics=task.physics,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s["epochs"]),
        train_dataloader=loader,
        eval_dataloader=DataLoader(test_set, batch_size=s["batch"]),
        eval_interval=max(1, s["epochs"] // 8),
        epochs=s["epochs"],
        losses=make_losses(task, method, loss, s, seed),
        metrics=metrics(task)["psnr"],
        compute_train_metrics=False,
        grad_clip=s["grad_clip"],
        check_grad=True,  # deepinv clips no gradient that it does not check
        device=task.x.device,
        save_path=out,
        resume=True,
        ckp_interval=max(1, s["epochs"] // 8),
        config=config,
        verbose=False,
        show_progress_bar=progress,
    )
    trainer.train()
    curve = {"loss": trainer.loss_history, "psnr": trainer.eval_metrics_history}
    return plain(curve), s["epochs"] * len(loader)


def set_up() -> None:
    r"""Let GPUs compute convolutions in float32, and silence notes of deepinv and PyTorch about defaults that are not used here.

    PyTorch allows GPUs to use TF32, whose rounding is above the tolerances of a fixed point.
    """
    torch.backends.cudnn.allow_tf32 = False
    for noise in (
        "progress bar frequency",
        "meshgrid",
        "non_blocking_transfers",
        "[Ss]parse",
        "Gradient norm",
        "lr_sched",
    ):
        warnings.filterwarnings("ignore", message=f".*{noise}.*")
