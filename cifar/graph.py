"""A step's gradients as a CUDA graph: forward, loss and backward are recorded once and then launched as one.

With 64 images for each GPU, launching some 400 kernels one by one takes longer than computing them. The graph holds the
bare network: DDP's hooks belong to the stream on which it was made, and its reducer changes while it warms up. Even the
parameters' own autograd nodes, which DDP keeps alive, belong to that stream, and a capture that meets them fails: the
graph's gradients are those of leaves of its own, which share the parameters' memory. The ranks' gradients lie in one
flat tensor instead, which one all-reduce averages after the replay. That all-reduce does not overlap with the backward
pass, as DDP's do, which is why DDP stays wherever no graph is replayed.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn
from torch.func import functional_call

from cifar import failure, loop, ranks
from cifar.recipes import Recipe

WARM_UP = 3  # eager steps before a capture, in which libraries choose and allocate what they need
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
) -> GradientFunction:
    """What computes the gradients of a step: graphs where they are wanted and there are such, or the eager step."""
    if wanted == "auto" and accelerator.device.type in KINDS:
        return GraphedGradients(accelerator, recipe, own_work, network)
    return partial(loop.accumulate_gradients, accelerator, recipe, own_work)


class GraphedGradients:
    """Does what `loop.accumulate_gradients` does, by replaying a graph of `network` where one can be trusted.

    There is one graph for each size of the images and set of parameters that learn. Before it is used, its gradients
    are compared with those of the eager step on the same images. If the capture or the comparison fails on any rank,
    one line says so, and all ranks go on eagerly.
    """

    def __init__(self, accelerator: Accelerator, recipe: Recipe, own_work: loop.OwnWork, network: nn.Module) -> None:
        self.accelerator, self.recipe, self.own_work, self.network = accelerator, recipe, own_work, network
        self.eager = partial(loop.accumulate_gradients, accelerator, recipe, own_work)
        self.graphs: dict[tuple[object, ...], _Graph] = {}
        self.trusted = True
        self.replayed = 0  # steps

    def __call__(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, write_failed: bool
    ) -> torch.Tensor:
        """See `loop.accumulate_gradients`; `model` is used where no graph is."""
        parameters = {name: each for name, each in self.network.named_parameters() if each.requires_grad}
        key = (images.shape, len(parameters))
        if self.trusted and key not in self.graphs:
            self.graphs[key] = _Graph(self.accelerator, self.recipe, self.network, parameters, images, labels)
            problem = self.graphs[key].problem(images, labels)
            self.trusted = not ranks.any_rank(self.accelerator, bool(problem))
            if not self.trusted:
                self.graphs.clear()
                if self.accelerator.is_main_process:
                    print(f"no CUDA graph ({problem or 'another rank has none'}): training goes on without", flush=True)
        if not self.trusted:
            return self.eager(model, images, labels, write_failed)
        graph = self.graphs[key]
        graph.run(images, labels)
        self.own_work.ends()
        graph.average_gradients()
        self.replayed += 1
        failure.beat()
        return loop.reduced_totals(self.accelerator, graph.totals, write_failed)


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
        loss = loop.micro_batch_loss(self._logits, self.images, self.labels, self.recipe, self.totals)
        scaler = self.accelerator.scaler
        scaled = loss if scaler is None else scaler.scale(loss)
        torch._foreach_add_(self.gradients, torch.autograd.grad(scaled, list(self.leaves.values())))

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = functional_call(self.network, self.leaves, (images,))
        return logits

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
        if self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            return "the network is compiled"
        buffers = [buffer.clone() for buffer in self.network.buffers()]
        generator = _generator(self.flat.device)
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
        except RuntimeError as error:
            restore()
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
        # float16's gradients may overflow in the first steps, until their scale is found.
        finite = torch.equal(eager.isfinite(), replayed.isfinite())
        eager, again, replayed = (each.nan_to_num(0, 0, 0) for each in (eager, again, replayed))
        difference, allowed = (eager - replayed).norm(), (eager - again).norm()
        if not torch.are_deterministic_algorithms_enabled():
            allowed += TOLERANCE * eager.norm()
        if not finite or not difference <= allowed:
            return f"its gradients differ by {difference:.3g} from the eager step's, and {allowed:.3g} are allowed"
        return ""


def _generator(device: torch.device) -> torch.Generator:
    """The one that dropout on this device draws from."""
    return torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """A block on a stream beside the current one, as a capture is; a device that has no streams runs it as it is."""
    if device.type != "cuda":
        yield
        return
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def capture(step: Replay) -> Replay:
    """`step` as a CUDA graph. Other threads, which write checkpoints and upload batches, may go on meanwhile."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        # Around it, since a capture that fails leaves this thread on the stream of the capture.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    except RuntimeError:
        # Until torch 2.13 the generator then still believes to be captured, and the next dropout would fail; a capture
        # that succeeds ends that.
        with suppress(RuntimeError), warnings.catch_warnings(action="ignore"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            pass
        raise
    return graph.replay
