r"""
Implicit differentiation against the Jacobian-free gradient
===========================================================

Jacobian-free backpropagation (JFB) differentiates the last step of a fixed-point iteration as if it were the only one. It costs one
vector-Jacobian product. Implicit differentiation (ID) solves a linear system instead, and is exact. How wrong is JFB, what
does ID cost, and does it matter?
"""

# %%
# A model and a problem
# ---------------------
#
# Crops of an MR slice, four times undersampled, and DE-Prox around a denoiser, in double precision for the comparison of gradients.

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
x = torch.cat([crops, torch.zeros_like(crops)], dim=1)
rng = torch.Generator().manual_seed(0)
mask = dinv.physics.generator.GaussianMaskGenerator((size, size), acceleration=4, rng=rng).step()["mask"]
physics = dinv.physics.MRI(mask=mask, img_size=(2, size, size))
y = physics(x)


def make(hook, tol=1e-4):
    iteration = DEProx(EquilibriumUNet(pretrained="complex"))
    return DEQReconstructor(iteration, solver=Solver("anderson", max_iter=200, tol=tol, on_failure="ignore"), hook=hook)


# %%
# The gradient
# ------------
#
# The reference backpropagates through 300 plain iterations. Every point below is one training gradient: its cost, in
# vector-Jacobian products, and its error.

x64, y64 = x[:2].double(), y[:2].double()
physics64 = dinv.physics.MRI(mask=mask.double(), img_size=(2, size, size))


def gradient(model, reconstruct):
    model.zero_grad()
    (reconstruct() - x64).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def unrolled():
    f, point = model.iteration.bind(y64, physics64), physics64.A_adjoint(y64)
    for _ in range(300):
        point = f(point)
    return point


model = make(ModularIDHook(), tol=1e-10).double().eval()
exact = gradient(model, unrolled)

model.hook = ModularIDHook(mode="jfb")
jfb = gradient(model, lambda: model(y64, physics64))
points = []
for tol in (0.5, 0.2, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6):
    model.hook = ModularIDHook(Solver("gmres", max_iter=100, tol=tol))
    implicit = gradient(model, lambda: model(y64, physics64))
    points.append((model.hook.stat.work, (implicit - exact).norm() / exact.norm()))

error, cosine = (jfb - exact).norm() / exact.norm(), torch.cosine_similarity(jfb, exact, dim=0)
print(f"JFB: relative error {error:.2f}, cosine with the exact gradient {cosine:.2f}")

figure, axis = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
axis.semilogy(*zip(*points, strict=True), "o-", label="ID, tolerances 0.5 to 1e-6")
axis.semilogy(1, error, "s", color="tab:red", label="JFB")
axis.set(xlabel="vector-Jacobian products", ylabel="relative error of the gradient")
axis.legend()
plt.show()

# %%
# What it does to training
# ------------------------
#
# For so few crops and steps, both train alike in the problem above. The slower an iteration contracts, the more terms of the sum
# :math:`b = g + g \, \partial F / \partial x + \dots` matter, of which JFB takes the first. DE-Grad in tomography is slow: it takes small
# steps. These are its gradients for four crops of 32 views, next to one of a solve to 1e-7.
#
# The tolerance of ID bounds the residual of the adjoint equation, divided by the norm of :math:`g`. So it means the same for small steps.

tomography = dinv.physics.Tomography(angles=32, img_width=size, normalize=True, adjoint_via_backprop=True)
tomography = SparseLinearPhysics.from_physics(tomography, (1, size, size))
sinograms = tomography(crops)


def make_ct(hook):
    iteration = DEGrad(EquilibriumUNet(pretrained="gray"), stepsize=1 / 51, data_weight=50.0)
    return DEQReconstructor(
        iteration, solver=Solver("anderson", max_iter=100, tol=1e-5, on_failure="ignore"), hook=hook
    )


def loss_of(model, rows):
    return (model(sinograms[rows], tomography) - crops[rows]).square().mean()


model = make_ct(None)


def gradient_ct(hook):
    model.hook = hook
    model.zero_grad()
    loss_of(model, slice(4)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def implicit(tol, max_iter=50):
    return ModularIDHook(Solver("gmres", max_iter=max_iter, tol=tol, on_failure="ignore"))


exact = gradient_ct(implicit(1e-7, 300))
for tol in (1e-2, 1e-3, 3e-4, 1e-4):
    cosine = torch.cosine_similarity(gradient_ct(implicit(tol)), exact, dim=0)
    stat = model.hook.stat
    print(
        f"ID, {tol:g}: {stat.work:4.1f} products, residual {stat.residual.max():4.0%}, cosine with the exact gradient {cosine:.2f}"
    )
print(
    f"JFB: cosine with the exact gradient {torch.cosine_similarity(gradient_ct(ModularIDHook(mode='jfb')), exact, dim=0):.2f}"
)

# %%
# And what comes of them: the same network, crops and steps, supervised; only the hook differs. Eight crops are kept for the test.
# The paper's tables, with more images, longer training and several seeds, are on the results page.


def train(hook, epochs=3, kept=8):
    torch.manual_seed(0)
    model, psnr, course = make_ct(hook), dinv.metric.PSNR(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(epochs + 1):
        with torch.no_grad():
            course.append(psnr(model.eval()(sinograms[-kept:], tomography), crops[-kept:]).mean().item())
        model.train()
        for batch in torch.randperm(len(crops) - kept).split(4) if epoch < epochs else ():
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return course


figure, axis = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
for name, hook in {"ID": implicit(3e-4), "JFB": ModularIDHook(mode="jfb")}.items():
    course = train(hook)
    axis.plot(course, "o-", label=f"{name}: {course[-1]:.2f} dB")
axis.set(xlabel="epochs", ylabel="PSNR of the test crops (dB)", xticks=range(4))
axis.legend()
plt.show()
