r"""
Train sparse-view CT on your images
===================================

A deep equilibrium model (DEQ) learns to reconstruct CT images from 50 views. It is trained with the equivariant imaging (EI) loss
:footcite:t:`chen2021equivariant` on sinograms, without ground-truth CT images. Its denoiser was pretrained on natural images.

The model is one line in a :class:`deepinv.Trainer` pipeline. Its gradients are exact (implicit differentiation,
Proposition 1 of the paper), although the EI loss passes through the model twice. The shipped model ``"ct-ei"`` was trained with
:class:`~deepinv_deq.losses.TurnedOperatorLoss`, which has a higher PSNR on CT (:doc:`/results`).

Without arguments the script generates phantoms and takes a few minutes on two CPU cores. With arguments:

.. code-block:: bash

    python examples/ct/demo_sparse_view_ct.py --data ct100.npz --size 128 --epochs 60

"""

# %%
# Settings
# --------
#
# ``--data`` is a ``.npz`` file with the key ``images``, or a folder of PNG, TIFF or DICOM files. The last tenth of the images
# is kept for the test.

import argparse
import json
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import deepinv as dinv
import matplotlib.pyplot as plt
import torch
from deepinv.datasets import TensorDataset
from torch.utils.data import DataLoader

from deepinv_deq import DEGrad, DEQReconstructor, EquilibriumUNet, ModularIDHook, Solver
from deepinv_deq.datasets import load_images, phantoms
from deepinv_deq.losses import ContractionLoss
from deepinv_deq.physics import SparseLinearPhysics
from deepinv_deq.training import ResumableTrainer

parser = argparse.ArgumentParser(description="Train a DEQ for sparse-view CT, by default without ground truth.")
parser.add_argument("--data", help=".npz file with the key 'images', or folder of PNG, TIFF or DICOM; default phantoms")
parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
parser.add_argument("--views", type=int, default=50, help="number of angles over 180 degrees")
parser.add_argument("--epochs", type=int, default=12)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--lr", type=float, default=3e-4, help="learning rate of Adam, with cosine decay")
parser.add_argument("--alpha", type=float, default=100.0, help="weight of the equivariance term, eq. 3")
parser.add_argument("--loss", choices=["ei", "sup"], default="ei", help="without or with ground truth")
parser.add_argument("--backward", choices=["implicit", "jfb"], default="implicit")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", default="runs/sparse_view_ct", help="folder for checkpoints, figures and the record")
parser.add_argument("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
args = parser.parse_args()
if min(args.size, args.views, args.epochs, args.batch_size) < 1:
    parser.error("--size, --views, --epochs and --batch-size must be at least 1")

torch.manual_seed(args.seed)
out = Path(args.out)
out.mkdir(parents=True, exist_ok=True)
# notes of deepinv and PyTorch about defaults that this script does not use
warnings.filterwarnings("ignore", message=".*(progress bar frequency|meshgrid|non_blocking_transfers|[Ss]parse).*")

# %%
# Images and measurements
# -----------------------
#
# The training set has measurements only, unless ``--loss sup`` selects supervised training.

try:
    images = phantoms(50, args.size) if args.data is None else load_images(args.data, args.size)
except (FileNotFoundError, ValueError, ImportError) as error:
    sys.exit(f"error: {error}")
if len(images) < 2:
    sys.exit(f"error: {args.data} has {len(images)} image: at least 2 are needed, one to train and one to test.")
n_test = max(1, len(images) // 10) if args.data else 10
images = images.to(args.device)
x_train, x_test = images[:-n_test], images[-n_test:]

physics = dinv.physics.Tomography(
    angles=args.views, img_width=args.size, normalize=True, adjoint_via_backprop=True, device=args.device
)
sqnorm = float(physics.operator_norm) ** 2
if torch.device(args.device).type == "cpu":  # the same operator as a sparse matrix, more than ten times as fast
    physics = SparseLinearPhysics.from_physics(physics, (1, args.size, args.size))

with torch.no_grad():
    y_train, y_test = physics.A(x_train), physics.A(x_test)

supervised = args.loss == "sup"
train_set = TensorDataset(x=x_train if supervised else None, y=y_train, use_dict_output=True)
test_set = TensorDataset(x=x_test, y=y_test, use_dict_output=True)
order = torch.Generator().manual_seed(args.seed)
train_loader = DataLoader(train_set, batch_size=args.batch_size, shuffle=True, generator=order)
test_loader = DataLoader(test_set, batch_size=args.batch_size)

# %%
# Model
# -----
#
# The reconstruction is the fixed point of DE-Grad (eq. 11) with a denoiser pretrained on natural images. The operator has
# norm 1 and the data have no noise, so the data term gets a large weight. The solver finds the fixed point, and the hook differentiates it. With
# ``--backward jfb``, the Jacobian-free gradient is used instead.

data_weight = 50.0
model = DEQReconstructor(
    DEGrad(EquilibriumUNet(pretrained="gray"), stepsize=1 / (data_weight + 1), data_weight=data_weight),
    solver=Solver("anderson", max_iter=100, tol=1e-4),
    hook=ModularIDHook(Solver("gmres", max_iter=50, tol=1e-2), mode=args.backward),
).to(args.device)

# %%
# The model before training, for comparison.

psnr = dinv.metric.PSNR()
untrained = DEQReconstructor(model.iteration, solver=replace(model.solver, on_failure="ignore")).eval()
with torch.no_grad():
    psnr_untrained = psnr(untrained(y_test, physics), x_test)
print(f"Before training: {psnr_untrained.mean():.2f} dB; {untrained.forward_stat.outcome}")

# %%
# Training
# --------
#
# Measurement consistency trains the components that the views measure. Equivariance to 360 rotations trains the others. A contraction loss keeps
# the fixed point unique. The paper's weight :math:`\alpha = 100` belongs to measurements that are not normalised, whose squared error is
# :math:`\|A\|^2` times ours. The weight of the contraction loss belongs to errors of images, and is multiplied with the weight that these have here.

rotations = dinv.transform.Rotate(
    limits=360, multiples=1, positive=True, interpolation_mode="bilinear", rng=torch.Generator().manual_seed(args.seed)
)
if supervised:
    of_images, losses = 1.0, [dinv.loss.SupLoss()]
else:
    of_images = args.alpha / sqnorm
    losses = [dinv.loss.MCLoss(), dinv.loss.EILoss(rotations, weight=of_images)]
of_step = model.iteration.stepsize.item() if args.backward == "jfb" else 1.0  # the size of a Jacobian-free gradient
losses.append(ContractionLoss(bound=0.85, weight=0.05 * of_images * of_step))

optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
trainer = ResumableTrainer(
    model=model,
    physics=physics,
    optimizer=optimizer,
    scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs),
    train_dataloader=train_loader,
    epochs=args.epochs,
    losses=losses,
    metrics=dinv.metric.PSNR(),
    compute_train_metrics=False,
    device=args.device,
    save_path=out,
    resume=args.resume,
    config={k: v for k, v in vars(args).items() if k not in ("device", "out", "resume")},
)
start = time.time()
try:
    model = trainer.train()
except KeyboardInterrupt:
    sys.exit(f"\nInterrupted. Continue with the same command and --resume; checkpoints are in {out}.")
except ValueError as error:
    if not args.resume:
        raise
    sys.exit(f"error: {error}")
seconds = time.time() - start

# %%
# Test images
# -----------
#
# Filtered back-projection (FBP) is the starting point of the solver, and the DEQ is its result. The record also holds the PSNR before training.

trainer.test(test_loader, compare_no_learning=False)
model.eval()
with torch.no_grad():
    x_fbp = physics.fbp(y_test)
    x_deq = model(y_test, physics)
psnr_fbp, psnr_deq = psnr(x_fbp, x_test), psnr(x_deq, x_test)

n_shown = min(3, len(x_test))
dinv.utils.plot(
    {"ground truth": x_test[:n_shown], "FBP": x_fbp[:n_shown].clamp(0, 1), "DEQ": x_deq[:n_shown].clamp(0, 1)},
    subtitles=[["", f"{a:.1f} dB", f"{b:.1f} dB"] for a, b in zip(psnr_fbp[:n_shown], psnr_deq[:n_shown], strict=True)],
    rescale_mode="clip",
    save_fn=out / "reconstructions.png",
    dpi=200,
)

# %%
# The residual of each test image falls until it reaches the tolerance. Each sample stops independently of the others. The certificate says whether
# the fixed points are unique.

print(model.certify(y_test[:3], physics, x_gt=x_test[:3]).outcome)

figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
for trace, steps in zip(model.forward_stat["rel_trace"], model.forward_stat["nstep"].int(), strict=True):
    axis.semilogy(range(1, steps + 1), trace[:steps].cpu(), color="tab:blue", alpha=0.5)
axis.axhline(model.solver.tol, color="gray", linestyle="--", label="tolerance")
axis.set(xlabel="evaluations of F", ylabel="relative residual", title="Forward solve of the test images")
axis.legend()
figure.savefig(out / "residuals.png", dpi=200)
plt.show()

# %%
# The record of the run.

record = {
    **vars(args),
    "images": {"train": len(x_train), "test": len(x_test)},
    "steps": args.epochs * len(train_loader),
    "psnr_fbp": psnr_fbp.tolist(),
    "psnr_untrained": psnr_untrained.tolist(),
    "psnr_deq": psnr_deq.tolist(),
    "evaluations": model.forward_stat.evaluations,
    "residual": model.forward_stat.residual.max().item(),
    "seconds": round(seconds, 1),
    "versions": {"torch": torch.__version__, "deepinv": dinv.__version__},
}
(out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
print(f"PSNR on unseen images: FBP {psnr_fbp.mean():.2f} dB, DEQ {psnr_deq.mean():.2f} dB")
