"""sentence-transformers' ranking losses, fused: numbers over all options, errors, memory, its trainer."""

from __future__ import annotations

import inspect
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.sentence_transformer import modules
from sentence_transformers.util import cos_sim, dot_score, euclidean_sim
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, TrainerCallback

from smartclip_kernels.integrations import sentence_transformers as fast
from tests.conftest import Run
from tests.integrations.watch import Largest

MORE = ("query_to_query", "doc_to_query", "doc_to_doc")
ALL = [("query_to_doc", *more) for count in range(4) for more in combinations(MORE, count)]
FUSED = [x for x in ALL if "doc_to_doc" not in x or "doc_to_query" in x]
OPTIONS: list[dict[str, Any]] = [{"directions": x} for x in FUSED]
OPTIONS += [{"directions": x, "partition_mode": "per_direction"} for x in (ALL[0], ("doc_to_query", "query_to_doc"))]
WORDS = [f"w{i}" for i in range(40)]


@cache
def model_files(directory: Path) -> str:
    """A small BERT from a configuration and a tokenizer of whole words, as files."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(directory)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=len(vocabulary), **size)).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_files(tmp_path_factory.mktemp("bert"))


def make_model(files: str) -> SentenceTransformer:
    words = modules.Transformer(files)
    return SentenceTransformer(modules=[words, modules.Pooling(32)], device="cpu")


@pytest.fixture(scope="module")
def model(files: str) -> SentenceTransformer:
    return make_model(files).eval()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def columns(negatives: int, count: int = 9, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Embeddings of queries, documents and hard negatives, not normalised."""
    return [torch.randn(count, 12, dtype=dtype).requires_grad_() for _ in range(2 + negatives)]


def sentences(count: int, negatives: int, seed: int = 0) -> dict[str, list[str]]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randint(len(WORDS), (2 + negatives, count, 6), generator=generator)
    names = ["anchor", "positive", *(f"negative_{i}" for i in range(negatives))]
    texts = [[" ".join(WORDS[i] for i in row[: 2 + k % 5]) for k, row in enumerate(x.tolist())] for x in draw]
    return dict(zip(names, texts, strict=True))


def features(model: Any, count: int, negatives: int) -> list[dict[str, Tensor]]:
    return [model.preprocess(texts) for texts in sentences(count, negatives).values()]


def run(loss: Any, inputs: Any) -> tuple[Tensor, list[Tensor]]:
    loss.model.zero_grad()
    value = loss(inputs, None)
    value.backward()
    return value.detach(), [x.grad.clone() for x in loss.model.parameters() if x.grad is not None]


# --- the losses themselves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("similarity", [cos_sim, dot_score])
def test_same_numbers(options: Any, negatives: int, similarity: Any, model: Any) -> None:
    options = {"scale": 7.0, "similarity_fct": similarity, **options}
    inputs = columns(negatives)
    found = []
    for where in (fast, theirs):
        loss = where.MultipleNegativesRankingLoss(model, **options).compute_loss_from_embeddings(inputs, None)
        found.append((loss, *torch.autograd.grad(loss, inputs)))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cached_and_through_the_model(options: Any, model: Any) -> None:
    """float32, as trained: both losses, forward and through the encoder, uneven mini-batches."""
    inputs = features(model, 11, 1)
    expected, wanted = run(theirs.MultipleNegativesRankingLoss(model, **options), inputs)
    cached = {"mini_batch_size": 4, **options}
    losses = [
        fast.MultipleNegativesRankingLoss(model, **options),
        fast.CachedMultipleNegativesRankingLoss(model, **cached),
    ]
    for loss in losses:
        got, grads = run(loss, inputs)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        for mine, other in zip(grads, wanted, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())))
    with torch.no_grad():
        torch.testing.assert_close(losses[1](inputs, None), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_same_contract(name: str, model: Any) -> None:
    ours, original = getattr(fast, name), getattr(theirs, name)
    for method in ("__init__", "forward"):
        expected, got = (inspect.signature(getattr(kind, method)) for kind in (original, ours))
        assert got == expected
    options = {"scale": 3.0, "similarity_fct": dot_score, "directions": ALL[-1]}
    loss = ours(model, **options)
    assert isinstance(loss, original)
    assert loss.get_config_dict() == original(model, **options).get_config_dict()
    assert loss.temperature == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="query_to_doc"):
        ours(model, directions=("doc_to_query",))
    with pytest.raises(ValueError, match="at least 2"):
        loss(features(model, 3, 0)[:1], None)
    loss.scale = 5.0
    assert loss.get_config_dict()["scale"] == 5.0


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_what_has_no_fused_form_is_refused(name: str, model: Any) -> None:
    make = getattr(fast, name)
    for directions in ALL:
        if directions not in FUSED:
            with pytest.raises(ValueError, match=r"directions: got .*doc_to_doc.*needs 'doc_to_query'"):
                make(model, directions=directions)
    for mode in ("in_batch_negatives", "hard_negatives", "all_negatives"):
        with pytest.raises(ValueError, match=f"hardness_mode: got '{mode}'"):
            make(model, hardness_mode=mode, hardness_strength=5.0)
    with pytest.raises(ValueError, match="similarity_fct: got euclidean_sim"):
        make(model, similarity_fct=euclidean_sim)
    changes: list[dict[str, Any]] = [
        {"similarity_fct": euclidean_sim},
        {"hardness_mode": "all_negatives", "hardness_strength": 1.0},
        {"directions": ("query_to_doc", "doc_to_doc")},
    ]
    for options in changes:  # after construction
        loss = make(model)
        for option, value in options.items():
            setattr(loss, option, value)
        with pytest.raises(ValueError, match=f"{next(iter(options))}: got"):
            loss(features(model, 3, 0), None)


def test_the_models_own_similarity(model: Any) -> None:
    inputs = columns(1)
    losses = [
        where.MultipleNegativesRankingLoss(model, similarity_fct=model.similarity).compute_loss_from_embeddings(
            inputs, None
        )
        for where in (fast, theirs)
    ]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)


def test_memory_is_linear(model: Any, set_workspace: Any) -> None:
    n = 500
    set_workspace(0.25)
    inputs = [torch.randn(n, 8, requires_grad=True) for _ in range(2)]
    options: dict[str, Any] = {"directions": ALL[-1]}
    largest = []
    for where in (fast, theirs):
        for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
            loss = getattr(where, name)(model, **options)
            with Largest() as seen:
                if name[0] == "C":
                    loss.mini_batch_size = 300
                    loss.calculate_loss([[x] for x in inputs], with_backward=True)
                else:
                    loss.compute_loss_from_embeddings(inputs, None).backward()
            largest.append(seen.elements)
    assert min(largest[2:]) >= n * 300
    assert max(largest[:2]) < n * n / 3  # 0.25 MiB is 65,536 numbers


# --- around them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_inside_a_matryoshka_loss(name: str, model: Any) -> None:
    inputs = features(model, 7, 1)
    found = []
    for where in (fast, theirs):
        loss = theirs.MatryoshkaLoss(model, getattr(where, name)(model), matryoshka_dims=[32, 16, 8])
        loss.model = model
        found.append(run(loss, inputs))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        assert logs is not None
        if "loss" in logs:
            self.losses.append(logs["loss"])


def three_steps(files: str, kind: Any, directory: Path, **options: Any) -> tuple[list[float], Any]:
    model = make_model(files)  # with its dropout, whose draws caching has to repeat
    data = Dataset.from_dict(sentences(24, 1))
    settings: dict[str, Any] = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    steps = {"max_steps": 3, "per_device_train_batch_size": 8, "logging_steps": 1, "optim": "sgd", "seed": 1}
    arguments = SentenceTransformerTrainingArguments(str(directory), learning_rate=0.1, **steps, **settings)
    seen = Losses()
    loss = kind(model, **options)
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss, callbacks=[seen])
    trainer.train()
    return seen.losses, model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MultipleNegativesRankingLoss", {}),
        ("CachedMultipleNegativesRankingLoss", {"mini_batch_size": 3, "directions": ALL[-1]}),
        (
            "CachedMultipleNegativesRankingLoss",
            {"mini_batch_size": 3, "directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
        ),
    ],
)
def test_three_steps_of_its_trainer(name: str, options: Any, files: str, tmp_path: Path) -> None:
    expected, before = three_steps(files, getattr(theirs, name), tmp_path, **options)
    got, after = three_steps(files, getattr(fast, name), tmp_path, **options)
    assert len(got) == 3
    assert len(set(got)) == 3
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for x, y in zip(after.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


TWO_RANKS = """
import sys
import torch
from torch import distributed, multiprocessing
from sentence_transformers.sentence_transformer import losses as theirs
from smartclip_kernels.integrations import sentence_transformers as fast

FUSED = eval(sys.argv[2])

def work(rank, store):
    distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
    torch.manual_seed(rank)
    inputs = [torch.randn(5, 6, dtype=torch.float64).requires_grad_() for _ in range(3)]
    for directions in FUSED:
        found = []
        for where in (fast, theirs):
            options = dict(directions=directions, gather_across_devices=True)
            loss = where.MultipleNegativesRankingLoss(torch.nn.Identity(), **options)
            value = loss.compute_loss_from_embeddings(inputs, None)
            found.append([value, *torch.autograd.grad(value, inputs)])
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    distributed.destroy_process_group()

multiprocessing.start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")
"""


@pytest.mark.slow
def test_gathered_across_two_ranks(tmp_path: Path, run_python: Run) -> None:
    done = run_python(TWO_RANKS, str(tmp_path / "store"), repr(FUSED), timeout=120, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
