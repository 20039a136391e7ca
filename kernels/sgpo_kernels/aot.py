"""Compiles every Triton kernel for several GPUs without one, and reports what each takes of the chip.

    python -m sgpo_kernels.aot [--arch 80 90 100] [--json]
    python -m sgpo_kernels.aot --estimate                   predicted times of one call on two GPUs (see estimate.py)

What: every kernel, with the options that change its code (kind, bias, soft-cap, temperature, dtype of dz), at the
  tiles of `sizes.blocks`, for a head whose size allows aligned 16-byte accesses. Reported: registers and stack per
  thread, spills (STL / LDL in the machine code), shared memory, and the widths of global loads and stores.
Limits: not under TRITON_INTERPRET=1; needs the cuobjdump and nvdisasm that the triton package ships.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sgpo_kernels import estimate, machine_code, sizes, triton_gradients, triton_products, triton_statistics
from sgpo_kernels import triton_constants as const

# Shared memory that one block may take, bytes, by compute capability.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
POINTERS = {
    "labels_ptr": "*i64",
    "rows_ptr": "*i64",
    "live_ptr": "*i32",
    "count_ptr": "*i32",
    "counts_ptr": "*i32",
    "first_ptr": "*i32",
}
POINTERS |= {"alive_ptr": "*i1", "forced_ptr": "*i1"}
# Pointers to operands of products, in the dtype of dz.
OPERANDS = {"dz_ptr", "hidden_ptr", "head_ptr"}
INTEGERS = {"C", "N", "T", "V", "H", "rank", "limit", "row_step", "tile_step", "number"}


class Variant(NamedTuple):
    """One kernel with its compile-time options; `dz` is the dtype that its out_ptr and its operands hold."""

    kernel: str
    options: dict[str, Any]
    warps: int
    dz: str = "bf16"
    stages: int = 3

    @property
    def name(self) -> str:
        """Kernel, flags without tiles, and the dtype of dz: the row's name in the table."""
        flags = [f"{key.lower()}={int(value)}" for key, value in self.options.items() if not key.startswith("BLOCK")]
        return f"{self.kernel}[{' '.join([*flags, self.dz])}]"


class Resources(NamedTuple):
    """What one compiled kernel takes: registers and stack bytes per thread, spill instructions, shared bytes per
    block, its global accesses by width in bits, and the instructions of its code (`special`: those of the units for
    exponentials and the like)."""

    variant: str
    arch: int
    registers: int
    stack: int
    spills: int
    shared: int
    loads: dict[str, int]
    stores: dict[str, int]
    instructions: int
    special: int


def variants(arch: int) -> Iterator[Variant]:
    """Every kernel with the tiles of a compute capability: each kind without options, and with all of them."""
    kinds, score = const.KINDS.values(), const.KINDS["score"]

    def tile(name: str, columns: int | None = None) -> tuple[dict[str, Any], int]:
        block = sizes.blocks(name, divmod(arch, 10))
        return {"BLOCK_R": block.rows, "BLOCK_V": columns or block.columns}, block.warps

    scan_columns = sizes.blocks("scan", divmod(arch, 10)).columns
    for full in (False, True):
        one = {"HAS_BIAS": full, "HAS_SOFTCAP": full, "HAS_TEMPERATURE": full}
        two = {**one, "HAS_TEACHER_BIAS": full}
        block, warps = tile("scan")
        yield Variant("scan_tiles", {**one, **block}, warps)
        yield Variant("combine_tiles", {**one, "HAS_LABELS": full, "BLOCK_R": 4, "BLOCK_T": 256}, 4)
        for kind in kinds:
            if kind != score:
                block, warps = tile("divergence")
                yield Variant("divergence_tiles", {"KIND": kind, **two, **block}, warps)
            block, warps = tile("peaks", scan_columns)
            skip = kind in (score, const.KINDS["forward_kl"])
            yield Variant("peak_tiles", {"KIND": kind, "SKIP": skip, **two, **block}, warps)
            block, warps = tile("columns")
            yield Variant("gradient_column_tiles", {"KIND": kind, **two, **block}, warps)
            block, warps = tile("gradient")
            for dz in ("bf16", "fp16", "fp32"):
                entropy = full and kind == score
                yield Variant("gradient_tiles", {"KIND": kind, "WITH_ENTROPY": entropy, **two, **block}, warps, dz)
    for dz in ("bf16", "fp16", "fp32"):
        yield Variant("rescale", {"BLOCK": 2048}, 4, dz)
        yield Variant("rescale_rows", {"BLOCK": 4096}, 4, dz)
    yield Variant("column_threshold", {"BLOCK": 1024}, 4)
    for swept in (False, True):
        yield Variant("live_columns", {"SWEPT": swept, "BLOCK_T": 8 if swept else 128, "BLOCK_V": 64}, 4)
    yield Variant("place_columns", {"BLOCK_T": 4096, "BLOCK_V": 64}, 4)
    yield from products(arch)
    block = {"BLOCK": 128}
    yield Variant("sweep_reach", block, 4)
    for known in (False, True):
        yield Variant("finish_columns", {"HAS_SUM": known, **block}, 4)
    for mode, ranks in itertools.product(const.MODES.values(), (1, 8)):
        flags = {"MODE": mode, "HAS_OLD": mode == const.MODES["policy"], "HAS_FACTOR": mode != const.MODES["values"]}
        yield Variant("label_row_values", {**flags, "RANKS": ranks, **block}, 4)
    for ranks in (1, 8):
        yield Variant("pair_row_values", {"RANKS": ranks, **block}, 4)
    for over in const.LIMITS.values():
        yield Variant("divergence_row_values", {"OVER_LIMIT": over, "HAS_FACTOR": True, **block}, 4)


def products(arch: int) -> Iterator[Variant]:
    """The kernels of triton_products that multiply, for half operands and for float32 ones where they take such."""

    def product(kernel: str, tile: str, dz: str, **flags: Any) -> Variant:
        operands = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dz]
        tiles = sizes.product_tiles(tile, operands, divmod(arch, 10))
        blocks = {"BLOCK_R": tiles.rows, "BLOCK_V": tiles.columns, "BLOCK_K": tiles.depth}
        return Variant(kernel, {**flags, **blocks}, tiles.warps, dz, tiles.stages)

    for dz in ("bf16", "fp16", "fp32"):
        yield product("live_hidden", "live_hidden", dz, head_step=1)
        yield product("live_head", "live_head", dz, HAS_FIRST=dz != "fp16")
    for full in (False, True):
        yield Variant("label_guess", {"HAS_TEMPERATURE": full, "BLOCK_R": 4, "BLOCK_V": 4096}, 4)
        yield product("gathered_gradient", "gathered", "bf16", HAS_TEMPERATURE=full)
        yield product("sweep", "sweep", "bf16", PEAKS=full, HAS_TEMPERATURE=full, PROGRAMS=132, GROUP=8)
        yield product("sweep", "sweep", "fp16", PEAKS=not full, HAS_TEMPERATURE=full, PROGRAMS=132, GROUP=8)


def compile_variant(variant: Variant, arch: int) -> Resources:
    """The resources of one variant on one compute capability (80, 90, 100)."""
    modules = (triton_statistics, triton_gradients, triton_products)
    function = next(found for module in modules if (found := vars(module).get(variant.kernel)) is not None)
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in variant.options:
            signature[name] = "constexpr"
        elif name in ("hidden", "head"):
            rows = variant.options["BLOCK_R" if name == "hidden" else "BLOCK_V"]
            signature[name] = f"tensordesc<{variant.dz}[{rows}, {variant.options['BLOCK_K']}]>"
        elif name.endswith("_ptr"):
            narrow = name in OPERANDS or (name == "out_ptr" and variant.kernel != "live_hidden")
            signature[name] = f"*{variant.dz}" if narrow else POINTERS.get(name, "*fp32")
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name.endswith("stride"):
            signature[name] = "i32"
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name in INTEGERS:
            signature[name] = "i32"
            if name in ("V", "H"):
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(fn=function, signature=signature, constexprs=dict(variant.options), attrs=attributes)
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    code = machine_code.read(binary.asm["cubin"])
    return Resources(
        variant.name,
        arch,
        code.registers,
        code.stack,
        code.spills,
        binary.metadata.shared,
        code.loads,
        code.stores,
        code.instructions,
        code.special,
    )


def table(rows: list[Resources]) -> str:
    """The resources as a text table."""
    lines = [f"{'sm':>3} {'regs':>4} {'stack':>5} {'spills':>6} {'shared':>6}  kernel, loads / stores by bits"]
    for row in rows:
        numbers = f"{row.arch:>3} {row.registers:>4} {row.stack:>5} {row.spills:>6} {row.shared:>6}"
        widths = f"{row.loads} / {row.stores}".replace("'", "")
        lines.append(f"{numbers}  {row.variant} {widths}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where a kernel spills or takes too much shared memory, 2 in Triton's interpreter."""
    parser = argparse.ArgumentParser(description="Compile the kernels ahead of time and report their resources.")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(SHARED_LIMIT))
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of the table")
    estimate.add_options(parser)
    options = parser.parse_args(arguments)
    if sizes.interpreting():
        print("TRITON_INTERPRET=1 is set: unset it, kernels cannot be compiled in the interpreter.", file=sys.stderr)
        return 2
    if options.estimate:
        print(estimate.report(options))
        return 0
    rows = [compile_variant(variant, arch) for arch in options.arch for variant in variants(arch)]
    print("\n".join(json.dumps(row._asdict()) for row in rows) if options.json else table(rows))
    over = [row for row in rows if row.stack or row.spills or row.shared > SHARED_LIMIT[row.arch]]
    if over:
        print(
            f"{len(over)} kernels spill or exceed the shared memory: {over[0].variant} on sm_{over[0].arch}",
            file=sys.stderr,
        )
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
