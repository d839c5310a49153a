r"""DEQReconstructor with the tools of PyTorch: functional_call, worker processes and export."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from deepinv_deq import FixedPointResidual
from tests.problems import imaging, relative_error


def perturbed(model, scale=1.0):
    rng = torch.Generator().manual_seed(7)
    return {
        name: (scale * (p.detach() + 0.02 * torch.randn(p.shape, generator=rng, dtype=p.dtype))).requires_grad_()
        for name, p in model.named_parameters()
    }


def test_functional_call_differentiates_the_parameters_it_is_given():
    model, physics, _, y = imaging()
    given = perturbed(model)
    before = [p.clone() for p in model.parameters()]
    x_hat = torch.func.functional_call(model, given, (y, physics))
    assert not any(given[name] is p for name, p in model.named_parameters())  # put back before the backward pass
    ours = torch.autograd.grad(x_hat.square().sum(), list(given.values()))
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict() | {k: v.detach() for k, v in given.items()})
    exact = torch.autograd.grad(twin(y, physics).square().sum(), list(twin.parameters()))
    assert relative_error(ours, exact) <= 1e-12
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_parameters_may_come_out_of_another_network():
    model, physics, _, y = imaging()
    s = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)

    def loss(s):
        given = {name: s * p.detach() for name, p in model.named_parameters()}
        return torch.func.functional_call(model, given, (y, physics)).square().sum()

    (ours,) = torch.autograd.grad(loss(s), s)
    h = 1e-5
    exact = (loss(s.detach() + h) - loss(s.detach() - h)) / (2 * h)
    assert ours.item() == pytest.approx(exact.item(), rel=1e-7)


class Reconstructing(torch.utils.data.Dataset):
    r"""Reconstructs in the processes of a DataLoader."""

    def __init__(self, model, physics, y):
        self.model, self.physics, self.y = model, physics, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        with torch.no_grad():
            return self.model(self.y[i : i + 1], self.physics)[0]


def test_it_reconstructs_in_the_workers_of_a_dataloader():
    model, physics, _, y = imaging(batch=4)
    with torch.no_grad():
        expected = model(y, physics)
    loader = DataLoader(Reconstructing(model, physics, y), batch_size=2, num_workers=2, timeout=120)
    torch.testing.assert_close(torch.cat(list(loader)), expected)


def test_an_exported_iteration_has_the_same_fixed_point():
    class Step(nn.Module):
        def __init__(self, iteration, physics):
            super().__init__()
            self.iteration, self.physics = iteration, physics

        def forward(self, x, aty):
            return self.iteration(x, self.physics, aty)

    model, physics, _, y = imaging()
    aty = physics.A_adjoint(y)
    exported = torch.export.export(Step(model.iteration, physics), (torch.zeros_like(aty), aty)).module()
    x, stat = model.solver(lambda x: exported(x, aty), aty)
    assert stat.converged.all() and relative_error(x, model(y, physics)) <= 1e-12

    class Solve(nn.Module):  # stops by what it finds in the data, which PyTorch exports no graph of
        def forward(self, y):
            return model(y, physics)

    with pytest.raises(Exception, match="data-dependent|skipfiles"):  # the second is what PyTorch 2.4 says
        torch.export.export(Solve(), (y,))


def replica(model):
    r"""A replica as :class:`torch.nn.DataParallel` makes it, whose ``replicate`` needs several GPUs."""
    modules = list(model.modules())
    twins = {module: module._replicate_for_data_parallel() for module in modules}
    for module, twin in twins.items():
        twin._former_parameters = {}
        for name, child in module._modules.items():
            twin._modules[name] = twins[child]
        for name, p in module._parameters.items():
            twin._former_parameters[name] = p * 1.0
            setattr(twin, name, twin._former_parameters[name])
    return twins[model]


def test_replicas_of_data_parallelism_report_to_the_model():
    model, physics, _, y = imaging()
    exact = torch.autograd.grad(model(y, physics).square().sum(), list(model.parameters()))
    model.forward_stat = model.hook.stat = None
    x_hat = replica(model)(y, physics)
    ours = torch.autograd.grad(x_hat.square().sum(), list(model.parameters()))
    assert relative_error(ours, exact) <= 1e-12
    assert model.forward_stat.converged.all() and model.hook.stat.converged.all()
    assert torch.equal(FixedPointResidual()(x_hat, model=model), model.forward_stat.residual)
    twin = copy.deepcopy(model)
    twin(y[:1], physics)
    assert len(model.forward_stat.residual) == 2  # a copy reports to itself


def test_the_printed_model_shows_its_solvers():
    model = imaging()[0]
    text = repr(model)
    assert f"solver={model.solver}" in text and f"hook={model.hook}" in text and "warm_starts=0" in text
