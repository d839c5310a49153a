r"""
Pretrain the denoiser of a DEQ on natural images
================================================

Trains :class:`deepinv_deq.EquilibriumUNet` to remove Gaussian noise of random strength, as the paper does before it trains
a DEQ (section 4.2.1, on BSDS500). The weights that ship with the package, ``EquilibriumUNet(pretrained="gray")``, come from

.. code-block:: bash

    python examples/paper/pretrain_denoiser.py --data ../shared/data/bsds500_gray_256.npz --out gray.pt
    python examples/paper/pretrain_denoiser.py --data ../shared/data/bsds500_gray_256.npz --start gray.pt --steps 350 --lr 5e-4 \
        --batch-size 8 --contraction 0.9 --contraction-steps 350 --out deepinv_deq/weights/gray.pt

``"complex"`` from ``--in-channels 2 --steps 2400 --contraction 0.9 --contraction-steps 900``, and ``"color"`` from ``--in-channels 3
--steps 1600 --contraction 0.9 --contraction-steps 600``.

With ``--in-channels 2`` the images get a smooth random phase, and the denoiser is one of complex images, as MRI needs it. With
``--in-channels 3`` the images are recoloured: no colour photographs are used. The grey patch is the luminance; the chroma is smooth, and
follows a random palette of four colours along a blurred mixture of that patch and another one. Without ``--data`` the script trains on
generated phantoms. ``--model dncnn`` trains deepinv's DnCNN in the same way, for PnP and RED.

The last line says how well held-out images are denoised, and the largest norm of the Jacobian. The file keeps these numbers under
``"about"``, where ``weights_table.py`` finds them. With ``--steps 0 --start gray`` nothing is trained, and what ships is measured.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from deepinv.models import DnCNN
from tqdm import trange

from deepinv_deq import EquilibriumUNet
from deepinv_deq.datasets import load_images, phantoms
from deepinv_deq.files import save_intact
from deepinv_deq.spectra import jacobian_norm

parser = argparse.ArgumentParser(description="Train EquilibriumUNet as a blind Gaussian denoiser.")
parser.add_argument("--data", help=".npz with 'images' and optionally 'split', or folder of images; default: phantoms")
parser.add_argument("--model", choices=["unet", "dncnn"], default="unet")
parser.add_argument("--in-channels", type=int, choices=[1, 2, 3], default=1, help="2: complex, 3: colour")
parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64])
parser.add_argument("--norm", choices=["spectral", "weight"], default="spectral")
parser.add_argument("--sigma", type=float, default=0.1, help="largest noise level, images in [0, 1]")
parser.add_argument("--steps", type=int, default=2000)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--patch", type=int, default=64)
parser.add_argument("--upright", action="store_true", help="patches as they are, not mirrored and turned at random")
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--contraction", type=float, help="penalise Jacobians whose norm is above this, such as 0.9")
parser.add_argument(
    "--contraction-steps", type=int, default=200, help="how many of the last steps do so: they cost more"
)
parser.add_argument("--start", help="weights to start from")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--out", required=True, help="file for the weights")
args = parser.parse_args()

# %%
# Patches
# -------
#
# Images of the test split are never seen; without splits, the last tenth is held out.

try:
    images = load_images(args.data) if args.data else phantoms(200, 128, args.seed)
except (FileNotFoundError, ValueError) as error:
    sys.exit(f"error: {error}")
split = np.load(args.data).get("split") if str(args.data).endswith(".npz") else None
held_out = torch.arange(len(images)) >= 0.9 * len(images) if split is None else torch.from_numpy(split == "test")
train, test = images[~held_out], images[held_out][:32]
if min(images.shape[-2:]) < args.patch:
    sys.exit(f"error: images of {tuple(images.shape[-2:])} are smaller than --patch {args.patch}")
rng = torch.Generator().manual_seed(args.seed)
torch.manual_seed(args.seed)


def draw(shape: tuple[int, ...] = ()) -> torch.Tensor:
    """Uniform random numbers of the run."""
    return torch.rand(shape, generator=rng)


def with_phase(x: torch.Tensor) -> torch.Tensor:
    """Real and imaginary part of images with a linear phase, of up to one turn over the image, at a random offset."""
    across, down, offset = 2 * torch.pi * draw((3, len(x), 1, 1, 1))
    column, row = (
        torch.linspace(-0.5, 0.5, side).reshape(shape)
        for side, shape in zip(x.shape[:1:-1], ((1, -1), (-1, 1)), strict=True)
    )
    phase = offset + column * across + row * down
    return torch.cat([x * phase.cos(), x * phase.sin()], dim=1)


def recoloured(x: torch.Tensor) -> torch.Tensor:
    """RGB images whose luminance is that of grey images, up to clipping, and whose chroma is smooth and random."""
    share, strength = draw((2, len(x), 1, 1, 1))
    mixed = share * x + (1 - share) * x.roll(1, dims=0).flip(-1)
    for _ in range(2):  # nearly a Gaussian
        mixed = torch.nn.functional.avg_pool2d(mixed, 7, 1, 3, count_include_pad=False)
    low, high = (extreme(mixed, dim=(1, 2, 3), keepdim=True) for extreme in (torch.amin, torch.amax))
    position = 3 * (mixed - low) / (high - low).clamp_min(1e-3)
    weights = (1 - (position - torch.arange(4.0).reshape(1, 4, 1, 1)).abs()).relu()
    palette = draw((len(x), 4, 3))
    palette = palette - (palette @ torch.tensor([0.299, 0.587, 0.114]))[..., None]
    return (x + 0.8 * strength * torch.einsum("nphw,npc->nchw", weights, palette)).clamp(0, 1)


with_channels = {1: lambda x: x, 2: with_phase, 3: recoloured}[args.in_channels]


def batch() -> torch.Tensor:
    """Random patches, randomly mirrored and turned unless ``--upright``."""
    pick = torch.randint(len(train), (args.batch_size,), generator=rng)
    top, left = (int(draw() * (side - args.patch + 1)) for side in train.shape[-2:])
    x = train[pick, :, top : top + args.patch, left : left + args.patch]
    if not args.upright:
        x = torch.rot90(x.flip(-1) if draw() < 0.5 else x, int(draw() * 4), (-2, -1))
    return with_channels(x)


# %%
# Training
# --------
#
# A good denoiser is not yet a contraction: along some edges it amplifies, and a DEQ made of it has no fixed point. The last
# steps may therefore penalise the norm of its Jacobian, which the package estimates with a few vector-Jacobian products.


class Denoise:
    """Gives ``jacobian_norm`` the denoiser as the part of an iteration that must contract."""

    def contractive_part(self, x: torch.Tensor, exact: bool) -> tuple[torch.Tensor, None]:
        return model(x), None


if args.model == "unet":
    model = EquilibriumUNet(args.in_channels, channels=args.channels, norm=args.norm, pretrained=args.start)
    settings = model.settings
else:
    settings = {"in_channels": args.in_channels, "out_channels": args.in_channels, "depth": 10, "nf": 48}
    model = DnCNN(**settings, pretrained=None)
model.to(args.device)
optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
start = time.time()
for step in (bar := trange(args.steps, disable=None)):  # no bar in a log file
    x = batch()
    noisy = (x + args.sigma * draw((len(x), 1, 1, 1)) * torch.randn(x.shape, generator=rng)).to(args.device)
    loss = (model(noisy) - x.to(args.device)).square().mean()
    if args.contraction and step >= args.steps - args.contraction_steps:
        part = noisy[:4, :, :32, :32]  # what is amplified is local
        norm = jacobian_norm(Denoise(), part, iterations=8, rng=rng)
        loss = loss + 0.3 * (norm - args.contraction).relu().square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    bar.set_postfix(loss=f"{loss.item():.1e}")

# %%
# Held-out images, and the file
# -----------------------------

model.eval().cpu()
test, about = with_channels(test), {}
for sigma in (0.02, 0.05, 0.1):
    noise = sigma * torch.randn(test.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        psnr = [-10 * torch.log10((z - test).square().mean()).item() for z in (test + noise, model(test + noise))]
    about |= {f"noisy_psnr_{sigma:g}": round(psnr[0], 3), f"denoised_psnr_{sigma:g}": round(psnr[1], 3)}


def largest_norm(images: torch.Tensor, pairs: int = 30) -> float:
    """Largest norm of the denoiser's Jacobian at images, by power iteration on J J^T, with J from a second differentiation."""
    x, b = images.detach().requires_grad_(), torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    out, dummy = model(x), torch.zeros_like(images).requires_grad_()
    (linear,) = torch.autograd.grad(out, x, dummy, create_graph=True)  # J^T dummy, whose derivative in dummy is J^T
    for _ in range(pairs):
        b = b / b.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        (down,) = torch.autograd.grad(out, x, b, retain_graph=True)
        (b,) = torch.autograd.grad(linear, dummy, down, retain_graph=True)
    return b.flatten(1).norm(dim=1).max().sqrt().item()


side = min(64, *test.shape[-2:])
patches = test[:16, :, :side, :side]
noise = torch.randn(patches.shape, generator=torch.Generator().manual_seed(3))
for sigma in (0.0, 0.05):
    parts = (patches + sigma * noise).split(4)
    about[f"jacobian_norm_{sigma:g}"] = round(max(largest_norm(part) for part in parts), 4)
about["held_out_images"] = len(test)
about |= {"steps": args.steps, "seconds": round(time.time() - start)} if args.steps else {}
Path(args.out).parent.mkdir(parents=True, exist_ok=True)
save_intact({"settings": settings, "state_dict": dict(model.state_dict()), "about": about}, args.out)
psnrs = ", ".join(f"{about[f'denoised_psnr_{sigma:g}']:.2f} dB at {sigma:g}" for sigma in (0.02, 0.05, 0.1))
print(
    f"{args.out}: {Path(args.out).stat().st_size / 1024:.0f} KiB after {time.time() - start:.0f} s; held-out PSNR {psnrs}; largest norm of the "
    f"Jacobian {about['jacobian_norm_0']:.3f} without noise, {about['jacobian_norm_0.05']:.3f} at 0.05"
)
