r"""
Sparse-view CT without ground truth
===================================

The deep equilibrium model that ships as ``"ct-ei"`` was trained on 90 sinograms of 30 views each, and on nothing else: what it reconstructs,
it has to reconstruct from other views of it, too (:doc:`/guide/losses`). It has never seen a reconstruction. Here it meets a slice of another scanner, and goes on learning from that
slice's sinogram, by equivariant imaging :footcite:p:`chen2021equivariant`.
"""

# %%
# A slice and its sinogram
# ------------------------
#
# The slice comes with pydicom (``pip install deepinv-deq[dicom]``), cut to the circle that a scanner sees. On a CPU, the operator
# as a sparse matrix is some twenty times faster than the original.

import deepinv as dinv
import matplotlib.pyplot as plt
import torch

from deepinv_deq import DEGrad, DEQReconstructor, EquilibriumUNet, Solver
from deepinv_deq.datasets import ct_slice
from deepinv_deq.physics import SparseLinearPhysics

torch.manual_seed(0)
size, views = 64, 30
x = ct_slice(size)
physics = SparseLinearPhysics.from_physics(
    dinv.physics.Tomography(angles=views, img_width=size, normalize=True, adjoint_via_backprop=True), (1, size, size)
)
y = physics.A(x)

# %%
# Three reconstructions
# ---------------------
#
# Filtered back-projection; the same iteration around a denoiser that was trained on natural images and on no sinogram; and the
# shipped model, in one line.

model = DEQReconstructor.from_pretrained("ct-ei")
before = DEQReconstructor(
    DEGrad(EquilibriumUNet(pretrained="gray"), stepsize=1 / 51, data_weight=50.0),
    solver=Solver("anderson", max_iter=200, tol=1e-5, on_failure="ignore"),
)
with torch.no_grad():
    images = {
        "FBP": physics.fbp(y),
        "before training": before(y, physics),
        "trained without ground truth": model(y, physics),
    }
images["ground truth"] = x
print(model.forward_stat.outcome)

psnr = dinv.metric.PSNR()
figure, axes = plt.subplots(1, 4, figsize=(11, 3.2), layout="constrained")
for axis, (name, image) in zip(axes, images.items(), strict=True):
    axis.imshow(image[0, 0], cmap="gray", vmin=0, vmax=1)
    level = "" if name == "ground truth" else f"\n{psnr(image, x).item():.1f} dB"
    axis.set(title=name + level, xticks=[], yticks=[])
plt.show()

# %%
# What is left of the error
# -------------------------

figure, axes = plt.subplots(1, 3, figsize=(8.6, 3), layout="constrained")
for axis, (name, image) in zip(axes, images.items(), strict=False):
    shown = axis.imshow((image - x)[0, 0], cmap="RdBu", vmin=-0.2, vmax=0.2)
    axis.set(title=name, xticks=[], yticks=[])
figure.colorbar(shown, ax=axes, label="error", shrink=0.8)
plt.show()

# %%
# Training goes on
# ----------------
#
# No ground truth is needed, so a model can go on learning from the very sinogram that it is to reconstruct. A rotated slice is a slice: its
# measurements are those of this one by a scanner that is turned, here by half of the angle between two views. From them the model is to find its own
# reconstruction again, :doc:`as it was trained </guide/losses>`. Twenty steps of Adam.

model = DEQReconstructor.from_pretrained("ct-ei").train()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
consistency = dinv.loss.MCLoss()
angles = (torch.arange(views) + 0.5) * 180 / views
turned = SparseLinearPhysics.from_physics(
    dinv.physics.Tomography(angles=angles, img_width=size, normalize=True, adjoint_via_backprop=True), (1, size, size)
)
course = []
for _ in range(20):
    optimizer.zero_grad()
    x_net = model(y, physics)
    course.append(psnr(x_net.detach(), x).item())
    target = x_net.detach()
    equivariance = (model(turned.A(target), turned) - target).square().mean()
    (consistency(x_net=x_net, y=y, physics=physics, model=model).mean() + equivariance).backward()
    optimizer.step()

figure, axis = plt.subplots(figsize=(5.5, 3), layout="constrained")
axis.plot(course, "o-")
axis.set(xlabel="steps on this one sinogram", ylabel="PSNR (dB)")
plt.show()

# %%
# To train such a model from scratch, on your own images, see ``examples/ct/demo_sparse_view_ct.py``, and ``examples/paper`` for the
# run that this one comes from.
#
# .. footbibliography::
