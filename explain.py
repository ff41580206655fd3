"""Shows what a trained network gets wrong, and why: run -> predictions -> mistakes -> maps -> pictures -> report.

    accelerate launch explain.py --run runs/resnet
    accelerate launch explain.py --run runs/resnet --order uncertain --true cat --check
    accelerate launch explain.py --run runs/resnet --corruptions
    python explain.py --help

All processes predict, then rank 0 does the rest. Everything is written to explain/ in the run directory.
"""

import sys

from cifar import failure
from cifar.explain import layers, options, runs
from cifar.explain.options import ExplainOptions
from cifar.explain.runs import Run


def explain(run: Run, asked: ExplainOptions) -> None:
    """Predicts with all processes; rank 0 writes figures, tables and the report."""
    # Imported here so that --help and a wrong flag are answered before torch has loaded.
    import numpy as np
    import torch

    from cifar import evaluation, launch
    from cifar.explain import checks, evidence, figures, mistakes, neighbours, output, robustness
    from cifar.explain.findings import Findings
    from cifar.explain.wording import counted
    from cifar.lettering import Labels
    from cifar.ranks import raise_on_all_ranks

    accelerator = launch.start()
    launch.collect_garbage()
    folder = asked.output or run.output
    cells = layers.resolutions(run.network)
    layer, last_stage = asked.layer or layers.default(cells), list(cells)[-1]

    # Predictions, in the launcher's precision: every process evaluates its part, and all of them get all results.
    with raise_on_all_ranks(accelerator):
        if accelerator.is_local_main_process:
            runs.images(run, asked.data)
    with raise_on_all_ranks(accelerator):
        data = runs.images(run, asked.data)
        compared, left_out = runs.others(run, asked.compare)
        wrong_in = runs.wrong_in(compared, data)
        network = runs.load(run, accelerator.device)
    accelerator.prepare_model(network, evaluation_mode=True)
    evaluated = evaluation.evaluate_whole(accelerator, network, torch.from_numpy(data.test_images), data)
    probabilities, labels = evaluated.probabilities, np.array(data.test_labels)
    ranking = np.argsort(-probabilities, axis=1, kind="stable").astype(np.uint8)

    # Mistakes, most confident first, each with a correctly classified image for comparison.
    wrong = mistakes.find(probabilities, labels)
    chosen = mistakes.choose(wrong, ranking[:, 0], labels, data.classes, asked)
    companions, companion_of = mistakes.companions(wrong, probabilities, labels)

    # With --corruptions: the same on corrupted images, also for the compared runs' networks.
    corrupted = None
    if asked.corruptions:
        first = robustness.ComparedNetwork(str(run.path), network, data)
        others = robustness.load(accelerator, compared, data)
        corrupted = robustness.measure(accelerator, first, evaluated, others, asked.seed)
    launch.end(accelerator)
    if not accelerator.is_main_process:
        return

    # Maps and votes, on a fresh copy of the network without the launcher's autocast.
    network = runs.load(run, accelerator.device)
    predictions, how = ranking[:, 0], (asked.method, layer)
    epochs, epoch_predictions = runs.prediction_history(run, data)
    of_mistakes, of_companions = np.stack((predictions[wrong], labels[wrong]), axis=1), ranking[companions, :2]
    findings = Findings(
        metadata={
            **runs.metadata(run, data, evaluated.accuracy, accelerator.mixed_precision),
            **({"flip test": checks.square(run.recipe.get("augmentation"))} if asked.check else {}),
        },
        classes=data.classes,
        labels=labels,
        probabilities=probabilities,
        epochs=epochs,
        epoch_predictions=epoch_predictions,
        mistakes=evidence.attributions(network, data, wrong, of_mistakes, *how, last_stage),
        companions=evidence.attributions(network, data, companions, of_companions, *how, last_stage),
        companion_of=companion_of,
        method=asked.method,
        layer=layer,
        neighbours=neighbours.find(network, data, wrong, predictions) if asked.neighbours else None,
        wrong_in=wrong_in,
        robustness=corrupted,
        checks=checks.measure(network, data, wrong, predictions, *how, asked.seed) if asked.check else {},
    )

    # Pictures, the list of mistakes, and the report that holds everything.
    pictures, map_pictures = figures.draw(findings, chosen, asked)
    with runs.written_to(folder):
        output.publish(folder, output.contents(findings, pictures, map_pictures))
        output.write_events(run.events(folder), pictures, run.step)
    own = runs.own_accuracy(run, accelerator.mixed_precision)
    beside = f" (the run's own: {own})" if own else ""
    print(
        f"{len(labels):,} test images, {counted(len(wrong), 'mistake')}, accuracy {findings.accuracy:.2%}{beside}",
        *left_out,
        *([corrupted.line()] if corrupted else []),
        *filter(None, [Labels(data.classes).advice()]),
        f"see {folder / 'report.html'}",
        sep="\n",
    )


def main() -> None:
    with failure.command_line("explain.py"):
        asked = options.parse_command_line(sys.argv[1:])
        run = runs.open_run(asked.run_dir)
        options.check(asked, run)
        runs.check_output(asked.output or run.output)
        with failure.fail_together():
            explain(run, asked)


if __name__ == "__main__":
    main()
