r"""Replicas: shared tensors, everything else private, the same values and gradients as the original."""

from __future__ import annotations

import copy
import enum
import functools
import gc
import pickle
import types
import weakref
from collections import ChainMap, UserDict, deque, namedtuple

import numpy as np
import pytest
import torch
from deepinv.physics import Blur, Inpainting, LinearPhysics, StackedLinearPhysics, Tomography
from deepinv.utils import TensorList
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from deepinv_deq import DEProx, DEQReconstructor, EquilibriumUNet, Solver
from deepinv_deq.iterations.replica import Replica
from tests.problems import F64, SmallDenoiser, assert_unrolled_gives_the_same, deq, imaging, relative_error


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def mask(*shape, seed=0):
    return (torch.rand(*shape, generator=rng(seed)) > 0.4).to(F64)


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


Pair = namedtuple("Pair", "one two")


class Plain:
    def __init__(self, **inside):
        self.__dict__.update(inside)


class Slotted:
    __slots__ = ("inside",)

    def __init__(self, inside):
        self.inside = inside


class Made:
    r"""Cannot be made without an argument, and drops everything when it is pickled or copied."""

    def __new__(cls, _):
        return super().__new__(cls)

    def __init__(self, inside):
        self.inside = inside

    def __getstate__(self):
        return {}


class Block:
    def __init__(self, inside):
        self.inside = inside

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Row(tuple):
    pass


class Table(dict):
    pass


def with_attribute(container, t):
    container.inside = t
    return container


def refers_to(m, t):
    m.child = Holder(t)
    m.gain = weakref.ref(m.child)


def closure(t):
    inside = [t]

    def change(value):
        nonlocal t
        t = inside[0] = value

    return Plain(get=lambda: t, first=lambda: inside[0], change=change)


def defaults(t):
    def get(gain=t, *, again=(t,)):
        return 0.5 * (gain + again[0])

    return get


def on_the_class(m, t):
    if "gain" in vars(type(m)):
        type(m).gain = t
    else:
        m.__class__ = type("WithGain", (type(m),), {"gain": t})


GAIN = {
    "deque": (lambda m, t: setattr(m, "gain", deque([t], maxlen=2)), lambda m: m.gain[0]),
    "set": (lambda m, t: setattr(m, "gain", {t}), lambda m: max(m.gain)),
    "frozen set": (lambda m, t: setattr(m, "gain", frozenset({t})), lambda m: max(m.gain)),
    "UserDict": (lambda m, t: setattr(m, "gain", UserDict(a=t)), lambda m: m.gain["a"]),
    "ChainMap": (lambda m, t: setattr(m, "gain", ChainMap({}, {"a": t})), lambda m: m.gain["a"]),
    "read-only dictionary": (
        lambda m, t: setattr(m, "gain", types.MappingProxyType({"a": t})),
        lambda m: m.gain["a"],
    ),
    "object with __new__": (lambda m, t: setattr(m, "gain", Made(t)), lambda m: m.gain.inside),
    "context manager": (lambda m, t: setattr(m, "gain", Block(t)), lambda m: m.gain.inside),
    "attribute of a tuple": (lambda m, t: setattr(m, "gain", with_attribute(Row(), t)), lambda m: m.gain.inside),
    "attribute of a dictionary": (lambda m, t: setattr(m, "gain", with_attribute(Table(), t)), lambda m: m.gain.inside),
    "weak reference": (refers_to, lambda m: m.gain().gain),
    "closure": (lambda m, t: setattr(m, "gain", closure(t)), lambda m: 0.5 * (m.gain.get() + m.gain.first())),
    "default values": (lambda m, t: setattr(m, "gain", defaults(t)), lambda m: m.gain()),
    "attribute of a function": (
        lambda m, t: setattr(m, "gain", with_attribute(lambda: None, t)),
        lambda m: m.gain.inside,
    ),
    "attribute of the class": (on_the_class, lambda m: m.gain),
    "array of objects": (lambda m, t: setattr(m, "gain", np.array([Holder(t)])), lambda m: m.gain[0].gain),
    "attribute": (lambda m, t: setattr(m, "gain", t), lambda m: m.gain),
    "list": (lambda m, t: setattr(m, "gain", [t]), lambda m: m.gain[0]),
    "tuple": (lambda m, t: setattr(m, "gain", (1, t)), lambda m: m.gain[1]),
    "named tuple": (lambda m, t: setattr(m, "gain", Pair(t, 1)), lambda m: m.gain.one),
    "dictionary": (lambda m, t: setattr(m, "gain", {"a": t}), lambda m: m.gain["a"]),
    "nested": (lambda m, t: setattr(m, "gain", {"a": [{"b": (t,)}]}), lambda m: m.gain["a"][0]["b"][0]),
    "TensorList": (lambda m, t: setattr(m, "gain", TensorList([t])), lambda m: m.gain[0]),
    "plain object": (lambda m, t: setattr(m, "gain", Plain(inside=Plain(t=t))), lambda m: m.gain.inside.t),
    "namespace": (lambda m, t: setattr(m, "gain", types.SimpleNamespace(t=t)), lambda m: m.gain.t),
    "slots": (lambda m, t: setattr(m, "gain", Slotted(t)), lambda m: m.gain.inside),
    "partial": (lambda m, t: setattr(m, "gain", functools.partial(torch.mul, t)), lambda m: m.gain(torch.ones(()))),
    "parameter": (lambda m, t: setattr(m, "gain", nn.Parameter(t.detach())), lambda m: m.gain),
    "parameter list": (lambda m, t: setattr(m, "gain", nn.ParameterList([t.detach()])), lambda m: m.gain[0]),
    "parameter dictionary": (
        lambda m, t: setattr(m, "gain", nn.ParameterDict({"a": t.detach()})),
        lambda m: m.gain["a"],
    ),
    "module in a list": (lambda m, t: setattr(m, "gain", [Holder(t)]), lambda m: m.gain[0].gain),
    "module in an object": (lambda m, t: setattr(m, "gain", Plain(h=Holder(t))), lambda m: m.gain.h.gain),
    "number": (lambda m, t: setattr(m, "gain", float(t.detach())), lambda m: m.gain),
    "number in a list": (lambda m, t: setattr(m, "gain", [float(t.detach())]), lambda m: m.gain[0]),
    "array": (lambda m, t: setattr(m, "gain", t.detach().numpy().copy()), lambda m: float(m.gain)),
}


class Holder(nn.Module):
    def __init__(self, t):
        super().__init__()
        self.gain = t


class Gain(LinearPhysics):
    r"""A multiple of the identity, which it keeps in one of many ways."""

    def __init__(self, kind):
        super().__init__()
        self.put, self.get = GAIN[kind]

    def A(self, x, **_):
        return self.get(self) * x

    def A_adjoint(self, y, **_):
        return self.get(self) * y


class Scaled(SmallDenoiser):
    r"""A denoiser times a number that it keeps in one of many ways."""

    def __init__(self, kind):
        super().__init__()
        self.put, self.get = GAIN[kind]

    def forward(self, x):
        return self.get(self) * super().forward(x)


def gradients(where, kind, between=None):
    r"""Gradients of all that is trained, after the gain was given another value between forward and backward."""
    t = torch.tensor(0.7, dtype=F64, requires_grad=True)
    owner = Gain(kind) if where == "physics" else Scaled(kind)
    owner.put(owner, t)
    model = deq(DEProx(owner if where == "denoiser" else SmallDenoiser(), stepsize=0.6).to(F64))
    physics = owner if where == "physics" else Inpainting((1, 6, 6), mask=mask(1, 6, 6))
    y = torch.rand(2, 1, 6, 6, dtype=F64, generator=rng())
    trained = [t, *model.parameters(), *physics.parameters()]

    if between is None:  # unrolled
        x = torch.zeros_like(y)
        for _ in range(150):
            x = model.iteration(x, physics, physics.A_adjoint(y))
    else:
        x = model(y, physics)
        between(owner)
    return torch.autograd.grad(x.square().sum(), trained, materialize_grads=True)


@pytest.mark.parametrize("where", ["physics", "denoiser"])
@pytest.mark.parametrize("kind", GAIN)
def test_whatever_a_module_keeps_is_that_of_the_forward_pass(kind, where):
    exact = gradients(where, kind)
    assert sum(float(g.abs().sum()) for g in exact) > 0
    other = torch.tensor(0.1, dtype=F64)
    for ours, theirs in zip(gradients(where, kind, lambda m: m.put(m, other)), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


CONTENTS = {
    "deque": lambda m: m.gain.append(m.gain.popleft() * 0.1),
    "UserDict": lambda m: m.gain.update(a=0.1),
    "object with __new__": lambda m: setattr(m.gain, "inside", 0.1),
    "context manager": lambda m: setattr(m.gain, "inside", 0.1),
    "attribute of a tuple": lambda m: setattr(m.gain, "inside", 0.1),
    "weak reference": lambda m: setattr(m.child, "gain", 0.1),
    "closure": lambda m: m.gain.change(0.1),
    "attribute of a function": lambda m: setattr(m.gain, "inside", 0.1),
    "attribute of the class": lambda m: setattr(type(m), "gain", 0.1),
    "array of objects": lambda m: setattr(m.gain[0], "gain", 0.1),
    "list": lambda m: m.gain.__setitem__(0, 0.1),
    "dictionary": lambda m: m.gain.__setitem__("a", 0.1),
    "nested": lambda m: m.gain["a"][0].__setitem__("b", (0.1,)),
    "plain object": lambda m: setattr(m.gain.inside, "t", 0.1),
    "namespace": lambda m: setattr(m.gain, "t", 0.1),
    "slots": lambda m: setattr(m.gain, "inside", 0.1),
    "module in a list": lambda m: setattr(m.gain[0], "gain", 0.1),
    "number in a list": lambda m: m.gain.append(m.gain.pop() * 0.1),
    "array": lambda m: m.gain.__imul__(0.1),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_the_contents_of_containers_are_those_of_the_forward_pass(kind):
    exact = gradients("physics", kind)
    for ours, theirs in zip(gradients("physics", kind, CONTENTS[kind]), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


class Kind(enum.Enum):
    A = 1


class InSlots(SmallDenoiser):
    __slots__ = ("gain", "__hidden")

    def __init__(self):
        super().__init__()
        self.gain, self.__hidden = 0.5, 1.0

    def forward(self, x):
        return self.gain * self.__hidden * super().forward(x)


def test_slots_of_a_module_are_private():
    model = deq(DEProx(InSlots(), stepsize=0.6))
    physics = Inpainting((1, 6, 6), mask=mask(1, 6, 6))
    y = torch.rand(2, 1, 6, 6, dtype=F64, generator=rng())
    assert_unrolled_gives_the_same(model, physics, y)
    weight = model.iteration.denoiser.conv.weight
    exact = torch.autograd.grad(model(y, physics).square().sum(), weight)[0]
    loss = model(y, physics).square().sum()
    model.iteration.denoiser.gain = 0.1
    assert relative_error(torch.autograd.grad(loss, weight)[0], exact) <= 1e-10


def test_a_forward_that_calls_the_one_it_replaces():
    net = SmallDenoiser()
    before = net.forward
    net.forward = lambda x: 0.5 * before(x)
    physics = Inpainting((1, 6, 6), mask=mask(1, 6, 6))
    y = torch.rand(2, 1, 6, 6, dtype=F64, generator=rng())
    model = deq(DEProx(net, stepsize=0.6))
    assert_unrolled_gives_the_same(model, physics, y)
    exact = torch.autograd.grad(model(y, physics).square().sum(), net.conv.weight)[0]
    loss = model(y, physics).square().sum()
    net.scale = 0.1
    assert relative_error(torch.autograd.grad(loss, net.conv.weight)[0], exact) <= 1e-10


def test_functions_that_call_themselves_or_share_a_variable():
    count = 0

    def up():
        nonlocal count
        count += 1
        return up if count < 3 else get

    def get():
        return count

    twin = Replica([Plain(up=up, get=get)]).roots[0]
    assert twin.up is not up and twin.up()()() is twin.get and twin.get() == 3 and count == 0


def test_members_of_an_enumeration_are_themselves():
    assert Replica([Plain(kind=Kind.A, sentinel=object)]).roots[0].kind is Kind.A


# Normalised weights ------------------------------------------------------------------------------------------------


def test_normalised_weights_are_computed_once_per_pass_and_get_their_gradient():
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 1, 3, padding=1)
    # normalised to 1 as a matrix, a 3x3 convolution has norm up to 3: damp it to a contraction
    damp = nn.Conv2d(1, 1, 1, bias=False).requires_grad_(False)
    nn.init.constant_(damp.weight, 0.3)
    denoiser = nn.Sequential(parametrizations.spectral_norm(conv), nn.Tanh(), damp).to(F64)
    _, physics, _, y = imaging()
    model = DEQReconstructor(DEProx(denoiser, stepsize=0.5), solver=Solver("anderson", max_iter=300, tol=1e-12)).to(F64)
    model.hook.solver = Solver("gmres", max_iter=100, tol=1e-12)
    model.train()
    calls = []
    conv.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    loss = model(y, physics).sin().sum() + model(0.5 * y, physics).cos().sum()  # two passes: u and v move in between
    assert len(calls) == 2
    loss.backward()
    assert len(calls) == 2 and model.forward_stat.converged.all()
    ours = conv.parametrizations.weight.original.grad.clone()

    model.eval()  # no more power iterations: now autograd through the normalisation is a fair reference
    model.zero_grad()
    (model(y, physics).sin().sum() + model(0.5 * y, physics).cos().sum()).backward()
    at_rest = conv.parametrizations.weight.original.grad.clone()
    model.zero_grad()
    f, g = (model.iteration.bind(v, physics) for v in (y, 0.5 * y))
    a, b = physics.A_adjoint(y), physics.A_adjoint(0.5 * y)
    for _ in range(200):
        a, b = f(a), g(b)
    (a.sin().sum() + b.cos().sum()).backward()
    assert relative_error(at_rest, conv.parametrizations.weight.original.grad) <= 1e-8
    assert relative_error(ours, at_rest) < 0.5  # a few power iterations apart: near, though not the same weights


def test_the_cache_of_weights_leaves_no_trace():
    from torch.nn.utils import parametrize

    conv = parametrizations.weight_norm(nn.Conv2d(1, 1, 3, padding=1))
    physics = Inpainting((1, 4, 4), mask=torch.ones(1, 4, 4))
    x = torch.rand(1, 1, 4, 4)
    f = DEProx(conv).bind(physics.A(x), physics)
    before = f(x)
    with parametrize.cached():  # a user's own cache survives ours
        inner = conv.weight
        f(x)
        assert conv.weight is inner
    with torch.no_grad():
        conv.parametrizations.weight.original0.mul_(2)
    torch.testing.assert_close(f(x), before)  # bound before the change
    assert not torch.allclose(DEProx(conv).bind(physics.A(x), physics)(x), before)


class LowRank(nn.Module):
    r"""LoRA: a frozen weight plus a trained product."""

    def __init__(self, shape, rank=2):
        super().__init__()
        n, m = shape[0], shape[1:].numel()
        self.a = nn.Parameter(torch.randn(n, rank, generator=rng(1), dtype=F64) / 20)
        self.b = nn.Parameter(torch.randn(rank, m, generator=rng(2), dtype=F64) / 20)

    def forward(self, weight):
        return weight + (self.a @ self.b).reshape(weight.shape)


class Half(nn.Module):
    def forward(self, weight):
        return 0.5 * weight


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 3, padding=1)).to(F64)


def lora(n):
    for conv in (n[0], n[2]):
        conv.weight.requires_grad_(False)
        parametrize.register_parametrization(conv, "weight", LowRank(conv.weight.shape))


def chained(n):
    parametrize.register_parametrization(n[0], "weight", LowRank(n[0].weight.shape))
    parametrize.register_parametrization(n[0], "weight", Half())
    parametrize.register_parametrization(n[0], "bias", Half())


def nested(n):
    low = LowRank(n[0].weight.shape)
    parametrize.register_parametrization(low, "a", Half())
    parametrize.register_parametrization(n[0], "weight", low)


def pruned(n):
    prune.l1_unstructured(n[0], "weight", 0.4)
    prune.random_unstructured(n[2], "bias", 1)


WEIGHTS = {
    "weight_norm": lambda n: parametrizations.weight_norm(n[0]),
    "spectral_norm": lambda n: parametrizations.spectral_norm(n[0]),
    "LoRA": lora,
    "several, in a chain": chained,
    "a parametrised parametrisation": nested,
    "old weight_norm": lambda n: nn.utils.weight_norm(n[0]),
    "old spectral_norm": lambda n: nn.utils.spectral_norm(n[0]),
    "prune": pruned,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_computed_get_the_gradient_of_an_unrolled_solve(name, used_before):
    n = net()
    WEIGHTS[name](n)
    with torch.no_grad():
        for _ in range(20 if "spectral" in name else 0):
            n(torch.rand(1, 1, 6, 6, dtype=F64))  # power iterations: from random vectors, the norm is far off
    if used_before:  # what an earlier use leaves on a module has a graph that is freed
        n(torch.rand(1, 1, 6, 6, dtype=F64)).sum().backward()
        n.zero_grad()
    physics = Inpainting((1, 6, 6), mask=mask(1, 6, 6))
    model = deq(DEProx(nn.Sequential(n, nn.Tanh(), Half()), stepsize=0.6)).eval()
    assert_unrolled_gives_the_same(model, physics, physics.A(torch.rand(2, 1, 6, 6, dtype=F64, generator=rng())))
    for _ in range(2):
        model(physics.A(torch.rand(2, 1, 6, 6, dtype=F64)), physics).sum().backward()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["spectral_norm", "old spectral_norm"])
def test_power_iterations_are_kept_as_in_one_forward_pass(name):
    n, twin = net(), net()
    WEIGHTS[name](n)
    twin = copy.deepcopy(n)
    physics = Inpainting((1, 6, 6), mask=mask(1, 6, 6))
    y = physics.A(torch.rand(1, 1, 6, 6, dtype=F64))
    model = DEQReconstructor(DEProx(nn.Sequential(n, Half()), stepsize=0.5), solver=Solver(on_failure="ignore")).train()
    loss = model(y, physics).sum() + model(y, physics).sum()
    twin.train()
    for _ in range(2):
        twin(y)
    assert all(torch.equal(a, b) for a, b in zip(n.buffers(), twin.buffers(), strict=True))
    loss.backward()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_running_statistics_are_those_of_the_layer():
    layer = nn.BatchNorm2d(1, dtype=F64)
    _, physics, _, y = imaging()
    model = DEQReconstructor(DEProx(nn.Sequential(layer, Half())), solver=Solver(on_failure="ignore")).train()
    loss = sum(model(y, physics).sum() for _ in range(2))
    assert layer.num_batches_tracked > 2 and layer.running_mean.abs() > 0
    loss.backward()


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


def test_copies_made_during_a_solve():
    model, physics, _, y = imaging()
    expected = model(y, physics)
    copies = []

    def hook(*_):
        if not copies:
            copies.extend([copy.deepcopy(model), pickle.loads(pickle.dumps(model))])

    # the hook is not in the copies: functions defined in a test cannot be pickled
    f = model.iteration.bind(y, physics)
    f(model.iteration.init(y, physics))
    copies += [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in copies:
        assert torch.equal(twin(y, physics), expected)


def test_functional_call_gives_the_gradient_of_the_given_weights():
    model, physics, _, y = imaging()
    given = {name: (1.1 * p).detach().requires_grad_() for name, p in model.named_parameters()}
    x = torch.func.functional_call(model, given, (y, physics))
    grads = torch.autograd.grad(x.square().sum(), list(given.values()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(given[name])
    exact = torch.autograd.grad(model(y, physics).square().sum(), list(model.parameters()))
    assert relative_error(grads, exact) <= 1e-10


@pytest.mark.parametrize("used", [False, True])
def test_functional_call_with_parametrised_weights(used):
    n = net()
    parametrizations.weight_norm(n[0])
    physics = Inpainting((1, 6, 6), mask=mask(1, 6, 6))
    model = deq(DEProx(nn.Sequential(n, nn.Tanh(), Half()), stepsize=0.6))
    y = physics.A(torch.rand(2, 1, 6, 6, dtype=F64, generator=rng()))
    exact = torch.autograd.grad(model(y, physics).square().sum(), list(model.parameters()))
    given = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    grads = torch.autograd.grad(
        torch.func.functional_call(model, given, (y, physics)).square().sum(), list(given.values())
    )
    assert relative_error(grads, exact) <= 1e-10


@pytest.mark.parametrize("how", ["wrapper", "method"])
def test_a_compiled_denoiser_is_private_too(how):
    model, physics, _, y = imaging()
    exact = torch.autograd.grad(model(y, physics).square().sum(), list(model.parameters()))
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    denoiser = model.iteration.denoiser
    if how == "method":
        denoiser.compile(backend=backend)
    else:
        model.iteration.denoiser = torch.compile(denoiser, backend=backend)
    x = model(y, physics)
    denoiser.scale, kept = 0.1, denoiser.scale
    grads = torch.autograd.grad(x.square().sum(), list(model.parameters()))
    assert compiled and relative_error(grads, exact) <= 1e-8
    denoiser.scale = kept
    count = len(compiled)
    model(y, physics).square().sum().backward()
    if torch.__version__ >= "2.5":  # before, code was compiled for one module only, and every replica compiles its own
        assert len(compiled) == count  # the compiled code is found again


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("how", ["script", "trace"])
def test_modules_of_torchscript(how, inside):
    n = nn.Sequential(net(), nn.Tanh())
    physics = Inpainting((1, 6, 6), mask=mask(1, 6, 6))
    y = physics.A(torch.rand(2, 1, 6, 6, dtype=F64, generator=rng()))
    exact = torch.autograd.grad(deq(DEProx(n, stepsize=0.3))(y, physics).square().sum(), list(n.parameters()))
    compiled = torch.jit.script(n) if how == "script" else torch.jit.trace(n, y)
    model = deq(DEProx(nn.Sequential(compiled) if inside else compiled, stepsize=0.3))
    x = model(y, physics)
    ours = torch.autograd.grad(x.square().sum(), list(model.parameters()), retain_graph=True)
    assert relative_error(ours, exact) <= 1e-8
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # PyTorch notices first
        x.sum().backward()
    assert not torch.allclose(model(y, physics), x)


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
