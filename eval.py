"""
Evaluate: answer the same questions through every row, and say what each costs.

    python eval.py --mode all --lm smollm2-135m --data synthetic
    python eval.py --mode text,raw,anchor --lm smollm2-135m --data dev-v1.1.json --samples 200
    python eval.py --mode all --ckpt runs/demo/ckpt/best --data dev-v1.1.json

    text           the prompt's token ids
    raw            the same prompt through inputs_embeds: must equal `text` token by token
    anchor         raw, and the anchor "Answer:" after it, which every row below has too
    token_budget   the user's text cut to its first M tokens
    truncated      the first M tokens of the context, and the question
    selective      the M tokens of the context that surprise the LM most, and the question (Selective-Context)
    matched        the M tokens of the context that stand nearest to the question's words, and the question: a rival that has
                   read the question, for wires that have (--scope asked)
    question_only  the question without its context
    text_lora      `anchor` read by the LM with the trained LoRA on: what LoRA alone brings
    token_budget_lora, truncated_lora, selective_lora, matched_lora   these four with the trained LoRA on
    latent         encoder, adapter, LoRA: M latents in place of the text; latent@16 takes 16 of them whatever --latents
                   says, latent@int8 sends them as integers
    latent_shuffled  the same with the latents of another context: what is left is not carried by the wire
    adapter        the text's embeddings resampled to M places and sent through the trained adapter, no encoder

Writes OUT/eval/metrics.json, predictions.jsonl, metrics_history.jsonl and OUT/logs/embedding_baseline.log.
"""
import json
import os
import re
import string
import sys
import time
import zlib
from collections import Counter
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from common import Parser, UserError, append_line, find_row, first_process, log, run_main, write_atomic

PLAIN = ("text", "raw", "anchor", "token_budget", "truncated", "selective", "matched", "question_only")
TRAINED = ("text_lora", "token_budget_lora", "truncated_lora", "selective_lora", "matched_lora", "latent", "latent_shuffled", "adapter")


def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument_group("what is answered").add_argument
    add("--data", default="synthetic", help="squad, synthetic (default), or a .json, .json.gz or .jsonl file")
    add("--split", default="dev", help="dev (default) or train, of squad and synthetic")
    add("--samples", type=int, default=200, help="questions, drawn with the seed (default 200)")
    add("--seed", type=int, default=0, help="of the draw (default 0)")
    add("--max_context_tokens", type=int, help="leave out questions whose context is longer")
    add = p.add_argument_group("by which row, LM and wire").add_argument
    add("--mode", default="all", help=f"rows, comma-separated, out of {', '.join(PLAIN + TRAINED)}, or all (default)")
    add("--ckpt", help="checkpoint folder of a trained wire, e.g. runs/demo/ckpt/best")
    add("--lm", help="hub id, local folder, .gguf file, or smollm2-135m (default: the checkpoint's, else smollm2-135m)")
    add("--prompt", choices=("plain", "chat"), help="prompt style (default: the checkpoint's, else plain)")
    add("--max_prompt_tokens", type=int, help="cut contexts from the right to fit (default: the checkpoint's, else 1024)")
    add("--latents", type=int, help="M (default: the checkpoint's, else 32)")
    add("--ratio", type=float, help="tokens per latent: M = ceil(T / ratio) for each context, in place of --latents")
    add("--wire", default="fp32", choices=("fp32", "fp16", "int8", "int4"), help="how the latents travel to the LM (default fp32)")
    add("--upper", help="run of a wire trained with --encoder text and evaluated on the same questions: prints the retention")
    add = p.add_argument_group("how").add_argument
    add("--max_new_tokens", type=int, default=24, help="of an answer (default 24)")
    add("--batch", type=int, default=25, help="questions a batch (default 25)")
    add("--shard", action="store_true", help="under torchrun: spread the LM over the processes, for one that is too large for a GPU")
    add("--device", help="cuda, cuda:1, cpu (default: a GPU where there is one)")
    add("--out", help="folder to write to (default: the checkpoint's run, else runs/eval)")
    add("--json", action="store_true", help="print metrics.json in place of the table")
    return p.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()  # before the heavy imports, so that --help and typing errors answer at once

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import Prompt, group_by_context, load_data, synthetic_chance
from lm import generate, join, load_lm, lora_off, pick_device, shard
from model import GROUP, SCALE_BITS, WIRES, budget, budgets, dequantise, load_wire, payload_bytes, quantise, rarity, read_checkpoint
from rivals import adapter_prefix, most_surprising, nearest_words, other_contexts


# ------------------------------------------------------------------------------------------------
# SQuAD's own scores (Rajpurkar et al., arXiv 1606.05250)

def normalize(text):
    """Lower case, without punctuation, articles and extra whitespace."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1_score(prediction, golds):
    """Token F1 in 0..1 against the best of the gold answers, equal to SQuAD v1.1's official script."""
    def one(gold):
        p, g = normalize(prediction).split(), normalize(gold).split()
        same = sum((Counter(p) & Counter(g)).values())
        return 2 * same / (len(p) + len(g)) if same else 0.0
    return max(map(one, golds), default=0.0)


def exact_match(prediction, golds):
    """1.0 if the normalised prediction equals one of the normalised gold answers, else 0.0."""
    return float(any(normalize(prediction) == normalize(gold) for gold in golds))


def interval(values, seed=0, resamples=2000):
    """95% bootstrap interval [low, high] of the mean of (n,) values."""
    values = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    return [float(x) for x in np.percentile(values[picks].mean(1), [2.5, 97.5])]


def ratio_interval(a, b, seed=0, resamples=2000):
    """95% bootstrap interval [low, high] of mean(a) / mean(b) over the same n questions."""
    picks = np.random.default_rng(seed).integers(len(a), size=(resamples, len(a)))
    return [float(x) for x in np.percentile(a[picks].mean(1) / np.maximum(b[picks].mean(1), 1e-9), [2.5, 97.5])]


# ------------------------------------------------------------------------------------------------
# Rows

def length_batches(lengths, batch, padded=5000):
    """Numbers of items of like length, at most `batch` of them and `padded` tokens a batch, so that few long contexts do not
    pad many short ones. Longest first: what does not fit into memory fails at once, and the ETA falls rather than grows."""
    chunks = [[]]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if chunks[-1] and (len(chunks[-1]) == batch or lengths[chunks[-1][0]] * (len(chunks[-1]) + 1) > padded):
            chunks.append([])
        chunks[-1].append(i)
    return chunks


def row_ids(row, prompt, item, scope, m, picked=None):
    """The token ids that a row reads for an item (LATENT where a latent goes). m: how many latents, or tokens in the rows
    that are cut to a budget; picked: the context's tokens for `selective` and `matched`."""
    if row in ("text", "raw"):
        return prompt.text(item)
    if row in ("anchor", "text_lora"):
        return np.concatenate([prompt.text(item), prompt.anchor])
    if row.startswith("token_budget"):
        content = np.concatenate([prompt.head, item.context, item.question])
        return np.concatenate([prompt.pre, content[:m], prompt.post, prompt.anchor])
    if row.startswith(("truncated", "selective", "matched")):
        picked = item.context[:m] if picked is None else picked
        return np.concatenate([prompt.pre, prompt.head, picked, item.question, prompt.post, prompt.anchor])
    if row == "question_only":
        return np.concatenate([prompt.pre, item.question, prompt.post, prompt.anchor])
    return np.concatenate([prompt.prefix(item, scope, m), prompt.asked(item, scope)])


@torch.no_grad()
def evaluate_row(row, lm, tokenizer, prompt, items, wire=None, M=None, ratio=None, max_new_tokens=24, batch=25, bar=None, kind="fp32"):
    """Answer every item through one row, at M latents or tokens, or at ceil(T / ratio) (default: what the wire was trained
    for), the latents quantised as `kind` says. Returns a dict with, per item in order, `answers`, `ids`, `f1`, `em`, and the means nll_token, first_token_top1,
    first_token_top5, tokens_read, latents, and seconds encode, prefill, decode."""
    row, _, own = row.partition("@")
    if own in WIRES:
        kind = own
    elif own:
        M, ratio = int(own), None
    if row not in TRAINED and wire is not None:
        with lora_off(lm):
            return evaluate_row(row, lm, tokenizer, prompt, items, None, M, ratio, max_new_tokens, batch, bar)
    device = lm.get_input_embeddings().weight.device
    scope = wire.config.scope if wire else "context"
    uses_latents = row in ("latent", "latent_shuffled", "adapter")
    given = other_contexts(items) if row == "latent_shuffled" else range(len(items))
    if row.startswith("matched"):
        contexts = [items[group[0]].context for group in group_by_context(items)]  # each once, however many questions it has
        rare = rarity(contexts, [item.question for item in items], prompt.around, lm.config.vocab_size)
    answers, ids, hits = [None] * len(items), [None] * len(items), []
    nll = tokens = read = source_tokens = latents = 0
    encode_s = prefill_s = decode_s = 0.0
    for chunk in length_batches([len(item.context) for item in items], batch):
        prefix, picked = None, [None] * len(chunk)
        m = [budget(prompt.replaced(items[i], scope), M or 32, ratio) for i in chunk]  # tokens, for the rows that are cut
        began = time.perf_counter()
        if uses_latents:
            # The control keeps the question: what a question alone can do is no work of the context's latents.
            given_items = [replace(items[i], context=items[given[i]].context) for i in chunk]
            # The adapter alone has not read the question where that stays text.
            context, asked = (t.to(device) for t in prompt.sources(given_items, "context" if row == "adapter" and scope == "asked" else scope))
            m = [wire.count(prompt.replaced(item, scope), M, ratio) for item in given_items]
            counts = torch.tensor(m, device=device)
            prefix = adapter_prefix(wire, context, counts) if row == "adapter" else wire.encode(context, counts, asked)[0]
            prefix = prefix if kind == "fp32" else dequantise(*quantise(prefix, kind))
            source_tokens += sum(prompt.replaced(item, scope) for item in given_items)
            latents += sum(m)
        elif row.startswith("selective"):
            picked = most_surprising(lm, prompt, [items[i].context for i in chunk], m)
        elif row.startswith("matched"):
            picked = nearest_words(lm, prompt, [items[i] for i in chunk], m, rare)
        if device.type == "cuda":
            torch.cuda.synchronize()
        encode_s += time.perf_counter() - began
        rows = [row_ids(row, prompt, items[i], scope, *rest) for i, *rest in zip(chunk, m, picked)]
        read += sum(map(len, rows))
        out = generate(lm, tokenizer, rows, prefix, max_new_tokens, row == "text",
                       golds=[items[i].answer[:-1] for i in chunk])  # of the first gold answer, without its end token
        prefill_s, decode_s = prefill_s + out.prefill, decode_s + out.decode
        nll += F.cross_entropy(out.logits, out.labels, reduction="sum").item()
        tokens += len(out.labels)
        label_logit = out.logits[out.first].gather(1, out.labels[out.first, None])
        hits += (out.logits[out.first] > label_logit).sum(1).tolist()  # how many tokens are likelier than the gold one
        for i, text, new in zip(chunk, out.answers, out.ids):
            answers[i], ids[i] = text, new
        if bar is not None:
            bar.update(len(chunk))
    n, hits = len(items), np.array(hits)
    return {
        "answers": answers, "ids": ids,
        "f1": [f1_score(a, item.example.answers) for a, item in zip(answers, items)],
        "em": [exact_match(a, item.example.answers) for a, item in zip(answers, items)],
        "nll_token": nll / tokens, "first_token_top1": float((hits < 1).mean()), "first_token_top5": float((hits < 5).mean()),
        "tokens_read": read / n, "source_tokens": source_tokens / n, "latents": latents / n,
        "encode_s": encode_s, "prefill_s": prefill_s, "decode_s": decode_s,
    }


def summary(result):
    """The scores of one row as they stand in metrics.json."""
    n = len(result["f1"])
    return {
        "f1": float(np.mean(result["f1"])), "em": float(np.mean(result["em"])),
        "f1_ci95": interval(result["f1"]), "em_ci95": interval(result["em"]),
        "nll": result["nll_token"], "nll_token": result["nll_token"],
        "first_token_top1": result["first_token_top1"], "first_token_top5": result["first_token_top5"],
        "distinct_first_words": len({answer.split(" ")[0] for answer in result["answers"]}),
        "tokens_read": result["tokens_read"],
        "encode_sec_per_sample": result["encode_s"] / n,
        "prefill_sec_per_sample": result["prefill_s"] / n, "decode_sec_per_sample": result["decode_s"] / n,
    }


# ------------------------------------------------------------------------------------------------
# Files and table

def place_row(metrics, row, name, result):
    """Put a row where the preserved run's schema has it."""
    scores = summary(result)
    ready = result["prefill_s"] + result["decode_s"]
    wall = ready + result["encode_s"]
    if row in ("raw", "anchor", "adapter"):
        metrics.setdefault("embedding_baselines", {})[row] = {"metrics": {name: scores}, "wall_clock_sec": {name: wall}}
        if row == "raw":
            metrics["text_embed"] = {name: scores, "wall_clock_sec": wall}
    else:
        metrics[row] = {name: scores, "wall_clock_sec": wall}
        if row == "token_budget":
            metrics[row].update(mode="content_only", k=metrics["latent_len"])
        if row.startswith("latent"):
            metrics[row]["wall_clock_ready_sec"] = ready


def table(metrics, name):
    """The rows evaluated so far, scores in percent with 95% intervals."""
    own = sorted((key for key in metrics if "@" in key), key=lambda key: (key.split("@")[0], key.split("@")[1].zfill(4)))
    found = {row: find_row(metrics, row, name) for row in [*PLAIN, *TRAINED, *own]}
    found = {row: value for row, value in found.items() if value}
    reference = found["text"][0]["f1"] if "text" in found else None
    lines = [f"{'Mode':<18}{'F1 %':>7}{'[95%]':>15}{'EM %':>7}{'[95%]':>15}{'vs text':>11}{'NLL/tok':>9}{'top-1 %':>9}{'tokens':>8}{'sec':>8}"]
    for row, (s, wall) in found.items():
        f1, em = (f"[{100 * a:.1f}, {100 * b:.1f}]" for a, b in (s["f1_ci95"], s["em_ci95"]))
        versus = "Reference" if row == "text" else "-" if reference is None else f"{100 * (s['f1'] - reference):+.1f}"
        lines.append(f"{row:<18}{100 * s['f1']:>7.1f}{f1:>15}{100 * s['em']:>7.1f}{em:>15}{versus:>11}{s['nll_token']:>9.2f}"
                     f"{100 * s['first_token_top1']:>9.1f}{s['tokens_read']:>8.1f}{wall:>8.1f}")
    return "\n".join(lines)


def _read_results(folder):
    """(metrics, records) that an evaluation wrote, or empty ones."""
    try:
        with open(folder / "predictions.jsonl", encoding="utf-8") as f:
            return json.loads((folder / "metrics.json").read_text(encoding="utf-8")), [json.loads(line) for line in f]
    except (OSError, ValueError):
        return {}, []


def read_earlier(folder, fingerprint):
    """(metrics, records) of an earlier call into the same folder on the same data and LM, else empty ones."""
    metrics, records = _read_results(folder)
    if metrics.get("fingerprint") != fingerprint:
        if metrics:
            log(f"notice: {folder / 'metrics.json'} is of another LM, data or setting; it is replaced")
        return {}, []
    return metrics, records


def write_results(out, metrics, records, argv, rows):
    """metrics.json and predictions.jsonl whole, metrics_history.jsonl and embedding_baseline.log with what is new."""
    write_atomic(out / "eval" / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_atomic(out / "eval" / "predictions.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    name = metrics["lm"]
    stamp = datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
    entry = {"kind": "eval", "tag": out.name, "argv": argv, "timestamp": stamp,
             "rows": {row: {"f1": find_row(metrics, row, name)[0]["f1"], "em": find_row(metrics, row, name)[0]["em"]} for row in rows}}
    append_line(out / "eval" / "metrics_history.jsonl", json.dumps(entry))
    lines = [f"{stamp} {row}: f1 {s['f1']:.4f} em {s['em']:.4f} nll_token {s['nll_token']:.4f} wall {wall:.2f} s, n {metrics['samples']}"
             for row in rows if row in ("raw", "anchor", "adapter") for s, wall in [find_row(metrics, row, name)]]
    if lines:
        append_line(out / "logs" / "embedding_baseline.log", "\n".join(lines))


def choose_rows(mode, ckpt):
    known = PLAIN + TRAINED
    if mode == "all":
        if not ckpt:
            log(f"notice: without --ckpt, {', '.join(TRAINED)} are left out")
        return known if ckpt else PLAIN
    rows = tuple(dict.fromkeys(part.strip() for part in mode.split(",")))
    for row in rows:
        name, at, own = row.partition("@")
        if name not in known or at and not (name in ("latent", "latent_shuffled") and (own in WIRES or own.isdigit() and int(own))):
            raise UserError(f"--mode {row} is unknown; there are {', '.join(known)}, all, latent@16 for another M, latent@int8 for another wire")
        if name in TRAINED and not ckpt:
            raise UserError(f"--mode {row} needs a trained wire: make one with `python train.py --preset demo`, then give "
                            "--ckpt runs/demo/ckpt/best")
    return rows


def main():
    from tqdm import tqdm
    rows = choose_rows(args.mode, args.ckpt)
    for option in ("samples", "batch", "max_new_tokens", "latents", "ratio"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise UserError(f"--{option} {value} must be at least 1")
    # A run is RUN/ckpt/best; a checkpoint elsewhere, such as a preserved one, is not written beside.
    run = Path(args.ckpt).resolve().parent if args.ckpt else None
    out = Path(args.out or (run.parent if run and run.name == "ckpt" else "runs/eval"))
    saved = read_checkpoint(args.ckpt) if args.ckpt else None
    master = first_process()
    if master:
        writable(out / "eval")
    config = saved.config if saved else None
    lm_name = args.lm or (config.lm if config else "smollm2-135m")
    device, dtype, why = pick_device(args.device)
    if args.shard:
        device = join(device, 15)
        if not saved:
            raise UserError("--shard needs --ckpt: it is for trained wires")
    lm, tokenizer = load_lm(lm_name, dtype, "cpu" if args.shard else args.device)
    prompt = Prompt(tokenizer, args.prompt or (config.prompt if config else "plain"),
                    args.max_prompt_tokens or (config.max_prompt_tokens if config else 1024))
    wire = load_wire(saved, lm).eval() if saved else None
    if args.shard:
        shard(wire, device)
    M = args.latents or (max(budgets(config)) if config else 32)
    ratio = args.ratio if args.ratio is not None or args.latents or not config else config.ratio or None
    examples = load_data(args.data, args.split, args.samples if args.max_context_tokens is None else None, args.seed)
    items = prompt.items(examples)
    if args.max_context_tokens is not None:
        items = draw_short(items, args)
    prompt.report_cuts(args.data)
    n, name = len(items), Path(lm.name).name
    log(f"{name} on {device} in {dtype} ({why}), attention sdpa; {n} questions; rows: {', '.join(rows)}")

    fingerprint = {"lm": name, "data": data_checksum(items), "prompt": prompt.style, "max_prompt_tokens": prompt.max_prompt_tokens,
                   "latents": M, "ratio": ratio, "wire": args.wire, "max_new_tokens": args.max_new_tokens}
    metrics, earlier = read_earlier(out / "eval", fingerprint)
    if saved and metrics.get("ckpt_sha256") != saved.checksum:  # rows of another checkpoint go, those that need none stay
        for place in (metrics, metrics.get("embedding_baselines", {}), *earlier):
            for row in [key for key in place if key.split("@")[0] in TRAINED or key in ("wire", "carried", "carried_ci95", "retention", "compression_of_all_the_lm_reads")
                        or key.startswith("payload_bytes")]:
                del place[row]
        metrics["ckpt_sha256"] = saved.checksum
    metrics.update({
        "samples": n, "max_new_tokens": args.max_new_tokens, "device": device.type, "dtype": str(dtype),
        "dataset": args.data, "lm": name, "fingerprint": fingerprint, "seed": args.seed, **provenance(),
        "avg_prompt_tokens": {name: float(np.mean([len(prompt.text(item)) for item in items]))},
        "debug": {name: {"latent_anchor_text": tokenizer.decode(prompt.anchor)},
                  "settings": {"latent_anchor_mode": "text", "latent_anchor_text": "Answer:", "prefix_gain": 1.0,
                               "calibration_mode": "embed_rms", "embedding_replay": True,
                               "embedding_baseline_modes": ["raw", "anchor", "adapter"]}},
    })
    if "latent" not in metrics:
        metrics["latent_len"], metrics["compression"] = M, {name: metrics["avg_prompt_tokens"][name] / M}
    if config or "is_text" not in metrics:
        metrics["is_text"] = bool(config and config.encoder == "text")
    upper = read_upper(args.upper, fingerprint) if args.upper else None
    records = earlier or [
               {"id": item.example.id, "prompt": tokenizer.decode(prompt.text(item)), "golds": list(item.example.answers)} for item in items]
    with tqdm(total=n * len(rows), unit="q", smoothing=0.05, disable=not master) as bar:
        for row in rows:
            bar.set_description(row)
            result = evaluate_row(row, lm, tokenizer, prompt, items, wire, M, ratio, args.max_new_tokens, args.batch, bar, args.wire)
            place_row(metrics, row, name, result)
            if row == "latent":
                describe_wire(metrics, name, result, prompt, items, wire)
            kind = row.partition("@")[2] if "@" in row else args.wire
            if row.startswith("latent") and "shuffled" not in row and kind in WIRES:
                values = round(result["latents"] * n) * lm.config.hidden_size
                metrics.setdefault("wire", {}).setdefault("quality", {})[kind] = {
                    **{key: metrics[row][name][key] for key in ("f1", "f1_ci95", "em")}, "bytes": payload_bytes(values, kind)}
            for record, answer in zip(records, result["answers"]):
                record[row] = answer
            comparison = compare(metrics, records, upper)
            if master:
                write_results(out, metrics, records, sys.argv[1:], [row])  # after each row: an interrupted run keeps them
    size = "M = T" if metrics["is_text"] else f"M = T / {ratio:g}" if ratio else f"M = {M}"
    lines = [f"\n{name}, {args.data}, n = {n}, prompt {prompt.style}, {size}", table(metrics, name)]
    if args.data == "synthetic":
        chance = synthetic_chance([item.example for item in items])
        lines.append(f"chance level, a random fact of the right kind out of the passage: EM {100 * chance:.1f}")
    lines += comparison + [f"written to {out / 'eval'}"]
    if master:
        print(json.dumps(metrics, indent=2) if args.json else "\n".join(lines))
    if args.shard:
        dist.destroy_process_group()


def read_upper(folder, fingerprint):
    """The answers of the text-tuned reader: the row `latent` of a run trained with --encoder text, evaluated on the same
    questions. Raises UserError where that is not what the folder holds."""
    metrics, records = _read_results(Path(folder) / "eval")
    if "latent" not in metrics:
        raise UserError(f"--upper {folder}: no evaluated run there; first: python eval.py --mode latent --ckpt {folder}/ckpt/best --data ...")
    if any(metrics["fingerprint"][key] != fingerprint[key] for key in ("lm", "data", "prompt")) or not metrics.get("is_text"):
        raise UserError(f"--upper {folder} must be a run of --encoder text, evaluated on the same LM, prompt and questions")
    if len(records) < metrics["samples"]:
        raise UserError(f"--upper {folder} holds only {len(records)} of its {metrics['samples']} predictions; evaluate its checkpoint again")
    return [record["latent"] for record in records]


def compare(metrics, records, upper):
    """Lines to print on how the latents compare, question by question: what the wire carries, and which share of the F1 of
    the zero-shot and of the tuned text reader it keeps. Puts the same into metrics."""
    if not records or "latent" not in records[0]:
        return []
    f1 = lambda answers: np.array([f1_score(answer, record["golds"]) for answer, record in zip(answers, records)])
    latent, lines = f1([record["latent"] for record in records]), []
    if "latent_shuffled" in records[0]:
        gap = latent - f1([record["latent_shuffled"] for record in records])
        low, high = metrics["carried_ci95"] = interval(gap)
        metrics["carried"] = float(gap.mean())
        lines.append(f"carried by the wire (latent - latent_shuffled): F1 {100 * gap.mean():+.1f} [{100 * low:.1f}, {100 * high:.1f}]")
    metrics["retention"] = {}
    references = {"zero-shot text (anchor)": [record.get("anchor") for record in records],
                  "text_lora, this wire's LoRA on the whole text": [record.get("text_lora") for record in records],
                  "a reader tuned on text (--upper)": upper}
    for what, answers in references.items():
        if answers and None not in answers and (reference := f1(answers)).any():
            low, high = ratio_interval(latent, reference)
            metrics["retention"][what] = {"ratio": float(latent.mean() / reference.mean()), "ci95": [low, high], "f1": float(reference.mean())}
            lines.append(f"retention: {latent.mean() / reference.mean():.2f} [{low:.2f}, {high:.2f}] of {what}, F1 {100 * reference.mean():.1f}")
    return lines


def writable(folder):
    """Raise UserError now, not after an hour of answers, where a folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {folder.parent} cannot be written ({error.strerror}); give another folder") from None


def draw_short(items, args):
    """The seed's draw of --samples items among those whose context is short enough."""
    import random
    short = [item for item in items if len(item.context) <= args.max_context_tokens]
    if not short:
        raise UserError(f"--max_context_tokens {args.max_context_tokens}: no context is that short; raise it")
    log(f"notice: {len(items) - len(short)} of {len(items)} questions have longer contexts and are left out")
    return random.Random(args.seed).sample(short, min(args.samples, len(short)))


def provenance():
    """What made these numbers: package versions, git commit and command line."""
    import platform
    import subprocess
    from importlib.metadata import version
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    return {"versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "safetensors", "numpy")}},
            "git_commit": commit or None, "argv": sys.argv[1:]}


def data_checksum(items):
    """Of ids, contexts, questions and answers, in order."""
    import hashlib
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(item.example).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def describe_wire(metrics, name, result, prompt, items, wire):
    """Compression and payload of the latents, in the preserved run's fields."""
    if metrics["fingerprint"]["ratio"] or metrics["is_text"]:
        metrics["latent_len"] = round(result["latents"], 1)  # on average
    n, M, d = metrics["samples"], metrics["latent_len"], wire.lm.config.hidden_size
    whole = np.mean([len(prompt.text(item)) + len(prompt.anchor) for item in items])
    metrics["compression"] = {name: result["source_tokens"] / result["latents"]}
    metrics["compression_of_all_the_lm_reads"] = {name: float(whole / result["tokens_read"])}
    bytes_of = {kind: payload_bytes(round(result["latents"] * n) * d, kind) for kind in WIRES}
    metrics["payload_bytes"] = bytes_of[args.wire]
    metrics["payload_bytes_detail"] = {**bytes_of, "selected": args.wire}
    texts = [item.example.context.encode("utf-8", "surrogatepass") for item in items]  # what the latents stand in for
    size = {"utf8": sum(map(len, texts)), "zlib": sum(len(zlib.compress(text, 9)) for text in texts)}
    metrics["wire"] = {"prompt_chars": {name: sum(len(item.example.context) for item in items)}, "prompt_count": n, "latent_shape": [n, M, d],
                       "latent_bytes": bytes_of, "text_bytes": size, "group_size": GROUP, "scale_bits": SCALE_BITS, "selected_latent_bytes": bytes_of[args.wire],
                       "wire_ratio": {kind: size["utf8"] / count for kind, count in bytes_of.items()},
                       "quality": metrics.get("wire", {}).get("quality", {})}


if __name__ == "__main__":
    run_main(main)
