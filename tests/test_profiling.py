"""--profile: traces that other programs open, a table and a sentence that add up, and a run that is the same."""

import gzip
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, Train, command
from helpers.launching import CPU_2PROC

from cifar import profiling
from cifar.profiling import Waits, covered, waits


def event(name: str, begin: float, end: float, device: str = "CPU", annotation: bool = False) -> Any:
    return SimpleNamespace(
        name=name,
        device_type=SimpleNamespace(name=device),
        is_user_annotation=annotation,
        time_range=SimpleNamespace(start=1e6 * begin, end=1e6 * end),
    )


def test_time_is_covered_once() -> None:
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4
    assert covered([]) == 0


def test_on_a_cpu_each_moment_counts_once() -> None:
    events = [
        event("ProfilerStep*", 0, 10), event("ProfilerStep*", 10, 20),
        event("images", 0, 3), event("aten::flip", 1, 2),  # augmented on the device: still the wait for images
        event("aten::convolution", 4, 8), event("aten::conv2d", 4, 9),
        event("gloo:all_reduce", 8, 11),  # beside the convolution until 9
        event("evaluation", 15, 19), event("aten::convolution", 16, 18),
        event("aten::add", 19.5, 25),  # ends in a step that is not traced
    ]  # fmt: skip
    found = waits(events, "cpu")
    assert found == pytest.approx(Waits(device=5.5, host=5.5, images=3, ranks=2))
    assert sum(found) == pytest.approx(20 - 4)


def test_on_a_gpu_what_it_computes_meanwhile_is_no_wait() -> None:
    events = [
        event("ProfilerStep*", 0, 10), event("ProfilerStep*", 0, 10, "CUDA", annotation=True),
        event("images", 0, 3), event("aten::convolution", 3, 4),
        event("sm90_xmma_fprop_implicit_gemm", 2, 7, "CUDA"), event("Memcpy HtoD", 6, 8, "CUDA"),
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 7, 9, "CUDA"), event("nccl:all_reduce", 7, 9, "CUDA", True),
    ]  # fmt: skip
    assert waits(events, "cuda") == pytest.approx(Waits(device=6, host=1, images=2, ranks=1))


@pytest.mark.parametrize(
    ("waited", "sentence"),
    [
        (Waits(0.06, 0.02, 0.01, 0.01),
         "a step of 50.0 ms waits for the device 60% of its time; the host 20%, images 10%, the other ranks 10%"),
        (Waits(0.02, 0, 0.06, 0),
         "a step of 40.0 ms waits for images 75% of its time; the device 25%, the host 0%, the other ranks 0%"),
    ],
)  # fmt: skip
def test_the_sentence_begins_with_what_is_waited_for_longest(waited: Waits, sentence: str) -> None:
    assert waited.sentence(2) == sentence


def arguments(shapes: Path, run: Path) -> list[object]:
    """Of 16 steps."""
    return ["--data", shapes, "--run", run, "--network", "whitened", "--augmentation-backend", "device", "--epochs", 2,
            "--peak-epoch", 1, "--global-batch-size", 8]  # fmt: skip


@pytest.mark.slow
def test_each_rank_leaves_a_trace_and_the_run_is_the_same(shapes: Path, train: Train, tmp_path: Path) -> None:
    plain = train(*arguments(shapes, tmp_path / "plain"), launcher=CPU_2PROC)
    # Steps 6 to 10 are traced, and an epoch has 8: there is an evaluation between them.
    traced = train(*arguments(shapes, tmp_path / "traced"), "--profile", 5, launcher=CPU_2PROC)
    assert (plain.returncode, traced.returncode) == (0, 0), plain.stderr + traced.stderr
    for name in ("model.safetensors", "predictions.safetensors", "checkpoints/step-0000016/optimizer.safetensors"):
        assert (tmp_path / "traced" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert not (tmp_path / "plain" / "profile").exists()

    folder = tmp_path / "traced" / "profile"
    stems = [f"attempt-1.rank-{rank}" for rank in (0, 1)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        stem + end for stem in stems for end in (".pt.trace.json.gz", ".txt")
    )
    for stem in stems:
        events = json.loads(gzip.decompress((folder / f"{stem}.pt.trace.json.gz").read_bytes()))["traceEvents"]
        names = [event.get("name", "") for event in events if event.get("cat") in ("user_annotation", "cpu_op")]
        assert sorted(name for name in names if name.startswith("ProfilerStep#")) == [
            f"ProfilerStep#{step}" for step in range(profiling.WARM_UP, profiling.WARM_UP + 5)
        ]
        assert names.count("images") == 5
        assert names.count(profiling.EVALUATION) == 1
        table = (folder / f"{stem}.txt").read_text()
        first, *rows, last = table.splitlines()
        assert first == "profile of 5 steps, milliseconds of each by kind of operator"
        kinds = {row[:18].strip(): float(row[18:]) for row in rows}
        assert kinds.keys() == {*profiling.KINDS, profiling.OPTIMIZER, "the rest"}
        assert kinds["convolution"] > 0
        assert kinds["optimizer"] > 0
        (step,) = re.findall(r"^a step of (\S+) ms waits for ", last)
        assert sum(kinds.values()) == pytest.approx(float(step.replace(",", "")), rel=0.01)
        assert sum(int(part) for part in re.findall(r"(\d+)%", last)) == pytest.approx(100, abs=2)
        assert not re.search(r"other ranks 0%", last)
    assert (folder / f"{stems[0]}.txt").read_text() in traced.stdout
    assert traced.stdout.count("profile of 5 steps") == 1


def test_more_steps_than_the_run_has_are_one_line(shapes: Path, train: Train, tmp_path: Path) -> None:
    done = train(*arguments(shapes, tmp_path / "run"), "--profile", 12)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "train.py: error: --profile 12 needs 17 steps, and the run has 16; ask for fewer"
    )
    assert not list((tmp_path / "run").rglob("*.json.gz"))


@pytest.mark.slow
def test_an_attempt_with_few_steps_left_and_one_without_room_train_on(
    shapes: Path, train: Train, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train(*arguments(shapes, run), "--checkpoint-every", 14).returncode == 0

    def again() -> str:
        (run / "result.json").unlink()
        (run / "status.json").unlink()
        done = train(*arguments(shapes, run), "--checkpoint-every", 14, "--profile", 5)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shutil.rmtree(run / "checkpoints" / "step-0000016")
    said = again()
    assert "resuming from" in said
    assert "profile" not in said
    shutil.rmtree(run / "checkpoints")
    (run / "profile").write_text("where a folder should be")
    cannot = f"{run}/profile/attempt-3.rank-0.pt.trace.json.gz cannot be written (File exists); training continues"
    assert cannot in again()


def test_what_is_cut_short_leaves_no_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rank_0 = SimpleNamespace(device=torch.device("cpu"), process_index=0, is_main_process=True)

    def traced(steps: int) -> None:
        with profiling.of_steps(4, rank_0, tmp_path, 1, 0, 100) as profiler:  # type: ignore[arg-type]
            for _ in range(steps):
                torch.ones(3).add(1)
                profiler.step()
            raise KeyError

    for steps in (0, profiling.WARM_UP - 1, profiling.WARM_UP + 2):
        with pytest.raises(KeyError):
            traced(steps)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
    with pytest.raises(KeyError):
        traced(profiling.WARM_UP + 4)
    assert len(list((tmp_path / "profile").iterdir())) == 2
    assert "profile of 4 steps" in capsys.readouterr().out


def test_a_number_that_is_none_is_one_line() -> None:
    done = subprocess.run(
        command(ROOT / "train.py", "--profile", -1), capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (
        2,
        "train.py: error: --profile -1 is not a number of steps; give e.g. 10\n",
    )
