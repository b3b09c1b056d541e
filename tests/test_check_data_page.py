"""The page of a data check in a real browser: names are text, nothing is fetched, it fits a phone."""

import json
import shutil
from pathlib import Path

import data_sets
import numpy as np
import pytest
from PIL import Image

from psp_jax.check_data import check_data, read_config

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH (Debian's package chromium)")

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page about a folder with lonely files, an unknown value and hostile names, 360 pixels wide."""
    folder = data_sets.write_folder(tmp_path_factory.mktemp("data") / "photos", {"train": 4, "val": 2})
    (folder / "classes.json").write_text(json.dumps({"names": ["road", f"<b>{HOSTILE}</b>", "sky"]}))
    for part, suffix in (("images", "jpg"), ("annotations", "png")):
        old = folder / part / "train" / f"photo000.{suffix}"
        old.rename(old.with_name(f"{HOSTILE}.{suffix}"))
    pixels = np.full((24, 32), 2, np.uint8)
    pixels[0, :3] = 9
    Image.fromarray(pixels).save(folder / "annotations" / "train" / f"{HOSTILE}.png")
    for index in range(7):
        Image.new("RGB", (8, 8)).save(folder / "images" / "train" / f"lonely{index}.png")
    config = read_config(str(ROOT / "configs" / "folder.py"), [f"--config.data.dir={folder}"])
    check_data(config.data, folder.parent)
    problems = []
    with playwright.sync_playwright() as driver:
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_context(viewport={"width": 360, "height": 800}).new_page()
        page.on("request", lambda r: r.url.startswith(("file:", "data:")) or problems.append(f"fetched {r.url}"))
        page.on("console", lambda m: m.type in ("error", "warning") and problems.append(m.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto((folder.parent / "check.html").as_uri())
        yield page
        browser.close()
    assert not problems


def test_findings_name_their_files_and_fold_the_rest(page) -> None:
    lonely = page.locator(".finding").filter(has_text="Files that belong to no pair")
    assert lonely.locator(".level").inner_text().lower() == "error"
    assert lonely.locator("li:visible").count() == 5
    lonely.get_by_text("2 more").click()
    assert lonely.locator("li:visible").count() == 7
    assert page.locator("#unknown tbody tr").inner_text().split("\t") == ["9", "3", "1", f"train/{HOSTILE}.jpg"]


def test_names_are_text(page) -> None:
    assert page.locator("main b, main img[src='x']").count() == 0
    assert page.locator("#classes tbody th").filter(has_text=HOSTILE).count() == 1
    assert page.locator(".example .id").all_inner_texts()[0] == f"{HOSTILE}.jpg"


def test_classes_sort_and_pictures_are_shown(page) -> None:
    names = page.locator("#classes tbody th")
    page.locator("#classes").get_by_role("button", name="Value").click()
    page.locator("#classes").get_by_role("button", name="Value").click()
    assert names.all_inner_texts()[0] == "road" and names.count() == 3
    sizes = page.locator(".example img").evaluate_all("nodes => nodes.map((node) => node.naturalWidth)")
    assert len(sizes) == 3 + 2 and min(sizes) > 100


def test_it_fits_a_phone(page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") == 360
