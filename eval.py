"""
Evaluate: answer the same questions through every row of rows.py, and say what each costs.

    python eval.py --mode all --lm smollm2-135m --data synthetic
    python eval.py --mode text,raw,anchor --lm smollm2-135m --data dev-v1.1.json --samples 200
    python eval.py --mode all --ckpt runs/demo/ckpt/best --data dev-v1.1.json

Writes OUT/eval/metrics.json, predictions.jsonl, metrics_history.jsonl and OUT/logs/embedding_baseline.log.
"""
import json
import os
import sys
from datetime import datetime, timezone
from pathlib import Path

from common import (Parser, UserError, append_line, check_counts, claim, find_row, first_process, log, read_json,
                    read_lines, run_main, write_atomic)


def parse_args(argv=None):
    doc = __doc__
    if {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv):
        from rows import ROWS  # takes seconds, which a typing error should not
        doc += "\nRows of --mode:\n" + "".join(f"    {name:<18} {row.help}\n" for name, row in ROWS.items())
    p = Parser(doc)
    add = p.add_argument_group("what is answered").add_argument
    add("--data", default="synthetic", help="squad, synthetic (default), or a .json, .json.gz or .jsonl file")
    add("--split", default="dev", choices=("dev", "train"), help="of squad and synthetic (default dev)")
    add("--samples", type=int, default=200, help="questions, drawn with the seed (default 200)")
    add("--seed", type=int, default=0, help="of the draw (default 0)")
    add = p.add_argument_group("by which row, LM and wire").add_argument
    add("--mode", default="all", help="rows, comma-separated: own is the one that the wire was trained for, all "
                                      "(default) are those that this LM or wire can answer")
    add("--ckpt", type=os.path.expanduser, help="checkpoint folder of a trained wire, e.g. runs/demo/ckpt/best")
    add("--lm", help="hub id, local folder, .gguf file, or smollm2-135m (default: the checkpoint's, else smollm2-135m)")
    add("--prompt", choices=("plain", "chat"), help="prompt style (default: the checkpoint's, else plain)")
    add("--max_prompt_tokens", type=int, help="contexts are cut to fit, and read at once (default: the "
                                                   "checkpoint's, else 1024)")
    add("--latents", type=int, help="M (default: the checkpoint's, else 32)")
    add("--ratio", type=float, help="tokens per latent: M = ceil(T / ratio) for each text, in place of --latents; in "
                                    "scope asked how densely a document is stored")
    add("--read_again", action="store_true", help="choose latents by a second reading of the text, as training does, "
                                                  "not by what the checkpoint predicts of it")
    add = p.add_argument_group("how").add_argument
    add("--max_new_tokens", type=int, default=24, help="of an answer (default 24)")
    add("--batch", type=int, default=25, help="questions a batch (default 25)")
    add("--shard", action="store_true", help="under torchrun: spread the LM over the processes, for one that is too "
                                             "large for a GPU")
    add("--device", help="cuda, cuda:1, cpu (default: a GPU where there is one)")
    add("--dtype", help="float32 or bfloat16 (default: bfloat16 on a GPU that has it, else float32)")
    add("--out", type=os.path.expanduser, help="folder to write to (default: the checkpoint's run, else runs/eval)")
    add("--json", action="store_true", help="print metrics.json in place of the table")
    return p.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()  # before the heavy imports, so that --help and typing errors answer at once

import numpy as np
import torch.distributed as dist

from data import Prompt, checksum, load_data, synthetic_chance
from lm import check_length, join_processes, lm_identity, load_lm, pick_device, shard
from model import LatentWire, how_many, untrained
from report import Run, score_table
from rows import (ROWS, evaluate_row, f1_score, interval, own_row, read_latents, rows_of, split_row, summary,
                  words_of)
from store import (FORMATS, SCALE_BITS, group_size, load_wire, place_values, read_checkpoint, stored_bytes,
                   vector_width)


SHOWN = 20  # questions of which is written down what the wire keeps


# ------------------------------------------------------------------------------------------------
# Files and table

def place_row(metrics, row, name, result, late):
    """Put a row where the preserved run's schema has it. late: whether M is what a question sees of what is stored."""
    scores, wall = summary(result), result["encode_s"] + result["prefill_s"] + result["decode_s"]
    if row in ("raw", "anchor", "adapter"):
        metrics.setdefault("embedding_baselines", {})[row] = {"metrics": {name: scores}, "wall_clock_sec": {name: wall}}
        if row == "raw":
            metrics["text_embed"] = {name: scores, "wall_clock_sec": wall}
    else:
        metrics[row] = {name: scores, "wall_clock_sec": wall}
        if row == "token_budget":
            k = None if metrics["fingerprint"]["ratio"] and not late else metrics["fingerprint"]["latents"]
            metrics[row].update(mode="content_only", k=k)


def table(out):
    """The rows evaluated so far, scores with 95% intervals."""
    head, rows = score_table(run := Run(out))
    lines = [head, *([name, *cells] for name, (_, *cells) in zip(run.rows, rows))]  # by the names that --mode takes
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def read_earlier(folder, fingerprint):
    """(metrics, records) of an earlier call into the same folder on the same data and LM, else empty ones."""
    metrics, records = read_json(folder / "metrics.json"), read_lines(folder / "predictions.jsonl")
    theirs = metrics.get("fingerprint", {})
    other = [key for key in fingerprint if theirs.get(key) != fingerprint[key]]
    if metrics and other:
        log(f"notice: {folder / 'metrics.json'} is of another {', '.join(other)}; it is replaced")
    elif metrics and len(records) != metrics["samples"]:
        log(f"notice: {folder / 'predictions.jsonl'} is not whole; the rows of before are replaced")
    return ({}, []) if other or len(records) != metrics["samples"] else (metrics, records)


def write_results(out, metrics, records, argv, row):
    """metrics.json and predictions.jsonl whole; metrics_history.jsonl and embedding_baseline.log get the new row."""
    write_atomic(out / "eval" / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_atomic(out / "eval" / "predictions.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    scores, wall = find_row(metrics, row, metrics["lm"])
    stamp = datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
    entry = {"kind": "eval", "tag": out.name, "argv": argv, "timestamp": stamp,
             "rows": {row: {key: scores[key] for key in ("f1", "em")}}}
    append_line(out / "eval" / "metrics_history.jsonl", json.dumps(entry))
    if row in ("raw", "anchor", "adapter"):
        line = f"{stamp} {row}: " + " ".join(f"{key} {scores[key]:.4f}" for key in ("f1", "em", "nll_token"))
        append_line(out / "logs" / "embedding_baseline.log", f"{line} wall {wall:.2f} s, n {metrics['samples']}")


# ------------------------------------------------------------------------------------------------
# Comparisons

def compare(metrics, records):
    """Lines to print on how the latents compare, question by question: what the wire carries, and which share of the
    F1 of the zero-shot and of the tuned reader of the text it keeps. Puts the same into metrics."""
    if not records or "latent" not in records[0]:
        return []
    f1 = lambda answers: np.array([f1_score(answer, record["golds"]) for answer, record in zip(answers, records)])
    latent, lines = f1([record["latent"] for record in records]), []
    if "latent_shuffled" in records[0]:
        gap = latent - f1([record["latent_shuffled"] for record in records])
        low, high = metrics["carried_ci95"] = interval(gap)
        metrics["carried"] = float(gap.mean())
        lines.append(f"carried by the wire (latent - latent_shuffled): F1 {100 * gap.mean():+.1f} "
                     f"[{100 * low:.1f}, {100 * high:.1f}]")
    metrics["retention"] = {}
    references = {"zero-shot text (anchor)": [record.get("anchor") for record in records],
                  "text_lora, this wire's LoRA on the whole text": [record.get("text_lora") for record in records]}
    for what, answers in references.items():
        if None not in answers and (reference := f1(answers)).any():
            ratio, (low, high) = latent.mean() / reference.mean(), interval(latent, reference)
            metrics["retention"][what] = {"ratio": float(ratio), "ci95": [low, high], "f1": float(reference.mean())}
            lines.append(f"retention: {ratio:.2f} [{low:.2f}, {high:.2f}] of {what}, F1 {100 * reference.mean():.1f}")
    return lines


def kept_words(wire, item, M, ratio):
    """[[a token of the item's text, which share of its latents it is], ...]: what the wire keeps of it."""
    latents, *_ = read_latents(ROWS["latent"], wire, [item], [item], M, ratio, "fp32")
    pieces, found, share = wire.prompt.pieces(wire.layout.source(item)), [], 0.0
    for piece, part in zip(pieces, latents.of_tokens(len(pieces), len(wire.layout.before)).tolist()):
        share += part
        if piece:
            found.append([piece, round(share, 4)])
            share = 0.0
    return found


def describe_latents(metrics, name, result, items, wire):
    """Compression (by the latents that a question sees) and payload (of all that are stored), in the preserved run's
    fields. Bytes count the keys and values of the text before the latents too, where the wire sends them."""
    n, before = metrics["samples"], len(wire.layout.before) if wire.config.wire == "kv" else 0
    M, ratio = (metrics["fingerprint"][key] for key in ("latents", "ratio"))
    metrics["latent_len"] = round(result["latents"], 1) if ratio else M  # on average
    metrics["compression"] = {name: result["source_tokens"] / max(result["latents"], 1e-9)}
    places = round(result["stored"] * n) + n * before
    bytes_of = {kind: stored_bytes(wire.lm, wire.config, places, kind) for kind in FORMATS}
    texts = [item.example.context for item in items]  # what the latents stand in for
    utf8 = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    metrics["payload_bytes"], metrics["payload_bytes_detail"] = bytes_of["fp32"], {**bytes_of, "selected": "fp32"}
    metrics["wire"] = {
        "prompt_chars": {name: sum(map(len, texts))}, "prompt_count": n,
        "latent_shape": [n, metrics["latent_len"], place_values(wire.lm, wire.config.wire)], "latent_bytes": bytes_of,
        "text_bytes": {"utf8": utf8}, "group_size": group_size(vector_width(wire.lm, wire.config.wire)),
        "scale_bits": SCALE_BITS,
        "selected_latent_bytes": bytes_of["fp32"],
        "wire_ratio": {kind: utf8 / count for kind, count in bytes_of.items()}}


# ------------------------------------------------------------------------------------------------
# The evaluation

def named(mode):
    """The names in --mode."""
    return [part.strip() for part in mode.split(",")]


def choose_rows(mode, config, trained):
    """The names of --mode's rows. config: of the wire, trained or not. Raises UserError for a row that is none or that
    this wire cannot answer."""
    can = [name for name in rows_of(config) if trained or not ROWS[name].lora]
    if "all" in named(mode) and (missing := [name for name in ROWS if name not in can]):
        why = f"--wire {config.wire} has none" if trained else "no --ckpt (latent by name: of an untrained wire)"
        log(f"notice: {', '.join(missing)} are left out: {why}")
    meant = {"all": can, "own": [own_row(config)]}
    rows = list(dict.fromkeys(row for name in named(mode) for row in meant.get(name, [name])))
    for name in rows:
        row = split_row(name)[0]
        if row not in can and (trained or ROWS[row].latents not in ("own", "other")):
            raise UserError(f"--mode {name} needs " + (
                f"another wire than this one of --wire {config.wire}: train one with --wire "
                f"{'embeds' if row == 'adapter' else 'kv'}"
                if trained else "a trained wire: make one with `python train.py --preset demo"
                               f"{' --wire embeds' * (row == 'adapter')}`, then give --ckpt "
                               "runs/demo/ckpt/best"))
    return rows


def provenance():
    """What makes these numbers: package versions and git commit, "-dirty" where a program is no longer as committed."""
    import platform
    import subprocess
    from importlib.metadata import version
    git = lambda *what: subprocess.run(["git", *what], cwd=Path(__file__).parent, capture_output=True,
                                       text=True).stdout.strip()
    try:
        commit = git("rev-parse", "HEAD")
        commit += "-dirty" * bool(git("status", "--porcelain", "--untracked-files=no", "*.py"))
    except OSError:  # no git here
        commit = ""
    packages = {name: version(name) for name in ("torch", "transformers", "safetensors", "numpy")}
    return {"versions": {"python": platform.python_version(), **packages}, "git_commit": commit or None}


def begin_metrics(metrics, args, fingerprint, prompt, items, saved):
    """The fields of metrics.json that no row changes."""
    name = fingerprint["lm"]
    metrics.update({
        "samples": len(items), "dataset": args.data, "lm": name, "fingerprint": fingerprint, "seed": args.seed,
        **{key: fingerprint[key] for key in ("max_new_tokens", "device", "dtype", "versions", "git_commit")},
        "avg_prompt_tokens": {name: float(np.mean([len(prompt.text(item)) for item in items]))},
        "debug": {name: {"latent_anchor_text": prompt.tokenizer.decode(prompt.anchor)},
                  "settings": {"latent_anchor_mode": "text", "latent_anchor_text": "Answer:", "prefix_gain": 1.0,
                               "calibration_mode": "embed_rms", "embedding_replay": True,
                               "embedding_baseline_modes": ["raw", "anchor", "adapter"]}},
    })
    if saved:
        metrics |= {"own_row": own_row(saved.config), "ckpt_sha256": saved.checksum}


def evaluate(args, rows, lm, prompt, wire, items, metrics, records, out):
    """Answer every row, writing the files after each: an interrupted call keeps them. Returns what `compare` says."""
    from tqdm import tqdm
    name, fingerprint, comparison = metrics["lm"], metrics["fingerprint"], []
    with tqdm(total=len(items) * len(rows), unit="q", smoothing=0.05, disable=not first_process()) as bar:
        for row in rows:
            bar.set_description(row)
            result = evaluate_row(row, lm, prompt.tokenizer, prompt, items, wire, fingerprint["latents"],
                                  fingerprint["ratio"], args.max_new_tokens, args.batch, bar)
            place_row(metrics, row, name, result, bool(wire and wire.layout.late))
            if row == "latent":
                describe_latents(metrics, name, result, items, wire)
                for record, item in zip(records[:SHOWN], items):
                    record["kept"] = kept_words(wire, item, fingerprint["latents"], fingerprint["ratio"])
            for record, answer in zip(records, result["answers"]):
                record[row] = answer
            comparison = compare(metrics, records)
            if first_process():
                write_results(out, metrics, records, sys.argv[1:], row)
    return comparison


def say(args, title, metrics, items, comparison, out):
    """Print the table and what it says, or with --json all of metrics.json."""
    if args.json:
        print(json.dumps(metrics, indent=2))
        return
    print(title, table(out), sep="\n")
    if args.data == "synthetic":
        chance = synthetic_chance([item.example for item in items])
        print(f"chance level, a random fact of the right kind out of the passage: EM {100 * chance:.1f}")
    print(*comparison, sep="\n", end="\n" * bool(comparison))


def main():
    check_counts(args, "samples", "batch", "max_new_tokens", "max_prompt_tokens", "latents", "ratio")
    if not args.shard and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("several processes share one LM with --shard; without it give python eval.py")
    if args.shard and args.ckpt is None:
        raise UserError("--shard needs --ckpt: it is for trained wires")
    saved = read_checkpoint(args.ckpt) if args.ckpt is not None else None
    config = saved.config if saved else untrained(args.lm or "smollm2-135m", args.prompt or "plain",
                                                  args.max_prompt_tokens or 1024)
    rows = choose_rows(args.mode, config, bool(saved))
    # A run is RUN/ckpt/best; a checkpoint elsewhere, such as a preserved one, is not written beside.
    run = Path(os.path.abspath(args.ckpt)).parent if args.ckpt else None  # not resolved: ckpt may be a link
    out = Path(args.out or (run.parent if run and run.name == "ckpt" else "runs/eval"))
    lock = claim(out / "eval") if first_process() else None  # held to the end: of two, one would lose its rows
    device, dtype, why = pick_device(args.device, args.dtype)
    if args.shard:
        device = join_processes(device, 15)
    wired = saved is not None or any(ROWS[split_row(row)[0]].latents for row in rows)
    lm, tokenizer = load_lm(args.lm or config.lm, "auto" if args.shard else dtype, "cpu" if args.shard else args.device,
                            wired and config.wire != "tokens")
    prompt = Prompt(tokenizer, args.prompt or config.prompt, args.max_prompt_tokens or config.max_prompt_tokens)
    check_length(lm, prompt.max_prompt_tokens)
    wire = load_wire(saved, lm, prompt).eval() if saved else None
    if wired and not saved:
        wire = LatentWire(lm, config, prompt).eval()
        wire.rarity.copy_(words_of(prompt, lm))
    if args.shard:
        shard(wire, device, dtype)
    if args.read_again and wire:
        wire.predictor = None
    M, ratio = how_many(config, args.latents, args.ratio)
    items = prompt.items(load_data(args.data, args.split, args.samples, args.seed))
    prompt.report_cuts(args.data)
    if "all" in named(args.mode) and len({item.example.context for item in items}) == 1:
        rows = [row for row in rows if ROWS[split_row(row)[0]].latents != "other"]
        log("notice: latent_shuffled is left out: all questions are on one context")
    name = Path(lm.name).name
    log(f"{name} on {device} in {dtype} ({why}), attention {lm.config._attn_implementation}; {len(items)} questions; "
        f"rows: {', '.join(rows)}")

    fingerprint = {"lm": name, "lm_sha256": lm_identity(lm)["weights_sha256"],
                   "ckpt": saved.checksum if saved else None, "split": args.split, "data": checksum(items),
                   "prompt": prompt.style, "max_prompt_tokens": prompt.max_prompt_tokens, "latents": M, "ratio": ratio,
                   "predicted": bool(wire and wire.predictor is not None), "max_new_tokens": args.max_new_tokens,
                   "device": device.type, "dtype": str(dtype), **provenance()}
    metrics, records = read_earlier(out / "eval", fingerprint)
    begin_metrics(metrics, args, fingerprint, prompt, items, saved)
    records = records or [{"id": item.example.id, "prompt": tokenizer.decode(prompt.text(item)),
                           "golds": list(item.example.answers)}
                          for item in items]
    comparison = evaluate(args, rows, lm, prompt, wire, items, metrics, records, out)
    if first_process():
        size = f"M = T / {ratio:g}" if ratio and config.scope != "asked" else f"M = {M}"
        title = f"\n{name}, {args.data}, n = {len(items)}, prompt {prompt.style}, {size}"
        say(args, title, metrics, items, comparison, out)
        log(f"written to {out / 'eval'}")
    if args.shard:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
