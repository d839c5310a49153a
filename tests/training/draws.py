r"""Random generators of every kind, and the places of a run in which they are kept."""

from __future__ import annotations

import functools
import random

import deepinv as dinv
import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from deepinv_deq.training import ResumableTrainer
from tests.problems import imaging

GLOBAL = np.random.default_rng(5)
MAKE = {
    "default_rng": lambda: np.random.default_rng(3),
    "MT19937": lambda: np.random.Generator(np.random.MT19937(3)),
    "Philox": lambda: np.random.Generator(np.random.Philox(3)),
    "SFC64": lambda: np.random.Generator(np.random.SFC64(3)),
    "RandomState": lambda: np.random.RandomState(3),
    "SeedSequence": lambda: np.random.SeedSequence(3),
    "spawning": lambda: Spawning(3),
    "Sobol": lambda: torch.quasirandom.SobolEngine(1, scramble=True, seed=3),
    "Random": lambda: random.Random(3),
    "torch": lambda: torch.Generator().manual_seed(3),
}


class Spawning:
    r"""Draws from a child of its own for each number. Its state is only how many children there were."""

    def __init__(self, seed):
        self.parent = np.random.default_rng(seed)

    def standard_normal(self):
        return self.parent.bit_generator.seed_seq.spawn(1)[0].generate_state(1)[0] / 2**32


def draw(rng) -> float:
    if rng is None:
        return 0.0
    if isinstance(rng, np.random.SeedSequence):
        return rng.spawn(1)[0].generate_state(1)[0] / 2**32
    if isinstance(rng, torch.quasirandom.SobolEngine):
        return rng.draw(1).item()
    if isinstance(rng, torch.Generator):
        return torch.randn((), generator=rng).item()
    if isinstance(rng, random.Random):
        return rng.gauss(0, 1)
    return float(rng.standard_normal())


class Noisy(Dataset):
    r"""Measurements with noise that is drawn anew at each access."""

    def __init__(self, y, rng):
        self.y, self.rng = y, rng

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return {"y": self.y[i] + 0.01 * draw(self.rng)}


class ByGlobal(Noisy):
    def __getitem__(self, i):
        return {"y": self.y[i] + 0.01 * jitter()}


def jitter():
    return draw(GLOBAL)


class Shuffled(BatchSampler):
    r"""Batches in an order of its own."""

    def __init__(self, n, rng):
        super().__init__(range(n), 2, False)
        self.n, self.rng = n, rng

    def __iter__(self):
        order = sorted(range(self.n), key=lambda _: draw(self.rng))
        yield from (order[i : i + 2] for i in range(0, self.n, 2))

    def __len__(self):
        return self.n // 2


class Augmented(Noisy):
    r"""A data set whose augmentation is a function: a closure, a partial one, or a bound method."""

    def __init__(self, y, augment):
        super().__init__(y, None)
        self.augment = augment

    def __getitem__(self, i):
        return {"y": self.y[i] + 0.01 * self.augment()}


class Slotted:
    __slots__ = ("rng",)

    def __init__(self, rng):
        self.rng = rng

    def draw(self):
        return draw(self.rng)


class OfClass(Noisy):
    rng_of_all = np.random.default_rng(7)

    def __init__(self, y):
        self.y = y

    def __getitem__(self, i):
        return {"y": self.y[i] + 0.01 * draw(self.rng_of_all)}


class NoisyLoss(dinv.loss.MCLoss):
    def __init__(self, rng):
        super().__init__()
        self.parts = {"deep": [(rng,)]}

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) * (1 + 0.1 * draw(self.parts["deep"][0][0]))


def closure(rng):
    return lambda: draw(rng)


PLACES = {
    "data set": lambda y, rng: {"data": Noisy(y, rng)},
    "subset of a concatenation": lambda y, rng: {
        "data": torch.utils.data.Subset(torch.utils.data.ConcatDataset([Noisy(y, rng)]), range(len(y)))
    },
    "batch sampler": lambda y, rng: {"batch_sampler": Shuffled(len(y), rng)},
    "closure": lambda y, rng: {"data": Augmented(y, closure(rng))},
    "partial": lambda y, rng: {"data": Augmented(y, functools.partial(draw, rng))},
    "method of the generator": lambda y, rng: {"data": Augmented(y, rng.standard_normal)},
    "method of an object with slots": lambda y, rng: {"data": Augmented(y, Slotted(rng).draw)},
    "loss": lambda y, rng: {"loss": NoisyLoss(rng)},
    "collate_fn": lambda y, rng: {
        "collate_fn": lambda items: {"y": torch.stack([i["y"] for i in items]) + 0.01 * draw(rng)}
    },
    "global variable": lambda y, rng: {"data": ByGlobal(y, None)},
    "class": lambda y, rng: {"data": OfClass(y)},
}
CASES = [("data set", kind) for kind in MAKE] + [(place, "default_rng") for place in PLACES if place != "data set"]
CASES += [("batch sampler", "Random"), ("loss", "torch")]


def trainer(folder, epochs, place="data set", kind="default_rng", **kwargs):
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    GLOBAL.bit_generator.state = np.random.default_rng(5).bit_generator.state
    OfClass.rng_of_all = np.random.default_rng(7)
    model, physics, x, _ = imaging(batch=4, tol=1e-6)
    y = physics.A(x)
    parts = {"data": Noisy(y, torch.Generator().manual_seed(9)), "loss": dinv.loss.MCLoss()}
    parts |= PLACES[place](y, MAKE[kind]())
    order = (
        {"batch_sampler": parts["batch_sampler"]} if "batch_sampler" in parts else {"batch_size": 2, "shuffle": True}
    )
    loader = DataLoader(parts["data"], collate_fn=parts.get("collate_fn"), **order)
    return ResumableTrainer(
        model, physics, torch.optim.Adam(model.parameters(), lr=1e-2), loader, epochs=epochs, losses=parts["loss"],
        metrics=None, device="cpu", save_path=folder, verbose=False, **kwargs,
    )  # fmt: skip
