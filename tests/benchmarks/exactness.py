r"""How exact the gradients are, and that memory stays flat: ``python -m tests.benchmarks.exactness``.

Prints a table and writes ``tests/benchmarks/records/exactness.json``. The tests assert the same contracts; this measures
how far inside them we are, next to TorchDEQ on the same problem.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
from pathlib import Path

import deepinv as dinv
import torch
import torchdeq

from deepinv_deq import DEProx, DEQReconstructor, EquilibriumUNet, ModularIDHook, Solver
from tests.implicit.common import ei_loss, gradients, sup_loss
from tests.problems import TEMPLATES, dense_gradient, imaging, relative_error, unrolled

RELATIVE = {"f_stop_mode": "rel", "b_stop_mode": "rel"}  # TorchDEQ's criterion, as in peers.py
RECORD = Path(__file__).parent / "records" / "exactness.json"


def one_pass(template) -> dict[str, float]:
    r"""Relative error of a single pass against the dense-Jacobian gradient, float64."""
    model, physics, _, y = imaging(template)
    y.requires_grad_()
    x_hat = model(y, physics)
    inputs, g = [*model.parameters(), y], torch.cos(x_hat.detach())
    exact = dense_gradient(lambda x: model.iteration.bind(y, physics)(x), x_hat, g, inputs)
    ours = torch.autograd.grad(x_hat, inputs, g)
    return {"parameters": relative_error(ours[:-1], exact[:-1]), "y": relative_error(ours[-1], exact[-1])}


def composed(template, loss) -> dict[str, float]:
    r"""Relative error of a loss against a fully unrolled solve, float64."""
    model, physics, _, y = imaging(template)
    y.requires_grad_()
    ours = gradients(loss(model, y, physics), model, [y])
    exact = gradients(loss(lambda y, p: unrolled(model, y, p), y, physics), model, [y])
    return {"parameters": relative_error(ours[:-1], exact[:-1]), "y": relative_error(ours[-1], exact[-1])}


def single_precision(template, loss) -> dict[str, float]:
    r"""Relative error in float32, tolerance 1e-6, against float64."""
    model, physics, _, y = imaging(template, dtype=torch.float32, tol=1e-6)
    model.solver = Solver("anderson", max_iter=100, tol=1e-6, on_failure="ignore")
    exact_model, exact_physics, _, exact_y = imaging(template)
    ours = gradients(loss(model, y.requires_grad_(), physics), model, [y])
    exact = gradients(loss(exact_model, exact_y.requires_grad_(), exact_physics), exact_model, [exact_y])
    return {"parameters": relative_error(ours[:-1], exact[:-1]), "y": relative_error(ours[-1], exact[-1])}


def scaled_loss(gradient, scales=(1e-8, 1e-4, 1e4, 1e8)) -> float:
    r"""Largest change of gradient / scale over scales of the loss."""
    one = gradient(1.0)
    return max(relative_error([g / s for g in gradient(s)], one) for s in scales)


def ours_scaled(scale: float):
    model, physics, _, y = imaging(dtype=torch.float32)
    model.solver, model.hook = Solver("anderson", tol=1e-5, max_iter=200), ModularIDHook()
    return [g.double() for g in torch.autograd.grad(scale * ei_loss(model, y, physics), list(model.parameters()))]


def torchdeq_scaled(scale: float):
    model, physics, _, y = imaging(dtype=torch.float32)
    deq = torchdeq.get_deq(f_max_iter=100, f_tol=1e-6, b_solver="anderson", ift=True, **RELATIVE)

    def reconstruct(y, physics):
        f = model.iteration.bind(y, physics)
        return deq(f, model.iteration.init(y, physics))[0][-1]

    loss = scale * ei_loss(reconstruct, y, physics)
    return [g.double() for g in torch.autograd.grad(loss, list(model.parameters()))]


def second_order(reconstruct, model, physics, y) -> list[torch.Tensor]:
    r"""Gradient of the squared norm of the gradient of a loss."""
    grads = torch.autograd.grad(sup_loss(reconstruct, y, physics), list(model.parameters()), create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in grads), list(model.parameters())))


def errors_of_second_order() -> dict[str, float]:
    r"""Relative errors of a gradient of second order against an unrolled solve, float64, ours and TorchDEQ's."""
    model, physics, _, y = imaging()
    limits = {"f_max_iter": 300, "f_tol": 1e-13, "b_max_iter": 300, "b_tol": 1e-13}
    deq = torchdeq.get_deq(b_solver="anderson", ift=True, **limits, **RELATIVE)

    def peer(y, physics):
        return deq(model.iteration.bind(y, physics), model.iteration.init(y, physics))[0][-1]

    exact = second_order(lambda y, p: unrolled(model, y, p, 200), model, physics, y)
    return {
        name: relative_error(second_order(reconstruct, model, physics, y), exact)
        for name, reconstruct in (("deepinv-deq", model), ("TorchDEQ ift", peer))
    }


def memory(steps: int = 500) -> dict[str, float]:
    r"""Peak resident memory in MB after a fifth of the steps and after all of them."""
    torch.manual_seed(0)
    mask = torch.ones(1, 2, 48, 48)
    mask[..., ::3] = 0
    physics = dinv.physics.MRI(mask=mask, img_size=(2, 48, 48))
    model = DEQReconstructor(
        DEProx(EquilibriumUNet(2, channels=(8, 16)), stepsize=0.5),
        solver=Solver("anderson", max_iter=8, tol=1e-3, on_failure="ignore"),
        hook=ModularIDHook(Solver("gmres", max_iter=8, tol=1e-2, on_failure="ignore")),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    y, peaks = physics.A(torch.rand(2, 2, 48, 48)), {}
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        ei_loss(model, y, physics).backward()
        optimizer.step()
        if step in (steps // 5, steps):
            peaks[f"after {step} steps"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return peaks


def render() -> str:
    r"""Markdown table of the record."""
    record = json.loads(RECORD.read_text())
    lines = ["| measured | values |", "|---|---|"]
    for name, values in record["rows"].items():
        unit = "{:.1f}" if "MB" in name else "{:.1e}"
        lines.append(f"| {name} | {', '.join(f'{k}: ' + unit.format(v) for k, v in values.items())} |")
    return "\n".join(lines)


def main() -> None:
    r"""Measure, print, record."""
    rows: dict[str, dict[str, float]] = {}

    def row(name: str, values: dict[str, float]) -> None:
        rows[name] = values
        print(
            f"{name:48s}", "  ".join(f"{k} {v:.1e}" if v < 1 else f"{k} {v:.1f}" for k, v in values.items()), flush=True
        )

    for template in TEMPLATES:
        name = template.__name__
        row(f"{name}, one pass, float64, dense Jacobian", one_pass(template))
        for loss, of in ((sup_loss, "one pass"), (ei_loss, "EI composition")):
            row(f"{name}, {of}, float64, unrolled", composed(template, loss))
            row(f"{name}, {of}, float32", single_precision(template, loss))
    row(
        "loss scale 1e-8 to 1e+8, EI, float32",
        {"deepinv-deq": scaled_loss(ours_scaled), "TorchDEQ ift": scaled_loss(torchdeq_scaled)},
    )
    row("second order, one pass, float64, unrolled", errors_of_second_order())
    row("peak memory in MB, EI training", memory())
    versions = {name: importlib.metadata.version(name) for name in ("torch", "deepinv", "torchdeq")}
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps({"rows": rows, "versions": versions, "machine": platform.machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
