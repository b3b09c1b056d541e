"""What is read from outside runs no code, unpacks to no more than it should, and reaches no page as markup."""

import ast
import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import ROOT, environment, run_module
from hostile import understated

from psp_jax.data.builders import files
from psp_jax.data.builders.files import Files
from psp_jax.data.source import read_info
from psp_jax.report import write_page

SOURCES = sorted((ROOT / "psp_jax").rglob("*.py"))
HOSTILE = "</script><img src=x onerror=alert(1)>\u2028&amp;\"'<!--"
# Pickles only go between a process and the workers that it starts; pickletools looks at a stream and builds nothing.
PICKLING = {"data/workers.py": {"pickle"}, "weights/pickles.py": {"pickletools"}}
UNSAFE = {"pickle", "pickletools", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch", "yaml"}
BUILT_IN = {"eval", "exec", "compile", "__import__"}
CALLS = {"extractall", "extract", "unpack_archive", "mktemp", "system", "popen"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_can_run_what_it_reads(path: Path) -> None:
    """No unpickling, no eval, no unpacking to names that an archive chooses, no shell."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            unsafe = CALLS | BUILT_IN if isinstance(node.func, ast.Name) else CALLS
            assert name not in unsafe, f"line {node.lineno}: {name}"
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                assert (keyword.arg, value) not in {("allow_pickle", True), ("shell", True)}, f"line {node.lineno}"
    assert imported & UNSAFE == PICKLING.get(path.relative_to(ROOT / "psp_jax").as_posix(), set())


def bombed(path: Path, size: int) -> Path:
    """Write an archive with a file of `size` zeros, compressed where its kind is."""
    zeros = io.BytesIO(bytes(size))
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("top/a.png", zeros.getvalue())
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
            member = tarfile.TarInfo("top/a.png")
            member.size = size
            tar.addfile(member, zeros)
    return path


@pytest.mark.parametrize("kind", ["a.zip", "a.tgz"])
def test_an_archive_that_grows_without_measure(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bombed(tmp_path / kind, 20_000_000)
    assert path.stat().st_size < 100_000
    assert len(Files(path, "top").read("a.png")) == 20_000_000
    monkeypatch.setattr(files, "MAX_BYTES", 1_000_000)
    with pytest.raises(ValueError, match=rf"{kind}.*it would unpack to 20,.* bytes, which images and labels do not"):
        Files(path, "top", keep="others")


@pytest.mark.parametrize("kind", ["a.zip", "a.tar"])
def test_a_file_too_large_for_an_image(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bombed(tmp_path / kind, 50_000)
    monkeypatch.setattr(files, "MAX_BYTES", 49_999)
    monkeypatch.setattr(files, "MAX_GROWTH", 10_000)
    with pytest.raises(ValueError, match=rf"{kind}.*a file of it has 50,000 bytes, more than an image"):
        Files(path, "top").read("a.png")


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_FILES", 0)
    with pytest.raises(ValueError, match="it holds 1 files, more than any data set"):
        Files(bombed(tmp_path / "a.zip", 5))


def test_a_zip_entry_that_understates_itself_takes_no_memory(tmp_path: Path) -> None:
    path = understated(bombed(tmp_path / "a.zip", 100_000_000), b"\0" * 10, 10)
    tracemalloc.start()
    read = Files(path, "top").read("a.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(read) == 10 and peak < 4_000_000


def test_a_tgz_header_of_any_size(tmp_path: Path) -> None:
    """The header of a long name says how long; tarfile takes it into memory whole."""
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 100_000_000
    path = tmp_path / "a.tgz"
    with gzip.open(path, "wb") as stream:
        stream.write(member.tobuf(tarfile.GNU_FORMAT) + bytes(100_000_000))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a\.tgz .* a header of 100,000,256 bytes"):
        Files(path, "top")
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["a.zip", "a.tar", "a.tgz"])
@pytest.mark.parametrize("name", ["../../evil", "/evil", "top/../../evil", "top/link"])
def test_names_and_links_lead_nowhere(kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "evil").write_bytes(b"secret")
    path = tmp_path / "in" / kind
    path.parent.mkdir()
    if kind == "a.zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("top/a.txt", b"a")
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o120777 << 16
            archive.writestr(entry, str(tmp_path / "evil"))
    else:
        with tarfile.open(path, "w:gz" if kind == "a.tgz" else "w") as tar:
            for written, link in (("top/a.txt", ""), (name, str(tmp_path / "evil"))):
                member = tarfile.TarInfo(written)
                member.type, member.linkname = (tarfile.SYMTYPE, link) if link else (tarfile.REGTYPE, "")
                tar.addfile(member)
    found = Files(path, "top")
    assert not any(b"secret" in found.read(member) for member in found.names)
    assert sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*")) == ["evil", "in", f"in/{kind}"]


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "python\\u0043lassName"])
def test_prepared_records_import_no_module(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TFDS imports the module of a class that features.json names."""
    (tmp_path / "evil_module.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "features.json").write_text(f'{{"featuresDict": {{}}, "{key}": "evil_module.Feature"}}')
    for name in ("dataset_info.json", "metadata.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"features\.json names 'evil_module\.Feature', which TFDS would import"):
        read_info(tmp_path)


class Elements(HTMLParser):
    """Counts the elements of a page and keeps the text of its payload."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: dict[str, int] = {}
        self.payload, self.title, self._inside = "", "", ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self._inside = dict(attributes).get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self.payload += data if self._inside == "payload" else ""
        self.title += data if self._inside == "title" else ""


@pytest.mark.parametrize("kind", ["report", "compare", "ablation", "check_data"])
def test_hostile_names_are_text_on_every_page(kind: str, tmp_path: Path) -> None:
    payload = {HOSTILE: [HOSTILE, {"name": HOSTILE}]}
    hostile = Elements(write_page(tmp_path / "a.html", kind, HOSTILE, payload).read_text("utf-8"))
    harmless = Elements(write_page(tmp_path / "b.html", kind, "a", {}).read_text("utf-8"))
    assert hostile.tags == harmless.tags and hostile.tags["script"] == 2
    assert hostile.title == HOSTILE and json.loads(hostile.payload) == payload


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    flags = ("--dataset=image_folder", f"--source={tmp_path}", f"--data_dir={tmp_path}")
    quiet, told = run_module("psp_jax.prepare", *flags), run_module("psp_jax.prepare", *flags, "--debug")
    assert quiet.returncode == told.returncode == 1
    assert quiet.stderr.startswith("error: ") and quiet.stderr.count("\n") == 1
    assert told.stderr.startswith("Traceback") and quiet.stderr.removeprefix("error: ") in told.stderr


def test_an_error_of_our_own_keeps_its_traceback() -> None:
    program = "from psp_jax.command import run_command\ndef main(): [][1]\nrun_command(main)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "IndexError" in done.stderr and "Traceback" in done.stderr
    assert "PSP_JAX_DEBUG" not in os.environ
