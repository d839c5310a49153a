r"""Old name of :mod:`deepinv_deq.states`."""

from deepinv_deq.states import WORTH as WORTH
from deepinv_deq.states import Layout as Layout
from deepinv_deq.states import Rows as Rows
from deepinv_deq.states import State as State
from deepinv_deq.states import as_tuple as as_tuple
from deepinv_deq.states import chunks as chunks
from deepinv_deq.states import join as join
from deepinv_deq.states import take as take
