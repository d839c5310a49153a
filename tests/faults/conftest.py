r"""The record of the tests of faults."""

from __future__ import annotations

import json

import pytest

from tests.faults.common import FULL, RECORD, TRIED


@pytest.fixture(scope="session", autouse=True)
def _record(request):
    r"""Writes down what was tried, if all of these tests ran and none failed: a part of them must not replace the record of all."""
    TRIED.clear()
    yield
    config = request.config
    some = config.getoption("keyword") or any("::" in name or name.endswith(".py") for name in config.args)
    if FULL and not some and not request.session.testsfailed:
        RECORD.write_text(json.dumps(TRIED, indent=1) + "\n")
