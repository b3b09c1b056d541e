"""JAX's cache of compiled programs on disk: where it is, and what a start took from it."""

import hashlib
import os
import platform
import sys
import tempfile
from pathlib import Path

import jax
from jax._src.compilation_cache import is_persistent_cache_enabled  # has no public name

OFF = "off"
MAX_BYTES = 10 * 2**30


def default_directory(workdir: Path, processes: int) -> str:
    """Return where programs are kept unless a flag tells: JAX_COMPILATION_CACHE_DIR, or else a folder.

    One process keeps them in the user's ~/.cache. JAX lets process 0 alone write, so that several share a folder beside
    the workdir: all machines see that storage, and it outlives them.
    """
    if given := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return given
    if processes > 1:
        return str(workdir.absolute().parent / ".psp_jax_compilation")
    return os.path.expanduser("~/.cache/psp_jax/compilation")


def enable(directory: str, max_bytes: int = MAX_BYTES) -> None:
    """Keep every compiled program in `directory`, "off" keeps none; say so on stderr where it cannot be written.

    The programs of a CPU go to a folder for its kind: another one may lack instructions that they use, which JAX's key
    does not tell. What was read longest ago is removed first where the folder holds more than `max_bytes`.
    """
    if directory == OFF:
        jax.config.update("jax_compilation_cache_dir", None)
        return
    if "://" not in directory:
        folder = Path(os.path.expanduser(directory))
        if jax.default_backend() == "cpu":
            folder /= f"cpu-{_processor()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            if jax.process_index() == 0:
                _trim(folder, max_bytes)
        except OSError as error:
            print(
                f"warning: compiled programs are not kept: {folder} cannot be written ({error.strerror}); give another "
                "folder by --compile_cache=DIR, or --compile_cache=off.",
                file=sys.stderr,
                flush=True,
            )
            jax.config.update("jax_compilation_cache_dir", None)
            return
        directory = str(folder)
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


class CompileLog:
    """What was compiled in this process since the log was made.

    Attributes:
      seconds: spent on compiling, and on reading what was compiled before.
      hits, misses: programs that were found in the cache, and those that were not; both 0 without a cache.
    """

    def __init__(self) -> None:
        self.seconds, self.hits, self._asked = 0.0, 0, 0
        jax.monitoring.register_event_listener(self._event)
        jax.monitoring.register_event_duration_secs_listener(self._duration)

    @property
    def misses(self) -> int:
        return self._asked - self.hits

    def words(self) -> str:
        """Return a line such as "compiled in 31.2 s up to the first step (cache: 0 hits, 12 misses)"."""
        cache = f"cache: {self.hits} hits, {self.misses} misses" if self._asked else "no cache"
        return f"compiled in {self.seconds:.1f} s up to the first step ({cache})"

    def values(self) -> dict[str, float]:
        """Return seconds, hits and misses, for the metrics."""
        return {"compile_seconds": self.seconds, "compile_hits": self.hits, "compile_misses": self.misses}

    def _event(self, event: str, **_: str | int) -> None:
        if not is_persistent_cache_enabled():
            return  # JAX asks also where it has nothing to ask
        self._asked += event == "/jax/compilation_cache/compile_requests_use_cache"
        self.hits += event == "/jax/compilation_cache/cache_hits"

    def _duration(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds += duration_secs


def _processor() -> str:
    """Return a digest of the CPU's model and of what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        first = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    except OSError:
        first = [platform.processor()]  # not Linux
    return hashlib.sha256("\n".join([platform.machine(), *first]).encode()).hexdigest()[:12]


def _trim(folder: Path, max_bytes: int) -> None:
    """Remove the programs read longest ago until `folder` holds at most `max_bytes` of them."""
    found = sorted(((file.stat(), file) for file in folder.glob("*-cache")), key=lambda one: one[0].st_atime)
    excess = sum(stat.st_size for stat, _ in found) - max_bytes
    for stat, file in found:
        if excess <= 0:
            return
        file.unlink(missing_ok=True)
        excess -= stat.st_size
