"""Compile every Triton kernel for GPUs that this machine does not have, and read its cost from the machine code.

    python -m vimscale.kernels.aot --target sm_90 --dtype bfloat16 --json rows.json

Prints one row per kernel, dtype, preset width and target: registers, spills, shared memory, the instructions of the
main loop, a roofline, and how far ahead of their use the loop loads. Instructions are what a 32-lane warp issues for
one token of 32 channels; times are clocks of one multiprocessor for the same, if nothing waits for a load. "3/19 by
408, rest 86" means that 3 of 19 loads are for the next iteration, that a warp issues at least 408 instructions before
it needs one of them, and 86 (the median) before it needs one of the others.

It cannot run in a process that interprets kernels: Triton decides at its first import.
"""

import argparse
import functools
import importlib
import json
import os
import re
import statistics
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .cases import PRESET_WIDTHS
from .compile_case import CompileCase

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Device:
    """A compilation target, and what one of its multiprocessors does per clock."""

    backend: str
    arch: int | str
    lanes: int
    """Lanes of a warp."""
    issue: int
    """Lanes that can start an instruction."""
    memory: float
    """Bytes to and from device memory: bandwidth / (multiprocessors x clock)."""
    exponentials: int = 16


# A100 80 GB 2.0 TB/s; H200 4.8 TB/s; B200 8 TB/s; MI300X 5.3 TB/s (four 16-lane units per compute unit)
DEVICES = {
    "sm_80": Device("cuda", 80, lanes=32, issue=128, memory=2.0e12 / (108 * 1.41e9)),
    "sm_90": Device("cuda", 90, lanes=32, issue=128, memory=4.8e12 / (132 * 1.755e9)),
    "sm_100": Device("cuda", 100, lanes=32, issue=128, memory=8.0e12 / (148 * 1.85e9)),
    "gfx942": Device("hip", "gfx942", lanes=64, issue=64, memory=5.3e12 / (304 * 2.1e9)),
}

# the kinds of instructions in the table; SASS names first, then GCN
_KINDS = {
    "matrix": r"H(G)?MMA|UTC\w*MMA|v_s?mfma",
    "exponential": r"MUFU|v_(exp|log|rcp|rsq|sqrt)",
    "arithmetic": r"F(FMA|MUL|ADD)2?$|v_(pk_)?(fma|fmac|mul|add|sub)_f32",
    "shuffle": r"SHFL|ds_(bpermute|swizzle|permute)|v_permlane",
    "global": r"LDG|STG|(global|flat|buffer)_(load|store)",
    "shared": r"LDSM?$|STSM?$|ds_(read|write)",
    "spill": r"LDL|STL|scratch_(load|store)",
}


@dataclass(frozen=True)
class Lead:
    """How many instructions a warp issues between a load and the first that needs its result, and whether the load is
    for the next iteration: nothing computes with it in this one, which may still move or unpack it at its end.
    """

    instructions: int
    ahead: bool


@dataclass(frozen=True)
class Anatomy:
    """What the compiler made of a kernel. `spilled` is in bytes per lane; `loop` counts the main loop by kind."""

    registers: int
    spilled: int
    shared: int
    loop: dict[str, int]
    leads: tuple["Lead", ...] = ()
    """One for each load from global memory in the main loop; none for GCN."""


@dataclass(frozen=True)
class Row:
    """A kernel on a target. Instructions and clocks are for one token of 32 channels, in one direction."""

    target: str
    kernel: str
    dtype: str
    width: int
    registers: int
    spilled: int
    shared: int
    issued: float
    mix: dict[str, float]
    exponential_clocks: float
    issue_clocks: float
    memory_clocks: float
    floor_clocks: float
    """Time of the exponentials that the mathematics needs; 0 if it needs none."""
    bound: str
    ratio: float | None
    """Issue clocks over the floor."""
    loads: int
    """Loads from global memory per iteration; 0 for GCN, where they are not traced."""
    loads_ahead: int
    """Those that the next iteration uses."""
    lead: int | None
    """Least instructions between such a load and its use."""
    lead_of_rest: int | None
    """Median instructions between any other load and its use."""


def examine(case: CompileCase, target: str, dtype: torch.dtype, width: int) -> Row:
    """Compile one case for one target, and count its instructions."""
    device = DEVICES[target]
    anatomy = _anatomy(_Source(case), target)
    warps = case.options["num_warps"]
    scale = warps * 32 / (case.tokens * case.channels)  # from the loop's count to one token of 32 channels
    mix = {kind: round(count * scale, 2) for kind, count in anatomy.loop.items()}
    issued = sum(anatomy.loop.values()) * scale
    clocks = {
        "exponential": anatomy.loop["exponential"] * scale * device.lanes / device.exponentials,
        "issue": issued * device.lanes / device.issue,
        "memory": case.bytes * 32 / device.memory,
    }
    floor = case.exponentials * 32 / device.exponentials
    ahead, rest = ([each.instructions for each in anatomy.leads if each.ahead is which] for which in (True, False))
    return Row(
        target=target, kernel=case.name, dtype=str(dtype).removeprefix("torch."), width=width,
        registers=anatomy.registers, spilled=anatomy.spilled, shared=anatomy.shared, issued=round(issued, 1), mix=mix,
        exponential_clocks=round(clocks["exponential"], 1), issue_clocks=round(clocks["issue"], 1),
        memory_clocks=round(clocks["memory"], 1), floor_clocks=floor, bound=max(clocks, key=lambda name: clocks[name]),
        ratio=round(clocks["issue"] / floor, 2) if floor else None,
        loads=len(anatomy.leads), loads_ahead=len(ahead), lead=min(ahead, default=None),
        lead_of_rest=statistics.median_low(rest) if rest else None,
    )  # fmt: skip


def cases(dtype: torch.dtype, width: int, target: str) -> list[CompileCase]:
    """All launches of the *_triton modules next to this one, on `target`, for a model of inner width `width`. fp16 also
    includes the LARGE forms, whose offsets are the same in every dtype.
    """
    names = sorted(path.stem for path in Path(__file__).parent.glob("*_triton.py"))
    modules = [importlib.import_module(f".{name}", __package__) for name in names]
    usual = [case for module in modules for case in module.compile_cases(dtype, width, target)]
    if dtype != torch.float16:
        return usual
    large = [
        replace(case, variant=f"{case.variant}_large", constexprs={**case.constexprs, "LARGE": True})
        for case in usual
        if "LARGE" in case.constexprs
    ]
    return usual + large


class _Source:
    """A case as the compiler sees it, so that widths that compile to the same code are compiled once."""

    def __init__(self, case: CompileCase):
        self.case = case
        self._key = (
            case.kernel, tuple(case.signature.items()), tuple(case.constexprs.items()), tuple(case.options.items()),
            case.loose,
        )  # fmt: skip

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Source) and self._key == other._key


@functools.cache
def _anatomy(source: _Source, target: str) -> Anatomy:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: this process interprets kernels; unset it to compile them")
    case, device = source.case, DEVICES[target]
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, (name, kind) in enumerate(case.signature.items())
        if kind.startswith(("*", "i")) and name not in case.loose
    }
    code = triton.compile(
        ASTSource(fn=case.kernel, signature=case.signature, constexprs=case.constexprs, attrs=aligned),
        target=GPUTarget(device.backend, device.arch, device.lanes),
        options=case.options,
    )
    return _of_gcn(code) if device.backend == "hip" else _of_sass(code)


def _of_sass(code: Any) -> Anatomy:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(code.asm["cubin"])
        cubin.flush()

        def dump(what: str) -> str:
            return subprocess.run([tool, what, cubin.name], capture_output=True, text=True, check=True).stdout

        usage, listing = dump("--dump-resource-usage"), dump("--dump-sass")
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    # /*0a30*/  @!P0 FFMA.FTZ R1, R2, R3, R4 ;
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)([^;]*);", listing)
    addresses = [int(address, 16) for address, _, _ in found]
    jumps = [
        (int(target[1], 16), address)
        for address, (_, name, rest) in zip(addresses, found, strict=True)
        if name == "BRA" and (target := re.search(r"0x([0-9a-f]+)", rest))
    ]
    first, last = _longest_loop(jumps, addresses[-1])
    body = [
        (name, rest)
        for address, (_, name, rest) in zip(addresses, found, strict=True)
        if first <= address <= last and name != "NOP"
    ]
    leads = tuple(_leads(body, last < addresses[-1]))
    return Anatomy(registers, stack + local, code.metadata.shared, _count(name for name, _ in body), leads)


def _leads(body: list[tuple[str, str]], loops: bool) -> Iterator[Lead]:
    """What follows each load in `body`, which starts again at its end if it `loops`."""
    end = len(body)
    read = [_registers_read(name, rest) for name, rest in body] * (1 + loops)

    def reader(after: int, registers: set[int]) -> int:
        return next((i for i in range(after + 1, len(read)) if registers & read[i]), len(read))

    for position, (name, rest) in enumerate(body):
        if name == "LDG":
            first = user = reader(position, _result(rest))
            while user < end and body[user][0] in ("MOV", "PRMT", "SHF"):
                user = reader(user, _result(body[user][1]))
            yield Lead(first - position - 1, loops and user >= end)


def _result(rest: str) -> set[int]:
    """The registers that an instruction writes, from what follows its name."""
    kind, first = re.match(r"(\S*)\s+R(\d+)", rest).groups()  # type: ignore[union-attr]
    return set(range(int(first), int(first) + _width(kind)))


def _registers_read(name: str, rest: str) -> set[int]:
    kind, _, text = rest.partition(" ")
    operands = text.split(",")
    stores = name.startswith(("ST", "RED", "ATOM"))
    registers = set[int]()
    # the first operand is the result, which a store has none of
    for operand in operands if stores else operands[1:]:
        for number, suffix in re.findall(r"(?<![A-Z])R(\d+)((?:\.\w+)*)", operand):
            pair = ".64" in suffix or name in ("FADD2", "FMUL2", "FFMA2")
            pair |= ".WIDE" in kind and operand is operands[-1]
            width = _width(kind) if stores and "[" not in operand else 1 + pair
            registers.update(range(int(number), int(number) + width))
    return registers


def _width(kind: str) -> int:
    """Registers that a load or a store of this kind moves per lane."""
    return 4 if ".128" in kind else 2 if ".64" in kind else 1


def _of_gcn(code: Any) -> Anatomy:
    listing = code.asm["amdgcn"]

    def fact(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", listing)[1])  # type: ignore[index]

    labels: dict[str, int] = {}
    jumps: list[tuple[int, int]] = []
    instructions: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\t([svdgbf]\w*_\w+)(?:\s+(\.LBB\w+))?", line):
            if instruction[2] in labels:
                jumps.append((labels[instruction[2]], len(instructions)))
            instructions.append(instruction[1])
    first, last = _longest_loop(jumps, len(instructions) - 1)
    spilled = 4 * (fact("vgpr_spill_count") + fact("sgpr_spill_count"))
    return Anatomy(fact("vgpr_count"), spilled, code.metadata.shared, _count(instructions[first : last + 1]))


def _longest_loop(jumps: list[tuple[int, int]], end: int) -> tuple[int, int]:
    """The backward jump (target, origin) that spans the most code; the entire program if there is none."""
    backward = [(target, origin) for target, origin in jumps if target < origin]
    return max(backward, key=lambda jump: jump[1] - jump[0], default=(0, end))


def _count(instructions: Any) -> dict[str, int]:
    counts = Counter(
        next((kind for kind, pattern in _KINDS.items() if re.match(pattern, name)), "rest") for name in instructions
    )
    return {kind: counts[kind] for kind in (*_KINDS, "rest")}


def _ahead(row: Row) -> str:
    rest = "" if row.lead_of_rest is None else f", rest {row.lead_of_rest}"
    return f"{row.loads_ahead}/{row.loads}" + ("" if row.lead is None else f" by {row.lead}") + rest


def _line(row: Row) -> str:
    mix = " ".join(f"{row.mix[kind]:6.1f}" for kind in (*_KINDS, "rest"))
    ratio = "   -" if row.ratio is None else f"{row.ratio:4.2f}"
    return (
        f"{row.target:7}{row.kernel:41}{row.dtype:9}{row.width:5} {row.registers:4} {row.spilled:5} {row.shared:6}"
        f" {row.issued:7.1f} {mix} {row.exponential_clocks:6.1f} {row.issue_clocks:6.1f} {row.memory_clocks:6.1f}"
        f" {row.bound:12}{ratio}  {_ahead(row)}"
    )


def main() -> None:
    names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    parser = argparse.ArgumentParser(prog="python -m vimscale.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=list(DEVICES), help="default: all of them")
    parser.add_argument("--dtype", action="append", choices=list(names), help="default: all of them")
    parser.add_argument("--width", action="append", type=int, help="inner width; default: the widths of the presets")
    parser.add_argument("--kernel", action="append", help="name in the table; default: all of them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    options = parser.parse_args()

    kinds = " ".join(f"{kind[:6]:>6}" for kind in (*_KINDS, "rest"))
    print(
        "instructions per warp, and clocks of a multiprocessor, for one token of 32 channels; spills in bytes\n"
        f"{'target':7}{'kernel':41}{'dtype':9}{'width':5} {'regs':>4} {'spill':>5} {'shared':>6} {'issued':>7} {kinds}"
        f" {'exp':>6} {'issue':>6} {'memory':>6} {'bound':12}i/fl  loads ahead"
    )
    rows = []
    for target in options.target or DEVICES:
        for dtype in options.dtype or names:
            for width in options.width or PRESET_WIDTHS.values():
                for case in cases(names[dtype], width, target):
                    if options.kernel and case.name not in options.kernel:
                        continue
                    rows.append(examine(case, target, names[dtype], width))
                    print(_line(rows[-1]), flush=True)
    if not rows:
        parser.error(f"--kernel {' '.join(options.kernel)}: no kernel has that name; without it, all are listed")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
