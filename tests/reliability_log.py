"""What the tests of reliability tell benchmarks/reliability.py: a line of JSON in the file that a variable names."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VARIABLE = "PSP_JAX_RELIABILITY_LOG"


def record(kind: str, **facts: Any) -> None:
    """Append facts about one fault or input, if anybody asks for them."""
    if file := os.environ.get(VARIABLE):
        with Path(file).open("a", encoding="utf-8") as log:
            log.write(json.dumps({"kind": kind, **facts}) + "\n")


@contextlib.contextmanager
def fault(**facts: Any) -> Iterator[dict[str, Any]]:
    """Record a fault with what is added to `facts` inside, and whether it was survived: nothing was raised inside.

    The facts of one that was not are printed, the seed among them, for pytest to show.
    """
    survived = False
    try:
        yield facts
        survived = True
    finally:
        if not survived:
            print(f"not survived: {json.dumps(facts)}")
        record("fault", survived=survived, **facts)
