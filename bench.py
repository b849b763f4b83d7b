"""
Measure: ratios against what one would otherwise write, side by side in one run. Prints tables, writes OUT/bench.json.

    python bench.py all                                   # every part, on SmolLM2-135M and synthetic passages
    python bench.py train answer --data train-v1.1.json.gz
    python bench.py plan                                  # no run: memory and time on GPUs, from arithmetic

    train    a training step against transformers.Trainer + peft, and what each saving brings
    answer   prompt to last answer token: text, latents, latents already made, text cut to the same budget
    scale    encoder and step from 128 to 8,192 context tokens, with fitted growth exponents
    ddp      one process against two (gloo, a thread each)
    plan     Llama-3.1-8B and 70B on 1 to 64 H100s

Contenders alternate and medians are reported, so that a machine that slows down slows all of them. What takes long is
repeated less (each table says how often). All but one row is of --scope context, the wire that encodes a text once for all
questions. The ordinary trainer needs requirements-bench.txt (peft, accelerate).
"""
import contextlib
import ctypes
import functools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from common import Parser, UserError, log, run_main, write_atomic

PARTS = ("train", "answer", "scale", "ddp", "plan")


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("parts", nargs="+", help=f"some of {', '.join(PARTS)}, or all")
    p.add_argument("--lm", default="smollm2-135m", help="language model (default smollm2-135m)")
    p.add_argument("--data", default="synthetic", help="where texts come from (default synthetic)")
    p.add_argument("--repeats", type=int, default=5, help="of each measurement; medians are reported (default 5)")
    p.add_argument("--batch", type=int, default=15, help="questions a step in `train` (default 15)")
    p.add_argument("--out", default="runs/bench", help="folder (default runs/bench)")
    p.add_argument("--device", help="cuda or cpu (default: a GPU where there is one)")
    p.add_argument("--peak", choices=("ours", "checkpointed", "ordinary"), help="measure this contender's peak memory alone, in this process (what `train` calls)")
    return p.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()

import numpy as np
import torch

from data import LATENT, PAD, Prompt, collate, epoch_plan, group_by_context, load_data, pack
from lm import embed, load_lm, pick_device
from model import LatentWire, WireConfig, mean_embedding

OURS, BASE = "train.py's step", "Trainer + peft"
WEIGHTS = {"tf": 1.0, "first": 0.5}
RECIPE = dict(prompt="plain", lora_rank=16, lora_alpha=32.0, lora_targets="q,v,o")


def on_gpu():
    return pick_device(args.device)[0].type == "cuda"


def sync():
    if on_gpu():
        torch.cuda.synchronize()


def seconds(run):
    sync()
    began = time.perf_counter()
    run()
    sync()
    return time.perf_counter() - began


def side_by_side(contenders, repeats, enough=math.inf):
    """({name: median seconds}, repeats) of {name: function}; they alternate, in another order each round, since what ran before
    one leaves it caches and memory. The first round is a warm-up; none begins after `enough` seconds, and if the first
    alone took as long, it is the one that counts."""
    rounds, began = [], time.perf_counter()
    while not rounds or len(rounds) <= repeats and time.perf_counter() - began < enough:
        order = random.Random(len(rounds)).sample(list(contenders), len(contenders))
        rounds.append({name: seconds(contenders[name]) for name in order})
    rounds = rounds[1:] or rounds
    return {name: statistics.median(taken[name] for taken in rounds) for name in contenders}, len(rounds)


def peak_bytes(run):
    """(bytes that a run needs on top of what is held before it, bytes in all), at its peak; NaN where the system does not say."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_allocated()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # hands freed memory back, so that it is not mistaken for held
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
        resident = lambda key: int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024
        before = resident("VmRSS")
    except OSError:
        run()
        return math.nan, math.nan
    run()
    return resident("VmHWM") - before, resident("VmHWM")


def table(head, rows):
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(f"{cell!s:<{width}}" if i == 0 else f"{cell!s:>{width}}" for i, (cell, width) in enumerate(zip(row, widths))))
    print(flush=True)


@functools.cache
def examples():
    """Examples in random order, those of a paragraph one after the other."""
    paragraphs = {}
    for example in load_data(args.data, "train", 2000 if args.data == "synthetic" else None):
        paragraphs.setdefault(example.context, []).append(example)
    return [example for group in random.Random(0).sample(list(paragraphs.values()), len(paragraphs)) for example in group]


def setup(**changes):
    """(lm, prompt, wire, items): a fresh LM with the recipe's wire around it, and 32 batches of tokenised examples."""
    torch.manual_seed(0)
    lm, tokenizer = load_lm(args.lm, device=args.device)
    wire = LatentWire(lm, WireConfig(lm=args.lm, **{**RECIPE, **changes})).train()
    prompt = Prompt(tokenizer, "plain", 20_000)
    return lm, prompt, wire, prompt.items(examples()[:32 * args.batch])


def matmul_rate(lm, shapes, repeats=20):
    """FLOP/s that torch.mm reaches at the LM's shapes (rows, in, out): the machine's own limit for a step."""
    new = lambda *shape: torch.randn(shape, device=lm.device, dtype=lm.dtype)
    pairs = [(new(n, i), new(i, o)) for n, i, o in shapes]
    run = lambda: [a @ b for a, b in pairs]
    run()
    taken = statistics.median(seconds(run) for _ in range(repeats))
    return sum(2 * n * i * o for n, i, o in shapes) / taken


# ------------------------------------------------------------------------------------------------
# train

STEPS = 2  # of a pass, over which every contender sees the same questions once


def full_logits_loss(wire, batch):
    """The wire's loss with the head applied to every position, as model(labels=...) does."""
    from losses import wire_loss
    prefix, _ = wire.encode(batch.context, batch.latents)
    embeds, S = embed(wire.lm, batch.ids, prefix), batch.ids.shape[1]
    own = (batch.segment[:, None, :] == batch.segment[:, :, None]) | (batch.segment[:, None, :] == 0)
    mask = (torch.ones(S, S, dtype=torch.bool, device=embeds.device).tril() & own)[:, None]
    hidden = wire.lm.model(inputs_embeds=embeds, attention_mask=mask, position_ids=batch.position, use_cache=False).last_hidden_state
    return wire_loss(wire.lm.get_output_embeddings()(hidden)[batch.row, batch.col], batch, WEIGHTS)[0]


def graph_below_loss(wire, batch):
    """The wire's loss where the encoder's frozen layers keep a graph, as they do unless one sees to it."""
    wire.hidden = lambda embeds, lead=0: LatentWire.hidden.__wrapped__(wire, embeds.detach().requires_grad_(), lead)
    try:
        return wire.loss(batch, WEIGHTS)[0]
    finally:
        del wire.hidden


def peft_wire():
    """A wire whose LoRA is peft's; off, as ours is, while the encoder's frozen layers read."""
    wire = setup(lora_rank=0)[2]
    peft_module().inject_adapter_in_model(peft_lora(), wire.lm)
    tuned = [module for module in wire.lm.modules() if isinstance(module, peft_module().tuners.tuners_utils.BaseTunerLayer)]

    def hidden(embeds, lead=0):
        for module in tuned:
            module.enable_adapters(False)
        h = LatentWire.hidden(wire, embeds, lead)
        for module in tuned:
            module.enable_adapters(True)
        return h
    wire.hidden = hidden
    return wire


def one_pass(prompt, wire, steps, loss, scope="context"):
    """A function that trains on every one of the steps, lists of rows of items, once, as train.py does."""
    params = list(wire.trainable().values())
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=wire.lm.device.type == "cuda")
    autocast = torch.autocast("cuda", torch.bfloat16) if wire.lm.device.type == "cuda" else contextlib.nullcontext()

    def run():
        for rows in steps:
            with autocast:
                value = loss(wire, collate(prompt, rows, scope, wire.count).to(wire.lm.device))
            value.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            value.item()  # what a log costs: wait for the device
    return run


def plan_steps(items):
    """STEPS batches of rows of up to 5 questions of one paragraph, from short to long ones, as train.py's plan puts them
    together from a pool of 32 batches."""
    groups, lengths = group_by_context(items), [len(item.context) for item in items]
    steps = [[[items[i] for i in row] for row in step[0]] for step in epoch_plan(groups, lengths, args.batch, args.batch, 0, 0, 5)]
    steps.sort(key=lambda rows: max(len(row[0].context) for row in rows))
    return [steps[(2 * i + 1) * len(steps) // (2 * STEPS)] for i in range(STEPS)]


def peft_module():
    try:
        import peft
    except ImportError:
        raise UserError("the ordinary trainer needs peft: pip install -r requirements-bench.txt") from None
    return peft


def peft_lora():
    """RECIPE's LoRA."""
    return peft_module().LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj", "o_proj"])


def ordinary(items, folder):
    """A function that trains on the items once in the ordinary way: transformers.Trainer, peft's LoRA, the same encoder as a
    module, one question a row, padding to the longest of a random batch, logits of the whole sequence."""
    peft = peft_module()
    from transformers import PrinterCallback, Trainer, TrainingArguments
    lm, prompt, wire, _ = setup(lora_rank=0)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.adapter = wire.encoder, wire.adapter
            self.lm = peft.get_peft_model(lm, peft_lora())

        def forward(self, context, latents, ids, attention_mask, labels):
            mask, embeds = context != PAD, embed(lm, context)
            with torch.no_grad(), self.lm.disable_adapter():
                h = wire.lower(inputs_embeds=embeds, attention_mask=mask.long(), use_cache=False).last_hidden_state
            z, attention = self.encoder(h.float(), mask, latents, context, embeds, torch.zeros_like(latents))
            prefix = self.adapter(z, mean_embedding(attention, embeds.float()))
            return self.lm(inputs_embeds=embed(lm, ids, prefix), attention_mask=attention_mask, labels=labels, use_cache=False)

    def rows(batch):
        made = collate(prompt, [[item] for item in batch], "context", wire.count)
        labels = torch.full_like(made.ids, -100)
        inside = made.col + 1 < labels.shape[1]  # a row's last answer token is predicted, never read
        labels[made.row[inside], made.col[inside] + 1] = made.label[inside]
        return {"context": made.context, "latents": made.latents, "ids": made.ids, "attention_mask": (made.ids != PAD).long(), "labels": labels}

    on_gpu = lm.device.type == "cuda"
    settings = TrainingArguments(output_dir=folder, per_device_train_batch_size=args.batch, num_train_epochs=1, learning_rate=1e-4, report_to=[], bf16=on_gpu,
                                 save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=not on_gpu, remove_unused_columns=False,
                                 dataloader_pin_memory=False)
    trainer = Trainer(model=Model(), args=settings, train_dataset=items, data_collator=rows)
    trainer.remove_callback(PrinterCallback)
    return trainer.train


def bench_train():
    lm, prompt, wire, items = setup()
    packed = plan_steps(items)
    questions = [item for rows in packed for row in rows for item in row]
    single = [[[item] for row in rows for item in row] for rows in packed]
    order = np.random.default_rng(0).permutation(len(questions))
    mixed = [[[questions[i]] for i in part] for part in np.array_split(order, STEPS)]
    loss = lambda wire, batch: wire.loss(batch, WEIGHTS)[0]

    def checkpointed(wire, batch):
        wire.lm.gradient_checkpointing_enable({"use_reentrant": False})
        value = loss(wire, batch)
        wire.lm.gradient_checkpointing_disable()
        return value

    asked = setup(scope="asked")[2]
    ours = lambda steps, loss, wire=wire, scope="context": one_pass(prompt, wire, steps, loss, scope)
    with tempfile.TemporaryDirectory() as folder:
        times, repeats = side_by_side({
            BASE: ordinary(questions, folder), OURS: ours(packed, loss), "  without packing": ours(single, loss),
            "  without packing and bucketing": ours(mixed, loss), "  with logits of every position": ours(packed, full_logits_loss),
            "  with a graph under the frozen layers": ours(packed, graph_below_loss), "  with peft's LoRA": ours(packed, loss, peft_wire()),
            "  with --grad_checkpoint": ours(packed, checkpointed),
            "  with --scope asked (cannot pack)": ours(single, lambda wire, batch: wire.loss(batch, {**WEIGHTS, "find": 0.3})[0], asked, "asked")}, args.repeats)
    peaks = {name: peak(name) for name in ("ours", "checkpointed", "ordinary")}
    rate = {name: len(questions) / taken for name, taken in times.items()}
    table([f"{len(questions)} questions, {STEPS} steps, {repeats} repeats", "questions/s", "of " + BASE],
          [[name, f"{value:.1f}", f"{value / rate[BASE]:.2f}x"] for name, value in rate.items()])
    table(["peak memory, GB", "in all", "of its", "for the steps", "of its"], [
        [label, f"{peaks[name]['total']:.2f}", f"{peaks[name]['total'] / peaks['ordinary']['total']:.2f}x", f"{peaks[name]['steps']:.2f}",
         f"{peaks[name]['steps'] / peaks['ordinary']['steps']:.2f}x"] for name, label in (("ordinary", BASE), ("ours", OURS), ("checkpointed", "  with --grad_checkpoint"))])
    batches = [collate(prompt, rows, "context", wire.count) for rows in packed]
    flops = sum(step_flops(wire, batch) for batch in batches)
    d, hidden, read = lm.config.hidden_size, lm.config.intermediate_size, batches[1].ids.numel()
    limit = matmul_rate(lm, [(read, d, hidden), (read, hidden, d), (read, d, d)])
    share = flops / times[OURS] / limit
    print(f"matrix multiplies of a step: {flops / STEPS / 1e9:.0f} GFLOP in {times[OURS] / STEPS:.2f} s, {share:.0%} of the {limit / 1e9:.0f} GFLOP/s that "
          f"torch.mm reaches at these shapes\n")
    return {"questions_per_s": rate, "repeats": repeats, "peak_gb": peaks, "matmul_share": share, "matmul_flops_per_s": limit}


def step_flops(wire, batch):
    """Matrix-multiply FLOPs of a step: 2 per weight and token forward and 2 for the input gradient, and for what is trained 2
    more for its own. Products of tokens with tokens in attention are left out."""
    config, layers = wire.lm.config, wire.lm.model.layers
    count = lambda parameters, trained: sum(p.numel() for p in parameters if p.dim() == 2 and p.requires_grad == trained)
    frozen, lora = count(layers.parameters(), False), count(layers.parameters(), True)
    lower, encoder = count(wire.lower.layers.parameters(), False), count([*wire.encoder.parameters(), *wire.adapter.parameters()], True)
    read, context, answer = batch.ids.numel(), batch.context.numel(), len(batch.label)
    return (4 * frozen + 6 * lora) * read + (2 * lower + 6 * encoder) * context + 4 * config.vocab_size * config.hidden_size * answer


def peak(contender):
    """{"total", "steps"}: peak memory in GB of one contender's pass in a process of its own, in all and above what was held before."""
    done = subprocess.run([sys.executable, __file__, "train", "--peak", contender, "--lm", args.lm, "--data", args.data, "--batch", str(args.batch),
                           *(["--device", args.device] if args.device else [])], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"measuring {contender} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak_of_steps():
    lm, prompt, wire, items = setup()
    packed = plan_steps(items)
    with tempfile.TemporaryDirectory() as folder:
        if args.peak == "ordinary":
            del lm, wire
            run = ordinary([item for rows in packed for row in rows for item in row], folder)
        else:
            if args.peak == "checkpointed":
                lm.gradient_checkpointing_enable({"use_reentrant": False})
            run = one_pass(prompt, wire, packed, lambda wire, batch: wire.loss(batch, WEIGHTS)[0])
        steps, total = peak_bytes(run)
    print(json.dumps({"total": total / 1e9, "steps": steps / 1e9}))


# ------------------------------------------------------------------------------------------------
# answer

SIZES, NEW = (128, 246, 256, 512, 1024, 2048), 8


def long_text(items, length):
    """Token ids (length,) of real contexts, one after the other."""
    texts, total = [], 0
    for group in group_by_context(items):
        texts.append(items[group[0]].context)
        total += len(texts[-1])
        if total >= length:
            break
    text = np.concatenate(texts)
    return np.resize(text, length)


@torch.no_grad()
def bench_answer():
    lm, prompt, wire, items = setup()
    wire.eval()
    results, rows = {}, []
    asked = prompt.asked(items[0], "context")
    for batch in (1, 25):
        for T in SIZES if batch == 1 or on_gpu() else SIZES[:-1]:  # the last cell takes a CPU minutes a round
            context = torch.from_numpy(long_text(items, T).astype(np.int64)).to(lm.device)[None].expand(batch, -1)
            stack = lambda *parts: torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(lm.device)[None].expand(batch, -1)
            before, M = np.concatenate([prompt.pre, prompt.head]), torch.full((batch,), 32, device=lm.device)
            text = stack(before, context[0].cpu().numpy(), asked)
            cut = stack(before, context[0, :32].cpu().numpy(), asked)
            latent = stack(before, np.full(32, LATENT), asked)
            ready, cache = wire.encode(context, M)[0], {}

            def answer(name, ids, prefix=None):
                inputs = {"inputs_embeds": embed(lm, ids, prefix)} if prefix is not None else {"input_ids": ids}
                out = lm.generate(**inputs, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
                cache[name] = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers) / 1e6 / batch
            times, repeats = side_by_side({
                "text": lambda: answer("text", text), "encoder + latents": lambda: answer("made", latent, wire.encode(context, M)[0]),
                "latents ready": lambda: answer("latents", latent, ready), "first 32 tokens": lambda: answer("cut", cut)}, args.repeats, 20)
            rows.append([f"{batch} x {T}", *(f"{1e3 * taken:.0f}" for taken in times.values()), f"{times['text'] / times['encoder + latents']:.1f}x",
                         f"{times['text'] / times['latents ready']:.1f}x", f"{cache['text']:.1f}", f"{cache['latents']:.1f}", repeats])
            results[f"{batch}x{T}"] = {"seconds": times, "repeats": repeats, "kv_cache_mb": cache, "kv_cache_mb_computed": {
                name: kv_bytes(lm.config, len(ids[0]) + NEW - 1, lm.dtype.itemsize) / 1e6 for name, ids in (("text", text), ("latents", latent))}}
            log(f"answer: {batch} x {T} done")
    table(["batch x context", "text ms", "encoder + latents", "latents ready", "first 32 tokens", "speed-up", "ready", "KV MB", "KV MB latents", "repeats"], rows)
    return results


def kv_bytes(config, tokens, bytes_per_value):
    """Keys and values of every layer: 2 x layers x KV heads x head width x tokens."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * tokens * bytes_per_value


# ------------------------------------------------------------------------------------------------
# scale

def bench_scale():
    lm, prompt, wire, items = setup()
    lengths, rows, results = (128, 256, 512, 1024, 2048, 4096, 8192), [], {}
    params = list(wire.trainable().values())
    for rule in ("M = 32", "T / M = 8"):
        encode_s, step_s, peaks = [], [], []
        for T in lengths:
            context = long_text(items, T)
            M = 32 if rule == "M = 32" else T // 8
            row = [(prompt.prefix(items[0], "context", M), [(prompt.asked(items[0], "context"), items[0].answer)])]
            batch = pack(row, [context], [M]).to(lm.device)

            def encode():
                with torch.no_grad():
                    wire.encode(batch.context, batch.latents)

            def step():
                wire.loss(batch, WEIGHTS)[0].backward()
                for p in params:
                    p.grad = None
            times, repeats = side_by_side({"encode": encode, "step": step}, args.repeats, 10)
            encode_s.append(times["encode"])
            step_s.append(times["step"])
            peaks.append(peak_bytes(step)[0])
            rows.append([f"{rule}, {T}", f"{1e3 * times['encode']:.0f}", f"{1e3 * times['step']:.0f}", f"{peaks[-1] / 1e6:.0f}", repeats])
            log(f"scale: {rule}, {T} tokens done")
        long = slice(2, None)  # below 512 tokens fixed costs rule
        grow = {name: float(np.polyfit(np.log(lengths[long]), np.log(taken[long]), 1)[0]) for name, taken in (("encode", encode_s), ("step", step_s), ("memory", peaks))}
        results[rule] = {"lengths": lengths, "encode_s": encode_s, "step_s": step_s, "peak_bytes": peaks, "exponents": grow}
    table(["context tokens", "encode ms", "step ms", "step's peak MB", "repeats"], rows)
    for rule, result in results.items():
        print(f"{rule}, from 512 tokens on: " + ", ".join(f"{name} grows as T^{power:.2f}" for name, power in result["exponents"].items()))
    return results


# ------------------------------------------------------------------------------------------------
# ddp

def sent_bytes():
    """What this machine's network interfaces, the loopback among them, have sent so far; NaN where the system does not say."""
    try:
        return sum(int(line.split(":")[1].split()[8]) for line in Path("/proc/net/dev").read_text().splitlines()[2:])
    except OSError:
        return math.nan


def bench_ddp():
    """On synthetic passages, four steps each time, two times."""
    found, steps, travelled = {1: [], 2: []}, 4, {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn, world in enumerate((1, 2, 1, 2)):
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", "train.py", "--preset", "demo", "--lm", args.lm,
                       "--samples", str(40 * steps), "--minutes", "0", "--epochs", "1", "--batch", "40", "--micro_batch", "20", "--pack", "5", "--ramp", "0",
                       "--eval_samples", "5", "--log_every", "1", "--warmup", "0", "--device", "cpu", "--out", f"{folder}/{turn}"]
            before = sent_bytes()
            done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            if done.returncode:
                why = [line for line in done.stderr.splitlines() if line.startswith("error:")] or done.stderr.strip().splitlines()
                raise UserError(f"{world} process(es): {why[-1]}")
            travelled[world].append(sent_bytes() - before)
            found[world] += [[json.loads(line) for line in open(f"{folder}/{turn}/logs/train_diagnostics.jsonl")]]
            log(f"ddp: {world} process(es) done")
    results = {world: {"samples_per_s": statistics.median(line["samples_per_sec"] for lines in runs for line in lines[1:]),
                       "tf": [next(iter(line["models"].values()))["tf"] for line in runs[0]]} for world, runs in found.items()}
    _, _, wire, _ = setup()
    measured = (min(travelled[2]) - min(travelled[1])) / steps / 2
    sent = sum(p.numel() for p in wire.trainable().values()) * 4
    ratio = results[2]["samples_per_s"] / results[1]["samples_per_s"]
    apart = max(abs(a - b) for a, b in zip(results[1]["tf"], results[2]["tf"]))
    table(["processes", "questions/s"], [[world, f"{result['samples_per_s']:.2f}"] for world, result in results.items()])
    print(f"two processes: {ratio:.2f}x the samples/s of one; {sent / 1e6:.1f} MB of gradients a step, {measured / 1e6:.1f} MB sent by each process "
          f"(the language model would be {4e-6 * sum(p.numel() for p in wire.lm.parameters()):.0f}); the loss curves differ by at most {apart:.1e}\n")
    return {"ratio": ratio, "bytes_per_step": sent, "bytes_per_step_measured": measured, "loss_difference": apart, **{str(world): result for world, result in results.items()}}


# ------------------------------------------------------------------------------------------------
# plan

MODELS = {  # layers, width, KV width, MLP width, vocabulary
    "Llama-3.1-8B": (32, 4096, 1024, 14336, 128256), "Llama-3.1-70B": (80, 8192, 1024, 28672, 128256)}
# Per GPU: bf16 dense, NVLink one way within a node of 8 (NVIDIA's data sheet); between nodes 400 Gbit/s InfiniBand.
H100 = {"memory": 80e9, "flops": 989e12, "node": 8, "link": 450e9, "network": 50e9}


def plan(model, gpus, batch, context=246, latents=32, asked=24, template=45, answer=6, rank=32, d_z=512, utilisation=0.4, micro=16, shard=False):
    """Memory in bytes by part and seconds a step, per GPU, for scope asked. batch: questions over all GPUs, one a row, at
    most `micro` at a time; template: tokens that the chat template puts around a question; utilisation: the share of peak
    that matrix multiplies reach, assumed; shard: train.py --shard."""
    layers, d, kv, mlp, vocabulary = MODELS[model]
    per_layer = 2 * d * d + 2 * d * kv + 3 * d * mlp
    lora = layers * rank * (2 * (d + d) + 2 * (d + kv) + 3 * (d + mlp))  # A and B of all seven projections
    encoder = d * d_z + 2 * 12 * d_z * d_z + d_z * d + d_z * d_z         # two blocks, projections in and out, value
    trained = lora + encoder
    rows = batch / gpus
    at_once, read, seen = min(rows, micro), latents + template + asked + answer, context + asked
    # Forward 2 FLOPs a weight and token; backward the input's gradient, 2 more, and a trained weight's own, 2 more. Products of
    # tokens with tokens are left out: below 1% at these lengths.
    flops = rows * (4 * layers * per_layer * read + 2 * (layers // 3 * 2) * per_layer * seen + 4 * vocabulary * d * answer + 6 * lora * read + 6 * encoder * seen)
    # Sharded (FSDP2): embeddings and head whole, 1/n of the layers and two whole ones, the one at work and the one on its way.
    held = (2 * layers * per_layer / gpus + 2 * 2 * per_layer if shard else 2 * layers * per_layer) + 2 * 2 * vocabulary * d
    # Kept per token and layer for the backward pass, in bf16 elements: for each of two norms its float32 input (2 d) and its
    # output (d), which LoRA's A needs; q and attention's output (2 d); o's and the residual's inputs (2 d); k and v; four of the
    # MLP (gate, up, silu, product). Frozen weights need no other input, frozen lower layers nothing at all (the count of Korthikanti et
    # al., arXiv 2205.05198, redone for this block). The encoder's two blocks: 34 d_z a token, float32.
    activations = at_once * (read * layers * (10 * d + 2 * kv + 4 * mlp) * 2 + seen * 2 * 34 * d_z * 4)
    memory = {"weights": held, "trained": 4 * trained, "gradients": 4 * trained, "optimizer": 8 * trained,
              "activations": activations, "logits": at_once * answer * vocabulary * 4 * 3}
    reduce = 4 * trained * 2 * (gpus - 1) / gpus  # ring all-reduce sends 2 (n-1)/n of the gradients
    # Sharded layers are gathered for each pass through them: the encoder's, the forward and the backward one, once a micro-batch.
    gather = 2 * layers * per_layer * (2 + 2 / 3) * math.ceil(rows / micro) * (gpus - 1) / gpus if shard else 0
    link = H100["link"] if gpus <= H100["node"] else H100["network"]
    seconds = max(flops / (H100["flops"] * utilisation), gather / link) + reduce / link  # the next layer travels while one works
    return {"memory": memory, "total": sum(memory.values()), "flops": flops * gpus, "reduce_bytes": reduce, "gather_bytes": gather,
            "seconds": seconds, "samples_per_s": batch / seconds, "utilisation": flops / H100["flops"] / seconds}


def bench_plan():
    rows, results = [], {}
    for model, shard in (("Llama-3.1-8B", False), ("Llama-3.1-70B", False), ("Llama-3.1-70B", True)):
        for gpus in (1, 4, 8, 64):
            if shard and gpus == 1:
                continue
            batch, name = 64 * gpus, model + (" --shard" if shard else "")
            p = plan(model, gpus, batch, shard=shard, micro=1)
            one = p["memory"]["activations"] + p["memory"]["logits"]
            largest = max(0, int((0.9 * H100["memory"] - p["total"] + one) / one))  # a tenth for CUDA itself and what lies between blocks
            micro = max([m for m in (1, 2, 4, 8, 16) if m <= largest], default=1)
            p = plan(model, gpus, batch, shard=shard, micro=micro)
            results[f"{name} x {gpus}"] = {**p, "largest_batch": largest * gpus, "micro_batch": micro}
            rows.append([f"{name}, {gpus} GPU(s)", f"{p['memory']['weights'] / 1e9:.0f}", *([
                micro, f"{(p['total'] - p['memory']['weights']) / 1e9:.0f}", f"{p['flops'] / 1e12:.0f}", f"{(p['reduce_bytes'] + p['gather_bytes']) / 1e9:.1f}",
                f"{p['samples_per_s']:.0f}", f"{p['utilisation']:.0%}", largest * gpus] if largest else ["-"] * 6 + ["does not fit"])])
    table(["64 questions a GPU", "weights GB", "at once", "rest GB", "TFLOP/step", "sent GB", "questions/s", "of peak", "largest at once"], rows)
    p = plan("Llama-3.1-8B", 4, 64)
    print(f"Multiplies at an assumed 40% of peak. The specification's run, batch 64 on 4 GPUs: 2.6 s a step, 17.7 GB allocated in all, 56% of memory used.\n"
          f"The plan for it: {p['seconds']:.2f} s a step and {p['total'] / 1e9:.0f} GB a GPU; 2.6 s would be {p['flops'] / 4 / 2.6 / H100['flops']:.1%} of peak.\n")
    return results


def main():
    parts = PARTS if "all" in args.parts else args.parts
    for part in parts:
        if part not in PARTS:
            raise UserError(f"{part} is unknown; there are {', '.join(PARTS)}, all")
    if args.peak:
        return peak_of_steps()
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers renames its checkpointing methods
    device = torch.cuda.get_device_name() if on_gpu() else f"{torch.get_num_threads()} CPU threads"
    path = Path(args.out) / "bench.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for part in parts:
        print(f"== {part} ({args.lm}, {device})", flush=True)
        found[part] = {"device": device, "lm": args.lm, "result": globals()[f"bench_{part}"]()}
        write_atomic(path, json.dumps(found, indent=2) + "\n")
    log(f"written: {path}")


if __name__ == "__main__":
    run_main(main)
