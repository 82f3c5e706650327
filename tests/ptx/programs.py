"""Programs of a few instructions, and what the emulator makes of them."""

import numpy as np
from ptx.emulator import Arena, emulate


def program(body: str, n_parameters: int, threads: int = 32, shared: bool = True) -> str:
    """A kernel with its parameters' addresses in %rd1.. and the thread in %r1, [%rd + 4 * thread] in %rd11.."""
    parameters = ",\n".join(f"\t.param .u64 .ptr .global .align 1 k_param_{i}" for i in range(n_parameters))
    loads = "\n".join(
        f"\tld.param.b64 %rd{i + 1}, [k_param_{i}];\n\tmad.wide.u32 %rd{i + 11}, %r1, 4, %rd{i + 1};"
        for i in range(n_parameters)
    )
    return f"""
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
{parameters}
)
.reqntid {threads}
{{
\t.reg .pred %p<20>;
\t.reg .b16 %rs<20>;
\t.reg .b32 %r<60>;
\t.reg .b64 %rd<40>;
\tmov.u32 %r1, %tid.x;
{loads}
{body}
\tret;
}}
"""


def run(body, *arrays, threads=32, shared=0, grid=(1, 1, 1), written=None, **options):
    """Results (arrays as they came out) and the launch."""
    arena = Arena()
    raw = [np.ascontiguousarray(a).view(np.uint8).reshape(-1).copy() for a in arrays]
    marks = [
        np.ones(r.size, bool) if written is None or written[i] else np.zeros(r.size, bool) for i, r in enumerate(raw)
    ]
    addresses = [arena.add(f"a{i}", r, m) for i, (r, m) in enumerate(zip(raw, marks, strict=True))]
    launch = emulate(program(body, len(arrays), threads), grid, addresses, arena, shared, **options)
    out = []
    for (_, offset, data, _), a in zip(arena.blocks, arrays, strict=True):
        out.append(launch.memory.bytes[offset : offset + data.size].view(a.dtype).reshape(a.shape))
    return out, launch


def kinds(launch):
    return {f.kind for f in launch.findings.entries.values()}
