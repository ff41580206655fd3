"""A step's gradients as a CUDA graph: forward, loss and backward are recorded once and then launched as one.

With 64 images per GPU, launching some 400 kernels one by one takes longer than running them. The graph captures the
bare network: DDP's hooks and reducer are tied to another stream and change during warm-up. Even the parameters'
autograd nodes, which DDP keeps alive, belong to that stream and would make the capture fail, so gradients are taken
with respect to detached leaves that share the parameters' memory. They lie in one flat tensor, averaged by one
all-reduce after the replay. It does not overlap with the backward pass, as DDP's does, so DDP is used wherever no graph
is replayed.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn
from torch.func import functional_call

from cifar import failure, loop, ranks
from cifar.clock import Clock
from cifar.recipes import Recipe

WARM_UP = 3  # eager steps before a capture, for autotuning and allocation
TOLERANCE = 1e-3  # of the gradients' norm, by which a replay may differ from the eager step, unless --deterministic

KINDS = ("cuda",)  # of devices that have graphs

Replay = Callable[[], None]
GradientFunction = Callable[[nn.Module, torch.Tensor, torch.Tensor, bool], torch.Tensor]


def gradient_function(
    wanted: Literal["auto", "off"],
    accelerator: Accelerator,
    recipe: Recipe,
    own_work: loop.OwnWork,
    network: nn.Module,
    clock: Clock,
) -> GradientFunction:
    """Returns what computes a step's gradients: a CUDA graph if wanted and supported, else the eager step.

    A capture counts as set-up on the clock. So does each step in which the network is compiled (--dynamo_backend).
    """
    wants_graph = wanted == "auto" and accelerator.device.type in KINDS
    eager = partial(loop.accumulate_gradients, accelerator, recipe, own_work)
    if accelerator.state.dynamo_plugin.backend == DynamoBackend.NO:
        return GraphedGradients(accelerator, recipe, own_work, network, clock) if wants_graph else eager
    if wants_graph:
        _say_why_no_graph(accelerator, "the network is compiled")
    compiled = set()

    def compiling(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, write_failed: bool) -> torch.Tensor:
        key = (images.shape, len(_learning(network)))
        if key in compiled:
            return eager(model, images, labels, write_failed)
        compiled.add(key)
        own_work.compiles = True
        with clock.within("set-up"):
            return eager(model, images, labels, write_failed)

    return compiling


def _learning(network: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that are not frozen, by name."""
    return {name: each for name, each in network.named_parameters() if each.requires_grad}


class GraphedGradients:
    """Does what `loop.accumulate_gradients` does, by replaying a graph of `network` where one can be trusted.

    There is one graph for each size of the images and set of parameters that learn. Before it is used, its gradients
    are compared with those of the eager step on the same images. If the capture or the comparison fails on any rank,
    one message says so, and all ranks continue eagerly.
    """

    def __init__(
        self, accelerator: Accelerator, recipe: Recipe, own_work: loop.OwnWork, network: nn.Module, clock: Clock
    ) -> None:
        self.accelerator, self.recipe, self.own_work, self.network = accelerator, recipe, own_work, network
        self.clock = clock
        self.eager = partial(loop.accumulate_gradients, accelerator, recipe, own_work)
        self.graphs: dict[tuple[object, ...], _Graph] = {}
        self.trusted = True
        self.replayed = 0  # steps

    def __call__(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, write_failed: bool
    ) -> torch.Tensor:
        """Does what `loop.accumulate_gradients` does; `model` is used where no graph is."""
        parameters = _learning(self.network)
        key = (images.shape, len(parameters))
        if self.trusted and key not in self.graphs:
            with self.clock.within("set-up"):
                self._capture(key, parameters, images, labels)
            self.own_work.begins()  # a capture is no part of a step
        if not self.trusted:
            return self.eager(model, images, labels, write_failed)
        graph = self.graphs[key]
        graph.run(images, labels)
        self.own_work.ends()
        graph.average_gradients()
        self.replayed += 1
        failure.step_progressed()
        return loop.reduced_totals(self.accelerator, graph.totals, write_failed)

    def _capture(
        self, key: tuple[object, ...], parameters: dict[str, nn.Parameter], images: torch.Tensor, labels: torch.Tensor
    ) -> None:
        """Adds a graph, or ends the use of all of them."""
        try:
            self.graphs[key] = _Graph(self.accelerator, self.recipe, self.network, parameters, images, labels)
            problem = self.graphs[key].problem(images, labels)
        except torch.OutOfMemoryError as error:
            problem = _first_line(error)
        self.trusted = not ranks.any_rank(self.accelerator, bool(problem))
        if not self.trusted:
            self.graphs.clear()
            _say_why_no_graph(self.accelerator, problem or "another rank has none")


def _say_why_no_graph(accelerator: Accelerator, why: str) -> None:
    if accelerator.is_main_process:
        print(f"no CUDA graph ({why}): continuing without", flush=True)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


class _Graph:
    """The captured step for one size of images and one set of parameters, with the tensors that it reads and writes."""

    def __init__(
        self, accelerator: Accelerator, recipe: Recipe, network: nn.Module, parameters: dict[str, nn.Parameter],
        images: torch.Tensor, labels: torch.Tensor,
    ) -> None:  # fmt: skip
        self.accelerator, self.recipe, self.network = accelerator, recipe, network
        self.parameters = list(parameters.values())
        self.parts = recipe.gradient_accumulation_steps
        self.images = torch.empty_like(images[: len(images) // self.parts])
        self.labels = torch.empty_like(labels[: len(labels) // self.parts])
        self.totals = torch.zeros(2, device=images.device)  # loss and correct predictions
        sizes = [parameter.numel() for parameter in self.parameters]
        self.flat = torch.zeros(sum(sizes), device=images.device)
        # Laid out in memory as their parameters are, which the fused optimizers want.
        self.gradients = [
            part.as_strided(parameter.shape, parameter.stride())
            for part, parameter in zip(torch.split(self.flat, sizes), self.parameters, strict=True)
        ]
        self.leaves = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
        self.replay: Replay = self._step

    def _step(self) -> None:
        """Adds a micro-batch's gradients and totals to those that are there."""
        model = partial(functional_call, self.network, self.leaves)
        loss = loop.micro_batch_loss(model, self.images, self.labels, self.recipe, self.totals)
        scaler = self.accelerator.scaler
        scaled = loss if scaler is None else scaler.scale(loss)
        torch._foreach_add_(self.gradients, torch.autograd.grad(scaled, list(self.leaves.values())))

    def run(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Leaves this rank's gradients in the parameters, and its totals."""
        self.flat.zero_()
        self.totals.zero_()
        for piece, piece_labels in zip(images.chunk(self.parts), labels.chunk(self.parts), strict=True):
            self.images.copy_(piece)
            self.labels.copy_(piece_labels)
            self.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def average_gradients(self) -> None:
        """Averages the gradients over the ranks; divided before they are added, as DDP does."""
        if self.accelerator.num_processes > 1:
            sent = self.flat.bfloat16() if self.recipe.gradient_compression == "bf16" else self.flat
            torch.distributed.all_reduce(sent.div_(self.accelerator.num_processes))
            if sent is not self.flat:
                self.flat.copy_(sent)

    def problem(self, images: torch.Tensor, labels: torch.Tensor) -> str:
        """Captures the step and compares; returns what is wrong, or ''. Leaves buffers and generator as they were."""
        buffers = [buffer.clone() for buffer in self.network.buffers()]
        generator = dropout_generator(self.flat.device)
        state = generator.get_state()

        def restore() -> None:
            for buffer, before in zip(self.network.buffers(), buffers, strict=True):
                buffer.copy_(before)
            generator.set_state(state)
            for parameter in self.parameters:
                parameter.grad = None

        def gradients() -> torch.Tensor:
            self.run(images, labels)
            restore()
            return self.flat.clone()

        try:
            with side_stream(self.flat.device):
                for _ in range(WARM_UP):
                    gradients()
            eager, again = gradients(), gradients()
            self.replay = capture(self._step)
            replayed = gradients()
        except (RuntimeError, ValueError) as error:  # ValueError: batch-norm over a single value
            restore()
            return _first_line(error)
        # float16's gradients may overflow in the first steps, until their scale is found.
        finite = torch.equal(eager.isfinite(), replayed.isfinite())
        eager, again, replayed = (each.nan_to_num(0, 0, 0) for each in (eager, again, replayed))
        difference, allowed = (eager - replayed).norm(), (eager - again).norm()
        if not torch.are_deterministic_algorithms_enabled():
            allowed += TOLERANCE * eager.norm()
        if not finite or not difference <= allowed:
            return f"its gradients differ by {difference:.3g} from the eager step's, and {allowed:.3g} are allowed"
        return ""


def dropout_generator(device: torch.device) -> torch.Generator:
    """Returns the generator that dropout on this device draws from.

    torch.manual_seed would seed those of all kinds of devices. For the ones that a machine lacks it formats a
    traceback each time, which takes the host 0.1 to 0.3 ms.
    """
    return torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Runs the block on a side stream, as a capture does; on a device without streams, directly."""
    if device.type != "cuda":
        yield
        return
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:  # what ran before an error still uses the tensors that the current stream goes on with
        current.wait_stream(stream)


@cache
def _pool() -> "torch.cuda._POOL_HANDLE":
    """Returns the memory pool of all graphs.

    They replay one after another, and none reads what another one has left there.
    """
    return torch.cuda.graph_pool_handle()


def capture(step: Replay) -> Replay:
    """Captures `step` as a CUDA graph. Other threads may write checkpoints and upload batches during the capture."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        # The outer block restores this thread's stream even if the capture fails.
        with torch.cuda.stream(torch.cuda.current_stream()), _captured(graph, _pool()):
            step()
    except RuntimeError:
        graph.reset()  # in torch 2.14 all that a failed capture needs
        _clean_up(_pool())
        raise
    return graph.replay


def _captured(graph: torch.cuda.CUDAGraph, pool: "torch.cuda._POOL_HANDLE | None" = None) -> torch.cuda.graph:
    """Returns a context that captures into `graph`. What other threads do on the device does not make it fail."""
    return torch.cuda.graph(graph, pool, capture_error_mode="thread_local")


def _clean_up(pool: "torch.cuda._POOL_HANDLE") -> None:
    """Ends what older versions of torch leave open after a failed capture."""
    # The allocator of 2.11 is not told that the capture has ended (github.com/pytorch/pytorch/pull/180395), and would
    # never again free a block that two streams have used. torch/_inductor/cudagraph_trees.py ends its pools like this.
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        pass  # it was told, and this would be once too often
    else:
        torch._C._cuda_releasePool(device, pool)
    _pool.cache_clear()  # torch refuses a pool that no graph uses any more
    # Up to torch 2.13 the generator stays in capture mode, and the next dropout would fail; a successful, empty capture
    # resets it.
    with suppress(RuntimeError), warnings.catch_warnings(action="ignore"), _captured(torch.cuda.CUDAGraph()):
        pass
