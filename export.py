"""
What other programs read of a wire: its reader, and a document.

    DIR/reader/                      the reader's LoRA, as PEFT stores one
    DIR/cache.safetensors            wire kv: keys and values (layers, heads, N, d_head) of a document
    DIR/prefix/                      the same as PEFT's prefix tuning
    DIR/prompt_embeds.safetensors    wire embeds: the vectors (M, d) of a document
    DIR/README.md                    the few lines of Python that read them

Written by `ask.py --export DIR`. Shapes: N cached places (the text before, then the latents), d the LM's width.
"""
import json
import re
import shutil
from pathlib import Path

import torch

from common import UserError, check_own, write_atomic
from lm import LORA_SCALE
from store import write_tensors

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes


def export(folder, wire, latents=None):
    """Write the reader's LoRA and, where Latents (B = 1) are given, the document. Raises UserError where there is
    nothing to write or it cannot be written."""
    folder, lm = Path(folder), wire.lm
    if not wire.config.lora_rank and latents is None:
        raise UserError("--export: this wire's reader has no LoRA (--lora_rank 0); give a document with --context")
    check_own(folder / "README.md", "# A document for other programs", "give --export another folder")
    name = lm.config._name_or_path  # where its weights are: what the user calls it may be known to this project alone
    name = str(Path(name).resolve()) if Path(name).exists() else name
    if latents and latents.keys and not all(held.all() and held.shape[-1] == latents.length for held in latents.held):
        raise UserError("--export: in this document one head holds more places than another, which the caches of other "
                        "programs do not know; give its text with --context")
    try:
        if (folder / "README.md").exists():  # an earlier export, perhaps of another wire or text
            for old in ("reader", "prefix"):
                shutil.rmtree(folder / old, ignore_errors=True)
            for old in ("cache.safetensors", "prompt_embeds.safetensors"):
                (folder / old).unlink(missing_ok=True)
        if wire.config.lora_rank:
            write_reader(folder / "reader", wire, name)
        if latents is None:
            page = READER + "```\n"
        elif latents.keys is None:
            write_tensors(folder / "prompt_embeds.safetensors", {"prompt_embeds": latents.prefix[0].to(lm.dtype)})
            page = EMBEDS
        else:
            keys, values = (torch.cat(list(side)).to(lm.dtype) for side in (latents.keys, latents.values))
            write_tensors(folder / "cache.safetensors", {"keys": keys, "values": values})
            write_prefix(folder / "prefix", keys, values, name)
            page = CACHE
        write_atomic(folder / "README.md", fill(page, wire, name))
    except OSError as error:
        raise UserError(f"--export {folder}: cannot be written ({error})") from None


def write_adapter(folder, tensors, config):
    """A PEFT adapter of that config."""
    write_tensors(folder / "adapter_model.safetensors", tensors)
    config = {"task_type": "CAUSAL_LM", "inference_mode": True, **config}
    write_atomic(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def write_reader(folder, wire, name):
    """lm.model.layers.0.self_attn.q_proj.A.reader -> base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight."""
    tensors = {}
    for key, p in wire.trainable().items():
        if key.endswith(".reader"):
            place, side, _ = key.removeprefix("lm.").rsplit(".", 2)
            tensors[f"base_model.model.{place}.lora_{side}.weight"] = p
    rank = wire.config.lora_rank
    write_adapter(folder, tensors, {
        "peft_type": "LORA", "base_model_name_or_path": name, "r": rank, "lora_alpha": LORA_SCALE * rank,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "target_modules": [f"{target}_proj" for target in wire.config.lora_targets.split(",")]})


def write_prefix(folder, keys, values, name):
    """keys, values (layers, heads, N, d_head) -> prompt_embeddings (N, layers * 2 * heads * d_head), a layer's keys
    before its values."""
    layers, heads, N, d_head = keys.shape
    flat = torch.stack([keys, values], 1).permute(3, 0, 1, 2, 4).reshape(N, -1)
    write_adapter(folder, {"prompt_embeddings": flat}, {
        "peft_type": "PREFIX_TUNING", "base_model_name_or_path": name, "num_virtual_tokens": N, "num_layers": layers,
        "num_attention_heads": heads, "token_dim": heads * d_head, "encoder_hidden_size": heads * d_head,
        "num_transformer_submodules": 1, "prefix_projection": False})


# ------------------------------------------------------------------------------------------------
# The README of an export: what stands in <> is filled in, and the code runs in its folder as it is printed.

def fill(page, wire, name):
    """A page with the wire's values; lines that name the reader are left out where it has no LoRA."""
    prompt, rank, listed = wire.prompt, wire.config.lora_rank, lambda ids: str([int(token) for token in ids])
    fits = str(next((most for most in VLLM_RANKS if most >= rank), rank))
    values = {"NAME": json.dumps(name), "DTYPE": str(wire.lm.dtype), "BEFORE": listed(wire.layout.before),
              "AFTER": listed([*prompt.post, *prompt.anchor]),
              "MARK": json.dumps(prompt.mark)[1:-1], "SKIP": str(prompt.skip), "RANK": fits,
              "SERVE": f" --enable-lora --max-lora-rank {fits} --lora-modules reader=reader" if rank else ""}
    lines = [line for line in page.split("\n") if rank or "reader" not in line]
    return re.sub("<([A-Z]+)>", lambda found: values[found[1]], "\n".join(lines))


READER = '''# A document for other programs

Run this in this folder (transformers 4.56 or newer):

```python
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

tokenizer = AutoTokenizer.from_pretrained(<NAME>)
lm = AutoModelForCausalLM.from_pretrained(<NAME>, dtype=<DTYPE>)
lm = PeftModel.from_pretrained(lm, "reader")  # the LoRA with which the language model reads latents
'''
ASK = '''asked = tokenizer("<MARK>\\nQuestion: Who wrote it?\\n", add_special_tokens=False).input_ids[<SKIP>:] + <AFTER>
how = dict(max_new_tokens=24, do_sample=False, repetition_penalty=1.0)
'''
SAY = '''print(tokenizer.decode(new, skip_special_tokens=True).split("\\n")[0].strip())
```
'''
CACHE = READER + ASK + '''# Keys and values, each (layers, heads, places, width of a head).
document = load_file("cache.safetensors")
cache = DynamicCache([(k[None], v[None]) for k, v in zip(document["keys"], document["values"])])
ids = torch.tensor([[0] * cache.get_seq_length() + asked])  # of the cache's places no id is read
new = lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **how)[0, ids.shape[1]:]
''' + SAY + '''
The folder `prefix` holds the same cache as PEFT's prefix tuning. After the lines above:

```python
lm = AutoModelForCausalLM.from_pretrained(<NAME>, dtype=<DTYPE>)
lm = PeftModel.from_pretrained(lm, "reader").merge_and_unload()
lm = PeftModel.from_pretrained(lm, "prefix")
ids = torch.tensor([asked])
new = lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)[0, ids.shape[1]:]
''' + SAY
EMBEDS = READER + ASK + '''table = lm.get_input_embeddings()
latents = load_file("prompt_embeds.safetensors")["prompt_embeds"]  # (latents, width of the language model)
rows = torch.cat([table(torch.tensor(<BEFORE>).long()), latents, table(torch.tensor(asked))]).detach()
new = lm.generate(inputs_embeds=rows[None], attention_mask=torch.ones(1, len(rows)).long(), **how)[0]
''' + SAY + '''
vLLM takes the same rows. As a server:

    vllm serve <NAME> --enable-prompt-embeds<SERVE>

and after the lines above:

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    llm = LLM(<NAME>, enable_prompt_embeds=True, enable_lora=True, max_lora_rank=<RANK>)
    out = llm.generate({"prompt_embeds": rows},
                       lora_request=LoRARequest("reader", 1, "reader"),
                       sampling_params=SamplingParams(temperature=0, max_tokens=24))
'''
