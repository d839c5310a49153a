r"""Old name of :mod:`deepinv_deq.states`."""

from deepinv_deq.states import (  # noqa: F401
    WORTH as WORTH,
    Layout as Layout,
    Rows as Rows,
    State as State,
    as_tuple as as_tuple,
    chunks as chunks,
    join as join,
    take as take,
)
