r"""
deepinv's algorithms as deep equilibrium models
===============================================

:mod:`deepinv.optim` contains proximal gradient descent, ADMM, half-quadratic splitting, Douglas-Rachford splitting and primal-dual algorithms.
:class:`deepinv_deq.FromOptim` turns each of them into a deep equilibrium model. Any solver finds its fixed point, the gradient is exact, and any
loss trains it.
"""

# %%
# A problem
# ---------
#
# Deblurring of crops of an MR slice.

import deepinv as dinv
import matplotlib.pyplot as plt
import torch

from deepinv_deq import DEQReconstructor, FromOptim, ModularIDHook, Solver
from deepinv_deq.datasets import mr_slice

torch.manual_seed(0)
size = 48
crops = mr_slice()[0, 0].unfold(0, size, 40).unfold(1, size, 40).reshape(-1, 1, size, size)
x = crops[crops.mean(dim=(1, 2, 3)) > 0.08]
physics = dinv.physics.BlurFFT(
    (1, size, size),
    filter=dinv.physics.blur.gaussian_blur(sigma=1.5),
    noise_model=dinv.physics.GaussianNoise(0.02, rng=torch.Generator().manual_seed(0)),
)
y = physics(x)

# %%
# Four algorithms
# ---------------
#
# Four plug-and-play algorithms with the same pretrained denoiser. deepinv passes a noise level to the denoiser, which this denoiser ignores.

from deepinv_deq import EquilibriumUNet


def algorithm(name):
    prior = dinv.optim.PnP(EquilibriumUNet(pretrained="gray"))
    return getattr(dinv.optim, name)(
        prior=prior, data_fidelity=dinv.optim.L2(), stepsize=1.0, max_iter=30, g_param=0.05
    )


def as_deq(name):
    return DEQReconstructor(
        FromOptim(algorithm(name), trainable=("stepsize",)),
        solver=Solver("anderson", max_iter=40, tol=1e-3, on_failure="ignore"),
        hook=ModularIDHook(Solver("gmres", max_iter=50, tol=1e-2)),
    )


psnr = dinv.metric.PSNR()
names = ("PGD", "HQS", "ADMM", "DRS")
test = slice(len(x) - 4, None)

# %%
# Trained as deep equilibrium models
# ----------------------------------
#
# Each model takes the same steps of supervised training. They train the denoiser and the stepsize.

courses, images = {}, {"measured": y[test]}
for name in names:
    torch.manual_seed(0)
    model, courses[name] = as_deq(name), []
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    for epoch in range(3):
        model.train()
        for batch in torch.randperm(len(x) - 4).split(4) if epoch else ():
            optimizer.zero_grad()
            (model(y[batch], physics) - x[batch]).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            images[name] = model.eval()(y[test], physics)
        courses[name].append(psnr(images[name], x[test]).mean().item())
images["ground truth"] = x[test]

figure, axis = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
for name, course in courses.items():
    axis.plot(course, "o-", label=f"{name}: {course[-1]:.1f} dB")
axis.set(xlabel="epochs", ylabel="PSNR of the test crops (dB)", xticks=range(3))
axis.legend()
plt.show()

# %%
# Two of the test crops after training.

figure, axes = plt.subplots(2, 6, figsize=(12, 4.2), layout="constrained")
for row, k in zip(axes, (0, 2), strict=True):
    for axis, (name, image) in zip(row, images.items(), strict=True):
        axis.imshow(image[k, 0], cmap="gray", vmin=0, vmax=1)
        level = "" if name == "ground truth" else f"{psnr(image[[k]], x[test][[k]]).item():.1f} dB"
        axis.set(title=f"{name}\n{level}" if k == 0 else level, xticks=[], yticks=[])
plt.show()
