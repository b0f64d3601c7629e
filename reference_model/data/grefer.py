"""Read gRefCOCO: refs as JSON, each about any number of objects or about none, beside COCO annotations."""

from typing import Any, ClassVar

import numpy as np
from pycocotools import mask as coco_mask

from reference_model.data.plain import MEND, plain_field, plain_list, read_plain_json
from reference_model.data.records import segmentation_defect, segmentation_mask
from reference_model.data.refer import Refer, Target
from reference_model.files import InputError


class GRefer(Refer):
    """A data set in gRefCOCO's layout, ``<dataset>/grefs(<split_by>).json``; the rest is as in `Refer`.

    ``ann_id`` and ``category_id`` of a ref are lists; ``ann_id: [-1]`` means that there is no target, and the
    flag ``no_target``, where a ref carries it, must agree. The mask of a record is the union of its
    annotations, crowds among them (ReLA leaves those out), and empty where there is no target.
    """

    refs_name: ClassVar[str] = "grefs({}).json"
    read_refs: ClassVar[Any] = staticmethod(read_plain_json)

    def _target(self, ref: dict[str, Any], image_id: int, where: str) -> Target:
        ann_ids, category_ids = (plain_list(ref, key, int, where) for key in ("ann_id", "category_id"))
        none = ann_ids in ([], [-1])
        if "no_target" in ref and plain_field(ref, "no_target", bool, where) != none:
            raise InputError(
                f"{where} has 'no_target' = {ref['no_target']}, but 'ann_id' names "
                f"{'nothing' if none else f'{len(ann_ids)} annotations'}; {MEND}"
            )
        if none:
            return Target((), (), self._nothing(image_id))
        found = [self._segmentation(ann_id, image_id, where) for ann_id in ann_ids]
        return Target(tuple(ann_ids), tuple(category_ids), _union(found, *self._sizes[image_id]))

    def _nothing(self, image_id: int) -> dict[str, Any]:
        height, width = self._sizes[image_id]
        nothing = {"size": [height, width], "counts": [height * width]}
        defect = segmentation_defect(nothing, height, width)
        if defect is not None:  # no annotation of this image need have told so
            raise InputError(f"{self.instances_file}: image {image_id}: {defect}; {MEND}")
        return nothing


def _union(segmentations: list[Any], height: int, width: int) -> Any:
    """Make one segmentation of several sound ones: polygons as they are, else all as run lengths."""
    if len(segmentations) == 1:
        return segmentations[0]
    if all(isinstance(segmentation, list) for segmentation in segmentations):
        return [polygon for segmentation in segmentations for polygon in segmentation]
    masks = [segmentation_mask(found, height, width, owner="annotation") for found in segmentations]
    return coco_mask.encode(np.asfortranarray(np.logical_or.reduce(masks).astype(np.uint8)))
