"""What only the Triton backend has: sizes of blocks, searches by keys, device code compiled without a device.

The rest of the suite runs on it too, in Triton's interpreter: the accuracy grid, ragged sizes, learned scales.
"""

from __future__ import annotations

import mmap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import smartclip_kernels as sk
from smartclip_kernels import backends, reference
from smartclip_kernels.backends.triton import config
from smartclip_kernels.testing import check_loss, make_inputs

pytestmark = pytest.mark.skipif("triton" not in sk.available_backends(), reason="triton is not installed")

# Rectangular, so that a row taken for a column is found out.
SIZES = {
    "parts of 32 columns": (32, 128, 16, 4, 2, 4, 1),
    "two parts": (16, 32, 32, 2, 1, 4, 1),
    "tall": (128, 16, 16, 1, 3, 4, 1),
}


@pytest.fixture(params=SIZES)
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = config.Config(*SIZES[request.param])
    monkeypatch.setattr(config, "config", lambda *_: chosen)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
@pytest.mark.parametrize("similarity", ["dot", "masked_cosine"])
def test_sizes_of_blocks_change_nothing(similarity: Any, objective: str, dtype: torch.dtype, poisoned: None) -> None:
    inputs = make_inputs(75, 131, 40, similarity=similarity, objective=objective, dtype=dtype, mask="soft", bias=-1.0)
    smoothing = 0.1 if objective == "softmax" else 0.0
    ignore = (torch.arange(75) % 7, torch.arange(131) % 7)
    check_loss(replace(inputs, ignore_ids=ignore, label_smoothing=smoothing), backend="triton")


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("per", ["text", "image"])
def test_searches_at_other_sizes(per: Any) -> None:
    inputs = make_inputs(75, 131, 40, similarity="masked_cosine", mask="soft")
    arguments = (inputs.image, inputs.text, inputs.mask)
    ids = {"image_ids": inputs.image_ids, "text_ids": inputs.text_ids, "per": per}
    found = {b: sk.masked_topk(*arguments, 9, per=per, backend=b) for b in ("triton", "reference")}  # type: ignore[arg-type]
    torch.testing.assert_close(found["triton"][0], found["reference"][0])
    ranks = {b: sk.retrieval_ranks(*arguments, **ids, backend=b) for b in ("triton", "reference")}
    assert torch.equal(ranks["triton"], ranks["reference"])


def test_hard_masks_are_exact_in_half_precision() -> None:
    """bfloat16 squares have sixteen digits: with the low half left out, cosines would err by 2⁻⁹."""
    inputs = make_inputs(40, 50, 64, similarity="masked_cosine", dtype=torch.bfloat16, mask="hard")
    assert inputs.mask is not None
    sim = sk.masked_similarity(inputs.image, inputs.text, inputs.mask, backend="triton")
    wide = inputs.to(torch.float64)
    true = reference.similarity(wide.image, wide.text, wide.mask)
    assert (sim - true).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("factor", [1e-4, 1.0, 300.0])
def test_features_of_any_length(dtype: torch.dtype, factor: float) -> None:
    """A cosine does not know them; dP, which divides by norms, has to fit half precision all the same."""
    inputs = make_inputs(40, 50, 24, similarity="masked_cosine", dtype=dtype, mask="soft", ids=True)
    check_loss(replace(inputs, image=inputs.image * factor, text=inputs.text * factor), backend="triton")


@pytest.mark.parametrize("weight", [1e-30, 1e-8, 1.0, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_incoming_gradients_of_any_size(dtype: torch.dtype, weight: float) -> None:
    """G is stored without them, so half precision neither loses nor overflows it."""
    inputs = make_inputs(30, 30, 16, dtype=dtype)
    image = inputs.image.clone().requires_grad_()
    loss = sk.clip_loss(image, inputs.text, inputs.logit_scale, backend="triton") * weight
    (grad,) = torch.autograd.grad(loss, image)
    (one,) = torch.autograd.grad(sk.clip_loss(image, inputs.text, inputs.logit_scale, backend="triton"), image)
    info, expected = torch.finfo(dtype), one.double() * weight
    allowed = max(2 * info.eps, 2.0**-17) * expected.abs().amax(1, keepdim=True) + info.tiny
    held = expected.abs() < info.max
    assert ((grad.double() - expected).abs() <= allowed)[held].all()


def test_float64_is_refused_by_name() -> None:
    x = torch.eye(4, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"image: got torch\.float64, needs .* on backend 'triton'"):
        sk.clip_loss(x, x, 1.0, backend="triton")


def test_an_exact_precision_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 products are float32's unless torch's own setting says otherwise; TF32 is never a surprise."""
    from smartclip_kernels.backends.triton import launch
    from smartclip_kernels.launch import Side
    from smartclip_kernels.problem import Problem

    x = torch.eye(4)
    made = []
    problem = Problem(x, x, None, torch.ones(()))
    for precision in ("highest", "high", "medium"):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        made.append(launch.TritonLaunch(problem, "dot", Side(4), Side(4))._common["PRECISION"])
    assert made == ["ieee", "tf32", "tf32"]


def test_rows_beyond_32_bits() -> None:
    """Five rows, 2³⁰ numbers apart: the last begins beyond 2³² bytes and beyond 2³¹ numbers."""
    stride, rows, d = 2**30, 5, 16
    try:
        far = torch.frombuffer(mmap.mmap(-1, 2 * (stride * (rows - 1) + d)), dtype=torch.float16)
    except (OSError, ValueError) as error:
        pytest.skip(f"no address space for it: {error}")
    inputs = make_inputs(rows, rows, d, dtype=torch.float16)
    image = far.as_strided((rows, d), (stride, 1)).copy_(inputs.image)
    check_loss(replace(inputs, image=image), backend="triton")


def test_tables_have_every_architecture_and_kind() -> None:
    for architecture in config.ARCHITECTURES:
        for similarity in ("dot", "masked_cosine"):
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                for kernel in config.KERNELS:
                    assert min(config.config(architecture, similarity, dtype, kernel)) > 0


@pytest.mark.parametrize(
    ("capability", "name"),
    [((7, 5), "default"), ((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90"),
     ((10, 0), "sm_100"), ((12, 0), "sm_100")],
)  # fmt: skip
def test_newer_chips_take_the_newest_table(
    capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert config.architecture.__wrapped__(0) == name


def test_without_a_gpu_it_says_what_would_help(run_python: Any) -> None:
    code = "import smartclip_kernels as sk, torch\nx = torch.eye(4)\nsk.clip_loss(x, x, 1.0, backend='triton')"
    result = run_python(code, TRITON_INTERPRET=None, CUDA_VISIBLE_DEVICES="")
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: backend: 'triton' is not available: ") and "TRITON_INTERPRET=1" in last


COMPILE = """
import sys, torch
from bench import ahead
architectures, dtypes, plain = sys.argv[1].split(","), [getattr(torch, x) for x in sys.argv[2].split(",")], sys.argv[3]
for architecture in architectures:
    for variant in ahead.variants(tuple(dtypes)):
        if plain == "all" or not variant.extra:
            usage = ahead.compile_variant(variant, architecture)
            print(usage.spilled, int(usage.fits), int(usage.atomics), usage.matrix, architecture, variant, sep="|")
"""


def compiled_ahead(run_python: Any, architectures: str, dtypes: str, which: str) -> list[list[str]]:
    result = run_python(
        COMPILE, architectures, dtypes, which, timeout=3000, TRITON_INTERPRET=None, PYTHONPATH=str(Path.cwd())
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return [line.split("|") for line in result.stdout.splitlines()]


def check_usage(lines: list[list[str]]) -> None:
    bad = [line for line in lines if line[:3] != ["0", "1", "0"]]
    assert not bad, "spilled bytes, fits into shared memory, has atomics:\n" + "\n".join("|".join(line) for line in bad)


def test_kernels_compile_for_hopper(run_python: Any) -> None:
    """One size a family: no spill, no more shared memory than there is, no atomics, and the matrix units at work."""
    lines = compiled_ahead(run_python, "sm_90", "bfloat16", "plain")
    check_usage(lines)
    products = {line[3] for line in lines if line[5].split()[0] in ("statistics", "gradient")}
    assert len(lines) > 10 and products == {"wgmma"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("architecture", [a for a in config.ARCHITECTURES if a != "interpreter"])
def test_kernels_compile_at_every_size_of_the_tables(architecture: str, run_python: Any) -> None:
    lines = compiled_ahead(run_python, architecture, "bfloat16,float16,float32", "all")
    check_usage(lines)
    assert len(lines) > 60


def test_the_default_on_a_gpu_is_a_fused_one(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = backends.load("triton")
    monkeypatch.setattr(triton, "unavailable", lambda: "")
    monkeypatch.setattr(triton, "runs_on", lambda device: device == "cuda")
    assert backends.default("cuda") == "triton"
    assert backends.default("cpu") == "cpu"


def test_units_are_powers_of_two() -> None:
    from smartclip_kernels.backends.triton import backward

    for top, expected in ((0.75, 0.5), (1.0, 1.0), (-3.9, 2.0), (0.0, 1.0), (torch.inf, 1.0), (torch.nan, 1.0)):
        unit = torch.full((), torch.nan)
        x = torch.tensor([0.0, top, 1e-3 if top else 0.0])
        backward.unit_of[(1,)](x, x[:0], unit, 3, 0, 1.0, BLOCK=16)
        assert unit == (2.0**-10 if top != top else expected), top
