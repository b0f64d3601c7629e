"""Train METRIS: parse -> data -> model -> loss, optimiser -> loop -> evaluate -> checkpoint."""

import json
import math
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from reference_model.configs import to_yaml
from reference_model.data.collate import Batch, Collate, ReferringDataset, report_overlong
from reference_model.data.layouts import read
from reference_model.data.streaming import ShardedDataset, ShardedLoader
from reference_model.files import InputError, written_whole
from reference_model.model.build import build_metris
from reference_model.model.checkpoint import GENERATED, WEIGHTS, pick_device, save_weights, start_checkpoint
from reference_model.model.config import ModelConfig
from reference_model.model.loss import MetrisLoss
from reference_model.model.text_encoder import article_ids, build_tokenizer, load_tokenizer
from reference_model.scoring.evaluate import Stream
from reference_model.scoring.evaluator import Evaluator
from reference_model.scoring.metris_predictor import MetrisPredictor
from reference_model.training.config import TrainConfig
from reference_model.training.sampler import ImageGroupedSampler
from reference_model.training.schedule import adamw, polynomial_decay


def train(config: TrainConfig) -> Path:
    """Run the command ``train`` and return the folder of the run: what evaluate and predict take.

    Raises:
        InputError: The config, the data or the place to write cannot be used.
    """
    _check_ranges(config)
    if (config.out / WEIGHTS).exists():
        raise InputError(
            f"{config.out}: holds the weights of a run already; choose another --out or remove it"
        )
    device = pick_device(config.device)
    torch.manual_seed(config.seed)

    # Data
    data = read(config.data)
    if data.streamed:
        if config.cache:
            raise InputError("cache: shards are streamed, and none of their images held; leave it out")
        records, val = Stream(data, "train"), Stream(data, "val")
        next(iter(val), None)  # now rather than at the first evaluation: is there such a split?
        sentences = data.sentences("train")
    else:
        records, val = data.records("train"), data.records("val")
        sentences = (record.expression for record in records)
    tokenizer, model_config = _tokenizer(config.model, sentences)
    collate = Collate(tokenizer, model_config.max_tokens)
    pinned = device.type == "cuda"
    groups = {"per_image": config.sentences_per_image, "seed": config.seed}
    if data.streamed:
        streamed = ShardedDataset(data, "train", model_config.image_size, **groups)
        loader = sampler = ShardedLoader(
            streamed, config.batch_size, collate, workers=config.data.workers, pin_memory=pinned
        )
    else:
        sampler = ImageGroupedSampler([record.image_id for record in records], config.batch_size, **groups)
        loader = DataLoader(
            ReferringDataset(
                records, model_config.image_size, cache=config.cache, on_error=config.data.on_error
            ),
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=config.data.workers,
            persistent_workers=config.data.workers > 0,
            pin_memory=pinned,
            # Its own generator: otherwise each new iterator would shift the dropout of the run.
            generator=torch.Generator().manual_seed(config.seed),
        )
    steps = config.steps or config.epochs * len(sampler)

    # Model, loss, optimiser
    model = build_metris(model_config).to(device, memory_format=torch.channels_last).train()
    model.tokenizer = tokenizer
    if len(tokenizer) > model.text_encoder.vocab_size:
        sizes = f"{len(tokenizer)} entries, but the text encoder {model.text_encoder.vocab_size}"
        raise InputError(f"tokenizer: has {sizes}; give the vocabulary that came with its weights")
    # What the encoders turned out to be, wherever their weights came from: checkpoints build them from this.
    model_config = model.config
    loss = MetrisLoss(
        contrastive_weight=config.contrastive_weight,
        temperature=config.contrastive_temperature,
        contrastive_rows=config.contrastive_rows,
        no_target_weight=config.no_target_weight,
    ).to(device)
    if config.share_temperature:
        extractor = model.guidance.extractor
        shared = None if extractor is None else extractor.aggregation.log_temperature
        if shared is None:
            raise InputError(
                "share_temperature: the model learns no temperature of Eq. 5 to share; set "
                "model.learn_aggregation_temperature=true and a model.guidance with ve"
            )
        loss.contrastive.log_temperature = shared
    optimiser = adamw([model, loss], learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    schedule = polynomial_decay(
        optimiser, steps=steps, power=config.poly_power, warmup_steps=config.warmup_steps
    )
    predictor = MetrisPredictor(
        model,
        tokenizer,
        image_size=model_config.image_size,
        max_tokens=model_config.max_tokens,
        batch_size=2 * config.batch_size,
        workers=config.data.workers,
        device=device,
        on_error=config.data.on_error,
    )
    first = list(islice(records, 1000)) if data.streamed else records
    report_overlong(tokenizer, first, model_config.max_tokens)
    start_checkpoint(config.out, to_yaml(replace(config, model=model_config)), tokenizer)
    root = config.data.root if config.data.root.is_dir() else config.data.root.parent
    if (root / GENERATED).is_file():
        with written_whole(config.out / GENERATED) as path:
            shutil.copyfile(root / GENERATED, path)

    # Loop
    best_scores: dict[str, float] = {}
    started = time.monotonic()
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    with Log(config.out / "log.jsonl") as log, tqdm(total=steps, desc="train", unit="step") as bar:
        for step, epoch_ends, batch in _batches(loader, sampler, steps):
            batch = batch.to(device)
            output = model(batch.images, batch.token_ids, batch.language_mask, batch.image_index)
            # An object may be too small for the resized mask: the records know better.
            absent = torch.tensor([record.no_target for record in batch.records], device=device)
            losses = loss(output, batch.masks, batch.language_mask, absent)
            if not torch.isfinite(losses.total):
                ids = [record.sent_id for record in batch.records]
                raise InputError(
                    f"step {step}: loss is {losses.total.item()} on sentences {ids}; lower learning_rate"
                )
            optimiser.zero_grad(set_to_none=True)
            losses.total.backward()
            if config.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            optimiser.step()
            rate = schedule.get_last_lr()[0]
            schedule.step()
            bar.update()
            if step % 10 == 0 or step == steps:
                entry = {name: value.item() for name, value in losses._asdict().items()}
                bar.set_postfix(loss=f"{entry['total']:.3f}", lr=f"{rate:.1e}")
                log.write(step=step, seconds=time.monotonic() - started, learning_rate=rate, **entry)

            # Evaluate, checkpoint
            due = epoch_ends and config.evaluate_every and sampler.epoch % config.evaluate_every == 0
            if step == steps or due:
                scores = Evaluator(on_error=config.data.on_error).score(predictor, val, title="val")
                log.write(step=step, seconds=time.monotonic() - started, val=scores)
                best_by = "gIoU" if "gIoU" in scores else "mIoU"  # the former where some have no target
                tqdm.write(
                    f"step {step}: val {best_by} {scores[best_by]:.4f}, oIoU {scores['oIoU']:.4f}", sys.stderr
                )
                if not best_scores or scores[best_by] > best_scores[best_by]:
                    best_scores = scores
                    save_weights(config.out, model)
    result = {"checkpoint": str(config.out), "steps": steps, "val": best_scores}
    print(
        json.dumps(result)
        if config.json
        else f"checkpoint: {config.out} (val {best_by} {best_scores[best_by]:.4f})"
    )
    return config.out


class Log:
    """A file of one JSON object a line, each on disk as soon as it is written."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, **entry: Any) -> None:
        """Append one entry."""
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()


def _batches(
    loader: DataLoader | ShardedLoader, sampler: ImageGroupedSampler | ShardedLoader, steps: int
) -> Iterator[tuple[int, bool, Batch]]:
    """Yield (step from 1, whether it ends an epoch, batch) until ``steps`` are done."""
    step = 0
    while True:
        for i, batch in enumerate(loader, start=1):
            step += 1
            ends = i == len(sampler)
            sampler.epoch += ends
            yield step, ends, batch
            if step == steps:
                return


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
    positive += [name for name in ("steps", "clip_norm") if getattr(config, name) is not None]
    for name in positive:
        if not 0 < getattr(config, name) < math.inf:
            raise InputError(f"{name}: must be > 0, got {getattr(config, name):g}")
    weights = ["weight_decay", "contrastive_weight", "no_target_weight"]
    for name in (*weights, "warmup_steps", "evaluate_every", "poly_power"):
        if not 0 <= getattr(config, name) < math.inf:
            raise InputError(f"{name}: must be >= 0, got {getattr(config, name):g}")
    for name, value in (("seed", config.seed), ("data.workers", config.data.workers)):
        if not 0 <= value < 2**31:
            raise InputError(f"{name}: must be in [0, 2^31), got {value}")
