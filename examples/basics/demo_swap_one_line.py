r"""
Swap one line
=============

A :class:`deepinv.Trainer` pipeline learns to reconstruct accelerated MRI without ground truth. Its model is a network that
cleans up the zero-filled image. Then one line changes, and the same pipeline trains a deep equilibrium model.
"""

# %%
# The pipeline
# ------------
#
# The training set consists of k-space measurements of crops of an MR slice, four times undersampled. The test image is the whole slice,
# at a lower resolution and with its own mask.

import deepinv as dinv
import matplotlib.pyplot as plt
import torch
from deepinv.datasets import TensorDataset
from torch.utils.data import DataLoader

from deepinv_deq import DEProx, DEQReconstructor, EquilibriumUNet
from deepinv_deq.datasets import mr_slice
from deepinv_deq.losses import BicubicRotate

device = "cuda" if torch.cuda.is_available() else "cpu"


def accelerated_mri(size):
    rng = torch.Generator().manual_seed(0)
    mask = dinv.physics.generator.GaussianMaskGenerator((size, size), acceleration=4, rng=rng).step()["mask"]
    return dinv.physics.MRI(mask=mask, img_size=(2, size, size), device=device)


def complex_image(image):
    return torch.cat([image, torch.zeros_like(image)], dim=1).to(device)  # real and imaginary part


crops = mr_slice()[0, 0].unfold(0, 48, 32).unfold(1, 48, 32).reshape(-1, 1, 48, 48)
crops = crops[crops.mean(dim=(1, 2, 3)) > 0.05]  # without the background
physics = accelerated_mri(48)
measurements = TensorDataset(y=physics(complex_image(crops)), use_dict_output=True)

x_test = complex_image(torch.nn.functional.interpolate(mr_slice(), size=(96, 96), mode="area"))
physics_test = accelerated_mri(96)
y_test = physics_test(x_test)


def train(model):
    r"""The pipeline: deepinv's Trainer and losses, the same for every model."""
    torch.manual_seed(0)
    dinv.Trainer(
        model=model,
        physics=physics,
        optimizer=torch.optim.Adam(model.parameters(), lr=3e-4),
        losses=[dinv.loss.MCLoss(), dinv.loss.EILoss(BicubicRotate(), no_grad=True)],
        train_dataloader=DataLoader(measurements, batch_size=4, shuffle=True),
        epochs=4,
        metrics=None,
        compute_train_metrics=False,
        save_path=None,
        device=device,
        verbose=False,
        show_progress_bar=False,
    ).train()
    with torch.no_grad():
        return model.eval()(y_test, physics_test)


# %%
# First with deepinv's own model: a network applied to :math:`A^\top y`.

network = EquilibriumUNet(pretrained="complex").to(device)
cleaned = train(dinv.models.ArtifactRemoval(network, mode="adjoint"))

# %%
# The swap
# --------
#
# The same network inside an iteration. The reconstruction is the fixed point of this iteration.

model = DEQReconstructor(DEProx(EquilibriumUNet(pretrained="complex"))).to(device)
solved = train(model)

# %%
# Reconstructions
# ---------------
#
# The network alone cannot see the measurements again. The iteration uses them in every evaluation.

# sphinx_gallery_thumbnail_number = 1

psnr = dinv.metric.PSNR(complex_abs=True)
images = {"zero-filled": physics_test.A_adjoint(y_test), "network": cleaned, "DEQ": solved, "ground truth": x_test}
magnitudes = {name: image[0].norm(dim=0).cpu() for name, image in images.items()}
figure, axes = plt.subplots(2, 2, figsize=(6, 6.6), layout="constrained")
for axis, (name, magnitude) in zip(axes.flat, magnitudes.items(), strict=True):
    axis.imshow(magnitude, cmap="gray", vmin=0, vmax=1)
    level = "" if name == "ground truth" else f": {psnr(images[name], x_test).item():.1f} dB"
    axis.set(title=name + level, xticks=[], yticks=[])
plt.show()

# %%
# The errors of the magnitudes.

figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
for axis, name in zip(axes, ("zero-filled", "network", "DEQ"), strict=True):
    shown = axis.imshow(magnitudes[name] - magnitudes["ground truth"], cmap="RdBu", vmin=-0.3, vmax=0.3)
    axis.set(title=name, xticks=[], yticks=[])
figure.colorbar(shown, ax=axes, label="error")
plt.show()

# %%
# Statistics of the solves
# ------------------------
#
# The last forward solve. The residual belongs to the point that was returned.

print(model.forward_stat.outcome)

# %%
# The adjoint solve of the last training step, counted in vector-Jacobian products.

print(model.hook.stat.outcome)

# %%
# The residual of the forward solve, evaluation by evaluation.

trace, steps = model.forward_stat["rel_trace"][0].cpu(), model.forward_stat.evaluations
figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
axis.semilogy(range(1, steps + 1), trace[:steps], "o-", label="residual")
axis.axhline(model.solver.tol, color="gray", linestyle="--", label="tolerance")
axis.set(xlabel="evaluations of the iteration", ylabel="relative residual")
axis.legend()
plt.show()
