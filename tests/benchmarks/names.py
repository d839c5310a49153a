r"""Names, goals and descriptions that measurements, tables and plots share. Imports nothing, so that plots need no PyTorch."""

from __future__ import annotations

OURS = "deepinv-deq"
WHOLE_BATCH, AN_IMAGE_AT_A_TIME = f"{OURS}, whole batch", f"{OURS}, an image at a time"
BATCH = {"ct": 2, "mri": 2}  # images of parts that need a batch
NAMES = {"ct": "CT 128×128", "mri": "MRI 256×256"}
# time of the fastest other method over ours
TARGETS = {
    "equal error": {"ct": 5.0, "mri": 2.0},
    "equal iterations": {"ct": 1.1, "mri": 1.1},
    "inference": {"ct": 5.0, "mri": 2.0},
}
_OLDER, _UNTRAINED, _SHIPPED, _BOTH = (
    "older, 32-64-128 feature maps",
    "untrained, 32-64-128 feature maps",
    "`{task}-ei` as it ships, 16-32-64 feature maps",
    "`ct-ei`, `mri-ei`",
)
_TEST = "the last test image"
# what a part of the record measures: model and images
MEASURED = {
    "sparse": ("none", "4 random"),
    "counts": (_BOTH + " as they ship", "the last 2 test images"),
    "memory": (_UNTRAINED, "4"),
    "growth of memory": (_UNTRAINED, "2"),
    "equal error": (_SHIPPED, _TEST),
    "equal iterations": (_SHIPPED, _TEST),
    "inference": (_SHIPPED, _TEST),
    "over the limit": (_SHIPPED, _TEST),
    "other solvers": (_SHIPPED, _TEST),
    "overhead": (_BOTH + " as they ship", _TEST),
    "penalty": (_BOTH + " as they ship, at the tolerances of their training", _TEST),
    "scaling": ("untrained, 16-32-64 feature maps", "1 to 16"),
    "threads": (_BOTH + " as they ship", "the last 4 (CT) or 2 (MRI) test images"),
    "data parallel": ("untrained, 16-32-64 feature maps", "2 in each process"),
    "learned start": ("`ct-ei` as it ships, 16-32-64 feature maps", _TEST),
    "options": (_SHIPPED, "the last {batch} test images"),
    "warm starts": (_OLDER, "24 of 64×64 for training, 8 for the PSNR"),
    "accelerator": (_BOTH, _TEST),
    "operations": (_BOTH + " as they ship", _TEST),
}


def measured(part: str) -> dict[str, str]:
    r"""Model and images of a part such as ``"inference, ct"``, for its record."""
    kind, _, task = part.partition(", ")
    model, images = MEASURED[kind]
    names = {"task": task, "batch": BATCH.get(task)}
    return {"model": model.format(**names), "images": images.format(**names)}
