"""Weights from the web: downloaded once into a cache directory, and only with a checksum that verifies them."""

import fcntl
import hashlib
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from psp_jax.download import checksum
from psp_jax.download import fetch as download

CACHE = Path("~/.cache/psp_jax")
# torchvision, timm's gluon files and mmsegmentation end their names in the first digits of the SHA-256.
NAMED_DIGEST = re.compile(r"-([0-9a-f]{8})\.\w+$")
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


def fetch(url_or_path: str, sha256: str | None = None, cache: Path | None = None) -> Path:
    """Return the path of a file of weights, downloaded first if it is an https address.

    Every address has a folder of its own in the cache, since many files are called model.safetensors. Several processes
    may ask for the same file at a time: one downloads it, the others wait.

    Args:
      url_or_path: an https address, or a path, which is returned as it is.
      sha256: hexadecimal, whole or its first 8 or more digits; by default those that the name ends in, if it does.
      cache: where downloads are kept; by default ~/.cache/psp_jax/weights, or `weights` in the folder that the
        environment variable PSP_JAX_CACHE names.

    Raises:
      FileNotFoundError: no such file, or no network: the sentence says which file to put where.
      ValueError: another checksum, none for a file that is not in the cache, or an address of another kind.
    """
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{8,64}", sha256):
        raise ValueError(f"The SHA-256 {sha256!r} is not 8 to 64 hexadecimal digits.")
    if "://" not in url_or_path:
        path = Path(url_or_path).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"There is no file {path}; give an existing one, or an https address.")
        _verify(path, (sha256 or "").lower())
        return path
    name = _file_name(url_or_path)
    digest = (sha256 or _named_digest(name)).lower()
    if cache is None:
        cache = Path(os.environ.get("PSP_JAX_CACHE") or CACHE) / "weights"
    target = cache.expanduser() / hashlib.sha256(url_or_path.encode()).hexdigest()[:8] / name
    if target.exists():  # a shared cache may be read-only, then no lock can be made
        _verify(target, digest)
        return target
    if not digest:
        raise ValueError(
            f"Nothing tells what {url_or_path} should send; give the SHA-256 that its publisher tells, by "
            "--config.init.sha256 or --sha256, or download it by other means and give the path of the file."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            _verify(target, digest)
        else:
            download(url_or_path, target, "sha256", digest, f"put it at {target}")
    return target


def was_downloaded(path: Path) -> bool:
    """Tell whether `path` is a file that `fetch` keeps."""
    return _lock(path).exists()


def _lock(target: Path) -> Path:
    return target.with_name(f"{target.name}.lock")


def _file_name(url: str) -> str:
    """Return a name for what `url` gives, of letters, digits, dots and dashes; ValueError unless it is https."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in THIS_MACHINE):
        raise ValueError(f"{url} is not an https address; download it by other means and give the path of the file.")
    name = re.sub(r"[^A-Za-z0-9._-]", "_", unquote(parts.path).rsplit("/", 1)[-1]).lstrip(".")
    if not name:
        raise ValueError(f"{url} names no file.")
    return name


def _named_digest(name: str) -> str:
    found = NAMED_DIGEST.search(name)
    # Eight decimal digits are rather a date, as in pspnet-20200615.pth.
    return found[1] if found and not found[1].isdecimal() else ""


def _verify(path: Path, digest: str) -> None:
    if digest and not (found := checksum(path, "sha256")).startswith(digest):
        raise ValueError(f"{path} has the SHA-256 {found}, not {digest}; remove it and try again.")
