"""
Look at a run: write RUN/README.md, the run in one page, and RUN/report.html, with curves and its predictions.

    python report.py runs/squad                              # also while it is still training
    python report.py runs/squad runs/demo                    # a table, and runs/squad/comparison.html
    python report.py runs/squad --preserve preserved_data    # a copy to keep: logs, scores, answers, checkpoint

The curves need matplotlib (pip install matplotlib); without it the page keeps its tables. Reads config.json, logs/ and
eval/ of a run, each file of them if it is there, also of older versions and of the specification's preserved run.
"""
import hashlib
import html
import io
import json
import re
import shutil
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

from common import Parser, UserError, check_own, find_row, log, read_json, read_lines, run_main, write_atomic


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("runs", nargs="+", help="folder of a run, e.g. runs/demo; several are compared")
    p.add_argument("--preserve", metavar="FOLDER", help="keep a copy as FOLDER/DATE_name, listed in FOLDER/README.md")
    p.add_argument("--name", help="of the preserved copy (default: the run's)")
    p.add_argument("--scores", action="store_true", help="preserve no checkpoint, only what was measured")
    return p.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()  # before the heavy imports, so that --help and typing errors answer at once

import numpy as np

from losses import PARTS
from model import how_many
from rows import ROWS, exact_match, f1_score, interval, own_row, split_row
from store import FORMAT, READS_OLDER

LOSSES = (*(part for part in PARTS if part != "entropy"), "more", "find", "entropy")  # more, find: of older runs
COLUMNS = ["Run", "Row", "Questions trained on", "n", "F1", "F1 - first row", "EM", "NLL/token", "First token",
           "Tokens read", "Commit"]  # of a comparison
KEEP_PREDICTIONS, KEEP_BYTES = 200, 25 * 2**20  # of a preserved copy: answers with their prompts; checkpoint


# ------------------------------------------------------------------------------------------------
# A run and what its figures say

class Run:
    """A run's files, read once. Raises UserError where there is neither an evaluation nor a logged step."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{folder}: no such folder; give a run, such as runs/demo")
        self.name = self.folder.resolve().name
        self.config = read_json(self.folder / "config.json")
        self.metrics = read_json(self.folder / "eval" / "metrics.json")
        self.steps = read_lines(self.folder / "logs" / "train_diagnostics.jsonl")
        self.predictions = read_lines(self.folder / "eval" / "predictions.jsonl")
        history = read_lines(self.folder / "eval" / "metrics_history.jsonl")
        self.dev = [record for record in history if record.get("kind") == "train" and "f1" in record]
        self.format = read_json(self.folder / "ckpt" / "config.json").get("format")  # of a preserved checkpoint
        if not self.metrics and not self.steps:
            raise UserError(f"{folder} has no eval/metrics.json, and no step yet in logs/train_diagnostics.jsonl; "
                            "train it first")
        for record in self.steps:  # the LM may have been trained and evaluated under two names
            record["model"], = record["models"].values()
        self.lm = next(iter(self.metrics.get("avg_prompt_tokens", {}) or self.steps[-1]["models"]))
        self.own = self.metrics.get("own_row") or own_row(SimpleNamespace(**{"wire": "kv", **self.config}))
        # {row: (scores, wall clock in s)}: rows in the order of ROWS, then latents at other budgets
        at = sorted((key for key in self.metrics if "@" in key), key=lambda key: key.split("@")[1].zfill(4))
        found = {row: find_row(self.metrics, row, self.lm) for row in [*ROWS, *at]}
        self.rows = {row: value for row, value in found.items() if value}
        # Where training ended: its evaluation there may come after the last step that was logged.
        self.end = max([*self.steps, *self.dev], key=lambda record: record["global_step"], default={})

    def last(self, key):
        """A value of the last diagnostics record: of the model, or of the step; None where it has none."""
        return self.steps[-1]["model"].get(key, self.steps[-1].get(key)) if self.steps else None

    def scores(self, row):
        """(scores, wall clock in s) of a row. Raises UserError where it was not evaluated."""
        if row not in self.rows:
            raise UserError(f"{self.folder} has no row {row}; it has {', '.join(self.rows)}")
        return self.rows[row]


def percent(value, ci=None):
    return f"{100 * value:.1f}%" + (f" [{100 * ci[0]:.1f}, {100 * ci[1]:.1f}]" if ci else "")


def spread(values):
    """Shares (n,) in percent: their mean and its 95% interval."""
    return percent(np.mean(values), interval(values))


def both_answered(run, row, other, other_row):
    """F1 in percent of a row and of another one, question by question, of the questions that both answered: (n, 2)."""
    f1 = lambda run, row: {(record["id"], *record["golds"]): 100 * f1_score(record[row], record["golds"])
                           for record in run.predictions if row in record}
    mine, theirs = f1(run, row), f1(other, other_row)
    return np.array([(mine[key], theirs[key]) for key in mine if key in theirs]).reshape(-1, 2)


def difference(mine, theirs):
    """The mean difference of two rows of (n,) scores in points, with its 95% interval."""
    low, high = interval(mine - theirs)
    return f"{np.mean(mine - theirs):+.1f} [{low:.1f}, {high:.1f}]"


def paired(run, row, first, first_row):
    """The paired difference of F1 to the first row over the questions whose answers of both are there, and how many
    those are where that is not all; "-" where there are none."""
    scores = both_answered(run, row, first, first_row)
    if (run, row) == (first, first_row) or not len(scores):
        return "-"
    return difference(*scores.T) + (f", n = {len(scores)}" if len(scores) < run.metrics["samples"] else "")


def score_table(run):
    """(head, rows) of a table: the scores of every row, the one that the wire is trained for in bold."""
    head = ["Mode", "F1", "EM", "vs text", "NLL/token", "First token", "Tokens read", "Seconds"]
    return head, [[*map(cells(run, row).get, head)] for row in run.rows]


def short(name):
    """A preserved run's name without its date, LM and data."""
    return re.sub(r"^[\d-]+_(smollm2_squad_)?", "", name)


def cells(run, row, first=None):
    """{column: text} of one row of a run; first: the (run, row) that it is compared with."""
    (s, wall), about, text = run.scores(row), ROWS[split_row(row)[0]], run.rows.get("text")
    at, number = row.partition("@")[2], lambda key, form: form.format(s[key]) if key in s else "-"
    best = max(run.dev, key=lambda record: record["f1"], default=run.end)  # what ckpt/best had seen
    start = [part for part in Path(run.config.get("start", "")).parts if part not in ("ckpt", "best", "last")]
    after = f" after {short(start[-1])}'s" if start else ""
    name = about.heading.strip("*") + (f", M = {at}" if at.isdigit() else f", {at}" if at else "")
    return {
        "Mode": f"**{name}**" if row == run.own else name,
        "vs text": "Reference" if row == "text" else f"{100 * (s['f1'] - text[0]['f1']):+.1f}%" if text else "-",
        "Seconds": "-" if wall is None else f"{wall:.1f}",
        "Run": short(run.name) if about.lora else "-", "Row": row,
        "Reads": about.heading + (f" ({at})" if at else ""),
        "Questions trained on": f"{best.get('samples_seen', 0):,}{after}" if about.lora and best else "-",
        "n": f"{run.metrics['samples']:,}", "F1": percent(s["f1"], s.get("f1_ci95")),
        "F1 - first row": paired(run, row, *first) if first else "-", "EM": percent(s["em"], s.get("em_ci95")),
        "NLL/token": number("nll_token", "{:.2f}"), "First token": number("first_token_top1", "{:.1%}"),
        "Tokens read": number("tokens_read", "{:.0f}"), "Commit": (run.metrics.get("git_commit") or "-")[:7]}


def comparison(runs):
    """(head, rows) of a table: the row that each run was trained for, then its others, beside the first run's own."""
    pairs = [(run, run.own) for run in runs if run.own in run.rows]
    pairs += [(run, row) for run in runs for row in run.rows if row != run.own]
    found = [cells(run, row, pairs[0]) for run, row in pairs]
    return COLUMNS, list(dict.fromkeys(tuple(row[column] for column in COLUMNS) for row in found))


# ------------------------------------------------------------------------------------------------
# The run as Markdown

def markdown_table(head, rows):
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]


def eval_command(run, rows, ckpt):
    """The command line that answers rows as a run's evaluation did, with the checkpoint at ckpt."""
    m, config = run.metrics, SimpleNamespace(**{"wire": "", "latents": "32", "ratio": 0, "scope": "",
                                                  "max_prompt_tokens": 1024, **run.config})
    given = m["fingerprint"] | {"seed": m["seed"]}
    M, ratio = how_many(config)
    usual = {"split": "dev", "latents": M, "prompt": config.prompt, "max_prompt_tokens": config.max_prompt_tokens,
             "max_new_tokens": 24, "seed": 0, "ratio": ratio}
    fixed = ratio and given["ratio"] is None  # --latents in place of the wire's --ratio
    changed = [f" --{name} {given[name]}" for name, value in usual.items()
               if given.get(name) not in (value, None) or fixed and name == "latents"]
    if config.wire == "kv" and not given.get("predicted"):
        changed.append(" --read_again")
    if (given.get("device"), given.get("dtype")) == ("cpu", "torch.bfloat16"):
        changed.append(" --dtype bfloat16")
    return (f"python eval.py --mode {','.join(rows)} --ckpt {ckpt} --data {Path(m['dataset']).name} "
            f"--samples {m['samples']}" + "".join(changed))


def configuration(run):
    """What was trained and evaluated; of a preserved checkpoint, how to evaluate it again."""
    c, m = run.config, run.metrics
    listed = lambda keys: ", ".join(f"{key} {c[key]}" for key in keys if c.get(key))
    out = [f"- **Model**: {c.get('lm') or run.lm}, frozen"]
    if c:
        wire = list(c)[:list(c).index("data")]  # a wire's own settings stand in front of all others
        idle = {"lm", "prompt", "max_prompt_tokens", "encoder_rank" if c.get("wire") == "tokens" else "keep"}
        out += [f"- **Dataset**: {Path(c['data']).name}, {c['samples']:,} samples at most",
                f"- **Wire**: {listed(key for key in wire if key not in idle)}",
                f"- **Training**: {listed(('batch', 'lr', 'dtype', 'start'))}, loss weights {listed(LOSSES)}"]
    if run.end:
        seen = run.end.get("samples_seen")
        out.append(f"- **Length**: {run.end['global_step']:,} steps" + (f", {seen:,} questions seen" if seen else ""))
    if m:
        out.append(f"- **Evaluation**: {m['samples']} questions of {Path(m['dataset']).name}, prompts of "
                   f"{m['avg_prompt_tokens'][run.lm]:.0f} tokens on average, {m['device']}")
    if run.format and m:
        ckpt = f"{run.folder.resolve().parent.name}/{run.name}/ckpt"
        older = f", after `git checkout {READS_OLDER.get(run.format)}`: this version does not read format {run.format}"
        rows = [run.own] if run.own in run.rows else run.rows  # the same at several M
        out.append(f"- **Again**: `{eval_command(run, rows, ckpt)}`" + (older if run.format < FORMAT else ""))
    return out


def own_lines(run):
    """What the evaluation says of the row that the wire is trained for."""
    if run.own not in run.rows:
        return []
    m, (s, wall) = run.metrics, run.rows[run.own]
    out = [f"- **First-token accuracy**: {percent(s['first_token_top1'])}, top-5 {percent(s['first_token_top5'])}"]
    if "carried" in m:
        low, high = m["carried_ci95"]
        out.append("- **Carried by the wire** (latents minus latents of another context): "
                   f"{100 * m['carried']:+.1f} F1 [{100 * low:.1f}, {100 * high:.1f}]")
    for what, kept in m.get("retention", {}).items():
        low, high = kept["ci95"]
        out.append(f"- **Retention**: {kept['ratio']:.2f} [{low:.2f}, {high:.2f}] of {what} ({percent(kept['f1'])})")
    if run.own == "latent":
        out.append(f"- **Compression**: {m['compression'][run.lm]:.1f}x, {m['latent_len']} latents"
                   + (" that a question sees" if run.config.get("scope") == "asked" else ""))
        sizes = m["wire"].get("text_bytes", {}) | m["wire"]["latent_bytes"]
        sizes = ", ".join(f"{what} {size / m['samples']:,.0f}" for what, size in sizes.items())
        out.append(f"- **Bytes a context**, as text and as latents: {sizes}")
    if run.own == "latent" and (text := run.rows.get("text", (None, None))[1]):
        out.append(f"- **Time**, text / latents: {text / wall:.1f}x with the encoder")
    words = Counter((record[run.own].split() or [""])[0] for record in run.predictions if run.own in record)
    words = words or Counter(run.last("prediction_histogram"))
    for word, count in words.most_common(1):
        out.append(f"- **First words**: {len(words)} in {words.total()} answers; {count / words.total():.0%} of them "
                   f"begin {word!r}")
    return out


def diagnostics(run):
    """The last step's values, and the memory in use."""
    keys = ("grad_norm", "first_acc", "first_acc_top5", *LOSSES[:-1], "entropy_loss", "prediction_diversity",
            "skipped_steps")
    values = ", ".join(f"{key} {run.last(key):.4g}" for key in keys if run.last(key) is not None)
    words = Counter(run.last("prediction_histogram")).most_common(5)
    memory = [f"- GPU {gpu['id']}: {gpu['allocated_gb']} GB allocated ({gpu['utilization_pct']}% utilization)"
              for gpu in (run.last("gpu_memory") or {}).get("gpus", [])]
    memory += [f"- Host memory, peak: {gb} GB" for gb in (run.last("host_memory") or {}).values()]
    return [f"- **Step {run.steps[-1]['global_step']}**: {values}", "- **First tokens**: " + ", ".join(
        f"{word!r} {count}" for word, count in words), *memory] if run.steps else []


def markdown(run, level=1):
    """The run as one Markdown page; level: of its title's heading."""
    parts = [(1, "Configuration", configuration(run)),
             (1, "Key Results", markdown_table(*score_table(run)) if run.rows else ["Not evaluated yet."]),
             (2, "Latent compression" if run.own == "latent" else f"The row `{run.own}`", own_lines(run)),
             (1, "Final training diagnostics", diagnostics(run))]
    sections = [[f"{'#' * (level + depth)} {title}", "", *lines, ""] for depth, title, lines in parts if lines]
    return "\n".join([f"{'#' * level} Experiment: {run.name}", "", *sum(sections, [])])


# ------------------------------------------------------------------------------------------------
# A copy to keep

def preserve(run, folder, name, scores=False):
    """Copy the run's small files and, but for `scores`, its best checkpoint to folder/DATE_name: what a fresh clone
    needs to evaluate it again, without paths of this machine. Returns the new folder. Raises UserError where the
    evaluation is not of that checkpoint, or where it is too large."""
    best = run.folder / "ckpt" / "best"
    manifest = read_json(best / "manifest.json")
    if not manifest or run.metrics.get("ckpt_sha256") != manifest["model.safetensors"]:
        raise UserError(f"{run.folder}/eval is not of {best}; run python eval.py --mode all --ckpt {best} --data ...")
    if (size := (best / "model.safetensors").stat().st_size) > KEEP_BYTES and not scores:
        raise UserError(f"{best} is {size / 2**20:.0f} MB, too large to keep in a repository (at most "
                        f"{KEEP_BYTES >> 20} MB); train with a lower --encoder_rank or --lora_rank")
    kept = Path(folder) / f"{datetime.now(timezone.utc):%Y-%m-%d}_{name}"
    if kept.exists():
        raise UserError(f"{kept} is there already; give another --name or remove it")
    part = kept.with_name(kept.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    logs, measured = (run.folder / "logs").glob("*"), (run.folder / "eval").glob("metrics*")
    for source in [run.folder / "config.json", *logs, *measured]:
        write_atomic(part / source.relative_to(run.folder), without_paths(source.read_text(encoding="utf-8")))
    if not scores:
        shutil.copytree(best, part / "ckpt")
        about = without_paths((best / "config.json").read_text(encoding="utf-8"))  # names the LM's folder
        write_atomic(part / "ckpt" / "config.json", about)
        manifest["config.json"] = hashlib.sha256(about.encode()).hexdigest()
        write_atomic(part / "ckpt" / "manifest.json", json.dumps(manifest, indent=2))
    for record in run.predictions[KEEP_PREDICTIONS:]:
        del record["prompt"]  # most of its bytes
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in run.predictions]
    write_atomic(part / "eval" / "predictions.jsonl", "".join(lines))
    part.rename(kept)
    return kept


def without_paths(text):
    """Paths of the machine that it ran on become file names, those of checkpoints RUN/ckpt/best."""
    return re.sub(r'(?<=["\s,=])(?:/|\.\.?/)(?:[^"\s,:]*/)?(?!(?:ckpt|best|last)\b)(?=\w)', "", text)


def index(folder):
    """README.md of a folder of preserved runs: their pages."""
    runs = [Run(path) for path in sorted(folder.iterdir()) if (path / "eval" / "metrics.json").exists()]
    return "\n---\n\n".join([f"""# Preserved Experimental Data

Results of LatentWire runs, kept so that anyone can evaluate and inspect them: scores and answers in `eval/`, `logs/`,
and of some the checkpoint in `ckpt/`. Written by `python report.py RUN --preserve {folder.name}`. Questions and texts
are from SQuAD v1.1 (Rajpurkar et al., 2016, arXiv 1606.05250), CC BY-SA 4.0.
""", *(markdown(run, level=2) for run in runs)])


# ------------------------------------------------------------------------------------------------
# The page

def reading(run):
    """[(label, tokens that the LM reads, F1 in percent, 95% intervals)]: the wire's rows as one curve, others alone."""
    found = {}
    for row, (s, _) in sorted(run.rows.items(), key=lambda pair: pair[1][0].get("tokens_read", 0)):
        name, _, form = split_row(row)
        if "tokens_read" in s and "f1_ci95" in s and not form:
            found.setdefault(name, []).append((s["tokens_read"], s))
    return [(row, [x for x, _ in points], [100 * s["f1"] for _, s in points], gaps(s for _, s in points))
            for row, points in found.items()]


def gaps(scores):
    """How far the 95% intervals reach below and above F1, in points: [[...], [...]]."""
    both = [(100 * (s["f1"] - s["f1_ci95"][0]), 100 * (s["f1_ci95"][1] - s["f1"])) for s in scores]
    return [list(side) for side in zip(*both)]


def figures(runs):
    """Curves as SVG, of one run or of several on the same axes; none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        log("notice: no curves, matplotlib is not installed (pip install matplotlib)")
        return []
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False})
    name = lambda run, what: f"{run.name} {what}" if len(runs) > 1 else what
    seen = lambda records: [record.get("samples_seen", record["global_step"]) for record in records]
    read = [(name(run, label), *points) for run in runs for label, *points in reading(run)]
    charts, found = [("F1 against what the LM reads, 95% interval", "tokens, latents", "percent", read)], []
    for title, unit, keys in (("Loss parts", "nats", (*LOSSES[:-1], "entropy_loss")),
                              ("First-token accuracy", "share", ("first_acc", "first_acc_top5"))):
        parts = [(name(run, key), seen(run.steps), [record["model"].get(key) for record in run.steps], None)
                 for run in runs for key in keys]
        charts.append((title, "questions seen", unit, [part for part in parts if any(part[2])]))
    dev = [(name(run, run.own), seen(run.dev), [100 * s["f1"] for s in run.dev], gaps(run.dev))
           for run in runs if run.dev]
    charts.append(("F1 on the dev slice, 95% interval", "questions seen", "percent", dev))
    for title, below, unit, series in charts:
        fig, ax = plt.subplots(figsize=(6.4, 3.6))
        for label, x, y, errors in series:
            ax.errorbar(x, y, errors, label=label, capsize=3, marker="o" if len(x) < 15 else None, markersize=4)
        if series:
            ax.set(title=title, xlabel=below, ylabel=unit)
            ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
            fig.savefig(out := io.StringIO(), format="svg", metadata={"Date": None}, bbox_inches="tight")
            found.append(f"<svg role='img' aria-label='{title}'" + out.getvalue().partition("<svg")[2])
        plt.close(fig)
    return found


STYLE = """
:root { color-scheme: light dark; } body { font: 16px/1.5 system-ui; max-width: 1080px; margin: 0 auto; padding: 1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8886; vertical-align: top; }
figure { display: inline-block; margin: 1rem 1rem 0 0; background: #fff; width: min(100%, 32rem); }
svg { max-width: 100%; height: auto; } summary { cursor: pointer; padding: .4rem 0; }
.head { display: flex; flex-wrap: wrap; gap: 0 2.5rem; } .head b { display: block; font-size: 2rem; }
mark { color: inherit; background: rgb(255 170 0 / calc(.45 * var(--kept))); }
.right b { color: light-dark(#17774a, #5cc690); } .wrong b { color: light-dark(#a8322a, #f08d84); }
"""

FILTER = """<p><input id=word type=search placeholder='filter by any word' aria-label='filter'>
<select id=only aria-label='which'><option value=all>all<option value=right>right<option value=wrong>wrong</select>
<span id=count></span></p><script>
const [word, only, count] = ['word', 'only', 'count'].map(id => document.getElementById(id));
function show() {
  const all = [...document.querySelectorAll('details')], wanted = word.value.toLowerCase();
  for (const d of all)
    d.hidden = !d.textContent.toLowerCase().includes(wanted) || only.value !== 'all' && d.className !== only.value;
  count.textContent = all.filter(d => !d.hidden).length + ' of ' + all.length;
}
word.addEventListener('input', show); only.addEventListener('change', show);
addEventListener('DOMContentLoaded', show);
</script>"""


def html_table(head, rows):
    bold = lambda text: re.sub(r"^\*\*(.*)\*\*$", r"<b>\1</b>", html.escape(str(text)))
    cells = lambda tag, row: "<tr>" + "".join(f"<{tag}>{bold(cell)}</{tag}>" for cell in row) + "</tr>"
    return f"<div class=wide><table>{cells('th', head)}{''.join(cells('td', row) for row in rows)}</table></div>"


def shaded(kept):
    """A text, each of whose tokens is the darker the more of the latents are of it."""
    most = max(share for _, share in kept) or 1
    return "".join(f"<mark style='--kept:{share / most:.2f}'>{html.escape(token)}</mark>" for token, share in kept)


def prediction(run, record):
    """One question, to be opened: its context and what every row answered."""
    golds, verdict = record["golds"], ("wrong", "right")
    right = {row: verdict[int(exact_match(record[row], golds))] for row in run.rows if row in record}
    answers = [["gold", " | ".join(golds), ""], *([row, record[row], right[row]] for row in right)]
    own = run.own if run.own in right else next(iter(right))
    context, _, question = record["prompt"].rpartition("\nQuestion: ")
    context, question, answer = map(html.escape, (context, question.partition("\n")[0], record[own]))
    context = shaded(record["kept"]) if "kept" in record else context
    return (f"<details class={right[own]}><summary>{question} <b>{answer}</b></summary><p>{context}</p>"
            f"{html_table(['row', 'answer', ''], answers)}</details>")


def headline(run):
    """[(figure, what it says)]: how good, how small, how fast the row is that the wire is trained for."""
    if run.own not in run.rows:
        return []
    m, (s, _) = run.metrics, run.rows[run.own]
    found = [(percent(s["f1"]), f"F1 of {m['samples']} answers" + (
        f", {100 * s['f1_ci95'][0]:.1f} to {100 * s['f1_ci95'][1]:.1f}" if "f1_ci95" in s else ""))]
    row = next((row for row in ("text_lora", "anchor", "text") if row in run.rows and row != run.own), None)
    whole = run.rows.get(row)
    if whole and whole[0]["f1"]:
        found.append((f"{s['f1'] / whole[0]['f1']:.0%}", f"of {ROWS[row].heading}: {percent(whole[0]['f1'])}"))
    if run.own != "latent" or run.config.get("scope", "context") != "context":
        return found  # a question's choice takes time, and what it chooses from is no smaller than what is stored
    found.append((f"{m['compression'][run.lm]:.1f}x", f"smaller: {m['latent_len']} latents for a text"))
    if whole and s.get("prefill_sec_per_sample") and whole[0].get("prefill_sec_per_sample"):
        faster = whole[0]["prefill_sec_per_sample"] / s["prefill_sec_per_sample"]
        found.append((f"{faster:.1f}x", "as fast to the first token as the text, latents at hand"))
    return found


def page(runs):
    """The runs as one self-contained HTML page."""
    run, title = runs[0], html.escape(" and ".join(run.name for run in runs))
    body, curves = [f"<h1>{title}</h1>"], [f"<figure>{chart}</figure>" for chart in figures(runs)]
    if len(runs) > 1:
        body += [html_table(*comparison(runs)), *curves]
    else:
        big = "".join(f"<p><b>{figure}</b> {html.escape(text)}</p>" for figure, text in headline(run))
        whole = [record for record in run.predictions if "prompt" in record and run.rows.keys() & record.keys()]
        body += [f"<div class=head>{big}</div>", *curves[:2]]
        body += ["<h2>Every row</h2>", html_table(*score_table(run)), *curves[2:]]
        body += ["<h2>Predictions</h2>", "<p>Opened, the first of them show their text, each word the darker the more "
                 "of the latents are of it.</p>" * any("kept" in record for record in whole), FILTER,
                 *(prediction(run, record) for record in whole)]
        body += ["<h2>Configuration</h2>", html_table(["flag", "value"], list(run.config.items()))]
    return ("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<link rel=icon href='data:,'><title>{title}</title><style>{STYLE}</style><main>{''.join(body)}</main>"
            "</html>\n")


def main(args):
    runs = [Run(folder) for folder in args.runs]
    run = runs[0]
    if len(runs) > 1 and args.preserve:
        raise UserError("--preserve takes one run; leave out the others")
    if len(runs) > 1:
        print("\n".join(markdown_table(*comparison(runs))))
        written = {run.folder / "comparison.html": page(runs)}
    elif args.preserve:
        check_own(Path(args.preserve) / "README.md", "# Preserved Experimental Data", "give --preserve another folder")
        kept = preserve(run, args.preserve, args.name or run.name, args.scores)
        written = {kept / "README.md": markdown(Run(kept)), kept.parent / "README.md": index(kept.parent)}
    else:
        check_own(run.folder / "README.md", "# Experiment: ", "move it away")
        written = {run.folder / "README.md": markdown(run), run.folder / "report.html": page(runs)}
    for path, text in written.items():
        write_atomic(path, text)
        log(f"written: {path}")


if __name__ == "__main__":
    run_main(lambda: main(args))
