r"""
Train and test one cell of the paper's tables
=============================================

.. code-block:: bash

    python examples/paper/run.py --task ct --method deq-id --loss ei --scale small --seed 0     # one cell
    python examples/paper/run.py --all --scale small --jobs 2                                   # the matrix
    python examples/paper/tables.py                                                             # its tables

A cell appends one record to ``examples/paper/results``. An interrupted one is resumed by the same command, a finished one is
not run again unless ``--force`` is given.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepinv as dinv
import experiments as ex
import torch
from deepinv.datasets import TensorDataset
from torch.utils.data import DataLoader

from deepinv_deq import DEQReconstructor
from deepinv_deq.training import ResumableTrainer

RESULTS = ex.HERE / "results"
SETTINGS = ex.HERE / "settings.json"
ROOT = ex.HERE.parents[1]
TIGHT = 0.1  # tables show reconstructions at this part of a model's tolerance
SEEDS = {"deq": 3}  # of the other methods, one


def matrix(scale: str) -> list[tuple[str, str, str, int]]:
    r"""All cells of the tables, the DEQs with ID first."""
    cells = []
    for method in ex.METHODS:
        for task in ex.TASKS:
            losses = ("none",) if method == "denoiser" else ("sup", "ei")
            losses += (
                {"ct": ("ei-fixed", "ei-turned", "split"), "mri": ("ei-fixed", "ei-sure")}[task]
                if method == "deq-id"
                else ()
            )
            seeds = SEEDS.get(method.split("-")[0], 1)
            cells += [(task, method, loss, seed) for loss in losses for seed in range(seeds)]
    return cells


def path_of(scale: str, task: str, method: str, loss: str, seed: int, denoiser: Path | None = None) -> Path:
    r"""The file of a record; those of another ``denoiser`` than the tables' own have a folder of its name."""
    return RESULTS / scale / (denoiser.stem if denoiser else "") / f"{task}_{method}_{loss}_{seed}.json"


def folder_of(record: Path) -> Path:
    r"""Where a cell leaves its checkpoints and its model, by the path of its record."""
    return Path("runs") / "paper" / record.relative_to(RESULTS).with_suffix("")


def read_record(path: Path) -> dict[str, Any] | None:
    r"""A finished record; ``None`` if there is none, or it is broken, which is said."""
    try:
        record = json.loads(path.read_text())
        record["psnr"]["mean"], record["config"]["method"]
        return record
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        print(f"The record {path} is broken ({type(error).__name__}: {error}): its cell is run again.", file=sys.stderr)
        return None


def found_settings() -> dict[str, Any]:
    r"""What ``search.py`` found on validation images."""
    return json.loads(SETTINGS.read_text()) if SETTINGS.exists() else {}


def weights_of(scale: str, task: str, kind: str, data: Path) -> str:
    r"""Pretrained weights, ``"unet"`` or ``"dncnn"``: shipped, or deepinv's, or else trained here once by ``pretrain_denoiser.py``."""
    n, channels = (1 if task == "ct" else 2), ex.SCALES[scale][task]["channels"]
    if kind == "unet" and scale == "small":
        return ex.SHIPPED[n]
    name = f"{kind}-{n}" + ("-" + "-".join(map(str, channels)) if kind == "unet" else "")
    path = Path("runs") / "paper" / f"{name}.pt"
    if not path.exists() and kind == "dncnn" and n == 1:  # deepinv has none of two channels
        download(path)
    if not path.exists():
        print(f"Training {path} once ...", file=sys.stderr)
        bsds = data / "bsds500_gray_256.npz"
        command = [sys.executable, str(ex.HERE / "pretrain_denoiser.py"), "--out", str(path), "--in-channels", str(n)]
        command += ["--data", str(bsds)] if bsds.exists() else []
        # patches of twice the receptive field of ten layers: a larger one only costs
        command += ["--model", "dncnn", "--patch", "40"] if kind == "dncnn" else ["--channels", *map(str, channels)]
        command += ["--contraction", "0.9"] if kind == "unet" and n == 2 else []
        subprocess.run(command, check=True)
    return str(path)


def download(path: Path) -> None:
    r"""Write deepinv's weights of a grey DnCNN to a file, if there is a way to get them."""
    try:
        net = dinv.models.DnCNN(1, 1, pretrained="download")
    except OSError as error:  # as all errors of networks are
        print(f"deepinv's DnCNN cannot be downloaded ({error}).", file=sys.stderr)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"settings": {"in_channels": 1, "out_channels": 1}, "state_dict": net.state_dict()}, path)


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
    validate: bool = False,
    out: Path | None = None,
    progress: bool = True,
    denoiser: Path | None = None,
) -> tuple[dict[str, Any], Any]:
    r"""Train and test; returns the record and the model.

    :param dict override: hyperparameters in the place of those found.
    :param Path denoiser: weights of ``pretrain_denoiser.py`` in the place of those that all methods share.
    :param bool validate: test on validation images.
    :param Path out: folder for checkpoints.
    """
    quiet()
    torch.manual_seed(seed)
    task = ex.make_task(task_name, scale, data, validate=validate, device=device)
    s = ex.settings_of(task_name, method, loss, scale, found_settings()) | (override or {})
    kind = "dncnn" if method == "denoiser" else "unet"
    weights = str(denoiser) if denoiser else weights_of(scale, task_name, kind, data)
    model = ex.make_model(task, method, s, {kind: weights}).to(device)
    config = {"task": task_name, "method": method, "loss": loss, "scale": scale, "seed": seed, **s}
    config |= {"denoiser": denoiser.name} if denoiser else {}
    resumed = out is not None and out.exists()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # Table 3 has the DEQ of the pretrained denoiser, too
    untrained = evaluate(task, model, s) if method.startswith("deq") and loss != "none" else {}
    model.train()
    start, history, steps = time.time(), {}, 0
    if loss != "none":
        history, steps = train(task, model, method, loss, s, seed, config, out, progress)
    record = {"config": config, "steps": steps, "seconds": round(time.time() - start, 1), **evaluate(task, model, s)}
    record |= {
        "resumed": resumed,
        "untrained": untrained,
        "curve": history,
        "validation": validate,
        **surroundings(device),
    }
    return record, model


def train(
    task: ex.Task,
    model: Any,
    method: str,
    loss: str,
    s: dict[str, Any],
    seed: int,
    config: dict[str, Any],
    out: Any,
    progress: bool,
) -> tuple[dict[str, list[float]], int]:
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
        losses=ex.make_losses(task, method, loss, s, seed),
        metrics=ex.metrics(task)["psnr"],
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


def evaluate(task: ex.Task, model: Any, s: dict[str, Any]) -> dict[str, Any]:
    r"""All measures on the test images: PSNR, SSIM, those of Tables 2 and 3, and whether a DEQ is at its fixed point.

    The images of a DEQ are those of :data:`TIGHT` times its tolerance; what it gives at its tolerance is in ``fixed_point``.
    """
    model.eval()
    x, y = task.x[task.test], task.y[task.test]
    measures = ex.metrics(task)
    record: dict[str, Any] = {"images": len(x)}
    tight, fixed_point = model, {}
    if isinstance(model, DEQReconstructor):
        model = for_tests(model, s)
        fixed_point = certified(model, task, measures["psnr"])
        solver = replace(model.solver, tol=TIGHT * model.solver.tol, max_iter=5 * model.solver.max_iter)
        tight = DEQReconstructor(model.iteration, solver=solver, hook=model.hook).eval()
    with torch.no_grad():
        x_hat, x0 = tight(y, task.physics), ex.start(y, task.physics)
        stat = getattr(tight, "forward_stat", None)
        for name in ("psnr", "ssim"):
            record[name], record[f"{name}_start"] = (summary(measures[name](image, x)) for image in (x_hat, x0))
        for name in ("pipeline_equivariance", *(["iteration_equivariance"] if stat is not None else [])):
            record[name] = summary(measures[name](x_hat, x, physics=task.physics, model=tight))
        record["ei_loss"] = ei_loss(task, tight, x_hat)
    if stat is not None:
        # an operator that leaves true images alone is equivariant at them, whatever it has learned
        operator = measures["iteration_equivariance"].system(task.physics, tight)
        with torch.no_grad():
            record["iteration_fidelity"] = summary(measures["psnr"](operator(x), x))
        record["fixed_point"] = fixed_point
    return record


def for_tests(model: DEQReconstructor, s: dict[str, Any]) -> DEQReconstructor:
    r"""The same model with the tolerance of tests."""
    solver = replace(model.solver, tol=s["test_tol"], max_iter=2 * s["max_iter"])
    return DEQReconstructor(model.iteration, solver=solver, hook=model.hook).eval()


def certified(model: DEQReconstructor, task: ex.Task, psnr: Any) -> dict[str, Any]:
    r"""The certificate of a model on the test images, as plain values, image by image.

    ``spread_db`` is the largest difference of PSNR between the solve at the model's tolerance, at a tenth of it, and those from
    other starts; the cell is *not a fixed point* where it exceeds 0.05 dB.
    """
    certificate = model.certify(task.y[task.test], task.physics, x_gt=task.x[task.test], metric=psnr)
    model(task.y[task.test], task.physics)
    db = torch.stack(list(certificate.psnr.values()))
    return {
        "outcome": certificate.outcome,
        "tol": certificate.tol,
        "psnr": {name: summary(values) for name, values in certificate.psnr.items()},
        "spread_db": summary(db.amax(dim=0) - db.amin(dim=0)),
        "spectral_radius": summary(certificate.spectral_radius),
        "error": certificate.error.tolist(),
        "residual": certificate.residual.tolist(),
        "converged": int(certificate.converged.sum()),
        "evaluations": model.forward_stat["nstep"].tolist(),
    }


def ei_loss(task: ex.Task, model: Any, x_hat: torch.Tensor) -> float:
    r"""The equivariance term of eq. (3) on the test images: whether a model that is worse is so by what it was trained for."""
    rng = torch.Generator(task.x.device).manual_seed(0)
    rotations = dinv.transform.Rotate(n_trans=1, multiples=1, positive=True, rng=rng, interpolation_mode="bilinear")
    loss = dinv.loss.EILoss(rotations, apply_noise=False)
    return float(loss(x_net=x_hat, physics=task.physics, model=model).mean())


def summary(values: torch.Tensor) -> dict[str, Any]:
    r"""Mean and standard deviation over the test images, and all of them."""
    values = values.double().flatten().cpu()
    return {
        "mean": values.mean().item(),
        "std": values.std(correction=0).item(),
        "all": [round(v, 4) for v in values.tolist()],
    }


def plain(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: plain(v) for k, v in tree.items()}
    return [plain(v) for v in tree] if isinstance(tree, (list, tuple)) else round(float(tree), 6)


def surroundings(device: str) -> dict[str, Any]:
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    name = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if device == "cuda":
        memory, name = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "deepinv": dinv.__version__, "python": platform.python_version()}
    return {
        "device": name,
        "peak_memory_mb": round(memory / 1e6),
        "versions": versions,
        "commit": git.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
    }


def quiet() -> None:
    # these notes of deepinv and PyTorch are about defaults that are not used here
    for noise in (
        "progress bar frequency",
        "meshgrid",
        "non_blocking_transfers",
        "[Ss]parse",
        "Gradient norm",
        "lr_sched",
    ):
        warnings.filterwarnings("ignore", message=f".*{noise}.*")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(text)
    partial.replace(path)


def arguments(description: str, whole: str) -> argparse.ArgumentParser:
    r"""What every command takes that is about one cell, or about all (``whole``) of them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--task", help=", ".join(ex.TASKS))
    parser.add_argument("--method", help=", ".join(ex.METHODS))
    parser.add_argument("--loss", help=", ".join(ex.LOSSES))
    parser.add_argument("--scale", default="small", help=", ".join(ex.SCALES))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with the images")
    parser.add_argument("--all", action="store_true", help=whole)
    parser.add_argument(
        "--jobs", type=int, default=1, help="with --all: how many at a time, one thread each if several"
    )
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    r"""The arguments, with the names checked; without ``--all`` they must say which cell."""
    args = parser.parse_args()
    if args.all:
        ex.check_name("scale", args.scale, ex.SCALES)
        return args
    missing = [f"--{name}" for name in ("task", "method", "loss") if getattr(args, name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} missing (or give --all)")
    ex.check(args.task, args.method, args.loss, args.scale)
    return args


def run_each(script: str, args: argparse.Namespace, cells: list[list[str]], common: list[str]) -> None:
    r"""Run a script for many cells, each in a process of its own; exits, with an error if one of them failed.

    :param list cells: arguments that tell the cells apart.
    :param list common: further arguments of all.
    """
    threads = {"OMP_NUM_THREADS": "1"} if args.jobs > 1 else {}

    def one(cell: list[str]) -> bool:
        command = [sys.executable, script, *cell, "--scale", args.scale, "--data", str(args.data), *common]
        failed = subprocess.run(command, env=os.environ | threads).returncode != 0
        print(f"{' '.join(cell)}: {'failed' if failed else 'done'}", flush=True)
        return failed

    with ThreadPoolExecutor(args.jobs) as pool:
        failed = sum(pool.map(one, cells))
    sys.exit(f"{failed} of {len(cells)} failed; the same command tries them again." if failed else 0)


def main() -> None:
    parser = arguments("Train and test one cell of the paper's tables, or all.", "every cell that has no record")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--force", action="store_true", help="run again what is on record")
    parser.add_argument("--denoiser", type=Path, help="weights to start from instead; the record is kept apart")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    args = parsed(parser)
    if args.denoiser and (args.all or not args.denoiser.exists()):
        sys.exit(f"error: --denoiser is for one cell and takes a file of pretrain_denoiser.py, got {args.denoiser}.")
    if args.all:
        cells = [
            ["--task", cell[0], "--method", cell[1], "--loss", cell[2], "--seed", str(cell[3])]
            for cell in matrix(args.scale)
            if args.force or read_record(path_of(args.scale, *cell)) is None
        ]
        common = ["--device", args.device, "--no-progress", *(["--force"] if args.force else [])]
        run_each(__file__, args, cells, common)
    cell = (args.task, args.method, args.loss, args.seed)
    path = path_of(args.scale, *cell, args.denoiser)
    known = None if args.force else read_record(path)
    if known is not None:
        print(f"{path} is there ({known['psnr']['mean']:.2f} dB); --force runs it again.")
        return
    folder = folder_of(path)
    if args.force:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        record, model = run_cell(
            *cell[:3],
            args.scale,
            args.seed,
            data=args.data,
            device=args.device,
            out=folder,
            progress=not args.no_progress,
            denoiser=args.denoiser,
        )
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    except ValueError as error:
        if "is of another run" not in str(error):
            raise
        sys.exit(f"error: {error} Or start it afresh with --force.")
    except KeyboardInterrupt:
        sys.exit(f"\nInterrupted. The same command continues from the last checkpoint in {folder}.")
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / "model.pt")
    write(path, json.dumps(record, indent=1) + "\n")
    name = " ".join(map(str, cell))
    print(
        f"{name}: {record['psnr']['mean']:.2f} ± {record['psnr']['std']:.2f} dB, SSIM {record['ssim']['mean']:.3f}, start "
        f"{record['psnr_start']['mean']:.2f} dB; {record['steps']} steps, {record['seconds']:.0f} s; {path}"
    )


if __name__ == "__main__":
    main()
