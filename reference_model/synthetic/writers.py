"""The same made set in the layouts of the benchmarks; written by the layouts' own rules, not by our readers.

refer           <dataset>/refs(unc).p, <dataset>/instances.json     RefCOCO, RefCOCO+; G-Ref: refs(umd).p
grefer          grefcoco/grefs(unc).json, grefcoco/instances.json   gRefCOCO
grefer-pickle   grefcoco/grefs(unc).p, grefcoco/instances.json
refzom          ref-zom/refs(final).p, ref-zom/instances.json       Ref-ZOM
cris            anns/<set>/<split>.json, masks/<set>/<ref_id>.png   CRIS, ETRIS, CGFormer
parquet         data/<split>-00000-of-00001.parquet                 jxu124/refcoco on the Hub
jsonl           data.jsonl                                          our own

The pictures are in `PICTURES` throughout. In REFER's layouts, each sentence also carries its `program`.
"""

import json
import pickle
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from reference_model.files import InputError
from reference_model.synthetic.render import painted_ids, visible_ids
from reference_model.synthetic.scene import SceneObject

PICTURES = "images/train2014"


class Made(NamedTuple):
    """A data set, whatever its layout."""

    dataset: str
    """The benchmark whose name it bears where each sentence is about one object."""
    splits: tuple[str, ...]
    refs: list[dict[str, Any]]
    """As REFER's; `ann_id` and `category_id` are lists, empty where there is no target."""
    instances: dict[str, Any]
    """COCO; every object of every picture is annotated, targets or not."""
    scenes: list[dict[str, Any]]
    """Objects of each picture, in painter's order."""


def _refer(root: Path, made: Made) -> Path:
    """One annotation a ref; the file name ends in its number, and is no file's."""
    refs = []
    for ref in made.refs:
        (ann_id,), (category_id,) = ref["ann_id"], ref["category_id"]
        file_name = ref["file_name"].replace(".jpg", f"_{ann_id}.jpg")
        refs.append(ref | {"file_name": file_name, "ann_id": ann_id, "category_id": category_id})
    split_by = "umd" if made.dataset == "refcocog" else "unc"
    return _beside_instances(root / made.dataset, f"refs({split_by}).p", refs, made)


def _grefer(root: Path, made: Made, suffix: str = "json") -> Path:
    """Lists of annotations, [-1] for none."""
    refs = [
        ref
        | {"ann_id": ref["ann_id"] or [-1], "category_id": ref["category_id"] or [-1]}
        | {"no_target": not ref["ann_id"]}
        for ref in made.refs
    ]
    return _beside_instances(root / "grefcoco", f"grefs(unc).{suffix}", refs, made)


def _grefer_pickle(root: Path, made: Made) -> Path:
    return _grefer(root, made, "p")


def _refzom(root: Path, made: Made) -> Path:
    """A number for one annotation, a list for others; `source` says which."""
    refs = []
    for ref in made.refs:
        source = {0: "zero", 1: "one"}.get(len(ref["ann_id"]), "many")
        target = {key: ref[key][0] if source == "one" else ref[key] for key in ("ann_id", "category_id")}
        refs.append(ref | target | {"source": source})
    return _beside_instances(root / "ref-zom", "refs(final).p", refs, made)


def _beside_instances(folder: Path, name: str, refs: list[dict[str, Any]], made: Made) -> Path:
    folder.mkdir()
    # Through JSON and back: pickle writes an object once however often it occurs, and which strings are one
    # object would otherwise depend on the number of workers.
    plain = json.loads(json.dumps(refs))
    if name.endswith(".p"):
        (folder / name).write_bytes(pickle.dumps(plain, protocol=2))
    else:
        write_json(folder / name, plain)
    write_json(folder / "instances.json", made.instances)
    return folder


def _cris(root: Path, made: Made) -> Path:
    """One JSON a split, one PNG a ref; `cat` counts the categories from 0, boxes are corners."""
    name = "refcocog_u" if made.dataset == "refcocog" else made.dataset
    anns, masks = root / "anns" / name, root / "masks" / name
    anns.mkdir(parents=True)
    masks.mkdir(parents=True)
    entries: dict[str, list[dict[str, Any]]] = {split: [] for split in made.splits}
    scenes = {scene["image_id"]: scene["objects"] for scene in made.scenes}
    boxes = {annotation["id"]: annotation["bbox"] for annotation in made.instances["annotations"]}
    size = made.instances["images"][0]["height"]
    for ref in made.refs:
        (ann_id,), (category_id,) = ref["ann_id"], ref["category_id"]
        x, y, width, height = boxes[ann_id]
        sentences = [
            {"idx": k, "sent_id": said["sent_id"], "sent": said["sent"]}
            for k, said in enumerate(ref["sentences"])
        ]
        entries[ref["split"]].append(
            {
                "bbox": [x, y, x + width, y + height],
                "cat": category_id - 1,
                "segment_id": ref["ref_id"],
                "img_name": ref["file_name"],
                "sentences": sentences,
                "sentences_num": len(sentences),
            }
        )
        items = [SceneObject(**{k: o[k] for k in o if k != "ann_id"}) for o in scenes[ref["image_id"]]]
        number = 1 + [o["ann_id"] for o in scenes[ref["image_id"]]].index(ann_id)
        mask = visible_ids(painted_ids(items, size)) == number
        Image.fromarray(mask.astype("uint8") * 255).save(masks / f"{ref['ref_id']}.png")
    for split, content in entries.items():
        if content:
            write_json(anns / f"{split}.json", content)
    return root / "anns"


def refuse_missing(layout: str) -> None:
    """Find out before long work whether what a layout takes is installed.

    Raises:
        InputError: It is not.
    """
    if layout == "parquet" and find_spec("pyarrow") is None:
        raise InputError("layout parquet needs pyarrow; pip install 'metris-blocks[data]'")


def _parquet(root: Path, made: Made) -> Path:
    """One row a ref, COCO's entries as JSON texts; val is called validation, testA test."""
    from pyarrow import Table, parquet

    folder = root / "data"
    folder.mkdir()
    annotations = {annotation["id"]: annotation for annotation in made.instances["annotations"]}
    images = {image["id"]: image for image in made.instances["images"]}
    for split in made.splits:
        rows = [
            _row(ref, annotations[ref["ann_id"][0]], images[ref["image_id"]], made.dataset)
            for ref in made.refs
            if ref["split"] == split
        ]
        if rows:
            name = {"val": "validation", "testA": "test"}.get(split, split)
            parquet.write_table(Table.from_pylist(rows), folder / f"{name}-00000-of-00001.parquet")
    return root


def _row(
    ref: dict[str, Any], annotation: dict[str, Any], image: dict[str, Any], dataset: str
) -> dict[str, Any]:
    said = [{key: s[key] for key in ("raw", "sent", "sent_id", "tokens")} for s in ref["sentences"]]
    x, y, width, height = map(float, annotation["bbox"])
    return {
        "sent_ids": ref["sent_ids"],
        "file_name": ref["file_name"].replace(".jpg", f"_{annotation['id']}.jpg"),
        "ann_id": annotation["id"],
        "ref_id": ref["ref_id"],
        "image_id": ref["image_id"],
        "split": ref["split"],
        "sentences": said,
        "category_id": annotation["category_id"],
        "raw_anns": json.dumps(annotation),
        "raw_image_info": json.dumps(image),
        "raw_sentences": json.dumps(said),
        "image_path": f"coco/train2014/{ref['file_name']}",
        "bbox": [x, y, x + width, y + height],
        "captions": [s["sent"] for s in said],
        "global_image_id": f"coco.{ref['image_id']}",
        "anns_id": f"{dataset}.{annotation['id']}",
    }


def _jsonl(root: Path, made: Made) -> Path:
    """One line a ref; lists where there are several, null where there is nothing."""
    outlines = {annotation["id"]: annotation["segmentation"] for annotation in made.instances["annotations"]}
    sides = {image["id"]: (image["height"], image["width"]) for image in made.instances["images"]}
    with (root / "data.jsonl").open("w", encoding="utf-8") as lines:
        for ref in made.refs:
            height, width = sides[ref["image_id"]]
            rings = [ring for ann_id in ref["ann_id"] for ring in outlines[ann_id]]
            line = {
                "image": f"{PICTURES}/{ref['file_name']}",
                "expression": _one_or_all([said["sent"] for said in ref["sentences"]]),
                "mask": rings or None,
                "split": ref["split"],
                "height": height,
                "width": width,
                "image_id": ref["image_id"],
                "ref_id": ref["ref_id"],
                "sent_id": _one_or_all(ref["sent_ids"]),
                "ann_id": _one_or_all(ref["ann_id"]),
                "category_id": _one_or_all(ref["category_id"]),
            }
            lines.write(json.dumps(line, separators=(",", ":")) + "\n")
    return root


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


LAYOUTS: dict[str, Callable[[Path, Made], Path]] = {
    "refer": _refer,
    "grefer": _grefer,
    "grefer-pickle": _grefer_pickle,
    "refzom": _refzom,
    "cris": _cris,
    "parquet": _parquet,
    "jsonl": _jsonl,
}
"""Name -> what writes it below a root; returns the folder in which readers look for lists of classes."""

HOLD_ONE = ("refer", "cris", "parquet")
"""Layouts whose every ref has exactly one target."""
