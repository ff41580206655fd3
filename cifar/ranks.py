"""Collective helpers: raise on all ranks, gather, compare, any."""

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from cifar.errors import UserError

T = TypeVar("T")


@contextmanager
def raise_on_all_ranks(accelerator: Accelerator) -> Iterator[None]:
    """Runs a block that all ranks enter and leave together: a UserError on any of them is raised on all of them.

    Without it the ranks that meet no error would wait in the next collective for one that has gone. The block itself
    must not contain collectives.
    """
    mine = None
    try:
        yield
    except UserError as error:
        mine = str(error), error.status
    errors = [error for error in gathered(accelerator, mine) if error is not None]
    if errors:
        raise UserError(*errors[0])


def gathered(accelerator: Accelerator, value: T) -> list[T]:
    """Returns every rank's value."""
    values: list[T] = gather_object([value]) if accelerator.num_processes > 1 else [value]
    return values


def require_equal(accelerator: Accelerator, values: Mapping[str, object]) -> None:
    """Raises UserError on all ranks where one of them has another value than rank 0."""
    everywhere = gathered(accelerator, (socket.gethostname(), dict(values)))
    first = everywhere[0][1]
    for rank, (host, theirs) in enumerate(everywhere):
        different = [f"{name} ({theirs[name]}, rank 0: {first[name]})" for name in first if theirs[name] != first[name]]
        if different:
            raise UserError(
                f"rank {rank} on {host} differs from rank 0 in {', '.join(different)}; "
                "start all processes with the same command and the same images"
            )


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Returns whether the flag is set on any rank: the same answer on all of them."""
    total = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum")
    return bool(total.item() > 0)
