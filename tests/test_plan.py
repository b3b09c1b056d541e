"""What psp_jax.plan reads out of compiled programs and makes of it, against values worked by hand; and the command."""

import csv
import json
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, TINY, run_module
from jax.sharding import SingleDeviceSharding
from PIL import Image

from psp_jax import classes as class_tables
from psp_jax import parallel, plan
from psp_jax.config_file import read_config
from psp_jax.planning import programs, summary
from psp_jax.planning.chips import CHIPS, topology_devices
from psp_jax.planning.plot import bar_plot
from psp_jax.planning.program_text import Cost, Traffic, program_cost

NETWORK = tuple(flag for flag in TINY if "steps" not in flag)
SMALLER = ("--config.model.head=fcn", "--config.model.aux_head=False")  # compiles in half the time
ADE20K = str(ROOT / "configs" / "ade20k.py")


@pytest.fixture(scope="module")
def hand() -> Cost:
    return program_cost((ROOT / "tests" / "planned_program.txt").read_text())


def test_cycles_of_loops_branches_and_calls(hand: Cost) -> None:
    # Three turns of 10 + 1; one of 5 + 1 of the loop whose turns are not known; the dearer branch twice; a call.
    assert hand.cycles == 3 * 11 + 6 + 9 + 9 + 5 + 100 + 200 + 1000
    assert hand.loops == [6]
    assert hand.unpriced == {"select-and-scatter": 1}


def test_collectives_once_each_with_their_bytes(hand: Cost) -> None:
    # A ring of n passes 2 (n - 1) / n of what it sums through each chip, and gathers (n - 1) / n of the result.
    assert hand.traffic == {
        "all-reduce": Traffic(4, 3 * 16 + 43, pytest.approx(3 * 16 + 43 * 2 * 7 / 8), {2, 8}),
        "all-gather": Traffic(1, 24, 12.0, {2}),
        "collective-permute": Traffic(1, 6, 6, {2}),
        "all-to-all": Traffic(1, 64, 48.0, {4}),
        "reduce-scatter": Traffic(1, 8, 8 * 7, {8}),
    }


def test_no_program() -> None:
    with pytest.raises(ValueError, match="has no ENTRY computation"):
        program_cost("HloModule nothing")


def test_memory_by_kind() -> None:
    analysis = Namespace(
        argument_size_in_bytes=150,
        output_size_in_bytes=120,
        alias_size_in_bytes=110,
        temp_size_in_bytes=1000,
        generated_code_size_in_bytes=7,
    )
    found = programs.memory_by_kind(analysis, {"parameters": 100, "averaged parameters": 0, "batch": 30})
    assert found == {
        "parameters": 100,
        "batch": 30,
        "padding, less what is not used": 20,
        "results": 10,
        "activations and other temporaries": 1000,
        "program": 7,
    }
    assert programs.Program(0.0, found).total == 150 + 10 + 1000 + 7


def test_bytes_of_a_shard() -> None:
    mesh = parallel.make_mesh(4, 2)
    batch = jax.ShapeDtypeStruct((8, 6, 5, 3), jnp.bfloat16, sharding=parallel.batch_sharding(mesh))
    whole = jax.ShapeDtypeStruct((10,), jnp.float32, sharding=parallel.replicated(mesh))
    assert programs.shard_bytes({"image": batch, "whole": whole, "none": None}) == 2 * 3 * 5 * 3 * 2 + 40


@pytest.mark.parametrize(
    ("grow", "first", "expected", "most"),
    [
        (lambda n: 100 + 10 * n, 4, 90, 3),
        (lambda n: 100 + 10 * n, 60, 90, 4),  # the double does not fit
        (lambda n: None if n > 1 else 900, 1, 1, 2),
        (lambda n: 2000, 8, 0, 4),
        (lambda n: 100 + 9 * n + n * n // 200, 4, 95, 8),  # not quite linear
    ],
)
def test_largest_count(grow: Any, first: int, expected: int, most: int) -> None:
    asked = []

    def total(count: int) -> int | None:
        asked.append(count)
        return grow(count)

    found = programs.largest_count(total, first, 1000)
    assert found == expected
    assert len(asked) == len(set(asked)) <= most


def test_the_largest_batch_divides_over_the_mesh_and_into_groups_of_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images at a time for the mesh, three for batch norm: batches are multiples of six, of which 48 still fits."""
    config = read_config(ADE20K, (*NETWORK, "--config.model.bn_group_size=3"))
    target, asked = plan.read_target("local@batch=12,spatial=4", config, 400), [12]

    def compiled(config: Any, *_: object) -> programs.Program:
        asked.append(config.train.batch_size)
        return programs.Program(0.0, {"batch": 100 * asked[-1]})

    monkeypatch.setattr(programs, "compile_training", compiled)
    assert plan.largest_batch(target, class_tables.get("ade20k"), programs.Program(0.0, {"batch": 1200}), 5300) == 48
    assert len(asked) == len(set(asked)) < 9 and not any(size % 6 for size in asked)


def row(target: str, chips: int, program: programs.Program, price: float | None = None) -> dict[str, Any]:
    found = summary.training_summary(program, CHIPS["v5e"], chips, 32, 1000, 8e12, price)
    sides = {"data": chips, "spatial": 1, "batch_size": 32, "crop": [41, 41], "dtype": "bfloat16", "steps": 1000}
    return {"target": target, "chips": chips, "hosts": chips // 4, **sides, **found}


def planned(cycles: int) -> programs.Program:
    cost = Cost(cycles, {"all-reduce": Traffic(2, 200_000_000, 3e8, {16})})
    return programs.Program(1.0, {"parameters": 3 * 2**30, "program": 2**30}, cost=cost, flops=1e12)


def test_time_and_money() -> None:
    found = row("v5e:4x4", 16, planned(54_000_000), price=1.25)
    assert found["step_seconds"] == pytest.approx(0.036)  # at 1.5 GHz
    assert found["images_per_second"] == pytest.approx(32 / 0.036)
    assert found["hours"] == pytest.approx(0.01)
    assert found["chip_hours"] == pytest.approx(0.16)
    assert found["price"] == pytest.approx(0.20)
    assert found["mfu"] == pytest.approx(8e12 / (16 * 197e12 * 0.036))
    assert found["least_link_seconds"] == pytest.approx(0.0015)  # 300 MB at 200 GB/s
    text = summary.as_text(found)
    assert "4,096.00 MiB of 16,128: fits" in text
    assert "all steps: 0.01 hours, 0.2 chip-hours, 0.20 USD" in text
    assert "2 all-reduce, 200.00 MB, among 16 chips" in text


def test_comparison(tmp_path: Path) -> None:
    rows = [
        row("v5e:2x2", 4, programs.Program(1.0, refusal="Used 20.00G of 15.75G hbm.")),
        row("v5e:4x4", 16, planned(54_000_000)),
        row("v5e:8x8", 64, planned(27_000_000)),
    ]
    cells = summary.table(rows)
    assert [line[0] for line in cells] == ["topology", "v5e:2x2 (does not fit)", "v5e:4x4", "v5e:8x8"]
    head, refused, _, last = (dict(zip(cells[0], line, strict=True)) for line in cells)
    assert "USD" not in head
    assert (refused["GiB a chip"], refused["images/s"]) == ("-", "-")
    assert [last[name] for name in ("GiB a chip", "ms a step", "images/s")] == ["4.00", "18.00", "1,778"]
    assert "does not fit. Used 20.00G of 15.75G hbm." in summary.as_text(rows[0])

    plan.write_rows(tmp_path, rows, "a comparison")
    written = list(csv.DictReader((tmp_path / "plan.csv").open()))
    assert [line["fits"] for line in written] == ["False", "True", "True"]
    assert float(written[2]["step_seconds"]) == pytest.approx(0.018)
    assert "| v5e:8x8 | 64 | 32 | 4.00 | 15.75 | 18.00 | 1,778 |" in (tmp_path / "plan.md").read_text()
    assert json.loads((tmp_path / "plan.json").read_text())["rows"][1]["chip_hours"] == pytest.approx(0.16)
    picture = np.asarray(Image.open(tmp_path / "plan.png"))
    np.testing.assert_array_equal(picture, bar_plot("a comparison", rows))
    blue = (picture == (17, 74, 139)).all(-1).sum(1)  # bars of the first row are missing, those of the last longest
    first, second, third = (blue[128 + 60 * i : 188 + 60 * i].max() for i in range(3))
    assert first == 0 < second < third


@pytest.mark.parametrize(
    ("prices", "target", "expected"),
    [
        ([], "v5e:4x4", None),
        (["1.2"], "v5e:4x4", 1.2),
        (["1.2", "v6e=2.7"], "v6e:2x2", 2.7),
        (["v6e=2"], "v4:2x2x1", None),
    ],
)
def test_price_of(prices: list[str], target: str, expected: float | None) -> None:
    assert plan.price_of(prices, target) == expected


def test_price_that_is_none() -> None:
    with pytest.raises(ValueError, match="--price=nan must be at least 0, and finite"):
        plan.price_of(["nan"], "v5e:4x4")
    with pytest.raises(ValueError, match=r"--price=v5e=cheap is no price; write USD a chip-hour as 1\.20"):
        plan.price_of(["v5e=cheap"], "v5e:4x4")
    with pytest.raises(ValueError, match="--price=v5=9 is of an unknown chip; known: v4, v5e"):
        plan.price_of(["v5=9"], "v5e:4x4")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("v5e:3x3", "The topology v5e:3x3 is unknown; choose local or CHIP:SHAPE of v4: 2x2x1 2x2x2"),
        ("gpu", "The topology gpu is unknown"),
        ("local@rows=2", "local@rows=2: rows=2 is no option; write spatial=N or batch=N."),
        ("local@batch=0", "batch=0 is no option"),
        ("local@batch=12", "eval.batch_size=12 does not divide over 8 devices of mesh.data; choose a multiple."),
        ("local@spatial=3", "mesh.data=-1 x mesh.spatial=3 does not use the 8 devices of this run exactly"),
        ("local@batch=8,spatial=8", "mesh.spatial=8 leaves fewer than 2 of the 6 rows of features to a device (crops "),
    ],
)
def test_targets_refused(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        plan.read_target(target, read_config(ADE20K, NETWORK), 400)


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ValueError, match=r"needs libtpu: pip install 'psp-jax\[plan\]'"):
        topology_devices("v5e:2x2")


def test_images_of_data_sets_that_are_not_here(tmp_path: Path) -> None:
    config = read_config(ADE20K, [f"--config.data.dir={tmp_path}"])
    classes, images = plan.data_set(config, None)
    assert (classes.num_classes, images) == (150, 20_210)
    assert plan.data_set(config, 7)[1] == 7
    config.data.update(name="cityscapes", train_split="train+train_extra")
    assert plan.data_set(config, None)[1] == 2_975 + 19_997
    config.data.train_split = "train+test"
    with pytest.raises(ValueError, match="cityscapes has no split 'test'; its splits are train, validation"):
        plan.data_set(config, None)
    config.data.update(name="image_folder", dir=str(tmp_path / "away"), train_split="train", classes="camvid")
    assert plan.data_set(config, 367)[1] == 367
    with pytest.raises(FileNotFoundError):
        plan.data_set(config, None)


def test_this_machine_as_a_user_plans_for_it(tmp_path: Path) -> None:
    flags = ("--config", ADE20K, *NETWORK, *SMALLER, "--images", 400, "--output", tmp_path / "out")
    done = run_module("psp_jax.plan", "--topology", "local@batch=4", "local@batch=8,spatial=1", *flags, devices=2)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "plan.json").read_text())["rows"]
    assert [found["steps"] for found in rows] == [10_000, 5_000]  # 100 epochs of 400 images
    assert [found["chips"] for found in rows] == [2, 2]
    for found, images in zip(rows, (2, 4), strict=True):
        assert found["memory"]["batch"] == images * 41 * 41 * 4
        assert found["collectives"]["all-reduce"]["chips"] == [2]
        assert found["images_per_second"] is None
    assert rows[1]["flops"] == pytest.approx(2 * rows[0]["flops"], rel=0.05)
    assert "cycles" not in done.stdout
    assert not (tmp_path / "out" / "plan.png").exists()  # of nothing


def test_another_number_of_devices_than_the_configuration_demands() -> None:
    config = read_config(ADE20K, (*NETWORK, "--config.mesh.devices=16"))
    with pytest.raises(ValueError, match=r"local@batch=8 has 8 devices, and mesh\.devices=16 refuses any other number"):
        plan.read_target("local@batch=8", config, 400)
    config.mesh.devices = 8
    assert plan.read_target("local@batch=8", config, 400).mesh.size == 8


def test_a_pod_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("libtpu")
    flags = (
        *("--config", ADE20K, *NETWORK, *SMALLER, "--price", "v5e=2"),
        *("--eval_image", 60, 70, "--output", tmp_path / "out"),
    )
    flags += ("--hlo", tmp_path / "step.txt", f"--config.data.dir={tmp_path}", "--config.train.ema_decay=0.999")
    done = run_module("psp_jax.plan", "--topology", "v5e:2x2", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (found,) = json.loads((tmp_path / "out" / "plan.json").read_text())["rows"]
    assert (found["chips"], found["steps"], found["fits"]) == (4, 505_200, True)
    memory = found["memory"]
    # Each chip holds the same share of all three, and the number of updates with the optimizer.
    assert memory["averaged parameters"] == memory["parameters"] == memory["optimizer state"] - 4
    assert memory["batch"] == 41 * 41 * 4
    assert found["cycles"] == program_cost((tmp_path / "step.txt").read_text()).cycles > 100_000
    # The gradients, in bfloat16 or more, are summed over the chips.
    assert found["collectives"]["all-reduce"]["bytes"] >= 4 * memory["parameters"] / 2
    assert found["price"] == pytest.approx(2 * 4 * 505_200 * found["cycles"] / 1.5e9 / 3600)
    assert found["evaluation"]["images_per_second"] > 0
    assert not (tmp_path / "out" / "plan.png").exists()


def test_a_program_that_does_not_fit() -> None:
    pytest.importorskip("libtpu")
    device = topology_devices("v5e:2x2")[0]
    array = jax.ShapeDtypeStruct((1 << 16, 1 << 10, 64), jnp.float32, sharding=SingleDeviceSharding(device))
    found = programs._compiled(jax.jit(lambda x: x + 1), (array,), {"batch": array})
    assert found.total is None
    assert found.refusal.startswith("Ran out of memory on HBM")
    assert "(15.75G)" in found.refusal


@pytest.mark.parametrize(("chip", "shape"), [(chip, facts.topologies[1]) for chip, facts in CHIPS.items()])
def test_every_chip_is_one_device(chip: str, shape: str) -> None:
    pytest.importorskip("libtpu")
    assert len(topology_devices(f"{chip}:{shape}")) == np.prod([int(side) for side in shape.split("x")])
