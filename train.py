"""
Train a wire: the LoRA sets of encoder and reader in one frozen LM.

    python train.py --preset demo                                # SmolLM2-135M on CPU, synthetic passages, 6 minutes
    torchrun --nproc_per_node=4 train.py                         # Llama-3.1-8B and SQuAD, one node with 4 GPUs
    torchrun --nproc_per_node=2 train.py --preset demo           # two CPU processes (gloo)
    python train.py --preset squad --data train-v1.1.json.gz     # SmolLM2-135M on CPU, real SQuAD, an hour
    python train.py --preset squad --wire tokens --keep all      # the rival that reads all of the text
    python train.py --preset demo --resume                       # goes on from runs/demo/ckpt/last

Every value below is a flag. Writes OUT/config.json, OUT/held_out.jsonl (questions for eval.py), OUT/logs/training.log,
OUT/logs/train_diagnostics.jsonl, OUT/eval/metrics_history.jsonl, OUT/ckpt/last and OUT/ckpt/best (by dev F1).
"""
import contextlib
import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel as DDP

from common import (Parser, UserError, append_line, check_counts, claim, first_process, log, read_json, read_lines,
                    run_main, write_atomic)
from data import Prompt, by_article, checksum, epoch_plan, group_by_context, grouped, join_paragraphs, load_data
from lm import LoRALinear, autocast, checkpoint_layers, join_processes, load_lm, pick_device, shard
from losses import PARTS
from model import LatentWire, WireConfig, budgets, check_config, option, rarity
from rows import evaluate_row, kept_tokens, own_row, summary
from store import check_lm, load_trained, read_checkpoint, read_last_good, save_checkpoint

try:
    import resource
except ImportError:  # Windows: no peak memory
    resource = None


@dataclass
class Config(WireConfig):
    # data
    data: str = option("squad", "squad, synthetic, or a .json, .json.gz or .jsonl file")
    eval_data: str = option("", "the same for the dev slice (default: the last articles of --data; synthetic: passages "
                                "of its own)")
    samples: int = option(20_000, "training questions")
    join: int = option(0, "a text is as many successive paragraphs of an article as fit into this many tokens, or by "
                          "chance fewer; 0: one. For articles and books, with --ratio 8 and --pack 16")
    eval_samples: int = option(200, "questions of the fixed dev slice")
    # optimizer
    epochs: int = option(20, "passes over the samples; 0, with --start: fit the predictor to those weights "
                             "and answer the dev slice")
    minutes: float = option(0.0, "end after that long, the learning rate with it; 0: epochs alone decide")
    batch: int = option(256, "questions a step, over all processes")
    micro_batch: int = option(16, "questions a forward pass at most; the rest of a step accumulates")
    pack: int = option(5, "questions of one paragraph that share its latents in a row")
    lr: float = option(1e-3, "peak learning rate; LoRA's B has one in proportion to the weight that it stands beside")
    warmup: float = option(0.03, "share of the run with a rising learning rate")
    weight_decay: float = option(0.01, "of AdamW")
    clip: float = option(1.0, "gradient norm is clipped to this")
    # loss mix, see losses.py
    tf: float = option(1.0, "weight of the answer's cross-entropy")
    kce: float = option(0.0, "weight of the cross-entropy of the first K tokens")
    first: float = option(3.0, "weight of the first token's cross-entropy")
    kd: float = option(0.0, "weight of the distillation from the LM that reads the text")
    entropy: float = option(0.5, "weight of the first-token entropy of the batch mean")
    K: int = option(4, "tokens of kce and kd")
    temperature: float = option(1.0, "of kd")
    # run
    preset: str = option("default", "default, smoke, demo or squad: sets the defaults of the other flags")
    out: str = option("runs/default", "folder of the run")
    start: str = option("", "checkpoint whose weights the run begins with: of this LM, wire and ranks, of any scope, "
                            "data or M")
    resume: bool = option(False, "go on from OUT/ckpt/last where there is one")
    seed: int = option(0, "of weights and order")
    shard: bool = option(False, "spread the frozen LM over the processes, for one that is too large for a GPU (FSDP2)")
    grad_checkpoint: bool = option(False, "keep each layer's input alone and compute the rest again in the backward "
                                          "pass: less memory, a third more time")
    log_every: int = option(10, "steps")
    eval_every: int = option(200, "steps between evaluations on the dev slice; 0: at the end alone")
    save_every: int = option(50, "steps between writes of ckpt/last")
    timeout: float = option(15.0, "minutes that a process waits for another before it gives up")
    device: str = option("", "cuda or cpu (default: a GPU where there is one)")
    dtype: str = option("", "float32 or bfloat16, of the frozen LM and what passes through it (default: bfloat16 on a "
                            "GPU that has it, else float32; CPUs with AVX512-BF16 or AMX are faster in bfloat16)")


# Presets differ in LM, data and length; those of the small LM also in what its small batches want.
SMOLLM = dict(lm="smollm2-135m", prompt="plain", batch=16, lora_rank=8, first=0.5, entropy=0.0)
PRESETS = {
    "default": {},  # the recommended run of the specification
    "smoke": dict(samples=640, batch=64, epochs=2, first=0.5, kce=0.5, kd=0.5, entropy=0.0, eval_every=0,
                  out="runs/smoke"),
    "demo": dict(SMOLLM, data="synthetic", samples=4000, epochs=4, minutes=5.5, eval_samples=50, eval_every=0,
                 log_every=5, out="runs/demo"),
    "squad": dict(SMOLLM, samples=90_000, epochs=1, minutes=60.0, eval_every=400, log_every=20, out="runs/squad"),
}

# By the first flag of each.
TOPICS = {"lm": "the LM and its prompt", "scope": "the wire", "data": "data", "epochs": "optimizer", "tf": "loss mix",
          "preset": "the run"}


def parse_config(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    p = Parser(__doc__)
    p.usage = "%(prog)s [flags]"  # there are too many
    for f in fields(Config):
        if f.name in TOPICS:
            add = p.add_argument_group(TOPICS[f.name]).add_argument
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type, "default": f.default}
        add(f"--{f.name}", help=f"{f.metadata['help']} (default %(default)s)", **kind)
    preset = p.parse_known_args([arg for arg in argv if arg not in ("-h", "--help")])[0].preset
    if preset not in PRESETS:
        raise UserError(f"--preset {preset} is unknown; there are {', '.join(PRESETS)}")
    p.set_defaults(**PRESETS[preset])
    config = Config(**vars(p.parse_args(argv)))
    config.out, config.start = map(os.path.expanduser, (config.out, config.start))  # bash leaves the ~ of --out=~/run
    check_counts(config, "samples", "batch", "micro_batch", "pack", "log_every", "save_every", "eval_samples", "K")
    if config.epochs < (0 if config.start else 1):
        raise UserError(f"--epochs {config.epochs} must be at least 1 (0 goes with --start, whose weights it measures)")
    for f in fields(Config):
        if f.type in (int, float) and not 0 <= getattr(config, f.name) < math.inf:
            raise UserError(f"--{f.name} {getattr(config, f.name)} must be a number of at least 0")
    for name in ("lr", "temperature", "clip"):
        if getattr(config, name) <= 0:
            raise UserError(f"--{name} {getattr(config, name)} must be above 0")
    if config.join and not 0 < config.join <= (room := config.max_prompt_tokens - 128):
        raise UserError(f"--join {config.join} must be 0 to {room}, which leaves of --max_prompt_tokens "
                        f"{config.max_prompt_tokens} room for a question")
    if config.warmup > 1:
        raise UserError(f"--warmup {config.warmup} must be at most 1: it is a share of the run")
    check_config(config)
    if config.eval_data not in ("", "squad", "synthetic") and (
            Path(config.eval_data).resolve() == Path(config.data).resolve()):
        raise UserError(f"--eval_data {config.eval_data} is --data itself; leave it out, and articles are held out")
    if not config.tf and not config.first and not config.kce and not config.kd:
        raise UserError("every loss weight is 0: give --tf 1")
    return config


def lr_factor(progress, warmup):
    """Share 0..1 of the peak learning rate at a share 0..1 of the run."""
    if progress < warmup:                                                    # 1) linear warm-up
        return (progress + 1e-3) / (warmup + 1e-3)
    done = min(1.0, (progress - warmup) / max(1e-9, 1 - warmup))
    return 0.5 * (1 + math.cos(math.pi * done))                              # 2) cosine down to 0


def unseen(config):
    """--data for eval.py: what neither trained the wire nor, but where one article alone is held out, picked its
    checkpoint."""
    if (config.eval_data or config.data) == "synthetic":
        return "synthetic"
    whole = config.data == "squad" and not config.eval_data and not config.join
    return "squad" if whole else f"{config.out}/held_out.jsonl"


def load_items(config, prompt):
    """(training items, dev items, the held out Examples that neither trains nor picks a checkpoint). The dev slice is
    fixed by the seed, and none of its articles is among those that eval.py is pointed to. Of SQuAD it is articles of
    the training file: eval.py answers the dev file."""
    flat = lambda groups: [example for group in groups for example in group]
    joined = lambda examples: join_paragraphs(examples, prompt, config.join, config.seed) if config.join else examples
    eval_data, measure = config.eval_data or config.data, []
    train = joined(load_data(config.data, "train", config.samples if config.data == "synthetic" else None, config.seed))
    if eval_data == "synthetic":
        # Other passages than eval.py's by the same seed: what picks the checkpoint is not what measures it.
        dev = load_data(eval_data, "dev", config.eval_samples, f"dev slice {config.seed}")
    else:
        if config.eval_data:
            held = by_article(joined(load_data(eval_data, "dev")))
        else:  # the last 4.5% of the articles (20 of SQuAD's 442), or of the contexts of a file that names none; more,
            # up to a fifth, where those have few questions
            groups = by_article(train)
            n = max(1 + (len(groups) >= 5), round(0.045 * len(groups)))
            while n < len(groups) // 5 and sum(map(len, groups[-n:])) < 2 * config.eval_samples:
                n += 1
            train, held = flat(groups[:-n]), groups[:-n - 1:-1]
        pick, measure = flat(held[::2]), flat(held[1::2] or held)
        dev = random.Random(config.seed).sample(pick, min(config.eval_samples, len(pick)))
        which = ("every other one, the others' are" if held[1:] else
                 "the only one, so what picks the checkpoint measures it too; all are")
        log(f"notice: {len(held)} articles or contexts of {eval_data} are held out; the dev slice is {len(dev)} "
            f"questions of {which} in {config.out}/held_out.jsonl")
    if config.samples < len(train):
        # Whole paragraphs, so that packing finds the questions that share one.
        groups = grouped(train, lambda example: example.context)
        random.Random(config.seed).shuffle(groups)
        train = flat(groups)[:config.samples]
    elif config.samples > len(train):
        log(f"notice: {config.samples} samples asked for, {len(train)} are there: using all of them")
    if not train or not dev:
        raise UserError(f"--data {config.data} leaves {len(train)} training and {len(dev)} dev questions; give "
                        "more data")
    items = prompt.items(train), prompt.items(dev)
    prompt.report_cuts(config.data)
    return *items, measure


# ------------------------------------------------------------------------------------------------
# Diagnostics

def first_token_stats(logits, batch, known):
    """What the first answer tokens of a micro-batch look like: ({name: a mean over its questions}, the most likely
    tokens (Q,)), left on the device. known: how many of the vocabulary's ids the tokenizer has; a vocabulary may be
    padded with ids that no text has."""
    p, label = logits[batch.first].float().softmax(-1), batch.label[batch.first]
    top, winners = p[:, :known].topk(5, dim=-1)
    share = top / top.sum(-1, keepdim=True)
    entropy = lambda x: -torch.xlogy(x, x).sum(-1).mean()
    hits = winners == label[:, None]
    return {"hit": hits[:, 0].float().mean(), "hit5": hits.any(1).float().mean(), "max": top[:, 0].mean(),
            "second": top[:, 1].mean(), "first_entropy": entropy(p), "top5_entropy": entropy(share)}, winners[:, 0]


def settle(window, tokenizer):
    """What `train_step` left on the device as [(questions, {name: number}, histogram of the first tokens), ...]: all in
    one transfer, for each one waits until a GPU has done all that it was told."""
    numbers = iter(torch.stack([value for _, shown, _ in window for value in shown.values()]).tolist())
    words = iter(tokenizer.batch_decode(torch.cat([winners for *_, winners in window])[:, None].tolist()))
    return [(size, {name: next(numbers) for name in shown}, Counter(next(words) for _ in range(size)))
            for size, shown, _ in window]


def memory(device):
    """Memory by GPU as the preserved run logs it, or this process's peak on the host."""
    if device.type != "cuda":
        if resource is None:
            return {}
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
        return {"host_memory": {"peak_rss_gb": round(kib / 2**20, 2)}}
    gb, index = lambda count: round(count / 1e9, 2), torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info()
    return {"gpu_memory": {"gpus": [{
        "id": index, "allocated_gb": gb(torch.cuda.memory_allocated()), "reserved_gb": gb(torch.cuda.memory_reserved()),
        "free_gb": gb(free), "total_gb": gb(total), "utilization_pct": round(100 * (1 - free / total), 1)}],
        "peak_allocated_gb": gb(torch.cuda.max_memory_allocated())}}


def keep_steps(path, step):
    """Drop the records of a .jsonl file that are past a step: a resumed run will write them again."""
    if path.exists():
        kept = [record for record in read_lines(path) if record.get("global_step", -1) <= step]
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))


# ------------------------------------------------------------------------------------------------
# The run

ROW_LENGTH = 5.5  # about how long the rows of SmolLM2-135M's weights are, for which --lr is meant


def step_sizes(wire):
    """{name: what --lr is multiplied with} of what is trained. That of LoRA's B is in proportion to the rows of the
    weight that it stands beside, so that a step changes the same share of what a layer gives in every LM:
    SmolLM2-135M's rows are 4 to 8 long, Gemma 3 270M's 0.7 to 1. (LARS, arXiv 1708.03888, has such rates for weights
    themselves.) The nearest power of two: so the optimizer has few groups."""
    sizes = dict.fromkeys(wire.trainable(), 1.0)
    for name, module in wire.named_modules():
        if isinstance(module, LoRALinear):
            length = torch.linalg.vector_norm(module.base.weight, dim=1, dtype=torch.float32).mean().item()
            size = 2.0 ** round(math.log2(max(length, 1e-6) / ROW_LENGTH))
            sizes |= {f"{name}.B.{lora}": size for lora in module.B}
    return sizes


def make_optimizer(wire, sizes, config):
    """AdamW, a group of parameters for each of the sizes; that of 1 first."""
    groups = {1.0: []}
    for name, p in wire.trainable().items():
        groups.setdefault(sizes[name], []).append(p)
    groups = [{"params": params, "size": size, "lr": config.lr * size} for size, params in groups.items()]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, betas=(0.9, 0.95), fused=p.is_cuda)


def optimizer_tensors(optimizer, wire):
    """AdamW's state as {"parameter name.key": tensor}; a parameter that has had no step has none."""
    return {f"{name}.{key}": torch.as_tensor(value) for name, p in wire.trainable().items()
            for key, value in optimizer.state[p].items()}


def main():
    config = parse_config()
    # DDP: torchrun sets these
    rank, world = (int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    device, dtype, why = pick_device(config.device, config.dtype)
    with contextlib.ExitStack() as stack:  # what is closed however this ends, so that an error is the last line
        if rank == 0:
            stack.enter_context(claim(Path(config.out)))
        try:
            device = join_processes(device, config.timeout)
            if world > 1:
                stack.callback(dist.destroy_process_group)
            return train(set_up(config, rank, world, device, dtype, why, stack))
        except RuntimeError as error:
            if world > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
                raise UserError(f"process {rank} lost another one ({' '.join(str(error).split())[:120]}); nothing "
                                f"after {config.out}/ckpt/last is kept: go on with --resume, which torchrun "
                                "--max_restarts=3 does by itself") from None
            raise


def check_out(config):
    """Whether --out holds a run to go on with. Raises UserError where a run would overwrite what is there."""
    out = Path(config.out)
    best, about = out / "ckpt" / "best", out / "config.json"
    found = any((out / "ckpt" / name).exists() for name in ("last", "last.old"))
    if found and not config.resume:
        raise UserError(f"--out {out} already holds a run; give --resume to go on with it, or another --out")
    if not found and about.exists() and '"preset"' not in about.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"--out {out} holds something else than a run, which has a config.json; give another --out")
    if not found and best.exists():
        raise UserError(f"--out {out} holds {best} and no ckpt/last to go on from; give another --out, and --start "
                        f"{best} to begin with it")
    return found


class Plan:
    """What every step of a run reads, a function of its number alone: so a run goes on anywhere without replaying,
    and processes that take every n-th micro-batch of a step read together the same, however many there are."""

    def __init__(self, config, items, micro):
        self.config, self.micro, self.groups = config, micro, group_by_context(items)
        lengths = [len(item.context) for item in items]
        alone = config.scope == "prompt" or config.wire == "tokens" and config.keep == "matched"  # a row a question
        per_row = 1 if alone else min(config.pack, micro)
        self.steps = [(epoch, *numbered) for epoch in range(config.epochs) for numbered in enumerate(
            epoch_plan(self.groups, lengths, config.batch, micro, config.seed, epoch, per_row))]

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, n):
        """The micro-batches of step n: [(rows of item numbers, M), ...]."""
        sizes = [None] if self.config.ratio and self.config.scope != "asked" else budgets(self.config)
        epoch, step, micros = self.steps[n]
        return [(rows, random.Random(f"{self.config.seed} {n} {i}").choice(sizes)) for i, rows in enumerate(micros)]


@dataclass
class State:
    """Where training stands; state.json of ckpt/last."""
    data: str = ""            # checksum of what it is trained on and of the dev slice
    step: int = 0
    seen: int = 0
    elapsed: float = 0.0      # seconds, over all starts
    skipped: int = 0
    skipped_in_a_row: int = 0
    best_f1: float = -1.0
    answered: int = -1        # the step at which the dev slice was answered last
    finished: bool = False


@dataclass
class Run:
    """All that the steps of a run need."""
    config: Config
    out: Path
    rank: int
    world: int
    device: object
    wire: LatentWire
    model: object             # the wire, in DDP where there are several processes
    optimizer: object
    items: list
    dev: list
    held: list                # Examples for held_out.jsonl
    plan: Plan
    state: State
    bar: object
    name: str
    stopping: list            # signals received
    rescued: bool = False     # whether a checkpoint was written in the middle of a step

    def note(self, text):
        """To the terminal and to training.log, from the first process."""
        if first_process():
            self.bar.write(text, file=sys.stderr)
            self.keep(append_line, self.out / "logs" / "training.log", text)

    def keep(self, write, path, *given):
        """Write a file or folder; a full disk or a read-only one must not end the training. True if it is written."""
        try:
            write(path, *given)
            return True
        except OSError as error:
            self.bar.write(f"warning: {path} not written, training goes on: {error}", file=sys.stderr)
            return False


def split_batch(config, world):
    """(questions a step, questions a forward pass): a batch that does not split evenly is made smaller, and said so."""
    micro = min(config.micro_batch, max(1, config.batch // world))
    batch = max(1, config.batch // (micro * world)) * micro * world
    if batch != config.batch:
        log(f"notice: --batch {config.batch} does not split into micro-batches of {micro} over {world} process(es): "
            f"taking {batch}")
    return batch, micro


def set_up(config, rank, world, device, dtype, why, stack):
    """The Run, new or as far as --resume finds it."""
    found = check_out(config)
    config.batch, micro = split_batch(config, world)
    start = read_checkpoint(config.start) if config.start and not found else None
    torch.manual_seed(config.seed)

    # model
    # Sharded: as it is stored, so mapped and not copied; each layer gets its dtype when it is spread.
    lm, tokenizer = load_lm(config.lm, "auto" if config.shard else dtype, "cpu" if config.shard else str(device),
                            wired=config.wire != "tokens")
    prompt = Prompt(tokenizer, config.prompt, config.max_prompt_tokens)
    wire = LatentWire(lm, config, prompt)
    if start:
        check_lm(start, lm)
        load_trained(wire, start)
    if config.grad_checkpoint:
        checkpoint_layers(lm)
    sizes = step_sizes(wire)  # while every process has whole weights
    if config.shard:
        shard(wire, device, dtype)
    if not wire.trainable():
        raise UserError("nothing is left to train: give --lora_rank or --encoder_rank above 0, and --lora_targets")
    optimizer = make_optimizer(wire, sizes, config)

    # data
    items, dev, held = load_items(config, prompt)
    plan = Plan(config, items, micro)
    texts, questions = [items[group[0]].context for group in plan.groups], [item.question for item in items]
    wire.rarity.copy_(rarity(texts, questions, prompt.around, len(wire.rarity)))

    state = State(data=checksum(items + dev))
    if found:
        state = restore(config, wire, optimizer, state.data)
        log(f"resuming {config.out} at step {state.step} of {len(plan)}")
    if world > 1:
        steps = [None] * world
        dist.all_gather_object(steps, state.step)
        if len(set(steps)) > 1:  # nodes without a shared disk
            raise UserError(f"--out {config.out} is not the same for all processes, which stand at steps {steps}; put "
                            "it on a disk that all nodes share, or copy ckpt/last to each")

    from tqdm import tqdm
    bar = stack.enter_context(tqdm(total=len(plan), initial=state.step, unit="step", disable=rank != 0,
                                   dynamic_ncols=True))
    model = wire
    if world > 1:  # the frozen LM is the same everywhere: neither broadcast nor reduced
        DDP._set_params_and_buffers_to_ignore_for_model(
            wire, [n for n, p in wire.named_parameters() if not p.requires_grad] + [n for n, _ in wire.named_buffers()])
        model = DDP(wire, broadcast_buffers=False)
    run = Run(config, Path(config.out), rank, world, device, wire, model, optimizer, items, dev, held, plan, state, bar,
              Path(lm.name).name, [])
    count = lambda wanted: sum(p.numel() for p in wire.parameters() if p.requires_grad == wanted)
    run.note(f"{run.name} on {device} in {dtype} ({why}), attention {lm.config._attn_implementation}, {world} "
             "process(es)")
    run.note(f"wire {config.wire}, scope {config.scope}; trainable {count(True):,}, frozen {count(False):,}")
    run.note(f"{len(items)} questions on {len(plan.groups)} contexts, {len(dev)} dev; {len(plan)} steps of "
             f"{config.batch} questions, micro-batches of {micro}"
             + (f"; ends after {config.minutes:g} minutes" if config.minutes else ""))
    return run


def restore(config, wire, optimizer, data):
    """Put what ckpt/last holds into wire and optimizer; returns the State, and says which flags have changed. data:
    checksum of the questions. Raises UserError for another wire or LM than the run's."""
    out = Path(config.out)
    saved, before = read_last_good(out / "ckpt" / "last"), read_json(out / "config.json")
    check_lm(saved, wire.lm)
    for f in fields(WireConfig):
        mine, theirs = getattr(config, f.name), getattr(saved.config, f.name)
        if f.name != "lm" and str(mine) != str(theirs):
            raise UserError(f"--{f.name} {mine} does not go with --resume: this run has --{f.name} {theirs}; leave it "
                            "as it was, or give another --out")
    config.start = config.start or before.get("start", "")  # where it began stays so
    for name, value in asdict(config).items():
        if name in before and before[name] != value and name not in ("resume", "device", "lm"):
            log(f"notice: --{name} was {before[name]}, goes on as {value}")
    load_trained(wire, saved)
    tensors = load_file(saved.folder / "optimizer.safetensors")
    for name, p in wire.trainable().items():
        optimizer.state[p] = {key: tensors[f"{name}.{key}"].to(p.device) for key in ("step", "exp_avg", "exp_avg_sq")
                              if f"{name}.{key}" in tensors}
    state = State(**json.loads((saved.folder / "state.json").read_text(encoding="utf-8")))
    if changed := state.data not in ("", data):
        log("notice: the questions are not those that this run began with; it may have been trained on some of the dev "
            f"slice and of {out}/held_out.jsonl")
    kept = any((out / "ckpt" / name).exists() for name in ("best", "best.old"))
    if changed or not kept:
        state.best_f1, state.answered = -1.0, -1  # that of other questions, or of weights that are not here
    return replace(state, data=data, finished=state.finished and kept)


def make_batch(run, rows, M):
    """(Batch, the teacher's Batch or None) of rows of item numbers."""
    wire, config = run.wire, run.config
    rows, kept = [[run.items[j] for j in row] for row in rows], None
    if config.wire == "tokens":
        firsts = [row[0] for row in rows]
        kept = kept_tokens(config.keep, wire.lm, wire.prompt, firsts,
                           [wire.stored(len(item.context), M) for item in firsts], wire.rarity)
    batch = wire.collate(rows, lambda length: wire.stored(length, M), M, kept)
    return batch.to(run.device), wire.text_batch(rows).to(run.device) if config.kd else None


def train_step(run, window):
    """One optimizer step; adds what its micro-batches showed to the window, left on the device (`settle`). Returns
    (gradient norm, questions), or None where a signal ended it: a step may take longer than the 30 s that torchrun
    waits. Of several processes none may leave the others alone: the first one saves, and all go on to the step's end
    as far as they get."""
    config, step, world, wire = run.config, run.plan[run.state.step], run.world, run.wire
    weights = {key: getattr(config, key) for key in PARTS}
    asked, mine = sum(len(row) for rows, M in step for row in rows), step[run.rank::world]
    for i, (rows, M) in enumerate(mine):
        if run.stopping and world == 1:
            run.optimizer.zero_grad(set_to_none=True)
            return None
        if run.stopping and not run.rescued:  # weights and Adam's state are those of the last step until this one ends
            run.rescued = save(run)
        batch, teacher = make_batch(run, rows, M)
        # Gradients travel once a step, with the last micro-batch.
        last = world == 1 or i == len(mine) - 1
        with contextlib.nullcontext() if last else run.model.no_sync(), autocast(wire.lm):
            loss, parts, logits = run.model(batch, weights, config.K, config.temperature, teacher)
            (loss * batch.size / asked * world).backward()  # DDP averages over processes, the mean is over questions
        stats, winners = first_token_stats(logits, batch, len(wire.prompt.tokenizer))
        window.append((batch.size, parts | stats, winners))
    norm = torch.nn.utils.clip_grad_norm_(wire.trainable().values(), config.clip).item()
    state = run.state
    if math.isfinite(norm):  # after the all-reduce, so one process's NaN is seen by all
        run.optimizer.step()
        state.skipped_in_a_row = 0
    else:
        state.skipped, state.skipped_in_a_row = state.skipped + 1, state.skipped_in_a_row + 1
        run.note(f"step {state.step + 1}: gradient norm {norm}, step skipped ({state.skipped} so far)")
        if state.skipped_in_a_row == 10:
            raise UserError(f"ten steps in a row were not finite; lower --lr. What is in {run.out}/ckpt is from before")
    run.optimizer.zero_grad(set_to_none=True)
    return norm, asked


def log_steps(run, window, norm, seconds, steps):
    """A record of the steps since the last one, to train_diagnostics.jsonl, training.log and the bar."""
    config, state, windows = run.config, run.state, [settle(window, run.wire.prompt.tokenizer)] * run.world
    if run.world > 1:
        dist.all_gather_object(windows, windows[0])
    if not first_process():
        return
    window = sum(windows, [])  # of all processes
    n, histogram = sum(size for size, *_ in window), sum((words for *_, words in window), Counter())
    mean = lambda key: sum(size * shown.get(key, 0.0) for size, shown, _ in window) / n
    epoch, epoch_step, _ = run.plan.steps[state.step - 1]
    dominant, tf, hit, mode = histogram.most_common(5), mean("tf"), mean("hit"), own_row(config)
    record = {
        "epoch": epoch, "global_step": state.step, "epoch_step": epoch_step + 1, "samples_seen": state.seen,
        "grad_norm": norm, "lr": run.optimizer.param_groups[0]["lr"],
        "sec_per_step": seconds / steps,
        "samples_per_sec": n / seconds, "skipped_steps": state.skipped, "mode": mode, "K": config.K,
        "first_weight": config.first, "prediction_diversity": len(histogram) / n, "dominant_predictions": dominant,
        "models": {run.name: {
            "mode": mode, **{key: mean(key) for key in PARTS if key != "entropy"}, "entropy_loss": mean("entropy"),
            "first_acc": hit, "first_acc_top5": mean("hit5"), "first_entropy": mean("first_entropy"),
            "first_token_logit_stats": {"max_prob": mean("max"), "second_prob": mean("second"),
                                        "margin": mean("max") - mean("second"), "top5_entropy": mean("top5_entropy")},
            "prediction_histogram": dict(histogram.most_common(20))}},
        **memory(run.device)}
    run.keep(append_line, run.out / "logs" / "train_diagnostics.jsonl", json.dumps(record))
    (word, count), distinct = dominant[0], min(20, len(histogram))
    line = f"tf {tf:.2f} first_acc {hit:.2f} distinct {distinct}/{n} {n / seconds:.1f} q/s"
    run.bar.set_postfix_str(line)
    run.keep(append_line, run.out / "logs" / "training.log", f"step {state.step}: {line} grad_norm {norm:.2f}")
    if count > 0.9 * n and n >= 32:
        run.note(f"warning: collapse: {count} of {n} first tokens are {word!r}; lower --lr, raise --entropy or "
                 "--first")


def most(run, *values):
    """The largest that any process has of each value, so that all decide alike; each must ask equally often."""
    shared = torch.tensor(values, dtype=torch.float64)
    if run.world > 1:
        shared = shared.to(run.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.tolist()


class Stopped(Exception):
    """A signal came while the dev slice was being answered."""


def evaluate(run):
    """Dev F1 of the wire's own row, once what is needed can be predicted; keeps the best checkpoint. Every process
    answers all of the questions, so that nothing has to be gathered; after each batch they agree whether a signal came.
    Returns whether one ended it."""
    from tqdm import tqdm
    state, row, groups = run.state, own_row(run.config), list(run.plan.groups)
    random.Random(run.config.seed).shuffle(groups)  # what it is fitted to: the same texts at every call
    bar = tqdm(total=len(run.dev), desc="dev slice", unit="q", leave=False, disable=not first_process())

    def watch(n):  # in time for a checkpoint
        bar.update(n)
        if most(run, float(bool(run.stopping)))[0]:
            raise Stopped
    run.wire.eval()
    try:
        texts = (run.wire.layout.source(run.items[group[0]]) for group in groups if not watch(0))
        run.wire.fit_predictor(texts)
        if run.world > 1 and run.wire.predictor is not None:  # a bit may decide what is kept, and how long they work
            dist.broadcast(run.wire.predictor, 0)
        scores = summary(evaluate_row(row, run.wire.lm, run.wire.prompt.tokenizer, run.wire.prompt, run.dev, run.wire,
                                      batch=min(25, run.config.micro_batch), bar=SimpleNamespace(update=watch)))
    except Stopped:
        return True
    finally:
        bar.close()
        run.wire.train()
    if first_process():
        keep_scores(run, row, scores)
    state.answered = state.step
    return False


def keep_scores(run, row, scores):
    """Write down what the dev slice's answers score, and the weights where they are the best so far."""
    state = run.state
    record = {"kind": "train", "tag": run.out.name, "row": row, "global_step": state.step, "samples_seen": state.seen,
              "n": len(run.dev), **scores, "timestamp": datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")}
    history = run.out / "eval" / "metrics_history.jsonl"
    run.keep(keep_steps, history, state.step - 1)  # of one that was killed after its record
    run.keep(append_line, history, json.dumps(record))
    low, high = scores["f1_ci95"]
    run.note(f"step {state.step}: dev {row} F1 {100 * scores['f1']:.1f} [{100 * low:.1f}, {100 * high:.1f}], EM "
             f"{100 * scores['em']:.1f}, {scores['distinct_first_words']} distinct first words of {len(run.dev)}")
    best, last = run.out / "ckpt" / "best", run.out / "ckpt" / "last"  # never one without the other
    if scores["f1"] > state.best_f1 and (last.exists() or save(run)) and run.keep(
            save_checkpoint, best, run.wire, None, None, torch.float16):
        state.best_f1 = scores["f1"]


def save(run):
    """Write ckpt/last; True where it is written."""
    return not first_process() or run.keep(save_checkpoint, run.out / "ckpt" / "last", run.wire,
                                           optimizer_tensors(run.optimizer, run.wire), asdict(run.state))


def clock(run, began):
    """(share 0..1 of the run that is over, whether to stop now), the same in all processes: they must agree on the
    time and on a signal that only one of them got. Counts the time into the state."""
    run.state.elapsed, stopping = most(run, time.monotonic() - began, float(bool(run.stopping)))
    timed = run.state.elapsed / 60 / run.config.minutes if run.config.minutes else 0.0
    return max(run.state.step / len(run.plan) if len(run.plan) else 1.0, timed), stopping > 0


def due(run):
    """Whether the dev slice is to be answered at this step."""
    every, step = run.config.eval_every, run.state.step
    return bool(every) and step % every == 0 and 0 < step < len(run.plan)


def train(run):
    """Go on with a Run to its end, or to a signal. Returns the exit code."""
    config, state = run.config, run.state
    for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", signal.SIGTERM)):
        signal.signal(number, lambda received, frame: run.stopping.append(received))
    run.wire.train()
    began, window, ticked = time.monotonic() - state.elapsed, [], time.monotonic()
    progress, stop = clock(run, began)
    logged = state.step
    if run.rank == 0 and not (state.finished and progress >= 1):  # logs lose what will be written again
        write_atomic(run.out / "config.json", json.dumps(asdict(config), indent=2) + "\n")
        if run.held:
            held = "".join(json.dumps(asdict(example)) + "\n" for example in run.held)
            write_atomic(run.out / "held_out.jsonl", held)
        for path in (run.out / "logs" / "train_diagnostics.jsonl", run.out / "eval" / "metrics_history.jsonl"):
            keep_steps(path, state.step)
    while progress < 1 and not stop:
        if due(run) and state.answered != state.step:
            paused = time.monotonic()
            if evaluate(run):
                return finish(run, True)
            if not state.skipped_in_a_row:
                save(run)  # with its best F1
            ticked += time.monotonic() - paused
            progress, stop = clock(run, began)
            continue
        run.wire.predictor = None  # it goes with the weights that it was fitted to
        for group in run.optimizer.param_groups:
            group["lr"] = config.lr * group["size"] * lr_factor(progress, config.warmup)
        done = train_step(run, window)
        if done is None:
            return finish(run, True)
        norm, asked = done
        state.step, state.seen, state.finished = state.step + 1, state.seen + asked, False
        if config.minutes and progress:  # the steps that there is time for, so that the bar's ETA is the run's
            run.bar.total = max(state.step, round((state.step - 1) / progress))
        run.bar.update()
        if state.step % config.log_every == 0:
            log_steps(run, window, norm, time.monotonic() - ticked, state.step - logged)
            window, ticked, logged = [], time.monotonic(), state.step
        if state.step % config.save_every == 0 and not due(run) and not state.skipped_in_a_row:
            save(run)
        progress, stop = clock(run, began)
    if state.step > logged and progress >= 1:  # of a short run all there is
        log_steps(run, window, norm, time.monotonic() - ticked, state.step - logged)
    return finish(run, stop and progress < 1)


def finish(run, stopped):
    """Save, and evaluate where the run is over. Returns the exit code."""
    state, out = run.state, run.out
    if not stopped and not state.finished:
        save(run)
        stopped = state.answered != state.step and evaluate(run)
    if stopped:
        if not save(run):
            raise UserError(f"stopped by signal at step {state.step} and not saved; the last checkpoint that is whole "
                            f"is in {out}/ckpt")
        run.note(f"stopped by signal at step {state.step}, saved; go on with --resume")
        return 130 if signal.SIGINT in run.stopping else 0
    if not state.finished:
        state.finished = state.best_f1 >= 0 or not first_process()
        if not save(run) or not state.finished:
            raise UserError(f"the run is over but its weights are not written; make room in {out} and finish it with "
                            "--resume")
    run.bar.close()
    log(f"done: {state.seen} questions in {state.elapsed / 60:.1f} min; next: python eval.py --mode all --ckpt "
        f"{out}/ckpt/best --data {unseen(run.config)}")
    return 0


if __name__ == "__main__":
    run_main(main)
