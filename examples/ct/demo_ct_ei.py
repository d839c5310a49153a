r"""
The shipped CT model on another scanner
=======================================

The model ``"ct-ei"`` ships with the package. It was trained on 90 sinograms of 50 views each (128×128 pixels), without ground-truth CT images. Its
denoiser had been pretrained on natural images. Here the model reconstructs a slice of another scanner, with 30 views and 64×64 pixels. Then
it continues to learn from the sinogram of this slice alone, by equivariant imaging.
"""

# %%
# A slice and its sinogram
# ------------------------
#
# The slice comes with pydicom (``pip install pydicom``). On a CPU, the sparse matrix is more than ten times as fast
# as the original (:doc:`/cost`).

import deepinv as dinv
import matplotlib.pyplot as plt
import torch

from deepinv_deq import DEGrad, DEQReconstructor, EquilibriumUNet, Solver
from deepinv_deq.datasets import ct_slice
from deepinv_deq.losses import TurnedOperatorLoss
from deepinv_deq.physics import SparseLinearPhysics

torch.manual_seed(0)
size, views = 64, 30


def scanner(angles):
    r"""Parallel-beam tomography, as a sparse matrix."""
    original = dinv.physics.Tomography(angles=angles, img_width=size, normalize=True, adjoint_via_backprop=True)
    return SparseLinearPhysics.from_physics(original, (1, size, size))


angles = torch.arange(views) * 180 / views
x = ct_slice(size)
physics = scanner(angles)
y = physics.A(x)

# %%
# Reconstructions
# ---------------
#
# Filtered back-projection (FBP), the iteration around the pretrained denoiser before any training on sinograms, and the shipped model.

model = DEQReconstructor.from_pretrained("ct-ei")
before = DEQReconstructor(
    DEGrad(EquilibriumUNet(pretrained="gray"), stepsize=1 / 51, data_weight=50.0),
    solver=Solver("anderson", max_iter=100, tol=1e-4),
).eval()
with torch.no_grad():
    images = {
        "FBP": physics.fbp(y),
        "DEQ before training": before(y, physics),
        "DEQ after training": model(y, physics),
    }
images["ground truth"] = x
print(model.forward_stat.outcome)

psnr = dinv.metric.PSNR()
figure, axes = plt.subplots(2, 2, figsize=(6, 6.6), layout="constrained")
for axis, (name, image) in zip(axes.flat, images.items(), strict=True):
    axis.imshow(image[0, 0], cmap="gray", vmin=0, vmax=1)
    level = "" if name == "ground truth" else f": {psnr(image, x).item():.1f} dB"
    axis.set_title(name + level, fontsize="medium")
    axis.set(xticks=[], yticks=[])
plt.show()

# %%
# Reconstruction minus ground truth.

figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
for axis, name in zip(axes, list(images)[:3], strict=True):
    shown = axis.imshow((images[name] - x)[0, 0], cmap="RdBu", vmin=-0.2, vmax=0.2)
    axis.set(title=name, xticks=[], yticks=[])
figure.colorbar(shown, ax=axes, label="error")
plt.show()

# %%
# The certificate
# ---------------
#
# Does the reconstruction depend on the start? The certificate measures it (:doc:`/guide/fixed_points`).

print(model.certify(y, physics, x_gt=x).outcome)

# %%
# Learning from one sinogram
# --------------------------
#
# This is equivariant imaging :footcite:p:`chen2021equivariant` with a turned operator. Measuring a rotated slice equals measuring the
# slice with the scanner rotated the opposite way. The loss measures the reconstruction with a scanner that is turned by half of the angle
# between two views. From these measurements the model must recover its own reconstruction (:doc:`/guide/losses`). No ground truth is
# involved. The curve shows the PSNR before each of ten steps of Adam. The ground truth is used for this curve only.

model.train()
model.solver = Solver("anderson", max_iter=100, tol=1e-4)  # looser than 3e-6: faster steps, 0.1 dB different
optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
losses = [dinv.loss.MCLoss(), TurnedOperatorLoss([scanner(angles + 90 / views)])]
course = []
for _ in range(10):
    optimizer.zero_grad()
    x_net = model(y, physics)
    course.append(psnr(x_net.detach(), x).item())
    sum(loss(x_net=x_net, y=y, physics=physics, model=model).mean() for loss in losses).backward()
    optimizer.step()

figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
axis.plot(course, "o-")
axis.set(xlabel="steps on this sinogram", ylabel="PSNR (dB)", title="PSNR of the reconstruction during training")
plt.show()

# %%
# To train such a model on your own images, run ``examples/ct/demo_sparse_view_ct.py``. The training of the shipped model is a command of
# ``examples/paper``.
#
# .. footbibliography::
