r"""Implicit differentiation of a fixed point (Proposition 1). All implicit-differentiation code is in this package.

For :math:`\hat x = F(\hat x)` and a cotangent :math:`g`, the paper's eq. 10 says

.. math::

    g \, \frac{\partial \hat x}{\partial \theta} = b \, \frac{\partial F}{\partial \theta}
    \quad \text{where} \quad b = b \, \frac{\partial F}{\partial x} + g .

The forward pass builds no autograd graph of :math:`F`. The backward pass builds one, at :math:`\hat x`, solves for :math:`b`
with vector-Jacobian products of that graph, and frees it. Forward mode solves
:math:`v = \frac{\partial F}{\partial x} v + \frac{\partial F}{\partial \theta} \dot\theta` with Jacobian-vector products.

- ``hook``: :class:`ModularIDHook`, the entry.
- ``functions``: the autograd functions.
- ``adjoint``: the adjoint solve.
- ``forward_mode``: the tangent of a fixed point.
- ``unchanged``: whether the map is still that of the forward pass.
- ``context``: autocast, inference mode and ``torch.compile`` in the backward pass.
"""

from deepinv_deq.implicit.hook import DifferentiableMap, ModularIDHook

__all__ = ["DifferentiableMap", "ModularIDHook"]
