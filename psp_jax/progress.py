"""What a run tells while it goes: metrics.jsonl, validation.jsonl, TensorBoard events, console lines and bars.

On a terminal the lines scroll above live bars; anywhere else (a log file, CI) there are plain lines without control
characters. On every process but the primary one all of this does nothing.
"""

import contextlib
import datetime
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars

from psp_jax.atomic import naming, replacing

Tracked = contextlib.AbstractContextManager[Callable[[int], None]]
# Not in a step's line on the console: `CompileLog.words` and `Recorder` have told them.
_LOGGED_ONLY = ("compile_seconds", "compile_hits", "compile_misses", "skipped", "invalid_labels")
_HEARTBEAT_SECONDS = 30.0  # without a terminal, a long `track` says this often how far it is


class Progress:
    """The log of one training run.

    On a resumed run, what was logged after `start_step` (by the killed process, whose later steps are taken again) is
    dropped from the .jsonl files and hidden in TensorBoard, so that no step is told twice.

    Args:
      workdir: holds metrics.jsonl, validation.jsonl and tensorboard/; created when missing.
      total_steps: the step at which training ends.
      start_step: steps already taken, 0 for a new run.
      primary: whether this process is the one that logs.
      tensorboard: whether to write TensorBoard events.
      between: see `track`.
    """

    def __init__(
        self,
        workdir: str | Path,
        total_steps: int,
        start_step: int,
        *,
        primary: bool,
        tensorboard: bool,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self._total, self._primary, self._between = total_steps, primary, between
        self._first: tuple[int, float] | None = None  # first step finished by this process, and when
        self._remaining = ""
        self._writer: Any = None
        self._bars: Bars | None = None
        if not primary:
            return
        folder = Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "validation.jsonl", "skipped.jsonl"):
            _cut_log(folder / name, start_step)
        self._metrics, self._validations = (
            (folder / name).open("a", encoding="utf-8") for name in ("metrics.jsonl", "validation.jsonl")
        )
        if tensorboard:
            from tensorboardX import SummaryWriter  # takes most of a second to import

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1, flush_secs=30)
        self._bars = _start_bars()
        if self._bars is not None:
            self._bar = self._bars.add_task("train", total=total_steps, completed=start_step, note="")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def advance(self, step: int) -> None:
        """Tell that `step` steps are done: moves the bar and the estimate of the time that remains."""
        if not self._primary:
            return
        now = time.monotonic()
        # Counted from the end of this process's first step, which holds the compilation.
        if self._first is None:
            self._first = (step, now)
        elif step > self._first[0]:
            seconds = (now - self._first[1]) / (step - self._first[0]) * (self._total - step)
            self._remaining = _left(seconds)
        if self._bars is not None:
            self._bars.update(self._bar, completed=step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of one step, the losses first, to metrics.jsonl, TensorBoard and the console.

        Values that are not finite become null in metrics.jsonl (JSON has no word for them), a gap in TensorBoard.
        """
        if not self._primary:
            return
        values = {key: values[key] for key in ("loss", "main_loss", "aux_loss", *values) if key in values}
        self._record(self._metrics, step, values)
        words = [_words(key, float(value)) for key, value in values.items() if key not in _LOGGED_ONLY]
        if self._bars is not None:
            short = [_words(key, float(values[key])) for key in ("loss", "images_per_second") if key in values]
            self._bars.update(self._bar, note="  ".join([*short, self._remaining]))
        place = f"step {step:>{len(str(self._total))}}/{self._total}"
        self.say("  ".join([place, *words, self._remaining]).rstrip())

    def validated(self, step: int, scores: Mapping[str, float | None]) -> None:
        """Write the scores of a validation, None where there is none, to validation.jsonl, TensorBoard, the console."""
        if not self._primary:
            return
        self._record(self._validations, step, scores, "validation/")
        words = [f"{key} n/a" if score is None else f"{key} {score:.4f}" for key, score in scores.items()]
        self.say("  ".join([f"validation after step {step}", *words]))

    def image(self, step: int, tag: str, picture: npt.NDArray[np.uint8]) -> None:
        """Write a picture u8[H, W, 3] to TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(tag, picture, step, dataformats="HWC")

    def say(self, text: str) -> None:
        """Print a line, above the bars where there are any."""
        if self._primary:
            _print(text, self._bars)

    def track(self, total: int, description: str, first: int = 0) -> Tracked:
        """Show a second bar below the first, for example while validating: see the function `track`."""
        return track(total, description, first=first, primary=self._primary, bars=self._bars, between=self._between)

    def close(self) -> None:
        """Flush and close everything; the bar stays on the screen as it is. Closing twice is fine."""
        if not self._primary:
            return
        if self._bars is not None:
            self._bars.stop()
        if self._writer is not None:
            self._writer.close()
        for file in (self._metrics, self._validations):
            with naming(Path(file.name)):  # what could not be written is tried once more
                file.close()

    def _record(self, file: TextIO, step: int, values: Mapping[str, float | None], prefix: str = "") -> None:
        finite = {key: float(v) if v is not None and math.isfinite(v) else None for key, v in values.items()}
        with naming(Path(file.name)):
            file.write(json.dumps({"step": step} | finite, allow_nan=False) + "\n")
            file.flush()
        if self._writer is not None:
            for key, value in finite.items():
                if value is not None:
                    self._writer.add_scalar(prefix + key, value, step)


@contextlib.contextmanager
def track(
    total: int,
    description: str,
    *,
    first: int = 0,
    primary: bool = True,
    bars: Bars | None = None,
    between: Callable[[], None] = lambda: None,
) -> Iterator[Callable[[int], None]]:
    """Show how far a piece of work is. Yields `advance(n)`, which counts n more of `total` as done.

    Example:
      with track(len(files), "predict") as advance:
          for file in files:
              ...
              advance(1)

    Args:
      total: number of things to do.
      description: what is being done, one or two words.
      first: how many of them were done before.
      primary: False shows nothing.
      bars: the live display to join; without one, a display of its own where stdout is a terminal.
      between: called by every `advance`, on every process; an exception out of it ends the work.
    """
    if not primary:
        yield lambda n: between()
        return
    own = _start_bars() if bars is None else None
    shown = bars or own
    done, begin = first, time.monotonic()
    spoken = begin
    bar = shown.add_task(description, total=total, note="") if shown is not None else None

    def advance(n: int) -> None:
        nonlocal done, spoken
        done += n
        now = time.monotonic()
        left = _left((now - begin) / max(done - first, 1) * (total - done))
        if shown is not None and bar is not None:
            shown.update(bar, completed=done, note=left)
        elif now - spoken >= _HEARTBEAT_SECONDS:
            spoken = now
            _print(f"{description}: {done}/{total} after {now - begin:.0f} s, {left}", None)
        between()

    try:
        yield advance
    finally:
        if shown is not None and bar is not None:
            shown.remove_task(bar)
        if own is not None:
            own.stop()
        _print(f"{description}: {done}/{total} in {time.monotonic() - begin:.1f} s", bars)


def _cut_log(path: Path, last_step: int) -> None:
    """Drop what is later than `last_step` from a log, and the half line of a kill."""
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        kept = "".join(
            line + "\n" for line in text.splitlines() if (step := _step_of(line)) is not None and step <= last_step
        )
        if kept != text:
            with replacing(path) as partial:
                partial.write_text(kept, encoding="utf-8")


def _step_of(line: str) -> int | None:
    """The step of a line of a log, None when the line is not whole."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _left(seconds: float) -> str:
    return f"{datetime.timedelta(seconds=round(seconds))} left"


def _words(key: str, value: float) -> str:
    """A value as the console tells it."""
    if key == "images_per_second":
        return f"{value:.1f} images/s"
    if key == "data_wait":
        return f"data wait {100 * value:.0f} %"
    return f"{key} {value:.4g}"


def _start_bars() -> Bars | None:
    """Start a live display, or None where stdout is not a terminal that can show one."""
    console = Console()
    # Not console.is_terminal: FORCE_COLOR turns it on for pipes too.
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    bars = Bars(*columns, console=console)
    bars.start()
    return bars


def _print(text: str, bars: Bars | None) -> None:
    if bars is None:
        print(text, flush=True)
    else:
        bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
