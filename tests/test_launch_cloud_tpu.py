"""launch/cloud_tpu.sh against a stub of gcloud that keeps a TPU of two workers as folders and processes."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from launch_stubs import Stubs
from stub_gcloud import GCLOUD, PYTHON3

OPTIONS = ("--name=psp", "--zone=us-west4-a", "--poll_seconds=0")
UP = (*OPTIONS, "--accelerator_type=v5litepod-16", "--", "--config", "configs/ade20k.py", "--workdir=/mnt/it's here")
TRAINED = ["-m", "psp_jax.main", "--config", "configs/ade20k.py", "--workdir=/mnt/it's here", "--coordinator=auto"]


@pytest.fixture
def tpu(tmp_path: Path) -> Iterator[Stubs]:
    stubs = Stubs(tmp_path)
    stubs.add("gcloud", GCLOUD)
    stubs.add("python3", PYTHON3)
    (tmp_path / "after_create").write_text("PROVISIONING\nACTIVE\n")
    (tmp_path / "deeds").write_text("exit 0\n")
    yield stubs
    for file in tmp_path.glob("worker*/psp_jax_run/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(file.read_text()), signal.SIGKILL)


def cloud_tpu(stubs: Stubs, *arguments: str) -> subprocess.CompletedProcess[str]:
    return stubs.run("launch/cloud_tpu.sh", *arguments)


def errors(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def test_up_creates_installs_trains_and_deletes(tpu):
    result = cloud_tpu(tpu, "up", "--spot", "--project=mine", "--setup=echo set up >>../setup", *UP)
    assert result.returncode == 0, result.stderr
    (create,) = tpu.calls("gcloud", "create")
    assert create == [
        *("gcloud", "compute", "tpus", "queued-resources", "create", "psp", "--node-id=psp"),
        *("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"),
        *("--zone=us-west4-a", "--project=mine"),
    ]
    assert sorted(tpu.calls("train")) == [["train", worker, *TRAINED] for worker in "01"]
    (delete,) = tpu.calls("gcloud", "delete")
    assert {"--force", "--quiet", "psp"} <= set(delete) and tpu.calls("gcloud")[-1] == delete
    assert all({"--zone=us-west4-a", "--project=mine"} <= set(call) for call in tpu.calls("gcloud"))


def test_a_preempted_tpu_is_made_again_and_the_training_started_again(tpu):
    state = shlex.quote(str(tpu.folder / "state"))
    preempt = f"sleep 0.5; echo SUSPENDED >{state}.new; mv {state}.new {state}; sleep 60"  # never seen half written
    (tpu.folder / "deeds").write_text(f"{preempt}\n{preempt.replace('sleep 60', 'exit 0')}\nexit 0\n")
    result = cloud_tpu(tpu, "up", *UP)
    assert result.returncode == 0, result.stderr
    verbs = [call[4] for call in tpu.calls("gcloud") if call[4] in ("create", "delete")]
    assert verbs == ["create", "delete"] * 3, result.stderr
    assert tpu.calls("train", "1") == [["train", "1", *TRAINED]] * 3
    assert result.stderr.count("psp was preempted (SUSPENDED)") == 2


def test_a_preemption_that_only_the_vm_knows_is_seen(tpu):
    vm = shlex.quote(str(tpu.folder / "vm"))
    (tpu.folder / "deeds").write_text(f"echo PREEMPTED >{vm}; sleep 60\nexit 0\n")
    gcloud = tpu.folder / "bin" / "gcloud"
    gcloud.write_text(gcloud.read_text().replace("    kill_all\n", '    kill_all\n    rm -f "$here/vm"\n'))
    result = cloud_tpu(tpu, "up", *UP)
    assert result.returncode == 0, result.stderr
    assert "psp was preempted (PREEMPTED)" in result.stderr and len(tpu.calls("gcloud", "create")) == 2


def test_restarts_come_to_an_end(tpu):
    (tpu.folder / "after_create").write_text("SUSPENDED\n")
    result = cloud_tpu(tpu, "up", "--max_restarts=2", *UP)
    assert result.returncode == 1
    assert errors(result) == [
        "error: psp was begun anew 2 times without an end of the training; look why, or raise --max_restarts."
    ]
    assert len(tpu.calls("gcloud", "create")) == 3 and not tpu.calls("train")


# Its whole session goes, as when the machine restarts; or it is asked to end first, and may save; or a worker hangs.
@pytest.mark.parametrize("end", ["kill -KILL 0", "kill -TERM $$", "exit 75", "exit 69"])
def test_a_lost_training_starts_again_on_the_same_tpu(tpu, end):
    (tpu.folder / "deeds").write_text(f"{end}\nexit 0\n")
    result = cloud_tpu(tpu, "up", *UP)
    assert result.returncode == 0, result.stderr
    assert "the training on psp is lost" in result.stderr
    assert len(tpu.calls("gcloud", "create")) == 1 and len(tpu.calls("train", "1")) == 2


def test_a_failed_training_gives_its_code_and_keeps_the_tpu(tpu):
    (tpu.folder / "deeds").write_text("echo error: no such field; exit 7\n")
    result = cloud_tpu(tpu, "up", *UP)
    assert result.returncode == 7
    assert "[1] error: no such field" in result.stderr and "[0] hello from worker 0" in result.stderr
    assert len(errors(result)) == 1 and "the TPU is kept for a look" in errors(result)[0]
    assert not tpu.calls("gcloud", "delete")


@pytest.mark.parametrize("where", ["at create", "later"])
def test_no_quota_is_one_sentence_and_its_own_code(tpu, where):
    text = "Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerZone' has been exceeded. Limit: 0 in zone us-west4-a."
    if where == "at create":
        (tpu.folder / "create_error").write_text(
            f"Create request issued.\nERROR: (gcloud.create) {{'code': 8,\n {text}}}\n"
        )
    else:
        (tpu.folder / "after_create").write_text(f"PROVISIONING\nFAILED {text}\n")
    result = cloud_tpu(tpu, "up", *UP)
    assert result.returncode == 3
    (error,) = errors(result)
    assert error.startswith("error: There is no quota for psp in us-west4-a (") and text[:-1] in error
    assert error.endswith("; ask for it in the console, or choose another --zone or --accelerator_type.")
    assert not tpu.calls("train")


def test_other_failures_of_create_are_told(tpu):
    (tpu.folder / "create_error").write_text("ERROR: (gcloud) ALREADY_EXISTS: Resource already exists\n")
    result = cloud_tpu(tpu, "create", *UP)
    assert (result.returncode, errors(result)) == (
        1,
        ["error: psp exists already in us-west4-a; delete it first, or choose another --name."],
    )
    (tpu.folder / "create_error").write_text("ERROR: (gcloud.create) PERMISSION_DENIED: not yours.\n")
    result = cloud_tpu(tpu, "create", *UP)
    assert errors(result) == ["error: gcloud could not create psp: (gcloud.create) PERMISSION_DENIED: not yours."]


def test_a_tpu_that_does_not_come_is_told(tpu):
    (tpu.folder / "state").write_text("WAITING_FOR_RESOURCES\n")
    result = cloud_tpu(tpu, "wait", "--wait_minutes=0", *OPTIONS)
    assert result.returncode == 4
    assert errors(result) == [
        "error: psp is still WAITING_FOR_RESOURCES after 0 minutes; it stays in the queue: wait again, or delete it."
    ]
    (tpu.folder / "state").unlink()
    assert "There is no psp in us-west4-a; create it first." in cloud_tpu(tpu, "wait", *OPTIONS).stderr


def test_the_worker_that_never_answers_is_named(tpu):
    assert cloud_tpu(tpu, "create", *UP).returncode == 0
    (tpu.folder / "down.1").touch()
    script = ROOT / "launch" / "cloud_tpu.sh"
    folder = tpu.folder / "launch"
    shutil.copytree(ROOT / "launch", folder)
    for name in ("LICENSE", "README.md", "configs", "psp_jax", "pyproject.toml"):
        (tpu.folder / name).symlink_to(ROOT / name)
    (folder / "cloud_tpu.sh").write_text(script.read_text().replace('"$(($1 * 60))"', "2"))  # not a minute
    result = tpu.run(str(folder / "cloud_tpu.sh"), "run", *UP)
    assert result.returncode == 4
    assert errors(result) == ["error: Worker 1 of psp did not come to an end of 'installing' within 30 minutes."]


def test_a_worker_that_cannot_install_is_named_with_its_output(tpu):
    assert cloud_tpu(tpu, "create", *UP).returncode == 0
    (tpu.folder / "no_network").touch()
    result = cloud_tpu(tpu, "run", *UP)
    assert result.returncode == 1
    assert "[1] uv: no network" in result.stderr
    assert len(errors(result)) == 1 and errors(result)[0].startswith("error: Worker 0 1 of psp failed at 'installing'")


def test_run_status_and_a_second_run(tpu):
    assert cloud_tpu(tpu, "create", *UP).returncode == 0
    (tpu.folder / "state").write_text("ACTIVE\n")
    assert cloud_tpu(tpu, "status", *OPTIONS).stdout == "worker 0: lost\nworker 1: lost\n"
    (tpu.folder / "deeds").write_text("sleep 60\nsleep 60\n")
    assert cloud_tpu(tpu, "run", *UP).returncode == 0
    first = (tpu.folder / "worker1/psp_jax_run/pid").read_text()
    assert cloud_tpu(tpu, "status", *OPTIONS).stdout == "worker 0: ended 0\nworker 1: running\n"
    assert cloud_tpu(tpu, "run", *UP).returncode == 0
    # Two trainings would fight for the chips. What nobody has waited for may stay, as a zombie without a command line.
    assert not Path(f"/proc/{first.strip()}").exists() or not Path(f"/proc/{first.strip()}/cmdline").read_bytes()
    assert cloud_tpu(tpu, "delete", *OPTIONS).returncode == 0


def test_up_finds_the_training_that_it_left(tpu):
    assert cloud_tpu(tpu, "create", *UP).returncode == 0
    # It ends once it was asked twice how it does, and not before `up` has looked at all.
    (tpu.folder / "deeds").write_text('until (($(grep -c status "$here/calls") > 1)); do sleep 0.1; done\n')
    assert cloud_tpu(tpu, "run", *UP).returncode == 0
    result = cloud_tpu(tpu, "up", "--keep", *UP)
    assert result.returncode == 0, result.stderr
    assert len(tpu.calls("train", "1")) == 1 and len(tpu.calls("gcloud", "create")) == 1
    assert not tpu.calls("gcloud", "delete")


def test_what_is_being_taken_away_is_waited_for(tpu):
    (tpu.folder / "state").write_text("SUSPENDING\nSUSPENDING\nSUSPENDED\n")
    assert cloud_tpu(tpu, "up", *UP).returncode == 0
    calls = [call[4] for call in tpu.calls("gcloud")]
    assert calls[:5] == ["describe", "describe", "describe", "delete", "create"]


def test_a_vm_that_is_gone_without_its_request_is_made_again(tpu):
    gcloud = tpu.folder / "bin" / "gcloud"
    text = gcloud.read_text().replace("    kill_all\n", '    kill_all\n    rm -f "$here/gone"\n')
    gcloud.write_text(
        text.replace('    [ -e "$here/vm" ]', '    [ ! -e "$here/gone" ] || not_found "$5"\n    [ -e "$here/vm" ]')
    )
    (tpu.folder / "deeds").write_text('touch "$here/gone"; sleep 60\nexit 0\n')
    result = cloud_tpu(tpu, "up", *UP)
    assert result.returncode == 0, result.stderr
    assert [call[4] for call in tpu.calls("gcloud") if call[4] in ("create", "delete")] == ["create", "delete"] * 2


def test_a_gcloud_that_fails_for_a_moment_is_asked_again(tpu):
    gcloud = tpu.folder / "bin" / "gcloud"
    text = gcloud.read_text()
    stumble = 'case "$(grep -c describe "$here/calls") $4" in [1-4]" describe") echo ERROR: 503 >&2; exit 1 ;; esac\n'
    gcloud.write_text(text.replace("value() {", stumble + "value() {"))
    (tpu.folder / "state").write_text("ACTIVE\n")
    assert cloud_tpu(tpu, "wait", *OPTIONS).returncode == 0
    gcloud.write_text(text.replace("value() {", "echo ERROR: 503 >&2; exit 1\nvalue() {"))
    result = cloud_tpu(tpu, "wait", *OPTIONS)
    assert (result.returncode, errors(result)) == (
        1,
        ["error: gcloud could not describe psp five times in a row: 503."],
    )


def test_logs_follow_a_worker(tpu):
    gcloud = tpu.folder / "bin" / "gcloud"
    gcloud.write_text(gcloud.read_text().split("value()")[0])
    assert cloud_tpu(tpu, "logs", "--worker=1", "--ssh_flag=--internal-ip", *OPTIONS).returncode == 0
    (call,) = tpu.calls()
    assert call[3:6] == ["tpu-vm", "ssh", "psp"]
    assert {"--worker=1", "--internal-ip", "--command=tail -n +1 -F psp_jax_run/log"} <= set(call)


def test_a_dry_run_prints_what_would_run(tpu):
    result = cloud_tpu(tpu, "up", "--dry_run", "--create_flag=--network=one", *UP)
    assert result.returncode == 0 and not tpu.calls()
    commands = [shlex.split(line) for line in result.stdout.splitlines()]
    assert [c[4] if c[0] == "gcloud" else c[0] for c in commands] == [
        *("create", "describe", "tar", "scp", "ssh", "ssh", "ssh", "delete")
    ]
    assert "--network=one" in commands[0]
    (start,) = (word.removeprefix("--command=") for word in commands[5] if word.startswith("--command="))
    assert shlex.split(start) == ["bash", "psp_jax_run/launch/tpu_worker.sh", "start", *TRAINED[2:-1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["up", "--name=psp"], "up needs --zone, --accelerator_type, -- and the arguments of psp_jax.main."),
        (["delete", "--zone=z"], "delete needs --name."),
        (["create", *OPTIONS], "create needs --accelerator_type."),
        (["up", "--config=a"], "There is no option --config; arguments of psp_jax.main follow --"),
        (["wait", *OPTIONS, "--wait_minutes=soon"], "--wait_minutes takes a whole number, not 'soon'."),
        (["wait", "--name"], "--name needs a value."),
        (["start"], "There is no command start; --help tells the commands."),
    ],
)
def test_wrong_usage_is_told(tpu, arguments, message):
    result = cloud_tpu(tpu, *arguments)
    assert result.returncode == 2 and len(errors(result)) == 1 and message in errors(result)[0]
    assert not tpu.calls()


def test_a_missing_tool_is_told(tpu):
    (tpu.folder / "bin" / "gcloud").unlink()
    for tool in ("bash", "dirname", "mktemp", "rm", "env", "tar", "timeout"):
        (tpu.folder / "bin" / tool).symlink_to(shutil.which(tool))
    result = tpu.run("launch/cloud_tpu.sh", "delete", *OPTIONS, path="")
    assert result.returncode == 1
    assert errors(result) == [
        "error: gcloud is not on PATH; gcloud comes with the Google Cloud CLI, the others with the system."
    ]
