r"""
One fixed point, from every start
=================================

The output of a deep equilibrium model is a fixed point. If the iteration contracts, every start leads to the same image. This example
shows the solve evaluation by evaluation, checks uniqueness with the certificate, and shows what happens without contraction.
"""

# %%
# A contracting iteration
# -----------------------
#
# The model ``"ct-ei-small"`` ships with the package. It was trained on sinograms with ContractionLoss, without ground-truth CT images.
# The slice comes with pydicom (``pip install pydicom``).

import deepinv as dinv
import matplotlib.pyplot as plt
import torch
from matplotlib.animation import FuncAnimation

from deepinv_deq import DEGrad, DEQReconstructor, EquilibriumUNet, Solver
from deepinv_deq.datasets import ct_slice
from deepinv_deq.physics import SparseLinearPhysics

size, views = 64, 30
x = ct_slice(size)
physics = SparseLinearPhysics.from_physics(
    dinv.physics.Tomography(angles=views, img_width=size, normalize=True, adjoint_via_backprop=True), (1, size, size)
)
y = physics.A(x)
psnr = dinv.metric.PSNR()
model = DEQReconstructor.from_pretrained("ct-ei-small").eval()

# %%
# Four starts, one limit
# ----------------------
#
# A solver accepts any function, so a wrapper can record the points at which the iteration is evaluated. The wrapper also offers
# what the solver uses of the iteration: its residual, its preconditioner, and the units of the criterion.


class Recorded:
    r"""An iteration that records the points of its evaluations."""

    has_own_step = True  # step(x) computes F(x) - x

    def __init__(self, f):
        self.f, self.points = f, []

    def __call__(self, x):
        self.points.append(x.clone())
        return self.f(x)

    def step(self, x):
        self.points.append(x.clone())
        return self.f.step(x)

    def preconditioner(self, x):
        return self.f.preconditioner(x)

    def natural(self, x):
        return self.f.natural(x)


starts = {
    "zeros": torch.zeros_like(x),
    "noise": torch.rand(x.shape, generator=torch.Generator().manual_seed(0)),
    "FBP": physics.fbp(y),
    "ground truth": x,
}


def solve_from_all(model):
    points = {}
    with torch.no_grad():
        f = model.iteration.bind(y, physics)
        for name, start in starts.items():
            recorded = Recorded(f)
            x_hat, _ = model.solver(recorded, start)
            points[name] = [*recorded.points, x_hat]
    return points


def draw_curves(axis, points):
    for name, course in points.items():
        axis.plot(
            [psnr(point, x).item() for point in course], label=f"from {name}: {psnr(course[-1], x).item():.1f} dB"
        )
    axis.set(xlabel="evaluations", ylabel="PSNR (dB)", ylim=(5, 45))
    axis.legend(fontsize="small")


points = solve_from_all(model)
figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
draw_curves(axis, points)
plt.show()

# %%
# The certificate
# ---------------
#
# ``certify`` measures what the curves suggest: the spectral radius of the Jacobian that must be below 1, the distance to the fixed point, and the
# spread over several starts. The page :doc:`/guide/fixed_points` explains the condition.

certificate = model.certify(y, physics, x_gt=x)
print(certificate.outcome)

# %%
# The image forms
# ---------------
#
# The solve that starts from zeros.

frames = points["zeros"][:20]
figure, axes = plt.subplots(1, 2, figsize=(5, 2.8), dpi=80, layout="constrained")
shown = axes[0].imshow(frames[0][0, 0], cmap="gray", vmin=0, vmax=1)
axes[1].imshow(x[0, 0], cmap="gray", vmin=0, vmax=1)
axes[1].set(title="ground truth", xticks=[], yticks=[])
axes[0].set(xticks=[], yticks=[])


def draw(k):
    shown.set_data(frames[k][0, 0])
    axes[0].set_title(f"evaluation {k}: {psnr(frames[k], x).item():.1f} dB")


draw(0)
animation = FuncAnimation(figure, draw, frames=len(frames), interval=400)
plt.show()

# %%
# Without contraction
# -------------------
#
# The pretrained denoiser before any training with ContractionLoss, with its output multiplied by 1.5. The Jacobian expands.
# No solve reaches the tolerance in 60 evaluations, and the four solves end at different images.
# :class:`~deepinv_deq.losses.ContractionLoss` prevents this in training.


class Amplified(torch.nn.Module):
    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x):
        return 1.5 * self.denoiser(x)


expanding = DEQReconstructor(
    DEGrad(Amplified(EquilibriumUNet(pretrained="gray")), stepsize=1 / 51, data_weight=50.0),
    solver=Solver("anderson", max_iter=60, tol=1e-4, on_failure="ignore"),
).eval()
elsewhere = solve_from_all(expanding)
figure, axes = plt.subplots(2, 4, figsize=(10, 5.4), layout="constrained")
for column, (name, course) in zip(axes.T, elsewhere.items(), strict=True):
    column[0].imshow(course[-1][0, 0], cmap="gray", vmin=0, vmax=1)
    column[0].set_title(f"from {name}\n{psnr(course[-1], x).item():.1f} dB")
    error = column[1].imshow((course[-1] - x)[0, 0], cmap="RdBu", vmin=-0.2, vmax=0.2)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
figure.colorbar(error, ax=axes[1], label="error")
plt.show()

# %%
# The certificate finds this, too.

print(expanding.certify(y, physics, x_gt=x).outcome)
