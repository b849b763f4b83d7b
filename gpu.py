"""
One GPU, ten minutes: what it is, whether the code is right on it, the recommended run, every row, and what that took.

    bash run_hpc.sh gpu                                         # official SQuAD, downloaded once; writes runs/gpu
    bash run_hpc.sh gpu OUT --data TRAIN --eval_data DEV --lm LM --minutes 8
    bash run_hpc.sh gpu --dry                                   # a few steps on synthetic passages, without a GPU too

Parts, in order: facts, checks, train, eval, bench. A part that fails or runs out of time is noted in OUT/gpu.json with
its reason, and the next one starts. train.py, eval.py, report.py and bench.py run as a user would run them, into OUT.
"""
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import Parser, UserError, log, read_json, read_lines, run_main, write_atomic

# The parts in order, and their shares of --minutes; what one leaves over, later ones get.
PARTS = {"facts": 1, "checks": 5, "train": 8, "eval": 6, "bench": 4}
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12,
         "L4": 121e12}  # bf16 FLOP/s, dense, as sold
LOGIT_BOUND = 0.25  # mean |difference| of log-probabilities that rounding to bf16 may make in a small LM
END_BOUND = 0.05    # of the loss at the end of two trainings that are one (on a CPU 0)


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("out", nargs="?", help="folder (default runs/gpu, with --dry runs/gpu_dry)")
    p.add_argument("--lm", default="smollm2-135m", help="language model (default smollm2-135m)")
    p.add_argument("--data", default="squad", help="squad (default), synthetic, or the training file")
    p.add_argument("--eval_data", default="", help="what the rows answer (default: squad's dev split, or articles of a "
                                                   "file that are held out)")
    p.add_argument("--minutes", type=float, default=9.0, help="for all parts, after the start (default 9)")
    p.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)} (default all)")
    p.add_argument("--samples", type=int, default=500, help="questions that every row answers (default 500)")
    p.add_argument("--micro_batch", type=int, default=0, help="of train (default: the largest that fits)")
    p.add_argument("--dry", action="store_true", help="a few steps of everything")
    p.add_argument("--device", help="cuda or cpu (default: a GPU where there is one)")
    return p.parse_args(argv)


if __name__ == "__main__":
    arguments = parse_args()

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # lengths vary; the scripts have it, too

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import setup, step_of
from data import Prompt, group_by_context, synthetic
from lm import embed, head, load_lm, pick_device

RECIPE = ["--preset", "squad", "--samples", "20000", "--epochs", "20", "--batch", "256", "--lora_rank", "32",
          "--eval_every", "0", "--log_every", "5", "--save_every", "100"]


def call(script, *flags, timeout, world=0):
    """Run a script to its end. Raises UserError with the last line that names an error of one that fails, whose last
    lines go to stderr, or that takes longer than timeout seconds. world: processes of torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world else []
    here = str(Path(__file__).with_name(script))
    process = subprocess.Popen([sys.executable, *launch, here, *map(str, flags)], stdout=sys.__stderr__,
                               stderr=subprocess.PIPE, text=True)
    why = ""
    try:
        said = process.communicate(timeout=max(1, timeout))[1]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # train.py saves
        try:
            said = process.communicate(timeout=35)[1]
        except subprocess.TimeoutExpired:  # nothing ends a kernel that hangs
            process.kill()
            said = process.communicate()[1]
        why = f"{script} was stopped after {timeout:.0f} s"
    if why or process.returncode:
        lines = said.strip().splitlines() or [f"{script} ended with {process.returncode}"]
        log("\n".join(lines[-20:]))
        # torchrun's own last words are an error without a message.
        raise UserError(why or next((line for line in reversed(lines) if re.search(r"[Ee]rror: \S", line)), lines[-1]))


# ------------------------------------------------------------------------------------------------
# Parts: each returns what goes into gpu.json

def facts(args, left):
    device, dtype, why = pick_device(args.device)
    found = {"torch": torch.__version__, "transformers": transformers.__version__, "device": device.type,
             "dtype": str(dtype), "why": why, "nccl": torch.distributed.is_nccl_available(), "cpus": os.cpu_count()}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        ask = ["nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(ask, capture_output=True, text=True).stdout.strip() if shutil.which(ask[0]) else None
        found |= {"card": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda,
                  "gb": round(total / 1e9, 1), "free_gb": round(free / 1e9, 1),
                  "capability": torch.cuda.get_device_capability()}
    return found


def read(lm, rows, masked=False):
    """The log-probabilities (tokens, V) that an LM gives after each token of rows, (1, S) token ids each. masked: with
    the causal mask given, as a wire's reader has one; with it the flash kernel does not apply, and without it the
    efficient one does not, where several query heads share a key."""
    states = []
    for row in rows:
        causal = torch.ones(1, 1, *[row.shape[1]] * 2, dtype=torch.bool, device=row.device).tril()
        states.append(lm.model(inputs_embeds=embed(lm, row), attention_mask=causal if masked else None,
                               use_cache=False).last_hidden_state[0])
    return head(lm, torch.cat(states)).float().log_softmax(-1)


@torch.no_grad()
def checks(args, left):
    """bf16 against float32, flash against plain attention, and two trainings that must end alike."""
    try:
        ends = alike(args, left)  # while no LM is held here
    except UserError as error:
        ends = {"ok": False, "why": str(error)}
    (exact, tokenizer), (rounded, _) = (load_lm(args.lm, kind, args.device) for kind in (torch.float32, torch.bfloat16))
    prompt, gap = Prompt(tokenizer), lambda a, b: (a - b).abs().mean().item()
    texts = [prompt.text(item) for item in prompt.items(synthetic("dev", 8))]
    rows = [torch.from_numpy(text)[None].long().to(exact.device) for text in texts]
    found, kernels = {"bound": LOGIT_BOUND, "bf16 - float32": gap(read(rounded, rows), read(exact, rows))}, {}
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(kernel):
                kernels[kernel] = read(rounded, rows, kernel == SDPBackend.EFFICIENT_ATTENTION)
        except RuntimeError as error:
            found[kernel.name] = str(error).splitlines()[0][:100]
    for kernel, values in list(kernels.items())[1:]:
        found[f"{kernel.name} - MATH"] = gap(values, kernels[SDPBackend.MATH])
    found |= ends
    for name, value in found.items():
        bound = END_BOUND if name in ends else LOGIT_BOUND
        if " - " in name and not value < bound:
            return found | {"ok": False, "why": f"{name} is {value:.3g}, more than {bound}"}
    return found


def alike(args, left):
    """The same eight steps: by themselves, as torchrun's only process, and killed after some and gone on with."""
    out, ends = Path(args.out) / "checks", {}
    shutil.rmtree(out, ignore_errors=True)  # --resume would find finished runs, perhaps another machine's
    for name in ("alone", "torchrun", "resumed"):
        flags = ["--preset", "demo", "--lm", args.lm, "--samples", 80, "--batch", 10, "--epochs", 1, "--minutes", 0,
                 "--encoder_rank", 8, "--eval_samples", 2, "--save_every", 1, "--log_every", 1, "--device", args.device,
                 "--out", out / name]
        if name == "resumed":
            here = str(Path(__file__).with_name("train.py"))
            first = subprocess.Popen([sys.executable, here, *map(str, flags)], stderr=subprocess.DEVNULL)
            logs = out / name / "logs" / "train_diagnostics.jsonl"
            while first.poll() is None and len(read_lines(logs)) < 3 and left() > 0:  # after some steps
                time.sleep(0.2)
            first.kill()
            first.wait()
        call("train.py", *flags, "--resume", timeout=left(), world=1 if name == "torchrun" else 0)
        last = read_lines(out / name / "logs" / "train_diagnostics.jsonl")[-1]
        ends[name] = next(iter(last["models"].values()))["tf"]
    return {"loss after 8 steps": ends, "torchrun - alone": abs(ends["torchrun"] - ends["alone"]),
            "resumed - alone": abs(ends["resumed"] - ends["alone"])}


def work(args):
    """(the largest micro-batch that fits, found on the longest paragraphs; FLOPs of a usual question's forward and
    backward pass)."""
    from torch.utils.flop_counter import FlopCounterMode
    wire, items = setup(args, most=None, lora_rank=32)
    groups = sorted((group[:5] for group in group_by_context(items)), key=lambda group: -len(items[group[0]].context))
    step = lambda some: step_of(wire, [[items[i] for i in group] for group in some])()
    usual = groups[len(groups) // 2:][:4]
    # Of other kernels PyTorch 2.11 does not count several query heads that share a key.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(usual)
    flops = counter.get_total_flops() / sum(map(len, usual))
    size = args.micro_batch or (8 if args.dry or wire.lm.device.type == "cpu" else 256)
    while True:
        longest, count = [], 0
        for group in groups:
            if count < size:
                longest.append(group[:min(4, size - count)])  # some rows have fewer than five questions
                count += len(longest[-1])
        try:
            step(longest)
            return size, flops
        except torch.OutOfMemoryError:
            wire.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            if size == 1:
                raise UserError("one question of the longest paragraph does not fit into this GPU's memory") from None
            size //= 2


def train(args, left):
    micro, flops = work(args)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    minutes = max(0.2, (left() - 75) / 60)  # the rest starts, evaluates and saves
    few = ["--samples", 40, "--epochs", 1, "--batch", 8, "--eval_samples", 4, "--minutes", 0] if args.dry else [
        "--minutes", f"{minutes:.2f}"]
    # Without --eval_data: articles of --data pick the checkpoint, never those that measure it.
    failed, before = {}, read_json(Path(args.out) / "ckpt" / "last" / "state.json").get("step", 0)
    try:
        call("train.py", *RECIPE, "--lm", args.lm, "--data", args.data, "--micro_batch", micro, *few, "--device",
             args.device, "--resume", "--out", args.out, timeout=left())
    except UserError as error:  # what it logged until then tells something, too
        failed = {"ok": False, "why": str(error)}
    records = [record for record in read_lines(Path(args.out) / "logs" / "train_diagnostics.jsonl")
               if record["global_step"] > before]  # this call's, perhaps of another card or version than those before
    if not records and not failed:
        failed = {"ok": False, "why": f"{args.out} holds a finished training; give another OUT"}
    rates = sorted(record["samples_per_sec"] for record in records[len(records) // 4:]) or [float("nan")]
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((value for name, value in PEAKS.items() if re.search(rf"\b{name}\b", card)), None)
    rate, last = rates[len(rates) // 2], records[-1] if records else {}
    return {"micro_batch": micro, "questions": last.get("samples_seen"), "questions_per_sec": rate,
            "gflop_a_question": flops / 1e9, "mfu": rate * flops / peak if peak else None,
            "gpu_memory": last.get("gpu_memory", last.get("host_memory")), **failed}


def evaluate(args, left):
    out = Path(args.out)
    data = args.eval_data or (args.data if args.data in ("squad", "synthetic") else out / "held_out.jsonl")
    ckpt = out / "ckpt" / ("best" if (out / "ckpt" / "best").exists() else "last")  # of a training that was stopped
    try:
        call("eval.py", "--mode", "own,latent_shuffled,text_lora,all",  # in this order, for time may run out
             "--ckpt", ckpt, "--data", data, "--samples", 6 if args.dry else args.samples, "--batch", 100, "--device",
             args.device, timeout=left() - 45)
    finally:
        if (out / "eval" / "metrics.json").exists():
            with contextlib.suppress(UserError):  # not in place of what the evaluation ran into
                call("report.py", out, timeout=90)
    return {"data": str(data)}


def bench(args, left):
    few = ["--lengths", "64", "--repeats", 1, "--batch", 5] if args.dry else ["--batch", 60]  # more than its launches
    path, failed = Path(args.out) / "bench.json", {}
    path.unlink(missing_ok=True)
    try:
        call("bench.py", "train", "profile", "answer", "scale", "--lm", args.lm, "--data", args.data, "--out", args.out,
             "--device", args.device, *few, timeout=left())
    except UserError as error:  # what was measured until then is there
        failed = {"ok": False, "why": str(error)}
    return read_json(path) | failed


def main(args):
    began, wanted = time.monotonic(), args.parts.split(",")
    for part in wanted:
        if part not in PARTS:
            raise UserError(f"--parts {part} is unknown; there are {', '.join(PARTS)}")
    if args.dry and args.data == "squad":
        args.data = "synthetic"
    args.out = args.out or ("runs/gpu_dry" if args.dry else "runs/gpu")
    args.device = args.device or str(pick_device()[0])
    path, over, run = Path(args.out) / "gpu.json", began + 60 * args.minutes, {"eval": evaluate}
    found = read_json(path)
    for part in wanted:
        started = time.monotonic()
        later = sum(map(PARTS.get, wanted[wanted.index(part) + 1:])) / sum(map(PARTS.get, wanted))
        end = over - 60 * args.minutes * later
        log(f"== {part} ({max(0, over - started):.0f} s left)")
        try:
            if started > over:
                raise UserError(f"no time left of --minutes {args.minutes:g}")
            result = {"ok": True, **(run.get(part) or globals()[part])(args, lambda: end - time.monotonic())}
        except Exception as error:  # whatever a part runs into, the next ones have their time
            result = {"ok": False, "why": (str(error) or type(error).__name__).splitlines()[0]}
        found[part] = result | {"seconds": round(time.monotonic() - started, 1)}
        write_atomic(path, json.dumps(found, indent=2, default=str) + "\n")
        state = "done" if result["ok"] else f"FAILED: {result['why']}"
        print(f"{part:<8}{found[part]['seconds']:>8.1f} s  {state}", flush=True)
    print(f"written: {path}")
    return 0 if all(found[part]["ok"] for part in wanted) else 1


if __name__ == "__main__":
    run_main(lambda: main(arguments))
