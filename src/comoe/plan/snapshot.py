"""What the device is like at one moment, as the scheduler sees it. `device.monitor` reads it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Bytes, fractions and rates; None where this machine does not tell.

    `available` is what the process may still take: the least that any of its cgroups, or the machine, has left.
    `limit` is the most that it may ever have. `some` and `full` are the shares of the last ten seconds in which some,
    or all, processes waited for memory. `cores` may compute at once; `read_bps` is the rate of the reads since the last
    snapshot; `battery` is its charge, None without one or on mains; `heat_c` the hottest sensor in degrees Celsius.
    """

    limit: int
    available: int
    some: float | None = None
    full: float | None = None
    cores: float | None = None
    read_bps: float | None = None
    battery: float | None = None
    heat_c: float | None = None
