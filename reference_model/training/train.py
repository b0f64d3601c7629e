"""Train METRIS: parse -> data -> model, loss, optimiser -> resume -> loop -> evaluate -> checkpoint."""

import hashlib
import importlib.util
import math
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from reference_model.data.collate import Batch, Collate
from reference_model.data.dataset import ReferringDataset
from reference_model.data.datasets import read
from reference_model.data.readers.reader import Stream
from reference_model.data.sampler import ImageGroupedSampler, piece_size
from reference_model.data.streaming import ShardedDataset, ShardedLoader
from reference_model.files import InputError
from reference_model.model.build import build_metris
from reference_model.model.config import ModelConfig
from reference_model.model.loss import Losses, MetrisLoss
from reference_model.processes import outlive_sigterm
from reference_model.scoring.metris_predictor import MetrisPredictor
from reference_model.tokens import article_ids, build_tokenizer, load_tokenizer, report_overlong
from reference_model.training import distributed as scale
from reference_model.training.config import TrainConfig
from reference_model.training.journal import Log, Meter, progress_bar
from reference_model.training.learner import Learner
from reference_model.training.run import Run, claimed, digest, seed_process
from reference_model.training.schedule import polynomial_decay

_DRY_STEPS = 2


def train(config: TrainConfig) -> Path:
    """Run the command ``train`` and return the folder of the run: what evaluate and predict take.

    The same command goes on with a run that was killed, from the newest state that it saved.

    Raises:
        InputError: The config, the data or the place to write cannot be used.
        SystemExit: With code 0, on SIGTERM, once the state is saved.
    """
    _check_ranges(config)
    accelerator = scale.start_processes(config)
    with Stop() as stop, claimed(config, accelerator) as unfinished:
        return _train(config, accelerator, stop, unfinished=unfinished)


def _train(config: TrainConfig, accelerator: Accelerator, stop: "Stop", *, unfinished: bool) -> Path:
    torch.manual_seed(config.seed)

    # Data
    data = read(config.data)
    if data.streamed:
        if config.cache:
            raise InputError("cache: shards are streamed, and none of their images held; leave it out")
        records, val = Stream(data, config.train_split), Stream(data, config.val_split)
        # Now rather than at the first evaluation: is there such a split?
        sentences = data.sentences(config.train_split)
    else:
        records, val = data.records(config.train_split), data.records(config.val_split)
        sentences = (record.expression for record in records)
    if next(iter(val), None) is None:
        raise InputError(f"{config.data.root}: split {config.val_split} has no sentence to select weights by")
    tokenizer, model_config = _tokenizer(config.model, sentences)
    collate = Collate(tokenizer, model_config.max_tokens)
    pinned = accelerator.device.type == "cuda"
    groups = {"per_image": config.sentences_per_image, "seed": config.seed}
    share = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    if data.streamed:
        streamed = ShardedDataset(data, config.train_split, model_config.image_size, **groups, **share)
        loader = sampler = ShardedLoader(
            streamed,
            piece_size(config.batch_size, accelerator.num_processes, config.accumulate),
            collate,
            accumulate=config.accumulate,
            workers=config.data.workers,
            pin_memory=pinned,
        )
    else:
        image_ids = [record.image_id for record in records]
        sampler = ImageGroupedSampler(
            image_ids, config.batch_size, accumulate=config.accumulate, **groups, **share
        )
    steps = config.steps or config.epochs * sampler.steps

    # Model, loss, optimiser
    model = build_metris(model_config)
    if len(tokenizer) > model.text_encoder.vocab_size:
        sizes = f"{len(tokenizer)} entries, but the text encoder {model.text_encoder.vocab_size}"
        raise InputError(f"tokenizer: has {sizes}; give the vocabulary that came with its weights")
    # What the encoders turned out to be, wherever their weights came from: checkpoints build them from this.
    config = replace(config, model=model.config)
    learner = Learner(config, model, _loss(config), accelerator)
    predictor = MetrisPredictor(
        model,
        tokenizer,
        image_size=model_config.image_size,
        max_tokens=model_config.max_tokens,
        batch_size=max(1, 2 * config.batch_size // (accelerator.num_processes * config.accumulate)),
        workers=config.data.workers,
        device=accelerator.device,
        on_error=config.data.on_error,
    )

    if not data.streamed:
        # Not before all that may be refused: a cache takes its place on the disk at once.
        loader = DataLoader(
            ReferringDataset(
                records, model_config.image_size, cache=config.cache, on_error=config.data.on_error
            ),
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=config.data.workers,
            persistent_workers=config.data.workers > 0,
            pin_memory=pinned,
            worker_init_fn=outlive_sigterm,
            # Its own generator: otherwise each new iterator would shift the dropout of the run.
            generator=torch.Generator().manual_seed(config.seed),
        )

    # Resume
    # Of shards, what their index says: reading them all would take as long as an epoch.
    known = hashlib.sha256(str(data.shards).encode()).hexdigest() if data.streamed else digest(records, val)
    run = Run(config, accelerator, learner, sampler, predictor, val, known, steps)
    if unfinished:
        run.go_on()
    elif accelerator.process_index:
        seed_process(config.seed, accelerator.process_index)  # the first goes on as if it were alone
    if accelerator.is_main_process:
        first = list(islice(records, 1000)) if data.streamed else records
        report_overlong(tokenizer, [record.expression for record in first], model_config.max_tokens)
    run.begin()
    schedule = polynomial_decay(
        learner.optimiser,
        steps=steps,
        power=config.poly_power,
        warmup_steps=config.warmup_steps,
        done=run.step,
    )

    # Loop
    last = min(steps, _DRY_STEPS) if config.dry_run else steps
    meter = Meter(accelerator.device)
    bar = progress_bar(run.step, last, shown=accelerator.is_main_process)
    with bar, Log(run.log_path, done=run.step) as log:

        def evaluate() -> None:
            scores = run.evaluate()
            run.evaluation_due = False
            log.write(step=run.step, seconds=run.seconds, val=scores)
            accelerator.log({f"val/{name}": value for name, value in scores.items()}, step=run.step)

        if run.evaluation_due:
            evaluate()
            if run.step < steps:
                run.save()
        batches = meter.waiting(_steps_of(loader, config.accumulate))
        for step, micro_batches in zip(range(run.step + 1, last + 1), batches):
            means = learner.gradients(micro_batches)
            shared = scale.mean_over_processes(torch.cat([means, means.new_tensor([stop.asked])])).tolist()
            losses, stopping = Losses(*shared[:-1]), shared[-1] > 0
            norm = learner.clip().item()
            if math.isfinite(losses.total) and (math.isfinite(norm) or learner.settling):
                learner.update()
            else:
                run.leave_out(step, losses, norm, micro_batches)
                learner.leave_out()
            # Without the factors of the encoders, whichever group comes first.
            rate = config.learning_rate * schedule.lr_lambdas[0](schedule.last_epoch)
            schedule.step()
            epoch_ends = sampler.advance()
            run.step = step
            meter.count(sum(len(batch.images) for batch in micro_batches) * accelerator.num_processes)
            bar.update()
            if step % config.log_every == 0 or step == last:
                entry = {"learning_rate": rate, **losses._asdict(), "gradient_norm": norm, **meter.read()}
                bar.set_postfix_str(_shown(entry))
                log.write(step=step, seconds=run.seconds, **entry)
                accelerator.log(entry, step=step)

            # Evaluate, checkpoint
            due = epoch_ends and config.evaluate_every and sampler.epoch % config.evaluate_every == 0
            evaluating = (step == steps or due) and not config.dry_run
            if evaluating and stopping:
                run.evaluation_due = True  # it may take longer than there is time
            elif evaluating:
                evaluate()
                stopping = scale.mean_over_processes(means.new_tensor([float(stop.asked)])).item() > 0
            unfinished = step < steps or run.evaluation_due
            saving = evaluating or stopping or (config.save_every and step % config.save_every == 0)
            if saving and unfinished and not config.dry_run:
                run.save()
            if stopping and unfinished:
                run.leave()
            if evaluating or saving:
                meter.start()
    return run.foretell(meter) if config.dry_run else run.finish()


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


def _steps_of(loader: DataLoader | ShardedLoader, accumulate: int) -> Iterator[list[Batch]]:
    """Yield the micro-batches of one step after the other, epoch after epoch."""
    while True:
        waiting = iter(loader)
        while micro_batches := list(islice(waiting, accumulate)):
            yield micro_batches


def _shown(entry: dict[str, float]) -> str:
    return (
        f"loss={entry['total']:.3f}, lr={entry['learning_rate']:.1e}, "
        f"{entry['images_per_second']:.1f} images/s ({entry['data_wait']:.0%} waiting), "
        f"{entry['memory_MiB']} MiB"
    )


def _loss(config: TrainConfig) -> MetrisLoss:
    return MetrisLoss(
        contrastive_weight=config.contrastive_weight,
        temperature=config.contrastive_temperature,
        contrastive_rows=config.contrastive_rows,
        no_target_weight=config.no_target_weight,
    )


def _tokenizer(model: ModelConfig, sentences: Iterable[str]) -> tuple[PreTrainedTokenizerBase, ModelConfig]:
    """Take the tokenizer of the pretrained text encoder, or build one from the training sentences."""
    if model.pretrained or model.text_weights is not None:
        tokenizer = load_tokenizer(model.text_weights or model.text_encoder)
    else:
        tokenizer = build_tokenizer(sentences)
        model = replace(model, vocab_size=len(tokenizer))
    return tokenizer, replace(model, article_ids=article_ids(tokenizer))


def _check_ranges(config: TrainConfig) -> None:
    positive = ["epochs", "batch_size", "sentences_per_image", "learning_rate", "contrastive_temperature"]
    positive += ["accumulate", "keep_last", "keep_best", "log_every"]
    positive += [name for name in ("steps", "clip_norm") if getattr(config, name) is not None]
    for name in positive:
        if not 0 < getattr(config, name) < math.inf:
            raise InputError(f"{name}: must be > 0, got {getattr(config, name):g}")
    weights = ["weight_decay", "contrastive_weight", "no_target_weight"]
    weights += ["image_encoder_lr", "text_encoder_lr"]
    counts = ["warmup_steps", "evaluate_every", "save_every", "skip_nonfinite"]
    for name in (*weights, *counts, "poly_power"):
        if not 0 <= getattr(config, name) < math.inf:
            raise InputError(f"{name}: must be >= 0, got {getattr(config, name):g}")
    for name in ("train", "val"):
        split = getattr(config, f"{name}_split")
        if split not in (name, f"{name}_seen"):
            raise InputError(
                f"{name}_split: must be {name} or {name}_seen, got {split}; tests select nothing"
            )
    if config.ema_decay is not None and not 0 < config.ema_decay < 1:
        raise InputError(f"ema_decay: must be in (0, 1), got {config.ema_decay:g}; 0.999 is usual")
    for name, value in (("seed", config.seed), ("data.workers", config.data.workers)):
        if not 0 <= value < 2**31:
            raise InputError(f"{name}: must be in [0, 2^31), got {value}")
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        raise InputError(f"tracker {config.tracker}: is not installed; pip install {config.tracker}")
