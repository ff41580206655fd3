"""The examples of .github/CONTRIBUTING.md work as they stand there, one after the other."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

TEXT = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
SHORT = ("--network", "tiny", "--epochs", "1", "--peak-epoch", "0.5")  # a later flag wins over an earlier one


def more(line: str) -> tuple[str, ...]:
    """What makes a command quick."""
    if "train.py" in line:  # an augmentation is tried out as it stands there, by Albumentations
        return SHORT if "--augmentation" in line else (*SHORT, "--augmentation-backend", "device")
    return ("-n", "0") if "pytest" in line else ()


def put(code: str, project: Path) -> None:
    """Puts a block where its first line says."""
    first, _, rest = code.partition("\n")
    path, place = re.fullmatch(r"# (\S+), (a new file|at its end|in [A-Z]+)", first).groups()  # type: ignore[union-attr]
    file = project / path
    if place == "a new file":
        assert not file.exists()
        file.write_text(rest)
    elif place == "at its end":
        file.write_text(f"{file.read_text()}\n\n{rest}")
    else:
        opening = f"{place.removeprefix('in ')} = {{\n"
        assert file.read_text().count(opening) == 1
        file.write_text(file.read_text().replace(opening, opening + rest))


def test_the_examples_work_as_they_stand(tmp_path: Path) -> None:
    project = tmp_path / "cifar"
    shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "runs", "data"))
    shutil.copytree(ROOT / "cifar" / "data", project / "cifar" / "data", dirs_exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["PYTHONPATH"] = str(project)
    run, promised = [], []
    for language, code in re.findall(r"```(python|sh)\n(.*?)```", TEXT, re.DOTALL):
        if language == "python":
            put(code, project)
            continue
        for line, _, comment in (line.partition("  #") for line in code.splitlines()):
            words = [*shlex.split(line), *more(line)]
            done = subprocess.run(
                [Path(sys.executable).parent / words[0], *words[1:]], cwd=project, env=environment,
                capture_output=True, text=True, timeout=900, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            for promise in re.findall(r"\d+ passed", comment):
                assert re.search(rf"\b{promise}\b", done.stdout), f"{line}\n{done.stdout}"
                promised.append(promise)
            run.append(line)
    assert (len(run), len(promised)) == (10, 4)
    assert (project / "runs" / "odd_or_even" / "result.json").is_file()
    assert (project / "runs" / "tiny" / "explain" / "report.html").is_file()


def test_the_lowest_versions_are_the_lowest_that_are_allowed(tmp_path: Path) -> None:
    block = re.findall(r"^    (.+)$", TEXT[TEXT.index("Dependency bounds") :], re.MULTILINE)
    environment, install, tests = (shlex.split(line.partition("  #")[0]) for line in block)
    pinned = dict(word.removesuffix(".*").split("==") for word in install if "==" in word)
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    allowed = dict(dependency.split(">=") for dependency in dependencies if ">=" in dependency)
    assert pinned == {name: allowed[name] for name in ("torch", "accelerate")}
    # The rest, but for the installation: gigabytes of another torch.
    subprocess.run([sys.executable, *environment[1:], "--without-pip"], cwd=tmp_path, check=True)
    subprocess.run([sys.executable, "-m", "pip", *install[1:], "--help"], capture_output=True, check=True)
    assert [(tmp_path / program).parent.is_dir() for program in (install[0], tests[0])] == [True, True]
