"""
The loss mix. Every part but the entropy is a mean over the questions of a micro-batch, so that micro-batches of
different sizes combine by their number of questions alone.

    tf       teacher-forced cross-entropy of the whole answer, averaged over its tokens
    kce      the same over the first K tokens
    first    cross-entropy of the first token
    kd       KL(teacher || student) over the first K tokens, at temperature t, times t^2 (arXiv 1503.02531)
    entropy  -H(p), p = mean over the micro-batch of the first-token distributions

The entropy is that of the batch mean, not the mean of the entropies: it is high when different questions get
different first tokens, each of them as certain as it likes, and 0 when all collapse to one token. A batch of one
question has nothing to compare and would only be blurred: it gets none.

Shapes: A answer tokens of Q questions; V the vocabulary.
"""
import torch.nn.functional as F

PARTS = ("tf", "first", "kce", "kd", "entropy")  # each has a weight: a flag of train.py


def per_question_mean(values, owner, size):
    """Mean over questions of the mean over each one's tokens. values (A,), owner (A,) in 0..size-1 -> scalar.
    A question without a token counts as 0."""
    return values.new_zeros(size).scatter_reduce(0, owner, values, "mean", include_self=False).mean()


def wire_loss(logits, batch, weights, K=4, temperature=1.0, teacher=None):
    """The weighted sum of the parts and a dict of each part whose weight is not 0, as tensors.
    logits (A, V): row i predicts batch.label[i]. weights: {"tf": 1.0, "first": 0.5, ...}. teacher: logits (A', V) of
    the teacher for the tokens with batch.step < K, in the same order; needed when weights has kd."""
    weights = {name: weight for name, weight in weights.items() if weight}
    parts, size = {}, batch.size
    logits, owner, early = logits.float(), batch.owner, batch.step < K
    ce = F.cross_entropy(logits, batch.label, reduction="none")  # (A,)
    if "tf" in weights:
        parts["tf"] = per_question_mean(ce, owner, size)
    if "kce" in weights:
        parts["kce"] = per_question_mean(ce[early], owner[early], size)
    if "first" in weights:
        parts["first"] = ce[batch.first].mean()
    if "kd" in weights:
        student = F.log_softmax(logits[early] / temperature, dim=-1)
        target = F.log_softmax(teacher.float() / temperature, dim=-1)
        kl = F.kl_div(student, target, reduction="none", log_target=True).sum(-1)  # (A',)
        parts["kd"] = per_question_mean(kl, owner[early], size) * temperature ** 2
    if "entropy" in weights and size > 1:
        p = logits[batch.first].softmax(-1).mean(0)  # (V,)
        parts["entropy"] = (p * p.clamp(min=1e-30).log()).sum()  # xlogy has no gradient at 0
    return sum(weights[name] * part for name, part in parts.items()), parts
