"""
The wire: a frozen LM that reads a text, keeps of it what each head needs most, and answers from that.

    Context: text                --LM + encoder LoRA-->  keys and values of every token in every layer and head
    Repeat: text                 --plain LM, behind-->   how much each head needs each of them: M a head stay, the most
                                                         needed of all layers and heads
    M latents, question, Answer: --LM + reader LoRA-->   answer

Training reads a text twice. After it a linear map of a place's keys and values predicts what the second reading would
find, and the text is read once.

Words, one meaning each:
    source         the token ids that latents replace (scope context: the context; prompt: question and context)
    importance     how much a head needs a token of the source while the LM reads it again (`need` below); and where a
                   question chooses, that times how much the LM looks at its place when about to answer (`looked_at`)
    predictor      what tells the need of each head from a token's keys and values in its layer alone
    latent         wire kv: one of the source's keys and its value in every layer and head. M latents are M a head on
                   average: a head that needs the source more than another has more of them.
                   wire embeds: a vector of the LM's width for one of the tokens that any head needs most.
                   With as many latents as tokens, the text's own are the latents
    encoder        the frozen LM with its LoRA set `encoder`: reads the source
    reader         the frozen LM with its LoRA set `reader`: reads latents and text, and answers
    wire           kv, embeds, or tokens (no encoder: the reader gets some of the context's own tokens, the rival)
    before         the text in front of the latents ("Context:", the chat template's head): attention needs a place to
                   rest. Its keys and values come with the latents of a kv wire and do not count as latents
    scope          what is latents and what stays text, as a Layout (data.py)
    stored, seen   how many latents a document has, and how many of them a question sees. They differ in scope asked
                   alone: a document is stored at --ratio, and of it a question sees M, of a long one M of those that
                   stand near its words (`nearby`)

Shapes: B rows, T source tokens, M latents, N cached places (before, latents), S tokens that the LM reads, A answer
tokens, d the LM's width, V the vocabulary; W columns of the encoder's pass, the first H of them before.
"""
import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError
from data import LATENT, PAD, Tensors, lay_source, pack, pad
from lm import (Tape, add_lora, behind, check_attention, check_length, embed, head, importance, lm_identity, masks,
                turn, turning_layers, use_lora, window)
from losses import wire_loss


def option(default, text):
    """A field of a config, which is a flag; text: its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class WireConfig:
    """What defines a wire; saved with every checkpoint."""
    lm: str = option("meta-llama/Llama-3.1-8B-Instruct", "hub id, local folder, .gguf file, or smollm2-135m")
    prompt: str = option("chat", "plain, or chat for the tokenizer's chat template")
    max_prompt_tokens: int = option(1024, "contexts are cut from the right to fit; also how many tokens of a text the "
                                          "encoder reads at once")
    scope: str = option("context", "what the latents replace: context (the question stays text), asked (the same, and "
                                   "each question chooses M of them) or prompt (question and context)")
    wire: str = option("kv", "how the text reaches the reader: kv (keys and values of every layer), embeds (vectors at "
                             "its input) or tokens (some of the text's own: the rival)")
    keep: str = option("truncated", "which tokens, for --wire tokens: truncated (the first), selective (the most "
                                    "surprising), matched (the nearest to the question's words) or all")
    latents: str = option("32", "M, how many latents (or tokens) stand for a text; several (8,16,32,64) train one wire "
                                "for all")
    ratio: float = option(0.0, "tokens per latent: M = ceil(T / ratio) for each text, in place of --latents; in scope "
                               "asked how densely a document is stored (default there 1: every token), and --latents "
                               "is what a question sees")
    encoder_rank: int = option(32, "LoRA rank of the encoder")
    lora_rank: int = option(32, "LoRA rank of the reader; 0: none")
    lora_targets: str = option("q,k,v,o,gate,up,down", "which projections get LoRA, in both sets")


def budgets(config):
    """The numbers of latents that --latents names, ascending: "8,16,32" -> [8, 16, 32]."""
    try:
        found = sorted({int(part) for part in str(config.latents).split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise UserError(f"--latents {config.latents} must be whole numbers of at least 1, such as 32 or 8,16,32,64")
    return found


def how_many(config, M=None, ratio=None):
    """(M, tokens per latent or None) that texts are stored and answered at: what is asked for, else what a wire was
    trained for, of several M the most. In scope asked the ratio says how a text is stored, M what a question sees."""
    if config.scope == "asked":
        return M or max(budgets(config)), ratio or config.ratio or 1.0
    return M or max(budgets(config)), ratio or (None if M else config.ratio) or None


KNOWN = {"scope": ("context", "asked", "prompt"), "wire": ("kv", "embeds", "tokens"), "prompt": ("plain", "chat"),
         "keep": ("truncated", "selective", "matched", "all")}


def check_config(config):
    """Raise UserError for a value that names no such thing, or that does not go with another."""
    budgets(config)
    if config.ratio and config.ratio < 1:
        raise UserError(f"--ratio {config.ratio} must be at least 1: it is tokens per latent")
    for name, known in KNOWN.items():
        if getattr(config, name) not in known:
            raise UserError(f"--{name} {getattr(config, name)} is unknown; there are {', '.join(known)}")
    if config.scope != "context" and config.wire == "tokens":
        raise UserError(f"--scope {config.scope} is for wires with latents; --wire tokens reads text: give --scope "
                        "context")
    if config.scope == "asked" and config.wire == "embeds":
        raise UserError("--scope asked shows each question its own part of a cache; give --wire kv with it")
    if config.wire == "tokens" and not config.lora_rank:
        raise UserError("--wire tokens with --lora_rank 0 leaves nothing to train; give --lora_rank 16")


def untrained(lm, prompt="plain", max_prompt_tokens=1024):
    """The WireConfig of a wire that nothing has been trained for: what the heads of the plain LM keep, read by it."""
    return WireConfig(lm=lm, prompt=prompt, max_prompt_tokens=max_prompt_tokens, encoder_rank=0, lora_rank=0)


# ------------------------------------------------------------------------------------------------
# Which words tell a place

NEARBY, LONG = 128, 512  # of more than LONG tokens a question chooses among the NEARBY that are nearest to its words
AT_ONCE = 8192           # how many tokens of a text are embedded at once: all those of a book would be gigabytes


def rarity(texts, questions, around, vocabulary):
    """How much a word of a question says about the place of its answer: the log of how much rarer than 1 in 100 it is
    among the tokens of all texts and questions, and 0 for commoner ones: (V,) float32. "who" is rare in texts and yet
    says nothing, hence the questions; what the prompt puts around each (`around`, token ids) gets 0 however few they
    are. texts, questions: lists of (n,) token ids."""
    ids = torch.from_numpy(np.concatenate(texts + questions)).long()
    counts = torch.bincount(ids, minlength=vocabulary).float()
    found = torch.log(0.01 / (counts / counts.sum() + 1e-5)).clamp(min=0)
    found[torch.from_numpy(around).long()] = 0
    return found


def places(score):
    """Which place each score (..., T) takes among those of its row, 0 the highest, the left one first of two equals."""
    return score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


@torch.no_grad()
def nearness(lm, question, context, rarity):
    """Which share of its question's words stands near each token of a context, 0 to 1: (B, T), 0 where there is none.
    question (B, Q), context (B, T), or (1, T) where all are about one: token ids, PAD right. Two words are as alike as
    the squared cosine of their input embeddings; a word counts more the rarer it is, in general (rarity (V,)) and in
    this text; near fades out over 32 tokens."""
    unit = lambda ids: F.normalize(embed(lm, ids).float(), dim=-1)
    text = (context != PAD)[:, None]                                              # (B or 1, 1, T)
    mean = lambda y: F.avg_pool1d(y, 33, 1, 16)                                   # of places, there or not
    with torch.autocast(context.device.type, enabled=False):  # bf16 has many equals
        asked = unit(question)
        parts = [asked @ unit(part).mT for part in context.split(AT_ONCE, 1)]
        alike = torch.cat(parts, 2).clamp(min=0) ** 2 * text                      # (B, Q, T)
        near = mean(F.max_pool1d(alike, 33, 1, 16) * text) / mean(text.float()).clamp(min=1 / 33)  # of those that are
        weight = rarity[question.clamp(min=0)] * (question != PAD) / (alike ** 4).sum(2).clamp(min=1)
        return ((weight / weight.sum(1, keepdim=True).clamp(min=1e-6))[:, None] @ near * text).squeeze(1)


# ------------------------------------------------------------------------------------------------
# What will be needed, without reading a text again

RIDGE = 0.005  # the penalty of a slope, by the variance of its column
BELOW = 3.0    # how far below the cut the log of a need still counts
ENOUGH, TOKENS = 16, 10_000  # to how many tokens of text for each trait the prediction is fitted, and at most in all
MOST = 5_000   # traits; an LM with more in a layer goes on reading twice: their squares would take its memory


def traits(lm, keys, values):
    """What a place is, as far as a layer sees it: of each of its heads the key as if it stood first, the value, and the
    log of the value's length; and 1: (B, W, F) float32 a layer, of keys and values (B, heads, W, d_head) a layer."""
    place = torch.arange(keys[0].shape[2], device=keys[0].device)
    still = turn(lm, [key.float() for key in keys], -place.expand(len(keys[0]), -1))
    for key, value in zip(still, values):
        length = value.float().norm(dim=-1, keepdim=True).clamp(min=1e-6).log()
        of_heads = torch.cat([key, value.float(), length], -1).transpose(1, 2).flatten(2)
        yield F.pad(of_heads, (0, 1), value=1.0)


def ridge(square, cross):
    """Ridge regression of the log of each head's need of a place on the traits of the place in its layer: (heads, F)
    weights, of the layer's sums square (F, F) and cross (F, heads). The constant, the last trait, is not penalised:
    everything is taken from its mean first. The penalty is the larger the fewer tokens there are."""
    n = square[-1, -1]
    square, cross = square / n, cross / n
    mean, middle = square[:-1, -1:], cross[-1:]
    spread, with_y = square[:-1, :-1] - mean @ mean.T, cross[:-1] - mean @ middle
    penalty = RIDGE * (ENOUGH * len(square) / n).clamp(min=1)
    slope = torch.linalg.solve(spread + torch.diag(penalty * spread.diagonal() + 1e-6), with_y)
    return torch.cat([slope, middle - mean.T @ slope]).T


# ------------------------------------------------------------------------------------------------
# The wire

@dataclass
class Latents(Tensors):
    """What the reader gets of B documents. Wire kv: keys and values, a tensor (B, heads, N, d_head) a layer. Wire
    embeds: prefix (B, M, d), and the text before it is text."""
    length: object   # (B,) the position of the first token behind them
    held: list       # (B, heads, N) bool a layer, which places there are; or (B, 1, N) where all heads hold the same
    kept: list       # (B, heads, N) or (B, 1, N) a layer: which of the document's places each is
    keys: list = None
    values: list = None
    prefix: object = None
    need: list = None  # (B, heads, N) a layer: how much a head needs each place anyway; where a question chooses later
    width: int = 0     # how many places the document has, latents or not: kept counts up to there
    ids: object = None  # (B, width) the token at each, PAD right; None of what a file without them was read from

    def of_tokens(self, T, before, weights=None):
        """(T,) shares of one document's latents by the token of its text that each is: of their number, or of weights
        ((heads, N) a layer). before: how many places stand in front of them."""
        share = torch.zeros(T, device=self.length.device)
        for layer in range(len(weights or self.held)):
            held, kept = (side[layer % len(side)][0, :, before:] for side in (self.held, self.kept))
            weight = held.float() if weights is None else weights[layer][:, before:] * held   # (heads or 1, N - before)
            token = torch.where(held, kept - before, 0).expand(weight.shape)
            share.index_add_(0, token.flatten(), weight.flatten())
        return (share / share.sum()).cpu()

    def rows(self, number):
        """The Latents of the documents number (a tensor (B',) or a slice), in that order."""
        return self.map(lambda x: x[number])

    def for_each(self, B):
        """The Latents of one document as those of B, of which none is a copy; those of B as they are."""
        return self.map(lambda x: x.expand(B, *x.shape[1:]))

    def packed(self, widths=None):
        """The same without the places that no head of a layer holds: what is stored, and read at least cost. A layer
        is padded to its fullest head; how full that is, a GPU must be asked, unless it is given of every layer."""
        if self.keys is None:
            return self
        widths = widths or torch.stack([held.sum(-1).max() for held in self.held]).tolist()
        number = [ascending(held)[..., :n] for held, n in zip(self.held, widths)]
        pick = lambda side: side and [y.take_along_dim(n.view(*n.shape, *(1,) * (y.ndim - 3)), 2)
                                      for y, n in zip(side, number)]
        sides = ("held", "kept", "keys", "values", "need")
        return replace(self, **{name: pick(getattr(self, name)) for name in sides})


class Adapter(nn.Module):
    """Tokens' last hidden states (..., d) -> a residual on their input embeddings, (..., d). It starts at 0, so that
    the LM can read it at once, and is scaled by the RMS of the LM's input embeddings: Adam's first steps have the
    size of the learning rate whatever the gradient, and unscaled they would swamp the base."""

    def __init__(self, d, rms):
        super().__init__()
        self.out, self.rms = nn.Linear(d, d), rms
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, h, base):
        return base + self.rms * self.out(h)


class LatentWire(nn.Module):
    """A frozen LM and its LoRA sets. prompt: of its items."""

    def __init__(self, lm, config, prompt):
        check_config(config)
        super().__init__()
        self.lm, self.config, self.prompt, self.layout = lm, config, prompt, prompt.layout(config.scope)
        last, d = lm.config.num_hidden_layers - 1, lm.config.hidden_size
        check_length(lm, config.max_prompt_tokens)
        lm_identity(lm)  # before there is LoRA in it
        # Of the last layer a kv wire sends keys and values: what comes after them there would never get a gradient.
        used = lambda lora, layer, target: (lora == "reader" or config.wire == "embeds" or layer < last
                                            or target in ("k", "v"))
        if config.wire != "tokens" and not hasattr(lm, "turning"):
            check_attention(lm)
        if config.wire == "kv":
            if not hasattr(lm, "turning"):
                turning_layers(lm)
            lm.config._attn_implementation = "behind"
        ranks = {"reader": config.lora_rank} | ({"encoder": config.encoder_rank} if config.wire != "tokens" else {})
        add_lora(lm, ranks, config.lora_targets, used)
        self.register_buffer("predictor", None)  # (L, heads, F), once it is fitted
        self.register_buffer("rarity", torch.zeros(lm.get_input_embeddings().weight.shape[0], device=lm.device))
        if config.wire == "embeds":
            with torch.no_grad():  # of what the module returns: Gemma scales in it
                some = embed(lm, torch.arange(min(4096, lm.config.vocab_size), device=lm.device))
            self.adapter = Adapter(d, some.float().pow(2).mean().sqrt().item()).to(lm.device)

    def train(self, mode=True):
        super().train(mode)
        self.lm.eval()  # it is frozen: no dropout of its own
        return self

    def trainable(self):
        """{name: parameter} of what is trained."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def kept(self):
        """{name: tensor} of what a checkpoint holds: what is trained, the rarity of words, the predictor if any."""
        return self.trainable() | dict(self.named_buffers(recurse=False))

    @torch.no_grad()
    def fit_predictor(self, texts):
        """Fit, to the second reading of texts (each (T,) token ids), what predicts from a place's keys and values how
        much each head needs it, so that outside of training a text is read once; such modules are known as gates (Fast
        KVzip, arXiv 2601.17668). Takes no more of the texts than are enough. Needs that are far below those of a
        text's most needed fifth all count alike. A wire has none where vectors are the latents, or where a layer has
        too many traits."""
        H, sums, self.predictor = len(self.layout.before), {}, None
        if self.config.wire != "kv":
            return
        most = min(TOKENS, (window(self.lm) or 2 * TOKENS) // 2)  # so much is seen when it is read again
        device = "cpu" if self.lm.device.type == "mps" else self.lm.device  # which has no float64
        for text in texts:
            source = lay_source(self.layout.before, [text[:most]], [1], self.prompt.repeat).to(self.lm.device)
            *_, text_read = self.read(source)
            need = torch.stack(self.needed(source, text_read))[:, 0, :, H:].clamp(min=1e-9).log()   # (L, heads, T)
            cut = need.flatten().float().quantile(0.8) - BELOW
            for layer, x in enumerate(traits(self.lm, text_read.keys, text_read.values)):  # all at once: gigabytes
                if x.shape[-1] > MOST:
                    return
                x, y = x[0, H:].to(device).double(), need[layer].clamp(min=cut).to(device).double()
                square, cross = sums.get(layer, (0.0, 0.0))
                sums[layer] = square + x.mT @ x, cross + x.mT @ y.mT
            if sums[0][0][-1, -1] >= min(TOKENS, ENOUGH * x.shape[-1]):
                break
        self.predictor = torch.stack([ridge(*pair) for pair in sums.values()]).float().to(self.lm.device)

    # -- how many

    def stored(self, length, M=None, ratio=None):
        """How many latents a source of `length` tokens is stored in (`how_many`), never more than there are tokens."""
        return budget(length, *how_many(self.config, M, ratio))

    # -- batches

    def source(self, texts, counts, items=None):
        """The Source of texts (token ids each), counts[b] latents each; items: whose texts they are, where the question
        finds the latents."""
        asks = [self.layout.asks(item) for item in items] if self.layout.asks else None
        return lay_source(self.layout.before, texts, counts, self.prompt.repeat, asks)

    def collate(self, rows, count, M=None, kept=None):
        """The Batch of rows of Items, a row's items sharing one source. count(T): latents for a source of T tokens;
        M: how many a question sees; kept: for --wire tokens the context's tokens of each row."""
        if self.config.wire == "tokens":
            return self.text_batch(rows, kept)
        asked = [[(self.layout.after(item), item.answer) for item in row] for row in rows]
        before = self.layout.before
        texts = [self.layout.source(row[0]) for row in rows]
        counts = [count(len(text)) for text in texts]
        source = self.source(texts, counts, [row[0] for row in rows])
        if self.config.wire == "embeds":
            slots = [np.concatenate([before, np.full(n, LATENT)]) for n in counts]
            batch = pack(list(zip(slots, asked)))
        elif self.layout.late:  # each sees latents of its own, so it has a row of its own
            questions = sum(asked, [])
            document = torch.repeat_interleave(torch.tensor([len(row) for row in rows]))
            batch = pack([(before[:0], [one]) for one in questions], source.length[document].tolist())
            batch.document, batch.sees, batch.least = document, M, min(map(len, texts))
            batch.asks = pad([text for text, answer in questions], PAD)
        else:
            batch = pack([(before[:0], questions) for questions in asked], source.length.tolist())
        batch.source = source
        return batch

    def text_batch(self, rows, kept=None):
        """The Batch of rows of Items behind text: their whole context, or kept, some of its tokens for each row."""
        texts = kept or [row[0].context for row in rows]
        return pack([(np.concatenate([self.layout.before, text]),
                      [(self.prompt.after(item), item.answer) for item in row]) for row, text in zip(rows, texts)])

    def reads(self, item, count):
        """The token ids that the reader gets with an Item: behind a cache, or with `count` places for vectors."""
        front = [self.layout.before, np.full(count, LATENT)] if self.config.wire == "embeds" else []
        return np.concatenate([*front, self.layout.after(item)])

    # -- passes

    def read(self, source, lora="encoder"):
        """The encoder's pass, or the same with another LoRA set on: what it reads and what becomes of it, (B, W, d)
        each, and the Latents of all its places, as it left them."""
        lm, real, tape = self.lm, source.ids != PAD, Tape()
        embeds, position = embed(lm, source.ids), torch.arange(real.shape[1], device=real.device).expand(real.shape)
        with use_lora(lm, lora):  # padding is on the right, where nothing sees it: plain causal attention does
            hidden = lm.model(inputs_embeds=embeds, position_ids=position, past_key_values=tape,
                              use_cache=True).last_hidden_state
        keys, values = map(list, zip(*(tape.caught[layer] for layer in range(lm.config.num_hidden_layers))))
        held, kept = ([side[:, None]] * len(keys) for side in (real, position))
        return embeds, hidden, Latents(real.sum(1), held, kept, keys, values, width=real.shape[1])

    def encode(self, source, each=False):
        """Source -> Latents, of all places of the text: which of them are latents, `held` says (`Latents.packed` drops
        the others). The LM reads before and text with the encoder's LoRA (`read`); how much each token is needed, it
        reads behind them without gradient, or it is predicted (`needed`). each: every head holds as many."""
        H, (embeds, hidden, text) = len(self.layout.before), self.read(source)
        need = self.needed(source, text)
        if source.asks is not None:
            need = for_question(need, self.looked_at(text, source.asks), text.kept)
        held = best(need, text.held, H, source.length - H, each)
        if self.config.wire == "embeds":
            kept = ascending(held[0])[..., :source.most]
            base, hidden = (y.take_along_dim(kept[:, 0, H:, None], 1).float() for y in (embeds, hidden))
            there = torch.arange(source.most, device=kept.device) < source.length[:, None, None]
            prefix = self.adapter(hidden, base)
            return Latents(source.length, [there], [kept], prefix=prefix, width=text.width)
        # Turned together: the text's last key would stand where the last of its latents stands in the cache.
        keys = turn(self.lm, text.keys, (source.length - text.length)[:, None] * (text.kept[0][:, 0] >= H))
        return replace(text, length=source.length, held=held, keys=keys, need=need if self.layout.late else None,
                       ids=source.ids)

    def needed(self, source, text):
        """How much each place of the encoder's pass (text, as Latents) is needed when the LM reads it again: (B, heads,
        W) a layer; of an embeds wire, whose vectors have no layers and heads, one (B, 1, W). Training does read again;
        afterwards that is predicted, of the places that a layer sees from behind the text."""
        if self.predictor is not None and not self.training:
            found, seen = traits(self.lm, text.keys, text.values), behind(self.lm, text, text.length[:, None])
            return [(x @ weight.mT).exp().mT * there[:, :, 0] for x, weight, there in zip(found, self.predictor, seen)]
        found = importance(self.lm, embed(self.lm, source.again), source.again != PAD, text)
        found = [score[..., :source.ids.shape[1]] for score in found]
        return [torch.stack(found).amax((0, 2))[:, None]] if self.config.wire == "embeds" else found

    def looked_at(self, latents, asks):
        """How much the LM looks at each place of the documents that Latents are of, where the reader, having read asks
        (B, S), token ids with PAD right, is about to answer: (B, 1, width), the mean of all layers and heads, each as
        loud as the others. As in SnapKV (arXiv 2404.14469) the end of the prompt is what looks, and a place is as much
        looked at as the most looked at one up to 8 beside it, and half as much again for itself: an answer is found
        where it begins."""
        real, found, H = asks != PAD, 0, len(self.layout.before)
        asking = real & (real.flip(1).cumsum(1).flip(1) <= len(self.prompt.anchor))
        scores = importance(self.lm, embed(self.lm, asks), real, latents, asking, "reader")
        for score, kept in zip(scores, latents.kept):  # one head holds other places than the next
            score = score[..., :kept.shape[-1]] * (kept >= H)
            share = score / score.sum(-1, keepdim=True).clamp(min=1e-9)
            share = share.new_zeros(*share.shape[:2], latents.width).scatter_add(2, kept.expand_as(share), share)
            share = share.mean(1, keepdim=True)
            found += (F.max_pool1d(share, 17, 1, 8) + share / 2) / self.lm.config.num_hidden_layers
        return found

    def nearby(self, latents, asks, least):
        """Of Latents (of B documents, or of one that all B questions are on) those that each question chooses among: of
        a long document what comes from the tokens nearest to its words, for among all of them the LM is easily
        distracted. asks, least: see `choose`. A question without a word that tells a place gets the first ones."""
        H, B = len(self.layout.before), len(asks)
        if latents.width - H <= LONG:
            return latents.for_each(B)
        text, around = latents.ids[:, H:], torch.from_numpy(self.prompt.around).long().to(asks.device)
        near = nearness(self.lm, asks.masked_fill(torch.isin(asks, around), PAD), text, self.rarity)
        most = torch.where((text != PAD).sum(1) > LONG, NEARBY, LONG)[:, None]
        stays = F.pad(places(near) < most, (H, 0), value=True)[:, None]          # (B, 1, width)
        latents = latents.for_each(B)
        held = [there & stays.expand(-1, kept.shape[1], -1).gather(2, kept)
                for there, kept in zip(latents.held, latents.kept)]
        latents = replace(latents, held=held)
        wide = H + (NEARBY if len(text) == 1 or least > LONG else LONG)  # in training no GPU is asked
        return latents.packed([min(there.shape[-1], wide) for there in held] if self.training else None)

    def choose(self, latents, asks, M=None, least=0):
        """Of Latents of B documents, or of one that all questions are on, the M (default: what the wire was trained
        for) that each of B questions sees, by asks (B, S), token ids with PAD right: the late choice of scope asked.
        least: a length that every document has."""
        latents = self.nearby(latents, asks, least)
        count = torch.full_like(latents.length, M or max(budgets(self.config)))
        need = for_question(latents.need, self.looked_at(latents, asks), latents.kept)
        return replace(latents, held=best(need, latents.held, len(self.layout.before), count, each=False))

    def latents(self, batch):
        """The Latents that a batch's rows see, None for a batch without a source."""
        if batch.source is None:
            return None
        latents = self.encode(batch.source)
        if batch.document is None:
            return latents
        alone = len(batch.source.ids) == 1  # then no row needs a copy of all of it
        return self.choose(latents if alone else latents.rows(batch.document), batch.asks, batch.sees, batch.least)

    def logits(self, batch, latents=None, keep=None, lora="reader"):
        """Logits (A, V) of the positions that predict the batch's answer tokens; `keep` (A,) bool selects some of them.
        The head, 49k to 128k wide, is applied to those positions alone. Segments that share a row see the prefix and
        themselves: exactly what they would see alone."""
        lm, ids, segment = self.lm, batch.ids, batch.segment
        embeds, S = embed(lm, ids, None if latents is None else latents.prefix), ids.shape[1]
        alone, position = batch.size == len(ids), batch.position
        mask, tape, cached = None, None, None
        if latents is None and alone:
            # one segment a row and padding on the right: causal, so no mask, and the flash kernel applies
            position = torch.arange(S, device=ids.device)[None]
        else:
            causal = torch.ones(S, S, dtype=torch.bool, device=ids.device).tril()
            allowed = causal & ((segment[:, None, :] == segment[:, :, None]) | (segment[:, None, :] == 0))  # (B, S, S)
            mask = masks(lm, allowed, position, position)
        if latents is not None and latents.keys is not None:
            tape, cached = Tape(latents.keys, latents.values), behind(lm, latents, position)
        with use_lora(lm, lora):
            hidden = lm.model(inputs_embeds=embeds, attention_mask=mask, position_ids=position, past_key_values=tape,
                              use_cache=tape is not None, cached=cached).last_hidden_state
        row, col = (batch.row, batch.col) if keep is None else (batch.row[keep], batch.col[keep])
        return head(lm, hidden[row, col])

    def loss(self, batch, weights, K=4, temperature=1.0, teacher=None):
        """Weighted loss of a batch, its parts, and, for the diagnostics, the answers' logits. teacher: the
        Batch of the same questions behind their text, for weights with kd."""
        logits = self.logits(batch, self.latents(batch))
        teacher_logits = None
        if weights.get("kd"):
            with torch.no_grad():
                teacher_logits = self.logits(teacher, keep=teacher.step < K, lora=None)
        total, parts = wire_loss(logits, batch, weights, K, temperature, teacher_logits)
        return total, {name: part.detach() for name, part in parts.items()}, logits.detach()

    forward = loss  # what DDP calls


def budget(length, M, ratio=None):
    """M, or ceil(length / ratio) where a ratio is given; never more than length."""
    return min(math.ceil(length / ratio) if ratio else M, length)


def for_question(need, looked, kept):
    """How much each head needs each place for a question: need, (B, heads, N) a layer, times how much it looks there,
    looked (B, 1, width) at the places kept. A head needs many or few whatever is asked, and the question says where."""
    return [score * looked.expand(-1, score.shape[1], -1).gather(2, which.expand_as(score))
            for score, which in zip(need, kept)]


def best(scores, held, before, count, each):
    """Which places stay, (B, heads, N) bool a layer: of scores (B, heads, N) a layer the `before` first ones of every
    head, and count[b] a head of those behind them that are held ((B, heads or 1, N) a layer). They are the highest of
    all layers and heads together, so that one has more of them than another; or, with each, of each head."""
    scores = [score.masked_fill(~there, -1) for score, there in zip(scores, held)]
    for score in scores:
        score[..., :before] = torch.inf
    count = before + count
    if each:
        stays = [places(score) < count[:, None, None] for score in scores]
    else:
        heads = sum(score.shape[1] for score in scores)
        place = places(torch.cat([score.flatten(1) for score in scores], 1)).split([s[0].numel() for s in scores], 1)
        stays = [(p < heads * count[:, None]).view_as(score) for p, score in zip(place, scores)]
    return [stay & there for stay, there in zip(stays, held)]


def ascending(stays):
    """stays (..., N) bool -> (..., N) the numbers of the places that stay, ascending, and those of the others."""
    return stays.int().sort(dim=-1, descending=True, stable=True).indices
