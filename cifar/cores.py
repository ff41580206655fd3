"""How many of this machine's cores the job may use."""

import os
from pathlib import Path

from cifar import stop


def of_job() -> int:
    """All that its processes on this machine may use together."""
    return min(available(), asked_for() * local_processes() or available())


def local_processes() -> int:
    """How many of the job's processes run on this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def available() -> int:
    """Those that this process may run on, or fewer where a container has a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        limit = int(quota) // int(period)
    except (OSError, ValueError):  # another system, or no limit ("max")
        return len(os.sched_getaffinity(0))
    return min(len(os.sched_getaffinity(0)), max(1, limit))


def asked_for() -> int:
    """The CPU threads that somebody gave by OMP_NUM_THREADS or --num_cpu_threads_per_process, 0 where nobody did.

    Launchers set the variable to 1 where nobody has said anything, which would leave all cores but one idle; what was
    there before them is seen in their own environment.
    """
    import psutil  # processes that decode images import this module, too, and never ask

    number = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # by nesting depth
    try:
        launcher = psutil.Process().parent()
        before, words = launcher.environ(), " ".join(launcher.cmdline())
    except (psutil.Error, AttributeError):  # it is gone, or another user's
        before, words = {}, ""
    launched = any(name in os.environ and name not in before for name in stop.SET_BY_LAUNCHERS)
    asked = not launched or "OMP_NUM_THREADS" in before or "num_cpu_threads_per_process" in words.replace("-", "_")
    return int(number) if asked and number.isdecimal() else 0
