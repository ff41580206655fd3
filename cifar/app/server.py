"""Runs the app's server, with a private folder for uploads that is deleted at the end."""

import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from cifar.errors import UserError, command_line, outlive_readers

if TYPE_CHECKING:  # a wrong address is refused before torch has loaded
    from cifar.app.content import AppContent
    from cifar.app.engine import Engine

HOST, PORT = "127.0.0.1", 7860
ENDS_WITHIN = 20  # seconds to wait at the end for a running import
OF_A_SPACE = {"GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "GRADIO_ROOT_PATH"}  # where Hugging Face wants the server


def serve_folder(folder: Path) -> None:
    """Serves a folder written by `--export-space`."""
    from cifar.app import content
    from cifar.app.engine import Engine
    from cifar.explain import runs

    with command_line("app.py"):
        host, port = address(None, None)
        serve(Engine(runs.open_run(folder)), content.read(folder), host, port)


def address(host: str | None, port: int | None) -> tuple[str, int]:
    """Returns where to listen: as asked for, else as the environment says for every Gradio app, else HOST and PORT.

    Raises UserError where no server can listen there.
    """
    named = os.environ.get("GRADIO_SERVER_PORT") or f"{PORT}"
    if port is None:
        if not (named.isascii() and named.isdecimal() and 0 < int(named) < 1 << 16):
            raise UserError(f"GRADIO_SERVER_PORT={named} is no port; give a number from 1 to 65535, or --port")
        port = int(named)
    host = host or os.environ.get("GRADIO_SERVER_NAME") or HOST
    check_port(host, port)
    return host, port


def serve(engine: "Engine", app_content: "AppContent", host: str, port: int) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP, then deletes the uploads."""
    asked_to_end = False

    def end(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked_to_end
        if asked_to_end:  # asked again: something blocks the normal end
            sys.exit(0)
        asked_to_end = True  # a flag, since Gradio swallows some exceptions

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the last when its terminal is closed
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, end)
    with _folder_for_uploads() as uploads:
        _set_gradio_environment(uploads, host)
        import gradio as gr
        from starlette.middleware import Middleware

        from cifar.app import page
        from cifar.app.gate import Gate, stay_on_this_machine
        from cifar.data import pictures

        stay_on_this_machine(host)
        largest, room = pictures.BYTES + (1 << 20), 40 * pictures.BYTES
        gate = Middleware(Gate, uploads=Path(uploads), largest=largest, room=room, kept=sum(page.KEPT))
        fonts = ["system-ui", "Segoe UI", "Helvetica", "Arial", "sans-serif"]  # what the visitor's machine has
        _, address, _ = page.build(engine, app_content, Path(uploads)).launch(
            server_name=f"[{host}]" if ":" in host else host,  # as an IPv6 address is written in a URL
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            num_workers=0,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            max_file_size=pictures.BYTES,
            state_session_capacity=100,
            app_kwargs={"middleware": [gate]},
            theme=gr.themes.Base(font=fonts, font_mono=["ui-monospace", "monospace"]).set(
                body_text_color_subdued="*neutral_600",
                body_text_color_subdued_dark="*neutral_300",  # to be readable
            ),
            # Not via `css`: Gradio rewrites its rules and breaks selectors with a comma in parentheses.
            head=f"<style>{Path(__file__).with_name('app.css').read_text()}</style>",
        )
        outlive_readers()  # it serves even if nobody reads this
        print(f"open {address} (Ctrl-C ends it)", flush=True)
        warming_up = threading.Thread(target=engine.warm_up, daemon=True)  # in the background, while the page is loaded
        warming_up.start()
        while not asked_to_end:
            time.sleep(0.2)
        warming_up.join(ENDS_WITHIN)  # imports fail during interpreter shutdown
        if warming_up.is_alive():
            print(f"cifar.app: ended, though grad-cam has not been imported after {ENDS_WITHIN} s", file=sys.stderr)


def _set_gradio_environment(uploads: str, host: str) -> None:
    """Sets the environment for Gradio. Must come before importing Gradio."""
    # Variables meant for other apps must not expose this one, and in a Space Gradio would start a second server, which
    # accepts code.
    for name in [name for name in os.environ if name.startswith(("GRADIO_", "SPACE_")) and name not in OF_A_SPACE]:
        del os.environ[name]
    os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    # Gradio's check of its own server must not go through a proxy.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(["127.0.0.1", "localhost", host])


@contextmanager
def _folder_for_uploads() -> Iterator[str]:
    try:
        folder = tempfile.TemporaryDirectory(prefix="cifar-app-", ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot create a folder for uploads ({error.strerror}); set TMPDIR to a writable folder"
        ) from None
    with folder as uploads:
        yield uploads


def check_port(host: str, port: int) -> None:
    """Raises UserError where no server can listen."""
    if not 0 < port < 1 << 16:  # getaddrinfo would take it modulo 65536
        raise UserError(f"--port {port} is out of range; give one from 1 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
            probe.bind(address)
            probe.listen()
    except (OSError, UnicodeError) as error:  # UnicodeError: not a valid host name
        why = getattr(error, "strerror", None) or f"{error}"
        raise UserError(f"no server can listen at {host} port {port} ({why}); give another --port or --host") from None
