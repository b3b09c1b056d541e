"""How every command ends when something is wrong: one sentence on stderr and exit code 1."""

import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

PACKAGE = str(Path(__file__).parent)
DEBUG_FLAG = "--debug"
LONGEST = 500  # characters of an error that repeats what was given


def run_command(main: Callable[[], None], leave: Callable[[int], None] = sys.exit) -> None:
    """Run `main`; an error that a user can mend becomes one line, anything else keeps its traceback.

    Mendable are failures of the system (files, disk, network), a run that diverged, and whatever this
    package itself raises as ValueError. With the flag --debug, which every command takes, or PSP_JAX_DEBUG=1 these keep
    their traceback too. Ctrl-C gives code 130.

    Args:
      main: the command.
      leave: ends the process with an exit code.
    """
    if DEBUG_FLAG in sys.argv[1:]:
        sys.argv.remove(DEBUG_FLAG)
        os.environ["PSP_JAX_DEBUG"] = "1"  # so that commands which this one starts know it too
    sys.unraisablehook = _unraisable
    logging.getLogger("asyncio").addFilter(_is_news)
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        leave(130)
    except Exception as error:
        words = None if os.environ.get("PSP_JAX_DEBUG") else told(error)
        if words is None:
            traceback.print_exc()
        else:
            print(f"error: {words}", file=sys.stderr, flush=True)
        leave(1)


def _unraisable(what: "sys.UnraisableHookArgs") -> None:
    # Where a disk is full, tensorstore tells each of its writes that failed to a loop that has ended with the first.
    if os.environ.get("PSP_JAX_DEBUG") or str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)


def _is_news(record: logging.LogRecord) -> bool:
    # Orbax raises the first of the writes that failed, and drops those that were under way beside it.
    return bool(os.environ.get("PSP_JAX_DEBUG")) or "exception was never retrieved" not in record.getMessage()


def last_words(error: Exception) -> str:
    """Return an error as one line; one that tells of a configuration file has that file's traceback inside."""
    lines = str(error).strip().splitlines()
    words = lines[-1].partition(": ")[2] if "Traceback" in str(error) else " ".join(lines)
    return words if len(words) <= LONGEST else f"{words[:LONGEST]} ..."


def cause(error: BaseException) -> str:
    """Return kind and words of an error as part of a sentence, cut off since they may repeat what was given."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def told(error: Exception) -> str | None:
    """Return the line that tells of an error that a user can mend, None of another; see `run_command`."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    ours = isinstance(error, ValueError) and frame.f_code.co_filename.startswith(PACKAGE)
    return one_line(str(error)) if ours or isinstance(error, OSError | FloatingPointError) else None


def one_line(text: str) -> str:
    """Return `text` with a space for what ends a line, steers a terminal or cannot be written; files are quoted."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
