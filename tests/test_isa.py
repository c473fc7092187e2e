"""Every instruction set that this machine has, each in a process of its own: SMARTCLIP_CPU_ISA is read once."""

from __future__ import annotations

from typing import Any

import pytest

compiled = pytest.importorskip("smartclip_kernels._C", reason="the compiled backend was not built")

CODE = """
import itertools, sys, torch
from dataclasses import replace
import smartclip_kernels as sk
from smartclip_kernels import _C, reference, testing

assert _C.isa() == sys.argv[1], _C.isa()
torch.set_num_threads(2)
torch.use_deterministic_algorithms(True)  # torch.empty is full of NaN
sides, dtypes = ("dot", "masked_cosine"), (torch.float32, torch.float64, torch.bfloat16, torch.float16)
for similarity, objective, dtype in itertools.product(sides, reference.OBJECTIVES, dtypes):
    for n, m, d in ((1, 1, 8), (7, 129, 16), (127, 75, 100)):
        smoothing = 0.1 if objective == "softmax" else 0.0
        inputs = testing.make_inputs(n, m, d, similarity=similarity, objective=objective, dtype=dtype, mask="soft",
                                     bias=-1.0, ids=n != 1, ignore=True, label_smoothing=smoothing)
        testing.check_loss(inputs, "none", backend="cpu")
    inputs = testing.make_inputs(64, 64, 32, similarity=similarity, objective=objective, dtype=dtype, scale=100.0,
                                 normalize=False)
    testing.check_loss(inputs, backend="cpu")
for dtype in dtypes[:2]:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randint(0, 2, (rows, 16), generator=generator).to(dtype) * 2 - 1 for rows in (201, 139))
    mask = torch.ones_like(text)
    sim = image @ text.T / 16
    for per, scores in (("text", sim.T), ("image", sim)):
        values, indices = sk.masked_topk(image, text, mask, 9, per=per, backend="cpu")
        expected = reference.topk(scores, 9)
        assert torch.equal(values, expected[0]) and torch.equal(indices, expected[1])
        ids = {"image_ids": torch.arange(201) % 50, "text_ids": torch.arange(139) % 60}
        positive = ids["image_ids"][:, None] == ids["text_ids"]
        expected = reference.ranks(scores, positive.T if per == "text" else positive)
        assert torch.equal(sk.retrieval_ranks(image, text, mask, **ids, per=per, backend="cpu"), expected)
print("fine")
"""


@pytest.mark.parametrize("isa", compiled.isas())
def test_isa(isa: str, run_python: Any) -> None:
    result = run_python(CODE, isa, SMARTCLIP_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "fine"


def test_portable_is_always_there() -> None:
    assert compiled.isas()[-1] == "portable"
    assert set(compiled.isas()) <= set(compiled.build["isas"])


@pytest.mark.parametrize("bad", ["sse9", "AVX2", " "])
def test_unknown_isa(bad: str, run_python: Any) -> None:
    code = "import torch, smartclip_kernels as sk\nsk.clip_loss(torch.eye(4), torch.eye(4), 1.0, backend='cpu')"
    result = run_python(code, SMARTCLIP_CPU_ISA=bad)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "SMARTCLIP_CPU_ISA" in last and f"'{bad}'" in last and "portable" in last, last
