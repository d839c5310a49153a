r"""
Swap one line
=============

An existing :class:`deepinv.Trainer` pipeline learns to reconstruct accelerated MRI without ground truth, with a network that cleans
up the zero-filled image. Then one line changes, and it trains a deep equilibrium model instead.
"""

# %%
# The pipeline that is there
# --------------------------
#
# Crops of an MR slice that ships with Matplotlib, four times undersampled k-space, and the equivariant imaging loss: the
# training set has measurements only.

import deepinv as dinv
import torch
from deepinv.datasets import TensorDataset
from torch.utils.data import DataLoader

from deepinv_deq import DEProx, DEQReconstructor, EquilibriumUNet
from deepinv_deq.datasets import mr_slice

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

size = 48
crops = mr_slice()[0, 0].unfold(0, size, 32).unfold(1, size, 32).reshape(-1, 1, size, size)
crops = crops[crops.mean(dim=(1, 2, 3)) > 0.05]  # not those of the background
x = torch.cat([crops, torch.zeros_like(crops)], dim=1).to(device)
rng = torch.Generator().manual_seed(0)
mask = dinv.physics.generator.GaussianMaskGenerator((size, size), acceleration=4, rng=rng).step()["mask"]
physics = dinv.physics.MRI(mask=mask, img_size=(2, size, size), device=device)
y = physics(x)

measurements = DataLoader(TensorDataset(y=y[:-4], use_dict_output=True), batch_size=4, shuffle=True)
x_test, y_test = x[-4:], y[-4:]


def train(model):
    r"""The pipeline: deepinv's Trainer and losses, whatever the model."""
    torch.manual_seed(0)
    dinv.Trainer(
        model=model,
        physics=physics,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3),
        losses=[dinv.loss.MCLoss(), dinv.loss.EILoss(dinv.transform.Rotate(interpolation_mode="bilinear"))],
        train_dataloader=measurements,
        epochs=4,
        metrics=None,
        compute_train_metrics=False,
        save_path=None,
        device=device,
        verbose=False,
        show_progress_bar=False,
    ).train()
    with torch.no_grad():
        return model.eval()(y_test, physics)


# %%
# With deepinv's own model: a network after :math:`A^\top y`.

network = EquilibriumUNet(pretrained="complex").to(device)
cleaned = train(dinv.models.ArtifactRemoval(network, mode="adjoint"))

# %%
# The swap
# --------
#
# The same network in the place of the proximal map of an iteration, whose fixed point is the reconstruction.

model = DEQReconstructor(DEProx(EquilibriumUNet(pretrained="complex"))).to(device)
solved = train(model)

# %%
# What comes out
# --------------

psnr = dinv.metric.PSNR(complex_abs=True)
shown = {"zero-filled": physics.A_adjoint(y_test), "network": cleaned, "DEQ": solved, "ground truth": x_test}
dinv.utils.plot(
    {name: image[:2].norm(dim=1, keepdim=True) for name, image in shown.items()},
    subtitles=[
        [f"{psnr(image[i : i + 1], x_test[i : i + 1]).item():.1f} dB" for image in list(shown.values())[:-1]] + [""]
        for i in range(2)
    ],
    rescale_mode="clip",
)

# %%
# How the solves went
# -------------------
#
# The statistic of the last forward solve, in a sentence; its residual is that of the very point that was returned.

print(model.forward_stat.outcome)

# %%
# And that of the adjoint solve of the last training step, counted in vector-Jacobian products.

print(model.hook.stat.outcome)
