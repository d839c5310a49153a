r"""Settings of all tests: one thread, which is faster for problems this small, and the same random numbers in every run."""

import pytest
import torch

torch.set_num_threads(1)
pytest.register_assert_rewrite("tests.browser", "tests.saved_files")


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)
