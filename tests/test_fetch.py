"""Weights from the web: once, gone on with, verified, and a sentence for whoever has no network."""

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from file_server import Server, running_server

from psp_jax.weights.fetch import fetch
from psp_jax.weights.formats import read_tensors

SHA256 = hashlib.sha256(Server.content).hexdigest()


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


def address(server: Server, name: str) -> str:
    return server.url.replace("a.zip", name)


def test_a_path_is_returned_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.pth").write_bytes(Server.content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch("a.pth") == Path("a.pth")
    assert fetch("~/a.pth", SHA256.upper()) == tmp_path / "a.pth"
    with pytest.raises(ValueError, match=f"a.pth has the SHA-256 {SHA256}, not 01234567; remove it"):
        fetch("a.pth", "01234567")
    with pytest.raises(FileNotFoundError, match=r"There is no file b\.pth; give an existing one"):
        fetch("b.pth")


@pytest.mark.parametrize("digest", [SHA256, SHA256[:8]])
def test_downloaded_once(tmp_path: Path, server: Server, digest: str | None) -> None:
    path = fetch(server.url, digest, tmp_path)
    assert path.read_bytes() == Server.content and path.name == "a.zip" and path.is_relative_to(tmp_path)
    assert fetch(server.url, digest, tmp_path) == path
    assert server.requests == [None]


def test_a_cache_that_has_the_file_is_not_written(tmp_path: Path, server: Server) -> None:
    """It may be read-only, as one that several users share."""
    path = fetch(server.url, SHA256, tmp_path)
    for file in path.parent.glob("*.lock"):
        file.unlink()
    assert fetch(server.url, None, tmp_path) == path
    assert list(path.parent.iterdir()) == [path]


def test_the_refusal_of_a_download_tells_what_to_remove(tmp_path: Path, server: Server) -> None:
    server.content = b"<!DOCTYPE html>sign in"
    path = fetch(address(server, "a.pth"), hashlib.sha256(server.content).hexdigest(), tmp_path)
    with pytest.raises(ValueError, match=rf"Cannot read {path}: .*; .* remove that file and try again\."):
        read_tensors(path)
    own = tmp_path / "own.pth"
    own.write_bytes(server.content)
    with pytest.raises(ValueError, match="not a file of torch") as caught:
        read_tensors(own)
    assert "remove" not in str(caught.value)


def test_every_address_has_its_own_file(tmp_path: Path, server: Server) -> None:
    one, other = (fetch(address(server, f"{name}/model.safetensors"), SHA256, tmp_path) for name in "ab")
    assert one.name == other.name == "model.safetensors" and one != other


def test_names_from_the_web_stay_in_the_cache(tmp_path: Path, server: Server) -> None:
    path = fetch(address(server, "x/..%2F..%2Fevil%20file.pth?download=1"), SHA256, tmp_path / "cache")
    assert path.name == "evil_file.pth" and path.resolve().is_relative_to(tmp_path / "cache")
    assert fetch(address(server, "x/..%2f.bashrc"), SHA256, tmp_path / "cache").name == "bashrc"
    with pytest.raises(ValueError, match="names no file"):
        fetch(address(server, "x/"), None, tmp_path / "cache")


def test_the_cache_of_the_environment(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSP_JAX_CACHE", str(tmp_path / "elsewhere"))
    assert fetch(server.url, SHA256).is_relative_to(tmp_path / "elsewhere" / "weights")
    monkeypatch.delenv("PSP_JAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch(server.url, SHA256).is_relative_to(tmp_path / ".cache" / "psp_jax" / "weights")


@pytest.mark.parametrize("parts", [True, False])
def test_a_broken_download_goes_on(tmp_path: Path, server: Server, parts: bool) -> None:
    server.parts, server.cut = parts, 300_000
    with pytest.raises(FileNotFoundError, match=r"Cannot fetch http.* 300,000 bytes are kept, .* put it at .*a\.zip\."):
        fetch(server.url, SHA256, tmp_path)
    server.cut = None
    assert fetch(server.url, SHA256, tmp_path).read_bytes() == Server.content
    assert server.requests == [None, "bytes=300000-"]


def test_a_wrong_checksum(tmp_path: Path, server: Server) -> None:
    with pytest.raises(ValueError, match=f"sha256 checksum {SHA256}, not {'0' * 64}; it was removed"):
        fetch(server.url, "0" * 64, tmp_path)
    with pytest.raises(ValueError, match=f"{SHA256}, not 0123abcd"):
        fetch(address(server, "resnet50-0123abcd.pth"), None, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    with pytest.raises(ValueError, match="'012' is not 8 to 64 hexadecimal digits"):
        fetch(server.url, "012", tmp_path)


def test_the_checksum_in_a_name(tmp_path: Path, server: Server) -> None:
    path = fetch(address(server, f"resnet50-{SHA256[:8]}.pth"), None, tmp_path)
    path.write_bytes(b"damaged later, or put there by hand")
    with pytest.raises(ValueError, match=f"{path} has the SHA-256 .*, not {SHA256[:8]}; remove it and try again"):
        fetch(address(server, f"resnet50-{SHA256[:8]}.pth"), None, tmp_path)
    with pytest.raises(ValueError, match="Nothing tells what"):
        fetch(address(server, "pspnet-20200615.pth"), None, tmp_path)  # a date


def test_nothing_is_downloaded_without_a_checksum(tmp_path: Path, server: Server) -> None:
    with pytest.raises(ValueError, match=r"Nothing tells what .*a\.zip should send; give the SHA-256 .* --sha256"):
        fetch(server.url, None, tmp_path)
    assert not server.requests and not list(tmp_path.iterdir())


def test_two_at_a_time(tmp_path: Path, server: Server) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(server.url, SHA256, tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and {path.read_bytes() for path in found} == {Server.content}
    assert server.requests == [None]


def test_without_a_network(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/resnet50-0123abcd.pth"
    with pytest.raises(FileNotFoundError) as caught:
        fetch(url, None, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"Cannot fetch {url} (") and "refused" in message and "\n" not in message
    place = Path(message.rsplit("put it at ", 1)[1].removesuffix("."))
    place.write_bytes(Server.content)
    with pytest.raises(ValueError, match="not 0123abcd"):
        fetch(url, None, tmp_path)
    assert fetch(url, SHA256, tmp_path) == place


@pytest.mark.parametrize("url", ["http://example.org/a.pth", "ftp://example.org/a.pth", "hf://a/b", "file:///a.pth"])
def test_other_addresses(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match=f"{url} is not an https address; download it by other means"):
        fetch(url, None, tmp_path)
    assert not list(tmp_path.iterdir())
