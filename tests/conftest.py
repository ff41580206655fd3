"""What the tests share: small sets of images, and `train.py` as a user starts it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Threads that wait for work would spin, and take the processors from other tests' processes.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
# Tests are of what a program does on CPUs, on a machine with GPUs, too; those marked `gpu` start theirs with
# GPU_ENVIRONMENT, which has what the shell had. xdist's workers inherit the environment of pytest's first process,
# where it has been changed already: that process keeps what it found in a variable of its own.
HIDING = ("CUDA_VISIBLE_DEVICES", "CIFAR_DEVICE")
FOUND = "CIFAR_TESTS_FOUND"
os.environ.setdefault(FOUND, json.dumps({name: os.environ[name] for name in HIDING if name in os.environ}))
for name in HIDING:
    os.environ.pop(name, None)
GPU_ENVIRONMENT = {**os.environ, **json.loads(os.environ[FOUND])}
REHEARSAL = "REHEARSE_GPU_TESTS" in os.environ  # the gpu tests on CPUs
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
DRIVERS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # where one of these is, is a GPU's driver

# What a shell starts in the background ignores Ctrl-C, and so would the programs to which the tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
LONGEST = ("test_slurm", "test_failure", "test_readme", "test_train", "test_launch", "test_app", "test_explain")
SHAPES = ("disc", "ring", "square", "stripes")
CHROMIUM = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
]


def draw(shape: str, generator: np.random.Generator) -> Image.Image:
    """A white shape somewhere on a dark, noisy ground, 32x32 RGB."""
    y, x = np.mgrid[:32, :32]
    centre_y, centre_x = generator.integers(12, 20, 2)
    distance = np.hypot(y - centre_y, x - centre_x)
    mask = {
        "disc": distance < 8,
        "ring": (distance > 6) & (distance < 10),
        "square": (abs(y - centre_y) < 7) & (abs(x - centre_x) < 7),
        "stripes": (x // 4) % 2 == 0,
    }[shape]
    pixels = generator.integers(0, 60, (32, 32, 3)) + 180 * mask[:, :, None]
    return Image.fromarray(pixels.astype(np.uint8))


def has_driver() -> bool:
    return any(Path(place).exists() for place in DRIVERS)


def gpus() -> int:
    """How many GPUs torch can use here, asked of a process of its own: this one is not to see them."""
    if not has_driver():
        return 0
    script = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run(
        [sys.executable, "-c", script], env=GPU_ENVIRONMENT, capture_output=True, text=True, check=False
    )
    return int(done.stdout or 0)


@pytest.fixture(scope="module")  # one for the whole session lost its driver after other modules' tests
def browser() -> "Iterator[Browser]":
    """A headless Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("there is no chromium on the path")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=CHROMIUM)
        yield started
        started.close()


def pytest_itemcollected(item: pytest.Item) -> None:
    """What needs a browser says so by its fixtures."""
    if "browser" in getattr(item, "fixturenames", ()):
        item.add_marker("browser")


@pytest.hookimpl(trylast=True)  # once -m has left out what was not asked for
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules first, so that no process has one of them left when the others are done."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    marked = [item for item in items if item.get_closest_marker("gpu") or item.get_closest_marker("multigpu")]
    found = gpus() if marked and not REHEARSAL else 2
    for item in marked:
        if found < 1 + (item.get_closest_marker("multigpu") is not None):
            item.add_marker(pytest.mark.skip(reason=f"torch finds {found} GPUs here"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """`-m gpu` has failed where there is a GPU's driver and yet every test was skipped."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    asked = re.search(r"\bgpu\b", session.config.option.markexpr)
    if asked and reporter and has_driver():
        outcomes = {outcome for outcome in ("passed", "failed", "error", "skipped") if reporter.stats.get(outcome)}
        if outcomes == {"skipped"}:
            reporter.write_line("\nevery gpu test was skipped, though this machine has a GPU's driver", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def session_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what the tests of several modules use."""
    return tmp_path_factory.mktemp("session")


@pytest.fixture(autouse=True, scope="module")
def module_leaves_no_files(
    session_path: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[None]:
    """Removes the runs that a module's fixtures made, as pytest does a test's own folder, unless a test failed."""
    before = {*tmp_path_factory.getbasetemp().iterdir(), session_path}
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed == failed:
        for path in {*tmp_path_factory.getbasetemp().iterdir()} - before:
            if not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def shapes(session_path: Path) -> Path:
    """A folder <train|test>/<class>/<image>: 4 classes, 64 training and 22 test images."""
    root = session_path / "shapes"
    generator = np.random.default_rng(0)
    for split, counts in (("train", (16, 16, 16, 16)), ("test", (6, 6, 5, 5))):
        for shape, count in zip(SHAPES, counts, strict=True):
            (root / split / shape).mkdir(parents=True)
            for number in range(count):
                draw(shape, generator).save(root / split / shape / f"{number:02d}.png")
    return root


@pytest.fixture(scope="session")
def shapes_zip(shapes: Path) -> Path:
    """The same images as a zip."""
    path = shapes.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(shapes.rglob("*.png")):
            archive.write(file, file.relative_to(shapes))
    return path


@pytest.fixture(scope="session")
def copied_project(session_path: Path) -> Path:
    """A copy of the project's files that has one network more, `small`."""
    root = session_path / "project" / "cifar"
    root.mkdir(parents=True)
    for name in ("accelerate_configs", "slurm", "cifar"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "explain.py"):
        shutil.copy(ROOT / name, root)
    shutil.copy(ROOT / "tests/helpers/networks/small.py", root / "cifar/models")
    return root


@pytest.fixture(autouse=True, scope="session")
def own_cache(session_path: Path) -> Iterator[Path]:
    """Image caches go into the test's own folder, in this process and in those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        path = session_path / "cache"
        patch.setenv("XDG_CACHE_HOME", str(path))
        patch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        patch.setenv("HF_HOME", str(path))  # no configuration of the user's own
        GPU_ENVIRONMENT.update(XDG_CACHE_HOME=str(path), HF_HOME=str(path))
        yield path


class Disk:
    """A small file system of its own, in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def remount(self, options: str) -> None:
        """Changes it, e.g. 'ro' or 'size=1m'."""
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A file system that can be made full or read-only, which stops root, too."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", path]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a file system, and not in every container")
    yield Disk(path)
    subprocess.run(["umount", path], check=True)


def poisoned(step: int) -> str:
    """A patch of train.py: the loss of that step is NaN."""
    return (
        "from cifar import loop\n"
        "healthy, steps = loop.accumulate_gradients, 0\n"
        "def poison(*arguments):\n"
        "    global steps\n"
        "    steps += 1\n"
        "    totals = healthy(*arguments)\n"
        f"    if steps == {step}: totals[0] = float('nan')\n"
        "    return totals\n"
        "loop.accumulate_gradients = poison\n"
    )


Train = Callable[..., subprocess.CompletedProcess[str]]


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.split("-")[1])


def command(*arguments: object, launcher: tuple[str, ...] = ()) -> list[str]:
    """`python train.py ...`, or `accelerate launch <launcher> train.py ...`."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", *launcher]
    return [*(accelerate if launcher else [sys.executable]), *(str(argument) for argument in arguments)]


@pytest.fixture(scope="session")
def train() -> Train:
    """Runs train.py to its end and returns the finished process with its output."""

    def start(
        *arguments: object, launcher: tuple[str, ...] = (), env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(ROOT / "train.py", *arguments, launcher=launcher),
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )

    return start
