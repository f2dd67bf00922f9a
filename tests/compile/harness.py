"""Harness: compiles a kernel for a GPU that need not be here, and reads what the assembler made of it.

Triton brings ptxas, which asks for no driver. A kernel that compiles may still be one that cannot be
launched (too much shared memory) or should not be (registers spilled to memory), so both are read and compared.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

SHARED_LIMIT = {80: 166_912, 90: 232_448}  # bytes a block may ask for
REGISTER_SLACK = 16


class Compiled(NamedTuple):
    """What one kernel takes: registers a thread, bytes spilled, bytes of shared memory, count of each PTX opcode."""

    registers: int
    spill_bytes: int
    shared: int
    opcodes: Counter[str]  # without modifiers: ld.global.v4.b32 counts as ld

    @property
    def atomics(self) -> int:
        return self.opcodes["atom"] + self.opcodes["red"]


class Config(NamedTuple):
    """One launch as shipped: the arguments of compile_for under a name that golden files know it by."""

    name: str
    fn: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    arch: int
    num_warps: int
    num_stages: int
    aligned: Sequence[str]


def compile_for(
    fn: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    arch: int,
    num_warps: int,
    num_stages: int,
    aligned: Sequence[str],
) -> Compiled:
    """Compiles a jitted function.

    Args:
        signature: type of each argument that is not a constant: "*fp32", "*bf16", "*i64", "i32", "i64", ...
        constants: values of the constexpr arguments, and of those that a launch specialises (a stride of 1).
        arch: 80 or 90.
        aligned: arguments that a launch finds divisible by 16; pointers of torch's own tensors are.
    """
    names = fn.arg_names
    source = ASTSource(
        fn,
        signature={name: "constexpr" if name in constants else signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    kernel = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps, "num_stages": num_stages}
    )
    registers, spilled = _registers(kernel.asm["ptx"], arch)
    opcodes = Counter(re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z]\w*)[.\s;]", kernel.asm["ptx"], re.MULTILINE))
    assert opcodes["ret"], f"no instructions in the PTX:\n{kernel.asm['ptx'][:500]}"
    return Compiled(registers, spilled, kernel.metadata.shared, opcodes)


def check_configs(configs: Iterable[Config], golden: Path) -> list[str]:
    """Compiles each, prints how many there were, and returns what is wrong with them, one line each.

    golden: JSON, registers by name; NF_GOLDEN=write makes it anew, to be read before it is committed.
    """
    write = os.environ.get("NF_GOLDEN") == "write"
    expected = {} if write else json.loads(golden.read_text())
    found: dict[str, int] = {}
    problems, compiled = [], 0
    for config in configs:
        name, fn, signature, constants, arch, warps, stages, aligned = config
        assert name not in found, f"two configurations are named {name}"
        got = compile_for(fn, signature, constants, arch=arch, num_warps=warps, num_stages=stages, aligned=aligned)
        compiled += 1
        found[name] = got.registers
        if got.spill_bytes:
            problems.append(f"{name}: {got.spill_bytes} bytes spilled")
        if got.shared > SHARED_LIMIT[arch]:
            problems.append(f"{name}: {got.shared} bytes of shared memory, sm_{arch} has {SHARED_LIMIT[arch]}")
        if got.atomics:
            problems.append(f"{name}: {got.atomics} atomic operations; sums would depend on the order of programs")
        if not write and abs(got.registers - expected.get(name, 10**6)) > REGISTER_SLACK:
            problems.append(f"{name}: {got.registers} registers, {golden.name} has {expected.get(name)}")
    if write:
        golden.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    problems += [f"{name}: in {golden.name}, but nobody ships it" for name in sorted(set(expected) - set(found))]
    print(f"\nconfigs compiled: {compiled}/{len(found)}")
    return problems


def _registers(ptx: str, arch: int) -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [
            get_ptxas(arch).path,
            "-v",
            f"--gpu-name={sm_arch_from_capability(arch)}",
            path,
            "-o",
            path.with_suffix(".cubin"),
        ]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used = re.search(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill", log)  # stores, loads
    assert used, f"ptxas -v said nothing of registers:\n{log}"
    assert len(spills) == 2, f"ptxas -v said nothing of spills:\n{log}"
    return int(used[1]), sum(map(int, spills))
