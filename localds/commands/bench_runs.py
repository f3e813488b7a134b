"""The measurements of `localds bench`: runs of a model, and what the machine can do at best."""

from __future__ import annotations

import math
import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self

from localds import _native
from localds.commands.bench_gpu import decode_limit, gpu_peaks, hits_between
from localds.limits import Peaks, ProfileRow, Step, add_up, least_time, profile_rows
from localds.memory.disk import measure_disk
from localds.memory.speeds import measure_peaks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from localds.commands.bench_gpu import GpuPeaks
    from localds.model import Model
    from localds.session import Session


@dataclass(frozen=True, slots=True)
class Profile:
    """Where the time of a measurement went, on average for a generated token or a prefill."""

    per: Literal["token", "run"]
    steps: list[ProfileRow]
    outside_us_per_layer: float
    """Microseconds outside the kernels for each call of a layer."""


@dataclass(frozen=True, slots=True)
class Record:
    """One measurement; names as in llama-bench. Speeds in tokens per second.

    `limit_ts` is the speed that the bytes and multiply-adds of this measurement allow a machine
    that does nothing else and wastes nothing (`localds.limits` says which are counted), `limit_by`
    which of the two it is. The machine's own speeds were measured in the same run, on as many
    threads: gigabytes read, and thousand million multiply-adds, a second.

    Where experts stay on disk, `disk_gbs` is what the disk was measured to give, `hit_rate` the
    share of experts that were in memory when a layer needed them, `read_gbps` gigabytes a second
    while something was read, and `stall_ms` the time a token waited for it. None elsewhere.

    On a GPU, `gpu` is its name, `gpu_gbs` gigabytes a second from its memory and `upload_gbs` to it
    from RAM, and `gpu_hit_rate` the share of experts that lay there when they were used, where not
    all do. A limit is known there for decoding alone.
    """

    model: str
    threads: int
    isa: str
    cache_type: str
    n_prompt: int
    n_gen: int
    n_depth: int
    avg_ts: float
    stddev_ts: float
    samples_ts: list[float]
    limit_ts: float | None
    limit_by: str | None
    read_gbs: float
    int8_gops: float
    float_gops: float
    profile: Profile
    disk_gbs: float | None = None
    hit_rate: float | None = None
    read_bytes_per_token: float | None = None
    read_gbps: float | None = None
    stall_ms: float | None = None
    gpu: str | None = None
    gpu_gbs: float | None = None
    upload_gbs: float | None = None
    gpu_hit_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to measure: each prompt and generation at each depth, all in tokens."""

    prompts: Sequence[int]
    generates: Sequence[int]
    depths: Sequence[int]
    repetitions: int
    cache_type: str
    chunk: int
    ram: str | None

    @property
    def context(self) -> int:
        """Tokens of the session that all measurements share."""
        longest = max(self.depths) + max((*self.prompts, *self.generates), default=0)
        return max(longest, 1)


def measure(model: Model, wanted: Wanted) -> Iterator[Record]:
    """Yield the records as they come, by depth.

    Raises `ContextError` where the model was not made for so many tokens.
    """
    session = model.session(wanted.context, cache_type=wanted.cache_type, chunk=wanted.chunk)
    # Before the weights come into memory, which may not hold both.
    with model.offload.lent() if model.offload else nullcontext():
        peaks = measure_peaks(wanted.ram)
        on_gpu = gpu_peaks(model)
    # Fault the weights in and wake the threads before anything is timed.
    session.evaluate(_tokens(model, min(wanted.chunk, wanted.context)))
    for n_depth in sorted(wanted.depths):
        _fill(model, session, n_depth)
        tests = [(n, 0) for n in wanted.prompts] + [(0, n) for n in wanted.generates]
        for n_prompt, n_gen in tests:
            with _DiskSpeed(model) as disk:
                runs = [
                    _run(model, session, n_depth, n_prompt, n_gen)
                    for _ in range(wanted.repetitions)
                ]
            now = replace(peaks, disk=disk.mean)
            record = _record(model, wanted, now, (n_prompt, n_gen, n_depth), runs)
            yield record if on_gpu is None else _on_gpu(record, model, on_gpu, runs)


class _DiskSpeed:
    """Measures the disk before and after a measurement, since its speed comes and goes."""

    def __init__(self, model: Model) -> None:
        self._paths = model.gguf.paths if model.offload else []
        self._speeds: list[float] = []

    def __enter__(self) -> Self:
        self._measure()
        return self

    def __exit__(self, *_: object) -> None:
        self._measure()

    def _measure(self) -> None:
        if self._paths:
            self._speeds.append(measure_disk(self._paths))

    @property
    def mean(self) -> float:
        """Bytes a second; infinite where nothing is read from disk."""
        return statistics.fmean(self._speeds) if self._speeds else math.inf


@dataclass(frozen=True, slots=True)
class _Run:
    """One prefill or one generation."""

    seconds: float
    steps: list[Step]
    store: _native.StoreStats | None
    gpu_hit_rate: float | None


def _record(
    model: Model, wanted: Wanted, peaks: Peaks, test: tuple[int, int, int], runs: Sequence[_Run]
) -> Record:
    n_prompt, n_gen, n_depth = test
    n_tokens = n_prompt or n_gen
    samples = [n_tokens / run.seconds for run in runs]
    steps = add_up(run.steps for run in runs)
    figures = [run.store for run in runs if run.store]
    least = least_time(steps, peaks, sum(store.read_bytes for store in figures))
    units = n_gen or 1  # of the profile, in each run
    passes = n_gen or -(-n_prompt // wanted.chunk)  # through all layers, in each run
    rows = profile_rows(steps, sum(run.seconds for run in runs), len(runs) * units)
    outside_ms = rows[-1].ms * units / passes
    record = Record(
        model=str(model.gguf.path),
        threads=_native.threads(),
        isa=_native.isa(),
        cache_type=wanted.cache_type,
        n_prompt=n_prompt,
        n_gen=n_gen,
        n_depth=n_depth,
        avg_ts=statistics.fmean(samples),
        stddev_ts=statistics.stdev(samples) if len(samples) > 1 else 0.0,
        samples_ts=samples,
        limit_ts=len(runs) * n_tokens / least.seconds if least.seconds else None,
        limit_by=least.by,
        read_gbs=peaks.read / 1e9,
        int8_gops=peaks.int8 / 1e9,
        float_gops=peaks.floats / 1e9,
        profile=Profile(
            per="run" if n_prompt else "token",
            steps=rows,
            outside_us_per_layer=1e3 * outside_ms / model.geometry.layers,
        ),
    )
    return replace(record, **_store_figures(figures, peaks, len(runs) * n_tokens))


def _on_gpu(record: Record, model: Model, peaks: GpuPeaks, runs: Sequence[_Run]) -> Record:
    """The record with the GPU's figures and limit in place of the CPU's."""
    limit = decode_limit(model) if record.n_gen else None
    rates = [run.gpu_hit_rate for run in runs if run.gpu_hit_rate is not None]
    return replace(
        record,
        limit_ts=limit,
        limit_by="reading" if limit else None,
        gpu_hit_rate=statistics.fmean(rates) if rates else None,
        **asdict(peaks),
    )


def _store_figures(
    figures: Sequence[_native.StoreStats], peaks: Peaks, tokens: int
) -> dict[str, Any]:
    """The record's figures of experts on disk, for so many tokens in all."""
    if not figures:
        return {}
    uses = sum(store.uses for store in figures)
    read = sum(store.read_bytes for store in figures)
    seconds = sum(store.read_seconds for store in figures)
    return {
        "disk_gbs": peaks.disk / 1e9,
        "hit_rate": sum(store.hits for store in figures) / uses if uses else 1.0,
        "read_bytes_per_token": read / tokens,
        "read_gbps": read / seconds / 1e9 if seconds else 0.0,
        "stall_ms": 1e3 * sum(store.stall_seconds for store in figures) / tokens,
    }


def _fill(model: Model, session: Session, depth: int) -> None:
    """Bring the cache to exactly `depth` tokens, keeping what is there."""
    session.truncate(min(depth, len(session.tokens)))
    missing = depth - len(session.tokens)
    if missing:
        session.evaluate(_tokens(model, missing))


def _run(model: Model, session: Session, depth: int, n_prompt: int, n_gen: int) -> _Run:
    """Time one prefill or one generation at `depth`."""
    session.truncate(depth)
    ids = _tokens(model, n_prompt or n_gen)
    _native.take_profile()  # what came before
    if model.offload:
        model.offload.store.take_figures()
    hits = model.on_gpu.hits() if model.on_gpu else (0, 0)
    started = time.perf_counter()
    if n_prompt:
        session.evaluate(ids)
    elif _steps_ahead(model):
        session.follow(session.evaluate(ids[:1])[0], n_gen - 1)
    else:
        for token in ids:
            session.evaluate([token])
    seconds = time.perf_counter() - started
    profile = _native.take_profile()
    return _Run(
        seconds,
        [Step(s.name, s.calls, s.seconds, s.bytes, s.int8, s.floats) for s in profile],
        model.offload.store.take_figures() if model.offload else None,
        hits_between(hits, model.on_gpu.hits())
        if model.on_gpu and not model.on_gpu.placement.resident
        else None,
    )


def _steps_ahead(model: Model) -> bool:
    """Whether tokens are generated with the next step begun before the last is read."""
    return model.on_gpu is not None and model.on_gpu.placement.resident


def _tokens(model: Model, count: int) -> list[int]:
    """Arbitrary tokens spread over the vocabulary, the same on every run."""
    return [(7919 * i + 11) % model.geometry.vocabulary for i in range(count)]
