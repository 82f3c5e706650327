"""PTX text, as Triton emits it, to a list of instructions with their labels and source lines."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from ptx.memory import EmulationError

SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid|laneid|warpid)(?:\.([xyz]))?$")
REGISTER = re.compile(r"%([a-zA-Z_]+?)(\d+)$")
# Half of a 64-bit register; the other half goes to a register of its own, which nobody reads.
HALF = re.compile(r"\{ \.reg \.b32 tmp; (mov\.b64 \{[^}]*\}, %rd\d+;) \}")
WIDTH = {"pred": 0, "b8": 1, "b16": 2, "b32": 4, "b64": 8, "f32": 4, "f64": 8, "u32": 4, "s32": 4, "u64": 8, "u16": 2}


class Register(NamedTuple):
    kind: str  # prefix: p, rs, r, rd
    number: int


class Special(NamedTuple):
    name: str
    axis: str


class Immediate(NamedTuple):
    bits: int  # of a float: its pattern; of an integer: its value


class Symbol(NamedTuple):
    name: str


class Address(NamedTuple):
    base: Register | Symbol | Immediate
    offset: int


class Group(NamedTuple):
    parts: tuple


@dataclass
class Instruction:
    opcode: str
    operands: list
    line: int  # of the PTX text, from 1
    guard: tuple[Register, bool] | None = None  # register, and whether it is negated
    source: str = ""
    used_bytes: int = -1
    text: str = ""


@dataclass
class Program:
    name: str
    parameters: list[tuple[str, int]]  # name and bytes
    registers: dict[str, tuple[int, int]]  # prefix to bytes (0: predicate) and count
    instructions: list[Instruction]
    labels: dict[str, int]
    threads: int
    lines: dict[int, Instruction] = field(default_factory=dict)

    def describe(self, line: int) -> str:
        found = self.lines.get(line)
        return f"line {line}" if found is None else f"line {line} `{found.text}` ({found.source})"


def parse(text: str) -> Program:
    """One `.entry`. EmulationError: more than one, a function call's `.func`, or a directive that is not known."""
    if len(re.findall(r"^\.visible \.entry|^\.entry", text, re.M)) != 1 or re.search(
        r"^\s*\.(?:visible )?\.?func", text, re.M
    ):
        raise EmulationError("expected exactly one .entry and no .func")
    lines = text.split("\n")
    start = next(i for i, line in enumerate(lines) if re.match(r"(\.visible )?\.entry", line))
    name = re.search(r"\.entry\s+(\w+)", lines[start])[1]
    opened = next(i for i in range(start, len(lines)) if lines[i].startswith("{"))
    header = "\n".join(lines[start:opened])
    parameters = [
        (m[2], WIDTH.get(m[1]) or int(m[1][1:]) // 8)
        for m in re.finditer(r"\.param\s+\.(\w+)[^,\n]*?\s(\w+)\s*[,\n)]", header)
    ]
    threads = re.search(r"\.reqntid\s+(\d+)", header)
    if threads is None:
        raise EmulationError("expected .reqntid")
    registers: dict[str, tuple[int, int]] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    source, used_bytes, pending, first = "", -1, "", 0
    for at in range(opened + 1, len(lines)):
        raw = lines[at]
        if raw.startswith("}"):
            break
        loc = re.match(r"\s*\.loc\s.*//\s*(\S+)\s*$", raw)
        if loc:
            inlined = re.search(r"inlined_at \d+ (\d+) \d+", raw)
            source = loc[1] + (f" inlined at line {inlined[1]}" if inlined else "")
            continue
        line = raw.split("//")[0].strip()
        half = HALF.fullmatch(line)
        if half:
            line = half[1].replace("tmp", "_")
        if not line or re.match(r"\.loc\s", line):
            continue
        label = re.match(r"([$\w.]+):(?!:)\s*(.*)$", line)
        if label and not pending:
            labels[label[1]] = len(instructions)
            line = label[2]
            if not line:
                continue
        first = first if pending else at + 1
        pending = f"{pending} {line}".strip()
        while ";" in pending:
            statement, pending = (part.strip() for part in pending.split(";", 1))
            if not statement:
                continue
            if statement.startswith("."):
                declared = re.match(r"\.reg\s+\.(\w+)\s+%(\w+)<(\d+)>$", statement)
                pragma = re.match(r'\.pragma\s+"used_bytes_mask (0x[0-9a-fA-F]+|\d+)"$', statement)
                if declared:
                    registers[declared[2]] = (WIDTH[declared[1]], int(declared[3]))
                elif pragma:
                    used_bytes = int(pragma[1], 0)
                else:
                    raise EmulationError(f"line {first}: unknown directive {statement!r}")
                continue
            parsed = _instruction(statement, first)
            parsed.source, parsed.used_bytes = source, used_bytes
            used_bytes = -1
            instructions.append(parsed)
    if pending:
        raise EmulationError(f"line {first}: statement without an end: {pending!r}")
    lines_of = {i.line: i for i in instructions}
    return Program(name, parameters, registers, instructions, labels, int(threads[1]), lines_of)


def _instruction(statement: str, line: int) -> Instruction:
    found = re.match(r"(?:@(!?)%(\w+)\s+)?([\w.:]+)\s*(.*)$", statement)
    if found is None:
        raise EmulationError(f"line {line}: cannot read {statement!r}")
    guard = None
    if found[2]:
        kind = REGISTER.match("%" + found[2])
        guard = (Register(kind[1], int(kind[2])), found[1] == "!")
    text = " ".join(statement.split())
    text = text if len(text) < 90 else text[:87] + "..."
    return Instruction(found[3], [_operand(p, line) for p in _split(found[4])], line, guard, text=text)


def _split(text: str) -> list[str]:
    parts, depth, current = [], 0, ""
    for letter in text:
        depth += letter in "{["
        depth -= letter in "}]"
        if letter == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += letter
    return [*parts, current.strip()] if current.strip() else parts


def _operand(text: str, line: int):
    if text.startswith("{"):
        return Group(tuple(_operand(p, line) for p in _split(text[1:-1])))
    if "|" in text:  # two predicates, of the halves of a register
        return Group(tuple(_operand(p, line) for p in text.split("|")))
    if text.startswith("["):
        inner = re.match(r"\[\s*([^+\s]+)\s*(?:\+\s*(-?\w+))?\s*\]$", text)
        if inner is None:
            raise EmulationError(f"line {line}: cannot read the address {text!r}")
        return Address(_operand(inner[1], line), int(inner[2] or "0", 0))
    special = SPECIAL.match(text)
    if special:
        return Special(special[1], special[2] or "")
    register = REGISTER.match(text)
    if register:
        return Register(register[1], int(register[2]))
    if re.match(r"0[fF][0-9a-fA-F]{8}$", text) or re.match(r"0[dD][0-9a-fA-F]{16}$", text):
        return Immediate(int(text[2:], 16))
    if re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", text):
        return Immediate(int(text.rstrip("U"), 0))
    if re.match(r"[$\w.]+$", text):
        return Symbol(text)
    raise EmulationError(f"line {line}: cannot read the operand {text!r}")
