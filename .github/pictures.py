"""The pictures of the README, from a run on scanned digits: .github/report.png and .github/app.png.

python .github/pictures.py    # two minutes on two cores; needs pip install -e '.[test]' and chromium on PATH
"""

import io
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).parent
WIDTH, HEIGHT = 1280, 800  # of the window
SHOWN = 800  # pixels across in the README
# Two epochs of the smaller network leave some mistakes.
TRAIN = ("--recipe", "digits", "--network", "whitened", "--epochs", "2", "--peak-epoch", "1")


def save(page: Page, name: str) -> None:
    """Saves what the window shows, smaller. With a palette, colour maps would lose their colours."""
    with Image.open(io.BytesIO(page.screenshot())) as shot:
        small = shot.convert("RGB").resize((SHOWN, SHOWN * HEIGHT // WIDTH), Image.Resampling.LANCZOS)
        small.save(HERE / f"{name}.png", optimize=True)


def main() -> None:
    """Trains, explains, opens both pages and takes their pictures."""
    chromium = shutil.which("chromium")
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        run, port = Path(folder, "digits"), free.getsockname()[1]
        for script, flags in (("train.py", TRAIN), ("explain.py", ("--neighbours",))):
            subprocess.run([sys.executable, script, *flags, "--run", run], cwd=HERE.parent, check=True)
        free.close()
        server = subprocess.Popen(
            [sys.executable, "-m", "cifar.app", "--run", run, "--port", str(port)],
            cwd=HERE.parent, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
                page.goto((run / "explain" / "report.html").as_uri())
                page.locator("button.tile").first.click()
                page.wait_for_timeout(1000)
                save(page, "report")
                assert server.stdout
                server.stdout.readline()  # its address, once it answers
                page.goto(f"http://127.0.0.1:{port}")
                page.get_by_role("tab", name="Misclassified").click()
                page.wait_for_timeout(1000)
                page.locator("#gallery button").first.click()
                page.locator(".heatmaps figure").first.wait_for()
                page.wait_for_timeout(1000)
                save(page, "app")
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
