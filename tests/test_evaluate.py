"""Evaluation of a finished run: the same counts everywhere, resumed, in bounded memory, with few compiles."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT, Run, environment, free_address, run_module
from PIL import Image

import psp_jax
from psp_jax import api, classes, config, parallel, validation
from psp_jax.data.source import Source, open_source
from psp_jax.protocols import MULTI, Protocol, mmseg, semseg
from psp_jax.score import score

FLAGS = ("--mode=evaluate", "--config.eval.protocol=semseg", "--config.eval.scales=multi")
FLAGS += ("--config.eval.base_size=(60,)", "--config.eval.window_batch=2", "--config.log.images=2")


def evaluated(workdir: Path) -> tuple[np.ndarray, dict]:
    """Confusion matrix and metrics.json of a workdir."""
    with (workdir / "eval" / "confusion.csv").open(newline="") as file:
        counts = np.array([row[1:] for row in csv.reader(file)][1:], np.int64)
    return counts, json.loads((workdir / "eval" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def one_device(finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run, evaluated by the real command on one device, with all label maps saved."""
    workdir = tmp_path_factory.mktemp("one") / "w"
    shutil.copytree(finished_run.workdir, workdir)
    done = finished_run.start(workdir, *FLAGS, "--config.eval.save_predictions=True")
    assert done.returncode == 0, done.stdout + done.stderr
    return workdir


def test_everything_is_written(one_device: Path) -> None:
    counts, metrics = evaluated(one_device)
    assert metrics["protocol"]["name"] == "semseg"
    assert metrics["protocol"]["scales"] == list(MULTI)
    assert metrics["images"] == 10
    assert metrics["pixels"] == counts.sum()
    images = json.loads((one_device / "eval" / "images.json").read_text())
    assert [image["id"] for image in images] == [f"scene{i:03}" for i in range(10)]
    accuracy = [image["pixel_accuracy"] for image in images]
    assert min(accuracy) < metrics["pixel_accuracy"] < max(accuracy)
    gallery = json.loads((one_device / "eval" / "gallery" / "index.json").read_text())
    order = [entry["mean_iou"] for entry in gallery]
    assert order == sorted(order)
    assert len(gallery) == 10
    entry = gallery[0]
    folder = one_device / "eval" / "gallery"
    sizes = {Image.open(folder / f"{entry['name']}{end}").size for end in (".jpg", ".prediction.png", ".truth.png")}
    assert len(sizes) == 1
    saved = np.asarray(Image.open(one_device / "eval" / "predictions" / f"{entry['id']}.png"))
    np.testing.assert_array_equal(saved, np.asarray(Image.open(folder / f"{entry['name']}.prediction.png")))
    assert len(list((one_device / "predictions").glob("*.png"))) >= 2
    assert "semseg" in (one_device / "report.html").read_text()
    assert not (one_device / "eval" / "partial.npz").exists()


def test_saved_label_maps_score_the_same_to_the_last_digit(one_device: Path, finished_run: Run) -> None:
    folder = Path(json.loads((finished_run.workdir / "config.json").read_text())["config"]["data"]["dir"])
    table = classes.get(folder / "classes.json")
    scores = score(one_device / "eval" / "predictions", folder / "annotations" / "val", table)
    _, metrics = evaluated(one_device)
    assert {name: metrics[name] for name in scores} == scores


def test_eight_devices_count_the_same(one_device: Path, finished_run: Run, tmp_path: Path) -> None:
    shutil.copytree(finished_run.workdir, tmp_path / "w")
    done = finished_run.start(tmp_path / "w", *FLAGS, "--config.eval.batch_size=8", devices=8)
    assert done.returncode == 0, done.stdout + done.stderr
    np.testing.assert_array_equal(evaluated(tmp_path / "w")[0], evaluated(one_device)[0])


@pytest.mark.slow
def test_two_processes_count_the_same(one_device: Path, finished_run: Run, tmp_path: Path) -> None:
    shutil.copytree(finished_run.workdir, tmp_path / "w")
    address = free_address()
    command = [sys.executable, "-m", "psp_jax.main", *finished_run.flags, "--workdir", str(tmp_path / "w"), *FLAGS]
    command += ["--config.eval.save_predictions=True", f"--coordinator={address}", "--num_processes=2"]
    started = [
        subprocess.Popen(
            [*command, f"--process_id={rank}"],
            cwd=ROOT,
            env=environment(2),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        text, _ = process.communicate(timeout=300)
        assert process.returncode == 0, text
    np.testing.assert_array_equal(evaluated(tmp_path / "w")[0], evaluated(one_device)[0])
    for path in (one_device / "eval" / "predictions").iterdir():
        assert path.read_bytes() == (tmp_path / "w" / "eval" / "predictions" / path.name).read_bytes()


def test_prediction_by_the_same_protocol_labels_the_same(one_device: Path, finished_run: Run, tmp_path: Path) -> None:
    folder = Path(json.loads((finished_run.workdir / "config.json").read_text())["config"]["data"]["dir"])
    card = json.loads((finished_run.workdir / "model.json").read_text())
    shutil.copytree(finished_run.workdir, tmp_path / "w")
    (tmp_path / "w" / "model.json").write_text(json.dumps(card | {"base_size": 60}))
    flags = ("--workdir", tmp_path / "w", "--output", tmp_path / "out", "--protocol", "semseg", "--scales", "multi")
    done = run_module("psp_jax.predict", *flags, "--batch", 2, folder / "images" / "val")
    assert done.returncode == 0, done.stderr
    for path in (one_device / "eval" / "predictions").iterdir():
        ours, theirs = (np.asarray(Image.open(p)) for p in (tmp_path / "out" / path.name, path))
        assert (ours == theirs).mean() > 0.999


def build(run: Run, directory: Path, protocol: Protocol | None, source: Source | None = None):
    """A Validation of the finished run in this process, on the eight devices, and its variables."""
    record = json.loads((run.workdir / "config.json").read_text())["config"]
    settings = config.defaults()
    settings.eval.update(batch_size=8, window_batch=2, gallery=3)
    settings.data.update(num_workers=0, eval_split="val")
    settings.log.images = 1
    mesh = parallel.make_mesh()
    model = api.load(run.workdir, "latest", parallel.replicated(mesh))
    source = source or open_source(
        "image_folder", record["data"]["dir"], "val", prepared_dir=record["data"]["prepared_dir"]
    )
    made = validation.Validation(settings, model.card, model.network, mesh, source, directory, protocol=protocol)
    return made, model.variables


def test_an_interrupted_evaluation_goes_on(
    finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    protocol = semseg((1.0,), 60, (41, 41))
    monkeypatch.setattr(validation, "_SAVE_SECONDS", -1.0)
    whole, variables = build(finished_run, tmp_path / "whole", protocol)
    expected = whole.run(variables, 12)

    made, _ = build(finished_run, tmp_path / "cut", protocol)
    add, counted = validation.Tally.add, []

    def fail_at_last(self, confusion, images, index) -> None:
        if counted:
            raise KeyboardInterrupt
        counted.append(index[index >= 0])
        add(self, confusion, images, index)

    monkeypatch.setattr(validation.Tally, "add", fail_at_last)
    with pytest.raises(KeyboardInterrupt):
        made.run(variables, 12, resume=True)
    assert (tmp_path / "cut" / "eval" / "partial.npz").exists()
    again: list[np.ndarray] = []

    def note(self, confusion, images, index) -> None:
        again.append(index[index >= 0])
        add(self, confusion, images, index)

    monkeypatch.setattr(validation.Tally, "add", note)
    assert made.run(variables, 12, resume=True) == expected
    assert sorted(np.concatenate([*counted, *again])) == list(range(10))
    assert not set(counted[0]) & set(np.concatenate(again))
    np.testing.assert_array_equal(evaluated(tmp_path / "cut")[0], evaluated(tmp_path / "whole")[0])
    # The counts of another evaluation, or a damaged file, start from nothing, in words.
    partial = tmp_path / "cut" / "eval" / "partial.npz"
    validation.Tally(10, 3).save(partial, "something else")
    for words in ("is of another evaluation", "is damaged"):
        again.clear()
        assert made.run(variables, 12, resume=True) == expected
        assert sorted(np.concatenate(again)) == list(range(10))
        assert words in capsys.readouterr().out
        partial.write_bytes(b"PK\x03\x04 half a file")


def test_other_data_or_classes_are_another_evaluation(finished_run: Run, tmp_path: Path, monkeypatch) -> None:
    owners: list[str] = []
    monkeypatch.setattr(validation.Tally, "load", lambda self, path, owner: owners.append(owner) or "")
    sources = [ManySizes(classes.get(name)) for name in ("camvid", "camvid", "voc2012")]
    sources[0].directory = Path("corrected")
    for source in sources:
        made, variables = build(finished_run, tmp_path, None, source)
        monkeypatch.setattr(made, "_count", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            made.run(variables, 12, resume=True)
    assert len(set(owners)) == 3


def test_label_maps_that_were_not_written_before_an_interruption_are_made_up_for(
    one_device: Path, finished_run: Run, tmp_path: Path
) -> None:
    made, variables = build(finished_run, tmp_path, semseg(MULTI, 60, (41, 41)))
    made._options.save_predictions = True
    made.run(variables, 12, resume=True)
    folder = tmp_path / "eval" / "predictions"
    expected = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    assert len(expected) == 10
    for name in list(expected)[:3]:
        (folder / name).unlink()
    made._write_missing_predictions(variables)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
    reference = {path.name: path.read_bytes() for path in (one_device / "eval" / "predictions").iterdir()}
    assert expected == reference


class ManySizes(Source):
    """Fifty images of fifty sizes."""

    void = False

    def __init__(self, table: classes.ClassTable) -> None:
        self.classes, self.split, self.directory = table, "val", Path("many")
        self.max_size = (30 + 49, 90)

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> dict:
        size = self.sizes()[index]
        label = np.random.default_rng(index).integers(0, 3, size).astype(np.uint8)
        image = label[..., None].repeat(3, -1) * 90
        return {"image": image, "label": np.full_like(label, 255) if self.void else label, "id": str(index)}

    def ids(self, index: int) -> str:
        return str(index)

    def sizes(self) -> list[tuple[int, int]]:
        return [(30 + i, 90 - i) for i in range(50)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("protocol", "most"),
    [(semseg((1.0,), 60, (41, 41)), 3), (None, 3), (mmseg((1.0,), (70, 40), (0, 0)), 5)],
    ids=["semseg", "whole", "mmseg"],
)
def test_fifty_sizes_need_few_compiles(finished_run: Run, tmp_path: Path, protocol, most) -> None:
    table = api.load(finished_run.workdir).card.classes
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    made, variables = build(finished_run, tmp_path, protocol, ManySizes(table))
    compiled.clear()
    made.run(variables, 12, resume=True)
    assert 1 <= len(compiled) <= most
    assert evaluated(tmp_path)[1]["pixels"] == sum(height * width for height, width in ManySizes(table).sizes())


def peak_memory(command: list[str]) -> float:
    """Peak resident memory in MB of a process that must succeed."""
    # Linux counts the peak of the process that starts another to the other as well, so that a small one starts it.
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, env=environment(1), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return int(done.stdout) / 1024


def test_a_split_without_labels_is_scored_as_nothing(finished_run: Run, tmp_path: Path) -> None:
    source = ManySizes(api.load(finished_run.workdir).card.classes)
    source.void = True
    made, variables = build(finished_run, tmp_path, semseg((1.0,), 60, (41, 41)), source)
    assert made.run(variables, 12) == {"mean_iou": None, "pixel_accuracy": None, "mean_accuracy": None}
    assert evaluated(tmp_path)[1]["pixels"] == 0


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(finished_run: Run, tmp_path: Path) -> None:
    rng, peaks = np.random.default_rng(0), []
    for count in (4, 44):  # 40 images more, of 5.8 MB each in probabilities, 1.9 MB in pixels and labels
        folder = tmp_path / str(count)
        for part in ("images", "annotations"):
            (folder / part / "val").mkdir(parents=True)
        for i in range(count):
            label = np.repeat(np.repeat(rng.integers(0, 3, (6, 8)), 100, 0), 100, 1).astype(np.uint8)
            Image.fromarray(label).save(folder / "annotations" / "val" / f"{i:02}.png")
            Image.fromarray(label[..., None].repeat(3, -1) * 80).save(folder / "images" / "val" / f"{i:02}.png")
        (folder / "classes.json").write_text(json.dumps({"names": ["red", "green", "blue"], "ignore": 255}))
        shutil.copytree(finished_run.workdir, folder / "w")
        flags = [*finished_run.flags, f"--config.data.dir={folder}", "--config.eval.scales=single", "--mode=evaluate"]
        flags += ["--config.eval.base_size=(80,)", f"--workdir={folder / 'w'}", "--config.eval.gallery=2"]
        peaks.append(peak_memory([sys.executable, "-m", "psp_jax.main", *flags]))
    assert peaks[1] - peaks[0] < 50, peaks


def test_bad_settings_are_refused_in_one_sentence(finished_run: Run, tmp_path: Path) -> None:
    shutil.copytree(finished_run.workdir, tmp_path / "w")
    done = finished_run.start(tmp_path / "w", "--mode=evaluate", "--config.eval.protocol=pspnet")
    assert done.returncode == 1
    assert done.stderr.strip() == "error: eval.protocol='pspnet' is unknown; choose one of: semseg, mmseg, whole."
    with pytest.raises(ValueError, match="choose one of: whole, semseg, tiles"):
        psp_jax.load(tmp_path / "w").labeler("slide")
    with pytest.raises(ValueError, match="has no scales"):
        psp_jax.load(tmp_path / "w").labeler("whole", scales="multi")
