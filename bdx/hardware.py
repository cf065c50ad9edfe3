"""hardware: what the CPU of this machine is slow at. No torch in here."""

from __future__ import annotations

from pathlib import Path

FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86, x86 and ARM: one is enough


def bf16_emulated(precision: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What to say of train.precision on a CPU without instructions for it; '' elsewhere, and where no such file tells."""
    if precision != "bf16-mixed" or not cpuinfo.exists():
        return ""
    lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    flags = next((set(value.split()) for key, _, value in lines if key.strip() in ("flags", "Features")), None)
    if flags is None or FLAGS & flags:
        return ""
    return (
        "this CPU has no bf16 instructions, so train.precision=bf16-mixed is slower here than fp32 (11 times, on an AMD EPYC "
        "with AVX2 alone); train.precision=32-true is faster, and another recipe: its rows are its own"
    )
