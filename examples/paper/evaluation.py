r"""
What a record holds of a trained model
======================================
"""

import platform
import resource
import subprocess
import time
from dataclasses import replace
from typing import Any

import deepinv as dinv
import torch
from data import ROOT, Task, metrics

from deepinv_deq import DEQReconstructor
from deepinv_deq.certificate import Certificate
from deepinv_deq.iterations.base import linear_reconstruction

# Tests go to the fixed point: on CT some solves take more than 160 evaluations. Those from other starts may take three times as many.
TEST_ITERATIONS = 400


def evaluate(task: Task, model: Any, s: dict[str, Any]) -> dict[str, Any]:
    r"""All measures on the test images: PSNR, SSIM, those of Tables 2 and 3, and whether a DEQ is at its fixed point.

    The images of a DEQ are those of a tenth of its tolerance; what it gives at its tolerance is in ``fixed_point``. The two measures that
    need further solves, equivariance of the pipeline and the term of EI, are at its tolerance: its error is far below what they measure.
    """
    model.eval()
    x, y = task.x[task.test], task.y[task.test]
    measures, record = metrics(task), {"images": len(x), "exact_equivariance": True}
    if isinstance(model, DEQReconstructor):
        model = for_tests(model, s)
        certificate = certified(model, task, measures["psnr"])
        record |= operator_measures(task, model) | {"fixed_point": plain_certificate(certificate)}
        x_hat = certificate.points["tenth"]
    else:
        with torch.no_grad():
            x_hat = model(y, task.physics)
    with torch.no_grad():
        x0 = linear_reconstruction(y, task.physics)
        for name in ("psnr", "ssim"):
            record[name], record[f"{name}_start"] = (summary(measures[name](image, x)) for image in (x_hat, x0))
        record["pipeline_equivariance"] = summary(
            measures["pipeline_equivariance"](x_hat, x, physics=task.physics, model=model)
        )
        record["ei_loss"] = ei_loss(task, model, x_hat)
    return record


def operator_measures(task: Task, model: DEQReconstructor) -> dict[str, Any]:
    r"""Table 3: how equivariant the learned operator is at true images, and how far from the identity. Nothing is solved.

    An operator that leaves true images alone is equivariant at them, whatever it has learned.
    """
    x, measures = task.x[task.test], metrics(task)
    equivariance = measures["iteration_equivariance"]
    operator = equivariance.system(task.physics, model)
    with torch.no_grad():
        return {
            "iteration_equivariance": summary(equivariance(x, x, physics=task.physics, model=model)),
            "iteration_fidelity": summary(measures["exact_psnr"](operator(x), x)),
        }


def for_tests(model: DEQReconstructor, s: dict[str, Any]) -> DEQReconstructor:
    r"""The same model with the tolerance of tests."""
    solver = replace(model.solver, tol=s["test_tol"], max_iter=TEST_ITERATIONS)
    return DEQReconstructor(model.iteration, solver=solver, hook=model.hook).eval()


def certified(model: DEQReconstructor, task: Task, psnr: Any) -> Certificate:
    r"""The certificate of a model on the test images."""
    return model.certify(task.y[task.test], task.physics, x_gt=task.x[task.test], metric=psnr)


def plain_certificate(certificate: Certificate) -> dict[str, Any]:
    r"""A certificate as plain values, image by image.

    ``spread_db`` is the largest difference of PSNR between the solve at the model's tolerance, at a tenth of it, and those from
    other starts; the cell is *not a fixed point* where it exceeds 0.05 dB.
    """
    db = torch.stack(list(certificate.psnr.values()))
    return {
        "outcome": certificate.outcome,
        "tol": certificate.tol,
        "psnr": {name: summary(values) for name, values in certificate.psnr.items()},
        "spread_db": summary(db.amax(dim=0) - db.amin(dim=0)),
        "spectral_radius": summary(certificate.spectral_radius),
        "rightmost": summary(certificate.rightmost),
        "error": certificate.error.tolist(),
        "residual": certificate.residual.tolist(),
        "converged": int(certificate.converged.sum()),
        "certified": int(certificate.unique.sum()),
        "evaluations": certificate.evaluations.tolist(),
    }


def ei_loss(task: Task, model: Any, x_hat: torch.Tensor) -> float:
    r"""The equivariance term of eq. (3) on the test images. It shows whether a lower PSNR comes with a larger EI loss."""
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
    r"""Nested lists and dictionaries with numbers as floats."""
    if isinstance(tree, dict):
        return {k: plain(v) for k, v in tree.items()}
    return [plain(v) for v in tree] if isinstance(tree, (list, tuple)) else round(float(tree), 6)


def commit() -> str | None:
    r"""The commit of the code; ``None`` outside of a repository."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return git.stdout.strip() or None


def surroundings(device: str, code: str | None) -> dict[str, Any]:
    r"""What a cell ran on; ``code`` is the :func:`commit` at its start, since the tree may move on while it runs."""
    memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    threads = torch.get_num_threads()
    name = f"{platform.machine()}, {threads} thread{'s' * (threads != 1)}"
    if device == "cuda":
        memory, name = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "deepinv": dinv.__version__, "python": platform.python_version()}
    return {
        "device": name,
        "peak_memory_mb": round(memory / 1e6),
        "versions": versions,
        "commit": code,
        "date": time.strftime("%Y-%m-%d"),
    }
