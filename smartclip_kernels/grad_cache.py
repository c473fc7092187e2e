"""Gradient caching: contrastive batches larger than the encoders' activations allow (Gao et al., arXiv 2101.06983).

The loss needs all embeddings at once, the encoders do not. So: encode in chunks without a graph, differentiate the
loss with respect to the embeddings alone, then encode again chunk by chunk with a graph and send the embeddings'
gradients through. Activations of one chunk are alive at a time; the price is a second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

Representations = dict[int | str, Tensor | None]
"""What an encoder returned, by position (int) or by keyword (str) of the loss function."""


class GradCache:
    """One training step's gradients, equal to those of the whole batch at once, with the activations of one chunk.

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
        fp16: run the encoders under float16 autocast. Needs a scaler. For bfloat16 call `cache_step` under
            ``torch.autocast``, which holds for encoders and loss alike.
        scaler: scales the loss before its gradients are taken. Unscaling, stepping and updating stay with the caller.

    An input is a tensor (``model(x)``), a list or tuple (``model(*x)``) or a mapping (``model(**x)``), nested as you
    like. Tensors of at least one dimension are split along their first; everything else goes to every chunk as it is.

    An encoder returns a tensor, a tuple or list of them (positional arguments of `loss_fn`, two for ``(text, mask)``)
    or a mapping (keyword arguments). None is passed along. Chunks are joined along the first dimension.

    The second pass repeats the first exactly: torch's generators, of the CPU and of every device that the encoder's
    inputs, parameters and buffers live on, are put back to where they were, chunk by chunk, and advance once in all.
    Not repeated: random numbers of Python, NumPy or a `torch.Generator` of one's own.

    Hazards: a module that updates buffers in its forward (batch normalisation's running statistics) does so twice a
    step, and normalises over a chunk, not the batch. Inputs that need gradients have to be leaves.
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

    def __call__(self, *model_inputs: Any, no_sync_except_last: bool = False, **loss_kwargs: Any) -> Tensor:
        """`cache_step`."""
        return self.cache_step(*model_inputs, no_sync_except_last=no_sync_except_last, **loss_kwargs)

    def cache_step(self, *model_inputs: Any, no_sync_except_last: bool = False, **loss_kwargs: Any) -> Tensor:
        """Adds the gradients of ``loss_fn(*encoded inputs, **loss_kwargs)`` to ``.grad`` everywhere.

        Args:
            model_inputs: one for each model.
            no_sync_except_last: all but a model's last chunk run under its ``no_sync()``, so that
                `DistributedDataParallel` reduces once for each model instead of once for each chunk.
            loss_kwargs: for the loss function.

        Returns:
            The loss, detached and not scaled.

        Raises:
            TypeError, ValueError: an input, an encoder's output or the loss does not fit; the message says what does.
        """
        if len(model_inputs) != len(self.models):
            raise ValueError(f"model_inputs: got {len(model_inputs)}, needs one for each of {len(self.models)} models")
        if no_sync_except_last:
            for model in self.models:
                if not hasattr(model, "no_sync"):
                    raise TypeError(
                        f"no_sync_except_last: {_name(model)} has no no_sync(), needs DistributedDataParallel"
                    )
        inputs = [self.split_inputs(x, size) for x, size in zip(model_inputs, self.chunk_sizes, strict=True)]
        encoded = [self.forward_no_grad(model, chunks) for model, chunks in zip(self.models, inputs, strict=True)]
        loss = self.build_cache(encoded, loss_kwargs)
        for model, chunks, first in zip(self.models, inputs, encoded, strict=True):
            if first.gradients:
                self.forward_backward(model, chunks, first, no_sync_except_last)
        return loss

    def split_inputs(self, model_input: Any, chunk_size: int) -> Sequence[Any]:
        """The chunks of one model's input; the last may be smaller."""
        if self.split_input_fn is not None:
            chunks = self.split_input_fn(model_input, chunk_size)
            if len(chunks) == 0:
                raise ValueError("split_input_fn: got no chunks, needs at least one")
            return chunks
        lengths = sorted({len(x) for x in _tensors(model_input) if x.dim()})
        if not lengths:
            raise TypeError(
                f"model_inputs: got {type(model_input).__name__} with no tensor to split, needs one, or split_input_fn"
            )
        if len(lengths) > 1:
            raise ValueError(f"model_inputs: got tensors of {lengths} rows in one input, needs one batch size")
        if lengths[0] == 0:
            raise ValueError("model_inputs: got a batch of 0 rows, needs at least one")
        return [_slice(model_input, start, chunk_size) for start in range(0, lengths[0], chunk_size)]

    def model_call(self, model: Callable[..., Any], model_input: Any) -> Any:
        """A chunk through an encoder."""
        with self._fp16_autocast(model, model_input):
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
                    f"{_name(model)}: output {key!r} is {type(x).__name__}, needs a tensor (see get_rep_fn)"
                )
            if x is not None and x.dim() == 0:
                raise ValueError(
                    f"{_name(model)}: output {key!r} has no dimension to join chunks along. Drop it with get_rep_fn "
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

    @torch.no_grad()
    def forward_no_grad(self, model: Callable[..., Any], chunks: Sequence[Any]) -> Encoded:
        """The first pass: all representations, and what the second pass needs to repeat it."""
        devices = _devices(model, chunks)
        states, parts = [], []
        for chunk in chunks:
            states.append(RandomState(devices))
            parts.append(self.get_reps(model, self.model_call(model, chunk)))
        if any(part.keys() != parts[0].keys() for part in parts):
            raise ValueError(f"{_name(model)}: outputs differ from chunk to chunk, need the same number or keys in all")
        reps: Representations = {}
        rows: dict[int | str, list[int]] = {}
        for key in parts[0]:
            tensors = [x for part in parts if (x := part[key]) is not None]
            if tensors and len(tensors) < len(parts):
                raise ValueError(f"{_name(model)}: output {key!r} is None for some chunks only")
            reps[key] = torch.cat(tensors) if tensors else None
            rows[key] = [len(x) for x in tensors]
        return Encoded(reps, rows, states, _needs_gradient(model, chunks))

    def build_cache(self, encoded: Sequence[Encoded], loss_kwargs: Mapping[str, Any]) -> Tensor:
        """The loss, detached; leaves in `encoded` the representations' gradients in place of the representations."""
        positional: list[Tensor | None] = []
        keywords = dict(loss_kwargs)
        for one in encoded:
            for key, rep in one.reps.items():
                if rep is not None:
                    # A frozen encoder's side asks for no gradient, so that the loss need not compute it.
                    rep = one.reps[key] = rep.detach().requires_grad_(one.needs_gradient and rep.is_floating_point())
                if isinstance(key, int):
                    positional.append(rep)
                elif key in keywords:
                    raise ValueError(
                        f"loss_fn: got {key!r} twice, from encoders or loss_kwargs; needs distinct keywords"
                    )
                else:
                    keywords[key] = rep
        loss = self.compute_loss(*positional, **keywords)
        with _autocast_off(loss):
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        for one in encoded:
            for key, rep in one.reps.items():
                if rep is not None and rep.grad is not None:
                    one.gradients[key] = rep.grad.split(one.rows[key])
            one.reps.clear()
        return loss.detach()

    def forward_backward(
        self, model: Callable[..., Any], chunks: Sequence[Any], first: Encoded, no_sync_except_last: bool
    ) -> None:
        """The second pass: each chunk again, with a graph, and its representations' gradients through it."""
        for i, (chunk, state) in enumerate(zip(chunks, first.states, strict=True)):
            synchronise = not no_sync_except_last or i == len(chunks) - 1
            with nullcontext() if synchronise else model.no_sync():  # type: ignore[attr-defined]
                with state.replay():
                    reps = self.get_reps(model, self.model_call(model, chunk))
                reached = [
                    (rep, parts[i])
                    for key, parts in first.gradients.items()
                    if (rep := reps[key]) is not None and rep.requires_grad
                ]
                if not reached:  # nor will later chunks: what needs gradients depends on parameters, not on rows
                    return
                tensors, gradients = zip(*reached, strict=True)
                with _autocast_off(*tensors):
                    torch.autograd.backward(tensors, gradients)

    def _fp16_autocast(self, model: Callable[..., Any], model_input: Any) -> AbstractContextManager[Any]:
        if not self.fp16:
            return nullcontext()
        device = next(chain(_tensors(model_input), _state(model)), torch.empty(0)).device
        return torch.autocast(device.type, dtype=torch.float16)


@dataclass
class Encoded:
    """One encoder's first pass."""

    reps: Representations
    rows: dict[int | str, list[int]]  # of each chunk
    states: list[RandomState]
    needs_gradient: bool
    gradients: dict[int | str, Sequence[Tensor]] = field(default_factory=dict)  # by chunk; of what the loss used


class RandomState:
    """torch's generators, of the CPU and of some devices, as they are now."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.cpu = torch.get_rng_state()
        self.devices = {d: torch.get_device_module(d).get_rng_state(*_index(d)) for d in devices}

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, *_index(device))

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Random numbers as they were then; afterwards the generators go on from where they are now."""
        now = RandomState(list(self.devices))
        self.restore()
        try:
            yield
        finally:
            now.restore()


def _index(device: torch.device) -> tuple[torch.device, ...]:
    """What the random state functions of a device's module take to find it: there is one MPS, and they take nothing."""
    return () if device.type == "mps" else (device,)


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


def _name(model: Callable[..., Any]) -> str:
    return getattr(model, "__qualname__", type(model).__name__)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for x in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(x)


def _slice(value: Any, start: int, size: int) -> Any:
    """The same structure with rows [start, start + size) of its tensors. Mappings become dicts."""
    if isinstance(value, Tensor):
        return value[start : start + size] if value.dim() else value
    if isinstance(value, Mapping):
        return {key: _slice(x, start, size) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_slice(x, start, size) for x in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _module(model: Callable[..., Any]) -> nn.Module | None:
    """The module behind an encoder: itself, or the one whose bound method it is (``clip.encode_image``)."""
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def _state(model: Callable[..., Any]) -> Iterator[Tensor]:
    module = _module(model)
    return iter(()) if module is None else chain(module.parameters(), module.buffers())


def _devices(model: Callable[..., Any], chunks: Sequence[Any]) -> list[torch.device]:
    devices = {x.device for x in chain(_tensors(list(chunks)), _state(model))}
    return sorted((d for d in devices if d.type not in ("cpu", "meta")), key=str)


def _needs_gradient(model: Callable[..., Any], chunks: Sequence[Any]) -> bool:
    """Whether its outputs can need gradients. Of a function we cannot know: the second pass finds out."""
    inside = chain(_tensors(list(chunks)), _state(model))
    return _module(model) is None or any(x.requires_grad for x in inside)


@contextmanager
def _autocast_off(*tensors: Tensor) -> Iterator[None]:
    """A backward pass runs in the precision of its forward; autocast would lower what was kept in float32 there."""
    with ExitStack() as stack:
        for device_type in {"cpu", *(x.device.type for x in tensors)}:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
