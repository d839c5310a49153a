r"""
Training in several processes
=============================

Each process solves its part of every batch, and PyTorch averages the gradients. The average equals the gradient of the whole batch in
one process. Solves in different processes may stop at different iterations, because a process waits for the others only when gradients
are averaged.

.. code-block:: bash

    torchrun --nproc_per_node=2 examples/advanced/ddp_train.py --epochs 4
    python examples/advanced/ddp_train.py --epochs 8 --resume     # one process goes on from the checkpoint of two

The loss needs no ground truth. The images are generated. The script runs on CPU (gloo) or GPUs (nccl).
"""

import argparse
import os
from pathlib import Path

import deepinv as dinv
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from deepinv_deq import DEProx, DEQReconstructor, EquilibriumUNet, FixedPointResidual, ModularIDHook, Solver
from deepinv_deq.datasets import phantoms
from deepinv_deq.losses import ContractionLoss


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a DEQ for inpainting without ground truth, in any number of processes."
    )
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8, help="in all processes together")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--out", type=Path, default=Path("runs/ddp"), help="folder for the checkpoint")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    return parser.parse_args()


def save(path: Path, **state: object) -> None:
    # write and rename, so that a killed process leaves no partial file
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def main() -> None:
    args = arguments()
    several = "RANK" in os.environ  # set by torchrun
    gpu = torch.cuda.is_available()
    if several:
        dist.init_process_group("nccl" if gpu else "gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    if args.batch_size % world:
        raise SystemExit(
            f"--batch-size {args.batch_size} cannot be shared by {world} processes: use a multiple of {world}."
        )
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpu else "cpu")
    torch.manual_seed(0)  # the same mask and weights everywhere

    mask = (torch.rand(1, args.size, args.size) > 0.3).float()
    physics = dinv.physics.Inpainting((1, args.size, args.size), mask=mask, device=device)
    y = physics.A(phantoms(args.images, args.size).to(device)).cpu()
    dataset = TensorDataset(y)
    sampler = DistributedSampler(dataset, num_replicas=world, rank=rank, seed=0)
    loader = DataLoader(dataset, args.batch_size // world, sampler=sampler)

    model = DEQReconstructor(
        DEProx(EquilibriumUNet(pretrained="gray")),
        solver=Solver("anderson", max_iter=100, tol=1e-3, on_failure="ignore"),
        hook=ModularIDHook(Solver("gmres", max_iter=30, tol=1e-2, on_failure="ignore")),
    ).to(device)
    parallel = DistributedDataParallel(model) if several else model
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    rotate = dinv.transform.Rotate(multiples=90, positive=True, interpolation_mode="nearest")
    # ContractionLoss keeps the fixed point unique: pretrained weights alone need not contract.
    losses = [dinv.loss.MCLoss(), dinv.loss.EILoss(rotate, no_grad=True), ContractionLoss()]
    metric = FixedPointResidual()

    path, start = args.out / "checkpoint.pt", 0
    if args.resume:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(checkpoint["model"])  # of the bare model, so it loads on any number of processes
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["epoch"] + 1
        if rank == 0:
            print(f"resumed after epoch {start} of a run with {checkpoint['world']} process(es)", flush=True)

    for epoch in range(start, args.epochs):
        sampler.set_epoch(epoch)
        torch.manual_seed(1000 * epoch + rank)  # different rotations in every process
        total, residual = torch.zeros((), device=device), torch.zeros((), device=device)
        for (batch,) in loader:
            batch = batch.to(device)
            optimizer.zero_grad()
            x_net = parallel(batch, physics)
            residual += metric(x_net, model=parallel).mean() / len(loader)
            loss = sum(term(x_net=x_net, y=batch, physics=physics, model=parallel).mean() for term in losses)
            loss.backward()
            optimizer.step()
            total += loss.detach() / len(loader)
        if several:
            dist.all_reduce(total)
            dist.all_reduce(residual)
        if rank == 0:
            print(
                f"epoch {epoch + 1}: loss {total.item() / world:.4e}, residual {residual.item() / world:.1e}",
                flush=True,
            )
            save(path, model=model.state_dict(), optimizer=optimizer.state_dict(), epoch=epoch, world=world)
    if several:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
