"""Several processes on this machine's CPUs, and a train.py that fails where a test wants it to.

`--network small` is there, too: helpers/networks/small.py.
"""

import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
from conftest import ROOT, command

TWO = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
       "--dynamo_backend", "no", "--main_process_port", "0")  # fmt: skip
THREE = ("--multi_gpu", "--num_processes", "3", "--num_machines", "1", "--mixed_precision", "no",
         "--dynamo_backend", "no", "--main_process_port", "0")  # fmt: skip
# The same by the project's own configuration.
CPU_2PROC = ("--config_file", str(ROOT / "accelerate_configs/cpu_2proc.yaml"), "--mixed_precision", "no",
             "--main_process_port", "0")  # fmt: skip


def project(tmp_path: Path, patch: str) -> Path:
    """A train.py in which `patch` has changed `step(rank, number)`, which is called before each step."""
    script = tmp_path / "train.py"
    script.write_text(
        f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nsys.argv[0] = 'train.py'\n"
        "import cifar.models\n"
        f"cifar.models.__path__.append({str(ROOT / 'tests/helpers/networks')!r})\n"
        "from cifar import loop\n"
        "def step(rank, number): pass\n"
        f"{patch}\n"
        "real, count = loop.accumulate_gradients, 0\n"
        "def patched(*arguments):\n"
        "    global count\n"
        "    count += 1\n"
        "    step(int(os.environ.get('RANK', '0')), count)\n"
        "    return real(*arguments)\n"
        "loop.accumulate_gradients = patched\n"
        "sys.modules.pop('train', None)\n"
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('real_train', {str(ROOT / 'train.py')!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "if __name__ == '__main__':\n"
        "    module.main()\n"
    )
    return script


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class TwoLaunchers:
    """Two launchers of one rank each, as on two machines: neither sees how the other's rank ends."""

    def __init__(
        self, script: Path, *arguments: object, precision: str, variables: Sequence[Mapping[str, str]]
    ) -> None:
        port = free_port()
        self.launchers = [
            subprocess.Popen(
                command(
                    script, *arguments,
                    launcher=("--config_file", str(ROOT / "accelerate_configs/multi_node.yaml"), "--num_processes", "2",
                              "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1",
                              "--main_process_port", str(port), "--mixed_precision", precision),
                ),
                env=variables[rank], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                start_new_session=True,
            )
            for rank in (0, 1)
        ]  # fmt: skip

    def rank(self, number: int) -> psutil.Process:
        """A rank's process."""
        found = [p for p in psutil.Process(self.launchers[number].pid).children() if "RANK" in p.environ()]
        return found[0]

    def outputs(self) -> list[str]:
        """What each launcher and its rank have said, once both have ended."""
        return [launcher.communicate(timeout=600)[0] for launcher in self.launchers]

    def end(self) -> None:
        """Kills what is left."""
        for launcher in self.launchers:
            if launcher.poll() is None:
                for child in psutil.Process(launcher.pid).children(recursive=True):
                    child.kill()
                launcher.kill()
                launcher.wait()
            assert launcher.stdout is not None
            launcher.stdout.close()
