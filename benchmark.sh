#!/usr/bin/env bash
# Run every script on every task with every seed. One script, task and seed make a cell. Finished cells are skipped;
# interrupted ones resume from their checkpoint. If a cell fails, the others go on and the failure is reported at the end.
# Ctrl-C stops everything after each run has written a checkpoint.
#
#   ./benchmark.sh                      run all cells, one worker per core, then draw the figures and write the table
#   ENVS="Hopper-v4 Ant-v4" SEEDS="1 2 3" SCRIPTS="smoothie_no_kl ddpg_continuous" WORKERS=2 TOTAL_TIMESTEPS=300000 ./benchmark.sh
#   ./benchmark.sh --eval-episodes 5    pass any other flag to the scripts
#   ./benchmark.sh --slurm --partition=cpu --time=24:00:00
#                                       submit the cells as a Slurm job array; flags after --slurm go to sbatch
#   ./benchmark.sh --dry-run            print the commands; put it before --slurm to print the sbatch command
#   ./benchmark.sh --status             show finished, running, failed and waiting cells, last returns, and the time left, not
#                                       counting evaluations
#   ./benchmark.sh --figures            draw the figures and write the table from all data so far
#
# The variables also select the cells for --status. RUNS is the folder for the runs (default: benchmark_runs) and
# PYTHON the interpreter. benchmark_settings.txt holds flags for single tasks and scripts.
set -euo pipefail
root=$(realpath "$(dirname "$0")")
runs=$(realpath -m "${RUNS:-$root/benchmark_runs}")
python=$(command -v "${PYTHON:-python}") || { echo "PYTHON: ${PYTHON:-python} not found" >&2; exit 2; }
[[ $python == /* ]] || python=$PWD/$python
cd "$root"

read -rd '' -a envs <<<"${ENVS:-Swimmer-v4 HalfCheetah-v4 Hopper-v4 Walker2d-v4 Ant-v4 Humanoid-v4}" || true
read -rd '' -a scripts <<<"${SCRIPTS:-smoothie_continuous smoothie_no_kl smoothie_closed_form ddpg_continuous}" || true
read -rd '' -a seeds <<<"${SEEDS:-1 2 3 4 5 6}" || true
total_timesteps=${TOTAL_TIMESTEPS:-1000000}
workers=${WORKERS:-$(nproc)}

mode=run dry='' extra=() sbatch_options=()
while (($#)); do
  case $1 in
    --dry-run) dry=1 ;;
    --status | --figures | --cell) mode=${1#--} ;; # the tasks of the job array call --cell
    --slurm) mode=slurm sbatch_options=("${@:2}") && break ;;
    -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' benchmark.sh && exit ;;
    --exp[-_]name* | --env[-_]id* | --seed* | --total[-_]timesteps* | --resume* | --evaluate*)
      echo "$1: set SCRIPTS, ENVS, SEEDS and TOTAL_TIMESTEPS instead" >&2 && exit 2 ;;
    *) extra+=("$1") ;;
  esac
  shift
done
for script in "${scripts[@]}"; do
  [[ -f $script.py ]] || { echo "SCRIPTS: $root has no $script.py" >&2; exit 2; }
done
for number in "${seeds[@]}" "$total_timesteps" "$workers"; do
  [[ $number =~ ^(0|[1-9][0-9]*)$ ]] || { echo "SEEDS, TOTAL_TIMESTEPS and WORKERS must be whole numbers, not $number" >&2; exit 2; }
done
((workers && total_timesteps)) || { echo "TOTAL_TIMESTEPS and WORKERS must be at least 1" >&2; exit 2; }

cells=()
for env_id in "${envs[@]}"; do
  for seed in "${seeds[@]}"; do
    for script in "${scripts[@]}"; do cells+=("$env_id $script $seed"); done
  done
done

# The functions below take a cell as three arguments: task, script, seed.

# Print the name of a cell in file names: task__script__seed.
name_of() { echo "${1//[^A-Za-z0-9_.-]/-}__$2__$3"; }

# Print the newest run folder of a cell, or nothing. Names end in the time of the start.
folder_of() { ls -d "$runs/runs/$(name_of "$@")"__* 2>/dev/null | sort -V | tail -n 1 || true; }

# Print the step of the last evaluation in a run folder.
steps_of() { tail -qn 1 "$1/evaluations.csv" 2>/dev/null | grep -oE '^[0-9]+' || echo 0; }

# Print the flags for a task and a script, one per line.
settings_of() {
  awk -v task="$1" -v script="$2" '{ sub(/#.*/, "") } ($1 == task || $1 == "*") && ($2 == script || $2 == "*") \
    { for (i = 3; i <= NF; i++) print $i }' benchmark_settings.txt
}

# Set `command` to the command that trains or resumes a cell, or to nothing if it is finished.
command_of() {
  local folder flags
  folder=$(folder_of "$@")
  command=("$python" "$PWD/$2.py")
  if [[ -n $folder ]] && (($(steps_of "$folder") >= total_timesteps)); then
    command=()
  elif [[ -n $folder && -f $folder/checkpoint.pt ]]; then
    command+=(--resume "${folder#"$runs"/}" --total-timesteps "$total_timesteps")
  else
    mapfile -t flags < <(settings_of "$1" "$2")
    command+=(--env-id "$1" --seed "$3" --total-timesteps "$total_timesteps" "${flags[@]}" "${extra[@]}")
  fi
}

# Print the mean return of the last evaluation in a run folder.
last_return() {
  [[ -f $1/evaluations.csv ]] || { echo - && return; }
  awk -F, 'NR > 1 { if ($1 != step) { step = $1; sum = n = 0 } sum += $3; n++ } END { if (n) printf "%.0f", sum / n; else printf "-" }' "$1/evaluations.csv"
}

# Read what a failed run wrote and print why it failed. That is the last line, unless tyro refused the flags: then it is the
# first paragraph in its box.
reason_for_failure() {
  awk '/^╭/ { box = 1; reason = ""; next }
    box && /^(│ ─|╰)/ { exit }
    box { sub(/^│ */, ""); sub(/ *│$/, ""); reason = reason (reason ? " " : "") $0; next }
    /[A-Za-z]/ && !/^(\033\[[0-9;]*m)?wandb/ { reason = $0 }
    END { print reason }'
}

# Print a line for each task and script, then the failures and the totals.
status() {
  local env_id script seed name folder steps speed left longest total_speed=0 total_left=0
  local -A n=() all=([done]=0 [running]=0 [failed]=0 [waiting]=0)
  local state returns failures=''
  printf '%-15s %-20s %5s %8s %7s %8s %9s  %s\n' task script 'done' running failed waiting 'time left' 'last return of each seed'
  for env_id in "${envs[@]}"; do
    for script in "${scripts[@]}"; do
      n=([done]=0 [running]=0 [failed]=0 [waiting]=0) returns='' left=- longest=0
      for seed in "${seeds[@]}"; do
        name=$(name_of "$env_id" "$script" "$seed") folder=$(folder_of "$env_id" "$script" "$seed") state=waiting
        steps=$(steps_of "$folder")
        if ((steps >= total_timesteps)); then
          state='done'
        elif is_running "$runs/$name.log"; then
          state=running left=${left/-/?}
          speed=$({ grep -oE '[0-9]+ steps/s' "$runs/$name.log" || echo 0; } | tail -n 1)
          speed=${speed% steps/s} total_speed=$((total_speed + speed))
          ((speed && (total_timesteps - steps) / speed > longest)) && longest=$(((total_timesteps - steps) / speed))
        elif [[ -f $runs/$name.failed ]]; then
          state=failed failures+="failed: $(<"$runs/$name.failed")"$'\n'
        fi
        ((steps >= total_timesteps)) || total_left=$((total_left + total_timesteps - steps))
        n[$state]=$((n[$state] + 1)) all[$state]=$((all[$state] + 1))
        returns+=" $(last_return "$folder")"
      done
      ((longest)) && left=$(hours "$longest")
      printf '%-15s %-20s %5s %8s %7s %8s %9s %s\n' "$env_id" "$script" "${n[done]}" "${n[running]}" "${n[failed]}" "${n[waiting]}" "$left" "$returns"
    done
  done
  printf '%s' "$failures"
  left=''
  ((total_speed)) && left="; about $(hours $((total_left / total_speed))) left at the present speed"
  echo "${#cells[@]} cells: ${all[done]} done, ${all[failed]} failed, ${all[waiting]} waiting, ${all[running]} running$left"
}

# Print seconds as hours, with one decimal.
hours() { printf '%d.%d h' $(($1 / 3600)) $(($1 % 3600 / 360)); }

# A running cell holds a lock on its log.
is_running() {
  local code=0
  [[ -f $1 ]] && { flock --nonblock --conflict-exit-code 75 "$1" true || code=$?; }
  ((code == 75))
}

# Train or resume a cell and return its exit code. `pin` holds the command that pins it to a core. `stop` makes the run write a
# checkpoint and exit. Each run has its own session (setsid), so a Ctrl-C or hang-up of the terminal reaches it only through stop.
pid='' stopped='' pin=()
stop() {
  stopped=1
  [[ -z $pid ]] || kill -TERM "$pid" 2>/dev/null || true
}
run_cell() {
  local name log lock size steps code=0
  name=$(name_of "$@") log=$runs/$name.log
  exec {lock}>>"$log"
  flock --timeout 1 --conflict-exit-code 75 "$lock" || code=$? # --status holds the lock for an instant
  ((code != 75)) || { exec {lock}>&- && echo "$*: already running" && return; }
  ((code == 0)) || { echo "$*: cannot lock $log; RUNS must be on a file system that supports flock" >&2 && return "$code"; }
  command_of "$@"
  ((${#command[@]})) || { exec {lock}>&- && echo "$*: already finished" && return; }
  rm -f "$runs/$name.failed"
  size=$(stat -c %s "$log")
  echo "$*: ${command[*]:2}"
  (cd "$runs" && exec setsid "${pin[@]}" "${command[@]}") >>"$log" 2>&1 &
  pid=$!
  [[ -z $stopped ]] || stop # the signal may come before there is a pid
  { wait "$pid" || code=$?; } 2>/dev/null
  while kill -0 "$pid" 2>/dev/null; do code=0 && { wait "$pid" || code=$?; } 2>/dev/null; done # a signal interrupts `wait`
  pid=''
  exec {lock}>&-
  steps=$(steps_of "$(folder_of "$@")")
  ((code || steps < total_timesteps)) || { echo "$*: done" && return; }
  ((code == 143)) && [[ -n $stopped ]] && return 143
  echo "$*: exit code $code after $steps steps: $(tail -c +$((size + 1)) "$log" | reason_for_failure)" | tee "$runs/$name.failed" >&2
  return $((code ? code : 1))
}

# Run unclaimed cells on one core until none is left. A worker ignores Ctrl-C, which the terminal sends to it, too: the main
# process stops it.
worker() {
  trap '' INT QUIT
  trap stop TERM HUP
  local core=$1 cell words
  command -v taskset >/dev/null && pin=(taskset -c "$core")
  for cell in "${cells[@]}"; do
    [[ -z $stopped ]] || exit 143
    mkdir "$claims/${cell//\//-}" 2>/dev/null || continue
    read -ra words <<<"$cell"
    run_cell "${words[@]}" 2>>"$claims.failed" || true
  done
}

# Collect the newest run folder of each cell, draw the figures and write the table, all in $RUNS/results.
figures() {
  local cell words folder folders=()
  for cell in "${cells[@]}"; do
    read -ra words <<<"$cell"
    folder=$(folder_of "${words[@]}")
    [[ -n $folder && -f $folder/evaluations.csv ]] && folders+=("$folder")
  done
  ((${#folders[@]})) || { echo "$runs/runs: none of these cells has an evaluation yet" >&2 && return 1; }
  "$python" utils/collect.py "${folders[@]}" --output "$runs/results/data" &&
    "$python" utils/figures.py "$runs/results/data" --output "$runs/results" &&
    "$python" utils/table.py "$runs/results/data" >"$runs/results/table.md.new" &&
    mv "$runs/results/table.md.new" "$runs/results/table.md"
}

case $mode in
  status) status; exit ;;
  figures) figures; exit ;;
  cell) # a task of the job array: Slurm sends SIGTERM to stop it, and SIGUSR1 shortly before its time limit
    read -ra words <<<"${cells[SLURM_ARRAY_TASK_ID]}"
    code=0 requeue=''
    trap stop TERM
    trap 'requeue=1; stop' USR1
    run_cell "${words[@]}" || code=$?
    if [[ -n $requeue ]] && ((code == 143)); then
      echo "${words[*]}: close to the time limit; the task goes back to the queue and will resume"
      scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
      sleep 60 # Slurm ends this task
    fi
    exit "$code"
    ;;
esac

waiting=()
for i in "${!cells[@]}"; do
  read -ra words <<<"${cells[i]}"
  command_of "${words[@]}"
  ((${#command[@]})) || continue
  waiting+=("$i")
  [[ -n $dry && $mode == run ]] && printf '%q ' "${command[@]}" && echo
done

if [[ $mode == slurm ]]; then
  command -v sbatch >/dev/null || [[ -n $dry ]] || { echo "--slurm: sbatch not found" >&2; exit 2; }
  ((${#waiting[@]})) || { echo "all cells are finished" && exit; }
  again=(env ENVS="${envs[*]}" SCRIPTS="${scripts[*]}" SEEDS="${seeds[*]}" TOTAL_TIMESTEPS="$total_timesteps" RUNS="$runs" PYTHON="$python" "$PWD/benchmark.sh")
  common=(--parsable --open-mode=append --cpus-per-task=1)
  array=$(IFS=,; echo "${waiting[*]}")${WORKERS:+%$WORKERS}
  submit=(sbatch --job-name=smoothie "${common[@]}" --output="$runs/slurm-%A_%a.log" --array="$array" --requeue --signal=B:USR1@120 "${sbatch_options[@]}"
    --wrap "exec $(printf '%q ' "${again[@]}" --cell "${extra[@]}")")
  [[ -n $dry ]] && printf '%q ' "${submit[@]}" && echo && exit
  mkdir -p "$runs/runs"
  job=$("${submit[@]}")
  sbatch --job-name=smoothie-figures "${common[@]}" --output="$runs/slurm-%j.log" --dependency="afterany:${job%%;*}" "${sbatch_options[@]}" \
    --wrap "exec $(printf '%q ' "${again[@]}" --figures)" >/dev/null
  echo "job array ${job%%;*}: ${#waiting[@]} cells; follow them with ./benchmark.sh --status or squeue"
  exit
fi
[[ -z $dry ]] || exit 0

mkdir -p "$runs/runs"
claims=$(mktemp -d)
trap 'rm -rf "$claims" "$claims.failed"' EXIT
children=()
trap 'kill -TERM "${children[@]}" 2>/dev/null || true; echo "stopping; each run writes a checkpoint" >&2 || true; wait; exit 130' INT QUIT TERM HUP
mapfile -t cores < <(taskset -cp $$ 2>/dev/null | grep -oE '[0-9,-]+$' | tr , '\n' | awk -F- '{ for (i = $1; i <= ($2 == "" ? $1 : $2); i++) print i }')
((${#cores[@]})) || cores=(0)
for ((i = 0; i < workers; i++)); do
  worker "${cores[i % ${#cores[@]}]}" &
  children+=($!)
done
wait
trap - INT QUIT TERM HUP # nothing is left to stop
code=0
figures || code=1
if [[ -s $claims.failed ]]; then
  echo "failed:" >&2
  cat "$claims.failed" >&2
  code=1
fi
exit "$code"
