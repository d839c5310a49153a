r"""Forged, foreign and damaged checkpoints: their errors name the file, and nothing changes."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch

from deepinv_deq.files import DIGEST, digest
from deepinv_deq.training import latest_checkpoint
from deepinv_deq.training.checkpoints import read_checkpoint
from tests.saved_files import flips
from tests.training.checkpoints import finished, run, whole  # noqa: F401
from tests.training.test_resuming import trainer

pytestmark = pytest.mark.usefixtures("run_folders")

FULL = os.environ.get("DEEPINV_DEQ_FAULTS") == "full"


# Forged and foreign checkpoints -----------------------------------------------------------------------------------------


def rewrite(path, change):
    content = torch.load(path, weights_only=True)
    del content[DIGEST]
    change(content)
    torch.save(content, path)


WRONG = {
    "weights that are no tensors": lambda c: c["state_dict"].update({next(iter(c["state_dict"])): 3}),
    "a list of weights": lambda c: c.update(state_dict=[torch.zeros(1)]),
    "numbered weights": lambda c: c.update(state_dict={1: torch.zeros(1)}),
    "an epoch that is no number": lambda c: c.update(epoch="2"),
    "a negative epoch": lambda c: c.update(epoch=-1),
    "an epoch of nothing": lambda c: c.update(epoch=None),
    "an optimiser that is a number": lambda c: c.update(optimizer=1),
    "a scheduler that is a list": lambda c: c.update(scheduler=[]),
    "histories that are numbers": lambda c: c.update(loss={"MCLoss": 1.0}),
    "a config that is a string": lambda c: c.update(config="alpha"),
    "generators that are a tensor": lambda c: c.update(rng=torch.zeros(3)),
    "a scaler that is nothing": lambda c: c.update(scaler=None),
}
MISFITS = {
    "another shape": lambda c: c["state_dict"].update(
        {k: torch.zeros(7) for k in c["state_dict"] if k.endswith("weight")}
    ),
    "weights that are missing": lambda c: c["state_dict"].popitem(),
    "an optimiser without groups": lambda c: c["optimizer"].update(param_groups=[]),
    "an optimiser of nothing": lambda c: c.update(optimizer={}),
    "a state of NumPy of another kind": lambda c: c["rng"].update(numpy={"bit_generator": "PCG64", "state": {}}),
    "a state of PyTorch that is too short": lambda c: c["rng"].update(torch=torch.zeros(3, dtype=torch.uint8)),
    "a state of Python that is too short": lambda c: c["rng"].update(python=(3, (1, 2), None)),
    "no state of NumPy": lambda c: c["rng"].pop("numpy"),
    "a private state of another type": lambda c: next(iter(c["rng"]["generators"].values())).update(state="x"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_values_of_a_wrong_type_name_the_file(run, kind):
    path = latest_checkpoint(run)
    rewrite(path, WRONG[kind])
    with pytest.raises(ValueError, match="ckp_2.pth.tar is no checkpoint of a Trainer"):
        read_checkpoint(path)
    with pytest.raises(ValueError, match="ckp_2.pth.tar is no checkpoint of a Trainer"):
        trainer(None, 5, ckpt_pretrained=path).train()
    with pytest.warns(UserWarning, match="broken checkpoint .*ckp_2"):
        assert latest_checkpoint(run).endswith("ckp_1.pth.tar")


def test_histories_of_another_form_in_a_foreign_checkpoint_do_not_matter(run):
    path = latest_checkpoint(run)
    rewrite(path, lambda c: (c.pop("rng"), c.update(loss=[0.5], eval_metrics=3)))
    tuned = trainer(None, 4, ckpt_pretrained=path)
    tuned.train()
    assert len(tuned.loss_history["MCLoss"]) == 1  # from the fourth epoch on


def everything(run):
    return digest([run.model.state_dict(), run.optimizer.state_dict(), run.scheduler.state_dict(), run.loss_history])


@pytest.mark.parametrize("kind", MISFITS)
def test_what_does_not_fit_names_the_file_and_changes_nothing(run, kind, monkeypatch):
    path = latest_checkpoint(run)
    rewrite(path, MISFITS[kind])
    resumed, before = trainer(run, 5, resume=True), []
    load = type(resumed).load_model

    def watched(self, *args, **kwargs):
        before.append((everything(self), torch.get_rng_state()))
        return load(self, *args, **kwargs)

    monkeypatch.setattr(type(resumed), "load_model", watched)
    with pytest.raises(ValueError, match="ckp_2.pth.tar does not fit this run"):
        resumed.train()
    assert everything(resumed) == before[0][0] and resumed.epoch_start == 0
    assert torch.equal(torch.get_rng_state(), before[0][1])


@pytest.mark.parametrize("key", ["optimizer", "scheduler", "loss", "scaler"])
def test_a_run_is_not_resumed_without_a_part_of_its_state(run, key):
    rewrite(latest_checkpoint(run), lambda c: c.pop(key))
    with pytest.raises(ValueError, match=f"was not saved by a ResumableTrainer: it has no {key} to resume from"):
        trainer(run, 5, resume=True).train()


def test_a_changed_weight_generator_or_setting_is_refused(run):
    path = latest_checkpoint(run)
    whole = torch.load(path, weights_only=True)
    for key, change in {
        "state_dict": lambda c: next(iter(c["state_dict"].values())).flatten()[:1].mul_(1 + 1e-15),
        "rng": lambda c: c["rng"]["torch"][100:101].bitwise_xor_(1),
        "optimizer": lambda c: c["optimizer"]["param_groups"][0].update(lr=2e-3),
        "config": lambda c: c["config"].update(alpha=1),
    }.items():
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"can be trusted.*digest of '{key}' is wrong"):
            read_checkpoint(path)
        torch.save(whole, path)
    read_checkpoint(path)


@pytest.mark.skipif(not FULL, reason="half a million files take minutes: DEEPINV_DEQ_FAULTS=full")
@pytest.mark.filterwarnings("ignore")
def test_every_single_bit_of_the_checkpoint_of_a_run(run):
    data = Path(latest_checkpoint(run)).read_bytes()
    content = torch.load(io.BytesIO(data), weights_only=True)
    del content[DIGEST]
    detected, harmless = flips(data, digest(content))
    print(f"{8 * len(data)} bits: {detected} detected, {harmless} harmless")
    assert detected + harmless == 8 * len(data)


def test_settings_that_could_not_be_saved_are_named_before_training(tmp_path):
    with pytest.raises(TypeError, match=r"config\['loss'\] is a builtins.builtin_function_or_method"):
        trainer(tmp_path, 2, config={"loss": print}).train()
    run = trainer(tmp_path, 2)
    run.optimizer.param_groups[0]["lr"] = __import__("numpy").float64(1e-3)
    with pytest.raises(TypeError, match=r"optimizer.state_dict\(\)\['param_groups'\]\[0\]\['lr'\] is a numpy.float64"):
        run.train()
    run = trainer(tmp_path, 2)
    run.train()
    with pytest.raises(TypeError, match=r"state\['mine'\] is a builtins.object"):
        run.save_model("mine.pth.tar", 1, {"mine": object()})
    run.save_model("mine.pth.tar", 1, {"mine": 3})
    assert read_checkpoint(Path(run.save_path) / "mine.pth.tar")["mine"] == 3
    assert not list(tmp_path.rglob("*.part"))
