"""
What the latents are measured against: tokens picked from the text, embeddings resampled, another context's latents.

Shapes: B rows, T context tokens, M latents, d the LM's width, V the vocabulary.
"""
import numpy as np
import torch
import torch.nn.functional as F

from common import UserError
from data import PAD, pad
from lm import embed, lora_off
from model import nearness, places


def other_contexts(items):
    """For each item the number of an item with another context, the same one for all questions of a context."""
    first = {}
    for number, item in enumerate(items):
        first.setdefault(item.example.context, number)
    if len(first) < 2:
        raise UserError("latent_shuffled needs questions of at least two contexts; raise --samples")
    numbers = list(first.values())
    after = dict(zip(first, numbers[1:] + numbers[:1]))
    return [after[item.example.context] for item in items]


def resample(embeds, mask, M):
    """Linear interpolation of each row's valid embeddings (B, T, d) to M (B,) places -> (B, max M, d)."""
    length = mask.sum(1, keepdim=True)
    m = torch.arange(int(M.max()), device=embeds.device)
    place = ((m + 0.5) / M[:, None] * length - 0.5).clamp(min=0).minimum(length - 1.0)   # (B, M)
    low = place.floor().long()
    high = (low + 1).minimum(length - 1)
    take = lambda index: embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[-1]))
    return torch.lerp(take(low), take(high), (place - low)[..., None].to(embeds.dtype))


def adapter_prefix(wire, context, counts):
    """The text's embeddings at M places, through the encoder's input projection (they are d wide, latents z) and the
    trained adapter."""
    base = resample(embed(wire.lm, context), context != PAD, counts).float()
    if wire.config.encoder == "text":
        return base
    z = wire.encoder.value(wire.encoder.final(wire.encoder.project(wire.encoder.norm(base))))
    return wire.adapter(z, base if wire.config.encoder == "pointer" else None)


@torch.no_grad()
def most_surprising(lm, prompt, contexts, counts):
    """Selective-Context (Li et al., arXiv 2310.06201), token by token: of each context (T,) the counts[b] tokens with the
    highest self-information -log p(token | what comes before it) under the plain LM, in their order."""
    before = np.concatenate([prompt.pre, prompt.head])
    ids = pad([np.concatenate([before, context]) for context in contexts], PAD).to(lm.device)
    with lora_off(lm):
        hidden = lm.model(inputs_embeds=embed(lm, ids), use_cache=False).last_hidden_state  # causal: padding on the right is unseen
        picked = []
        for states, context, count in zip(hidden, contexts, counts):
            logits = lm.get_output_embeddings()(states[len(before) - 1:][:len(context)])
            information = F.cross_entropy(logits.float(), torch.as_tensor(context, device=lm.device).long(), reduction="none")
            picked.append(context[information.topk(min(count, len(context))).indices.sort().values.cpu().numpy()])
    return picked


@torch.no_grad()
def nearest_words(lm, prompt, items, counts, rarity):
    """Of each item's context the counts[b] tokens that stand nearest to the question's words, in their order. rarity (V,): how
    much a word counts (`model.rarity`)."""
    ids, asked = (t.to(lm.device) for t in prompt.sources(items, "asked"))
    near = nearness(embed(lm, ids), ids != PAD, asked, rarity.to(lm.device)[ids.clamp(min=0)]).cpu()
    scores = [row[len(item.question):][:len(item.context)] for row, item in zip(near, items)]
    return [item.context[(places(score[None])[0] < m).numpy()] for item, score, m in zip(items, scores, counts)]
