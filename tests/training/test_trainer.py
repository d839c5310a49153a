r"""A deep equilibrium model in deepinv's Trainer: metrics, evaluation, several physics and loggers."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

import deepinv as dinv
import pytest
import torch

from deepinv_deq import DEGrad, FixedPointResidual, SolverEvaluations
from deepinv_deq.datasets import phantoms
from deepinv_deq.training import ResumableTrainer, latest_checkpoint
from tests.problems import relative_error, weights
from tests.training.trainers import deq, loader, make

pytestmark = pytest.mark.filterwarnings("ignore:Trainer running with AMP", "ignore:non_blocking_transfers")
ROTATE = {"interpolation_mode": "bilinear"}


# Metrics ---------------------------------------------------------------------------------------------------------------


def test_statistics_of_solves_are_metrics_like_others():
    trainer = make(eval_dataloader=loader(deq()[1], seed=1))
    before = weights(trainer.model)
    trainer.train()
    assert not torch.equal(before, weights(trainer.model))
    for history in (trainer.train_metrics_history, trainer.eval_metrics_history):
        assert set(history) == {"PSNR", "FixedPointResidual", "SolverEvaluations"}
        assert all(len(values) == 2 for values in history.values())
        assert all(0 < r <= 1e-4 for r in history["FixedPointResidual"])
        assert all(3 < n < 50 for n in history["SolverEvaluations"])
    result = trainer.test(loader(deq()[1], seed=2), compare_no_learning=True, log_raw_metrics=True)
    assert len(result["SolverEvaluations_vals"]) == 4 and result["FixedPointResidual"] <= 1e-4
    assert result["SolverEvaluations no learning"] != result["SolverEvaluations no learning"]  # NaN: it solves nothing


def test_the_adjoint_solves_beside_the_forward_ones():
    class AdjointEvaluations(SolverEvaluations):
        pass

    metrics = [SolverEvaluations(), AdjointEvaluations(which="backward")]
    trainer = make(metrics=metrics, eval_dataloader=loader(deq()[1]))
    trainer.train()
    history = trainer.eval_metrics_history
    assert history["AdjointEvaluations"][-1] == trainer.model.hook.stat["nstep"].mean().item()
    assert history["AdjointEvaluations"] != history["SolverEvaluations"]


# Evaluation ------------------------------------------------------------------------------------------------------------


def test_losses_of_the_evaluation_set_and_no_gradient_left():
    physics = deq()[1]
    losses = [dinv.loss.MCLoss(), dinv.loss.EILoss(dinv.transform.Rotate(multiples=90, **ROTATE))]
    trainer = make(losses=losses, eval_dataloader=loader(physics, seed=3), compute_eval_losses=True, epochs=1)
    trainer.train()
    x = phantoms(4, 8, seed=3)
    y = physics.A(x)
    expected = (physics.A(trainer.model(y, physics)) - y).square().mean().item()
    assert trainer.eval_loss_history["MCLoss"] == [pytest.approx(expected, rel=1e-3)]
    assert trainer.eval_loss_history["EILoss"][0] > 0


def test_the_course_of_a_solve_is_plotted(monkeypatch, tmp_path):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)  # deepinv saves these figures under the working directory
    module, plotted = importlib.import_module("deepinv.training.trainer"), []
    plot = module.plot_curves
    monkeypatch.setattr(module, "plot_curves", lambda m, **kw: plotted.append(m) or plot(m, **(kw | {"show": False})))
    trainer = make(plot_convergence_metrics=True, eval_dataloader=loader(deq()[1]), epochs=1)
    trainer.train()
    assert len(plotted) == 1 and set(plotted[0]) == {"residual", "psnr"}
    assert all(len(c) == 2 and c[0][-1] <= 1e-4 for c in [plotted[0]["residual"]])
    assert list(tmp_path.rglob("*.p*"))


@pytest.mark.parametrize("first", [dinv.metric.PSNR, FixedPointResidual])
def test_early_stopping(first):
    trainer = make(metrics=first(), lr=0.0, epochs=20, early_stop=2, eval_dataloader=loader(deq()[1]))
    trainer.train()  # nothing ever improves: the first epoch is the best, and two more may pass without a better one
    assert len(trainer.eval_metrics_history[first.__name__]) == 4


def test_early_stopping_on_losses():
    trainer = make(
        metrics=None, losses=dinv.loss.MCLoss(), lr=0.0, epochs=20, early_stop=1, early_stop_on_losses=True,
        compute_eval_losses=True, eval_dataloader=loader(deq()[1]),
    )  # fmt: skip
    trainer.train()
    assert len(trainer.eval_loss_history["MCLoss"]) == 3


def test_a_pretrained_checkpoint(tmp_path):
    first = make(save_path=tmp_path, eval_dataloader=loader(deq()[1]))
    first.train()
    path = latest_checkpoint(tmp_path)
    start = weights(first.model)
    model, _ = deq(seed=5)
    tested = make(model=model, ckpt_pretrained=path)
    tested.test(loader(deq()[1]))
    assert torch.equal(weights(model), start)
    model, _ = deq(seed=5)
    more = make(model=model, ckpt_pretrained=path, epochs=3)
    more.train()
    assert len(more.loss_history["SupLoss"]) == 1 and not torch.equal(weights(model), start)
    moments = more.optimizer.state_dict()["state"][0]["step"]
    assert moments == 6  # the optimiser's memory came along: two steps in each of three epochs
    best = make(model=deq(seed=5)[0], kind=ResumableTrainer, save_path=tmp_path / "other")
    best.load_model(Path(path).with_name("ckp_best.pth.tar"))  # before anything is set up, too


# Several physics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [True, False])
def test_several_physics_and_dataloaders(together):
    model, _ = deq(template=DEGrad)
    physics = [deq(seed=s)[1] for s in (1, 2)]
    loaders = [loader(p, n=2, seed=s) for s, p in enumerate(physics)]
    trainer = make(
        model=model, physics=physics, train_dataloader=loaders, eval_dataloader=loaders, sgd=True, lr=0.1, epochs=1,
        optimizer_step_multi_dataset=together, metrics=[SolverEvaluations()], compute_train_metrics=False,
    )  # fmt: skip
    twin, _ = deq(template=DEGrad)
    before = weights(twin)
    trainer.train()
    total = torch.zeros_like(before)
    for s, p in enumerate(physics):
        x = phantoms(2, 8, seed=s)
        loss = (twin(p.A(x), p) - x).square().mean()
        total += torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(twin.parameters()))])
    error = relative_error(weights(model) - before, -0.1 * total)
    assert error < 1e-3 if together else 1e-3 < error < 0.5  # two steps, the second from other weights
    assert trainer.eval_metrics_history["SolverEvaluations"][0] > 3


# Weights & Biases, MLflow ----------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self):
        self.logs = {}

    def __call__(self, logs, step=None, **_):
        self.logs.setdefault(step, {}).update(logs)


@pytest.fixture
def logged(monkeypatch, tmp_path):
    r"""What is logged, by the real tools off line where they are installed, else by stand-ins."""
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    found = {}
    for name, function in (("wandb", "log"), ("mlflow", "log_metrics")):
        found[name] = Recorder()
        if importlib.util.find_spec(name) is not None:
            module = importlib.import_module(name)
            # wandb.init puts the method of the run in the place of wandb.log
            owner = module.Run if name == "wandb" else module
            real, record = getattr(owner, function), found[name]

            def both(*args, step=None, real=real, record=record, **kwargs):
                record(args[-1], step)
                return real(*args, step=step, **kwargs)

            monkeypatch.setattr(owner, function, both)
            continue
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        run = types.SimpleNamespace(id=f"{name}-id", info=types.SimpleNamespace(run_id=f"{name}-id"))
        module.run, module.ended = None, 0

        def start(module=module, run=run, **_):
            module.run = run

        def end(module=module):
            module.run, module.ended = None, module.ended + 1

        module.init = module.start_run = start
        module.finish = module.end_run = end
        module.active_run = lambda module=module: module.run
        setattr(module, function, found[name])
        monkeypatch.setitem(sys.modules, name, module)
    yield found


@pytest.mark.parametrize("per_batch", [False, True])
def test_solver_statistics_are_logged(logged, per_batch, tmp_path):
    trainer = make(
        ResumableTrainer, wandb_vis=True, mlflow_vis=True, eval_dataloader=loader(deq()[1]), save_path=tmp_path / "run",
        log_train_batch=per_batch, wandb_setup={"project": "deq"},
    )  # fmt: skip
    trainer.train()
    for record in logged.values():
        steps = record.logs
        assert sorted(steps) == list(range(4 if per_batch else 2))
        for logs in steps.values():
            assert {"PSNR", "FixedPointResidual", "SolverEvaluations", "TotalLoss"} <= set(logs)
            assert 0 < logs["FixedPointResidual"] <= 1e-4 and logs["SolverEvaluations"] > 3
        evaluated = [logs["Eval SolverEvaluations"] for logs in steps.values() if "Eval SolverEvaluations" in logs]
        assert evaluated == trainer.eval_metrics_history["SolverEvaluations"]
    saved = torch.load(latest_checkpoint(tmp_path / "run"), weights_only=True)
    assert saved["wandb_id"] and saved["mlflow_id"]
    assert all(getattr(sys.modules[name], "ended", 1) == 1 for name in logged)
