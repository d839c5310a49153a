r"""
Exact gradients against Jacobian-free gradients
===============================================

Jacobian-free backpropagation (JFB) differentiates the last step of a fixed-point iteration only. It costs one vector-Jacobian product (VJP).
Implicit differentiation (ID) solves a linear equation and is exact. This example measures how wrong JFB is, what ID
costs, and how both depend on the contraction of the iteration.
"""

# %%
# A model and a problem
# ---------------------
#
# Crops of an MR slice, four times undersampled, and DE-Prox around a pretrained denoiser.

import deepinv as dinv
import matplotlib.pyplot as plt
import torch

from deepinv_deq import DEGrad, DEProx, DEQReconstructor, EquilibriumUNet, ModularIDHook, Solver
from deepinv_deq.datasets import mr_slice
from deepinv_deq.physics import SparseLinearPhysics

torch.manual_seed(0)
size = 32
crops = mr_slice()[0, 0].unfold(0, size, 32).unfold(1, size, 32).reshape(-1, 1, size, size)
crops = crops[crops.mean(dim=(1, 2, 3)) > 0.05]
x = torch.cat([crops, torch.zeros_like(crops)], dim=1)[:2].double()
rng = torch.Generator().manual_seed(0)
mask = dinv.physics.generator.GaussianMaskGenerator((size, size), acceleration=4, rng=rng).step()["mask"]
physics = dinv.physics.MRI(mask=mask.double(), img_size=(2, size, size))
y = physics(x)


def gradient(model, y, physics, target):
    model.zero_grad()
    (model(y, physics) - target).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def implicit(tol, max_iter=300):
    return ModularIDHook(Solver("gmres", max_iter=max_iter, tol=tol, on_failure="ignore"))


jfb = ModularIDHook(mode="jfb")

# %%
# The cost of accuracy
# --------------------
#
# Each point is one gradient: its cost in VJPs, and its relative error. The reference solves both equations to
# 1e-10 in double precision. The tolerance of ID is the residual of the adjoint equation, relative to the cotangent.

precise = Solver("anderson", max_iter=300, tol=1e-10)
model = DEQReconstructor(DEProx(EquilibriumUNet(pretrained="complex")), solver=precise).double().eval()
model.hook = implicit(1e-10)
exact = gradient(model, y, physics, x)
points = []
for tol in (0.5, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6):
    model.hook = implicit(tol)
    error = (gradient(model, y, physics, x) - exact).norm() / exact.norm()
    points.append((model.hook.stat.work, error))
model.hook = jfb
error = (gradient(model, y, physics, x) - exact).norm() / exact.norm()

figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
axis.semilogy(*zip(*points, strict=True), "o-", label="ID, tolerances 0.5 to 1e-6")
axis.semilogy(1, error, "s", color="tab:red", label="JFB")
axis.set(xlabel="vector-Jacobian products", ylabel="relative error of the gradient")
axis.legend()
plt.show()

# %%
# The role of contraction
# -----------------------
#
# The exact gradient uses :math:`b = g + g \, J + g \, J^2 + \dots` with the Jacobian :math:`J` of the iteration. JFB keeps the first term only. The closer
# the spectral radius is to 1, the more terms matter. To vary the radius, the output of the denoiser is multiplied by a
# factor. The certificate measures the radius.


class Scaled(torch.nn.Module):
    def __init__(self, denoiser, factor):
        super().__init__()
        self.denoiser, self.factor = denoiser, factor

    def forward(self, x):
        return self.factor * self.denoiser(x)


radii, errors, products = [], [], []
for factor in (0.2, 0.4, 0.6, 0.8, 0.9, 1.0):
    denoiser = Scaled(EquilibriumUNet(pretrained="complex"), factor)
    model = DEQReconstructor(DEProx(denoiser), solver=precise).double().eval()
    radii.append(model.certify(y, physics).spectral_radius.max().item())
    model.hook = implicit(1e-3)
    exact = gradient(model, y, physics, x)
    products.append(model.hook.stat.work)
    model.hook = jfb
    errors.append(((gradient(model, y, physics, x) - exact).norm() / exact.norm()).item())

figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
axes[0].plot(radii, errors, "s-", color="tab:red")
axes[0].set(xlabel="spectral radius", ylabel="relative error of JFB")
axes[1].plot(radii, products, "o-")
axes[1].set(xlabel="spectral radius", ylabel="VJPs of ID, tolerance 1e-3")
plt.show()

# %%
# The effect on training
# ----------------------
#
# Sparse-view CT with DE-Grad, whose gradient steps are small. The network, the crops and the steps are the same, and only the hook differs. The training
# is supervised. Eight crops are kept for the test.

tomography = dinv.physics.Tomography(angles=32, img_width=size, normalize=True, adjoint_via_backprop=True)
tomography = SparseLinearPhysics.from_physics(tomography, (1, size, size))
sinograms = tomography(crops)
kept = 8
psnr = dinv.metric.PSNR()


def train(hook, epochs=3):
    torch.manual_seed(0)
    iteration = DEGrad(EquilibriumUNet(pretrained="gray"), stepsize=1 / 51, data_weight=50.0)
    model = DEQReconstructor(iteration, solver=Solver("anderson", max_iter=100, tol=1e-4), hook=hook)
    optimizer, course = torch.optim.Adam(model.parameters(), lr=1e-3), []
    for epoch in range(epochs + 1):
        with torch.no_grad():
            course.append(psnr(model.eval()(sinograms[-kept:], tomography), crops[-kept:]).mean().item())
        model.train()
        for batch in torch.randperm(len(crops) - kept).split(4) if epoch < epochs else ():
            optimizer.zero_grad()
            (model(sinograms[batch], tomography) - crops[batch]).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return course


figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
for name, hook in {"ID": implicit(1e-2, 50), "JFB": jfb}.items():
    course = train(hook)
    axis.plot(course, "o-", label=f"{name}: {course[-1]:.2f} dB")
axis.set(xlabel="epochs", ylabel="PSNR of the test crops (dB)", xticks=range(4))
axis.legend()
plt.show()

# %%
# The page :doc:`/results` has longer trainings with more images and several seeds.
