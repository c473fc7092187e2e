"""Every line of the list of bad inputs: the error names the argument, what it got and what it needs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import smartclip_kernels as sk

N, M, D = 6, 6, 8


def good() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(N, D, generator=generator), torch.randn(M, D, generator=generator)
    return {"image": image, "text": text, "mask": torch.ones(M, D), "logit_scale": 2.0}


def ids(n: int) -> Tensor:
    return torch.arange(n)


LOSSES: dict[str, Callable[..., Any]] = {
    "clip_loss": sk.clip_loss,
    "siglip_loss": sk.siglip_loss,
    "smartclip_loss": sk.smartclip_loss,
}
SOFTMAX = {name: LOSSES[name] for name in ("clip_loss", "smartclip_loss")}
PREFIXES = {name: LOSSES[name] for name in ("clip_loss", "siglip_loss")}
MASKED: dict[str, Callable[..., Any]] = {
    "smartclip_loss": sk.smartclip_loss,
    "masked_similarity": sk.masked_similarity,
    "masked_topk": sk.masked_topk,
    "retrieval_ranks": sk.retrieval_ranks,
}
ALL = {**LOSSES, **MASKED}
PAIRED = {**LOSSES, "retrieval_ranks": sk.retrieval_ranks}


def call(name: str, **changes: Any) -> Any:
    arguments = good()
    if name in ("clip_loss", "siglip_loss"):
        del arguments["mask"]
    if name not in LOSSES:
        del arguments["logit_scale"]
    if name == "masked_topk":
        arguments["k"] = 2
    return ALL[name](**{**arguments, **changes})


# Which functions, the arguments that are bad, the class of error, and patterns that its message must hold.
Case = tuple[dict[str, Callable[..., Any]], dict[str, Any], type[Exception], list[str]]
CASES: dict[str, Case] = {
    # features
    "image is no tensor": (ALL, {"image": [[1.0]]}, TypeError, ["image", "list", "Tensor"]),
    "text is no tensor": (ALL, {"text": None}, TypeError, ["text", "NoneType", "Tensor"]),
    "image is 1-D": (ALL, {"image": torch.ones(D)}, ValueError, ["image", r"\(8,\)", "2"]),
    "text is 3-D": (ALL, {"text": torch.ones(M, D, 1)}, ValueError, ["text", r"6\D+8\D+1", "2"]),
    "image is an integer": (ALL, {"image": torch.ones(N, D).long()}, TypeError, ["image", "int64", "float"]),
    "text is bool": (ALL, {"text": torch.ones(M, D).bool()}, TypeError, ["text", "bool", "float"]),
    "image is complex": (ALL, {"image": torch.ones(N, D) + 0j}, TypeError, ["image", "complex64", "float"]),
    "no images": (ALL, {"image": torch.ones(0, D)}, ValueError, ["image", r"0\D+8", "one row"]),
    "no texts": (ALL, {"text": torch.ones(0, D), "mask": None}, ValueError, ["text", r"0\D+8", "one row"]),
    "no features": (
        ALL,
        {"image": torch.ones(N, 0), "text": torch.ones(M, 0), "mask": None},
        ValueError,
        ["image", r"6\D+0", "one column"],
    ),
    "D differs": (ALL, {"text": torch.ones(M, D + 1)}, ValueError, ["text", "9", "image", "8"]),
    "dtypes differ": (ALL, {"text": torch.ones(M, D).double()}, TypeError, ["text", "float64", "image", "float32"]),
    "devices differ": (ALL, {"text": torch.ones(M, D, device="meta")}, ValueError, ["text", "meta", "image", "cpu"]),
    # masks
    "mask is no tensor": (MASKED, {"mask": 1.0}, TypeError, ["mask", "float", "Tensor"]),
    "mask is an integer": (MASKED, {"mask": torch.ones(M, D).int()}, TypeError, ["mask", "int32", "bool"]),
    "mask has other rows": (MASKED, {"mask": torch.ones(M + 1, D)}, ValueError, ["mask", r"7\D+8", "text", r"6\D+8"]),
    "mask has other columns": (MASKED, {"mask": torch.ones(M, D - 1)}, ValueError, ["mask", r"6\D+7", r"6\D+8"]),
    "mask is 1-D": (MASKED, {"mask": torch.ones(D)}, ValueError, ["mask", r"\(8,\)", r"6\D+8"]),
    "mask is elsewhere": (MASKED, {"mask": torch.ones(M, D, device="meta")}, ValueError, ["mask", "meta", "cpu"]),
    # pairs
    "N is not M": (PAIRED, {"image": torch.ones(N + 1, D)}, ValueError, ["image", "text", "7", "6", "ids"]),
    "image_ids alone": (PAIRED, {"image_ids": ids(N)}, ValueError, ["text_ids", "None", "image_ids"]),
    "text_ids alone": (PAIRED, {"text_ids": ids(M)}, ValueError, ["image_ids", "None", "text_ids"]),
    "ids are a list": (PAIRED, {"image_ids": [1] * N, "text_ids": ids(M)}, TypeError, ["image_ids", "list", "Tensor"]),
    "too few image_ids": (
        PAIRED,
        {"image_ids": ids(N - 1), "text_ids": ids(M)},
        ValueError,
        ["image_ids", r"\(5,\)", r"\(6,\)"],
    ),
    "too many text_ids": (
        PAIRED,
        {"image_ids": ids(N), "text_ids": ids(M + 1)},
        ValueError,
        ["text_ids", r"\(7,\)", r"\(6,\)"],
    ),
    "ids are 2-D": (
        PAIRED,
        {"image_ids": ids(N)[:, None], "text_ids": ids(M)},
        ValueError,
        ["image_ids", r"6\D+1", r"\(6,\)"],
    ),
    "ids are int32": (
        PAIRED,
        {"image_ids": ids(N), "text_ids": ids(M).int()},
        TypeError,
        ["text_ids", "int32", "int64"],
    ),
    "ids are floats": (
        PAIRED,
        {"image_ids": ids(N).float(), "text_ids": ids(M)},
        TypeError,
        ["image_ids", "float32", "int64"],
    ),
    "ids are elsewhere": (
        PAIRED,
        {"image_ids": ids(N), "text_ids": ids(M).to("meta")},
        ValueError,
        ["text_ids", "meta", "cpu"],
    ),
    "ignore_ids is one tensor": (LOSSES, {"ignore_ids": ids(N)}, TypeError, ["ignore_ids", "Tensor", "pair"]),
    "ignore_ids are three": (LOSSES, {"ignore_ids": (ids(N),) * 3}, TypeError, ["ignore_ids", "3|tuple", "pair"]),
    "ignore_ids lack one": (LOSSES, {"ignore_ids": (ids(N), None)}, TypeError, [r"ignore_ids\[1\]", "None", "Tensor"]),
    "ignore_ids are too few": (
        LOSSES,
        {"ignore_ids": (ids(N), ids(M - 1))},
        ValueError,
        [r"ignore_ids\[1\]", r"\(5,\)", r"\(6,\)"],
    ),
    "ignore_ids are floats": (
        LOSSES,
        {"ignore_ids": (ids(N).double(), ids(M))},
        TypeError,
        [r"ignore_ids\[0\]", "float64", "int64"],
    ),
    # scalars
    "scale of two": (LOSSES, {"logit_scale": torch.ones(2)}, ValueError, ["logit_scale", r"\(2,\)", "1-element"]),
    "scale of none": (LOSSES, {"logit_scale": torch.ones(0)}, ValueError, ["logit_scale", r"\(0,\)", "1-element"]),
    "scale is text": (LOSSES, {"logit_scale": "2"}, TypeError, ["logit_scale", "str", "float"]),
    "scale is None": (LOSSES, {"logit_scale": None}, TypeError, ["logit_scale", "NoneType", "float"]),
    "scale is an integer tensor": (
        LOSSES,
        {"logit_scale": torch.tensor(2)},
        TypeError,
        ["logit_scale", "int64", "float"],
    ),
    "bias of a row": (LOSSES, {"logit_bias": torch.ones(1, M)}, ValueError, ["logit_bias", r"1\D+6", "1-element"]),
    "bias is a list": (LOSSES, {"logit_bias": [1.0]}, TypeError, ["logit_bias", "list", "float"]),
    "scale is elsewhere": (
        LOSSES,
        {"logit_scale": torch.ones((), device="meta")},
        ValueError,
        ["logit_scale", "meta", "cpu"],
    ),
    # choices
    "unknown reduction": (
        LOSSES,
        {"reduction": "max"},
        ValueError,
        ["reduction", "'max'", "'mean'", "'sum'", "'none'"],
    ),
    "reduction is None": (LOSSES, {"reduction": None}, ValueError, ["reduction", "None", "'mean'"]),
    "unknown objective": (
        {"smartclip_loss": sk.smartclip_loss},
        {"objective": "hinge"},
        ValueError,
        ["objective", "'hinge'", "'softmax'", "'sigmoid'"],
    ),
    "unknown strategy": (LOSSES, {"strategy": "tree"}, ValueError, ["strategy", "'tree'", "'gather'", "'ring'"]),
    "no process group": (LOSSES, {"group": object()}, RuntimeError, ["group", "not initialised", "init_process_group"]),
    "unknown backend": (ALL, {"backend": "tpu"}, ValueError, ["backend", "'tpu'", "'cpu'", "'reference'"]),
    "backend is no name": (ALL, {"backend": 1}, ValueError, ["backend", "1", "'cpu'"]),
    "backend is empty": (ALL, {"backend": ""}, ValueError, ["backend", "''", "'cpu'"]),
    **{
        f"label_smoothing of {value}": (
            {name: LOSSES[name] for name in ("clip_loss", "smartclip_loss")},
            {"label_smoothing": value},
            ValueError,
            ["label_smoothing", re.escape(str(value)), r"\[0, 1\)"],
        )
        for value in (-0.1, 1.0, 1.5, float("nan"), float("inf"))
    },
    "label_smoothing is text": (
        {"clip_loss": sk.clip_loss},
        {"label_smoothing": "0.1"},
        TypeError,
        ["label_smoothing", "str", "float"],
    ),
    "a sigmoid takes no label_smoothing": (
        {"smartclip_loss": sk.smartclip_loss},
        {"objective": "sigmoid", "label_smoothing": 0.1},
        ValueError,
        ["label_smoothing", "0.1", "sigmoid"],
    ),
    # of the softmax
    **{
        f"tau_plus of {value}": (SOFTMAX, {"tau_plus": value}, ValueError, ["tau_plus", re.escape(str(value)), "0, 1"])
        for value in (-0.1, 1.0, 2, float("nan"))
    },
    "tau_plus is text": (SOFTMAX, {"tau_plus": "0.1"}, TypeError, ["tau_plus", "str", "float"]),
    "tau_plus is one tensor": (SOFTMAX, {"tau_plus": torch.zeros(N)}, TypeError, ["tau_plus", "Tensor", "pair"]),
    "tau_plus are three": (SOFTMAX, {"tau_plus": (torch.zeros(N),) * 3}, ValueError, ["tau_plus", "3", "pair"]),
    "tau_plus lacks one": (SOFTMAX, {"tau_plus": (torch.zeros(N), 0.1)}, TypeError, [r"tau_plus\[1\]", "float"]),
    "tau_plus are too few": (
        SOFTMAX,
        {"tau_plus": (torch.zeros(N), torch.zeros(M - 1))},
        ValueError,
        [r"tau_plus\[1\]", r"\(5,\)", r"\(6,\)"],
    ),
    "tau_plus are integers": (SOFTMAX, {"tau_plus": (ids(N), ids(M))}, TypeError, [r"tau_plus\[0\]", "int64", "float"]),
    "tau_plus is elsewhere": (
        SOFTMAX,
        {"tau_plus": (torch.zeros(N), torch.zeros(M, device="meta"))},
        ValueError,
        [r"tau_plus\[1\]", "meta", "cpu"],
    ),
    "a sigmoid takes no tau_plus": (
        {"smartclip_loss": sk.smartclip_loss},
        {"objective": "sigmoid", "tau_plus": 0.1},
        ValueError,
        ["tau_plus", "above 0", "sigmoid"],
    ),
    **{
        f"margin of {value}": (SOFTMAX, {"margin": value}, ValueError, ["margin", str(value), "finite"])
        for value in (float("inf"), float("nan"))
    },
    "margin is a tensor": (SOFTMAX, {"margin": torch.tensor(0.1)}, TypeError, ["margin", "Tensor", "float or None"]),
    "margin is a truth": (SOFTMAX, {"margin": True}, TypeError, ["margin", "bool", "float or None"]),
    "a sigmoid takes no margin": (
        {"smartclip_loss": sk.smartclip_loss},
        {"objective": "sigmoid", "margin": 0.1},
        ValueError,
        ["margin", "0.1", "None", "sigmoid"],
    ),
    "no direction": (SOFTMAX, {"directions": ()}, ValueError, ["directions", r"\(\)", "'image_to_text'"]),
    "unknown direction": (SOFTMAX, {"directions": ("up",)}, ValueError, ["directions", "'up'", "'text_to_image'"]),
    "a direction twice": (SOFTMAX, {"directions": ("image_to_text",) * 2}, ValueError, ["directions", "one or both"]),
    "directions are text": (SOFTMAX, {"directions": "image_to_text"}, TypeError, ["directions", "'image", "tuple"]),
    "a sigmoid has no directions": (
        {"smartclip_loss": sk.smartclip_loss},
        {"objective": "sigmoid", "directions": ("image_to_text",)},
        ValueError,
        ["directions", "'image_to_text'", "sigmoid"],
    ),
    **{
        f"dims of {value}": (PREFIXES, {"dims": value}, ValueError, ["dims", re.escape(repr(value)), "increasing", "8"])
        for value in ((), (0, 4), (4, 4), (8, 4), (4, 9), [-1, 8])
    },
    "dims is a number": (PREFIXES, {"dims": 4}, TypeError, ["dims", "4", "tuple of ints"]),
    "dims are floats": (PREFIXES, {"dims": (4.0,)}, TypeError, ["dims", r"\(4\.0,\)", "tuple of ints"]),
    "a wider text's prefix": (
        PREFIXES,
        {"dims": (4,), "text": torch.ones(M, D + 1)},
        ValueError,
        ["text", "9", "image", "8"],
    ),
    # retrieval
    "k of 0": ({"masked_topk": sk.masked_topk}, {"k": 0}, ValueError, ["k", "0", "1"]),
    "k of -1": ({"masked_topk": sk.masked_topk}, {"k": -1}, ValueError, ["k", "-1", "at least 1"]),
    "k is a float": ({"masked_topk": sk.masked_topk}, {"k": 1.0}, TypeError, ["k", "float", "int"]),
    "k is a bool": ({"masked_topk": sk.masked_topk}, {"k": True}, TypeError, ["k", "bool", "int"]),
    "unknown side": (
        {name: ALL[name] for name in ("masked_topk", "retrieval_ranks")},
        {"per": "row"},
        ValueError,
        ["per", "'row'", "'text'", "'image'"],
    ),
}


@pytest.mark.parametrize("name", ALL)
def test_good_input_is_good(name: str) -> None:
    call(name)


@pytest.mark.parametrize(("case", "name"), [(case, name) for case, values in CASES.items() for name in values[0]])
def test_bad_input(case: str, name: str) -> None:
    _, changes, error, patterns = CASES[case]
    if name in ("clip_loss", "siglip_loss"):
        changes = {k: v for k, v in changes.items() if k != "mask"}
    elif "mask" in changes and changes["mask"] is None:
        changes = {**changes, "mask": torch.ones(changes["text"].shape)}
    with pytest.raises(error) as caught:
        call(name, **changes)
    assert type(caught.value) is error
    message = str(caught.value)
    assert re.match(patterns[0], message) or "N is not M" in case, f"does not begin with its argument: {message}"
    for pattern in patterns:
        assert re.search(pattern, message), f"no {pattern!r} in: {message}"


@pytest.mark.parametrize("bad", [torch.ones(N, D).half(), torch.ones(N, D).bfloat16()])
def test_half_dtypes_do_not_mix(bad: Tensor) -> None:
    with pytest.raises(TypeError, match=r"text: got dtype torch\.float32, needs image's"):
        call("clip_loss", image=bad)


@pytest.mark.parametrize("megabytes", [0, -1, float("nan"), True, "64", [64]])
def test_workspace(megabytes: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"megabytes: got .*, needs a positive number"):
        sk.set_workspace(megabytes)


def test_the_environment_names_itself(run_python: Any) -> None:
    for variable, value, needs in (
        ("SMARTCLIP_WORKSPACE_MB", "lots", "positive number"),
        ("SMARTCLIP_WORKSPACE_MB", "-3", "positive number"),
        ("SMARTCLIP_BACKEND", "tpu", "'cpu'"),
    ):
        result = run_python("import smartclip_kernels", **{variable: value})
        assert result.returncode != 0
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("ValueError") and variable in last and repr(value) in last and needs in last, last
