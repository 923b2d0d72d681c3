#!/usr/bin/env bash
# Train every script on every task with every seed: a cell is (script, task, seed). What is finished is skipped, what was
# interrupted goes on from its checkpoint, what fails is reported at the end while the others go on. Ctrl-C stops all of it.
#
#   ./benchmark.sh                                   all cells, one worker a core, then the figures and the table
#   ENVS="Hopper-v4 Ant-v4" SEEDS="1 2 3" SCRIPTS="smoothie_no_kl ddpg_continuous" WORKERS=2 TOTAL_TIMESTEPS=300000 ./benchmark.sh
#   ./benchmark.sh --compile --eval-episodes 5       other arguments go to the scripts
#   ./benchmark.sh --compile --slurm --partition=cpu --time=24:00:00
#                                                    the same cells as a Slurm job array; what follows --slurm goes to sbatch
#   ./benchmark.sh --dry-run                         print the commands; before --slurm, that of sbatch
#   ./benchmark.sh --status                          cells done, running, failed and waiting, last returns, time left
#   ./benchmark.sh --figures                         figures and table of what is there
#
# The variables choose the cells for --status and --figures, too. Folders of the runs lie in $RUNS (default benchmark_runs),
# settings of tasks and scripts in benchmark_settings.txt. PYTHON names the interpreter.
set -euo pipefail
root=$(realpath "$(dirname "$0")")
runs=$(realpath -m "${RUNS:-$root/benchmark_runs}")
python=$(command -v "${PYTHON:-python}") || { echo "${PYTHON:-python}: not found; PYTHON names the interpreter" >&2; exit 2; }
[[ $python == /* ]] || python=$PWD/$python
cd "$root"

read -rd '' -a envs <<<"${ENVS:-Swimmer-v4 HalfCheetah-v4 Hopper-v4 Walker2d-v4 Ant-v4 Humanoid-v4}" || true
read -rd '' -a scripts <<<"${SCRIPTS:-smoothie_continuous smoothie_no_kl ddpg_continuous}" || true
read -rd '' -a seeds <<<"${SEEDS:-1 2 3 4 5 6}" || true
total_timesteps=${TOTAL_TIMESTEPS:-1000000}
workers=${WORKERS:-$(nproc)}

mode=run dry='' extra=() sbatch_options=()
while (($#)); do
  case $1 in
    --dry-run) dry=1 ;;
    --status | --figures | --cell) mode=${1#--} ;; # --cell is what the tasks of the job array call
    --slurm) mode=slurm sbatch_options=("${@:2}") && break ;;
    -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' benchmark.sh && exit ;;
    --exp[-_]name* | --env[-_]id* | --seed* | --total[-_]timesteps* | --resume* | --evaluate*)
      echo "$1: a cell has its own; SCRIPTS, ENVS, SEEDS and TOTAL_TIMESTEPS choose the cells" >&2 && exit 2 ;;
    *) extra+=("$1") ;;
  esac
  shift
done
for script in "${scripts[@]}"; do
  [[ -f $script.py ]] || { echo "SCRIPTS: there is no $script.py; smoothie_continuous, smoothie_no_kl, ddpg_continuous are" >&2; exit 2; }
done
for number in "${seeds[@]}" "$total_timesteps" "$workers"; do
  [[ $number =~ ^(0|[1-9][0-9]*)$ ]] || { echo "SEEDS, TOTAL_TIMESTEPS and WORKERS are whole numbers, not $number" >&2; exit 2; }
done
((workers && total_timesteps)) || { echo "TOTAL_TIMESTEPS and WORKERS are at least 1" >&2; exit 2; }

cells=()
for env_id in "${envs[@]}"; do
  for seed in "${seeds[@]}"; do
    for script in "${scripts[@]}"; do cells+=("$env_id $script $seed"); done
  done
done

# A cell's name in file names: task__script__seed.
name_of() { echo "${1//[^A-Za-z0-9_.-]/-}__$2__$3"; }

# The newest run folder of a cell, or nothing.
folder_of() { ls -td "$runs/runs/$(name_of "$@")"__* 2>/dev/null | head -n 1 || true; }

# The last step that was evaluated in a run folder.
steps_of() { tail -qn 1 "$1/evaluations.csv" 2>/dev/null | grep -oE '^[0-9]+' || echo 0; }

settings_of() {
  awk -v task="$1" -v script="$2" '{ sub(/#.*/, "") } ($1 == task || $1 == "*") && ($2 == script || $2 == "*") \
    { for (i = 3; i <= NF; i++) print $i }' benchmark_settings.txt
}

# Set `command` to what trains or resumes the cell, or to nothing if it is finished.
command_of() {
  local folder flags
  folder=$(folder_of "$@")
  command=("$python" "$PWD/$2.py")
  if [[ -n $folder ]] && (($(steps_of "$folder") >= total_timesteps)); then
    command=()
  elif [[ -f $folder/checkpoint/state.pt ]]; then
    command+=(--resume "${folder#"$runs"/}" --total-timesteps "$total_timesteps")
  else
    mapfile -t flags < <(settings_of "$1" "$2")
    command+=(--env-id "$1" --seed "$3" --total-timesteps "$total_timesteps" "${flags[@]}" "${extra[@]}")
  fi
}

# The mean return of the last evaluation in a run folder.
last_return() {
  [[ -f $1/evaluations.csv ]] || { echo - && return; }
  awk -F, 'NR > 1 { if ($1 != step) { step = $1; sum = n = 0 } sum += $3; n++ } END { if (n) printf "%.0f", sum / n; else printf "-" }' "$1/evaluations.csv"
}

# One line a task and script, then what failed and the whole.
status() {
  local env_id script seed name folder steps speed left total_speed=0 total_left=0
  local -A n=() all=([done]=0 [running]=0 [failed]=0 [waiting]=0)
  local state returns failures=''
  printf '%-15s %-20s %5s %8s %7s %8s %9s  %s\n' task script 'done' running failed waiting 'time left' 'last return of each seed'
  for env_id in "${envs[@]}"; do
    for script in "${scripts[@]}"; do
      n=([done]=0 [running]=0 [failed]=0 [waiting]=0) returns='' left=-
      for seed in "${seeds[@]}"; do
        name=$(name_of "$env_id" "$script" "$seed") folder=$(folder_of "$env_id" "$script" "$seed") state=waiting
        steps=$(steps_of "$folder")
        if ((steps >= total_timesteps)); then
          state='done'
        elif is_running "$runs/$name.log"; then
          state=running left=${left/-/?}
          speed=$({ grep -oE '[0-9]+ steps/s' "$runs/$name.log" || echo 0; } | tail -n 1)
          speed=${speed% steps/s} total_speed=$((total_speed + speed))
          ((speed)) && left=$(hours $(((total_timesteps - steps) / speed)))
        elif [[ -f $runs/$name.failed ]]; then
          state=failed failures+="failed: $(<"$runs/$name.failed")"$'\n'
        fi
        ((steps >= total_timesteps)) || total_left=$((total_left + total_timesteps - steps))
        n[$state]=$((n[$state] + 1)) all[$state]=$((all[$state] + 1))
        returns+=" $(last_return "$folder")"
      done
      printf '%-15s %-20s %5s %8s %7s %8s %9s %s\n' "$env_id" "$script" "${n[done]}" "${n[running]}" "${n[failed]}" "${n[waiting]}" "$left" "$returns"
    done
  done
  printf '%s' "$failures"
  left=''
  ((total_speed)) && left="; some $(hours $((total_left / total_speed))) left at their speed"
  echo "${#cells[@]} cells: ${all[done]} done, ${all[failed]} failed, ${all[waiting]} waiting, ${all[running]} running$left"
}

# Seconds as hours, with one decimal.
hours() { printf '%d.%d h' $(($1 / 3600)) $(($1 % 3600 / 360)); }

# Whether the log of a cell is locked, as it is while the cell trains.
is_running() {
  local code=0
  [[ -f $1 ]] && { flock --nonblock --conflict-exit-code 75 "$1" true || code=$?; }
  ((code == 75))
}

# Train or resume one cell, with the command prefix in `pin`, and return its exit code. SIGTERM makes the run write a checkpoint
# and end. setsid: Ctrl-C must reach a run once, through here.
pid='' stopped='' pin=()
stop() {
  stopped=1
  [[ -z $pid ]] || kill -TERM "$pid" 2>/dev/null || true
}
run_cell() {
  local name log lock steps sentence code=0
  name=$(name_of "$@") log=$runs/$name.log
  exec {lock}>>"$log"
  flock --nonblock --conflict-exit-code 75 "$lock" || code=$?
  ((code != 75)) || { echo "$*: is running already" && return; }
  ((code == 0)) || { echo "$*: $log cannot be locked; RUNS must lie on a file system that has flock" >&2 && return "$code"; }
  command_of "$@"
  ((${#command[@]})) || { exec {lock}>&- && echo "$*: finished before" && return; }
  rm -f "$runs/$name.failed"
  echo "$*: ${command[*]:2}"
  (cd "$runs" && OMP_NUM_THREADS=1 exec setsid "${pin[@]}" "${command[@]}") >>"$log" 2>&1 &
  pid=$!
  [[ -z $stopped ]] || stop # the signal came before there was a pid
  { wait "$pid" || code=$?; } 2>/dev/null
  while kill -0 "$pid" 2>/dev/null; do code=0 && { wait "$pid" || code=$?; } 2>/dev/null; done # a trapped signal ends the first wait
  pid=''
  exec {lock}>&-
  steps=$(steps_of "$(folder_of "$@")")
  ((code || steps < total_timesteps)) || { echo "$*: done" && return; }
  ((code == 143)) && [[ -n $stopped ]] && return 143
  sentence=$(grep '[[:alpha:]]' "$log" | grep -ve '--help' | tail -n 1 | sed 's/^│ *//; s/ *│$//') || true # flags are refused in a box
  echo "$*: exit code $code after $steps steps: $sentence" | tee "$runs/$name.failed" >&2
  return $((code ? code : 1))
}

# One cell after the other on one core, until none is unclaimed.
worker() {
  local core=$1 cell
  command -v taskset >/dev/null && pin=(taskset -c "$core")
  trap stop TERM HUP
  for cell in "${cells[@]}"; do
    [[ -z $stopped ]] || exit 143
    mkdir "$claims/${cell//\//-}" 2>/dev/null || continue
    # shellcheck disable=SC2086
    run_cell $cell 2>>"$claims.failed" || true
  done
}

# From the newest run folder of each cell to data, figures and the table in $RUNS/results.
figures() {
  local cell folder folders=()
  for cell in "${cells[@]}"; do
    # shellcheck disable=SC2086
    folder=$(folder_of $cell)
    [[ -n $folder ]] && (($(steps_of "$folder"))) && folders+=("$folder")
  done
  ((${#folders[@]})) || { echo "no cell of these has been evaluated yet in $runs/runs" >&2 && return 1; }
  "$python" utils/collect.py "${folders[@]}" --output "$runs/results/data" &&
    "$python" utils/figures.py "$runs/results/data" --output "$runs/results" &&
    "$python" utils/table.py "$runs/results/data" >"$runs/results/table.md.new" &&
    mv "$runs/results/table.md.new" "$runs/results/table.md"
}

case $mode in
  status) status; exit ;;
  figures) figures; exit ;;
  cell) # a task of the job array, which Slurm stops with SIGTERM and, before its time limit, warns with SIGUSR1
    # shellcheck disable=SC2086
    set -- ${cells[SLURM_ARRAY_TASK_ID]}
    code=0 requeue=''
    trap stop TERM
    trap 'requeue=1; stop' USR1
    run_cell "$@" || code=$?
    if [[ -n $requeue ]] && ((code == 143)); then
      echo "$*: the time limit is near; the task goes back into the queue and will resume"
      scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
      sleep 60 # Slurm ends this task
    fi
    exit "$code"
    ;;
esac

waiting=()
for i in "${!cells[@]}"; do
  # shellcheck disable=SC2086
  command_of ${cells[i]}
  ((${#command[@]})) || continue
  waiting+=("$i")
  [[ -n $dry && $mode == run ]] && echo "${command[*]}"
done

if [[ $mode == slurm ]]; then
  command -v sbatch >/dev/null || [[ -n $dry ]] || { echo "--slurm: there is no sbatch here; log in to where jobs are submitted" >&2; exit 2; }
  ((${#waiting[@]})) || { echo "every cell is finished" && exit; }
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
  echo "job array ${job%%;*}: ${#waiting[@]} cells; ./benchmark.sh --status tells how far they are, squeue where"
  exit
fi
[[ -z $dry ]] || exit 0

mkdir -p "$runs/runs"
claims=$(mktemp -d)
trap 'rm -rf "$claims" "$claims.failed"' EXIT
children=()
trap 'kill -TERM "${children[@]}" 2>/dev/null || true; echo "stopping: every run writes a checkpoint" >&2 || true; wait; exit 130' INT TERM HUP
mapfile -t cores < <(taskset -cp $$ 2>/dev/null | grep -oE '[0-9,-]+$' | tr , '\n' | awk -F- '{ for (i = $1; i <= ($2 == "" ? $1 : $2); i++) print i }')
((${#cores[@]})) || cores=(0)
for ((i = 0; i < workers; i++)); do
  worker "${cores[i % ${#cores[@]}]}" &
  children+=($!)
done
wait
code=0
figures || code=1
if [[ -s $claims.failed ]]; then
  echo "failed:" >&2
  cat "$claims.failed" >&2
  code=1
fi
exit "$code"
