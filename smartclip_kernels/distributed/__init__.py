"""One-sided distribution: a rank scores its own rows of one side against all rows of the other, and nothing else.

The lighter side travels: texts, or with masks images, where a text is twice as wide (with more than twice as many
images as texts, texts and masks). Scores of own images × all texts give the images' states (states.py) at once and a
part of every text's. Those parts, a few numbers a text, go to the text's owner, which merges them in rank order; its
states and the weights of its losses come back to everyone for the gradients. grad_image is then local, and each rank's
part of grad_text goes home and is summed there, again in rank order. Two thirds of the products of gathering both
towers, half of the traffic.

An objective without statistics makes loss and gradients in one sweep; its sums need no states.
"""

from smartclip_kernels.distributed.exchange import group_of
from smartclip_kernels.distributed.loss import EXACT, Semantics, loss, mean
from smartclip_kernels.distributed.strategies import STRATEGIES

__all__ = ["EXACT", "STRATEGIES", "Semantics", "group_of", "loss", "mean"]
