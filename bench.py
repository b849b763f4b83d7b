"""
Measure speed and memory as ratios, side by side in one run. Prints tables, writes OUT/bench.json.

    python bench.py all                                   # every part, on SmolLM2-135M and synthetic passages
    python bench.py train answer --data train-v1.1.json.gz

    python bench.py documents --ckpt runs/squad/ckpt/best --data dev-v1.1.json.gz

    train    questions a second and peak memory of a training step, for each wire and without each saving
    answer   time to the first answer and for each next question: text against latents
    profile  where a training step's time goes: by phase, and by operator
    scale    encoding and a training step from 512 to 16,384 tokens, with fitted growth exponents
    documents  a trained wire's answers from 1, 2 and 4 documents at once: F1, and whether the right one is named

Contenders alternate, in another order each round, and medians are reported: one that slows down slows all.
"""
import json
import math
import random
import statistics
import time
from pathlib import Path

from common import Parser, UserError, log, run_main, write_atomic

PARTS = ("train", "profile", "answer", "scale", "documents")


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("parts", nargs="+", help=f"some of {', '.join(PARTS)}, or all")
    p.add_argument("--lm", default="smollm2-135m", help="language model (default smollm2-135m)")
    p.add_argument("--data", default="synthetic", help="where texts come from (default synthetic)")
    p.add_argument("--ckpt", help="checkpoint of a trained wire, for `documents`; without it that part is left out")
    p.add_argument("--samples", type=int, default=50, help="questions of `documents` (default 50)")
    p.add_argument("--repeats", type=int, default=5, help="of each measurement; medians are reported (default 5)")
    p.add_argument("--batch", type=int, default=15, help="questions a step in `train` (default 15)")
    p.add_argument("--lengths", help="tokens of the texts in `answer` and `scale`, comma-separated (default: their "
                                     "own)")
    p.add_argument("--out", default="runs/bench", help="folder (default runs/bench)")
    p.add_argument("--device", help="cuda or cpu (default: a GPU where there is one)")
    return p.parse_args(argv)


if __name__ == "__main__":
    arguments = parse_args()

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ask import replies
from data import Example, Prompt, group_by_context, load_data
from lm import checkpoint_layers, generate, load_lm
from model import LatentWire, WireConfig
from rows import f1_score, interval, kept_tokens
from store import Document, encode, join, load_wire, place_values, read_checkpoint

WEIGHTS = {"tf": 1.0, "first": 0.5, "more": 0.3}


def setup(args, **changes):
    """(wire, items): a fresh LM with a wire around it, and tokenised examples, those of a paragraph together."""
    torch.manual_seed(0)
    lm, tokenizer = load_lm(args.lm, device=args.device, wired=True)
    prompt = Prompt(tokenizer, "plain", 1024)
    wire = LatentWire(lm, WireConfig(lm=args.lm, **{"prompt": "plain", "lora_rank": 8, **changes}), prompt).train()
    return wire, prompt.items(load_data(args.data, "train", 500 if args.data == "synthetic" else None))


def seconds(run):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def side_by_side(contenders, repeats):
    """{name: median seconds} of {name: function}. The first round is a warm-up."""
    rounds = []
    for number in range(repeats + 1):
        order = random.Random(number).sample(list(contenders), len(contenders))
        rounds.append({name: seconds(contenders[name]) for name in order})
    return {name: statistics.median(taken[name] for taken in rounds[1:]) for name in contenders}


def peak_bytes(run):
    """Bytes that a run needs on top of what is held before it; NaN where the system does not say."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
        status = lambda key: int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) * 1024
        before = status("VmRSS:")
        run()
        return status("VmHWM:") - before
    except OSError:
        run()
        return math.nan


def table(head, rows):
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(f"{cell!s:<{width}}" if i == 0 else f"{cell!s:>{width}}" for i,
                        (cell, width) in enumerate(zip(row, widths))))
    print(flush=True)


# ------------------------------------------------------------------------------------------------

def step_of(wire, rows):
    """A function that trains on rows of items once, as train.py does but for the clipping and the log."""
    params = list(wire.trainable().values())
    optimizer = torch.optim.AdamW(params, lr=1e-4)

    def run():
        kept = None
        if wire.config.wire == "tokens":
            kept = kept_tokens(wire.config.keep, wire.lm, wire.prompt, [row[0] for row in rows], [32] * len(rows))
        with record_function("collate"):
            batch = wire.collate(rows, wire.stored, None, kept).to(wire.rarity.device)
        loss = wire(batch, WEIGHTS)[0]
        with record_function("backward"):
            loss.backward()
        with record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return run


def questions_of(args, items):
    """Rows of five questions on a paragraph each, as many as fit into --batch and at least one."""
    groups, wanted = [group[:5] for group in group_by_context(items) if len(group) >= 5], max(1, args.batch // 5)
    if len(groups) < wanted:
        raise UserError(f"--batch {args.batch} needs {wanted} paragraphs of five questions, --data {args.data} has "
                        f"{len(groups)}; lower it or give more data")
    return [[items[i] for i in group] for group in random.Random(0).sample(groups, wanted)]


def bench_train(args):
    """Each wire on the same questions, and kv without each saving."""
    wire, items = setup(args)
    rows = questions_of(args, items)
    alone = [[item] for row in rows for item in row]
    saving = setup(args)[0]
    checkpoint_layers(saving.lm)
    contenders = {"kv": step_of(wire, rows), "kv, one question a row": step_of(wire, alone),
                  "kv, --grad_checkpoint": step_of(saving, rows),
                  "embeds": step_of(setup(args, wire="embeds")[0], rows)}
    for keep in ("truncated", "all"):
        contenders[f"tokens {keep}"] = step_of(setup(args, wire="tokens", keep=keep)[0], rows)
    times, n = side_by_side(contenders, args.repeats), len(alone)
    peaks = {name: peak_bytes(run) for name, run in contenders.items()}
    table([f"{n} questions a step", "questions/s", "of kv", "peak MB above rest"],
          [[name, f"{n / taken:.2f}", f"{times['kv'] / taken:.2f}x", f"{peaks[name] / 1e6:.0f}"] for name,
           taken in times.items()])
    return {"questions": n, "seconds": times, "peak_bytes": peaks}


def bench_profile(args):
    """A training step of the kv wire under torch.profiler; a phase counts without those inside it. On a GPU a phase is
    what the processor takes to launch it, an operator what its kernels take."""
    wire, items = setup(args)
    phases = {"encode": "first reading, forward", "keeps": "second reading and choice", "logits": "reader, forward"}
    for name in phases:
        setattr(wire, name, record_function(name)(getattr(wire, name)))
    run = step_of(wire, questions_of(args, items))
    run()  # a warm-up
    on_gpu = wire.rarity.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiled:
        whole = seconds(lambda: [run() for _ in range(args.repeats)]) / args.repeats
    found = [event for event in profiled.key_averages() if event.device_type == DeviceType.CPU]
    took = {event.key: event.cpu_time_total / 1e6 / args.repeats for event in found}
    took["encode"] -= took["keeps"]
    by_phase = {text: took[name] for name, text in (phases | {
        "backward": "backward", "optimizer": "optimizer", "collate": "collate"}).items()}
    by_phase["loss and the rest"] = whole - sum(by_phase.values())
    own = lambda event: event.self_device_time_total if on_gpu else event.self_cpu_time_total
    operators = {event.key: own(event) / 1e6 / args.repeats
                 for event in sorted(found, key=own, reverse=True) if "::" in event.key}
    operators = dict(list(operators.items())[:10])
    for what, times in (("phase", by_phase), ("operator, its own time", operators)):
        table([what, "ms a step", "share"], [[name, f"{1e3 * time:.0f}", f"{time / whole:.0%}"]
                                             for name, time in times.items()])
    return {"step": whole, "phases": by_phase, "operators": operators}


def long_text(items, length):
    """`length` token ids of contexts one after the other."""
    text = np.concatenate([item.context for item in items])
    return np.tile(text, -(-length // len(text)))[:length]


@torch.no_grad()
def bench_answer(args):
    """The prompt to eight answer tokens, batch 1. "first" encodes the document, "next" has its latents."""
    wire, items = setup(args)
    wire.eval()
    lm, layout, result, rows = wire.lm, wire.layout, {}, []
    after = layout.after(items[0])
    ask = lambda row, latents=None: generate(lm, wire.prompt.tokenizer, [row], latents, 8)
    for T in [int(x) for x in (args.lengths or "246,1024,8192").split(",")]:
        text, count = long_text(items, T), min(32, T)
        once = lambda: wire.encode(wire.source([text], [count]).to(wire.rarity.device))
        ready = once()

        def first():
            ask(after, once())
        times = side_by_side({"text": lambda: ask(np.concatenate([layout.before, text, after])), "first": first,
                              "next": lambda: ask(after, ready)}, args.repeats if T < 4096 else 1)
        cache = {name: places * place_values(lm, "kv") * lm.dtype.itemsize / 1e6
                 for name, places in (("text", T + len(layout.before)), ("latents", ready.held.shape[1]))}
        result[T] = {"seconds": times, "cache_mb": cache}
        rows.append([T, *(f"{1e3 * times[name]:.0f}" for name in ("text", "first", "next")),
                     f"{times['text'] / times['first']:.2f}x", f"{times['text'] / times['next']:.2f}x",
                     f"{cache['text']:.1f} -> {cache['latents']:.1f}"])
        log(f"answer: {T} tokens done")
    table(["context tokens", "text ms", "first ms", "next ms", "text/first", "text/next", "cache MB"], rows)
    return result


def bench_scale(args):
    """Encoding and a training step by the text's length, in chunks of --max_prompt_tokens: linear is T^1."""
    wire, items = setup(args)
    lengths = [int(x) for x in (args.lengths or "512,2048,8192,16384").split(",")]
    result, rows = {}, []
    for rule, count in (("M = 32", lambda T: 32), ("T / M = 8", lambda T: T // 8)):
        taken = {"encode": [], "step": []}
        for T in lengths:
            text = long_text(items, T)
            item = wire.prompt.items([Example("", "", items[0].example.question, ("x",))])[0]
            row = [[type(item)(item.example, text, item.question, item.answer)]]

            def step():
                batch = wire.collate(row, lambda length: min(count(length), length)).to(wire.rarity.device)
                wire(batch, WEIGHTS)[0].backward()

            def once():
                with torch.no_grad():
                    wire.encode(wire.source([text], [count(T)]).to(wire.rarity.device))
            times = side_by_side({"encode": once, "step": step}, args.repeats if T < 4096 else 1)
            for name, value in times.items():
                taken[name].append(value)
            rows.append([f"{rule}, {T}", *(f"{1e3 * times[name]:.0f}" for name in taken)])
            log(f"scale: {rule}, {T} tokens done")
        result[rule] = {"lengths": lengths, **taken, "exponents": {
            name: float(np.polyfit(np.log(lengths), np.log(value), 1)[0]) for name, value in taken.items()}}
    table(["context tokens", "encode ms", "step ms"], rows)
    for rule, found in result.items():
        print(f"{rule}: " + ", ".join(f"{name} grows as T^{power:.2f}" for name, power in found["exponents"].items()))
    return result


@torch.no_grad()
def bench_documents(args):
    """Each question is on a paragraph of its own article; the others' stand beside it, in random order."""
    saved = read_checkpoint(args.ckpt)
    if saved.config.wire == "tokens" or saved.config.scope == "prompt" or args.samples < 4:
        raise UserError(f"documents needs a wire whose latents stand for a text alone, and --samples of at least 4; "
                        f"this is --wire {saved.config.wire} --scope {saved.config.scope} with {args.samples}")
    lm, tokenizer = load_lm(saved.config.lm, device=args.device, wired=True)
    wire = load_wire(saved, lm, Prompt(tokenizer, saved.config.prompt, saved.config.max_prompt_tokens)).eval()
    examples = load_data(args.data, "dev", 20 * args.samples if args.data == "synthetic" else None)
    random.Random(0).shuffle(examples)
    articles = list({example.title or example.context: example for example in examples}.values())
    contexts = {example.context: example for example in [*articles, *examples]}  # of other articles where there are
    items = wire.prompt.items(list(contexts.values())[:args.samples])
    H, rng = len(wire.layout.before), random.Random(0)
    stored = [Document(encode(wire, item.context, wire.stored(len(item.context))), H, str(n))
              for n, item in enumerate(items)]
    result, rows = {}, []
    for count in (1, 2, 4):
        f1, right = [], []
        for n, item in enumerate(items):
            numbers = rng.sample([other for other in range(len(items)) if other != n], count - 1) + [n]
            rng.shuffle(numbers)
            documents = [stored[number] for number in numbers]
            together = join(wire, [document.latents for document in documents])
            reply, = replies(wire, documents, together, [item.example.question])
            f1.append(f1_score(reply["answer"], item.example.answers))
            right.append(float(reply.get("document", str(n)) == str(n)))
        result[count] = {"f1": float(np.mean(f1)), "f1_ci95": interval(f1), "named": float(np.mean(right)),
                         "named_ci95": interval(right)}
        percent = lambda mean, ends: f"{100 * mean:.1f} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"
        rows.append([count, percent(result[count]["f1"], result[count]["f1_ci95"]),
                     percent(result[count]["named"], result[count]["named_ci95"])])
        log(f"documents: {count} done")
    table(["documents", "F1", "right one named"], rows)
    return result


def main(args):
    parts = PARTS if "all" in args.parts else args.parts
    if "all" in args.parts and not args.ckpt:
        parts = [part for part in PARTS if part != "documents"]
    if "documents" in parts and not args.ckpt:
        raise UserError("documents needs a trained wire: give --ckpt")
    for part in parts:
        if part not in PARTS:
            raise UserError(f"{part} is unknown; there are {', '.join(PARTS)}, all")
    path = Path(args.out) / "bench.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for part in parts:
        print(f"== {part} ({args.lm}, {torch.get_num_threads()} CPU threads)", flush=True)
        found[part] = {"lm": args.lm, "result": globals()[f"bench_{part}"](args)}
        write_atomic(path, json.dumps(found, indent=2) + "\n")
    log(f"written: {path}")


if __name__ == "__main__":
    run_main(lambda: main(arguments))
