"""Messages among the ranks of a process group, each wait knowing whom it waits for.

Everything travels from rank to rank directly (isend, irecv): rows may be uneven, blocks arrive where they belong, and a
rank that is gone is found by every other at once. NCCL groups the messages; where rows are even it has collectives of
its own for whole towers, which cross between machines less often.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from smartclip_kernels.problem import Tensors

HEADER_BYTES = 2048
LOST = "smartclip_kernels/lost"
_GRACE = timedelta(seconds=1)
"""For the other ranks, once one has let the group's timeout pass."""

_calls: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


class Message(NamedTuple):
    rank: int  # of the group
    tensor: Tensor


class Exchange:
    """One call's messages. `who` is this rank; ranks are the group's, in errors the world's."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.who, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.others = [rank for rank in range(self.size) if rank != self.who]
        self.backends = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
        self.call = _calls[group] = _calls.get(group, 0) + 1

    def check_device(self, device: torch.device) -> None:
        backend = self.backends.get(device.type, "none")
        if backend == "none" or (backend == "gloo" and device.type != "cpu"):
            raise ValueError(
                f"group: got one with {dist.get_backend_config(self.group)}, needs a backend that sends tensors on "
                f"{device.type}: nccl for cuda, gloo for cpu"
            )

    def agree(self, when: str, has: dict[str, Any], error: Exception | None = None) -> list[dict[str, Any]]:
        """What every rank has, by rank. Always the first message of a pass, and of one size, so that it arrives.

        Args:
            when: which pass of this call.
            has: small numbers and texts. Names that begin with a capital letter may differ among ranks.
            error: this rank cannot go on.

        Raises:
            Exception: `error`, here; a RuntimeError with its text at every other rank.
            RuntimeError: ranks differ; it names them and what each has.
        """
        step = f"{when} of call {self.call}"
        failed = None if error is None else f"{type(error).__name__}: {error}"[: HEADER_BYTES // 4]
        text = json.dumps({"step": step, "Error": failed} | ({} if error else has), ensure_ascii=False).encode()
        # Without a backend for the CPU, messages go by the GPUs, which waits for them.
        device = "cpu" if "cpu" in self.backends else "cuda"
        header = torch.frombuffer(bytearray(text.ljust(HEADER_BYTES)), dtype=torch.uint8).to(device)
        headers = [torch.empty_like(header) if rank != self.who else header for rank in range(self.size)]
        self._pairs([header] * self.size, headers, f"agreeing on {step}")
        found = [json.loads(bytes(x.cpu().numpy().tobytes())) for x in headers]
        if error is not None:
            raise error
        for rank, it in enumerate(found):
            if it["Error"] is not None:
                raise RuntimeError(f"{self.name([rank])} failed in {it['step']}: {it['Error']}")
        for key in found[self.who]:
            if key[0].islower() and any(it.get(key) != found[self.who][key] for it in found):
                raise RuntimeError(self._difference(key, [it.get(key) for it in found]))
        return found

    def gather(self, blocks: Tensors, rows: Sequence[int]) -> Tensors:
        """All ranks' rows, in rank order, of each tensor (own rows, …)."""
        whole = tuple(x.new_empty(sum(rows), *x.shape[1:]) for x in blocks)
        if self._even(rows, blocks):
            for x, out in zip(blocks, whole, strict=True):
                dist.all_gather_into_tensor(out, x.contiguous(), group=self.group)
            return whole
        pending = []
        for x, out in zip(blocks, whole, strict=True):
            places = out.split(list(rows))
            places[self.who].copy_(x)
            pending.append(self._start_pairs([x.contiguous()] * self.size, places, "gathering rows"))
        for it in pending:
            it.wait()
        return whole

    def swap(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Piece r goes to rank r; returns what each rank had for this one. All of those are shaped as its own."""
        pieces = [x.contiguous() for x in pieces]
        received = [torch.empty_like(pieces[self.who]) if r != self.who else pieces[r] for r in range(self.size)]
        self._pairs(pieces, received, "exchanging states")
        return received

    def sum_home(self, whole: Tensors, rows: Sequence[int]) -> Tensors:
        """Own rows of each tensor (all rows, …), summed over the ranks, in rank order."""
        sums = []
        for x in whole:
            if self._even(rows, whole):
                out = x.new_empty(rows[self.who], *x.shape[1:])
                dist.reduce_scatter_tensor(out, x, group=self.group)
                sums.append(out)
                continue
            first, *others = self.swap(x.split(list(rows)))
            total = first.clone()
            for other in others:
                total += other
            sums.append(total)
        return tuple(sums)

    def shift(self, blocks: Tensors, rows: int) -> Pending:
        """Starts sending blocks to the next rank, and receiving the previous one's, which have `rows` rows."""
        after, before = (self.who + 1) % self.size, (self.who - 1) % self.size
        received = tuple(x.new_empty(rows, *x.shape[1:]) for x in blocks)
        return self._start(
            [Message(after, x.contiguous()) for x in blocks],
            [Message(before, x) for x in received],
            "passing on a block",
            received,
        )

    def name(self, ranks: Sequence[int]) -> str:
        """ "rank 3" or "ranks 1, 2", in the world's numbers."""
        numbers = ", ".join(str(dist.get_global_rank(self.group, rank)) for rank in ranks)
        return f"rank {numbers}" if len(ranks) == 1 else f"ranks {numbers}"

    def _even(self, rows: Sequence[int], blocks: Tensors) -> bool:
        """Whether NCCL's own collectives serve."""
        return len(set(rows)) == 1 and all(self.backends[x.device.type] == "nccl" for x in blocks)

    def _pairs(self, sent: Sequence[Tensor], received: Sequence[Tensor], what: str) -> None:
        self._start_pairs(sent, received, what).wait()

    def _start_pairs(self, sent: Sequence[Tensor], received: Sequence[Tensor], what: str) -> Pending:
        return self._start(
            [Message(rank, sent[rank]) for rank in self.others],
            [Message(rank, received[rank]) for rank in self.others],
            what,
        )

    def _start(self, sends: list[Message], receives: list[Message], what: str, received: Tensors = ()) -> Pending:
        pending = Pending(self, what, received, [x.tensor for x in sends])
        messages = [(dist.irecv, it) for it in receives] + [(dist.isend, it) for it in sends]
        if not messages:
            return pending
        if self.backends[sends[0].tensor.device.type] != "gloo":
            operations = [dist.P2POp(how, _bytes(x), group=self.group, group_peer=rank) for how, (rank, x) in messages]
            pending.works = [(self.who, work) for work in dist.batch_isend_irecv(operations)]
            return pending
        for how, (rank, x) in messages:
            other = {"group_src" if how is dist.irecv else "group_dst": rank}
            try:
                pending.works.append((rank, how(_bytes(x), group=self.group, **other)))
            except RuntimeError as error:
                pending.lost.setdefault(rank, error)
        return pending

    def lost(self, ranks: dict[int, RuntimeError], what: str) -> RuntimeError:
        """The error of ranks that are gone. The first report of the group is the cause of all later ones.

        Then hangs up on everyone: a rank that waits for this one is to end, too, though it may not wait for the lost.
        """
        late = [rank for rank, error in ranks.items() if _timed_out(error)]
        gone = [rank for rank in ranks if rank not in late]
        parts = [f"{self.name(gone)} closed the connection"] if gone else []
        parts += [f"{self.name(late)} did not answer within the group's timeout"] if late else []
        report = f"{' and '.join(parts)} ({self.name([self.who])} was {what}, call {self.call})"
        try:
            first = self.group.get_group_store().compare_set(LOST, "", report).decode()
        except RuntimeError as error:
            first = f"unknown, the group's store is gone, too: {str(error).splitlines()[0]}"
        if "cpu" in self.backends:
            self._hang_up()
        return RuntimeError(report if first == report else f"{report}; the first report: {first}")

    def _hang_up(self) -> None:
        """Gloo closes all connections of a process that does not get what it waits for in time."""
        for rank in self.others:
            nothing = torch.empty(1)
            with suppress(RuntimeError):  # that is what it comes to, or has come to before
                work = dist.irecv(nothing, group=self.group, group_src=rank, tag=1)
                assert work is not None
                work.wait(timedelta(milliseconds=1))

    def _difference(self, key: str, values: list[Any]) -> str:
        """What the few have and what the many."""
        ranks: dict[str, list[int]] = {}
        for rank, value in enumerate(values):
            ranks.setdefault(str(value), []).append(rank)
        parties = [f"{self.name(who)} {value}" for value, who in sorted(ranks.items(), key=lambda it: len(it[1]))]
        return f"{key}: all ranks of the group need the same, got {'; '.join(parties)}"


class Pending:
    """Messages on their way, with the tensors that they leave from."""

    def __init__(self, exchange: Exchange, what: str, received: Tensors, sent: list[Tensor]) -> None:
        self.exchange, self.what, self.received, self.sent = exchange, what, received, sent
        self.works: list[tuple[int, Any]] = []
        self.lost: dict[int, RuntimeError] = {}

    def wait(self) -> Tensors:
        """What was received.

        Raises:
            RuntimeError: names every rank that is gone. All others are waited for first: they would miss this one.
        """
        for rank, work in self.works:
            late = any(map(_timed_out, self.lost.values()))
            try:
                work.wait(*([_GRACE] if late else []))
            except RuntimeError as error:
                self.lost.setdefault(rank, error)
        if self.lost:
            raise self.exchange.lost(self.lost, self.what) from next(iter(self.lost.values()))
        return self.received


def group_of(group: object) -> dist.ProcessGroup:
    """The group, checked.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        TypeError, ValueError: it is no group, or this process is not in it.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "group: torch.distributed is not initialised; call torch.distributed.init_process_group first (torchrun "
            "sets its environment), or leave group out for one process"
        )
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: got one that this process is not a member of; call the loss on its members only")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: got {type(group).__name__}, needs a torch.distributed.ProcessGroup")
    return group


def _timed_out(error: RuntimeError) -> bool:
    return "imed out" in str(error) or "timeout" in str(error)


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == torch.bool else x
