"""
Data: where examples come from, how a prompt is put together, and in which order a run sees it.

    load_data("squad", "dev")             official SQuAD v1.1, downloaded once and checked
    load_data("path/to/file.json.gz")     SQuAD v1.1 or v2.0 layout, a list of records, or one a line (.jsonl)
    load_data("synthetic", "train")       passages made here, for machines without a download

A prompt has six pieces, tokenised apart so that every row of the evaluation shares the same token ids:

    pre | head      | context  | question           | post | anchor
        | "Context:"| " ..."   | "\\nQuestion: ...\\n"|      | "Answer:"

`pre` and `post` are what a chat template puts around the user's text (plain prompts: the tokenizer's BOS, nothing).
Shapes: see model.py.
"""
import gzip
import hashlib
import json
import os
import random
import re
import socket
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torch.hub import download_url_to_file
from torch.nn.utils.rnn import pad_sequence

from common import UserError, log


CACHE = Path(os.path.expanduser(os.environ.get("LATENTWIRE_CACHE", "~/.cache/latentwire")))  # downloads, converted LMs
SQUAD_URL = os.environ.get("LATENTWIRE_SQUAD_URL", "https://rajpurkar.github.io/SQuAD-explorer/dataset/")
SQUAD_SHA256 = {
    "train": "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955",
    "dev": "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9",
}
LATENT = -1  # stands in a row of token ids where a latent goes
PAD = -2     # stands where nothing is
SYSTEM = "You answer questions about the given context. Reply with the shortest span that answers, and nothing else."


# ------------------------------------------------------------------------------------------------
# Examples

@dataclass(frozen=True)
class Example:
    id: str
    context: str
    question: str
    answers: tuple  # of str, every annotator's
    title: str = ""  # of the article, where the file names one

    @property
    def article(self):
        """What names the article that it is of: the context itself where the file does not."""
        return self.title or self.context


def load_data(source, split="train", samples=None, seed=0):
    """The list of Examples of `source`: "squad", "synthetic" or a path (then `split` does not matter).
    With `samples`, that many are drawn without replacement in an order that depends on the seed alone; more than
    there are means all of them, with a notice. Raises UserError for anything that cannot be read."""
    if source == "synthetic":
        return synthetic(split, samples or (20_000 if split == "train" else 1_000), seed)
    examples = load_squad(source, split)
    if (samples or 0) > len(examples):
        log(f"notice: {samples} samples asked for, {source} has {len(examples)}: using all of them")
    return examples if samples is None or samples >= len(examples) else random.Random(seed).sample(examples, samples)


def load_squad(source, split="train"):
    """Read SQuAD by name ("squad") or from a file: SQuAD v1.1 or v2.0 layout, a list of records, or one record a line,
    each {"context", "question", "answers"} and, if any, "id" and "title"; .gz or not. Answers may be a string, a list
    of strings, or SQuAD's {"text": ...} in either shape. Questions without an answer (SQuAD v2.0, or "") are left out
    and counted in a notice. Raises UserError naming the file and the place in it that is wrong."""
    path = download_squad(split) if source == "squad" else Path(os.path.expanduser(source))
    found, where = [], "its start"
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rt", encoding="utf-8-sig") as f:
            text = f.read()
        for where, record in _records(text):
            found.append(_example(record, f"#{len(found) + 1}"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON (line {error.lineno}: {error.msg}); other formats become it by pandas: "
                        "to_json(NAME.jsonl, orient='records', lines=True)") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"--data {source} cannot be read ({error}); give squad, synthetic, or a .json, .json.gz or "
                        ".jsonl file") from None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}, at or behind {where}: {type(error).__name__} {error}; a question has context, "
                        "question and answers, by itself or in SQuAD's layout") from None
    examples = [example for example in found if example.answers]
    if len(found) > len(examples):
        log(f"notice: {path.name}: left out {len(found) - len(examples)} questions without an answer")
    if not examples:
        raise UserError(f"{path} holds no answerable question; give a file in SQuAD layout")
    seen = set()
    distinct = [replace(example, id=f"{example.id}#{n}") if example.id in seen or seen.add(example.id) else example
                for n, example in enumerate(examples, 1)]
    if again := len(examples) - len(seen):
        log(f"notice: {path.name}: {again} ids are there twice; their questions' numbers are put behind them")
    return distinct


def _records(text):
    """(where it stands, record) of each question; what surrounds a record in SQuAD's layout is in it. The text is one
    JSON value, or several behind each other, as in a .jsonl file."""
    space, read, roots = re.compile(r"\s*"), json.JSONDecoder().raw_decode, []
    at = space.match(text).end()
    while at < len(text):
        root, at = read(text, at)
        at = space.match(text, at).end()
        whole_file = "data" in root and "context" not in root
        roots += root if isinstance(root, list) else root["data"] if whole_file else [root]
    for n, row in enumerate(roots, 1):
        for p, paragraph in enumerate(row["paragraphs"] if "paragraphs" in row else [{**row, "qas": [{}]}], 1):
            for q, qa in enumerate(paragraph["qas"], 1):
                yield f"record {n}, paragraph {p}, question {q}", {"title": row.get("title"), **paragraph, **qa}


def _example(record, number):
    """The Example of a record, called by its number if it has no id; without answers where it has none but blanks."""
    def text(value):
        if not isinstance(value, str):
            raise TypeError(f"{json.dumps(value)[:40]} is not a string")
        return whole(value).replace("\r\n", "\n")

    def flat(answers):
        if isinstance(answers, dict):
            return flat(answers["text"])
        if isinstance(answers, list):
            return [one for answer in answers for one in flat(answer)]
        return [] if answers is None else [text(str(answers))]
    answers = [] if record.get("is_impossible") else flat(record["answers"])
    name = lambda key: "" if record.get(key) is None else text(str(record[key]))
    return Example(name("id") or number, text(record["context"]), text(record["question"]),
                   tuple(filter(str.strip, answers)), name("title"))


def join_paragraphs(examples, prompt, tokens, seed):
    """Examples whose contexts are an article's successive paragraphs, one behind the other: as many as fit into a
    number of tokens that is drawn for each text, up to `tokens`, so that there are short ones, too; a longer paragraph
    stands alone. Examples without a title stay as they are."""
    rng, found = random.Random(f"join {seed}"), []
    contexts = list(dict.fromkeys(example.context for example in examples))
    length = dict(zip(contexts, map(len, prompt.tokenize([" " + context for context in contexts]))))
    for article in grouped(examples, lambda example: example.article):
        texts, room = [], 0
        for questions in grouped(article, lambda example: example.context):
            room -= length[questions[0].context]
            if room < 0:
                texts.append([])
                room = rng.randint(1, tokens) - length[questions[0].context]
            texts[-1].append(questions)
        for parts in texts:
            text = " ".join(questions[0].context for questions in parts)
            found += [replace(example, context=text) for questions in parts for example in questions]
    return found


def whole(text):
    """Lone surrogates, which JSON can spell but UTF-8 cannot, become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def download_squad(split):
    """Path of the official file of `split`, downloaded into the cache on first use and checked by SHA-256."""
    path = CACHE / f"{split}-v1.1.json"
    if not path.exists():
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            download_url_to_file(SQUAD_URL + path.name, str(path), SQUAD_SHA256[split])
        except (OSError, RuntimeError, ValueError, HTTPException) as error:  # a wrong checksum is a RuntimeError
            raise UserError(f"cannot download SQuAD into {CACHE} ({error}); set LATENTWIRE_CACHE to a folder of yours, "
                            "give a local file with --data PATH, or use --data synthetic") from None
        finally:
            socket.setdefaulttimeout(before)
    return path


# ------------------------------------------------------------------------------------------------
# Synthetic passages: two to four people, two to three facts each. The question names a person, and every other person
# of the passage has a fact of the same kind, so a reader who sees only the kind of the question is right once in
# (number of people) times, and one who sees no passage once in (length of the list).

FIRST = {
    "train": "Anna Boris Clara David Elena Felix Greta Hassan Irene Jonas Karin Leon Maria Nils Olga Pablo Rosa Simon "
             "Tessa Victor Wanda Yusuf Zoe Adam Berta Carlos Diana Emil Frida Georg Helena Ivan Julia Kurt Laura Marco "
             "Nadia Oscar".split(),
    "dev": "Arthur Bianca Cyril Doris Edgar Flora Gustav Hilda Isaac Joanna Kamil Lydia Martin Nora Otto Petra Rafael "
           "Sonia Tobias Ursula Vera Walter Xenia Yvonne".split(),
}
LAST = {
    "train": "Adler Becker Castro Dahl Eriksen Fischer Garcia Hoffman Ibsen Jansen Keller Lindberg Moreau Novak Olsen "
             "Petrov Quinn Rossi Schmidt Tanaka Ulrich Vargas Weber Yamada Ziegler Andersen Bauer Costa Dubois Engel "
             "Ferrari Gomez".split(),
    "dev": "Archer Bianchi Coleman Dvorak Ellison Fontaine Graham Haas Ingram Jokinen Kaplan Lombard Marsh Nygaard "
           "Osborne Palmer Ramos Sanders Thorne Underwood Valdez Whitman".split(),
}
VALUES = {
    "city": "Lisbon Madrid Vienna Prague Dublin Oslo Athens Warsaw Budapest Geneva Naples Hamburg Toronto Chicago "
            "Boston Denver Seattle Montreal Kyoto Osaka Sydney Cairo Nairobi Lima Bogota Santiago Delhi Mumbai Seoul "
            "Bangkok Helsinki Rome".split(),
    "job": "painter;surgeon;teacher;lawyer;pilot;chemist;baker;poet;carpenter;butcher;farmer;violinist;journalist;"
           "goldsmith;sculptor;biologist;geologist;translator;librarian;photographer;dentist;sailor;tailor;"
           "historian".split(";"),
    "prize": "Nobel Prize;Booker Prize;Fields Medal;Turing Award;Pulitzer Prize;Abel Prize;Wolf Prize;Balzan Prize;"
             "Crafoord Prize;Kyoto Prize;Holberg Prize;Shaw Prize;Lasker Award;Pritzker Prize".split(";"),
    "year": [str(year) for year in range(1901, 1990)],
    "sport": "tennis;chess;rowing;fencing;cycling;skiing;golf;boxing;sailing;swimming;archery;rugby;hockey;"
             "badminton".split(";"),
    "language": "Spanish Greek Polish Arabic Hindi Korean Finnish Dutch Turkish Swahili Hungarian Czech Russian "
                "Welsh".split(),
}
FACTS = {  # kind of fact: (list of values, phrasings of the fact, phrasings of the question)
    "birthplace": ("city", ["{n} was born in {v}.", "The birthplace of {n} is {v}.", "{n} came into the world in {v}."],
                   ["Where was {n} born?", "In which city was {n} born?"]),
    "birth year": ("year", ["{n} was born in the year {v}.", "The year of birth of {n} is {v}."],
                   ["In what year was {n} born?", "When was {n} born?"]),
    "home": ("city", ["{n} now lives in {v}.", "The home of {n} is in {v}.", "{n} moved to {v} and stayed there."],
             ["Where does {n} live now?", "In which city does {n} live?"]),
    "job": ("job", ["{n} works as a {v}.", "{n} is a {v} by profession.", "{n} earns a living as a {v}."],
            ["What does {n} do for a living?", "What is the profession of {n}?"]),
    "prize": ("prize", ["{n} won the {v}.", "The {v} was given to {n}.", "{n} was honoured with the {v}."],
              ["Which prize did {n} win?", "What award was given to {n}?"]),
    "sport": ("sport", ["{n} is fond of {v}.", "In the evenings {n} practises {v}.",
                        "The favourite sport of {n} is {v}."],
              ["What is the favourite sport of {n}?", "Which sport does {n} practise?"]),
    "language": ("language", ["{n} speaks {v} at home.", "The mother tongue of {n} is {v}.",
                              "{n} grew up speaking {v}."],
                 ["What is the mother tongue of {n}?", "Which language does {n} speak at home?"]),
}


def synthetic(split, samples, seed=0):
    """`samples` deterministic Examples, about five to a passage. Names of people are disjoint between "train" and
    "dev"; the other lists are shared. Same (split, samples, seed): same bytes."""
    rng = random.Random(f"latentwire synthetic {split} {seed}")  # seeding by string is stable across Python versions
    examples = []
    for passage in range(samples):
        people = [f"{first} {last}" for first, last in
                  zip(rng.sample(FIRST[split], rng.randint(2, 4)), rng.sample(LAST[split], 4))]
        kinds = rng.sample(sorted(FACTS), rng.randint(2, 3))
        sentences, asked, taken = [], [], set()  # no value twice in a passage: a right answer names one person's fact
        for kind in kinds:
            values, phrasings, questions = FACTS[kind]
            chosen = rng.sample([value for value in VALUES[values] if value not in taken], len(people))
            taken.update(chosen)
            for name, value in zip(people, chosen):
                sentences.append(rng.choice(phrasings).format(n=name, v=value))
                asked.append((rng.choice(questions).format(n=name), value))
        rng.shuffle(sentences)
        context = " ".join(sentences)
        for number, (question, value) in enumerate(rng.sample(asked, min(5, len(asked)))):
            examples.append(Example(f"synthetic-{split}-{seed}-{passage}-{number}", context, question, (value,)))
            if len(examples) == samples:
                return examples


def synthetic_chance(examples):
    """How often (0..1, exact match) a reader is right who picks one of the passage's facts of the right kind."""
    def people(context):
        return sum(bool(re.search(rf"\b{first} [A-Z]", context)) for names in FIRST.values() for first in names)
    return float(np.mean([1 / people(example.context) for example in examples]))


# ------------------------------------------------------------------------------------------------
# Prompts

@dataclass(frozen=True)
class Item:
    """A tokenised example. Arrays are int32; `context` is one array for all questions of a paragraph."""
    example: Example
    context: np.ndarray
    question: np.ndarray
    answer: np.ndarray  # of the first gold answer, the end token last


@dataclass(frozen=True)
class Layout:
    """How a scope divides a prompt: `before` (token ids) and after(item) stay text, latents replace source(item).
    Where the question chooses among the latents: asks(item), what the reader reads behind a source that has the
    question in it to choose at once; or late, each question chooses later."""
    before: np.ndarray
    source: Callable
    after: Callable
    asks: Callable | None = None
    late: bool = False


class Prompt:
    """Tokenises examples. style "plain", or "chat" for the tokenizer's chat template with a short-answer system prompt.
    Contexts are cut from the right where the prompt would be longer than `max_prompt_tokens`."""

    def __init__(self, tokenizer, style="plain", max_prompt_tokens=1024):
        self.tokenizer, self.style, self.max_prompt_tokens = tokenizer, style, max_prompt_tokens
        if style == "plain":
            first = tokenizer("").input_ids
            if first and first[-1] == tokenizer.eos_token_id and first != [tokenizer.bos_token_id]:
                first = first[:-1]  # add_eos_token: the text goes on here
            self.pre, self.post = np.array(first, np.int32), np.array([], np.int32)
        else:
            if not getattr(tokenizer, "chat_template", None):
                raise UserError("--prompt chat: this language model's tokenizer has no chat template; use --prompt "
                                "plain")
            self.pre, self.post = (np.array(tokenizer(part, add_special_tokens=False).input_ids, np.int32)
                                   for part in self._around_user())
        self.mark, self.skip = "", 0
        self.head, = self.tokenize(["Context:"])
        # SentencePiece puts a space in front of a text: " Rome" would be two pieces, and one where it goes on a text.
        start, alone, behind = (tokenizer(text, add_special_tokens=False).input_ids for text in ("\n", "a", "\na"))
        if behind[:len(start)] == start and behind[len(start):] != alone:
            self.mark, self.skip = "\n", len(start)
        self.anchor, self.repeat, *around = self.tokenize(["Answer:", "\nRepeat:", "\nQuestion:", "\n"])
        self.around = np.concatenate([*around, self.post, self.anchor])  # every question
        self.end = tokenizer.eos_token_id
        self.cut = self.answers_cut = 0  # questions whose context was cut; those of them that lost every gold answer

    def _around_user(self):
        """What a chat template puts before and behind the user's text."""
        user = "\u241fuser\u241f"  # marks where that goes in the rendered template
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
        # Not today's date: a wire must read tomorrow what it was trained on. And no thoughts before the answer.
        try:
            template = self.tokenizer.get_chat_template()
            rendered = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, date_string="01 Jan 2025", enable_thinking=False,
                chat_template="{%- macro strftime_now(format) -%}01 Jan 2025{%- endmacro -%}" + template)
            before, after = rendered.split(user)
        except Exception as error:  # whatever its template raises
            raise UserError("--prompt chat: this tokenizer's template does not take a system and a user message "
                            f"({error}); use --prompt plain") from None
        if after.rfind("<think>") > after.rfind("</think>"):
            after = f"{after.rstrip()}\n\n</think>\n\n"
        return before, after

    def tokenize(self, texts):
        """Token ids of users' texts. A special token typed in one stays plain text: it cannot end the prompt."""
        found = []
        for start in range(0, len(texts), 5000):  # its own form of them takes a hundred bytes a token
            ids = self.tokenizer([self.mark + text for text in texts[start:start + 5000]], add_special_tokens=False,
                                 split_special_tokens=True, return_attention_mask=False).input_ids
            found += [np.array(row[self.skip:], np.int32) for row in ids]
        return found

    def pieces(self, ids):
        """The text that each of some token ids (n,) adds to those before it, "" where a character is not yet whole."""
        found, begin, last, said = [], 0, 0, ""
        for n in range(1, len(ids) + 1):
            text = self.tokenizer.decode(ids[begin:n])
            whole_one = n == len(ids) or not text.endswith("\ufffd")
            found.append(text[len(said):] if whole_one else "")
            if whole_one:
                if n - begin >= 32:  # from the last whole character on: a long text must not be decoded over and over
                    begin, text = last, self.tokenizer.decode(ids[last:n])
                last, said = n, text
        return found

    def items(self, examples):
        """Tokenise examples; a context shared by many questions is tokenised once and kept once."""
        texts = list(dict.fromkeys(example.context for example in examples))
        contexts = dict(zip(texts, self.tokenize([" " + text for text in texts])))
        questions = self.tokenize([f"\nQuestion: {example.question.strip()}\n" for example in examples])
        answers = self.tokenize([" " + example.answers[0].strip() for example in examples])
        items = []
        for example, question, answer in zip(examples, questions, answers):
            answer, context = np.append(answer, np.int32(self.end)), contexts[example.context]
            room = self.max_prompt_tokens - len(self.pre) - len(self.head) - len(question) - len(self.post)
            if room < 1:
                raise UserError(f"--max_prompt_tokens {self.max_prompt_tokens} leaves no room for a context; raise it")
            if len(context) > room:
                context = context[:room]
                self.cut += 1
                kept = self.tokenizer.decode(context)
                self.answers_cut += not any(gold in kept for gold in example.answers)
            items.append(Item(example, context, question, answer))
        return items

    def text(self, item):
        """The whole prompt as token ids, without the anchor."""
        return np.concatenate([self.pre, self.head, item.context, item.question, self.post])

    def after(self, item):
        """What the LM reads behind the context: the question and the anchor."""
        return np.concatenate([item.question, self.post, self.anchor])

    def layout(self, scope):
        """The Layout of a scope."""
        before, end = np.concatenate([self.pre, self.head]), np.concatenate([self.post, self.anchor])
        if scope == "prompt":
            source = lambda item: np.concatenate([item.question, item.context])
            return Layout(before, source, lambda item: end, self.after)
        return Layout(before, lambda item: item.context, self.after, late=scope == "asked")

    def report_cuts(self, what):
        """Say how many contexts were cut, if any were."""
        if self.cut:
            log(f"notice: {what}: {self.cut} questions' contexts cut to --max_prompt_tokens {self.max_prompt_tokens}, "
                f"{self.answers_cut} of them lost their answer")


# ------------------------------------------------------------------------------------------------
# Batches


def pad(arrays, value, left=False):
    """Stack 1-D integer arrays of unequal length into (B, longest), `value` filling the right (or left) side."""
    return pad_sequence([torch.as_tensor(array).long() for array in arrays], True, value, "left" if left else "right")


class Tensors:
    """What a dataclass of tensors can do."""

    def map(self, of):
        """The same with `of` done to every tensor in it, also in lists."""
        def each(x):
            if isinstance(x, list):
                return [each(y) for y in x]
            return x.map(of) if isinstance(x, Tensors) else of(x) if torch.is_tensor(x) else x
        return type(self)(*map(each, vars(self).values()))

    def to(self, device):
        return self.map(lambda x: x.to(device))


@dataclass
class Source(Tensors):
    """What one encoder pass reads, a document a row."""
    ids: object       # (B, W) token ids: before, text; PAD right
    again: object     # (B, R) token ids of what is read behind it unless that is predicted: the text again; PAD right
    length: object    # (B,) how many places each document has in the cache: before, latents
    most: int         # and the most of them
    asks: object = None  # (B, S) token ids that choose the latents, where a question does at once; PAD right


@dataclass
class Batch(Tensors):
    """What one forward pass reads. A row is a shared prefix (latents, text or both) and segments behind it."""
    ids: object       # (B, S) token ids the LM reads, LATENT and PAD where they apply
    position: object  # (B, S) position ids; they restart after the prefix for every segment
    segment: object   # (B, S) 0 the prefix, 1.. the segments, -1 padding
    row: object       # (A,) for each answer token: the row and column of the position that predicts it,
    col: object       # (A,)
    label: object     # (A,) the token itself,
    owner: object     # (A,) which of the batch's questions it belongs to
    step: object      # (A,) and its index within that answer
    first: object     # (Q,) which of the answer tokens are a question's first
    size: int         # Q, the questions
    source: object = None  # Source, where an encoder reads
    document: object = None  # (B,) in scope asked: of which of the source's documents a row sees latents,
    asks: object = None    # (B, R) token ids that choose them, PAD right,
    sees: int = 0          # and how many,
    least: int = 0         # and how long the shortest of those documents is


def pack(rows, starts=None):
    """Lay out a Batch. rows: [(prefix ids, questions: a list of (ids, answer ids)), ...]; starts: the position of each
    row's first token, past the latents in its cache (default 0)."""
    ids, position, segment, targets, firsts = [], [], [], [], []
    for r, (prefix, questions) in enumerate(rows):
        start, at = starts[r] if starts else 0, len(prefix)
        parts, places, segments = [prefix], [start + np.arange(at)], [np.zeros(at, int)]
        for s, (text, answer) in enumerate(questions, 1):
            part = np.concatenate([text, answer[:-1]])  # the last token is predicted, never read
            parts.append(part)
            places.append(start + len(prefix) + np.arange(len(part)))
            segments.append(np.full(len(part), s))
            first = at + len(text) - 1  # the position that predicts the answer's first token
            targets += [(r, first + k, token, len(firsts), k) for k, token in enumerate(answer)]
            firsts.append(len(targets) - len(answer))
            at += len(part)
        ids.append(np.concatenate(parts))
        position.append(np.concatenate(places))
        segment.append(np.concatenate(segments))
    return Batch(pad(ids, PAD), pad(position, 0), pad(segment, -1),
                 *torch.tensor(targets, dtype=torch.long).view(-1, 5).T.contiguous(),
                 torch.tensor(firsts, dtype=torch.long), len(firsts))


def lay_source(before, texts, counts, repeat, asks=None):
    """The Source of texts (each (T,) token ids), counts[b] <= T latents each. Behind each text stands the text once
    more, behind the cue `repeat`; asks[b] (token ids), where given, choose its latents."""
    with_front = lambda front: pad([np.concatenate([front, text]) for text in texts], PAD)
    return Source(with_front(before), with_front(repeat), len(before) + torch.tensor(counts), len(before) + max(counts),
                  pad(asks, PAD) if asks else None)


def epoch_plan(groups, lengths, batch, micro, seed, epoch, per_row=1):
    """One epoch's order, a function of the arguments alone: a list of steps, each a list of micro-batches, each a list
    of rows, each a list of item numbers.
    groups: item numbers that may share a row (the questions of one paragraph); lengths: an item's length, for
    bucketing. A micro-batch holds at most `micro` questions, a step batch/micro micro-batches of like length; what
    does not fill a step is left out of the epoch, by chance, so that no length is left out of all of them."""
    rng = random.Random(f"{seed} {epoch}")
    rows = []
    for group in groups:
        group = rng.sample(group, len(group))
        rows += [group[i:i + per_row] for i in range(0, len(group), per_row)]
    rng.shuffle(rows)
    pool = 1 + 32 * batch // per_row  # rows; sorting a pool, not the epoch, keeps the order random enough
    rows = [row for i in range(0, len(rows), pool) for row in sorted(rows[i:i + pool], key=lambda row: lengths[row[0]])]
    micros, count = [], micro
    for row in rows:
        if count + len(row) > micro:
            micros.append([])
            count = 0
        micros[-1].append(row)
        count += len(row)
    if count * 2 < micro:
        micros.pop()
    per_step = max(1, batch // micro)
    for _ in range(len(micros) % per_step):
        micros.pop(rng.randrange(len(micros)))
    steps = [micros[i:i + per_step] for i in range(0, len(micros), per_step)]
    if not steps:
        raise UserError(f"{sum(map(len, groups))} examples do not fill one batch of {batch}; lower --batch or give "
                        "more")
    rng.shuffle(steps)
    return steps


def checksum(items):
    """Of Items' ids, contexts, questions, answers and titles, in order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(item.example).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def grouped(things, key):
    """[the things that have one key, those that have the next, ...], in order of appearance."""
    groups = {}
    for thing in things:
        groups.setdefault(key(thing), []).append(thing)
    return list(groups.values())


def by_article(examples):
    """The Examples of each article, or of each context where none is named or one for all."""
    articles = grouped(examples, lambda example: example.article)
    return articles if len(articles) > 1 else grouped(examples, lambda example: example.context)


def group_by_context(items):
    """Item numbers of each paragraph, in order of appearance: [[0, 1, 2], [3], ...]."""
    return grouped(range(len(items)), lambda number: items[number].example.context)
