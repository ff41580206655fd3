"""Trains an image classifier: recipe -> data -> network -> loop -> result.

    accelerate launch train.py                    # CIFAR-10
    accelerate launch train.py --recipe digits    # handwritten digits, no download
    python train.py --help

A run that was stopped, killed or crashed goes on with the same command, and ends with the same weights.
"""

from cifar import stop

stop.catch()  # first of all: torch takes seconds to import, and a stop request must not be lost meanwhile

import math  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402

from cifar import failure, run  # noqa: E402
from cifar.errors import UserError, outlive_readers  # noqa: E402
from cifar.recipes import Options, Recipe, parse_command_line  # noqa: E402

LOG_EVERY = 10  # steps between points in TensorBoard
FITTED = 5000  # training images that a network may look at before its first step


def train(recipe: Recipe, options: Options) -> None:
    """Trains, going on from the newest checkpoint if there is one, and writes the run directory."""
    # Imported here so that --help and a wrong flag are answered before torch has loaded.
    import torch
    from accelerate.utils import broadcast_object_list

    from cifar import attempt as attempts
    from cifar import checkpoint, launch, loop, models, optim, summary
    from cifar.data import loading, order, sampler
    from cifar.data.augment import normalize, resize
    from cifar.data.cache import open_data
    from cifar.tracking import Tracker

    began = time.monotonic()
    accelerator = launch.start(recipe.gradient_compression, options.deterministic)
    device, main, rank, ranks = (
        accelerator.device, accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    )  # fmt: skip
    launch.check_split(accelerator, recipe.global_batch_size, recipe.gradient_accumulation_steps)

    with launch.together(accelerator):
        if main:
            run.check(options.run, recipe, options.resume)
    finished = broadcast_object_list([run.finished(options.run) if main else ""])[0]
    if finished:
        if main:
            print(finished)
        launch.end(accelerator)
        return

    # Data: one process of each machine decodes the images, then all of them map what it wrote.
    with launch.together(accelerator):
        if accelerator.is_local_main_process:
            open_data(recipe.data)
    with launch.together(accelerator):
        data = open_data(recipe.data)
        training_images = loading.training_images(recipe, data, device)
    launch.data_is_open(accelerator)
    images = len(data.train_labels)
    total_steps = order.total_steps(images, recipe.epochs, recipe.global_batch_size)
    freeze_step = order.freeze_step(total_steps, recipe)

    def epochs_completed(step: int) -> int:
        return order.epochs_completed(step, images, recipe.global_batch_size)

    # Network and optimizer: from the seed, or from the checkpoint that rank 0 chooses for all.
    torch.manual_seed(recipe.seed)
    network = models.build(recipe.network, len(data.classes), recipe.dropout)
    models.fit(network, normalize(torch.from_numpy(data.train_images[:FITTED]), data.mean, data.std))
    network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = optim.build(network, recipe)
    attempt, chosen, evaluated = None, checkpoint.Chosen(), 0
    with launch.together(accelerator):
        if main:
            attempt = run.start(options, recipe, data.fingerprint, ranks)
            chosen = checkpoint.choose(options.run / "checkpoints", options.resume)
            history = run.History(attempt, chosen.step, data.test_labels)
            evaluated = history.last_epoch()
    number, chosen, evaluated = broadcast_object_list([attempt and attempt.number, chosen, evaluated])
    progress = checkpoint.Progress()
    with launch.together(accelerator):
        attempts.see(options.run, number)
        if chosen.path:
            progress = checkpoint.restore(chosen.path, network, optimizer, recipe, data.fingerprint)
    if progress.step > freeze_step:
        models.freeze(network)
    table = summary.table(network)
    model, stepper = accelerator.prepare(network, optimizer)  # `network` stays what is evaluated and saved
    launch.restore_scaler(accelerator, progress.scaler)
    launch.settle_buckets(accelerator, model, network)

    # Batches are augmented ahead by other processes, or on the device; an epoch's end does not interrupt them.
    shares = sampler.DistributedBatchSampler(recipe, images, progress.step, total_steps, rank, ranks)
    batches = loading.training_batches(training_images, shares, launch.loader_workers(), device)

    facts = {
        "network": recipe.network, "classes": data.classes, "mean": data.mean, "std": data.std,
        "recipe": recipe.model_dump(), "data_fingerprint": data.fingerprint,
        "world_size": ranks, "precision": accelerator.mixed_precision, "resumed_from": chosen.origin,
        "computed_on": launch.computed_on(accelerator),
    }  # fmt: skip
    tracker = None
    if attempt:
        tracker = Tracker(attempt, recipe, data, history, progress.step, total_steps)
        tracker.start(launch.topology(accelerator, recipe.global_batch_size), table, training_images)
        for line in chosen.passed_over:
            tracker.say(f"passed over a broken checkpoint: {line}")
        if chosen.path:
            tracker.say(f"attempt {attempt.number}: going on from {chosen.path}")
            for line in checkpoint.changes(chosen.path, facts, recipe.global_batch_size):
                tracker.say(line)
        run.write_status(attempt, "running", progress.step)
    with run.failure_recorded(options.run, attempt, number, progress):
        seconds_before, stopping = progress.seconds, False
        while True:
            # An epoch's end: its checkpoint is on disk already, so an evaluation that is cut short is made again.
            epoch = epochs_completed(progress.step)
            if progress.step and epoch > epochs_completed(progress.step - 1):
                if epoch > evaluated:
                    views = recipe.test_time_augmentation and progress.step == total_steps
                    evaluation = loop.evaluate(accelerator, network, data, views)
                    if evaluation is None:
                        stopping = True
                        break
                    if attempt and tracker:
                        attempt.check()
                        progress.seconds = seconds_before + time.monotonic() - began
                        rate = optim.lr_at(progress.step - 1, total_steps, recipe)
                        tracker.log_epoch(epoch, progress, rate, evaluation)
                progress.loss_sum, progress.correct, progress.seen = 0.0, 0, 0
            if progress.step == total_steps:
                break

            clock = time.perf_counter()
            batch, labels = next(batches)
            batch = resize(batch, order.image_size_at(progress.step, total_steps, recipe))
            if progress.step == freeze_step:
                models.freeze(network)
                model = launch.join(accelerator, network)
            learning_rate = optim.lr_at(progress.step, total_steps, recipe)
            optim.set_lr(optimizer, learning_rate)
            torch.manual_seed(order.generator_seed(recipe.seed, progress.step, rank))  # for dropout
            totals = loop.accumulate_gradients(accelerator, model, batch, labels, recipe)
            if not math.isfinite(totals.loss):
                last = checkpoint.newest(options.run / "checkpoints")[0]
                raise UserError(
                    f"loss {totals.loss} in step {progress.step + 1} at learning rate {learning_rate:.3g}; lower "
                    f"--peak-learning-rate in a new --run (last good checkpoint: {last or 'none yet'})"
                )
            log = (progress.step + 1) % LOG_EVERY == 0
            gradient_norm = loop.gradient_norm(accelerator, network) if log else math.nan
            with accelerator.autocast():  # for what an optimizer multiplies
                stepper.step()
            stepper.zero_grad()
            progress.count(recipe.global_batch_size, totals.loss, totals.correct)
            if tracker:
                tracker.count(recipe.global_batch_size, time.perf_counter() - clock)
                if attempt and log:
                    attempt.check()
                    tracker.log_step(progress.step, totals, learning_rate, gradient_norm, launch.memory_bytes(device))

            ends_epoch = epochs_completed(progress.step) > epochs_completed(progress.step - 1)
            if totals.stop or ends_epoch or progress.step % options.checkpoint_every == 0:
                with launch.together(accelerator):
                    if attempt:
                        progress.seconds = seconds_before + time.monotonic() - began
                        progress.scaler = launch.scaler_state(accelerator)
                        checkpoint.save(attempt, network, optimizer, progress, facts)
                        run.write_status(attempt, "running", progress.step)
            if totals.stop:
                stopping = True
                break

        launch.end(accelerator)
        if attempt and tracker and stopping:
            history.export()
            run.write_status(attempt, "preempted", progress.step, f"{stop.name() or 'another rank'} asked to stop")
            tracker.say(f"stopped on request after step {progress.step}; the same command goes on from there")
        elif attempt and tracker:
            final = history.epochs[-1]
            history.export()
            progress.seconds = seconds_before + time.monotonic() - began
            checkpoint.export(attempt, network, {**facts, "test_accuracy": final.test_accuracy})
            result = {
                "test_accuracy": final.test_accuracy,
                "test_accuracy_of_views": final.test_accuracy_of_views,
                "test_loss": final.test_loss,
                "images_per_second": tracker.images_per_second(),
                "seconds": progress.seconds,
                "steps": progress.step,
                "epochs": recipe.epochs,
                "world_size": ranks,
                "precision": accelerator.mixed_precision,
                "parameters": summary.parameter_count(network),
            }
            run.write_result(attempt, result)
            run.write_status(attempt, "finished", progress.step)
            tracker.finish(result)
    if tracker:
        tracker.close()


def main() -> None:
    """Reads the command line and trains; a user's mistake ends in one line and exit status 2."""
    outlive_readers()
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        recipe, options = parse_command_line(sys.argv[1:])
        with failure.shared():
            train(recipe, options)
        stop.ignore()
    except UserError as error:
        if speaks:
            print(f"train.py: {error.prefix}{error}", file=sys.stderr)
        failure.leave(error.status)
    failure.leave(0)


if __name__ == "__main__":
    main()
