"""The device is what was asked for, or an error."""

import pytest
import torch

from cifar import device
from cifar.errors import UserError


@pytest.fixture(autouse=True)
def asked_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CIFAR_DEVICE", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)


def machine(monkeypatch: pytest.MonkeyPatch, gpus: int, *, hip: str | None = None, other: str = "") -> None:
    """A machine as torch tells it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.version, "hip", hip)
    found = torch.device(other) if other else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)  # noqa: ARG005


@pytest.mark.parametrize(
    ("asked", "gpus", "kind"),
    [({}, 0, "cpu"), ({}, 2, "cuda"), ({"CIFAR_DEVICE": "cpu"}, 2, "cpu"), ({"CIFAR_DEVICE": "cuda"}, 2, "cuda"),
     ({"ACCELERATE_USE_CPU": "True"}, 2, "cpu"), ({"ACCELERATE_USE_CPU": "False"}, 2, "cuda")],
)  # fmt: skip
def test_the_device_is_what_was_asked_for_or_what_there_is(
    asked: dict[str, str], gpus: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, gpus)
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    decided = device.decide(2)
    assert (decided.kind, decided.backend) == (kind, {"cpu": "gloo", "cuda": "nccl"}[kind])


@pytest.mark.parametrize(
    ("asked", "gpus", "more", "words"),
    [
        ("cuda", 0, {}, "has no GPU that torch .* can use, and CIFAR_DEVICE=cuda asks for one; look at nvidia-smi"),
        ("", 1, {}, r"has 1 GPU\(s\) for 2 processes; set --num_processes 1 for this machine"),
        ("", 2, {"hip": "6.4"}, "has an AMD GPU, on which this was never run; set CIFAR_DEVICE=cuda to try, or cpu"),
        ("", 0, {"other": "mps"}, "has an accelerator of type mps, which is not supported; set CIFAR_DEVICE=cpu"),
        ("", 0, {"other": "xpu"}, "has an accelerator of type xpu, which is not supported; set CIFAR_DEVICE=cpu"),
        ("tpu", 2, {}, "CIFAR_DEVICE=tpu is unknown; set cpu or cuda, or leave it unset"),
    ],
)
def test_what_a_machine_lacks_is_an_error_that_names_it(
    asked: str, gpus: int, more: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, gpus, **more)  # type: ignore[arg-type]
    if asked:
        monkeypatch.setenv("CIFAR_DEVICE", asked)
    with pytest.raises(UserError, match=words):
        device.decide(2)


def test_a_machine_that_lost_its_gpus_is_named_among_those_that_have_some() -> None:
    device.compare([("node1", "cuda"), ("node2", "cuda")])
    device.compare([("node1", "cpu"), ("node2", "cpu")])
    with pytest.raises(UserError, match="node2 has no GPU that torch can use, but the other machines have one"):
        device.compare([("node1", "cuda"), ("node2", "cpu"), ("node3", "cuda")])
    with pytest.raises(UserError, match="localhost has no GPU that torch can use"):
        device.compare([("localhost", "cuda"), ("localhost", "cpu")])


def test_a_gpu_and_the_cpu_are_not_asked_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 2)
    monkeypatch.setenv("CIFAR_DEVICE", "cuda")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UserError, match=r"asks for a GPU, and the launch for the CPU .* drop one"):
        device.decide(1)
