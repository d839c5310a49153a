r"""Fixed-point iterations :math:`F_\theta(x; y)` for imaging inverse problems, and how they are bound to a measurement."""

from deepinv_deq.iterations.base import FixedPointIteration, linear_reconstruction, measurement
from deepinv_deq.iterations.bound import BoundIteration
from deepinv_deq.iterations.from_optim import FromOptim
from deepinv_deq.iterations.gradient import DEGrad, DEProx
from deepinv_deq.iterations.splitting import DEADMM, DEHQS

__all__ = [
    "DEADMM",
    "DEHQS",
    "BoundIteration",
    "DEGrad",
    "DEProx",
    "FixedPointIteration",
    "FromOptim",
    "linear_reconstruction",
    "measurement",
]
