"""From settings to a data set on disk.

Beside the files of its layout (see `layouts`) a set has

scenes.json        the scene graph of each picture, objects in painter's order
generated.json     the settings
classes.json       beside the annotations: the categories seen and unseen in training, if any are unseen
"""

import json
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from reference_model.files import InputError, written_whole
from reference_model.synthetic.config import GenerateConfig
from reference_model.synthetic.kinds import PRESETS, Preset
from reference_model.synthetic.program import Program, describe
from reference_model.synthetic.render import marked_ids, painted_ids, picture, polygons, visible_ids
from reference_model.synthetic.scene import Scene, outline_area, sample_scene
from reference_model.synthetic.targets import KINDS, describe_again, describe_any
from reference_model.synthetic.words import sentence
from reference_model.synthetic.writers import (
    HOLD_ONE,
    LAYOUTS,
    PICTURES,
    Made,
    refuse_missing,
    write_json,
)

VERSION = 1
"""Raise it with every change that alters a byte of what a config makes."""

VISIBLE = 0.7
"""Least visible fraction of any object; a scene that hides more is drawn anew."""

USUAL = {"targets": "one", "layout": None, "unseen": 0}
"""Settings that generated.json leaves out: they are younger than sets that lack them."""

LONGEST = 18
"""Most words of a sentence; what takes more is not said."""

References = dict[tuple[int, ...], list[tuple[str, Program]]]
"""Indices of the targets -> sentences and what they mean."""


class Job(NamedTuple):
    """One picture to make."""

    split: str
    index: int
    image_id: int


def generate(config: GenerateConfig) -> Path:
    """Write the data set that the settings describe, whole or not at all.

    Returns:
        The root. A root that already holds this very data set is left as it is.

    Raises:
        InputError: A setting is out of range; the root holds something else; it cannot be written.
    """
    config = _checked(config)
    if _is_up_to_date(config):
        print(f"{config.root}: up to date", file=sys.stderr)
        return config.root
    jobs = list(_jobs(config))
    with written_whole(config.root.resolve(), flush=False) as root:
        folder = root / PICTURES
        folder.mkdir(parents=True)
        with _mapping(config.workers) as mapping:
            made = mapping(partial(_make, config=config, folder=folder), jobs)
            pictures = list(tqdm(made, "pictures", len(jobs), file=sys.stderr, disable=None))
        refs, annotations, scenes = _numbered(jobs, pictures)
        preset = PRESETS[config.scenes]
        instances = _instances(config, jobs, annotations)
        beside = LAYOUTS[config.layout](root, Made(preset.dataset, preset.splits, refs, instances, scenes))
        if config.unseen:
            unseen = [preset.shapes.index(shape) + 1 for shape in preset.unseen(config.unseen)]
            seen = [id for id in range(1, len(preset.shapes) + 1) if id not in unseen]
            write_json(beside / "classes.json", {"seen": seen, "unseen": sorted(unseen)})
        write_json(root / "scenes.json", scenes)
        write_json(root / "generated.json", _settings(config))
    made = {
        "data": str(config.root),
        "pictures": len(jobs),
        "sentences": sum(len(ref["sent_ids"]) for ref in refs),
    }
    print(json.dumps(made) if config.json else "  ".join(f"{key}: {value}" for key, value in made.items()))
    return config.root


def _checked(config: GenerateConfig) -> GenerateConfig:
    """Refuse what is out of range, and fill in what was left open."""
    if config.scenes not in PRESETS:
        raise InputError(f"GenerateConfig: scenes must be one of {list(PRESETS)}, got {config.scenes!r}")
    preset = PRESETS[config.scenes]
    for field, low, high in (
        ("size", 32, 2048),
        ("train", 0, 10**7),
        ("val", 0, 10**7),
        ("test", 0, 10**7),
        ("unseen", 0, len(preset.shapes) - 2),
        ("seed", 0, 2**63 - 1),
        ("workers", 1, 256),
    ):
        value = getattr(config, field)
        if type(value) is not int or not low <= value <= high:
            raise InputError(
                f"GenerateConfig: {field} must be a whole number in [{low}, {high}], got {value!r}"
            )
    targets = config.targets or ("any" if preset.any_targets else "one")
    layout = config.layout or _usual_layout(targets)
    if targets not in ("one", "any"):
        raise InputError(f"GenerateConfig: targets must be one or any, got {targets!r}")
    if layout not in LAYOUTS:
        raise InputError(f"GenerateConfig: layout must be one of {list(LAYOUTS)}, got {layout!r}")
    if targets == "any" and layout in HOLD_ONE:
        others = [name for name in LAYOUTS if name not in HOLD_ONE]
        raise InputError(
            f"GenerateConfig: layout {layout} holds sentences about one object alone, but targets is any; "
            f"use layout {', '.join(others[:-1])} or {others[-1]}"
        )
    if not config.train + config.val + config.test:
        raise InputError("GenerateConfig: train, val and test are all 0, at least one must be 1 or more")
    refuse_missing(layout)
    return replace(config, targets=targets, layout=layout)


def _settings(config: GenerateConfig) -> dict[str, Any]:
    """All that the bytes depend on."""
    fields = asdict(config)
    if config.layout == _usual_layout(config.targets):
        fields["layout"] = None
    left_out = {"root", "workers", "json"} | {k for k, usual in USUAL.items() if fields[k] == usual}
    return {"version": VERSION} | {k: v for k, v in fields.items() if k not in left_out}


def _usual_layout(targets: str) -> str:
    return "refer" if targets == "one" else "grefer"


def _is_up_to_date(config: GenerateConfig) -> bool:
    root = config.root
    try:
        if not root.exists() or (root.is_dir() and not any(root.iterdir())):
            return False
        held = json.loads((root / "generated.json").read_text())
    except (OSError, ValueError):
        raise InputError(f"{root}: is there and was not made by generate; choose another root") from None
    asked = _settings(config)
    if held == asked:
        return True
    held, asked = (USUAL | found for found in (held if isinstance(held, dict) else {}, asked))
    differs = [f"{k}={held.get(k)!r} (asked for {v!r})" for k, v in asked.items() if held.get(k) != v]
    raise InputError(f"{root}: holds a set with {', '.join(differs)}; choose another root or remove this one")


def _jobs(config: GenerateConfig) -> Iterator[Job]:
    image_id = 0
    for split in PRESETS[config.scenes].splits:
        for index in range(config.test if split.startswith("test") else getattr(config, split)):
            image_id += 1
            yield Job(split, index, image_id)


@contextmanager
def _mapping(workers: int) -> Iterator[Any]:
    """Give a `map` that keeps the order, over so many processes."""
    if workers == 1:
        yield map
        return
    # Spawned rather than forked: the caller may hold the threads of torch.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            yield partial(pool.map, chunksize=32)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _make(job: Job, config: GenerateConfig, folder: Path) -> dict[str, Any]:
    """Make one picture: write it, and return its objects and references, not yet numbered."""
    rng = Random(f"{config.seed} {job.split} {job.index}")
    preset = PRESETS[config.scenes]
    if job.split == "train":
        preset = replace(preset, unsaid=preset.unseen(config.unseen))
    kinds = None if config.targets == "one" else rng.choices(list(KINDS), KINDS.values(), k=rng.randint(2, 4))
    while True:
        scene = sample_scene(preset, rng)
        painted = painted_ids(scene, config.size)
        ids = visible_ids(painted)
        seen = np.bincount(ids.ravel(), minlength=len(scene) + 1)[1:]
        whole = np.array([outline_area(item) for item in scene]) * config.size**2
        if (seen < VISIBLE * whole).any():
            continue
        free = [k for k, item in enumerate(scene) if item.shape in preset.targets(job.split)]
        refs = (
            _references(scene, free, preset, rng)
            if kinds is None
            else _of_kinds(kinds, scene, free, preset, rng)
        )
        if refs is not None:
            break
    image = picture(scene, marked_ids(scene, painted), rng)
    image.save(folder / _file_name(job.image_id), quality=92, subsampling=0)
    return {
        "objects": [item.stored() for item in scene],
        "annotations": [
            _annotation(ids == k + 1, preset.shapes.index(scene[k].shape)) for k in range(len(scene))
        ],
        "refs": refs,
    }


def _references(scene: Scene, free: list[int], preset: Preset, rng: Random) -> References | None:
    """Two to four targets, each one object and with one to three sentences; None where there are fewer.

    The family of the first sentence is drawn before its target, or few would be superlatives.
    """
    refs: References = {}
    for _ in range(rng.randint(2, 4)):
        found = _described(rng.sample(free, len(free)), scene, preset, rng)
        if found is None:
            break
        target, text, program = found
        free.remove(target)
        sentences = {text: program}
        for _ in range(rng.randint(0, 2)):
            again = _described([target], scene, preset, rng)
            if again is not None:
                sentences.setdefault(again.text, again.program)
        refs[target,] = list(sentences.items())
    return refs if len(refs) >= 2 else None


def _of_kinds(
    kinds: list[str], scene: Scene, free: list[int], preset: Preset, rng: Random
) -> References | None:
    """For each kind one to three sentences about one choice of targets; None where the scene has too few.

    The kinds are drawn before the scene, or those that few scenes have would be rare.
    """
    refs: dict[tuple[int, ...], dict[str, Program]] = {}
    for kind in kinds:
        unused_first = sorted(free, key=lambda k: rng.random() + ((k,) in refs))
        found = describe_any(kind, scene, unused_first, preset, rng)
        if found is None:
            return None
        targets, program = found
        text = _worded(program, rng)
        if text is None:
            return None
        sentences = refs.setdefault(targets, {})
        sentences.setdefault(text, program)
        for _ in range(rng.randint(0, 2)):
            again = describe_again(targets, scene, preset, rng)
            text = again and _worded(again.program, rng)
            if again is not None and text is not None:
                sentences.setdefault(text, again.program)
    return {targets: list(sentences.items()) for targets, sentences in refs.items()}


class Said(NamedTuple):
    """A sentence about one object."""

    target: int
    text: str
    program: Program


def _described(targets: list[int], scene: Scene, preset: Preset, rng: Random) -> Said | None:
    """Draw a family by weight and describe the first target it fits; where it fits none, draw again."""
    weights = dict(preset.families)
    while weights:
        family = rng.choices(list(weights), list(weights.values()))[0]
        for target in targets:
            program = describe(target, scene, family, preset, rng)
            text = program and _worded(program, rng)
            if program is not None and text is not None:
                return Said(target, text, program)
        del weights[family]
    return None


def _worded(program: Program, rng: Random) -> str | None:
    text = sentence(program, rng)
    return text if text.count(" ") < LONGEST else None


def _annotation(mask: np.ndarray, category: int) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left, bottom, right = int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
    crop = mask[top:bottom, left:right]
    shift = (left, top)
    return {
        "category_id": category + 1,
        "area": int(crop.sum()),
        "bbox": [left, top, right - left, bottom - top],
        "iscrowd": 0,
        "segmentation": [[v + shift[i % 2] for i, v in enumerate(ring)] for ring in polygons(crop)],
    }


def _file_name(image_id: int) -> str:
    return f"COCO_train2014_{image_id:012d}.jpg"


def _numbered(jobs: list[Job], pictures: list[dict[str, Any]]) -> tuple[list, list, list]:
    """Number objects, references and sentences from 1, in the order of the pictures."""
    refs: list[dict] = []
    annotations: list[dict] = []
    scenes: list[dict] = []
    sent_id = 0
    for job, made in zip(jobs, pictures):
        first_ann = len(annotations) + 1
        for k, annotation in enumerate(made["annotations"]):
            annotations.append({"id": first_ann + k, "image_id": job.image_id} | annotation)
        objects = [{"ann_id": first_ann + k} | item for k, item in enumerate(made["objects"])]
        scenes.append({"image_id": job.image_id, "split": job.split, "objects": objects})
        for targets, described in made["refs"].items():
            sentences = []
            for text, program in described:
                sent_id += 1
                words = {"tokens": text.split(), "raw": text, "sent_id": sent_id, "sent": text}
                sentences.append(words | {"program": program})
            found = [annotations[first_ann - 1 + target] for target in targets]
            refs.append(
                {
                    "sent_ids": [s["sent_id"] for s in sentences],
                    "file_name": _file_name(job.image_id),
                    "ann_id": [annotation["id"] for annotation in found],
                    "ref_id": len(refs) + 1,
                    "image_id": job.image_id,
                    "split": job.split,
                    "category_id": [annotation["category_id"] for annotation in found],
                    "sentences": sentences,
                }
            )
    return refs, annotations, scenes


def _instances(config: GenerateConfig, jobs: list[Job], annotations: list[dict]) -> dict[str, Any]:
    side = {"height": config.size, "width": config.size}
    shapes = PRESETS[config.scenes].shapes
    return {
        "info": {"description": "synthetic referring expressions", "version": str(VERSION)},
        "licenses": [{"id": 1, "name": "made by a program, free of rights", "url": ""}],
        "images": [
            {"id": j.image_id, "file_name": _file_name(j.image_id), "license": 1} | side for j in jobs
        ],
        "annotations": annotations,
        "categories": [
            {"id": k, "name": shape, "supercategory": "shape"} for k, shape in enumerate(shapes, start=1)
        ],
    }
