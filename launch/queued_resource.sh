# shellcheck shell=bash disable=SC2034,SC2154
# The request for a TPU and what has become of it: functions of launch/cloud_tpu.sh, which sets the options that they read.

tpu() { # GROUP VERB ARGUMENTS: gcloud compute tpus, for our TPU in our zone
  call gcloud compute tpus "$1" "$2" "${@:3}" "--zone=$zone" ${project:+"--project=$project"}
}

remote() { # VERB ARGUMENTS: ssh and scp
  tpu tpu-vm "$@" ${ssh_flags[@]+"${ssh_flags[@]}"}
}

# gcloud's error on one line: from "ERROR" on, or its last line.
last_error() {
  local text
  text=$(sed -n '/^ERROR/,$p' "$scratch/error" | tr '\n' ' ')
  [[ -n $text ]] || text=$(tail -n 1 "$scratch/error")
  sed 's/^ERROR: *//; s/[. ]*$//' <<<"$text"
}

create() {
  local flags=("--node-id=$name" "--accelerator-type=$accelerator_type" "--runtime-version=$runtime_version")
  [[ $spot == no ]] || flags+=(--spot)
  note "asking for $name: $accelerator_type in $zone"
  tpu queued-resources create "$name" "${flags[@]}" ${create_flags[@]+"${create_flags[@]}"} 2>"$scratch/error" && return
  if grep -qi 'quota\|RESOURCE_EXHAUSTED' "$scratch/error"; then
    no_quota "$(last_error)"
  elif grep -q ALREADY_EXISTS "$scratch/error"; then
    die 1 "$name exists already in $zone; delete it first, or choose another --name."
  fi
  die 1 "gcloud could not create $name: $(last_error)."
}

no_quota() {
  die 3 "There is no quota for $name in $zone ($1); ask for it in the console, or choose another --zone or --accelerator_type."
}

remove() {
  note "deleting $name"
  tpu queued-resources delete "$name" --force --quiet 2>"$scratch/error" ||
    die 1 "gcloud could not delete $name ($(last_error)); it may go on to cost money."
}

# Sets `state` to that of the request; while that is ACTIVE, to that of the TPU where it is lost. MISSING: there is none.
state=UNKNOWN reason="" failed_looks=0
look() {
  local answer vm
  local format='value[separator=" "](state.state,state.failedData.error.message)'
  if answer=$(tpu queued-resources describe "$name" "--format=$format" 2>"$scratch/error"); then
    state=${answer%% *} reason=${answer#* } failed_looks=0
    [[ $state == ACTIVE ]] || return 0
    if vm=$(tpu tpu-vm describe "$name" '--format=value(state)' 2>"$scratch/error"); then
      [[ ! $vm =~ ^(PREEMPTED|TERMINATED|STOPPED)$ ]] || state=$vm
    elif grep -q NOT_FOUND "$scratch/error"; then
      state=TERMINATED
    fi
  elif grep -q NOT_FOUND "$scratch/error"; then
    state=MISSING failed_looks=0
  elif ((++failed_looks >= 5)); then
    die 1 "gcloud could not describe $name five times in a row: $(last_error)."
  fi
}

# What a preemption leaves: nothing that could become ACTIVE again.
is_gone() { [[ $state =~ ^(MISSING|SUSPENDING|SUSPENDED|FAILED|DELETING|PREEMPTED|TERMINATED|STOPPED)$ ]]; }

# Returns 1 when the TPU was preempted before it was there.
wait_active() {
  local begin=$SECONDS seen=""
  if [[ $dry_run == yes ]]; then
    tpu queued-resources describe "$name" '--format=value(state.state)'
    return
  fi
  while :; do
    look
    [[ $state == "$seen" ]] || note "$name is $state"
    seen=$state
    case $state in
      ACTIVE) return 0 ;;
      FAILED)
        [[ ! $reason =~ [Qq]uota ]] || no_quota "$reason"
        die 1 "The request $name has failed: $reason"
        ;;
      MISSING) die 1 "There is no $name in $zone; create it first." ;;
    esac
    ! is_gone || return 1
    ((SECONDS - begin < wait_minutes * 60)) ||
      die 4 "$name is still $state after $wait_minutes minutes; it stays in the queue: wait again, or delete it."
    sleep "$poll_seconds"
  done
}
