# shellcheck shell=bash disable=SC2154
# What the launchers share; `dry_run` is theirs: yes or no.

note() { printf '%s\n' "$*" >&2; }
die() { # CODE SENTENCE
  note "error: $2"
  exit "$1"
}

# Runs a command, or prints it as it could be typed.
call() {
  local word line=""
  if [[ $dry_run == no ]]; then
    "$@"
    return
  fi
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line:1}"
}
