"""What an examination comes to: findings, one line each."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Self

OK, WARN, FAIL = "ok", "warn", "fail"
CONFIGURATION = "configuration"
REPORT = "mend the installation, or report this"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Attributes:
      level: OK, WARN (runs go on, but slower or not for long) or FAIL.
      name: what was looked at.
      text: what was seen.
      remedy: what to do; "" where there is nothing to do.

    Raises:
      ValueError: it is not OK, and has no remedy.
    """

    level: str
    name: str
    text: str
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.level != OK and not self.remedy:
            raise ValueError(f"The finding {self.name!r} ({self.text[:80]}) says not what to do.")

    def line(self) -> str:
        """Return it as one line."""
        text = f"{self.text}; {self.remedy}" if self.remedy else self.text
        return f"{self.level:<4}  {self.name}: {' '.join(text.split())}"

    def encoded(self) -> str:
        """Return it as a line of JSON, for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def decoded(cls, line: str) -> Self:
        """Read what `encoded` gave; ValueError where it is something else."""
        try:
            return cls(**json.loads(line))
        except TypeError as error:
            raise ValueError(f"{line[:80]!r} is no finding") from error


def guarded(name: str, examine: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield the findings of `examine`; an examination that breaks down is a finding too, whatever it raises."""
    try:
        yield from examine()
    except Exception as error:
        yield of_error(FAIL, name, error)


def of_error(level: str, name: str, error: Exception) -> Finding:
    """Return the finding that an error makes; this package's own say what to do after their semicolon."""
    text, _, remedy = str(error).rstrip(".").partition("; ")
    if isinstance(error, OSError | ValueError) and remedy:
        return Finding(level, name, text, remedy)
    if name == CONFIGURATION and isinstance(error, ValueError):  # what the user gave, in the words of this package
        return Finding(level, name, text, "correct it, and examine again")
    remedy = "look at its rights and at its storage" if isinstance(error, OSError) else REPORT
    return Finding(level, name, f"{type(error).__name__}: {error}".rstrip("."), remedy)
