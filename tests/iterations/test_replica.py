r"""Replicas: shared tensors, everything else private, the same values and gradients as the original."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import torch
from deepinv.physics import Blur, Inpainting, StackedLinearPhysics, Tomography
from deepinv.utils import TensorList
from torch import nn

from deepinv_deq import DEProx, DEQReconstructor, EquilibriumUNet, Solver
from deepinv_deq.iterations.replica import Replica
from tests.iterations.contents import Plain
from tests.problems import F64, SmallDenoiser, assert_unrolled_gives_the_same, deq, imaging, relative_error, rng
from tests.problems import random_mask as mask


def test_replica_of_a_network_has_its_values_and_gradients_bit_for_bit():
    net = EquilibriumUNet(2, channels=(4, 8))
    nn.init.normal_(net.Conv_1x1.weight, generator=rng())
    net.eval()
    x = torch.rand(2, 2, 16, 16, generator=rng())
    twin = Replica([net]).roots[0]
    assert twin is not net and torch.equal(twin(x), net(x))
    parameters = list(net.parameters())
    for ours, exact in zip(*(torch.autograd.grad(f(x).square().sum(), parameters) for f in (twin, net)), strict=True):
        assert torch.equal(ours, exact)


# Private the other way ---------------------------------------------------------------------------------------------


class Keeps(SmallDenoiser):
    def __init__(self):
        super().__init__()
        self.features, self.count, self.log = None, 0, []

    def forward(self, x):
        self.features, self.count = torch.tanh(self.conv(x)), self.count + 1
        self.log.append(self.features)
        return self.scale * (x + self.features)


def test_what_an_evaluation_stores_stays_on_the_replica():
    denoiser = Keeps()
    physics = Inpainting((1, 6, 6), mask=mask(1, 6, 6))
    y = physics.A(torch.rand(2, 1, 6, 6, dtype=F64, generator=rng()))
    model = deq(DEProx(denoiser, stepsize=0.6))
    denoiser(y).sum().backward()  # pretraining leaves a feature map with a graph that is freed
    kept = denoiser.features
    assert_unrolled_gives_the_same(deq(DEProx(SmallDenoiser(), stepsize=0.6)), physics, y)
    for _ in range(2):
        model(y, physics).sum().backward()
    assert denoiser.features is kept and denoiser.count == 1 and denoiser.log == [kept]
    reference = deq(DEProx(SmallDenoiser(), stepsize=0.6))
    assert torch.equal(model(y, physics), reference(y, physics))


def test_a_tensor_with_a_graph_that_the_physics_uses_gets_its_gradient():
    z = torch.rand(1, 1, 3, 3, dtype=F64, generator=rng()).requires_grad_()
    x = torch.rand(2, 1, 8, 8, dtype=F64, generator=rng(1))
    model = deq(DEProx(SmallDenoiser(0.25), stepsize=0.8))

    def gradient(solve):
        physics = Blur(padding="circular")
        physics.filter = z.exp() / z.exp().sum()
        y = physics.A(x)
        return torch.autograd.grad(solve(y, physics).square().sum(), z)[0]

    def unrolled(y, physics):
        x = torch.zeros_like(y)
        for _ in range(60):
            x = model.iteration(x, physics, physics.A_adjoint(y))
        return x

    assert relative_error(gradient(model), gradient(unrolled)) <= 1e-8


def test_hooks_fire_on_replicas():
    model, physics, _, y = imaging()
    seen = []
    handle = model.iteration.denoiser.conv.register_forward_hook(lambda m, i, out: seen.append(out.detach()))
    model(y, physics)
    assert seen and all(out.shape == (2, 1, 4, 4) for out in seen)
    handle.remove()
    count = len(seen)
    model(y, physics)
    assert len(seen) == count


def test_what_a_hook_refers_to_belongs_to_the_root_of_its_module():
    gain, adapter = torch.ones(1, dtype=F64), nn.Conv2d(1, 1, 1, dtype=F64)
    denoiser, physics = SmallDenoiser(), Inpainting((1, 6, 6), mask=mask(1, 6, 6))
    denoiser.register_forward_hook(lambda m, i, out: gain * adapter(out))
    denoiser.register_forward_hook(lambda m, i, out: out if denoiser.training else None)  # refers to the model itself
    replica = Replica([denoiser, physics])
    of_weights = {id(t) for t in denoiser.parameters()}
    for twin in (replica, replica.again(), replica.again().again()):
        assert all(twin.found[id(t)].roots == {0} for t in (gain, adapter.weight, adapter.bias))
        assert all(twin.found[key].roots == {0} and twin.found[key].role == "parameter" for key in of_weights)


def test_shared_modules_stay_shared_and_cycles_are_safe():
    shared = nn.Conv2d(1, 1, 3, padding=1)
    tree = nn.Sequential(shared, nn.Sequential(shared))
    tree.self, tree.child = [tree], Plain(parent=tree)
    tree.method = tree.forward
    replica = Replica([tree, tree.child])
    twin = replica.roots[0]
    assert twin[0] is twin[1][0] is not shared and twin.self[0] is twin and twin.child is replica.roots[1]
    assert twin.child.parent is twin and twin.method.__self__ is twin
    assert len(replica.found) == 2


def test_nothing_of_a_pass_needs_the_garbage_collector():
    physics = Tomography(angles=5, img_width=8, normalize=False, adjoint_via_backprop=True, dtype=F64)
    y = physics.A(torch.rand(1, 1, 8, 8, dtype=F64))
    denoiser = Keeps().to(F64)
    model = DEQReconstructor(DEProx(denoiser, stepsize=0.5), solver=Solver(tol=1e-2))
    model(y, physics).sum().backward()
    gc.collect()
    gc.disable()
    try:
        f = model.iteration.bind(y, physics)
        graph = f(f.init(y))
        gone = [weakref.ref(f), weakref.ref(f._physics)]
        del f, graph
        assert [r() for r in gone] == [None, None]
    finally:
        gc.enable()


def test_stacked_parts_are_trained():
    kernel = (torch.rand(1, 1, 3, 3, dtype=F64, generator=rng()) / 9).requires_grad_()
    blur = Blur(padding="circular")
    blur.filter = kernel
    physics = StackedLinearPhysics([Inpainting((1, 6, 6), mask=mask(1, 6, 6)), blur])
    model = deq(DEProx(SmallDenoiser(0.25), stepsize=0.4))
    x = torch.rand(2, 1, 6, 6, dtype=F64, generator=rng(3))
    y = TensorList([t.detach() for t in physics.A(x)])

    def unrolled():
        x = torch.zeros(2, 1, 6, 6, dtype=F64)
        for _ in range(60):
            x = model.iteration(x, physics, physics.A_adjoint(y))
        return x

    ours, exact = (torch.autograd.grad(f().square().sum(), kernel)[0] for f in (lambda: model(y, physics), unrolled))
    assert relative_error(ours, exact) <= 1e-8


def test_arrays_are_copied_and_shared_things_are_shared():
    holder = Plain(array=np.ones(3), generator=torch.Generator(), dtype=torch.float32, function=len)
    twin = Replica([holder]).roots[0]
    assert twin.array is not holder.array and twin.generator is holder.generator and twin.function is len
