"""What a survey of a data set tells: errors, over which a training run would stumble, and warnings to look into."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from psp_jax.classes import ClassTable
from psp_jax.data.contents import Problem
from psp_jax.data.frequencies import count_values
from psp_jax.data.source import Source
from psp_jax.data.survey import Look, Tally

LISTED = 200  # files of a finding that are named; all are counted
DOMINANT = 0.99  # share of the labelled pixels
# How improbable it must be that a split lacks a class by chance, were the images of all splits drawn alike.
CHANCE = 0.001
ERRORS = {
    "split": "Splits that are not there",
    "layout": "Files that belong to no pair",
    "file": "Files that cannot be opened",
    "image": "Images that cannot be read",
    "label": "Labels that are no maps of class values",
    "size": "Labels of another size than their image",
    "values": "Values that the class table does not know",
}
FEW = 3  # images to evaluate on: with fewer, one of them decides the score


@dataclass
class Finding:
    """Something found, once or in many files.

    Attributes:
      level: "error" or "warning".
      title: a few words.
      text: what it means and what to do, or "".
      total: how many files or classes.
      items: a sentence or a name for each, at most `LISTED`.
    """

    level: str
    title: str
    text: str = ""
    total: int = 0
    items: list[str] = field(default_factory=list)

    def add(self, item: str) -> None:
        """Count one more."""
        self.total += 1
        if len(self.items) < LISTED:
            self.items.append(item)


class Findings:
    """Collects what is found while a survey goes on, and judges the sums at its end.

    Attributes:
      tallies: {split: its sums}.
    """

    def __init__(self, classes: ClassTable, splits: Sequence[str]) -> None:
        self.classes = classes
        self.tallies = {split: Tally() for split in splits}
        self._problems = {kind: Finding("error", title) for kind, title in ERRORS.items()}
        self._problems["unused"] = Finding("warning", "Annotations without images", "They are left out.")
        self._pairs = Counter[str]()  # of each split, readable or not
        self._void = Finding("warning", "Labels that are void everywhere", "No pixel of them is learned from.")
        self._turned = Finding(
            "warning",
            "Images that viewers turn by their EXIF orientation",
            "Here the pixels are read as they are stored: look whether the label was drawn on the turned image. "
            "`exiftran -ai` turns the pixels themselves.",
        )
        # Of each digest: the names of each split.
        self._same: dict[bytes, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        self._strange: dict[int, Counter[str]] = defaultdict(Counter)  # of unknown values: pixels, images
        self._strange_in: dict[int, list[str]] = defaultdict(list)

    def problem(self, problem: Problem) -> None:
        """Count one that has a kind of its own."""
        self._problems[problem.kind].add(problem.message)

    def add(self, seen: Look) -> None:
        """Count what one pair was found to hold."""
        for problem in seen.problems:
            self.problem(problem)
        self.tallies[seen.split].add(seen)
        self._pairs[seen.split] += 1
        name = f"{seen.split}/{seen.name}"
        if seen.turned:
            self._turned.add(name)
        if seen.digest:
            self._same[seen.digest][seen.split].append(name)
        if seen.values is not None:
            known = list(self.classes.raw_ids)
            strange = np.delete(np.arange(256), known + list(self.classes.void_ids))
            for value in strange[seen.values[strange] > 0]:
                self._strange[int(value)].update(pixels=int(seen.values[value]), images=1)
                if len(self._strange_in[int(value)]) < LISTED:
                    self._strange_in[int(value)].append(name)
            if not seen.problems and not seen.values[known].any():
                self._void.add(name)

    def unknown_values(self) -> list[dict[str, Any]]:
        """Return value, pixels, images and files of each value that the class table does not know."""
        return [
            {"value": value, **self._strange[value], "files": self._strange_in[value]}
            for value in sorted(self._strange)
        ]

    def all(self, train_split: str, eval_split: str) -> list[Finding]:
        """Return everything found, errors first; the arguments are those of `config.data`, splits joined by +."""
        twice = self._twice(train_split.split("+"), eval_split.split("+"))
        counted = [*self._problems.values(), *twice, self._void, self._turned]
        judged = [*judge(self.classes, self.tallies, train_split), self._few(eval_split.split("+"))]
        return sorted((f for f in [*counted, *judged] if f.total), key=lambda finding: finding.level)

    def _few(self, evaluated: Sequence[str]) -> Finding:
        found = Finding("warning", "Few images to evaluate on", "One image more or less changes the score; add some.")
        count = sum(self._pairs[split] for split in evaluated)
        if 0 < count < FEW:
            found.add(f"{'+'.join(evaluated)} has {count} {'image' if count == 1 else 'images'}")
        return found

    def _twice(self, training: Sequence[str], evaluated: Sequence[str]) -> tuple[Finding, Finding]:
        """Find images that are in a training and in another evaluated split, and those that are twice in any split.

        Other splits may overlap: all of train is in train_aug of VOC.
        """
        between = Finding(
            "warning", "The same image in two splits", "A score on images that were trained on is too good; keep one."
        )
        within = Finding("warning", "The same image twice in a split", "It counts twice.")
        for names in self._same.values():
            for first, *others in names.values():
                for other in others:
                    within.add(f"{first} and {other}")
            for learned in training:
                for scored in evaluated:
                    if learned != scored and learned in names:
                        for name in names.get(scored, ()):
                            between.add(f"{names[learned][0]} and {name}")
        return between, within


def judge(classes: ClassTable, tallies: Mapping[str, Tally], train_split: str) -> Iterator[Finding]:
    """Yield the warnings that follow from the sums of all splits."""
    values = sum((tally.values for tally in tallies.values()), np.zeros(256, np.int64))
    if not values.any():
        return
    raw_ids = np.array(classes.raw_ids)
    shifted = off_by_one(classes, values)
    if shifted:
        yield Finding("warning", "Labels that seem to count from another number", shifted, 1)
    never = Finding("warning", "Classes that never occur", "No network learns them, and they have no IoU.")
    for c in np.flatnonzero(values[raw_ids] == 0):
        never.add(f"{classes.names[c]} (value {raw_ids[c]})")
    yield never
    yield from _dominant(classes, tallies)
    yield _missing_in_training(classes, tallies, train_split.split("+"))
    yield _uneven(classes, tallies)


def first_look(source: Source, count: int = 64) -> str:
    """Return what `off_by_one` says of `count` labels of a prepared split, evenly spread over it.

    Raises:
      ValueError: one of them cannot be read or has a value that the class table does not know.
    """
    values = np.zeros(256, np.int64)
    for index in np.unique(np.linspace(0, len(source) - 1, min(count, len(source)), dtype=int)):
        values += count_values(source.classes.to_raw(source.label(int(index))))
    return off_by_one(source.classes, values)


def off_by_one(classes: ClassTable, values: np.ndarray) -> str:
    """Return a sentence where the values i64[256] look like the class table's, shifted by one, else "".

    Only where the table's values have no gap: all that is wrong is one after its last; its first never occurs, and
    either the one after its last does, or all the others do; or its last never occurs, and the one before its first
    does, although it is not void.
    """
    first, last = min(classes.raw_ids), max(classes.raw_ids)
    if last - first + 1 != classes.num_classes or classes.num_classes < 2:
        return ""
    name = classes.names[classes.raw_ids.index(first)]
    found = values > 0
    others = [value for value in np.flatnonzero(found) if value not in (*classes.raw_ids, *classes.void_ids)]
    if first == 0 and found[0] and others == [last + 1]:
        return (
            f"The values {first} to {last + 1} occur, one more than there are classes: where {first} is void, as in "
            f'ADE20K, say so in classes.json: "raw_ids": [{first + 1}, ..., {last + 1}], "ignore": {first}.'
        )
    unknown = [value for value in (first - 1, last + 1) if 0 <= value <= 255 and value not in classes.void_ids]
    if not found[first] and last + 1 in unknown and found[last + 1]:
        return (
            f"The value {first} ({name}) never occurs, but {last + 1} does, one above the last class: the labels seem "
            f"to begin with {first + 1}. Subtract 1, or name their values in classes.json: "
            f'"raw_ids": [{first + 1}, ..., {last + 1}].'
        )
    if not found[last] and first - 1 in unknown and found[first - 1]:
        return (
            f"The value {last} never occurs, but {first - 1} does, one below the first class: the labels seem to begin "
            f"with {first - 1}. Add 1, or name their values in classes.json."
        )
    if not found[first] and classes.num_classes > 2 and found[first + 1 : last + 1].all():
        return (
            f"The value {first} ({name}) is the only class that never occurs: if the labels begin with {first + 1}, "
            "every class has the name of its neighbour; compare the examples with their legends."
        )
    return ""


def _dominant(classes: ClassTable, tallies: Mapping[str, Tally]) -> Iterator[Finding]:
    found = Finding("warning", "A class covers nearly everything", "Accuracy says little then; look at the IoU.")
    for split, tally in tallies.items():
        pixels = tally.values[list(classes.raw_ids)]
        if classes.num_classes > 1 and pixels.max() > DOMINANT * pixels.sum():
            share = 100 * pixels.max() / pixels.sum()
            found.add(f"{split}: {share:.2f} % of the labelled pixels are {classes.names[int(pixels.argmax())]}")
    yield found


def _missing_in_training(classes: ClassTable, tallies: Mapping[str, Tally], training: Sequence[str]) -> Finding:
    found = Finding("warning", "Classes that the training split lacks", "They are scored, but cannot be learned.")
    in_training = sum((tallies[split].present for split in training if split in tallies), np.zeros(256, np.int64))
    if in_training.any():
        for split, tally in tallies.items():
            for raw, name in zip(classes.raw_ids, classes.names, strict=True):
                if split not in training and tally.present[raw] and not in_training[raw]:
                    found.add(f"{name} occurs in {tally.present[raw]:,} labels of {split}")
    return found


def _uneven(classes: ClassTable, tallies: Mapping[str, Tally]) -> Finding:
    """Find classes that a split has in so many labels that another would not lack them by chance."""
    found = Finding(
        "warning",
        "Classes frequent in one split and absent in another",
        f"With images drawn alike this would happen in less than {100 * CHANCE:.1f} % of the cases.",
    )
    for split, tally in tallies.items():
        for other, less in tallies.items():
            if other == split or not less.values[list(classes.raw_ids)].any():
                continue
            for raw, name in zip(classes.raw_ids, classes.names, strict=True):
                present = int(tally.present[raw])
                if not present or less.present[raw]:
                    continue
                # That all labels with the class fall into the first split, of all ways to deal them to the two.
                chance = math.comb(tally.labels, present) / math.comb(tally.labels + less.labels, present)
                if chance < CHANCE:
                    share = 100 * present / tally.labels
                    found.add(f"{name} is in {share:.0f} % of the labels of {split} and in none of {other}")
    return found
