"""A Slurm cluster of several nodes on one machine: the real daemons, each node with its own address and processes.

A node is a network namespace on a bridge and a process namespace with a slurmd in it, so it can die, freeze or be cut
off as a machine would. The bridge and slurmctld are in a namespace of their own: a browser in the host's would take a
new interface for a new network and drop its connections. Needs root, the packages slurmctld, slurmd, slurm-client,
munge and iproute2, and nothing else: no systemd, no database, no cgroups. Files of the host are left as they are.

    python tests/helpers/slurm_cluster.py DIRECTORY    # a cluster until Ctrl-C, and how to get a shell in it
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

NODES = 4
NEEDS = ("slurmctld", "slurmd", "sbatch", "munged", "mungekey", "ip", "nsenter", "unshare", "taskset", "setpriv")
DIE_WITH_THE_TESTS = ("setpriv", "--pdeathsig", "KILL")
LOGIN = "slurm0"  # the namespace of slurmctld, in which Slurm's commands are typed
INSIDE = ("nsenter", f"--net=/run/netns/{LOGIN}")

CONF = """\
ClusterName=test
SlurmctldHost={host}(10.77.0.254)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until the credentials of the attempt before have expired: two minutes by default.
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld
SlurmdLogFile={root}/log/%n
MailProg=/bin/true
MpiDefault=none
# Found by their parents, not by cgroups or process groups: elastic's workers have sessions of their own.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_min_interval=500000,batch_sched_delay=0
KillWait=5
SlurmdTimeout=10
SlurmctldTimeout=30
ReturnToService=2
# A node whose cable was pulled cannot end its step; after this time it would drain itself, and stay so.
UnkillableStepTimeout=900
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node[1-{nodes}] NodeAddr=10.77.0.[1-{nodes}] CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 \
ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def reason_to_skip() -> str:
    """Why no cluster can be brought up here, or ''."""
    missing = [name for name in NEEDS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} here (apt-get install slurmctld slurmd slurm-client munge iproute2)"
    if os.geteuid() != 0:
        return "only root can give nodes addresses of their own"
    probe = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "ip", "link", "add", "probe0", "type", "bridge"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        return "this container may not make network and process namespaces"
    return ""


class Cluster:
    """Nodes are numbered from 1; their names are node1, node2, ..."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}
        self.machines: dict[int, subprocess.Popen[bytes]] = {}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    # ---- the cluster

    def up(self) -> None:
        """Brings all nodes up and waits until they are idle."""
        self.down()  # what a run that was killed has left of its networks
        for name in ("state", "spool", "log", *(f"spool/node{n}" for n in range(1, NODES + 1))):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        conf = CONF.format(host=socket.gethostname().partition(".")[0], root=self.root, nodes=NODES)
        (self.root / "slurm.conf").write_text(conf)
        names = "".join(f"10.77.0.{n} node{n}\n" for n in range(1, NODES + 1))
        (self.root / "hosts").write_text("127.0.0.1 localhost\n" + names)
        # Asking a name server that these networks do not reach would cost half a minute for each job.
        (self.root / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
        key, munge = self.root / "munge.key", self.root / "munge.socket"
        subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True)
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge}",
                     f"--pid-file={self.root}/munge.pid", f"--log-file={self.root}/log/munged",
                     f"--seed-file={self.root}/munge.seed")  # fmt: skip
        self.wait(munge.exists, "munged")
        subprocess.run(["ip", "netns", "add", LOGIN], check=True)
        self.call("ip", "link", "set", "lo", "up")
        self.call("ip", "link", "add", "br-slurm", "type", "bridge")
        self.call("ip", "address", "add", "10.77.0.254/24", "dev", "br-slurm")
        self.call("ip", "link", "set", "br-slurm", "up")
        for n in range(1, NODES + 1):
            self.call("ip", "netns", "add", f"slurm{n}")
            self.call("ip", "link", "add", f"slurm{n}", "type", "veth", "peer", "name", "eth0", "netns", f"slurm{n}")
            self.call("ip", "link", "set", f"slurm{n}", "master", "br-slurm", "up")
            self.call("ip", "-n", f"slurm{n}", "address", "add", f"10.77.0.{n}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                self.call("ip", "-n", f"slurm{n}", "link", "set", device, "up")
        self.start_controller("-c")
        for n in range(1, NODES + 1):
            self.start(n)
        self.wait_idle()

    def down(self) -> None:
        """Ends everything that was started, whatever state it is in."""
        for machine in self.machines.values():
            machine.kill()
            machine.wait()
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        for name in (LOGIN, *(f"slurm{n}" for n in range(1, NODES + 1))):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def start_controller(self, *flags: str) -> None:
        """Starts slurmctld; it takes its state from where the one before left it."""
        self._daemon("slurmctld", "-D", *flags, inside=INSIDE)

    def kill_controller(self) -> None:
        """Slurmctld dies on the spot."""
        self.daemons["slurmctld"].kill()
        self.daemons["slurmctld"].wait()

    def _daemon(self, *words: str, inside: tuple[str, ...] = ()) -> None:
        with (self.root / "log" / f"{words[0]}.out").open("ab") as log:
            self.daemons[words[0]] = subprocess.Popen(
                [*DIE_WITH_THE_TESTS, *inside, *words],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    # ---- its nodes

    def start(self, node: int) -> None:
        """Switches a machine on. It has one processor: ranks that share two of them hinder each other badly."""
        processors = sorted(os.sched_getaffinity(0))
        inside = (
            f"hostname node{node}; mount --bind {self.root}/hosts /etc/hosts; "
            f"mount --bind {self.root}/nsswitch.conf /etc/nsswitch.conf; "
            "slurmd -D & while :; do wait; sleep 1; done"  # the first process outlives slurmd, as a machine does
        )
        with (self.root / "log" / f"node{node}.out").open("ab") as log:
            self.machines[node] = subprocess.Popen(
                [*DIE_WITH_THE_TESTS, "taskset", "--cpu-list", str(processors[node % len(processors)]),
                 "nsenter", f"--net=/run/netns/slurm{node}", "unshare", "--pid", "--fork", "--kill-child",
                 "--mount-proc", "--uts", "bash", "-c", inside],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def kill(self, node: int) -> None:
        """The power goes: everything on the node is dead at once."""
        self.machines[node].kill()
        self.machines[node].wait()

    def lag(self, node: int) -> None:
        """Slurmd alone dies: Slurm takes the node for dead, and its processes go on."""
        (daemon,) = self.processes(node, lambda p: p.name() == "slurmd" and p.cmdline()[:2] == ["slurmd", "-D"])
        daemon.kill()

    def cut(self, node: int) -> None:
        """Pulls the network cable."""
        self.call("ip", "link", "set", f"slurm{node}", "down")

    def plug(self, node: int) -> None:
        """Puts it in again."""
        self.call("ip", "link", "set", f"slurm{node}", "up")

    def processes(self, node: int, which: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
        """The node's processes for which `which` is true, oldest first."""
        found = []
        for process in psutil.Process(self.machines[node].pid).children(recursive=True):
            try:
                if which(process):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return sorted(found, key=lambda process: process.create_time())

    def ranks(self, node: int) -> list[psutil.Process]:
        """The training processes on a node, in the order of their ranks."""
        found = self.processes(node, lambda p: _trains(p) and not _trains(p.parent()))  # their children load images
        return sorted(found, key=lambda process: int(process.environ().get("RANK", "0")))

    def launcher(self, node: int) -> psutil.Process:
        """`accelerate launch` on a node."""
        return self.processes(node, lambda p: any(word.endswith("/accelerate") for word in p.cmdline()[:2]))[0]

    def wait_idle(self) -> None:
        """Waits until all nodes are idle, and neither drained nor silent (to `sinfo -t idle` those are idle, too)."""
        idle = [f"node{n} idle" for n in range(1, NODES + 1)]
        self.wait(
            lambda: self.call("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T").splitlines() == idle,
            "all nodes to be idle",
        )

    # ---- jobs

    def call(self, *words: str, cwd: Path | None = None) -> str:
        """Runs a command where slurmctld is, to its end."""
        done = self.run(*words, cwd=cwd)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def run(self, *words: str, cwd: Path | None = None, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """The same for a command that may fail."""
        return subprocess.run(
            [*INSIDE, *words], cwd=cwd, env=self.environment, capture_output=True, text=True, check=False,
            timeout=timeout,
        )  # fmt: skip

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`."""
        shown = self.call("scontrol", "--oneliner", "show", "job", job)
        return next(word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}="))

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.field(job, "JobState")

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 300, every: float = 0.1) -> None:
        """Waits until the condition holds, looking every so many seconds. A failure tells what Slurm shows then."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                shown = (self.run("squeue", "--long"), self.run("sinfo", "-N", "-p", "low", "-o", "%N %T %E"))
                raise AssertionError(f"waited {seconds:.0f} s for {what}\n" + "\n".join(each.stdout for each in shown))
            time.sleep(every)


def _trains(process: psutil.Process | None) -> bool:
    if process is None or "python" not in process.name():
        return False
    return any(word.endswith("train.py") for word in process.cmdline()[1:3])


if __name__ == "__main__":
    cluster = Cluster(Path(sys.argv[1]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        cluster.up()
        print(f"SLURM_CONF={cluster.root}/slurm.conf {' '.join(INSIDE)} bash")
        while True:
            time.sleep(3600)
    finally:
        cluster.down()
