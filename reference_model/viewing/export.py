"""Export a checkpoint: the model as one file for other programs, with the recipe for its inputs."""

import json

from reference_model.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from reference_model.files import InputError, refuse_unwritable
from reference_model.model.checkpoint import load_checkpoint
from reference_model.model.export import Agreement, save_exported
from reference_model.viewing.config import ExportConfig

RECIPE = {
    "image": "RGB / 255 less mean, by std; resized to a square of image_size, bilinearly and antialiased",
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "mask": "sigmoid of the logits, resized bilinearly to the photo, above threshold",
    "threshold": 0.5,
    "no_target_threshold": 0.5,
}


def export(config: ExportConfig) -> None:
    """Run the command ``export``.

    Raises:
        InputError: The checkpoint cannot be used or exported, or the place not written.
    """
    if config.out.suffix != f".{config.format}":
        raise InputError(f"out {config.out}: must end in .{config.format}, by which predict knows the format")
    refuse_unwritable(config.out)
    model = load_checkpoint(config.checkpoint).model
    found = save_exported(model, config.out, format=config.format, recipe=RECIPE)
    size = config.out.stat().st_size
    if config.json:
        print(json.dumps({"out": str(config.out), "bytes": size, **found._asdict()}))
    else:
        within = ", ".join(f"{name} within {value:.1g}" for name, value in found.differences.items())
        print(f"{config.out}: {size / 2**20:.1f} MiB, {within} of PyTorch's; {selection(found)}")


def selection(found: Agreement) -> str:
    """Say how the selections of a program and its model compare."""
    if "scores" not in found.differences:
        return "it selects nothing"
    if not found.turned:
        return f"the same tokens selected for all {found.sentences} sentences"
    return f"near ties turned, and logits not compared, in {found.turned} of {found.sentences} sentences"
