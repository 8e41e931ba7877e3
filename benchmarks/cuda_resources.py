"""What the compiler makes of the CUDA kernels: registers, spills and instructions. Needs no GPU.

Each source is compiled for sm_80 and sm_90. Registers, spilled bytes and static shared memory are
those that ptxas reports. The inner loop of a kernel is the shortest loop that has tensor core
products. Its instructions are the fewest that one turn executes with all these products, which is
the way without mask, dropout and tail. Where a loop is unlike that, there is no figure.

The estimate is of one block of stage 3 of Swin V2-B with windows of 16 at batch 128 on an H100. It
counts the instructions of the loops alone, at the full rate of issue, so it is a lower bound.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks import harness

CUDA = Path(__file__).parents[1] / "swin_moe" / "csrc" / "cuda"
ARCHITECTURES = (80, 90)
FLAGS = ("-O3", "-std=c++17", "-cubin", "-Xptxas", "-v")  # setup.py has the first two
KINDS = ("HMMA", "LDSM", "MUFU", "FFMA", "FMUL", "FADD", "ISETP", "FSEL", "LDG", "LDS", "STG")
TYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}

# An H100 SXM: issue slots of all SMs times the clock, and bytes a second of its memory.
ISSUES = 132 * 4 * 1.755e9
BANDWIDTH = 3.35e12
WINDOWS, HEADS, TOKENS, HEAD_DIM = 128, 16, 256, 32
STRIPS = WINDOWS * HEADS * (TOKENS // 16) * (TOKENS // 32)  # of 16 by 32 scores
ROWS = WINDOWS * HEADS * TOKENS * HEAD_DIM * 2  # bytes of q in bfloat16
PASSES = {"forward": (("forward",), 4 * ROWS), "backward": (("query", "key"), 8 * ROWS)}


class Usage(NamedTuple):
    """What ptxas reports of a kernel: registers of a thread, spilled bytes, static shared bytes."""

    registers: int
    spills: int
    shared: int


class Loop(NamedTuple):
    """Instructions of a kernel's inner loop: all of them, and those of the fastest way."""

    size: int
    fastest: int
    kinds: dict[str, int]


Instructions = list[tuple[int, str]]  # address, text


def nvcc() -> str | None:
    """Return the compiler's path, None if there is none."""
    return shutil.which("nvcc")


def cuobjdump() -> str | None:
    """Return the path of the program that shows instructions; triton brings one along."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin:
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


def compile_cubin(source: Path, architecture: int, folder: Path) -> tuple[dict[str, Usage], Path]:
    """Compile a source; return its kernels' usage by readable name, and the binary.

    Raises:
        RuntimeError: with the compiler's messages.
    """
    cubin = folder / f"{source.stem}.sm_{architecture}.cubin"
    command = [nvcc() or "nvcc", *FLAGS, f"-arch=sm_{architecture}", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile:\n{done.stderr}")
    return usage(done.stderr), cubin


def compile_all(
    sources: Sequence[Path], architectures: Sequence[int], folder: Path
) -> dict[tuple[Path, int], tuple[dict[str, Usage], Path]]:
    """Compile each source for each architecture, two at a time; the arguments are the keys."""
    jobs = [(source, architecture) for source in sources for architecture in architectures]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(lambda job: compile_cubin(*job, folder), jobs), strict=True))


def readable(mangled: str) -> str:
    """Return a kernel's name and template arguments, such as ``key_kernel<bfloat16, 32, true>``."""
    found = re.search(r"\d([a-z][a-z_]*_kernel)(?:I(.*?E?)Ev)?", mangled)
    if found is None:
        return mangled
    words = re.findall(r"6__half|13__nv_bfloat16|Li\d+E|Lb[01]E|f", found[2] or "")
    values = [
        TYPES.get(word) or {"Lb0E": "false", "Lb1E": "true"}.get(word) or word[2:-1]
        for word in words
    ]
    return found[1] + (f"<{', '.join(values)}>" if values else "")


def usage(log: str) -> dict[str, Usage]:
    """Read what ``ptxas -v`` says of each kernel."""
    result = {}
    for part in log.split("Compiling entry function '")[1:]:
        registers = re.search(r"Used (\d+) registers", part)
        assert registers is not None, part
        shared = re.search(r"(\d+) bytes smem", part)
        spills = sum(int(count) for count in re.findall(r"(\d+) bytes spill", part))
        result[readable(part.split("'")[0])] = Usage(
            int(registers[1]), spills, int(shared[1]) if shared else 0
        )
    return result


def disassemble(cubin: Path) -> dict[str, Instructions]:
    """Return the instructions of each kernel of a binary, nothing if no program shows them."""
    program = cuobjdump()
    if program is None:
        return {}
    command = [program, "-sass", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels: dict[str, Instructions] = {}
    current: Instructions = []
    for line in text.splitlines():
        if name := re.search(r"Function : (\S+)", line):
            current = kernels.setdefault(readable(name[1]), [])
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?) ;", line):
            current.append((int(found[1], 16), found[2]))
    return kernels


def inner_loop(instructions: Instructions) -> Loop | None:
    """Return the shortest loop that has all products of a strip, None if there is none."""
    loops = []
    for address, text in instructions:
        back = _target(text)
        if back is not None and back < address:
            body = [one for one in instructions if back <= one[0] <= address]
            products = sum("HMMA" in one[1] for one in body)
            way = _fastest_way(body) if products else []
            if way:
                loops.append((len(body), way))
    if not loops:
        return None
    size, way = min(loops, key=lambda loop: loop[0])
    kinds = Counter(re.sub(r"^@!?U?P\d+ +", "", text).split()[0].split(".")[0] for text in way)
    return Loop(size, len(way), dict(kinds.most_common()))


def _target(text: str) -> int | None:
    found = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
    return int(found[1], 16) if found else None


def _fastest_way(body: Instructions) -> list[str]:
    """Return the instructions of the shortest way from first to last that skips no product."""
    place = {address: i for i, (address, _) in enumerate(body)}
    products = [0]
    for _, text in body:
        products.append(products[-1] + ("HMMA" in text))
    best: list[tuple[int, int] | None] = [None] * len(body)  # length, the one before
    best[0] = (1, -1)
    for i, (_, text) in enumerate(body):
        state = best[i]
        if state is None:
            continue
        target = _target(text)
        conditional = text.startswith("@") or re.search(r"BRA\S* !?U?P\d", text)
        following = [i + 1] if target is None or conditional else []
        if target in place and place[target] > i and products[place[target]] == products[i + 1]:
            following.append(place[target])
        for j in following:
            old = best[j] if j < len(body) else (0, 0)
            if old is None or state[0] + 1 < old[0]:
                best[j] = (state[0] + 1, i)
    way: list[str] = []
    i = len(body) - 1
    while i >= 0:
        reached = best[i]
        if reached is None:
            return []
        way.append(body[i][1])
        i = reached[1]
    return way[::-1]


def cells_of(
    source: Path, architecture: int, kernels: dict[str, Usage], cubin: Path
) -> list[dict[str, object]]:
    """Return a cell for each kernel instance of a compiled source."""
    code = disassemble(cubin)
    cells = []
    for name, used in sorted(kernels.items()):
        loop = inner_loop(code.get(name, []))
        cells.append(
            harness.figure(
                f"{source.stem}: {name}",
                "instructions",
                float(loop.fastest) if loop else None,
                mode=f"sm_{architecture}",
                **used._asdict(),
                total=len(code.get(name, [])),
                loop=loop.size if loop else None,
                kinds=loop.kinds if loop else {},
            )
        )
    return cells


def measure(sources: Sequence[Path], architectures: Sequence[int]) -> list[dict[str, object]]:
    """Return a cell for each kernel instance and architecture."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_all(sources, architectures, Path(folder))
        return [cell for job, made in compiled.items() for cell in cells_of(*job, *made)]


def estimate(cells: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return the least milliseconds of each pass by its instructions, beside the memory's."""
    result = []
    for name, (kernels, size) in PASSES.items():
        count = 0.0
        for kernel in kernels:
            # Before there was a plain instance, one instance did everything.
            names = [f"{kernel}_kernel<bfloat16, {HEAD_DIM}{more}>" for more in (", true", "")]
            found = [
                cell["ours"]
                for cell in cells
                if cell["mode"] == "sm_90" and str(cell["name"]).split(": ")[1] in names
            ]
            count += float(str(found[0])) if found and found[0] is not None else float("nan")
        milliseconds = round(1e3 * count * STRIPS / ISSUES, 4)
        floor = round(1e3 * size / BANDWIDTH, 4)
        more = {"instructions": count, "strips": STRIPS, "memory": floor}
        result.append(harness.figure(name, "ms", milliseconds, mode="estimate", **more))
    return result


def rows_of(cells: list[dict[str, object]], before: dict[tuple[str, str], dict]) -> list[list[str]]:
    """Return the rows of the table; figures of before, if any, come first: 449 → 219."""
    rows = []
    for cell in cells:
        old = before.get((str(cell["name"]).replace(", true>", ">"), str(cell["mode"])), {})
        kinds = cell["kinds"]
        assert isinstance(kinds, dict)
        figures = [
            f"{old[key]:.0f} → {cell[key]:.0f}" if old.get(key) and cell[key] else f"{cell[key]}"
            for key in ("registers", "spills", "shared", "ours")
        ]
        counts = " ".join(f"{kind} {kinds[kind]}" for kind in KINDS if kind in kinds)
        rows.append([str(cell["name"]), str(cell["mode"]), *figures, counts])
    return rows


def main() -> None:
    parser = harness.arguments(__doc__ or "")
    parser.add_argument("--source", type=Path, default=CUDA, help="folder of the sources")
    parser.add_argument("--before", type=Path, help="JSON of an earlier state, to compare with")
    options = parser.parse_args()
    pattern = "window_attention*.cu" if options.quick else "*.cu"
    cells = measure(
        sorted(options.source.glob(pattern)), ARCHITECTURES[-1:] if options.quick else ARCHITECTURES
    )
    earlier = json.loads(options.before.read_text()) if options.before else {}
    old_cells = earlier.get("cells", [])
    before = {(cell["name"], cell["mode"]): cell for cell in old_cells}
    head = ["kernel", "mode", "registers", "spills", "shared", "a strip", "of these"]
    harness.report("instructions of the inner loop", head, rows_of(cells, before))
    bounds = {"after": estimate(cells)} | ({"before": estimate(old_cells)} if before else {})
    for when, passes in bounds.items():
        for one in passes:
            print(
                f"{when}, {one['name']}: {one['instructions']:.0f} instructions a strip, "
                f"at least {one['ours']} ms; memory {one['memory']} ms"
            )
    harness.write_json(options.json, cells, estimate=bounds, before=old_cells)


if __name__ == "__main__":
    main()
