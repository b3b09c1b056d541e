"""The official pixel-level scores of Cityscapes: IoU and iIoU of classes and of categories.

The rules are those of cityscapesScripts' evalPixelLevelSemanticLabeling.py, over label ids 0-33 (not training ids):
pixels whose label is not evaluated count nowhere, a prediction that is not evaluated is a miss of its label. iIoU
weighs the hits and misses of every instance by the average size of its class over its own size; false positives have
no instance and count as pixels. Groups (instance ids up to 1000) give neither hits nor misses.
"""

from typing import Any

import numpy as np

from psp_jax import classes

NUM_IDS = 34
CATEGORIES = {
    "flat": range(7, 11),
    "construction": range(11, 17),
    "object": range(17, 21),
    "nature": range(21, 23),
    "sky": range(23, 24),
    "human": range(24, 26),
    "vehicle": range(26, 34),
}
# Pixels of an average instance. All classes of the last two categories have instances, no other class has.
AVERAGE_SIZES = {
    "person": 3462.4756337644,
    "rider": 3930.4788056518,
    "car": 12794.0202738185,
    "truck": 27855.1264367816,
    "bus": 35732.1511111111,
    "train": 67583.7075812274,
    "motorcycle": 6298.7200839748,
    "bicycle": 4672.3249222261,
}
_CATEGORY_OF = np.zeros(256, np.uint8)  # of each label id; 0 is void
for _index, _ids in enumerate(CATEGORIES.values(), start=1):
    _CATEGORY_OF[_ids.start : _ids.stop] = _index


class CityscapesScores:
    """Sums over images.

    Attributes:
      confusion: i64[34, 34] pixels, row = label id, column = predicted id.
    """

    def __init__(self) -> None:
        table = classes.get("cityscapes")
        self._ids = dict(zip(table.names, table.raw_ids, strict=True))  # of the 19 classes that are evaluated
        self._evaluated = list(table.raw_ids)
        self._ignored = set(table.void_ids)
        self._sizes = {self._ids[name]: size for name, size in AVERAGE_SIZES.items()}
        self._weighted = np.zeros((NUM_IDS, 2))  # pixels hit and missed in instances of each class
        self._weighted_category = np.zeros((len(CATEGORIES) + 1, 2))
        self._has_instances: bool | None = None
        self.confusion = np.zeros((NUM_IDS, NUM_IDS), np.int64)

    def add(self, prediction: np.ndarray, label: np.ndarray, instances: np.ndarray | None, where: str) -> None:
        """Count an image: prediction and label u8[H, W] of label ids, instances u16[H, W] of gtFine_instanceIds.

        Raises:
          ValueError: ids that Cityscapes does not have, sizes that differ, or instances for some images only; the
            sentence names `where`.
        """
        for what, ids in (("prediction", prediction), ("label", label)):
            if ids.max(initial=0) >= NUM_IDS:
                raise ValueError(
                    f"The {what} of {where} holds the value {ids.max()}; Cityscapes' label ids are 0-{NUM_IDS - 1} "
                    "(not training ids)."
                )
        for what, others in (("prediction", prediction), ("instance map", instances)):
            if others is not None and others.shape != label.shape:
                raise ValueError(
                    f"The {what} of {where} is {others.shape[1]}x{others.shape[0]} pixels but its label is "
                    f"{label.shape[1]}x{label.shape[0]}; both must have the same size."
                )
        has_instances = instances is not None
        if self._has_instances not in (None, has_instances):
            raise ValueError(f"{where} has {'' if has_instances else 'no '}instance ids, unlike the images before it.")
        self._has_instances = has_instances
        pairs = label.astype(np.intp) * NUM_IDS + prediction
        self.confusion += np.bincount(pairs.ravel(), minlength=NUM_IDS**2).reshape(NUM_IDS, NUM_IDS)
        if instances is not None:
            self._add_instances(prediction, instances, where)

    def _add_instances(self, prediction: np.ndarray, instances: np.ndarray, where: str) -> None:
        owner = instances.astype(np.int64) // 1000
        sizes = np.bincount(instances.ravel())
        same_class = np.bincount(instances[prediction == owner], minlength=len(sizes))
        same_category = np.bincount(instances[_CATEGORY_OF[prediction] == _CATEGORY_OF[owner]], minlength=len(sizes))
        for instance in np.flatnonzero(sizes[1001:]) + 1001:
            class_id, size = int(instance) // 1000, sizes[instance]
            if class_id in self._ignored:
                continue
            if class_id not in self._sizes:
                raise ValueError(f"{where} has the instance {instance}, but label id {class_id} has no instances.")
            weight = self._sizes[class_id] / size
            category = _CATEGORY_OF[class_id]
            for sums, hits in (
                (self._weighted[class_id], same_class[instance]),
                (self._weighted_category[category], same_category[instance]),
            ):
                sums += hits * weight, (size - hits) * weight

    def class_confusion(self) -> np.ndarray:
        """Return i64[19, 20], row = label, of the evaluated classes; the last column is predicted but not evaluated."""
        rows = self.confusion[self._evaluated]
        columns = rows[:, self._evaluated]
        return np.column_stack([columns, rows.sum(1) - columns.sum(1)])

    def results(self) -> dict[str, Any]:
        """Return {"classes": scores, "categories": scores}, as fractions of 1 and None where nothing was counted.

        The scores are {"mean_iou", "mean_iiou", "iou": {name: IoU}, "iiou": {name: iIoU}}; a mean leaves out what has
        no score. iIoU exists for the names that have instances, and is None where no instance maps were given.
        """
        class_iou, class_iiou, category_iou, category_iiou = {}, {}, {}, {}
        for name, i in self._ids.items():
            hits, labelled = self.confusion[i, i], self.confusion[i].sum()
            false = self.confusion[self._evaluated, i].sum() - hits
            class_iou[name] = _ratio(hits, false, labelled - hits)
            if name in AVERAGE_SIZES:
                class_iiou[name] = self._instance_ratio(self._weighted[i], false)
        for index, (name, members) in enumerate(CATEGORIES.items(), start=1):
            own = [i for i in self._evaluated if i in members]
            others = self.confusion[[i for i in self._evaluated if i not in members]]
            hits = self.confusion[np.ix_(own, own)].sum()
            category_iou[name] = _ratio(hits, others[:, own].sum(), self.confusion[own].sum() - hits)
            if name in ("human", "vehicle"):
                # Caravans and trailers are no part of IoU, but here predicting one is a vehicle all the same.
                false = others[:, members.start : members.stop].sum()
                category_iiou[name] = self._instance_ratio(self._weighted_category[index], false)
        return {
            level: {"mean_iou": _mean(iou), "mean_iiou": _mean(iiou), "iou": iou, "iiou": iiou}
            for level, iou, iiou in (("classes", class_iou, class_iiou), ("categories", category_iou, category_iiou))
        }

    def _instance_ratio(self, weighted: np.ndarray, false: int) -> float | None:
        return _ratio(weighted[0], false, weighted[1]) if self._has_instances else None


def _ratio(hits: float, false: float, missed: float) -> float | None:
    whole = hits + false + missed
    return float(hits / whole) if whole else None


def _mean(scores: dict[str, float | None]) -> float | None:
    values = [value for value in scores.values() if value is not None]
    return sum(values) / len(values) if values else None
