r"""What is said where deepinv is too old."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from deepinv_deq import _versions


def test_an_older_deepinv_is_named_before_anything_else_fails(tmp_path):
    found = tmp_path / "deepinv-0.3.7.dist-info"
    found.mkdir()
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: deepinv\nVersion: 0.3.7\n")
    (tmp_path / "deepinv.py").write_text("")  # with nothing of what is imported from it
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    run = subprocess.run(
        [sys.executable, "-c", "import deepinv_deq"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    last = run.stderr.strip().splitlines()[-1]
    assert last == (
        "ImportError: deepinv-deq needs deepinv >= 0.5, and found deepinv 0.3.7. Run: pip install --upgrade deepinv"
    )


@pytest.mark.parametrize("found", ["0.5", "0.5.0", "0.5.1rc1", "0.10.2", "1.0", "1.0.dev3+g12ab", "unknown"])
def test_versions_that_are_new_enough(monkeypatch, found):
    monkeypatch.setattr(_versions, "version", lambda name: found)
    _versions.require_deepinv()


@pytest.mark.parametrize("found", ["0.4", "0.4.99", "0.0.1", "0.4.0.dev1"])
def test_versions_that_are_too_old(monkeypatch, found):
    monkeypatch.setattr(_versions, "version", lambda name: found)
    with pytest.raises(ImportError, match=f"found deepinv {found}"):
        _versions.require_deepinv()


def test_a_deepinv_without_a_version_is_left_to_the_imports(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_versions, "version", missing)
    _versions.require_deepinv()
