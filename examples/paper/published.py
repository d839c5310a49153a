r"""
The paper's own numbers
=======================
"""

_METHODS = ("deq-id", "deq-jfb", "unet", "unrolled-1", "unrolled-3", "unrolled-5", "unrolled-7")
_ROWS = {  # Table 1: test PSNR in dB
    ("mri", "sup"): (32.61, 32.51, 30.587, 29.16, 29.45, 29.33, 29.57),
    ("mri", "ei"): (31.34, 29.39, 28.02, 27.35, 27.56, 27.12, 27.24),
    ("ct", "sup"): (36.77, 32.80, 36.33, 35.14, 34.57, 34.99, 35.80),
    ("ct", "ei"): (35.41, 33.52, 34.03, 31.73, 32.01, 32.34, 34.66),
}
TABLE_1 = {(task, m, loss): v for (task, loss), row in _ROWS.items() for m, v in zip(_METHODS, row, strict=True)}
TABLE_1 |= {("mri", "denoiser", "none"): 25.07, ("ct", "denoiser", "none"): 31.90}
TABLE_2 = {  # equivariance of the pipeline in dB: EI, supervised
    ("mri", "deq-id"): (34.64, 34.66),
    ("mri", "unet"): (28.01, 25.62),
    ("ct", "deq-id"): (47.57, 39.24),
    ("ct", "unet"): (42.55, 36.48),
}
TABLE_3 = {"mri": (39.96, 32.59, 37.50), "ct": (52.44, 46.75, 33.94)}  # of F: EI, supervised, initialisation
