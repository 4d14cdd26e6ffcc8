"""Reads a kernel's machine code (SASS): barriers, widths of stores, loads in flight, copies between products."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?PT?\d*\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)


class Instruction(NamedTuple):
    address: int
    name: str  # with its modifiers
    operands: str

    def is_one(self, *names: str) -> bool:
        return self.name.split(".")[0] in names


def read_kernels(cuobjdump: Path, made: Path, arch: str, names: Iterable[str]) -> dict[str, list[Instruction]]:
    """{mangled name: instructions} of kernels in an object file, for one architecture."""
    command = [cuobjdump, "-sass", "-arch", f"sm_{arch}", "-fun", ",".join(names), made]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = [part.split("\n", 1) for part in text.split("Function : ")[1:]]
    return {
        name.strip(): [Instruction(int(address, 16), *others) for address, *others in _LINE.findall(body)]
        for name, body in parts
    }


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The instructions of every loop, from a branch's target to the branch behind it, shortest first."""
    found = []
    for one in code:
        target = re.search(r"0x([0-9a-f]+)$", one.operands) if one.is_one("BRA") else None
        if target and int(target[1], 16) < one.address:
            found.append([other for other in code if int(target[1], 16) <= other.address <= one.address])
    return sorted(found, key=len)


def is_barrier(one: Instruction) -> bool:
    return one.is_one("BAR")


def barriers_of_a_layer(code: list[Instruction]) -> int:
    """In the smallest loop around the products that has any: the loop over the layers."""
    products = sum(one.is_one("HMMA") for one in code)
    around = [loop for loop in loops(code) if sum(one.is_one("HMMA") for one in loop) == products]
    return next(count for loop in around if (count := sum(map(is_barrier, loop))))


def copies_under_products(code: list[Instruction]) -> int:
    """Asynchronous copies between the first and the last product of a chunk."""
    products = [at for at, one in enumerate(code) if one.is_one("HMMA")]
    return sum(one.is_one("LDGSTS") for one in code[products[0] : products[-1]])


def _registers(text: str, width: int = 1) -> set[int]:
    return {int(first) + i for first in re.findall(r"\bR(\d+)", text) for i in range(width)}


def flights(code: list[Instruction]) -> list[int]:
    """How many 16-byte loads of global memory are under way whenever one of their results is first used, most first."""
    found, pending = [], {}
    for one in code:
        operands = one.operands.split(",", 1)
        if one.is_one("LDG") and ".128" in one.name:
            pending[one.address] = _registers(operands[0], 4)
        elif pending:
            read = _registers(one.operands if one.is_one("STG", "STS") else operands[-1])
            if any(read & loaded for loaded in pending.values()):
                found.append(len(pending))
                pending = {}
    return sorted(found, reverse=True)


def stores(code: list[Instruction], wide: bool) -> int:
    """Stores to global memory of 16 bytes, or of less."""
    return sum(one.is_one("STG") and (".128" in one.name) == wide for one in code)


def measure_hopper(code: list[Instruction]) -> dict[str, int]:
    """The whole kernel, and the smallest loop with all products, which is the one over tiles or over layers."""

    def count(instructions: list[Instruction], name: str) -> int:
        return sum(one.name.startswith(name) for one in instructions)

    products = count(code, "HGMMA")
    loop = next(loop for loop in loops(code) if count(loop, "HGMMA") == products)
    return {
        "products": products,
        "fences": count(code, "WARPGROUP.ARRIVE"),
        "waits": count(code, "WARPGROUP.DEPBAR"),
        "stores": count(code, "STG"),
        "stores_of_16_bytes": stores(code, wide=True),
        "wide_loads": count(code, "LDG.E.128"),
        "loads_in_flight": [*flights(code), 0, 0][1],  # the map has two types, each with its own code
        "reductions": sum(one.is_one("RED", "REDG") for one in code),
        "instructions_of_the_loop": len(loop),
        "moves_of_the_loop": count(loop, "MOV"),
    }


def measure_convolution(code: list[Instruction]) -> dict[str, int]:
    """Products and fragments of a chunk of weights, and what stands around the products."""

    def count(name: str, width: str = "") -> int:
        return sum(one.is_one(name) and one.name.endswith(width) for one in code)

    return {
        "products": count("HMMA"),
        "fragments_of_the_map": count("LDSM"),
        "fragments_of_weights": count("LDS", ".128"),
        "loads_in_flight": max(flights(code)),
        "wide_stores": stores(code, wide=True),
        "narrow_stores": stores(code, wide=False),
        "block_barriers": sum(map(is_barrier, code)),
        "copies_under_products": copies_under_products(code),
        "instructions_of_a_chunk": len(next(loop for loop in loops(code) if any(one.is_one("HMMA") for one in loop))),
    }


def measure_decode(code: list[Instruction]) -> dict[str, int]:
    """Of a kernel of the decode, or of its weights' gradients, which alone load fragments transposed."""
    if any(one.name.startswith("LDSM") for one in code):
        names = {"products": "HMMA", "fragment_loads": "LDSM", "copies": "LDGSTS", "wide_loads": "LDG.E.128"}
        counts = {key: sum(one.name.startswith(name) for one in code) for key, name in names.items()}
        return {**counts, "stores_to_shared": sum(one.name.startswith("STS.128") for one in code)}
    return {
        "block_barriers": sum(is_barrier(one) and one.operands in ("0x0", "") for one in code),
        "barriers_of_a_layer": barriers_of_a_layer(code),
        "narrow_stores": stores(code, wide=False),
        "wide_stores": stores(code, wide=True),
        "loads_in_flight": [*flights(code), 0, 0][1],  # the map has two types, each with its own code
        "copies_under_products": copies_under_products(code),
    }
