"""What a run trains on and selects weights by: tokenizer, batches, validation split, fingerprint."""

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import NamedTuple

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from reference_model.data.collate import Collate
from reference_model.data.dataset import ReferringDataset
from reference_model.data.datasets import read
from reference_model.data.loading import ListedLoader, Loader
from reference_model.data.readers.reader import Split
from reference_model.data.readers.shards import Shards
from reference_model.data.records import Record
from reference_model.data.sampler import ImageGroupedSampler, piece_size
from reference_model.data.streaming import ShardedDataset, ShardedLoader
from reference_model.files import InputError
from reference_model.model.config import ModelConfig
from reference_model.tokens import article_ids, build_tokenizer, load_tokenizer
from reference_model.training.config import TrainConfig


class TrainingData(NamedTuple):
    """What `open_training_data` gives."""

    tokenizer: PreTrainedTokenizerBase
    model: ModelConfig
    """The network, with the vocabulary of the tokenizer."""
    loader: Loader
    val: Split
    """Selects the weights."""
    fingerprint: str
    """Hash of all sentences; of shards, of their index: reading them would take as long as an epoch."""
    examples: list[str]
    """Training sentences: all of them, of shards the first 1000."""


def open_training_data(config: TrainConfig, accelerator: Accelerator) -> TrainingData:
    """Open the data of a run, before its model is built.

    Raises:
        InputError: There is no such split, it is empty, or a batch cannot be shared by the processes.
    """
    reader = read(config.data)
    if reader.streamed and config.cache:
        raise InputError("cache: shards are streamed, and none of their images held; leave it out")
    train, val = reader.split(config.train_split), reader.split(config.val_split)
    val.refuse_empty("weights are selected by it")
    # The vocabulary of shards lies in their index.
    listed = train.listed is not None
    sentences = [r.expression for r in train] if listed else reader.sentences(train.name)
    tokenizer, model = _tokenizer(config.model, sentences)
    options = {
        "collate": Collate(tokenizer, model.max_tokens),
        "workers": config.data.workers,
        "pin_memory": accelerator.device.type == "cuda",
    }
    order = {
        "per_image": config.sentences_per_image,
        "seed": config.seed,
        "rank": accelerator.process_index,
        "world": accelerator.num_processes,
    }
    accumulate = config.parallel.accumulate
    if isinstance(reader, Shards):
        piece = piece_size(config.batch_size, accelerator.num_processes, accumulate)
        dataset = ShardedDataset(reader, train.name, model.image_size, **order)
        loader: Loader = ShardedLoader(dataset, piece, accumulate=accumulate, **options)
        fingerprint = hashlib.sha256(str(reader.shards).encode()).hexdigest()
    else:
        image_ids = [record.image_id for record in train]
        sampler = ImageGroupedSampler(image_ids, config.batch_size, accumulate=accumulate, **order)
        images = {"cache": config.cache, "on_error": config.data.on_error}
        made = partial(ReferringDataset, train.listed, model.image_size, **images)
        loader = ListedLoader(made, sampler, **options)
        fingerprint = digest(train, val)
    examples = sentences if listed else [r.expression for r in islice(train, 1000)]
    return TrainingData(tokenizer, model, loader, val, fingerprint, examples)


def digest(*splits: Iterable[Record]) -> str:
    """Hash the ids and sentences of splits, in their order."""
    found = hashlib.sha256()
    for records in splits:
        for record in records:
            found.update(f"{record.sent_id} {record.image_id} {record.expression}\n".encode())
        found.update(b"\0")
    return found.hexdigest()


def _tokenizer(model: ModelConfig, sentences: Iterable[str]) -> tuple[PreTrainedTokenizerBase, ModelConfig]:
    """Take the tokenizer of the pretrained text encoder, or build one from the training sentences."""
    if model.pretrained or model.text_weights is not None:
        tokenizer = load_tokenizer(model.text_weights or model.text_encoder)
    else:
        tokenizer = build_tokenizer(sentences)
        model = replace(model, vocab_size=len(tokenizer))
    return tokenizer, replace(model, article_ids=article_ids(tokenizer))
