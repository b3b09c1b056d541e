"""Run a training on Google Kubernetes Engine as a JobSet (the cluster needs the JobSet controller, 0.6 or newer).

    python launch/gke.py submit --name psp --image IMAGE --claim runs:/mnt --tpu tpu-v5-lite-podslice --topology 4x4 \\
        -- --config configs/ade20k.py --workdir /mnt/psp
    python launch/gke.py submit --name psp --image IMAGE --claim runs:/mnt --gpu nvidia-h100-80gb --nodes 2 \\
        -- --config configs/ade20k.py --workdir /mnt/psp
    python launch/gke.py wait --name psp      until all pods run; names those that do not
    python launch/gke.py logs --name psp      follow all pods
    python launch/gke.py delete --name psp

What follows `--` goes to psp_jax.main unchanged, with the flags that make the pods one run after it. With --dry_run the
manifest and the kubectl commands are printed. When a node is preempted, or SIGTERM made a pod save and end with code
75, the JobSet starts all pods again, without limit, and the run goes on from its workdir; after failures of its own at
most --max_restarts times. Exit codes: 2 wrong usage, 3 no quota, 4 a time limit has passed, otherwise kubectl's.
"""

import argparse
import json
import math
import re
import shlex
import subprocess
import sys
import time
from typing import Any

CONTAINER = "psp-jax"
POD_ROLE = "workers"  # name of the replicated job: part of the pods' names
PORT = 8476  # of process 0, on GPUs; TPUs have their own
JOBSET_LABEL = "jobset.sigs.k8s.io/jobset-name"


class Refused(Exception):
    """An error for the user: a sentence and an exit code."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


def hosts(topology: str, chips_per_host: int) -> int:
    """Return how many pods a slice of `topology`, such as 4x4 or 2x2x4, takes.

    Raises:
      Refused: the topology is not one, or is no whole number of hosts.
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", topology):
        raise Refused(2, f"--topology is like 4x4 or 2x2x4, not {topology}.")
    chips = math.prod(map(int, topology.split("x")))
    if chips_per_host < 1 or chips % chips_per_host:
        raise Refused(2, f"The {chips} chips of {topology} are no whole number of hosts of {chips_per_host} chips.")
    return chips // chips_per_host


def jobset(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """Return the JobSet (jobset.x-k8s.io/v1alpha2): a Job per TPU slice or for all GPU nodes, a pod per host."""
    annotations: dict[str, str] = {}
    if options.tpu:
        pods, device, count = hosts(options.topology, options.chips_per_host), "google.com/tpu", options.chips_per_host
        selector = {
            "cloud.google.com/gke-tpu-accelerator": options.tpu,
            "cloud.google.com/gke-tpu-topology": options.topology,
        }
        flags = ["--coordinator=auto"]
        annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = (
            "cloud.google.com/gke-nodepool"  # a pool is a slice
        )
    else:
        pods, device, count = options.nodes, "nvidia.com/gpu", options.gpus_per_node
        selector = {"cloud.google.com/gke-accelerator": options.gpu}
        first = f"{options.name}-{POD_ROLE}-0-0.{options.name}"  # the JobSet's headless service bears its name
        flags = [f"--coordinator={first}:{PORT}", f"--num_processes={pods}", "--process_id=$(JOB_COMPLETION_INDEX)"]
    if options.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    job = {
        "parallelism": pods,
        "completions": pods,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # the JobSet starts all pods again, never one alone
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [75]}},
            ]
        },
        "template": {"spec": pod(options, [*map(escape, arguments), *flags], {device: count}, selector)},
    }
    preempted = {
        "name": "preempted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": options.name, "annotations": annotations},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": options.name},
            "failurePolicy": {"maxRestarts": options.max_restarts, "rules": [preempted]},
            "replicatedJobs": [
                {"name": POD_ROLE, "replicas": options.slices if options.tpu else 1, "template": {"spec": job}}
            ],
        },
    }


def escape(argument: str) -> str:
    """Keep Kubernetes from replacing $(NAME) in an argument."""
    return argument.replace("$", "$$")


def pod(
    options: argparse.Namespace, arguments: list[str], devices: dict[str, int], selector: dict[str, str]
) -> dict[str, Any]:
    """Return the specification of a pod: one process that drives all devices of its host."""
    claims = [claim.partition(":") for claim in options.claim]
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": options.image,
        "args": arguments,  # the image's entry point is psp_jax.main
        "resources": {"requests": devices, "limits": devices},
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"},
            *({"name": f"claim-{i}", "mountPath": path} for i, (_, _, path) in enumerate(claims)),
        ],
    }
    if not options.tpu:
        container["ports"] = [{"containerPort": PORT}]
    if options.privileged:
        container["securityContext"] = {"privileged": True, "runAsUser": 0}
    specification: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 60,  # psp_jax.main saves within 30 and ends with code 75
        "securityContext": {"fsGroup": 1000, "fsGroupChangePolicy": "OnRootMismatch"},  # the image's user may write
        "nodeSelector": selector,
        "containers": [container],
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # batches pass there; a container has 64 MB otherwise
            *({"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": c}} for i, (c, _, _) in enumerate(claims)),
        ],
    }
    if options.spot:
        specification["tolerations"] = [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]
    if options.service_account:
        specification["serviceAccountName"] = options.service_account
    return specification


def kubectl(options: argparse.Namespace, *arguments: str, text: str | None = None, show: bool = False) -> str:
    """Run kubectl with `text` as its input and return its output, or let it through with `show`.

    Raises:
      Refused: it failed; with code 3 where a quota is the reason.
    """
    command = ["kubectl", *arguments, *([f"--namespace={options.namespace}"] if options.namespace else [])]
    if options.dry_run:
        print(shlex.join(command))
        return ""
    try:
        stdout = None if show else subprocess.PIPE
        done = subprocess.run(command, input=text, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    except FileNotFoundError:
        raise Refused(1, "kubectl is not on PATH; `gcloud components install kubectl` installs it.") from None
    if done.returncode:
        problem = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ").rstrip(".")
        if "quota" in problem:
            raise Refused(3, f"There is no quota for {options.name} ({problem}); ask for it, or for fewer nodes.")
        raise Refused(done.returncode, f"kubectl {arguments[0]} failed: {problem}.")
    return done.stdout or ""


def reason(found: dict[str, Any]) -> str:
    """Say why a pod does not run: what its container waits for, or why no node takes it."""
    status = found["status"]
    waiting = [c["state"]["waiting"] for c in status.get("containerStatuses", []) if "waiting" in c["state"]]
    blocked = [c for c in status.get("conditions", []) if c["status"] == "False" and "message" in c]
    words = [f"{why.get('reason', '')}: {why.get('message', '')}".strip(": ") for why in (*waiting, *blocked)]
    return words[0] if words else status["phase"]


def wait(options: argparse.Namespace) -> None:
    """Return when every pod runs or has ended well.

    Raises:
      Refused: with code 4 at the time limit, naming the pods that did not start and why; or the JobSet has failed.
    """
    deadline = time.monotonic() + 60 * options.wait_minutes
    while True:
        text = kubectl(options, "get", "jobset", options.name, "--output=json")
        listed = kubectl(options, "get", "pods", f"--selector={JOBSET_LABEL}={options.name}", "--output=json")
        if options.dry_run:
            return
        found = json.loads(text)
        for condition in found.get("status", {}).get("conditions", []):
            if condition["type"] == "Failed" and condition["status"] == "True":
                raise Refused(1, f"{options.name} has failed ({condition.get('message', '')}); see its logs.")
        expected = sum(
            job["replicas"] * job["template"]["spec"]["parallelism"] for job in found["spec"]["replicatedJobs"]
        )
        pods = json.loads(listed)["items"]
        late = [p for p in pods if p["status"]["phase"] not in ("Running", "Succeeded")]
        if len(pods) - len(late) >= expected:
            print(f"all {expected} pods of {options.name} run")
            return
        if time.monotonic() >= deadline:
            names = "; ".join(f"{p['metadata']['name']} ({reason(p)})" for p in late) or "the others do not exist yet"
            raise Refused(
                4,
                f"{len(pods) - len(late)} of {expected} pods of {options.name} run after {options.wait_minutes:g} "
                f"minutes: {names}.",
            )
        time.sleep(options.poll_seconds)


def submit(options: argparse.Namespace, arguments: list[str]) -> None:
    """Render the manifest and apply it, or print it.

    Raises:
      Refused: options are missing or do not fit together, or kubectl failed.
    """
    if not arguments:
        raise Refused(2, "submit needs the arguments of psp_jax.main after --.")
    if not options.image or bool(options.tpu) == bool(options.gpu) or bool(options.tpu) != bool(options.topology):
        raise Refused(2, "submit needs --image, and either --tpu with --topology or --gpu.")
    # The pods' names are NAME-workers-SLICE-INDEX-5LETTERS, at most 63 characters.
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", options.name):
        raise Refused(2, f"--name takes up to 40 of a-z, 0-9 and -, a letter first, not {options.name}.")
    for claim in options.claim:
        if not re.fullmatch(r"[^:]+:/.+", claim):
            raise Refused(2, f"--claim is CLAIM:/PATH, not {claim}.")
    manifest = json.dumps(jobset(options, arguments), indent=2)
    if options.dry_run:
        print(manifest)
    print(kubectl(options, "apply", "--filename=-", text=manifest), end="")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line at `--` into this launcher's options and the run's arguments."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["submit", "wait", "logs", "delete"])
    parser.add_argument("--name", required=True, help="of the JobSet")
    parser.add_argument("--namespace", help="by default kubectl's")
    parser.add_argument("--dry_run", action="store_true", help="print in place of doing")
    parser.add_argument("--image", help="built of launch/Dockerfile")
    parser.add_argument("--claim", action="append", default=[], help="CLAIM:/PATH, a volume that all pods can write")
    parser.add_argument("--tpu", help="label cloud.google.com/gke-tpu-accelerator, such as tpu-v6e-slice")
    parser.add_argument("--topology", help="label cloud.google.com/gke-tpu-topology, such as 4x4")
    parser.add_argument("--chips_per_host", type=int, default=4, help="chips of a TPU node (4)")
    parser.add_argument("--slices", type=int, default=1, help="TPU slices (1)")
    parser.add_argument("--gpu", help="label cloud.google.com/gke-accelerator, such as nvidia-h100-80gb")
    parser.add_argument("--nodes", type=int, default=1, help="GPU nodes (1)")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="GPUs of a node (8)")
    parser.add_argument("--spot", action="store_true", help="on spot nodes")
    parser.add_argument("--privileged", action="store_true", help="as root, for nodes whose devices ask for it")
    parser.add_argument("--service_account", help="Kubernetes service account of the pods")
    parser.add_argument("--max_restarts", type=int, default=3, help="after failures that are no preemption (3)")
    parser.add_argument("--wait_minutes", type=float, default=30.0, help="time limit of wait (30)")
    parser.add_argument("--poll_seconds", type=float, default=10.0, help="time between two looks (10)")
    return parser.parse_args(argv[:cut]), argv[cut + 1 :]


def main(argv: list[str]) -> int:
    """Do what the command line says; return the exit code."""
    options, arguments = parse(argv)
    selector = f"--selector={JOBSET_LABEL}={options.name}"
    try:
        if options.command == "submit":
            submit(options, arguments)
        elif options.command == "wait":
            wait(options)
        elif options.command == "logs":
            kubectl(options, "logs", selector, "--follow", "--prefix", "--tail=-1", "--max-log-requests=512", show=True)
        else:
            print(kubectl(options, "delete", "jobset", options.name), end="")
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
