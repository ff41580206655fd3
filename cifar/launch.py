"""Sets up a job's processes: checks, Accelerator, DDP, shutdown."""

import ctypes
import gc
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch import nn
from torch.distributed import is_nccl_available

from cifar import cores, device, failure, ranks
from cifar.cores import local_processes
from cifar.data.sources import DOWNLOAD_SECONDS
from cifar.errors import UserError

# DDP's bucket size in MB. A bucket is all-reduced while the next is computed, so only the last one is exposed: 16.8 MB
# of the 6.6 M network with DDP's default of 25, 1.5 MB with 5. Smaller buckets would mean more messages.
BUCKET_MB = 5

# Launcher features that are not supported, often set by another project's default configuration.
UNUSED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")  # of the rendezvous


def start(gradient_compression: str = "none", deterministic: bool = False) -> Accelerator:
    """Creates the Accelerator of this process, after checks that refuse a misconfigured launch.

    With `gradient_compression` "bf16" DDP sends gradients in that precision, whatever they were computed in.
    Mixed precision is set by the launcher alone, the device by device.py. On CPUs every core is in use. `deterministic`
    restricts torch to deterministic operations. Raises UserError if the processes do not find each other, have
    different devices or lack the precision.
    """
    _check_numbers()
    failure.start()  # before the rendezvous, so that a missing rank and its reason are named
    decided = device.decide(local_processes())
    on_cpu = decided.kind == "cpu"
    if on_cpu:
        failure.computes_on_cpu()
    _check_settings(on_cpu)
    machines = failure.exchange("device", f"{socket.gethostname()} {decided.kind}")
    device.compare((host, kind) for host, kind in map(str.split, machines))
    if deterministic:
        _make_deterministic()
    # Longer than failure.py's timeouts, which name the missing rank (this one would not), and long enough for one rank
    # to download and decode.
    seconds = 4 * max(failure.SETUP_SECONDS, DOWNLOAD_SECONDS, failure.hang_seconds())
    limit = timedelta(seconds=min(seconds, failure.LONGEST))
    _rejoin(decided.backend, limit)
    hook = DDPCommunicationHookType("no" if gradient_compression == "none" else gradient_compression)
    handlers = [
        # Gradients stay in the buckets after the all-reduce, instead of being copied out of them.
        DistributedDataParallelKwargs(bucket_cap_mb=BUCKET_MB, comm_hook=hook, gradient_as_bucket_view=True),
        InitProcessGroupKwargs(timeout=limit),
    ]
    # By its own default it would take a number from the environment, and divide gradients by it.
    accumulation = GradientAccumulationPlugin(num_steps=1)
    accelerator = Accelerator(cpu=on_cpu, gradient_accumulation_plugin=accumulation, kwargs_handlers=handlers)
    # Precision `no` means real float32; bf16 is for speed. (Accelerate allows the second where it compiles.)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if accelerator.num_processes > 1 and gradient_compression != "none" and not is_nccl_available():
        raise UserError(
            f"--gradient-compression {gradient_compression} needs a torch build with NCCL, which builds for CPUs lack; "
            "leave it out, in a new --run, or install a torch for GPUs, which runs on CPUs as well"
        )
    launched = os.environ.get("WORLD_SIZE", "1")
    if launched != str(accelerator.num_processes):  # each would believe itself to be alone, and all would write
        raise AssertionError(f"{launched} processes were launched, but this one knows of {accelerator.num_processes}")
    failure.name_hosts(ranks.gathered(accelerator, socket.gethostname()))
    # The launcher leaves a process on a machine with GPUs one thread, however many cores there are.
    torch.set_num_threads(cores.asked_for() or max(1, cores.available() // local_processes()))
    if on_cpu:
        _keep_freed_memory()
    return accelerator


def collect_garbage() -> None:
    """Enables Python's garbage collection, which failure.command_line disables; call it again after further imports.

    Later collections leave out what is there already: to go through it takes 0.2 s, for which a step would stop.
    """
    gc.collect()  # torch's imports leave an exception that keeps its callers' frames, and all that is in them, alive
    gc.freeze()
    gc.enable()


def _make_deterministic() -> None:
    """Makes torch raise for operations that are not deterministic. Call it before CUDA and NCCL start."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")  # all but these two, whose reduction order varies
    torch.use_deterministic_algorithms(True)
    # Else every tensor is filled before it is written, 324 a step instead of 28.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False  # autotuning may choose another algorithm in each run


def _check_numbers() -> None:
    """Raises UserError if the launcher's rendezvous variables are malformed or incomplete."""
    given = {name: os.environ[name] for name in NUMBERS if os.environ.get(name, "-1") != "-1"}  # -1: as if unset
    odd = next((f"{name}={value} is not a number" for name, value in given.items() if not value.isdecimal()), "")
    several = given.get("WORLD_SIZE", "1") != "1"
    missing = [name for name in (*NUMBERS, "MASTER_ADDR") if name not in os.environ]
    if not odd and missing and (several or "LOCAL_RANK" in given):
        what = "WORLD_SIZE" if several else "LOCAL_RANK"
        odd = f"{what}={given[what]} without {missing[0]}"
    if odd:
        os.environ["RANK"] = "0"  # so that this process prints the error
        raise UserError(f"{odd} in the environment; unset it, and let accelerate launch set the rendezvous variables")


def _check_settings(on_cpu: bool) -> None:
    """Raises UserError for a launcher setting that is not supported here."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    config = ("cpu_2proc" if several else "cpu") if on_cpu else ("multi_gpu" if several else "single_gpu")
    instead = f"launch with --config_file accelerate_configs/{config}.yaml"
    for name, what in UNUSED.items():
        if os.environ.get(name, "false").lower() in ("true", "1", "yes", "on"):
            raise UserError(
                f"the launch asks for {what} (a flag, a --config_file, or a default_config.yaml that is left under "
                f"~/.cache/huggingface/accelerate), and this job does not use it; {instead}"
            )
    if place := os.environ.get("ACCELERATE_TORCH_DEVICE"):  # accelerate would take it, whatever was decided
        raise UserError(f"ACCELERATE_TORCH_DEVICE={place} is not supported; unset it, and set {device.VARIABLE}")
    wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted not in ("no", "bf16", "fp16"):
        raise UserError(f"precision {wanted} is not supported; {instead}")
    if wanted == "fp16" and on_cpu:
        raise UserError(f"precision {wanted} needs a GPU, and there is none; launch with --mixed_precision bf16 or no")


def _rejoin(backend: str, limit: timedelta) -> None:
    """Joins the process group under store keys of its own, after an in-place restart (--max_restarts).

    The launcher's store outlives its workers, and with static rendezvous, Accelerate's default, torch 2.14 does not
    separate one attempt's keys from the next's: a new rank would look up a dead one's address, and hang.
    """
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if count == "0":
        return
    from torch.distributed import PrefixStore, TCPStore, init_process_group  # type: ignore[attr-defined]

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own = PrefixStore(f"restart/{count}", store)
    init_process_group(backend, store=own, rank=rank, world_size=ranks, timeout=limit)


def check_split(accelerator: Accelerator, global_batch_size: int, accumulation_steps: int) -> None:
    """Raises UserError if the global batch is not divisible: it is fixed by the recipe and never rounded."""
    if global_batch_size % (accelerator.num_processes * accumulation_steps):
        raise UserError(
            f"--global-batch-size {global_batch_size} does not divide into {accelerator.num_processes} process(es) x "
            f"{accumulation_steps} accumulation step(s); change one of the three"
        )


def loader_workers() -> int:
    """Returns how many dataloader workers a training process has: its share of the cores less one, between 1 and 8."""
    return max(1, min(8, cores.available() // local_processes() - 1))


def _keep_freed_memory() -> None:
    """Makes glibc keep freed activations instead of giving them back to the kernel, which would zero them again.

    Each step allocates and frees some gigabytes in pieces of up to 134 MB; by default each is a fresh mapping. On 2
    cores this took the 6.6 M network from 232 to 328 images/s (bf16, batch 512). A libc without mallopt is left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if sys.platform == "linux" and mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX in malloc.h: no mappings of their own for large pieces
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back
        mallopt(-2, 64 << 20)  # M_TOP_PAD: grow by 64 MB at a time


def topology(accelerator: Accelerator, global_batch_size: int) -> str:
    """Returns one line for the start of a run.

    It names device, processes, threads, precision, batch; and which precision is faster.
    """
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    processes = accelerator.num_processes
    line = (
        f"{name}, {processes} process{'es' if processes > 1 else ''}, {torch.get_num_threads()} CPU threads each, "
        f"precision {accelerator.mixed_precision}, global batch {global_batch_size}"
        f" ({global_batch_size // processes} a process)"
    )
    if accelerator.mixed_precision == "no" and native_bf16(device):
        line += (
            "\nhint: this machine computes bf16 natively, about twice as fast: accelerate launch --mixed_precision bf16"
        )
    if accelerator.mixed_precision == "bf16" and not native_bf16(device):
        # 13 times slower on a processor with AVX2 alone (torch 2.14, this network, one thread).
        line += "\nhint: this machine only emulates bf16, which takes many times as long: --mixed_precision no"
    return line


def computed_on(accelerator: Accelerator) -> dict[str, str]:
    """Returns the hardware and libraries on which the bits of a result may depend."""
    found = {"torch": str(torch.__version__)}
    if accelerator.device.type == "cpu":
        return {**found, "device": "CPU", "threads": str(torch.get_num_threads())}
    found["device"] = torch.cuda.get_device_name(accelerator.device)
    driver = Path("/proc/driver/nvidia/version")
    found["driver"] = driver.read_text().splitlines()[0] if driver.exists() else "unknown"
    found["CUDA"], found["cuDNN"] = str(torch.version.cuda), str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    if accelerator.num_processes > 1:
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return found


def native_bf16(device: torch.device) -> bool:
    """Returns whether the device computes in bf16 itself, instead of emulating it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def fix_bucket_order(accelerator: Accelerator, model: nn.Module, network: nn.Module) -> None:
    """Lets DDP arrange its buckets before the first step, so that a resumed run adds gradients in the same order.

    DDP sorts the gradients again after its first backward pass, by the order in which they became ready. With three
    ranks or more, a gradient's place in its bucket decides the order in which the ranks' contributions are added, and
    float32 sums depend on that: the first step after a resume would differ in the last bits from the same step before.
    """
    if accelerator.num_processes == 1:
        return
    # Evaluations and checkpoints use rank 0's batch-norm statistics, so steps need not broadcast buffers. (From torch
    # 2.14 on, DDP's constructor has another name for it.)
    model.broadcast_buffers = False  # type: ignore[assignment]
    buffers = [buffer.clone() for buffer in network.buffers()]
    for _ in range(2):  # they are arranged at the beginning of the second forward pass
        images = torch.zeros(2, 3, 32, 32, device=accelerator.device).contiguous(memory_format=torch.channels_last)
        accelerator.backward(model(images).sum() * 0)
    for buffer, before in zip(network.buffers(), buffers, strict=True):
        buffer.copy_(before)
    for parameter in network.parameters():
        parameter.grad = None


def rewrap_ddp(accelerator: Accelerator, network: nn.Module) -> nn.Module:
    """Wraps the network in DDP again after some of it has been frozen.

    DDP waits for the gradient of every parameter that was trainable when it was built. (With find_unused_parameters it
    would send zeros for the others, and warn at its first step that there are none.)
    """
    network.__dict__.pop("_is_accelerate_prepared", None)  # else a single process would not compile again
    model: nn.Module = accelerator.prepare_model(network)
    fix_bucket_order(accelerator, model, network)
    return model


def end(accelerator: Accelerator) -> None:
    """Shuts the process group down cleanly, once rank 0 has written what it writes alone."""
    failure.disable_watchdog()
    accelerator.end_training()


def prepare(
    accelerator: Accelerator, network: nn.Module, optimizer: torch.optim.Optimizer, scaler: dict[str, Any] | None
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """Returns the network as the ranks train it together, and the optimizer that steps it.

    The network is in the launcher's precision.
    """
    model, prepared = accelerator.prepare(network, optimizer)
    if accelerator.scaler is not None and scaler is not None:
        accelerator.scaler.load_state_dict(scaler)
    fix_bucket_order(accelerator, model, network)
    collect_garbage()  # before dataloader workers are forked
    return model, prepared


def scaler_state(accelerator: Accelerator) -> dict[str, Any] | None:
    """Returns the state of the loss scaler that float16 needs, None in other precisions."""
    return None if accelerator.scaler is None else accelerator.scaler.state_dict()


def memory_bytes(device: torch.device) -> int:
    """Returns the peak of allocated memory on a CUDA device, else this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
