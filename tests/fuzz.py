"""A deterministic fuzzer of everything that is read from files and flags: input k is a function of k alone.

(But for the names of the files that hold a checkpoint's arrays, which are drawn anew for each.)

    python tests/fuzz.py FOLDER FIRST LAST

damages sound inputs, reads each as the package does, and prints a line of JSON about each of FIRST ... LAST - 1: it is
read; refused, which is an error that every command ends with in one line, short and with the name of what is wrong; or
broken, with what went wrong. Broken is also what is read as another value than the sound one although a checksum is
there to tell.
"""

import contextlib
import fnmatch
import hashlib
import json
import random
import re
import shutil
import signal
import sys
import time
import traceback
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from psp_jax.command import told

LONGEST = 1000  # characters of a refusal, in which a path may stand twice and what is damaged be quoted
SECONDS = 120  # that reading one input may take, on a slow and loaded machine
TEXTS = (".json", ".csv", ".py", ".flag")
NUMBERS = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"\xff" * 8)
WORDS = ("\ud800", "\x00", "\u202e\u2028", "é" * 5000, "../../etc/passwd", "<script>", "%s{0}$title", "")
VALUES: tuple[Any, ...] = (None, True, -1, 0, 2**31, 2**64, 10**400, 1e308, float("nan"), [], {}, [[]], "text", *WORDS)


class Told(Exception):
    """What a command tells of an input in a line of its output, and goes on."""


class Late(BaseException):
    """There was no answer in time; no reader may take it for damage."""


def files_of(folder: Path, *patterns: str) -> list[Path]:
    """Return the files in a folder whose names match, in order."""
    return sorted({file for pattern in patterns for file in folder.rglob(pattern) if file.is_file()})


def file_name(folder: Path, file: str) -> list[str]:
    """Return what names a file that stands for itself."""
    return [file]


def folder_name(folder: Path, file: str) -> list[str]:
    """Return what names a file that a user knows by its folder: a checkpoint, a bundle, prepared records."""
    return [file, str(folder)]


class Target(NamedTuple):
    """A kind of input.

    Attributes:
      make: writes a sound input to an empty folder and returns the files to damage.
      read: reads it from there and returns what it holds, arrays, bytes and plain values in any tree.
      weight: how often it is taken.
      exact: patterns of the files that have checksums: damaged, they are refused or give what they held.
      names: (folder, file) -> texts, one of which an error about that file must hold.
    """

    make: Callable[[Path], list[Path]]
    read: Callable[[Path], Any]
    weight: int = 1
    exact: tuple[str, ...] = ()
    names: Callable[[Path, str], list[str]] = file_name


def digest(value: Any) -> str:
    """Return a checksum of all that a reader returned."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        array = None if isinstance(leaf, str | bytes) else np.asarray(leaf)
        content = repr(leaf) if array is None else f"{array.dtype} {array.shape} {array.tobytes()!r}"
        found.update(f"{jax.tree_util.keystr(path)} {content}\n".encode("utf-8", "surrogatepass"))
    return found.hexdigest()


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


def fault_of(words: str | None, error: Exception, names: list[str]) -> str:
    """Return what a refusal lacks, "" where it is one sentence that names the input."""
    if words is None:
        return "a traceback"
    if not words.strip() or "\n" in str(error) or "Traceback" in words or "[Errno " in words:
        return "not a sentence"
    if len(words) > LONGEST:
        return f"{len(words)} characters"
    return "" if any(name in words for name in names) else f"without a name of {names[:3]}"


def outcome(target: Target, folder: Path, file: str, sound: str | None) -> tuple[str, str]:
    """Read the input in `folder` and return "read", "refused" or "broken", and the words of the error.

    Args:
      target: kind of the input.
      folder: holds it.
      file: name of the one that is damaged.
      sound: `digest` of what it must be read as, if it is; None for anything.
    """

    def late(*_: object) -> None:
        raise Late(f"no answer within {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = digest(target.read(folder))
    except (Exception, Late, SystemExit) as error:
        words = str(error) if isinstance(error, Told) else told(error) if isinstance(error, Exception) else None
        if not (fault := fault_of(words, error, target.names(folder, file))):
            return "refused", str(words)
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "broken", f"{fault}: {type(error).__name__} at {place.filename}:{place.lineno}: {str(error)[:600]}"
    finally:
        signal.alarm(0)
    return ("read", "") if sound in (None, found) else ("broken", "another value, and a checksum would have told")


SOUND: dict[str, str] = {}  # by target, the digest of what its sound input holds


def attempt(number: int, sound: Path, folder: Path) -> dict[str, Any]:
    """Damage and read input `number`; sound inputs are made in `sound` once."""
    from fuzz_targets import TARGETS

    rng = random.Random(number)
    names = [name for name, target in TARGETS.items() for _ in range(target.weight)]
    name = names[number % len(names)]
    target = TARGETS[name]
    if name not in SOUND:
        (sound / name).mkdir()
        target.make(sound / name)
        SOUND[name] = digest(target.read(sound / name))
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound / name, folder)
    files = [folder / file.relative_to(sound / name) for file in target.make(sound / name)]
    victim = rng.choice(files)
    damage(victim, rng)
    file = victim.relative_to(folder).as_posix()
    exact = any(fnmatch.fnmatch(file, pattern) for pattern in target.exact)
    tracemalloc.start()
    began = time.monotonic()
    result, words = outcome(target, folder, victim.name, SOUND[name] if exact else None)
    seconds = time.monotonic() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    facts = {"input": number, "target": name, "file": file, "exact": exact, "seconds": round(seconds, 3)}
    return facts | {"outcome": result, "words": words, "peak_bytes": peak}


def main() -> None:
    """Try the inputs and print what becomes of each."""
    base, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    sound, folder = base / "sound", base / "input"
    sound.mkdir(parents=True)
    for number in range(first, last):
        with contextlib.redirect_stdout(sys.stderr):  # TFDS prints
            row = attempt(number, sound, folder)
        print(json.dumps(row), flush=True)
    # Not ru_maxrss, which begins at the peak of the process that started this one.
    peak = int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    print(json.dumps({"process_peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    from fuzz import main  # the targets import this module too, under its name

    main()
