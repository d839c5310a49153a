r"""Training that can be killed at any time and resumed as if nothing had happened, in one process or several."""

from deepinv_deq.training.checkpoints import latest_checkpoint, read_checkpoint
from deepinv_deq.training.trainer import ResumableTrainer

__all__ = ["ResumableTrainer", "latest_checkpoint"]
_read = read_checkpoint  # its name in 0.1, which scripts of users import
