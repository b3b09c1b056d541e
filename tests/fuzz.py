"""A deterministic fuzzer of everything that is read from files and flags: input k is a function of k alone.

    python tests/fuzz.py FOLDER FIRST LAST

damages sound inputs, reads each as the package does, and prints a line of JSON about each of FIRST ... LAST - 1: it is
read, refused (ValueError or OSError in one sentence that names the file), or broken, with what went wrong.
"""

import json
import random
import re
import shutil
import signal
import sys
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 120  # that reading one input may take, on a slow and loaded machine
TEXTS = (".json", ".csv", ".py", ".flag")
NUMBERS = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"\xff" * 8)
WORDS = ("\ud800", "\x00", "\u202e\u2028", "é" * 5000, "../../etc/passwd", "<script>", "%s{0}$title", "")
VALUES: tuple[Any, ...] = (None, True, -1, 0, 2**31, 2**64, 10**400, 1e308, float("nan"), [], {}, [[]], "text", *WORDS)


class Target(NamedTuple):
    """A kind of input.

    Attributes:
      make: writes a sound input to an empty folder and returns the files to damage.
      read: reads it from there.
      weight: how often it is taken.
    """

    make: Callable[[Path], list[Path]]
    read: Callable[[Path], Any]
    weight: int = 1


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return `data` with one to four faults."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        size = len(data)
        at = rng.randrange(size + 1)
        kind = rng.randrange(9)
        if kind == 0:
            data = data[:at]
        elif kind == 1 and size:  # bits
            changed = bytearray(data)
            for _ in range(rng.choice((1, 8, 64))):
                changed[rng.randrange(size)] ^= 1 << rng.randrange(8)
            data = bytes(changed)
        elif kind == 2:  # two pieces swapped
            data = data[at : at + 16] + data[:at] + data[at + 16 :]
        elif kind == 3:
            length = rng.choice((1, 8, 512))
            data = data[:at] + bytes(length) + data[at + length :]
        elif kind == 4:
            number = rng.choice(NUMBERS)
            at = rng.randrange(min(size, 64) + 1)  # in the headers
            data = data[:at] + number + data[at + len(number) :]
        elif kind == 5:
            data = data[:at] + data[at // 2 :]  # a piece twice
        elif kind == 6:
            data = data[:at] + rng.randbytes(rng.choice((1, 4, 300))) + data[at:]
        elif kind == 7:
            data = rng.choice(
                (b"", b"\0", b"<!doctype html><p>Sign in</p>\n", b"\x89PNG\r\n\x1a\n", b"PK\3\4", b"\x80\4.")
            )
        else:
            data = data[:at] + rng.choice(WORDS).encode("utf-8", "surrogatepass") + data[at:]
    return data


def damaged_json(text: str, rng: random.Random) -> str:
    """Return JSON with a value of another type, too deep, or with a key or an entry gone or too many."""
    kind = rng.randrange(6)
    if kind == 0:
        return "[" * 200_000 + "]" * 200_000
    whole = {"": json.loads(text)}
    node: Any = whole
    key: Any = ""
    for _ in range(rng.randrange(6)):
        value = node[key]
        if not isinstance(value, dict | list) or not value:
            break
        node, key = value, rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    if kind == 1 and node is not whole:
        del node[key]
    elif kind == 2 and isinstance(node, dict):
        node[rng.choice(WORDS) or "more"] = rng.choice(VALUES)
    else:
        node[key] = rng.choice(VALUES)
    return json.dumps(whole.get(""))


def damage(file: Path, rng: random.Random) -> None:
    """Damage a file in place, one of JSON now as bytes and now as values."""
    if file.suffix == ".json" and rng.random() < 0.7:
        file.write_text(damaged_json(file.read_text("utf-8"), rng), "utf-8")
    else:
        file.write_bytes(damaged(file.read_bytes(), rng))


def outcome(target: Target, folder: Path, names: list[str]) -> tuple[str, str]:
    """Read the input in `folder` and return "read", "refused" or "broken", and the words of the error."""

    def late(*_: object) -> None:
        raise AssertionError(f"no answer within {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(folder)
    except (ValueError, OSError) as error:
        words = str(error)
        if not words or "\n" in words or len(words) > 3000:
            return "broken", f"not one sentence: {type(error).__name__}: {words[:2000]}"
        named = str(folder) in words or any(name in words for name in names)
        return ("refused" if named else "broken"), f"{type(error).__name__}: {words[:600]}"
    except BaseException as error:
        place = error.__traceback__
        while place and place.tb_next:
            place = place.tb_next
        where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else ""
        return "broken", f"{type(error).__name__} at {where}: {str(error)[:600]}"
    finally:
        signal.alarm(0)
    return "read", ""


def attempt(number: int, sound: Path, folder: Path) -> dict[str, Any]:
    """Damage and read input `number`; sound inputs are made in `sound` once."""
    from fuzz_targets import TARGETS

    rng = random.Random(number)
    names = [name for name, target in TARGETS.items() for _ in range(target.weight)]
    name = names[number % len(names)]
    target = TARGETS[name]
    if not (sound / name).exists():
        (sound / name).mkdir()
        target.make(sound / name)
        target.read(sound / name)  # it is sound
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound / name, folder)
    files = [folder / file.relative_to(sound / name) for file in target.make(sound / name)]
    victim = rng.choice(files)
    damage(victim, rng)
    tracemalloc.start()
    result, words = outcome(target, folder, [victim.name])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    file = victim.relative_to(folder).as_posix()
    return {"input": number, "target": name, "file": file, "outcome": result, "words": words, "peak_bytes": peak}


def main() -> None:
    """Try the inputs and print what becomes of each."""
    base, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    sound, folder = base / "sound", base / "input"
    sound.mkdir(parents=True)
    for number in range(first, last):
        print(json.dumps(attempt(number, sound, folder)), flush=True)
    # Not ru_maxrss, which begins at the peak of the process that started this one.
    peak = int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    print(json.dumps({"process_peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    main()
