"""A program for 64-bit ARM: compiled by the Clang of the package ziglang, run by the emulator unicorn, read as words.

Unicorn lacks the bfloat16 instructions of FEAT_BF16. It reports each of them, and `_bfloat16` computes the result.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

STACK, RETURN, HEAP = 0x7000_0000, 0x6000_0000, 0x1_0000_0000  # addresses; programs lie far below
STACK_BYTES = 1 << 20

# Instructions by (bits that decide, their value), from the Arm Architecture Reference Manual.
FMLA = [(0xBFA0FC00, 0x0E20CC00), (0xBF80F400, 0x0F801000)]  # vectors; vector by element
BFDOT = [(0xFFE0FC00, 0x6E40FC00), (0xFFC0F400, 0x4F40F000)]
BFCVTN, BFCVT = (0xFFFFFC00, 0x0EA16800), (0xFFFFFC00, 0x1E634000)
ON_STACK = [(0x0A0003E0, 0x080003E0)]  # loads and stores whose address is the stack pointer's


def build(sources: Sequence[Path], flags: Sequence[str], folder: Path, entry: str) -> bytes:
    """A static program without any library, that begins at a function."""
    command = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl"]
    objects = [folder / f"{source.name}.o" for source in sources]
    for source, made in zip(sources, objects, strict=True):
        subprocess.run([*command, *flags, "-fno-sanitize=all", "-c", source, "-o", made], check=True)
    program = folder / entry
    subprocess.run([*command, "-nostdlib", "-static", f"-Wl,-e,{entry}", *objects, "-o", program], check=True)
    return program.read_bytes()


def _segments(program: bytes) -> Iterator[tuple[int, bytes, bool]]:
    """Address, content and executability of an ELF file's segments in memory."""
    (first,), (each, count) = struct.unpack_from("<Q", program, 32), struct.unpack_from("<HH", program, 54)
    for at in range(first, first + each * count, each):
        kind, flags, offset, address, _, size, memory = struct.unpack_from("<IIQQQQQ", program, at)
        if kind == 1:  # PT_LOAD
            yield address, program[offset : offset + size].ljust(memory, b"\0"), bool(flags & 1)


def matches(word: int, patterns: Sequence[tuple[int, int]]) -> bool:
    return any(word & bits == value for bits, value in patterns)


def inner_loops(program: bytes) -> list[list[int]]:
    """The instructions of every loop without a branch inside."""
    loops = []
    for _, content, executable in _segments(program):
        words = struct.unpack(f"<{len(content) // 4}I", content[: len(content) // 4 * 4]) if executable else ()
        start = 0  # after the last branch
        for at, word in enumerate(words):
            conditional = word & 0xFF000010 == 0x54000000 or word & 0x7E000000 == 0x34000000  # b.cond; cbz, cbnz
            if conditional:
                offset = (word >> 5 & 0x7FFFF) - (word >> 5 & 0x40000) * 2
                if offset < 0 and at + offset >= start:
                    loops.append(list(words[at + offset : at + 1]))
            if conditional or word & 0x7C000000 == 0x14000000 or word & 0xFE000000 in (0x36000000, 0xD6000000):
                start = at + 1
    return loops


def run(program: bytes, *blocks: bytes, memory: int) -> list[bytes]:
    """The blocks after the program has run with their addresses, and that of `memory` bytes, as arguments."""
    from unicorn import UC_ARCH_ARM64, UC_HOOK_INTR, UC_MODE_ARM, Uc
    from unicorn import arm64_const as arm

    machine = Uc(UC_ARCH_ARM64, UC_MODE_ARM)
    machine.ctl_set_cpu_model(arm.UC_CPU_ARM64_MAX)
    page = 1 << 16
    for address, content, _ in _segments(program):
        low = address // page * page
        machine.mem_map(low, (address + len(content) - low + page - 1) // page * page)
        machine.mem_write(address, content)
    machine.mem_map(STACK - STACK_BYTES, STACK_BYTES)
    machine.mem_map(RETURN, page)
    at, places = HEAP, []
    for size in [*map(len, blocks), memory]:
        machine.mem_map(at, (size + page - 1) // page * page)
        places.append(at)
        at += (size + 2 * page - 1) // page * page  # with a page that is not mapped after each
    for index, place in enumerate(places):
        machine.reg_write(arm.UC_ARM64_REG_X0 + index, place)
    for place, block in zip(places, blocks, strict=False):
        machine.mem_write(place, block)
    machine.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # vector registers may be used
    machine.reg_write(arm.UC_ARM64_REG_SP, STACK)
    machine.reg_write(arm.UC_ARM64_REG_X30, RETURN)

    def undefined(machine: Uc, number: int, _: object) -> None:
        pc = machine.reg_read(arm.UC_ARM64_REG_PC)
        (word,) = struct.unpack("<I", machine.mem_read(pc, 4))
        numbers = word & 31, word >> 5 & 31, word >> 16 & 31
        target, first, second = (
            np.frombuffer(machine.reg_read(arm.UC_ARM64_REG_V0 + number).to_bytes(16, "little"), np.uint32)
            for number in numbers
        )
        result = _bfloat16(word, target, first, second)
        if number != 1 or result is None:
            raise ValueError(f"exception {number} at the instruction {word:08x}")
        machine.reg_write(arm.UC_ARM64_REG_V0 + numbers[0], int.from_bytes(result.tobytes(), "little"))
        machine.reg_write(arm.UC_ARM64_REG_PC, pc + 4)

    machine.hook_add(UC_HOOK_INTR, undefined)
    machine.emu_start(struct.unpack_from("<Q", program, 24)[0], RETURN)
    return [bytes(machine.mem_read(place, len(block))) for place, block in zip(places, blocks, strict=False)]


def _bfloat16(word: int, target: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray | None:
    """What an instruction of FEAT_BF16 writes, 16 bytes; None for another instruction. Sums are rounded once."""
    if matches(word, BFDOT):
        if matches(word, BFDOT[1:]):
            second = np.full(4, second[(word >> 11 & 1) * 2 + (word >> 21 & 1)], np.uint32)
        low = (first << 16).view(np.float32).astype(np.float64) * (second << 16).view(np.float32)
        high, mask = first & 0xFFFF0000, np.uint32(0xFFFF0000)
        products = low + high.view(np.float32).astype(np.float64) * (second & mask).view(np.float32)
        return (target.view(np.float32) + products).astype(np.float32)
    if matches(word, [BFCVTN, BFCVT]):
        rounded = (first + 0x7FFF + (first >> 16 & 1)) >> 16  # to nearest, ties to even; no NaN comes here
        halves = np.zeros(8, np.uint16)
        count = 4 if matches(word, [BFCVTN]) else 1
        halves[:count] = rounded[:count]
        return halves
    return None
