r"""Settings of all tests: one thread, which is faster for problems this small, and the same on every machine."""

import torch

torch.set_num_threads(1)
