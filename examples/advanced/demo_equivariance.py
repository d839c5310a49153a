r"""
How equivariant is a trained model?
===================================

A reconstruction of a rotated patient should be the rotated reconstruction. Nothing in the architecture says so; how far does training lead there?
The measures of Tables 2 and 3 of the paper, of one slice. :doc:`/results` has the tables.
"""

# %%
# Two models
# ----------
#
# The shipped model for sparse-view CT, trained without ground truth, and the same iteration before that training.

import deepinv as dinv
import matplotlib.pyplot as plt
import torch

from deepinv_deq import DEGrad, DEQReconstructor, EquilibriumUNet, IterationEquivariance, PipelineEquivariance, Solver
from deepinv_deq.datasets import ct_slice
from deepinv_deq.physics import SparseLinearPhysics

size, views = 64, 30
x = ct_slice(size)
physics = SparseLinearPhysics.from_physics(
    dinv.physics.Tomography(angles=views, img_width=size, normalize=True, adjoint_via_backprop=True), (1, size, size)
)
models = {
    "before training": DEQReconstructor(
        DEGrad(EquilibriumUNet(pretrained="gray"), stepsize=1 / 51, data_weight=50.0),
        solver=Solver("anderson", max_iter=200, tol=1e-5, on_failure="ignore"),
    ).eval(),
    "trained without ground truth": DEQReconstructor.from_pretrained("ct-ei"),
}

# %%
# The two measures
# ----------------
#
# :class:`deepinv_deq.PipelineEquivariance` compares :math:`f(A T_g x)` with :math:`T_g f(A x)`, and
# :class:`deepinv_deq.IterationEquivariance` the learned operator with itself, :math:`F(T_g x, A T_g x)` with :math:`T_g F(x, A x)`. Both are deepinv
# metrics: give them to a Trainer. The default rotation is by 90°, which needs no interpolation. Higher is more equivariant.

for name, model in models.items():
    for metric in (PipelineEquivariance(), IterationEquivariance()):
        value = metric(x, x, physics=physics, model=model).item()
        print(f"{name}: {type(metric).__name__} {value:.1f} dB")

# %%
# Any angle
# ---------
#
# Views are 6° apart. A rotation by a multiple of that gives the scanner the same sinogram again, up to a shift; any other shows it what it did not
# measure. (Interpolation limits what can be reached in between, for every model alike.)

rotation = dinv.transform.Rotate(interpolation_mode="bilinear")
angles = list(range(0, 46, 3))
figure, axis = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
for name, model in models.items():
    values = [
        PipelineEquivariance(rotation, params={"theta": [angle]})(x, x, physics=physics, model=model).item()
        for angle in angles[1:]
    ]
    axis.plot(angles[1:], values, "o-", label=name)
axis.set(xlabel="angle of the rotation (degrees)", ylabel="equivariance of the pipeline (dB)")
axis.legend()
plt.show()

# %%
# Where they differ
# -----------------
#
# The difference between rotating before and after, for 90°.

figure, axes = plt.subplots(1, 2, figsize=(6.6, 3), layout="constrained")
for axis, (name, model) in zip(axes, models.items(), strict=True):
    with torch.no_grad():
        after = torch.rot90(model(physics.A(x), physics), 1, (-2, -1))
        before = model(physics.A(torch.rot90(x, 1, (-2, -1))), physics)
    shown = axis.imshow((before - after)[0, 0], cmap="RdBu", vmin=-0.1, vmax=0.1)
    axis.set(title=name, xticks=[], yticks=[])
figure.colorbar(shown, ax=axes, shrink=0.8)
plt.show()
