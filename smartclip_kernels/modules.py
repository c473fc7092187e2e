"""The losses as `nn.Module`s with open_clip's constructors and `forward`, and the head that makes SmartCLIP's masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from smartclip_kernels import checks, distributed
from smartclip_kernels.functional import (
    BOTH,
    Direction,
    Strategy,
    TauPlus,
    contrastive_loss,
    siglip_loss,
    smartclip_loss,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Losses = Tensor | dict[str, Tensor]


class _Distributed(nn.Module):
    """Which process group a loss is over, from what open_clip's constructors say about it."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        group: ProcessGroup | None,
        strategy: Strategy,
        backend: str | None,
    ) -> None:
        super().__init__()
        if not 0 <= rank < world_size:
            raise ValueError(f"rank, world_size: got {rank}, {world_size}, needs 0 <= rank < world_size")
        checks.choice("strategy", strategy, tuple(distributed.STRATEGIES))
        self.rank = rank
        self.world_size = world_size
        self.group = group
        self.strategy: Strategy = strategy
        self.backend = backend

    def process_group(self) -> ProcessGroup | None:
        """`group`, or the default one where `world_size` says that there is one. None: this process is all there is.

        Raises:
            RuntimeError: torch.distributed is not initialised.
            ValueError: it was not given this rank or world size.
        """
        if self.world_size == 1:
            return self.group
        group = distributed.group_of(dist.group.WORLD if self.group is None else self.group)
        if (self.rank, self.world_size) != (group.rank(), group.size()):
            needs = f"{group.rank()}, {group.size()}"
            raise ValueError(f"rank, world_size: got {self.rank}, {self.world_size}, needs the group's, {needs}")
        return group


class ClipLoss(_Distributed):
    """`clip_loss` in the place of ``open_clip.ClipLoss``.

    Args:
        local_loss, gather_with_grad: with `world_size`, what open_clip gives once the gradients' mean over ranks is
            taken, as `DistributedDataParallel` does. With gather_with_grad it is the gradient of the whole batch;
            without it, and without local_loss, that of the features is too small by the number of ranks; with
            local_loss alone image and text receive the gradients of their own anchors' terms only, which point
            elsewhere. The scale's is exact always. Without local_loss all ranks return the same number, the loss of the
            whole batch; with it each its share, whose mean over ranks that is.
        cache_labels, use_horovod: accepted; there are no labels to cache, and torch.distributed is what is used.
        rank, world_size: of this process in the group.
        label_smoothing, tau_plus, margin, directions, dims, backend: as in `clip_loss`.
        group: default with a world_size above 1: all of torch.distributed's. With a world_size of 1 the flags say
            nothing: it is `clip_loss` over that group, exact.
        strategy: as in `clip_loss`.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        label_smoothing: float = 0.0,
        tau_plus: TauPlus = 0.0,
        margin: float | None = None,
        directions: Sequence[Direction] = BOTH,
        dims: Sequence[int] | None = None,
        group: ProcessGroup | None = None,
        strategy: Strategy = "gather",
        backend: str | None = None,
    ) -> None:
        super().__init__(rank, world_size, group, strategy, backend)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.use_horovod = use_horovod
        self.label_smoothing = label_smoothing
        self.tau_plus = tau_plus
        self.margin = margin
        self.directions = directions
        self.dims = dims

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        ignore_ids: tuple[Tensor, Tensor] | None = None,
    ) -> Losses:
        """The 0-D loss, or with `output_dict` ``{"contrastive_loss": loss}``; arguments as in `clip_loss`."""
        loss: Tensor = contrastive_loss(
            "softmax",
            image_features,
            text_features,
            None,
            logit_scale,
            logit_bias,
            image_ids,
            text_ids,
            ignore_ids,
            self.label_smoothing,
            "mean",
            self.backend,
            self.process_group(),
            self.strategy,
            self._semantics(),
            tau_plus=self.tau_plus,
            margin=self.margin,
            directions=self.directions,
            dims=self.dims,
        )
        return {"contrastive_loss": loss} if output_dict else loss

    def _semantics(self) -> distributed.Semantics:
        if self.world_size == 1:
            return distributed.EXACT
        return distributed.Semantics(
            sides_apart=self.local_loss and not self.gather_with_grad,
            features_divided=not self.local_loss and not self.gather_with_grad,
            same_value=not self.local_loss,
        )


class SigLipLoss(_Distributed):
    """`siglip_loss` in the place of ``open_clip.SigLipLoss``.

    Args:
        cache_labels: accepted; there are no labels to cache.
        rank, world_size: of this process in the group.
        dist_impl: how open_clip distributes; all are the same loss. "bidir" and "shift", where texts go from neighbour
            to neighbour, are the strategy "ring" here, "reduce" and "gather" are "gather".
        chunk_size: accepted; the logits are never held as a whole, whatever it is.
        group: default with a world_size above 1: all of torch.distributed's.
        dims, backend: as in `siglip_loss`.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        dims: Sequence[int] | None = None,
        group: ProcessGroup | None = None,
        backend: str | None = None,
    ) -> None:
        checks.choice("dist_impl", dist_impl or "bidir", ("bidir", "shift", "reduce", "gather"))
        super().__init__(rank, world_size, group, "gather" if dist_impl in ("reduce", "gather") else "ring", backend)
        self.cache_labels = cache_labels
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size
        self.dims = dims

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        ignore_ids: tuple[Tensor, Tensor] | None = None,
    ) -> Losses:
        """The 0-D loss, or with `output_dict` ``{"contrastive_loss": loss}``; arguments as in `siglip_loss`."""
        loss = siglip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            image_ids=image_ids,
            text_ids=text_ids,
            ignore_ids=ignore_ids,
            dims=self.dims,
            group=self.process_group(),
            strategy=self.strategy,
            backend=self.backend,
        )
        return {"contrastive_loss": loss} if output_dict else loss


class SmartClipLoss(_Distributed):
    """`smartclip_loss` plus a price on masks: sparsity_weight · mean(text_mask) (Xie et al. 2025, arXiv 2507.22264).

    Without the price nothing keeps a mask from passing every dimension, which is CLIP with a cosine. The price is the
    L1 norm of the masks over their number of entries, so that its weight means the same at any width and batch size.

    Args:
        objective: "softmax" or "sigmoid".
        sparsity_weight: what a mask of ones adds to the loss. Not negative.
        label_smoothing, tau_plus, margin, directions, backend, strategy: as in `smartclip_loss`.
        rank, world_size: of this process in the group.
        group: default with a world_size above 1: all of torch.distributed's. Both terms are then over all ranks' texts,
            and a rank returns the number of ranks × its share, as `clip_loss` says.
    """

    def __init__(
        self,
        objective: Literal["softmax", "sigmoid"] = "softmax",
        sparsity_weight: float = 0.0,
        *,
        label_smoothing: float = 0.0,
        tau_plus: TauPlus = 0.0,
        margin: float | None = None,
        directions: Sequence[Direction] = BOTH,
        rank: int = 0,
        world_size: int = 1,
        group: ProcessGroup | None = None,
        strategy: Strategy = "gather",
        backend: str | None = None,
    ) -> None:
        super().__init__(rank, world_size, group, strategy, backend)
        checks.choice("objective", objective, ("softmax", "sigmoid"))
        if not 0 <= sparsity_weight < math.inf:
            raise ValueError(f"sparsity_weight: got {sparsity_weight}, needs a finite number of at least 0")
        self.objective: Literal["softmax", "sigmoid"] = objective
        self.sparsity_weight = sparsity_weight
        self.label_smoothing = label_smoothing
        self.tau_plus = tau_plus
        self.margin = margin
        self.directions = directions

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        text_mask: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        ignore_ids: tuple[Tensor, Tensor] | None = None,
    ) -> Losses:
        """The 0-D total, or with `output_dict` its terms ``{"contrastive_loss": …, "sparsity_loss": …}``.

        The weight is in the term already: open_clip's training loop sums what ends in ``_loss``. `text_mask` is (M, D),
        from a `MaskHead`; the other arguments are those of `smartclip_loss`.
        """
        group = self.process_group()
        contrastive: Tensor = smartclip_loss(
            image_features,
            text_features,
            text_mask,
            logit_scale,
            logit_bias,
            objective=self.objective,
            image_ids=image_ids,
            text_ids=text_ids,
            ignore_ids=ignore_ids,
            label_smoothing=self.label_smoothing,
            tau_plus=self.tau_plus,
            margin=self.margin,
            directions=self.directions,
            group=group,
            strategy=self.strategy,
            backend=self.backend,
        )
        mask = text_mask.to(contrastive.dtype)
        sparsity = self.sparsity_weight * (mask.mean() if group is None else distributed.mean(mask, group))
        if output_dict:
            return {"contrastive_loss": contrastive, "sparsity_loss": sparsity}
        return contrastive + sparsity


class _ClassAttention(nn.Module):
    """One query that reads the tokens and itself (CaiT's class attention, Touvron et al. 2021, arXiv 2103.17239).

    It costs two W×W products a token, a sixth of a transformer layer. The query is among its own keys, so a text that
    is all padding has something to attend to, and no NaN.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, query: Tensor, states: Tensor, padding_mask: Tensor | None) -> Tensor:
        """query (M, 1, W), states (M, T, W), padding_mask (M, T + 1) -> (M, 1, W)."""
        keys = self.norm(torch.cat([query, states], dim=1))
        read, _ = self.attention(keys[:, :1], keys, keys, key_padding_mask=padding_mask, need_weights=False)
        query = query + read
        return query + self.feed_forward(query)


class _Attend(nn.Module):
    """A learned query after `depth` blocks of class attention: (M, T, W) -> (M, W)."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(width))
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(_ClassAttention(width, heads) for _ in range(depth))

    def forward(self, states: Tensor, padding_mask: Tensor | None) -> Tensor:
        if padding_mask is not None:
            padding_mask = nn.functional.pad(padding_mask, (1, 0), value=False)
        query, states = self.query.expand(len(states), 1, -1), self.norm(states)
        for block in self.blocks:
            query = block(query, states, padding_mask)
        return query.squeeze(1)


class _Mean(nn.Module):
    """The mean of the tokens that are no padding, 0 where all are: (M, T, W) -> (M, W)."""

    def forward(self, states: Tensor, padding_mask: Tensor | None) -> Tensor:
        if padding_mask is None:
            return states.mean(1)
        kept = ~padding_mask[:, :, None]
        return torch.where(kept, states, 0).sum(1) / kept.sum(1).clamp(min=1)


class MaskHead(nn.Module):
    """Token states of a text -> which dimensions of the image's embedding it speaks of (SmartCLIP, arXiv 2507.22264).

    A learned query reads the tokens through `depth` blocks of class attention and a linear layer follows; with depth 0
    it is the tokens' mean and a perceptron of one hidden layer. Each dimension gets a probability p = sigmoid(logit) of
    being kept. The mask is p itself (soft), or 1 where p > ½ and 0 elsewhere (hard),
    with p's gradient: the straight-through estimator of Bengio et al. 2013, arXiv 1308.3432.

    At the start p is near `initial_keep` for every text and dimension: the last layer's weights begin with a standard
    deviation of `initial_std` around a bias of logit(initial_keep). A small one starts all texts with nearly the same
    mask (well above ½, hard masks pass everything); a large one starts each with a mask of its own.

    Args:
        width: W, of the token states.
        embed_dim: D, of the embeddings.
        hard: masks of exactly 0 and 1, or soft ones.
        initial_keep: the probability at the start, in (0, 1).
        initial_std: of the last layer's weights at the start; not negative.
        depth, heads: blocks of class attention, and heads in each; heads divides width. Default: 64 dimensions a head.
        explore: in training only, a dimension is kept where logit + noise > 0, with logistic noise (the binary
            Concrete distribution of Maddison et al. 2017, arXiv 1611.00712, at temperature 1). A hard mask is then a
            draw with probability p, so dimensions on the far side of the threshold are tried too. Random numbers come
            from torch's generator of the states' device, which `GradCache` replays.
    """

    def __init__(
        self,
        width: int,
        embed_dim: int,
        *,
        hard: bool = True,
        initial_keep: float = 0.9,
        initial_std: float = 0.02,
        depth: int = 1,
        heads: int | None = None,
        explore: bool = False,
    ) -> None:
        super().__init__()
        heads = max(1, width // 64) if heads is None else heads
        for name, value, least in (
            ("width", width, 1),
            ("embed_dim", embed_dim, 1),
            ("depth", depth, 0),
            ("heads", heads, 1),
        ):
            if value < least:
                raise ValueError(f"{name}: got {value}, needs at least {least}")
        if width % heads:
            raise ValueError(f"heads: got {heads}, needs a divisor of width, {width}")
        if not 0 < initial_keep < 1:
            raise ValueError(f"initial_keep: got {initial_keep}, needs a probability in (0, 1), ends excluded")
        if not initial_std >= 0:
            raise ValueError(f"initial_std: got {initial_std}, needs at least 0")
        self.width = width
        self.hard = hard
        self.explore = explore
        self.read = _Attend(width, heads, depth) if depth else _Mean()
        last = nn.Linear(width, embed_dim)
        hidden = [nn.LayerNorm(width)] if depth else [nn.Linear(width, width), nn.GELU()]
        self.to_logits = nn.Sequential(*hidden, last)
        nn.init.normal_(last.weight, std=initial_std)
        nn.init.constant_(last.bias, math.log(initial_keep / (1 - initial_keep)))

    def forward(self, states: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """
        Args:
            states: (M, T, W), the text encoder's token states.
            padding_mask: (M, T) bool, True at padding, as in `nn.MultiheadAttention`.

        Returns:
            (M, D) masks in [0, 1], in the precision of the head's logits (the autocast dtype under autocast).

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it, what it got and what it needs.
        """
        self._check(states, padding_mask)
        logits = self.to_logits(self.read(states, padding_mask))
        if self.explore and self.training:
            uniform = torch.rand(logits.shape, device=logits.device, dtype=torch.float32)
            logits = logits + uniform.logit(eps=1e-6).to(logits.dtype)
        keep = logits.sigmoid()
        # p − p.detach() is exactly 0, so a hard mask's values are exactly 0 and 1, and a NaN stays one.
        return (keep > 0.5).to(keep.dtype) + (keep - keep.detach()) if self.hard else keep

    def _check(self, states: Tensor, padding_mask: Tensor | None) -> None:
        checks.tensor("states", states)
        if states.dim() != 3 or states.shape[2] != self.width:
            raise ValueError(f"states: got shape {checks.shape(states)}, needs (texts, tokens, {self.width})")
        if padding_mask is None:
            return
        checks.tensor("padding_mask", padding_mask)
        if padding_mask.dtype != torch.bool:
            raise TypeError(f"padding_mask: got dtype {padding_mask.dtype}, needs bool, True at padding")
        if padding_mask.shape != states.shape[:2]:
            raise ValueError(
                f"padding_mask: got shape {checks.shape(padding_mask)}, needs states', {tuple(states.shape[:2])}"
            )
