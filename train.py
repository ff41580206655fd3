"""Trains an image classifier: recipe -> data -> network -> loop -> result.

    accelerate launch train.py                    # CIFAR-10
    accelerate launch train.py --recipe digits    # handwritten digits, no download
    python train.py --help

A run that was stopped, killed or crashed resumes with the same command, and ends with the same weights if hardware,
libraries, number of processes and threads are the same (on a GPU with --deterministic).
"""

from cifar import stop

stop.catch()  # first: importing torch takes seconds, and a stop request must not be lost during that time

import sys  # noqa: E402

from cifar import failure  # noqa: E402
from cifar.recipes import Recipe, RunOptions, parse_command_line  # noqa: E402


def train(recipe: Recipe, options: RunOptions) -> None:
    """Trains, resuming from the newest checkpoint if there is one, and writes the run directory."""
    # Imported here so that --help and a wrong flag are answered before torch has loaded.
    import torch

    from cifar import evaluation, graph, launch, loop, models, optim
    from cifar.clock import Clock
    from cifar.data import loading
    from cifar.data.augment import resize
    from cifar.data.sampler import DistributedBatchSampler
    from cifar.record import TRAINING, WAITING, RunRecord, finished_before
    from cifar.schedule import Schedule

    clock = Clock()
    accelerator = launch.start(recipe.gradient_compression, options.deterministic)
    device, rank, ranks = accelerator.device, accelerator.process_index, accelerator.num_processes
    launch.check_split(accelerator, recipe.global_batch_size, recipe.gradient_accumulation_steps)
    if finished_before(accelerator, options, recipe):
        launch.end(accelerator)
        return

    clock.on("data")
    data, training_images = loading.open_on_all_ranks(accelerator, recipe)
    test_images = torch.from_numpy(data.test_images).to(device)
    schedule = Schedule(recipe, len(data.train_labels), options.checkpoint_every)

    # Network and optimizer: from the seed, or from the checkpoint that rank 0 chooses for all.
    clock.on("set-up")
    sample = loading.sample_images(data, device)
    network = models.create(recipe.network, len(data.classes), recipe.dropout, recipe.seed, sample)
    optimizer = optim.build(network, recipe)
    record = RunRecord(accelerator, options, recipe, data, schedule, clock)
    progress = record.resume(network, optimizer)
    if progress.step > schedule.freeze_step:
        models.freeze(network)
    model, prepared = launch.prepare(accelerator, network, optimizer, progress.scaler)  # evaluate and save `network`

    # Dataloader workers augment batches ahead of time, or the device does; epochs do not interrupt the stream.
    sampler = DistributedBatchSampler(recipe, schedule.images, progress.step, schedule.total_steps, rank, ranks)
    batches = loading.training_batches(training_images, sampler, launch.loader_workers(), device)
    record.start(network, training_images)
    own_work, delayed, stopping = loop.OwnWork(device), loop.DelayedMetrics(accelerator), False
    compute_gradients = graph.gradient_function(options.cuda_graph, accelerator, recipe, own_work, network, clock)
    with record.running(), record.profiled_steps() as profiler:
        while not stopping:
            # End of an epoch. Its checkpoint is already queued: an interrupted evaluation is repeated on resume.
            step = progress.step
            if schedule.completes_epoch(step):
                if schedule.epochs_completed(step) > record.evaluated:
                    tta = recipe.test_time_augmentation and step == schedule.total_steps
                    with clock.within("evaluation" if step < schedule.total_steps else "final evaluation"):
                        evaluated = evaluation.evaluate(accelerator, network, test_images, data, tta)
                    if evaluated is None:
                        stopping = True
                        break
                    record.log_epoch(evaluated, own_work.seconds())
                progress.begin_epoch()
            if step == schedule.total_steps:
                break

            clock.on(WAITING)
            own_work.begins()
            batch, labels = next(batches)
            clock.on(TRAINING)
            batch = resize(batch, schedule.image_size(step))
            if step == schedule.freeze_step:
                with clock.within("set-up"):
                    models.freeze(network)
                    model = launch.rewrap_ddp(accelerator, network)
            optim.set_lr(optimizer, schedule.learning_rate(step))
            graph.dropout_generator(device).manual_seed(schedule.generator_seed(step, rank))
            totals = compute_gradients(model, batch, labels, record.write_failed())
            norm = loop.gradient_norm(accelerator, network) if record.log_due() else None
            with accelerator.autocast():  # for Muon's matrix products
                prepared.step()
            prepared.zero_grad()
            progress.step += 1

            # On a GPU, metrics arrive a few steps late; before a checkpoint, wait for all of them.
            metrics = delayed.add(progress.step, totals, norm)
            if schedule.saves(progress.step) or any(each.stop for each in metrics):
                metrics += delayed.read()
            stopping = record.log_steps(metrics, own_work.elapsed())
            if stopping or schedule.saves(progress.step):
                record.save(network, optimizer)
            profiler.step()
        record.wait()
        record.finish(network, stopping)
        launch.end(accelerator)


def main() -> None:
    with failure.command_line("train.py"):
        recipe, options = parse_command_line(sys.argv[1:])
        with failure.fail_together():
            train(recipe, options)
        stop.ignore()


if __name__ == "__main__":
    main()
