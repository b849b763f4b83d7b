"""
What every script shares: errors of one line, arguments, logs and small files. No torch, so that --help answers at once.
"""
import argparse
import contextlib
import difflib
import json
import os
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None


class UserError(Exception):
    """A mistake that the user can mend. Its text is one line that names the bad value and the fix."""


class Parser(argparse.ArgumentParser):
    """argparse with this project's manners: the docstring as it is, defaults in --help, one line for a mistake."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        if message.startswith("unrecognized arguments: "):
            flag = message.removeprefix("unrecognized arguments: ").split(" ")[0] or "''"
            near = difflib.get_close_matches(flag.split("=")[0], self._option_string_actions, 1)
            message = (f"{flag} is not a flag of {self.prog}; "
                       + (f"did you mean {near[0]}?" if near else "--help lists them all"))
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def first_process():
    """Whether this is the one process, or the first of torchrun's: it alone writes and reports."""
    return os.environ.get("RANK", "0") == "0"


def log(message):
    """One line to stderr from the first process alone: progress goes there, results go to stdout."""
    if first_process():
        print(message, file=sys.stderr, flush=True)


def _quiet(kind, error, trace):
    """Ctrl-C while the imports run, before `run_main`, is one word, too."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _quiet


def run_main(main):
    """Run a script's main(): a UserError, or a file the system refuses, is one line and exit code 2, Ctrl-C 130."""
    try:
        sys.exit(main())
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):  # of a GPU, of a CPU
            raise
        print("error: the device is out of memory; lower --micro_batch (train) or --batch (eval), or take a "
              "smaller model", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def claim(out):
    """Lock a folder for this process and return the open file; the lock goes with the process, however it ends. Raises
    UserError while another process has it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "lock", "a+")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise UserError(f"--out {out} is in use by process {lock.read().strip() or '?'}; wait for it, or give another "
                        "--out") from None
    except OSError:
        pass  # a file system without locks
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def check_counts(args, *names):
    """Raise UserError for a flag of those that is given and is no number of at least 1."""
    for name in names:
        if (value := getattr(args, name)) is not None and not 1 <= value < float("inf"):
            raise UserError(f"--{name} {value} must be a number of at least 1")


def check_own(path, begins, fix):
    """Raise UserError where a page would replace one that this program has not written: it does not begin so."""
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(begins):
        raise UserError(f"{path} is there and of something else; {fix}")


def append_line(path, text):
    """Add a line to a log, on a line of its own even where a killed process or a full disk left half a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as f:
        if f.tell():
            f.seek(-1, os.SEEK_END)
            text = text if f.read(1) == b"\n" else "\n" + text
        f.write((text + "\n").encode("utf-8"))


def read_lines(path):
    """The objects of a .jsonl log, without what a killed process or a full disk left half written."""
    records = []
    if path.exists():
        with open(path, encoding="utf-8") as f:
            for line in f:
                with contextlib.suppress(json.JSONDecodeError):
                    records.append(json.loads(line))
    return records


def read_json(path):
    """What a file holds, or {} where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); write it again or remove it") from None


def find_row(metrics, row, lm):
    """(scores, wall clock in s or None) of a row in a metrics.json, or None where it has no such row."""
    if baseline := metrics.get("embedding_baselines", {}).get(row):
        return baseline["metrics"][lm], baseline.get("wall_clock_sec", {}).get(lm)
    entry = metrics.get(row)
    return (entry[lm], entry.get("wall_clock_sec")) if isinstance(entry, dict) and lm in entry else None


def write_atomic(path, text):
    """Write text under a temporary name, then rename: a reader sees the old file or the new one, never half. Raises
    OSError, naming the file, and leaves nothing behind."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written ({error})") from None
