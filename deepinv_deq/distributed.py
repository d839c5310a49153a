r"""The old name of :mod:`deepinv_deq.training.distributed`."""

from deepinv_deq.training.distributed import SynchronisedDenoiser

__all__ = ["SynchronisedDenoiser"]
