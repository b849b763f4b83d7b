"""
The wire: a frozen LM, an encoder that turns a text into M latents, an adapter that puts them into the LM's input
space, and LoRA layers in the LM that reads them.

    context tokens --first k frozen layers--> h --encoder--> latents z --adapter--> prefix --LM + LoRA--> answer

Shapes: B rows, T context tokens, M latents, S tokens that the LM reads, A answer tokens, d the LM's width, z the
latents' width, V the vocabulary.
"""
import copy
import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common import UserError, log, write_atomic
from data import PAD
from lm import add_lora, answer_logits, embed, lm_identity, lora_off
from losses import wire_loss

CHUNK, OVERLAP = 1024, 128  # tokens that the encoder's layers read at once, and how many of them twice
NEAR = 7.0  # makes a logit of the nearness of the question's words: with it that alone, as a softmax, best tells the answer's tokens
FORMAT = 4  # of the checkpoint folder, and of what its weights mean; another is refused


@dataclass
class WireConfig:
    """What defines a wire; saved with every checkpoint. Help texts are those of the command line."""
    lm: str = field(default="meta-llama/Llama-3.1-8B-Instruct", metadata={"help": "hub id, local folder, .gguf file, or smollm2-135m"})
    prompt: str = field(default="chat", metadata={"help": "plain, or chat for the tokenizer's chat template"})
    max_prompt_tokens: int = field(default=1024, metadata={"help": "contexts are cut from the right to fit"})
    scope: str = field(default="context", metadata={"help": "what the latents replace: context (the question stays text), asked (the same, but the encoder has read the question) or prompt (all of it)"})
    encoder: str = field(default="pointer", metadata={"help": "pointer, query, pool, or text (every token its own latent: the upper bound)"})
    latents: str = field(default="32", metadata={"help": "M, how many latents replace the text; several (8,16,32,64) train one wire for all"})
    ratio: float = field(default=0.0, metadata={"help": "tokens per latent: M = ceil(T / ratio) for each text, in place of --latents"})
    d_z: int = field(default=512, metadata={"help": "width of a latent before the adapter"})
    depth: int = field(default=0, metadata={"help": "k, the LM layer whose hidden states the encoder reads; 0: a third of them, two thirds where it has read the question"})
    blocks: int = field(default=2, metadata={"help": "trainable bidirectional blocks of the encoder"})
    sharp: float = field(default=40.0, metadata={"help": "scope context: how steeply the pointer's attention falls outside its window"})
    lora_rank: int = field(default=32, metadata={"help": "0: no LoRA"})
    lora_alpha: float = field(default=64.0, metadata={"help": "LoRA's output is scaled by alpha / rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "on LoRA's input"})
    lora_targets: str = field(default="q,k,v,o,gate,up,down", metadata={"help": "which projections get LoRA"})


# ------------------------------------------------------------------------------------------------
# Where to look

def token_counts(texts, vocabulary):
    """How often each token of a vocabulary occurs in a list of (n,) token ids: (V,) float32."""
    return torch.bincount(torch.from_numpy(np.concatenate(texts)).long(), minlength=vocabulary).float()


def rarity(texts, questions, around, vocabulary):
    """How much a word of a question says about the place of its answer: the log of how much rarer than 1 in 100 it is among the
    tokens of all texts and questions, and 0 for commoner ones: (V,). "who" is rare in texts and yet says nothing, hence the
    questions; what the prompt puts around each (`around`, token ids) gets 0 however few they are. texts, questions: lists
    of (n,) token ids."""
    counts = token_counts(texts + questions, vocabulary)
    found = torch.log(0.01 / (counts / counts.sum() + 1e-5)).clamp(min=0)
    found[torch.from_numpy(around).long()] = 0
    return found


def nearness(embeds, mask, asked, rarity):
    """Which share of the question's words stands near each token of the text, 0 to 1: (B, T). embeds (B, T, d) and mask (B, T):
    the LM's input embeddings of a question of asked (B,) tokens and the text after it. Two words are as alike as their
    squared cosine; a word counts more the rarer it is, in general (rarity, B, T) and in this text; near fades out over 32 tokens.
    What stands at the question's own tokens means nothing."""
    T, Q = embeds.shape[1], int(asked.max())
    own = torch.arange(T, device=embeds.device) < asked[:, None]                  # (B, T) the question's tokens
    with torch.no_grad():
        e, text = F.normalize(embeds.float(), dim=-1), (mask & ~own)[:, None]
        alike = (e[:, :Q] @ e.transpose(1, 2)).clamp(min=0) ** 2 * text           # (B, Q, T)
        mean = lambda y: F.avg_pool1d(y, 33, 1, 16)                               # of places, there or not, so
        near = mean(F.max_pool1d(alike, 33, 1, 16) * text) / mean(text.float()).clamp(min=1 / 33)  # of those that are
    weight = rarity[:, :Q] * own[:, :Q] / (alike ** 4).sum(2).clamp(min=1)
    return ((weight / weight.sum(1, keepdim=True).clamp(min=1e-6))[:, None] @ near).squeeze(1)


# ------------------------------------------------------------------------------------------------
# Encoder and adapter

def places(score):
    """Which place each score (B, T) takes among those of its row, 0 the highest, the left one first of two equals."""
    return score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def in_chunks(run, lead, *x):
    """run(*x) for a long text, x each (B, T, ...): in chunks that overlap, since attention grows with the square of what it
    sees. The first `lead` tokens, the question where there is one (of a batch, the longest), stand in front of every chunk.
    -> (B, T, ...)."""
    parts, T = [], x[0].shape[1]
    for start in range(0, max(1, T - OVERLAP), CHUNK - OVERLAP):
        chunk = [torch.cat([y[:, :lead], y[:, start:start + CHUNK]], 1) if start else y[:, :CHUNK] for y in x]
        parts.append(run(*chunk)[:, lead + OVERLAP if start else 0:])
    return torch.cat(parts, 1)


def fourier(r, n=32):
    """Features (..., 2n) of relative positions r in 0..1 (...): sines and cosines at wavelengths from 2 down to 1/32."""
    w = math.pi * torch.logspace(0, 6, n, base=2, device=r.device)
    return torch.cat([(r[..., None] * w).sin(), (r[..., None] * w).cos()], -1)


class Block(nn.Module):
    """Pre-norm bidirectional attention and MLP; both branches start at 0, so that the block starts as the identity."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for last in (self.out, self.down):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x, mask):  # (B, T, z), (B, 1, 1, T) bool -> (B, T, z)
        B, T, z = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, T, z/heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, z))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """Hidden states h (B, T, d) of the text -> latents (B, M, z) and, for the pointer, where each one looks (B, M, T).

    pointer  in scope context, where the question is not known: latent m is a weighted mean over its window of the text, by
             several heads, a softmax over t of
             q_mh K_h(x_t) + g_h(x_t) + s(token t) - sharp max(0, |m + 1/2 + o_h - u_t| - 1/2)^2
             with u_t = M (t + 1/2) / T the place of token t: every latent has as many tokens. s starts as the token's surprise
             without context, -log(p + 0.001): content words count, "the" hardly does (smooth inverse frequency, Arora et al.,
             ICLR 2017). The offsets o_h spread the heads over the window, so that a latent knows the order of what it holds;
             they vanish where a token has a latent of its own.
             In scopes asked and prompt it has read the question and picks: the M tokens with the highest NEAR n_t + f(x_t) get a
             latent each. n_t is the share of the question's words, the rare ones counting most, that stand near (`nearness`); f starts
             at 0 and learns from the places of the answers alone (`find`, losses.py), smoothed over 5 tokens, since answers
             have several: the LM's loss says nothing about tokens that it does not see. In scope prompt the question's words of
             a rarity above 0 come first, the rarest of them, and take up to half of the latents: `find` would never ask for them.
             Either way what a latent looks at (in scope context the mean of the heads' weights) also averages the LM's own input
             embeddings (`mean_embedding`), so that the LM can read the latents before any training.
    query    M learned queries cross-attend to the whole text, starting from nothing (the Q-Former's kind,
             arXiv 2301.12597).
    pool     the mean of M equal windows of the text (arXiv 2510.20797).

    Queries are functions of the relative position (m + 1/2) / M, not one vector per index, so M is free at run time."""

    def __init__(self, kind, d, width, blocks, sharp, vocabulary, scope="context"):
        super().__init__()
        if width % 64:
            raise UserError(f"--d_z {width} does not split into heads of 64; give a multiple of 64")
        self.kind, self.sharp, self.scope = kind, sharp, scope
        self.heads = {"pointer": width // 128 if width % 128 == 0 else width // 64, "query": width // 64, "pool": 1}[kind]
        self.norm, self.project, self.place = nn.LayerNorm(d), nn.Linear(d, width), nn.Linear(64, width)
        self.blocks = nn.ModuleList(Block(width, width // 64) for _ in range(blocks))
        self.final = nn.LayerNorm(width)
        self.value = nn.Linear(width, width)
        self.picks = kind == "pointer" and scope != "context"
        if self.picks:
            self.register_buffer("rarity", torch.ones(vocabulary))
            self.look = nn.Linear(width, 1, bias=False)
            nn.init.zeros_(self.look.weight)
        elif kind != "pool":
            self.query, self.key = nn.Linear(64, width), nn.Linear(width, width, bias=False)
        if kind == "pointer" and not self.picks:
            self.gate = nn.Linear(width, self.heads, bias=False)  # a bias would cancel in the softmax
            for start in (self.query.weight, self.query.bias, self.gate.weight):  # at first place and salience decide
                nn.init.zeros_(start)
            self.salience = nn.Parameter(torch.zeros(vocabulary))

    @torch.no_grad()
    def count_tokens(self, texts, questions, around):
        """Start the pointer's salience from the token frequencies of the texts, or, where it picks, set its `rarity`."""
        if self.picks:
            self.rarity.copy_(rarity(texts, questions, around, len(self.rarity)))
        else:
            counts = token_counts(texts, len(self.salience))
            self.salience.copy_(-torch.log(counts / counts.sum() + 1e-3))

    def pick(self, x, mask, own, M, embeds, asked, rarity):
        """Which tokens (B, T) get a latent, and log p (B, T) that one is what the question asks for, -1e9 outside the text after
        it. own: the question's tokens."""
        text = mask & ~own
        with torch.autocast(x.device.type, enabled=False):  # bf16 would make ties
            found = F.avg_pool1d((self.look(x.float()) * text[..., None]).transpose(1, 2), 5, 1, 2).squeeze(1)
            wish = (NEAR * nearness(embeds, mask, asked, rarity) + found).masked_fill(~text, -1e9).log_softmax(1)
        order = wish
        if self.scope == "prompt":  # the question's words have no other way to the LM
            weight = rarity * own
            order = wish.masked_fill((weight > 0) & (places(weight) < M[:, None] // 2), 1.0)  # above any log p
        return places(order) < M[:, None], wish

    def forward(self, h, mask, M, ids, embeds, asked):
        """h (B, T, d), mask (B, T) bool, M (B,) latents wanted, ids (B, T), embeds (B, T, d) the LM's input embeddings, asked
        (B,) how many tokens at the front are the question -> z (B, max M, z), attention (B, max M, T), None for query, and
        where it picks the log-probabilities (B, T) that it picks by. Rows past a row's own M are meaningless and never read."""
        B, T, _ = h.shape
        m = torch.arange(int(M.max()), device=h.device)
        t = (torch.arange(T, device=h.device) + 0.5) / mask.sum(1, keepdim=True)  # (B, T) relative place of a token
        x = self.project(self.norm(h)) + self.place(fourier(t))        # (B, T, z)

        def through_blocks(x, mask):
            mask = mask | ~mask.any(1, keepdim=True)  # a chunk may be all padding for one row, and attention needs something
            for block in self.blocks:
                x = block(x, mask[:, None, None])
            return x
        x = self.final(in_chunks(through_blocks, int(asked.max()), x, mask))
        own = torch.arange(T, device=h.device) < asked[:, None]
        if self.picks:
            picked, wish = self.pick(x, mask, own, M, embeds, asked, self.rarity[ids.clamp(min=0)])
            attention = (picked[:, None] & (picked.cumsum(1)[:, None] == m[:, None] + 1)).to(x.dtype)  # (B, M, T)
            return attention @ self.value(x), attention, wish
        text = mask & ~own if self.scope == "asked" else mask  # there the question stays text: it is read, not pointed at
        r = (m + 0.5) / M[:, None]                                                # (B, M) relative place of a latent
        split = lambda y: y.view(B, -1, self.heads, y.shape[-1] // self.heads).transpose(1, 2)  # (B, heads, T or M, z / heads)
        value = split(self.value(x))
        if self.kind == "query":
            y = F.scaled_dot_product_attention(split(self.query(fourier(r))), split(self.key(x)), value, attn_mask=text[:, None, None])
            return y.transpose(1, 2).reshape(B, len(m), -1), None, None
        share = M[:, None] / text.sum(1, keepdim=True)                            # (B, 1) windows per token
        distance = (m + 0.5)[:, None] - (share * (text.cumsum(1) - 0.5))[:, None]  # (B, M, T) in windows
        if self.kind == "pool":
            score = torch.where(distance.abs() <= 0.5 + 1e-4, 0.0, -1e4)[:, None]  # not -inf: past a row's own M a window is empty
        else:  # written out, not through SDPA: the weights themselves are the result
            q, k = split(self.query(fourier(r))), split(self.key(x))
            offset = (torch.arange(self.heads, device=h.device) + 0.5) / self.heads - 0.5
            offset = offset[:, None, None] * (1 - share)[:, None, None]                                 # (B, heads, 1, 1)
            outside = ((distance[:, None] + offset).abs() - 0.5 - 1e-4).clamp(min=0)                    # (B, heads, M, T)
            gate = self.gate(x).transpose(1, 2) + self.salience[ids.clamp(min=0)][:, None]              # (B, heads, T)
            score = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + gate[:, :, None] - self.sharp * outside ** 2
        attention = score.masked_fill(~text[:, None, None], float("-inf")).softmax(-1)
        return (attention @ value).transpose(1, 2).reshape(B, len(m), -1), attention.mean(1), None


def mean_embedding(attention, embeds):
    """What the LM reads before any training: means (B, M, d) of input embeddings (B, T, d) by attention (B, M, T), brought to the
    mean length of their tokens, since a mean of several is shorter than each. A latent of one token is that token."""
    mean, length = attention @ embeds, attention @ embeds.norm(dim=-1, keepdim=True)
    return mean * (length / mean.norm(dim=-1, keepdim=True).clamp(min=1e-6))


class Adapter(nn.Module):
    """Latents (B, M, z) -> prefix (B, M, d) at the RMS of the LM's input embeddings.

    With a readable base (B, M, d) the latents are a residual that starts at 0. Its factor rms matters: Adam's first steps
    have the size of the learning rate whatever the gradient, and unscaled they would swamp the base."""

    def __init__(self, width, d, rms, residual):
        super().__init__()
        self.out, self.rms = nn.Linear(width, d), rms
        if residual:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, z, base=None):
        y = self.out(z)
        if base is not None:
            return base + self.rms * y
        return self.rms * y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-12)


# ------------------------------------------------------------------------------------------------
# Payload: how latents travel

WIRES = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}  # bits per value
GROUP, SCALE_BITS = 32, 16  # integers share one scale per group


def quantise(prefix, kind):
    """prefix (..., d), d a multiple of 32 -> (values, scales) as they travel. fp32, fp16: the values alone. int8, int4: round
    to nearest by absolute maximum per group of 32, int8 codes (two int4 codes to a byte) and float16 scales."""
    if kind in ("fp32", "fp16"):
        return prefix.to(torch.float32 if kind == "fp32" else torch.float16), None
    largest = 2 ** (WIRES[kind] - 1) - 1
    groups = prefix.float().unflatten(-1, (-1, GROUP))
    scales = (groups.abs().amax(-1, keepdim=True) / largest).clamp(min=1e-7).half()
    codes = (groups / scales.float()).round().clamp(-largest, largest).to(torch.int8).flatten(-2)
    if kind == "int4":
        low, high = (codes.view(torch.uint8) & 15).unflatten(-1, (-1, 2)).unbind(-1)
        codes = low | (high << 4)
    return codes, scales.squeeze(-1)


def dequantise(values, scales):
    """What `quantise` made, as float32 (..., d)."""
    if scales is None:
        return values.float()
    if values.dtype == torch.uint8:  # 4-bit two's complement, the low half first
        values = torch.stack([values & 15, values >> 4], -1).flatten(-2).to(torch.int8)
        values = torch.where(values > 7, values - 16, values)
    return (values.unflatten(-1, (-1, GROUP)).float() * scales.float()[..., None]).flatten(-2)


def payload_bytes(values, kind):
    """Bytes of that many latent values on the wire, scales included."""
    return values * WIRES[kind] // 8 + (values // GROUP * SCALE_BITS // 8 if kind.startswith("int") else 0)


class LatentWire(nn.Module):
    """Encoder + adapter + LoRA around a frozen LM. The LM is held outside the module tree's trainable and saved part:
    `trainable()` names what is learned, `kept()` what is saved."""

    def __init__(self, lm, config):
        super().__init__()
        check_config(config)
        d, layers = lm.config.hidden_size, lm.config.num_hidden_layers
        self.config, self.lm = config, lm
        depth = config.depth or max(1, layers // 3) * (1 if config.scope == "context" else 2)
        if not 1 <= depth <= layers:
            raise UserError(f"--depth {config.depth}: this LM has {layers} layers")
        # The first k layers, sharing their weights with the LM: a shallow copy with a shorter list and no final norm.
        self.__dict__["lower"] = lower = copy.copy(lm.model)
        lower._modules = dict(lm.model._modules, layers=nn.ModuleList(lm.model.layers[:depth]), norm=nn.Identity())
        weight = lm.get_input_embeddings().weight
        rms = weight.float().pow(2).mean().sqrt().item()
        if config.encoder != "text":
            self.encoder = Encoder(config.encoder, d, config.d_z, config.blocks, config.sharp, lm.config.vocab_size, config.scope).to(weight.device)
            self.adapter = Adapter(config.d_z, d, rms, residual=config.encoder == "pointer").to(weight.device)
        if config.lora_rank:
            add_lora(lm, config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets)

    def trainable(self):
        """{name: parameter} of everything that is learned."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def kept(self):
        """{name: tensor} of what a checkpoint holds: what is learned, and the counts of words that an encoder picks by."""
        return {**self.trainable(), **{name: b for name, b in self.named_buffers() if name.startswith("encoder.")}}

    def count(self, length, M=None, ratio=None):
        """How many latents stand for a text of `length` tokens: M, or ceil(length / ratio), never more than there are tokens.
        Without either, what the wire was trained for, of several the most."""
        if self.config.encoder == "text":
            return length
        ratio = self.config.ratio if M is None and ratio is None else ratio
        return budget(length, M or max(budgets(self.config)), ratio)

    @torch.no_grad()  # frozen layers keep no graph
    def hidden(self, embeds, lead=0):
        """Input embeddings (B, T, d) -> hidden states after the first k layers of the plain LM; lead: see `in_chunks`."""
        def layers(chunk):
            return self.lower(inputs_embeds=chunk, attention_mask=None, use_cache=False,
                              position_ids=torch.arange(chunk.shape[1], device=chunk.device)[None]).last_hidden_state
        with lora_off(self.lm):
            return in_chunks(layers, lead, embeds)

    def encode(self, context, M, asked=None):
        """context (B, T) token ids, PAD right; M (B,), each at most what `count` gives; asked (B,) how many of the tokens at the front are the question, which
        scopes asked and prompt need -> prefix (B, max M, d), attention (B, max M, T), None for the encoders query and text.
        Raises UserError without them."""
        return self.look(context, M, asked)[:2]

    def look(self, context, M, asked=None):
        """What `encode` gives, and the log-probabilities (B, T) that an encoder picks by, None for one that does not."""
        if asked is None and self.config.scope != "context" and self.config.encoder != "text":
            raise UserError(f"a wire of --scope {self.config.scope} must be told how many tokens the question has, which stands in front of the text")
        mask = context != PAD
        embeds = embed(self.lm, context)
        if self.config.encoder == "text":
            return embeds, None, None
        asked = torch.zeros_like(M) if asked is None else asked
        h = self.hidden(embeds, int(asked.max()))
        # Padding is on the right and these layers are causal, so no token sees it; the encoder masks it.
        z, attention, wish = self.encoder(h.float(), mask, M, context, embeds, asked)
        base = mean_embedding(attention, embeds.float()) if self.config.encoder == "pointer" else None
        return self.adapter(z, base), attention, wish

    def loss(self, batch, weights, K=4, temperature=1.0, teacher=None):
        """Weighted loss of a batch, its parts, and what the diagnostics show: answer logits (A, V), prefix, attention.

        teacher: the Batch of the same questions behind their text, for weights with kd."""
        prefix, attention, wish = self.look(batch.context, batch.latents, batch.asked)
        logits = answer_logits(self.lm, batch, prefix)
        teacher_logits = None
        if weights.get("kd"):
            with torch.no_grad(), lora_off(self.lm):
                teacher_logits = answer_logits(self.lm, teacher, keep=teacher.step < K)
        total, parts = wire_loss(logits, batch, weights, K, temperature, teacher_logits, wish)
        return total, parts, (logits.detach(), prefix.detach(), attention if attention is None else attention.detach())

    forward = loss  # what DDP calls


def budget(length, M, ratio=None):
    """M, or ceil(length / ratio) where a ratio is given; never more than length."""
    return min(math.ceil(length / ratio) if ratio else M, length)


def budgets(config):
    """The numbers of latents that --latents names, ascending: "8,16,32" -> [8, 16, 32]."""
    try:
        found = sorted({int(part) for part in str(config.latents).split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise UserError(f"--latents {config.latents} must be whole numbers of at least 1, such as 32 or 8,16,32,64")
    return found


def check_config(config):
    """Raise UserError for a value that names no such thing."""
    budgets(config)
    if config.ratio and config.ratio < 1:
        raise UserError(f"--ratio {config.ratio} must be at least 1: it is tokens per latent")
    for name, known in (("encoder", ("pointer", "query", "pool", "text")), ("scope", ("context", "asked", "prompt")), ("prompt", ("plain", "chat"))):
        if getattr(config, name) not in known:
            raise UserError(f"--{name} {getattr(config, name)} is unknown; there are {', '.join(known)}")
    if config.encoder == "text" and config.scope == "asked":
        raise UserError("--encoder text keeps every token as it is and reads no question: give --scope context with it")
    if config.d_z < 1:
        raise UserError(f"--d_z {config.d_z} must be at least 1")
    for name in ("lora_rank", "blocks", "depth"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name} {getattr(config, name)} must not be negative")


# ------------------------------------------------------------------------------------------------
# Checkpoints
#
# A folder:  config.json          format version, WireConfig, identity of the LM it belongs to
#            model.safetensors    what was trained, by name; never the LM's own weights. float32, or float16 in ckpt/best,
#                                 which is read and passed on, not trained further
#            state.json, optimizer.safetensors    where training stood (written and read by train.py)
#            manifest.json        SHA-256 of each of the files above
#
# It is written under another name, every file synced to disk, then renamed: a folder with the right name is whole. The
# one before it steps aside as NAME.old first, so that at any moment one of the two is there, and stays there as a reserve
# against damage. No file holds code.

@dataclass
class Checkpoint:
    folder: Path
    config: WireConfig
    identity: dict   # of the LM
    checksum: str    # of the trained weights


def save_checkpoint(folder, wire, tensors=None, state=None, dtype=torch.float32):
    """Write a checkpoint folder whole or not at all. tensors: the optimizer's, by name; state: what goes into state.json;
    dtype: of the stored weights."""
    folder = Path(folder)
    part, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        _write_checkpoint(part, wire, tensors, state, dtype)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"{folder} cannot be written ({error})") from None
    if folder.exists():  # else a write was cut short before, and the one aside is all there is
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(part, folder)


def _write_checkpoint(part, wire, tensors, state, dtype):
    config = {field.name: getattr(wire.config, field.name) for field in fields(WireConfig)}
    save_file({name: p.detach().to("cpu", dtype).contiguous() for name, p in wire.kept().items()}, part / "model.safetensors")
    write_atomic(part / "config.json", json.dumps({"format": FORMAT, "wire": config, "lm": lm_identity(wire.lm)}, indent=2))
    if state is not None:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, part / "optimizer.safetensors")
        write_atomic(part / "state.json", json.dumps(state))
    names = sorted(path.name for path in part.iterdir())
    write_atomic(part / "manifest.json", json.dumps({name: _sha256(part / name) for name in names}, indent=2))
    for path in [*part.iterdir(), part]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_checkpoint(folder):
    """Check a checkpoint folder and read its config. Raises UserError when it is missing, damaged or of another format."""
    folder = Path(folder)
    if not folder.exists() and (aside := folder.with_name(folder.name + ".old")).exists():
        folder = aside  # the writer was stopped between its two renames
    if not (folder / "manifest.json").exists():
        raise UserError(f"--ckpt {folder}: no checkpoint there; give a folder with config.json and model.safetensors, such as "
                        "runs/demo/ckpt/best")
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, checksum in manifest.items():
            if _sha256(folder / Path(name).name) != checksum:
                raise UserError(f"--ckpt {folder}: {name} is damaged (wrong SHA-256); use another checkpoint")
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if saved["format"] != FORMAT:
            age, mend = ("newer", "update LatentWire") if saved["format"] > FORMAT else ("older", "its encoder looked at texts in another way; train it again")
            raise UserError(f"--ckpt {folder}: format {saved['format']} is {age} than this version's {FORMAT}; {mend}")
        return Checkpoint(folder, WireConfig(**saved["wire"]), saved["lm"], manifest["model.safetensors"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--ckpt {folder} is damaged ({type(error).__name__}: {error}); use another checkpoint") from None


def read_last_good(folder):
    """`read_checkpoint` of a folder, or, with a notice, of the one before it where this one is damaged."""
    try:
        return read_checkpoint(folder)
    except UserError as error:
        old = folder.with_name(folder.name + ".old")
        if not old.exists():
            raise
        log(f"notice: {error}. Going on from the one before it, {old}")
        return read_checkpoint(old)


def check_lm(saved, lm):
    """Raise UserError where a Checkpoint was trained for another LM."""
    mine = lm_identity(lm)
    for key, value in saved.identity.items():
        if key != "name" and mine[key] != value:
            raise UserError(f"--ckpt {saved.folder} was trained for {saved.identity['name']} ({key} {value}), not {lm.name} "
                            f"({key} {mine[key]}); give --lm {saved.identity['name']}")


def load_wire(saved, lm):
    """LatentWire of a Checkpoint around lm. Raises UserError for weights that belong to another LM."""
    check_lm(saved, lm)
    wire = LatentWire(lm, saved.config)
    load_trained(wire, saved.folder)
    return wire


def load_trained(wire, folder):
    """Copy a checkpoint's weights into the wire. Raises UserError when names or shapes differ."""
    wanted = wire.kept()
    try:
        weights = load_file(Path(folder) / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise UserError(f"--ckpt {folder}: model.safetensors is damaged ({error}); use another checkpoint") from None
    for name in wanted.keys() | weights.keys():
        have, want = (tuple(side[name].shape) if name in side else None for side in (weights, wanted))
        if have != want:
            raise UserError(f"--ckpt {folder}: {name} has shape {have}, this wire needs {want}; its config differs")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(weights[name])
