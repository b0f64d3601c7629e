"""How fast are data and scoring: images, masks, readers, metrics, each beside what no way can avoid?

    python -m benchmarks.data             # tables in Markdown
    python -m benchmarks.data --write     # the README's table too

480 px, one core. Pictures are 640 x 480 JPEGs with noise, so that decoding costs what it does on photographs.
A ratio is the median over interleaved rounds; above 1 is slower than what stands beside it.
"""

import argparse
import json
import os
import pickle
import statistics
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from benchmarks.measure import ratio
from benchmarks.report import between
from reference_model.cost import device_name, latencies
from reference_model.data.config import ConvertConfig, DataConfig
from reference_model.data.convert import convert
from reference_model.data.dataset import ReferringDataset
from reference_model.data.datasets import read
from reference_model.data.records import Record
from reference_model.scoring.curves import histogram
from reference_model.scoring.outcome import outcome
from reference_model.synthetic.config import GenerateConfig
from reference_model.synthetic.generate import generate

SIZE, HEIGHT, WIDTH = 480, 480, 640
EPOCHS = 40  # the paper's
MARKS = ("<!-- data benchmarks: begin -->", "<!-- data benchmarks: end -->")


class Row(NamedTuple):
    """One line of the table."""

    what: str
    ms: float
    beside: str
    ratio: float


def image_rows(folder: Path, rounds: int) -> list[Row]:
    """Time items of the training set beside their image's decoding."""
    path = folder / "photo.jpg"
    _photo().save(path, quality=92)
    corners = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    outlines = [
        np.stack([320 + r * np.cos(corners), 240 + r * np.sin(corners)], axis=1).ravel().tolist()
        for r in (60, 90, 120, 150, 180)
    ]
    ids = {"split": "train", "image_id": 1, "category_id": 1}
    records = [
        Record(path, HEIGHT, WIDTH, "it", [outline], ref_id=i, ann_id=i, sent_id=i, **ids)
        for i, outline in enumerate(outlines)
    ]
    dataset, polygons = ReferringDataset(records, SIZE), records[0].segmentation
    probability = np.random.default_rng(0).random((SIZE, SIZE), dtype=np.float32)
    truth = probability > 0.7

    def decode() -> Image.Image:
        with Image.open(path) as image:
            return image.convert("RGB")

    def again() -> None:
        for _ in range(EPOCHS):
            decode()

    def epochs() -> torch.Tensor:
        cached = ReferringDataset(records[:1], SIZE, cache=True)
        for _ in range(EPOCHS):
            (item,) = cached.__getitems__([0])
        return item.image

    def resize() -> object:
        return decode().resize((SIZE, SIZE), Image.Resampling.BILINEAR)

    def fill() -> object:
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, HEIGHT, WIDTH)))

    require(np.array_equal(fill(), records[0].mask()), "mask", "pycocotools")
    require(epochs().equal(dataset[0].image), "cache", "the image")
    require(histogram(probability, truth)[1].sum() == truth.sum(), "histogram", "the mask")
    return _rows(
        rounds,
        ("image, one sentence", lambda: dataset.__getitems__([0]), "decoding by Pillow", decode),
        ("image, one sentence", lambda: dataset.__getitems__([0]), "decoding and resizing by Pillow", resize),
        (f"the same with --cache, {EPOCHS} epochs", epochs, f"decoding by Pillow, {EPOCHS} times", again),
        (
            "image, masks, five sentences",
            lambda: dataset.__getitems__(range(5)),
            "decoding by Pillow",
            decode,
        ),
        ("mask of polygons", records[0].mask, "pycocotools alone", fill),
        ("IoU and P@X of a sentence", lambda: outcome(truth, truth), "filling its mask", fill),
        ("precision-recall histogram", lambda: histogram(probability, truth), "filling its mask", fill),
    )


def reader_rows(folder: Path, pictures: int, rounds: int) -> list[Row]:
    """Time reading a whole data set beside the unsafe unpickling of the same references and annotations."""
    made = generate(GenerateConfig(root=folder / "refer", scenes="standard", train=pictures, val=0, test=0))
    files = made / "refcoco/refs(unc).p", made / "refcoco/instances.json"
    places = {"REFER": made}
    for layout in ("cris", "parquet"):
        config = GenerateConfig(
            root=folder / layout, scenes="standard", layout=layout, train=pictures, val=0, test=0
        )
        places[layout] = generate(config)
    places["JSONL"] = convert(ConvertConfig(DataConfig(made), made / "data.jsonl"))
    places["shards"] = convert(ConvertConfig(DataConfig(made), folder / "shards"))

    def plain() -> object:
        return pickle.loads(files[0].read_bytes()), json.loads(files[1].read_bytes())

    def whole(root: Path) -> Callable[[], object]:
        return lambda: sum(1 for _ in read(DataConfig(root)).stream("train"))

    sentences = whole(made)()
    for name, root in places.items():
        require(whole(root)() == sentences, name, "REFER")
    ways = [
        (f"{name}, {sentences} sentences", whole(root), "pickle and json alone", plain)
        for name, root in places.items()
    ]
    return _rows(rounds, *ways)


def memory_rows(folder: Path, pictures: int) -> list[tuple[str, float, float]]:
    """Give (layout, MiB at its peak, times as much with four times the samples) of streams."""
    found = []
    for layout in ("parquet", "shards"):
        peaks = []
        for count in (pictures, 4 * pictures):
            root = folder / f"{layout}{count}"
            usual = "refer" if layout == "shards" else layout
            config = GenerateConfig(
                root=root, scenes="standard", layout=usual, train=count, val=0, test=0, workers=2
            )
            generate(config)
            if layout == "shards":
                root = convert(ConvertConfig(DataConfig(root), folder / f"tar{count}", shard_size=1))
            peaks.append(_peak(root))
        found.append((layout, peaks[0] / 2**20, peaks[1] / peaks[0]))
    return found


def _peak(root: Path) -> int:
    reader = read(DataConfig(root))
    tracemalloc.start()
    for _ in reader.stream("train"):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def require(same: bool, what: str, other: str) -> None:
    """Refuse to time what is not the same thing.

    Raises:
        ValueError: It is not.
    """
    if not same:
        raise ValueError(f"{what}: differs from {other}; no row without truth")


def _photo() -> Image.Image:
    """A smooth picture with grain: a JPEG of 480 x 640 of about 130 KiB, as COCO's are."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float32)
    grain = random.normal(0, 8, (HEIGHT, WIDTH, 3))
    return Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))


def _rows(rounds: int, *given: tuple[str, Callable, str, Callable]) -> list[Row]:
    """Time pairs of calls in turns."""
    found = []
    for what, call, beside, other in given:
        times = latencies({what: call, beside: other}, range(rounds + 1), torch.device("cpu"))
        ms = statistics.median(times[what])
        found.append(Row(what, ms, beside, ratio(times[what], times[beside])))
    return found


def tables(rounds: int, pictures: int) -> str:
    """Measure everything and lay it out in Markdown."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = image_rows(Path(folder), rounds) + reader_rows(Path(folder), pictures, max(3, rounds // 5))
        peaks = memory_rows(Path(folder), pictures)
    lines = [
        f"{device_name(torch.device('cpu'))}, one core; images of 640 x 480 to 480 px, "
        f"{pictures} pictures to read.",
        "",
        "| what | ms | beside | ratio |",
        "|---|---|---|---|",
        *(f"| {row.what} | {row.ms:.3g} | {row.beside} | {row.ratio:.2f} |" for row in rows),
        "",
        "| streamed | peak MiB | with four times the samples |",
        "|---|---|---|",
        *(f"| {layout} | {mib:.1f} | x {times:.2f} |" for layout, mib, times in peaks),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25, help="interleaved rounds")
    parser.add_argument("--pictures", type=int, default=200, help="pictures of the sets that are read")
    parser.add_argument("--write", action="store_true", help="rewrite the README's table")
    options = parser.parse_args()
    text = tables(options.rounds, options.pictures)
    print(text)
    if options.write:
        readme = Path(__file__).parents[1] / "README.md"
        part = readme.with_suffix(".part")
        part.write_text(between(readme.read_text(), text, *MARKS))
        os.replace(part, readme)
