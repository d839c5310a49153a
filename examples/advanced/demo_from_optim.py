r"""
deepinv's algorithms as deep equilibrium models
===============================================

:mod:`deepinv.optim` has algorithms: proximal gradient, ADMM, half-quadratic and Douglas-Rachford splitting, primal-dual. Each repeats a step, so each
has a fixed point, and :class:`deepinv_deq.FromOptim` makes a template of it: solved by any solver, differentiated exactly, trained with any loss.
"""

# %%
# A problem
# ---------
#
# Crops of an MR slice, blurred and noisy.

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
# Plug-and-play, each with the same pretrained denoiser in the place of the proximal map. deepinv hands it a noise level, which this
# denoiser has no use for.

from deepinv_deq import EquilibriumUNet


def algorithm(name):
    prior = dinv.optim.PnP(EquilibriumUNet(pretrained="gray"))
    return getattr(dinv.optim, name)(
        prior=prior, data_fidelity=dinv.optim.L2(), stepsize=1.0, max_iter=30, g_param=0.05
    )


def as_deq(name):
    return DEQReconstructor(
        FromOptim(algorithm(name), trainable=("stepsize",)),
        solver=Solver("anderson", max_iter=40, tol=3e-3, on_failure="ignore"),
        hook=ModularIDHook(Solver("gmres", max_iter=50, tol=1e-2)),
    )


psnr = dinv.metric.PSNR()
names = ("PGD", "HQS", "ADMM", "DRS")
test = slice(len(x) - 4, None)
for name in names:
    model = as_deq(name)
    with torch.no_grad():
        x_hat = model(y[test], physics)
    print(
        f"{name}: {psnr(x_hat, x[test]).mean().item():.1f} dB untrained, {model.forward_stat.evaluations} evaluations"
    )

# %%
# Trained as deep equilibrium models
# ----------------------------------
#
# The same steps of supervised training for each: the denoiser and the stepsize learn what this problem needs.

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

figure, axes = plt.subplots(2, 6, figsize=(12, 4.2), layout="constrained")
for row, k in zip(axes, (0, 2), strict=True):
    for axis, (name, image) in zip(row, images.items(), strict=True):
        axis.imshow(image[k, 0], cmap="gray", vmin=0, vmax=1)
        axis.set(title=name if k == 0 else "", xticks=[], yticks=[])
plt.show()
