# What all batch scripts share; each sources it. It reads the site's file, finds the run, opens the log, passes signals on, and writes down
# how a task began and ended: <run>/jobs/tasks/<name>-<job>[_<task>].jsonl, as distill/cluster/tasks.py reads it.
#
# Set by `distill submit`, and to be set by hand only where the defaults don't fit:
#   DISTILL_SLURM       folder of these scripts; default: slurm/ in the folder that sbatch was called in
#   DISTILL_SITE        the site's file; default: ~/.config/distill/site.env
#   DISTILL_PYTHON      the Python that has the kit; default: .venv beside slurm/, else what SITE_SETUP or PATH gives
#   DISTILL_RUN         the run's folder; default: as the recipe has it
#   DISTILL_NAME        of the task in records and logs; default: the stage
#   DISTILL_FORERUNNER  the job that this one goes on from

early=75      # exit code: ended on a signal, and there is more to do (EARLY in distill/errors.py)
child=        # the command, while it runs
interrupted=  # whether a signal came while the command was waited for
received=     # the first signal that came
as=           # the signal that the command gets in place of it; empty: the same

pass_on() {
  interrupted=1
  received=${received:-$1}
  if [ -n "$child" ]; then kill -s "${as:-$1}" "$child" 2> /dev/null; fi
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 1
}

node=${SLURMD_NODENAME:-$(hostname)}

now() { date -u +%Y-%m-%dT%H:%M:%SZ; }

# Reads the site's file and sets the environment up; then `python` is the Python that has the kit.
set_up() {
  local file=${DISTILL_SITE:-$HOME/.config/distill/site.env}
  if [ -r "$file" ]; then
    # shellcheck source=/dev/null
    . "$file"
  elif [ -n "$DISTILL_SITE" ]; then
    fail "DISTILL_SITE: $file can't be read"
  fi
  eval "$SITE_SETUP"
  if [ -n "$SITE_SCRATCH" ]; then
    eval "TMPDIR=$SITE_SCRATCH"
    export TMPDIR
    mkdir -p "$TMPDIR" || fail "SITE_SCRATCH: $TMPDIR can't be made"
  fi
  python=$DISTILL_PYTHON
  if [ -z "$python" ]; then
    if [ -z "$SITE_SETUP" ] && [ -x "$DISTILL_SLURM/../.venv/bin/python" ]; then
      python=$(cd "$DISTILL_SLURM/.." && pwd)/.venv/bin/python
    else
      python=$(command -v python || command -v python3) || fail "no python in PATH. Set SITE_SETUP in $file, or DISTILL_PYTHON."
    fi
  fi
  export PYTHONUNBUFFERED=1
}

# Finds the run's folder, the task's record and its log, and goes on in that.
#   open_log NAME RECIPE [OVERRIDES...]
open_log() {
  local name=${DISTILL_NAME:-$1}
  shift
  run=$DISTILL_RUN
  if [ -z "$run" ]; then
    run=$("$python" -m distill.cluster.place "$@") || exit 1
  fi
  job=${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-0}}
  task=${SLURM_ARRAY_TASK_ID:-}
  attempt=${SLURM_RESTART_COUNT:-0}
  local id=$name-$job${task:+_$task}
  mkdir -p "$run/logs" "$run/jobs/tasks" || exit 1
  record=$run/jobs/tasks/$id.jsonl
  if [ -z "$DISTILL_RUN" ]; then # else sbatch was told to write there
    printf 'log: %s\n' "$run/logs/$id.log"
    exec >> "$run/logs/$id.log" 2>&1
  fi
  printf '%s\n' "" "--- $(now)  $id, attempt $attempt"
  printf 'host      %s%s\n' "$node" "${SLURM_JOB_NODELIST:+ of $SLURM_JOB_NODELIST}"
  printf 'folder    %s\n' "$PWD"
  printf 'revision  %s\n' "$(git -C "$DISTILL_SLURM" describe --always --dirty --abbrev=12 '--exclude=*' 2> /dev/null || echo "no checkout")"
}

# Sets `recipe` to what is meant by a recipe, or by @FILE: the recipe in the line of FILE that has the number of the array's task.
name_recipe() {
  recipe=$1
  if [ "${recipe#@}" = "$recipe" ]; then return; fi
  recipe=$(sed -n "${SLURM_ARRAY_TASK_ID:-1}p" "${1#@}")
  if [ -z "$recipe" ]; then fail "${1#@} has no line ${SLURM_ARRAY_TASK_ID:-1}"; fi
}

note() {
  printf '{"event": "%s", "at": "%s", "attempt": %d, "host": "%s"%s}\n' "$1" "$(now)" "$attempt" "$node" "$2" >> "$record"
}

# Ends the task where going on has no sense: what it goes on from has failed for good, or comes no further.
end_if_hopeless() {
  if [ -z "$DISTILL_FORERUNNER" ] && [ "$attempt" = 0 ]; then return; fi
  "$python" -m distill.cluster.again "$run" "${DISTILL_NAME:-$1}" ${task:+--task "$task"} || exit 1
}

# Runs a command, with signals passed on to it, and ends this script as the command ended, or has the task queued again.
run_task() {
  printf 'command  '
  printf ' %q' "$@"
  printf '\n\n'
  local code=$early
  note started
  if [ -z "$received" ]; then # else there is no time to begin
    "$@" &
    child=$!
    while :; do
      interrupted=
      wait "$child"
      code=$?
      if [ -z "$interrupted" ]; then break; fi # else it was the signal that ended the waiting
    done
  fi
  if [ -n "$received" ] && [ -e "$record.early" ]; then code=$early; fi
  rm -f "$record.early"
  note ended ", \"code\": $code, \"signal\": ${received:+\"}${received:-null}${received:+\"}"
  printf '\n--- %s  ended with exit code %d%s\n' "$(now)" "$code" "${received:+ after SIG$received}"
  # Of an array's task by both numbers: of the task whose job has the array's number $SLURM_JOB_ID would queue all of them again.
  if [ "$code" = "$early" ] && [ "$SITE_REQUEUE" = 1 ]; then scontrol requeue "$job${task:+_$task}"; fi
  exit "$code"
}
