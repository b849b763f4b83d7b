"""
The rows of the evaluation: what each reads, its answers and its scores. Adding a row is adding an entry to ROWS.
"""
import re
import string
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from common import UserError
from data import PAD, pad
from lm import embed, generate, head, use_lora
from model import Latents, budget, how_many, nearness, places
from store import FORMATS, through


# ------------------------------------------------------------------------------------------------
# The table

@dataclass(frozen=True)
class Row:
    """One row. heading: its name in tables; help: what it reads; reads(prompt, item, kept): the token ids of a row
    without latents; keep: which of the context's tokens are `kept` (`kept_tokens`); lora: read with the reader's LoRA
    on, so it needs a trained wire; latents: "own", "other" (another context's) or "adapter" (no encoder) where the
    reader gets latents."""
    heading: str
    help: str
    reads: Callable | None = None
    keep: str = ""
    lora: bool = False
    latents: str = ""


_text = lambda prompt, item, kept: prompt.text(item)
_anchor = lambda prompt, item, kept: np.concatenate([prompt.text(item), prompt.anchor])
_budget = lambda prompt, item, kept: np.concatenate([prompt.pre, kept, prompt.post, prompt.anchor])
_kept = lambda prompt, item, kept: np.concatenate([prompt.pre, prompt.head, kept, prompt.after(item)])
_question = lambda prompt, item, kept: np.concatenate([prompt.pre, prompt.after(item)])

ROWS = {
    "text": Row("Text baseline", "the prompt's token ids", _text),
    "raw": Row("Raw embeddings", "the same prompt through inputs_embeds: must equal `text` token by token", _text),
    "anchor": Row("Anchor embeddings", 'raw, and the anchor "Answer:" after it, which every row below has too',
                  _anchor),
    "token_budget": Row("Token budget", "the user's text cut to as many tokens as there are latents", _budget,
                        "budget"),
    "truncated": Row("Truncated context", "the first M tokens of the context, and the question", _kept, "truncated"),
    "selective": Row("Selective-Context", "the M tokens of the context that surprise the LM most, and the question",
                     _kept, "selective"),
    "matched": Row("Nearest to the question", "the M tokens of the context that stand nearest to the question's words, "
                   "and the question", _kept, "matched"),
    "question_only": Row("Question only", "the question without its context", _question),
    "text_lora": Row("Text, LoRA on", "`anchor` read with the trained LoRA on", _anchor, lora=True),
    "token_budget_lora": Row("Token budget, LoRA on", "`token_budget` with it", _budget, "budget", lora=True),
    "truncated_lora": Row("Truncated context, LoRA on", "`truncated` with it", _kept, "truncated", lora=True),
    "selective_lora": Row("Selective-Context, LoRA on", "`selective` with it", _kept, "selective", lora=True),
    "matched_lora": Row("Nearest to the question, LoRA on", "`matched` with it", _kept, "matched", lora=True),
    "latent": Row("**Latents**", "M latents in place of the text; latent@16 takes 16 of them whatever --latents says, "
                  "latent@int8 sends them as integers", lora=True, latents="own"),
    "latent_shuffled": Row("Latents of another context", "the same with another context's: what is left is not "
                           "carried by the wire", lora=True, latents="other"),
    "adapter": Row("Adapter (no encoder)", "the text's embeddings resampled to M places and sent through the trained "
                   "adapter of an embeds wire", lora=True, latents="adapter"),
}


def split_row(name):
    """"latent@16" -> ("latent", 16, None), "latent@int8" -> ("latent", None, "int8"), "text" -> ("text", None, None).
    Raises UserError for a name that is no row."""
    row, at, own = name.partition("@")
    known = ROWS.get(row)
    sent = known and known.latents in ("own", "other")
    number = known and (sent or known.keep) and own.isdecimal() and int(own) > 0
    if not known or at and not (number or sent and own in FORMATS):
        raise UserError(f"--mode {name} is unknown; there are {', '.join(ROWS)}, own, all, latent@16 or truncated@16 "
                        "for another M, latent@int8 for another format")
    return row, int(own) if own.isdecimal() else None, own if own in FORMATS else None


def own_row(config):
    """The row that a wire is trained for."""
    if config.wire != "tokens":
        return "latent"
    return "text_lora" if config.keep == "all" else f"{config.keep}_lora"


def rows_of(config):
    """The rows that a wire can answer."""
    lacks = {"kv": {"adapter"}, "embeds": set(), "tokens": {"latent", "latent_shuffled", "adapter"}}[config.wire]
    return [name for name in ROWS if name not in lacks]


# ------------------------------------------------------------------------------------------------
# SQuAD's own scores (Rajpurkar et al., arXiv 1606.05250)

def normalize(text):
    """Lower case, without punctuation, articles and extra whitespace."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1_score(prediction, golds):
    """Token F1 in 0..1 against the best of the gold answers, equal to SQuAD's official script: of v1.1, and where the
    answer or a gold is nothing but articles and punctuation, which have no token, of v2.0: 1 if both are, else 0.
    Tokens are what stands between spaces: in scripts without them F1 is exact match."""
    def one(gold):
        p, g = normalize(prediction).split(), normalize(gold).split()
        if not p or not g:
            return float(p == g)
        same = sum((Counter(p) & Counter(g)).values())
        return 2 * same / (len(p) + len(g)) if same else 0.0
    return max(map(one, golds), default=0.0)


def exact_match(prediction, golds):
    """1.0 if the normalised prediction equals one of the normalised gold answers, else 0.0."""
    return float(any(normalize(prediction) == normalize(gold) for gold in golds))


def interval(values, over=None):
    """95% bootstrap interval [low, high] of the mean of (n,) values, or of mean(values) / mean(over)."""
    values, rng = np.asarray(values, dtype=float), np.random.default_rng(0)
    picks = (rng.integers(len(values), size=len(values)) for _ in range(2000))  # one by one: 90,000 questions fit
    means = [values[p].mean() / (1.0 if over is None else max(over[p].mean(), 1e-9)) for p in picks]
    return [float(x) for x in np.percentile(means, [2.5, 97.5])]


# ------------------------------------------------------------------------------------------------
# What the latents are measured against

def kept_tokens(keep, lm, prompt, items, counts, rare=None):
    """Of each item the tokens that a rival keeps: a list of (n,) arrays, n at most counts[b] but for all. keep:
    truncated, selective (depends on the context alone), matched (rare (V,): how much a word counts, see
    `model.rarity`), all, or budget: the first of everything the user wrote."""
    if keep == "all":
        return [item.context for item in items]
    if keep == "truncated":
        return [item.context[:count] for item, count in zip(items, counts)]
    if keep == "budget":
        return [np.concatenate([prompt.head, item.context, item.question])[:count]
                for item, count in zip(items, counts)]
    if keep == "selective":
        return most_surprising(lm, prompt, [item.context for item in items], counts)
    question, context = (pad([getattr(item, name) for item in items], PAD).to(lm.device) for name in (
        "question", "context"))
    place = places(nearness(lm, question, context, rare.to(lm.device))).cpu().numpy()
    return [item.context[row[:len(item.context)] < count] for item, row, count in zip(items, place, counts)]


@torch.no_grad()
def most_surprising(lm, prompt, contexts, counts):
    """Selective-Context (Li et al., arXiv 2310.06201), token by token: of each context (T,) the counts[b] tokens with
    the highest self-information -log p(token | what comes before it) under the plain LM, in their order."""
    before, device = np.concatenate([prompt.pre, prompt.head]), lm.get_input_embeddings().weight.device
    ids = pad([np.concatenate([before, context]) for context in contexts], PAD).to(device)
    with use_lora(lm, None):  # causal: padding on the right is unseen
        hidden = lm.model(inputs_embeds=embed(lm, ids), use_cache=False).last_hidden_state
    picked = []
    for states, context, count in zip(hidden, contexts, counts):
        logits = head(lm, states[len(before) - 1:][:len(context)])
        label = torch.as_tensor(context, device=device).long()
        information = F.cross_entropy(logits.float(), label, reduction="none")
        picked.append(context[information.topk(min(count, len(context))).indices.sort().values.cpu().numpy()])
    return picked


def other_contexts(items):
    """For each item the number of an item with another context, the same one for all questions of a context: of
    another article where there is one, for a paragraph's neighbour may hold its answers."""
    first = {}
    for number, item in enumerate(items):
        first.setdefault(item.example.context, number)
    if len(first) < 2:
        raise UserError("latent_shuffled needs questions of at least two contexts; raise --samples, or leave it out")
    numbers, after = list(first.values()), {}
    for place, context in enumerate(first):
        others = numbers[place + 1:] + numbers[:place]
        title = items[numbers[place]].example.title
        after[context] = next((n for n in others if not title or items[n].example.title != title), others[0])
    return [after[item.example.context] for item in items]


def adapter_latents(wire, texts, counts):
    """Latents of an embeds wire without its encoder: the texts' embeddings at counts[b] places through its adapter."""
    rows = [embed(wire.lm, torch.from_numpy(text)[None].long().to(wire.lm.device)).float() for text in texts]
    base = pad_sequence([F.interpolate(row.transpose(1, 2), count, mode="linear")[0].T
                         for row, count in zip(rows, counts)], True)
    return Latents(torch.tensor(counts, device=base.device), None, None, prefix=wire.adapter(base, base))


# ------------------------------------------------------------------------------------------------
# Answers

def length_batches(lengths, batch, padded):
    """Numbers of items of like length, at most `batch` of them and `padded` tokens a batch, so that few long contexts
    do not pad many short ones. Longest first: what does not fit into memory fails at once, and the ETA falls rather
    than grows."""
    chunks = [[]]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if chunks[-1] and (len(chunks[-1]) == batch or lengths[chunks[-1][0]] * (len(chunks[-1]) + 1) > padded):
            chunks.append([])
        chunks[-1].append(i)
    return chunks


@torch.no_grad()
def read_latents(row, wire, items, others, M, ratio, form):
    """What a row with latents reads: (Latents of the items, token ids behind or around them, counts of what the
    latents replace). others: whose context each item's latents are made of."""
    layout, device = wire.layout, wire.lm.device
    given = [replace(item, context=other.context) for item, other in zip(items, others)]
    texts = [layout.source(item) for item in given]
    counts = [wire.stored(len(text), M, ratio) for text in texts]
    if row.latents == "adapter":
        latents = adapter_latents(wire, texts, counts)
    else:  # a text that several items share is encoded once
        first = {text.tobytes(): b for b, text in reversed(list(enumerate(texts)))}
        alone = sorted(first.values())
        latents = wire.encode(wire.source([texts[b] for b in alone], [counts[b] for b in alone],
                                          [given[b] for b in alone]).to(device))
        latents = through(latents.packed(), form)
        latents = latents.rows(torch.tensor([alone.index(first[text.tobytes()]) for text in texts], device=device))
        if layout.late:
            latents = wire.choose(latents, pad([layout.after(item) for item in items], PAD).to(device), M).packed()
    seen = sum(counts)
    if layout.late:  # by a head on average, the text before aside
        of_heads = torch.cat([layer.sum((0, 2)) for layer in latents.held])
        seen = of_heads.sum().item() / len(of_heads) - len(layout.before) * len(items)
    done = {"source_tokens": sum(map(len, texts)), "stored": sum(counts), "latents": seen}
    if wire.config.wire == "kv":  # vectors are in the rows
        done["tokens_read"] = seen + len(layout.before) * len(items)
    return latents, [wire.reads(item, n) for item, n in zip(items, counts)], done


def read_text(row, wire, lm, prompt, items, M, ratio, rare):
    """The token ids that a row without latents reads. M, ratio: see `evaluate_row`; where a document is stored at a
    ratio, M alone says how much of it is read."""
    layout = wire.layout if wire else prompt.layout("context")
    ratio = None if layout.late else ratio
    counts = [budget(len(layout.source(item)), M, ratio) for item in items]
    kept = kept_tokens(row.keep, lm, prompt, items, counts, rare) if row.keep else items
    return [row.reads(prompt, item, text) for item, text in zip(items, kept)]


def ranks(logits, labels):
    """How many tokens come before each label (n,) in the order of its logits (n, V), of equals the lower id first, as
    argmax has it: bf16 has many equals."""
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > own) | (logits == own) & earlier).sum(1)


def words_of(prompt, lm):
    """`rarity` of words (V,) where no wire has counted any: all alike, but for what stands around every question. To
    count them among the questions asked would make one's answer depend on the others."""
    rare = torch.ones(lm.get_input_embeddings().weight.shape[0])
    rare[torch.from_numpy(prompt.around).long()] = 0
    return rare


@torch.no_grad()
def evaluate_row(name, lm, tokenizer, prompt, items, wire=None, M=None, ratio=None, max_new_tokens=24, batch=25,
                 bar=None):
    """Answer every item through one row, at M latents or tokens, or at ceil(T / ratio) (default: what the wire was
    trained for; without one 32). Returns a dict with, per item in order, `answers`, `ids`, `f1`, `em`, and the means
    nll_token, first_token_top1, first_token_top5, tokens_read, latents (that a question sees), stored (of its
    document), and seconds encode, prefill, decode."""
    name, own, form = split_row(name)
    row = ROWS[name]
    if own:  # of a document that is stored at a ratio, that many are seen
        M, ratio = own, ratio if wire and wire.layout.late else None
    if wire:
        M, ratio = how_many(wire.config, M, ratio)
    others = [items[o] for o in other_contexts(items)] if row.latents == "other" else items
    rare = None if row.keep != "matched" else wire.rarity if wire else words_of(prompt, lm)
    answers, ids, hits, total = [None] * len(items), [None] * len(items), [], Counter()
    padded = 5_000 if lm.device.type == "cpu" else 50_000  # tokens at once: on a GPU a token's time is its launches
    for chunk in length_batches([len(other.context) for other in others], batch, padded):
        given, latents = [items[i] for i in chunk], None
        began = time.perf_counter()
        if row.latents:
            latents, rows, done = read_latents(row, wire, given, [others[i] for i in chunk], M, ratio, form or "fp32")
            total.update(done)
        else:
            rows = read_text(row, wire, lm, prompt, given, M or 32, ratio, rare)
        if lm.device.type == "cuda":
            torch.cuda.synchronize(lm.device)
        total.update(encode_s=time.perf_counter() - began, tokens_read=sum(map(len, rows)))
        with use_lora(lm, "reader" if row.lora else None):
            out = generate(lm, tokenizer, rows, latents, max_new_tokens, name == "text",
                           golds=[item.answer[:-1] for item in given])  # without its end token
        nll = F.cross_entropy(out.logits, out.labels, reduction="sum").item()
        total.update(prefill_s=out.prefill, decode_s=out.decode, tokens=len(out.labels), nll=nll)
        hits += ranks(out.logits[out.first][:, :len(tokenizer)], out.labels[out.first]).tolist()
        for i, text, new in zip(chunk, out.answers, out.ids):
            answers[i], ids[i] = text, new
        if bar is not None:
            bar.update(len(chunk))
    n, hits = len(items), np.array(hits)
    return {
        "answers": answers, "ids": ids,
        "f1": [f1_score(a, item.example.answers) for a, item in zip(answers, items)],
        "em": [exact_match(a, item.example.answers) for a, item in zip(answers, items)],
        "nll_token": total["nll"] / total["tokens"],
        "first_token_top1": float((hits < 1).mean()), "first_token_top5": float((hits < 5).mean()),
        **{key: total[key] / n for key in ("tokens_read", "source_tokens", "latents", "stored")},
        **{key: total[key] for key in ("encode_s", "prefill_s", "decode_s")},
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
