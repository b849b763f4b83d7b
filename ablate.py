"""
Ablations: the same recipe with one thing changed, one cell after another, and a table.

    python ablate.py                                                     # official SQuAD, downloaded once
    python ablate.py --data TRAIN --eval_data DEV --cells "base,M = 8"   # from files, some of the cells

Every cell trains on the same questions and answers the same ones through its own row. One that took over a tenth more
or less time than the base runs again for the base's time, on up to four times as many questions. "- base": difference
in F1, paired. What is finished is skipped; after a change of code or data give another --out. Writes OUT/table.md and
runs.
"""
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from common import Parser, UserError, find_row, log, run_main, same_file, write_atomic

CELLS = {  # name: what train.py gets beside the recipe
    "base": "", "embeds": "--wire embeds", "prompt scope": "--scope prompt",
    "tokens truncated": "--wire tokens --keep truncated", "tokens selective": "--wire tokens --keep selective",
    "tokens matched": "--wire tokens --keep matched", "tokens all": "--wire tokens --keep all",
    "asked": "--scope asked", "asked ratio 2": "--scope asked --ratio 2", "asked ratio 4": "--scope asked --ratio 4",
    "M = 8": "--latents 8", "M = 16": "--latents 16", "M = 64": "--latents 64", "elastic": "--latents 8,16,32,64",
    "frozen encoder": "--encoder_rank 0", "rank 16": "--encoder_rank 16", "kd 0.5": "--kd 0.5", "first 0": "--first 0",
    "first 3": "--first 3", "entropy 0.5": "--entropy 0.5", "lr 2x": "--lr 2e-3", "lr 0.5x": "--lr 5e-4",
}


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("--data", default="squad", help="squad (default), synthetic, or the training file")
    p.add_argument("--eval_data", default="squad", help="the same, or the file whose questions are answered")
    p.add_argument("--preset", default="squad", help="recipe of train.py that every cell starts from (default squad)")
    p.add_argument("--samples", type=int, default=400, help="training questions a cell (default 400)")
    p.add_argument("--eval_samples", type=int, default=500, help="questions answered a cell (default 500)")
    p.add_argument("--cells", default=",".join(CELLS), help=f"some of: {', '.join(CELLS)}")
    p.add_argument("--out", default="runs/ablate", help="folder (default runs/ablate)")
    return p.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()  # before the heavy imports, so that --help and typing errors answer at once

from report import Run, markdown_table, paired, percent, read_json
from rows import own_row


def trained(folder):
    """(questions seen, minutes, rows to answer: its own, of an elastic one at each M) of a finished cell, else None."""
    state, config = read_json(folder / "ckpt/last/state.json"), SimpleNamespace(**read_json(folder / "config.json"))
    if not state.get("finished"):
        return None
    at = [f"@{M}" for M in config.latents.split(",")] if "," in config.latents else [""]
    return state["seen"], state["elapsed"] / 60, [own_row(config) + part for part in at]


def run_cell(args, name, minutes):
    """Train and evaluate a cell, as far as that is not done. minutes: for so long; 0: once through the questions."""
    folder = Path(args.out) / (name.replace(" ", "_").replace("=", "") + ("_equal_time" if minutes else ""))
    log(f"== {folder}")
    given = {"preset": args.preset, "data": args.data, "samples": args.samples * (4 if minutes else 1)}
    before = read_json(folder / "config.json") or given
    if changed := [key for key in given if before[key] != given[key]]:
        raise UserError(f"--out {args.out}: {folder.name} was trained with another --{changed[0]}; give another --out")
    if not trained(folder):
        call("train.py", *(f"--{key}={value}" for key, value in given.items()), "--epochs", 1, "--minutes", minutes,
             "--eval_samples", 25, "--eval_every", 0, "--resume", "--out", folder, *CELLS[name].split())
    metrics, rows = read_json(folder / "eval/metrics.json"), trained(folder)[2]
    todo = [row for row in rows if not find_row(metrics, row, metrics.get("lm"))]
    if todo or (metrics["samples"], metrics["dataset"]) != (args.eval_samples, args.eval_data):
        call("eval.py", "--mode", ",".join(todo or rows), "--ckpt", folder / "ckpt" / "best", "--data", args.eval_data,
             "--samples", args.eval_samples)
    return folder


def call(*command):
    done = subprocess.run([sys.executable, *map(str, command)])
    if done.returncode:
        raise UserError(f"`python {' '.join(map(str, command))}` ended with {done.returncode}; mend that, start again")


def table(folders):
    """Markdown table of the cells that are finished; folders: {(cell, whether for the base's time): folder}."""
    found, lines = {key: Run(folder) for key, folder in folders.items()}, []
    for key, run in found.items():
        (name, timed), (seen, minutes, rows) = key, trained(run.folder)
        for row in rows:
            s, base = run.rows[row][0], found.get(("base", False), run)
            gap = "-" if run is base else paired(run, row, base, "latent")
            lines.append([name, f"equal {'time' if timed else 'samples'}", f"{seen:,}", f"{minutes:.1f}", row,
                          f"{s['tokens_read']:.0f}", percent(s["f1"], s["f1_ci95"]), gap,
                          percent(s["em"], s["em_ci95"]), percent(s["first_token_top1"]), f"{s['nll_token']:.2f}"])
    return "\n".join(markdown_table(["cell", "budget", "questions seen", "minutes", "row", "tokens read", "F1",
                                     "- base", "EM", "first-token top-1", "NLL/token"], lines))


def main(args):
    if same_file(args.eval_data, args.data) and args.data not in ("squad", "synthetic"):
        raise UserError(f"--eval_data {args.eval_data} is --data itself; give other questions to measure by")
    cells, folders = [cell.strip() for cell in args.cells.split(",")], {}
    if unknown := [cell for cell in cells if cell not in CELLS]:
        raise UserError(f"--cells {unknown[0]} is unknown; there are {', '.join(CELLS)}")
    for timed in (False, True):
        base = (trained(Path(args.out) / "base") or [0, 0])[1] if timed else 0  # minutes
        for name in cells:
            if not timed or base and abs(trained(folders[name, False])[1] / base - 1) > 0.1:
                folders[name, timed] = run_cell(args, name, base)
                write_atomic(Path(args.out) / "table.md", table(folders) + "\n")
    print(table(folders))


if __name__ == "__main__":
    run_main(lambda: main(args))
