"""Read gRefCOCO and Ref-ZOM: refs about any number of objects or about none, beside COCO annotations."""

from typing import Any, ClassVar

from reference_model.data.readers.refer import Refer, Target
from reference_model.data.records import segmentation_defect, segmentation_union
from reference_model.data.untrusted import MEND, plain_field, plain_list
from reference_model.files import InputError, shown


class GRefer(Refer):
    """A data set in gRefCOCO's layout, ``<dataset>/grefs(<split_by>).json`` or, if there is none, ``.p``.

    ``ann_id`` and ``category_id`` of a ref are lists; ``ann_id: [-1]`` means that there is no target, and the
    flag ``no_target``, where a ref carries it, must agree. The mask of a record is the union of its
    annotations, crowds among them (ReLA leaves those out), and empty where there is no target. The rest is
    as in `Refer`.
    """

    refs_names: ClassVar[tuple[str, ...]] = ("grefs({}).json", "grefs({}).p")

    def _target(self, ref: dict[str, Any], image_id: int, where: str) -> Target:
        ann_ids, category_ids = (plain_list(ref, key, int, where) for key in ("ann_id", "category_id"))
        none = ann_ids in ([], [-1])
        if "no_target" in ref and plain_field(ref, "no_target", bool, where) != none:
            raise InputError(
                f"{where} has 'no_target' = {ref['no_target']}, but 'ann_id' names "
                f"{'nothing' if none else f'{len(ann_ids)} annotations'}; {MEND}"
            )
        return self._nothing(image_id) if none else self._union(ann_ids, category_ids, image_id, where)

    def _union(self, ann_ids: list[int], category_ids: list[int], image_id: int, where: str) -> Target:
        found = [self._segmentation(ann_id, image_id, where) for ann_id in dict.fromkeys(ann_ids)]
        _, height, width = self._images[image_id]
        return Target(tuple(ann_ids), tuple(category_ids), segmentation_union(found, height, width))

    def _nothing(self, image_id: int) -> Target:
        _, height, width = self._images[image_id]
        nothing = {"size": [height, width], "counts": [height * width]}
        defect = segmentation_defect(nothing, height, width)
        if defect is not None:  # no annotation of this image need have told so
            raise InputError(f"{self.instances_file}: image {image_id}: {defect}; {MEND}")
        return Target((), (), nothing)


class RefZom(GRefer):
    """Ref-ZOM, ``<dataset>/refs(final).p`` or as released, ``Ref-ZOM(final).p``; the rest is as in `Refer`.

    ``ann_id`` and ``category_id`` of a ref are a number or a list. Its ``source`` says whether it refers to
    zero, one or many objects; with zero, whatever annotation it names is not its target. The images are those
    of COCO train2014 and val2014, together in one folder or in two.
    """

    refs_names: ClassVar[tuple[str, ...]] = ("refs({}).p", "Ref-ZOM({}).p")

    def _target(self, ref: dict[str, Any], image_id: int, where: str) -> Target:
        if "source" in ref and plain_field(ref, "source", str, where) == "zero":
            return self._nothing(image_id)
        ann_ids, category_ids = (_one_or_many(ref, key, where) for key in ("ann_id", "category_id"))
        if ann_ids not in ([], [-1]):
            return self._union(ann_ids, category_ids, image_id, where)
        if "source" in ref:
            raise InputError(
                f"{where} has 'source' = {shown(ref['source'])}, but 'ann_id' names nothing; {MEND}"
            )
        return self._nothing(image_id)


def _one_or_many(ref: dict[str, Any], key: str, where: str) -> list[int]:
    if type(ref.get(key)) is list:
        return plain_list(ref, key, int, where)
    return [plain_field(ref, key, int, where)]
