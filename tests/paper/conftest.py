r"""A scale of 16 x 16 pixels for the scripts of the paper's experiments, and a folder in which they may write."""

from __future__ import annotations

import sys
from pathlib import Path

import deepinv as dinv
import numpy as np
import pytest
import torch

from deepinv_deq.datasets import phantoms

FOLDER = Path(__file__).parents[2] / "examples" / "paper"
sys.path.insert(0, str(FOLDER))
import bound  # noqa: E402
import data  # noqa: E402
import models  # noqa: E402
import records  # noqa: E402
import search  # noqa: E402
import settings  # noqa: E402

EPOCHS = {method.epochs: 1 for method in models.METHODS.values() if method.epochs is not None}


@pytest.fixture
def tiny():
    r"""Sizes and epochs, which a test may change."""
    return {
        "ct": {"size": 16, "views": 60, "channels": data.CHANNELS, "batch": 4, "epochs": dict(EPOCHS)},
        "mri": {"size": 16, "acceleration": 4, "channels": data.CHANNELS, "batch": 4, "epochs": dict(EPOCHS)},
    }


@pytest.fixture
def lab(tmp_path, monkeypatch, tiny):
    r"""A folder with images, a scale that takes a second, and places for records of its own."""
    for name in data.FILES.values():
        np.savez(tmp_path / name, images=phantoms(10, 16)[:, 0].numpy())
    monkeypatch.setitem(data.SCALES, "small", tiny)
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(settings, "SETTINGS", tmp_path / "settings.json")
    monkeypatch.setattr(search, "TRIALS", tmp_path / "search")
    monkeypatch.setattr(bound, "BOUNDS", tmp_path / "bound")
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "runs" / "paper" / "dncnn-1.pt"
    weights.parent.mkdir(parents=True)
    net = dinv.models.DnCNN(1, 1, depth=3, nf=4, pretrained=None)
    options = {"in_channels": 1, "out_channels": 1, "depth": 3, "nf": 4}
    torch.save({"settings": options, "state_dict": net.state_dict()}, weights)
    return tmp_path
