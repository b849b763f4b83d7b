"""
Ask a document of any length: its text is encoded into latents once, then every question is answered from them.

    python ask.py --ckpt CKPT --context FILE.txt                                 # questions from the terminal
    python ask.py --ckpt CKPT --context FILE.txt --question "Who wrote it?"      # CKPT: such as runs/demo/ckpt/best
    python ask.py --ckpt CKPT --context FILE.txt --question "..." --inspect      # what is kept, and looked at
    python ask.py --ckpt CKPT --context FILE.txt --save doc.safetensors          # the document as latents
    python ask.py --ckpt CKPT --load doc.safetensors --question "..."            # needs nothing of the text
    python ask.py --ckpt CKPT --load a.safetensors b.safetensors                 # says whose memory it looked at
    python ask.py --ckpt CKPT --context FILE.txt --export DIR                    # for transformers, PEFT and vLLM

Answers go to stdout, everything else to stderr.
"""
import os
import sys
import time
from pathlib import Path

from common import Parser, UserError, log, run_main


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("--ckpt", required=True, help="checkpoint folder of a trained wire, e.g. runs/demo/ckpt/best")
    given = p.add_argument_group("the document, one of")
    given.add_argument("--context", help="text file (UTF-8)")
    given.add_argument("--load", metavar="FILE", nargs="+", help="latents that --save wrote, with this checkpoint; of "
                       "several an answer names the one that it looked at most")
    asked = p.add_argument_group("the question")
    asked.add_argument("--question", help="asked once (default: questions, one a line, from the terminal or stdin)")
    asked.add_argument("--inspect", action="store_true", help="show which tokens are kept and what the answer rests on")
    asked.add_argument("--max_new_tokens", type=int, default=24, help="of an answer (default 24)")
    size = p.add_argument_group("the latents")
    size.add_argument("--latents", type=int, help="M (default: the checkpoint's); in scope asked what a question sees")
    size.add_argument("--ratio", type=float, help="tokens per latent; in scope asked how densely a text is stored")
    size.add_argument("--save", metavar="FILE", help="write the latents to FILE.safetensors")
    size.add_argument("--format", default="int8", choices=("fp32", "fp16", "int8", "int4"), help="default int8")
    other = p.add_argument_group("other")
    other.add_argument("--export", metavar="DIR", help="write the reader's LoRA, and the document if any, for other "
                       "programs; with --export or --save nothing is asked but --question")
    other.add_argument("--device", help="cuda or cpu (default: a GPU where there is one)")
    return p.parse_args(argv)


if __name__ == "__main__":
    arguments = parse_args()  # before the heavy imports, so that --help and typing errors answer at once

import numpy as np
import torch
import torch.nn.functional as F

from data import LATENT, Example, Prompt, whole
from export import export
from lm import embed, generate, importance, lm_identity, load_lm, use_lora
from model import budgets
from store import (Document, encode, join, load_document, load_wire, payload_bytes, place_values, printable,
                   read_checkpoint, save_document)


# ------------------------------------------------------------------------------------------------
# Answers

def answer(wire, latents, item, max_new_tokens, said=None):
    """What the reader makes of Latents (B = 1), or of token ids in their place, and an item's question: a Generated.
    said: token ids of an answer whose logits are wanted."""
    before, row, given = wire.layout.before, wire.layout.after(item), latents
    if isinstance(latents, np.ndarray):
        row, given = np.concatenate([before, latents, row]), None
    elif latents.keys is None:
        row = np.concatenate([before, np.full(latents.prefix.shape[1], LATENT), row])
    with use_lora(wire.lm, "reader"):
        return generate(wire.lm, wire.prompt.tokenizer, [row], given, max_new_tokens, golds=said and [said])


def needs(wire, latents, item):
    """How much the answer's first token needs each of Latents (B = 1): (heads, M) a layer."""
    H, N, lm = len(wire.layout.before), latents.held.shape[1], wire.lm
    row, cached = wire.layout.after(item), latents
    if latents.keys is None:
        row, cached = np.concatenate([wire.layout.before, np.full(N - H, LATENT), row]), None
    ids = torch.from_numpy(row)[None].long().to(lm.device)
    asking = torch.arange(ids.shape[1], device=lm.device)[None] == ids.shape[1] - 1
    embeds = embed(lm, ids, latents.prefix)
    return [layer[0, :, H:N] for layer in importance(lm, embeds, asking | True, cached, asking, "reader")]


# ------------------------------------------------------------------------------------------------
# Inspection

def of_tokens(latents, T, before, weights=None):
    """(T,) shares of Latents (B = 1) by the token of the text that each is: of their number, or of weights ((heads,
    M) a layer)."""
    share = torch.zeros(T, device=latents.held.device)
    for layer in range(len(weights or latents.kept)):
        token = latents.kept[layer % len(latents.kept)][0, :, before:] - before       # (heads or 1, M)
        weight = torch.ones_like(token, dtype=torch.float) if weights is None else weights[layer]
        share.index_add_(0, token.expand(weight.shape).flatten(), weight.flatten())
    return (share / share.sum()).cpu()


def inspect(wire, document, latents, item, max_new_tokens):
    """Print which tokens of a document are kept, and which of them the answer to an item's question rests on. latents:
    those of the document that the question sees."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    tokenizer, ids, before = wire.prompt.tokenizer, document.ids, document.before
    words = [printable(tokenizer.decode([token])) for token in ids]
    M, kept = latents.held.shape[1] - before, len(latents.kept) > 1
    print(f"{len(ids)} tokens, {M} of which {'each head keeps' if kept else 'the question sees'}. "
          f"{'Shaded' if colour else 'Marked · + * #'} by how often a token is kept:\n")
    often = of_tokens(latents, len(ids), before)
    shade = lambda word, n: f"\x1b[48;5;{16 + n}m\x1b[97m{word}\x1b[0m" if colour and n else word + "·+*#"[n - 1:n]
    print("".join(map(shade, words, (often / often.max() * 4.999).int().tolist())).strip() + "\n")

    told, cut = (answer(wire, given, item, max_new_tokens) for given in (latents, ids[:M]))
    scored = answer(wire, latents, item, 1, told.ids[0] or [wire.prompt.end])
    logp = -F.cross_entropy(scored.logits, scored.labels, reduction="sum").item()
    print(f"question  {printable(item.example.question)}")
    print(f"answer    {printable(told.answers[0])}   (log-probability {logp:.2f})")
    print(f"          {printable(cut.answers[0])}   from the first {M} tokens of the text instead of {M} latents")
    print("\nits first token looks at the latents of")
    share = of_tokens(latents, len(ids), before, needs(wire, latents, item))
    for t in share.topk(min(8, len(ids))).indices.tolist():
        around = ["".join(part).strip() for part in (words[max(0, t - 4):t], words[t:t + 1], words[t + 1:t + 5])]
        print(f"{share[t]:>6.1%}  {around[0]} [{around[1]}] {around[2]}")


# ------------------------------------------------------------------------------------------------

def check(args, config):
    """Raise UserError where the command line contradicts itself or the wire's config."""
    document = args.context or args.load
    for name in ("latents", "ratio", "max_new_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    if args.context and args.load or not document and not args.export:
        raise UserError("give the document: either --context FILE.txt or --load FILE.safetensors")
    if args.inspect and (not args.context or args.question is None) or args.save and not args.context:
        raise UserError("--save needs the text (--context FILE.txt), and --inspect that and a --question")
    if document and config.wire == "tokens":
        raise UserError(f"--ckpt {args.ckpt} makes no latents (--wire tokens); give one trained with --wire kv")
    if document and config.scope == "prompt":
        raise UserError(f"--ckpt {args.ckpt} has the question in its latents (--scope prompt); eval.py alone reads it")
    if args.load and (args.ratio or args.latents and config.scope == "context"):
        raise UserError("--latents and --ratio are settled in a saved document; give them with --context and --save")
    if document and args.export and config.scope == "asked":
        raise UserError("--export: in scope asked each question sees latents of its own, which no fixed cache holds; "
                        "give no document, or a wire of --scope context")


def read_document(args, wire, saved):
    """The Document of --context, encoded and, with --save, written; says what became of the text."""
    try:
        text = Path(args.context).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--context {args.context}: cannot be read as UTF-8 text ({error})") from None
    if not text:
        raise UserError(f"--context {args.context} is empty")
    config, before, began = wire.config, len(wire.layout.before), time.perf_counter()
    ids = wire.prompt.items([Example("", text, "", ("",))])[0].context
    T, count = len(ids), wire.stored(len(ids), args.latents, args.ratio)
    dense = bool(config.ratio) or config.scope == "asked"  # stored by ratio, not by number
    trained = {wire.stored(T)} if dense else {wire.stored(T, M) for M in budgets(config)}
    if count not in trained or dense and args.latents not in (None, *budgets(config)):
        log(f"notice: this wire was trained for --latents {config.latents}" + f" --ratio {config.ratio or 1:g}" * dense)
    document = Document(encode(wire, ids, count), before, Path(args.context).stem, ids)
    places = int(document.latents.held.sum()) - before * (config.wire == "embeds")  # waits for a GPU, too
    size = payload_bytes(places * place_values(wire.lm, config.wire), args.format)
    log(f"{T} tokens -> {count} latents ({T / count:.1f}x), {len(text.encode()):,} bytes of text, "
        f"{size:,} bytes of latents in {args.format}, {time.perf_counter() - began:.2f} s")
    if args.save:
        save_document(args.save, document, args.format, saved, lm_identity(wire.lm), text)
        log(f"saved to {args.save}, {Path(args.save).stat().st_size:,} bytes")
    return document


def typed():
    """The next line from the terminal or a pipe; empty at its end."""
    if sys.stdin.isatty():
        print("? ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline()


def reply(args, wire, documents, together, question):
    """Print the answer to a question, or with --inspect what it rests on. Raises UserError for one that is too long."""
    began, most = time.perf_counter(), wire.config.max_prompt_tokens // 2
    item = wire.prompt.items([Example("", "", whole(question), ("",))])[0]
    if len(item.question) > most:
        raise UserError(f"a question of {len(item.question):,} tokens is too long; {most} are the most")
    latents = together
    if wire.config.scope == "asked":
        asks = torch.from_numpy(wire.layout.after(item))[None].long().to(wire.lm.device)
        latents = wire.choose(together, asks, args.latents)
    if args.inspect:
        return inspect(wire, documents[0], latents, item, args.max_new_tokens)
    told = printable(answer(wire, latents, item, args.max_new_tokens).answers[0])
    if len(documents) > 1:
        sizes = [document.latents.held.shape[1] - document.before for document in documents]
        looks = sum(layer.sum(0) for layer in needs(wire, together, item)).split(sizes)
        told += f"   [{printable(documents[np.argmax([part.sum().item() for part in looks])].title)}]"
    print(told, flush=True)
    log(f"  ({time.perf_counter() - began:.2f} s)")


@torch.no_grad()
def main(args):
    saved = read_checkpoint(args.ckpt)
    check(args, saved.config)
    lm, tokenizer = load_lm(saved.config.lm, device=args.device, wired=saved.config.wire != "tokens")
    wire = load_wire(saved, lm, Prompt(tokenizer, saved.config.prompt, sys.maxsize)).eval()  # texts are not cut here
    documents = [load_document(path, saved, lm_identity(lm), lm.device, lm.dtype) for path in args.load or ()]
    documents += [read_document(args, wire, saved)] if args.context else []
    together = join(wire, [document.latents for document in documents]) if documents else None
    if args.export:
        export(args.export, wire, together)
        log(f"written to {args.export}; its README.md says how other programs read it")
    if together and args.question is not None:
        return reply(args, wire, documents, together, args.question)
    if not args.save and not args.export:
        sys.stdin.reconfigure(errors="replace")
        for line in filter(str.strip, iter(typed, "")):
            try:
                reply(args, wire, documents, together, line)
            except UserError as error:
                log(f"error: {error}")


if __name__ == "__main__":
    run_main(lambda: main(arguments))
