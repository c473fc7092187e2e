"""sentence-transformers' in-batch ranking losses, fused: the same constructors, import them from here.

::

    from smartclip_kernels.integrations.sentence_transformers import CachedMultipleNegativesRankingLoss

    trainer = SentenceTransformerTrainer(model, train_dataset=data, loss=CachedMultipleNegativesRankingLoss(model))

The classes derive from sentence-transformers': constructor, configuration, embedding and gradient caching are its own,
what becomes of the embeddings is `sk.clip_loss`. No score is held, so the cached loss needs no mini-batches for that
stage. `gather_across_devices` is its `group`, all ranks; as in the original, a rank returns the mean over its own rows.

With q_i a query, d_i its document and s the scaled similarities, a loss is a combination of softmaxes of an anchor over
its candidates, each less s(q_i, d_i), which is a candidate of both:

- A_i = log Σ e^s(q_i, ·) − s(q_i, d_i), over all documents, and with "query_to_query" over the other queries
- B_i = log Σ e^s(d_i, ·) − s(q_i, d_i), over all queries, and with "doc_to_doc" over the other queries' documents

"joint" is log(e^A_i + e^B_i), "per_direction" ½(A_i + B_i), and A_i where only queries are anchors.

Hardness of strength h adds h times the similarity, a constant, to the logits of some negatives of a query. Where they
are other pairs' documents, their scale is s + h and their gradient's s; a pair's own hard negatives, a few, are scored
one by one beside them.

What does not fit is refused with a `ValueError`: "doc_to_doc" without "doc_to_query" (B_i has no s(q_i, d_i)),
"query_to_query" beside harder documents (two scales in one softmax), similarities other than cosine and dot product.
"""

from __future__ import annotations

from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

import smartclip_kernels as sk
from smartclip_kernels.integrations import require
from smartclip_kernels.ops import autocast
from smartclip_kernels.reference import paired_similarity

require("sentence_transformers", "6.0", "sentence-transformers")

from sentence_transformers import util  # noqa: E402
from sentence_transformers.sentence_transformer import losses as theirs  # noqa: E402


class MultipleNegativesRankingLoss(theirs.MultipleNegativesRankingLoss):
    """``sentence_transformers.losses.MultipleNegativesRankingLoss``, fused.

    Raises:
        ValueError: an option has no fused form; the message names it.
    """

    @wraps(theirs.MultipleNegativesRankingLoss.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check(self)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """Queries (N, D), their documents (N, D), and any number of columns of hard negatives (N, D) -> 0-D loss."""
        if len(embeddings) < 2:
            raise ValueError(f"embeddings: got {len(embeddings)} columns, needs at least 2, queries and documents")
        return _ranking_loss(self, embeddings[0], embeddings[1:])


class CachedMultipleNegativesRankingLoss(theirs.CachedMultipleNegativesRankingLoss):
    """``sentence_transformers.losses.CachedMultipleNegativesRankingLoss``, fused.

    Raises:
        ValueError: an option has no fused form; the message names it.
    """

    @wraps(theirs.CachedMultipleNegativesRankingLoss.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check(self)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Columns of embeddings in mini-batches -> 0-D loss, detached and differentiated where `with_backward`."""
        queries, *documents = (torch.cat(column) for column in reps)
        loss = _ranking_loss(self, queries, documents)
        if not with_backward:
            return loss
        loss.backward()
        return loss.detach()


def _check(loss: Any) -> None:
    """Refuses what has no fused form. Options may change after construction, so each step asks."""
    if "doc_to_doc" in loss.directions and "doc_to_query" not in loss.directions:
        raise ValueError(
            f"directions: got {loss.directions}, needs 'doc_to_query' beside 'doc_to_doc': without it a document's "
            "softmax has no positive, and no fused form"
        )
    if "query_to_query" in loss.directions and _hardness(loss, "in_batch_negatives"):
        raise ValueError(
            f"hardness_mode: got {loss.hardness_mode!r} with 'query_to_query' among the directions, needs None or "
            "'hard_negatives' there: queries and documents of two scales in one softmax have no fused form"
        )
    _normalises(loss)


def _normalises(loss: Any) -> bool:
    """True for the cosine, False for the dot product, which the model's own similarity may be, too."""
    function = loss.similarity_fct
    while isinstance(function, partial) and not (function.args or function.keywords):
        function = function.func
    if function == getattr(loss.model, "similarity", None):
        function = util.SimilarityFunction.to_similarity_fn(loss.model.similarity_fn_name)
    if function not in (util.cos_sim, util.pytorch_cos_sim, util.dot_score):
        raise ValueError(f"similarity_fct: got {util.similarity_fct_name(function)}, needs util.cos_sim or dot_score")
    return function is not util.dot_score


def _hardness(loss: Any, negatives: str) -> float:
    """Of "in_batch_negatives", other pairs' documents, or of "hard_negatives", a pair's own."""
    on = loss.hardness_mode in (negatives, "all_negatives")
    return float(loss.hardness_strength) if on else 0.0


def _ranking_loss(loss: Any, queries: Tensor, documents: list[Tensor]) -> Tensor:
    _check(loss)
    if _normalises(loss):
        queries, *documents = (F.normalize(x, dim=-1) for x in (queries, *documents))
    pair = torch.arange(len(queries), device=queries.device)
    group = None
    if loss.gather_across_devices and distributed.is_available() and distributed.is_initialized():
        group = distributed.group.WORLD
        pair = pair * distributed.get_world_size() + distributed.get_rank()  # a number of this rank's alone
    nobody = torch.full_like(pair, -1)
    # Candidates, whose they are, and whom they are kept from.
    answers = [(documents[0], pair, nobody), *((x, nobody, nobody) for x in documents[1:])]
    questions = [(queries, pair, nobody)]
    if "query_to_query" in loss.directions:
        answers.append((queries, nobody, pair))
    if "doc_to_doc" in loss.directions:
        questions += [(x, nobody, pair) for x in documents]
    softmaxes = partial(_softmaxes, scale=loss.scale, group=group)
    if loss.hardness_mode is not None and loss.hardness_strength > 0:
        a = _hard_softmax(loss, queries, pair, documents, answers, group)
        if "doc_to_query" not in loss.directions:
            return a.mean()
        (b,) = softmaxes(documents[0], pair, questions, ["image_to_text"])
    elif "doc_to_query" not in loss.directions:
        (a,) = softmaxes(queries, pair, answers, ["image_to_text"])
        return a.mean()
    elif set(loss.directions) == {"query_to_doc", "doc_to_query"}:  # the same scores, by columns
        a, b = softmaxes(queries, pair, answers, ["image_to_text", "text_to_image"])
        b = b[: len(queries)]
    else:
        (a,) = softmaxes(queries, pair, answers, ["image_to_text"])
        (b,) = softmaxes(documents[0], pair, questions, ["image_to_text"])
    return (torch.logaddexp(a, b) if loss.partition_mode == "joint" else (a + b) / 2).mean()


def _hard_softmax(
    loss: Any,
    queries: Tensor,
    ids: Tensor,
    documents: list[Tensor],
    answers: list[tuple[Tensor, Tensor, Tensor]],
    group: distributed.ProcessGroup | None,
) -> Tensor:
    """A_i where logits of negatives have h · similarity more: log(1 + Σ e^(s_ij + h_ij) / e^s(positive))."""
    scale, of_others, of_own = loss.scale, *(_hardness(loss, x) for x in ("in_batch_negatives", "hard_negatives"))
    positive = _paired(queries, documents[0])
    own = None
    if of_own != of_others and len(documents) > 1:  # their own are kept from them, and added one by one
        answers = [(x, whose, ids if k and k < len(documents) else kept) for k, (x, whose, kept) in enumerate(answers)]
        own = torch.stack([_paired(queries, x) for x in documents[1:]], dim=1)
        own = (scale * (own - positive[:, None]) + of_own * own.detach()).logsumexp(1)
    share = scale / (scale + of_others)
    harder = [(_slowed(x, share), whose, kept) for x, whose, kept in answers]
    (a,) = _softmaxes(_slowed(queries, share), ids, harder, ["image_to_text"], scale + of_others, group)
    # log Σ e^(…) over the others, less the positive's. Nobody there: −∞, whose gradient is none.
    some = a > 0
    others = torch.where(some, a + (-torch.expm1(-torch.where(some, a, 1))).log(), -torch.inf)
    others = others + of_others * positive.detach()
    if own is not None:
        others = torch.logaddexp(others, own)
    return torch.logaddexp(others, torch.zeros_like(others))


def _paired(queries: Tensor, documents: Tensor) -> Tensor:
    """(N,): row by row what `sk.clip_loss` scores, in its precision."""
    return paired_similarity(*autocast(queries, documents))


def _slowed(x: Tensor, share: float) -> Tensor:
    """x, of whose gradient a share goes on."""
    return x if share == 1 else x.detach() + share * (x - x.detach())


def _softmaxes(
    anchors: Tensor,
    ids: Tensor,
    candidates: list[tuple[Tensor, Tensor, Tensor]],
    directions: list[Any],
    scale: float,
    group: distributed.ProcessGroup | None,
) -> tuple[Tensor, ...]:
    """log Σ e^s − s(positive) of every anchor; by columns, of every candidate that is somebody's positive (else 0)."""
    features, of_candidates, ignored = (torch.cat(x) for x in zip(*candidates, strict=True))
    found = sk.clip_loss(
        anchors,
        features,
        scale,
        image_ids=ids,
        text_ids=of_candidates,
        ignore_ids=(ids, ignored),
        reduction="none",
        directions=directions,
        group=group,
    )
    return found if isinstance(found, tuple) else (found,)
