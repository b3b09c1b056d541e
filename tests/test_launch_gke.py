"""launch/gke.py renders JobSets that fit the official schema, and drives kubectl; a stub stands in for it."""

import copy
import json
import shlex
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import jsonschema
import pytest
from conftest import ROOT
from launch_stubs import Stubs

SCHEMA = json.loads((ROOT / "tests" / "jobset_schema.json").read_text())
RUN = ("--", "--config", "configs/ade20k.py", "--workdir=/mnt/it's $(HERE) $$")
COMMON = ("submit", "--name=psp", "--image=registry/psp:1", "--claim=runs:/mnt", "--claim=data:/data")
TPU = (*COMMON, "--tpu=tpu-v5-lite-podslice", "--topology=4x4")
GPU = (*COMMON, "--gpu=nvidia-h100-80gb", "--nodes=3")
# Answers with the file of the subcommand, such as get-pods, once, where there is a get-pods.more; keeps its input.
KUBECTL = r"""
verb=$1; [ "$verb" != get ] || verb="get-$2"
[ "$verb" != apply ] || cat >"$here/applied"
[ ! -e "$here/$verb.error" ] || { cat "$here/$verb.error" >&2; exit 1; }
[ ! -e "$here/$verb" ] || cat "$here/$verb"
[ ! -e "$here/$verb.more" ] || mv "$here/$verb.more" "$here/$verb"
"""


@pytest.fixture
def stubs(tmp_path: Path) -> Stubs:
    stubs = Stubs(tmp_path)
    stubs.add("kubectl", KUBECTL)
    return stubs


def gke(stubs: Stubs, *arguments: str) -> CompletedProcess[str]:
    return stubs.run(sys.executable, "launch/gke.py", *arguments)


def rendered(stubs: Stubs, *arguments: str) -> dict[str, Any]:
    result = gke(stubs, *arguments, *RUN)
    assert result.returncode == 0, result.stderr
    manifest = json.loads((stubs.folder / "applied").read_text())
    jsonschema.validate(manifest, SCHEMA)
    return manifest


def parts(manifest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The replicated job, its Job and its pod."""
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    return replicated, job, job["template"]["spec"]


def expanded(argument: str, variables: dict[str, str]) -> str:
    """What a container gets of an argument: $$ is read as $, and $(NAME) as the variable where there is one."""
    out, rest = "", argument
    while rest:
        name = rest[2 : rest.index(")")] if rest.startswith("$(") and ")" in rest else None
        if rest.startswith("$$"):
            out, rest = out + "$", rest[2:]
        elif name in variables:
            out, rest = out + variables[name], rest[len(name) + 3 :]
        else:
            out, rest = out + rest[0], rest[1:]
    return out


def test_tpu_slices(stubs):
    replicated, job, pod = parts(rendered(stubs, *TPU, "--slices=2", "--spot"))
    assert replicated["replicas"] == 2
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)  # 16 chips, 4 a host
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"] == {"requests": {"google.com/tpu": 4}, "limits": {"google.com/tpu": 4}}
    told = [expanded(a, {"HERE": "wrong", "JOB_COMPLETION_INDEX": "1"}) for a in container["args"]]
    assert told == [*RUN[1:], "--coordinator=auto"]


@pytest.mark.parametrize(
    ("topology", "chips", "pods"), [("2x2x4", 4, 4), ("2x2", 4, 1), ("2x4", 8, 1), ("1x1", 1, 1), ("8x16", 4, 32)]
)
def test_pods_of_a_topology(stubs, topology, chips, pods):
    _, job, pod = parts(rendered(stubs, *TPU[:-1], f"--topology={topology}", f"--chips_per_host={chips}"))
    assert job["parallelism"] == job["completions"] == pods
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}


def test_gpu_nodes_meet_at_the_first_pod(stubs):
    manifest = rendered(stubs, *GPU, "--service_account=trainer", "--privileged")
    replicated, job, pod = parts(manifest)
    (container,) = pod["containers"]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (1, 3, 3)
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert pod["serviceAccountName"] == "trainer" and container["securityContext"]["privileged"]
    # JobSet names hosts <jobset>-<replicated job>-<job index>-<pod index>.<subdomain>; Jobs count pods when Indexed.
    host = f"psp-{replicated['name']}-0-0.{manifest['spec']['network']['subdomain']}"
    assert job["completionMode"] == "Indexed" and manifest["spec"]["network"]["enableDNSHostnames"] is True
    told = [expanded(a, {"JOB_COMPLETION_INDEX": "2"}) for a in container["args"]]
    assert told == [*RUN[1:], f"--coordinator={host}:8476", "--num_processes=3", "--process_id=2"]
    assert container["ports"] == [{"containerPort": 8476}]


def test_storage(stubs):
    _, _, pod = parts(rendered(stubs, *GPU))
    claims = {v["name"]: v.get("persistentVolumeClaim", {}).get("claimName") for v in pod["volumes"]}
    mounts = {m["mountPath"]: claims[m["name"]] for m in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"/mnt": "runs", "/data": "data", "/dev/shm": None}


def test_preemption_restarts_without_limit_and_failures_count(stubs):
    manifest = rendered(stubs, *TPU, "--max_restarts=7")
    _, job, pod = parts(manifest)
    taken, saved = job["podFailurePolicy"]["rules"]
    assert taken == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    (container,) = pod["containers"]
    codes = {"containerName": container["name"], "operator": "In", "values": [75]}
    assert saved == {"action": "FailJob", "onExitCodes": codes} and pod["terminationGracePeriodSeconds"] == 60
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7 and pod["restartPolicy"] == "Never"  # podFailurePolicy asks for Never
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_the_schema_refuses_what_is_wrong(stubs):
    good = rendered(stubs, *TPU)
    for spoil in (
        lambda m: m["spec"].update(replicatedJob=[]),
        lambda m: m["spec"]["failurePolicy"]["rules"][0].pop("name"),
        lambda m: parts(m)[1].update(parallelism="4"),
        lambda m: parts(m)[2]["containers"][0].update(arg=[]),
        lambda m: parts(m)[2]["nodeSelector"].update(spot=True),
    ):
        bad = copy.deepcopy(good)
        spoil(bad)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, SCHEMA)


def test_a_dry_run_prints_manifest_and_command(stubs):
    result = gke(stubs, *TPU, "--namespace=vision", "--dry_run", *RUN)
    manifest, end = json.JSONDecoder().raw_decode(result.stdout)
    assert manifest == rendered(stubs, *TPU, "--namespace=vision")
    assert shlex.split(result.stdout[end:]) == ["kubectl", "apply", "--filename=-", "--namespace=vision"]
    assert len(stubs.calls()) == 1


def test_logs_and_delete(stubs):
    (stubs.folder / "logs").write_text("[psp-workers-0-1] step 2\n")
    result = gke(stubs, "logs", "--name=psp")
    assert result.stdout == "[psp-workers-0-1] step 2\n"
    assert gke(stubs, "delete", "--name=psp", "--namespace=vision").returncode == 0
    logs, delete = stubs.calls()
    assert {"--follow", "--prefix", "--selector=jobset.sigs.k8s.io/jobset-name=psp"} <= set(logs)
    assert delete == ["kubectl", "delete", "jobset", "psp", "--namespace=vision"]


def pods(*phases: str) -> str:
    statuses = {
        "Running": {"phase": "Running"},
        "Pending": {
            "phase": "Pending",
            "conditions": [
                {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/5 nodes"}
            ],
        },
        "NoImage": {
            "phase": "Pending",
            "conditions": [{"type": "Ready", "status": "False", "message": "containers with unready status"}],
            "containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff"}}}],
        },
    }
    items = [{"metadata": {"name": f"psp-workers-0-{i}"}, "status": statuses[p]} for i, p in enumerate(phases)]
    return json.dumps({"items": items})


@pytest.fixture
def submitted(stubs: Stubs) -> Stubs:
    rendered(stubs, *GPU)
    (stubs.folder / "applied").rename(stubs.folder / "get-jobset")
    return stubs


def test_wait_ends_when_all_pods_run(submitted):
    (submitted.folder / "get-pods").write_text(pods("Running", "Running"))
    (submitted.folder / "get-pods.more").write_text(pods("Running", "Running", "Running"))
    result = gke(submitted, "wait", "--name=psp", "--poll_seconds=0.01")
    assert (result.returncode, result.stdout) == (0, "all 3 pods of psp run\n")
    assert len(submitted.calls("pods")) == 2


@pytest.mark.parametrize(
    ("phases", "why"),
    [
        (
            ("Running", "Pending", "NoImage"),
            "psp-workers-0-1 (Unschedulable: 0/5 nodes); psp-workers-0-2 (ImagePullBackOff)",
        ),
        (("Running",), "the others do not exist yet"),
    ],
)
def test_pods_that_never_start_are_named(submitted, phases, why):
    (submitted.folder / "get-pods").write_text(pods(*phases))
    result = gke(submitted, "wait", "--name=psp", "--wait_minutes=0")
    assert result.returncode == 4
    assert result.stderr == f"error: 1 of 3 pods of psp run after 0 minutes: {why}.\n"


def test_a_failed_jobset_is_told(submitted):
    failed = json.loads((submitted.folder / "get-jobset").read_text())
    failed["status"] = {"conditions": [{"type": "Failed", "status": "True", "message": "reached max restarts"}]}
    (submitted.folder / "get-jobset").write_text(json.dumps(failed))
    (submitted.folder / "get-pods").write_text(pods())
    result = gke(submitted, "wait", "--name=psp")
    assert (result.returncode, result.stderr) == (1, "error: psp has failed (reached max restarts); see its logs.\n")


def test_kubectl_failures_are_one_sentence(stubs):
    (stubs.folder / "apply.error").write_text("Error from server (Forbidden): exceeded quota: gpus, requested: 8\n")
    result = gke(stubs, *GPU, *RUN)
    assert result.returncode == 3
    assert result.stderr == (
        "error: There is no quota for psp (Error from server (Forbidden): exceeded quota: gpus, requested: 8); "
        "ask for it, or for fewer nodes.\n"
    )
    (stubs.folder / "apply.error").write_text('warning\nerror: no matches for kind "JobSet"\n')
    result = gke(stubs, *GPU, *RUN)
    assert (result.returncode, result.stderr) == (1, 'error: kubectl apply failed: no matches for kind "JobSet".\n')


def test_a_missing_kubectl_is_told(stubs):
    (stubs.folder / "bin" / "kubectl").unlink()
    result = stubs.run(sys.executable, "launch/gke.py", "delete", "--name=psp", path="")
    assert (result.returncode, result.stderr[:36]) == (1, "error: kubectl is not on PATH; `gclo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (TPU, "submit needs the arguments of psp_jax.main after --."),
        ((*COMMON, *RUN), "submit needs --image, and either --tpu with --topology or --gpu."),
        ((*TPU, "--gpu=l4", *RUN), "submit needs --image, and either --tpu with --topology or --gpu."),
        ((*TPU[:-1], *RUN), "submit needs --image, and either --tpu with --topology or --gpu."),
        ((*TPU, "--topology=4*4", *RUN), "--topology is like 4x4 or 2x2x4, not 4*4."),
        ((*TPU, "--topology=3x3", *RUN), "The 9 chips of 3x3 are no whole number of hosts of 4 chips."),
        ((*GPU, "--name=Psp", *RUN), "--name takes up to 40 of a-z, 0-9 and -, a letter first, not Psp."),
        ((*GPU, "--claim=/mnt", *RUN), "--claim is CLAIM:/PATH, not /mnt."),
    ],
)
def test_wrong_usage_is_told(stubs, arguments, message):
    result = gke(stubs, *arguments)
    assert (result.returncode, result.stderr) == (2, f"error: {message}\n")
    assert not stubs.calls()
