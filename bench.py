"""
Measure speed and memory as ratios, side by side in one run. Prints tables, writes OUT/bench.json.

    python bench.py all                                   # every part, on SmolLM2-135M and synthetic passages
    python bench.py train answer --data train-v1.1.json.gz

    python bench.py documents articles peers --ckpt runs/squad/ckpt/best --data dev-v1.1.json.gz

    train    questions a second and peak memory of a training step, for each wire and without each saving
    answer   time to the first answer and for each next question: text against latents
    profile  where a training step's time goes: by phase, and by operator
    scale    encoding from 512 to 16,384 tokens, with fitted growth exponents
    plan     what fits where: memory of a training step, counted without running it, for --lm and for Llama-3.1-8B
    documents  a trained wire's answers from 1, 2 and 4 documents at once: F1, and whether the right one is named
    articles  a trained wire's answers from a text of many paragraphs, each about one of them: F1 by its length, by M
             and by where the paragraph stands; of --wire tokens --keep all or matched, the reader's of the text itself
             or of what is nearest to the question
    peers    a trained wire beside published methods that keep as much: kvpress beside one of --wire kv, LLMLingua
             beside one of --wire tokens; not in `all`: pip install --no-deps -r requirements-bench.txt

Contenders alternate, in another order each round, and medians are reported: one that slows down slows all.
"""
import json
import math
import random
import statistics
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from common import Parser, UserError, check_counts, log, read_json, run_main, write_atomic

PARTS = ("train", "profile", "answer", "scale", "plan", "documents", "articles", "peers")
TRAINED = ("documents", "articles", "peers")  # these need --ckpt


def numbers(text):
    """"246,1024" -> [246, 1024]."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError
    return found


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("parts", nargs="+", metavar="part", choices=[*PARTS, "all"],
                   help=f"some of {', '.join(PARTS)}, or all")
    p.add_argument("--lm", help="language model (default smollm2-135m, for --ckpt the one it was trained for)")
    p.add_argument("--data", default="synthetic", help="where texts come from (default synthetic)")
    p.add_argument("--ckpt", help=f"checkpoint of a trained wire, for {', '.join(TRAINED)}")
    p.add_argument("--samples", type=int, default=50, help="questions of those (default 50)")
    p.add_argument("--repeats", type=int, default=5, help="of each measurement, from 4,096 tokens on one; medians are "
                   "reported (default 5)")
    p.add_argument("--batch", type=int, default=15, help="questions a step in train, profile and plan (default 15)")
    p.add_argument("--lengths", type=numbers, help="tokens of the texts in `answer`, `scale`, `articles`, by commas "
                                                   "(default: their own)")
    p.add_argument("--out", default="runs/bench", help="folder (default runs/bench)")
    p.add_argument("--device", help="cuda or cpu (default: a GPU where there is one)")
    return p.parse_args(argv)


if __name__ == "__main__":
    arguments = parse_args()

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ask import replies
from data import Prompt, group_by_context, load_data
from lm import DTYPES, _attend_and_note, autocast, checkpoint_layers, generate, load_lm, positions, use_lora
from model import Latents, LatentWire, WireConfig, budgets
from report import markdown_table, spread
from rows import evaluate_row, f1_score, interval, kept_tokens, own_row
from store import Document, encode, join, load_wire, place_values, read_checkpoint

WEIGHTS = {"tf": 1.0, "first": 0.5}
LLAMA_8B = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072)  # as its config.json says


def fresh_wire(args, dtype=None, **changes):
    """A wire that nothing has been trained for, around a fresh LM."""
    torch.manual_seed(0)
    lm, tokenizer = load_lm(args.lm, dtype, args.device, wired=True)
    changes = {"prompt": "plain", "lora_rank": 8, "max_prompt_tokens": min(1024, positions(lm)), **changes}
    return LatentWire(lm, WireConfig(lm=args.lm, **changes), Prompt(tokenizer, "plain", changes["max_prompt_tokens"]))


def setup(args, most=5000, **changes):
    """(wire, items): a fresh wire, and `most` tokenised examples, those of a paragraph together."""
    wire, samples = fresh_wire(args, **changes), 500 if args.data == "synthetic" else None
    return wire, wire.prompt.items(load_data(args.data, "train", samples)[:most])


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


class Meter(TorchDispatchMode):
    """Inside, counts the bytes of all tensors that are made and not freed: `now`, and `peak`, the most at once."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        storages = lambda tree: [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
        given = {*storages((args, kwargs))}  # of which what is made may be a view
        for storage in storages(made):
            if storage not in self.known and storage not in given:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def _free(self, count):
        self.now -= count


def peak_bytes(run, device):
    """Bytes of tensors that a run on a device needs on top of what is held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with Meter() as meter:  # a process's own peak says more of its allocator, which keeps what is freed
        run()
    return meter.peak


def trained_wire(args, fits, needs):
    """The wire of --ckpt, around --lm or the LM that it was trained for. Raises UserError unless fits(its config)."""
    saved = read_checkpoint(args.ckpt)
    config = saved.config
    if not fits(config):
        raise UserError(f"{needs}; this is --wire {config.wire} --keep {config.keep} --scope {config.scope} --ratio "
                        f"{config.ratio:g}")
    lm, tokenizer = load_lm(args.lm or config.lm, device=args.device, wired=True)
    return load_wire(saved, lm, Prompt(tokenizer, config.prompt, config.max_prompt_tokens)).eval()


def of_text(config):
    """Whether a wire's latents stand for a text alone."""
    return config.wire != "tokens" and config.scope != "prompt"


def table(head, rows):
    print("\n".join(markdown_table(head, [list(map(str, row)) for row in rows])) + "\n", flush=True)


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
        with autocast(wire.lm):
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
    saving = fresh_wire(args)
    checkpoint_layers(saving.lm)
    contenders = {"kv": step_of(wire, rows), "kv, one question a row": step_of(wire, alone),
                  "kv, --grad_checkpoint": step_of(saving, rows),
                  **{f"kv, --dtype {dtype}": step_of(fresh_wire(args, getattr(torch, dtype)), rows)
                     for dtype in DTYPES if getattr(torch, dtype) != wire.lm.dtype},
                  "embeds": step_of(fresh_wire(args, wire="embeds"), rows)}
    for keep in ("truncated", "all"):
        contenders[f"tokens {keep}"] = step_of(fresh_wire(args, wire="tokens", keep=keep), rows)
    times, n = side_by_side(contenders, args.repeats), len(alone)
    peaks = {name: peak_bytes(run, wire.rarity.device) for name, run in contenders.items()}
    table([f"{n} questions a step", "questions/s", "of kv", "peak MB of tensors"],
          [[name, f"{n / taken:.2f}", f"{times['kv'] / taken:.2f}x", f"{peaks[name] / 1e6:.0f}"] for name,
           taken in times.items()])
    return {"questions": n, "seconds": times, "peak_bytes": peaks}


def bench_profile(args):
    """A training step of the kv wire under torch.profiler; a phase counts without those inside it. On a GPU a phase is
    what the processor takes to launch it, an operator what its kernels take."""
    wire, items = setup(args)
    phases = {"read": "first reading, forward", "needed": "second reading", "encode": "choice",
              "logits": "reader, forward"}
    for name in phases:
        setattr(wire, name, record_function(name)(getattr(wire, name)))
    run = step_of(wire, questions_of(args, items))
    run()  # a warm-up
    on_gpu = wire.rarity.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiled:
        whole = seconds(lambda: [run() for _ in range(args.repeats)]) / args.repeats
    found = [event for event in profiled.key_averages() if event.device_type == DeviceType.CPU]
    took = {event.key: event.cpu_time_total / 1e6 / args.repeats for event in found}
    took["encode"] -= took["read"] + took["needed"]
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


def long_texts(args):
    """(A wire whose predictor is fitted, items, text(T): T token ids of their contexts one after the other)."""
    wire, items = setup(args)
    wire.eval().fit_predictor(items[group[0]].context for group in group_by_context(items))
    return wire, items, partial(np.resize, np.concatenate([item.context for item in items]))


@torch.no_grad()
def bench_answer(args):
    """The prompt to eight answer tokens, batch 1. "cached" has the whole text's keys and values; "first" encodes the
    document, which it reads once, "twice" as training does; "next" has its latents."""
    (wire, items, long), result, rows = long_texts(args), {}, []
    lm, layout, fitted = wire.lm, wire.layout, wire.predictor
    after = layout.after(items[0])
    ask = lambda row, latents=None: generate(lm, wire.prompt.tokenizer, [row], latents, 8, at_least=8)
    for T in args.lengths or (246, 1024, 8192):
        text, count = long(T), min(32, T)
        once, wire.predictor = lambda: encode(wire, text, count), fitted
        ready, whole = once(), wire.read(wire.source([text], [T]).to(lm.device), None)[2]

        def first(predictor):
            wire.predictor = predictor
            ask(after, once())
        times = side_by_side({"text": lambda: ask(np.concatenate([layout.before, text, after])),
                              "cached": lambda: ask(after, whole),
                              "first": lambda: first(fitted), "twice": lambda: first(None),
                              "next": lambda: ask(after, ready)}, args.repeats if T < 4096 else 1)
        cache = {"text": (T + len(layout.before)) * place_values(lm, "kv") * lm.dtype.itemsize / 1e6,
                 "latents": sum(side.nbytes for side in ready.keys + ready.values) / 1e6}  # a layer's are padded
        result[T] = {"seconds": times, "cache_mb": cache}
        rows.append([T, *(f"{1e3 * seconds:.0f}" for seconds in times.values()),
                     *(f"{times['text'] / times[name]:.2f}x" for name in list(times)[1:]),
                     f"{cache['text']:.1f} -> {cache['latents']:.1f}"])
        log(f"answer: {T} tokens done")
    table(["context tokens", *(f"{name} ms" for name in times), *(f"text/{name}" for name in list(times)[1:]),
           "cache MB"], rows)
    return result


@torch.no_grad()
def bench_scale(args):
    """Encoding by the text's length, in chunks of 1,024 tokens at most: linear is T^1."""
    (wire, _, text), lengths, taken = long_texts(args), args.lengths or [512, 2048, 8192, 16384], []
    counts = {"M = 32": lambda T: min(32, T), "T / M = 8": lambda T: max(1, T // 8)}
    for T in lengths:
        once = {rule: partial(encode, wire, text(T), count(T)) for rule, count in counts.items()}
        taken.append(side_by_side(once, args.repeats if T < 4096 else 1))
        log(f"scale: {T} tokens done")
    times = {rule: [at[rule] for at in taken] for rule in counts}
    grows = {rule: float(np.polyfit(np.log(lengths), np.log(of), 1)[0]) if len({*lengths}) > 1 else math.nan
             for rule, of in times.items()}  # one length says nothing
    table(["context tokens", *(f"{rule}: ms" for rule in counts)], [
        *([T, *(f"{1e3 * seconds:.0f}" for seconds in at.values())] for T, at in zip(lengths, taken)),
        ["grows as T^", *(f"{power:.2f}" for power in grows.values())]])
    return {rule: {"lengths": lengths, "encode": times[rule], "exponents": {"encode": grows[rule]}} for rule in counts}


def step_bytes(config, dtype, rows, prompt, recompute):
    """Bytes of a training step on rows of items for an LM of that config: the frozen LM's, its largest layer's, those
    of what is trained with Adam's, and what passes, gradients included, at its peak. The step itself runs, on tensors
    without values, so that nothing is held and nothing here has to be kept like model.py."""
    size = lambda tensors: sum(x.numel() * x.element_size() for x in tensors)
    mode, meter = FakeTensorMode(allow_non_fake_inputs=True), Meter()
    with mode, meter:
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").requires_grad_(False)
        lm.name, lm.identity, lm.turning = "planned", {}, [True] * config.num_hidden_layers  # wiring would try it out
        frozen, layer = size(lm.parameters()), max(size(layer.parameters()) for layer in lm.model.layers)
        wire = LatentWire(lm, WireConfig(lm="planned", max_prompt_tokens=prompt.max_prompt_tokens), prompt).train()
    if recompute:
        checkpoint_layers(lm)
    batch, trained = wire.collate(rows, wire.stored).map(mode.from_tensor), list(wire.trainable().values())
    with mode, meter, autocast(wire.lm):
        before = meter.peak = meter.now
        wire(batch, WEIGHTS)[0].backward()
    return {"frozen": frozen, "layer": layer, "trained": 3 * size(trained), "passing": meter.peak - before}


def bench_plan(args):
    """What fits where. With --shard each of n GPUs holds the embeddings, an n-th of the layers and two whole ones."""
    wire, items = setup(args, lora_rank=32)
    rows, lm, GB, result, lines = questions_of(args, items), wire.lm, 1e9, {}, []
    step, first, n = step_of(wire, rows), len(rows[0]), sum(map(len, rows))
    step()  # so that Adam's state is there
    result["measured"] = peak_bytes(step, wire.rarity.device)
    for name, config, dtype in [*((args.lm, lm.config, kind) for kind in dict.fromkeys((lm.dtype, torch.bfloat16))),
                                ("Llama-3.1-8B", LlamaConfig(**LLAMA_8B), torch.bfloat16)]:
        for recompute in (False, True):
            made = {k: step_bytes(config, dtype, rows[:k], wire.prompt, recompute) for k in {1, len(rows)}}
            all_rows, one = made[len(rows)], made[1]
            beside = n - first  # what is the same for any number of questions cancels out
            each = (all_rows["passing"] - one["passing"]) / beside if beside else all_rows["passing"] / n
            whole, layers = all_rows["frozen"], config.num_hidden_layers * all_rows["layer"]
            held = {gpus: all_rows["trained"] + (whole if gpus == 1 else whole - layers + layers / gpus
                                                 + 2 * all_rows["layer"]) for gpus in (1, 2, 4, 8)}
            room = {gpus: 80 * GB - rest - one["passing"] for gpus, rest in held.items()}
            fit = {gpus: int(left / each) + first if left >= 0 else 0 for gpus, left in room.items()}
            kind = f"{name} {str(dtype)[6:]}" + (" --grad_checkpoint" if recompute else "")
            result[kind] = all_rows | {"a_question": each, "fit_80_gb": fit, "questions": n}
            lines.append([kind, *(f"{x / GB:.2f}" for x in (whole, all_rows["trained"], all_rows["passing"])),
                          f"{each / 1e6:.0f}", *fit.values()])
            log(f"plan: {kind} done")
    table([f"{n} questions, LoRA 32", "frozen GB", "trained GB", "passing GB", "MB a question",
           *(f"fit each of {gpus} x 80 GB" for gpus in (1, 2, 4, 8))], lines)
    planned = next(iter(found["passing"] for name, found in result.items() if name != "measured"))
    print(f"measured for the first line: {result['measured'] / GB:.3f} GB pass, planned {planned / GB:.3f} GB")
    return result


@torch.no_grad()
def bench_documents(args):
    """Each question is on a paragraph of its own article; the others' stand beside it, in random order."""
    wire = trained_wire(args, of_text, "documents needs a wire whose latents stand for a text alone")
    examples = load_data(args.data, "dev", 20 * args.samples if args.data == "synthetic" else None)
    random.Random(0).shuffle(examples)
    articles = list({example.article: example for example in examples}.values())
    contexts = {example.context: example for example in [*articles, *examples]}  # of other articles where there are
    items = wire.prompt.items(list(contexts.values())[:args.samples])
    of = [item.example.article for item in items]
    if len({*of}) < 4:
        raise UserError(f"documents needs contexts of four articles, {len(items)} of --data {args.data} have "
                        f"{len({*of})}; give more data, or raise --samples")
    H, rng = len(wire.layout.before), random.Random(0)
    stored = [Document(encode(wire, item.context, wire.stored(len(item.context))), H, str(n))
              for n, item in enumerate(items)]
    result, rows = {}, []
    for count in (1, 2, 4):
        f1, right = [], []
        for n, item in enumerate(items):
            numbers = rng.sample([other for other in range(len(items)) if of[other] != of[n]], count - 1) + [n]
            rng.shuffle(numbers)
            documents = [stored[number] for number in numbers]
            together = join(wire, [document.latents for document in documents])
            reply, = replies(wire, documents, together, [item.example.question])
            f1.append(f1_score(reply["answer"], item.example.answers))
            right.append(float(reply.get("document", str(n)) == str(n)))
        result[count] = {"f1": float(np.mean(f1)), "f1_ci95": interval(f1), "named": float(np.mean(right)),
                         "named_ci95": interval(right)}
        rows.append([count, spread(f1), spread(right)])
        log(f"documents: {count} done")
    table(["documents", "F1", "right one named"], rows)
    return result


def article_text(prompt, examples, T):
    """(T token ids or fewer: an article's first paragraphs, [(question's Item, where its paragraph's middle stands in
    them, 0 to 1)] of the paragraphs that are there whole)."""
    items, begins, end = prompt.items(examples), {}, 0
    for item in items:
        if item.example.context not in begins:
            begins[item.example.context], end = (end, item.context), end + len(item.context)
    text = np.concatenate([part for _, part in begins.values()])[:T]
    middle = lambda item: (begins[item.example.context][0] + len(item.context) / 2) / T
    whole = lambda item: begins[item.example.context][0] + len(item.context) <= T
    return text, [(item, middle(item)) for item in items if whole(item)]


def as_reader(wire, text):
    """The Latents of a text (T,) that the reader itself reads, all of it at once: what it would answer from anyway."""
    wire.lm.config._attn_implementation = "behind"  # without latents it is plain SDPA
    source = wire.source([text], [len(text)]).to(wire.lm.device)
    return wire.read(source, "reader")[2]


def article_answers(wire, text, items):
    """{column: the answers to items about a text (T,)}: by how many latents there are, or a question sees, or of --wire
    tokens by what its reader gets."""
    config, T, questions = wire.config, len(text), [item.example.question for item in items]

    def told(latents, sees=None):
        document = Document(latents, len(wire.layout.before), "")
        return [reply["answer"] for reply in replies(wire, [document], latents, questions, sees)]
    if own_row(config) == "matched_lora":
        given = [replace(item, context=text) for item in items]
        found = evaluate_row("matched_lora", wire.lm, wire.prompt.tokenizer, wire.prompt, given, wire)
        return {"nearest": found["answers"]}
    if config.wire == "tokens":
        return {"text": told(as_reader(wire, text))}
    if wire.layout.late:
        stored = encode(wire, text, wire.stored(T))
        return {f"{M} seen": told(stored, M) for M in reversed(budgets(config))}
    return {name: told(encode(wire, text, M)) for name, M in {"T / M = 8": T // 8, "M = 32": 32, "M = T": T}.items()}


@torch.no_grad()
def bench_articles(args):
    """A text is the first paragraphs of an article; up to five questions of each, on any paragraph."""
    wire = trained_wire(args, lambda config: of_text(config) or own_row(config) in ("text_lora", "matched_lora"),
                        "articles needs latents that stand for a text alone, or --wire tokens --keep all or matched")
    articles, result, rows = {}, {}, []
    for example in load_data(args.data, "dev", 2000 if args.data == "synthetic" else None):
        articles.setdefault(example.title, []).append(example)
    if len(articles) == 1:
        log(f"notice: --data {args.data} names no articles: it is read as one, of which five questions are asked")
    for T in args.lengths or (1024, 2048, 4096, 8000):
        rng, f1, at = random.Random(T), {}, []
        for title in rng.sample(sorted(articles), len(articles)):
            if len(at) >= args.samples:
                break
            text, asked = article_text(wire.prompt, articles[title], T)
            if len(text) < T or not asked:
                continue
            items, places = zip(*rng.sample(asked, min(5, len(asked), args.samples - len(at))))
            at += places
            for name, answers in article_answers(wire, text, items).items():
                f1.setdefault(name, []).extend(f1_score(answer, item.example.answers)
                                               for answer, item in zip(answers, items))
        if not at:
            log(f"notice: --data {args.data} has no article of {T} tokens that hold a whole paragraph: left out")
            continue
        third, first = np.minimum((3 * np.array(at)).astype(int), 2), next(iter(f1))
        result[T] = {"n": len(at), "f1": f1, "place": at}
        rows.append([T, len(at), *(spread(values) for values in f1.values()),
                     ", ".join(f"{100 * np.mean(np.array(f1[first])[third == k]):.0f}" if (third == k).any()
                               else "-" for k in range(3))])
        log(f"articles: {T} tokens done")
    if not rows:
        raise UserError(f"--data {args.data} has no article that is long enough; give other --lengths")
    table(["tokens", "n", *next(iter(result.values()))["f1"], f"{first}: first, middle, last third"], rows)
    return result


def lingua(lm, tokenizer):
    """LLMLingua's PromptCompressor (arXiv 2310.05736) around an LM that is loaded already: loading its own wants a
    download, and it takes a cache for a list of pairs, as older transformers did."""
    from llmlingua import PromptCompressor

    def forward(ids, past_key_values=None, **kwargs):
        with use_lora(lm, None):
            out = lm(ids, past_key_values=DynamicCache(past_key_values), **kwargs)
        return SimpleNamespace(logits=out.logits, past_key_values=[(x.keys, x.values)
                                                                   for x in out.past_key_values.layers])

    class Compressor(PromptCompressor):
        def __init__(self):
            self.tokenizer = self.oai_tokenizer = tokenizer
            self.model, self.device, self.use_llmlingua2 = forward, lm.device, False
            self.max_position_embeddings = lm.config.max_position_embeddings
            self.cache_bos_num, self.prefix_bos_num = 10, 100
    return Compressor()


def lingua_items(compressor, prompt, items, M):
    """Items whose context is the M tokens that LLMLingua leaves of it. A text is one segment: of segments of 200 it
    leaves whole what does not fill one (its issues 73 and 196)."""
    found = {}
    texts = [prompt.tokenizer.decode(item.context).strip() for item in items]  # as far as they are read
    for text in dict.fromkeys(texts):
        size = compressor.get_token_length(text, False)
        short = compressor.compress_prompt([text], target_token=M, iterative_size=size)["compressed_prompt"]
        found[text] = prompt.tokenize([" " + short.strip()])[0][:M]
    return [replace(item, context=found[text]) for item, text in zip(items, texts)]


def press_latents(wire, press, text, M):
    """The Latents that a press of kvpress keeps of a text (T,), which the encoder's LoRA reads (for KVzip twice): M
    places of each head (of KVzip on average), as far from the question as they are in the text."""
    lm, before = wire.lm, wire.layout.before
    ids = torch.from_numpy(np.concatenate([before, text])).long()[None].to(lm.device)
    N, stay = ids.shape[1], len(before) + min(M, len(text))
    press.compression_ratio = 0.0 if stay == N else 1 - (stay + 0.01) / N  # int(N (1 - ratio)) places stay
    cache, at = DynamicCache(), "kvpress.presses.kvzip_press.AutoTokenizer.from_pretrained"
    plain = SimpleNamespace(chat_template=None, encode=wire.prompt.tokenizer.encode)  # the text has no template
    with use_lora(lm, "encoder"), patch(at, lambda name: plain), press(lm):
        # kvpress 0.5 wants cache_position, which transformers no longer passes on by itself
        lm.model(input_ids=ids, past_key_values=cache, use_cache=True, cache_position=torch.arange(N).to(lm.device))
    held = [torch.ones(*layer.keys.shape[:3], dtype=torch.bool, device=lm.device) for layer in cache.layers]
    for there, layer in zip(held, lm.model.layers):
        if dropped := getattr(layer.self_attn, "masked_key_indices", None):  # how KVzip says what it drops
            there[dropped] = False
            layer.self_attn.masked_key_indices = None
    return Latents(torch.tensor([N], device=lm.device), held, None, [layer.keys for layer in cache.layers],
                   [layer.values for layer in cache.layers])


def press_answers(wire, name, items, M):
    """The reader's answers from what a press, by its class's name, keeps of each context, not knowing the question."""
    import kvpress
    press, found = getattr(kvpress, name)(n_sink=len(wire.layout.before)), []
    for item in items:
        latents = press_latents(wire, press, item.context, M)
        with use_lora(wire.lm, "reader"):
            found += generate(wire.lm, wire.prompt.tokenizer, [wire.prompt.after(item)], latents).answers
    return found


@torch.no_grad()
def bench_peers(args):
    """F1 of the wire's own row and of the methods that leave as many tokens, or places a head, by the same reader,
    which was trained on what its own row reads."""
    try:
        import kvpress
        import llmlingua
    except ImportError as error:
        raise UserError(f"peers: {error}; pip install --no-deps -r requirements-bench.txt") from None
    ALL_ATTENTION_FUNCTIONS["noted"] = _attend_and_note  # kvpress wraps all that is registered, this one wrongly
    wire = trained_wire(args, lambda config: config.scope == "context" and not config.ratio and config.wire != "embeds"
                        and own_row(config) != "text_lora", "peers needs a wire of scope context that keeps M")
    config, lm, prompt = wire.config, wire.lm, wire.prompt
    M, own = max(budgets(config)), own_row(config)
    items, result, rows = prompt.items(load_data(args.data, "dev", args.samples)), {}, []
    row = lambda name, some=items: evaluate_row(name, lm, prompt.tokenizer, prompt, some, wire, M)["answers"]
    contenders = {own: partial(row, own)}
    if config.wire == "kv":
        contenders |= {name: partial(press_answers, wire, f"{name}Press", items, M)
                       for name in ("KVzip", "ExpectedAttention")}
    else:
        contenders["LLMLingua"] = lambda: row("text_lora", lingua_items(lingua(lm, prompt.tokenizer), prompt, items, M))
    for name, run in contenders.items():
        f1 = np.array([f1_score(answer, item.example.answers) for answer, item in zip(run(), items)])
        ours = f1 if name == own else ours
        result[name] = {"f1": f1.mean(), "f1_ci95": interval(f1), "n": len(f1), "minus_own": interval(f1 - ours)}
        rows.append([name, spread(f1), "-" if name == own else spread(f1 - ours)])
        log(f"peers: {name} done")
    table([f"{M} tokens or places, n = {len(items)}", "F1", f"- {own}"], rows)
    return result


def main(args):
    check_counts(args, "repeats", "samples", "batch")
    for part in args.parts:
        if part in TRAINED and not args.ckpt:
            raise UserError(f"{part} needs a trained wire: give --ckpt")
    parts = [part for part in PARTS if part in args.parts or "all" in args.parts and part != "peers"
             and (args.ckpt or part not in TRAINED)]
    path = Path(args.out) / "bench.json"
    found, given = read_json(path), args.lm
    for part in parts:
        args.lm = given if part in TRAINED else given or "smollm2-135m"
        lm = args.ckpt if part in TRAINED else args.lm
        print(f"== {part} ({lm}, {torch.get_num_threads()} CPU threads)", flush=True)
        found[part] = {"of": lm, "result": globals()[f"bench_{part}"](args)}
        write_atomic(path, json.dumps(found, indent=2) + "\n")
    log(f"written: {path}")


if __name__ == "__main__":
    run_main(lambda: main(arguments))
