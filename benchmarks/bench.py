"""The benchmark: ratios whose two figures are measured in turns on a quiet machine, kept and rendered.

    make bench                       # every row, about an hour on two cores
    make bench ROW=padding           # one; several: ROW=rollout,learner

A row (`benchmarks/rows.py`) divides figures of sides (`benchmarks/sides.py`). A repeat measures every side that is
wanted once, each in a process of its own, and makes one ratio a row of it; median and range are of five repeats.
Nothing is measured while another process takes more than 5 % of the machine. Results are kept in
benchmarks/results.json, and docs/performance.md and its picture are made of them; so are those of a run that was
interrupted (Ctrl-C), with the number of its repeats.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks import page, workload
from benchmarks.rows import ROWS, Row
from cluster.rundir.environment import write_environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results.json"
REPEATS, BUSY, QUIET_S, SIDE_S = 5, 0.05, 120.0, 900.0
TRL = ROOT / ".venv-trl"

Times = Mapping[int, tuple[str, float]]
"""Name and processor seconds so far, by process id."""


class NotMeasured(RuntimeError):
    """A side, or the machine, does not allow a measurement; the text says why."""


def times() -> Times:
    """Those of all processes but this one and its children."""
    own = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    found = {}
    for process in psutil.process_iter(["name", "cpu_times"]):
        if process.pid not in own and (used := process.info["cpu_times"]):
            found[process.pid] = (process.info["name"], used.user + used.system)
    return found


def busy(look: Callable[[], Times] = times, seconds: float = 1.0) -> list[str]:
    """Other processes that take more than 5 % of the machine, as "name (share)"."""
    before, started = look(), time.monotonic()
    time.sleep(seconds)
    after, passed = look(), time.monotonic() - started
    shares = {
        pid: (name, (used - before[pid][1]) / passed / (os.cpu_count() or 1))
        for pid, (name, used) in after.items()
        if pid in before
    }
    return [f"{name} (process {pid}, {share:.0%})" for pid, (name, share) in shares.items() if share > BUSY]


def await_quiet(wait_s: float = QUIET_S, look: Callable[[], Times] = times, seconds: float = 1.0) -> None:
    """Return when no other process works. Raises NotMeasured that names them after `wait_s`."""
    end = time.monotonic() + wait_s
    while others := busy(look, seconds):
        if time.monotonic() > end:
            raise NotMeasured(
                f"other processes use this machine: {', '.join(others)}. Remedy: end them, or wait for them, and run "
                "again; the repeats before are kept"
            )


def trl_python() -> Path:
    """Python of an environment that has the product's packages and TRL 1.12.0 before them, made if it is not there."""
    python = TRL / "bin" / "python"
    if not list(TRL.glob("lib/*/site-packages/trl")):
        packages = next((ROOT / ".venv" / "lib").glob("python*/site-packages"))
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
        try:
            subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", TRL], check=True)
            own = TRL / "lib" / packages.parent.name / "site-packages"
            (own / "product.pth").write_text(f"{packages}\n")
            subprocess.run([*pip, "-r", ROOT / "benchmarks" / "trl.txt"], check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            raise NotMeasured(f"TRL could not be installed, is there no network? {error.stderr}") from error
    return python


def command(side: str, folder: Path) -> list[str]:
    """What measures a side. Raises NotMeasured where TRL cannot be installed."""
    if side == "trl":
        return [str(trl_python()), "benchmarks/trl_ppo.py", str(folder)]
    return [sys.executable, "-m", "benchmarks.sides", side, str(folder)]


def figures(command: Sequence[str]) -> dict[str, float]:
    """The last line of JSON that a command prints. Raises NotMeasured with the end of its output."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | str = process.wait(SIDE_S)
        except subprocess.TimeoutExpired:
            code = f"nothing for {SIDE_S:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        output.seek(0)
        lines = output.read().splitlines()
    found = next((line for line in reversed(lines) if line.startswith("{")), None)
    if code or not found:
        raise NotMeasured(f"{' '.join(command)} failed ({code}):\n" + "\n".join(lines[-15:]))
    return json.loads(found)


def repeat(
    rows: Sequence[Row],
    side: Callable[[str], Mapping[str, float]],
    repeats: int = REPEATS,
    quiet: Callable[[], None] = await_quiet,
) -> Iterator[dict[str, tuple[float, float] | str]]:
    """Value and denominator of every row, once for each repeat; or why there are none.

    A side that fails is not tried again. Raises NotMeasured when the machine is not quiet.
    """
    failed: dict[str, str] = {}
    for _ in range(repeats):
        found: dict[str, Mapping[str, float]] = {}
        for name in dict.fromkeys(name for row in rows for name in row.sides):
            if name not in failed:
                quiet()
                try:
                    found[name] = side(name)
                except NotMeasured as error:
                    failed[name] = str(error)
        quiet()
        yield {
            row.name: next((failed[name] for name in row.sides if name in failed), None) or row.ratio(found)
            for row in rows
        }


def record(pairs: Sequence[tuple[float, float]], environment: Mapping[str, Any]) -> dict[str, Any]:
    """A row's result: the ratios, what they were made of, and where and when."""
    values, denominators = zip(*pairs, strict=True)
    return {
        "ratios": [value / denominator for value, denominator in pairs],
        "value": statistics.median(values),
        "denominator": statistics.median(denominators),
        **environment,
    }


def environment() -> dict[str, Any]:
    """Machine, versions, date and commit."""
    with tempfile.TemporaryDirectory() as name:
        write_environment(Path(name), ["make", "bench"])
        found = json.loads((Path(name) / "environment.json").read_text())
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    keys = ("processor", "cores", "memory_gib")
    return {
        "date": found["date"][:10],
        "commit": commit or "unknown",
        "machine": {key: found["machine"][key] for key in keys},
        "versions": found["versions"],
    }


def main() -> int:
    """Measure the rows that are asked for, keep them and render the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="names, with commas between: " + ", ".join(row.name for row in ROWS))
    asked = parser.parse_args().rows
    names = asked.split(",") if asked else [row.name for row in ROWS]
    if unknown := set(names) - {row.name for row in ROWS}:
        parser.error(f"no row is called {', '.join(sorted(unknown))}; there are {', '.join(row.name for row in ROWS)}")
    rows = [row for row in ROWS if row.name in names]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    where, pairs, failures = environment(), {row.name: [] for row in rows}, {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            await_quiet()
            workload.make(Path(folder))
            for number, found in enumerate(repeat(rows, lambda name: figures(command(name, Path(folder))))):
                for name, pair in found.items():
                    if isinstance(pair, str):
                        failures[name] = pair
                    else:
                        pairs[name].append(pair)
                        print(f"{number + 1}/{REPEATS} {name:10} {pair[0] / pair[1]:.3f}", flush=True)
    except (NotMeasured, KeyboardInterrupt) as error:
        failures = dict.fromkeys(names, str(error) or "it was interrupted") | failures
    for row in rows:
        if row.name in failures:
            print(f"{row.name} has {len(pairs[row.name])} repeats: {failures[row.name]}", file=sys.stderr)
        if not pairs[row.name]:
            continue
        before, results[row.name] = results.get(row.name), record(pairs[row.name], where)
        was = f", before {statistics.median(before['ratios']):.2f}" if before else ""
        print(f"{row.name:10} {page.figure(results[row.name])}, goal {row.goal}{was}")
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    page.write(ROOT / "docs", ROWS, results)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
