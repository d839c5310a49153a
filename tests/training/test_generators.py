r"""A resumed run equals the uninterrupted one, whatever it draws from and wherever that is."""

from __future__ import annotations

import functools
import io
import itertools
import random
import warnings

import deepinv as dinv
import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from deepinv_deq.training import ResumableTrainer, generators, latest_checkpoint
from tests.problems import imaging

pytestmark = pytest.mark.usefixtures("run_folders")
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


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("place,kind", CASES)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, place, kind):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The state of")
        whole = trainer(tmp_path / "a", 4, place, kind)
        whole.train()
        trainer(tmp_path / "b", 2, place, kind).train()
        resumed = trainer(tmp_path / "b", 4, place, kind, resume=True)
        resumed.train()
    assert torch.equal(weights(whole.model), weights(resumed.model)) and resumed.loss_history == whole.loss_history
    other = trainer(
        tmp_path / "c", 4, place, kind, ckpt_pretrained=latest_checkpoint(tmp_path / "b").replace("_3", "_1")
    )
    assert other.resume is False


def test_the_draws_of_these_runs_matter(tmp_path, monkeypatch):
    trainer(tmp_path, 2).train()
    monkeypatch.setattr(generators, "set_state", lambda *_: None)
    resumed, whole = trainer(tmp_path, 4, resume=True), trainer(None, 4)
    resumed.train(), whole.train()
    assert not torch.equal(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize("kind", [kind for kind in MAKE if kind != "spawning"])  # which is no generator itself
def test_states_are_plain_and_exact(kind):
    rng = MAKE[kind]()
    draw(rng)
    state = generators.state_of(rng)
    ahead = [draw(rng) for _ in range(5)]
    other = MAKE[kind]()
    generators.set_state(other, state)
    assert [draw(other) for _ in range(5)] == ahead
    torch.save(state, buffer := io.BytesIO())
    buffer.seek(0)
    if kind == "SeedSequence":  # children cannot be taken back
        with pytest.raises(ValueError, match="has spawned 6 children, and 1 in the checkpoint: build the run anew"):
            generators.set_state(other, state)
        other = MAKE[kind]()
    generators.set_state(other, torch.load(buffer, weights_only=True))
    assert [draw(other) for _ in range(5)] == ahead


class Stream(Noisy):
    def __init__(self, y):
        self.y, self.indices = y, itertools.cycle(range(len(y)))

    def __getitem__(self, i):
        return {"y": self.y[next(self.indices)]}


@pytest.mark.parametrize(
    "change,named",
    [
        (lambda y: {"dataset": Noisy(y, random.SystemRandom())}, r"train_dataloader\[0\].dataset.rng .SystemRandom"),
        (lambda y: {"dataset": Stream(y)}, r"train_dataloader\[0\].dataset.indices .an iterator, cycle"),
        (
            lambda y: {"dataset": Augmented(y, lambda *, some={np.random.default_rng(0)}: len(some))},
            r"\['some'\] .a set",
        ),
        (
            lambda y: {"dataset": Noisy(y, None), "num_workers": 1, "persistent_workers": True},
            r"train_dataloader\[0\] .persistent_workers=True",
        ),
    ],
)
def test_what_cannot_be_kept_is_named(tmp_path, change, named):
    run = trainer(tmp_path, 2)
    run.train_dataloader = DataLoader(batch_size=2, **change(run.train_dataloader.dataset.y))
    with pytest.warns(UserWarning, match=f"{named}.*will not repeat an uninterrupted one bit for bit"):
        run.setup_train()


@pytest.mark.parametrize("workers", [0, 2])
def test_generators_read_by_worker_processes(tmp_path, workers):
    def run(folder, epochs, **kwargs):
        made = trainer(folder, epochs, **kwargs)
        data = made.train_dataloader.dataset
        made.train_dataloader = DataLoader(
            data, 2, num_workers=workers, multiprocessing_context="fork" if workers else None
        )
        made.train()
        return weights(made.model)

    whole = run(tmp_path / "a", 3)
    run(tmp_path / "b", 2)
    assert torch.equal(whole, run(tmp_path / "b", 3, resume=True))


def test_another_number_of_generators_is_named_and_changes_nothing(tmp_path):
    trainer(tmp_path, 2).train()
    fewer, more, other = (trainer(tmp_path, 4, resume=True) for _ in range(3))
    fewer.train_dataloader.dataset.rng = None
    more.losses = NoisyLoss(np.random.default_rng(0))
    other.train_dataloader.dataset.rng = random.Random(0)
    place = r"train_dataloader\[0\].dataset.rng"
    for run, message in (
        (fewer, rf"states of 1 random generators, and the run has 0 \(only in the checkpoint: {place}\)"),
        (more, r"states of 1 random generators, and the run has 2 \(only in the run: losses\[0\].parts\['deep'\]"),
        (other, rf"run of another kind: {place}"),
    ):
        before = weights(run.model)
        with pytest.raises(ValueError, match=f"ckp_1.pth.tar has the {message}" if run is not other else message):
            run.train()
        assert torch.equal(before, weights(run.model)) and run.optimizer.state_dict()["state"] == {}


def test_a_checkpoint_of_an_older_version_says_so(tmp_path):
    trainer(tmp_path, 2).train()
    path = latest_checkpoint(tmp_path)
    content = torch.load(path, weights_only=True)
    del content["_digest"]
    content["rng"]["generators"] = [torch.Generator().get_state()]
    torch.save(content, path)
    with pytest.raises(ValueError, match="deepinv-deq 0.1.: the run cannot be resumed.*ckpt_pretrained"):
        trainer(tmp_path, 4, resume=True).train()
    trainer(tmp_path / "other", 4, ckpt_pretrained=path).train()


def test_searching_is_bounded_and_says_where_it_ends(tmp_path, monkeypatch):
    found, lost = generators.find({"big": list(range(10**6)), "rng": MAKE["Random"]()})
    assert list(found) == ["['rng']"] and not lost
    monkeypatch.setattr(generators, "_LIMIT", 10)
    _, lost = generators.find([[object()] for _ in range(100)])
    assert len(lost) == 1 and "after 10 objects" in lost[0]
    knot: list = []
    knot.append(knot)
    assert generators.find(knot) == ({}, [])
