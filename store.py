"""
What is written and read again: checkpoints, and documents as latents. Shapes: see model.py.
"""
import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch.nn.utils.rnn import pad_sequence

from common import UserError, log, write_atomic
from lm import lm_identity, turn
from model import LatentWire, Latents, WireConfig

FORMAT = 6  # of the checkpoint folder, and of what its weights mean; another is refused. From ee1a745 on it may have a
# predictor, which earlier commits cannot apply. Up to 590f892 a question chose otherwise, in long documents up to
# b07f13d: wires of scope asked and prompt from then answer a little otherwise
READS_OLDER = {4: "d78f6d1", 5: "73f4a51"}  # the last commit that reads a format


def write_tensors(path, tensors, about=None):
    """Write {name: tensor} as safetensors. about: metadata, of str. Not by its save_file, whose files are for the user
    alone and whose errors are no OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    path.write_bytes(save(tensors, about or {"format": "pt"}))


# ------------------------------------------------------------------------------------------------
# Payload: how latents travel

FORMATS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}  # bits per value
SCALE_BITS = 16  # of the scale that the integers of a group share


def group_size(width):
    """How many neighbours in a vector of that width share a scale: 32, or what 32 and the width have in common."""
    return math.gcd(32, width)


def quantise(x, kind):
    """x (..., d), d even -> (values, scales) as they travel. fp32, fp16: the values alone. int8, int4: round to nearest
    by absolute maximum per group (`group_size`), int8 codes (two int4 codes to a byte) and float16 scales."""
    if kind in ("fp32", "fp16"):
        return x.to(torch.float32 if kind == "fp32" else torch.float16), None
    largest = 2 ** (FORMATS[kind] - 1) - 1
    groups = x.float().unflatten(-1, (-1, group_size(x.shape[-1])))
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
    return (values.float().unflatten(-1, (scales.shape[-1], -1)) * scales.float()[..., None]).flatten(-2)


def as_half(need):
    """float16, of which none is infinite: times a look of 0 that would be no number."""
    return need.clamp(max=65504).half()


def through(latents, kind):
    """Latents as they arrive after travelling as `kind`."""
    if kind == "fp32":
        return latents
    arrive = lambda x: dequantise(*quantise(x, kind)).to(x.dtype)
    keys, values = ([arrive(x) for x in part] if part else None for part in (latents.keys, latents.values))
    return replace(latents, keys=keys, values=values, prefix=arrive(latents.prefix) if keys is None else None,
                   need=latents.need and [as_half(x).float() for x in latents.need])


def vector_width(lm, wire):
    """The width of what a wire, "kv" or "embeds", sends: a head's keys and values, or the LM's own."""
    config = lm.config
    if wire != "kv":
        return config.hidden_size
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def place_values(lm, wire):
    """How many values one cached place takes: keys and values of every layer, or one vector of the LM's width."""
    config, width = lm.config, vector_width(lm, wire)
    return width if wire != "kv" else 2 * config.num_hidden_layers * config.num_key_value_heads * width


def stored_bytes(lm, config, places, kind):
    """Bytes of so many cached places as latents of a wire of that WireConfig, integers with their scales; in scope
    asked with how much each head needs each and which token's it is, by which a question chooses."""
    values, width = places * place_values(lm, config.wire), vector_width(lm, config.wire)
    scales = values // group_size(width) if kind in ("int8", "int4") else 0
    heads = lm.config.num_hidden_layers * lm.config.num_key_value_heads
    need = heads * (8 if kind == "fp32" else 6) if config.scope == "asked" else 0
    return (values * FORMATS[kind] + scales * SCALE_BITS) // 8 + places * need


# ------------------------------------------------------------------------------------------------
# Documents as latents

@dataclass
class Document:
    """A text as latents: Latents of one row, how many of their places are the text before, and its title (of the
    file)."""
    latents: Latents
    before: int
    title: str


def divide(length, count, chunk):
    """[(begin, end, share), ...]: the chunks, of like length and of at most `chunk` tokens, in which a text of
    `length` tokens is read, and how many of its `count` latents come from each: never more than it has tokens."""
    pieces = max(1, -(-length // chunk))
    ends = [c * length // pieces for c in range(pieces + 1)]
    upto = [end * count // max(1, length) for end in ends]
    return [(ends[c], ends[c + 1], upto[c + 1] - upto[c]) for c in range(pieces)]


def encode(wire, text, count, each=False):
    """The Latents of a text (T,) of any length, chunk by chunk: time is linear in the text, memory that of a chunk.
    each: every head holds as many, as the caches of other programs want it."""
    from tqdm import tqdm
    parts, upto, before = [], 0, wire.layout.before
    read = [part for part in divide(len(text), count, wire.config.max_prompt_tokens) if part[2]]
    for begin, end, share in tqdm(read, "encoding", leave=False, unit="chunk", disable=None if len(read) > 1 else True):
        source = wire.source([text[begin:end]], [share]).to(wire.lm.device)
        part, gap = wire.encode(source, each).packed(), begin - upto  # between them what got no latent
        kept = [torch.where(kept < len(before), kept, kept + gap) for kept in part.kept]
        parts.append(replace(part, kept=kept, width=part.width + gap, ids=None))
        upto = end
    latents = join(wire, parts).packed() if len(parts) > 1 else parts[0]
    ids = torch.from_numpy(np.concatenate([before, text]))[None].long().to(wire.lm.device)
    return replace(latents, width=ids.shape[1], ids=ids)


def join(wire, parts):
    """One Latents of several (B = 1 each), one text behind the other: what is before them is kept of the first alone,
    and keys are turned to their new positions. Not packed: which places are whose, their widths tell."""
    if len(parts) == 1:
        return parts[0]
    H = len(wire.layout.before)
    begins, starts = ([0, *itertools.accumulate(size - H for size in sizes)] for sizes in (
        [part.width for part in parts], [part.length.item() for part in parts]))
    moved = lambda part, by: part.keys and turn(wire.lm, part.keys, torch.full_like(part.length[:, None], by))
    parts = [replace(part, kept=[kept + begin for kept in part.kept], keys=moved(part, start))
             for part, begin, start in zip(parts, begins, starts)]

    def of(name):
        """Of each part a tensor (1, heads or 1, N, ...) a layer -> those of all, the text before once."""
        found = []
        for layer in zip(*(getattr(part, name) or () for part in parts)):
            heads = max(y.shape[1] for y in layer)
            new = [y[:, :, H if number else 0:] for number, y in enumerate(layer)]
            found.append(torch.cat([y.expand(-1, heads, *y.shape[2:]) for y in new], 2))
        return found or None
    prefix = None if parts[0].keys else torch.cat([part.prefix for part in parts], 1)
    ids = [part.ids[:, H if number else 0:] for number, part in enumerate(parts) if part.ids is not None]
    return Latents(torch.full_like(parts[0].length, starts[-1] + H), of("held"), of("kept"), of("keys"), of("values"),
                   prefix, of("need"), begins[-1] + H, torch.cat(ids, 1) if ids else None)


# A document's file is safetensors:
#                keys, values     (P, d_head) of a kv wire: those of the first layer's first head, the text before in
#                                 front of the latents, then the next head's, and
#                places           (layers, heads) how many each has, P in all; in scope asked also
#                need             (P,) how much each head needs each, float16 (float32 beside fp32),
#                kept             (P,) which of the document's places each is, and
#                ids              (width,) the token at each place, by which a question finds those near; or
#                prefix           (M, d) of an embeds wire. As fp32 and fp16 the plain tensors; as int8 and int4 codes,
#                keys_scales ...  and their scales
# its metadata:  format, kind, how many places are `before` and how many the document has, latents or not (width),
#                SHA-256 of the checkpoint's weights, identity of the LM, title, SHA-256 of the rest

DOCUMENT = "latentwire 6"


def save_document(path, document, kind, saved, identity):
    """Write a Document. saved: the Checkpoint. Raises UserError where the file cannot be written."""
    latents = document.latents
    if latents.keys is None:
        tensors, parts = {}, {"prefix": latents.prefix[0]}
    else:
        held = [held[0].expand(k.shape[1:3]) for held, k in zip(latents.held, latents.keys)]
        tensors = {"places": torch.stack([h.sum(-1) for h in held]).to("cpu", torch.int32)}
        flat = lambda sides: torch.cat([y[0].expand(*there.shape, *y.shape[3:])[there]
                                        for y, there in zip(sides, held)])
        parts = {"keys": flat(latents.keys), "values": flat(latents.values)}
        if latents.need:
            tensors["need"] = flat(latents.need).to("cpu") if kind == "fp32" else as_half(flat(latents.need)).cpu()
            tensors |= {"kept": flat(latents.kept).to("cpu", torch.int32), "ids": latents.ids[0].to("cpu", torch.int32)}
    for name, x in parts.items():
        codes, scales = quantise(x.cpu(), kind)
        tensors |= {name: codes} | ({} if scales is None else {f"{name}_scales": scales})
    about = {"format": DOCUMENT, "kind": kind, "before": str(document.before), "width": str(latents.width),
             "ckpt_sha256": saved.checksum, "lm": json.dumps(identity), "title": document.title}
    about["sha256"] = _sha256_of(tensors, about)
    part = Path(f"{path}.part")
    try:
        write_tensors(part, tensors, about)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise UserError(f"--save {path}: cannot be written ({error})") from None


def is_document(path):
    """Whether a file is one of latents, of this version or another."""
    try:
        with safe_open(path, "pt") as f:
            return (f.metadata() or {}).get("format", "").startswith("latentwire")
    except (OSError, SafetensorError):
        return False


def _sha256_of(tensors, about):
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode("utf-8"))
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode("utf-8"))
        digest.update(x.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_document(path, saved=None, identity=None, device="cpu", dtype=torch.float32):
    """The Document of a file that `save_document` wrote, as dtype on a device. With saved (a Checkpoint) and identity
    (of the LM), raises UserError for a file that belongs to others, and always for one that is no such file or
    damaged."""
    try:
        with safe_open(path, "pt") as f:
            about, tensors = f.metadata() or {}, {name: f.get_tensor(name) for name in f.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"--load {path}: cannot be read ({printable(str(error))})") from None
    if about.get("format") != DOCUMENT:
        raise UserError(f"--load {path} is not a file of latents of this version; write one with --save")
    if about.pop("sha256", "") != _sha256_of(tensors, about):
        raise UserError(f"--load {path} is damaged (wrong SHA-256); write it again with --save")
    theirs, before, width = json.loads(about["lm"]), int(about["before"]), int(about["width"])
    if identity and any(theirs[key] != identity[key] for key in identity if key != "name"):
        raise UserError(f"--load {path} holds latents for {printable(theirs['name'])}, not for {identity['name']}")
    if saved and about["ckpt_sha256"] != saved.checksum:
        raise UserError(f"--load {path} was written with another checkpoint than {saved.folder or 'none'}; give the "
                        "--ckpt it was saved with")
    if saved and "places" in tensors and ("need" in tensors) != (saved.config.scope == "asked"):
        raise UserError(f"--load {path} was written with the same weights in another --scope than {saved.folder}; give "
                        "the --ckpt it was saved with")
    part = lambda name: dequantise(tensors[name], tensors.get(f"{name}_scales")).to(device, dtype)
    if "prefix" in tensors:
        prefix = part("prefix")[None]
        held = torch.ones(1, 1, before + prefix.shape[1], dtype=torch.bool, device=device)
        kept = torch.arange(held.shape[-1], device=device)[None, None]
        return Document(Latents(held.sum(-1)[0], [held], [kept], prefix=prefix, width=width), before, about["title"])
    places = tensors["places"]
    each, widths = places.flatten().tolist(), places.amax(1).tolist()
    layers = lambda flat: [side[None, :, :n] for side, n in zip(
        pad_sequence(flat.split(each), True).unflatten(0, places.shape), widths)]
    held = [torch.arange(n, device=device) < there[None, :, None].to(device) for there, n in zip(places, widths)]
    length = torch.tensor([round(sum(each) / len(each))], device=device)
    need = layers(tensors["need"].to(device)) if "need" in tensors else None
    # Else no more is known than that they are of this document: some of its places will do.
    kept = (layers(tensors["kept"].to(device, torch.long)) if "kept" in tensors else
            [torch.arange(n, device=device)[None, None] for n in widths])
    ids = tensors["ids"][None].to(device, torch.long) if "ids" in tensors else None
    latents = Latents(length, held, kept, layers(part("keys")), layers(part("values")), None, need, width, ids)
    return Document(latents, before, about["title"])


def printable(text):
    """Without control characters: neither a document nor an answer may drive the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


# ------------------------------------------------------------------------------------------------
# Checkpoints
#
# A folder:  config.json          format version, WireConfig, identity of the LM it belongs to
#            model.safetensors    `LatentWire.kept` by name; float16 in ckpt/best
#            state.json, optimizer.safetensors    where training stood (written and read by train.py)
#            manifest.json        SHA-256 of each of the files above
#
# It is written under another name, every file synced to disk, then renamed: a folder with the right name is whole. The
# one before it steps aside as NAME.old first, so that at any moment one of the two is there, and stays there as a
# reserve against damage. No file holds code.

@dataclass
class Checkpoint:
    folder: Path
    config: WireConfig
    identity: dict   # of the LM
    checksum: str    # of model.safetensors


def save_checkpoint(folder, wire, tensors=None, state=None, dtype=torch.float32):
    """Write a checkpoint folder whole or not at all. tensors: the optimizer's, by name; state: what goes into
    state.json; dtype: of the stored weights."""
    folder = Path(folder)
    part, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    shutil.rmtree(part, ignore_errors=True)
    try:
        config = {field.name: getattr(wire.config, field.name) for field in fields(WireConfig)}
        write_tensors(part / "model.safetensors", {name: p.to("cpu", dtype) for name, p in wire.kept().items()})
        about = {"format": FORMAT, "wire": config, "lm": lm_identity(wire.lm)}
        write_atomic(part / "config.json", json.dumps(about, indent=2))
        if state is not None:
            write_tensors(part / "optimizer.safetensors", tensors)
            write_atomic(part / "state.json", json.dumps(state))
        names = sorted(path.name for path in part.iterdir())
        write_atomic(part / "manifest.json", json.dumps({name: _sha256(part / name) for name in names}, indent=2))
        for path in [*part.iterdir(), part]:
            with contextlib.suppress(PermissionError):  # Windows opens no folder, and syncs no file opened to be read
                descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
                os.fsync(descriptor)
                os.close(descriptor)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"{folder} cannot be written ({error})") from None
    if folder.exists():  # else a write was cut short before, and the one aside is all there is
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(part, folder)


def _sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_checkpoint(folder):
    """Check a checkpoint folder, read its config. Raises UserError if it is missing, damaged or of another format."""
    folder = Path(folder)
    if not folder.exists() and (aside := folder.with_name(folder.name + ".old")).exists():
        folder = aside  # the writer was stopped between its two renames
    if not (folder / "manifest.json").exists():
        raise UserError(f"--ckpt {folder}: no checkpoint there; give a folder with config.json and model.safetensors, "
                        "such as runs/demo/ckpt/best")
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, checksum in manifest.items():
            if _sha256(folder / Path(name).name) != checksum:
                raise UserError(f"--ckpt {folder}: {name} is damaged (wrong SHA-256); use another checkpoint")
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if saved["format"] != FORMAT:
            reader = READS_OLDER.get(saved["format"])
            age, mend = ("newer", "update LatentWire") if saved["format"] > FORMAT else (
                "older", f"commit {reader} reads it, or train it again" if reader else "train it again")
            raise UserError(f"--ckpt {folder}: format {saved['format']} is {age} than this version's {FORMAT}; {mend}")
        return Checkpoint(folder, WireConfig(**saved["wire"]), saved["lm"], manifest["model.safetensors"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--ckpt {folder} is damaged ({type(error).__name__}: {error}); use another "
                        "checkpoint") from None


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
            raise UserError(f"--ckpt {saved.folder} was trained for {saved.identity['name']} ({key} {value}), not "
                            f"{lm.name} ({key} {mine[key]}); give --lm {saved.identity['name']}")


def load_wire(saved, lm, prompt):
    """LatentWire of a Checkpoint around lm. Raises UserError for weights that belong to another LM."""
    check_lm(saved, lm)
    wire = LatentWire(lm, saved.config, prompt)
    load_trained(wire, saved)
    return wire


def load_trained(wire, saved):
    """Copy a Checkpoint's weights into the wire. Raises UserError when names or shapes differ, or when they are no
    longer those that it was read with: a training may replace its best ones meanwhile."""
    folder = saved.folder
    try:
        if _sha256(folder / "model.safetensors") != saved.checksum:
            raise UserError(f"--ckpt {folder} was written anew meanwhile; give the command again")
        weights = load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise UserError(f"--ckpt {folder}: model.safetensors is damaged ({error}); use another checkpoint") from None
    fitted = weights.get("predictor")
    wire.predictor = None if fitted is None else torch.zeros(fitted.shape, device=wire.lm.device)
    wanted = wire.kept()
    for name in wanted.keys() | weights.keys():
        have, want = (tuple(side[name].shape) if name in side else None for side in (weights, wanted))
        if have != want:
            raise UserError(f"--ckpt {folder}: {name} has shape {have}, this wire needs {want}; its config differs")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(weights[name])
