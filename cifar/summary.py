"""The network as a table: what `train.py` prints at the start of a run."""

from functools import partial

import torch
from torch import nn


def table(network: nn.Module) -> str:
    """Formats `rows` as a text table, and adds the size of the float32 weights in MB."""
    cells = rows(network)
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    lines = [
        f"{name:{widths[0]}}  {kind:{widths[1]}}  {shape:>{widths[2]}}  {own:>{widths[3]}}"
        for name, kind, shape, own in cells
    ]
    size = parameter_count(network) * 4 / 1e6
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], f"{size:.3f} MB in float32"])


def rows(network: nn.Module) -> list[tuple[str, str, str, str]]:
    """Returns name, type, output shape and parameters of every layer, and their total, below a row of these headings.

    Runs one zero image through the network in evaluation mode; mode, hooks and buffers are left as they were.
    """
    found: list[tuple[str, str, str, int]] = []
    layers = [(name, module) for name, module in network.named_modules() if not list(module.children())]

    def record(name: str, module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        found.append((name, type(module).__name__, "x".join(map(str, output.shape[1:])), parameter_count(module)))

    handles = [module.register_forward_hook(partial(record, name)) for name, module in layers]
    mode = network.training
    weight = next(network.parameters())
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, 32, 32, device=weight.device, dtype=weight.dtype))
    finally:
        network.train(mode)
        for handle in handles:
            handle.remove()
    return [
        ("layer", "type", "output", "parameters"),
        *((name, kind, shape, f"{own:,}") for name, kind, shape, own in found),
        ("total", "", "", f"{parameter_count(network):,}"),
    ]


def parameter_count(network: nn.Module) -> int:
    """Returns the number of trainable and frozen parameters, buffers aside."""
    return sum(parameter.numel() for parameter in network.parameters())
