r"""
Equivariance of a trained model
===============================

The reconstruction of a rotated scan should be the rotated reconstruction. The architecture does not guarantee this. This example measures
how equivariant a model is before and after training, with the measures of Tables 2 and 3 of the paper.
"""

# %%
# Two models
# ----------
#
# The shipped model for sparse-view CT, trained without ground-truth CT images, and the same iteration before this training. The slice
# comes with pydicom (``pip install pydicom``).

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
before = DEQReconstructor(DEGrad(EquilibriumUNet(pretrained="gray"), stepsize=1 / 51, data_weight=50.0)).eval()
models = {"before training": before, "after training": DEQReconstructor.from_pretrained("ct-ei-small")}
for model in models.values():
    model.solver = Solver("anderson", max_iter=200, tol=1e-4)  # as accurate as these measures need

# %%
# The two measures
# ----------------
#
# :class:`deepinv_deq.PipelineEquivariance` compares :math:`f(A T_g x)` with :math:`T_g f(A x)`. :class:`deepinv_deq.IterationEquivariance`
# compares :math:`F(T_g x, A T_g x)` with :math:`T_g F(x, A x)`. Both are metrics for a Trainer. The default rotation is by 90°, which needs no
# interpolation. Higher is more equivariant. Training makes the iteration more equivariant, and the pipeline less. The page
# :doc:`/results` has the tables.

metrics = {"pipeline": PipelineEquivariance(), "iteration": IterationEquivariance()}
figure, axes = plt.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
for axis, (kind, metric) in zip(axes, metrics.items(), strict=True):
    values = [metric(x, x, physics=physics, model=model).item() for model in models.values()]
    bars = axis.barh(list(models), values, color=["tab:blue", "tab:orange"])
    axis.bar_label(bars, fmt="%.1f dB", label_type="center", color="white")
    axis.set(xlabel=f"equivariance of the {kind} (dB)")
axes[1].set_yticks([])
plt.show()

# %%
# Other angles
# ------------
#
# Views are 6° apart. A rotation by a multiple of 6° gives the same sinogram up to a shift. Any other angle gives new information. Interpolation
# limits the values at these angles, for all models.

# sphinx_gallery_thumbnail_number = 2

rotation = dinv.transform.Rotate(interpolation_mode="bilinear")
angles = list(range(0, 46, 3))
figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
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
# Where the reconstructions differ
# --------------------------------
#
# The difference between rotating before and after the reconstruction, by 90°.

figure, axes = plt.subplots(1, 2, figsize=(6.6, 3), layout="constrained")
for axis, (name, model) in zip(axes, models.items(), strict=True):
    with torch.no_grad():
        after = torch.rot90(model(physics.A(x), physics), 1, (-2, -1))
        before = model(physics.A(torch.rot90(x, 1, (-2, -1))), physics)
    shown = axis.imshow((before - after)[0, 0], cmap="RdBu", vmin=-0.1, vmax=0.1)
    axis.set(title=name, xticks=[], yticks=[])
figure.colorbar(shown, ax=axes, shrink=0.8, label="difference")
plt.show()
