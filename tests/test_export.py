"""`python -m cifar.export`: one file whose answers are the network's, or none."""

import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Train

from cifar import export, models
from cifar.app.engine import Engine
from cifar.data import pictures
from cifar.explain import runs
from cifar.recipes import RECIPES

pytestmark = pytest.mark.slow

NETWORKS = models.names()
AS_PROCESS = ("resnet", "speedrun")  # one recipe of each network


@pytest.fixture(scope="module", params=RECIPES)
def run(request: pytest.FixtureRequest, shapes: Path, train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of each recipe."""
    directory = tmp_path_factory.mktemp("export") / request.param
    done = train("--recipe", request.param, "--data", shapes, "--run", directory, "--epochs", 2, "--peak-epoch", 1,
                 "--global-batch-size", 16, "--augmentation-backend", "device")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return directory


def exported(*arguments: object, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "cifar.export", *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("ending", export.NEEDS)
def test_after_every_recipe_the_file_answers_as_the_app_does(
    ending: str,
    run: Path,
    shapes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / f"out{ending}"
    if run.name in AS_PROCESS:
        done = exported("--run", run, "--output", file)
        assert done.returncode == 0, done.stderr
        out, err = done.stdout, done.stderr
    else:
        monkeypatch.setattr("sys.argv", ["cifar.export", "--run", str(run), "--output", str(file)])
        export.main()
        out, err = capsys.readouterr()
    assert err == ""
    first, second, third = out.splitlines()
    assert first.startswith(f"{file}: ")
    assert "verified on 22 test images: probabilities differ by at most" in first
    assert second.startswith("100.00% of the classes are those of the run's own last evaluation (in precision")
    assert third == "disc, ring, square, stripes: the classes, as JSON in its metadata under 'classes'"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]

    engine, paths = Engine(runs.open_run(run)), sorted((shapes / "test").glob("*/*.png"))
    pixels = np.stack([pictures.read(path) for path in paths])
    expected = np.stack([engine.answer(image, None, "gradcam", []).probabilities for image in pixels])
    if ending == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(file)
        assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == engine.run.classes
        (given,), (got,) = session.get_inputs(), session.get_outputs()
        assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [32, 32, 3])
        assert (got.name, got.type) == ("probabilities", "tensor(float)")
        found = [session.run(None, {"images": some})[0] for some in (pixels, pixels[:1])]
    else:
        extra = {"classes.json": ""}
        with file.open("rb") as opened:
            program = torch.export.load(opened, extra_files=extra).module()
        assert json.loads(extra["classes.json"]) == engine.run.classes
        found = [program(torch.from_numpy(some)).detach().numpy() for some in (pixels, pixels[:1])]
    np.testing.assert_allclose(found[0], expected, atol=1e-4)
    np.testing.assert_allclose(found[1], expected[:1], atol=1e-4)


def test_a_file_that_is_not_the_network_is_not_written(
    run: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export._with_normalization

    def wrong(network: torch.nn.Module, opened: runs.Run) -> torch.nn.Module:
        linear = network.get_submodule("linear")
        linear.weight.data = linear.weight.data.roll(1, 0)  # type: ignore[union-attr, operator]
        return real(network, opened)

    monkeypatch.setattr(export, "_with_normalization", wrong)
    opened, images = runs.open_run(run), np.stack([pictures.read(path) for path in shapes.rglob("*.png")])
    with pytest.raises(export.UserError, match=r"the exported file is not the network: probabilities differ by up to"):
        export.export(opened, images, tmp_path / "out.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("out.pth", "has an unknown suffix; use one of: .onnx, .pt2"),
        ("there.onnx", "exists; name a new file"),
        ("there.onnx/out.onnx", "cannot be written; name another folder"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "there.onnx").write_text("mine")
    done = exported("--output", tmp_path / name)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"cifar.export: error: --output {tmp_path / name} {words}\n"
    assert (tmp_path / "there.onnx").read_text() == "mine"


@pytest.mark.parametrize("streams", ["> /dev/full", ">&-", "2>&-", "> /dev/full 2> /dev/full"])
def test_output_that_cannot_be_written_does_not_matter_once_the_file_is_there(streams: str, tmp_path: Path) -> None:
    code = (
        "import sys; from cifar import export; export.start = lambda asked: print(asked.output, flush=True); "
        f"sys.argv = ['x', '--output', {str(tmp_path / 'x.pt2')!r}]; export.main()"
    )
    done = subprocess.run(
        ["bash", "-c", f"exec {shlex.join([sys.executable, '-c', code])} {streams}"], cwd=ROOT, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_without_hard_links_the_file_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), source, None, target)

    monkeypatch.setattr(os, "link", no_link)
    with export._under_another_name(tmp_path / "x.onnx") as temporary:
        temporary.write_bytes(b"ours")
    with (
        pytest.raises(export.UserError, match=r"x.onnx cannot be written \(File exists\)"),
        export._under_another_name(tmp_path / "x.onnx") as temporary,
    ):
        temporary.write_bytes(b"another")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.onnx", b"ours")]


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *rest: None if name == 'onnxscript' else find(name, *rest); "
        f"import sys; sys.argv = ['x', '--output', {str(tmp_path / 'x.onnx')!r}]; "
        "from cifar import export; export.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2, "cifar.export: error: onnxscript not installed; install it with: pip install '.[export]'\n",
    )  # fmt: skip
