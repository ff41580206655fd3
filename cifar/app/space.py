"""A Hugging Face Space: a self-contained folder.

It contains the network, the images of the page, and the modules of this project that serve them: those imported by now,
since the export has run the network and built the page as the Space will.
"""

import importlib.metadata
import json
import shutil
import sys
import tempfile
from pathlib import Path

from cifar import files
from cifar.app import content, gate, page, server
from cifar.app.content import AppContent
from cifar.app.engine import Engine
from cifar.errors import UserError
from cifar.explain.runs import Run

SERVING = (server, gate, page)  # what the Space will load, though the export itself needs only the last

# What those modules import; each brings what it needs itself.
PACKAGES = (
    "gradio",
    "grad-cam",
    "jinja2",
    "matplotlib",
    "numpy",
    "pillow",
    "pydantic",
    "safetensors",
    "torch",
    "torchvision",
)

LARGE = "filter=lfs diff=lfs merge=lfs -text"  # Hugging Face requires LFS for binary files

START = '''\
"""Serves the network of this folder."""

from pathlib import Path

from cifar.app.server import serve_folder

serve_folder(Path(__file__).parent)
'''

README = """\
---
title: {title}
emoji: 🔎
colorFrom: blue
colorTo: indigo
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
short_description: Classify a picture and see what raised the score
pinned: false
---

# {title}

Upload a picture: the network says which of its classes it shows; maps show what raised a class's score. {accuracy}.

The classes: {classes}.

To start it on your own machine: `pip install -r requirements.txt`, then `python app.py`.
"""


def export(engine: Engine, app_content: AppContent, folder: Path) -> None:
    """Writes the Space atomically to a folder that does not exist or is empty. Raises UserError."""
    engine.warm_up()
    page.build(engine, app_content, folder)
    place = folder.absolute()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as temporary:
            whole = Path(temporary, place.name)
            whole.mkdir()
            _write(engine.run, app_content, whole)
            whole.rename(place)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}; make room or name another folder") from None


def _write(run: Run, app_content: AppContent, folder: Path) -> None:
    shutil.copyfile(run.path / "model.safetensors", folder / "model.safetensors")
    config = json.loads((run.path / "config.json").read_bytes())
    config["recipe"]["data"] = Path(config["recipe"]["data"]).name  # do not publish the local path
    files.write(folder / "config.json", json.dumps(config, indent=1).encode())
    shutil.copyfile(run.path / "result.json", folder / "result.json")
    content.save(app_content, folder)
    _copy_package(folder)
    pins = [f"{name}=={_public(importlib.metadata.version(name))}\n" for name in PACKAGES]
    files.write(folder / "requirements.txt", "".join(pins).encode())
    files.write(folder / "app.py", START.encode())
    files.write(folder / ".gitattributes", b"".join(f"*.{kind} {LARGE}\n".encode() for kind in ("safetensors", "png")))
    readme = README.format(
        title=f"{run.network}, {len(run.classes)} classes",
        gradio=importlib.metadata.version("gradio"),
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        accuracy=f"Its accuracy is {app_content.metadata['accuracy']}",
        classes=", ".join(run.classes),
    )
    files.write(folder / "README.md", readme.encode())


def _copy_package(folder: Path) -> None:
    import cifar

    root = Path(cifar.__path__[0])
    loaded = [module.__file__ for name, module in list(sys.modules.items()) if name.partition(".")[0] == "cifar"]
    data = [file for file in (root / "app").iterdir() if file.suffix in {".css", ".j2"}]
    for file in [*map(Path, filter(None, loaded)), *data]:
        copy = folder / "cifar" / file.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def _public(version: str) -> str:
    """Returns a version without its local part, such as '+cpu'."""
    return version.partition("+")[0]
