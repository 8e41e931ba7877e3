"""The JSON of a first contact: the steps and what they found.

Written after each step, so that an interrupted script leaves its results, and read at the next
start, so that a step that passed is not run again. Needs nothing but Python.

    python -m benchmarks.first_contact.record passed|add|finish --out FILE ...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

NOT_RUN = 77  # a step's exit code that says: something is missing here, see the last line
TIMED_OUT = (124, 137)  # of `timeout`
PLAIN = ("versions", "machine", "cells", "ceilings")  # keys of a step's JSON with a place above
Content = dict[str, Any]


def read(path: Path) -> Content:
    """Return the content of a file; empty if there is none."""
    if not path.is_file():
        return {"versions": {}, "machine": {}, "steps": {}, "cells": []}
    content: Content = json.loads(path.read_text())
    return content


def write(path: Path, content: Content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def outcome_of(code: int) -> str:
    """Return the outcome that an exit code means."""
    if code in TIMED_OUT:
        return "timed out"
    return {0: "passed", NOT_RUN: "not run"}.get(code, "failed")


def passed(content: Content, step: str, key: str) -> bool:
    """Return whether a step passed before, with this card and this library."""
    known = content["steps"].get(step, {})
    return known.get("outcome") == "passed" and known.get("key") == key


def add(
    content: Content,
    step: str,
    key: str,
    code: int,
    seconds: float,
    reason: str,
    found: Content,
) -> str:
    """Record a step in place of its earlier record, and return its outcome.

    Args:
        key: card and library. reason: why it did not pass. found: what the step wrote.
    """
    outcome = outcome_of(code)
    known = content["steps"].get(step, {})
    if outcome == "not run" and known.get("key") == key and known.get("outcome") != "not run":
        return outcome  # an attempt says more than none
    record: Content = {"outcome": outcome, "seconds": round(seconds, 1), "key": key}
    if outcome != "passed":
        record["reason"] = f"at its limit; {reason}" if outcome == "timed out" else reason
    record |= {name: value for name, value in found.items() if name not in PLAIN}
    content["steps"][step] = record
    content["versions"] |= found.get("versions", {})
    content["machine"] |= found.get("machine", {})
    if "ceilings" in found:
        content["ceilings"] = content.get("ceilings", {}) | found["ceilings"]
    others = [cell for cell in content["cells"] if cell.get("step") != step]
    content["cells"] = others + [{"step": step, **cell} for cell in found.get("cells", [])]
    return outcome


def summary(content: Content) -> str:
    """Return the tables as text."""
    lines = [f"{'step':<24} {'outcome':<10} {'seconds':>7}"]
    for step, record in content["steps"].items():
        line = f"{step:<24} {record['outcome']:<10} {record['seconds']:>7.0f}"
        lines.append(f"{line}  {record.get('reason', '')}".rstrip())
    kernels = content["steps"].get("trials", {}).get("kernels", {})
    if kernels:
        lines += ["", f"{'kernel, tried as a run tries it':<40} {'right':<5} {'speedup':>7}"]
    lines += [
        f"{name:<40} {'yes' if tried['right'] else 'no':<5} {tried['speedup']:>7.1f}"
        f"  {tried['reason']}".rstrip()
        for name, tried in kernels.items()
    ]
    if content["cells"]:
        lines += ["", f"{'cell':<75} {'ours':>9} {'best peer':>9}  which (speedup)"]
    lines += [_cell_line(cell) for cell in content["cells"]]
    return "\n".join(lines)


def _cell_line(cell: Content) -> str:
    name = f"{cell['step']}: {cell['name']} {cell['dtype']} {cell['mode']}"
    if cell["ours"] is None:
        return f"{name:<75} failed: {cell.get('error', '')}"
    line = f"{name:<75} {cell['ours']:>9.4g}"
    peers = cell["peers"]
    if not peers:
        return f"{line} {'':>9}  {cell['unit']}"
    best = (min if cell["unit"] == "ms" else max)(peers, key=peers.__getitem__)
    return f"{line} {peers[best]:>9.4g}  {cell['unit']}, {best} ({cell['speedup']}x)"


def last_line(log: Path, offset: int) -> str:
    """Return the last line of a log that is not empty, from a byte on."""
    if not log.exists():
        return ""
    text = log.read_bytes()[offset:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["passed", "add", "finish"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--step", default="")
    parser.add_argument("--key", default="")
    parser.add_argument("--code", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--reason", default="")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--offset", type=int, default=0)
    parser.add_argument("--found", type=Path)
    parser.add_argument("--rehearsal", action="store_true")
    options = parser.parse_args()
    content = read(options.out)
    if options.what == "passed":
        raise SystemExit(0 if passed(content, options.step, options.key) else 1)
    if options.what == "finish":
        print(summary(content))
        bad = any(r["outcome"] in ("failed", "timed out") for r in content["steps"].values())
        raise SystemExit(1 if bad else 0)
    if content.get("rehearsal", options.rehearsal) != options.rehearsal:
        content = read(Path())  # toy figures and real ones do not mix
    content |= {"rehearsal": options.rehearsal, "key": options.key}
    reason = options.reason or (last_line(options.log, options.offset) if options.log else "")
    found = read(options.found) if options.found and options.found.exists() else {}
    outcome = add(content, options.step, options.key, options.code, options.seconds, reason, found)
    write(options.out, content)
    print(f"    {outcome} in {options.seconds:.0f} s: {reason}")


if __name__ == "__main__":
    main()
