"""Gradient caching: contrastive batches larger than the encoders' activations allow (Gao et al., arXiv 2101.06983).

The loss needs all embeddings at once, the encoders do not. So: encode in chunks without a graph, differentiate the
loss with respect to the embeddings alone, then encode again chunk by chunk with a graph and send the embeddings'
gradients through. The price is a second forward pass, of the chunks whose graphs did not fit in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from smartclip_kernels.grad_cache.inputs import (
    devices_of,
    is_args_and_kwargs,
    may_need_gradient,
    module_of,
    name_of,
    rows_of,
    state_of,
    tensors_in,
)
from smartclip_kernels.grad_cache.keep import Graphs, Limit, auto_budget, parse_keep_graph
from smartclip_kernels.grad_cache.replay import RandomState, autocast_off
from smartclip_kernels.grad_cache.sync import (
    communicates_in_forward,
    reducers_of,
    settles_in_forward,
    several_processes,
    without_reduction,
)

Representations = dict[int | str, Tensor | None]
"""What an encoder returned, by position (int) or by keyword (str) of the loss function."""


class GradCache:
    """One training step's gradients, equal to those of the whole batch at once, with the activations of a few chunks.

    ::

        cache = sk.GradCache([image_encoder, text_encoder], 128, sk.clip_loss)
        loss = cache(images, tokens, logit_scale=log_scale.exp())  # .grad of every parameter is there, log_scale's too
        optimizer.step()

    Args:
        models: encoders: modules, or any callables. The same one may be there twice.
        chunk_sizes: rows of a chunk: one number, or one for each model.
        loss_fn: called with all encoders' outputs, in the order of `models`, and `cache_step`'s keyword arguments;
            returns a scalar. What it closes over, or gets by keyword, receives gradients as usual: a learned scale and
            bias, for one.
        split_input_fn: (model input, chunk size) -> list of chunks, in place of `split_inputs`.
        get_rep_fn: (what a model returned) -> what `loss_fn` gets of it. Default: all of it.
        fp16: run encoders and loss under float16 autocast. Needs a scaler. For bfloat16 call `cache_step` under
            ``torch.autocast``, which holds for encoders and loss alike.
        scaler: scales the loss before its gradients are taken. Unscaling, stepping and updating stay with the caller.
        keep_graph: whose graphs stay in memory from the first pass for the backward pass, so that they need no second
            one. Chunks are taken in the order in which they are encoded, those of the first model first:

            - a number: so many chunks, over all models. 0 keeps none: two forward passes; all of them: one.
            - a size, ``"512MiB"`` or ``"2GB"``: as many chunks as fit. Counted is what the graphs save: every storage
              once, without parameters, buffers and inputs.
            - ``"auto"``: the same with three quarters of the memory that is free when the step begins, less gradients
              yet to be allocated: on the device of the modules and inputs, the fullest if there are several; on a CPU
              (Linux) what the system has available and this process's control groups leave.
        offload: kept graphs wait in (pinned) host memory and not on their device. A size then counts host memory.

    An input is a tensor (``model(x)``), a list or tuple (``model(*x)``), a mapping (``model(**x)``) or a tuple of a
    list and a mapping (``model(*x[0], **x[1])``), nested as you like. Tensors of at least one dimension are split along
    their first; everything else goes to every chunk as it is.

    An encoder returns a tensor, a tuple or list of them (positional arguments of `loss_fn`, two for ``(text, mask)``)
    or a mapping (keyword arguments). None is passed along. Chunks are joined along the first dimension. Encoders of
    which nothing needs a gradient are run once.

    The second pass repeats the first exactly: torch's generators, of the CPU and of every device that the encoder's
    inputs, parameters and buffers live on, are put back to where they were, chunk by chunk, and advance once in all.
    Not repeated: random numbers of Python, NumPy or a `torch.Generator` of one's own. Gradients are added in the order
    of the chunks, kept or not: `keep_graph` and `offload` change no bit of them, as long as an encoder computes the
    same with a graph and without.

    Several processes: wrap the encoders in `DistributedDataParallel` or FSDP2's ``fully_shard``, let `loss_fn` gather,
    and call with ``no_sync_except_last=True``: gradients are reduced once a step, at the last chunk of each wrapped
    module, after all its sides if it encodes several. An encoder of which each side uses some parameters only needs
    ``find_unused_parameters=True``, as ever. Accumulation over several steps: all but the last within `no_sync`.

    Hazards:
        - A module that updates buffers in its forward (batch normalisation's running statistics) does so each time
          that a chunk is encoded, and normalises over a chunk, not the batch.
        - Inputs that need gradients have to be leaves.
        - Memory goes up to the kept graphs, the graph of one more chunk, and what the loss takes.
        - Not counted by a size: what an encoder's own `torch.autograd.Function` puts on its context without
          ``save_for_backward``. "auto" knows no device that a function alone uses, and several processes that share a
          memory each see all that is free: give them sizes.
        - A size, "auto" and `offload` use `torch.autograd.graph.saved_tensors_hooks`, which ``torch.func.grad`` within
          an encoder refuses. A number of chunks does not.
        - `DistributedDataParallel` reduces as the latest forward pass said: its last chunk is never kept, with C chunks
          (C + 1)/C forward passes are the least. With ``static_graph=True`` its ``no_sync`` fails in the first step.
        - Processes have to make the same number of forward passes where these communicate (FSDP2, `SyncBatchNorm`):
          there `keep_graph` has to be a number of chunks.
        - A function may hide a `DistributedDataParallel`: with several processes, graphs are kept of modules and of
          their methods only.
    """

    def __init__(
        self,
        models: Iterable[Callable[..., Any]] | nn.ModuleList,
        chunk_sizes: int | Sequence[int],
        loss_fn: Callable[..., Any],
        split_input_fn: Callable[[Any, int], Sequence[Any]] | None = None,
        get_rep_fn: Callable[[Any], Any] | None = None,
        fp16: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        *,
        keep_graph: int | str = 0,
        offload: bool = False,
    ) -> None:
        if isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList):
            raise TypeError(f"models: got one {type(models).__name__}, needs a list of encoders")
        self.models = list(models)
        if not self.models:
            raise ValueError("models: got none, needs at least one encoder")
        self.chunk_sizes = _chunk_sizes(chunk_sizes, len(self.models))
        if fp16 and scaler is None:
            raise ValueError("scaler: got None with fp16=True, needs a torch.amp.GradScaler")
        self.loss_fn = loss_fn
        self.split_input_fn = split_input_fn
        self.get_rep_fn = get_rep_fn
        self.fp16 = fp16
        self.scaler = scaler
        self.keep_graph = parse_keep_graph(keep_graph)
        if offload and self.keep_graph.chunks == 0:
            raise ValueError("offload: got True with keep_graph=0, which keeps no graph")
        self.offload = offload
        self._reduces = True

    def __call__(self, *model_inputs: Any, no_sync_except_last: bool = False, **loss_kwargs: Any) -> Tensor:
        """`cache_step`."""
        return self.cache_step(*model_inputs, no_sync_except_last=no_sync_except_last, **loss_kwargs)

    def cache_step(self, *model_inputs: Any, no_sync_except_last: bool = False, **loss_kwargs: Any) -> Tensor:
        """Adds the gradients of ``loss_fn(*encoded inputs, **loss_kwargs)`` to ``.grad`` everywhere.

        Args:
            model_inputs: one for each model.
            no_sync_except_last: gradients are reduced once a step for each model that `DistributedDataParallel` or
                ``fully_shard`` wraps, instead of once for each chunk that is not kept.
            loss_kwargs: for the loss function.

        Returns:
            The loss, detached and not scaled.

        Raises:
            TypeError, ValueError: an input, an encoder's output or the loss does not fit; the message says what does.
        """
        if len(model_inputs) != len(self.models):
            raise ValueError(f"model_inputs: got {len(model_inputs)}, needs one for each of {len(self.models)} models")
        reducers = [reducers_of(model) for model in self.models]
        for model, found in zip(self.models, reducers, strict=True):
            if no_sync_except_last and not found:
                raise TypeError(
                    f"no_sync_except_last: {name_of(model)} has no no_sync(), needs DistributedDataParallel or "
                    "fully_shard"
                )
        inputs = [self.split_inputs(x, size) for x, size in zip(model_inputs, self.chunk_sizes, strict=True)]
        graphs = self._graphs(inputs)
        encoded = [self.first_pass(model, chunks, graphs) for model, chunks in zip(self.models, inputs, strict=True)]
        loss = self.build_cache(encoded, loss_kwargs)
        sides = [i for i, first in enumerate(encoded) if first.gradients]
        for i in sides:
            later = {id(x) for j in sides if j > i for x in reducers[j]}
            held = [reducers[i]] * len(inputs[i])  # for each chunk, who must not reduce
            if self._reduces and no_sync_except_last:
                held[-1] = [x for x in reducers[i] if id(x) in later]
            elif self._reduces:
                held = [[]] * len(inputs[i])
            self.second_pass(self.models[i], inputs[i], encoded[i], held)
        return loss

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Steps in here leave their gradients in this process, where they add up; the first step after it reduces them.

        ::

            with nullcontext() if last else cache.no_sync():
                cache(images, tokens, no_sync_except_last=True)

        As `DistributedDataParallel.no_sync`, which may be used as well; FSDP2 has none of its own.
        """
        before, self._reduces = self._reduces, False
        try:
            yield
        finally:
            self._reduces = before

    def split_inputs(self, model_input: Any, chunk_size: int) -> Sequence[Any]:
        """The chunks of one model's input; the last may be smaller."""
        if self.split_input_fn is not None:
            chunks = self.split_input_fn(model_input, chunk_size)
            if len(chunks) == 0:
                raise ValueError("split_input_fn: got no chunks, needs at least one")
            return chunks
        lengths = sorted({len(x) for x in tensors_in(model_input) if x.dim()})
        if not lengths:
            raise TypeError(
                f"model_inputs: got {type(model_input).__name__} with no tensor to split, needs one, or split_input_fn"
            )
        if len(lengths) > 1:
            raise ValueError(f"model_inputs: got tensors of {lengths} rows in one input, needs one batch size")
        if lengths[0] == 0:
            raise ValueError("model_inputs: got a batch of 0 rows, needs at least one")
        return [rows_of(model_input, start, chunk_size) for start in range(0, lengths[0], chunk_size)]

    def model_call(self, model: Callable[..., Any], model_input: Any) -> Any:
        """A chunk through an encoder."""
        with self._fp16_autocast(chain(tensors_in(model_input), state_of(model))):
            if is_args_and_kwargs(model_input):
                return model(*model_input[0], **model_input[1])
            if isinstance(model_input, Mapping):
                return model(**model_input)
            if isinstance(model_input, (list, tuple)):
                return model(*model_input)
            return model(model_input)

    def get_reps(self, model: Callable[..., Any], model_output: Any) -> Representations:
        """An encoder's output, or what `get_rep_fn` makes of it, by position or keyword of the loss function."""
        output = model_output if self.get_rep_fn is None else self.get_rep_fn(model_output)
        if isinstance(output, Mapping):
            reps = dict(output)
        else:
            reps = dict(enumerate(output if isinstance(output, (list, tuple)) else [output]))
        for key, x in reps.items():
            if x is not None and not isinstance(x, Tensor):
                raise TypeError(
                    f"{name_of(model)}: output {key!r} is {type(x).__name__}, needs a tensor (see get_rep_fn)"
                )
            if x is not None and x.dim() == 0:
                raise ValueError(
                    f"{name_of(model)}: output {key!r} has no dimension to join chunks along. Drop it with get_rep_fn "
                    "and give it to loss_fn by keyword"
                )
        return reps

    def compute_loss(self, *reps: Tensor | None, **kwargs: Any) -> Tensor:
        """The loss function's value, checked."""
        loss = self.loss_fn(*reps, **kwargs)
        if not isinstance(loss, Tensor):
            hint = "; sum the terms of an output_dict" if isinstance(loss, Mapping) else ""
            raise TypeError(f"loss_fn: returned {type(loss).__name__}, needs to return a tensor{hint}")
        if loss.numel() != 1:
            raise ValueError(f"loss_fn: returned shape {tuple(loss.shape)}, needs to return a scalar")
        if not loss.requires_grad:
            raise ValueError(
                "loss_fn: returned a loss without gradient: nothing in it is trained, or torch.no_grad() holds"
            )
        return loss

    def first_pass(self, model: Callable[..., Any], chunks: Sequence[Any], graphs: Graphs) -> Encoded:
        """All representations, the graphs that are kept, and what the second pass needs to repeat the rest."""
        first = Encoded()
        parts: list[Representations] = []
        devices, trains = devices_of(model, chunks), may_need_gradient(model, chunks)
        held = [x for x in reducers_of(model) if settles_in_forward(x)]
        for i, chunk in enumerate(chunks):
            first.states.append(RandomState(devices))
            keep = trains and graphs.open and not (held and i == len(chunks) - 1)
            if keep or (trains and i == 0):
                with graphs.record(keep), without_reduction(held):
                    reps = self.get_reps(model, self.model_call(model, chunk))
            else:
                with torch.no_grad():
                    reps = self.get_reps(model, self.model_call(model, chunk))
            if i == 0:  # what needs gradients depends on parameters, not on rows
                first.trained = {key for key, x in reps.items() if x is not None and x.requires_grad}
                trains = bool(first.trained)
            parts.append({key: None if x is None else x.detach() for key, x in reps.items()})
            kept = keep and trains and not graphs.full
            first.kept.append(reps if kept else None)
            graphs.chunks += kept
            del reps  # its graph, which would live on while the next chunk is encoded
        if any(part.keys() != parts[0].keys() for part in parts):
            raise ValueError(
                f"{name_of(model)}: outputs differ from chunk to chunk, need the same number or keys in all"
            )
        for key in parts[0]:
            tensors = [x for part in parts if (x := part[key]) is not None]
            if tensors and len(tensors) < len(parts):
                raise ValueError(f"{name_of(model)}: output {key!r} is None for some chunks only")
            first.reps[key] = torch.cat(tensors) if tensors else None
            first.rows[key] = [len(x) for x in tensors]
        return first

    def build_cache(self, encoded: Sequence[Encoded], loss_kwargs: Mapping[str, Any]) -> Tensor:
        """The loss, detached; leaves in `encoded` the representations' gradients in place of the representations."""
        positional: list[Tensor | None] = []
        keywords = dict(loss_kwargs)
        for one in encoded:
            for key, rep in one.reps.items():
                if rep is not None:
                    # A frozen encoder's side asks for no gradient, so that the loss need not compute it.
                    rep.requires_grad_(key in one.trained)
                if isinstance(key, int):
                    positional.append(rep)
                elif key in keywords:
                    raise ValueError(
                        f"loss_fn: got {key!r} twice, from encoders or loss_kwargs; needs distinct keywords"
                    )
                else:
                    keywords[key] = rep
        with self._fp16_autocast(rep for one in encoded for rep in one.reps.values() if rep is not None):
            loss = self.compute_loss(*positional, **keywords)
        with autocast_off(loss):
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        for one in encoded:
            for key, rep in one.reps.items():
                if rep is not None and rep.grad is not None:
                    one.gradients[key] = rep.grad.split(one.rows[key])
            one.reps.clear()
        return loss.detach()

    def second_pass(
        self, model: Callable[..., Any], chunks: Sequence[Any], first: Encoded, held: Sequence[Sequence[nn.Module]]
    ) -> None:
        """Each chunk's representations' gradients through its graph, which is made anew where it was not kept.

        Args:
            held: for each chunk, the modules that must not reduce gradients between processes.
        """
        for i, (chunk, state) in enumerate(zip(chunks, first.states, strict=True)):
            with without_reduction(held[i]):
                reps, first.kept[i] = first.kept[i], None
                if reps is None:
                    with state.replay():
                        reps = self.get_reps(model, self.model_call(model, chunk))
                _backward(reps, {key: parts[i] for key, parts in first.gradients.items()})

    def _graphs(self, inputs: Sequence[Sequence[Any]]) -> Graphs:
        """This step's budget."""
        limit = self.keep_graph
        if limit.chunks == 0:
            return Graphs(limit)
        for model in self.models:
            if module_of(model) is None and several_processes():
                raise ValueError(
                    f"keep_graph: got {name_of(model)}, a function, where there are several processes: it could hide a "
                    "DistributedDataParallel; needs a module or its method"
                )
            if limit.chunks is None and communicates_in_forward(model):
                raise ValueError(
                    f"keep_graph: got {'auto' if limit.is_auto else 'a size'} with {name_of(model)}, whose forward "
                    "pass waits for that of other processes; needs a number of chunks, the same in all"
                )
        state = list(chain.from_iterable(state_of(model) for model in self.models))
        if limit.is_auto:
            devices = sorted({d for m, x in zip(self.models, inputs, strict=True) for d in devices_of(m, x)}, key=str)
            limit = Limit(bytes=auto_budget(devices, state, offload=self.offload))
        return Graphs(limit, offload=self.offload, outside=chain(state, tensors_in(list(inputs))))

    def _fp16_autocast(self, tensors: Iterable[Tensor]) -> AbstractContextManager[Any]:
        if not self.fp16:
            return nullcontext()
        device = next(iter(tensors), torch.empty(0)).device
        return torch.autocast(device.type, dtype=torch.float16)


@dataclass
class Encoded:
    """One encoder's first pass."""

    reps: Representations = field(default_factory=dict)  # joined
    rows: dict[int | str, list[int]] = field(default_factory=dict)  # of each chunk
    states: list[RandomState] = field(default_factory=list)
    kept: list[Representations | None] = field(default_factory=list)  # of each chunk, with their graphs
    trained: set[int | str] = field(default_factory=set)  # which need gradients
    gradients: dict[int | str, Sequence[Tensor]] = field(default_factory=dict)  # by chunk; of what the loss used


def _backward(reps: Representations, gradients: Mapping[int | str, Tensor]) -> None:
    reached = [(x, g) for key, g in gradients.items() if (x := reps[key]) is not None and x.requires_grad]
    if reached:
        tensors, gradients_of_them = zip(*reached, strict=True)
        with autocast_off(*tensors):
            torch.autograd.backward(tensors, gradients_of_them)


def _chunk_sizes(chunk_sizes: int | Sequence[int], n_models: int) -> list[int]:
    sizes = [chunk_sizes] * n_models if isinstance(chunk_sizes, int) else list(chunk_sizes)
    if len(sizes) != n_models:
        raise ValueError(f"chunk_sizes: got {len(sizes)}, needs one, or one for each of {n_models} models")
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"chunk_sizes: got {type(size).__name__}, needs an int")
        if size < 1:
            raise ValueError(f"chunk_sizes: got {size}, needs at least 1")
    return sizes
