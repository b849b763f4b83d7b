"""
Ask a document: its text is encoded into latents once, then every question is answered from them. (A wire of --scope asked
reads the question before it looks: it encodes the text again for every question.)

    python ask.py --ckpt runs/demo/ckpt/best --context FILE.txt                            # questions from the terminal
    python ask.py --ckpt runs/demo/ckpt/best --context FILE.txt --question "Who wrote it?"
    python ask.py --ckpt ... --context FILE.txt --question "..." --inspect                 # where latents look, what they hold
    python ask.py --ckpt ... --context FILE.txt --save doc.safetensors                     # the document as latents
    python ask.py --ckpt ... --load doc.safetensors --question "..."                       # needs nothing of the text
    python ask.py --ckpt ... --export DIR                                                  # the LoRA, in PEFT's layout

Answers go to stdout, everything else to stderr.
"""
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from common import Parser, UserError, log, run_main, write_atomic


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("--ckpt", required=True, help="checkpoint folder of a trained wire, e.g. runs/demo/ckpt/best")
    given = p.add_argument_group("the document, one of")
    given.add_argument("--context", help="text file (UTF-8)")
    given.add_argument("--load", metavar="FILE", help="latents that --save wrote, with this checkpoint")
    asked = p.add_argument_group("the question")
    asked.add_argument("--question", help="asked once (default: read questions, one a line, from the terminal or stdin)")
    asked.add_argument("--inspect", action="store_true", help="show what each latent looks at and holds, and what the answer rests on")
    asked.add_argument("--max_new_tokens", type=int, default=24, help="of an answer (default 24)")
    size = p.add_argument_group("the latents")
    size.add_argument("--latents", type=int, help="M (default: the checkpoint's)")
    size.add_argument("--ratio", type=float, help="tokens per latent, in place of --latents")
    size.add_argument("--save", metavar="FILE", help="write the latents to FILE.safetensors; without --question nothing is asked")
    size.add_argument("--wire", default="int8", choices=("fp32", "fp16", "int8", "int4"), help="how --save stores them (default int8)")
    other = p.add_argument_group("other")
    other.add_argument("--export", metavar="DIR", help="write the trained LoRA in PEFT's layout and stop")
    other.add_argument("--device", help="cuda or cpu (default: a GPU where there is one)")
    return p.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()  # before the heavy imports, so that --help and typing errors answer at once

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data import Example, Prompt, pack, whole
from lm import answer_logits, embed, generate, lm_identity, load_lm
from model import dequantise, load_wire, mean_embedding, payload_bytes, quantise, read_checkpoint


def printable(text):
    """Without control characters: neither a document nor an answer may drive the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


# ------------------------------------------------------------------------------------------------
# Latents as a file

def save_latents(path, prefix, kind, saved, identity):
    """Write a document's prefix (M, d): safetensors with `values` (and `scales`), and whose latents these are. As fp32 or
    fp16, `values` is the plain (M, d) tensor that inference servers take as prompt embeddings."""
    values, scales = quantise(prefix.cpu(), kind)
    tensors = {"values": values.contiguous(), **({} if scales is None else {"scales": scales.contiguous()})}
    about = {"format": "latentwire 1", "kind": kind, "ckpt_sha256": saved.checksum, "lm": json.dumps(identity)}
    part = Path(f"{path}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part, metadata=about)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--save {path}: cannot be written ({error})") from None


def load_latents(path, saved=None, identity=None):
    """Prefix (M, d) float32 of a file that `save_latents` wrote. With saved (a Checkpoint) and identity (of the LM), raises
    UserError for a file that belongs to others, and always for one that is no such file."""
    try:
        with safe_open(path, "pt") as f:
            about = f.metadata() or {}
            if about.get("format") != "latentwire 1":
                raise UserError(f"--load {path} is not a file of latents; write one with --save")
            tensors = {name: f.get_tensor(name) for name in f.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"--load {path}: cannot be read ({printable(str(error))})") from None
    theirs = json.loads(about["lm"])
    if identity and any(theirs[key] != identity[key] for key in identity if key != "name"):
        raise UserError(f"--load {path} holds latents for {printable(theirs['name'])}, not for {identity['name']}")
    if saved and about["ckpt_sha256"] != saved.checksum:
        raise UserError(f"--load {path} was written with another checkpoint than {saved.folder}; give the --ckpt it was saved with")
    return dequantise(tensors["values"], tensors.get("scales"))


def export_lora(folder, wire):
    """Write the LoRA as PEFT stores one: adapter_config.json and adapter_model.safetensors."""
    config, folder = wire.config, Path(folder)
    tensors = {f"base_model.model.{name[3:-2]}.lora_{name[-1]}.weight": p.detach().cpu().contiguous()
               for name, p in wire.trainable().items() if name.startswith("lm.")}
    if not tensors:
        raise UserError("--export: this wire was trained without LoRA")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_atomic(folder / "adapter_config.json", json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": config.lm, "r": config.lora_rank, "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout, "target_modules": [f"{name}_proj" for name in config.lora_targets.split(",")], "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True}, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------
# Inspection

SHADES = ((0, ""), (17, "·"), (18, "+"), (19, "*"), (21, "#"))  # background colour, plain mark; from hardly to most attended


def shaded(words, weight, colour):
    """The document's tokens, each shaded by its share of the most attended token's attention."""
    top, out = max(weight), []
    for word, w in zip(words, weight):
        background, mark = SHADES[min(4, int(5 * w / top))]
        out.append(f"\x1b[48;5;{background}m\x1b[97m{word}\x1b[0m" if colour and mark else word + ("" if colour else mark))
    return "".join(out)


@torch.no_grad()
def encode(wire, prompt, items, counts):
    """Prefix (B, max M, d) and attention (B, max M, T) of the items' contexts, counts[b] latents each."""
    scope, device = wire.config.scope, wire.lm.device
    context, asked = (t.to(device) for t in prompt.sources(items, scope))
    prefix, attention = wire.encode(context, torch.tensor(counts, device=device), asked)
    return prefix, attention if attention is None or scope == "context" else attention[:, :, int(asked[0]):]  # of one question


@torch.no_grad()
def inspect(wire, tokenizer, prompt, item, M, max_new_tokens):
    """Print where the latents of an item's context look, what they hold, and what the answer to its question rests on."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    device, document, T = wire.lm.device, item.context, len(item.context)
    words = [printable(tokenizer.decode([token])) for token in document]
    prefix, attention = encode(wire, prompt, [item], [M])
    if wire.config.encoder != "pointer":
        raise UserError(f"--inspect needs a wire that says where it looks, --encoder pointer; this one has --encoder {wire.config.encoder}")
    prefix, attention = prefix[0], attention[0]
    print(f"{T} tokens in {M} latents. " + ("Shaded" if colour else "Marked · + * #") + " by how much attention a token gets from all latents:\n")
    print(shaded(words, attention.sum(0).tolist(), colour).strip() + "\n")

    table = F.normalize(wire.lm.get_input_embeddings().weight.float(), dim=-1)  # (V, d)
    near = (F.normalize(prefix.float(), dim=-1) @ table.T).topk(4)
    plain = mean_embedding(attention, embed(wire.lm, torch.as_tensor(document, device=device).long()).float())  # what the latent would be without its residual
    residual = (prefix - plain).norm(dim=-1)
    share = residual / (residual + plain.norm(dim=-1))
    print(f"{'latent':>6}  {'looks at':<58}  {'nearest in the vocabulary (cosine)':<58}  residual")
    for m in range(M):
        weight, where = attention[m].topk(min(5, T))
        looks = " ".join(f"{words[t].strip()} {w:.0%}" for w, t in zip(weight.tolist(), where.tolist()) if w > 0.04)
        holds = " ".join(f"{printable(tokenizer.decode([t])).strip()} {c:.2f}" for c, t in zip(near.values[m].tolist(), near.indices[m].tolist()))
        print(f"{m + 1:>6}  {looks[:58]:<58}  {holds[:58]:<58}  {share[m]:.0%}")

    asked = prompt.asked(item, "context")
    row = np.concatenate([prompt.prefix(item, "context", M), asked])
    answer = generate(wire.lm, tokenizer, [row], prefix[None], max_new_tokens)
    said = np.array(answer.ids[0] or [prompt.end])
    # The same answer's probability when the tokens of one latent's window are taken out of the document; -1: not picked.
    owner = torch.where(attention.amax(0) > 0, attention.argmax(0), -1).cpu().numpy()
    windows = [np.flatnonzero(owner == m) for m in range(M)]
    windows = [window for window in windows if 0 < len(window) < T]
    texts = [document] + [np.delete(document, window) for window in windows]
    counts = [wire.count(len(text), M) for text in texts]
    prefixes, _ = encode(wire, prompt, [replace(item, context=text) for text in texts], counts)
    batch = pack([(prompt.prefix(item, "context", m), [(asked, said)]) for m in counts], texts, counts).to(device)
    logp = -F.cross_entropy(answer_logits(wire.lm, batch, prefixes).float(), batch.label, reduction="none")
    logp = torch.zeros(len(texts), device=device).index_add(0, batch.owner, logp).tolist()
    first = np.concatenate([prompt.pre, prompt.head, document[:M], asked])
    cut = generate(wire.lm, tokenizer, [first], None, max_new_tokens).answers[0]
    print(f"\nquestion  {printable(item.example.question)}\nanswer    {printable(answer.answers[0])}   (log-probability {logp[0]:.2f})")
    print(f"          {printable(cut)}   from the first {M} tokens of the text instead of {M} latents")
    print("\nwithout these words the answer's log-probability falls by")
    for drop, window in sorted(((logp[0] - p, window) for p, window in zip(logp[1:], windows)), key=lambda pair: -pair[0])[:5]:
        print(f"{drop:>8.2f}  {''.join(words[t] for t in window).strip()}")


# ------------------------------------------------------------------------------------------------

def read_text(path):
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--context {path}: cannot be read as UTF-8 text ({error})") from None
    if not text:
        raise UserError(f"--context {path} is empty")
    return text


def questions():
    """The one of --question, or lines from the terminal or a pipe."""
    if args.question is not None:
        yield whole(args.question)
        return
    sys.stdin.reconfigure(errors="replace")
    while True:
        if sys.stdin.isatty():
            print("? ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield whole(line)


@torch.no_grad()
def main():
    for option in ("latents", "ratio", "max_new_tokens"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise UserError(f"--{option} {value} must be at least 1")
    if not args.export and bool(args.context) == bool(args.load):
        raise UserError("give the document: either --context FILE.txt or --load FILE.safetensors")
    if args.inspect and (args.load or args.question is None):
        raise UserError("--inspect needs the text (--context) and a --question")
    text = read_text(args.context) if args.context else None
    saved = read_checkpoint(args.ckpt)
    scope = saved.config.scope
    if not args.export and (scope == "prompt" or scope == "asked" and (args.save or args.load)):
        raise UserError(f"--ckpt {args.ckpt} makes latents for one question (--scope {scope}); a saved document needs a wire trained with --scope context"
                        if scope == "asked" else f"--ckpt {args.ckpt} has the question in its latents (--scope prompt), which eval.py alone reads; "
                        "give a wire trained with --scope asked or context")
    lm, tokenizer = load_lm(saved.config.lm, device=args.device)
    wire = load_wire(saved, lm).eval()
    prompt = Prompt(tokenizer, saved.config.prompt, saved.config.max_prompt_tokens)
    if args.export:
        export_lora(args.export, wire)
        return log(f"LoRA of {args.ckpt} written to {args.export}")
    if args.load:
        prefix = load_latents(args.load, saved, lm_identity(lm)).to(lm.device)[None]
        log(f"{args.load}: {prefix.shape[1]} latents, {Path(args.load).stat().st_size:,} bytes")
    else:
        began = time.perf_counter()
        question = whole(args.question or "") if scope == "asked" else ""  # it takes some of the prompt's room
        document = prompt.items([Example("", text, question, ("",))])[0]
        M = wire.count(len(document.context), args.latents, args.ratio)
        prompt.report_cuts(args.context)
        if args.inspect:
            return inspect(wire, tokenizer, prompt, replace(document, example=Example("", "", whole(args.question), ("",))), M, args.max_new_tokens)
        prefix = encode(wire, prompt, [document], [M])[0] if scope == "context" else None
        log(f"{len(document.context)} tokens -> {M} latents ({len(document.context) / M:.1f}x), {len(text.encode('utf-8')):,} bytes of text, "
            f"{payload_bytes(M * lm.config.hidden_size, args.wire):,} bytes of latents in {args.wire}" +
            (f", encoded in {time.perf_counter() - began:.2f} s" if prefix is not None else ", encoded for each question"))
    if args.save:
        save_latents(args.save, prefix[0], args.wire, saved, lm_identity(lm))
        log(f"saved to {args.save}")
        if args.question is None:
            return
    for question in questions():
        began = time.perf_counter()
        if len(prompt.tokenize(question)) > saved.config.max_prompt_tokens // 2:
            too_long = f"a question of {len(question):,} characters is too long; {saved.config.max_prompt_tokens // 2} tokens are the most"
            if args.question is not None:
                raise UserError(too_long)
            log(f"error: {too_long}")
            continue
        asked = prompt.items([Example("", "", question, ("",))])[0]
        latents = prefix if prefix is not None else encode(wire, prompt, [replace(asked, context=document.context)], [M])[0]
        row = np.concatenate([prompt.prefix(asked, "context", latents.shape[1]), prompt.asked(asked, "context")])
        answer = generate(lm, tokenizer, [row], latents, args.max_new_tokens).answers[0]
        print(printable(answer), flush=True)
        log(f"  ({time.perf_counter() - began:.2f} s)")


if __name__ == "__main__":
    run_main(main)
