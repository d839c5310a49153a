r"""
Train and test one cell of the paper's tables
=============================================

.. code-block:: bash

    python examples/paper/run.py --task ct --method deq-id --loss ei --scale small --seed 0     # one cell
    python examples/paper/run.py --all --scale paper --jobs 2                                   # the matrix
    python examples/paper/tables.py                                                             # its tables

A cell writes one record to ``examples/paper/results``. An interrupted one is resumed by the same command, a finished one is
not run again unless ``--force`` is given. Records of DEQs without a checked fixed point count as not run.
"""

import json
import shutil
import sys
from pathlib import Path

import records
import torch
from commands import arguments, parsed, run_each
from data import CHANNELS
from records import folder_of, is_outdated, matrix, path_of, read_record, variant_of, write
from settings import NotSearched, found_settings, outdated_settings
from training import measure_again, run_cell


def finished(path: Path) -> records.Row | None:
    r"""The record of a cell that need not run again."""
    record = read_record(path)
    return None if record is None or is_outdated(record) else record


def main() -> None:
    parser = arguments("Train and test one cell of the paper's tables, or all.", "every cell that has no record")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="run again what is on record")
    parser.add_argument("--again", action="store_true", help="only measure the trained model of a finished cell again")
    parser.add_argument("--denoiser", type=Path, help="weights to start from instead; the record is kept apart")
    parser.add_argument(
        "--channels", type=int, nargs="+", default=CHANNELS, help="feature maps; the records of others are kept apart"
    )
    parser.add_argument(
        "--bound", type=float, help="bound of the penalty in the place of the task's; the record is kept apart"
    )
    parser.add_argument("--epochs", type=int, help="epochs in the place of the scale's; the record is kept apart")
    parser.add_argument("--defaults", action="store_true", help="train with defaults where nothing was searched")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    args = parsed(parser)
    args.channels = tuple(args.channels)
    if args.denoiser and (args.all or not args.denoiser.exists()):
        sys.exit(f"error: --denoiser is for one cell and takes a file of pretrain_denoiser.py, got {args.denoiser}.")
    if args.all and args.again:
        sys.exit("error: --again is for one cell: give --task, --method and --loss.")
    if args.bound is not None and not 0 < args.bound < 1:
        sys.exit(f"error: --bound must be in (0, 1), got {args.bound:g}.")
    if args.epochs is not None and args.epochs < 1:
        sys.exit(f"error: --epochs must be at least 1, got {args.epochs}.")
    others = {name: getattr(args, name) for name in ("bound", "epochs") if getattr(args, name) is not None}
    variant = variant_of(args.denoiser, args.channels, **others)
    if args.all:
        cells = [
            ["--task", cell[0], "--method", cell[1], "--loss", cell[2], "--seed", str(cell[3])]
            for cell in matrix(args.scale)
            if args.force or finished(path_of(args.scale, *cell, variant)) is None
        ]
        common = ["--device", args.device, "--no-progress", "--channels", *map(str, args.channels)]
        common += [word for name, of in others.items() for word in (f"--{name}", str(of))]
        common += [flag for flag in ("--force", "--defaults") if getattr(args, flag[2:])]
        run_each(__file__, args, cells, common)
    cell = (args.task, args.method, args.loss, args.seed)
    path = path_of(args.scale, *cell, variant)
    if args.again:
        weights = folder_of(path) / "model.pt"
        trained = read_record(path)
        if trained is None or not weights.exists():
            sys.exit(f"error: --again needs the record {path} and the model {weights}.")
        report(cell, measure_again(trained, weights, data=args.data, device=args.device), path)
        return
    known = None if args.force else finished(path)
    if known is not None:
        changed = {} if variant else outdated_settings(known["config"], found_settings())
        other = ", ".join(f"{name} {then} instead of {now}" for name, (then, now) in changed.items())
        print(
            f"{path} is there ({known['psnr']['mean']:.2f} dB{f', made with other settings: {other}' if other else ''}); "
            "--force runs it again."
        )
        return
    folder = folder_of(path)
    if args.force:
        shutil.rmtree(folder, ignore_errors=True)
    override = others | ({"channels": args.channels} if args.channels != CHANNELS else {})
    try:
        record, model = run_cell(
            *cell[:3],
            args.scale,
            args.seed,
            data=args.data,
            device=args.device,
            override=override,
            defaults=args.defaults,
            out=folder,
            progress=not args.no_progress,
            denoiser=args.denoiser,
        )
    except (FileNotFoundError, NotSearched) as error:
        sys.exit(f"error: {error}")
    except ValueError as error:
        if "is of another run" not in str(error):
            raise
        sys.exit(f"error: {error} Or start it afresh with --force.")
    except KeyboardInterrupt:
        sys.exit(f"\nInterrupted. The same command continues from the last checkpoint in {folder}.")
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / "model.pt")
    report(cell, record, path)


def report(cell: tuple[str, str, str, int], record: records.Row, path: Path) -> None:
    r"""Write a record, and say what is in it."""
    write(path, json.dumps(record, indent=1) + "\n")
    name, point = " ".join(map(str, cell)), record.get("fixed_point")
    spread = f", spread {max(point['spread_db']['all']):.3f} dB" if point else ""
    print(
        f"{name}: {record['psnr']['mean']:.2f} ± {record['psnr']['std']:.2f} dB{spread}, SSIM {record['ssim']['mean']:.3f}, start "
        f"{record['psnr_start']['mean']:.2f} dB; {record['steps']} steps, {record['seconds']:.0f} s; settings of "
        f"{record['config'].get('settings_from', 'small')}; {path}"
    )


if __name__ == "__main__":
    main()
