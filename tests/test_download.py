"""Downloads go on where they ended and are verified."""

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from file_server import Server, running_server

from psp_jax.download import fetch


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.mark.parametrize("parts", [True, False])
def test_a_broken_download_goes_on(tmp_path: Path, server: Server, parts: bool) -> None:
    target = tmp_path / "downloads" / "a.zip"
    server.parts, server.cut = parts, 300_000
    with pytest.raises(FileNotFoundError, match=r"Cannot fetch .* 300,000 bytes are kept, .* means and keep it\."):
        fetch(server.url, target, "sha1", server.sha1, "keep it")
    assert not target.exists()
    server.cut = None
    fetch(server.url, target, "sha1", server.sha1, "keep it")
    assert target.read_bytes() == server.content
    assert server.requests == [None, "bytes=300000-"]


def test_without_a_checksum_a_broken_download_begins_anew(tmp_path: Path, server: Server) -> None:
    server.cut = 300_000
    with pytest.raises(FileNotFoundError) as caught:
        fetch(server.url, tmp_path / "a.zip", "sha1", "", "keep it")
    assert "are kept" not in str(caught.value)
    server.cut, server.content = None, b"another file"
    fetch(server.url, tmp_path / "a.zip", "sha1", "", "keep it")
    assert (tmp_path / "a.zip").read_bytes() == b"another file"
    assert server.requests == [None, None]


def test_a_complete_part_is_only_verified(tmp_path: Path, server: Server) -> None:
    (tmp_path / "a.zip.part").write_bytes(server.content)
    fetch(server.url, tmp_path / "a.zip", "sha1", server.sha1, "keep it")
    assert (tmp_path / "a.zip").read_bytes() == server.content


def test_a_wrong_checksum_is_refused(tmp_path: Path, server: Server) -> None:
    with pytest.raises(ValueError, match=f"checksum {server.sha1}, not 0000; it was removed, try again"):
        fetch(server.url, tmp_path / "a.zip", "sha1", "0000", "keep it")
    assert not list(tmp_path.iterdir())


def test_https_stays_https(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = urllib.request.urlopen(server.url)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: answer)
    with pytest.raises(FileNotFoundError, match=rf"redirected to {server.url}, which is not https\)"):
        fetch("https://example.org/a.zip", tmp_path / "a.zip", "sha1", server.sha1, "keep it")
    assert not list(tmp_path.iterdir())
