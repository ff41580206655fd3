"""Training on a real Slurm cluster, interrupted in every way that clusters know, ends with the same bytes.

The oracle of every case: weights, optimizer state and predictions equal those of a run that nothing interrupted, no
more steps were repeated than the case allows, the curves have no gap and no step twice, and the run was finished once.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT, SHAPES, draw, poisoned, step_of
from helpers.networks.small import SECONDS
from helpers.slurm_cluster import Cluster, reason_to_skip
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cifar import checkpoint

SKIP = reason_to_skip()
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(SKIP), reason=SKIP)]

EVERY = 5  # steps between checkpoints
EPOCH, EPOCHS = 100, 4
STEPS = EPOCHS * EPOCH
HANG = 20  # seconds: more than a slow machine takes for an evaluation with its pictures


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, own_cache: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    made.environment |= {
        "CIFAR_PRECISION": "no", "CIFAR_HANG_SECONDS": str(HANG), "CIFAR_ENVIRONMENT": sys.prefix,
        "SLOWLY": str(made.root / "slowly"), "FAILS": str(made.root / "fails"),
        "CIFAR_PREFLIGHT_SECONDS": "0",  # seconds of imports in each attempt; the README's example has it
    }  # fmt: skip
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture(scope="module")
def many_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """800 training images: so many steps in an epoch that faults meet training and not evaluation alone."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    generator = np.random.default_rng(0)
    for split, count in (("train", 8 * EPOCH // len(SHAPES)), ("test", 5)):
        for shape in SHAPES:
            (root / split / shape).mkdir(parents=True)
            for number in range(count):
                draw(shape, generator).save(root / split / shape / f"{number:03d}.png")
    return root


@pytest.fixture(scope="module")
def project(copied_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's files with the small network, and with every step a point of the curves."""
    root = tmp_path_factory.mktemp("project") / "cifar"
    shutil.copytree(copied_project, root)
    record = root / "cifar/record.py"
    text, found = re.subn(r"^LOG_SECONDS = [0-9.]+", "LOG_SECONDS = 0", record.read_text(), flags=re.MULTILINE)
    assert found == 1
    record.write_text(text)
    return root


class Job:
    """A submitted training job and its run directory."""

    def __init__(self, cluster: Cluster, run: Path, number: str, log: Path) -> None:
        self.cluster, self.run, self.number, self.log = cluster, run, number, log

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def status(self) -> dict[str, object]:
        path = self.run / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}  # type: ignore[no-any-return]

    def attempts(self) -> int:
        return len(list((self.run / "attempts").glob("*.json")))

    def resumed_at(self) -> list[int]:
        """The step at which each attempt but the first went on."""
        return [int(step) for step in re.findall(r"resuming from \S+/step-(\d+)", self.text())]

    def wait_step(self, step: int) -> None:
        """Waits for the checkpoint of that step."""
        checkpoints = self.run / "checkpoints"
        newest = lambda: max(map(step_of, checkpoint.found(checkpoints)), default=0)  # noqa: E731
        self.cluster.wait(lambda: newest() >= step, f"step {step} of job {self.number}: {self.text()}")

    def wait_state(self, *states: str) -> None:
        """Waits until Slurm says that the job is in one of these states."""
        try:
            self.cluster.wait(lambda: self.cluster.state(self.number) in states, f"{states}")
        except AssertionError as error:
            shown = self.cluster.call("scontrol", "--oneliner", "show", "job", self.number)
            attempts = [path.read_text() for path in sorted((self.run / "attempts").glob("*.json"))]
            raise AssertionError(f"{error}; {shown}; {attempts}; {self.status()}; {self.text()[-3000:]}") from None

    def warn(self) -> None:
        """As Slurm does before the time limit, and before preemption."""
        self.cluster.call("scancel", "--batch", "--signal=USR1", self.number)

    def ranks(self, node: int) -> list[psutil.Process]:
        """The training processes of its newest attempt on a node, in the order of their ranks.

        A rank that was frozen may be left of an attempt before: nobody continues it once its launcher is gone.
        """
        there = self.cluster.ranks(node)
        attempts = [(int(variables["SLURM_JOB_ID"]), int(variables.get("SLURM_RESTART_COUNT", "0")))
                    for variables in (process.environ() for process in there)]  # fmt: skip
        return [process for process, attempt in zip(there, attempts, strict=True) if attempt == max(attempts)]

    def nodes(self) -> list[int]:
        """The numbers of its nodes, in the order of their ranks."""
        names = self.cluster.call("scontrol", "show", "hostnames", self.cluster.field(self.number, "NodeList"))
        return [int(name.removeprefix("node")) for name in names.split()]


Submit = Callable[..., Job]


@pytest.fixture
def slowly(cluster: Cluster) -> Iterator[Path]:
    """While this file is there, training is slow: no run ends before a fault strikes it, however fast the machine."""
    path = Path(cluster.environment["SLOWLY"])
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def submit(cluster: Cluster, project: Path, many_shapes: Path, tmp_path: Path) -> Iterator[Submit]:
    """Submits slurm/train.sbatch; afterwards no job is left and every node is well."""
    yield lambda *flags, **more: start(cluster, project, many_shapes, tmp_path, *flags, **more)
    clear(cluster)


def clear(cluster: Cluster) -> None:
    cluster.call("scancel", "--user=root")
    cluster.wait(lambda: not cluster.call("squeue", "-h").strip(), "all jobs to be gone")
    cluster.wait_idle()


def start(
    cluster: Cluster, project: Path, data: Path, folder: Path, *flags: str,
    arguments: tuple[str, ...] = (), run: str = "run",
) -> Job:  # fmt: skip
    # Augmented on the device: nothing is lost here without workers, which take their time at each start.
    options = ["--data", str(data), "--network", "small", "--run", str(folder / run),
               "--augmentation-backend", "device", "--epochs", str(EPOCHS), "--peak-epoch", "1",
               "--global-batch-size", "8", "--checkpoint-every", str(EVERY), *arguments]  # fmt: skip
    done = cluster.run(
        "sbatch", "--parsable", f"--output={folder}/job-%j.out", *flags, "slurm/train.sbatch", *options, cwd=project
    )
    assert done.returncode == 0, done.stderr
    number = done.stdout.strip()
    return Job(cluster, folder / run, number, folder / f"job-{number}.out")


def patched(project: Path, folder: Path, patch: str) -> Path:
    """The project with another train.py, which changes something and then does what the real one does."""
    other = folder / "patched"
    shutil.copytree(project, other)
    (other / "train.py").rename(other / "real_train.py")
    (other / "train.py").write_text(f"import real_train\n{patch}\nif __name__ == '__main__':\n    real_train.main()\n")
    return other


@pytest.fixture(scope="module")
def undisturbed(
    cluster: Cluster, project: Path, many_shapes: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The run directory of a run that nothing interrupted, with all its checkpoints, made when first asked for."""
    made: dict[tuple[str, ...], Path] = {}

    def reference(*flags: str) -> Path:
        flags = flags or ("--nodes=2",)
        if flags not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            keeping = patched(project, folder, "from cifar import checkpoint\ncheckpoint.KEEP = 1000")
            job = start(cluster, keeping, many_shapes, folder, *flags)
            job.wait_state("COMPLETED")
            assert job.attempts() == 1
            made[flags] = job.run
        return made[flags]

    return reference


def curve(run: Path) -> list[int]:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]


RESULT = ("model.safetensors", f"checkpoints/step-{STEPS:07d}/optimizer.safetensors", "predictions.safetensors")


def equal_bytes(run: Path, reference: Path, names: tuple[str, ...] = RESULT) -> bool:
    return all((run / name).read_bytes() == (reference / name).read_bytes() for name in names)


def assert_nothing_happened(job: Job, reference: Path, *, attempts: int) -> None:
    """The oracle: what the run has left is what an undisturbed one leaves."""
    assert job.status() == {"state": "finished", "step": STEPS, "reason": ""}, job.text()
    assert job.text().count("finished: test accuracy") == 1
    assert job.attempts() == attempts, job.text()
    assert curve(job.run) == list(range(1, STEPS + 1))
    assert equal_bytes(job.run, reference)
    assert not list(job.run.rglob("*.tmp*"))


# ---- one long run, struck again and again


class Struck:
    """A run on two nodes that faults strike one after the other, and a run like it that none did."""

    def __init__(self, submit: Callable[[], Job], reference: Path) -> None:
        self.submit, self.reference = submit, reference
        self.job = submit()
        self.attempts, self.whole = 0, True

    def goes_on(self, said: int = 0, *, compare: bool = True) -> str:
        """Waits until the run has gone on after a fault. Returns what the job has said since its `said`th character.

        The oracle of each fault: the first checkpoint that is written after it equals the undisturbed run's. (Without
        `compare`, another fault strikes at once.)
        """
        job = self.job
        pattern = r"attempt (\d+): resuming from \S+/step-(\d+)"
        job.cluster.wait(lambda: bool(re.search(pattern, job.text()[said:])), f"the next attempt: {job.text()[said:]}")
        attempt, step = (int(number) for number in re.findall(pattern, job.text()[said:])[-1])
        self.attempts = attempt
        if compare:
            self.equals_after(step)
        return job.text()[said:]

    def equals_after(self, step: int) -> None:
        """Waits for the next checkpoint after a step, and compares it bit for bit."""
        step += EVERY - step % EVERY
        self.job.wait_step(step)
        folder = f"checkpoints/step-{step:07d}"
        assert equal_bytes(
            self.job.run, self.reference, (f"{folder}/model.safetensors", f"{folder}/optimizer.safetensors")
        )
        self.whole = True

    def newest(self) -> int:
        """The step of the newest checkpoint."""
        return step_of(checkpoint.found(self.job.run / "checkpoints")[0])


@pytest.fixture(scope="module")
def made_to_be_struck(cluster: Cluster) -> Iterator[list[Struck]]:
    yield []
    Path(cluster.environment["SLOWLY"]).unlink(missing_ok=True)
    clear(cluster)


@pytest.fixture
def begun(
    made_to_be_struck: list[Struck], cluster: Cluster, project: Path, many_shapes: Path,
    undisturbed: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory,
) -> Struck:  # fmt: skip
    """The run that faults strike, as the test before has left it; a new one if that test failed."""
    reference = undisturbed()
    if not made_to_be_struck or not made_to_be_struck[-1].whole:
        clear(cluster)
        Path(cluster.environment["SLOWLY"]).touch()
        folder = tmp_path_factory.mktemp("struck")
        made_to_be_struck.append(Struck(lambda: start(cluster, project, many_shapes, folder, "--nodes=2"), reference))
    now = made_to_be_struck[-1]
    now.whole = False  # until a checkpoint was compared
    return now


@pytest.fixture
def struck(begun: Struck) -> Struck:
    """The same, once it has saved something, and has made some steps since that can be lost."""
    begun.job.wait_step(EVERY)
    time.sleep(3 * SECONDS)
    begun.attempts = begun.job.attempts()
    return begun


def stopped_at(said: str) -> int:
    """The step at which a job says that it has stopped on request."""
    return int(re.findall(r"preempted at step (\d+)", said)[-1])


def resumed_at(said: str) -> int:
    """The step at which an attempt says that it goes on."""
    return int(re.findall(r"resuming from \S+/step-(\d+)", said)[-1])


def test_a_warning_before_python_listens_is_not_lost(begun: Struck) -> None:
    job = begun.job
    job.cluster.wait(lambda: "attempt of job" in job.text(), "the script to begin")
    time.sleep(1)
    job.warn()
    job.cluster.wait(lambda: "requeued 1 time(s)" in job.text(), f"the next attempt: {job.text()}")
    assert "warned at" in job.text()
    # It is heard while the images are looked for, or else after a first step, which is saved.
    stopped = re.findall(r"preempted at step (\d+)", job.text()) or ["0"]
    begun.equals_after(int(stopped[0]))
    assert job.resumed_at() == [int(step) for step in stopped if step != "0"]
    assert job.cluster.field(job.number, "Restarts") == "1"


def test_preemption_by_a_job_of_higher_priority(struck: Struck) -> None:
    job, said_before = struck.job, len(struck.job.text())
    job.cluster.call("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    job.cluster.wait(lambda: job.status()["state"] == "preempted", "the run to stop")
    assert job.status()["reason"] == "SIGUSR1 asked to stop"
    said = struck.goes_on(said_before)
    assert "warned at" in said
    assert resumed_at(said) == stopped_at(said)


def test_a_cancelled_job_stays_cancelled_and_can_be_submitted_again(struck: Struck) -> None:
    job, said_before = struck.job, len(struck.job.text())
    job.cluster.call("scancel", job.number)
    job.wait_state("CANCELLED")
    job.cluster.wait(lambda: job.status()["state"] == "preempted", "the run to stop")
    stopped = job.status()["step"]
    job.cluster.wait(lambda: not job.cluster.call("squeue", "-h").strip(), "the job to be gone")
    assert "requeued, to resume" not in job.text()[said_before:]
    struck.job = struck.submit()
    assert resumed_at(struck.goes_on()) == stopped


@pytest.mark.parametrize("rank", [0, 1], ids=["the batch host", "another"])
def test_a_node_dies(rank: int, struck: Struck) -> None:
    job, newest, said_before = struck.job, struck.newest(), len(struck.job.text())
    node = job.nodes()[rank]
    job.cluster.kill(node)
    try:
        job.cluster.wait(lambda: job.attempts() > struck.attempts, "the next attempt")
    finally:
        job.cluster.start(node)
    assert resumed_at(struck.goes_on(said_before)) >= newest


def test_a_network_cable_is_pulled(struck: Struck) -> None:
    job, newest, said_before = struck.job, struck.newest(), len(struck.job.text())
    node = job.nodes()[1]
    job.cluster.cut(node)
    try:
        job.cluster.wait(lambda: job.attempts() > struck.attempts, "the next attempt")
    finally:
        job.cluster.plug(node)
    said = struck.goes_on(said_before)
    assert f"rank 1 on node{node}: no answer, so killed, frozen or cut off (no heartbeat for 5 s)" in said
    assert resumed_at(said) >= newest


def test_the_first_rank_is_killed(struck: Struck) -> None:
    job, newest, said_before = struck.job, struck.newest(), len(struck.job.text())
    node = job.nodes()[0]
    job.ranks(node)[0].kill()
    said = struck.goes_on(said_before)
    # With it its launcher has gone, and the store with that.
    assert f"train.py: error: rank 0 on node{node}: its node does not answer" in said
    assert resumed_at(said) >= newest


def test_a_rank_freezes(struck: Struck) -> None:
    job, newest, said_before = struck.job, struck.newest(), len(struck.job.text())
    node = job.nodes()[1]
    job.ranks(node)[0].suspend()
    said = struck.goes_on(said_before)
    assert f"rank 1 on node{node}: no answer, so killed, frozen or cut off (no heartbeat for 5 s)" in said
    assert resumed_at(said) >= newest


@pytest.mark.parametrize("rank", [0, 1], ids=["the first, with the store", "another"])
def test_a_launcher_is_killed(rank: int, struck: Struck) -> None:
    job, newest, said_before = struck.job, struck.newest(), len(struck.job.text())
    job.cluster.launcher(job.nodes()[rank]).kill()
    assert resumed_at(struck.goes_on(said_before)) >= newest


def test_a_rank_raises(struck: Struck, cluster: Cluster) -> None:
    job, newest, said_before = struck.job, struck.newest(), len(struck.job.text())
    node, fails = job.nodes()[1], Path(cluster.environment["FAILS"])
    fails.touch()
    try:
        line = f"train.py: error: rank 1 on node{node}: ValueError: boom"
        job.cluster.wait(lambda: line in job.text()[said_before:], "the error")
    finally:
        fails.unlink()
    said = struck.goes_on(said_before)
    assert said.count(line) == 2  # said by both ranks
    assert resumed_at(said) >= newest


def test_a_rank_is_killed_and_then_one_node_alone_is_asked_to_stop_before_the_attempt_has_come_as_far(
    struck: Struck,
) -> None:
    # Slurm tells a node that was cut off late that its job has ended, and ends the attempt that runs there by then.
    job, said_before = struck.job, len(struck.job.text())
    job.wait_step(struck.newest() + EVERY)
    time.sleep(3 * SECONDS)  # some steps further, which are lost now and are not made again before the next fault
    newest, node = struck.newest(), job.nodes()[1]
    job.ranks(node)[0].kill()
    failed = struck.goes_on(said_before, compare=False)
    assert f"train.py: error: rank 1 on node{node}: no answer, so killed, frozen or cut off" in failed
    assert resumed_at(failed) >= newest
    job.cluster.launcher(job.nodes()[1]).terminate()
    said = struck.goes_on(said_before + len(failed))
    assert resumed_at(said) == stopped_at(said) <= int(re.findall(r"failed at step (\d+)", failed)[-1])


def test_killed_while_writing_a_checkpoint(struck: Struck) -> None:
    job, newest, said_before = struck.job, struck.newest(), len(struck.job.text())
    (rank0,) = job.ranks(job.nodes()[0])

    def half_written() -> bool:
        return any((job.run / "checkpoints").glob(".step-*.tmp"))

    def stopped_in_the_middle() -> bool:
        if half_written():
            rank0.suspend()
            job.cluster.wait(lambda: rank0.status() == psutil.STATUS_STOPPED, "it to stop")
            if half_written():
                return True
            rank0.resume()  # it was just done
        return False

    job.cluster.wait(stopped_in_the_middle, "a checkpoint in the making", every=0.005)
    rank0.kill()
    assert resumed_at(struck.goes_on(said_before)) >= newest


def test_the_newest_checkpoint_is_truncated(struck: Struck) -> None:
    job, before, said_before = struck.job, struck.newest(), len(struck.job.text())
    nodes = job.nodes()
    job.cluster.call("scontrol", "requeuehold", job.number)  # without a warning
    job.wait_state("PENDING")
    job.cluster.wait(lambda: not any(job.cluster.ranks(node) for node in nodes), "the ranks to end")
    newest, _ = checkpoint.newest(job.run / "checkpoints")
    assert newest is not None
    assert step_of(newest) >= before
    os.truncate(newest / "optimizer.safetensors", 1000)
    job.cluster.call("scontrol", "release", job.number)
    said = struck.goes_on(said_before)
    assert "warned at" not in said
    assert f"skipped a broken checkpoint: {newest}/optimizer.safetensors does not match" in said
    assert step_of(newest) - EVERY <= resumed_at(said) < step_of(newest)


def test_the_controller_restarts_and_training_does_not_notice(struck: Struck) -> None:
    job = struck.job
    job.cluster.kill_controller()
    time.sleep(2)
    struck.equals_after(struck.newest())  # without a controller
    job.cluster.start_controller()
    job.wait_state("RUNNING")
    assert job.attempts() == struck.attempts


def test_and_in_the_end_nothing_has_happened(struck: Struck, cluster: Cluster) -> None:
    Path(cluster.environment["SLOWLY"]).unlink()
    struck.job.wait_state("COMPLETED")
    assert_nothing_happened(struck.job, struck.reference, attempts=struck.attempts)


# ---- runs of their own


def test_the_end_of_the_time_limit_for_which_the_explanation_waits(
    submit: Submit, cluster: Cluster, project: Path, undisturbed: Callable[..., Path], slowly: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    reference = undisturbed("--nodes=1")
    monkeypatch.delitem(cluster.environment, "CIFAR_PRECISION")
    slowly.touch()
    job = submit("--nodes=1")
    explain = cluster.call(
        "sbatch", "--parsable", f"--dependency=afterok:{job.number}", f"--output={tmp_path}/explain.out",
        "slurm/explain.sbatch", "--run", str(job.run), cwd=project,
    ).strip()  # fmt: skip
    job.wait_step(EVERY)
    job.cluster.call("scontrol", "update", f"JobId={job.number}", "EndTime=now+60")
    job.cluster.wait(lambda: job.status()["state"] == "preempted", "the run to stop")
    stopped = job.status()["step"]
    job.cluster.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")  # or each attempt would be as short
    job.cluster.wait(lambda: job.attempts() == 2, "the next attempt")
    assert job.cluster.state(explain) == "PENDING"  # a requeue is no end
    slowly.unlink()
    job.wait_state("COMPLETED")
    assert job.resumed_at() == [stopped]
    assert_nothing_happened(job, reference, attempts=2)
    assert "precision no" in job.text()  # there are no GPUs
    Job(cluster, job.run, explain, tmp_path / "explain.out").wait_state("COMPLETED")
    assert (job.run / "explain" / "report.html").is_file()


def test_a_node_that_only_seems_dead_does_not_write_any_more(
    submit: Submit, undisturbed: Callable[..., Path], slowly: Path
) -> None:
    reference = undisturbed("--nodes=1")
    slowly.touch()
    job = submit("--nodes=1")
    job.wait_step(EVERY)
    node = int(job.cluster.field(job.number, "BatchHost").removeprefix("node"))
    (old,) = job.ranks(node)
    job.cluster.lag(node)  # Slurm gives the job to another node, and the processes on this one train on
    try:
        job.cluster.wait(lambda: job.attempts() == 2, "the next attempt")
        old.wait(timeout=900)  # it ends itself (its words are lost with the srun that would have passed them on)
    finally:
        job.cluster.kill(node)
        job.cluster.start(node)
    slowly.unlink()
    job.wait_state("COMPLETED")
    assert_nothing_happened(job, reference, attempts=2)


def test_a_crash_on_one_node_is_repaired_in_place(
    submit: Submit, undisturbed: Callable[..., Path], slowly: Path
) -> None:
    reference = undisturbed()  # two ranks, too
    slowly.touch()
    job = submit("--nodes=1", "--ntasks-per-node=2")
    job.wait_step(EVERY)
    node = int(job.cluster.field(job.number, "BatchHost").removeprefix("node"))
    job.ranks(node)[1].kill()
    job.cluster.wait(lambda: job.attempts() == 2, "the next attempt")
    slowly.unlink()
    job.wait_state("COMPLETED")
    assert job.cluster.field(job.number, "Restarts") == "0"
    assert json.loads((job.run / "attempts" / "0002.json").read_text())["restarts_in_place"] == 1
    assert_nothing_happened(job, reference, attempts=2)


# ---- several jobs


def test_one_element_of_an_array_is_requeued_alone(
    submit: Submit, undisturbed: Callable[..., Path], slowly: Path
) -> None:
    # The last one, whose own number is that of the whole array.
    reference = undisturbed("--nodes=1")
    slowly.touch()
    array = submit("--nodes=1", "--array=0-1")
    cluster, folder = array.cluster, array.run.parent
    jobs = [
        Job(cluster, folder / f"run-seed{n}", f"{array.number}_{n}", folder / f"job-{number}.out")
        for n in (0, 1)
        for number in [cluster.field(f"{array.number}_{n}", "JobId")]
    ]
    for job in jobs:
        job.wait_step(EVERY)
    jobs[1].warn()
    cluster.wait(lambda: jobs[1].status()["state"] == "preempted", "the run to stop")
    slowly.unlink()
    for job in jobs:
        job.wait_state("COMPLETED")
    assert_nothing_happened(jobs[0], reference, attempts=1)
    assert jobs[1].attempts() == 2
    assert jobs[1].status()["state"] == "finished"
    assert [json.loads((job.run / "recipe.json").read_text())["recipe"]["seed"] for job in jobs] == [0, 1]


def test_a_run_submitted_twice_is_written_by_the_later_job_alone(
    submit: Submit, undisturbed: Callable[..., Path], slowly: Path
) -> None:
    # Two ranks on one node, where torch's launcher starts them again if they fail.
    reference, flags = undisturbed(), ("--nodes=1", "--ntasks-per-node=2", "--exclusive")
    slowly.touch()
    first = submit(*flags)
    first.wait_step(EVERY)
    second = submit(*flags)
    first.wait_state("FAILED")
    slowly.unlink()
    second.wait_state("COMPLETED")
    assert f"was taken over by attempt 2 (process {attempt(second, 2)['pid']} on node" in first.text()
    assert f"was taken over by job {second.number}; this one ends" in first.text()
    assert_nothing_happened(second, reference, attempts=2)


def attempt(job: Job, number: int) -> dict[str, object]:
    return json.loads((job.run / "attempts" / f"{number:04d}.json").read_text())  # type: ignore[no-any-return]


def test_the_commands_of_the_readme(
    cluster: Cluster, project: Path, many_shapes: Path, submit: Submit, tmp_path: Path
) -> None:
    readme = (ROOT / "slurm/README.md").read_text()
    blocks = [block for block in re.findall(r"```sh\n(.*?)```", readme, re.DOTALL) if "sbatch" in block]
    short = f"--network small --data {many_shapes} --epochs 2 --peak-epoch 1 --global-batch-size 8"
    script = "\n".join(blocks)
    for words, instead in (  # what a test has at hand instead of a repository, an index, CIFAR-10, GPUs and patience
        ("git clone REPOSITORY cifar", f"cp -r {project} cifar"),
        ("python3 -m venv venv && venv/bin/pip install -e .", f"ln -s {sys.prefix} venv"),
        ('"cifar10"', f'"{many_shapes}"'),
        (" --gpus-per-node=8", ""),
        (" --gpus-per-node=1", ""),
        (" --cpus-per-task=16", ""),
        ("--array=0-4", "--array=0-1"),
        ("slurm/train.sbatch", f"slurm/train.sbatch {short}"),
        ("tail -F", "until ls runs/resnet/explain/report.html; do sleep 1; done; cat"),
        ("--recipe digits", "--recipe digits --run runs/digits"),
    ):
        assert words in script, words
        script = script.replace(words, instead)
    assert script.count("sbatch ") >= 4
    done = cluster.run("bash", "-euo", "pipefail", "-c", script, cwd=tmp_path, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished: test accuracy" in done.stdout
    assert f'"state": "finished", "step": {2 * EPOCH}, "reason": ""' in done.stdout
    cluster.wait(lambda: not cluster.call("squeue", "-h").strip(), "all jobs to be finished")
    for run in ("resnet", "digits", "resnet-seed0", "resnet-seed1"):
        assert json.loads((tmp_path / "cifar" / "runs" / run / "status.json").read_text())["state"] == "finished"


def masked(log: str) -> list[str]:
    """The lines that tell the story, with '#' for each number and without the network's table."""
    table = ("layer ", "---", "stages.", "dropout ", "linear ", "total ", "hint: ")
    # What Slurm says depends on how fast it is: srun, that the step before still holds the nodes, and then no more.
    slurm = ("slurmstepd", "srun: Job ", "srun: Step created")
    # Where the time went, and whether images were late, depends on what else the machine does.
    log = re.sub(r"(since this process began: ).*?\)", r"\1...)", log)
    varying = (" MB in ", " of training was waiting ", " is slow: ")
    lines = [line for line in log.splitlines() if line and not line.startswith(table + slurm)]
    lines = [line for line in lines if not any(words in line for words in varying)]
    return [re.sub(r"(/\S+)?/run\b", "runs/resnet", re.sub(r"\d+([.,:]\d+)*", "#", line)) for line in lines]


def test_the_example_of_the_readme(
    submit: Submit, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, slowly: Path
) -> None:
    monkeypatch.setitem(cluster.environment, "CIFAR_PREFLIGHT_SECONDS", "60")
    monkeypatch.setitem(cluster.environment, "CIFAR_CONTAINER", "env INSIDE=container")  # a command before a command
    monkeypatch.setitem(cluster.environment, "CIFAR_INTERFACE", "eth0")
    job = submit("--nodes=3", arguments=("--global-batch-size", "12", "--checkpoint-every", "1000"))
    job.cluster.wait(lambda: "epoch 1/4" in job.text(), "the first epoch")
    (first,) = job.ranks(1)
    environment = first.environ()
    assert [environment[name] for name in ("INSIDE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")] == [
        "container", "eth0", "eth0",
    ]  # fmt: skip
    job.cluster.wait(lambda: "epoch 2/4" in job.text(), "the second epoch")
    slowly.touch()
    job.warn()
    job.cluster.wait(lambda: job.status()["state"] == "preempted", "the run to stop")
    slowly.unlink()
    job.wait_state("COMPLETED")
    (example,) = re.findall(r"```\n(attempt of job .*?)```", (ROOT / "slurm/README.md").read_text(), re.DOTALL)
    assert masked(example) == masked(job.text())

    # Sums of three numbers or more depend on their order, which DDP changes after its first step.
    monkeypatch.setitem(cluster.environment, "CIFAR_PREFLIGHT_SECONDS", "0")
    arguments = ("--global-batch-size", "12", "--checkpoint-every", "1000")
    alone = submit("--nodes=3", arguments=arguments, run="alone")
    alone.wait_state("COMPLETED")
    steps = int(str(alone.status()["step"]))
    assert (alone.attempts(), job.attempts(), steps) == (1, 2, math.ceil(EPOCHS * 8 * EPOCH / 12))
    result = ("model.safetensors", f"checkpoints/step-{steps:07d}/optimizer.safetensors", "predictions.safetensors")
    assert equal_bytes(job.run, alone.run, result)
    assert curve(job.run) == list(range(1, steps + 1))
    assert not list(job.run.rglob("*.tmp*"))


def test_a_finished_run_is_not_trained_again(submit: Submit, undisturbed: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(undisturbed(), tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    job = submit("--nodes=2", arguments=("--run-dir", str(tmp_path / "run")), run="another")  # the last one counts
    job.wait_state("COMPLETED")
    assert f"{tmp_path}/run is finished: test accuracy " in job.text()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    assert not job.run.exists()


# ---- bad input


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("CIFAR_ENVIRONMENT", "/no/such/place", "CIFAR_ENVIRONMENT=/no/such/place has no bin/python; name a"),
        ("CIFAR_CONTAINER", "no-such-container exec", "CIFAR_CONTAINER: no command no-such-container on this node"),
        ("CIFAR_INTERFACE", "ib7", "CIFAR_INTERFACE=ib7: node1 has no such interface; see ip link"),
        ("CIFAR_PRECISION", "int4", "CIFAR_PRECISION=int4 is unknown; set no, bf16 or fp16"),
        ("CIFAR_MAX_REQUEUES", "many", "CIFAR_MAX_REQUEUES=many is not a number; set 0 or more"),
        ("CIFAR_MAX_RESTARTS", "-1", "CIFAR_MAX_RESTARTS=-1 is not a number; set 0 or more"),
        ("CIFAR_HANG_SECONDS", "0", "CIFAR_HANG_SECONDS=0 is not a number of seconds"),
        ("CIFAR_DEVICE", "tpu", "CIFAR_DEVICE=tpu is unknown; set cpu or cuda, or leave it unset"),
        ("CIFAR_PREFLIGHT_SECONDS", "soon", "CIFAR_PREFLIGHT_SECONDS=soon is not a number of seconds"),
    ],
)
def test_an_absurd_variable_is_one_line(
    variable: str, value: str, words: str, submit: Submit, monkeypatch: pytest.MonkeyPatch, cluster: Cluster
) -> None:
    monkeypatch.setitem(cluster.environment, variable, value)
    job = submit("--nodelist=node1")
    job.wait_state("FAILED")
    assert job.cluster.field(job.number, "ExitCode") == "2:0"
    assert [line.partition(" error: ")[0] for line in job.text().splitlines()] == ["train.sbatch:"]
    assert words in job.text()
    assert not job.run.exists()


def test_a_variable_that_was_not_set_is_asked_for(
    submit: Submit, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(cluster.environment, "CIFAR_ENVIRONMENT")
    monkeypatch.setitem(cluster.environment, "PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
    job = submit("--nodes=1")
    job.wait_state("FAILED")
    expected = "train.sbatch: error: no accelerate on PATH; set CIFAR_ENVIRONMENT to where it is installed\n"
    assert job.text() == expected


@pytest.mark.parametrize("name", ["train", "explain"])
def test_a_script_outside_a_job_or_its_directory_says_so(name: str, cluster: Cluster, tmp_path: Path) -> None:
    script = ROOT / "slurm" / f"{name}.sbatch"
    done = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2, f"{name}.sbatch: error: no Slurm job; submit it: sbatch slurm/{name}.sbatch ...\n"
    )  # fmt: skip
    number = cluster.call("sbatch", "--parsable", str(script), cwd=tmp_path).strip()
    Job(cluster, tmp_path, number, tmp_path / "no log").wait_state("FAILED")
    (log,) = tmp_path.glob("*.out")
    assert f"error: no {name}.py in {tmp_path}; submit from the directory that holds it" in log.read_text()


def test_more_ranks_than_the_batch_allows_end_without_a_requeue(submit: Submit, project: Path) -> None:
    job = submit("--nodes=3", "--ntasks-per-node=2")
    job.wait_state("FAILED")
    line = "train.py: error: --global-batch-size 8 does not divide into 6 process(es) x 1 accumulation step(s)"
    assert job.text().count(line) == 1
    assert "train.sbatch: error: the same command would fail again; see above. Not requeued" in job.text()
    assert not job.run.exists()
    assert not list(project.glob(".*"))


def test_a_loss_that_is_not_finite_ends_the_job_at_once(
    cluster: Cluster, submit: Submit, project: Path, many_shapes: Path, tmp_path: Path
) -> None:
    # On one node with two ranks, where torch's launcher would start them again.
    job = start(
        cluster, patched(project, tmp_path, poisoned(8)), many_shapes, tmp_path, "--nodes=1", "--ntasks-per-node=2"
    )
    job.wait_state("FAILED")
    assert job.text().count("train.py: error: loss nan in step 8") == 1
    assert "train.sbatch: error: the same command would fail again; see above. Not requeued" in job.text()
    assert job.attempts() == 1
    assert job.status()["state"] == "failed"


def test_starts_that_end_without_a_step_are_tried_again_later_and_later(
    cluster: Cluster, submit: Submit, project: Path, many_shapes: Path, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    reference = undisturbed("--nodes=1")
    patch = (
        "import os, time\nfrom pathlib import Path\nfrom cifar.data import cache\n"
        "real = cache.open_data\n"
        "def open_data(*data, **how):\n"
        f"    if not Path({str(tmp_path / 'healed')!r}).exists(): raise RuntimeError('the disk is away')\n"
        "    return real(*data, **how)\n"
        "cache.open_data = open_data\n"
    )
    # An earlier job, which was cancelled, has left its attempt: this one has not been taken over by it.
    (tmp_path / "run/attempts").mkdir(parents=True)
    (tmp_path / "run/attempts/0001.json").write_text(json.dumps({"host": "node4", "pid": 1, "job": "999"}, indent=1))
    job = start(cluster, patched(project, tmp_path, patch), many_shapes, tmp_path, "--nodes=1")
    for failures, minutes in ((1, 0), (2, 2), (3, 8)):
        said = f"ended without a step, {failures} time(s) in a row; retrying in {minutes} minute(s)"
        cluster.wait(lambda said=said: said in job.text(), f"failure {failures}: {job.text()}")  # type: ignore[misc]
        if minutes:
            cluster.wait(lambda: cluster.state(job.number) == "PENDING", "the job to wait")
            cluster.wait(lambda: cluster.field(job.number, "Reason") == "BeginTime", "it to wait for its time")
            starts = time.mktime(time.strptime(cluster.field(job.number, "StartTime"), "%Y-%m-%dT%H:%M:%S"))
            assert 60 * (minutes - 1) < starts - time.time() <= 60 * minutes
            # Slurm revokes an attempt's credential to the second: a start within it is refused, and ends the job ("Job
            # credential revoked"). Left to itself, Slurm starts the next one later.
            time.sleep(2)
            if minutes == 8:
                (tmp_path / "healed").touch()
            cluster.call("scontrol", "update", f"JobId={job.number}", "StartTime=now")
    job.wait_state("COMPLETED")
    assert_nothing_happened(job, reference, attempts=2)
    assert sorted(path.name for path in (job.run / "attempts").iterdir()) == ["0001.json", "0002.json"]


def test_starts_that_never_make_a_step_end_in_giving_up(
    cluster: Cluster, submit: Submit, project: Path, many_shapes: Path, tmp_path: Path
) -> None:
    broken = patched(project, tmp_path, "raise RuntimeError('broken')")
    script = broken / "slurm" / "train.sbatch"
    assert "retry_minutes=(0 2 8)" in script.read_text()
    script.write_text(script.read_text().replace("retry_minutes=(0 2 8)", "retry_minutes=(0 0 0)"))
    job = start(cluster, broken, many_shapes, tmp_path, "--nodes=1")
    job.wait_state("FAILED")
    assert job.text().count("RuntimeError: broken") >= 4
    assert "train.sbatch: error: 4 starts in a row ended without a step; see above. Not requeued" in job.text()
    assert not list((job.run / "attempts").iterdir())


@pytest.mark.parametrize("seconds", ["0", "60"], ids=["by train.py", "before training"])
def test_a_node_whose_gpus_do_not_answer_is_named(
    seconds: str, submit: Submit, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cluster.environment, "CIFAR_DEVICE", "cuda")  # as for a job that has been given some
    monkeypatch.setitem(cluster.environment, "CIFAR_PREFLIGHT_SECONDS", seconds)
    job = submit("--nodes=2", "--nodelist=node[1-2]")
    if seconds == "60":
        job.cluster.wait(lambda: "ended without a step" in job.text(), "the first start to end")
    else:
        job.wait_state("FAILED")
    words = r"node[12] has no GPU that torch \S+ can use, and CIFAR_DEVICE=cuda asks for one; look at nvidia-smi there"
    assert re.search(words, job.text()), job.text()
    assert not (job.run / "checkpoints").exists()


@pytest.mark.parametrize(
    ("gpus", "flags", "words"),
    [("64", (), r"\d+ core\(s\) on a node for 64 processes; ask for more, e.g. sbatch --cpus-per-task=512"),
     ("1", ("--mem=1000M",), r"1000 MB of memory on a node for 1 GPU\(s\); ask for more, e.g. sbatch --mem-per-gpu=4")],
    ids=["cores", "memory"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["train", "explain"])
def test_too_little_for_the_gpus_is_refused(
    name: str, gpus: str, flags: tuple[str, ...], words: str, cluster: Cluster, project: Path, tmp_path: Path
) -> None:
    # As Slurm sets it where there are GPUs.
    script = f"export SLURM_GPUS_ON_NODE={gpus} && exec bash slurm/{name}.sbatch"
    done = cluster.run("sbatch", "--parsable", f"--output={tmp_path}/out", *flags, f"--wrap={script}", cwd=project)
    Job(cluster, tmp_path, done.stdout.strip(), tmp_path / "out").wait_state("FAILED")
    assert re.search(f"{name}.sbatch: error: {words}", (tmp_path / "out").read_text()), (tmp_path / "out").read_text()


def test_nodes_that_see_different_directories_are_refused(submit: Submit, cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    first = psutil.Process(cluster.machines[2].pid).children()[0].pid  # the node's own view of the file systems
    inside = ["nsenter", f"--target={first}", "--mount"]
    subprocess.run([*inside, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "shared")], check=True)
    try:
        job = submit("--nodes=2", "--nodelist=node[1-2]", run="shared/run")
        job.wait_state("FAILED")
    finally:
        subprocess.run([*inside, "umount", str(tmp_path / "shared")], check=True)
    assert f"node2 does not see {tmp_path}/shared/run/attempts/0001.json, which rank 0 has just written" in job.text()


def test_another_recipe_in_the_run_directory_is_named_field_by_field(
    submit: Submit, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(undisturbed(), tmp_path / "run")  # finished, but not what is asked for
    job = submit("--nodes=1", arguments=("--dropout", "0.3"))
    job.wait_state("FAILED")
    assert "train.py: error: " in job.text()
    assert "holds a run with another recipe: dropout (0.1 there, 0.3 here); choose another --run" in job.text()


def test_requeues_are_bounded(submit: Submit, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, slowly: Path) -> None:
    monkeypatch.setitem(cluster.environment, "CIFAR_MAX_REQUEUES", "0")
    slowly.touch()
    job = submit("--nodes=1")
    job.wait_step(EVERY)
    job.warn()
    job.wait_state("FAILED")
    assert "requeued 0 time(s) already, and CIFAR_MAX_REQUEUES is 0; submit again to resume" in job.text()
    assert job.status()["state"] == "preempted"


# ---- negative controls: without each mechanism the oracle must fail


def test_without_the_order_the_oracle_fails(
    cluster: Cluster, submit: Submit, project: Path, many_shapes: Path, undisturbed: Callable[..., Path],
    tmp_path: Path, slowly: Path,
) -> None:  # fmt: skip
    # Each attempt begins the order of the images anew, as a loader does that knows no step.
    patch = (
        "from cifar.data import sampler\n"
        "real = sampler.DistributedBatchSampler.__init__\n"
        "def anew(self, recipe, images, start, end, rank, ranks):\n"
        "    real(self, recipe, images, 0, end - start, rank, ranks)\n"
        "sampler.DistributedBatchSampler.__init__ = anew\n"
    )
    reference = undisturbed("--nodes=1")
    slowly.touch()
    job = start(cluster, patched(project, tmp_path, patch), many_shapes, tmp_path, "--nodes=1")
    job.wait_step(EVERY)
    job.warn()
    job.cluster.wait(lambda: job.attempts() == 2, "the next attempt")
    slowly.unlink()
    job.wait_state("COMPLETED")
    assert job.status()["state"] == "finished"
    assert not equal_bytes(job.run, reference)


def test_without_the_agreement_the_oracle_fails(
    cluster: Cluster, submit: Submit, project: Path, many_shapes: Path, tmp_path: Path, slowly: Path
) -> None:
    # Each rank stops when it is itself asked to, whatever the others do.
    patch = (
        "from cifar import loop, stop\n"
        "real = loop.accumulate_gradients\n"
        "def alone(*arguments):\n"
        "    totals = real(*arguments)\n"
        "    totals[2] = bool(stop.requested())\n"
        "    return totals\n"
        "loop.accumulate_gradients = alone\n"
    )
    slowly.touch()
    job = start(cluster, patched(project, tmp_path, patch), many_shapes, tmp_path, "--nodes=2")
    job.wait_step(EVERY)
    job.ranks(2)[0].send_signal(signal.SIGUSR1)  # one rank hears it before the other
    job.wait_state("COMPLETED", "FAILED", "PENDING")
    assert "failed at step" in job.text()  # instead of "preempted": the steps since the last checkpoint are lost
