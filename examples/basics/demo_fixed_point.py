r"""
The fixed point as it forms
===========================

A reconstruction is a fixed point, found by a solver. This example watches one: images and residuals, evaluation by evaluation,
for plain iteration, Anderson acceleration, and Anderson with the filter that :class:`deepinv_deq.DEGrad` offers where the
physics is nearly one.
"""

# %%
# A trained model
# ---------------
#
# The shipped model for sparse-view CT, and a slice that comes with pydicom, cut to the circle that a scanner sees.

import deepinv as dinv
import matplotlib.pyplot as plt
import torch
from matplotlib.animation import FuncAnimation

from deepinv_deq import DEQReconstructor, Solver
from deepinv_deq.datasets import ct_slice
from deepinv_deq.physics import SparseLinearPhysics

size, views = 64, 30
x = ct_slice(size)
physics = SparseLinearPhysics.from_physics(
    dinv.physics.Tomography(angles=views, img_width=size, normalize=True, adjoint_via_backprop=True), (1, size, size)
)
y = physics.A(x)
model = DEQReconstructor.from_pretrained("ct-ei")

# %%
# Three ways to the same point
# ----------------------------
#
# A solver takes a map and a start, whatever they are; here, the map that the model binds to the sinogram. To keep the points it
# evaluates, wrap the map. (A preconditioner belongs to the map, so the wrapper passes it on where it is wanted.)


class Watched:
    r"""A map that remembers where it was evaluated."""

    def __init__(self, f, precondition):
        self.f, self.points = f, []
        if precondition:
            self.preconditioner = f.preconditioner

    def __call__(self, x):
        self.points.append(x.clone())
        return self.f(x)


solvers = {
    "plain iteration": (Solver("fixed_point_iter", max_iter=300, tol=1e-5, on_failure="ignore"), False),
    "Anderson": (Solver("anderson", max_iter=300, tol=1e-5, on_failure="ignore"), False),
    "Anderson, with the filter": (Solver("anderson", max_iter=300, tol=1e-5), True),
}
start = torch.zeros_like(x)
courses = {}
with torch.no_grad():
    f = model.iteration.bind(y, physics)
    for name, (solver, precondition) in solvers.items():
        watched = Watched(f, precondition)
        x_hat, stat = solver(watched, start)
        courses[name] = (watched.points, stat["rel_trace"][0])
        print(f"{name}: {stat.evaluations} evaluations, residual {stat.residual.item():.1e}")

# %%
# Residuals
# ---------
#
# Left, what a solver sees: the relative residual. Right, what it cannot see: the distance from where the last of the three ended. With
# a small step, a small residual is not yet a small distance.

figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for name, (points, residuals) in courses.items():
    axes[0].semilogy(residuals, label=name)
    axes[1].semilogy([(point - x_hat).norm() / x_hat.norm() for point in points])
axes[0].set(xlabel="evaluations", ylabel="relative residual", title=r"$\|F(x) - x\| \, / \, \|F(x)\|$")
axes[1].set(xlabel="evaluations", title=r"$\|x - \hat x\| \, / \, \|\hat x\|$", ylim=(1e-5, 2))
axes[0].legend()
plt.show()

# %%
# The image forms
# ---------------
#
# From nothing, by Anderson with the filter.

points = courses["Anderson, with the filter"][0]
psnr = dinv.metric.PSNR()
figure, axes = plt.subplots(1, 2, figsize=(6, 3.3), layout="constrained")
shown = axes[0].imshow(points[0][0, 0], cmap="gray", vmin=0, vmax=1)
axes[1].imshow(x[0, 0], cmap="gray", vmin=0, vmax=1)
axes[1].set(title="ground truth", xticks=[], yticks=[])
axes[0].set(xticks=[], yticks=[])


def draw(k):
    shown.set_data(points[k][0, 0])
    axes[0].set_title(f"evaluation {k}: {psnr(points[k], x).item():.1f} dB")


animation = FuncAnimation(figure, draw, frames=len(points), interval=400)
plt.show()
