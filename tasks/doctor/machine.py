"""Room to work in: disk and memory, as this process may use them."""

import shutil
import tempfile
from pathlib import Path

from tasks.doctor.finding import Finding, ok, problem, warning
from tasks.registry import cache_folder
from tasks.storage import local_path, normalise

_GB = 1e9
# A run holds one shard per slot and a model per slot; a plan of 10⁶ images is sorted in the folder for temporary files.
DISK_GB = (1.0, 10.0)  # below the first: a problem; below the second: a warning
MEMORY_GB = (0.5, 1.5)

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_CGROUP_USES = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")


def check_machine(store: str) -> list[Finding]:
    """Free disk space for the store, temporary files and cached models, and free memory."""
    uri = normalise(store)
    places = {"temporary files": Path(tempfile.gettempdir()), "cached models": cache_folder()}
    if not uri.startswith("s3://"):
        places = {"the store": Path(local_path(uri))} | places
    return [*_disks(places), _memory()]


def _disks(places: dict[str, Path]) -> list[Finding]:
    """One finding per file system."""
    by_device: dict[int, tuple[list[str], Path]] = {}
    for what, place in places.items():
        while not place.exists():
            place = place.parent
        by_device.setdefault(place.stat().st_dev, ([], place))[0].append(what)
    return [disk(" and ".join(names), shutil.disk_usage(place).free) for names, place in by_device.values()]


def disk(what: str, free_bytes: float) -> Finding:
    """So much room for this."""
    mend = "free some, or set PIXELMILL_STORE, TMPDIR or XDG_CACHE_HOME to a larger disk"
    return _graded("disk", f"{free_bytes / _GB:,.1f} GB free for {what}", free_bytes / _GB, DISK_GB, mend)


def _memory() -> Finding:
    free = available_memory()
    if free is None:
        return ok("memory", "this system does not say how much is free")
    return memory(free)


def memory(free_bytes: float) -> Finding:
    """So much memory."""
    mend = "give it more memory, or fewer --slots and a smaller --batch-size"
    return _graded("memory", f"{free_bytes / _GB:,.1f} GB free", free_bytes / _GB, MEMORY_GB, mend)


def available_memory() -> int | None:
    """Bytes that a new process can have: what the machine has left, or the container if that is less."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    for limit, used in zip(_CGROUP_LIMITS, _CGROUP_USES, strict=True):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return max(free, 0)


def _graded(check: str, found: str, value: float, bounds: tuple[float, float], mend: str) -> Finding:
    if value < bounds[0]:
        return problem(check, found, mend)
    return warning(check, found, mend) if value < bounds[1] else ok(check, found)
