"""Before training on several nodes: finds the one that does not answer, lacks a device or does not reach the others.

    srun --ntasks-per-node=1 python -m cifar.preflight --port 29400 --processes-per-node 8 node1 node2 node3

One process on each node: a rendezvous, and one all-reduce with the backend that training will use. A node that does
not answer is named within a minute, where training itself would wait for it for half an hour and name nobody.
"""

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

from cifar import device
from cifar.errors import Parser, UserError, command_line

SECONDS = 60  # for all nodes to begin, and again for the all-reduce


def check(nodes: Sequence[str], rank: int, port: int, processes_per_node: int, seconds: int) -> None:
    """Returns when an all-reduce over the nodes has succeeded. Raises UserError, naming nodes that did not answer."""
    device.quiet_nccl()
    import torch
    from torch import distributed
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    wait, limit = timedelta(seconds=seconds), timedelta(seconds=4 * seconds)  # `meet`, which names nodes, waits less
    decided = device.decide(processes_per_node)
    try:
        store = TCPStore(nodes[0], port, is_master=rank == 0, timeout=wait, wait_for_workers=False)
    except RuntimeError as refused:
        reason = str(refused).splitlines()[0].partition(". ")[0]
        raise UserError(f"{nodes[rank]} does not reach {nodes[0]}, port {port}: {reason}; check the network") from None

    meet = partial(_meet, store, nodes, rank, seconds)
    meet("began", decided.kind)
    kinds = [store.get(f"began/{r}").decode() for r in range(len(nodes))]
    device.compare(zip(nodes, kinds, strict=True))
    error = "they have not done so in time"

    def add_up() -> None:
        nonlocal error
        try:
            # A store of its own: one that waits lets no other thread use its connection.
            own = TCPStore(nodes[0], port, is_master=False, timeout=wait, wait_for_workers=False)
            distributed.init_process_group(
                decided.backend, store=PrefixStore("group", own), rank=rank, world_size=len(nodes), timeout=limit
            )
            total = torch.ones(1, device=decided.kind)
            distributed.all_reduce(total)
            error = "" if total.item() == len(nodes) else f"{total.item():g} instead of {len(nodes)}"
        except RuntimeError as failed:
            error = str(failed).splitlines()[0].partition(". ")[0]

    # In a thread: NCCL may wait forever for a communicator that one node cannot make.
    adding = threading.Thread(target=add_up, daemon=True)
    adding.start()
    adding.join(seconds)
    meet("added up")  # also after a failure: a frozen node is named here, not those that waited for it
    if not error:
        distributed.destroy_process_group()
    _leave(store, rank, range(1, len(nodes)), seconds)
    if error:
        raise UserError(
            f"{nodes[rank]}: the nodes answer but their all-reduce fails ({error}); set the interface that "
            "connects them (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
        )


def _meet(store: Any, nodes: Sequence[str], rank: int, seconds: int, stage: str, word: str = "") -> None:
    """Waits until every node has come as far. Raises UserError, the same on all that are there, if one does not."""
    deadline = time.monotonic() + seconds
    try:
        store.set(f"{stage}/{rank}", word)
        while silent := [other for other in range(len(nodes)) if not store.check([f"{stage}/{other}"])]:
            line = store.get("failed").decode() if store.check(["failed"]) else ""
            if not line and time.monotonic() > deadline:
                names = ", ".join(nodes[other] for other in silent)
                line = f"no answer from {names} within {seconds} s; check or exclude it"
                store.set("failed", line)
            if line:
                _leave(store, rank, {*range(1, len(nodes))} - {*silent}, seconds)
                raise UserError(line)
            time.sleep(0.1)
    except RuntimeError:  # the store is in the first node's process
        raise UserError(f"{nodes[rank]}: {nodes[0]} has ended; see its message") from None


def _leave(store: Any, rank: int, others: Iterable[int], seconds: int) -> None:
    """Returns on rank 0 after the others: the store is in its process, and they are still reading it."""
    if rank:
        store.set(f"left/{rank}", "")
        return
    deadline, left = time.monotonic() + seconds, [f"left/{other}" for other in others]
    while left and not store.check(left) and time.monotonic() < deadline:
        time.sleep(0.1)


def _end_after(seconds: int, nodes: Sequence[str]) -> None:
    """Ends this process after so many seconds, more than all stages take: torch's store does not keep its own limit.

    It waits for ever for a frozen first node, or for another program that has its port.
    """

    def end() -> None:
        line = f"{nodes[0]} does not answer, or another program has its port; check or exclude it"
        print(f"preflight: error: {line}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def parse_command_line() -> argparse.Namespace:
    """Parses the command line. Raises UserError for a flag that is unknown, missing, or no number."""
    parser = Parser(prog="python -m cifar.preflight", description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, required=True, help="a free port on the first node")
    parser.add_argument("--processes-per-node", type=int, required=True, help="devices that each node must have")
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"time limit of each stage ({SECONDS})")
    parser.add_argument("nodes", nargs="+", help="names of the job's nodes, in the order of their ranks")
    return parser.parse_args()


def main() -> None:
    """Ends with one line and exit status 2 where the nodes cannot work together."""
    try:
        with command_line("preflight"):
            asked, rank = parse_command_line(), int(os.environ["SLURM_PROCID"])
            _end_after(6 * asked.seconds, asked.nodes)
            check(asked.nodes, rank, asked.port, asked.processes_per_node, asked.seconds)
            if rank == 0:
                print(f"preflight: {len(asked.nodes)} nodes answer: {', '.join(asked.nodes)}")
    except SystemExit as refused:
        os._exit(int(refused.code or 0))  # a thread that NCCL holds would not let Python end


if __name__ == "__main__":
    main()
