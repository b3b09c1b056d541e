"""Fetching one large file: with a progress bar, going on where an earlier try ended, and with its checksum verified."""

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

CHUNK = 1 << 20  # bytes
TIMEOUT = 60.0  # seconds without any data


def fetch(url: str, target: Path, algorithm: str, digest: str, other_way: str) -> None:
    """Download `url` to `target`; an unfinished download waits in `target`.part and is gone on with.

    Args:
      url: what to download.
      target: the file to write; its folder is made.
      algorithm, digest: a checksum such as "sha1" in hexadecimal, or the first digits of it. Without a digest nothing
        would tell that two halves belong together: then every try begins anew.
      other_way: what to do with a file that was downloaded by hand, the end of a sentence.

    Raises:
      FileNotFoundError: the server cannot be reached or the connection broke; ends with `other_way`.
      ValueError: the file does not have the checksum.
    """
    part = target.with_name(f"{target.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    if not digest:
        part.unlink(missing_ok=True)
    try:
        _download(url, part)
    except (OSError, http.client.HTTPException) as error:
        kept = f" {part.stat().st_size:,} bytes are kept, the next try goes on from there." if part.exists() else ""
        raise FileNotFoundError(
            f"Cannot fetch {url} ({error}).{kept if digest else ''} "
            f"You can also download it by other means and {other_way}."
        ) from None
    found = checksum(part, algorithm)
    if not found.startswith(digest):
        part.unlink()
        raise ValueError(
            f"What {url} sent has the {algorithm} checksum {found}, not {digest}; it was removed, try again."
        )
    part.rename(target)


def checksum(path: Path, algorithm: str) -> str:
    """Return the hexadecimal checksum of a file; `algorithm` is a name that hashlib knows."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _download(url: str, part: Path) -> None:
    """Append to `part` what it lacks of `url`. Raises OSError or HTTPException when the transfer ends early."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if have and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is missing; the checksum decides
        raise
    with response:
        if url.startswith("https:") and not response.url.startswith("https:"):
            raise ConnectionError(f"it was redirected to {response.url}, which is not https")
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0  # a server that cannot send parts starts from the beginning
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        columns = (TextColumn(part.stem), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with part.open("ab" if have else "wb") as file, Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("download", total=total, completed=have)
            while chunk := response.read(CHUNK):
                file.write(chunk)
                have += len(chunk)
                progress.update(task, completed=have)
    if total is not None and have != total:
        raise ConnectionError(f"the connection ended after {have:,} of {total:,} bytes")
