"""The classes that masks hold: of their values, or of a table of colours."""

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from psp_jax.classes import IGNORE_LABEL, MAX_CLASSES
from psp_jax.data.masks import COLOURS, VALUES, Colour, MaskFacts

VOID = "void"  # a name in a table of colours
COLUMNS = ("name", "r", "g", "b")
Facts = Mapping[Path, MaskFacts]  # of each mask
# What is returned below: classes.json, and the value of each colour; None where masks stay as they are.
Classes = tuple[dict[str, Any], dict[Colour, int] | None]


def read_colours(path: Path) -> dict[Colour, str]:
    """Read a table of colours, CSV with the columns name, r, g, b or a JSON list of such objects.

    Several colours may have one name; the name void, in letters of any case, makes no class.

    Raises:
      FileNotFoundError, ValueError: no such file, not readable, or a row that is none; names the file and the row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no table of colours {path}.")
    kind = "JSON" if path.suffix.lower() == ".json" else "CSV"
    try:
        text = path.read_text("utf-8-sig")
        rows = json.loads(text) if kind == "JSON" else list(csv.DictReader(io.StringIO(text)))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it as {kind} UTF-8.") from None
    except (ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"{path} is not readable as {kind}: {error}.") from None
    table: dict[Colour, str] = {}
    for number, row in enumerate(rows if isinstance(rows, list) else [None], start=1):
        try:
            given, *channels = (row[column] for column in COLUMNS)
            red, green, blue = (int(channel) for channel in channels)
        except (TypeError, KeyError, ValueError, OverflowError):
            raise ValueError(f"{path}, row {number}: it must have {', '.join(COLUMNS)} with numbers 0-255.") from None
        colour = (red, green, blue)
        name = str(given or "").strip()
        if not name or not all(0 <= channel <= 255 for channel in colour):
            raise ValueError(f"{path}, row {number}: fill in a name, void for none, and numbers 0-255.")
        if colour in table:
            raise ValueError(f"{path}, row {number}: the colour {red},{green},{blue} stands there twice.")
        table[colour] = VOID if name.lower() == VOID else name
    return table


def of_table(table: Mapping[Colour, str], facts: Facts) -> Classes:
    """Return the classes of masks of colours, in the order of the table of colours.

    Raises:
      ValueError: a mask holds a colour that the table lacks, or fewer than two classes or too many.
    """
    for mask, seen in facts.items():
        for colour, pixels in seen.counts.items():
            if colour not in table:
                raise ValueError(
                    f"{mask} holds the colour {','.join(map(str, colour))} ({pixels:,} pixels), which the table of "
                    "colours lacks; add it, with the name void where it is no class."
                )
    names = list(dict.fromkeys(name for name in table.values() if name != VOID))
    _check_count(len(names), "The names in the table of colours")
    first = {name: colour for colour, name in reversed(list(table.items()))}
    values = {colour: IGNORE_LABEL if name == VOID else names.index(name) for colour, name in table.items()}
    return {"names": names, "palette": [list(first[name]) for name in names], "ignore": IGNORE_LABEL}, values


def of_values(
    facts: Facts, *, void: int | None = None, names: list[str] | None = None, read_as: str | None = None, template: Path
) -> Classes:
    """Return the classes of masks of values, also of grey ones that were saved as colours.

    Args:
      facts: what the masks hold.
      void: the value that means void; None takes 255 where at least two other values occur, -1 is none.
      names: of the classes: one for each value that occurs, void left out, in ascending order, or for all values from 0
        on (from 1 on where void is 0), some of which may not occur. One name too many is refused where a class is above
        void: void may be among the names, and would shift them.
      read_as: what the user said that masks hold.
      template: where to write a table of colours to fill in, where masks hold colours.

    Raises:
      ValueError: the masks hold colours, or some of them do; palettes that contradict each other; fewer than two
        classes, too many, or names that do not fit.
    """
    kinds = {kind: [mask for mask, seen in facts.items() if seen.read_as == kind] for kind in (VALUES, COLOURS)}
    totals: Counter[Any] = Counter()
    for seen in facts.values():
        totals.update(seen.counts)
    if kinds[COLOURS]:
        if kinds[VALUES]:
            raise ValueError(
                f"{kinds[VALUES][0]} holds values and {kinds[COLOURS][0]} colours; masks must be of one kind, or read "
                "alike by --masks_hold colours."
            )
        if any(len(set(colour)) > 1 for colour in totals):
            _ask_for_names(totals, template)
        grey = {colour: int(colour[0]) for colour in totals}
        return _name_values(set(grey.values()), void, names), grey
    palette = {} if read_as == VALUES else _common_palette(facts)
    classes = _name_values(set(totals), void, names)
    if palette and all(value in palette for value in classes["raw_ids"]):
        classes["palette"] = [list(palette[value]) for value in classes["raw_ids"]]
    return classes, None


def _name_values(found: set[int], void: int | None, names: list[str] | None) -> dict[str, Any]:
    """Return classes.json for the values `found`; see `of_values`."""
    if void is None:
        void = IGNORE_LABEL if len(found - {IGNORE_LABEL}) >= 2 else -1
    values = sorted(found - {void})
    if names is not None and len(names) == len(values) + 1 and 0 <= void < max(values, default=0):
        raise ValueError(
            f"There are {len(names)} names, but the masks hold {len(values)} values beside the void value {void}; "
            "leave void out of the names, and any class that does not occur."
        )
    if names is not None and len(names) != len(values):
        start = 1 if void == 0 else 0
        from_start = [value for value in range(start, 256) if value != void][: len(names)]
        if not set(values) <= set(from_start):
            raise ValueError(
                f"There are {len(names)} names, but the masks hold {len(values)} values beside void "
                f"({', '.join(map(str, values[:12]))}{', ...' if len(values) > 12 else ''}); name each of these in "
                f"ascending order, or all values from {start} on."
            )
        values = from_start
    _check_count(len(values), "The values in the masks")
    ignore = void if void >= 0 else max(set(range(256)) - set(values))
    return {"names": names or [f"class {value}" for value in values], "raw_ids": values, "ignore": ignore}


def _check_count(count: int, where: str) -> None:
    if count < 2:
        raise ValueError(f"{where} give {count} classes beside void; there must be two to tell apart.")
    if count > MAX_CLASSES:
        raise ValueError(f"{where} give {count} classes; at most {MAX_CLASSES} are possible.")


def _common_palette(facts: Facts) -> dict[int, Colour]:
    """Return the colour of each value; raise ValueError where the palettes of two masks contradict each other."""
    palette: dict[int, Colour] = {}
    first: dict[int, Path] = {}
    for mask, seen in facts.items():
        for value, colour in seen.palette.items():
            if palette.setdefault(value, colour) != colour:
                raise ValueError(
                    f"The value {value} has different colours in the palettes of {first[value]} and {mask}: where the "
                    "colours are right, give --masks_hold colours, where the values are, --masks_hold values."
                )
            first.setdefault(value, mask)
    return palette


def _ask_for_names(totals: Mapping[Colour, int], template: Path) -> NoReturn:
    """List the colours found, write them to `template` unless it is there, and raise ValueError."""
    if len(totals) > MAX_CLASSES + 1:
        raise ValueError(
            f"The masks hold {len(totals):,} colours, more than {MAX_CLASSES} classes and void; smoothed edges or "
            "lossy compression make such masks, else name those that count in a table and pass it by --colours."
        )
    ordered = sorted(totals, key=lambda colour: -totals[colour])
    for colour in ordered:
        print(f"  colour {','.join(map(str, colour))}: {totals[colour]:,} pixels")
    if not template.exists():
        template.parent.mkdir(parents=True, exist_ok=True)
        with template.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*COLUMNS, "pixels"])
            writer.writerows(["", *colour, totals[colour]] for colour in ordered)
    raise ValueError(
        f"The masks hold {len(totals)} colours: fill in their names in {template} (void is no class), and run again "
        f"with --colours {template}."
    )
