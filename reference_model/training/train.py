"""Train METRIS: parse -> data -> model, loss, optimiser -> resume -> loop -> evaluate -> checkpoint."""

import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator

from reference_model.checkpoints.checkpoint import Checkpoint, refuse_larger
from reference_model.configs import check_bounds
from reference_model.data.loading import micro_batches
from reference_model.model.build import build_metris
from reference_model.model.loss import MetrisLoss
from reference_model.scoring.metris_predictor import MetrisPredictor
from reference_model.tokens import report_overlong
from reference_model.training import distributed
from reference_model.training.config import TrainConfig
from reference_model.training.folder import lock_run_folder
from reference_model.training.journal import Log, Meter, progress_bar
from reference_model.training.learner import Learner
from reference_model.training.run import Run
from reference_model.training.schedule import polynomial_decay
from reference_model.training.training_data import open_training_data

_DRY_STEPS = 2


def train(config: TrainConfig) -> Path:
    """Run the command ``train`` and return the folder of the run: what evaluate and predict take.

    The same command resumes a run that was killed, from the newest state that it saved.

    Raises:
        InputError: The config, the data or the place to write cannot be used.
        SystemExit: With code 0, on SIGTERM, once the state is saved.
    """
    check_bounds(config)
    config.check()
    accelerator = distributed.start_processes(config)
    with Stop() as stop, lock_run_folder(config.out, accelerator, dry_run=config.dry_run) as interrupted:
        return _train(config, accelerator, stop, resume=interrupted)


def _train(config: TrainConfig, accelerator: Accelerator, stop: "Stop", *, resume: bool) -> Path:
    torch.manual_seed(config.seed)
    optim, every = config.optim, config.checkpointing.save_every

    # Data
    data = open_training_data(config, accelerator)
    loader, processes = data.loader, accelerator.num_processes
    steps = config.steps or config.epochs * loader.steps

    # Model, loss, optimiser
    model = build_metris(data.model)
    refuse_larger(data.tokenizer, model.config, "tokenizer")
    # What the encoders turned out to be, wherever their weights came from: checkpoints build them from this.
    config = replace(config, model=model.config)
    loss = MetrisLoss(
        contrastive_weight=config.loss.contrastive_weight,
        temperature=config.loss.contrastive_temperature,
        no_target_weight=config.loss.no_target_weight,
    )
    learner = Learner(config, model, loss, accelerator)
    predictor = MetrisPredictor.of(
        Checkpoint(model, data.tokenizer, model.config),
        batch_size=max(1, 2 * config.batch_size // (processes * loader.accumulate)),
        workers=config.data.workers,
        on_error=config.data.on_error,
    )

    # Resume
    run = Run(config, accelerator, learner, predictor, data, steps)
    run.resume() if resume else run.seed_processes()
    if accelerator.is_main_process:
        report_overlong(data.tokenizer, data.examples, model.config.max_tokens)
    run.begin()
    shape = {"steps": steps, "power": optim.poly_power, "warmup_steps": optim.warmup_steps}
    schedule = polynomial_decay(learner.optimiser, **shape, done=run.step)

    # Loop
    last = min(steps, _DRY_STEPS) if config.dry_run else steps
    meter = Meter(accelerator.device)
    bar = progress_bar(run.step, last, shown=accelerator.is_main_process)
    with bar, Log(run.log_path, done=run.step) as log:
        if run.evaluation_due:
            run.evaluate(log)
            if run.step < steps:
                run.save()
        for step, batches in zip(range(run.step + 1, last + 1), meter.waiting(micro_batches(loader))):
            report = learner.gradients(step, batches)
            learner.update(report)
            # Without the factors of the encoders, whichever group comes first.
            rate = optim.learning_rate * schedule.lr_lambdas[0](schedule.last_epoch)
            schedule.step()
            epoch_ends = loader.advance()
            run.step = step
            run.unread.append(report)
            meter.count(sum(len(batch.images) for batch in batches) * processes)
            bar.update()

            # What is read from the device is waited for, so that it is read where it is needed alone.
            due = epoch_ends and config.evaluate_every and loader.epoch % config.evaluate_every == 0
            evaluating = (step == steps or due) and not config.dry_run
            stopping = distributed.any_process(stop.asked)
            saving = evaluating or stopping or (every and step % every == 0)
            logging = step % config.logging.log_every == 0 or step == last
            if logging or saving or learner.checks_each_step:
                losses, norm = run.read_losses()
            if logging:
                entry = {"learning_rate": rate, **losses._asdict(), "gradient_norm": norm, **meter.read()}
                bar.set_postfix_str(_in_short(entry))
                log.write(step=step, seconds=run.seconds, **entry)
                accelerator.log(entry, step=step)

            # Evaluate, checkpoint
            if evaluating and stopping:
                run.evaluation_due = True  # it may take longer than there is time
            elif evaluating:
                run.evaluate(log)
                stopping = distributed.any_process(stop.asked)
            steps_left = step < steps or run.evaluation_due
            if saving and steps_left and not config.dry_run:
                run.save()
            if stopping and steps_left:
                run.leave()
            if evaluating or saving:
                meter.start()
    return run.estimate(meter) if config.dry_run else run.finish()


class Stop:
    """Take note of SIGTERM while a run is on, so that it can end where a step ends."""

    asked = False

    def __enter__(self) -> "Stop":
        # Python lets the main thread alone set handlers.
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self.main:
            signal.signal(signal.SIGTERM, self.before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def _in_short(entry: dict[str, float]) -> str:
    return (
        f"loss={entry['total']:.3f}, lr={entry['learning_rate']:.1e}, "
        f"{entry['images_per_second']:.1f} images/s ({entry['data_wait']:.0%} waiting), "
        f"{entry['memory_MiB']} MiB"
    )
