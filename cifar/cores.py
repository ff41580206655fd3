"""How many of this machine's cores the job may use."""

import os
from pathlib import Path

from cifar import stop


def of_job() -> int:
    """Returns the number of cores that all of the job's processes on this machine may use together."""
    return min(available(), asked_for() * local_processes() or available())


def local_processes() -> int:
    """Returns how many of the job's processes run on this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def available() -> int:
    """Returns the number of cores that this process may run on, within the container's quota."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        limit = int(quota) // int(period)
    except (OSError, ValueError):  # another system, or no limit ("max")
        return len(os.sched_getaffinity(0))
    return min(len(os.sched_getaffinity(0)), max(1, limit))


def asked_for() -> int:
    """Returns the number of CPU threads set by OMP_NUM_THREADS or --num_cpu_threads_per_process; 0 if none was.

    Launchers set the variable to 1 if the user did not, which would leave all but one core idle; the launcher's own
    environment shows what the user set.
    """
    import psutil  # processes that decode images import this module, too, and never ask

    number = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # by nesting depth
    try:
        launcher = psutil.Process().parent()
        before, words = launcher.environ(), " ".join(launcher.cmdline())
    except (psutil.Error, AttributeError):  # it has exited, or belongs to another user
        before, words = {}, ""
    asked = (
        not stop.launched(before)
        or "OMP_NUM_THREADS" in before
        or "num_cpu_threads_per_process" in words.replace("-", "_")
    )
    return int(number) if asked and number.isdecimal() else 0
