"""The app as a user starts it: its answers, what it refuses, what it serves, and the page in a real browser."""

import asyncio
import http.client
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, Train, draw
from helpers.contrast import LEAST_CONTRAST
from PIL import Image
from safetensors.numpy import load_file, save_file

from cifar.app import content, engine
from cifar.app.engine import Engine
from cifar.data.cache import Data, open_data
from cifar.errors import UserError
from cifar.explain import evidence, figures, maps, mistakes, options, runs
from cifar.explain.layers import Grid
from cifar.explain.runs import Run

gradio_client = pytest.importorskip("gradio_client", reason="gradio is not installed")
from cifar.app import handlers, server, views  # noqa: E402
from cifar.app import space as space_module  # noqa: E402
from cifar.app.__main__ import main  # noqa: E402
from cifar.app.gate import Gate  # noqa: E402

Client, handle_file = gradio_client.Client, gradio_client.handle_file

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOSTILE = '<img src=x onerror="alert(1)"> & a rather long name'
CLASSES = sorted([HOSTILE, "disc", "square", "stripes"])
PREDICTED, TRUE, NO_MAP, ANY = "(predicted)", "(true)", "(no map)", "(any)"
DEFAULT = (3, True, PREDICTED, "gradcam", ["layer2"])
MISTAKES = (True, 5, ANY, ANY, "confident", 0, PREDICTED, "gradcam", "layer2")


# ---- a run, and the app on it


@pytest.fixture(scope="module")
def run(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training on images of which a third of the test set lies in the wrong folder."""
    data, generator = tmp_path_factory.mktemp("data") / "hostile", np.random.default_rng(0)
    shapes = ("ring", "disc", "square", "stripes")
    folders = (HOSTILE, "disc", "square", "stripes")
    for split, count in (("train", 16), ("test", 9)):
        for number, shape in enumerate(shapes):
            for image in range(count):
                folder = data / split / folders[(number + (split == "test" and image % 3 == 0)) % len(folders)]
                folder.mkdir(parents=True, exist_ok=True)
                draw(shape, generator).save(folder / f"{shape}{image:02}.png")
    directory = tmp_path_factory.mktemp("runs") / "run"
    # Small steps, and many of them: so that its probabilities are neither all alike nor 0 and 1.
    done = train("--data", data, "--run", directory, "--epochs", 3, "--peak-epoch", 1, "--global-batch-size", 4,
                 "--peak-learning-rate", 2e-4, "--augmentation-backend", "device")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def opened(run: Path) -> Run:
    return runs.open_run(run)


@pytest.fixture(scope="module")
def data(opened: Run) -> Data:
    return runs.as_trained(open_data(opened.recipe["data"]), opened)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class App:
    """The app in a process of its own."""

    def __init__(self, command: list[Any], port: int, temporary: Path, **options: Any) -> None:
        temporary.mkdir()
        self.port, self.temporary = port, temporary
        env = {**os.environ, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
        options["env"] = env | options.get("env", {})
        # What a shell has started in the background ignores Ctrl-C, what nohup has, a hang-up: as these tests may be.
        self.process = subprocess.Popen(
            ["env", "--default-signal=INT,HUP", *command],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline()
        if not self.first_line.startswith("open http"):
            self.process.kill()
            raise AssertionError(self.first_line + self.process.communicate()[0])
        self.address = f"http://127.0.0.1:{port}/"

    def client(self) -> Client:
        return Client(self.address, verbose=False, analytics_enabled=False)

    def http(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes, dict[str, str]]:
        """A request with exactly this path, which no library has tidied."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=900)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read(), {name.lower(): value for name, value in response.getheaders()}
        finally:
            connection.close()

    def post(self, path: str, content: Any) -> tuple[int, bytes]:
        return self.http("POST", path, json.dumps(content).encode(), **{"Content-Type": "application/json"})[:2]

    def ask(self, function: int, values: list[Any], **more: Any) -> dict[str, Any]:
        """Calls a function as the page does, with values that no client has checked."""
        session = os.urandom(6).hex()
        body = {"fn_index": function, "session_hash": session, "data": values, "event_data": None, **more}
        status, answer = self.post("/gradio_api/queue/join", body)
        assert status == 200, answer
        stream = self.http("GET", f"/gradio_api/queue/data?session_hash={session}")[1].decode()
        messages = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: ")]
        done: dict[str, Any] = next(message for message in messages if message["msg"] == "process_completed")
        return done

    def end(self, by: int = signal.SIGTERM) -> str:
        self.process.send_signal(by)
        return self.process.communicate(timeout=900)[0]


def left(app: App) -> list[Path]:
    """The files that it has not deleted, and its folder; torch makes an empty one of its own."""
    return [path for path in app.temporary.rglob("*") if path.is_file() or path.name.startswith("cifar-app-")]


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "cifar.app", *map(str, arguments)]


@pytest.fixture(scope="module")
def app(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    port = free_port()
    started = App(command("--run", run, "--port", port), port, tmp_path_factory.mktemp("app") / "tmp", cwd=ROOT)
    yield started
    output = started.end()
    assert started.process.returncode == 0
    assert "Traceback" not in output
    assert left(started) == []


@pytest.fixture(scope="module")
def client(app: App) -> Client:
    return app.client()


def png(pixels: np.ndarray[Any, np.dtype[np.uint8]], path: Path) -> Any:
    Image.fromarray(pixels).save(path)
    return handle_file(path)


# ---- answers: those of the explanation pass


def test_it_listens_on_this_machine_alone(app: App) -> None:
    assert app.first_line == f"open {app.address} (Ctrl-C ends it)\n"
    sockets = psutil.Process(app.process.pid).net_connections(kind="inet")
    assert {(found.laddr.ip, found.laddr.port) for found in sockets if found.status == psutil.CONN_LISTEN} == {
        ("127.0.0.1", app.port)
    }


@pytest.mark.parametrize("method", list(maps.METHODS))
def test_an_answer_is_that_of_the_explanation_pass(
    method: str, client: Client, opened: Run, data: Data, tmp_path: Path
) -> None:
    network = runs.load(opened, torch.device("cpu"))
    index = np.array([5])
    images = evidence.tensor(data, index, torch.device("cpu"))
    ranking = network(images)[0].argsort(descending=True).tolist()
    picture = png(data.test_images[5].repeat(7, axis=0).repeat(7, axis=1), tmp_path / "a.png")
    for chosen, (target, against) in ((PREDICTED, ranking[:2]), (CLASSES[ranking[2]], (ranking[2], ranking[0]))):
        _, answer = client.predict(picture, 4, True, chosen, method, ["layer3", "prep"], api_name="/classify")
        assert [row["class"] for row in answer["top"]] == [CLASSES[number] for number in ranking]
        expected = network(images).softmax(dim=1)[0].detach()[ranking].tolist()
        assert [row["probability"] for row in answer["top"]] == pytest.approx(expected, abs=2e-6)
        assert (answer["map for"], answer["method"]) == (CLASSES[target], method)
        assert [(row["layer"], row["cells"]) for row in answer["maps"]] == [("prep", 32), ("layer3", 4)]
        for row in answer["maps"]:
            raw, _ = maps.compute(network, row["layer"], method, images, maps.one_hot(torch.tensor([[target]]), 4))
            assert np.allclose(row["map"], np.maximum(raw[0, 0], 0), atol=2e-6)
            assert row["raw maximum"] == pytest.approx(raw.max(), abs=2e-6)
        shown = evidence.attributions(
            network, data, index, np.array([[target, against]], np.uint8), method, "prep", "layer3"
        )
        votes = answer["votes"]
        assert (votes["layer"], votes["for"], votes["against"]) == ("layer3", CLASSES[target], CLASSES[against])
        assert np.allclose(votes["cells"], shown.votes[0], atol=2e-5)
        assert votes["sum"] + votes["bias"] == pytest.approx(votes["margin"], abs=1e-4)
        assert votes["margin"] == pytest.approx(float(shown.margins[0]), abs=1e-4)


def test_classes_are_ranked_even_where_their_probabilities_are_0(opened: Run, data: Data) -> None:
    engine = Engine(opened)
    rankings = [engine.answer(pixels, None, "gradcam", []).ranking for pixels in data.test_images]
    telling = [row for row, ranking in enumerate(rankings) if ranking[1] > ranking[2]]  # unlike ties, in order
    with torch.no_grad():
        for parameter in engine.network.get_submodule("linear").parameters():
            parameter.mul_(1000)
    sure = engine.answer(data.test_images[telling[0]], None, "gradcam", ["layer3"])
    assert np.sort(sure.probabilities).tolist() == [0, 0, 0, 1]
    assert sure.ranking.tolist() == rankings[telling[0]].tolist()
    assert sure.votes is not None
    assert [sure.votes.target, sure.votes.against] == sure.ranking[:2].tolist()


def test_maps_can_be_switched_off_and_no_more_classes_are_shown_than_asked_for(
    client: Client, data: Data, tmp_path: Path
) -> None:
    picture = png(data.test_images[0], tmp_path / "a.png")
    view, answer = client.predict(picture, 2, False, PREDICTED, "gradcam", ["layer2"], api_name="/classify")
    assert (len(answer["top"]), answer["maps"], answer["votes"]) == (2, [], None)
    assert view.count("<li") == 2
    assert "What raised the score" not in view
    view, answer = client.predict(picture, 4, True, PREDICTED, "gradcam", [], api_name="/classify")
    assert (len(answer["top"]), answer["maps"], answer["votes"]) == (4, [], None)


def test_a_picture_of_any_kind_can_be_given(client: Client, tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (301, 200, 3)).astype(np.uint8))
    for name, image in (("a.jpg", noise.convert("CMYK")), ("a.gif", noise.convert("P")), ("a.tif", noise)):
        image.save(tmp_path / name)
        _, answer = client.predict(handle_file(tmp_path / name), *DEFAULT, api_name="/classify")
        assert len(answer["top"]) == 3


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, 5, "the number of classes 5 is not possible; give a whole number from 1 to 4"),
        (0, 0, "from 1 to 4"),
        (0, 2.5, "from 1 to 4"),
        (0, True, "from 1 to 4"),
        (0, None, "from 1 to 4"),
        (0, [2], "from 1 to 4"),
        (1, "yes", "neither true nor false"),
        (2, "unicorn", "class 'unicorn' is unknown; choose one of: (predicted), "),
        (2, ["disc"], "is unknown"),
        (3, "GradCAM", "method 'GradCAM' is unknown; choose one of: gradcam, "),
        (4, "layer2", "is not a list"),
        (4, ["layer2", "linear"], "layer 'linear' is unknown; choose one of: prep, layer1, layer2, layer3"),
        (4, [{}], "layer {} is unknown"),
    ],
)
def test_what_the_page_does_not_offer_is_refused_in_words(
    position: int, value: Any, words: str, client: Client, data: Data, tmp_path: Path
) -> None:
    values: list[Any] = list(DEFAULT)
    values[position] = value
    view, answer = client.predict(png(data.test_images[0], tmp_path / "a.png"), *values, api_name="/classify")
    assert words in answer["error"]
    assert 'role="alert"' in view


def test_a_file_that_is_no_picture_is_refused_in_words(client: Client, tmp_path: Path) -> None:
    for name, written in (("zero.png", b""), ("text.png", b"hello"), ("half.png", b"\x89PNG\r\n\x1a\n\0\0")):
        (tmp_path / name).write_bytes(written)
        view, answer = client.predict(handle_file(tmp_path / name), *DEFAULT, api_name="/classify")
        assert re.search(r"not a picture|is damaged", answer["error"])
        assert "Traceback" not in view


def test_twenty_visitors_at_once_get_each_their_own_answer(app: App, data: Data, tmp_path: Path) -> None:
    clients = [app.client() for _ in range(20)]
    asks = [(png(data.test_images[number], tmp_path / f"{number}.png"), 4, True, CLASSES[number % 4],
             list(maps.METHODS)[number % 5], [("prep", "layer1", "layer2", "layer3")[number % 4]])
            for number in range(20)]  # fmt: skip
    alone = [client.predict(*ask, api_name="/classify") for client, ask in zip(clients, asks, strict=True)]
    assert len({json.dumps(answer["maps"]) for _, answer in alone}) == 20
    with ThreadPoolExecutor(20) as pool:
        jobs = [pool.submit(one.predict, *ask, api_name="/classify") for one, ask in zip(clients, asks, strict=True)]
        assert [job.result() for job in jobs] == alone


# ---- mistakes


def test_the_mistakes_are_those_of_the_run(client: Client, opened: Run, run: Path, data: Data) -> None:
    stored = load_file(run / "predictions.safetensors")
    last, labels = stored["predictions"][-1], stored["labels"]
    _, rows = client.predict(True, 30, *MISTAKES[2:], api_name="/misclassified")
    assert sorted(row["index"] for row in rows) == np.flatnonzero(last != labels).tolist()
    assert len(rows) >= 4
    confidences = []
    for row in rows:
        index = row["index"]
        assert (row["true"], row["predicted"]) == (CLASSES[labels[index]], CLASSES[last[index]])
        assert list(row["probabilities"].values()) == pytest.approx(stored["probabilities"][index].tolist(), abs=1e-6)
        confidences.append(max(row["probabilities"].values()))
    assert [round(value, 4) for value in confidences] == sorted((round(v, 4) for v in confidences), reverse=True)

    network, wrong = runs.load(opened, torch.device("cpu")), np.array([row["index"] for row in rows])
    targets = np.stack((last[wrong], labels[wrong]), axis=1)
    shown = evidence.attributions(network, data, wrong, targets, "hirescam", "layer1", "layer3")
    for column, map_for in enumerate((PREDICTED, TRUE)):
        _, rows = client.predict(
            True, 30, ANY, ANY, "confident", 0, map_for, "hirescam", "layer1", api_name="/misclassified"
        )
        assert [CLASSES.index(row["map for"]) for row in rows] == targets[:, column].tolist()
        assert [row["cells"] for row in rows] == [16] * len(rows)
        for row, expected, peak in zip(rows, shown.maps[:, column], shown.peaks[:, column], strict=True):
            assert np.allclose(row["map"], expected, atol=2e-5)
            assert row["raw maximum"] == pytest.approx(float(peak), abs=2e-5)


def test_mistakes_are_filtered_ordered_and_counted_as_asked(client: Client, run: Path) -> None:
    stored = load_file(run / "predictions.safetensors")
    last, labels, probabilities = (
        stored["predictions"][-1],
        stored["labels"],
        stored["probabilities"].astype(np.float32),
    )
    wrong = mistakes.find(probabilities, labels)
    pair = labels[wrong[0]], last[wrong[0]]
    for true, predicted in ((None, None), (pair[0], None), (None, pair[1]), pair):
        for order in options.ORDERS:
            names = [ANY if number is None else CLASSES[number] for number in (true, predicted)]
            for count in (1, 30):
                view, rows = client.predict(
                    True, count, *names, order, 3, NO_MAP, "gradcam", "layer2", api_name="/misclassified"
                )
                expected = wrong[mistakes.select(labels[wrong], last[wrong], true, predicted, order, 3)]
                assert [row["index"] for row in rows] == expected[:count].tolist()
                assert f"{len(rows)} of {len(expected)} mistakes" in view
                assert 'class="layered"' not in view
    orders = []
    for seed in range(4):
        asks = (True, 30, ANY, ANY, "random", seed, NO_MAP, "gradcam", "layer2")
        orders.append(client.predict(*asks, api_name="/misclassified")[1])
    assert len({tuple(row["index"] for row in rows) for rows in orders}) > 1
    never = next(
        name for name in CLASSES if name not in {CLASSES[number] for number in labels[wrong][last[wrong] == pair[1]]}
    )
    assert client.predict(True, 9, never, CLASSES[pair[1]], *MISTAKES[4:], api_name="/misclassified")[1] == []
    assert client.predict(False, *MISTAKES[1:], api_name="/misclassified") == ("", None)


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [(0, 1, "neither true nor false"), (1, 61, "from 1 to 60"), (2, "unicorn", "true class 'unicorn'"),
     (3, None, "predicted class None"), (4, "best", "choose one of: confident, uncertain, random"), (5, -1, "seed -1"),
     (5, 1e300, "seed"), (6, "disc", "choose one of: (no map), (predicted), (true)"), (7, "cam", "method 'cam'"),
     (8, ["layer2"], "layer ['layer2']")],
)  # fmt: skip
def test_other_mistakes_are_refused_in_words(position: int, value: Any, words: str, client: Client) -> None:
    values = [*MISTAKES[:position], value, *MISTAKES[position + 1 :]]
    assert words in client.predict(*values, api_name="/misclassified")[1]["error"]


PAGE = """
import json, sys
from pathlib import Path
from cifar.app import content, page
from cifar.app.engine import Engine
from cifar.app.gate import Gate
from cifar.explain import runs
for path in sys.argv[1:]:
    run = runs.open_run(Path(path))
    shown = content.of_run(run, run.recipe["data"])
    print(json.dumps(page.build(Engine(run), shown, Path()).get_config_file(), default=str))
"""


CHOICES = """
import json, sys
from dataclasses import replace
from pathlib import Path
from cifar.app import content, page
from cifar.app.engine import Engine
from cifar.app.handlers import Handlers
from cifar.explain import runs
opened, folder = runs.open_run(Path(sys.argv[1])), Path(sys.argv[2])
shown = content.of_run(opened, opened.recipe["data"])
def told(classes):
    engine = Engine(replace(opened, classes=classes))
    parts = page.build(engine, shown, folder).get_config_file()["components"]
    lists = {}
    for part in parts:
        if part["type"] == "dropdown":
            lists.setdefault(part["props"]["label"], part["props"])
    handlers, picture = Handlers(engine, shown, folder), {"path": str(folder / "x.png")}
    def wrong(true, predicted):
        rows = handlers.misclassified(True, 60, true, predicted, "confident", 0, "(no map)", "gradcam", "layer2")[1]
        return [[row["true"], row["predicted"]] for row in rows]
    anyone = lists["True class"]["value"], lists["Predicted class"]["value"]
    classified = {value: handlers.classify(picture, 1, True, value, "gradcam", ["layer2"])[1]
                  for _, value in lists["Map for class"]["choices"]}
    return {
        "choices": {label: props["choices"] for label, props in lists.items()},
        "defaults": {label: props["value"] for label, props in lists.items()},
        "all": wrong(*anyone),
        "true": {value: wrong(value, anyone[1]) for _, value in lists["True class"]["choices"]},
        "predicted": {value: wrong(anyone[0], value) for _, value in lists["Predicted class"]["choices"]},
        "map for": {value: answer["map for"] for value, answer in classified.items()},
        "top": [answer["top"][0]["class"] for answer in classified.values()],
    }
print(json.dumps([told(classes) for classes in json.loads(sys.argv[3])]))
"""
LIKE_CHOICES = (
    ["(any)", "(predicted)", "(true)", "(no map)"],
    ["((any))", "(any)", "(predicted)", "\uff08any\uff09 "],
)


def test_a_class_may_be_called_as_a_choice_of_the_page(run: Path, data: Data, tmp_path: Path) -> None:
    Image.fromarray(data.test_images[0]).save(tmp_path / "x.png")
    words = [sys.executable, "-W", "ignore", "-c", CHOICES, str(run), str(tmp_path), json.dumps(LIKE_CHOICES)]
    pages = json.loads(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    for classes, told in zip(LIKE_CHOICES, pages, strict=True):
        for label in ("True class", "Predicted class", "Map for class"):
            shown, sent = zip(*told["choices"][label], strict=True)
            assert len({unicodedata.normalize("NFKC", name).strip() for name in shown}) == len(sent) == 5
            assert sent[0] == told["defaults"][label]
            assert list(sent[1:]) == classes
        assert len(told["all"]) > 1
        for name in classes:
            assert told["true"][name] == [row for row in told["all"] if row[0] == name]
            assert told["predicted"][name] == [row for row in told["all"] if row[1] == name]
            assert told["map for"][name] == name
        assert told["map for"][told["defaults"]["Map for class"]] == told["top"][0]


def test_a_run_with_hardly_a_mistake_has_a_page_too(run: Path, tmp_path: Path) -> None:
    copies = [tmp_path / "none", tmp_path / "one"]
    for mistaken, copy in enumerate(copies):
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints"))
        evaluated = load_file(copy / "predictions.safetensors")
        evaluated["predictions"][-1] = evaluated["labels"]
        evaluated["predictions"][-1, :mistaken] = 3
        evaluated["probabilities"][:] = 0.25  # ties, as float16 makes them: the class that was predicted counts
        save_file(evaluated, copy / "predictions.safetensors")
        (copy / "predictions.log").unlink()
        opened = runs.open_run(copy)
        shown = content.of_run(opened, opened.recipe["data"])
        assert shown.mistakes.indices.tolist() == [0][:mistaken]
        assert shown.mistakes.predictions.tolist() == [3][:mistaken]
        assert shown.metadata["accuracy"].startswith(f"{(36 - mistaken) / 36:.2%} of 36")
        assert sum(right for right, _ in shown.right) == 36 - mistaken
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PAGE, *copies], cwd=ROOT, capture_output=True,
                          text=True, check=True)  # fmt: skip
    pages = done.stdout.splitlines()
    assert ["No mistakes: all 36 test images are classified correctly." in text for text in pages] == [True, False]
    assert ["How many" in text for text in pages] == [False, True]


# ---- safety


def upload(app: App, name: str, content: bytes) -> tuple[int, bytes]:
    """As a browser uploads a file."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    body = head + content + b"\r\n--x--\r\n"
    return app.http("POST", "/gradio_api/upload", body, **{"Content-Type": "multipart/form-data; boundary=x"})[:2]


def test_no_path_from_a_visitor_is_opened(app: App, run: Path, data: Data, tmp_path: Path) -> None:
    Image.fromarray(data.test_images[0]).save(tmp_path / "mine.png")
    status, answer = upload(app, "fine.png", (tmp_path / "mine.png").read_bytes())
    assert status == 200
    [inside] = json.loads(answer)
    function = next(row["id"] for row in json.loads(app.http("GET", "/config")[1])["dependencies"]
                    if row["api_name"] == "classify")  # fmt: skip
    file = {"meta": {"_type": "gradio.FileData"}}
    assert app.ask(function, [{"path": inside, **file}, *DEFAULT])["success"]
    folder = Path(inside).parents[1]
    link = folder / "link.png"
    link.symlink_to(tmp_path / "mine.png")
    for path in (
        "/etc/passwd", str(tmp_path / "mine.png"), str(run / "samples.png"), "samples.png", "README.md", "../mine.png",
        f"{folder}/../../../mine.png", f"{folder}/../../..{tmp_path}/mine.png", str(link), str(folder),
        "http://example.com/a.png", "https://example.com/a.png", "file:///etc/passwd", "", "\0", None, 5, ["/etc"],
    ):  # fmt: skip
        for picture in (
            {"path": path},
            {"path": path, **file},
            {"path": path, "url": "data:image/png;base64,AAAA", **file},
        ):
            answered = app.ask(function, [picture, *DEFAULT])
            output = answered["output"]
            if answered["success"]:
                assert "error" in output["data"][1], path
            else:
                assert output["error"] == "The request cannot be read; upload a picture.", path
            assert "root:" not in json.dumps(answered)
    for picture in ("text", 5, [], [{"path": "/etc/passwd", **file}], {"url": "http://example.com/a.png", **file}):
        answered = app.ask(function, [picture, *DEFAULT])
        assert not answered["success"] or "error" in answered["output"]["data"][1]
    other = app.ask(function, [{"path": inside, **file}, {"path": "/etc/passwd", **file}, *DEFAULT[1:]])
    assert not other["success"] or "error" in other["output"]["data"][1]


def test_only_the_apps_own_folder_is_served(app: App, run: Path) -> None:
    [inside] = json.loads(upload(app, "seen.txt", b"mine")[1])
    assert app.http("GET", f"/gradio_api/file={inside}")[:2] == (200, b"mine")
    folder = str(Path(inside).parents[1])
    targets = ["/etc/passwd", str(run / "config.json"), str(ROOT / "README.md"), "README.md", "pyproject.toml", folder]
    forms = [
        *targets,
        *(f"{folder}/{'../' * depth}etc/passwd" for depth in range(1, 12)),
        *(f"{'../' * depth}etc/passwd" for depth in range(1, 12)),
        "..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "%252e%252e%252fetc%252fpasswd", "..%5c..%5cetc%5cpasswd", "....//....//....//etc/passwd", "%2fetc%2fpasswd",
        "//etc/passwd", "/./etc/passwd", "file:///etc/passwd", "/etc/passwd%00.png", "%00", "/proc/self/environ",
        f"{folder}/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc/passwd", "http://example.com/", "https://example.com/a.png",
        "http%3A%2F%2Fexample.com/", "ftp://example.com/",
    ]  # fmt: skip
    for form in forms:
        for prefix in ("/gradio_api/file=", "/gradio_api/file/", "/file=", "/file/", "/static/", "/assets/", "/svelte/",
                       "/gradio_api/proxy=", "/gradio_api/stream/", "/theme/", "/"):  # fmt: skip
            status, content, _ = app.http("GET", prefix + form)
            assert status in {400, 403, 404, 405} or (prefix == "/" and form == folder), prefix + form
            assert b"root:" not in content
            assert b"network" not in content
            assert b"[project]" not in content


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/deep_link", "/monitoring", "/monitoring/summary", "/gradio_api/vibe-code/", "/gradio_api/runs",
     "/gradio_api/proxy=http://example.com", "/gradio_api/mcp/sse", "/docs", "/gradio_api/openapi.json", "/logout",
     "/gradio_api/custom_component/x/client/x/y", "/login", "/gradio_api/queue/status", "/gradio_api/dev/reload"],
)  # fmt: skip
def test_what_the_page_does_not_need_is_not_there(path: str, app: App) -> None:
    assert app.http("GET", path)[0] == 404
    assert app.post(path, {})[0] == 404


def test_the_page_does_not_say_where_the_data_lie(app: App, opened: Run) -> None:
    status, content, _ = app.http("GET", "/config")
    data = Path(opened.recipe["data"])
    assert (status, data.is_absolute()) == (200, True)
    assert data.name in content.decode()
    assert str(data.parent) not in content.decode()


def test_words_stay_honest(app: App, opened: Run, data: Data) -> None:
    answering = Engine(opened)
    text = app.http("GET", "/config")[1].decode().lower()
    for method in maps.METHODS:
        given = answering.answer(data.test_images[0], None, method, ["layer2"])
        view = views.answer(given, answering, 3).lower()
        assert ("raised the score" in view) == (method not in maps.OF_NO_CLASS)
        text += view
    text += space_module.README.lower() + (ROOT / "cifar" / "app" / "README.md").read_text().lower()
    for word in ("looked", "it look", "looks at", "wrong label", "mislabel", "jet"):
        assert not re.search(rf"\b{word}\b", text), word


def test_uploads_are_limited_before_they_are_read(app: App) -> None:
    status, answer = upload(app, "large.png", bytes((25 << 20) + 1))
    assert status == 413, answer
    connection = http.client.HTTPConnection("127.0.0.1", app.port, timeout=60)
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("Content-Length", str(10**12))  # of which not one byte is sent
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    for address in ("/gradio_api/upload", "/gradio_api/queue/join"):
        for length in ([], ["1"]):  # given as well, it would hold for nothing
            connection.putrequest("POST", address)
            connection.putheader("Transfer-Encoding", "chunked")
            for value in length:
                connection.putheader("Content-Length", value)
            connection.endheaders(b"1\r\nx\r\n0\r\n\r\n")
            assert connection.getresponse().status == 411
            connection.close()
    assert upload(app, "../../../evil.png", b"x")[0] == 200
    assert all(path.is_relative_to(app.temporary) for path in app.temporary.rglob("*evil*"))
    assert list(app.temporary.rglob("*evil*"))


def test_uploads_fill_only_so_much_of_the_disk(tmp_path: Path) -> None:
    async def served(*_: Any) -> None: ...

    gate = Gate(served, tmp_path, largest=100, room=250, kept=3600)

    def status(length: int) -> int:
        refusal = gate.refusal("/gradio_api/upload", "POST", {b"content-length": b"%d" % length})
        return 200 if refusal is None else refusal.status_code

    for name in ("a", "b"):
        assert status(100) == 200
        (tmp_path / name).mkdir()
        (tmp_path / name / "picture.png").write_bytes(bytes(100))
    assert (status(51), status(50)) == (507, 200)
    assert gate.refusal("/gradio_api/queue/join", "POST", {b"content-length": b"51"}) is None
    (tmp_path / "a" / "picture.png").unlink()
    assert status(51) == 200
    (tmp_path / "tmp1234").write_bytes(bytes(100))  # of an upload that was broken off: Gradio does not delete it
    assert status(51) == 507
    os.utime(tmp_path / "tmp1234", (0, 0))
    assert status(51) == 200
    assert not (tmp_path / "tmp1234").exists()


def test_uploads_that_are_on_their_way_take_their_room(tmp_path: Path) -> None:
    statuses: list[int] = []

    async def upload_now(gate: Gate) -> None:
        async def receive() -> Any: ...

        async def send(message: Any) -> None:
            statuses.append(message["status"]) if "status" in message else None

        headers = [(b"content-length", b"100")]
        await gate({"type": "http", "path": "/gradio_api/upload", "method": "POST", "headers": headers}, receive, send)

    depth = 0

    async def served(*_: Any) -> None:
        nonlocal depth
        depth += 1
        if depth < 4:
            await upload_now(gate)  # while this one is still on its way

    gate = Gate(served, tmp_path, largest=100, room=250, kept=3600)
    asyncio.run(upload_now(gate))
    assert (depth, statuses) == (2, [507])
    depth = 3
    asyncio.run(upload_now(gate))
    assert depth == 4


def test_only_an_upload_may_be_large(app: App) -> None:
    status, answer = app.post("/gradio_api/queue/join", {"data": [[]] * 50_000})
    assert (status, answer) == (413, b"Too large")


@pytest.mark.parametrize("index", [[0], [[0], [1]], "0", None, True, 0.5, -1, 1e300])
def test_a_test_image_has_a_number(index: Any, run: Path, data: Data) -> None:
    opened = runs.open_run(run)
    answers = handlers.Handlers(Engine(opened), content.of_run(opened, opened.recipe["data"]), run)
    with pytest.raises(UserError, match=r"test image .* is not possible; give a whole number from 0 to "):
        answers.test_image(index)


def test_a_space_of_a_network_without_mistakes_can_be_read(tmp_path: Path) -> None:
    nothing = content.EvaluatedImages(
        np.empty(0, np.int64), np.empty((0, 32, 32, 3), np.uint8), np.empty(0, np.uint8), np.empty((0, 4), np.float32)
    )
    one = content.EvaluatedImages(
        np.zeros(1, np.int64), np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1, np.uint8), np.ones((1, 4), np.float32)
    )
    content.save(content.AppContent(one, nothing, 8, [(2, 2)] * 4, {}), tmp_path)
    assert content.read(tmp_path).mistakes.probabilities.shape == (0, 4)


def test_the_page_says_that_it_talks_to_nobody_else(app: App) -> None:
    status, content, headers = app.http("GET", "/")
    assert status == 200
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    config = json.loads(app.http("GET", "/config")[1])
    assert not config["analytics_enabled"]
    assert b"fonts.googleapis" not in content


def test_the_process_reaches_no_other_machine() -> None:
    code = """
import socket
from cifar.app.gate import stay_on_this_machine
stay_on_this_machine("127.0.0.1")
with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
    print("here")
for reach in (
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=5),
    lambda: socket.create_connection(("2001:db8::1", 80), timeout=5),
    lambda: socket.getaddrinfo("example.com", 443),
    lambda: socket.gethostbyname("example.com"),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)),
):
    try:
        reach()
    except PermissionError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["here", *["this app connects to no other machine"] * 5]


def test_the_process_reaches_the_addresses_of_its_own_name() -> None:
    code = """
import socket
real = socket.getaddrinfo
def named(host, *rest, **more):
    return [(socket.AF_INET, 1, 6, "", ("192.0.2.1", 0))] if host == "box" else real(host, *rest, **more)
socket.getaddrinfo = named
from cifar.app.gate import stay_on_this_machine
stay_on_this_machine("box")
for place in ("192.0.2.1", "192.0.2.2"):
    with socket.socket() as connection:
        connection.setblocking(False)
        try:
            connection.connect_ex((place, 80))
            print("let out")
        except PermissionError as error:
            print(error)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["let out", "this app connects to no other machine"]


def test_it_listens_at_an_ipv6_address(run: Path, tmp_path: Path) -> None:
    port = free_port()
    try:
        server.check_port("::1", port)
    except UserError:
        pytest.skip("this machine has no IPv6")
    app = App(command("--run", run, "--host", "::1", "--port", port), port, tmp_path / "tmp", cwd=ROOT)
    assert app.first_line == f"open http://[::1]:{port}/ (Ctrl-C ends it)\n"
    connection = http.client.HTTPConnection("::1", port, timeout=60)
    connection.request("GET", "/config")
    assert connection.getresponse().status == 200
    connection.close()
    app.end()
    assert app.process.returncode == 0


def test_it_listens_where_the_environment_says_and_when_asked_to_end_leaves_nothing(
    run: Path, data: Data, tmp_path: Path
) -> None:
    port = free_port()
    app = App(command("--run", run), port, tmp_path / "tmp", cwd=ROOT,
              env={"HTTP_PROXY": "http://192.0.2.1:9", "GRADIO_ALLOWED_PATHS": "/", "GRADIO_SHARE": "1",
                   "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)})  # fmt: skip
    assert app.first_line == f"open http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"
    Image.fromarray(data.test_images[0]).save(tmp_path / "a.png")
    assert upload(app, "a.png", (tmp_path / "a.png").read_bytes())[0] == 200
    assert list(app.temporary.rglob("a.png"))
    assert app.http("GET", "/gradio_api/file=/etc/hostname")[0] == 403
    output = app.end(signal.SIGINT)  # the others here are terminated
    assert app.process.returncode == 0
    assert output.strip() == ""
    assert left(app) == []


# ---- a Space


@pytest.fixture(scope="module")
def space(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "new" / "space"
    done = subprocess.run(
        command("--run", run, "--export-space", folder), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "is a complete Space" in done.stdout
    return folder


def test_a_space_has_all_that_it_needs_and_says_nothing_of_this_machine(space: Path, run: Path, data: Data) -> None:
    names = {path.name for path in space.iterdir()}
    assert names == {
        "app.py", "requirements.txt", "README.md", ".gitattributes", "cifar", "model.safetensors", "config.json",
        "result.json", "examples", "mistakes", "pictures.json",
    }  # fmt: skip
    assert list(space.parent.iterdir()) == [space]
    _, front, text = (space / "README.md").read_text().split("---\n", 2)
    matter = dict(line.split(": ", 1) for line in front.splitlines())
    pins = dict(line.split("==") for line in (space / "requirements.txt").read_text().splitlines())
    assert (matter["sdk"], matter["app_file"], matter["sdk_version"]) == ("gradio", "app.py", pins["gradio"])
    assert {"torch", "torchvision", "grad-cam", "safetensors", "pillow", "numpy"} < pins.keys()
    assert all(re.fullmatch(r"[0-9.]+", version) for version in pins.values())
    assert "Its accuracy is" in text
    for path in space.rglob("*"):
        if path.suffix in {".json", ".md", ".txt", ".py"}:
            assert str(run.parents[2]) not in path.read_text(), path
    shown = content.read(space)
    expected = content.of_run(runs.open_run(run), str(data.path.parent) and runs.open_run(run).recipe["data"])
    for ours, theirs in ((shown.examples, expected.examples), (shown.mistakes, expected.mistakes)):
        for mine, its in zip(vars(ours).values(), vars(theirs).values(), strict=True):
            assert np.array_equal(mine, its)
            assert mine.dtype == its.dtype
    assert (shown.images, shown.right, shown.metadata) == (expected.images, expected.right, expected.metadata)
    assert shown.examples.labels.tolist() == [0, 1, 2, 3]
    for label, index in enumerate(shown.examples.indices):
        assert index == np.flatnonzero(data.test_labels == label)[0]


def test_a_space_starts_from_its_folder_alone(space: Path, client: Client, data: Data, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(space, tmp_path / "elsewhere"))
    port = free_port()
    # As a fresh environment: without this project, and without what its requirements do not name.
    start = (
        "import runpy, sys; "
        f"sys.path.insert(0, {str(moved)!r}); "
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in getattr(finder, '__name__', '')]; "
        "sys.modules.update(dict.fromkeys(['accelerate', 'albumentations', 'tensorboard'])); "
        f"runpy.run_path({str(moved / 'app.py')!r}, run_name='__main__')"
    )
    env = {"PYTHONPATH": "", "XDG_CACHE_HOME": str(tmp_path / "none"), "GRADIO_SERVER_PORT": str(port),
           "SYSTEM": "spaces", "SPACE_ID": "somebody/space"}  # fmt: skip
    app = App([sys.executable, "-P", "-c", start], port, tmp_path / "tmp", cwd=tmp_path, env=env)
    try:
        loaded = Path(f"/proc/{app.process.pid}/cwd").resolve()
        assert loaded == tmp_path
        there = app.client()
        picture = png(data.test_images[3], tmp_path / "a.png")
        for chosen in (PREDICTED, HOSTILE):
            ask = (picture, 4, True, chosen, "gradcam", ["layer1", "layer3"])
            assert there.predict(*ask, api_name="/classify") == client.predict(*ask, api_name="/classify")
        assert there.predict(*MISTAKES, api_name="/misclassified") == client.predict(
            *MISTAKES, api_name="/misclassified"
        )
        assert app.http("GET", f"/gradio_api/file={moved / 'config.json'}")[0] == 403
        assert app.http("GET", "/gradio_api/file=config.json")[0] == 403
    finally:
        output = app.end(signal.SIGHUP)
    assert app.process.returncode == 0, output
    assert left(app) == []
    assert not (tmp_path / "none" / "cifar").exists()  # it has looked for no data set


# ---- bad input


Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Gives the one line that the app's command line ends with, in this process."""

    def serve(*_: Any) -> None:
        raise AssertionError("it serves")

    monkeypatch.setattr(server, "serve", serve)

    def end(*arguments: Any) -> str:
        monkeypatch.setattr("sys.argv", ["cifar.app", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return only_line(ended.value.code, *capsys.readouterr())

    return end


def only_line(status: Any, out: str, err: str) -> str:
    """The line with which a wrong command line is refused."""
    assert status == 2, err
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith("cifar.app: error: ")
    return line


def test_a_wrong_command_line_is_one_line_of_the_process_too(run: Path, shapes: Path) -> None:
    done = subprocess.run(
        command("--run", run, "--data", shapes), cwd=ROOT, capture_output=True, text=True, check=False, timeout=900
    )
    assert "the images have the classes" in only_line(done.returncode, done.stdout, done.stderr)


def test_a_wrong_run_is_refused(run: Path, tmp_path: Path, refused: Refused) -> None:
    assert "does not exist" in refused("--run", tmp_path / "none")
    assert "is not a finished run" in refused("--run", tmp_path)
    unfinished = Path(shutil.copytree(run, tmp_path / "unfinished"))
    (unfinished / "result.json").unlink()
    assert "is not a finished run; train it to its end first" in refused("--run", unfinished)
    assert "is not a finished run" in refused("--run", next((run / "checkpoints").iterdir()))
    broken = Path(shutil.copytree(run, tmp_path / "broken", ignore=shutil.ignore_patterns("checkpoints")))
    with (broken / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert "does not match its sha256" in refused("--run", broken)
    shutil.copy(run / "model.safetensors", broken)
    (broken / "predictions.safetensors").write_bytes(b"no")
    assert "predictions.safetensors cannot be read" in refused("--run", broken)
    (broken / "predictions.safetensors").unlink()
    assert "predictions.safetensors" in refused("--run", broken)


def test_other_images_are_refused(run: Path, tmp_path: Path, refused: Refused) -> None:
    other = tmp_path / "other"
    for split in ("train", "test"):
        for name in CLASSES:
            (other / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(other / split / name / "a.png")
    assert "name them with --data" in refused("--run", run, "--data", other)
    assert "--data" in refused("--run", run, "--data", tmp_path / "none")


def test_a_wrong_address_flag_or_folder_is_refused(run: Path, app: App, tmp_path: Path, refused: Refused) -> None:
    assert f"port {app.port} (Address already in use); give another --port" in refused("--run", run, "--port", app.port)
    assert "--port" in refused("--run", run, "--port", 70_000)
    assert "--host" in refused("--run", run, "--host", "192.0.2.1")
    assert "see python -m cifar.app --help" in refused("--run", run, "--share")
    assert "invalid int value" in refused("--run", run, "--port", "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    assert "is not an empty folder; name a new one" in refused("--run", run, "--export-space", tmp_path / "full")
    assert "is not an empty folder" in refused("--run", run, "--export-space", tmp_path / "full" / "mine")
    assert "cannot be written" in refused("--run", run, "--export-space", tmp_path / "full" / "mine" / "below")
    assert (tmp_path / "full" / "mine").read_text() == "mine"


def test_a_flag_says_where_to_listen_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    port, other = free_port(), free_port()
    monkeypatch.setenv("GRADIO_SERVER_NAME", "127.0.0.1")
    monkeypatch.setenv("GRADIO_SERVER_PORT", str(port))
    assert server.address(None, None) == ("127.0.0.1", port)
    assert server.address("localhost", other) == ("localhost", other)


def test_a_wrong_address_in_the_environment_is_refused(
    run: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value, words in (
        ("GRADIO_SERVER_PORT", "http", "GRADIO_SERVER_PORT=http is no port; give a number from 1 to 65535"),
        ("GRADIO_SERVER_PORT", "70000", "GRADIO_SERVER_PORT=70000 is no port"),
        ("GRADIO_SERVER_NAME", "192.0.2.1", "no server can listen at 192.0.2.1 port"),
        ("GRADIO_SERVER_NAME", "127.0..1", "no server can listen at 127.0..1 port"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert words in refused("--run", run)


def test_a_run_without_its_figures_is_refused(run: Path, tmp_path: Path, refused: Refused) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    result = json.loads((copy / "result.json").read_text())
    (copy / "result.json").write_text(json.dumps({name: result[name] for name in ("steps", "test_accuracy")}))
    assert "result.json does not say: seconds, world_size, " in refused("--run", copy)
    assert "--run " in refused("--run", "x" * 300)
    assert "cannot be written" in refused("--run", run, "--export-space", tmp_path / ("x" * 300))


def test_a_visitor_is_told_when_the_network_does_not_come_free(
    opened: Run, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "BUSY_SECONDS", 0.1)
    one = Engine(opened)
    with one._alone(), pytest.raises(UserError, match="the network has been busy for"):
        one.answer(data.test_images[0], None, "gradcam", [])
    assert one.answer(data.test_images[0], None, "gradcam", []).heatmaps == []


HANGS = """
import sys, threading
from pathlib import Path
from cifar.app import server
from cifar.app.engine import Engine
server.ENDS_WITHIN = 1
Engine.warm_up = lambda self: threading.Event().wait()
from cifar.app import engine, content, server
from cifar.explain import runs
run = runs.open_run(Path(sys.argv[1]))
server.serve(Engine(run), content.of_run(run, run.recipe["data"]), "127.0.0.1", int(sys.argv[2]))
"""


def test_it_serves_though_nobody_reads_its_output(run: Path) -> None:
    port = free_port()
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(command("--run", run, "--port", port), stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    while True:
        assert process.poll() is None, (process.returncode, process.communicate()[1])
        with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/") as answer:
            assert answer.status == 200
            break
        time.sleep(0.1)
    time.sleep(1)  # it writes its line once it can be reached
    process.terminate()
    assert (process.wait(900), process.communicate()[1]) == (0, "")


def test_it_ends_though_an_import_never_does(run: Path, tmp_path: Path) -> None:
    port = free_port()
    app = App([sys.executable, "-c", HANGS, str(run), str(port)], port, tmp_path / "tmp", cwd=ROOT)
    assert app.http("GET", "/")[0] == 200  # by now the import has begun
    output = app.end()
    assert app.process.returncode == 0
    assert output == "cifar.app: ended, though grad-cam has not been imported after 1 s\n"
    assert left(app) == []


def test_without_gradio_it_says_what_to_install(run: Path) -> None:
    code = (
        "import sys, importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *rest: None if name == 'gradio' else find(name, *rest); "
        f"sys.argv = ['cifar.app', '--run', {str(run)!r}]; import cifar.app.__main__ as m; m.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "cifar.app: error: gradio is not installed; install it with: pip install '.[app]'\n",
    )


def test_nothing_but_the_app_imports_gradio() -> None:
    files = [*ROOT.glob("*.py"), *(ROOT / "cifar").rglob("*.py")]
    importing = {
        file.parent for file in files if re.search(r"^\s*(from|import) gradio\b", file.read_text(), re.MULTILINE)
    }
    assert importing == {ROOT / "cifar" / "app"}


def test_help_needs_neither_torch_nor_gradio() -> None:
    code = (
        "import sys; sys.modules.update(torch=None, gradio=None); sys.argv = ['x', '--help']; "
        "import cifar.app.__main__ as m; m.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--export-space DIR" in done.stdout


# ---- the page in a browser


class Visit:
    """An open page, with everything that must not happen on it counted."""

    def __init__(self, page: "Page", app: App) -> None:
        self.page, self.app = page, app
        self.requests: list[str] = []
        self.trouble: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("dialog", lambda dialog: (self.trouble.append(dialog.message), dialog.dismiss()))
        page.on("pageerror", lambda error: self.trouble.append(str(error)))
        page.on("console", lambda line: self.trouble.append(line.text) if line.type == "error" else None)
        page.goto(app.address)
        page.locator("#examples button").first.wait_for()

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def away(self) -> list[str]:
        """Requests to anywhere but the app."""
        return [url for url in self.requests if not url.startswith((self.app.address, "data:", "blob:"))]

    def asked(self) -> int:
        """How many times the network was asked."""
        return sum("/queue/join" in url for url in self.requests)

    def shot(self, selector: str) -> np.ndarray[Any, Any]:
        """The pixels of an element, whose place the browser rounds to whole ones."""
        element = self.page.locator(selector).first
        element.scroll_into_view_if_needed()
        box = element.bounding_box()
        assert box is not None
        clip = {name: math.floor(value + 0.5) for name, value in box.items()}
        image = Image.open(BytesIO(self.page.screenshot(clip=clip, animations="disabled")))  # answers fade in
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture
def visit(browser: "Browser", app: App) -> Iterator[Callable[..., Visit]]:
    contexts, visits = [], []

    def start(width: int = 1280, **options: Any) -> Visit:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        context.set_default_timeout(60_000)
        contexts.append(context)
        visits.append(Visit(context.new_page(), app))
        return visits[-1]

    yield start
    for context in contexts:
        context.close()
    for one in visits:
        assert (one.trouble, one.away()) == ([], [])


def test_an_uploaded_picture_is_classified_and_shown_as_the_network_sees_it(
    visit: Callable[..., Visit], client: Client, data: Data, tmp_path: Path
) -> None:
    visited = visit()
    picture = png(data.test_images[7].repeat(10, axis=0).repeat(10, axis=1), tmp_path / "a.png")
    assert "Upload, paste or photograph a picture" in visited.page.inner_text("#answer-view")
    visited.page.set_input_files("#picture input[type=file]", tmp_path / "a.png")
    visited.page.locator(".answer").wait_for()
    _, answer = client.predict(picture, 4, True, PREDICTED, "gradcam", ["layer2"], api_name="/classify")
    names = visited.page.locator(".seen .bars .name").all_inner_texts()
    shares = visited.page.locator(".seen .bars .share").all_inner_texts()
    assert names == [row["class"] for row in answer["top"]]
    assert shares == [f"{100 * row['probability']:.1f} %" for row in answer["top"]]
    seen = visited.shot(".input")
    assert (seen == data.test_images[7].repeat(6, axis=0).repeat(6, axis=1)).all()
    text = visited.page.inner_text(".heatmaps")
    assert "layer2, 8x8 cells" in text
    assert f"raw maximum {answer['maps'][0]['raw maximum']:.3g}" in text
    votes = answer["votes"]
    assert f"sum {votes['sum']:+.2f}, bias {votes['bias']:+.2f}: margin {votes['margin']:+.2f}" in " ".join(
        text.split()
    )
    cells = [float(cell) for cell in visited.page.locator(".votes td").all_inner_texts()]
    assert cells == pytest.approx(np.ravel(votes["cells"]).tolist(), abs=0.06)


def test_the_opacity_is_true_and_asks_nobody(
    visit: Callable[..., Visit], client: Client, data: Data, tmp_path: Path
) -> None:
    visited = visit()
    picture = png(data.test_images[9], tmp_path / "a.png")
    visited.page.set_input_files("#picture input[type=file]", tmp_path / "a.png")
    visited.page.locator(".answer").wait_for()
    _, answer = client.predict(picture, 4, True, PREDICTED, "gradcam", ["layer2"], api_name="/classify")
    look, asked = answer["maps"][0], visited.asked()
    slider = visited.page.get_by_label("range slider for Map opacity").first
    for opacity in (0.5, 0.0, 1.0, 0.25):
        slider.fill(str(opacity))
        visited.page.wait_for_function(
            "(value) => getComputedStyle(document.querySelector('.layered .map')).opacity == value",
            arg=str(opacity).removesuffix(".0"),
        )
        cells = np.array(look["map"], np.float32)
        blended = figures.blended(data.test_images[9], cells, Grid(8, 2, 4), look["raw maximum"], opacity)
        shown = visited.shot(".layered")
        assert np.abs(shown - figures.enlarged(blended, 6)).max() <= 3
    assert visited.asked() == asked


def test_every_control_changes_the_answer(visit: Callable[..., Visit]) -> None:
    page = visit().page
    page.locator("#examples button").nth(1).click()
    page.locator(".answer").wait_for()
    page.get_by_label("range slider for Top classes").fill("2")
    page.wait_for_function("document.querySelectorAll('.seen .bars li').length == 2")
    assert page.get_by_label("range slider for Top classes").get_attribute("max") == "4"
    page.get_by_label("layer3 (4x4)").check()
    page.get_by_label("prep (32x32)").check()
    page.wait_for_function("document.querySelectorAll('.heatmaps figure').length == 4")
    assert [line.split(",")[0] for line in page.locator(".heatmaps b").all_inner_texts()] == [
        "prep",
        "layer2",
        "layer3",
        "Votes of layer3",
    ]
    page.get_by_label("Map for class").first.click()
    page.get_by_role("option", name="square").click()
    page.get_by_text("What raised the score of square?").wait_for()
    page.get_by_label("Method").first.click()
    page.get_by_role("option", name="eigencam").click()
    page.get_by_text("the same map for every class").wait_for()
    page.get_by_label("Show maps").uncheck()
    page.wait_for_function("document.querySelectorAll('.heatmaps').length == 0")
    assert page.locator(".seen .bars li").count() == 2


def test_a_mistake_is_carried_over_to_be_classified(visit: Callable[..., Visit], client: Client, data: Data) -> None:
    visited = visit()
    page = visited.page
    visited.tab("Misclassified")
    page.locator(".mistakes button").first.wait_for()
    _, rows = client.predict(*MISTAKES, api_name="/misclassified")
    page.get_by_label("range slider for How many").fill("2")
    page.wait_for_function("document.querySelectorAll('.mistakes button').length == 2")
    first = page.locator(".mistakes button").first.inner_text()
    assert f"true: {rows[0]['true']}" in first
    assert f"predicted: {rows[0]['predicted']}" in first
    assert f"raw maximum {rows[0]['raw maximum']:.3g}" in first
    page.get_by_role("combobox", name="Order").click()
    page.get_by_role("option", name="random").click()
    page.get_by_label("Seed of the order").wait_for()
    page.get_by_role("combobox", name="Order").click()
    page.get_by_role("option", name="uncertain").click()
    page.get_by_label("Show mistakes").uncheck()
    page.wait_for_function("document.querySelectorAll('.mistakes').length == 0")
    page.get_by_label("Show mistakes").check()
    page.locator(".mistakes button").nth(1).click()
    page.locator(".answer").wait_for()
    _, rows = client.predict(True, 2, ANY, ANY, "uncertain", *MISTAKES[5:], api_name="/misclassified")
    assert page.get_by_role("tab", name="Classify").get_attribute("aria-selected") == "true"
    assert (visited.shot(".input") == figures.enlarged(data.test_images[rows[1]["index"]], 6)).all()


def test_about_says_what_it_is_and_what_it_cannot_do(visit: Callable[..., Visit], opened: Run) -> None:
    visited = visit()
    visited.tab("About")
    text = visited.page.locator(".about")
    text.wait_for()
    words = text.inner_text()
    accuracy = f"{opened.test_accuracy:.2%} of 36 test images"
    for part in (
        accuracy,
        "32x32 pixels",
        "It knows 4 classes",
        HOSTILE,
        "peak_learning_rate",
        opened.sha256,
        "linear",
    ):
        assert part in words


def test_a_bad_file_is_answered_in_words_and_a_good_one_after_it(visit: Callable[..., Visit], tmp_path: Path) -> None:
    page = visit().page
    (tmp_path / "bad.png").write_bytes(b"")
    page.set_input_files("#picture input[type=file]", tmp_path / "bad.png")
    page.locator(".problem").wait_for()
    assert "not a picture that can be read" in page.inner_text("#answer-view")
    assert "Traceback" not in page.content()
    page.locator("#examples button").first.click()
    page.locator(".answer").wait_for()
    page.get_by_label("Remove Image").click()
    page.get_by_text("Upload, paste or photograph").wait_for()


def test_a_picture_can_be_pasted_or_photographed(visit: Callable[..., Visit]) -> None:
    page = visit(permissions=["camera", "clipboard-read", "clipboard-write"]).page
    page.evaluate("""async () => {
      const canvas = new OffscreenCanvas(90, 60);
      canvas.getContext('2d').fillRect(0, 0, 90, 60);
      const blob = await canvas.convertToBlob({ type: 'image/png' });
      await navigator.clipboard.write([new ClipboardItem({ 'image/png': blob })]);
    }""")
    page.get_by_label("Paste from clipboard").click()
    page.locator(".answer").wait_for()
    page.get_by_label("Remove Image").click()
    page.locator("#answer-view .hint").wait_for()
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('video')?.videoWidth > 0")
    page.get_by_label("capture photo").click()
    page.locator(".answer").wait_for()


def test_it_can_be_used_with_the_keyboard_alone(visit: Callable[..., Visit]) -> None:
    page = visit().page
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.index !== undefined"):
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.locator(".answer").wait_for()
    page.get_by_label("range slider for Map opacity").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("getComputedStyle(document.querySelector('.layered .map')).opacity == '0.51'")
    page.get_by_role("tab", name="Classify").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator(".mistakes button").first.wait_for()
    page.locator(".mistakes button").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('[role=tab]').getAttribute('aria-selected') == 'true'")


OUTSIDE = """() => [...document.querySelectorAll('.gradio-container *')]
  .filter((element) => element.checkVisibility() && element.clientWidth > 0)
  .filter((element) => element.getBoundingClientRect().right > innerWidth + 0.5)
  .map((element) => element.outerHTML.slice(0, 120))"""
CUT = """() => [...document.querySelectorAll('.answer *, .mistakes *, .about *, #controls span, #filters span')]
  .filter((element) => element.checkVisibility() && getComputedStyle(element).display != 'inline')
  .filter((element) => element.clientWidth > 0 && element.scrollWidth > element.clientWidth + 1)
  .map((element) => element.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_tab_fits_and_can_be_read(width: int, scheme: str, visit: Callable[..., Visit]) -> None:
    visited = visit(width, color_scheme=scheme)
    page = visited.page
    page.locator("#examples button").nth(1).click()
    page.get_by_label("layer3 (4x4)").check()
    page.wait_for_function("document.querySelectorAll('.heatmaps figure').length == 3")
    for tab, sign in (("Classify", ".answer"), ("Misclassified", ".mistakes button"), ("About", ".about")):
        visited.tab(tab)
        page.locator(sign).first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(OUTSIDE) == []
        assert page.evaluate(CUT) == []
        least, where = page.evaluate(LEAST_CONTRAST, [".gradio-container *", "style, script"])
        assert least >= 4.5, where
    assert page.locator("footer").count() == 0 or not page.locator("footer").is_visible()
