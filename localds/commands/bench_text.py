"""What `localds bench` prints for people: its speeds beside their limits, and its profiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

from localds.limits import OUTSIDE

if TYPE_CHECKING:
    from localds.commands.bench_runs import Profile, Record
    from localds.limits import ProfileRow

HEADER = (
    f"{'test':>8}  {'depth':>6}  {'tokens/s':>18}  {'limit':>10}  {'of limit':>8}  {'bound by':>10}"
)
# So that the tables of several measurements compare; 80 columns with the spaces between.
_PROFILE_WIDTHS = (32, 5, 8, 6, 6, 8, 9)


def machine_line(record: Record) -> str:
    """What the machine was measured to do at best."""
    threads = "1 thread" if record.threads == 1 else f"{record.threads} threads"
    disk = "" if record.disk_gbs is None else f", disk {_figure(record.disk_gbs)} GB/s"
    return (
        f"{threads}, {record.isa}: reads {_figure(record.read_gbs)} GB/s, "
        f"multiplies {_figure(record.int8_gops)} (int8) and "
        f"{_figure(record.float_gops)} (float) G/s{disk}"
    )


def gpu_line(record: Record) -> str:
    """What the GPU was measured to do at best; empty without one."""
    if record.gpu is None:
        return ""
    read, upload = _figure(record.gpu_gbs or 0), _figure(record.upload_gbs or 0)
    return f"{record.gpu}: reads {read} GB/s, takes {upload} GB/s from RAM"


def record_line(record: Record) -> str:
    """One measurement, below `HEADER`; a dash where no limit is known."""
    test = f"pp{record.n_prompt}" if record.n_prompt else f"tg{record.n_gen}"
    speed = f"{record.avg_ts:.2f} ± {record.stddev_ts:.2f}"
    limit = share = "-"
    if record.limit_ts is not None:
        limit, share = f"{record.limit_ts:.2f}", f"{100 * record.avg_ts / record.limit_ts:.1f}%"
    return (
        f"{test:>8}  {record.n_depth:>6}  {speed:>18}  {limit:>10}  {share:>8}  "
        f"{record.limit_by or '-':>10}"
    )


def hits_line(record: Record) -> str:
    """How many experts lay on the GPU; empty where all do, or there is none."""
    if record.gpu_hit_rate is None:
        return ""
    return f"{'':>8}  {100 * record.gpu_hit_rate:.1f}% of the experts used lay on the GPU"


def store_line(record: Record) -> str:
    """What a measurement read from disk; empty where nothing is there."""
    if record.read_bytes_per_token is None:
        return ""
    return (
        f"{'':>8}  {100 * (record.hit_rate or 0):.1f}% of experts in memory, "
        f"{record.read_bytes_per_token / 1e6:.1f} MB a token from disk at "
        f"{record.read_gbps or 0:.2f} GB/s, waited {record.stall_ms or 0:.1f} ms"
    )


def profile_lines(profile: Profile) -> list[str]:
    """A table of the steps; blank where a step reads or multiplies nothing that is counted."""
    title = f"per {profile.per}"
    table: list[tuple[str, ...]] = [
        (title, "calls", "ms", "share", "GB/s", "int8 G/s", "float G/s")
    ]
    table += [_cells(row) for row in profile.steps]
    widths = [
        max(least, *map(len, column))
        for least, *column in zip(_PROFILE_WIDTHS, *table, strict=True)
    ]
    lines = [
        " ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in table
    ]
    lines[-1] += f" {profile.outside_us_per_layer:.1f} us a layer"
    return lines


def _cells(row: ProfileRow) -> tuple[str, ...]:
    rates = (row.gbs, row.int8_gops, row.float_gops)
    return (
        row.name,
        "" if row.name == OUTSIDE else f"{row.calls:g}",
        f"{row.ms:.3f}",
        f"{100 * row.share:.1f}%",
        *(f"{rate:.1f}" if rate else "" for rate in rates),
    )


def _figure(value: float) -> str:
    """Three digits, and no exponent for large values."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
