"""
Train a wire: encoder, adapter and LoRA around a frozen LM.

    python train.py --preset demo                                # SmolLM2-135M on CPU, synthetic passages, 6 minutes
    torchrun --nproc_per_node=4 train.py                         # Llama-3.1-8B and SQuAD, one node with 4 GPUs
    torchrun --nproc_per_node=2 train.py --preset demo           # two CPU processes (gloo)
    python train.py --preset squad --data train-v1.1.json.gz     # SmolLM2-135M on CPU, real SQuAD, an hour
    python train.py --preset demo --resume                       # goes on from runs/demo/ckpt/last

Every value below is a flag. Writes OUT/config.json, OUT/logs/training.log, OUT/logs/train_diagnostics.jsonl,
OUT/eval/metrics_history.jsonl, OUT/ckpt/last and OUT/ckpt/best (by dev F1).
"""
import contextlib
import fcntl
import json
import math
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel as DDP

from common import UserError, append_line, first_process, log, nearest, read_lines, run_main, write_atomic
from data import Prompt, collate, epoch_plan, group_by_context, load_data
from eval import evaluate_row, summary
from lm import join, load_lm, pick_device, shard
from model import CHUNK, LatentWire, WireConfig, budgets, check_lm, load_trained, read_last_good, save_checkpoint


def option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Config(WireConfig):
    # data
    data: str = option("squad", "squad, synthetic, or a .json, .json.gz or .jsonl file")
    eval_data: str = option("", "the same for the dev slice (default: the dev split; of a file, its last articles are held out)")
    samples: int = option(20_000, "training questions")
    eval_samples: int = option(200, "questions of the fixed dev slice")
    max_context_tokens: int = option(0, "leave out questions whose context is longer; 0: keep all")
    # optimizer
    epochs: int = option(20, "passes over the samples")
    minutes: float = option(0.0, "end after that long, the learning rate with it; 0: epochs alone decide")
    batch: int = option(256, "questions a step, over all processes")
    micro_batch: int = option(16, "questions a forward pass at most; the rest of a step accumulates")
    pack: int = option(4, "questions of one paragraph that share its latents in a row (context scope)")
    ramp: float = option(0.3, "share of the run over which M falls from the context's own length: the task first, then the compression")
    lr: float = option(1e-3, "peak learning rate of LoRA")
    encoder_lr: float = option(2e-4, "peak learning rate of the encoder and the adapter")
    warmup: float = option(0.03, "share of the run with a rising learning rate")
    weight_decay: float = option(0.01, "of AdamW")
    clip: float = option(1.0, "gradient norm is clipped to this")
    # loss mix, see losses.py
    tf: float = option(1.0, "weight of the answer's cross-entropy")
    kce: float = option(0.0, "weight of the cross-entropy of the first K tokens")
    first: float = option(3.0, "weight of the first token's cross-entropy")
    kd: float = option(0.0, "weight of the distillation from the LM that reads the text")
    find: float = option(0.3, "weight of the cross-entropy of the answer's own tokens where the encoder picks (scopes asked and prompt)")
    entropy: float = option(0.5, "weight of the first-token entropy of the batch mean")
    K: int = option(4, "tokens of kce and kd")
    temperature: float = option(1.0, "of kd")
    # run
    preset: str = option("default", "default, smoke, demo or squad: sets the defaults of the other flags")
    out: str = option("runs/default", "folder of the run")
    resume: bool = option(False, "go on from OUT/ckpt/last where there is one")
    seed: int = option(0, "of weights, order and dropout")
    shard: bool = option(False, "spread the frozen LM over the processes, for one that is too large for a GPU (FSDP2)")
    grad_checkpoint: bool = option(False, "keep each layer's input alone and compute the rest again in the backward pass: less memory, a third more time")
    log_every: int = option(10, "steps")
    eval_every: int = option(200, "steps between evaluations on the dev slice; 0: at the end alone")
    save_every: int = option(50, "steps between writes of ckpt/last")
    timeout: float = option(15.0, "minutes that a process waits for another before it gives up")
    device: str = option("", "cuda or cpu (default: a GPU where there is one)")


ASKED = dict(scope="asked", ramp=0.0, encoder_lr=5e-4)
PRESETS = {
    "default": ASKED,  # the recommended run of the specification, with the recipe measured here
    "smoke": dict(ASKED, samples=640, batch=64, epochs=2, first=0.5, kce=0.5, kd=0.5, entropy=0.0, eval_every=0, out="runs/smoke"),
}
SMOLLM = dict(lm="smollm2-135m", prompt="plain", batch=16, pack=5, lora_rank=16, lora_alpha=32.0, lora_targets="q,v,o", first=0.5, entropy=0.0)
PRESETS["demo"] = dict(SMOLLM, data="synthetic", samples=4000, epochs=4, minutes=5.5, ramp=0.6, eval_samples=50, eval_every=0, log_every=5, out="runs/demo")
PRESETS["squad"] = dict(SMOLLM, **ASKED, samples=90_000, epochs=1, minutes=60.0, eval_every=400, log_every=20, out="runs/squad")


# By the first flag of each.
TOPICS = {"lm": "the LM and its prompt", "scope": "the wire", "data": "data", "epochs": "optimizer", "tf": "loss mix", "preset": "the run"}


def parse_config(argv=None):
    from transformers import HfArgumentParser
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(Config, description=__doc__.strip().split("\n")[0], allow_abbrev=False)
    preset = next((argv[i + 1] for i, arg in enumerate(argv[:-1]) if arg == "--preset"), "default")
    preset = next((arg.split("=", 1)[1] for arg in argv if arg.startswith("--preset=")), preset)
    if preset not in PRESETS:
        raise UserError(f"--preset {preset} is unknown; there are {', '.join(PRESETS)}")
    parser.set_defaults(**PRESETS[preset])
    group = parser._optionals
    for action in parser._actions:  # --help in groups
        if action.dest in TOPICS:
            group = parser.add_argument_group(TOPICS[action.dest])
        if group is not parser._optionals:
            parser._optionals._group_actions.remove(action)
            group._group_actions.append(action)
    config, unknown = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    if unknown:
        raise UserError(f"{unknown[0]} is not a flag of train.py" + nearest(unknown[0], list(parser._option_string_actions)))
    for name in ("samples", "epochs", "batch", "micro_batch", "pack", "log_every", "save_every", "eval_samples", "K"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)} must be at least 1")
    for name in ("lr", "encoder_lr", "temperature", "clip"):
        if getattr(config, name) <= 0:
            raise UserError(f"--{name} {getattr(config, name)} must be above 0")
    if not config.tf and not config.first and not config.kce and not config.kd:
        raise UserError("every loss weight is 0: give --tf 1")
    return config


def lr_factor(progress, warmup):
    """Share 0..1 of the peak learning rate at a share 0..1 of the run."""
    if progress < warmup:                                                    # 1) linear warm-up
        return (progress + 1e-3) / (warmup + 1e-3)
    done = min(1.0, (progress - warmup) / max(1e-9, 1 - warmup))
    return 0.5 * (1 + math.cos(math.pi * done))                              # 2) cosine down to 0


def hold_out(items, n):
    """(training items, held-out items, what was held out): the last 4.5% of a file's articles (20 of SQuAD's 442), or of
    its contexts where it names no articles; more, up to a fifth, until there are n questions."""
    groups = {}
    for item in items:
        groups.setdefault(item.example.title or item.example.context, []).append(item)
    names, held = list(groups), []
    wanted = max(1, round(0.045 * len(names)))
    most = max(1, len(names) // 5)
    while len(names) > 1 and (len(held) < wanted or len(held) < most and sum(len(groups[name]) for name in held) < n):
        held.append(names.pop())
    flat = lambda names: [item for name in names for item in groups[name]]
    return flat(names), flat(held), f"the last {len(held)} {'articles' if items and items[0].example.title else 'contexts'}"


def load_items(config, prompt):
    """(training items, dev items). The dev slice is fixed by the seed."""
    eval_data = config.eval_data or config.data
    examples = load_data(config.data, "train", config.samples if config.data == "synthetic" else None, config.seed)
    short = lambda items: [item for item in items if not config.max_context_tokens or len(item.context) <= config.max_context_tokens]
    if config.eval_data or config.data in ("squad", "synthetic"):
        train = short(prompt.items(examples))
        dev = short(prompt.items(load_data(eval_data, "dev", config.eval_samples if eval_data == "synthetic" else None, config.seed)))
        dev = random.Random(config.seed).sample(dev, min(config.eval_samples, len(dev)))
    else:
        train, held, what = hold_out(short(prompt.items(examples)), config.eval_samples)
        dev = random.Random(config.seed).sample(held, min(config.eval_samples, len(held)))
        log(f"notice: {what} of {config.data} are held out, the dev slice is {len(dev)} of their questions; all are in {config.out}/held_out.jsonl")
        if first_process():
            write_atomic(Path(config.out) / "held_out.jsonl", "".join(json.dumps(asdict(item.example)) + "\n" for item in held))
    if config.samples < len(train):
        # Whole paragraphs, so that packing finds the questions that share one.
        groups = group_by_context(train)
        random.Random(config.seed).shuffle(groups)
        train = [train[i] for group in groups for i in group][:config.samples]
    elif config.samples > len(train):
        log(f"notice: {config.samples} samples asked for, {len(train)} are there: using all of them")
    if not train or not dev:
        raise UserError(f"--data {config.data} leaves {len(train)} training and {len(dev)} dev questions; give more data or a "
                        "larger --max_context_tokens")
    prompt.report_cuts(config.data)
    return train, dev


# ------------------------------------------------------------------------------------------------
# Diagnostics

def first_token_stats(logits, batch, tokenizer):
    """What the first answer tokens of a micro-batch look like: hits, probabilities, and a histogram of the winners."""
    first = batch.step == 0
    p, label = logits[first].float().softmax(-1), batch.label[first]
    top, winners = p.topk(5, dim=-1)
    renormalised = top / top.sum(-1, keepdim=True)
    return {
        "n": len(label), "hit": (winners[:, 0] == label).sum().item(), "hit5": (winners == label[:, None]).any(1).sum().item(),
        "max": top[:, 0].sum().item(), "second": top[:, 1].sum().item(),
        "entropy": -torch.xlogy(p, p).sum().item(), "top5_entropy": -torch.xlogy(renormalised, renormalised).sum().item(),
        "histogram": Counter(tokenizer.convert_tokens_to_string([token]) for token in tokenizer.convert_ids_to_tokens(winners[:, 0].tolist())),
    }


def memory():
    """Memory by GPU as the preserved run logs it, or this process's peak on the host."""
    if not torch.cuda.is_available():
        return {"host_memory": {"peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}}
    gb, index = 1e9, torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info()
    return {"gpu_memory": {"gpus": [{
        "id": index, "allocated_gb": round(torch.cuda.memory_allocated() / gb, 2), "reserved_gb": round(torch.cuda.memory_reserved() / gb, 2),
        "free_gb": round(free / gb, 2), "total_gb": round(total / gb, 2), "utilization_pct": round(100 * (1 - free / total), 1)}],
        "peak_allocated_gb": round(torch.cuda.max_memory_allocated() / gb, 2)}}


def diagnostics(window, config, name):
    """One record of the steps since the last: window is a list over micro-batches of all processes of
    (questions, loss parts, first-token statistics, latent RMS, attention entropy)."""
    n = sum(size for size, *_ in window)
    mean = lambda key: sum(stats[key] for _, _, stats, _, _ in window) / n
    part = lambda key: sum(size * parts.get(key, 0.0) for size, parts, *_ in window) / n
    histogram = sum((stats["histogram"] for _, _, stats, _, _ in window), Counter())
    entropies = [value for *_, value in window if value is not None]
    return {
        "mode": "latent", "K": config.K, "first_weight": config.first,
        "prediction_diversity": len(histogram) / n, "dominant_predictions": histogram.most_common(5),
        "latent_rms": sum(rms for *_, rms, _ in window) / len(window),
        "attention_entropy": sum(entropies) / len(entropies) if entropies else None,
        "models": {name: {
            "mode": "latent", "tf": part("tf"), "first": part("first"), "kce": part("kce"), "kd": part("kd"), "find": part("find"), "entropy_loss": part("entropy"),
            "first_acc": mean("hit"), "first_acc_top5": mean("hit5"), "first_entropy": mean("entropy"),
            "first_token_logit_stats": {"max_prob": mean("max"), "second_prob": mean("second"),
                                        "margin": mean("max") - mean("second"), "top5_entropy": mean("top5_entropy")},
            "prediction_histogram": dict(histogram.most_common(20))}},
    }


def keep_steps(path, step):
    """Drop the records of a .jsonl file that are past a step: a resumed run will write them again."""
    if path.exists():
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in read_lines(path) if record.get("global_step", 0) <= step))


# ------------------------------------------------------------------------------------------------
# The run

def optimizer_tensors(optimizer, wire):
    """AdamW's state as {"parameter name.key": tensor}; a parameter that has had no step has none."""
    return {f"{name}.{key}": torch.as_tensor(value) for name, p in wire.trainable().items() for key, value in optimizer.state[p].items()}


def restore_optimizer(optimizer, wire, tensors):
    for name, p in wire.trainable().items():
        state = {key: tensors[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in tensors}
        if state:
            optimizer.state[p] = {key: t.to(p.device) if key != "step" or p.is_cuda else t for key, t in state.items()}


def main():
    config = parse_config()
    # DDP: torchrun sets these
    rank, world = (int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    device, dtype, why = pick_device(config.device or None)
    with contextlib.ExitStack() as stack:  # what is closed however this ends, so that an error is the last line
        if rank == 0:
            stack.enter_context(claim(Path(config.out)))
        try:
            device = join(device, config.timeout)
            if world > 1:
                stack.callback(dist.destroy_process_group)
            return train(config, rank, world, device, dtype, why, stack)
        except RuntimeError as error:
            if world > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
                raise UserError(f"process {rank} lost another one ({' '.join(str(error).split())[:120]}); nothing after {config.out}/ckpt/last is kept: "
                                "go on with --resume, which torchrun --max_restarts=3 does by itself") from None
            raise


def claim(out):
    """Lock a run's folder for this process and return the open file; the lock goes with the process, however it ends.
    Raises UserError while another process has it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "lock", "a+")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise UserError(f"--out {out} is in use by process {lock.read().strip() or '?'}; wait for it, or give another --out") from None
    except OSError:
        return lock  # a file system without locks
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def check_resume(config, saved, lm, path):
    """Raise UserError where --resume is given another wire or LM than the run's; say which other flags have changed."""
    check_lm(saved, lm)
    for f in fields(WireConfig):
        mine, theirs = getattr(config, f.name), getattr(saved.config, f.name)
        if f.name != "lm" and str(mine) != str(theirs):
            raise UserError(f"--{f.name} {mine} does not go with --resume: this run has --{f.name} {theirs}; leave it as it was, or give another --out")
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, value in asdict(config).items():
        if name in before and before[name] != value and name not in ("resume", "device", "lm"):
            log(f"notice: --{name} was {before[name]}, goes on as {value}")


def train(config, rank, world, device, dtype, why, stack):
    out, master = Path(config.out), rank == 0
    last = out / "ckpt" / "last"
    found = last.exists() or last.with_name("last.old").exists()
    if found and not config.resume:
        raise UserError(f"--out {out} already holds a run; give --resume to go on with it, or another --out")
    micro = min(config.micro_batch, max(1, config.batch // world))
    if config.batch % micro or config.batch // micro % world:
        raise UserError(f"--batch {config.batch} does not split into micro-batches of {micro} over {world} processes; change "
                        "--batch or --micro_batch")
    if config.shard and config.max_prompt_tokens > CHUNK:  # in step only while every process runs the layers as often as the others
        raise UserError(f"--max_prompt_tokens {config.max_prompt_tokens} does not go with --shard, whose processes must read their texts in one piece; give {CHUNK} or less")
    torch.manual_seed(config.seed)

    # model
    lm, tokenizer = load_lm(config.lm, dtype, "cpu" if config.shard else str(device))
    prompt = Prompt(tokenizer, config.prompt, config.max_prompt_tokens)
    wire = LatentWire(lm, config)
    if config.shard:
        shard(wire, device)
    trainable = wire.trainable()
    if config.grad_checkpoint:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    if not trainable:
        raise UserError("--encoder text with --lora_rank 0 leaves nothing to train; give --lora_rank 16")
    parts = [([p for name, p in trainable.items() if name.startswith("lm.") == is_lora], lr) for is_lora, lr in ((True, config.lr), (False, config.encoder_lr))]
    optimizer = torch.optim.AdamW([{"params": params, "peak": lr} for params, lr in parts if params], weight_decay=config.weight_decay, betas=(0.9, 0.95),
                                  fused=device.type == "cuda")

    # data
    items, dev = load_items(config, prompt)
    groups = group_by_context(items)
    lengths = [len(item.context) for item in items]
    sizes = budgets(config)
    per_row = min(config.pack, micro) if config.scope == "context" else 1  # elsewhere no two questions share latents
    plan = lambda epoch: epoch_plan(groups, lengths, config.batch, micro, config.seed, epoch, per_row)
    total = sum(len(plan(epoch)) for epoch in range(config.epochs))

    if config.encoder == "pointer":
        wire.encoder.count_tokens([items[group[0]].context for group in groups], [item.question for item in items], prompt.around)

    # resume
    state = {"step": 0, "epoch": 0, "epoch_step": 0, "seen": 0, "elapsed": 0.0, "skipped": 0, "skipped_in_a_row": 0, "best_f1": -1.0, "finished": False}
    if found:
        saved = read_last_good(last)
        check_resume(config, saved, lm, out / "config.json")
        load_trained(wire, saved.folder)
        restore_optimizer(optimizer, wire, load_file(saved.folder / "optimizer.safetensors"))
        state = json.loads((saved.folder / "state.json").read_text(encoding="utf-8"))
        log(f"resuming {out} at step {state['step']} of {total}")
    logs, name = out / "logs", Path(lm.name).name
    if master:
        logs.mkdir(parents=True, exist_ok=True)
        (out / "eval").mkdir(exist_ok=True)
        write_atomic(out / "config.json", json.dumps(asdict(config), indent=2) + "\n")
        for path in (logs / "train_diagnostics.jsonl", out / "eval" / "metrics_history.jsonl"):
            keep_steps(path, state["step"])

    def keep(what, write, *given):
        """Write something; a full disk or a folder that became read-only must not end the training. True if it is written."""
        try:
            write(*given)
            return True
        except OSError as error:
            bar.write(f"warning: {what} not written, training goes on: {error}", file=sys.stderr)
            return False

    def note(text):
        """To the terminal and to training.log, from the first process."""
        if master:
            bar.write(text, file=sys.stderr)
            keep("training.log", append_line, logs / "training.log", text)

    from tqdm import tqdm
    bar = stack.enter_context(tqdm(total=total, initial=state["step"], unit="step", disable=not master, dynamic_ncols=True))
    note(f"{name} on {device} in {dtype} ({why}), attention {lm.config._attn_implementation}, {world} process(es)")
    note(f"trainable {sum(p.numel() for p in trainable.values()):,}, frozen {sum(p.numel() for p in lm.parameters() if not p.requires_grad):,}")
    note(f"{len(items)} questions on {len(groups)} contexts, {len(dev)} dev; {total} steps of {config.batch} questions, micro-batches of {micro}"
         + (f"; ends after {config.minutes:g} minutes" if config.minutes else ""))

    model = wire
    if world > 1:  # the frozen LM is the same everywhere: neither broadcast nor reduced
        DDP._set_params_and_buffers_to_ignore_for_model(wire, [n for n, _ in wire.named_parameters() if n not in trainable] + [n for n, _ in wire.named_buffers()])
        model = DDP(wire, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False)
    autocast = torch.autocast("cuda", dtype) if dtype == torch.bfloat16 else contextlib.nullcontext()
    weights = {key: getattr(config, key) for key in ("tf", "kce", "first", "kd", "find", "entropy")}

    def save():
        return not master or keep("ckpt/last", save_checkpoint, last, wire, optimizer_tensors(optimizer, wire), state)

    def evaluate():
        """Dev F1 of the latents; keeps the best checkpoint. A sharded LM answers in all processes at once."""
        if not master and not config.shard:
            return
        wire.eval()
        scores = summary(evaluate_row("latent", lm, tokenizer, prompt, dev, wire))
        wire.train()
        if not master:
            return
        record = {"kind": "train", "tag": out.name, "global_step": state["step"], "samples_seen": state["seen"], "n": len(dev), **scores,
                  "timestamp": datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")}
        keep("metrics_history.jsonl", append_line, out / "eval" / "metrics_history.jsonl", json.dumps(record))
        low, high = scores["f1_ci95"]
        note(f"step {state['step']}: dev latent F1 {100 * scores['f1']:.1f} [{100 * low:.1f}, {100 * high:.1f}], EM {100 * scores['em']:.1f}, "
             f"{scores['distinct_first_words']} distinct first words of {len(dev)}")
        if scores["f1"] > state["best_f1"] and keep("ckpt/best", save_checkpoint, out / "ckpt" / "best", wire, None, None, torch.float16):
            state["best_f1"] = scores["f1"]

    stopping = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda received, frame: stopping.append(received))
    wire.train()
    began, window, ticked = time.time() - state["elapsed"], [], time.time()
    # A finished run goes on where it is given more epochs or minutes.
    done = state["finished"] and (state["step"] >= total or 0 < config.minutes <= state["elapsed"] / 60)
    state["finished"] = done
    while not done:
        steps = plan(state["epoch"])
        while state["epoch_step"] < len(steps):
            # All processes must agree on the clock and on a signal that only one of them got.
            shared = torch.tensor([time.time() - began, float(bool(stopping))], dtype=torch.float64, device=device)
            if world > 1:
                dist.all_reduce(shared, dist.ReduceOp.MAX)
            state["elapsed"], stop = shared[0].item(), shared[1].item() > 0
            progress = max(state["step"] / total, state["elapsed"] / 60 / config.minutes if config.minutes else 0.0)
            if stop or progress >= 1:
                break
            factor = lr_factor(progress, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            torch.manual_seed(config.seed + 1_000_003 * state["step"] + rank)  # dropout follows from the position alone

            kept = max(0.0, 1 - progress / config.ramp) if config.ramp else 0.0  # share of the tokens that still have a latent each
            count = lambda length: min(length, max(wire.count(length, M), math.ceil(kept * length)))
            step = steps[state["epoch_step"]]
            asked, mine = sum(len(row) for rows in step for row in rows), step[rank::world]
            for i, rows in enumerate(mine):
                rows = [[items[j] for j in row] for row in rows]
                # One of --latents for each micro-batch, the same whichever process gets it.
                M = None if config.ratio else random.Random(f"{config.seed} {state['step']} {rank + i * world}").choice(sizes)
                batch = collate(prompt, rows, config.scope, count).to(device)
                teacher = collate(prompt, rows, config.scope, None).to(device) if config.kd else None
                # Gradients travel once a step, with the last micro-batch.
                with model.no_sync() if world > 1 and i < len(mine) - 1 else contextlib.nullcontext(), autocast:
                    loss, parts, (logits, prefix, attention) = model(batch, weights, config.K, config.temperature, teacher)
                    (loss * batch.size / asked * world).backward()  # DDP averages over processes, the mean is over questions
                look = None if attention is None or wire.encoder.picks else -torch.xlogy(attention, attention).sum(-1).mean().item()
                window.append((batch.size, {key: value.item() for key, value in parts.items()}, first_token_stats(logits, batch, tokenizer),
                               prefix.float().pow(2).mean().sqrt().item(), look))
            norm = torch.nn.utils.clip_grad_norm_(trainable.values(), config.clip)
            if torch.isfinite(norm):  # after the all-reduce, so one process's NaN is seen by all
                optimizer.step()
                state["skipped_in_a_row"] = 0
            else:
                state["skipped"], state["skipped_in_a_row"] = state["skipped"] + 1, state["skipped_in_a_row"] + 1
                note(f"step {state['step'] + 1}: gradient norm {norm.item()}, step skipped ({state['skipped']} so far)")
                if state["skipped_in_a_row"] == 10:
                    raise UserError(f"ten steps in a row were not finite; the last good checkpoint is kept in {last}. Lower --lr")
            optimizer.zero_grad(set_to_none=True)
            state.update(step=state["step"] + 1, epoch_step=state["epoch_step"] + 1, seen=state["seen"] + asked)
            if progress and config.minutes:  # the steps that there is time for, so that the bar's ETA is the run's
                bar.total = max(state["step"], round((state["step"] - 1) / progress))
            bar.update()

            if state["step"] % config.log_every == 0:
                windows = [window]
                if world > 1:
                    windows = [None] * world
                    dist.all_gather_object(windows, window)
                record = diagnostics(sum(windows, []), config, name)
                questions = sum(size for every in windows for size, *_ in every)
                window, seconds, ticked = [], time.time() - ticked, time.time()
                if master:
                    record = {"epoch": state["epoch"], "global_step": state["step"], "epoch_step": state["epoch_step"], "samples_seen": state["seen"],
                              "grad_norm": norm.item(), "lr": config.lr * factor, "sec_per_step": seconds / config.log_every,
                              "samples_per_sec": questions / seconds, "skipped_steps": state["skipped"], **record, **memory()}
                    keep("train_diagnostics.jsonl", append_line, logs / "train_diagnostics.jsonl", json.dumps(record))
                    inner, (word, count) = record["models"][name], record["dominant_predictions"][0]
                    line = (f"tf {inner['tf']:.2f} first_acc {inner['first_acc']:.2f} distinct {len(inner['prediction_histogram'])}/{questions} "
                            f"M {int(batch.latents.max())} {questions / seconds:.1f} q/s")
                    left = f" {max(0.0, config.minutes - state['elapsed'] / 60):.1f} min left" if config.minutes else ""
                    bar.set_postfix_str(line + left)
                    keep("training.log", append_line, logs / "training.log", f"step {state['step']}: {line} grad_norm {norm.item():.2f}")
                    if count > 0.9 * questions and questions >= 32:
                        note(f"warning: collapse: {count} of {questions} first tokens are {word!r}; lower --lr, raise --entropy or --first")
            due = config.eval_every and state["step"] % config.eval_every == 0 and state["step"] < total
            if due:
                evaluate()
            if (due or state["step"] % config.save_every == 0) and not state["skipped_in_a_row"]:
                save()  # after the evaluation, whose best F1 it holds
        else:
            state.update(epoch=state["epoch"] + 1, epoch_step=0)
            done = state["epoch"] >= config.epochs
            continue
        if stop:
            if not save():
                raise UserError(f"stopped by signal at step {state['step']} and not saved; the last checkpoint that is whole is in {out}/ckpt")
            note(f"stopped by signal at step {state['step']}, saved; go on with --resume")
            return 130 if signal.SIGINT in stopping else 0
        done = True

    if not state["finished"]:
        save()
        evaluate()
        state["finished"] = state["best_f1"] >= 0 or not master
        if not save() or not state["finished"]:
            raise UserError(f"the run is over but its weights are not written; make room in {out} and finish it with --resume")
    bar.close()
    unseen = out / "held_out.jsonl" if (out / "held_out.jsonl").exists() else config.eval_data or config.data
    log(f"done: {state['seen']} questions in {state['elapsed'] / 60:.1f} min; next: python eval.py --mode all --ckpt {out}/ckpt/best --data {unseen}")


if __name__ == "__main__":
    run_main(main)
