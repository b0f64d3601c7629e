"""How masks are compared: what published evaluation code does differently, as values.

Tables of this field mix protocols: RefCOCO numbers of one model move by tenths of a point with the size, the
threshold and the true mask below. `PROTOCOLS` names the five that cover the models METRIS is compared with.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Protocol:
    """Everything that stands between a model's answer and its score."""

    name: str
    """What results call it."""

    size: int | None = None
    """Side of the square where masks are compared, pixels. None: each image's own size."""

    truth: Literal["resized", "redrawn"] = "resized"
    """How a true mask comes to that square: filled at the image's own size, each pixel of the square then
    takes the value under its centre; or polygons are scaled first and filled there. Run lengths are always
    resized."""

    resized: Literal["logits", "probabilities", "mask"] = "logits"
    """What of a prediction is brought to that size: before the sigmoid, after it, or after the threshold."""

    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How; masks always take the value under the centre of each pixel."""

    align_corners: bool = False
    """Whether interpolation maps centres of corner pixels onto one another, instead of outer edges."""

    threshold: float | Literal["argmax"] = 0.5
    """Probability above which a pixel belongs to the mask, in (0, 1); argmax of two channels is 0.5."""

    precisions: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    """X of P@X: the share of sentences with a target whose IoU is at least X."""

    inclusive: bool = True
    """Whether IoU = X counts for P@X."""

    overlaps: Literal["union", "exactly_one"] = "union"
    """True pixels: those in any polygon of the target, or those in exactly one. The latter comes from adding
    up the polygons and keeping the ones: what two polygons share becomes background."""

    sentences: Literal["all", "first", "last", "random"] = "all"
    """Which sentences of a ref are scored; random draws one, by ``seed`` and ref_id alone."""

    seed: int = 0
    """Of random sentences."""

    empty_iou: float = 0.0
    """IoU where neither mask has a pixel; gIoU has a rule of its own."""

    epsilon: float = 0.0
    """Added to the union of each IoU, pixels; oIoU and cIoU go without."""

    empty_by: Literal["pixels", "classifier"] = "pixels"
    """What tells that a prediction is empty, for gIoU, N-acc and T-acc: that its mask has no pixel, once the
    no-target classifier has withdrawn masks; or what that classifier says, where a model has one. In the
    latter case the union of cIoU keeps masks that were withdrawn from sentences with a target."""

    @property
    def cutoff(self) -> float:
        """``threshold`` as a number."""
        return 0.5 if self.threshold == "argmax" else self.threshold

    def said(self, *, given: bool = False) -> str:
        """Say it in one line; ``given``: predictions were masks, so that nothing was cut or interpolated."""
        size = "own size" if self.size is None else f"{self.size} x {self.size}"
        corners = ", aligned corners" * self.align_corners
        resized = "mask" if self.resized == "mask" else f"{self.resized} {self.interpolation}{corners}"
        cut = "masks as given" if given else f"{resized}, probability > {self.cutoff:g}"
        truth = "union of polygons" if self.overlaps == "union" else "pixels of exactly one polygon"
        truth += f" scaled to {size}" * (self.truth == "redrawn")
        sentences = {"all": "all sentences", "random": f"one random sentence of each ref, seed {self.seed}"}
        which = sentences.get(self.sentences, f"the {self.sentences} sentence of each ref")
        return f"{self.name}: {size}, {cut}, {truth}, {which}, P@X {'>=' if self.inclusive else '>'} X"

    def __str__(self) -> str:
        return self.said()


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        # Ours: every pixel that was annotated, at the size it was annotated at.
        Protocol("metris"),
        # LAVT-RIS/test.py: `evaluate` (argmax at the network's 480, >=, IoU 0 where the union is 0);
        # data/dataset_refer_bert.py (all sentences of a ref; pixels whose sum of polygons is 1);
        # transforms.py (true mask to 480 by nearest). train.py validates on one random sentence of each ref.
        Protocol("lavt", size=480, threshold="argmax", overlaps="exactly_one"),
        # CRIS.pytorch/engine/engine.py: `inference` (sigmoid, cubic warp back to the image, > 0.35, > X,
        # union + 1e-6), tools/data_process.py (union). Its letterbox belongs to the model, not to the score.
        # `validate` takes the first sentence of each ref.
        Protocol(
            "cris",
            resized="probabilities",
            interpolation="bicubic",
            threshold=0.35,
            inclusive=False,
            epsilon=1e-6,
        ),
        # CGFormer/engine/engine.py: `inference` (sigmoid, bicubic with aligned corners to the image, > 0.5,
        # > X, union + 1e-6); utils/dataset.py (masks whose shared pixels wrap around to background).
        # `validate` works at 480, on the last sentence of each ref. X is float32 there, not imitated here.
        Protocol(
            "cgformer",
            resized="probabilities",
            interpolation="bicubic",
            align_corners=True,
            inclusive=False,
            overlaps="exactly_one",
            epsilon=1e-6,
        ),
        # ReLA/gres_model/evaluation/refer_evaluation.py: `process`, `evaluate` (argmax at 480, >= .7 .8 .9
        # over sentences with a target, the classifier's word); gres_model/data/dataset_mappers (polygons
        # scaled to 480, then filled; union, which leaves out annotations with iscrowd; the readers here take
        # them in, so that a target that holds a crowd has more true pixels than there).
        Protocol(
            "rela",
            size=480,
            truth="redrawn",
            threshold="argmax",
            precisions=(0.7, 0.8, 0.9),
            empty_by="classifier",
        ),
    )
}
"""The named presets."""
