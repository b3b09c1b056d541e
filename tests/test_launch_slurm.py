"""launch/slurm.sh submits itself, hands SIGTERM on and goes back to the queue; stubs stand in for SLURM's commands."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from conftest import ROOT
from launch_stubs import Stubs

RUN = ("--", "--config", "configs/ade20k.py", "--workdir=/scratch/it's here")
TOLD = [*RUN[1:], "--coordinator=auto"]
# sbatch runs nothing. srun does what `deed` says, after telling that it is there; scontrol and squeue are recorded.
SBATCH = '[ ! -e "$here/error" ] || { cat "$here/error" >&2; exit 1; }; echo "4711;cluster"'
SRUN = 'touch "$here/running"; . "$here/deed"'


@pytest.fixture
def stubs(tmp_path: Path) -> Stubs:
    stubs = Stubs(tmp_path)
    stubs.add("sbatch", SBATCH)
    stubs.add("srun", SRUN)
    stubs.add("squeue", 'cat "$here/state"')
    stubs.add("scontrol")
    (tmp_path / "state").write_text("RUNNING\n")
    return stubs


def slurm(stubs: Stubs, *arguments: str) -> CompletedProcess[str]:
    return stubs.run("launch/slurm.sh", *arguments)


def submitted(stubs: Stubs, *options: str) -> tuple[list[str], list[str]]:
    """The flags of sbatch, and the command of the job with its arguments."""
    result = slurm(stubs, *options, *RUN)
    assert result.returncode == 0, result.stderr
    (call,) = stubs.calls("sbatch")
    cut = call.index(str(ROOT / "launch" / "slurm.sh"))
    assert call[cut + 1] == "job"
    return call[1:cut], call[cut + 2 :]


def test_a_process_per_gpu(stubs):
    flags, job = submitted(
        stubs, "--nodes=2", "--gpus_per_node=4", "--cpus_per_task=12", "--time=1-00:00:00", "--partition=gpu",
        "--account=vision", "--sbatch_flag=--qos=long", "--srun_flag=--mpi=none",
    )  # fmt: skip
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=12"} <= set(flags)
    assert {"--time=1-00:00:00", "--partition=gpu", "--account=vision", "--qos=long"} <= set(flags)
    assert {"--requeue", "--signal=B:TERM@120", "--open-mode=append", f"--chdir={ROOT}"} <= set(flags)
    assert not any(flag.startswith("--gpus-per-task") for flag in flags)  # a process must see its node's GPUs
    assert job[:2] == ["90", "srun"]
    cut = job.index("python")
    assert {"--kill-on-bad-exit=0", "--wait=60", "--gpu-bind=none", "--cpus-per-task=12", "--mpi=none"} == set(
        job[2:cut]
    )
    assert job[cut:] == ["python", "-m", "psp_jax.main", *TOLD]


def test_a_process_per_node_drives_all_its_gpus(stubs):
    flags, job = submitted(stubs, "--per=node", "--gpus_per_node=4", "--image=psp.sif")
    assert {"--ntasks-per-node=1", "--gpus-per-node=4"} <= set(flags)
    cut = job.index("apptainer")
    assert job[cut:] == [
        *("apptainer", "exec", "--nv", "psp.sif", "env", "JAX_LOCAL_DEVICE_IDS=0,1,2,3"),
        *("python", "-m", "psp_jax.main", *TOLD),
    ]


def test_the_signal_comes_before_the_grace_ends(stubs):
    flags, job = submitted(stubs, "--grace_seconds=600")
    assert "--signal=B:TERM@630" in flags and job[0] == "600"


def test_submission_tells_where_the_output_goes(stubs):
    result = slurm(stubs, "--name=psp", *RUN)
    assert result.stderr == f"submitted as job 4711; its output: tail -F {ROOT}/psp-4711.out\n"


def test_a_dry_run_prints_the_command(stubs):
    dry = slurm(stubs, "--dry_run", *RUN)
    assert not stubs.calls()
    slurm(stubs, *RUN)
    assert [shlex.split(dry.stdout)] == stubs.calls()


def start(stubs: Stubs, deed: str, grace: int = 30, restarts: int = 0) -> subprocess.Popen:
    """Start the batch script as SLURM does, and return when its step runs."""
    (stubs.folder / "deed").write_text(deed)
    script = stubs.folder / "spooled"  # SLURM runs a copy
    shutil.copy(ROOT / "launch" / "slurm.sh", script)
    process = subprocess.Popen(
        [str(script), "job", str(grace), "srun", "python", "-m", "psp_jax.main"],
        env=os.environ
        | {"PATH": f"{stubs.folder}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "4711"}
        | {"SLURM_RESTART_COUNT": str(restarts)},
        stdout=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not (stubs.folder / "running").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.2)  # for the traps
    return process


@pytest.mark.parametrize("code", [0, 7])
def test_a_job_that_ends_gives_its_code_and_stays_ended(stubs, code):
    process = start(stubs, f"exit {code}")
    process.communicate(timeout=60)
    assert process.returncode == code
    assert not stubs.calls("scontrol")


def test_killed_processes_are_started_again_three_times(stubs):
    """137 is of one that srun ended after the others, or that took all memory."""
    process = start(stubs, "exit 137", restarts=2)
    process.communicate(timeout=60)
    assert stubs.calls("scontrol") == [["scontrol", "requeue", "4711"]]
    (stubs.folder / "running").unlink()
    process = start(stubs, "exit 137", restarts=3)
    process.communicate(timeout=60)
    assert process.returncode == 137
    assert len(stubs.calls("scontrol")) == 1


@pytest.mark.parametrize("code", [69, 75])
def test_a_job_that_can_go_on_goes_back_to_the_queue(stubs, code):
    process = start(stubs, f"exit {code}")
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, f"code {code}: going back to the queue\n")
    assert stubs.calls("scontrol") == [["scontrol", "requeue", "4711"]]


def test_sigterm_is_handed_on_and_the_job_goes_back_to_the_queue(stubs):
    process = start(stubs, "trap 'touch \"$here/told\"; exit 75' TERM; for i in $(seq 600); do sleep 0.1; done")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert (stubs.folder / "told").exists()
    assert output == "SIGTERM: going back to the queue in at most 30 seconds\n"
    assert stubs.calls("scontrol") == [["scontrol", "requeue", "4711"]]


def test_a_training_that_finishes_within_the_grace_stays_finished(stubs):
    process = start(stubs, "trap 'exit 0' TERM; for i in $(seq 600); do sleep 0.1; done")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert not stubs.calls("scontrol")


def test_a_job_deaf_to_sigterm_goes_back_after_the_grace(stubs):
    process = start(stubs, "trap '' TERM; echo $$ >\"$here/pid\"; exec sleep 60", grace=1)
    process.send_signal(signal.SIGTERM)
    until = time.monotonic() + 60
    while not stubs.calls("scontrol"):
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(int((stubs.folder / "pid").read_text()), signal.SIGKILL)  # SLURM would, now
    process.communicate(timeout=60)


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING", ""])
def test_a_cancelled_or_requeued_job_is_left_alone(stubs, state):
    (stubs.folder / "state").write_text(state)
    process = start(stubs, "trap 'exit 75' TERM; for i in $(seq 600); do sleep 0.1; done")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert f"not sent back to the queue: the job is {state or 'gone'}\n" in output
    assert not stubs.calls("scontrol")


@pytest.mark.parametrize(
    ("message", "code", "sentence"),
    [
        (
            "sbatch: error: QOSMaxGRES\nsbatch: error: Batch job submission failed: Job violates accounting/QOS policy",
            3,
            "The cluster's limits do not admit 2 nodes of 8 GPUs "
            "(Batch job submission failed: Job violates accounting/QOS policy).",
        ),
        ("sbatch: error: invalid partition specified: gpus", 1, "sbatch failed: invalid partition specified: gpus."),
    ],
)
def test_a_refused_submission_is_one_sentence(stubs, message, code, sentence):
    (stubs.folder / "error").write_text(message + "\n")
    result = slurm(stubs, "--nodes=2", *RUN)
    assert (result.returncode, result.stderr) == (code, f"error: {sentence}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes=2"], "The arguments of psp_jax.main must follow --."),
        (["--per=task", *RUN], "--per is gpu or node, not 'task'."),
        (["--nodes=0", *RUN], "--nodes takes a whole number from 1 on, not '0'."),
        (
            ["--config", *RUN],
            "There is no option --config; arguments of psp_jax.main follow --, and --help tells the options.",
        ),
        (["--time"], "--time needs a value."),
    ],
)
def test_wrong_usage_is_told(stubs, arguments, message):
    result = slurm(stubs, *arguments)
    assert (result.returncode, result.stderr) == (2, f"error: {message}\n")
    assert not stubs.calls()


def test_a_missing_sbatch_is_told(stubs):
    (stubs.folder / "bin" / "sbatch").unlink()
    for tool in ("bash", "env", "dirname", "mktemp", "rm"):
        (stubs.folder / "bin" / tool).symlink_to(shutil.which(tool))
    result = stubs.run("launch/slurm.sh", *RUN, path="")
    assert (result.returncode, result.stderr) == (
        1,
        "error: sbatch is not on PATH; submit from a login node of the cluster.\n",
    )


def test_a_job_goes_back_where_slurm_does_not_answer(stubs):
    stubs.add("squeue", "exit 1")
    process = start(stubs, "trap 'exit 75' TERM; for i in $(seq 600); do sleep 0.1; done")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert stubs.calls("scontrol") == [["scontrol", "requeue", "4711"]]
