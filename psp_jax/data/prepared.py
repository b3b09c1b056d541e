"""Preparing a data set once: what is ready is left alone, what a killed run left behind is removed and done again."""

import contextlib
import fcntl
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from psp_jax import download
from psp_jax.data import builders
from psp_jax.data.builders.ade20k import Ade20k, Archive
from psp_jax.data.builders.files import Part, locate
from psp_jax.data.builders.image_folder import ImageFolder, open_folder
from psp_jax.data.source import read_info

ADE20K_URL = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
# As in GluonCV's preparation script; no SHA-256 of the file is published.
ADE20K_SHA1 = "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"


def ensure_prepared(
    name: str,
    data_dir: str | Path,
    *,
    prepared_dir: str | Path = "data",
    classes: str | Path | None = None,
    archive: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Prepare a data set unless its records are there already, and return their folder.

    Every image and annotation is decoded and checked once. Records are written to a folder of their own that gets its
    name when it is complete. Where several processes call at the same time, one works and the others wait; on several
    hosts let one host call. `open_source` with the same arguments then opens a split.

    Args:
      name, data_dir, prepared_dir, classes: see `builders.locate`.
      archive: for ade20k, ADEChallengeData2016.zip or the folder unpacked from it; for voc2012, cityscapes and
        pascal_context the folder that holds the official archives, or what was unpacked from them. If None the folder
        of prepared data sets has it in downloads/; what is not there is downloaded where that takes no login.
      say: receives sentences on what happens.

    Raises:
      FileNotFoundError, ValueError: naming the file and the remedy: missing or unsuitable input, a bad pair,
        records prepared in part, or no place to write.
    """
    takes = [key for key, builder in builders.BUILDERS.items() if builder.parts or builder is Ade20k]
    if archive and name not in takes:
        raise ValueError(f"The data set {name} takes no archive, only {', '.join(takes)} do.")
    directory = builders.locate(name, data_dir, prepared_dir=prepared_dir, classes=classes)
    if not directory.exists():
        with _lock(directory.parent):
            if not directory.exists():  # another process may have prepared it while this one waited
                _remove_leftovers(directory.parent, say)
                _prepare(name, data_dir, directory, classes, archive, say)
    read_info(directory)
    return directory


def describe(directory: Path) -> str:
    """Return a sentence on prepared records: where, how many, what is missing, a note such as "not the full set"."""
    info, metadata = read_info(directory)
    sizes = metadata["max_size"]
    splits = ", ".join(
        f"{name} {split.num_examples:,} (up to {sizes[name][1]}x{sizes[name][0]} pixels)"
        for name, split in info.splits.items()
    )
    note = f" {metadata['note']}" if metadata["note"] else ""
    note += "".join(f" No {name}, for want of {needs}." for name, needs in metadata.get("absent", {}).items())
    return f"{info.name} in {directory}: {splits}; {len(metadata['classes']['names'])} classes.{note}"


def _prepare(
    name: str,
    data_dir: str | Path,
    directory: Path,
    classes: str | Path | None,
    archive: str | Path | None,
    say: Callable[[str], None],
) -> None:
    root = directory.parent.parent
    builder: builders.PairBuilder
    if name == "ade20k":
        builder = Ade20k(archive=Archive(_ade20k_archive(root, archive, say)), data_dir=root)
    elif name == "image_folder":
        folder, table = open_folder(data_dir, classes)
        builder = ImageFolder(folder=folder, classes=table, data_dir=root)
        outdated = [str(path) for path in root.parent.glob(f"{folder.short_name()}-*") if path != root]
        if outdated:
            say(f"Records of another state of {data_dir}, or of a folder of that name, are in {', '.join(outdated)}.")
    elif parts := builders.BUILDERS[name].parts:
        builder = builders.BUILDERS[name](folder=_archives(name, parts, root, archive, say), data_dir=root)
    else:
        builder = builders.BUILDERS[name](data_dir=root)
    say(f"Preparing {name} in {directory}.")
    tfds.disable_progress_bar()  # ours shows more
    config = tfds.download.DownloadConfig(try_download_gcs=False, compute_stats=tfds.download.ComputeStatsMode.SKIP)
    # TFDS prints that it knows no sizes, and makes a folder for downloads that it is not asked for.
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as unused:
        builder.download_and_prepare(
            download_dir=unused, download_config=config, file_format=tfds.core.FileFormat.ARRAY_RECORD
        )


def _ade20k_archive(root: Path, archive: str | Path | None, say: Callable[[str], None]) -> Path:
    """Return the path of the archive: the one named, or else the one in `root`/downloads, fetched if absent."""
    if archive:
        return Path(archive).expanduser()
    target = root / "downloads" / ADE20K_URL.rsplit("/", 1)[1]
    if not target.exists():
        say(f"Fetching {ADE20K_URL} to {target} (about 1 GB).")
        command = f"python -m psp_jax.prepare --dataset ade20k --data_dir {root} --archive PATH"
        download.fetch(ADE20K_URL, target, "sha1", ADE20K_SHA1, f"put it at {target}, or run `{command}`")
    return target


def _archives(
    name: str, parts: tuple[Part, ...], root: Path, archive: str | Path | None, say: Callable[[str], None]
) -> Path:
    """Return the folder of the official archives: the one named, or else `root`/downloads, what it lacks fetched."""
    if archive:
        folder = Path(archive).expanduser().absolute()
        if not folder.is_dir():
            wanted = " and ".join(part.archive for part in parts)
            raise FileNotFoundError(f"{folder} is not a folder; for {name} name the folder that holds {wanted}.")
        return folder
    folder = (root / "downloads").absolute()
    for part in parts:
        if part.size and not any(locate(folder, one) for one in (part, *part.instead)):
            target = folder / part.archive
            say(f"Fetching {part.url} to {target} (about {part.size}).")
            command = f"python -m psp_jax.prepare --dataset {name} --data_dir {root} --archive FOLDER"
            download.fetch(part.url, target, "md5", part.md5, f"put it at {target}, or run `{command}`")
    return folder


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Hold the right to prepare in `directory`; the system takes it back from a process that dies."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / ".lock").open("w")
    except OSError as error:
        raise ValueError(f"Cannot write to {directory} ({error.strerror}); name another folder.") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_leftovers(directory: Path, say: Callable[[str], None]) -> None:
    """Remove what a killed preparation left behind. Call it with the lock held: nobody else is preparing then."""
    for leftover in directory.glob(f"{tfds.core.constants.INCOMPLETE_PREFIX}*"):
        say(f"Removing {leftover}, left behind by a preparation that was interrupted.")
        shutil.rmtree(leftover)
