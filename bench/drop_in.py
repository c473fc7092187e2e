"""A training step of other people's codebases, as it is shipped and with the drop-in: time, and memory at its peak.

Towers are small, so that the loss is most of a step; each step is forward, loss, backward and optimiser, in turns.
``python -m bench.drop_in '<case as JSON>' SUBJECT`` prints a step's bytes, from a process of its own.
"""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from bench import memory, report
from bench.rows import Figure

SHIPPED, DROP_IN = "as shipped", "drop-in"
SUBJECTS = (SHIPPED, DROP_IN)
WARM_N, SIZE, TOKENS, WORDS = 64, 32, 8, 1000

Step = Callable[[], float]
"""Does one, returns its loss."""


@dataclass(frozen=True)
class Case:
    codebase: str
    loss: str
    n: int
    d: int = 512


CASES = tuple(
    Case(codebase, loss, n, 128 if loss == "SiglipModel" else 512)  # whose towers are as wide as the embedding
    for codebase, losses in {
        "open_clip": ("ClipLoss", "SigLipLoss", "DistillClipLoss"),
        "transformers": ("CLIPModel", "SiglipModel"),
        "sentence_transformers": ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"),
    }.items()
    for loss in losses
    for n in (1024, 4096)
)


@dataclass
class Row:
    """What came out for one subject."""

    codebase: str
    loss: str
    n: int
    d: int
    subject: str
    step_ms: Figure
    times_ours: Figure  # this subject's time over the drop-in's, within each round
    extra_mib: float  # peak of a step over what is there before it: the towers' activations, too
    first_loss: float
    status: str = "ok"


def make_step(case: Case, subject: str) -> Step:
    """A model of the same random weights for both subjects, one made batch, SGD."""
    torch.manual_seed(0)
    build = {"open_clip": _open_clip, "transformers": _transformers, "sentence_transformers": _sentence_transformers}
    model, loss = build[case.codebase](case, subject == DROP_IN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.item()

    return step


def _open_clip(case: Case, fused: bool) -> tuple[nn.Module, Callable[[], Tensor]]:
    import open_clip
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    from smartclip_kernels.integrations import open_clip as fast

    vision = CLIPVisionCfg(layers=1, width=64, head_width=32, patch_size=16, image_size=SIZE)
    text = CLIPTextCfg(context_length=TOKENS, vocab_size=WORDS, width=64, heads=2, layers=1)
    siglip, distill = case.loss == "SigLipLoss", case.loss == "DistillClipLoss"
    model = CLIP(case.d, vision, text, init_logit_bias=-10 if siglip else None, output_dict=True)
    teacher = CLIP(case.d, vision, text, output_dict=True)
    flags = {"local_loss": False, "gather_with_grad": False, "horovod": False, "loss_dist_impl": None}
    args = SimpleNamespace(model="small", rank=0, world_size=1, siglip=siglip, distill=distill, **flags)
    with fast.patch() if fused else nullcontext():
        loss_fn = open_clip.create_loss(args)
    images, tokens = torch.randn(case.n, 3, SIZE, SIZE), torch.randint(WORDS, (case.n, TOKENS))

    def loss() -> Tensor:
        output = model(images, tokens)
        if distill:
            with torch.no_grad():
                output |= {f"dist_{name}": x for name, x in teacher(images, tokens).items()}
        return sum(loss_fn(**output, output_dict=True).values())

    return model, loss


def _transformers(case: Case, fused: bool) -> tuple[nn.Module, Callable[[], Tensor]]:
    import transformers

    from smartclip_kernels.integrations import transformers as fast

    layer = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "num_hidden_layers": 1}
    siglip = case.loss == "SiglipModel"
    if siglip:
        layer |= {"hidden_size": case.d, "intermediate_size": 64}
    text = {**layer, "vocab_size": WORDS, "max_position_embeddings": TOKENS, "eos_token_id": WORDS - 1}
    vision = {**layer, "image_size": SIZE, "patch_size": 16}
    kind = transformers.SiglipConfig if siglip else transformers.CLIPConfig
    config = kind(text_config=text, vision_config=vision, **({} if siglip else {"projection_dim": case.d}))
    model = getattr(fast if fused else transformers, case.loss)(config)
    images, tokens = torch.randn(case.n, 3, SIZE, SIZE), torch.randint(WORDS, (case.n, TOKENS))
    return model, lambda: model(input_ids=tokens, pixel_values=images, return_loss=True).loss


class _Words(nn.Module):
    """The mean of a text's words and a linear layer, as sentence-transformers calls a model."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.embed, self.project = nn.Embedding(WORDS, 64), nn.Linear(64, d)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": self.project(self.embed(features["input_ids"]).mean(1))}


def _sentence_transformers(case: Case, fused: bool) -> tuple[nn.Module, Callable[[], Tensor]]:
    from sentence_transformers.sentence_transformer import losses as theirs

    from smartclip_kernels.integrations import sentence_transformers as fast

    model = nn.Sequential(_Words(case.d))
    clip: dict[str, Any] = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    chunks = {"mini_batch_size": 256} if case.loss.startswith("Cached") else {}
    loss_fn = getattr(fast if fused else theirs, case.loss)(model, **clip, **chunks)
    sides = [{"input_ids": torch.randint(WORDS, (case.n, TOKENS))} for _ in range(2)]
    return model, lambda: loss_fn([dict(side) for side in sides], None)


def extra_bytes(case: Case, subject: str) -> int:
    """In this process: what a step takes at its peak beyond the model, the batch and the parameters' gradients."""
    make_step(replace(case, n=WARM_N), subject)()  # loads code and starts threads
    step = make_step(case, subject)
    memory.CLEAR_REFS.write_text("5")
    baseline = memory.resident("VmRSS")
    step()
    return memory.resident("VmHWM") - baseline


def measure_memory(case: Case, subject: str) -> int:
    command = [sys.executable, "-m", "bench.drop_in", json.dumps(asdict(case)), subject, str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=memory.ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def run_case(case: Case, rounds: int) -> list[Row]:
    steps = {subject: make_step(case, subject) for subject in SUBJECTS}
    first = {subject: step() for subject, step in steps.items()}
    taken: dict[str, list[float]] = {subject: [] for subject in SUBJECTS}
    for _ in range(rounds):
        for subject, step in steps.items():
            start = perf_counter()
            step()
            taken[subject].append(perf_counter() - start)
    same = abs(first[SHIPPED] - first[DROP_IN]) <= 1e-5 * max(1, abs(first[SHIPPED]))
    return [
        Row(
            **asdict(case),
            subject=subject,
            step_ms=Figure.of([1e3 * t for t in taken[subject]]),
            times_ours=Figure.of([t / own for t, own in zip(taken[subject], taken[DROP_IN], strict=True)]),
            extra_mib=measure_memory(case, subject) / 2**20,
            first_loss=first[subject],
            status="ok" if same else f"losses differ: {first[SHIPPED]} and {first[DROP_IN]}",
        )
        for subject in SUBJECTS
    ]


def flat(row: Row) -> Iterator[tuple[str, Any]]:
    for name, value in asdict(row).items():
        yield from ((f"{name}_{part}", x) for part, x in value.items()) if isinstance(value, dict) else [(name, value)]


def main(out: Path, quick: bool) -> int:
    console, about = Console(width=160, log_path=False), report.environment()
    for package in ("sentence-transformers", "transformers"):
        about["versions"][package] = report.version(package)
    cases, rounds = ([replace(case, n=64, d=32) for case in CASES[::2]], 1) if quick else (CASES, 5)
    rows: list[Row] = []
    for case in cases:
        for row in run_case(case, rounds):
            rows.append(row)
            console.log(
                f"{row.codebase} {row.loss} N={row.n} {row.subject}: {report.milliseconds(row.step_ms)} ms, "
                f"{report.cell(row.times_ours, '.2f')} × ours, {row.extra_mib:,.0f} MiB, {row.status}",
                highlight=False,
                markup=False,
            )
    directory = out / report.slug(about["device"])
    directory.mkdir(parents=True, exist_ok=True)
    document = {"environment": about, "rows": [asdict(row) for row in rows]}
    report.replace_file(directory / "drop_in.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    file = io.StringIO()
    writer = csv.DictWriter(file, dict(flat(rows[0])))
    writer.writeheader()
    writer.writerows(dict(flat(row)) for row in rows)
    report.replace_file(directory / "drop_in.csv", file.getvalue())
    console.print(f"written: drop_in.csv, drop_in.json in {directory}")
    return 0 if all(row.status == "ok" for row in rows) else 1


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(extra_bytes(Case(**json.loads(sys.argv[1])), sys.argv[2]))
