"""Argument checks: every error names the argument, what it got and what it needs. None reads a tensor's data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from smartclip_kernels.reference import DIRECTIONS, OBJECTIVES

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
SIDES = ("text", "image")


def shape(x: Tensor) -> str:
    return "(" + ", ".join(str(n) for n in x.shape) + ("," if x.dim() == 1 else "") + ")"


def choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, needs one of {', '.join(map(repr, choices))}")


def tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, needs a torch.Tensor")


def features(image: Tensor, text: Tensor) -> None:
    for name, x in (("image", image), ("text", text)):
        if x.dtype not in FLOATING:
            raise TypeError(f"{name}: got dtype {x.dtype}, needs float16, bfloat16, float32 or float64")
        if x.dim() != 2:
            raise ValueError(f"{name}: got shape {shape(x)}, needs 2 dimensions (rows, embedding width)")
        if x.shape[0] == 0 or x.shape[1] == 0:
            raise ValueError(f"{name}: got shape {shape(x)}, needs at least one row and one column")
    if text.shape[1] != image.shape[1]:
        raise ValueError(f"text: got embedding width {text.shape[1]}, needs image's, {image.shape[1]}")
    if text.dtype != image.dtype:
        raise TypeError(f"text: got dtype {text.dtype}, needs image's, {image.dtype}")
    same_device("text", text, image)


def same_device(name: str, x: Tensor, image: Tensor) -> None:
    if x.device != image.device:
        raise ValueError(f"{name}: got a tensor on {x.device}, needs image's device, {image.device}")


def text_mask(mask: Tensor, image: Tensor, text: Tensor) -> None:
    if mask.dtype != torch.bool and mask.dtype not in FLOATING:
        raise TypeError(f"mask: got dtype {mask.dtype}, needs bool or a floating dtype")
    if mask.shape != text.shape:
        raise ValueError(f"mask: got shape {shape(mask)}, needs text's, {shape(text)}")
    same_device("mask", mask, image)


def ids(names: tuple[str, str], pair: tuple[Tensor | None, Tensor | None], image: Tensor, text: Tensor) -> None:
    """Both or neither; int64, one a row."""
    for name, other, x in ((*names, pair[0]), (*reversed(names), pair[1])):
        if x is None and pair != (None, None):
            raise ValueError(f"{name}: got None, needs ids because {other} has them")
    for name, x, side in ((names[0], pair[0], image), (names[1], pair[1], text)):
        if x is None:
            continue
        if x.dtype != torch.int64:
            raise TypeError(f"{name}: got dtype {x.dtype}, needs int64")
        if x.shape != side.shape[:1]:
            raise ValueError(f"{name}: got shape {shape(x)}, needs ({side.shape[0]},), an id a row")
        same_device(name, x, image)


def id_arguments(image_ids: Any, text_ids: Any, ignore_ids: Any) -> tuple[Tensor | None, Tensor | None]:
    """Types of the id arguments, as a caller gave them; `ignore_ids` taken apart."""
    for name, x in (("image_ids", image_ids), ("text_ids", text_ids)):
        if x is not None:
            tensor(name, x)
    if ignore_ids is None:
        return None, None
    if not isinstance(ignore_ids, (tuple, list)) or len(ignore_ids) != 2:
        raise TypeError(
            f"ignore_ids: got {type(ignore_ids).__name__}, needs a pair of tensors (image's ids, text's ids)"
        )
    for i, x in enumerate(ignore_ids):
        tensor(f"ignore_ids[{i}]", x)
    return ignore_ids[0], ignore_ids[1]


def one_element(name: str, x: Tensor, image: Tensor) -> None:
    if x.numel() != 1:
        raise ValueError(f"{name}: got shape {shape(x)}, needs a float, a 0-D or a 1-element tensor")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name}: got dtype {x.dtype}, needs a floating dtype")
    same_device(name, x, image)


def problem(
    image: Tensor,
    text: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    image_ignore: Tensor | None,
    text_ignore: Tensor | None,
    objective: str,
    label_smoothing: float,
) -> None:
    """Everything that a loss takes."""
    features(image, text)
    if mask is not None:
        text_mask(mask, image, text)
    one_element("logit_scale", scale, image)
    if bias is not None:
        one_element("logit_bias", bias, image)
    ids(("image_ids", "text_ids"), (image_ids, text_ids), image, text)
    ids(("ignore_ids[0]", "ignore_ids[1]"), (image_ignore, text_ignore), image, text)
    paired(image, text, image_ids)
    choice("objective", objective, tuple(OBJECTIVES))
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: got {label_smoothing}, needs a number in [0, 1)")
    if label_smoothing and not OBJECTIVES[objective].both_sides:
        raise ValueError(f"label_smoothing: got {label_smoothing}, needs 0 with the {objective} objective")


def correction(numbers: Sequence[Tensor | None], image: Tensor, text: Tensor, objective: str) -> None:
    """Of each kind both or neither, image's and text's: a number a row."""
    for name, some, none, pair in (
        ("tau_plus", "numbers above 0", "0", numbers[:2]),
        ("margin", "ceilings", "None", numbers[2:]),
    ):
        if all(x is None for x in pair):
            continue
        if not OBJECTIVES[objective].both_sides:
            raise ValueError(f"{name}: got {some}, needs {none} with the {objective} objective")
        anchors(name, pair, image, text)


def anchors(name: str, pair: Sequence[Tensor | None], image: Tensor, text: Tensor) -> None:
    """Image's and text's: a number a row."""
    for i, (x, side) in enumerate(zip(pair, (image, text), strict=True)):
        tensor(f"{name}[{i}]", x)
        assert x is not None
        if x.dtype not in FLOATING:
            raise TypeError(f"{name}[{i}]: got dtype {x.dtype}, needs a floating dtype")
        if x.shape != side.shape[:1]:
            raise ValueError(f"{name}[{i}]: got shape {shape(x)}, needs ({side.shape[0]},), a number a row")
        same_device(f"{name}[{i}]", x, image)


def margin(value: object, objective: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"margin: got {type(value).__name__}, needs a float or None")
    if not math.isfinite(value):
        raise ValueError(f"margin: got {value}, needs a finite number or None")
    if not OBJECTIVES[objective].both_sides:
        raise ValueError(f"margin: got {value}, needs None with the {objective} objective")


def directions(value: object, objective: str) -> None:
    """One or both of them; both where the objective has one loss for both."""
    needs = f"a tuple of one or both of {', '.join(map(repr, DIRECTIONS))}"
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"directions: got {value!r}, needs {needs}")
    if not value or len(set(value)) < len(value) or not set(value) <= set(DIRECTIONS):
        raise ValueError(f"directions: got {value!r}, needs {needs}")
    if len(value) < len(DIRECTIONS) and not OBJECTIVES[objective].both_sides:
        raise ValueError(f"directions: got {value!r}, needs both with the {objective} objective")


def dims(value: object, image: Tensor) -> None:
    """Widths of prefixes."""
    if not isinstance(value, (tuple, list)) or not all(isinstance(d, int) and not isinstance(d, bool) for d in value):
        raise TypeError(f"dims: got {value!r}, needs a tuple of ints")
    width = image.shape[-1] if image.dim() else 0
    if not value or not all(a < b for a, b in zip((0, *value), (*value, width + 1), strict=True)):
        raise ValueError(
            f"dims: got {value!r}, needs strictly increasing numbers from 1 to the embedding width, {width}"
        )


def one_sweep(mask: Tensor | None, ceiling: Tensor | None, backend: str, nests: bool) -> None:
    """Where an op may take all `dims` at once."""
    if mask is not None:
        raise ValueError("mask: got a tensor, needs None with dims")
    if ceiling is not None:
        raise ValueError("dims: got some and ceilings, which are of one width: needs one loss for each")
    if not nests:
        raise ValueError(f"dims: got some, needs one loss for each on backend {backend!r}")


def paired(image: Tensor, text: Tensor, image_ids: Tensor | None) -> None:
    """Without ids, i matches i."""
    if image_ids is None and image.shape[0] != text.shape[0]:
        raise ValueError(
            f"text: got {text.shape[0]} rows for image's {image.shape[0]}; without image_ids and text_ids, "
            "where row i matches row i, needs as many"
        )
