"""A run goes on with other devices and other processes, on the same batches and with the same losses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Run, environment, free_address

# With the usual rate one ReLU that rounding switches in the first step moves the later losses by a thousandth.
FLAGS = (
    *("--config.optimizer.base_lr=1e-4", "--config.model.head=fcn", "--config.model.aux_head=False"),
    *("--config.train.batch_size=16", "--config.eval.batch_size=16", "--config.train.log_every_steps=1"),
    *("--config.train.steps=3", "--config.checkpoint.every_steps=1", "--config.checkpoint.keep_latest=3"),
    *("--config.log.images=0", "--config.eval.gallery=0", "--config.data.num_workers=0"),
)


def losses(workdir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def go_on(run: Run, former: Path, step: int, workdir: Path, devices: int, processes: int = 1) -> None:
    """Take the steps after `step` of a copy of a run, on `devices` devices in all."""
    shutil.copytree(former, workdir)
    for checkpoint in (workdir / "checkpoints").iterdir():
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    command = [sys.executable, "-m", "psp_jax.main", *run.flags, *FLAGS, "--workdir", str(workdir)]
    address = free_address()
    joined = [
        [f"--coordinator={address}", f"--num_processes={processes}", f"--process_id={r}"] if processes > 1 else []
        for r in range(processes)
    ]
    started = [
        subprocess.Popen(
            [*command, *flags],
            cwd=ROOT,
            env=environment(devices // processes),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for flags in joined
    ]
    outputs = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, outputs
    assert f"on {devices} x cpu\ngoing on after step {step} in" in outputs[0]


def test_eight_devices_then_four_of_two_processes_then_sixteen(finished_run: Run, tmp_path: Path) -> None:
    undisturbed, four, sixteen = (tmp_path / name for name in ("eight", "four", "sixteen"))
    done = finished_run.start(undisturbed, *FLAGS, devices=8)
    assert done.returncode == 0, done.stderr
    go_on(finished_run, undisturbed, 1, four, devices=4, processes=2)
    go_on(finished_run, four, 2, sixteen, devices=16)
    assert losses(four)[:1] == losses(undisturbed)[:1] and losses(sixteen)[:2] == losses(four)[:2]
    assert losses(sixteen) == pytest.approx(losses(undisturbed), rel=1e-5)
