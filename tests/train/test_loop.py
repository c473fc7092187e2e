from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import smartclip_kernels as sk
from smartclip_kernels.train import checkpoint
from smartclip_kernels.train.batches import batches
from smartclip_kernels.train.config import Config
from smartclip_kernels.train.loop import prepare_folder, train
from smartclip_kernels.train.report import read_metrics
from smartclip_kernels.train.run import NonFiniteError, Run, learning_rate
from tests.train.processes import options, take_steps

Configure = Callable[..., Config]


def weights(config: Config) -> dict[str, torch.Tensor]:
    found = checkpoint.newest(Path(str(config.out)) / "checkpoints")
    assert found is not None
    assert found.step == config.steps
    return found.weights


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("objective", "captions"), [("clip", "long"), ("clip", "mixed"), ("siglip", "short"), ("smartclip", "both")]
)
def test_every_objective_learns(config: Configure, objective: str, captions: str) -> None:
    settings = config(objective=objective, captions=captions, steps=40, checkpoint_every=40, lr=5e-3)
    metrics = train(settings, quiet=True)
    lines = read_metrics(Path(str(settings.out)) / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 41))
    first, last = (sum(line["loss"] for line in part) for part in (lines[:5], lines[-5:]))
    assert last < 0.75 * first
    # A random order's expected average precision is about the share of relevant images, here a quarter to a third.
    assert metrics["keyword mAP"] > 45


def test_a_run_leaves_what_it_promises(config: Configure) -> None:
    settings = config()
    metrics = train(settings, quiet=True)
    out = Path(str(settings.out))
    assert json.loads((out / "evaluation.json").read_text()) == metrics
    for name in ("curves.png", "retrievals.png"):
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert checkpoint.steps(out / "checkpoints") == [4, 6]
    assert load_file(out / "checkpoints" / "step-00000006" / "model.safetensors").keys() == weights(settings).keys()
    line = read_metrics(out / "metrics.jsonl")[-1]
    assert {"loss", "lr", "gradient norm", "pairs/s", "memory MiB", "unreadable"} <= line.keys()


@pytest.mark.parametrize("chunk_size", [1, 7, 23])
def test_chunks_do_not_change_the_gradients(config: Configure, chunk_size: int, tmp_path: Path) -> None:
    losses = []
    for size in (24, chunk_size):
        settings = config(chunk_size=size, precision="float64", out=tmp_path / str(size), steps=4)
        losses.append([numbers["loss"] for numbers in take_steps(None, settings)[0]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.skipif("cpu" not in sk.available_backends(), reason="the compiled backend is not built")
@pytest.mark.parametrize("objective", ["clip", "siglip", "smartclip"])
def test_fused_losses_train_as_the_naive_ones_do(config: Configure, objective: str, tmp_path: Path) -> None:
    """50 steps in float64: the same curve to 1e-6."""
    curves = []
    for backend in ("reference", "cpu"):
        settings = config(objective=objective, precision="float64", loss_backend=backend, steps=50)
        logged, _, _ = take_steps(None, dataclasses.replace(settings, out=tmp_path / backend))
        curves.append([numbers["loss"] for numbers in logged])
    assert len(curves[0]) == 50
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) <= 1e-6


def test_an_image_that_comes_twice_is_not_pushed_from_its_other_caption(config: Configure) -> None:
    """By the formula: equal texts are positives; of one image's copies, each other's texts count for nothing."""
    settings = config(objective="clip", captions="short", batch_size=80, precision="float64")
    run = Run(settings, prepare_folder(settings))
    batch = next(batches(run.source, settings, 0))
    generator = torch.Generator().manual_seed(0)
    image, *texts = (torch.randn(80, 16, generator=generator, dtype=torch.float64) / 4 for _ in range(3))
    found = run.loss(image, texts[0], None, texts[1], None, ids=batch.ids, image_ids=batch.image_ids, share=1.0)
    expected, n_ignored = 0.0, 0
    for text, words in zip(texts, batch.texts, strict=True):
        positive = torch.tensor([[a == b for b in words] for a in words])
        copies = torch.tensor([[a.key == b.key for b in batch.records] for a in batch.records])
        ignored = copies & ~positive
        n_ignored += int(ignored.sum())
        logits = run.model.log_scale[0].exp().item() * image @ text.T  # 14, as float32 holds its logarithm
        counted = logits.masked_fill(ignored, -torch.inf)
        for dim in (0, 1):
            of_positives = (logits * positive).sum(dim) / positive.sum(dim)
            expected += 0.5 * (counted.logsumexp(dim) - of_positives).mean().item()
    assert n_ignored > 20
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_the_loss_backend_is_the_one_named(config: Configure) -> None:
    with pytest.raises(ValueError, match="nonesuch"):
        train(config(loss_backend="nonesuch"), quiet=True)


def test_resumed_equals_uninterrupted(config: Configure, tmp_path: Path) -> None:
    """Stopped between checkpoints, in the middle of an epoch: bitwise the same weights in the end."""
    whole = config(out=tmp_path / "whole")
    train(whole, quiet=True)
    stopped = config(out=tmp_path / "stopped", resume=True)
    run = Run(stopped, prepare_folder(stopped))
    for batch in batches(run.source, stopped, 0):
        run.train_step(batch)
        if run.step == 2:
            run.save()
        if run.step == 3:
            break
    train(stopped, quiet=True)
    assert same(weights(whole), weights(stopped))


def test_the_command_line_killed_and_resumed(config: Configure, tmp_path: Path) -> None:
    """SIGKILL once a step is logged, then the same command again: as uninterrupted. test_kills.py has other moments."""
    whole = config(out=tmp_path / "whole")
    train(whole, quiet=True)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "smartclip_kernels.train", *options(config(out=out, resume=True))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not read_metrics(out / "metrics.jsonl"):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (-signal.SIGKILL, 0)
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert same(weights(whole), weights(config(out=out)))
    steps = [line["step"] for line in read_metrics(out / "metrics.jsonl")]
    assert steps == list(range(1, 7))


def test_two_runs_do_not_mix(config: Configure) -> None:
    train(config(), quiet=True)
    with pytest.raises(FileExistsError, match="holds a run"):
        train(config(), quiet=True)
    with pytest.raises(ValueError, match=r"other settings: lr=0\.004"):
        train(config(resume=True, lr=1.0), quiet=True)


def test_a_loss_that_is_no_number_stops_before_the_weights(config: Configure) -> None:
    settings = config()
    run = Run(settings, prepare_folder(settings))
    for batch in batches(run.source, settings, 0):
        if run.step == 3:
            break
        run.train_step(batch)
        if run.step == 2:
            path = run.save()
    before = {name: x.clone() for name, x in run.model.state_dict().items()}
    with torch.no_grad():
        next(run.model.image.projection.parameters())[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=rf"step 3: loss nan.*last good checkpoint: {re.escape(str(path))}"):
        run.train_step(batch)
    after = run.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name != "image.projection.weight")
    written = json.loads((Path(str(settings.out)) / "non-finite-step-3.json").read_text())
    assert [row[0] for row in written["batch"]] == [r.key for r in batch.records]
    assert [row[1] for row in written["batch"]] == batch.texts[0]


def test_unreadable_images_are_counted_and_named_once(
    config: Configure, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(steps=4)
    broken = Run(settings, prepare_folder(settings)).source.records["train"][0].key
    (shapes / broken).write_bytes(b"")
    train(settings)
    said = capsys.readouterr().out.replace("\n", "")
    assert said.count(f"unreadable image skipped: {broken}") == 1
    assert "1 unreadable images were skipped" in said
    lines = read_metrics(Path(str(settings.out)) / "metrics.jsonl")
    assert lines[-1]["unreadable"] == 1
    assert {line["images"] for line in lines} == {23, 24} or {line["images"] for line in lines} == {22, 23, 24}


def test_the_scale_stays_within_100(config: Configure) -> None:
    model = dataclasses.replace(config().model, initial_scale=250.0)
    settings = config(model=model, steps=1)
    train(settings, quiet=True)
    assert weights(settings)["log_scale"].exp().tolist() == pytest.approx([100.0, 100.0], rel=1e-5)


def test_warm_up_and_cosine(config: Configure) -> None:
    settings = config(lr=1.0, warmup=4, steps=104)
    assert [learning_rate(settings, step) for step in (0, 1, 3, 4)] == [0.25, 0.5, 1.0, 1.0]
    assert learning_rate(settings, 54) == pytest.approx(0.5)
    assert 0 < learning_rate(settings, 103) < 1e-3


def test_gradients_are_clipped_together(config: Configure) -> None:
    settings = config(clip_norm=1e-3)
    run = Run(settings, prepare_folder(settings))
    numbers = run.train_step(next(batches(run.source, settings, 0)))
    norm = torch.stack([p.grad.norm() for p in run.model.parameters() if p.grad is not None]).norm()
    assert numbers["gradient norm"] > 1e-2
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_bfloat16_trains(config: Configure) -> None:
    settings = config(precision="bfloat16", steps=40, lr=5e-3, checkpoint_every=40)
    train(settings, quiet=True)
    losses = [line["loss"] for line in read_metrics(Path(str(settings.out)) / "metrics.jsonl")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all(x.dtype == torch.float32 for x in weights(settings).values())
