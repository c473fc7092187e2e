"""sentence-transformers' ranking losses, fused: numbers over all options, errors, memory, its trainer."""

from __future__ import annotations

import inspect
from functools import cache, partial
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
HARDER = ("in_batch_negatives", "all_negatives")  # of other pairs
HARD = [
    {"hardness_mode": mode, "hardness_strength": 5.0, "directions": directions}
    for mode in (*HARDER, "hard_negatives")
    for directions in (ALL[0], ("query_to_doc", "doc_to_query"), ("query_to_doc", "doc_to_query", "doc_to_doc"))
]
OPTIONS += HARD
OPTIONS += [
    HARD[-1] | {"directions": ("query_to_doc", "query_to_query")},
    HARD[1] | {"partition_mode": "per_direction"},
]
WORDS = [f"w{i}" for i in range(40)]
ROOT = Path(__file__).resolve().parents[2]


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
    same_numbers(columns(negatives), model, {"similarity_fct": similarity, **options})


def same_numbers(inputs: list[Tensor], model: Any, options: dict[str, Any]) -> None:
    options = {"scale": 7.0, **options}
    found = []
    for where in (fast, theirs):
        loss = where.MultipleNegativesRankingLoss(model, **options).compute_loss_from_embeddings(inputs, None)
        found.append((loss, *torch.autograd.grad(loss, inputs)))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("negatives", [0, 1, 2])
def test_cached_and_through_the_model(options: Any, negatives: int, model: Any) -> None:
    """float32, as trained: both losses, forward and through the encoder, uneven mini-batches."""
    inputs = features(model, 11, negatives)
    expected = run(theirs.MultipleNegativesRankingLoss(model, **options), inputs)
    cached = fast.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4, **options)
    close(run(fast.MultipleNegativesRankingLoss(model, **options), inputs), expected)
    close(run(cached, inputs), expected)
    with torch.no_grad():
        torch.testing.assert_close(cached(inputs, None), expected[0], rtol=1e-5, atol=1e-5)


def close(got: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]], factor: float = 1.0) -> None:
    """A float32 loss and its gradients, `factor` times those that were expected."""
    torch.testing.assert_close(got[0], expected[0] * factor, rtol=1e-5, atol=1e-5 * factor)
    for mine, other in zip(got[1], expected[1], strict=True):
        largest = float(other.abs().max())
        torch.testing.assert_close(mine, other * factor, rtol=1e-4, atol=1e-5 * factor * max(1.0, largest))


def test_cached_by_a_budget_of_tokens(model: Any) -> None:
    """Mini-batches of uneven numbers of rows."""
    inputs, options = features(model, 13, 1), {"directions": ALL[-1]}
    expected = run(theirs.MultipleNegativesRankingLoss(model, **options), inputs)
    loss = fast.CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=11, **options)
    rows: list[list[int]] = []
    calculate = loss.calculate_loss

    def watched(reps: Any, *arguments: Any, **more: Any) -> Tensor:
        rows.extend([len(x) for x in column] for column in reps)
        return calculate(reps, *arguments, **more)

    loss.calculate_loss = watched
    close(run(loss, inputs), expected)
    assert all(len(set(column)) > 1 for column in rows)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
def test_cached_gradients_are_scaled_and_add_up(options: Any, model: Any) -> None:
    """What a GradScaler and gradient accumulation do, with both forward passes before either goes backward."""
    batches = [features(model, 7, 1), features(model, 5, 1)]
    original = theirs.MultipleNegativesRankingLoss(model, **options)
    loss = fast.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3, **options)
    alone = [run(original, batch) for batch in batches]
    for factor in (1024.0, 2.0**16):
        model.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=factor)
        scaled = scaler.scale(loss(batches[0], None))
        scaled.backward()
        close((scaled.detach(), [x.grad for x in model.parameters() if x.grad is not None]), alone[0], factor)
    model.zero_grad()
    first, second = (loss(batch, None) for batch in batches)
    (second / 2).backward()
    (first / 2).backward()
    grads = [x.grad for x in model.parameters() if x.grad is not None]
    both = [(x + y) / 2 for x, y in zip(alone[0][1], alone[1][1], strict=True)]
    close((first.detach(), grads), (alone[0][0], both))


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_evaluation(name: str, without: Any, model: Any) -> None:
    inputs = features(model, 9, 1)
    with without():
        got = getattr(fast, name)(model)(inputs, None)
        expected = getattr(theirs, name)(model)(inputs, None)
    assert not got.requires_grad
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_under_autocast(name: str, files: str) -> None:
    """Embeddings in bfloat16: the loss is no more than they were rounded, the gradients are theirs to bfloat16."""
    model = make_model(files).eval()
    model.append(modules.Dense(32, 32))  # ends in bfloat16, where a LayerNorm would in float32
    inputs = features(model, 9, 1)
    exact, wanted = run(theirs.MultipleNegativesRankingLoss(model), inputs)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = getattr(fast, name)(model)(inputs, None)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), exact, rtol=0, atol=0.05)
    grads = [x.grad for x in model.parameters() if x.grad is not None]
    largest = max(float(x.abs().max()) for x in wanted)
    for x, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(x, other, rtol=0, atol=0.05 * float(other.abs().max()) + 1e-4 * largest)


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
    for mode in HARDER:
        with pytest.raises(ValueError, match=f"hardness_mode: got '{mode}'"):
            make(model, hardness_mode=mode, hardness_strength=5.0, directions=("query_to_doc", "query_to_query"))
    with pytest.raises(ValueError, match="similarity_fct: got euclidean_sim"):
        make(model, similarity_fct=euclidean_sim)
    changes: list[dict[str, Any]] = [
        {"similarity_fct": euclidean_sim},
        {"hardness_mode": "all_negatives", "hardness_strength": 1.0, "directions": ("query_to_doc", "query_to_query")},
        {"directions": ("query_to_doc", "doc_to_doc")},
    ]
    for options in changes:  # after construction
        loss = make(model)
        for option, value in options.items():
            setattr(loss, option, value)
        with pytest.raises(ValueError, match=f"{next(iter(options))}: got"):
            loss(features(model, 3, 0), None)


def test_a_batch_without_other_pairs(model: Any) -> None:
    """Nobody there to be harder, or only the pair's own; and a positive that is certain."""
    for options in HARD:
        for negatives in (0, 1):
            inputs = columns(negatives, count=1)
            same_numbers(inputs, model, options)
    certain = [x.clone().requires_grad_() for x in (torch.eye(4, dtype=torch.float64),) * 2]
    same_numbers(certain, model, HARD[0] | {"scale": 2000.0})


def test_a_similarity_by_another_name(model: Any) -> None:
    inputs = columns(1)
    for function in (model.similarity, partial(cos_sim), partial(partial(dot_score))):
        losses = [
            where.MultipleNegativesRankingLoss(model, similarity_fct=function).compute_loss_from_embeddings(
                inputs, None
            )
            for where in (fast, theirs)
        ]
        torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match="similarity_fct: got"):
        fast.MultipleNegativesRankingLoss(model, similarity_fct=partial(cos_sim, b=inputs[0]))


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
from torch.nn.parallel import DistributedDataParallel
from sentence_transformers.sentence_transformer import losses as theirs
from smartclip_kernels.integrations import sentence_transformers as fast
from tests.integrations import test_sentence_transformers as tests

def gathered(rank):
    torch.manual_seed(rank)
    inputs = [torch.randn(5, 6, dtype=torch.float64).requires_grad_() for _ in range(3)]
    for options in tests.OPTIONS:
        found = []
        for where in (fast, theirs):
            loss = where.MultipleNegativesRankingLoss(torch.nn.Identity(), gather_across_devices=True, **options)
            value = loss.compute_loss_from_embeddings(inputs, None)
            found.append([value, *torch.autograd.grad(value, inputs)])
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)

def cached(rank):
    model = tests.make_model(sys.argv[2]).eval()
    inputs = tests.features(model, 10, 1)
    own = slice(5 * rank, 5 * rank + 5)
    mine = [{k: x[own] if torch.is_tensor(x) else x for k, x in column.items()} for column in inputs]
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)  # BERT has a pooler, which is not used
    for options in (tests.OPTIONS[3], tests.OPTIONS[-1]):
        with wrapped.no_sync():
            expected = tests.run(theirs.MultipleNegativesRankingLoss(model, **options), inputs)
        loss = fast.CachedMultipleNegativesRankingLoss(
            model, mini_batch_size=2, gather_across_devices=True, **options
        )
        loss.model = wrapped
        value, grads = tests.run(loss, mine)
        distributed.all_reduce(value)
        tests.close((value / 2, grads), expected)

def work(rank, store):
    distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
    gathered(rank)
    cached(rank)
    distributed.destroy_process_group()

multiprocessing.start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")
"""


def test_two_ranks(files: str, tmp_path: Path, run_python: Run) -> None:
    """Gathered, the original's numbers; cached under DDP, those of one process with the whole batch."""
    done = run_python(TWO_RANKS, str(tmp_path / "store"), files, timeout=120, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
