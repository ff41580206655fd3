"""Try a trained network in the browser.

python -m cifar.app --run runs/resnet
python -m cifar.app --run runs/resnet --export-space DIR
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cifar.app import server
from cifar.errors import Parser, UserError, command_line
from cifar.explain import runs


def parse_command_line(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line. Raises UserError for an unknown flag; `--help` prints and exits."""
    parser = Parser(
        prog="python -m cifar.app",
        allow_abbrev=False,
        description=f"Try a trained network in the browser, at http://{server.HOST}:{server.PORT}.",
    )
    add = parser.add_argument
    runs.add_flag(parser)
    add("--data", metavar="PATH", help="path of the images, as in training (default: those of the run)")
    add(
        "--export-space", type=Path, metavar="DIR", help="write a Hugging Face Space to a new folder instead of serving"
    )
    add(
        "--host",
        metavar="ADDRESS",
        help=f"address to listen on; 0.0.0.0: open to other machines ($GRADIO_SERVER_NAME, else {server.HOST})",
    )
    add("--port", type=int, metavar="N", help=f"($GRADIO_SERVER_PORT, else {server.PORT})")
    return parser.parse_args(argv)


def start(asked: argparse.Namespace) -> None:
    """Serves or exports what was asked for."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("gradio is not installed; install it with: pip install '.[app]'")
    if not runs.is_finished(asked.run_dir) and asked.run_dir.is_dir():
        raise UserError(f"{asked.run_dir} is not a finished run; train it to its end first, or name another --run")
    run = runs.open_run(asked.run_dir)
    # Refuse what can be refused before the imports that take seconds.
    if asked.export_space:
        check_new(asked.export_space)
    else:
        host, port = server.address(asked.host, asked.port)

    from cifar.app import content
    from cifar.app.engine import Engine

    app_content, engine = content.of_run(run, asked.data), Engine(run)
    if asked.export_space:
        from cifar.app import space

        space.export(engine, app_content, asked.export_space)
        print(f"{asked.export_space} is a complete Space; try it with: python {asked.export_space / 'app.py'}")
    else:
        server.serve(engine, app_content, host, port)


def check_new(folder: Path) -> None:
    """Raises UserError for a folder that is not empty or not writable."""
    with suppress(OSError):  # a name that is too long, say: it cannot be written either
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"--export-space {folder} is not an empty folder; name a new one")
    if not runs.can_be_written(folder):
        raise UserError(f"--export-space {folder} cannot be written; name another folder")


def main() -> None:
    with command_line("cifar.app"):
        start(parse_command_line(sys.argv[1:]))


if __name__ == "__main__":
    main()
