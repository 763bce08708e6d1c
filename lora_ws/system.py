"""What differs between systems and processors: CPUs, memory, encoding, a parent's end."""

import io
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

# In a pool: Windows waits for at most 63 handles at once, two of which are not processes.
MOST_PROCESSES = 61 if sys.platform == "win32" else sys.maxsize
# Seconds between looks at the parent.
PAUSE = 0.5
# Of the processors of this machine, on Linux.
CPUINFO = Path("/proc/cpuinfo")
# Kernels that NumPy shall not use; it reads this when it is imported.
DISABLED = "NPY_DISABLE_CPU_FEATURES"
# What a container may take, where this process is in one; "max" where it is not.
CGROUP = Path("/sys/fs/cgroup/memory.max")


def cpus() -> int:
    """Count the CPUs that this process may use; only Linux tells them from those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_facts() -> dict[str, str]:
    """What the system says of the first processor, by its names for it; only Linux says any."""
    first = ""
    with suppress(OSError):
        first = CPUINFO.read_text(encoding="utf-8").partition("\n\n")[0]
    lines = (line.partition(": ") for line in first.split("\n"))
    return {name.strip(): value for name, _, value in lines}


def choose_numpy_kernels() -> None:
    """Have NumPy, where nothing imported it yet, sort and select without AVX-512 on AMD's Zen 4.

    There its AVX-512 partition takes 4 times as long as that for AVX2 (benchmarks/partition.py), as
    the processor is slow to compress into memory, by which the former keeps values. A user's own
    ``NPY_DISABLE_CPU_FEATURES`` stays. Processes started from here do the same.
    """
    if "numpy" in sys.modules or DISABLED in os.environ:
        return
    said = processor_facts()
    family = said.get("vendor_id"), said.get("cpu family")
    if family == ("AuthenticAMD", "25") and "avx512f" in said["flags"].split():
        os.environ[DISABLED] = "X86_V4 AVX512_ICL"


def memory_of_machine() -> int:
    """Bytes of memory of this machine, or of the container that this process is in."""
    if sys.platform == "win32":
        import ctypes

        kib = ctypes.c_ulonglong()
        ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kib))
        return kib.value << 10
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):
        return min(machine, int(CGROUP.read_text(encoding="utf-8")))
    return machine


def write_utf8() -> None:
    """Write UTF-8 into files and pipes, whatever the locale, and to a terminal what it can show.

    A name in any script is written or escaped, and ends no command.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encoding = None if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="backslashreplace")


def wait_for_parent(parent: int) -> None:
    """Return once the process that started this one has ended.

    Args:
        parent: its id; on Windows `os.getppid` stays the same after its end.
    """
    if sys.platform == "win32":
        import _winapi

        with suppress(OSError):  # it may have ended already
            handle = _winapi.OpenProcess(_winapi.SYNCHRONIZE, False, parent)
            _winapi.WaitForSingleObject(handle, _winapi.INFINITE)
            _winapi.CloseHandle(handle)
        return
    while os.getppid() == parent:
        time.sleep(PAUSE)
