r"""Ten pipelines of deepinv's gallery with the model swapped: training from the default start helps in each."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import pytest

from deepinv_deq import DEQReconstructor

FOLDER = Path(__file__).parents[1] / "examples" / "swap"


@pytest.fixture(scope="module")
def swap():
    r"""The modules of ``examples/swap``, whose names other examples have, too."""
    names = ("pipelines", "training", "table")
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


RECORD = json.loads((FOLDER / "record.json").read_text())


def test_the_record_has_all_pipelines_and_each_was_worth_it(swap):
    assert list(RECORD) == [f.__name__ for f in swap["pipelines"].PIPELINES.values()] and len(RECORD) == 10
    for name, row in RECORD.items():
        assert row["trained"] > max(row["linear"], row["untrained"]) + 0.3, name
        assert row["lines"] <= 2 and row["steps"] == 48, name
    assert swap["table"].render().count("\n") == 11


QUICK = ("supervised_inpainting", "equilibrium_deblurring", "r2r_denoising", "sure_denoising")
ALL = os.environ.get("DEEPINV_DEQ_GALLERY") == "full"  # three minutes of one core instead of one


@pytest.mark.parametrize("name", RECORD if ALL else QUICK)
@pytest.mark.filterwarnings("ignore")
def test_the_swapped_model_beats_the_linear_reconstruction_and_its_start(swap, name):
    function, training = getattr(swap["pipelines"], name), swap["training"]
    pipeline, theirs = training.build(function, True), training.build(function, False)
    assert isinstance(pipeline.model, DEQReconstructor) and not isinstance(theirs.model, DEQReconstructor)
    assert [type(a) for a in pipeline.losses[:-1]] == [type(a) for a in theirs.losses]
    assert training.lines_changed(function) == RECORD[name]["lines"]
    before = training.psnr(pipeline.model.eval(), pipeline)
    assert before == pytest.approx(RECORD[name]["untrained"], abs=0.05)
    after = training.psnr(training.train(pipeline, RECORD[name]["steps"]), pipeline)
    assert after > max(before, RECORD[name]["linear"]), (before, after)
