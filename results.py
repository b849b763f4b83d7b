"""
Write the tables of README.md and RESULTS.md from the files of preserved runs, so that they cannot go stale.

    python results.py

Where a text says <!-- runs: latent@NAME truncated_lora@OTHER --> ... <!-- end -->, what stands between the two becomes
the commands of those runs of preserved_data and a table of those rows; `table:` in place of `runs:` leaves out the
commands and some columns, `sizes:` has a line for each run and a column for each M, `bars:` draws their F1, `kinds:`
tells it by kind of answer; `pairs:` subtracts the second from the first, the fourth from the third, and so on.
Differences are of the same questions; in a column of a table, to its first row.
"""
import re
from dataclasses import asdict
from pathlib import Path

from common import Parser, UserError, run_main, write_atomic


def parse_args(argv=None):
    return Parser(__doc__).parse_args(argv)


if __name__ == "__main__":
    parse_args()  # before the heavy imports, so that --help and typing errors answer at once

from report import COLUMNS, Run, both_answered, cells, difference, eval_command, markdown_table, short, spread
from rows import ROWS, f1_score, interval, split_row
from train import PRESETS, Config

RUNS = Path(__file__).parent / "preserved_data"
# Flags that were null and are gone, as a run that did not use them has them.
GONE = {"ramp": 0.0, "continuations": 0, "more": 0.3}
SIZES = (4, 8, 16, 32, 64, 128)
KINDS = ("runs", "table", "sizes", "bars", "kinds", "pairs")
SHORT = ["Run", "Reads", "Questions trained on", "n", "F1", "EM", "NLL/token", "Tokens read"]


def train_command(config):
    """The command line that a run's config.json stands for: what differs from its preset."""
    preset = config["preset"]
    usual = asdict(Config(**{"preset": preset, **PRESETS[preset]}))
    config = {name: value for name, value in config.items() if GONE.get(name) != value}
    idle = {"preset", "out", "resume", "device"}
    shown = lambda value: f"{value:g}" if isinstance(value, float) else value
    flags = [f"--{name}" + ("" if value is True else f" {shown(value)}") for name, value in config.items()
             if name not in idle and value != usual.get(name)]
    return " ".join([f"python train.py --preset {preset}", *flags, f"--out {config['out']}"])


def bar(run, row):
    """One row's F1 as a line, a block for two percent."""
    s = run.scores(row)[0]
    what = f"{ROWS[split_row(row)[0]].heading.strip('*')} ({s['tokens_read']:.0f} tokens)"
    return f"{what:<42}{'█' * round(50 * s['f1'])} {100 * s['f1']:.1f}"


DATE = re.compile(r"\b(1\d{3}|20\d\d)s?\b|century|"
                  r"\b(January|February|March|April|June|July|August|September|October|November|December)\b|"
                  r"\d May\b|\bMay \d")


def kind_of(answer):
    """What a gold answer is, by its letters: a date, a number, a name (an upper-case letter) or other words."""
    kinds = {"date": DATE.search(answer), "number": re.search(r"\d", answer), "name": re.search(r"[A-Z]", answer)}
    return next((kind for kind, found in kinds.items() if found), "other words")


def by_kind(pairs):
    """The lines of a table: a row's F1 on the questions of each kind."""
    kinds, rows = ("date", "number", "name", "other words"), []
    for row, name in pairs:
        f1 = {kind: [] for kind in kinds}
        for record in Run(RUNS / name).predictions:
            if row in record:
                f1[kind_of(record["golds"][0])].append(f1_score(record[row], record["golds"]))
        cell = lambda f1: f"{spread(f1)}, n = {len(f1)}" if f1 else "-"
        rows.append([short(name), row, *(cell(f1[kind]) for kind in kinds)])
    return markdown_table(["Run", "Row", *kinds], rows)


def by_pair(pairs, runs):
    """The lines of a table: (row, run) of every two less the other, in F1 of the questions that both answered."""
    rows, at = [], lambda row, name: "`" + short(name) + "`" + (f" at {M}" if (M := row.partition("@")[2]) else "")
    for (row, name), (other_row, other) in zip(pairs[::2], pairs[1::2], strict=True):
        mine, theirs = both_answered(runs[name], row, runs[other], other_row).T
        if not len(mine):
            raise UserError(f"pairs: {row}@{name} and {other_row}@{other} have no question in common")
        low, high = interval(mine, theirs)
        rows.append([f"{at(row, name)} - {at(other_row, other)}", f"{len(mine):,}",
                     f"{mine.mean():.1f} - {theirs.mean():.1f}", difference(mine, theirs),
                     f"{mine.mean() / theirs.mean():.2f} [{low:.2f}, {high:.2f}]"])
    return markdown_table(["Two runs", "n", "F1", "Difference", "Share"], rows)


def by_size(found):
    """The lines of a table: of the cells of rows at several M a line for each run, F1 and NLL per token at each M."""
    about, lines = ("Run", "Row", "Questions trained on", "n"), {}
    for row in found:
        name, _, M = row["Row"].partition("@")
        key = tuple((row | {"Row": name})[column] for column in about)
        lines.setdefault(key, {})[int(M)] = f"{row['F1']}, {row['NLL/token']}"
    return markdown_table([*about, *(f"{M}: F1, NLL" for M in SIZES)],
                          [[*key, *(line.get(M, "-") for M in SIZES)] for key, line in lines.items()])


def block(kind, names, printed=()):
    """What stands between two marks: names, a list of ROW@RUN. printed: lines that stand further above, which is where
    a run is trained."""
    pairs = [name.rpartition("@")[::2] for name in names]
    if kind == "kinds":
        return "\n".join(by_kind(pairs))
    runs = {name: Run(RUNS / name) for _, name in pairs}
    if kind == "bars":
        return "\n".join(["```", *(bar(runs[name], row) for row, name in pairs), "```"])
    if kind == "pairs":
        return "\n".join(by_pair(pairs, runs))
    if kind == "sizes":
        pairs = [(f"{row}@{M}", name) for row, name in pairs for M in SIZES if f"{row}@{M}" in runs[name].rows]
        if not pairs:
            raise UserError(f"sizes: {' '.join(names)}: none was evaluated at an M of {', '.join(map(str, SIZES))}")
    columns, commands = SHORT if kind == "table" else COLUMNS, []
    first = runs[pairs[0][1]], pairs[0][0]
    found = [cells(runs[name], row, first) for row, name in pairs]
    if kind in ("runs", "sizes"):
        of = lambda name: [row for row, theirs in pairs if theirs == name]
        lines = [[train_command(run.config), eval_command(run, of(name), f"{run.config['out']}/ckpt/best")]
                 for name, run in runs.items()]
        commands = [line for line in dict.fromkeys(sum(lines, [])) if line not in printed]
        commands = commands and ["", "<details><summary>Commands</summary>", "", "```", *commands, "```", "",
                                 "</details>"]
    if kind == "sizes":
        return "\n".join([*by_size(found), *commands])
    if kind == "table":  # is read in two minutes
        found = [row | {"EM": row["EM"].split(" ")[0]} for row in found]
    return "\n".join([*markdown_table(columns, [[row[c] for c in columns] for row in found]), *commands])


def renewed(text):
    """The text with every marked table written anew."""
    kind, printed = "|".join(KINDS), set()

    def anew(m):
        made = block(m[2], m[3].split(), printed)
        printed.update(made.split("\n"))
        return f"{m[1]}\n{made}\n\n{m[4]}"
    return re.sub(rf"(<!-- ({kind}): ([^\n]*?) -->\n)(?:(?!<!-- (?:{kind}):).)*?(<!-- end -->)", anew, text,
                  flags=re.DOTALL)


def main():
    for name in ("README.md", "RESULTS.md"):
        path = Path(__file__).parent / name
        write_atomic(path, renewed(path.read_text(encoding="utf-8")))
    print("written: README.md, RESULTS.md")


if __name__ == "__main__":
    run_main(main)
