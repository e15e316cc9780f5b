"""Reads the optimised HLO text of a GPU program: what lies between products, our kernels and attention."""

import functools
import re
from typing import NamedTuple

_INSTRUCTION = re.compile(
    r"\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<opcode>[a-z][a-z\-]*)\((?P<rest>.*)"
)
_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) (?:\(.*\) -> .*)?\{$")
_CALLEES = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")

_FREE = {"bitcast", "get-tuple-element", "tuple", "parameter", "constant", "opt-barrier", "after-all"}
# What fetches or places elements without computing any; a slice may be read by the arithmetic beside it.
_MOVING = {"copy", "transpose", "concatenate", "pad", "reverse", "gather", "scatter"}
_MOVING |= {"dynamic-slice", "dynamic-update-slice"}
_NOT_COMPUTING = _FREE | _MOVING | {"slice", "convert", "reshape", "broadcast", "iota", "fusion"}


class Instruction(NamedTuple):
    opcode: str
    operands: tuple[str, ...]
    rest: str  # operands and attributes, as they stand
    callees: tuple[str, ...]


class Program(NamedTuple):
    computations: dict[str, dict[str, Instruction]]
    entry: dict[str, Instruction]  # with the bodies of plain calls in place of the calls


def parse(text: str) -> Program:
    computations: dict[str, dict[str, Instruction]] = {}
    roots: dict[str, str] = {}
    entry = current = ""
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            current = start["name"]
            computations[current] = {}
            entry = current if start["entry"] else entry
        elif current and (found := _INSTRUCTION.match(line)):
            name = found["name"]
            operands = tuple(re.findall(r"%([\w.\-]+)", _balanced(found["rest"])))
            callees = tuple(_CALLEES.findall(found["rest"]))
            computations[current][name] = Instruction(found["opcode"], operands, found["rest"], callees)
            if line.lstrip().startswith("ROOT "):
                roots[current] = name
    if not entry:
        raise ValueError(f"text must be an HLO module with an ENTRY, got {text[:80]!r}. Pass `compiled.as_text()`.")
    return Program(computations, _inlined(computations, roots, entry, "", ()))


def _balanced(rest: str) -> str:
    """Up to the parenthesis that closes an operand list which is already open."""
    depth = 1
    for i, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return rest[:i]
    return rest


def _inlined(computations, roots, name: str, prefix: str, arguments: tuple[str, ...]) -> dict[str, Instruction]:
    """A computation's instructions, those of what it calls included; parameters stand for the call's operands."""
    flat: dict[str, Instruction] = {}
    renamed: dict[str, str] = {}
    for inner, instruction in computations[name].items():
        operands = tuple(renamed.get(x, prefix + x) for x in instruction.operands)
        if instruction.opcode == "call":
            (callee,) = instruction.callees
            flat |= _inlined(computations, roots, callee, f"{prefix}{inner}/", operands)
            renamed[inner] = f"{prefix}{inner}/{roots[callee]}"
        elif instruction.opcode == "parameter" and prefix:
            renamed[inner] = arguments[int(instruction.rest.split(")")[0])]
        else:
            flat[prefix + inner] = instruction._replace(operands=operands)
    return flat


def _opcodes(program: Program, instruction: Instruction) -> set[str]:
    """The opcode, and those of everything that it calls."""
    found = {instruction.opcode}
    for callee in instruction.callees:
        for inner in program.computations.get(callee, {}).values():
            found |= _opcodes(program, inner)
    return found


def kernel_name(instruction: Instruction, attention: str) -> str:
    """What a custom call runs: "attention", the name of one of our kernels, or ""."""
    if instruction.opcode != "custom-call":
        return ""
    if re.search(attention, instruction.rest):
        return "attention"
    names = re.findall(r"pallas_qk_[a-z_]+?_(?:forward|backward|weight_sum|sum)\b", instruction.rest)
    return names[-1] if names else ""


def kernels(program: Program, attention: str) -> list[str]:
    """The names of our kernels and of attention, in the order of the text."""
    return [name for x in program.entry.values() if (name := kernel_name(x, attention))]


def _is_product(program: Program, instruction: Instruction) -> bool:
    if instruction.opcode == "custom-call":
        return re.search(r'custom_call_target="[^"]*(gemm|matmul)', instruction.rest) is not None
    return bool({"dot", "scaled-dot"} & _opcodes(program, instruction))


def faults(program: Program, attention: str) -> list[str]:
    """What stands between two of {products, our kernels, attention} and moves data instead of computing.

    `attention` is a pattern that the text of attention's custom calls matches. An elementwise fusion may read a slice,
    as `attended * sigmoid(gate)` reads the gate, and may add up the parts of a product.
    """
    anchors = {
        name
        for name, instruction in program.entry.items()
        if kernel_name(instruction, attention) or _is_product(program, instruction)
    }
    users: dict[str, list[str]] = {name: [] for name in program.entry}
    for name, instruction in program.entry.items():
        for operand in instruction.operands:
            users[operand].append(name)

    @functools.cache
    def below_anchor(name: str) -> bool:
        return any(x in anchors or below_anchor(x) for x in program.entry[name].operands)

    @functools.cache
    def above_anchor(name: str) -> bool:
        return any(x in anchors or above_anchor(x) for x in users[name])

    found = []
    for name, instruction in program.entry.items():
        if name in anchors or instruction.opcode in _FREE or not (below_anchor(name) and above_anchor(name)):
            continue
        opcodes = _opcodes(program, instruction)
        if instruction.opcode != "fusion":
            found.append(f"{name}: {instruction.opcode} outside a fusion")
        elif moving := sorted(opcodes & _MOVING):
            found.append(f"{name}: a fusion with {', '.join(moving)}")
        elif not opcodes - _NOT_COMPUTING:
            found.append(
                f"{name}: a fusion that computes nothing, of {', '.join(sorted(opcodes - _FREE - {'fusion'}))}"
            )
    return found


def sources(program: Program, kernel: str, attention: str) -> list[str]:
    """What the one call of `kernel` reads, by kind: "product", "fusion", "parameter", or a kernel's name.

    A fusion that adds up the parts of a product counts as the product.
    """

    def kind(name: str) -> str:
        instruction = program.entry[name]
        opcodes = _opcodes(program, instruction)
        if _is_product(program, instruction):
            return "product"
        if instruction.opcode in _FREE - {"parameter", "constant"} or "reduce" in opcodes:
            return kind(instruction.operands[0])
        return kernel_name(instruction, attention) or instruction.opcode

    (call,) = (x for x in program.entry.values() if kernel_name(x, attention) == kernel)
    return [kind(operand) for operand in call.operands]
