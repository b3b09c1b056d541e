"""The pages about runs: what they hold, and what happens where a workdir lacks something."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from evaluated_run import (
    HEIGHT,
    NAMES,
    PALETTE,
    SCRIPT_NAME,
    VOID_ROWS,
    WHOLE,
    WIDTH,
    label_maps,
    mean_iou,
    write,
    write_workdir,
)
from PIL import Image

from psp_jax import report
from psp_jax.classes import ClassTable
from psp_jax.command import run_command
from psp_jax.compare import compare, main
from psp_jax.report import read_gallery, worst_pairs, write_report


def payload(page):
    """The data of a page, as its script reads them."""
    (text,) = re.findall(r'<script type="application/json" id="payload">(.*?)</script>', page.read_text("utf-8"), re.S)
    return json.loads(text)


def picture(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


@pytest.fixture
def workdir(tmp_path):
    return write_workdir(tmp_path / "run")


def test_page_holds_the_scores_of_the_files(workdir):
    data = payload(write_report(workdir))
    metrics = json.loads((workdir / "eval" / "metrics.json").read_text())
    assert [score["value"] for score in data["scores"]] == [metrics["mean_iou"], metrics["pixel_accuracy"]]
    assert data["protocol"] == WHOLE and (data["step"], data["split"], data["images"]) == (12, "val", 4)
    assert [row["name"] for row in data["classes"]] == list(NAMES)
    assert [row["iou"] for row in data["classes"]] == list(metrics["per_class_iou"].values())
    # Half of the labelled pixels are road, all found; of the other half rows go wrong, 2 to 8 of 42.
    assert data["classes"][0]["share"] == 0.5 and data["classes"][0]["accuracy"] == 1
    assert data["classes"][1]["accuracy"] == pytest.approx(1 - (2 + 6) / 2 / 42)
    assert data["classes"][3]["accuracy"] is None
    assert sum(data["histogram"]) == 4
    assert data["config"] == {"seed": 0, "optimizer.base_lr": 0.02}


def test_ade20k_score_only_where_the_classes_are_ade20k(tmp_path):
    data = payload(write_report(write_workdir(tmp_path / "run", data="ade20k")))
    assert [score["name"] for score in data["scores"]] == ["Mean IoU", "Pixel accuracy", "ADE20K score"]


def test_curves_keep_gaps_and_drop_the_half_line_of_a_kill(workdir):
    training = payload(write_report(workdir))["training"]
    assert training["step"] == list(range(1, 13)) and training["loss"][3:6] == [0.75, None, 0.5]
    assert "aux_loss" not in training


def test_long_curves_are_averaged(workdir, monkeypatch):
    monkeypatch.setattr(report, "CURVE_POINTS", 4)
    training = payload(write_report(workdir))["training"]
    assert training["step"] == [2, 5, 8, 11]
    assert training["loss"][1] == pytest.approx((3 / 4 + 3 / 6) / 2)  # the gap of step 5 does not count


def test_cost_of_a_mistake_is_the_mean_iou_that_its_pixels_would_win():
    confusion = np.random.default_rng(0).integers(1, 50, (4, 4))
    confusion[3] = 0  # occurs in predictions only: its IoU is 0
    pairs = worst_pairs(confusion)
    assert len(pairs) == 9 and [p["cost"] for p in pairs] == sorted((p["cost"] for p in pairs), reverse=True)
    for pair in pairs:
        label, prediction = pair["label"], pair["prediction"]
        mended = confusion.copy()
        mended[label, label] += mended[label, prediction]
        mended[label, prediction] = 0
        assert pair["pixels"] == confusion[label, prediction]
        assert pair["cost"] == pytest.approx(mean_iou(mended) - mean_iou(confusion))


def test_costs_stay_finite_where_a_class_is_only_a_mistake_or_nowhere():
    pairs = worst_pairs(np.array([[6, 2, 0], [0, 0, 0], [0, 0, 0]]))
    assert pairs == [{"label": 0, "prediction": 1, "pixels": 2, "cost": pytest.approx(2 / 8 / 2)}]


def test_pictures_show_the_label_maps(workdir):
    table = ClassTable.from_dict({"names": list(NAMES), "palette": [list(color) for color in PALETTE]}, "folder")
    items = read_gallery(workdir, table)
    assert [item["id"] for item in items] == [f"scene/<{i}>" for i in range(4)]
    truth, prediction = label_maps(1, 2)
    colors = np.array([*PALETTE, (0, 0, 0)])
    layers = items[1]["layers"]
    assert (np.asarray(picture(layers["truth"]).convert("RGB")) == colors[np.minimum(truth, 4)]).all()
    assert (np.asarray(picture(layers["prediction"]).convert("RGB")) == colors[prediction]).all()
    errors = np.asarray(picture(layers["errors"]).convert("RGBA"))
    assert tuple(errors[-1, -1]) == (255, 59, 48, 255)  # wrong
    assert tuple(errors[-1, 0])[3] < 255  # right: the image shines through
    assert len({tuple(pixel) for pixel in errors[:VOID_ROWS].reshape(-1, 4)}) == 1  # void
    assert items[1]["classes"] == [[0, 0.5], [2, 0.5]]
    assert items[1]["mistakes"] == [[2, 0, 4 * WIDTH // 2]]


def test_large_photos_are_compressed_until_many_fit_on_a_page(workdir):
    noise = np.random.default_rng(0).integers(0, 256, (768, 1024, 3), np.uint8)
    scene = Image.fromarray(noise).resize((256, 192)).resize((1024, 768), Image.Resampling.BICUBIC)
    path = workdir / "eval" / "gallery" / "n0.jpg"
    scene.save(path, quality=98)
    page = write_report(workdir)
    uri = payload(page)["gallery"][0]["layers"]["image"]
    assert path.stat().st_size > report.PHOTO_BYTES and picture(uri).size == (1024, 768)
    assert page.stat().st_size < 8e6 / 24


def test_page_needs_no_network_and_no_text_ends_its_element(workdir):
    text = write_report(workdir).read_text("utf-8")
    assert not re.search(r"https?://|@import|url\(", text)
    assert SCRIPT_NAME not in text and "scene/<" not in text
    assert text.count("</script>") == 2
    assert "default-src 'none'" in text


def test_title_is_escaped(tmp_path):
    text = write_report(write_workdir(tmp_path / "<i>run")).read_text("utf-8")
    assert "<title>&lt;i&gt;run</title>" in text


@pytest.mark.parametrize(
    "missing",
    ["metrics.jsonl", "validation.jsonl", "config.json", "eval/confusion.csv", "eval/images.json", "eval/gallery"],
)
def test_what_a_workdir_lacks_is_left_out(workdir, missing):
    path = workdir / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    data = payload(write_report(workdir))
    keys = {"metrics.jsonl": "training", "validation.jsonl": "validation", "config.json": "config"}
    keys |= {"eval/confusion.csv": "confusion", "eval/images.json": "histogram", "eval/gallery": "gallery"}
    assert not data[keys[missing]] and len(data["classes"]) == 4


def test_page_is_replaced_whole_or_not_at_all(workdir, monkeypatch):
    page = write_report(workdir)
    before = page.read_text("utf-8")
    write(workdir / "config.json", {"config": {"seed": 1}})

    def full_disk(source, target):
        assert source.read_text("utf-8").endswith("</html>\n")
        raise OSError("No space left on device")

    monkeypatch.setattr("psp_jax.atomic.os.replace", full_disk)
    with pytest.raises(OSError):
        write_report(workdir)
    assert page.read_text("utf-8") == before


def test_directory_without_evaluation_is_refused_with_the_remedy(workdir):
    (workdir / "eval" / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no eval/metrics.json.*--mode=evaluate"):
        write_report(workdir)


def test_files_of_other_classes_are_refused(workdir):
    text = (workdir / "eval" / "confusion.csv").read_text()
    (workdir / "eval" / "confusion.csv").write_text(text.replace("road", "street"))
    with pytest.raises(ValueError, match="other classes"):
        write_report(workdir)


def test_comparison_pairs_scores_classes_fields_and_images(workdir, tmp_path):
    other = write_workdir(tmp_path / "other", wrong=1, images=3)
    data = payload(compare(workdir, other, tmp_path / "out" / "compare.html"))
    values = [
        [json.loads((w / "eval" / "metrics.json").read_text())[key] for w in (workdir, other)]
        for key in ("mean_iou", "pixel_accuracy")
    ]
    assert [score["values"] for score in data["scores"]] == values
    assert data["fields"] == [{"field": "optimizer.base_lr", "values": [0.02, 0.01]}]
    assert [item["id"] for item in data["gallery"]] == [f"scene/<{i}>" for i in range(3)]
    shown = np.asarray(picture(data["gallery"][0]["layers"]["second"]).convert("RGB"))
    assert shown.shape == (HEIGHT, WIDTH, 3) and (shown == np.array(PALETTE)[label_maps(0, 1)[1]]).all()
    assert "with 4 images against val with 3 images" in data["warnings"][0]


def test_comparison_warns_of_other_protocols_and_names_equal_folders_apart(tmp_path):
    first, second = write_workdir(tmp_path / "a" / "run"), write_workdir(tmp_path / "b" / "run")
    metrics = json.loads((second / "eval" / "metrics.json").read_text())
    write(second / "eval" / "metrics.json", metrics | {"protocol": WHOLE | {"name": "semseg"}})
    data = payload(compare(first, second, tmp_path / "compare.html"))
    assert len(data["warnings"]) == 1 and "protocols differ" in data["warnings"][0]
    assert [run["name"] for run in data["runs"]] == [str(first), str(second)]


def test_comparison_of_different_classes_is_one_sentence(workdir, tmp_path, monkeypatch, capsys):
    other = write_workdir(tmp_path / "other", names=("a", "b", "c", "d"))
    monkeypatch.setattr("sys.argv", ["compare", str(workdir), str(other), "--output", str(tmp_path / "compare.html")])
    codes = []
    run_command(main, codes.append)
    error = capsys.readouterr().err
    assert codes == [1] and error.count("\n") == 1 and "different classes" in error
    assert not (tmp_path / "compare.html").exists()
