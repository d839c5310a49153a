r"""
The pretrained networks that the methods start from
===================================================
"""

import subprocess
import sys
from pathlib import Path

import deepinv as dinv
import torch
from data import CHANNELS, HERE

SHIPPED = {1: "gray", 2: "complex"}  # denoisers of 16-32-64 feature maps


def weights_of(
    task: str, kind: str | None, data: Path, channels: tuple[int, ...] = CHANNELS, device: str = "cpu"
) -> str | None:
    r"""Pretrained weights: shipped, or deepinv's, or else trained here once by ``pretrain_denoiser.py``.

    :param str kind: ``"unet"``, ``"dncnn"`` or ``None``, which needs none.
    :param tuple channels: feature maps of the U-Net.
    :param str device: what it is trained on.
    """
    if kind is None:
        return None
    n = 1 if task == "ct" else 2
    if kind == "unet" and tuple(channels) == CHANNELS:
        return SHIPPED[n]
    name = f"{kind}-{n}" + ("-" + "-".join(map(str, channels)) if kind == "unet" else "")
    path = Path("runs") / "paper" / f"{name}.pt"
    if not path.exists() and kind == "dncnn" and n == 1:  # deepinv has none of two channels
        download(path)
    if not path.exists():
        print(f"Training {path} once ...", file=sys.stderr)
        bsds = data / "bsds500_gray_256.npz"
        command = [sys.executable, str(HERE / "pretrain_denoiser.py"), "--out", str(path), "--in-channels", str(n)]
        command += ["--device", device]
        command += ["--data", str(bsds)] if bsds.exists() else []
        # patches of twice the receptive field of ten layers: a larger one only costs
        command += ["--model", "dncnn", "--patch", "40"] if kind == "dncnn" else ["--channels", *map(str, channels)]
        command += ["--contraction", "0.9"] if kind == "unet" else []
        subprocess.run(command, check=True)
    return str(path)


def download(path: Path) -> None:
    r"""Write deepinv's weights of a grey DnCNN to a file, if there is a way to get them."""
    try:
        net = dinv.models.DnCNN(1, 1, pretrained="download")
    except OSError as error:  # as all errors of networks are
        print(f"deepinv's DnCNN cannot be downloaded ({error}).", file=sys.stderr)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"settings": {"in_channels": 1, "out_channels": 1}, "state_dict": net.state_dict()}, path)
