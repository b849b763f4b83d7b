"""
Look at a run: write RUN/README.md, the run in one page, computed from its files.

    python report.py runs/squad                              # also while it is still training
    python report.py runs/squad --preserve preserved_data    # a copy to keep: logs, scores, 200 predictions, checkpoint

It reads RUN/config.json, logs/train_diagnostics.jsonl, eval/metrics.json, eval/predictions.jsonl and
eval/metrics_history.jsonl, each of them if it is there, and the runs that the specification preserved.
"""
import argparse
import json
import math
import shutil
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

from data import UserError, log, run_main, write_atomic

NAMES = {"text": "Text baseline", "raw": "Raw embeddings", "anchor": "Anchor embeddings", "adapter": "Adapter (no encoder)",
         "token_budget": "Token budget", "truncated": "Truncated context",
         "selective": "Selective-Context", "question_only": "Question only", "text_lora": "Text, LoRA on",
         "token_budget_lora": "Token budget, LoRA on", "truncated_lora": "Truncated context, LoRA on",
         "selective_lora": "Selective-Context, LoRA on", "latent": "**Latents**",
         "latent_shuffled": "Latents of another context"}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", help="folder of a run, e.g. runs/demo")
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


def read_lines(path):
    """The objects of a .jsonl file; a last line that is still being written is left out."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.endswith("}\n")]


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
        models = [*self.metrics.get("avg_prompt_tokens", {}), *(self.steps[-1]["models"] if self.steps else {})]
        self.lm = models[0] if models else "?"
        self.rows = self._rows()

    def _rows(self):
        """{row: (scores, wall clock in s)} in the order of NAMES, then latents at other budgets."""
        m, found = self.metrics, {}
        for row in [*NAMES, *sorted((key for key in m if "@" in key), key=lambda key: key.split("@")[1].zfill(4))]:
            baseline = m.get("embedding_baselines", {}).get(row)
            if baseline:
                wall = baseline.get("wall_clock_sec")
                found[row] = (baseline["metrics"][self.lm], wall.get(self.lm) if isinstance(wall, dict) else wall)
            elif isinstance(m.get(row), dict) and self.lm in m[row]:
                found[row] = (m[row][self.lm], m[row].get("wall_clock_sec"))
        return found

    def last(self, key, default=None):
        """A value of the last diagnostics record: of the model, or of the step."""
        if not self.steps:
            return default
        return self.steps[-1]["models"][self.lm].get(key, self.steps[-1].get(key, default))

    def mean(self, key, start, end):
        """Mean of a model's value over the records from share `start` to share `end` of the run."""
        part = self.steps[int(start * len(self.steps)):math.ceil(end * len(self.steps))]
        values = [record["models"][self.lm][key] for record in part if key in record["models"][self.lm]]
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
    seen = run.steps[-1].get("samples_seen") if run.steps else None
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
                ", ".join(f"{key} {c[key]:g}" for key in ("tf", "kce", "first", "kd", "entropy", "recall") if c.get(key))]
    if run.steps:
        seen = run.steps[-1].get("samples_seen")
        out.append(f"- **Length**: {run.steps[-1]['global_step']:,} steps" + (f", {seen:,} questions seen" if seen else ""))
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
        keys = ("grad_norm", "first_acc", "first_acc_top5", "tf", "first", "kce", "kd", "entropy_loss", "recall", "prediction_diversity", "latent_rms", "attention_entropy")
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
python eval.py --mode latent --ckpt {folder.name}/{runs[-1].folder.name}/ckpt --data dev-v1.1.json --samples 1000
```

`eval/predictions.jsonl` holds {KEEP_PREDICTIONS} questions with their contexts from SQuAD v1.1 (Rajpurkar et al., 2016, arXiv 1606.05250),
CC BY-SA 4.0.
"""


def main():
    run = Run(args.run)
    if args.preserve:
        kept = preserve(run, args.preserve, args.name or run.folder.resolve().name)
        write_atomic(kept / "README.md", markdown(Run(kept)))
        write_atomic(Path(args.preserve) / "README.md", index(Path(args.preserve)))
        log(f"kept in {kept}, listed in {args.preserve}/README.md")
    else:
        write_atomic(run.folder / "README.md", markdown(run))
        log(f"written: {run.folder / 'README.md'}")


if __name__ == "__main__":
    args = parse_args()
    run_main(main)
