"""open_clip's losses, fused: ``patch()`` puts them where open_clip and its trainer look.

::

    from smartclip_kernels.integrations import open_clip as fast

    fast.patch()  # before `from open_clip import ClipLoss`; or `with fast.patch(): ...`

Each class derives from open_clip's: the same constructor, attributes, hooks and results, `isinstance` included. The
loss is `sk.ClipLoss` or `sk.SigLipLoss` with what the constructor said; logits are never made, so they are never
rounded either, and the loss of half-precision features is float32.

A subclass (or an instance) that overrides a hook (`get_logits`, `get_ground_truth`, `dist_loss`, `_loss`) means logits
of its own: its loss is open_clip's own, from these dense logits. So is horovod's. Calling the hooks works as ever.
"""

from __future__ import annotations

import sys
from functools import wraps
from threading import RLock
from types import TracebackType
from typing import Any

from torch import Tensor, nn

import smartclip_kernels as sk
from smartclip_kernels.integrations import require

require("open_clip", "3.0", "open_clip")

from open_clip import loss as theirs  # noqa: E402

from smartclip_kernels.integrations.distillation import clip_and_distillation  # noqa: E402


class ClipLoss(theirs.ClipLoss):
    """`sk.ClipLoss` in the place of ``open_clip.ClipLoss``."""

    @wraps(theirs.ClipLoss.__init__)  # type: ignore[misc]  # its arguments, whatever its version
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fused = sk.ClipLoss(self.local_loss, self.gather_with_grad, rank=self.rank, world_size=self.world_size)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Any:
        """The 0-D loss, or with `output_dict` ``{"contrastive_loss": loss}``."""
        arguments = (image_features, text_features, logit_scale, logit_bias, output_dict)
        return super().forward(*arguments) if _dense(self) else self.fused(*arguments)


class CoCaLoss(theirs.CoCaLoss, ClipLoss):
    """``open_clip.CoCaLoss``, whose contrastive term, the ``super().forward`` of open_clip's code, is the fused one."""


class DistillClipLoss(theirs.DistillClipLoss, ClipLoss):
    """``open_clip.DistillClipLoss`` with neither the student's nor the teacher's logits in memory."""

    def forward(  # type: ignore[override]  # as open_clip's own
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> Any:
        """The pair of contrastive and distillation loss, or with `output_dict` a dictionary of them.

        Raises:
            ValueError: the teacher's features require a gradient.
        """
        student, teacher = (image_features, text_features), (dist_image_features, dist_text_features)
        if _dense(self):
            arguments = (*student, logit_scale, *teacher, dist_logit_scale, output_dict)
            return theirs.DistillClipLoss.forward(self, *arguments)
        scales = logit_scale, dist_logit_scale
        if self.world_size == 1:
            losses = _distill(student, scales, teacher)
        elif self.local_loss:
            all_student, all_teacher = self._gathered(student), self._gathered(teacher)
            first = self.rank * len(image_features)
            of_sides = [
                _distill((student[k], all_student[1 - k]), scales, (teacher[k], all_teacher[1 - k]), first)
                for k in (0, 1)
            ]
            losses = tuple((of_image + of_text) / 2 for of_image, of_text in zip(*of_sides, strict=True))
        else:
            losses = _distill(self._gathered(student), scales, self._gathered(teacher))
        return dict(zip(("contrastive_loss", "distill_loss"), losses, strict=True)) if output_dict else losses

    def _gathered(self, features: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Those of all ranks, with the gradients that the constructor's flags say."""
        return theirs.gather_features(
            *features, self.local_loss, self.gather_with_grad, rank=self.rank, world_size=self.world_size
        )


def _distill(
    student: tuple[Tensor, Tensor],
    scales: tuple[Tensor | float, Tensor | float],
    teacher: tuple[Tensor, Tensor],
    first: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Both sides; with `first`, row i of the first features matches row first + i of the second, and is an anchor."""
    return clip_and_distillation(
        *student, scales[0], *teacher, scales[1], first_text=first or 0, both_sides=first is None
    )


class SigLipLoss(theirs.SigLipLoss):
    """`sk.SigLipLoss` in the place of ``open_clip.loss.SigLipLoss``."""

    @wraps(theirs.SigLipLoss.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fused = sk.SigLipLoss(rank=self.rank, world_size=self.world_size, dist_impl=self.dist_impl)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Any:
        """The 0-D loss, or with `output_dict` ``{"contrastive_loss": loss}``."""
        arguments = (image_features, text_features, logit_scale, logit_bias, output_dict)
        return super().forward(*arguments) if _dense(self) else self.fused(*arguments)


_HOOKS = ("get_logits", "get_ground_truth", "dist_loss", "_loss")
_PAIRS = tuple((getattr(theirs, ours.__name__), ours) for ours in (ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss))


def _dense(loss: nn.Module) -> bool:
    """Whether somebody's own logits or labels are asked for, or horovod's."""
    if getattr(loss, "use_horovod", False) and loss.world_size != 1:
        return True
    kind = type(loss)
    base = next(original for original, ours in reversed(_PAIRS) if issubclass(kind, ours))
    return any(name in vars(loss) or getattr(kind, name, None) is not getattr(base, name, None) for name in _HOOKS)


_lock = RLock()


class Patch:
    """What `patch` returns: a context manager that takes the patch back if that very call applied it."""

    def __init__(self, applied: bool) -> None:
        self.applied = applied

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.applied:
            unpatch()


def patch() -> Patch:
    """Put the fused losses into open_clip, for the whole process; where they are already, nothing happens.

    Their names change in `open_clip` (`loss`, `factory` and its top level, and whatever of it imported them) and in
    `open_clip_train`'s loaded modules, so `create_loss(args)` builds ours. What other modules imported from open_clip
    before, and losses made before, stay as they are.

    Returns:
        A context manager, for those who want the patch for a block only.
    """
    with _lock:
        applied = theirs.ClipLoss is not ClipLoss
        _exchange(dict(_PAIRS))
        return Patch(applied)


def unpatch() -> None:
    """Put open_clip's own losses back; where they are already, nothing happens."""
    with _lock:
        _exchange({ours: original for original, ours in _PAIRS})


def _exchange(replacements: dict[type, type]) -> None:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("open_clip", "open_clip_train") or module is None:
            continue
        for attribute, value in list(vars(module).items()):
            if isinstance(value, type) and value in replacements:
                setattr(module, attribute, replacements[value])
