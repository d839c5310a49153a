r"""
Your own physics, your own iteration
====================================

An operator that is not in deepinv, and an iteration that is not in this package, take a few lines each. Solvers, exact gradients and
training without ground truth work without further code.
"""

# %%
# An operator
# -----------
#
# A camera adds to each pixel the value of another pixel, and reads out two thirds of the sums. A :class:`deepinv.physics.LinearPhysics` needs
# the methods ``A`` and ``A_adjoint``.

import copy

import deepinv as dinv
import matplotlib.pyplot as plt
import torch

from deepinv_deq import DEQReconstructor, EquilibriumUNet, FixedPointIteration, ModularIDHook, Solver
from deepinv_deq.datasets import mr_slice

torch.manual_seed(0)
size = 48
crops = mr_slice()[0, 0].unfold(0, size, 32).unfold(1, size, 32).reshape(-1, 1, size, size)
x = crops[crops.mean(dim=(1, 2, 3)) > 0.08]  # training
x_test = torch.nn.functional.interpolate(mr_slice(), size=(96, 96), mode="area")


class PairingCamera(dinv.physics.LinearPhysics):
    r""":math:`y = m \, (x + P x) / 2` with a permutation :math:`P` of the pixels and a mask :math:`m`."""

    def __init__(self, side, **kwargs):
        super().__init__(**kwargs)
        partner = torch.randperm(side * side)
        self.register_buffer("partner", partner)
        self.register_buffer("back", partner.argsort())
        self.register_buffer("mask", (torch.rand(side * side) < 2 / 3).float())

    def A(self, x, **kwargs):
        flat = x.flatten(2)
        return self.mask * (flat + flat[..., self.partner]) / 2

    def A_adjoint(self, y, **kwargs):
        y = self.mask * y
        side = int(self.partner.numel() ** 0.5)
        return ((y + y[..., self.back]) / 2).unflatten(-1, (side, side))


physics, physics_test = PairingCamera(size), PairingCamera(96)
assert physics.adjointness_test(x[:1]).abs() < 1e-2  # A_adjoint is the adjoint of A
print(f"squared norm of the operator: {physics.compute_sqnorm(x[:1], verbose=False).item():.2f}")
y, y_test = physics(x), physics_test(x_test)

# %%
# An iteration
# ------------
#
# A gradient step on the data term, a network, and an average with :math:`A^\top y`, which multiplies the norm of the Jacobian by :math:`1 - s`. The weight
# :math:`s` of the average is learned.


class Anchored(FixedPointIteration):
    r""":math:`F(x) = (1 - s) \, D(x - \eta A^\top(A x - y)) + s \, A^\top y`, with :math:`s` between 0 and 1."""

    def __init__(self, denoiser, **kwargs):
        super().__init__(denoiser, **kwargs)
        self.logit = torch.nn.Parameter(torch.tensor(-3.0))

    def forward(self, x, physics, aty):
        s = torch.sigmoid(self.logit)
        return (1 - s) * self.denoise(x - self.stepsize * self.data_gradient(x, physics, aty)) + s * aty


model = DEQReconstructor(
    Anchored(EquilibriumUNet(pretrained="gray"), stepsize=1.0, learn_stepsize=True),
    solver=Solver("anderson", max_iter=100, tol=1e-3),
    hook=ModularIDHook(Solver("gmres", max_iter=50, tol=1e-2)),
)

# %%
# A check of the gradient
# -----------------------
#
# The loss as a function of the new parameter, and the line with the slope that the hook computes. A small untrained network replaces the
# denoiser, in double precision.

exact = DEQReconstructor(
    Anchored(EquilibriumUNet(channels=(8, 16))),
    solver=Solver("anderson", max_iter=300, tol=1e-10),
    hook=ModularIDHook(Solver("gmres", max_iter=200, tol=1e-8)),
).double()
physics64, x64, y64 = copy.deepcopy(physics).double(), x[:1].double(), y[:1].double()


def loss(shift=0.0):
    with torch.no_grad():
        exact.iteration.logit.fill_(-3.0 + shift)
    return (exact(y64, physics64) - x64).square().mean()


middle = loss()
(gradient,) = torch.autograd.grad(middle, [exact.iteration.logit])
shifts = torch.linspace(-1.5, 1.5, 9).double()
with torch.no_grad():
    values = [loss(shift.item()).item() for shift in shifts]
figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
axis.plot(shifts, values, "o-", label="loss")
axis.plot(shifts, middle.item() + gradient.item() * shifts, "--", label="slope of the hook")
axis.set(xlabel="change of the parameter", ylabel="loss")
axis.legend()
plt.show()

# %%
# Training without ground truth
# -----------------------------
#
# Shifted and rotated images are still valid images, but the camera pairs other pixels of them. So equivariant imaging applies.

psnr = dinv.metric.PSNR()
consistency = dinv.loss.MCLoss()
transform = dinv.transform.Shift() * dinv.transform.Rotate(multiples=90, positive=True)
equivariance = dinv.loss.EILoss(transform, no_grad=True)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
course = []
for _ in range(3):
    with torch.no_grad():
        course.append(psnr(model.eval()(y_test, physics_test), x_test).item())
    model.train()
    for batch in torch.randperm(len(x)).split(4):
        optimizer.zero_grad()
        x_net = model(y[batch], physics)
        total = consistency(x_net=x_net, y=y[batch], physics=physics, model=model)
        total = total + equivariance(x_net=x_net, physics=physics, model=model)
        total.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
with torch.no_grad():
    x_hat = model.eval()(y_test, physics_test)
course.append(psnr(x_hat, x_test).item())

figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
axis.plot(course, "o-")
axis.set(xlabel="epochs", ylabel="PSNR of the test image (dB)", xticks=range(4))
plt.show()

# %%
# The test image after training, and the statistic of its solve.

# sphinx_gallery_thumbnail_number = 3

print(model.forward_stat.outcome)
images = {"adjoint": physics_test.A_adjoint(y_test), "DEQ": x_hat, "ground truth": x_test}
figure, axes = plt.subplots(2, 2, figsize=(6, 6.4), layout="constrained")
for axis, (name, image) in zip(axes.flat, images.items(), strict=False):
    axis.imshow(image[0, 0], cmap="gray", vmin=0, vmax=1)
    level = "" if name == "ground truth" else f": {psnr(image, x_test).item():.1f} dB"
    axis.set_title(name + level)
error = axes[1, 1].imshow((x_hat - x_test)[0, 0], cmap="RdBu", vmin=-0.3, vmax=0.3)
axes[1, 1].set_title("error of the DEQ")
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
figure.colorbar(error, ax=axes[1, 1], shrink=0.8)
plt.show()
