"""Benchmarks the app: start-up, latency, concurrent visitors, memory.

    python -m cifar.bench.app --run runs/resnet

Separate from the other benchmarks, since it needs a finished run. Each visitor is a `gradio_client`.
"""

import argparse
import importlib.util
import json
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from cifar.bench import measurement
from cifar.bench.measurement import Measurement
from cifar.errors import Parser, UserError, command_line
from cifar.explain import layers, runs
from cifar.explain.maps import METHODS

SIZE = (640, 480)  # of the pictures: a webcam's
VISITORS = 20
STARTS_WITHIN, ANSWERS_WITHIN, ENDS_WITHIN = 600, 300, 60  # seconds
PARTS = 5  # of the requests, each followed by a look at the memory


class App:
    """`python -m cifar.app` in a process of its own, on a free port of this machine."""

    def __init__(self, run: Path) -> None:
        """Waits for its first page. Raises UserError if it ends instead."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "cifar.app", "--run", str(run), "--port", str(port)]
        began = time.perf_counter()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        if not (opened := re.match(r"open (\S+)", self._first_line())):
            self.end()
            raise UserError(f"the app ended with exit status {self.process.returncode}")
        self.address = opened[1]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.address, timeout=ANSWERS_WITHIN) as page:
            page.read()
        self.seconds = time.perf_counter() - began

    def _first_line(self) -> str:
        """Reads the first line of output. Raises UserError after STARTS_WITHIN seconds without one."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], STARTS_WITHIN)[0]:
            self.end()
            raise UserError(f"the app said nothing for {STARTS_WITHIN} s; start it by itself to see why")
        return self.process.stdout.readline()

    def visitor(self) -> Any:
        """Returns a client that has the page's functions."""
        from gradio_client import Client

        return Client(self.address, verbose=False, analytics_enabled=False)

    def megabytes(self) -> float:
        """Returns the process's resident memory."""
        return float(psutil.Process(self.process.pid).memory_info().rss / 1e6)

    def end(self) -> None:
        """Terminates the app; kills it if it does not exit."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.communicate(timeout=ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()


def measure(run: Path, starts: int, answers: int, requests: int) -> list[Measurement]:
    """Starts and queries the app; see `parse_command_line`. Raises UserError if answers get mixed up."""
    if importlib.util.find_spec("gradio_client") is None:
        raise UserError("gradio is not installed; install it with: pip install '.[app]'")
    from gradio_client import handle_file

    opened = runs.open_run(run)
    cells, top = layers.resolutions(opened.network), min(5, len(opened.classes))
    seconds = []
    for _ in range(starts - 1):
        app = App(run)
        seconds.append(app.seconds)
        app.end()

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        app = App(run)
        stack.callback(app.end)
        seconds.append(app.seconds)
        generator = np.random.default_rng(0)
        asks = []
        for number in range(VISITORS):
            coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3)).astype(np.uint8))
            coarse.resize(SIZE, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
            layer = list(cells)[number % len(cells)]
            method = list(METHODS)[number % len(METHODS)]
            asks.append([handle_file(folder / f"{number}.jpg"), top, True, "(predicted)", method, [layer]])

        def ask(visitor: Any, question: list[Any]) -> tuple[float, str]:
            began = time.perf_counter()
            try:
                _, answer = visitor.submit(*question, api_name="/classify").result(timeout=ANSWERS_WITHIN)
            except TimeoutError:
                raise UserError(f"the app did not answer within {ANSWERS_WITHIN} s") from None
            if answer is None or "error" in answer:
                raise UserError(f"the app answers {answer}")
            return time.perf_counter() - began, json.dumps(answer)

        visitors = [app.visitor() for _ in range(VISITORS)]
        alone = [ask(visitors[0], question)[1] for question in asks]
        usual = [asks[0][0], top, True, "(predicted)", "gradcam", [layers.default(cells)]]
        single = [ask(visitors[0], usual)[0] for _ in range(answers)]

        with ThreadPoolExecutor(VISITORS) as pool:
            crowd = list(pool.map(ask, visitors, asks))
        if [answer for _, answer in crowd] != alone:
            raise UserError("a visitor got another answer under load than alone")

        memory = []
        for part in range(PARTS):
            for number in range(requests // PARTS):
                ask(visitors[number % VISITORS], asks[(number + part) % VISITORS])
            memory.append(app.megabytes())
    return [
        Measurement("app", "start to first page", "s", seconds),
        Measurement("app", f"answer with a map, picture of {SIZE[0]}x{SIZE[1]}", "s", single),
        Measurement("app", f"answer among {VISITORS} visitors at once", "s", [taken for taken, _ in crowd]),
        Measurement("app", f"memory after each {requests // PARTS} requests", "MB", memory),
    ]


def parse_command_line() -> argparse.Namespace:
    """Parses the command line. Raises UserError for a number that is too small."""
    parser = Parser(
        prog="python -m cifar.bench.app", allow_abbrev=False, description="Measure the app of a finished run."
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="a finished run")
    parser.add_argument("--starts", type=int, default=3, metavar="N", help="starts (3)")
    parser.add_argument("--answers", type=int, default=50, metavar="N", help="answers one after another (50)")
    parser.add_argument("--requests", type=int, default=500, metavar="N", help="requests while memory is watched (500)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every value here")
    arguments = parser.parse_args()
    for name, least in (("starts", 1), ("answers", 1), ("requests", PARTS)):
        if (given := getattr(arguments, name)) < least:
            raise UserError(f"--{name} {given} is too few; give at least {least}")
    return arguments


def main() -> None:
    with command_line("bench"):
        arguments = parse_command_line()
        found = measure(arguments.run, arguments.starts, arguments.answers, arguments.requests)
        print(measurement.head(), *(each.row() for each in found), sep="\n")
        if arguments.json:
            arguments.json.write_text(json.dumps([each.json() for each in found], indent=1))


if __name__ == "__main__":
    main()
