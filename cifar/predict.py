"""Classifies images with a trained network: files, folders, zips.

    python -m cifar.predict --run runs/resnet PICTURE|FOLDER|ZIP ...
    find photos -name '*.jpg' | python -m cifar.predict --run runs/resnet --format csv -

Images of any size and mode are preprocessed as in the app; the network computes in float32.
"""

import argparse
import csv
import io
import json
import os
import sys
import tarfile
import zipfile
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

from cifar import cores, device, names
from cifar.data import image_files, layout, pictures
from cifar.data.decoding import InFolder, InZip, Reader
from cifar.data.image_files import Listing
from cifar.data.waiting import ProgressBar
from cifar.errors import Parser, UserError, command_line
from cifar.explain import runs
from cifar.explain.mistakes import guarded

if TYPE_CHECKING:
    import torch

BATCH = 256  # pictures that the network sees at once
AHEAD = 2  # batches decoded ahead of the network
# In folders and zips, only files with these suffixes; a file that is named itself is tried whatever its suffix.
ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
FORMATS = ("table", "csv", "json")


class Item(NamedTuple):
    """A picture that has not been read yet, and what it is called in the output."""

    name: str
    read: Callable[[], pictures.UInt8]  # raises UserError


class Prediction(NamedTuple):
    """The most probable classes of a picture, and their probabilities, highest first."""

    name: str
    classes: list[str]
    probabilities: list[float]


def parse_command_line(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line; `--help` prints and exits.

    Raises UserError for a wrong flag, a path that does not exist, and a closed stdin.
    """
    parser = Parser(
        prog="python -m cifar.predict",
        allow_abbrev=False,
        description="Classify pictures with a finished run: a line for each, in order.",
        epilog="Exit status: 1 if a picture could not be read (the others are classified), 2 for wrong arguments.",
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="a picture, a folder or zip of pictures, or - for paths from stdin")
    runs.add_flag(parser)
    add("--top", default="1", metavar="K", help="number of classes to print for each image, most probable first (1)")
    add("--format", default="table", metavar="|".join(FORMATS), help="output format; json: one object per line (table)")
    asked = parser.parse_args(argv)
    if not (asked.top.isdecimal() and asked.top.isascii() and int(asked.top) >= 1):
        raise UserError(f"--top {asked.top} is not a number of classes; give a whole number of at least 1")
    if asked.format not in FORMATS:
        raise UserError(f"--format {asked.format!r} is unknown; choose one of: {', '.join(FORMATS)}")
    for path in asked.paths:
        if path == "-" and sys.stdin is None:
            raise UserError("- takes paths from stdin, which is closed; name the paths, or write them to stdin")
        if path != "-" and not os.path.lexists(path):
            raise UserError(f"{names.one_line(path)} does not exist; name a picture, a folder or a zip")
    return asked


# ---- what is to be classified


def items(paths: Sequence[str], skipped: list[str], broken: Callable[[str], None]) -> Iterator[Item]:
    """Yields the pictures of all paths, in order.

    Other files in folders and zips are added to `skipped`; unreadable folders and zips are reported to `broken`.
    """
    for argument in paths:
        for path in _lines(sys.stdin) if argument == "-" else [argument]:
            if os.path.isdir(path):  # noqa: PTH112  # a path that is too long is no error here
                yield from _within(path, _folder, skipped, broken)
            elif _is_zip(path):
                yield from _within(path, _zip, skipped, broken)
            else:
                yield Item(path, partial(_read_file, path))


def _lines(stream: TextIO) -> Iterator[str]:
    """Yields the paths in a stream, one a line.

    A carriage return at a line's end is part of a name only if there is such a file.
    """
    for line in stream:
        path = line.removesuffix("\n")
        if path.strip():
            yield path if os.path.lexists(path) else path.removesuffix("\r")


def _is_zip(path: str) -> bool:
    # A pipe would be waited for. A zip is found by its end, which may be that of a tar's last file.
    return os.path.isfile(path) and zipfile.is_zipfile(path) and not tarfile.is_tarfile(path)  # noqa: PTH113


def _read_file(path: str) -> pictures.UInt8:
    try:
        if not os.path.isfile(path):  # noqa: PTH113
            wrong = "it is a pipe, socket or device, not a file" if os.path.exists(path) else "there is no such file"  # noqa: PTH110
            raise UserError(f"{wrong}; name another")
        pictures.check_size(os.path.getsize(path))  # noqa: PTH202
        return pictures.read(Path(path).read_bytes())
    except (OSError, ValueError) as error:  # a null character in its name
        raise UserError(f"it cannot be read ({error}); change its permissions, or name another") from None


def _folder(path: str) -> tuple[Listing, Reader]:
    try:
        return image_files.list_folder(Path(path)), InFolder(Path(path))
    except OSError as error:
        raise UserError(f"{names.one_line(path)} cannot be read ({error.strerror}); change its permissions") from None


def _zip(path: str) -> tuple[Listing, Reader]:
    listing, entries = image_files.list_zip(Path(path))
    return listing, InZip(Path(path), entries)


def _within(
    path: str, opened: Callable[[str], tuple[Listing, Reader]], skipped: list[str], broken: Callable[[str], None]
) -> Iterator[Item]:
    try:
        listing, reader = opened(path)
    except UserError as error:
        broken(f"{error}")
        return
    where = path.removesuffix("/")
    skipped += [f"{where}/{name}" for name in layout.sorted_names(listing.hidden)]
    for name in layout.sorted_names(listing.sizes):
        if name.endswith("/") or os.path.splitext(name)[1].lower() in ENDINGS:  # noqa: PTH122  # an unreadable folder
            yield Item(f"{where}/{name}", partial(_read_within, listing, reader, name))
        else:
            skipped.append(f"{where}/{name}")


def _read_within(listing: Listing, reader: Reader, name: str) -> pictures.UInt8:
    if name in listing.wrong:
        raise UserError(listing.wrong[name])
    pictures.check_size(listing.sizes[name])
    try:
        with reader.opened() as read:
            content = read(name)
    except Exception as error:  # decompression of damaged data raises nearly anything
        raise UserError(f"it cannot be read ({f'{error}' or type(error).__name__}); repair or remove it") from None
    return pictures.read(content)


# ---- prediction


def predictions(
    run: runs.Run, wanted: Iterator[Item], top: int, broken: Callable[[str], None]
) -> Generator[Prediction, None, None]:
    """Yields predictions in the order of the pictures; calls `broken` with a message for each that cannot be read."""
    import torch

    torch.backends.cudnn.allow_tf32 = False  # the same results on GPU and CPU
    network = runs.load(run, torch.device(device.decide(1).kind))
    decoders = ThreadPoolExecutor(cores.of_job(), "decoder")
    try:
        with ProgressBar("classifying", "pictures") as progress:
            for batch in _decoded_ahead(decoders, wanted):
                if not sys.stdout.isatty():  # on a terminal the lines themselves show progress
                    progress.look()
                progress.done += len(batch)
                decoded: list[tuple[str, pictures.UInt8]] = []
                for name, future in batch:
                    try:
                        decoded.append((name, future.result()))
                    except UserError as error:
                        broken(f"{names.one_line(name)}: {error}")
                if decoded:
                    yield from _classify(run, network, decoded, top)
    finally:
        decoders.shutdown(cancel_futures=True)


def _decoded_ahead(
    decoders: ThreadPoolExecutor, wanted: Iterator[Item]
) -> Iterator[list[tuple[str, "Future[pictures.UInt8]"]]]:
    """Yields batches of pictures that are decoded while the network is busy with the ones before.

    Each is twice the one before, up to BATCH: so the first predictions appear before stdin ends.
    """
    waiting: deque[list[tuple[str, Future[pictures.UInt8]]]] = deque()
    size = 1
    while batch := list(islice(wanted, min(size, BATCH))):
        size *= 2
        waiting.append([(item.name, decoders.submit(item.read)) for item in batch])
        if len(waiting) > AHEAD:
            yield waiting.popleft()
    yield from waiting


def _classify(
    run: runs.Run, network: "torch.nn.Module", decoded: list[tuple[str, pictures.UInt8]], top: int
) -> Iterator[Prediction]:
    import numpy as np

    logits = runs.logits(run, network, np.stack([picture for _, picture in decoded]))
    probabilities, ranking = logits.softmax(dim=1).cpu(), logits.argsort(dim=1, descending=True, stable=True).cpu()
    for (name, _), row, order in zip(decoded, probabilities, ranking[:, :top], strict=True):
        yield Prediction(name, [run.classes[number] for number in order.tolist()], row[order].tolist())


# ---- output


def written(prediction: Prediction, form: str) -> str:
    """Formats a prediction as one line of output."""
    name, pairs = prediction.name, list(zip(prediction.classes, prediction.probabilities, strict=True))
    if form == "json":
        classes = [{"class": label, "probability": round(probability, 6)} for label, probability in pairs]
        return json.dumps({"path": name, "classes": classes})
    if form == "csv":
        cells = [guarded(name), *(cell for label, p in pairs for cell in (guarded(label), f"{p:.6f}"))]
        return _csv_line(cells)
    return "  ".join([names.one_line(name), *(f"{names.one_line(label)} {p:.3f}" for label, p in pairs)])


def _csv_line(cells: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()


def predict(asked: argparse.Namespace) -> int:
    """Prints a line for each picture; returns how many could not be read."""
    run = runs.open_run(asked.run_dir)
    top, count, skipped = min(int(asked.top), len(run.classes)), 0, list[str]()
    if asked.format == "csv":
        heads = (("class", "probability"), *((f"class_{k}", f"probability_{k}") for k in range(2, top + 1)))
        print(_csv_line(["path", *(head for pair in heads for head in pair)]))

    def broken(line: str) -> None:
        nonlocal count
        count += 1
        print(f"cifar.predict: {line}", file=sys.stderr)

    with closing(predictions(run, items(asked.paths, skipped, broken), top, broken)) as found:  # at once if stopped
        for prediction in found:
            print(written(prediction, asked.format), flush=True)
    if skipped:
        which = "that are hidden or have no image suffix"
        example = names.one_line(skipped[0])
        print(f"cifar.predict: skipped {len(skipped)} file(s) {which}, e.g. {example}", file=sys.stderr)
    return count


def main() -> None:
    """Reads the command line and predicts; the exit status is 1 if a picture could not be read."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # or invalid bytes, which must still open the file
    with command_line("cifar.predict"):
        if predict(parse_command_line(sys.argv[1:])):
            sys.exit(1)


if __name__ == "__main__":
    main()
