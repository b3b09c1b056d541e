"""The pages about runs in a real browser: they work by mouse and keyboard, fetch nothing and raise no error."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from evaluated_run import HEIGHT, SCRIPT_NAME, VOID_ROWS, label_maps, write_workdir
from PIL import Image
from test_ablation import PLAN, write_runs

from psp_jax import classes
from psp_jax.ablation import write_ablation
from psp_jax.compare import compare
from psp_jax.report import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH (Debian's package chromium)")

ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    return write_report(write_workdir(tmp_path_factory.mktemp("report") / "run"))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("compare")
    first, second = write_workdir(base / "first", wrong=3), write_workdir(base / "second", wrong=1)
    return compare(first, second, base / "compare.html")


@pytest.fixture
def visit(browser):
    """Open a page; when the test ends, it must have fetched nothing and raised no error."""
    problems, contexts = [], []

    def refuse(route):
        local = route.request.url.startswith(("file:", "data:"))
        route.continue_() if local else route.abort()

    def open_page(path: Path, width: int = 1200, scheme: str = "light"):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce"
        )
        contexts.append(context)
        context.route("**/*", refuse)
        page = context.new_page()
        page.on("request", lambda r: r.url.startswith(("file:", "data:")) or problems.append(f"fetched {r.url}"))
        page.on("console", lambda m: m.type in ("error", "warning") and problems.append(m.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


def names(page) -> list[str]:
    return page.locator("#classes tbody th").all_inner_texts()


def pixel(stage, x: float, y: float) -> tuple[int, ...]:
    """The colour that is seen at a place 0..1 of an element."""
    shot = Image.open(io.BytesIO(stage.screenshot())).convert("RGB")
    return shot.getpixel((int(x * shot.width), int(y * shot.height)))


def close(color: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(abs(a - b) <= 6 for a, b in zip(color, other, strict=True))


def full_strength(page) -> None:
    page.get_by_label("Strength of colours").fill("100")


def width_of(page) -> int:
    return page.evaluate("document.documentElement.scrollWidth")


def test_table_sorts_by_mouse_and_keyboard(visit, report):
    page = visit(report)
    iou = page.locator("#classes th", has=page.get_by_role("button", name="IoU %"))
    assert iou.get_attribute("aria-sort") == "descending" and names(page)[3] == "absent"
    descending = names(page)[:3]
    iou.get_by_role("button").click()
    assert iou.get_attribute("aria-sort") == "ascending"
    assert names(page) == [*reversed(descending), "absent"]  # without an IoU: last in both directions
    page.get_by_role("button", name="Class", exact=True).focus()
    page.keyboard.press("Enter")
    assert iou.get_attribute("aria-sort") is None
    assert names(page) == [SCRIPT_NAME, "absent", "road", "tree & sky"]
    assert page.locator("tbody b").count() == 0  # the name of a class is text, not markup


def test_slider_wipes_by_mouse_and_keyboard(visit, report):
    page = visit(report)
    full_strength(page)
    page.get_by_role("combobox", name="Order").select_option("by name")
    stage = page.locator(".stage").first
    slider = stage.locator("input")
    stage.scroll_into_view_if_needed()
    assert close(pixel(stage, 0.7, 0.4), (0, 160, 0)) and close(pixel(stage, 0.3, 0.4), (120, 120, 120))
    box = stage.bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.4 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.4 * box["height"], steps=4)
    page.mouse.up()
    page.mouse.move(2, 2)
    assert int(slider.input_value()) in (79, 80, 81)
    assert close(pixel(stage, 0.7, 0.4), (120, 120, 120)) and close(pixel(stage, 0.9, 0.4), (0, 160, 0))
    slider.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert slider.input_value() == "1" and close(pixel(stage, 0.3, 0.4), (200, 0, 200))
    page.get_by_role("combobox", name="Right").select_option("ground truth")
    assert close(pixel(stage, 0.6, 0.98), (0, 160, 0)) and close(pixel(stage, 0.3, 0.05), (0, 0, 0))


def test_pointer_reads_the_classes(visit, report):
    page = visit(report)
    page.get_by_role("combobox", name="Order").select_option("by name")
    stage = page.locator(".stage").first
    box = stage.bounding_box()
    wrong_row = HEIGHT - 1
    assert label_maps(0, 2)[0][wrong_row, -1] == 1 and label_maps(0, 2)[1][wrong_row, -1] == 0
    slider = stage.locator("input")
    place = {"x": 0.9 * box["width"], "y": (wrong_row + 0.5) / HEIGHT * box["height"]}
    slider.hover(position={"x": 0.8 * box["width"], "y": place["y"]})
    page.wait_for_function("pointed.maps !== null")
    slider.hover(position=place)
    assert stage.locator(".point").inner_text() == f"truth: {SCRIPT_NAME} · prediction: road"


def test_error_map_marks_wrong_right_and_void(visit, report):
    page = visit(report)
    page.get_by_role("combobox", name="Order").select_option("by name")
    switch = page.get_by_role("button", name="Error map")
    switch.click()
    assert switch.get_attribute("aria-pressed") == "true"
    stage = page.locator(".stage").nth(1)
    stage.locator("input").focus()
    page.keyboard.press("Home")
    bottom = 1 - 2 / HEIGHT  # of the four wrong rows of this image
    assert close(pixel(stage, 0.6, bottom), (255, 59, 48))
    assert max(pixel(stage, 0.4, bottom)) < 60  # right: the grey photo, dimmed
    red, green, blue = pixel(stage, 0.5, VOID_ROWS / 2 / HEIGHT)
    assert 110 < red < 150 and abs(red - green) < 12 and abs(green - blue) < 14
    switch.click()
    assert switch.get_attribute("aria-pressed") == "false"
    assert page.get_by_role("combobox", name="Right").input_value() == "prediction"


def test_filters_and_orders(visit, report):
    page = visit(report)
    ids = page.locator(".card .id")
    assert ids.all_inner_texts() == [f"scene/<{i}>" for i in (3, 2, 1, 0)]  # worst first
    page.get_by_role("combobox", name="Order").select_option("best first")
    assert ids.all_inner_texts() == [f"scene/<{i}>" for i in (0, 1, 2, 3)]
    page.get_by_role("combobox", name="Class").select_option("2")
    assert ids.all_inner_texts() == ["scene/<1>", "scene/<3>"]
    page.get_by_label("Search").fill("<3")
    assert ids.all_inner_texts() == ["scene/<3>"]
    page.get_by_label("Search").fill("nothing")
    assert page.get_by_role("status").filter(has_text="None of these images").is_visible()


def test_mistake_shows_its_images(visit, report):
    page = visit(report)
    pair = page.locator(".pair").first
    assert pair.inner_text().startswith("tree & sky taken for road")
    pair.focus()
    page.keyboard.press("Enter")
    ids = page.locator(".card .id")
    assert ids.all_inner_texts() == ["scene/<3>", "scene/<1>"]  # the most of it first
    assert page.evaluate("document.activeElement.textContent") == "Images"
    page.get_by_role("button", name="Stop sorting").click()
    assert page.locator(".chip").is_hidden()
    matrix = page.locator("canvas")
    matrix.focus()
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    assert page.locator(".readout").inner_text().startswith("tree & sky taken for road: 14.29")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    assert ids.all_inner_texts() == ["scene/<2>", "scene/<0>"]


def test_curves_read_out_under_pointer_and_keys(visit, report):
    page = visit(report)
    loss = page.locator(".chart").first
    assert "step 12" in loss.inner_text()
    loss.locator("svg").focus()
    page.keyboard.press("ArrowLeft")
    assert "step 11" in loss.inner_text() and f"loss {3 / 11:.3f}" in loss.inner_text()
    loss.locator("svg").hover(position={"x": 60, "y": 100})
    assert "step 1\n" in loss.inner_text() and "loss 3" in loss.inner_text()


def test_labels_of_axes_are_whole_and_one_image_is_one(visit, tmp_path):
    workdir = write_workdir(tmp_path / "run", images=1)
    log = workdir / "metrics.jsonl"
    log.write_text(log.read_text().replace('"learning_rate": 0.01', '"learning_rate": 0.0024'))
    page = visit(write_report(workdir))
    rate = page.locator(".chart svg").last
    assert "0.0015" in rate.text_content()
    assert rate.evaluate("svg => Math.min(...[...svg.querySelectorAll('text')].map(text => text.getBBox().x))") >= 0
    assert "val, 1 image" in page.locator(".run-line").inner_text().split(" \u00b7 ")
    assert page.locator(".tally").inner_text() == "1 image."


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_theme_follows_the_system_until_the_button_is_used(visit, report, scheme):
    page = visit(report, scheme=scheme)

    def brightness() -> int:
        return sum(pixel(page.locator("body"), 0.005, 0.2))

    assert (brightness() > 600) == (scheme == "light")
    page.get_by_role("button", name="Switch to").click()
    assert (brightness() > 600) == (scheme == "dark")


def test_pages_fit_a_phone_also_with_150_classes(visit, report, comparison, tmp_path):
    ade = write_workdir(tmp_path / "ade", names=classes.get("ade20k").names, data="ade20k")
    for path in (report, comparison, write_report(ade)):
        page = visit(path, width=360)
        assert width_of(page) == 360
        assert page.locator(".stage").first.bounding_box()["width"] <= 360


def test_comparison_shows_both_predictions(visit, comparison):
    page = visit(comparison)
    full_strength(page)
    assert page.locator(".score-value").first.inner_text().startswith("+")
    assert page.locator("#configuration tbody tr").all_inner_texts() == ["optimizer.base_lr\t0.03\t0.01"]
    assert names(page)[-1] == "absent"
    page.get_by_role("combobox", name="Order").select_option("by name")
    stage = page.locator(".stage").first
    stage.scroll_into_view_if_needed()
    row = 1 - 2.5 / HEIGHT  # the first run has three wrong rows here, the second one
    assert close(pixel(stage, 0.6, row), (0, 160, 0))
    stage.locator("input").focus()
    page.keyboard.press("End")
    assert close(pixel(stage, 0.6, row), (200, 0, 200))
    page.get_by_role("button", name="Error map").click()
    assert close(pixel(stage, 0.6, row), (255, 59, 48))


def test_ablation_shows_every_seed_and_sorts(visit, tmp_path):
    write_ablation(write_runs(tmp_path), PLAN)
    page = visit(tmp_path / "ablation.html", width=360)
    assert width_of(page) == 360
    page.set_viewport_size({"width": 1200, "height": 800})
    table = page.locator("#table-0")
    rows = table.locator("tbody tr")
    assert rows.nth(0).inner_text().startswith("FCN\t45.0 \u00b1 7.1") and "+35.0" in rows.nth(1).inner_text()
    first = rows.nth(0).locator(".strip").first  # axis 20 .. 90 %: the seeds are at 50 and 40 %
    places = first.locator(".dot").evaluate_all("dots => dots.map((dot) => getComputedStyle(dot).left)")
    width = first.bounding_box()["width"]
    assert [float(place[:-2]) / width for place in places] == pytest.approx([3 / 7, 2 / 7], abs=0.01)
    table.get_by_role("button", name="mean IoU").click()
    assert rows.nth(0).inner_text().startswith("PSPNet")
    assert page.locator("#classes tbody tr").count() == 3


def test_a_split_without_labels_still_has_a_page(visit, tmp_path):
    workdir = write_workdir(tmp_path / "void")
    for name in ("metrics.json", "images.json", "gallery/index.json"):
        path = workdir / "eval" / name
        path.write_text(re.sub(r"(_iou|accuracy|score)\": [0-9.e-]+", r'\1": null', path.read_text()))
    metrics = json.loads((workdir / "eval" / "metrics.json").read_text())
    metrics["per_class_iou"] = dict.fromkeys(metrics["per_class_iou"])
    (workdir / "eval" / "metrics.json").write_text(json.dumps(metrics))
    counts = workdir / "eval" / "confusion.csv"
    counts.write_text(re.sub(r",[0-9]+", ",0", counts.read_text()))
    for truth in (workdir / "eval" / "gallery").glob("*.truth.png"):
        Image.new("L", Image.open(truth).size, 255).save(truth)
    page = visit(write_report(workdir))
    assert page.locator("#classes tbody tr").count() == 4
    assert page.get_by_role("button", name="Dark").is_visible()
