"""
Ablations: the same recipe with one thing changed, one cell after another, and a table.

    python ablate.py                                                         # official SQuAD, downloaded once
    python ablate.py --data train-v1.1.json.gz --eval_data dev-v1.1.json.gz  # the same from files
    python ablate.py --cells base,query,pool                                 # some of the cells

Every cell trains on the same questions with the same seed, then answers the same questions. A cell that took over a tenth more
or less time than the base is run a second time for the base's wall clock, on what it gets to of four times as many questions,
so that the table has both comparisons. "- base" is the difference in F1 to the base, question by question. Finished cells
are skipped and an interrupted one goes on: start it again until it is done; after a change of the code give another --out.
Writes OUT/table.md and OUT/<cell>/ (a run each).
"""
import json
import subprocess
import sys
from pathlib import Path

from common import Parser, UserError, find_row, log, run_main, write_atomic

CELLS = {  # name: what train.py gets beside the recipe
    "base": "",
    "query": "--encoder query",
    "pool": "--encoder pool",
    "context scope": "--scope context --ramp 0.3 --encoder_lr 2e-4",
    "text": "--encoder text --scope context",
    "prompt scope": "--scope prompt",
    "no find": "--find 0",
    "depth 10": "--depth 10",
    "no LoRA": "--lora_rank 0",
    "M = 8": "--latents 8",
    "M = 64": "--latents 64",
    "M = 16": "--latents 16",
    "elastic": "--latents 8,16,32,64",
    "no first": "--first 0",
    "first 3": "--first 3",
    "entropy 0.5": "--entropy 0.5",
    "kd 0.5": "--kd 0.5",
}


def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--data", default="squad", help="squad (default), synthetic, or the training file")
    add("--eval_data", default="squad", help="squad (default), synthetic, or the file whose questions are answered")
    add("--preset", default="squad", help="recipe of train.py that every cell starts from (default squad)")
    add("--samples", type=int, default=400, help="training questions a cell (default 400, about 3 minutes on 2 cores)")
    add("--eval_samples", type=int, default=500, help="questions answered a cell (default 500)")
    add("--cells", default=",".join(CELLS), help=f"some of: {', '.join(CELLS)}")
    add("--out", default="runs/ablate", help="folder (default runs/ablate)")
    return p.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()  # before the heavy imports, so that --help and typing errors answer at once

import numpy as np

from eval import f1_score, interval


def minutes_of(folder):
    """How long a cell trained, or None where it has not finished."""
    path = folder / "ckpt" / "last" / "state.json"
    state = json.loads(path.read_text()) if path.exists() else {"finished": False}
    return state["elapsed"] / 60 if state["finished"] else None


def run_cell(name, flags, out, minutes=0.0):
    """Train and evaluate one cell, as far as that is not done yet. minutes: for as long, on up to four times the questions."""
    folder = out / (name.replace(" ", "_").replace("=", "") + ("_equal_time" if minutes else ""))
    given = {"preset": args.preset, "data": args.data, "samples": args.samples * (4 if minutes else 1)}
    before = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else given
    for key, value in given.items():
        if before[key] != value:
            raise UserError(f"--out {out}: {folder.name} was trained with --{key} {before[key]}, not {value}; give another --out")
    if minutes_of(folder) is None:
        call("train.py", *(f"--{key}={value}" for key, value in given.items()), "--epochs", 1, "--minutes", minutes, "--eval_samples", 25,
             "--eval_every", 0, "--resume", "--out", folder, *flags.split())
    metrics = folder / "eval" / "metrics.json"
    rows = {"base": ["latent", "matched_lora"],
            "elastic": ["latent@8", "latent@16", "latent@32", "latent@64"]}.get(name, ["latent"])
    found = json.loads(metrics.read_text()) if metrics.exists() else {}
    todo = [row for row in rows if not find_row(found, row, found.get("lm"))]
    if todo or found["samples"] != args.eval_samples:
        call("eval.py", "--mode", ",".join(todo or rows), "--ckpt", folder / "ckpt" / "best", "--data", args.eval_data, "--samples", args.eval_samples)
    return folder


def call(*command):
    done = subprocess.run([sys.executable, *map(str, command)])
    if done.returncode:
        raise UserError(f"`python {' '.join(map(str, command))}` ended with code {done.returncode}; mend that and start again")


def f1_of(folder, row):
    """F1 (n,) of a row's answers, 0 to 1."""
    with open(folder / "eval" / "predictions.jsonl", encoding="utf-8") as f:
        return np.array([f1_score(record[row], record["golds"]) for record in map(json.loads, f)])


def table(folders):
    """Markdown table of the cells that are finished; folders: {(cell, budget): folder}."""
    lines = ["| cell | budget | questions seen | minutes | M | F1 | - base | EM | first-token top-1 | NLL/token |", "|---|---|---|---|---|---|---|---|---|---|"]
    base = f1_of(folders["base", "equal samples"], "latent") if ("base", "equal samples") in folders else None
    for (name, budget), folder in folders.items():
        metrics = json.loads((folder / "eval" / "metrics.json").read_text(encoding="utf-8"))
        state = json.loads((folder / "ckpt" / "last" / "state.json").read_text(encoding="utf-8"))
        for row in ("latent", "matched_lora", "latent@8", "latent@16", "latent@32", "latent@64"):
            found = find_row(metrics, row, metrics["lm"])
            if not found:
                continue
            s, _ = found
            label = name if row == "latent" else f"{name}: {row}"
            M = row.partition("@")[2] or ("T" if metrics["is_text"] else metrics["latent_len"])
            f1, em = (f"{100 * s[key]:.1f} [{100 * s[key + '_ci95'][0]:.1f}, {100 * s[key + '_ci95'][1]:.1f}]" for key in ("f1", "em"))
            gap = "-"
            if base is not None and label != "base":
                gain = 100 * (f1_of(folder, row) - base)
                gap = "{:+.1f} [{:.1f}, {:.1f}]".format(gain.mean(), *interval(gain))
            lines.append(f"| {label} | {budget} | {state['seen']:,} | {state['elapsed'] / 60:.1f} | {M} | {f1} | {gap} | {em} | "
                         f"{100 * s['first_token_top1']:.1f} | {s['nll_token']:.2f} |")
    return "\n".join(lines)


def main():
    cells = [cell.strip() for cell in args.cells.split(",")]
    for cell in cells:
        if cell not in CELLS:
            raise UserError(f"--cells {cell} is unknown; there are {', '.join(CELLS)}")
    out, folders = Path(args.out), {}

    def add(name, budget, minutes=0.0):
        log(f"== {name}, {budget}")
        folders[name, budget] = run_cell(name, CELLS[name], out, minutes)
        write_atomic(out / "table.md", table(folders) + "\n")
        return minutes_of(folders[name, budget])
    taken = {cell: add(cell, "equal samples") for cell in cells}
    base = minutes_of(out / "base")
    if base is None:
        log("notice: without the cell base there is no equal time to compare")
    for cell, minutes in taken.items():
        if base and abs(minutes / base - 1) > 0.1:
            add(cell, "equal time", base)
    print(table(folders))


if __name__ == "__main__":
    run_main(main)
