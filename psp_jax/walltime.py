"""What a training loop is doing, and how much time it has spent on what."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator

# In the order in which they follow each other; `again` is the steps that a killed process had taken already.
ACTIVITIES = ("start", "data_wait", "compile", "step", "again", "validation", "checkpoint")
_STEPPING = ("data_wait", "step", "again")


class WallTime:
    """Divides the time since it was made among ACTIVITIES, without a gap.

    Example:
      walltime = WallTime()
      for step in range(1, steps + 1):
          walltime.begin(step)
          with walltime.during("data_wait"):
              batch = next(batches)
          state, metrics = train_step(state, batch)
          walltime.add(batch_size)
          with walltime.during("validation"):
              validate()
      log(walltime.take())

    Attributes:
      step: the step begun last, 0 before the first.
      activity: the present one.
      moves: how many things were finished: steps, batches of a validation.
      reached: the last step that a former process had begun.
      step_seconds: what the last hundred steps took, validations and checkpoints left out.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.step, self.activity, self.moves, self.reached = 0, ACTIVITIES[0], 0, 0
        self.step_seconds: collections.deque[float] = collections.deque(maxlen=100)
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._clock, self._since = clock, clock()
        self._images, self._taken, self._waited, self._begun = 0, 0.0, 0.0, 0.0

    def begin(self, step: int) -> None:
        """Begin with a step, counted from 1, and so end the one before."""
        self._turn("again" if step <= self.reached else "step")
        stepping = self._stepping()
        if self.step:
            self.step_seconds.append(stepping - self._begun)
        self.step, self._begun = step, stepping
        self.move()

    def move(self) -> None:
        """Tell that something was finished."""
        self.moves += 1

    @contextlib.contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Count the time inside as that of `activity`."""
        outer = self.activity
        self._turn(activity)
        try:
            yield
        finally:
            self._turn(outer)

    def seconds(self) -> dict[str, float]:
        """Return the time spent in each activity until now."""
        self._turn(self.activity)
        return dict(self._seconds)

    def add(self, images: int) -> None:
        """Count the images (of all processes) of one step."""
        self._images += images

    def take(self) -> dict[str, float]:
        """Return images_per_second and data_wait (a share, 0..1) of the steps since the last call."""
        stepping, waited = self._stepping(), self._seconds["data_wait"]
        seconds = max(stepping - self._taken, 1e-9)
        values = {
            "images_per_second": self._images / seconds,
            "data_wait": min(1.0, (waited - self._waited) / seconds),
        }
        self._images, self._taken, self._waited = 0, stepping, waited
        return values

    def _stepping(self) -> float:
        seconds = self.seconds()
        return sum(seconds[activity] for activity in _STEPPING)

    def _turn(self, activity: str) -> None:
        now = self._clock()
        self._seconds[self.activity] += now - self._since
        self.activity, self._since = activity, now
