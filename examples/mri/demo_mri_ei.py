r"""
Accelerated MRI without ground truth
====================================

The model ``"mri-ei"`` ships with the package. It was trained on noisy k-space of cardiac slices of 256×256 pixels, eight times undersampled, without ground-truth MR images.
The losses were equivariant imaging and Stein's unbiased risk estimate (SURE). Its denoiser had been pretrained on natural images. Here it
reconstructs a smaller slice of a head.
"""

# %%
# k-space
# -------
#
# The slice comes with Matplotlib. It has 96×96 pixels, with real and imaginary part in two channels. The Gaussian mask samples the low frequencies
# fully. The noise in k-space has a standard deviation of 0.05.

import deepinv as dinv
import matplotlib.pyplot as plt
import torch

from deepinv_deq import DEProx, DEQReconstructor, EquilibriumUNet, Solver
from deepinv_deq.datasets import mr_slice

size = 96
image = torch.nn.functional.interpolate(mr_slice(), size=(size, size), mode="area")
x = torch.cat([image, torch.zeros_like(image)], dim=1)
rng = torch.Generator().manual_seed(0)
mask = dinv.physics.generator.GaussianMaskGenerator((size, size), acceleration=8, rng=rng).step()["mask"]
noise = dinv.physics.GaussianNoise(0.05, rng=torch.Generator().manual_seed(0))
physics = dinv.physics.MRI(mask=mask, img_size=(2, size, size), noise_model=noise)
y = physics(x)

figure, axes = plt.subplots(1, 2, figsize=(6, 3.2), layout="constrained")
axes[0].imshow(mask[0, 0], cmap="gray")
axes[0].set(title="sampled frequencies", xticks=[], yticks=[])
shown = axes[1].imshow(y[0].norm(dim=0).clamp(min=1e-3).log10(), cmap="magma")
axes[1].set(title="measurements", xticks=[], yticks=[])
figure.colorbar(shown, ax=axes[1], label="logarithm of the magnitude")
plt.show()

# %%
# Reconstructions
# ---------------

# sphinx_gallery_thumbnail_number = 2

model = DEQReconstructor.from_pretrained("mri-ei")
before = DEQReconstructor(
    DEProx(EquilibriumUNet(pretrained="complex")),
    solver=Solver("anderson", max_iter=100, tol=1e-3),
).eval()
with torch.no_grad():
    images = {
        "zero-filled": physics.A_adjoint(y),
        "DEQ before training": before(y, physics),
        "DEQ after training": model(y, physics),
    }
images["ground truth"] = x
print(model.forward_stat.outcome)

psnr = dinv.metric.PSNR(complex_abs=True)
magnitudes = {name: image[0].norm(dim=0) for name, image in images.items()}
figure, axes = plt.subplots(2, 2, figsize=(6, 6.6), layout="constrained")
for axis, (name, magnitude) in zip(axes.flat, magnitudes.items(), strict=True):
    axis.imshow(magnitude, cmap="gray", vmin=0, vmax=1)
    level = "" if name == "ground truth" else f": {psnr(images[name], x).item():.1f} dB"
    axis.set_title(name + level, fontsize="medium")
    axis.set(xticks=[], yticks=[])
plt.show()

# %%
# The errors of the magnitudes.

figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
for axis, name in zip(axes, list(images)[:3], strict=True):
    shown = axis.imshow(magnitudes[name] - magnitudes["ground truth"], cmap="RdBu", vmin=-0.3, vmax=0.3)
    axis.set(title=name, xticks=[], yticks=[])
figure.colorbar(shown, ax=axes, label="error")
plt.show()

# %%
# The certificate
# ---------------
#
# Does the reconstruction depend on the start? The certificate measures it (:doc:`/guide/fixed_points`).

print(model.certify(y, physics, x_gt=x, metric=psnr).outcome)

# %%
# Accuracy is a setting
# ---------------------
#
# The same model, solved to several tolerances. The PSNR settles once the fixed point is reached. A lower tolerance then costs evaluations and changes nothing.

tolerances, evaluations, levels = (3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4), [], []
for tol in tolerances:
    model.solver = Solver("anderson", max_iter=200, tol=tol, on_failure="ignore")
    with torch.no_grad():
        levels.append(psnr(model(y, physics), x).item())
    evaluations.append(model.forward_stat.evaluations)

figure, axes = plt.subplots(2, 1, figsize=(5, 5), sharex=True, layout="constrained")
axes[0].semilogx(tolerances, levels, "o-")
axes[0].set(ylabel="PSNR (dB)")
axes[1].semilogx(tolerances, evaluations, "o-")
axes[1].set(xlabel="tolerance of the forward solve", ylabel="evaluations")
axes[1].invert_xaxis()
plt.show()
