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
#   ./benchmark.sh --status                          one line a cell: state, steps, last return, time left
#   ./benchmark.sh --figures                         figures and table of what is there
#
# Folders of the runs lie in $RUNS (default benchmark_runs), settings of tasks and scripts in benchmark_settings.txt.
set -euo pipefail
cd "$(dirname "$0")"

read -ra envs <<<"${ENVS:-Swimmer-v4 HalfCheetah-v4 Hopper-v4 Walker2d-v4 Ant-v4 Humanoid-v4}"
read -ra scripts <<<"${SCRIPTS:-smoothie_continuous smoothie_no_kl ddpg_continuous}"
read -ra seeds <<<"${SEEDS:-1 2 3 4 5 6}"
total_timesteps=${TOTAL_TIMESTEPS:-1000000}
runs=$(realpath -m "${RUNS:-benchmark_runs}")
workers=${WORKERS:-$(nproc)}
python=$(command -v "${PYTHON:-python}") || { echo "${PYTHON:-python}: not found; PYTHON names the interpreter" >&2; exit 2; }

mode=run dry='' extra=() sbatch_options=()
while (($#)); do
  case $1 in
    --dry-run) dry=1 ;;
    --status | --figures | --cell) mode=${1#--} ;; # --cell is what the tasks of the job array call
    --slurm) mode=slurm sbatch_options=("${@:2}") && break ;;
    *) extra+=("$1") ;;
  esac
  shift
done
for script in "${scripts[@]}"; do
  [[ -f $script.py ]] || { echo "SCRIPTS: there is no $script.py; smoothie_continuous, smoothie_no_kl, ddpg_continuous are" >&2; exit 2; }
done
for number in "${seeds[@]}" "$total_timesteps" "$workers"; do
  [[ $number =~ ^[0-9]+$ ]] || { echo "SEEDS, TOTAL_TIMESTEPS and WORKERS are whole numbers, not $number" >&2; exit 2; }
done

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

status() {
  local env_id script seed folder steps state last speed left
  printf '%-16s %-20s %4s  %-8s %10s %10s  %s\n' task script seed state steps return "time left"
  for cell in "${cells[@]}"; do
    read -r env_id script seed <<<"$cell"
    folder=$(folder_of "$env_id" "$script" "$seed") state=waiting steps=0 last=- left=-
    if [[ -n $folder ]]; then
      steps=$(steps_of "$folder")
      last=$(awk -F, 'NR > 1 { if ($1 != step) { step = $1; sum = n = 0 } sum += $3; n++ } END { if (n) printf "%.1f", sum / n }' "$folder/evaluations.csv")
      if ((steps >= total_timesteps)); then
        state='done'
      elif flock --nonblock "$folder/lock" true; then
        state=stopped
        [[ -f $folder/failed ]] && state=failed
      else
        state=running
        speed=$(grep -oE '[0-9]+ steps/s' "$runs/$(name_of "$env_id" "$script" "$seed").log" | tail -n 1 || true)
        ((${speed% steps/s})) && left="$(((total_timesteps - steps) / ${speed% steps/s} / 60)) min"
      fi
    fi
    printf '%-16s %-20s %4s  %-8s %10s %10s  %s\n' "$env_id" "$script" "$seed" "$state" "$steps" "$last" "$left"
  done
}

# Train or resume one cell, with the command prefix in `pin`, and return its exit code. SIGTERM makes the run write a checkpoint
# and end. setsid: Ctrl-C must reach a run once, through here.
pid='' stopped='' pin=()
stop() {
  stopped=1
  [[ -z $pid ]] || kill -TERM "$pid" 2>/dev/null || true
}
run_cell() {
  local log folder lock code=0
  command_of "$@"
  ((${#command[@]})) || { echo "$*: finished before" && return; }
  log=$runs/$(name_of "$@").log
  exec {lock}>>"$log"
  flock --nonblock "$lock" || { echo "$*: is running already" && return; }
  echo "$*: ${command[*]:2}"
  (cd "$runs" && OMP_NUM_THREADS=1 exec setsid "${pin[@]}" "${command[@]}") >>"$log" 2>&1 &
  pid=$!
  [[ -z $stopped ]] || stop # the signal came before there was a pid
  wait "$pid" || code=$?
  while kill -0 "$pid" 2>/dev/null; do code=0 && wait "$pid" || code=$?; done # a trapped signal ends the first wait
  pid=''
  exec {lock}>&-
  folder=$(folder_of "$@")
  [[ -n $folder ]] && rm -f "$folder/failed"
  if ((code == 0)); then
    echo "$*: done"
  elif ((code != 143)); then
    echo "$*: $(tail -n 1 "$log")" >&2
    [[ -n $folder ]] && touch "$folder/failed"
  fi
  return "$code"
}

# One cell after the other on one core, until none is unclaimed.
worker() {
  local core=$1 cell
  command -v taskset >/dev/null && pin=(taskset -c "$core")
  trap stop TERM
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
  "$python" utils/collect.py "${folders[@]}" --output "$runs/results/data"
  "$python" utils/figures.py "$runs/results/data" --output "$runs/results"
  "$python" utils/table.py "$runs/results/data" >"$runs/results/table.md"
}

case $mode in
  status) status && exit ;;
  figures) figures && exit ;;
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
trap 'echo "stopping: every run writes a checkpoint" >&2; kill -TERM "${children[@]}" 2>/dev/null || true; wait; exit 130' INT TERM
mapfile -t cores < <(taskset -cp $$ 2>/dev/null | grep -oE '[0-9,-]+$' | tr , '\n' | awk -F- '{ for (i = $1; i <= ($2 == "" ? $1 : $2); i++) print i }')
((${#cores[@]})) || cores=(0)
for ((i = 0; i < workers; i++)); do
  worker "${cores[i % ${#cores[@]}]}" &
  children+=($!)
done
wait
figures || true
if [[ -s $claims.failed ]]; then
  echo "failed:" >&2
  cat "$claims.failed" >&2
  exit 1
fi
