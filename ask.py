"""
Ask a document of any length: its text is encoded into latents once, then every question is answered from them.

    python ask.py --ckpt CKPT --context FILE.txt                                 # questions from the terminal
    python ask.py --lm smollm2-135m --context FILE.txt                           # the same, nothing trained
    python ask.py --ckpt CKPT --context FILE.txt --question "Who wrote it?"      # CKPT: such as runs/demo/ckpt/best
    python ask.py --ckpt CKPT --context FILE.txt --questions LIST.txt --json     # many at once, JSON lines
    python ask.py --ckpt CKPT --context FILE.txt --question "..." --inspect      # what is kept, and looked at
    python ask.py --ckpt CKPT --context FILE.txt --save doc.safetensors          # the document as latents
    python ask.py --ckpt CKPT --load doc.safetensors --question "..."            # needs nothing of the text
    python ask.py --ckpt CKPT --load a.safetensors b.safetensors                 # says whose memory it looked at
    python ask.py --ckpt CKPT --context FILE.txt --export DIR                    # for transformers, PEFT and vLLM

Answers go to stdout, everything else to stderr: how sure the LM is of an answer, and the words that it needed most.
"""
import contextlib
import json
import sys
import time
from pathlib import Path

from common import Parser, UserError, check_counts, log, run_main


def parse_args(argv=None):
    p = Parser(__doc__)
    wire = p.add_argument_group("the wire")
    wire.add_argument("--ckpt", help="checkpoint folder of a trained wire, e.g. runs/demo/ckpt/best")
    wire.add_argument("--lm", help="an LM (hub id, folder, .gguf, smollm2-135m): through an untrained wire, or where "
                      "that of --ckpt is now")
    given = p.add_argument_group("the document").add_mutually_exclusive_group()
    given.add_argument("--context", help="text file (UTF-8)")
    given.add_argument("--load", metavar="FILE", nargs="+", help="latents that --save wrote, with this checkpoint; of "
                       "several an answer names the one that it looked at most")
    group = p.add_argument_group("the question")
    asked = group.add_mutually_exclusive_group()
    asked.add_argument("--question", help="asked once (default: questions, one a line, as they come from the terminal "
                       "or a pipe)")
    asked.add_argument("--questions", metavar="FILE", help="a file of questions, one a line (- for standard input), "
                       "answered in batches")
    group.add_argument("--json", action="store_true", help="print each answer as one JSON object a line: question, "
                       "answer, probability of its tokens, near or document")
    group.add_argument("--inspect", action="store_true", help="show which tokens are kept and what the answer rests on")
    group.add_argument("--max_new_tokens", type=int, default=24, help="of an answer (default 24)")
    size = p.add_argument_group("the latents")
    size.add_argument("--latents", type=int, help="M (default: the checkpoint's); in scope asked what a question sees")
    size.add_argument("--ratio", type=float, help="tokens per latent; in scope asked how densely a text is stored")
    size.add_argument("--save", metavar="FILE", help="write the latents to FILE; in scope asked also the text's "
                      "token ids")
    size.add_argument("--format", default="int8", choices=("fp32", "fp16", "int8", "int4"), help="default int8")
    other = p.add_argument_group("other")
    other.add_argument("--export", metavar="DIR", help="write the reader's LoRA, and the document if any, for other "
                       "programs; with --export or --save the terminal is not asked for questions")
    other.add_argument("--device", help="cuda or cpu (default: a GPU where there is one)")
    args = p.parse_args(argv)
    if args.ckpt is None and args.lm is None:
        p.error("one of the arguments --ckpt --lm is required")
    return args


if __name__ == "__main__":
    arguments = parse_args()  # before the heavy imports, so that --help and typing errors answer at once

import torch

from data import PAD, Example, Prompt, pad, whole
from export import export
from lm import embed, generate, importance, lm_identity, load_lm, positions, use_lora
from model import LatentWire, untrained
from store import (Checkpoint, Document, encode, is_document, join, load_document, load_wire, printable,
                   read_checkpoint, save_document, stored_bytes)

BATCH = 25  # questions at once


# ------------------------------------------------------------------------------------------------
# Answers

def asked(wire, latents, items):
    """What the reader reads of items and their Latents, a row of token ids each."""
    return [wire.reads(item, 0 if latents.prefix is None else latents.prefix.shape[1]) for item in items]


def answer(wire, latents, items, max_new_tokens):
    """What the reader makes of Latents (B rows) and the items' questions: a Generated."""
    with use_lora(wire.lm, "reader"):
        return generate(wire.lm, wire.prompt.tokenizer, asked(wire, latents, items), latents, max_new_tokens)


def needs(wire, latents, items):
    """How much each answer's first token needs each place of the Latents: (B, heads, N) a layer."""
    lm = wire.lm
    ids, cached = pad(asked(wire, latents, items), PAD).to(lm.device), latents if latents.keys is not None else None
    real = ids != PAD
    asking = torch.arange(ids.shape[1], device=lm.device) == real.sum(1, keepdim=True) - 1
    found = importance(lm, embed(lm, ids, latents.prefix), real, cached, asking, "reader")
    return [layer[..., :latents.held[number % len(latents.held)].shape[-1]] for number, layer in enumerate(found)]


def replies(wire, documents, together, questions, sees=None, max_new_tokens=24):
    """For each question {"question", "answer", "probability": of the answer's tokens, "document": of several, the title
    of the one that its first token needs most, "near": where its text is there, the words that it needs most}.
    together: the documents' Latents, joined; sees: in scope asked, how many of them a question sees."""
    items = wire.prompt.items([Example("", "", whole(question), ("",)) for question in questions])
    most = wire.config.max_prompt_tokens // 2
    for item in items:
        if len(item.question) > most:
            raise UserError(f"a question of {len(item.question):,} tokens is too long; {most} are the most")
    if wire.layout.late:
        latents = wire.choose(together, pad([wire.layout.after(item) for item in items], PAD).to(wire.lm.device), sees)
    else:
        latents = together.for_each(len(items))
    before, tells = documents[0].before, len(documents) > 1 or together.ids is not None
    needed = needs(wire, latents, items) if tells else []
    told, found = answer(wire, latents, items, max_new_tokens), []
    for b, question in enumerate(questions):
        reply = {"question": whole(question), "answer": printable(told.answers[b]),
                 "probability": round(told.sure[b], 4)}
        found.append(reply)
        if not tells:
            continue
        share = latents.rows(slice(b, b + 1)).of_tokens(together.width - before, before, [layer[b] for layer in needed])
        if len(documents) > 1:
            parts = share.split([document.latents.width - before for document in documents])
            most_needed = max(range(len(parts)), key=lambda number: parts[number].sum())
            reply["document"] = printable(documents[most_needed].title)
        else:
            ids, at = together.ids[0, before:], int(share.argmax())
            reply["near"] = printable(wire.prompt.tokenizer.decode(ids[max(0, at - 5):at + 6])).strip(" \ufffd")
    return found


# ------------------------------------------------------------------------------------------------
# Inspection

def inspect(wire, latents, question, args):
    """Print which tokens of a document (its Latents) are kept, and which of them the answer to a question rests on."""
    item, = wire.prompt.items([Example("", "", question, ("",))])
    if wire.layout.late:
        latents = wire.choose(latents, pad([wire.layout.after(item)], PAD).to(wire.lm.device), args.latents)
    before = len(wire.layout.before)
    ids = latents.ids[0, before:]
    words = list(map(printable, wire.prompt.pieces(ids)))
    often = latents.of_tokens(len(ids), before)
    print(f"{len(ids)} tokens, marked \u00b7 + * # by how often one is kept:\n")
    marks = ["\u00b7+*#"[n - 1:n] for n in (often / often.max() * 4.999).int().tolist()]
    print("".join(word + mark for word, mark in zip(words, marks)).strip() + "\n")
    told = answer(wire, latents, [item], args.max_new_tokens)
    print(f"question  {printable(item.example.question)}\nanswer    {printable(told.answers[0])}   "
          f"(sure {told.sure[0]:.0%})\n\nits first token looks at the latents of")
    share = latents.of_tokens(len(ids), before, [layer[0] for layer in needs(wire, latents, [item])])
    for t in share.topk(min(8, len(ids))).indices.tolist():
        around = ["".join(part).strip() for part in (words[max(0, t - 4):t], words[t:t + 1], words[t + 1:t + 5])]
        print(f"{share[t]:>6.1%}  {around[0]} [{around[1]}] {around[2]}")


# ------------------------------------------------------------------------------------------------

def check(args, config):
    """Raise UserError where the command line contradicts itself or the wire's config."""
    document = args.context or args.load
    check_counts(args, "latents", "ratio", "max_new_tokens")
    if not document and not args.export:
        raise UserError("give the document: either --context FILE.txt or --load FILE.safetensors")
    if args.inspect and (not args.context or args.question is None) or args.save and not args.context:
        raise UserError("--save needs the text (--context FILE.txt), and --inspect that and a --question")
    if args.save and args.export:
        raise UserError("--export keeps as many latents in every head, which answers worse; give --save in a call of "
                        "its own")
    if args.save and Path(args.save).exists() and not is_document(args.save):
        raise UserError(f"--save {args.save} is there and no file of latents; give another name")
    if document and config.wire == "tokens":
        raise UserError(f"--ckpt {args.ckpt} makes no latents (--wire tokens); give one trained with --wire kv")
    if document and config.scope == "prompt":
        raise UserError(f"--ckpt {args.ckpt} has the question in its latents (--scope prompt); eval.py alone reads it")
    if args.load and (args.ratio or args.latents and config.scope == "context"):
        raise UserError("--latents and --ratio are settled in a saved document; give them with --context and --save")
    if document and args.export and config.scope == "asked":
        raise UserError("--export: in scope asked each question sees latents of its own, which no fixed cache holds; "
                        "give no document, or a wire of --scope context")


def read_text(flag, path):
    """The text of a file, or for --questions - of standard input."""
    try:
        return sys.stdin.read() if path == "-" and flag == "--questions" else Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: cannot be read as UTF-8 text ({error})") from None


def read_document(args, wire, saved):
    """The Document of --context, encoded and, with --save, written; says what became of the text."""
    text = read_text("--context", args.context).strip()
    if not text:
        raise UserError(f"--context {args.context} is empty")
    config, before, began = wire.config, len(wire.layout.before), time.perf_counter()
    ids = wire.prompt.items([Example("", text, "", ("",))])[0].context
    T, count = len(ids), wire.stored(len(ids), args.latents, args.ratio)
    title = whole(Path(args.context).stem)
    document = Document(encode(wire, ids, count, each=bool(args.export)), before, title)
    places = int(document.latents.length) - before * (config.wire == "embeds")  # waits for a GPU, too
    size = stored_bytes(wire.lm, config, places, args.format)
    log(f"{T} tokens -> {count} latents ({T / count:.1f}x), {len(text.encode()):,} bytes of text, "
        f"{size:,} bytes of latents in {args.format}, {time.perf_counter() - began:.2f} s")
    if args.save:
        save_document(args.save, document, args.format, saved, lm_identity(wire.lm))
        log(f"saved to {args.save}, {Path(args.save).stat().st_size:,} bytes")
    return document


def typed():
    """The questions from a pipe, or from the terminal, with a history where there is readline."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):  # input() would put its prompt among the answers
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() uses it
    with contextlib.suppress(EOFError):
        while True:
            yield input("? ")


def say(args, wire, documents, together, questions):
    """Print the answers: as lines, or with --json as one object a line."""
    began = time.perf_counter()
    for reply in replies(wire, documents, together, questions, args.latents, args.max_new_tokens):
        if args.json:
            print(json.dumps(reply, ensure_ascii=False), flush=True)
            continue
        print(reply["answer"] + (f"   [{reply['document']}]" if "document" in reply else ""), flush=True)
        log(f"  ({time.perf_counter() - began:.2f} s, sure {reply['probability']:.0%}"
            + (f", near: {reply['near']}" if "near" in reply else "") + ")")


@torch.no_grad()
def main(args):
    trained = args.ckpt is not None
    saved = read_checkpoint(args.ckpt) if trained else Checkpoint(None, untrained(args.lm), {}, "untrained")
    check(args, saved.config)
    lm, tokenizer = load_lm(args.lm or saved.config.lm, device=args.device, wired=saved.config.wire != "tokens")
    if not trained:
        saved.config.max_prompt_tokens = min(saved.config.max_prompt_tokens, positions(lm))
    prompt = Prompt(tokenizer, saved.config.prompt, sys.maxsize)  # texts are not cut here
    if not trained and tokenizer.chat_template:
        try:
            prompt = Prompt(tokenizer, "chat", sys.maxsize)
        except UserError as error:
            log(f"notice: {error}: as is done here")
    wire = (load_wire(saved, lm, prompt) if trained else LatentWire(lm, saved.config, prompt)).eval()
    documents = [load_document(path, saved, lm_identity(lm), lm.device, lm.dtype) for path in args.load or ()]
    documents += [read_document(args, wire, saved)] if args.context else []
    together = join(wire, [document.latents for document in documents]) if documents else None
    if together and int(together.length) > (most := positions(lm)):
        log(f"notice: {int(together.length):,} latents are more than the {most:,} positions of {lm.name}, beyond which "
            "it reads badly; give a higher --ratio, fewer --latents or fewer files")
    if args.export:
        export(args.export, wire, together)
        log(f"written to {args.export}; its README.md says how other programs read it")
    if together and args.inspect:
        return inspect(wire, together, whole(args.question), args)
    if together and (args.question is not None or args.questions):
        questions = [args.question] if args.question is not None else [
            line.strip() for line in read_text("--questions", args.questions).split("\n") if line.strip()]
        # Each question's row gets a copy of the cache, but where it chooses.
        size = BATCH if wire.layout.late else max(1, min(BATCH, BATCH * 1024 // int(together.length)))
        for start in range(0, len(questions), size):
            say(args, wire, documents, together, questions[start:start + size])
    elif not args.save and not args.export:
        sys.stdin.reconfigure(errors="replace")
        for line in filter(str.strip, typed()):
            try:
                say(args, wire, documents, together, [line.strip()])
            except UserError as error:
                log(f"error: {error}")


if __name__ == "__main__":
    run_main(lambda: main(arguments))
