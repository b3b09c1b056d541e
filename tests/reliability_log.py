"""What the tests of reliability tell benchmarks/reliability.py: a line of JSON in the file that a variable names."""

import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "PSP_JAX_RELIABILITY_LOG"


def record(kind: str, **facts: Any) -> None:
    """Append facts about one fault or input, if anybody asks for them."""
    if file := os.environ.get(VARIABLE):
        with Path(file).open("a", encoding="utf-8") as log:
            log.write(json.dumps({"kind": kind, **facts}) + "\n")
