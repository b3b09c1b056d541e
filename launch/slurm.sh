#!/usr/bin/env bash
# Trains on GPU nodes of a SLURM cluster. `launch/slurm.sh --help` tells how. This file is also the batch script, which
# sbatch runs with `job` as its first word.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/slurm.sh [options] -- arguments of psp_jax.main

Submits the training from this checkout, with the Python on PATH. SLURM sends SIGTERM two minutes before it takes the nodes
back; the processes get it and save, and the job goes back to the queue and later on from its workdir: after --grace_seconds
at the latest, and also when the training ends with code 75 (saved after SIGTERM) or 69 (a process did not answer).

  --nodes N              nodes (1)
  --gpus_per_node N      GPUs of a node (8)
  --per gpu|node         one process per GPU, or one per node that drives all its GPUs (gpu)
  --cpus_per_task N      CPU cores of a process (by default the cluster's)
  --time TIME            such as 24:00:00 (by default the partition's)
  --partition NAME       --account NAME
  --name NAME            of the job (psp_jax)
  --image FILE           an Apptainer image that has the Python; other containers by --srun_flag
  --sbatch_flag FLAG     one more flag for sbatch; may be repeated
  --srun_flag FLAG       one more flag for srun, such as --container-image=IMAGE; may be repeated
  --grace_seconds N      at most between SIGTERM and going back to the queue (90)
  --dry_run              print the command in place of running it

Exit codes: 2 wrong usage, 3 a limit of the cluster, otherwise 1. Paths are relative to the checkout.
USAGE
}

# The batch script, on the first node.
job() { # GRACE_SECONDS COMMAND
  local step code=0 asked=no left=$1 state
  "${@:2}" &
  step=$!
  trap 'asked=yes' TERM
  wait "$step" || code=$?
  if [[ $asked == yes ]]; then
    echo "SIGTERM: going back to the queue in at most $left seconds"
    kill -TERM "$step" 2>/dev/null || true # srun hands it on to the processes
    while kill -0 "$step" 2>/dev/null && ((left-- > 0)); do sleep 1; done
    if ! kill -0 "$step" 2>/dev/null; then # it has ended within the grace: finished or failed by itself?
      code=0
      wait "$step" || code=$?
      [[ $code != 0 && $code != 1 ]] || exit "$code"
    fi
  else
    # 75: SIGTERM reached a process, and all have saved; 69: a process did not answer. srun tells the highest code of
    # all processes: 134 and 137 are of those that JAX or srun ended because another had failed, or were out of memory.
    case $code in
      69 | 75) ;;
      134 | 137) ((${SLURM_RESTART_COUNT:-0} < 3)) || exit "$code" ;;
      *) exit "$code" ;;
    esac
    echo "code $code: going back to the queue"
  fi
  # A cancelled job stays cancelled; a preempted one may be in the queue already.
  # Where SLURM does not answer, going back is the better guess.
  state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) || state=RUNNING
  if [[ $state == RUNNING ]]; then
    scontrol requeue "$SLURM_JOB_ID"
  else
    echo "not sent back to the queue: the job is ${state:-gone}"
  fi
}

parse() {
  local option
  while (($#)); do
    [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
    option=${1#--}
    case $1 in
      --)
        arguments=("${@:2}")
        return
        ;;
      --dry_run)
        dry_run=yes
        shift
        continue
        ;;
      --time | --partition | --account | --name | --image | --sbatch_flag | --srun_flag) ;;
      --nodes | --gpus_per_node | --cpus_per_task | --grace_seconds)
        [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die 2 "$1 takes a whole number from 1 on, not '${2:-}'."
        ;;
      --per) [[ ${2:-} == gpu || ${2:-} == node ]] || die 2 "--per is gpu or node, not '${2:-}'." ;;
      *) die 2 "There is no option $1; arguments of psp_jax.main follow --, and --help tells the options." ;;
    esac
    (($# > 1)) || die 2 "$1 needs a value."
    case $1 in
      --sbatch_flag) sbatch_flags+=("$2") ;;
      --srun_flag) srun_flags+=("$2") ;;
      *) printf -v "$option" %s "$2" ;;
    esac
    shift 2
  done
}

submit() {
  local tasks=$gpus_per_node id
  # By itself JAX gives process I of a node its GPU I, of those that all processes of the node see: no binding of GPUs.
  local step=(srun --kill-on-bad-exit=0 --wait=60 --gpu-bind=none) program=(python -m psp_jax.main)
  if [[ $per == node ]]; then
    tasks=1
    program=(env "JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $((gpus_per_node - 1)))" "${program[@]}")
  fi
  [[ -z $image ]] || program=(apptainer exec --nv "$image" "${program[@]}")
  [[ -z $cpus_per_task ]] || step+=("--cpus-per-task=$cpus_per_task")
  local batch=(sbatch --parsable "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$tasks"
    "--gpus-per-node=$gpus_per_node" ${cpus_per_task:+"--cpus-per-task=$cpus_per_task"} ${time:+"--time=$time"}
    ${partition:+"--partition=$partition"} ${account:+"--account=$account"}
    --requeue "--signal=B:TERM@$((grace_seconds + 30))" --open-mode=append "--output=$PWD/%x-%j.out" "--chdir=$root"
    ${sbatch_flags[@]+"${sbatch_flags[@]}"} "$root/launch/slurm.sh" job "$grace_seconds")
  step+=(${srun_flags[@]+"${srun_flags[@]}"} "${program[@]}" "${arguments[@]}" --coordinator=auto)
  if [[ $dry_run == yes ]]; then
    call "${batch[@]}" "${step[@]}"
    return
  fi
  command -v sbatch >/dev/null || die 1 "sbatch is not on PATH; submit from a login node of the cluster."
  if ! id=$("${batch[@]}" "${step[@]}" 2>"$scratch"); then
    id=$(tail -n 1 "$scratch" | sed 's/^sbatch: error: *//; s/[. ]*$//')
    [[ ! $id =~ QOS|[Ll]imit|[Qq]uota ]] || die 3 "The cluster's limits do not admit $nodes nodes of $gpus_per_node GPUs ($id)."
    die 1 "sbatch failed: $id."
  fi
  note "submitted as job ${id%%;*}; its output: tail -F $PWD/$name-${id%%;*}.out"
}

if [[ ${1:-} == job ]]; then
  job "${@:2}"
  exit
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"
nodes=1 gpus_per_node=8 per=gpu cpus_per_task="" time="" partition="" account="" name=psp_jax image="" grace_seconds=90
dry_run=no sbatch_flags=() srun_flags=() arguments=()
if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  usage
  exit 0
fi
parse "$@"
((${#arguments[@]})) || die 2 "The arguments of psp_jax.main must follow --."
scratch=$(mktemp)
trap 'rm -f "$scratch"' EXIT
submit
