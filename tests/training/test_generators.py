r"""A resumed run equals the uninterrupted one, whatever it draws from and wherever that is."""

from __future__ import annotations

import io
import itertools
import random
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from deepinv_deq.training import generators, latest_checkpoint
from tests.problems import weights
from tests.training.draws import CASES, MAKE, Augmented, Noisy, NoisyLoss, draw, trainer

pytestmark = pytest.mark.usefixtures("run_folders")


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


class Slots:
    __slots__ = ("__rng",)

    def __init__(self):
        self.__rng = torch.Generator()


def test_generators_in_private_slots_are_found():
    found, passed_over = generators.find([Slots()])
    assert len(found) == 1 and not passed_over


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
