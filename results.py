"""
Write the tables of README.md and RESULTS.md from the files of preserved runs, so that they cannot go stale.

    python results.py            # write both anew
    python results.py --check    # exit code 1 where one of them is not what the runs say

Where a text says <!-- runs: latent@NAME truncated_lora@OTHER --> ... <!-- end -->, what stands between the two becomes
the commands of those runs of preserved_data and a table of those rows; `table:` in place of `runs:` leaves out the
commands and some columns. Differences are to the first row, question by question.
"""
import re
from dataclasses import asdict
from pathlib import Path

from common import Parser, UserError, run_main, write_atomic


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("--check", action="store_true", help="change nothing, say which files are stale")
    p.add_argument("files", nargs="*", default=["README.md", "RESULTS.md"], help="default: README.md RESULTS.md")
    return p.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()  # before the heavy imports, so that --help and typing errors answer at once

from report import Run, markdown_table, paired, percent
from rows import ROWS
from train import PRESETS, Config

RUNS = Path(__file__).parent / "preserved_data"
SHORT = ("Reads", "Questions trained on", "F1", "EM", "NLL/token", "Tokens read")
LONG = ("Run", "Row", "Questions trained on", "n", "F1", "F1 - first row", "EM", "NLL/token", "First token",
        "Tokens read", "Commit")


def train_command(config):
    """The command line that a run's config.json stands for: what differs from its preset."""
    preset = config.get("preset", "default")
    usual = asdict(Config(**{"preset": preset, **PRESETS[preset]}))
    idle = {"preset", "out", "resume", "device"}
    shown = lambda value: f"{value:g}" if isinstance(value, float) else value
    flags = [f"--{name} {shown(value)}" for name, value in config.items()
             if name in usual and name not in idle and value != usual[name]]
    return " ".join([f"python train.py --preset {preset}", *flags, f"--out {config['out']}"])


def eval_command(run, rows):
    ckpt = f"--ckpt {run.config['out']}/ckpt/best " if run.config else "--lm {run.lm} "
    return (f"python eval.py --mode {','.join(rows)} {ckpt}--data {Path(run.metrics['dataset']).name} --samples "
            f"{run.metrics['samples']}")


def cells(run, row, first):
    """{column: text} of one row of a run; first: the (run, row) that it is compared with."""
    if row not in run.rows:
        raise UserError(f"{run.folder} has no row {row}; it has {', '.join(run.rows)}")
    s, about = run.rows[row][0], ROWS[row.partition("@")[0]]
    at = row.partition("@")[2]
    return {
        "Run": re.sub(r"^[\d-]+_smollm2_", "", run.name), "Row": row,
        "Reads": about.heading + (f" ({at})" if at else ""),
        "Questions trained on": f"{run.end.get('samples_seen', 0):,}" if about.trained else "-",
        "n": f"{run.metrics['samples']:,}", "F1": percent(s["f1"], s["f1_ci95"]),
        "F1 - first row": paired(run, row, *first), "EM": percent(s["em"], s["em_ci95"]),
        "NLL/token": f"{s['nll_token']:.2f}", "First token": percent(s["first_token_top1"]),
        "Tokens read": f"{s['tokens_read']:.0f}", "Commit": (run.metrics.get("git_commit") or "-")[:7]}


def block(kind, names):
    """What stands between two marks: names, a list of ROW@RUN."""
    pairs = [name.rpartition("@")[::2] for name in names]
    runs = {name: Run(RUNS / name) for _, name in pairs}
    columns, commands = SHORT if kind == "table" else LONG, []
    first = runs[pairs[0][1]], pairs[0][0]
    found = [cells(runs[name], row, first) for row, name in pairs]
    if kind == "runs":
        of = lambda name: [row for row, theirs in pairs if theirs == name]
        commands = ["```", *(line for name, run in runs.items()
                             for line in (train_command(run.config), eval_command(run, of(name)))), "```", ""]
    return "\n".join([*commands, *markdown_table(list(columns), [[row[c] for c in columns] for row in found])])


def renewed(text):
    """The text with every marked table written anew."""
    return re.sub(r"(<!-- (runs|table): (.*?) -->\n).*?(<!-- end -->)",
                  lambda m: f"{m[1]}\n{block(m[2], m[3].split())}\n\n{m[4]}", text, flags=re.DOTALL)


def main(args):
    stale = []
    for name in args.files:
        path = Path(__file__).parent / name
        text = path.read_text(encoding="utf-8")
        if (new := renewed(text)) != text:
            stale.append(name)
            if not args.check:
                write_atomic(path, new)
    print(f"{'stale' if args.check else 'written'}: {', '.join(stale)}" if stale else "nothing has changed")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    run_main(lambda: main(args))
