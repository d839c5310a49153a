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
# Deblurring. The training set consists of crops of an MR slice. The test image is the whole slice, at half of its resolution.

import deepinv as dinv
import matplotlib.pyplot as plt
import torch

from deepinv_deq import DEQReconstructor, EquilibriumUNet, FromOptim, ModularIDHook, Solver
from deepinv_deq.datasets import mr_slice
from deepinv_deq.losses import ContractionLoss

torch.manual_seed(0)
size = 48
crops = mr_slice()[0, 0].unfold(0, size, 40).unfold(1, size, 40).reshape(-1, 1, size, size)
x = crops[crops.mean(dim=(1, 2, 3)) > 0.08][:16]
x_test = torch.nn.functional.interpolate(mr_slice(), size=(128, 128), mode="area")


def blur(size):
    return dinv.physics.BlurFFT(
        (1, size, size),
        filter=dinv.physics.functional.gaussian_blur(sigma=1.5),
        noise_model=dinv.physics.GaussianNoise(0.02, rng=torch.Generator().manual_seed(0)),
    )


physics, physics_test = blur(size), blur(128)
y, y_test = physics(x), physics_test(x_test)

# %%
# Four algorithms
# ---------------
#
# Four plug-and-play algorithms with the same pretrained denoiser. deepinv passes a noise level to the denoiser, which this denoiser ignores.


def algorithm(name):
    prior = dinv.optim.PnP(EquilibriumUNet(pretrained="gray"))
    return getattr(dinv.optim, name)(
        prior=prior, data_fidelity=dinv.optim.L2(), stepsize=1.0, max_iter=30, g_param=0.05
    )


def as_deq(name):
    return DEQReconstructor(
        FromOptim(algorithm(name), trainable=("stepsize",)),
        solver=Solver("anderson", max_iter=100, tol=1e-3),
        hook=ModularIDHook(Solver("gmres", max_iter=100, tol=1e-1)),  # the data are noisy
    )


psnr = dinv.metric.PSNR()
names = ("PGD", "HQS", "ADMM", "DRS")

# %%
# Trained as deep equilibrium models
# ----------------------------------
#
# Each model takes the same steps of supervised training. They train the denoiser and the stepsize. A penalty keeps the fixed points unique.

penalty = ContractionLoss(bound=0.9)
courses, images = {}, {"measured": y_test}
for name in names:
    torch.manual_seed(0)
    model, courses[name] = as_deq(name), []
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    for epoch in range(3):
        model.train()
        for batch in torch.randperm(len(x)).split(4) if epoch else ():
            optimizer.zero_grad()
            x_net = model(y[batch], physics)
            total = (x_net - x[batch]).square().mean() + penalty(x_net, y[batch], physics, model).mean()
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            images[name] = model.eval()(y_test, physics_test)
        courses[name].append(psnr(images[name], x_test).item())
images["ground truth"] = x_test

figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
for name, course in courses.items():
    axis.plot(course, "o-", label=f"{name}: {course[-1]:.1f} dB")
axis.set(xlabel="epochs", ylabel="PSNR of the test image (dB)", xticks=range(3))
axis.legend()
plt.show()

# %%
# The test image and the errors after training.

figure, axes = plt.subplots(2, 5, figsize=(11, 4.9), layout="constrained")
for column, (name, image) in zip(axes.T, list(images.items())[:5], strict=True):
    column[0].imshow(image[0, 0], cmap="gray", vmin=0, vmax=1)
    column[0].set_title(f"{name}: {psnr(image, x_test).item():.1f} dB", fontsize="medium")
    error = column[1].imshow((image - x_test)[0, 0], cmap="RdBu", vmin=-0.2, vmax=0.2)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
figure.colorbar(error, ax=axes[1], label="error")
plt.show()
