r"""Settings of all tests: one thread, which is faster for problems this small, and the same on every machine."""

import pytest
import torch

torch.set_num_threads(1)
pytest.register_assert_rewrite("tests.browser", "tests.saved_files")  # so that their failures show values
