# What all batch scripts share; each sources it. It reads the site's file, finds the run, opens the log, and becomes distill/cluster/task.py,
# which passes signals on, and writes down how the task began and ended: <run>/jobs/tasks/<name>-<job>[_<task>].jsonl.
#
# Set by `distill submit`, and to be set by hand only where the defaults don't fit:
#   DISTILL_SLURM       folder of these scripts; default: slurm/ in the folder that sbatch was called in
#   DISTILL_SITE        the site's file; default: ~/.config/distill/site.env
#   DISTILL_PYTHON      the Python that has the kit; default: .venv beside slurm/, else what SITE_SETUP or PATH gives
#   DISTILL_RUN         the run's folder; default: as the recipe has it
#   DISTILL_NAME        of the task in records and logs; default: the stage
#   DISTILL_FORERUNNER  the job that this one goes on from
#   DISTILL_FIRST       the first of those that go on from each other; default: the forerunner

received= # the first signal that came before the command began
as=       # the signal that the command gets, whichever came; empty: the same
trap 'received=${received:-USR1}' USR1
trap 'received=${received:-TERM}' TERM

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
  export SITE_MAX_IDLE_RESTARTS
  eval "$SITE_SETUP" || fail "SITE_SETUP failed, see above: $SITE_SETUP"
  if [ -n "$SITE_SCRATCH" ]; then
    eval "TMPDIR=$SITE_SCRATCH"
    export TMPDIR
    local each=() # a node has a disk of its own
    if [ "${SLURM_NNODES:-1}" -gt 1 ]; then each=(srun "--nodes=$SLURM_NNODES" "--ntasks=$SLURM_NNODES" --ntasks-per-node=1); fi
    "${each[@]}" mkdir -p "$TMPDIR" || fail "SITE_SCRATCH: $TMPDIR can't be made"
  fi
  python=$DISTILL_PYTHON
  if [ -z "$python" ]; then
    if [ -z "$SITE_SETUP" ] && [ -x "$DISTILL_SLURM/../.venv/bin/python" ]; then
      python=$(cd "$DISTILL_SLURM/.." && pwd)/.venv/bin/python
    else
      python=$(command -v python || command -v python3) || fail "no python in PATH. Set SITE_SETUP in $file, or DISTILL_PYTHON."
    fi
  fi
  "$python" -c 'import distill.recipe.reading' || fail "$python can't load the kit, see above. Set SITE_SETUP in $file, or DISTILL_PYTHON."
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

# Sets `recipe` to what is meant by a recipe, or by @FILE: the recipe in the line of FILE that has the number of the array's task, and
# `of` to the folder of that one's own run.
name_recipe() {
  recipe=$1 of=
  if [ "${recipe#@}" = "$recipe" ]; then return; fi
  recipe=$(sed -n "${SLURM_ARRAY_TASK_ID:-1}p" "${1#@}")
  if [ -z "$recipe" ]; then fail "${1#@} has no line ${SLURM_ARRAY_TASK_ID:-1}"; fi
  of=${recipe%/jobs/*}
}

# Ends the task where going on has no sense: what it goes on from has failed for good, or comes no further.
end_if_hopeless() {
  if [ -z "$DISTILL_FORERUNNER" ] && [ "$attempt" = 0 ]; then return; fi
  "$python" -m distill.cluster.again "$run" "${DISTILL_NAME:-$1}" ${task:+--task "$task"} ${of:+--of "$of"} || exit 1
}

# Becomes the command of the task: passes signals on to it, writes down how it began and ended, ends as it ended.
run_task() {
  printf 'command  '
  printf ' %q' "$@"
  printf '\n\n'
  local options=()
  if [ -n "$as" ]; then options+=(--as "$as"); fi
  if [ -n "$received" ]; then options+=(--received "$received"); fi
  if [ "$SITE_REQUEUE" = 1 ]; then options+=(--requeue); fi
  exec "$python" -m distill.cluster.task "$record" "${options[@]}" -- "$@"
}
