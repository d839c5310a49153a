r"""Folders of runs that are named by a count: deepinv names them by the second, and these are started faster."""

import importlib
import itertools

import pytest


@pytest.fixture
def run_folders(monkeypatch):
    count = itertools.count()
    module = importlib.import_module("deepinv.training.trainer")
    monkeypatch.setattr(module, "get_timestamp", lambda: f"24-01-01-00:00:{next(count):02d}")
