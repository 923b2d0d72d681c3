#!/usr/bin/env bash
# Train every script on every task with every seed, WORKERS at a time, then draw the figures and
# write the tables. Each run has a folder and a log in RUNS. Interrupt it at any time and call it
# again: it skips finished runs and resumes the others.
#
#   ./benchmark.sh
#   ENVS="Hopper-v4 Ant-v4" SEEDS="1 2 3" TOTAL_TIMESTEPS=300000 WORKERS=4 ./benchmark.sh
#   RUNS=slow ./benchmark.sh --q-lr 3e-4    other flags go to every script; use another RUNS
#   ./benchmark.sh --status             of each run the last evaluation: step and mean return
#   ./benchmark.sh --dry-run            the commands, one per line, e.g. for Slurm:
#
#   mkdir -p benchmark_runs
#   ./benchmark.sh --dry-run > commands
#   sbatch --array=1-$(wc -l < commands) --wrap 'sed -n ${SLURM_ARRAY_TASK_ID}p commands | bash'
set -euo pipefail
: "${ENVS:=Swimmer-v4 HalfCheetah-v4 Hopper-v4 Walker2d-v4 Ant-v4 Humanoid-v4}"
: "${SCRIPTS:=smoothie_continuous smoothie_no_kl smoothie_closed_form ddpg_continuous}"
: "${SEEDS:=1 2 3 4 5 6}" "${TOTAL_TIMESTEPS:=1000000}"
: "${RUNS:=benchmark_runs}" "${PYTHON:=python}"
: "${WORKERS:=$(env -u OMP_NUM_THREADS nproc)}" # nproc would heed OMP_NUM_THREADS
export OMP_NUM_THREADS=1                        # one core for each run
root=$(dirname "$(realpath "$0")")

mode=--train flags=()
for flag in "$@"; do
  case $flag in
    -h | --help) sed -n '2,/^set/s/^# \?//p' "$0" && exit ;;
    --dry-run | --status) mode=$flag ;;
    *) flags+=("$flag") ;;
  esac
done

each_run() { # call a function with $env, $seed, $script and $run
  for env in $ENVS; do for seed in $SEEDS; do for script in $SCRIPTS; do
    run=$RUNS/${env//[:\/]/-}__${script}__$seed
    "$1"
  done; done; done
}

is_finished() { grep -qs "^$TOTAL_TIMESTEPS," "$run/evaluations.csv"; }
is_running() { [[ -e $run.log ]] && ! flock -n "$run.log" true; } # a run locks its log

print_command() { # that waits for the lock: an interrupted run takes a few seconds to end
  is_finished && return
  printf '%q ' flock -w 5 -E 0 "$run.log" "$PYTHON" "$root/$script.py" --run-dir "$run" \
    --env-id "$env" --seed "$seed" --total-timesteps "$TOTAL_TIMESTEPS" "${flags[@]}"
  printf '>>%q 2>&1\n' "$run.log"
}

print_status() {
  local state=stopped
  if is_finished; then state=finished; elif is_running; then state=running; fi
  awk -F, -v run="${run##*/}" -v state=$state '
    NR > 1 { if ($1 != step) n = sum = 0; step = $1; sum += $3; mean = sum / ++n }
    END { printf "%-45s %-8s %8d %9.1f\n", run, state, step, mean }' \
    <(cat "$run/evaluations.csv" 2>/dev/null)
}

report_failure() {
  is_finished || is_running || { echo "failed: see $run.log" >&2 && failed=1; }
}

case $mode in
  --dry-run) each_run print_command ;;
  --status) each_run print_status ;;
  --train)
    mkdir -p "$RUNS"
    each_run print_command | xargs -r -d '\n' -n 1 -P "$WORKERS" bash -c || true
    failed=0
    each_run report_failure
    "$PYTHON" "$root/utils/figures.py" "$RUNS" --output "$RUNS" --last-step "$TOTAL_TIMESTEPS"
    "$PYTHON" "$root/utils/table.py" "$RUNS" --last-step "$TOTAL_TIMESTEPS" >"$RUNS/tables.md"
    exit $failed
    ;;
esac
