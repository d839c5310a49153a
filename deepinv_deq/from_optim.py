r"""The import path of 0.1: :class:`FromOptim` is in :mod:`deepinv_deq.iterations`."""

from deepinv_deq.iterations.from_optim import FromOptim

__all__ = ["FromOptim"]
