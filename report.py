"""
Look at a run: write RUN/README.md, the run in one page, and RUN/report.html, with curves and every prediction.

    python report.py runs/squad                              # also while it is still training
    python report.py runs/squad runs/demo                    # side by side: RUN/comparison.html and a table
    python report.py runs/squad --preserve preserved_data    # a copy to keep: logs, scores, 200 predictions, checkpoint

The curves need matplotlib (pip install matplotlib); without it the page keeps its tables.

It reads RUN/config.json, logs/train_diagnostics.jsonl, eval/metrics.json, eval/predictions.jsonl and
eval/metrics_history.jsonl, each of them if it is there, and the runs that the specification preserved.
"""
import json
import math
import shutil
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

from common import Parser, UserError, find_row, log, read_lines, run_main, write_atomic

NAMES = {"text": "Text baseline", "raw": "Raw embeddings", "anchor": "Anchor embeddings", "adapter": "Adapter (no encoder)",
         "token_budget": "Token budget", "truncated": "Truncated context",
         "selective": "Selective-Context", "matched": "Nearest to the question", "question_only": "Question only", "text_lora": "Text, LoRA on",
         "token_budget_lora": "Token budget, LoRA on", "truncated_lora": "Truncated context, LoRA on",
         "selective_lora": "Selective-Context, LoRA on", "matched_lora": "Nearest to the question, LoRA on", "latent": "**Latents**",
         "latent_shuffled": "Latents of another context"}


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("runs", nargs="+", help="folder of a run, e.g. runs/demo; several are compared")
    p.add_argument("--preserve", metavar="FOLDER", help="copy what is worth keeping to FOLDER/YYYY-MM-DD_name and list it in FOLDER/README.md")
    p.add_argument("--name", help="of the preserved copy (default: the run's)")
    return p.parse_args(argv)


def read_json(path, default=None):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None


class Run:
    """A run's files, read once. Anything may be missing."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{folder}: no such folder; give a run, such as runs/demo")
        self.config = read_json(self.folder / "config.json", {})
        self.metrics = read_json(self.folder / "eval" / "metrics.json", {})
        self.steps = read_lines(self.folder / "logs" / "train_diagnostics.jsonl")
        self.history = read_lines(self.folder / "eval" / "metrics_history.jsonl")
        self.predictions = read_lines(self.folder / "eval" / "predictions.jsonl")
        if not self.metrics and not self.steps:
            raise UserError(f"{folder} has neither eval/metrics.json nor logs/train_diagnostics.jsonl; train or evaluate first")
        for record in self.steps:  # the LM may have been trained and evaluated under two names
            record["model"], = record["models"].values()
        self.lm = next(iter(self.metrics.get("avg_prompt_tokens", {}) or self.steps[-1]["models"]))
        self.rows = self._rows()
        # Where training ended: its evaluation there may come after the last step that was logged.
        self.end = max([*self.steps, *(r for r in self.history if r.get("kind") == "train")], key=lambda r: r["global_step"], default={})

    def _rows(self):
        """{row: (scores, wall clock in s)} in the order of NAMES, then latents at other budgets."""
        rows = [*NAMES, *sorted((key for key in self.metrics if "@" in key), key=lambda key: key.split("@")[1].zfill(4))]
        found = {row: find_row(self.metrics, row, self.lm) for row in rows}
        return {row: value for row, value in found.items() if value}

    def last(self, key, default=None):
        """A value of the last diagnostics record: of the model, or of the step."""
        if not self.steps:
            return default
        return self.steps[-1]["model"].get(key, self.steps[-1].get(key, default))

    def mean(self, key, start, end):
        """Mean of a model's value over the records from share `start` to share `end` of the run."""
        part = self.steps[int(start * len(self.steps)):math.ceil(end * len(self.steps))]
        values = [record["model"][key] for record in part if key in record["model"]]
        return sum(values) / len(values) if values else float("nan")


def percent(value, ci=None):
    return f"{100 * value:.1f}%" + (f" [{100 * ci[0]:.1f}, {100 * ci[1]:.1f}]" if ci else "")


def score_table(run):
    """The rows as a Markdown table, in the preserved run's form."""
    reference = run.rows.get("text", (None,))[0]
    lines = ["| Mode | F1 Score | EM Score | vs Text Baseline | tokens read |", "|------|----------|----------|------------------|---|"]
    for row, (s, _) in run.rows.items():
        versus = "Reference" if row == "text" else f"{100 * (s['f1'] - reference['f1']):+.1f}%" if reference else "-"
        row, _, own = row.partition("@")
        name = NAMES[row] + (f", M = {own}" if own.isdigit() else f", {own}" if own else "")
        read = f"{s['tokens_read']:.0f}" if "tokens_read" in s else "-"
        lines.append(f"| {name} | {percent(s['f1'], s.get('f1_ci95'))} | {percent(s['em'], s.get('em_ci95'))} | {versus} | {read} |")
    return "\n".join(lines)


def collapse(run):
    """(share of the most frequent first word in the latents' answers, the word, distinct first words, answers), or None."""
    words = Counter((record["latent"].split() or [""])[0] for record in run.predictions if "latent" in record)
    if words:
        word, count = words.most_common(1)[0]
        return count / words.total(), word, len(words), words.total()
    if run.steps and run.last("prediction_histogram"):
        histogram = run.last("prediction_histogram")
        word = max(histogram, key=histogram.get)
        return histogram[word] / sum(histogram.values()), word, len(histogram), sum(histogram.values())
    return None


def advice(run):
    """What this run's own figures say about the next one."""
    lines, latent = [], run.rows.get("latent", (None,))[0]
    seen = run.end.get("samples_seen")
    found = collapse(run)
    if found and found[0] > 0.5 and found[3] >= 20:
        lines.append(f"{percent(found[0])} of the answers start with {found[1]!r}: the latents have collapsed. Start readable (`--encoder pointer`), "
                     "train longer, and raise `--entropy` only if that does not help.")
    ci = run.metrics.get("carried_ci95")
    if ci and ci[0] <= 0:
        lines.append("The latents score no better than those of another context: nothing is carried yet. Train longer or with a longer `--ramp`.")
    if len(run.steps) >= 8:
        early, late = run.mean("tf", 0.7, 0.8), run.mean("tf", 0.9, 1.0)
        if late < early - 0.02:
            lines.append(f"The training loss still fell at the end (tf {early:.2f} at three quarters, {late:.2f} at the end"
                         + (f", {seen:,} questions" if seen else "") + "): more samples pay.")
        else:
            lines.append(f"The training loss was flat at the end (tf {early:.2f} at three quarters, {late:.2f} at the end): more of the same "
                         "brings little; change the recipe.")
    whole = run.rows.get("text_lora", (None,))[0]
    if latent and whole and whole["f1"] > 0:
        share = latent["f1"] / whole["f1"]
        where = "in the compression, not in the reader" if share < 0.8 else "in the reader as much as in the compression"
        lines.append(f"Latents keep {share:.2f} of what the same LoRA makes of the whole text ({percent(whole['f1'])}): what is missing is {where}.")
    skipped = run.steps[-1].get("skipped_steps") if run.steps else 0
    if skipped:
        lines.append(f"{skipped} steps were skipped because their gradients were not finite: lower `--lr`.")
    gpus = (run.last("gpu_memory") or {}).get("gpus", [])
    if gpus and max(gpu["utilization_pct"] for gpu in gpus) < 85:
        lines.append(f"GPU memory is used to {max(gpu['utilization_pct'] for gpu in gpus):.0f}% at most: a larger `--micro_batch` fits.")
    return lines or ["Nothing in these files asks for a change."]


def markdown(run, level=1):
    """The run as one Markdown page; level: of its title's heading."""
    h = lambda depth, text: f"{'#' * (level + depth)} {text}"
    c, m = run.config, run.metrics
    latent, whole = run.rows.get("latent", (None,))[0], run.rows.get("text", (None, None))
    out = [h(0, f"Experiment: {run.folder.resolve().name}"), "", h(1, "Configuration")]
    out += [f"- **Model**: {c.get('lm') or run.lm}, frozen", f"- **Hardware**: {hardware(run)}"]
    if c:
        out += [f"- **Dataset**: {Path(c['data']).name}, {c['samples']:,} samples at most, contexts "
                + (f"of at most {c['max_context_tokens']} tokens" if c.get("max_context_tokens") else "uncut"),
                f"- **Wire**: encoder {c['encoder']}, scope {c['scope']}, M = {c['latents']}, d_z {c['d_z']}, LoRA rank {c['lora_rank']} on {c['lora_targets']}",
                f"- **Training**: batch {c['batch']}, peak learning rate {c['lr']:g}, loss weights " +
                ", ".join(f"{key} {c[key]:g}" for key in ("tf", "kce", "first", "kd", "find", "entropy") if c.get(key))]
    if run.steps:
        seen = run.end.get("samples_seen")
        out.append(f"- **Length**: {run.end['global_step']:,} steps" + (f", {seen:,} questions seen" if seen else ""))
    if m:
        out.append(f"- **Evaluation**: {m['samples']} questions of {Path(m.get('dataset', 'SQuAD')).name}, prompts of {m['avg_prompt_tokens'][run.lm]:.0f} tokens on average")
    out += ["", h(1, "Key Results"), ""]
    out += [score_table(run), ""] if run.rows else ["Not evaluated yet.", ""]
    if latent:
        out += [h(2, "Latent compression"), f"- **Latent F1**: {percent(latent['f1'], latent.get('f1_ci95'))}",
                f"- **First-token accuracy**: {percent(latent['first_token_top1'])}, top-5 {percent(latent['first_token_top5'])}"]
        if "carried" in m:
            out.append(f"- **Carried by the wire** (latents minus latents of another context): {100 * m['carried']:+.1f} F1 "
                       f"[{100 * m['carried_ci95'][0]:.1f}, {100 * m['carried_ci95'][1]:.1f}]")
        out += [f"- **Retention**: {r['ratio']:.2f} [{r['ci95'][0]:.2f}, {r['ci95'][1]:.2f}] of {what} ({percent(r['f1'])})" for what, r in m.get("retention", {}).items()]
        out += [f"- **Compression**: {m['compression'][run.lm]:.1f}x, {m['latent_len']} latents"]
        if "text_bytes" in m.get("wire", {}):
            bytes_of = {"text as UTF-8": m["wire"]["text_bytes"]["utf8"], "text, zlib": m["wire"]["text_bytes"]["zlib"], **m["wire"]["latent_bytes"]}
            out.append("- **Bytes a context**: " + ", ".join(f"{what} {size / m['samples']:,.0f}" for what, size in bytes_of.items()))
        out.append("")
        if found := collapse(run):
            out += [h(2, "Mode-collapse check"), f"- {found[2]} distinct first words in {found[3]} answers; the most frequent, {found[0]:.0%} of them, is {found[1]!r}", ""]
    if any(wall for _, wall in run.rows.values()):
        out += [h(2, "Performance"), "- Wall clock: " + ", ".join(f"{row} {wall:.1f} s" for row, (_, wall) in run.rows.items() if wall)]
        if latent and whole[1]:
            out.append(f"- Text / latents: {whole[1] / run.rows['latent'][1]:.1f}x with the encoder"
                       + (f", {whole[1] / m['latent']['wall_clock_ready_sec']:.1f}x with latents ready" if "wall_clock_ready_sec" in m["latent"] else ""))
        if run.steps:
            out.append(f"- Training: {run.last('sec_per_step'):.2f} s a step" + (f", {run.last('samples_per_sec'):.1f} questions/s" if run.last("samples_per_sec") else ""))
        out.append("")
    if run.steps:
        keys = ("grad_norm", "first_acc", "first_acc_top5", "tf", "first", "kce", "kd", "find", "entropy_loss", "prediction_diversity", "latent_rms", "attention_entropy")
        final = {key: round(run.last(key), 4) for key in keys if run.last(key) or key.startswith("first_acc")}
        final["dominant_predictions"] = dict(Counter(run.last("prediction_histogram") or {}).most_common(5))
        out += [h(1, "Final training diagnostics"), f"Step {run.steps[-1]['global_step']}:", "```json", json.dumps(final, indent=2, ensure_ascii=False), "```", ""]
        out += [h(1, "Memory profile"), *memory_lines(run), ""]
    out += [h(1, "What to change next"), *(f"{i}. {line}" for i, line in enumerate(advice(run), 1)), ""]
    return "\n".join(out)


def hardware(run):
    gpus = (run.last("gpu_memory") or {}).get("gpus", [])
    if gpus:
        return f"{len(gpus)} GPU(s) of {gpus[0]['total_gb']:.0f} GB"
    return f"{run.metrics.get('device', 'cpu')}, {run.metrics.get('dtype', 'float32').removeprefix('torch.')}"


def memory_lines(run):
    gpus = (run.last("gpu_memory") or {}).get("gpus", [])
    if gpus:
        return [f"- GPU {gpu['id']}: {gpu['allocated_gb']} GB allocated ({gpu['utilization_pct']}% utilization)" for gpu in gpus]
    host = run.last("host_memory") or {}
    return [f"- Host, peak: {host['peak_rss_gb']} GB" if host else "- not recorded"]


# ------------------------------------------------------------------------------------------------
# A copy to keep

KEEP_PREDICTIONS, KEEP_BYTES = 200, 25 * 2**20


def preserve(run, folder, name):
    """Copy the run's small files and its best checkpoint to folder/DATE_name; the last steps of the path a fresh clone needs
    to evaluate it again. Returns the new folder. Raises UserError where the evaluation is not of that checkpoint."""
    best = run.folder / "ckpt" / "best"
    manifest = read_json(best / "manifest.json")
    if manifest is None or run.metrics.get("ckpt_sha256") != manifest["model.safetensors"]:
        raise UserError(f"{run.folder}/eval is not of {best}; first: python eval.py --mode all --ckpt {best} --data ...")
    if (size := (best / "model.safetensors").stat().st_size) > KEEP_BYTES:
        raise UserError(f"{best} is {size / 2**20:.0f} MB, too large to keep in a repository (at most {KEEP_BYTES >> 20} MB)")
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    kept = Path(folder) / f"{date}_{name}"
    if kept.exists():
        raise UserError(f"{kept} is there already; give another --name or remove it")
    part = kept.with_name(kept.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(best, part / "ckpt")
    for source in [*sorted((run.folder / "logs").glob("*")), run.folder / "config.json", *sorted((run.folder / "eval").glob("metrics*"))]:
        text = without_paths(source.read_text(encoding="utf-8"))
        write_atomic(part / source.relative_to(run.folder), text)
    for chart in figures([run]):  # a README's picture
        if "F1 of every row" in chart:
            write_atomic(part / "rows.svg", chart)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in run.predictions[:KEEP_PREDICTIONS]]
    write_atomic(part / "eval" / "predictions.jsonl", "".join(lines))
    part.rename(kept)
    return kept


def without_paths(text):
    """Paths of the machine that it ran on become file names."""
    import re
    return re.sub(r'(?<=["\s,])(?:/|\.\.?/)[^"\s,:]*/', "", text)


def index(folder):
    """README.md of a folder of preserved runs: what is where, then each run's page."""
    runs = [Run(path) for path in sorted(folder.iterdir()) if (path / "eval" / "metrics.json").exists()]
    tree = "\n".join(f"├── {run.folder.name}/\n" + "".join(f"│   ├── {part}/  {', '.join(sorted(p.name for p in (run.folder / part).iterdir()))}\n"
                                                            for part in ("eval", "logs", "ckpt") if (run.folder / part).exists()) for run in runs)
    pages = "\n---\n\n".join(markdown(run, level=2) for run in runs)
    data, samples = runs[-1].metrics.get("dataset", "dev-v1.1.json"), runs[-1].metrics["samples"]
    return f"""# Preserved Experimental Data

Results of LatentWire runs, kept so that anyone can evaluate and inspect them. Written by `python report.py RUN --preserve {folder.name}`.

## Directory Structure

```
{folder.name}/
{tree.rstrip()}
```

{pages}
---

## Usage

```
python eval.py --mode latent --ckpt {folder.name}/{runs[-1].folder.name}/ckpt --data {Path(data).name} --samples {samples}
```

`eval/predictions.jsonl` holds {KEEP_PREDICTIONS} questions with their contexts from SQuAD v1.1 (Rajpurkar et al., 2016, arXiv 1606.05250),
CC BY-SA 4.0.
"""


# ------------------------------------------------------------------------------------------------
# The page

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --dim: #667; --line: #d5dae2; --paper: #fff; --good: #17774a; --bad: #a8322a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7ee; --dim: #99a; --line: #3a4150; --paper: #161a21; --good: #5cc690; --bad: #f08d84; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1080px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { white-space: nowrap; } #list td { white-space: normal; overflow-wrap: anywhere; } th { color: var(--dim); font-weight: 500; }
figure { margin: 1rem 0; background: #fff; border-radius: 6px; } svg { max-width: 100%; height: auto; display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 1rem; } .charts figure { margin: 0; }
.right { color: var(--good); } .wrong { color: var(--bad); } .dim { color: var(--dim); } input, select { font: inherit; padding: .3rem; max-width: 100%; }
#list details { border-bottom: 1px solid var(--line); padding: .4rem 0; } #list summary { cursor: pointer; } #list p { color: var(--dim); }
"""

SCRIPT = """
const all = JSON.parse(document.getElementById('data').textContent), list = document.getElementById('list');
const word = document.getElementById('word'), only = document.getElementById('only'), count = document.getElementById('count');
const add = (parent, tag, text, cls) => { const e = parent.appendChild(document.createElement(tag)); e.textContent = text; if (cls) e.className = cls; return e; };
function show() {
  list.replaceChildren();
  const wanted = all.filter(p => JSON.stringify(p).toLowerCase().includes(word.value.toLowerCase())
    && (only.value === 'all' || p.right === (only.value === 'right')));
  count.textContent = wanted.length + ' of ' + all.length;
  for (const p of wanted.slice(0, 200)) {
    const d = add(list, 'details', '');
    const s = add(d, 'summary', p.question + ' ');
    add(s, 'span', p.main, p.right ? 'right' : 'wrong');
    add(d, 'p', p.context);
    const t = add(d, 'table', '');
    for (const [name, text, ok] of p.rows) { const r = add(t, 'tr', ''); add(r, 'th', name); add(r, 'td', text, ok === null ? '' : ok ? 'right' : 'wrong'); }
  }
}
word.addEventListener('input', show); only.addEventListener('change', show); show();
"""


def figures(runs):
    """SVG charts of one run, or of several on the same axes: the curves, and for one run its rows and its budgets. An empty
    list without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        log("notice: no curves, matplotlib is not installed (pip install matplotlib)")
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False, "font.size": 11})
    found = []

    def chart(title, y, series, x="questions seen"):
        """series: [(label, xs, ys, (lows, highs) or None)]"""
        series = [s for s in series if len(s[1])]
        if not series:
            return
        fig, ax = plt.subplots(figsize=(6.4, 3.6))
        for label, xs, ys, band in series:
            line, = ax.plot(xs, ys, label=label, linewidth=1.6, marker="o" if len(xs) < 15 else None, markersize=4)
            if band and len(xs) == 1:
                ax.errorbar(xs, ys, [[ys[0] - band[0][0]], [band[1][0] - ys[0]]], color=line.get_color(), capsize=3)
            elif band:
                ax.fill_between(xs, *band, alpha=0.2, color=line.get_color(), linewidth=0)
        ax.set(title=title, xlabel=x, ylabel=y)
        if len(series) > 1 or len(runs) > 1:
            ax.legend(frameon=False)
        found.append(svg(fig))

    def svg(fig):
        import io
        out = io.StringIO()
        fig.tight_layout()
        fig.savefig(out, format="svg", metadata={"Date": None})
        plt.close(fig)
        return out.getvalue()[out.getvalue().index("<svg"):]

    label = lambda run, part="": " ".join(filter(None, [run.folder.resolve().name if len(runs) > 1 else "", part])) or part
    at = lambda run: [record.get("samples_seen", record["global_step"]) for record in run.steps]
    inner = lambda run, key: [record["model"].get(key) for record in run.steps]
    parts = [(run, key) for run in runs for key in ("tf", "first", "kce", "kd", "find", "entropy_loss") if any(v for v in inner(run, key))]
    chart("Loss parts", "nats", [(label(run, key), at(run), inner(run, key), None) for run, key in parts])
    chart("First-token accuracy", "share", [(label(run, name), at(run), inner(run, key), None) for run in runs
                                            for key, name in (("first_acc", "top 1"), ("first_acc_top5", "top 5")) if run.steps])
    for key, title, y in (("prediction_diversity", "Distinct first tokens", "per question"), ("attention_entropy", "Attention entropy of a latent", "nats")):
        chart(title, y, [(label(run), at(run), [record[key] for record in run.steps], None) for run in runs if run.steps and run.steps[0].get(key) is not None])
    series = []
    for run in runs:
        dev = [record for record in run.history if record.get("kind") == "train" and "f1" in record]
        series.append((label(run), [r["samples_seen"] for r in dev], [100 * r["f1"] for r in dev], [[100 * r["f1_ci95"][i] for r in dev] for i in (0, 1)]))
    chart("F1 on the dev slice, 95% interval", "percent", series)
    if len(runs) == 1 and runs[0].rows:
        rows = list(runs[0].rows.items())[::-1]
        fig, ax = plt.subplots(figsize=(6.4, 0.8 + 0.36 * len(rows)))
        for y, (row, (s, _)) in enumerate(rows):
            low, high = s.get("f1_ci95") or (s["f1"], s["f1"])
            ax.barh(y, 100 * s["f1"], color="#c2410c" if row.startswith("latent") and "shuffled" not in row else "#94a3b8",
                    xerr=[[100 * max(0, s["f1"] - low)], [100 * max(0, high - s["f1"])]], error_kw={"linewidth": 1, "capsize": 3})
        ax.set(title="F1 of every row, 95% interval", xlabel="percent")
        ax.set_yticks(range(len(rows)), [row for row, _ in rows])
        found.append(svg(fig))
        sizes = sorted((int(row.split("@")[1]), s) for row, (s, _) in runs[0].rows.items() if row.startswith("latent@") and row.split("@")[1].isdigit())
        if sizes:
            tokens = runs[0].metrics["avg_prompt_tokens"][runs[0].lm]
            chart("Quality against compression", "F1, percent", [("latents", [tokens / M for M, _ in sizes], [100 * s["f1"] for _, s in sizes],
                  [[100 * s["f1_ci95"][i] for _, s in sizes] for i in (0, 1)])], x="prompt tokens per latent")
    return found


def html_table(head, rows):
    import html
    cells = lambda tag, row: "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>"
    return f"<div class=wide><table>{cells('th', head)}{''.join(cells('td', row) for row in rows)}</table></div>"


def predictions_json(run):
    """What the list of predictions shows, as JSON that may stand inside a page."""
    from eval import exact_match
    records = []
    for record in run.predictions:
        rows = [row for row in run.rows if row in record]
        main = "latent" if "latent" in record else rows[0] if rows else None
        context, _, question = record["prompt"].rpartition("\nQuestion: ")
        right = {row: bool(exact_match(record[row], record["golds"])) for row in rows}
        records.append({"question": question.split("\n")[0], "context": context, "main": record[main] if main else "", "right": right.get(main, False),
                        "rows": [["gold", " | ".join(dict.fromkeys(record["golds"])), None], *([row, record[row], right[row]] for row in rows)]})
    return json.dumps(records, ensure_ascii=False).replace("<", "\\u003c")


def page(runs):
    """The runs as one self-contained HTML page."""
    import html
    title = " and ".join(run.folder.resolve().name for run in runs)
    body = [f"<h1>{html.escape(title)}</h1>"]
    if len(runs) == 1:
        run, = runs
        reference = run.rows.get("text", (None,))[0]
        body += ["<h2>Rows</h2>", html_table(
            ["row", "F1", "EM", "vs text", "NLL / token", "tokens read", "seconds"],
            [[row, percent(s["f1"], s.get("f1_ci95")), percent(s["em"], s.get("em_ci95")),
              f"{100 * (s['f1'] - reference['f1']):+.1f}" if reference else "", f"{s['nll_token']:.2f}" if "nll_token" in s else "",
              f"{s['tokens_read']:.0f}" if "tokens_read" in s else "", f"{wall:.1f}" if wall else ""] for row, (s, wall) in run.rows.items()])
            if run.rows else "<p>Not evaluated yet.</p>"]
        body += ["<h2>What to change next</h2><ol>", *(f"<li>{html.escape(line)}</li>" for line in advice(run)), "</ol>"]
    else:
        body += ["<h2>F1</h2>", html_table(*comparison(runs))]
    charts = figures(runs)
    body.append("<h2>Curves</h2><div class=charts>" + "".join(f"<figure>{chart}</figure>" for chart in charts) + "</div>" if charts
                else "<p class=dim>No curves: matplotlib is not installed.</p>")
    if len(runs) == 1 and runs[0].predictions:
        body += ["<h2>Predictions</h2><p><input id=word type=search placeholder='filter by any word' aria-label='filter'> ",
                 "<select id=only aria-label='which'><option value=all>all<option value=right>right<option value=wrong>wrong</select> <span id=count class=dim></span></p>",
                 f"<div id=list></div><script type='application/json' id=data>{predictions_json(runs[0])}</script><script>{SCRIPT}</script>"]
    if len(runs) == 1 and runs[0].config:
        body += ["<h2>Configuration</h2>", html_table(["flag", "value"], [[f"--{key}", value] for key, value in runs[0].config.items()])]
    return (f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'><link rel=icon href='data:,'>"
            f"<title>{html.escape(title)}</title><style>{STYLE}</style>{''.join(body)}</html>\n")


def comparison(runs):
    """(head, rows) of a table: F1 of every row of every run."""
    names = list(dict.fromkeys(row for run in runs for row in run.rows))
    return (["row", *(run.folder.resolve().name for run in runs)],
            [[row, *(percent(run.rows[row][0]["f1"], run.rows[row][0].get("f1_ci95")) if row in run.rows else "-" for run in runs)] for row in names])


def main():
    runs = [Run(folder) for folder in args.runs]
    run = runs[0]
    if len(runs) > 1:
        if args.preserve:
            raise UserError("--preserve takes one run")
        head, rows = comparison(runs)
        print("\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]))
        write_atomic(run.folder / "comparison.html", page(runs))
        log(f"written: {run.folder / 'comparison.html'}")
    elif args.preserve:
        kept = preserve(run, args.preserve, args.name or run.folder.resolve().name)
        write_atomic(kept / "README.md", markdown(Run(kept)))
        write_atomic(Path(args.preserve) / "README.md", index(Path(args.preserve)))
        log(f"kept in {kept}, listed in {args.preserve}/README.md")
    else:
        write_atomic(run.folder / "README.md", markdown(run))
        write_atomic(run.folder / "report.html", page(runs))
        log(f"written: {run.folder / 'README.md'}, {run.folder / 'report.html'}")


if __name__ == "__main__":
    args = parse_args()
    run_main(main)
