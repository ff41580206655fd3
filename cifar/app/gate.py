"""Access control: only the URLs that the page needs, only the app's upload folder, no other machine.

Gradio serves more than this app uses: files by path or by web address, a proxy, links to saved states, monitoring.
"""

import ipaddress
import os
import re
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

NEEDED = re.compile(
    r"/(config/?|theme\.css|favicon\.ico|manifest\.json|robots\.txt|assets/.+|static/.+)?"
    r"|/gradio_api/(info|startup-events|upload|upload_progress|reset|cancel|queue/(join|data)|heartbeat/\w+|file=.+)"
)
# Gradio's page has inline scripts, and templates that it compiles; neither comes from anywhere but this server.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; object-src 'none'"
)
UPLOAD = "/gradio_api/upload"
QUESTION = 1 << 16  # bytes of any other POST; the page sends a few hundred, and parsing JSON takes 25 times its size
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Gate:
    """ASGI middleware in front of all that Gradio serves."""

    def __init__(self, app: ASGIApp, uploads: Path, largest: int, room: int, kept: float) -> None:
        """Takes `uploads`, the only folder that files are served from, and `largest`, the maximum bytes of an upload.

        Uploads that would make the folder larger than `room` bytes are refused. An upload first deletes files older
        than `kept` seconds: Gradio does not delete those of an aborted upload.
        """
        self.app, self.uploads, self.largest, self.room, self.kept = app, uploads, largest, room, kept
        self.coming = 0  # bytes of accepted uploads in progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Rejects requests that are not allowed and forwards all others."""
        if scope["type"] != "http":  # 'lifespan' says that the server starts and ends; there are no websockets
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        headers = dict(scope["headers"])
        refusal = self.refusal(scope["path"], scope["method"], headers)
        if refusal:
            await refusal(scope, receive, send_guarded)
            return
        length = int(headers[b"content-length"]) if scope["path"] == UPLOAD and scope["method"] == "POST" else 0
        self.coming += length
        try:
            await self.app(scope, receive, send_guarded)
        finally:
            self.coming -= length

    def refusal(self, path: str, method: str, headers: dict[bytes, bytes]) -> PlainTextResponse | None:
        """Returns the answer to a request that is not let in, else None."""
        if not NEEDED.fullmatch(path):
            return PlainTextResponse("Not found", 404)
        _, asks_for_file, file = path.partition("/file=")
        # This also refuses URLs of other machines: 'http://...' is not a file in the folder.
        if asks_for_file and not lies_in(file, self.uploads):
            return PlainTextResponse("Forbidden", 403)
        if method == "POST":
            length = headers.get(b"content-length", b"")
            if not length.isdigit() or b"transfer-encoding" in headers:  # which would go before the length
                return PlainTextResponse("Length required", 411)
            if int(length) > (self.largest if path == UPLOAD else QUESTION):
                return PlainTextResponse("Too large", 413)
            if path == UPLOAD and _tidied(self.uploads, self.kept) + self.coming + int(length) > self.room:
                return PlainTextResponse("Too many pictures have been uploaded here; try again in an hour", 507)
        return None


def lies_in(path: str, folder: Path) -> bool:
    """Checks whether an untrusted path is inside a folder, with links and '..' resolved."""
    try:
        return Path(path).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):  # not a valid path: a null byte or a lone surrogate
        return False


def _tidied(folder: Path, kept: float) -> int:
    """Deletes the files that have been in a folder for `kept` seconds; returns the bytes of the others."""
    total, now = 0, time.time()
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # Gradio deletes old ones, too
                path = Path(place, name)
                status = path.lstat()
                if now - status.st_mtime > kept:
                    path.unlink()
                else:
                    total += status.st_size
    return total


def stay_on_this_machine(host: str | None) -> None:
    """Keeps this process from connecting to other machines, whatever libraries try; `host` is its own address.

    This cannot be undone: audit hooks are permanent.
    """
    own = {"localhost", "", host}
    if host:  # a name may be that of an address that is not loopback: Gradio asks its own server there
        with suppress(OSError):
            own |= {str(address[0]) for *_, address in socket.getaddrinfo(host, None)}

    def is_here(name: Any) -> bool:
        name = name.decode() if isinstance(name, bytes) else name
        if name is None or name in own:
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in {"socket.connect", "socket.sendto"}:
            connection, address = arguments
            allowed = connection.family not in {socket.AF_INET, socket.AF_INET6} or is_here(address[0])
        elif event in {"socket.getaddrinfo", "socket.gethostbyname"}:
            allowed = is_here(arguments[0]) or _is_address(arguments[0])
        else:
            return
        if not allowed:
            raise PermissionError("this app connects to no other machine")

    sys.addaudithook(hook)


def _is_address(name: Any) -> bool:
    try:
        ipaddress.ip_address(name.decode() if isinstance(name, bytes) else name)
    except ValueError:
        return False
    return True
