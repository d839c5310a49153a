"""The plots at the top of ``results.md``, for every scale with records."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
PLOTS = {  # file: what a reader sees who cannot see it, and the caption
    "dots": (
        "PSNR of every method, with standard errors, and the paper's",
        "PSNR of the test images by method. Filled: ours, with the standard error over test images. Hollow: the paper's, on"
        " other images and at other sizes. Compare differences between methods, not absolute values.",
    ),
    "gaps": (
        "Difference to supervised training by loss",
        "How far each training without ground truth is from supervised training of the same DEQ: paired differences over test"
        " images, with two standard errors.",
    ),
    "times": (
        "PSNR against training time",
        "PSNR against training time. Filled: one core. Hollow: on a GPU that up to 16 trainings shared.",
    ),
    "curves": (
        "PSNR of the test images over the training of all cells",
        "PSNR of the test images during training, mean of the seeds, at the training tolerance. It was not used to choose"
        " settings. The learning rate falls to zero. Colour: method. Line style: training."
        " With equivariant splitting, deepinv rotates the images in these tests, and hides a tenth of the measurements. The tables do neither.",
    ),
    "bound": (
        "PSNR and evaluations against the bound of the penalty",
        "PSNR at the fixed point of validation images, largest spread and evaluations, against the bound of ContractionLoss.",
    ),
}


def render() -> str:
    """Markdown, the larger scale first. Plots that only support the others are in a dropdown."""
    blocks = []
    for scale in ("paper", "small"):
        if not any((ROOT / "examples" / "paper" / "results" / scale).glob("*.json")):
            continue
        measured = any((ROOT / "examples/paper/bound").glob(f"*_{scale}_*.json"))
        names = [name for name in PLOTS if name != "bound" or measured]
        shown = [
            f"![{PLOTS[name][0]}, scale {scale}](_static/{scale}/{name}.png)\n\n*{PLOTS[name][1]}*" for name in names
        ]
        more = "\n\n".join(shown[2:])
        blocks += [*shown[:2], f"````{{dropdown}} More plots of scale {scale}\n\n{more}\n\n````"]
    return "\n\n".join(blocks)
