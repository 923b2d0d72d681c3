#!/usr/bin/env bash
# Train every script on every task with every seed: a cell is (script, task, seed). What is finished is skipped, what was
# interrupted goes on from its checkpoint, what fails is reported at the end while the others go on. Ctrl-C stops all of it.
#
#   ./benchmark.sh                                   all cells, one worker a core
#   ENVS="Hopper-v4 Ant-v4" SEEDS="1 2 3" SCRIPTS="smoothie_no_kl ddpg_continuous" WORKERS=2 TOTAL_TIMESTEPS=300000 ./benchmark.sh
#   ./benchmark.sh --compile --eval-episodes 5       other arguments go to the scripts
#   ./benchmark.sh --dry-run                         print the commands
#   ./benchmark.sh --status                          one line a cell: state, steps, last return, time left
#
# Folders of the runs lie in $RUNS (default benchmark_runs), settings of tasks and scripts in benchmark_settings.txt.
set -euo pipefail
cd "$(dirname "$0")"

read -ra ENVS <<<"${ENVS:-Swimmer-v4 HalfCheetah-v4 Hopper-v4 Walker2d-v4 Ant-v4 Humanoid-v4}"
read -ra SCRIPTS <<<"${SCRIPTS:-smoothie_continuous smoothie_no_kl ddpg_continuous}"
read -ra SEEDS <<<"${SEEDS:-1 2 3 4 5 6}"
TOTAL_TIMESTEPS=${TOTAL_TIMESTEPS:-1000000}
RUNS=${RUNS:-benchmark_runs}
WORKERS=${WORKERS:-$(nproc)}
PYTHON=${PYTHON:-python}

mode=run
extra=()
for argument in "$@"; do
  case $argument in
    --dry-run | --status) mode=${argument#--} ;;
    *) extra+=("$argument") ;;
  esac
done
for script in "${SCRIPTS[@]}"; do
  [[ -f $script.py ]] || { echo "SCRIPTS: there is no $script.py; smoothie_continuous, smoothie_no_kl, ddpg_continuous are" >&2; exit 2; }
done
for number in "${SEEDS[@]}" "$TOTAL_TIMESTEPS" "$WORKERS"; do
  [[ $number =~ ^[0-9]+$ ]] || { echo "SEEDS, TOTAL_TIMESTEPS and WORKERS are whole numbers, not $number" >&2; exit 2; }
done

cells=()
for env_id in "${ENVS[@]}"; do
  for seed in "${SEEDS[@]}"; do
    for script in "${SCRIPTS[@]}"; do cells+=("$env_id $script $seed"); done
  done
done

# The newest run folder of a cell, or nothing.
folder_of() { ls -td "$RUNS"/runs/"${1//[^A-Za-z0-9_.-]/-}__$2__$3"__* 2>/dev/null | head -n 1 || true; }

# The last step that was evaluated in a run folder.
steps_of() { tail -qn 1 "$1/evaluations.csv" 2>/dev/null | grep -oE '^[0-9]+' || echo 0; }

settings_of() {
  awk -v task="$1" -v script="$2" '{ sub(/#.*/, "") } ($1 == task || $1 == "*") && ($2 == script || $2 == "*") \
    { for (i = 3; i <= NF; i++) print $i }' benchmark_settings.txt
}

# Set `command` to what trains or resumes the cell, or to nothing if it is finished.
command_of() {
  local folder flags
  folder=$(folder_of "$1" "$2" "$3")
  command=("$PYTHON" "$PWD/$2.py")
  if [[ -n $folder ]] && (($(steps_of "$folder") >= TOTAL_TIMESTEPS)); then
    command=()
  elif [[ -f $folder/checkpoint/state.pt ]]; then
    command+=(--resume "${folder#"$RUNS"/}" --total-timesteps "$TOTAL_TIMESTEPS")
  else
    mapfile -t flags < <(settings_of "$1" "$2")
    command+=(--env-id "$1" --seed "$3" --total-timesteps "$TOTAL_TIMESTEPS" "${flags[@]}" "${extra[@]}")
  fi
}

status() {
  local env_id script seed folder steps state last first elapsed left
  printf '%-16s %-20s %4s  %-8s %10s %10s  %s\n' task script seed state steps return "time left"
  for cell in "${cells[@]}"; do
    read -r env_id script seed <<<"$cell"
    folder=$(folder_of "$env_id" "$script" "$seed") state=waiting steps=0 last=- left=-
    if [[ -n $folder ]]; then
      steps=$(steps_of "$folder")
      last=$(awk -F, 'NR > 1 { if ($1 != step) { step = $1; sum = n = 0 } sum += $3; n++ } END { if (n) printf "%.1f", sum / n }' "$folder/evaluations.csv")
      if ((steps >= TOTAL_TIMESTEPS)); then
        state='done'
      elif flock --nonblock "$folder/lock" true; then
        state=stopped
        [[ -f $folder/failed ]] && state=failed
      else
        state=running
        first=$(stat -c %Y "$folder/config.json") elapsed=$(($(stat -c %Y "$folder/evaluations.csv") - first))
        ((steps > 0 && elapsed > 0)) && left="$((elapsed * (TOTAL_TIMESTEPS - steps) / steps / 60)) min"
      fi
    fi
    printf '%-16s %-20s %4s  %-8s %10s %10s  %s\n' "$env_id" "$script" "$seed" "$state" "$steps" "$last" "$left"
  done
}

# One cell after the other on one core, until none is unclaimed. setsid: Ctrl-C must reach a run once, through its worker.
worker() {
  local core=$1 pid='' env_id script seed folder code pin=()
  command -v taskset >/dev/null && pin=(taskset -c "$core")
  trap '[[ -n $pid ]] && kill -TERM "$pid" 2>/dev/null; wait; exit 143' TERM
  for cell in "${cells[@]}"; do
    mkdir "$claims/${cell//\//-}" 2>/dev/null || continue
    read -r env_id script seed <<<"$cell"
    command_of "$env_id" "$script" "$seed"
    if ((${#command[@]} == 0)); then
      echo "$cell: finished before"
      continue
    fi
    echo "$cell: ${command[*]:2}"
    (cd "$RUNS" && OMP_NUM_THREADS=1 exec setsid "${pin[@]}" "${command[@]}") >>"$RUNS/${cell// /__}.log" 2>&1 &
    pid=$!
    code=0
    wait "$pid" || code=$?
    pid=
    folder=$(folder_of "$env_id" "$script" "$seed")
    if ((code)); then
      echo "$cell: $(tail -n 1 "$RUNS/${cell// /__}.log")" >>"$claims.failed"
      [[ -n $folder ]] && touch "$folder/failed"
    else
      rm -f "$folder/failed"
      echo "$cell: done"
    fi
  done
}

if [[ $mode == status ]]; then
  status
  exit
elif [[ $mode == dry-run ]]; then
  for cell in "${cells[@]}"; do
    read -r env_id script seed <<<"$cell"
    command_of "$env_id" "$script" "$seed"
    ((${#command[@]})) && echo "${command[*]}"
  done
  exit 0
fi

mkdir -p "$RUNS/runs"
claims=$(mktemp -d)
trap 'rm -rf "$claims" "$claims.failed"' EXIT
workers=()
trap 'echo "stopping: every run writes a checkpoint" >&2; kill -TERM "${workers[@]}" 2>/dev/null || true; wait; exit 130' INT TERM
mapfile -t cores < <(taskset -cp $$ 2>/dev/null | grep -oE '[0-9,-]+$' | tr , '\n' | awk -F- '{ for (i = $1; i <= ($2 == "" ? $1 : $2); i++) print i }')
((${#cores[@]})) || cores=(0)
for ((i = 0; i < WORKERS; i++)); do
  worker "${cores[i % ${#cores[@]}]}" &
  workers+=($!)
done
wait
if [[ -s $claims.failed ]]; then
  echo "failed:" >&2
  cat "$claims.failed" >&2
  exit 1
fi
