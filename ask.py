"""
Ask a document: its text is encoded into latents once, then every question is answered from them.

    python ask.py --ckpt runs/demo/ckpt/best --context FILE.txt --question "Who won the prize?"
    python ask.py --ckpt runs/demo/ckpt/best --context FILE.txt          # questions from the terminal, one a line
"""
import argparse
import sys
import time
from pathlib import Path

from data import UserError, log, run_main


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", required=True, help="checkpoint folder of a wire trained with --scope context")
    p.add_argument("--context", required=True, help="text file, UTF-8")
    p.add_argument("--question", help="one question; without it, questions are read one a line until end of input")
    p.add_argument("--latents", type=int, help="M (default: the checkpoint's)")
    p.add_argument("--ratio", type=float, help="tokens per latent, in place of --latents")
    p.add_argument("--max_new_tokens", type=int, default=24, help="of an answer (default 24)")
    p.add_argument("--device", help="cuda, cuda:1, cpu (default: a GPU where there is one)")
    return p.parse_args()


if __name__ == "__main__":
    args = parse_args()  # before the heavy imports, so that --help and typing errors answer at once

import numpy as np
import torch

from data import PAD, Example, Prompt, pad
from model import generate, load_lm, load_wire, read_checkpoint


def printable(text):
    """Without control characters: neither a document nor an answer may drive the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


@torch.no_grad()
def main():
    try:
        text = Path(args.context).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--context {args.context}: cannot be read as UTF-8 text ({error})") from None
    if not text:
        raise UserError(f"--context {args.context} is empty")
    for option in ("latents", "ratio"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise UserError(f"--{option} {value} must be at least 1")
    saved = read_checkpoint(args.ckpt)
    if saved.config.scope != "context":
        raise UserError(f"--ckpt {args.ckpt} puts the question into its latents (--scope prompt); a document that is asked many "
                        "times needs a wire trained with --scope context")
    lm, tokenizer = load_lm(saved.config.lm, device=args.device)
    wire = load_wire(saved, lm).eval()
    prompt = Prompt(tokenizer, saved.config.prompt, saved.config.max_prompt_tokens)
    began = time.perf_counter()
    document = prompt.items([Example("", text, "", ("",))])[0]
    M = wire.count(len(document.context), args.latents, args.ratio)
    context = pad([document.context], PAD).to(lm.device)
    prefix, _ = wire.encode(context, torch.tensor([M], device=lm.device))
    prompt.report_cuts(args.context)
    d = lm.config.hidden_size
    log(f"{len(document.context)} tokens -> {M} latents ({len(document.context) / M:.1f}x), {len(text.encode('utf-8'))} bytes of text, "
        f"{M * d * 2} bytes of latents in fp16, encoded in {time.perf_counter() - began:.2f} s")

    interactive = args.question is None and sys.stdin.isatty()
    while True:
        if args.question is None:
            if interactive:
                print("? ", end="", file=sys.stderr, flush=True)
            question = sys.stdin.readline()
            if not question:
                return
        else:
            question = args.question
        if question.strip():
            began = time.perf_counter()
            asked = prompt.items([Example("", "", question, ("",))])[0]  # the document is in the latents
            row = np.concatenate([prompt.prefix(asked, "context", M), prompt.asked(asked, "context")])
            answer = generate(lm, tokenizer, [row], prefix, args.max_new_tokens).answers[0]
            print(printable(answer), flush=True)
            log(f"  ({time.perf_counter() - began:.2f} s)")
        if args.question is not None:
            return


if __name__ == "__main__":
    run_main(main)
