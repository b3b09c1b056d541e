#!/usr/bin/env bash
# What launch/cloud_tpu.sh runs on each worker, where it sits in ~/psp_jax_run: install [SETUP], start ARGUMENTS, status or
# tail. A line that begins with "psp_jax:" tells that it was done.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

is_running() { [[ -e pid ]] && grep -qs psp_jax "/proc/$(<pid)/cmdline"; }

case $1 in
  install)
    bash -c "${2:-}"
    if [[ ! -x .venv/bin/python ]]; then
      # The Python of the image may be too old, so that uv brings one. Images after PEP 668 refuse pip without the
      # variable, earlier ones do not know it.
      PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
      python3 -m uv venv --quiet --python=3.12 .venv
    fi
    python3 -m uv pip install --quiet --python=.venv/bin/python -e '.[tpu]'
    echo "psp_jax: installed"
    ;;
  start)
    while is_running; do
      kill -KILL -- "-$(<pid)" || true
      sleep 0.2
    done
    rm -f exit
    # A session of its own: it goes on when the connection ends.
    # shellcheck disable=SC2016
    setsid nohup bash -c '"$@"; echo $? >exit' bash .venv/bin/python -m psp_jax.main "${@:2}" --coordinator=auto \
      >>log 2>&1 </dev/null &
    echo $! >pid
    echo "psp_jax: started"
    ;;
  status)
    if [[ -s exit ]]; then
      echo "psp_jax: ended $(cat exit)"
    elif is_running; then
      echo "psp_jax: running"
    else
      echo "psp_jax: lost"
    fi
    ;;
  tail)
    echo "psp_jax: end of the log"
    tail -n 15 log
    ;;
esac
