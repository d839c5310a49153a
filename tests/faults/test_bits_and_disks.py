r"""Every bit of a checkpoint, and full disks: the tests of ``tests/test_files.py`` and ``tests/training``, counted."""

from __future__ import annotations

import pytest

from tests.faults.common import BITS, FULL, FULL_DISKS, TRIED
from tests.saved_files import bits_of_a_checkpoint
from tests.training.checkpoints import finished  # noqa: F401
from tests.training.conftest import run_folders  # noqa: F401
from tests.training.test_checkpoints import full_disk_runs, needs_mount, small_disk  # noqa: F401

pytestmark = pytest.mark.skipif(not FULL, reason="these run in tests/test_files.py and tests/training already")


@pytest.mark.parametrize("legacy", [False, True])
def test_every_bit_of_a_checkpoint(legacy):
    TRIED[BITS] += sum(bits_of_a_checkpoint(legacy))


@needs_mount
def test_full_disks(small_disk, tmp_path, finished, run_folders):  # noqa: F811
    TRIED[FULL_DISKS] += full_disk_runs(small_disk, tmp_path, finished, [*range(10)])[1]
