"""Two machines emulated on one, with a link of given bandwidth and delay. Linux, root, no kernel modules.

Each machine is a network namespace whose only way out is a TUN device. A thread reads what one sends and writes it to
the other when a link of that bandwidth and delay would have delivered it.
"""

import fcntl
import heapq
import os
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from cifar.bench.context import Bench
from cifar.bench.interleave import Program
from cifar.errors import UserError

NAMES = ("cifar-bench-0", "cifar-bench-1")
ADDRESSES = ("10.79.0.1", "10.79.0.2")
DEVICE = "link0"
PACKET = 60_000  # bytes: large, since a Python thread forwards each packet
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000  # linux/if_tun.h


class Link:
    """Both machines and what lies between them. `bits` a second each way and `delay` in seconds may be changed."""

    def __init__(self) -> None:
        if missing := [name for name in ("ip", "taskset", "sysctl") if shutil.which(name) is None]:
            raise UserError(f"no {missing[0]} here; install iproute2, util-linux and procps")
        if os.geteuid() != 0 or not os.path.exists("/dev/net/tun"):  # noqa: PTH110
            raise UserError("--measure makes network namespaces and needs root and /dev/net/tun")
        self.bits, self.delay = 1e9, 0.0
        self.ends: list[int] = []
        self.over, self.wakes = os.pipe()
        self.thread = threading.Thread(target=self._carry)

    def __enter__(self) -> "Link":
        self._remove()  # leftovers of a killed benchmark
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
            self.ends.append(end)
            _ip("netns", "add", name)
            _ip("link", "set", name, "netns", name)
            _ip("-n", name, "link", "set", name, "name", DEVICE, "mtu", str(PACKET), "txqueuelen", "10000", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
            # Otherwise TCP slow start would throttle the first bytes of each step.
            _ip("netns", "exec", name, "sysctl", "-q", "net.ipv4.tcp_slow_start_after_idle=0")
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.wakes)
        self.thread.join()
        for end in (*self.ends, self.over):
            os.close(end)
        self._remove()

    def _remove(self) -> None:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def _carry(self) -> None:
        """Delivers packets until the other side of `over` is closed."""
        free = [0.0, 0.0]  # when each direction has sent what it has
        waiting: list[tuple[float, int, int, bytes]] = []  # when it is due, a number, the end, the packet
        number = 0
        while True:
            until = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
            readable = select.select([*self.ends, self.over], [], [], until)[0]
            if self.over in readable:
                return
            now = time.monotonic()
            for end in readable:
                side = self.ends.index(end)
                packet = os.read(end, PACKET + 100)
                free[side] = max(free[side], now) + 8 * len(packet) / self.bits
                number += 1
                heapq.heappush(waiting, (free[side] + self.delay, number, self.ends[1 - side], packet))
            while waiting and waiting[0][0] <= time.monotonic():
                os.write(waiting[0][2], waiting[0][3])
                heapq.heappop(waiting)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"ip {' '.join(words)}: {done.stderr.strip()}; --measure needs the right to make namespaces")


@contextmanager
def two_machines(bench: Bench, *arguments: object) -> Iterator[Program]:
    """Runs train.py under observation on both machines, with one core each, within a Link.

    The program that is asked is the first's.
    """

    def on(machine: int) -> Program:
        before = ("ip", "netns", "exec", NAMES[machine], "taskset", "-c", str(machine))
        return bench.ours(f"machine{machine}", *arguments, run="two", processes=2, before=before,
                          machines=("--num_machines", 2, "--machine_rank", machine, "--main_process_ip", ADDRESSES[0]),
                          environment={"GLOO_SOCKET_IFNAME": DEVICE})  # fmt: skip

    with on(1), on(0) as first:  # the second ends when the first does
        yield first
