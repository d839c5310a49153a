r"""The record of the tests of faults."""

from __future__ import annotations

import json

import pytest

from tests.faults.common import FULL, RECORD, TRIED


@pytest.fixture(scope="session", autouse=True)
def _record(request):
    r"""Writes down what was tried, if none of these tests failed: all of it, or the counts of the files that ran."""
    TRIED.clear()
    yield
    config = request.config
    single = config.getoption("keyword") or any("::" in name for name in config.args)
    some = any(name.endswith(".py") for name in config.args)
    if FULL and not single and not request.session.testsfailed:
        known = json.loads(RECORD.read_text()) if some and RECORD.exists() else {}
        RECORD.write_text(json.dumps({**known, **TRIED}, indent=1) + "\n")
