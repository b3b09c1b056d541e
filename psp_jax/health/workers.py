"""Examines a worker process of the data pipeline. Imports no jax: the worker imports this module."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from psp_jax.data.workers import Batch, Batches, WorkerPool
from psp_jax.health.findings import FAIL, OK, Finding, of_error


class Numbers:
    """Batches that hold their own number."""

    def __getitem__(self, step: int) -> Batch:
        return {"step": np.array([step])}


class Records:
    """Batches of one record of a source each, decoded."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __getitem__(self, step: int) -> Batch:
        record = self.source[step]
        return {"step": np.array([step]), "image": record["image"], "label": record["label"]}


def worker(batches: Batches, what: str, seconds: float) -> Iterator[Finding]:
    """Start a worker process, let it answer for batch 0, and give it `seconds` for that."""
    answer: list[Any] = []

    def ask(pool: WorkerPool) -> None:
        try:
            answer.append(next(pool))
        except Exception as error:
            answer.append(error)

    with WorkerPool(batches, 0, 1, 1) as pool:
        asking = threading.Thread(target=ask, args=(pool,), daemon=True)
        asking.start()
        asking.join(seconds)
    if not answer:
        text = f"a worker process gave no answer in {seconds:.0f} s"
        yield Finding(FAIL, "data worker", text, "look whether the storage of the data or of Python's packages hangs")
    elif isinstance(answer[0], Exception):
        yield of_error(FAIL, "data worker", answer[0])
    else:
        shape = answer[0]["image"].shape if "image" in answer[0] else ()
        size = f", {shape[1]}x{shape[0]} pixels" if shape else ""
        yield Finding(OK, "data worker", f"a worker process answers with {what}{size}")
