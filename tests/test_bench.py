"""The bench: measurements are interleaved, the real programs are what is measured, and no measurement stands alone."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch
from conftest import ROOT
from helpers.bench import BATCH, SMALL, command, shrink
from torch.nn import functional as F

from cifar import models
from cifar.bench import context, counts, interleave, limit, scaling, scaling_model, shaped
from cifar.bench.context import Bench, products
from cifar.bench.interleave import Program
from cifar.bench.plain import TRANSFORMS, Images, Plain
from cifar.data.augment import normalize
from cifar.data.cache import open_data
from cifar.errors import UserError
from cifar.recipes import RECIPES, Recipe

pytestmark = pytest.mark.slow

Measure = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def bench(tmp_path: Path) -> Measure:
    """Runs `python -m cifar.bench` in the test's own folder."""

    def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        words = [*command("cifar.bench"), *map(str, arguments)]
        return subprocess.run(words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
                              capture_output=True, text=True, timeout=1200, check=False)  # fmt: skip

    return run


def test_programs_are_interleaved_and_the_first_two_requests_are_not_counted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from cifar.bench import interleave\n"
        "cold = 100\n"  # times as slow
        "def work(amount):\n"
        "    global cold\n"
        "    with Path(sys.argv[1]).open('a') as file: file.write(f'{sys.argv[2]} {amount}\\n')\n"
        "    print('a line of its own')\n"
        "    seconds, cold = cold * 0.5 * amount / int(sys.argv[3]), 1\n"
        "    return {'amount': amount, 'seconds': seconds}\n"
        "interleave.serve({'work': work})\n"
    )
    with (
        Program("a", ["-c", script, str(log), "a", "4"], {}) as a,
        Program("b", ["-c", script, str(log), "b", "1"], {}) as b,
    ):
        contestants = {"a": (a, {"do": "work"}), "b": (b, {"do": "work"})}
        answers = interleave.alternate(contestants, repeats=3, seconds=2.0, least=4)
    # The first request only warms up. In the second one a takes 0.5 s for 4, so that 16 fit into 2 s; b takes 2 s.
    assert log.read_text().splitlines() == ["a 4", "a 4", "b 4", "b 4", *["a 16", "b 4"] * 3]
    rates, slower = interleave.rates(answers["a"]), interleave.rates(answers["b"], each=10)
    assert (rates, slower) == ([8, 8, 8], [20, 20, 20])
    assert interleave.quotients(slower, rates) == [2.5, 2.5, 2.5]


@pytest.mark.parametrize("name", RECIPES)
def test_a_steps_limit_is_that_of_what_a_step_computes(name: str, tmp_path: Path) -> None:
    from cifar.bench import probe

    probe.IMPORTS.end()  # which measures from here on
    observer = probe.Observer()
    observer.network = network = models.build(RECIPES[name]().network, classes=10, dropout=0)
    bench = Bench(name, 1, 1.0, tmp_path, machine={"native_bf16": False, "gpus": 0}, limits={products("float32"): 1e12})
    metadata = observer.metadata()
    assert network.training
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    computed = counts.multiply_adds(lambda: F.cross_entropy(network(images), labels).backward())
    assert bench.limit(metadata["step_multiply_adds"])[1] == pytest.approx(1e12 / (computed / 2), rel=1e-9)
    assert bench.limit(metadata["multiply_adds"])[1] == pytest.approx(
        1e12 / counts.forward_multiply_adds(network), rel=1e-9
    )


def test_a_program_that_ends_is_named_and_its_words_are_passed_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bench = Bench("resnet", 1, 1.0, tmp_path, machine={"native_bf16": False, "gpus": 0})
    with (
        bench.launch("ours", "--data", tmp_path / "missing", "--run", tmp_path / "run") as program,
        pytest.raises(UserError, match="ours ended with exit status 1; its stderr is above"),
    ):
        program.request("train", amount=1)
    assert f"train.py: error: --data {tmp_path / 'missing'} does not exist" in capfd.readouterr().err


def test_a_wrong_device_is_one_line_of_the_program_that_is_measured(bench: Measure) -> None:
    done = bench("limit", CIFAR_DEVICE="tpu")
    assert done.returncode == 2
    first, last = done.stderr.splitlines()
    assert first == "limit: error: CIFAR_DEVICE=tpu is unknown; set cpu or cuda, or leave it unset"
    assert last == "bench: error: limit ended with exit status 2; its stderr is above"


def test_a_gpu_is_measured_less_often_and_for_less_time_unless_told_otherwise(tmp_path: Path) -> None:
    found = []
    for gpus in (0, 1):
        for given in ((0, 0.0), (9, 0.5)):
            bench = Bench("resnet", *given, tmp_path)
            bench.runs_on({"gpus": gpus})
            found.append((bench.repeats, bench.seconds))
    assert found == [(5, 5.0), (9, 0.5), (3, 1.0), (9, 0.5)]


def test_what_is_watched_is_train_py_itself(shapes: Path, tmp_path: Path) -> None:
    bench = Bench("resnet", 1, 1.0, tmp_path, machine={"native_bf16": False, "gpus": 0})
    run = tmp_path / "run"
    arguments = ("--data", shapes, "--run", run, "--epochs", 3, "--peak-epoch", 1, *SMALL,
                 "--augmentation-backend", "device")  # fmt: skip
    with bench.launch("ours", *arguments, "--checkpoint-every", 1) as program:
        trained = program.request("train", amount=5, uncounted=1)  # an epoch has 4 steps of BATCH images
        restored = program.request("restore", amount=1)
        saved = sorted((run / "checkpoints").iterdir())
        computed = [program.request("metadata")["step_multiply_adds"]]
        small = program.request("train", amount=1, uncounted=0, image_size=24, frozen=True)
        computed.append(program.request("metadata")["step_multiply_adds"])
    assert saved[-1].name == "step-0000006"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    assert len(trained["save"]) == 5
    assert (trained["image_size"], small["image_size"]) == (32, 24)
    assert 0 < trained["input"] < trained["seconds"]
    linear = 3 * 256 * (10 - 4)  # fewer products for four classes than for ten: see test_counts.py
    assert computed == [303_085_344 - linear, 245_153_568 - linear]
    assert restored["bytes"] == sum(file.stat().st_size for file in saved[-1].iterdir())


def test_the_plain_loop_evaluates_every_image_as_the_network_does(shapes: Path, tmp_path: Path) -> None:
    plain = Plain(Recipe(data=str(shapes), global_batch_size=16), tmp_path / "plain")
    plain.train(amount=2)
    answer = plain.evaluate(amount=22)
    data = open_data(str(shapes))
    with torch.no_grad():
        logits = plain.network.eval()(normalize(torch.from_numpy(data.test_images[:].copy()), data.mean, data.std))
    labels = torch.from_numpy(data.test_labels[:].copy()).long()
    assert answer["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert answer["correct"] == int((logits.argmax(1) == labels).sum())


def test_the_plain_loop_augments_as_the_recipes_do(shapes: Path) -> None:
    assert {recipe().augmentation for recipe in RECIPES.values()} <= set(TRANSFORMS)
    data = open_data(str(shapes))
    torch.manual_seed(0)
    images = [Images(data, "train", *TRANSFORMS["crop_flip_cutout"])[0][0] for _ in range(20)]
    assert {int((image == 0).all(dim=0).sum()) for image in images} == {64}  # a square of 8x8 is the data's mean
    assert len({image.numpy().tobytes() for image in images}) == 20


@pytest.mark.parametrize(
    ("module", "name"),
    [("bench.app", "bench"), ("bench.curves", "bench"), ("bench.scaling_model", "bench"), ("preflight", "preflight")],
)
def test_a_wrong_command_line_of_every_other_program_is_one_line(module: str, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"cifar.{module}", "--nope"], cwd=ROOT, env={**os.environ, "SLURM_PROCID": "0"},
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"{name}: error: ")
    assert done.stderr.endswith(f"see python -m cifar.{module} --help\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stepp"], "part 'stepp' is unknown; choose among: limit, step, input"),
        (["--recipe", "vgg"], "--recipe 'vgg' is unknown; choose one of: resnet"),
        (["--repeats", "1"], "--repeats 1 has no spread; give at least 2"),
        (["--repeats", "x"], "argument --repeats: invalid int value: 'x'; see python -m cifar.bench --help"),
        (["--seconds", "nan"], "--seconds nan is outside 0..3600; give e.g. 5"),
        (["--json", "missing/bench.json"], "--json missing/bench.json: there is no such folder; make it first"),
        (["--rec", "digits"], "unrecognized arguments: --rec; see"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, bench: Measure, tmp_path: Path) -> None:
    done = bench(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("bench: error: ")
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_does_not_wait_for_torch() -> None:
    script = (
        "import sys; from cifar.bench import __main__\n"
        "try: __main__.parse_command_line(['--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "  startup" in done.stdout


def test_every_figure_has_its_turns_its_limit_and_its_baseline(bench: Measure, tmp_path: Path) -> None:
    done = bench("scaling", "checkpoint", "startup", "--recipe", "digits", "--repeats", 2, "--seconds", 0.01,
                 "--json", "bench.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    result = json.loads((tmp_path / "bench.json").read_text())
    figures = result["figures"]
    assert {figure["part"] for figure in figures} == {"limit", "scaling", "checkpoint", "startup"}
    assert len(done.stdout.splitlines()) == 2 + len(figures)  # machine and head
    for figure in figures:
        for numbers in (figure, figure.get("times_as_fast", figure)):
            assert len(numbers["values"]) == numbers["n"] == 2
            assert 0 <= numbers["low"] <= numbers["median"] <= numbers["high"] < math.inf
    baselines = {figure["baseline"] for figure in figures if "times_as_fast" in figure}
    assert baselines == {"1 process", "plain", "Pillow, one thread"}
    assert {part for part in ("scaling", "checkpoint", "startup")
            if any(figure["part"] == part and "of_limit" in figure for figure in figures)} == {
                "scaling", "checkpoint", "startup"}  # fmt: skip

    def values(what: str) -> list[float]:
        return next(figure["values"] for figure in figures if figure["what"].startswith(what))

    # The whole is the sum of its parts, and what is sent is what is counted.
    starts = zip(*(values(f"of which {part}") for part in ("the launcher", "imports", "this project", "the first")),
                 strict=True)  # fmt: skip
    assert [sum(parts) for parts in starts] == pytest.approx(values("launch to the end"))
    summed = sum(size for name, size in result["counts"]["collectives_per_step"] if name == "gloo:all_reduce")
    assert values("summed over") == [summed / 1e6] * 2


def test_one_gpu_computes_the_parts_of_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "RANKS", (1, 4))
    for place, name in ((Program, "__init__"), (Bench, "batch"), (context, "IMAGES"), (limit, "SHAPES")):
        value = getattr(place, name)
        monkeypatch.setattr(place, name, dict(value) if name == "IMAGES" else value)  # put back afterwards
    shrink()
    bench = Bench("resnet_fast", 2, 0.04, tmp_path, machine={"native_bf16": False, "gpus": 0})
    found = scaling.on_one_gpu(bench)
    total = math.ceil(10 * 50_000 / BATCH)  # ten epochs: three sizes, and frozen for the last fifth
    ends = [0, *(math.ceil(total * third / 3) for third in (1, 2)), math.ceil(0.8 * total), total]
    steps = [end - begin for begin, end in pairwise(ends)]
    phases = ["24x24", "28x28", "32x32", "32x32, frozen"]
    wanted: list[tuple[str, str, int]] = []
    for how in ("eager", "by graph"):
        for ranks, images in ((1, BATCH), (4, BATCH // 4)):
            wanted += [
                *((f"{images} images of {phase}, {how}", "ms a step", 2) for phase in phases),
                (f"{ranks} GPUs computed from it", "images/s", 2),
                ("all steps of resnet_fast on CIFAR-10", "s", 2),
            ]
        wanted += [(f"{gpus} GPUs, {BATCH} images each, {how}", "images/s", 2) for gpus in scaling.GROWING]
    assert [(each.what, each.unit, len(each.values)) for each in found] == wanted
    assert all(value > 0 for each in found for value in each.values)
    *times, rate, whole = found[:6]
    # Alone it waits for nobody.
    expected = sum(count * time.values[0] / 1e3 for count, time in zip(steps, times, strict=True))
    assert whole.values[0] == pytest.approx(expected)
    assert rate.values[0] == pytest.approx(total * BATCH / expected)
    assert rate.ratios == [1, 1]


# ---- the model of a step's time


def test_the_model_is_arithmetic() -> None:
    parts = [scaling_model.Bucket(1000, 0.5), scaling_model.Bucket(3000, 1.0)]
    slow, near = scaling_model.Network(1000.0, 0.0, 1), scaling_model.Network(1e12, 0.0, 1)
    assert scaling_model.step(4.0, parts, 1, slow, 1.0) == (4, 0, 0)
    # Two processes: 1 s for the first bucket, which is hidden, and 3 s for the last, which is not.
    assert scaling_model.step(4.0, parts, 2, slow).exposed == pytest.approx(3)
    assert scaling_model.step(4.0, scaling_model.flat(parts), 2, slow).exposed == pytest.approx(4)  # nothing overlaps
    # Where early layers are frozen, the last ones' gradients are ready later in what is left of the backward pass.
    whole, frozen = (scaling_model.buckets("whitened", frozen=frozen) for frozen in (False, True))
    assert frozen[0].size == whole[0].size
    assert frozen[0].ready > whole[0].ready
    assert (
        sum(bucket.size for bucket in whole) - sum(bucket.size for bucket in frozen)
        == 4 * (24 * 64 + 64 * 64) * 9 + 512
    )
    assert scaling_model.step(1.0, parts, 2, slow).exposed == pytest.approx(
        0.5 + 1 + 3 - 1
    )  # the first is in the last's way
    assert scaling_model.step(4.0, parts, 2, near).seconds == pytest.approx(4)
    # Around a ring of four each sends 2 x 3/4 of the bytes.
    assert scaling_model.step(4.0, parts, 4, slow).exposed == pytest.approx(1.5 * 3)
    # A small sum, and the last bucket's: along trees each has 2 log2(n) messages.
    far = scaling_model.Network(1e12, 0.01, 2, nccl=True)
    assert scaling_model.step(4.0, parts, 16, far).exposed == pytest.approx(0.02 * 2 * 8, rel=1e-6)
    # gloo's rings have 2(n-1), each of a large sum in two segments or more, two of which are under way.
    far = scaling_model.Network(1e12, 0.01, 2)
    assert scaling_model.step(4.0, parts, 16, far).exposed == pytest.approx(0.02 * 2 * 30, rel=1e-6)
    # 8 MB over two: four segments of 1 MB there and four back, of 1 s each; or, two at a time, of 3 s.
    assert scaling_model.sum_seconds(8 << 20, 2, scaling_model.Network(1 << 20, 0.5, 2)) == pytest.approx(8)
    assert scaling_model.sum_seconds(8 << 20, 2, scaling_model.Network(1 << 20, 2.5, 2)) == pytest.approx(8 * 6 / 2)
    assert scaling_model.step(4.0, parts, 16, near, 0.1).waiting == pytest.approx(0.1 * math.sqrt(2 * math.log(16)))


@pytest.mark.parametrize("network", ["resnet", "whitened"])
def test_the_last_gradients_are_ready_at_the_end(network: str) -> None:
    parts = scaling_model.buckets(network)
    assert 1 / 3 < parts[0].ready < parts[-1].ready == pytest.approx(1, abs=0.01)


def test_what_goes_through_the_link_arrives(tmp_path: Path) -> None:
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
        pytest.skip("only root can make network namespaces, and the link needs /dev/net/tun")
    sent = os.urandom(3_000_000)
    (tmp_path / "sent").write_bytes(sent)
    listen = "import socket, sys; s = socket.create_server(('', 5000)); print('ready', flush=True); c = s.accept()[0]\n"
    listen += "while part := c.recv(65536): sys.stdout.buffer.write(part)"
    send = "import socket, sys; socket.create_connection((sys.argv[1], 5000)).sendall(open(sys.argv[2], 'rb').read())"
    first, second = (["ip", "netns", "exec", name, sys.executable, "-c"] for name in shaped.NAMES)
    with shaped.Link() as link:
        link.bits, link.delay = 1e8, 0.01
        receiver = subprocess.Popen([*first, listen], stdout=subprocess.PIPE)
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == b"ready\n"
        subprocess.run([*second, send, shaped.ADDRESSES[0], tmp_path / "sent"], check=True)
        assert receiver.communicate(timeout=300)[0] == sent
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert not any(name in left for name in shaped.NAMES)


def test_the_model_is_measured_only_where_namespaces_can_be_made(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cifar.bench.scaling_model", "--measure"], cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "bench: error: no ip here; install iproute2, util-linux and procps\n"


def test_curves_of_one_name_share_a_colour_and_a_mean(tmp_path: Path) -> None:
    def run(name: str, accuracies: list[float], tta: float | None = None) -> Path:
        lines = [{"seconds": 60.0 * (n + 1), "test_accuracy": accuracy} for n, accuracy in enumerate(accuracies)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(
            "\n".join(json.dumps(line) for line in [*lines[:-1], {**lines[-1], "test_accuracy_tta": tta}])
        )
        return tmp_path / name

    runs = [run("one-seed0", [0.5, 0.9], 0.92), run("one-seed1", [0.6, 0.91], 0.94), run("other", [0.7, 0.8, 0.85])]
    drawn = []
    for output in (tmp_path / "a.svg", tmp_path / "b.svg"):
        subprocess.run([sys.executable, "-m", "cifar.bench.curves", *runs, "--output", output], cwd=ROOT, check=True)
        drawn.append(output.read_bytes())
    assert drawn[0] == drawn[1]
    texts = [element.text for element in ET.fromstring(drawn[0]).iter("{http://www.w3.org/2000/svg}text")]
    assert texts[-2:] == ["one: 90.50 %, 93.00 % with TTA (mean of 2)", "other: 85.00 %"]
    assert {"1", "2"} < set(texts)  # minutes


def test_a_run_without_evaluations_is_refused_in_one_line(tmp_path: Path) -> None:
    for run, output, wrong in (
        (tmp_path, "a.png", f"{tmp_path}/metrics.jsonl cannot be read"),
        (tmp_path, "a.txt", "--output a.txt is neither .svg nor .png"),
        (tmp_path, "none/a.png", "--output none/a.png: there is no such folder"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "cifar.bench.curves", run, "--output", output],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.startswith(f"bench: error: {wrong}")
        assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
