#!/usr/bin/env bash
# Trains on a Cloud TPU VM that comes as a queued resource. `launch/cloud_tpu.sh --help` tells how.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/cloud_tpu.sh COMMAND --name NAME --zone ZONE [options] [-- arguments of psp_jax.main]

  up       create, wait and run, and again whenever the TPU is preempted; ends with the training, and then deletes
  create   ask for the TPU
  wait     until it is there
  run      copy this checkout to all workers, install it, start the training; it goes on when the connection ends
  status   of the training, on each worker
  logs     follow the output of a worker (--worker 0)
  delete   the TPU and the request for it

  --accelerator_type TYPE     v5litepod-16, v6e-8, ...: needed by create and up
  --runtime_version VERSION   by default the one for this accelerator
  --project PROJECT           by default gcloud's
  --spot                      cheaper, can be preempted
  --create_flag FLAG          one more flag for gcloud's create, such as --network=NAME; may be repeated
  --ssh_flag FLAG             one more flag for gcloud's ssh and scp, such as --internal-ip; may be repeated
  --setup COMMAND             run on every worker before the installation, for example to mount the workdir's storage
  --worker N                  whose output `logs` follows, or all (0)
  --wait_minutes N            how long to wait for the TPU (1440)
  --setup_minutes N           how long the workers may take to install (30)
  --poll_seconds N            time between two looks (60)
  --max_restarts N            how often `up` may begin anew (100)
  --keep                      `up` does not delete the TPU after the training
  --dry_run                   print the commands in place of running them

Exit codes: 2 wrong usage, 3 no quota, 4 a time limit has passed, otherwise the training's or 1.
USAGE
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"
# shellcheck source=launch/queued_resource.sh
source "$root/launch/queued_resource.sh"

# Runs tpu_worker.sh on all workers at once, for at most MINUTES. The output of worker N goes to $scratch/out/N.log; `silent`
# becomes the workers that did not come to its end, and `code` gcloud's exit code.
on_all() { # MINUTES COMMAND
  local flags=(ssh "$name" --worker=all "--command=$2") file
  silent="" code=0
  if [[ $dry_run == yes ]]; then
    remote "${flags[@]}"
    return
  fi
  rm -rf "$scratch/out"
  mkdir "$scratch/out"
  timeout --foreground --kill-after=10 "$(($1 * 60))" gcloud compute tpus tpu-vm "${flags[@]}" "--zone=$zone" \
    "--output-directory=$scratch/out" ${project:+"--project=$project"} ${ssh_flags[@]+"${ssh_flags[@]}"} \
    </dev/null >/dev/null 2>"$scratch/error" || code=$?
  for file in "$scratch"/out/*.log; do
    [[ -e $file ]] || silent="s (none answers)"
    [[ ! -e $file ]] || grep -q '^psp_jax:' "$file" || silent+=" $(basename "$file" .log)"
  done
}

show_output() { # WORKERS
  local worker
  for worker in $1; do
    [[ ! -e $scratch/out/$worker.log ]] || tail -n 15 "$scratch/out/$worker.log" | sed "s/^/[$worker] /" >&2
  done
}

# Returns 1 when the TPU was preempted meanwhile.
step() { # MINUTES WHAT COMMAND
  note "$2"
  on_all "$1" "$3"
  [[ -n $silent ]] || return 0
  show_output "$silent"
  local problem
  problem=$(last_error)
  look
  ! is_gone || return 1
  [[ $code != 124 && $code != 137 ]] || die 4 "Worker$silent of $name did not come to an end of '$2' within $1 minutes."
  die 1 "Worker$silent of $name failed at '$2' (exit code $code; $problem)."
}

run() {
  local upload=(scp "$scratch/psp_jax_run.tar.gz" "$name:" --worker=all) problem
  call tar --create --gzip --exclude=__pycache__ "--file=$scratch/psp_jax_run.tar.gz" "--directory=$root" \
    LICENSE README.md configs launch psp_jax pyproject.toml || die 1 "tar could not pack $root."
  note "copying this checkout to the workers"
  if ! remote "${upload[@]}" 2>"$scratch/error"; then
    problem=$(last_error)
    look
    ! is_gone || return 1
    die 1 "gcloud could not copy to $name: $problem."
  fi
  step "$setup_minutes" "installing" "$unpack && bash $worker_script install ${setup@Q}" &&
    step 5 "starting the training" "bash $worker_script start$(printf ' %q' "${arguments[@]}")"
}

# Sets `training` to running, finished, failed or lost: not started, or gone with a restart of its machine.
failed_asks=0
ask_training() {
  local told
  on_all 5 "$tell_status"
  if [[ -n $silent ]]; then
    training=running # a connection may fail; gcloud tells whether the TPU is still there
    ((++failed_asks < 5)) || die 4 "Worker$silent of $name did not answer five times in a row."
    return
  fi
  failed_asks=0
  told=$(sed -n 's/^psp_jax: //p' "$scratch"/out/*.log)
  training_code=$(sed -n 's/^ended //p' <<<"$told" | grep -vx 0 | head -n 1) || true
  case $told in
    # SIGTERM: its machine was shut down, after a save (75) or before the first step; 69: a worker did not answer.
    *ended\ 75* | *ended\ 143* | *ended\ 69*) training=lost ;;
    *ended\ [1-9]*) training=failed ;;
    *lost*) training=lost ;;
    *running*) training=running ;;
    *) training=finished ;;
  esac
}

status() {
  on_all 5 "$tell_status"
  [[ $dry_run == yes ]] || grep -H '^psp_jax: ' "$scratch"/out/*.log | sed 's|.*/\([0-9]*\)\.log:psp_jax:|worker \1:|' || true
  [[ -z $silent ]] || die 1 "Worker$silent of $name did not answer."
}

# Returns when the training has ended on a TPU that is still there, is lost, or the TPU is gone.
watch() {
  while :; do
    sleep "$poll_seconds"
    look
    ! is_gone || return 0
    ask_training
    [[ $training == running ]] || break
  done
  sleep "$poll_seconds" # a preemption ends the training, and is told only then
  look
}

up() {
  local begun
  if [[ $dry_run == yes ]]; then
    create
    wait_active
    run
    on_all 5 "$tell_status"
    [[ $keep == yes ]] || remove
    return
  fi
  trap 'note "left as it is, and costs money until: launch/cloud_tpu.sh delete --name $name --zone $zone"; exit 130' INT TERM
  for ((begun = 0; begun <= max_restarts; begun++)); do
    look
    while [[ $state == SUSPENDING || $state == DELETING ]]; do # cannot be deleted yet
      sleep "$poll_seconds"
      look
    done
    if is_gone; then
      [[ $state == MISSING ]] || remove
      create
    fi
    wait_active || continue
    ask_training
    [[ $training == running ]] || run || continue
    note "training; follow it by: launch/cloud_tpu.sh logs --name $name --zone $zone"
    watch
    if is_gone; then
      note "$name was preempted ($state)"
      continue
    fi
    if [[ $training == finished ]]; then
      note "the training has ended"
      [[ $keep == yes ]] || remove
      return 0
    fi
    if [[ $training == failed ]]; then
      on_all 5 "bash $worker_script tail"
      # A worker that does not answer may be on its way out, which gcloud tells late.
      if [[ -z $silent ]]; then
        show_output "$(basename -as .log "$scratch"/out/*.log)"
        die "$training_code" "The training on $name has failed; the TPU is kept for a look, and costs money until you delete it."
      fi
    fi
    note "the training on $name is lost"
  done
  die 1 "$name was begun anew $max_restarts times without an end of the training; look why, or raise --max_restarts."
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
      --spot | --keep | --dry_run)
        printf -v "$option" yes
        shift
        continue
        ;;
      --create_flag | --ssh_flag | --name | --zone | --project | --accelerator_type | --runtime_version | --setup | --worker) ;;
      --wait_minutes | --setup_minutes | --poll_seconds | --max_restarts)
        [[ ${2:-} =~ ^[0-9]+$ ]] || die 2 "$1 takes a whole number, not '${2:-}'."
        ;;
      *) die 2 "There is no option $1; arguments of psp_jax.main follow --, and --help tells the options." ;;
    esac
    (($# > 1)) || die 2 "$1 needs a value."
    case $1 in
      --create_flag) create_flags+=("$2") ;;
      --ssh_flag) ssh_flags+=("$2") ;;
      *) printf -v "$option" %s "$2" ;;
    esac
    shift 2
  done
}

check() {
  local tool missing=()
  [[ -n $name ]] || missing+=(--name)
  [[ -n $zone ]] || missing+=(--zone)
  [[ $command != up && $command != create || -n $accelerator_type ]] || missing+=(--accelerator_type)
  [[ $command != up && $command != run || ${#arguments[@]} != 0 ]] || missing+=("-- and the arguments of psp_jax.main")
  ((${#missing[@]} == 0)) || die 2 "$command needs$(printf ' %s,' "${missing[@]}" | sed 's/,$//')."
  case $accelerator_type in
    v6e-*) : "${runtime_version:=v2-alpha-tpuv6e}" ;;
    v5p-*) : "${runtime_version:=v2-alpha-tpuv5}" ;;
    v5litepod-*) : "${runtime_version:=v2-alpha-tpuv5-lite}" ;;
    *) : "${runtime_version:=tpu-ubuntu2204-base}" ;;
  esac
  [[ $dry_run == no ]] || return 0
  for tool in gcloud tar timeout; do
    command -v "$tool" >/dev/null || die 1 "$tool is not on PATH; gcloud comes with the Google Cloud CLI, the others with the system."
  done
}

worker_script=psp_jax_run/launch/tpu_worker.sh
unpack='mkdir -p psp_jax_run && cd psp_jax_run && rm -rf psp_jax configs && tar -xzf ../psp_jax_run.tar.gz && cd ..'
tell_status="[ ! -e $worker_script ] && echo psp_jax: lost || bash $worker_script status"
name="" zone="" project="" accelerator_type="" runtime_version="" setup="" worker=0
wait_minutes=1440 setup_minutes=30 poll_seconds=60 max_restarts=100 spot=no keep=no dry_run=no
create_flags=() ssh_flags=() arguments=()
command=${1:---help}
case $command in
  up | create | wait | run | status | logs | delete) ;;
  -h | --help | help)
    usage
    exit 0
    ;;
  *) die 2 "There is no command $command; --help tells the commands." ;;
esac
parse "${@:2}"
check
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
case $command in
  wait) wait_active || die 1 "$name was preempted ($state) before it was there; delete it and create it again." ;;
  run) run || die 1 "$name was preempted ($state); delete it and create it again." ;;
  logs) remote ssh "$name" "--worker=$worker" '--command=tail -n +1 -F psp_jax_run/log' ;;
  delete) remove ;;
  *) "$command" ;;
esac
