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

Contenders alternate and medians are reported, so that a machine that slows down slows all of them. The ordinary trainer
needs requirements-bench.txt (peft, accelerate).
"""
import ctypes
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
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
from lm import embed, load_lm
from model import LatentWire, WireConfig

OURS = "train.py's step"
WEIGHTS = {"tf": 1.0, "first": 0.5}
RECIPE = dict(prompt="plain", lora_rank=16, lora_alpha=32.0, lora_targets="q,v,o")


def sync():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run):
    sync()
    began = time.perf_counter()
    run()
    sync()
    return time.perf_counter() - began


def side_by_side(contenders, repeats):
    """{name: median seconds} of {name: function}; they alternate, after one warm-up round each."""
    times = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, run in contenders.items():
            taken = seconds(run)
            if repeat:
                times[name].append(taken)
    return {name: statistics.median(taken) for name, taken in times.items()}


def peak_bytes(run):
    """Bytes that a run needs on top of what is held before it, at its peak; None where the system does not say."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # hands freed memory back, so that it is not mistaken for held
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
        resident = lambda key: int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024
        before = resident("VmRSS")
        run()
        return resident("VmHWM") - before
    except OSError:
        return None


def table(head, rows):
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(f"{cell!s:<{width}}" if i == 0 else f"{cell!s:>{width}}" for i, (cell, width) in enumerate(zip(row, widths))))
    print(flush=True)


def setup(**changes):
    """(lm, prompt, wire, items): a fresh LM with the recipe's wire around it, and tokenised examples."""
    torch.manual_seed(0)
    lm, tokenizer = load_lm(args.lm, device=args.device)
    wire = LatentWire(lm, WireConfig(lm=args.lm, **{**RECIPE, **changes})).train()
    prompt = Prompt(tokenizer, "plain", 20_000)
    items = prompt.items(load_data(args.data, "train", 2000))
    return lm, prompt, wire, items


def matmul_rate(shapes, repeats=20):
    """FLOP/s that torch.mm reaches at the LM's shapes (rows, in, out): the machine's own limit for a step."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    pairs = [(torch.randn(n, i, device=device, dtype=dtype), torch.randn(i, o, device=device, dtype=dtype)) for n, i, o in shapes]
    run = lambda: [a @ b for a, b in pairs]
    run()
    taken = statistics.median(seconds(run) for _ in range(repeats))
    return sum(2 * n * i * o for n, i, o in shapes) / taken


# ------------------------------------------------------------------------------------------------
# train

def full_logits_loss(wire, batch):
    """The wire's loss with the head applied to every position, as model(labels=...) does."""
    from losses import wire_loss
    prefix, _ = wire.encode(batch.context, batch.latents)
    embeds, S = embed(wire.lm, batch.ids, prefix), batch.ids.shape[1]
    own = (batch.segment[:, None, :] == batch.segment[:, :, None]) | (batch.segment[:, None, :] == 0)
    mask = (torch.ones(S, S, dtype=torch.bool, device=embeds.device).tril() & own)[:, None]
    hidden = wire.lm.model(inputs_embeds=embeds, attention_mask=mask, position_ids=batch.position, use_cache=False).last_hidden_state
    return wire_loss(wire.lm.get_output_embeddings()(hidden)[batch.row, batch.col], batch, WEIGHTS)[0]


def stepper(wire, batches, loss):
    """A function that does one optimizer step on the next of the batches."""
    params = list(wire.trainable().values())
    optimizer = torch.optim.AdamW(params, lr=1e-4)
    turn = itertools.cycle(batches)

    def step():
        loss(next(turn)).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def batches_of(prompt, items, wire, per_row, bucketed=True):
    """A few batches of args.batch questions, as train.py's plan makes them, or in random order."""
    if bucketed:
        plan = epoch_plan(group_by_context(items), [len(item.context) for item in items], args.batch, args.batch, 0, 0, per_row)[:8]
        rows = [[[items[i] for i in row] for row in step[0]] for step in plan]
    else:
        order = np.random.default_rng(0).permutation(len(items))[:8 * args.batch].reshape(8, -1)
        rows = [[[items[i]] for i in step] for step in order]
    return [collate(prompt, step, "context", wire.count).to(wire.lm.device) for step in rows]


def peft_module():
    try:
        import peft
    except ImportError:
        raise UserError("the ordinary trainer needs peft: pip install -r requirements-bench.txt") from None
    return peft


def peft_lora():
    """RECIPE's LoRA."""
    return peft_module().LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj", "o_proj"])


def ordinary(items, prompt, steps):
    """Seconds per step of the ordinary way: transformers.Trainer, peft LoRA, the same encoder as a module, one question a row,
    padding to the longest of a random batch, logits of the whole sequence."""
    peft = peft_module()
    from transformers import Trainer, TrainingArguments
    torch.manual_seed(0)
    lm, _ = load_lm(args.lm, device=args.device)
    wire = LatentWire(lm, WireConfig(lm=args.lm, **{**RECIPE, "lora_rank": 0}))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.adapter = wire.encoder, wire.adapter
            self.lm = peft.get_peft_model(lm, peft_lora())

        def forward(self, context, latents, ids, attention_mask, labels):
            mask = context != PAD
            with torch.no_grad(), self.lm.disable_adapter():
                h = lm(input_ids=context.clamp(min=0), attention_mask=mask.long(), output_hidden_states=True).hidden_states[lm.config.num_hidden_layers // 3]
            z, attention = self.encoder(h, mask, latents, context, None, None)
            prefix = self.adapter(z, attention @ embed(lm, context))
            return self.lm(inputs_embeds=embed(lm, ids, prefix), attention_mask=attention_mask, labels=labels)

    def rows(batch):
        made = pack([(prompt.prefix(item, "context", wire.count(len(item.context))), [(prompt.asked(item, "context"), item.answer)]) for item in batch],
                    [item.context for item in batch], [wire.count(len(item.context)) for item in batch])
        labels = torch.full_like(made.ids, -100)
        inside = made.col + 1 < labels.shape[1]  # a row's last answer token is predicted, never read
        labels[made.row[inside], made.col[inside] + 1] = made.label[inside]
        return {"context": made.context, "latents": made.latents, "ids": made.ids, "attention_mask": (made.ids != PAD).long(), "labels": labels}

    taken = []
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(output_dir=folder, per_device_train_batch_size=args.batch, max_steps=steps, learning_rate=1e-4, report_to=[],
                                     save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
                                     remove_unused_columns=False, dataloader_pin_memory=False)
        trainer = Trainer(model=Model(), args=settings, train_dataset=items, data_collator=rows)
        plain = trainer.training_step

        def timed(*given, **named):
            taken.append(time.perf_counter())
            return plain(*given, **named)
        trainer.training_step = timed
        trainer.train()
        sync()
        taken.append(time.perf_counter())
    return np.diff(taken)


def bench_train():
    lm, prompt, wire, items = setup()
    loss = lambda batch: wire.loss(batch, WEIGHTS)[0]
    packed, single = batches_of(prompt, items, wire, 5), batches_of(prompt, items, wire, 1)
    random = batches_of(prompt, items, wire, 1, bucketed=False)

    def graph_below(batch):  # what a graph under the frozen layers would cost
        embeds = embed(lm, batch.context).requires_grad_()
        wire.lower(inputs_embeds=embeds, attention_mask=None, use_cache=False).last_hidden_state.sum().backward()
        return loss(batch)

    def checkpointed(batch):  # what --grad_checkpoint costs
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        value = loss(batch)
        lm.gradient_checkpointing_disable()
        return value

    theirs_lm, _, with_peft, _ = setup(lora_rank=0)
    peft_module().inject_adapter_in_model(peft_lora(), theirs_lm)
    contenders = {OURS: stepper(wire, packed, loss), "  without packing": stepper(wire, single, loss),
                  "  without packing and bucketing": stepper(wire, random, loss),
                  "  with logits of every position": stepper(wire, packed, lambda batch: full_logits_loss(wire, batch)),
                  "  with a graph under the frozen layers": stepper(wire, packed, graph_below),
                  "  with peft's LoRA": stepper(with_peft, packed, lambda batch: with_peft.loss(batch, WEIGHTS)[0]),
                  "  with --grad_checkpoint": stepper(wire, packed, checkpointed)}
    times = side_by_side(contenders, args.repeats)
    questions = statistics.mean(batch.size for batch in packed)
    theirs = statistics.median(ordinary(items, prompt, args.repeats + 2)[1:])
    again = statistics.median(seconds(contenders[OURS]) for _ in range(args.repeats))
    peaks = {name: peak(name) for name in ("ours", "checkpointed", "ordinary")}
    rate = {name: (questions if "packing" not in name else args.batch) / taken for name, taken in times.items()}
    rate["Trainer + peft"] = args.batch / theirs
    base = rate["Trainer + peft"]
    table(["contender", "questions/s", "of Trainer + peft"], [[name, f"{value:.1f}", f"{value / base:.2f}x"] for name, value in rate.items()])
    print(f"peak memory: ours {peaks['ours']:.2f} GB, with --grad_checkpoint {peaks['checkpointed']:.2f} GB, Trainer + peft {peaks['ordinary']:.2f} GB ({peaks['ours'] / peaks['ordinary']:.2f}x)")
    flops = step_flops(lm, wire, packed)
    d, hidden = lm.config.hidden_size, lm.config.intermediate_size
    limit = matmul_rate([(packed[0].ids.numel(), d, hidden), (packed[0].ids.numel(), hidden, d), (packed[0].ids.numel(), d, d)])
    share = flops / times[OURS] / limit
    print(f"matrix multiplies of a step: {flops / 1e9:.0f} GFLOP in {times[OURS]:.2f} s, {share:.0%} of the {limit / 1e9:.0f} GFLOP/s that "
          f"torch.mm reaches at these shapes\n")
    return {"questions_per_s": rate, "step_s_again": again, "peak_gb": peaks, "matmul_share": share, "matmul_flops_per_s": limit}


def step_flops(lm, wire, batches):
    """Matrix-multiply FLOPs of a step: 2 per weight and token forward; backward only the input gradient, as the weights are
    frozen, again 2 (the LoRA's and the encoder's own are within 5% and left out)."""
    layers = lm.model.layers
    weights = sum(p.numel() for p in layers[0].parameters() if p.dim() == 2)
    lower = len(wire.lower.layers)
    answer = statistics.mean(len(batch.label) for batch in batches)
    read, context = (statistics.mean(getattr(batch, name).numel() for batch in batches) for name in ("ids", "context"))
    return 4 * weights * len(layers) * read + 2 * weights * lower * context + 4 * lm.config.vocab_size * lm.config.hidden_size * answer


def peak(contender):
    """Peak memory in GB of a few steps of one contender, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "train", "--peak", contender, "--lm", args.lm, "--data", args.data, "--batch", str(args.batch),
                           *(["--device", args.device] if args.device else [])], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"measuring {contender} failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.strip().splitlines()[-1])


def peak_of_steps():
    import resource
    lm, prompt, wire, items = setup()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if args.peak != "ordinary":
        if args.peak == "checkpointed":
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        step = stepper(wire, batches_of(prompt, items, wire, 5), lambda batch: wire.loss(batch, WEIGHTS)[0])
        for _ in range(6):
            step()
    else:
        ordinary(items, prompt, 6)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else max(used, before) * 1024 / 1e9)


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
    for module in lm.modules():
        if hasattr(module, "merge"):
            module.merge()  # as served: LoRA folded into the weights
    results, rows = {}, []
    asked = prompt.asked(items[0], "context")

    def answer(ids, prefix=None):
        inputs = {"inputs_embeds": embed(lm, ids, prefix)} if prefix is not None else {"input_ids": ids}
        return lm.generate(**inputs, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)

    for batch in (1, 25):
        for T in SIZES:
            if batch * T > 26_000 and not torch.cuda.is_available():
                continue
            context = torch.from_numpy(long_text(items, T).astype(np.int64)).to(lm.device)[None].expand(batch, -1)
            stack = lambda *parts: torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(lm.device)[None].expand(batch, -1)
            before, M = np.concatenate([prompt.pre, prompt.head]), torch.full((batch,), 32, device=lm.device)
            text = stack(before, context[0].cpu().numpy(), asked)
            cut = stack(before, context[0, :32].cpu().numpy(), asked)
            latent = stack(before, np.full(32, LATENT), asked)
            ready = wire.encode(context, M)[0]
            times = side_by_side({"text": lambda: answer(text), "encoder + latents": lambda: answer(latent, wire.encode(context, M)[0]),
                                  "latents ready": lambda: answer(latent, ready), "first 32 tokens": lambda: answer(cut)}, args.repeats)
            cache = {name: sum(layer.keys.numel() + layer.values.numel() for layer in out.past_key_values.layers) * 4 / 1e6 / batch
                     for name, out in (("text", answer(text)), ("latents", answer(latent, ready)))}
            rows.append([f"{batch} x {T}", *(f"{1e3 * taken:.0f}" for taken in times.values()), f"{times['text'] / times['encoder + latents']:.1f}x",
                         f"{times['text'] / times['latents ready']:.1f}x", f"{cache['text']:.1f}", f"{cache['latents']:.1f}"])
            results[f"{batch}x{T}"] = {"seconds": times, "kv_cache_mb": cache, "kv_cache_mb_computed": {
                name: kv_bytes(lm.config, len(ids[0]) + NEW - 1, 4) / 1e6 for name, ids in (("text", text), ("latents", latent))}}
            log(f"answer: {batch} x {T} done")
    table(["batch x context", "text ms", "encoder + latents", "latents ready", "first 32 tokens", "speed-up", "ready", "KV MB", "KV MB latents"], rows)
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
            times = side_by_side({"encode": encode, "step": step}, max(2, args.repeats // 2))
            encode_s.append(times["encode"])
            step_s.append(times["step"])
            peaks.append(peak_bytes(step))
            rows.append([f"{rule}, {T}", f"{1e3 * times['encode']:.0f}", f"{1e3 * times['step']:.0f}", f"{peaks[-1] / 1e6:.0f}" if peaks[-1] else "-"])
            log(f"scale: {rule}, {T} tokens done")
        long = slice(2, None)  # below 512 tokens fixed costs rule
        grow = {name: float(np.polyfit(np.log(lengths[long]), np.log(taken[long]), 1)[0]) for name, taken in (("encode", encode_s), ("step", step_s), ("memory", peaks)) if all(taken)}
        results[rule] = {"lengths": lengths, "encode_s": encode_s, "step_s": step_s, "peak_bytes": peaks, "exponents": grow}
    table(["context tokens", "encode ms", "step ms", "step's peak MB"], rows)
    for rule, result in results.items():
        print(f"{rule}, from 512 tokens on: " + ", ".join(f"{name} grows as T^{power:.2f}" for name, power in result["exponents"].items()))
    return results


# ------------------------------------------------------------------------------------------------
# ddp

def bench_ddp():
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in (1, 2):
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", "train.py", "--preset", "demo", "--lm", args.lm,
                       "--samples", "400", "--minutes", "0", "--epochs", "1", "--batch", "40", "--micro_batch", "20", "--pack", "5", "--ramp", "0", "--eval_samples", "5",
                       "--log_every", "1", "--warmup", "0", "--out", f"{folder}/{world}"]
            done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            if done.returncode:
                raise UserError(f"{world} process(es): {done.stderr.strip().splitlines()[-1]}")
            lines = [json.loads(line) for line in open(f"{folder}/{world}/logs/train_diagnostics.jsonl")]
            results[world] = {"samples_per_s": statistics.median(line["samples_per_sec"] for line in lines[1:]),
                              "tf": [next(iter(line["models"].values()))["tf"] for line in lines]}
            log(f"ddp: {world} process(es) done")
    _, _, wire, _ = setup()
    sent = sum(p.numel() for p in wire.trainable().values()) * 4
    ratio = results[2]["samples_per_s"] / results[1]["samples_per_s"]
    apart = max(abs(a - b) for a, b in zip(results[1]["tf"], results[2]["tf"]))
    table(["processes", "questions/s"], [[world, f"{result['samples_per_s']:.2f}"] for world, result in results.items()])
    print(f"two processes: {ratio:.2f}x the samples/s of one; {sent / 1e6:.1f} MB of gradients a step; the loss curves differ by at most {apart:.1e}\n")
    return {"ratio": ratio, "bytes_per_step": sent, "loss_difference": apart, **{str(world): result for world, result in results.items()}}


# ------------------------------------------------------------------------------------------------
# plan

MODELS = {  # layers, width, KV width, MLP width, vocabulary
    "Llama-3.1-8B": (32, 4096, 1024, 14336, 128256), "Llama-3.1-70B": (80, 8192, 1024, 28672, 128256)}
# Per GPU: bf16 dense, NVLink one way within a node of 8 (NVIDIA's data sheet); between nodes 400 Gbit/s InfiniBand.
H100 = {"memory": 80e9, "flops": 989e12, "node": 8, "link": 450e9, "network": 50e9}


def plan(model, gpus, batch, context=246, latents=32, asked=24, answer=6, rank=32, d_z=512, utilisation=0.4, micro=16, shard=False):
    """Memory in bytes by part and seconds a step, per GPU. batch: questions over all GPUs, one a row, a
    micro-batch at a time; shard: train.py --shard."""
    layers, d, kv, mlp, vocabulary = MODELS[model]
    per_layer = 2 * d * d + 2 * d * kv + 3 * d * mlp
    weights = layers * per_layer + 2 * vocabulary * d
    lora = layers * rank * (2 * (d + d) + 2 * (d + kv) + 3 * (d + mlp))  # A and B of all seven projections
    encoder = d * d_z + 2 * 12 * d_z * d_z + d_z * d + 4 * d_z * d_z + vocabulary
    trained = lora + encoder
    rows = batch / gpus
    at_once = min(rows, micro)
    read = latents + asked + answer
    # Forward 2 FLOPs a weight and token; backward the input gradient alone, 2 more (frozen weights get none).
    flops = rows * (4 * layers * per_layer * read + 2 * (layers // 3) * per_layer * context + 4 * vocabulary * d * answer + 6 * trained * read)
    # Activations kept per layer and token, bf16: about 34 d for a block with SDPA (Korthikanti et al., arXiv 2205.05198), less what only
    # weight gradients need; the frozen lower layers of the encoder keep none.
    # Sharded (FSDP2): 1/n of the weights and two whole layers, the one at work and the one that is on its way.
    held = 2 * weights / gpus + 2 * 2 * per_layer if shard else 2 * weights
    memory = {"weights": held, "trained": 4 * trained, "gradients": 4 * trained, "optimizer": 8 * trained,
              "activations": at_once * read * layers * (20 * d + 4 * mlp) * 2, "logits": at_once * answer * vocabulary * 4 * 3}
    reduce = 4 * trained * 2 * (gpus - 1) / gpus  # ring all-reduce sends 2 (n-1)/n of the gradients
    # Sharded layers are gathered for each pass through them: the encoder's, the forward and the backward one, once a micro-batch.
    gather = 2 * layers * per_layer * (2 + 1 / 3) * math.ceil(rows / micro) * (gpus - 1) / gpus if shard else 0
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
            p = plan(model, gpus, batch, shard=shard)
            fixed = p["total"] - p["memory"]["activations"] - p["memory"]["logits"]
            per_question = (p["memory"]["activations"] + p["memory"]["logits"]) / 16
            largest = max(0, int((0.9 * H100["memory"] - fixed) / per_question)) * gpus
            results[f"{name} x {gpus}"] = {**p, "largest_batch": largest}
            rows.append([f"{name}, {gpus} GPU(s)", f"{p['memory']['weights'] / 1e9:.0f}", f"{(p['total'] - p['memory']['weights']) / 1e9:.1f}", f"{p['flops'] / 1e12:.0f}",
                         f"{(p['reduce_bytes'] + p['gather_bytes']) / 1e6:.0f}", *((f"{p['samples_per_s']:.0f}", f"{p['utilisation']:.0%}", largest) if largest else ("-", "-", "does not fit"))])
    table(["64 questions a GPU, 16 at once", "weights GB", "rest GB", "TFLOP/step", "sent MB", "questions/s", "of peak", "largest at once"], rows)
    p = plan("Llama-3.1-8B", 4, 64)
    print(f"The specification's run, batch 64 on 4 GPUs: 2.6 s a step, 17.7 GB allocated in all, 56% of memory used. The plan at 40% of peak: "
          f"{p['seconds']:.2f} s a step and {p['total'] / 1e9:.0f} GB a GPU.\n")
    return results


def main():
    parts = PARTS if "all" in args.parts else args.parts
    for part in parts:
        if part not in PARTS:
            raise UserError(f"{part} is unknown; there are {', '.join(PARTS)}, all")
    if args.peak:
        return peak_of_steps()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    path = Path(args.out) / "bench.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for part in parts:
        print(f"== {part} ({args.lm}, {device})", flush=True)
        found[part] = {"device": device, "lm": args.lm, "result": globals()[f"bench_{part}"]()}
        write_atomic(path, json.dumps(found, indent=2) + "\n")
    log(f"written: {path}")


if __name__ == "__main__":
    run_main(main)
