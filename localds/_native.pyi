# ruff: noqa: A002 - the names are those of the native arguments
"""The native library.

Arrays are C-contiguous; a wrong dtype raises TypeError, a wrong size ValueError. Types are GGUF
ids. Every call that computes releases the GIL; calls of several threads take turns.
"""

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float32]

# ---- weights and kernels ----

class Matrix:
    """`batch` matrices [rows, cols] as they lie in `data` uint8, which is kept alive.

    Without `batch_bytes` they follow one another and fill `data` exactly.
    """

    def __init__(
        self,
        type: int,
        rows: int,
        cols: int,
        batch: int,
        data: NDArray[np.uint8],
        batch_bytes: int | None = None,
    ) -> None: ...
    @property
    def type(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

def matmul(matrix: Matrix, x: _Floats, batch: int = 0, kernel: str = "auto") -> _Floats: ...
def dequantize(matrix: Matrix) -> _Floats: ...
def quantize(type: int, x: _Floats, importance: _Floats | None = None) -> NDArray[np.uint8]: ...
def gemm_nt(a: _Floats, b: _Floats, near: bool = False) -> _Floats: ...
def gemm_nn(a: _Floats, b: _Floats, c: _Floats, near: bool = False) -> _Floats: ...
def rms_norm(x: _Floats, weight: _Floats, eps: float) -> _Floats: ...
def swiglu(gate: _Floats, up: _Floats) -> _Floats: ...
def exp_sum(x: _Floats, max: float) -> tuple[_Floats, float]: ...
def available_isas() -> list[str]: ...
def select_isa(name: str) -> None: ...
def isa() -> str: ...

# ---- weights of checkpoints to float32, written to `out`, on all threads ----

def widen(type: str, data: NDArray[np.uint8], out: _Floats) -> None:
    """Values of F16, BF16, F8_E4M3 or F8_E5M2 (as safetensors names them), uint8 [nbytes]."""

def scale_fp8(
    type: str,
    data: NDArray[np.uint8],
    scales: _Floats,
    block_rows: int,
    block_columns: int,
    first_row: int,
    out: _Floats,
) -> None:
    """F8_E4M3 or F8_E5M2 [rows, columns] times the scale of each value's block.

    `scales` [block rows, block columns] are those of the whole matrix, and `first_row` says where
    in it `data` begins; the last blocks may reach beyond the matrix.
    """

def unpack_integers(
    bits: int,
    packed: NDArray[np.uint32],
    scales: _Floats,
    zeros: NDArray[np.uint8] | None,
    group: int,
    out: _Floats,
) -> None:
    """(integer - zero) * scale for integers of 4 or 8 bits, packed low bits first [rows, words].

    `out` is [rows, columns], `scales` and `zeros` [rows, groups]; without zeros it is the middle,
    2^(bits - 1).
    """

# ---- threads ----

def set_threads(threads: int) -> None: ...
def threads() -> int: ...
def default_threads() -> int: ...
def physical_cores(root: str) -> int:
    """Cores that the affinity allows, by Linux's files below `root` (its own: ""); 0 if unknown."""

def quota_cores(root: str) -> int:
    """Whole cores' worth of time that the control groups allow, at least 1; 0 if no limit."""

# ---- where the time goes ----

class ProfiledStep:
    """What the calls of one step took: seconds, bytes of weights or cache, multiply-adds."""

    @property
    def name(self) -> str: ...
    @property
    def calls(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def bytes(self) -> int: ...
    @property
    def int8(self) -> int: ...
    @property
    def floats(self) -> int: ...

class Peaks:
    """Bytes read, int8 and float multiply-adds a second, at best."""

    @property
    def read(self) -> float: ...
    @property
    def int8(self) -> float: ...
    @property
    def floats(self) -> float: ...

def take_profile() -> list[ProfiledStep]:
    """The steps of all layers since the last call, in the order of their first calls."""

def measure_peaks(nbytes: int) -> Peaks:
    """Measure, in about a second, on all threads; reads from `nbytes` taken for that time.

    Raises `MemoryError` where there are not as many.
    """

# ---- files and experts that stay on disk ----

class ReadError(OSError):
    """A file could not be read as it was when it was opened."""

class DirectFile:
    """A file read around the system's cache."""

    def __init__(self, path: str) -> None: ...
    @property
    def size(self) -> int: ...
    def read(self, start: int, out: NDArray[np.uint8]) -> None:
        """Fill `out` from byte `start` on; position, size and address are multiples of 4096."""

class StoreStats:
    """What a store did, since it was made or last asked.

    `uses` counts experts by layer and forward, `hits` those in memory already (or on their way
    there unasked), `early` those that a read ahead had begun to fetch. `read_bytes` are all bytes
    from the disk, `wasted_bytes` what was read ahead in vain. `stall_seconds` is how long layers
    waited, `read_seconds` how long the disk was busy.
    """

    @property
    def uses(self) -> int: ...
    @property
    def hits(self) -> int: ...
    @property
    def early(self) -> int: ...
    @property
    def read_bytes(self) -> int: ...
    @property
    def wasted_bytes(self) -> int: ...
    @property
    def stall_seconds(self) -> float: ...
    @property
    def read_seconds(self) -> float: ...

class ExpertStore:
    """`layers` are (block, parts) with parts (file, offset, bytes of an expert), read together."""

    def __init__(
        self,
        files: list[str],
        layers: list[tuple[int, list[tuple[int, int, int]]]],
        experts: int,
        slots: int,
        window: int,
        ahead: int,
        most: int,
        readers: int,
    ) -> None: ...
    @property
    def slots(self) -> int: ...
    def resize(self, slots: int) -> None: ...
    def set_look_ahead(self, on: bool) -> None: ...
    def warm(self, keys: NDArray[np.int32]) -> None:
        """Keep `keys` (layer * experts + expert), as far as there is room; read them unasked."""

    def is_warm(self) -> bool: ...
    def counts(self) -> NDArray[np.uint32]:
        """Uses of each key."""

    def restore(self, counts: NDArray[np.uint32]) -> None: ...
    def resident(self) -> NDArray[np.uint8]:
        """For each key, 1 if the expert lies in memory now, else 0."""

    def fetch(
        self,
        layer: int,
        experts: NDArray[np.int32],
        outs: list[NDArray[np.uint8]],
        tokens: NDArray[np.int64] | int,
    ) -> None:
        """Copy experts to `outs`, one uint8 [len(experts), bytes] for each part of the layer.

        `experts` ascend; `tokens` is how many want each. All that are missing are read at once.
        Raises ReadError, and ValueError before anything is read.
        """

    def stats(self) -> StoreStats:
        """All that was done since the store was made."""

    def take_stats(self) -> StoreStats:
        """What was done since the last call of this method."""

# ---- layers: x float32 [n_tokens, hidden] is updated in place ----

class Recorder:
    """Sums of the squared inputs of one layer's products; see localds.ops.recording.

    Which inputs a layer records under which names stands in its header.
    """

    def __init__(self) -> None: ...
    def sums(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.int64]] | None:
        """Views of an input's squares float64 [matrices, columns] and counts int64 [matrices]."""

class MlaLayer:
    def __init__(
        self,
        norm: _Floats,
        q_a: Matrix | None,
        q_norm: _Floats | None,
        q: Matrix,
        kv_a: Matrix,
        kv_norm: _Floats,
        k_b: Matrix,
        v_b: Matrix,
        output: Matrix,
        inverse_frequencies: _Floats,
        amplitude: float,
        softmax_scale: float,
        eps: float,
        latent_eps: float,
    ) -> None: ...
    def forward(
        self,
        x: _Floats,
        cache: NDArray[np.uint8],
        cache_type: int,
        cache_width: int,
        past: int,
        recorder: Recorder | None = None,
    ) -> None: ...

class GqaLayer:
    def __init__(
        self,
        norm: _Floats,
        q: Matrix,
        k: Matrix,
        v: Matrix,
        output: Matrix,
        heads: int,
        kv_heads: int,
        inverse_frequencies: _Floats,
        amplitude: float,
        softmax_scale: float,
        eps: float,
    ) -> None: ...
    def forward(
        self,
        x: _Floats,
        cache: NDArray[np.uint8],
        cache_type: int,
        cache_width: int,
        past: int,
        recorder: Recorder | None = None,
    ) -> None: ...

class FfnLayer:
    def __init__(
        self, norm: _Floats, gate: Matrix, up: Matrix, down: Matrix, eps: float
    ) -> None: ...
    def forward(self, x: _Floats, recorder: Recorder | None = None) -> None: ...

class Router:
    def __init__(
        self,
        top_k: int,
        gating: str,
        normalize: bool,
        scale: float,
        groups: int,
        groups_used: int,
        group_score: str,
        bias: _Floats | None,
    ) -> None: ...

class MoeLayer:
    def __init__(
        self,
        norm: _Floats,
        router_weight: Matrix,
        router: Router,
        gate: Matrix,
        up: Matrix,
        down: Matrix,
        shared_gate: Matrix | None,
        shared_up: Matrix | None,
        shared_down: Matrix | None,
        eps: float,
    ) -> None: ...
    def read_from(self, store: ExpertStore, layer: int, fused: bool) -> None:
        """Take experts from a store from now on; `fused` if gate and up are one part there."""

    def look_ahead_to(self, next: MoeLayer) -> None:
        """Have the store read what `next`, the store's next layer, will probably choose."""

    def forward(self, x: _Floats, recorder: Recorder | None = None) -> None: ...
    def route(self, x: _Floats, ids: NDArray[np.int32], weights: _Floats) -> None: ...
    def add_rest(self, x: _Floats, ids: NDArray[np.int32], weights: _Floats, out: _Floats) -> None:
        """Add to `out` what the experts that are not elsewhere make of x, not yet normalized.

        `ids` and `weights` [n_tokens, top_k] are choices made elsewhere. Only `out` is changed. The
        shared expert is left out. Raises ValueError for an id that is no expert's.
        """

    def set_elsewhere(self, mask: NDArray[np.uint8]) -> None:
        """Say which experts, 1 in mask [experts], `add_rest` leaves out; `forward` runs all."""

    def uses(self) -> NDArray[np.uint64]:
        """Tokens sent to each expert so far, [experts], those elsewhere included; never waits."""

class HeadLayer:
    def __init__(self, norm: _Floats, output: Matrix, eps: float) -> None: ...
    def forward(self, x: _Floats, logits: _Floats, recorder: Recorder | None = None) -> None: ...

def embed(table: Matrix, ids: NDArray[np.int32], out: _Floats) -> None: ...
