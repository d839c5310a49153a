r"""
Table of the pretrained networks
================================

What ``pretrain_denoiser.py`` measured is in the files of the weights themselves.
"""

import torch
from data import ROOT

ROWS = {"gray": "1", "complex": "2 (complex)", "color": "3 (RGB)"}


def render() -> str:
    r"""PSNR and contraction of the pretrained networks that ship, in reStructuredText."""
    heads = ["weights", "channels", "σ = 0.02", "σ = 0.05", "σ = 0.1", "norm at clean images", "at σ = 0.05"]
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in [heads, *map(_row, ROWS)]:
        lines += [f"   {'* -' if i == 0 else '  -'} {text}" for i, text in enumerate(row)]
    return "\n".join(lines)


def _row(name: str) -> list[str]:
    file = ROOT / "deepinv_deq" / "weights" / f"{name}.pt"
    about = torch.load(file, map_location="cpu", weights_only=True)["about"]
    psnrs = [f"{about[f'denoised_psnr_{s}']:.1f} ({about[f'noisy_psnr_{s}']:.1f})" for s in ("0.02", "0.05", "0.1")]
    return [f'``"{name}"``', ROWS[name], *psnrs, *(f"{about[f'jacobian_norm_{s}']:.2f}" for s in ("0", "0.05"))]
