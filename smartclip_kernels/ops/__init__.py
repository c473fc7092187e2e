"""The torch ops `smartclip::*`: schema, implementation, fake, autograd, autocast.

Ops return per-anchor losses; reductions are made above them, so the anchors' weights u and v of the backward pass are
simply the incoming gradients. `backend` "" and `workspace` 0 are resolved once, in the forward pass, and handed to the
backward pass, which runs on another thread. Registered with `Library.define` and a thin autograd kernel instead of
`custom_op`, which costs several times as much a call.
"""

from __future__ import annotations

from smartclip_kernels.ops import fakes, kernels  # importing them registers them
from smartclip_kernels.ops.autograd import first_order, needed_gradients
from smartclip_kernels.ops.casts import autocast

__all__ = ["autocast", "fakes", "first_order", "kernels", "needed_gradients"]
