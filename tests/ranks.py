"""A few processes with gloo groups, kept for many small runs: starting them takes longer than any of those."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 90.0  # seconds for one run


class Ranks:
    """`size` processes; `run` calls a function of a module on all of them, or on the first few, with their group.

    Args:
        store: a file that does not exist, for the processes to find each other.
        timeout: of the groups, in seconds.
    """

    def __init__(self, size: int, store: Path, timeout: float = 60) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.distributed_runs"])  # torch is imported once
        self.size, self.pipes, self.processes = size, [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, str(store), timeout), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self.run(_nothing)

    def outcomes(self, function: Callable[..., Any], *arguments: Any, among: int | None = None) -> list[Any]:
        """What `function(group, *arguments)` returned on each rank, or, as a string, the traceback of what it raised.

        None: the process ended. One that does neither within PATIENCE is killed, and the test fails.
        """
        among = self.size if among is None else among
        self.begin(function, *arguments, among=among)
        return [self.outcome(rank) for rank in range(among)]

    def begin(self, function: Callable[..., Any], *arguments: Any, among: int) -> None:
        for pipe in self.pipes[:among]:
            pipe.send_bytes(pickle.dumps((function, among, arguments)))

    def outcome(self, rank: int) -> Any:
        """Of what was begun."""
        if not self.pipes[rank].poll(PATIENCE):
            self.close()
            raise AssertionError(f"rank {rank} neither returned nor raised for {PATIENCE:.0f} s")
        try:
            return pickle.loads(self.pipes[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            return None

    def run(self, function: Callable[..., Any], *arguments: Any, among: int | None = None) -> list[Any]:
        """As `outcomes`, where nobody is to raise or end."""
        found = self.outcomes(function, *arguments, among=among)
        for rank, outcome in enumerate(found):
            assert outcome is not None, f"rank {rank} ended"
            assert not isinstance(outcome, str), f"rank {rank}: {outcome}"
        return found

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _serve(pipe: Connection, rank: int, size: int, store: str, timeout: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    groups: dict[int, Any] = {count: dist.new_group(list(range(count))) for count in range(1, size)}
    groups[size] = dist.group.WORLD
    while True:
        try:
            function, among, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        try:
            outcome = function(groups[among], *arguments)
        except Exception:
            outcome = traceback.format_exc()
        pipe.send_bytes(pickle.dumps(outcome))


def _nothing(group: dist.ProcessGroup) -> int:
    return dist.get_rank(group)
