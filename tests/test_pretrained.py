r"""Whole models in files."""

from __future__ import annotations

import deepinv as dinv
import pytest
import torch
from torch import nn

from deepinv_deq import (
    DEADMM,
    DEHQS,
    DEGrad,
    DEProx,
    DEQReconstructor,
    EquilibriumUNet,
    ModularIDHook,
    Solver,
    pretrained,
)
from deepinv_deq.datasets import ct_slice, mr_slice
from deepinv_deq.files import load_intact
from deepinv_deq.physics import SparseLinearPhysics
from tests.problems import imaging, mri


@pytest.mark.parametrize("template", [DEGrad, DEProx])
@pytest.mark.parametrize("learned", [False, True])
def test_saved_model_is_the_same_model(tmp_path, template, learned):
    torch.manual_seed(0)
    net = EquilibriumUNet(2, channels=(4, 8))
    torch.nn.init.normal_(net.Conv_1x1.weight, std=0.01)
    model = DEQReconstructor(
        template(net, stepsize=0.4, data_weight=1.5, learn_stepsize=learned, sigma=torch.tensor(0.1)),
        solver=Solver("anderson", max_iter=77, tol=2e-5, on_failure="ignore"),
        hook=ModularIDHook(Solver("broyden", tol=3e-3), mode="jfb"),
    )
    model.save_pretrained(tmp_path / "model.pt", data="somewhere")
    loaded = DEQReconstructor.from_pretrained(tmp_path / "model.pt")
    assert not loaded.training and loaded.solver == model.solver and loaded.hook.solver == model.hook.solver
    assert loaded.hook.mode == "jfb" and isinstance(loaded.iteration.stepsize, nn.Parameter) == learned
    physics = mri()
    y = physics(torch.rand(2, 2, 16, 16))
    torch.testing.assert_close(loaded(y, physics), model.eval()(y, physics), rtol=0, atol=0)
    other = DEQReconstructor.from_pretrained(tmp_path / "model.pt", solver=Solver("broyden", max_iter=3))
    assert other.solver.method == "broyden" and not list(tmp_path.glob("*.part"))


def test_file_of_something_else_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No weights 'nothing'"):
        DEQReconstructor.from_pretrained("nothing")
    denoiser = tmp_path / "denoiser.pt"
    torch.save({"settings": {}, "state_dict": {}}, denoiser)
    with pytest.raises(ValueError, match="is no DEQReconstructor.*EquilibriumUNet"):
        DEQReconstructor.from_pretrained(denoiser)
    model, *_ = imaging()
    with pytest.raises(TypeError, match="model.state_dict"):
        model.save_pretrained(tmp_path / "model.pt")
    good = DEQReconstructor(DEProx(EquilibriumUNet(2, channels=(4, 8))))
    good.save_pretrained(tmp_path / "good.pt")
    whole = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut.pt holds no weights"):
        DEQReconstructor.from_pretrained(tmp_path / "cut.pt")


def test_shipped_models_reconstruct():
    x = ct_slice(64)
    tomography = dinv.physics.Tomography(angles=30, img_width=64, normalize=True, adjoint_via_backprop=True)
    physics = SparseLinearPhysics.from_physics(tomography, (1, 64, 64))
    psnr, y = dinv.metric.PSNR(), physics.A(x)
    for name in ("ct-ei", "ct-ei-small"):
        with torch.no_grad():
            assert psnr(DEQReconstructor.from_pretrained(name)(y, physics), x) > psnr(physics.fbp(y), x) + 4
    model = DEQReconstructor.from_pretrained("mri-ei")
    rng = torch.Generator().manual_seed(0)
    mask = dinv.physics.generator.GaussianMaskGenerator((96, 96), acceleration=8, rng=rng).step()["mask"]
    noise = dinv.physics.GaussianNoise(0.05, rng=rng)
    physics, psnr = (
        dinv.physics.MRI(mask=mask, img_size=(2, 96, 96), noise_model=noise),
        dinv.metric.PSNR(complex_abs=True),
    )
    image = torch.nn.functional.interpolate(mr_slice(), size=(96, 96), mode="area")
    x = torch.cat([image, torch.zeros_like(image)], dim=1)
    with torch.no_grad():
        y = physics(x)
        assert psnr(model(y, physics), x) > psnr(physics.A_adjoint(y), x) + 1
    assert model.forward_stat.converged.all()


class Widened(DEGrad):
    r"""An iteration with one more setting, as a later version may have it."""

    def __init__(self, denoiser, *, stepsize=1.0, learn_stepsize=False, data_weight=1.0, relaxation=1.0, sigma=None):
        super().__init__(
            denoiser, stepsize=stepsize, learn_stepsize=learn_stepsize, data_weight=data_weight, sigma=sigma
        )
        self.relaxation = relaxation

    def forward(self, x, physics, *constants):
        return x + self.relaxation * (super().forward(x, physics, *constants) - x)


@pytest.mark.parametrize("template", [DEHQS, DEADMM, Widened])
def test_settings_of_any_iteration_are_kept(tmp_path, monkeypatch, template):
    monkeypatch.setitem(pretrained.ITERATIONS, "Widened", Widened)
    more = {"relaxation": 0.75} if template is Widened else {}
    iteration = template(EquilibriumUNet(2, channels=(4, 8)), stepsize=0.3, data_weight=2.0, **more)
    context = {} if template is Widened else {"context": False}
    kept = pretrained.settings_of(iteration)
    assert kept == pytest.approx({"stepsize": 0.3, "learn_stepsize": False, "data_weight": 2.0} | more | context)
    DEQReconstructor(iteration).save_pretrained(tmp_path / "model.pt")
    loaded = DEQReconstructor.from_pretrained(tmp_path / "model.pt")
    assert type(loaded.iteration) is template and pretrained.settings_of(loaded.iteration) == kept


def test_setting_that_cannot_be_read_back_is_an_error(tmp_path, monkeypatch):
    class Forgetful(DEProx):
        def __init__(self, denoiser, *, secret=3):
            super().__init__(denoiser)

    monkeypatch.setitem(pretrained.ITERATIONS, "Forgetful", Forgetful)
    model = DEQReconstructor(Forgetful(EquilibriumUNet(2, channels=(4, 8))))
    with pytest.raises(TypeError, match="The argument secret of Forgetful must be an attribute of the same name"):
        model.save_pretrained(tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


def test_file_of_version_0_1_still_loads(tmp_path):
    model = DEQReconstructor(DEGrad(EquilibriumUNet(2, channels=(4, 8)), stepsize=0.4, learn_stepsize=True))
    model.save_pretrained(tmp_path / "new.pt")
    saved = load_intact(tmp_path / "new.pt")
    for name in ("contraction", "context_channels", "dim"):
        del saved["denoiser"][name]
    saved["learn_stepsize"] = saved.pop("settings")["learn_stepsize"]
    torch.save(saved, tmp_path / "old.pt")
    old = DEQReconstructor.from_pretrained(tmp_path / "old.pt")
    assert isinstance(old.iteration.stepsize, nn.Parameter) and old.iteration.stepsize.item() == pytest.approx(0.4)
    assert old.iteration.denoiser.settings["contraction"] == 1.0


@pytest.mark.parametrize("change", [{"iteration": "DEUnknown"}, {"settings": {"not_yet": 1}}])
def test_file_of_a_later_version_says_so(tmp_path, change):
    DEQReconstructor(DEGrad(EquilibriumUNet(2, channels=(4, 8)))).save_pretrained(tmp_path / "new.pt")
    torch.save(load_intact(tmp_path / "new.pt") | change, tmp_path / "later.pt")
    with pytest.raises(ValueError, match="DEUnknown|has no not_yet here"):
        DEQReconstructor.from_pretrained(tmp_path / "later.pt")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_are_kept(tmp_path, dtype):
    model = DEQReconstructor(DEGrad(EquilibriumUNet(1, channels=(4, 8)), stepsize=0.1)).to(dtype)
    nn.init.normal_(model.iteration.denoiser.Conv_1x1.weight, std=0.1)
    model.save_pretrained(tmp_path / "model.pt")
    loaded = DEQReconstructor.from_pretrained(tmp_path / "model.pt")
    saved, found = model.state_dict(), loaded.state_dict()
    assert all(found[k].dtype == t.dtype and torch.equal(found[k], t) for k, t in saved.items())
    weights = [p for p in loaded.parameters() if p.ndim == 4]
    assert all(w.dtype == dtype and w.is_contiguous(memory_format=torch.channels_last) for w in weights)


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("learned", [False, True])
def test_a_stepsize_per_channel_is_kept(tmp_path, shape, learned):
    stepsize = torch.linspace(0.3, 0.5, torch.Size(shape).numel()).reshape(shape)
    model = DEQReconstructor(DEGrad(EquilibriumUNet(2, channels=(4, 8)), stepsize=stepsize, learn_stepsize=learned))
    model.save_pretrained(tmp_path / "model.pt")
    found = DEQReconstructor.from_pretrained(tmp_path / "model.pt").iteration.stepsize
    assert torch.equal(found, stepsize) and isinstance(found, nn.Parameter) == learned


def test_wrong_settings_are_not_the_fault_of_the_file():
    with pytest.raises(TypeError, match="unexpected keyword argument 'solvr'"):
        DEQReconstructor.from_pretrained("ct-ei-small", solvr=Solver())
    with pytest.raises(ValueError, match="^warm_starts"):
        DEQReconstructor.from_pretrained("ct-ei-small", warm_starts=-1)
    with pytest.raises(TypeError, match="^solver must be a Solver"):
        DEQReconstructor.from_pretrained("ct-ei-small", solver="anderson")
