r"""
Accelerated MRI without ground truth
====================================

The model that ships as ``"mri-ei"`` was trained on noisy k-space of cardiac slices, eight times undersampled, with equivariant
imaging and Stein's unbiased risk estimate. No image was ever shown to it. Here it reconstructs a slice of a head.
"""

# %%
# k-space
# -------
#
# A slice that ships with Matplotlib, at 96×96 pixels, real and imaginary part in two channels; a fixed Gaussian mask with the
# low frequencies fully sampled; noise of standard deviation 0.05 in k-space.

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

# %%
# Reconstructions
# ---------------

model = DEQReconstructor.from_pretrained("mri-ei")
before = DEQReconstructor(
    DEProx(EquilibriumUNet(pretrained="complex")),
    solver=Solver("anderson", max_iter=100, tol=1e-3, on_failure="ignore"),
)
with torch.no_grad():
    images = {
        "zero-filled": physics.A_adjoint(y),
        "before training": before(y, physics),
        "trained without ground truth": model(y, physics),
    }
images["ground truth"] = x
print(model.forward_stat.outcome)

psnr = dinv.metric.PSNR(complex_abs=True)
figure, axes = plt.subplots(1, 5, figsize=(13, 3.2), layout="constrained")
axes[0].imshow(mask[0, 0], cmap="gray")
axes[0].set(title="what is measured", xticks=[], yticks=[])
for axis, (name, shown) in zip(axes[1:], images.items(), strict=True):
    axis.imshow(shown[0].norm(dim=0), cmap="gray", vmin=0, vmax=1)
    level = "" if name == "ground truth" else f"\n{psnr(shown, x).item():.1f} dB"
    axis.set(title=name + level, xticks=[], yticks=[])
plt.show()

# %%
# Accuracy is a setting
# ---------------------
#
# The same model, solved to other tolerances. It was trained at 0.003: where a solve stops earlier, the fixed point is not there yet;
# going on costs evaluations and changes little.

figure, axis = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
for tol in (3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3):
    model.solver = Solver("anderson", max_iter=100, tol=tol, on_failure="ignore")
    with torch.no_grad():
        value = psnr(model(y, physics), x).item()
    axis.plot(model.forward_stat.evaluations, value, "o", color="tab:blue")
    axis.annotate(f"{tol:g}", (model.forward_stat.evaluations, value), xytext=(4, 4), textcoords="offset points")
axis.margins(0.15)  # room for the numbers
axis.set(xlabel="evaluations", ylabel="PSNR (dB)", title="tolerance of the forward solve")
plt.show()
