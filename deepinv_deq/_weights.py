r"""The old name of :mod:`deepinv_deq.files`."""

from deepinv_deq.files import load_intact, read_weights

__all__ = ["load_intact", "read_weights"]
