"""Bash of the stubs with which tests/test_launch_cloud_tpu.py keeps a TPU of two workers as folders and processes."""

# `state` is the request's, or missing. A created request is PROVISIONING for one look. The workers' folders are their
# homes, in which `ssh` runs the command, unless there is a file down.WORKER: then it hangs.
GCLOUD = r"""
value() { local a; for a in "${@:2}"; do case $a in "$1"=*) echo "${a#*=}" ;; esac; done; }
not_found() { echo "ERROR: (gcloud) NOT_FOUND: Resource '$1' was not found." >&2; exit 1; }
pids() { cat "$here"/worker*/psp_jax_run/pid 2>/dev/null || :; }
kill_all() { for p in $(pids); do kill -KILL -- "-$p" 2>/dev/null || :; done; }
case "$3 $4" in
  "queued-resources create")
    [ ! -e "$here/create_error" ] || { cat "$here/create_error" >&2; exit 1; }
    mkdir -p "$here/worker0" "$here/worker1"
    cp "$here/after_create" "$here/state" ;;
  "queued-resources describe")
    [ -e "$here/state" ] || not_found "$5"
    head -n 1 "$here/state"
    [ "$(wc -l <"$here/state")" -lt 2 ] || sed -i 1d "$here/state" ;;
  "queued-resources delete")
    kill_all
    rm -rf "$here/state" "$here"/worker* ;;
  "tpu-vm describe")
    [ -e "$here/vm" ] && cat "$here/vm" || echo READY ;;
  "tpu-vm scp")
    for w in "$here"/worker*; do cp "$5" "$w"; done ;;
  "tpu-vm ssh")
    out=$(value --output-directory "$@") command=$(value --command "$@") code=0
    for w in 0 1; do
      export HOME="$here/worker$w" WORKER=$w
      cd "$HOME"
      : >"$out/$w.log"
      [ ! -e "$here/down.$w" ] || sleep 60 &
      [ -e "$here/down.$w" ] || bash -c "$command" >"$out/$w.log" 2>&1 || code=$?
    done
    wait
    exit "$code" ;;
esac
"""
# What `python3 -m pip` and `-m uv` do on a worker: nothing but making the Python that stands in for training. That one
# does what the next line of `deeds` says, for each start of worker 1; worker 0 always ends well.
PYTHON3 = r"""
case "$*" in *" venv "*)
  mkdir -p .venv/bin
  printf '#!/usr/bin/env bash\nhere=%q\n' "$here" >.venv/bin/python
  cat >>.venv/bin/python <<'DEED'
printf '%q ' train "$WORKER" "$@" >>"$here/calls"; echo >>"$here/calls"
echo "hello from worker $WORKER"
[ "$WORKER" = 1 ] || exit 0
deed=$(head -n 1 "$here/deeds"); sed -i 1d "$here/deeds"
eval "$deed"
DEED
  chmod +x .venv/bin/python ;;
*install*tpu*) [ ! -e "$here/no_network" ] || { echo "uv: no network"; exit 2; } ;;
esac
"""
