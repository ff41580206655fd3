"""Start-up: launch to first step, --help, decoding images for the first time."""

import io
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from cifar.bench import interleave
from cifar.bench.context import COPY, IMAGES, Bench
from cifar.bench.interleave import Answer, Program
from cifar.bench.measurement import Measurement

PARTS = ("the launcher", "imports", "this project before its first step", "the first step")


def measure(bench: Bench) -> list[Measurement]:
    """Starts recipe `digits`, train.py and the plain loop, interleaved, each time in a new run directory."""
    launches: list[list[float]] = []
    plain_seconds, help_seconds = [], []
    _launch(bench, "warm-up")  # the disk's cache, and the digits'
    for number in range(bench.repeats):
        launches.append(_launch(bench, f"startup-{number}"))
        with Program("plain", ["-m", "cifar.bench.plain", "--recipe", "digits"], {}) as plain:
            plain_seconds.append(plain.request("train", amount=1, uncounted=0)["at"] - plain.launched)
        began = time.perf_counter()
        subprocess.run([sys.executable, interleave.ROOT / "train.py", "--help"], stdout=subprocess.DEVNULL, check=True)
        help_seconds.append(time.perf_counter() - began)
    totals = [sum(parts) for parts in launches]

    with Program("cache", ["-m", "cifar.bench.startup", str(bench.images())], {}) as cache:
        count = sum(IMAGES.values())
        built = [cache.request("build", folder=str(bench.folder / f"cache-{n}")) for n in range(bench.repeats)]
        decoded = [cache.request("decode", amount=count // 10) for _ in range(bench.repeats)]
        mapped = [cache.request("map", folder=str(bench.folder / "cache-0")) for _ in range(bench.repeats)]
    building = interleave.rates(built)
    image_bytes = 32 * 32 * 3
    return [
        Measurement("startup", "launch to the end of the first step", "s", totals, None, "plain",
                    interleave.quotients(plain_seconds, totals)),
        *(Measurement("startup", f"of which {name}", "s", values)
          for name, values in zip(PARTS, zip(*launches, strict=True), strict=True)),
        Measurement("startup", "train.py --help", "s", help_seconds),
        Measurement("startup", f"cache of {count:,} JPEG files built", "images/s", building,
                    (COPY, bench.limits[COPY] / image_bytes), "Pillow, one thread",
                    interleave.quotients(building, interleave.rates(decoded))),
        Measurement("startup", "cache mapped", "s", [answer["seconds"] for answer in mapped]),
    ]  # fmt: skip


def _launch(bench: Bench, name: str) -> list[float]:
    """Returns the seconds for each of PARTS."""
    with bench.launch(name, "--recipe", "digits", "--run", bench.folder / name) as ours:
        end = ours.request("train", amount=1, uncounted=0)["at"]
        metadata = ours.request("metadata")
    own = metadata["ready"] - metadata["began"] - metadata["imports"]
    return [metadata["began"] - ours.launched, metadata["imports"], own, end - metadata["ready"]]


def main() -> None:
    """Runs the program that decodes images."""
    import numpy as np
    from PIL import Image

    from cifar.data.cache import open_cache, open_data

    archive = sys.argv[1]

    def build(folder: str) -> Answer:
        os.environ["XDG_CACHE_HOME"] = folder
        began = time.perf_counter()
        data = open_data(archive)
        return {"amount": len(data.train_labels) + len(data.test_labels), "seconds": time.perf_counter() - began}

    def map_it(folder: str) -> Answer:
        path, *_ = Path(folder, "cifar").iterdir()
        began = time.perf_counter()
        open_cache(path)
        return {"amount": 1, "seconds": time.perf_counter() - began}

    def decode(amount: int) -> Answer:
        began = time.perf_counter()
        with zipfile.ZipFile(archive) as opened:
            names = opened.namelist()[:amount]
            np.stack([np.asarray(Image.open(io.BytesIO(opened.read(name))).convert("RGB")) for name in names])
        return {"amount": amount, "seconds": time.perf_counter() - began}

    interleave.serve({"build": build, "map": map_it, "decode": decode})


if __name__ == "__main__":
    main()
