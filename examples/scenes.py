"""What the examples share: a handful of procedural scenes in memory, and fifty steps of training.

Each picture comes twice, with sentences about two of its objects: who does not listen cannot learn both.
"""

from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metris_blocks import PixelContrastiveLoss
from reference_model.data.transforms import image_pixels
from reference_model.synthetic.kinds import PRESETS
from reference_model.synthetic.program import describe
from reference_model.synthetic.render import painted_ids, picture, visible_ids
from reference_model.synthetic.scene import sample_scene
from reference_model.synthetic.words import VOCABULARY, sentence

SIZE = 64
IDS = {word: i for i, word in enumerate(["<pad>", "<end>", *sorted(VOCABULARY)])}


class Scenes(NamedTuple):
    """A batch; two samples in a row are of one picture."""

    image: Tensor
    """(b, 3, 64, 64), ImageNet-normalised."""
    words: Tensor
    """(b, l) int64, each sentence closed by <end>, then padded."""
    mask: Tensor
    """(b, l) bool; True = real word."""
    target: Tensor
    """(b, 64, 64) of 0 and 1."""


def make_scenes(pictures: int = 4, seed: int = 0) -> Scenes:
    """Draw scenes, two objects of each described by shape and colour."""
    rng, preset, samples = Random(seed), PRESETS["easy"], []
    while len(samples) < 2 * pictures:
        scene = sample_scene(preset, rng)
        programs = [describe(k, scene, "attribute", preset, rng) for k in (0, 1)]
        if None in programs:
            continue
        painted = painted_ids(scene, SIZE)
        image = image_pixels(picture(scene, painted, rng), SIZE) / 127.5 - 1
        for k, program in enumerate(programs):
            words = [IDS[word] for word in sentence(program, rng).split()] + [IDS["<end>"]]
            samples.append((image, torch.tensor(words), torch.from_numpy(visible_ids(painted) == k + 1)))
    images, sentences, targets = zip(*samples)
    words = nn.utils.rnn.pad_sequence(sentences, batch_first=True)
    lengths = torch.tensor(np.array([len(words) for words in sentences]))
    mask = torch.arange(words.shape[1]) < lengths[:, None]
    return Scenes(torch.stack(images), words, mask, torch.stack(targets).float())


def mask_loss(model: nn.Module, scenes: Scenes) -> Tensor:
    """Binary cross-entropy of the logits (b, h, w) that a model gives, at the size of the targets."""
    logits = model(scenes.image, scenes.words, scenes.mask)
    logits = F.interpolate(logits[:, None], scenes.target.shape[1:], mode="bilinear", align_corners=False)
    return F.binary_cross_entropy_with_logits(logits[:, 0], scenes.target)


def fit(model: nn.Module, scenes: Scenes, *, steps: int = 50, learning_rate: float = 3e-3) -> list[float]:
    """Train on all scenes at once; give the loss before each step.

    Where a model has an ``extractor``, the scores of its global cue have their own loss (Eq. 4).
    """
    optimizer = torch.optim.AdamW(model.train().parameters(), learning_rate)
    contrast, losses, heard = PixelContrastiveLoss(), [], []
    extractor = getattr(model, "extractor", nn.Identity())
    with extractor.register_forward_hook(lambda *call: heard.append(call[-1])):
        for _ in range(steps):
            loss = mask_loss(model, scenes)
            while heard:
                loss = loss + contrast(heard.pop().scores[:, 0], scenes.target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def main(model: nn.Module) -> None:
    """Train a model and say how it went."""
    losses = fit(model, make_scenes())
    print(f"{type(model).__name__}: loss {losses[0]:.3f}, after {len(losses)} steps {losses[-1]:.3f}")
