"""Chooses the training device, in this place only; there is no silent fallback.

The CPU is requested by CIFAR_DEVICE=cpu, by `accelerate launch --cpu` or `use_cpu: true` for one process, and by hidden
GPUs (CUDA_VISIBLE_DEVICES=-1, which `gpu_ids: "-1,-1"` in a configuration file sets). GPUs are requested by
CIFAR_DEVICE=cuda, which slurm/train.sbatch sets for jobs that have some. Otherwise a GPU is used if there is one;
launch.py compares the ranks' choices.
"""

import os
import socket
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

from cifar.errors import UserError

VARIABLE = "CIFAR_DEVICE"


class Device(NamedTuple):
    """A device type and its communication backend."""

    kind: Literal["cpu", "cuda"]

    @property
    def backend(self) -> Literal["gloo", "nccl"]:
        """torch.distributed's."""
        return "gloo" if self.kind == "cpu" else "nccl"


def decide(processes: int) -> Device:
    """Returns the device of this machine's `processes`.

    Raises UserError, naming the machine, where it lacks what was asked for or has an accelerator of another kind.
    """
    import torch  # not for --help

    asked, host = os.environ.get(VARIABLE, ""), socket.gethostname()
    if asked not in ("", "cpu", "cuda"):
        raise UserError(f"{VARIABLE}={asked} is unknown; set cpu or cuda, or leave it unset")
    by_launcher = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
    if asked == "cuda" and by_launcher:  # accelerate would take the CPU
        raise UserError(f"{VARIABLE}=cuda asks for a GPU, and the launch for the CPU (--cpu, use_cpu); drop one")
    if asked == "cpu" or by_launcher:
        return Device("cpu")
    if torch.cuda.is_available():
        if torch.version.hip and not asked:
            raise UserError(f"{host} has an AMD GPU, on which this was never run; set {VARIABLE}=cuda to try, or cpu")
        count = torch.cuda.device_count()
        if count < processes:
            raise UserError(
                f"{host} has {count} GPU(s) for {processes} processes; set --num_processes {count} for this machine"
            )
        return Device("cuda")
    if asked == "cuda":
        raise UserError(
            f"{host} has no GPU that torch {torch.__version__} can use, and {VARIABLE}=cuda asks for one; "
            "look at nvidia-smi there, exclude that node, or set CIFAR_DEVICE=cpu"
        )
    other = torch.accelerator.current_accelerator(check_available=True)
    if other is not None:
        raise UserError(f"{host} has an accelerator of type {other.type}, which is not supported; set {VARIABLE}=cpu")
    return Device("cpu")


def compare(kinds: Iterable[tuple[str, str]]) -> None:
    """Raises UserError, naming the machines, where some of (machine, kind) train on GPUs and others on CPUs.

    Two of the machines may have the same name.
    """
    kinds = set(kinds)
    if len({kind for _, kind in kinds}) > 1:
        without = sorted(machine for machine, kind in kinds if kind == "cpu")
        raise UserError(
            f"{', '.join(without)} has no GPU that torch can use, but the other machines have one; look at "
            f"nvidia-smi there and exclude it, or set {VARIABLE}=cpu for all"
        )


def quiet_nccl() -> None:
    """Lets failure.py or preflight.py say why a job ends: NCCL's watchdog would end the process first.

    It writes 30 lines that name no rank. Call it before torch is imported, for the level of its log.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # torch's launcher has set 1
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")


class Mark:
    """A point in a device's work queue that can be waited for (a CUDA event); on a CPU, the present moment."""

    def __init__(self, device: "torch.device", timed: bool = False) -> None:
        import torch

        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=timed, blocking=True)  # type: ignore[no-untyped-call]
            self._event.record()
        self.made = time.perf_counter()  # on the host

    def wait(self) -> None:
        """Waits until the device has finished all work queued before this mark."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: "Mark") -> float:
        """Returns the seconds between two timed marks. Waits until the device has reached this one."""
        self.wait()
        if self._event is None or earlier._event is None:
            return self.made - earlier.made
        return float(earlier._event.elapsed_time(self._event)) / 1000
