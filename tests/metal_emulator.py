"""`mx.fast.metal_kernel` on the CPU: MLX writes the source as for a Mac, and lockstep runs it."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lockstep import Lockstep

DTYPES = {mx.float32: np.float32, mx.float16: np.float16, mx.uint32: np.uint32}

# What a function's arguments of these attributes are.
ATTRIBUTES = {
    "simdgroup_index_in_threadgroup": "flat(lockstep::thread_index) / lockstep::warp_lanes()",
    "simdgroups_per_threadgroup": "threads_per_group() / lockstep::warp_lanes()",
    "thread_index_in_simdgroup": "lockstep::lane()",
    "thread_position_in_grid": "position_in_grid()",
    "thread_position_in_threadgroup": "three(lockstep::thread_index)",
    "threadgroup_position_in_grid": "three(lockstep::block_index)",
    "threadgroups_per_grid": "three(lockstep::grid_size)",
    "threads_per_threadgroup": "three(lockstep::block_size)",
}
PARAMETER = re.compile(r"^  (.+?)([*& ]) ?(\w+) \[\[(\w+)(?:\((\d+)\))?\]\](?:,|\) \{)$", re.M)
FUNCTION = re.compile(r"^\[\[kernel\]\] void (\w+)\($", re.M)
INSTANCE = re.compile(r"\[\[kernel\]\] decltype\((\w+<.*>)\)")


@dataclass
class MetalEmulator:
    """Stands in for `mx.fast.metal_kernel`. `launched` are the functions that ran, by name."""

    lockstep: Lockstep
    real: Any = mx.fast.metal_kernel
    launched: list[str] = field(default_factory=list)
    written: dict[str, str] = field(default_factory=dict)

    def __call__(self, **definition: Any) -> Any:
        kernel = self.real(**definition)
        names = definition["input_names"], definition["output_names"]

        def call(**launch: Any) -> list[mx.array]:
            # All that the text depends on.
            inputs = [(array.dtype, array.ndim, array.size < 8) for array in launch["inputs"]]
            key = str((definition, inputs, launch["template"], launch["output_dtypes"]))
            if key not in self.written:
                self.written[key] = text_of(kernel, launch)
            return self.run(self.written[key], names, launch)

        return call

    def run(
        self, text: str, names: tuple[list[str], list[str]], launch: dict[str, Any]
    ) -> list[mx.array]:
        """Run a whole source."""
        held: dict[str, np.ndarray[Any, Any]] = {}
        for name, array in zip(names[0], launch["inputs"], strict=True):
            held[name] = np.ascontiguousarray(np.array(array))
            held[f"{name}_shape"] = np.array(array.shape, np.int32)
            held[name].flags.writeable = held[f"{name}_shape"].flags.writeable = False
        outputs = zip(names[1], launch["output_shapes"], launch["output_dtypes"], strict=True)
        for name, shape, dtype in outputs:
            held[name] = np.empty(shape, DTYPES[dtype])
            held[name].view(np.uint8).fill(0xFF)  # NaN
        groups, rest = zip(*map(divmod, launch["grid"], launch["threadgroup"]), strict=True)
        assert not any(rest), "groups that are not whole"
        function = FUNCTION.search(text)
        assert function is not None
        self.launched.append(function[1])
        buffers, arguments = [], []
        head = text[function.end() : text.index("{\n", function.end()) + 1]
        for kind, mark, name, attribute, index in PARAMETER.findall(head):
            if attribute != "buffer":
                arguments.append(ATTRIBUTES[attribute])
                continue
            assert int(index) == len(buffers)
            buffers.append(held[name])
            of_type = re.sub(r"\b(device|constant)\b", "", kind)
            buffer = f"lockstep::buffer<{of_type}>({index})"
            arguments.append(f"*{buffer}" if mark == "&" else buffer)
        # The instance of the template is asked for in a way that is not C++.
        text, *named = text.split("\ntemplate [[host_name")
        instance = INSTANCE.search(named[0]) if named else None
        self.lockstep.run(
            f'#include "metal_shim.h"\n{text}',
            f"{instance[1] if instance else function[1]}({', '.join(arguments)});",
            buffers,
            blocks=groups,
            threads=launch["threadgroup"],
        )
        return [mx.array(held[name]) for name in names[1]]


def text_of(kernel: Any, launch: dict[str, Any]) -> str:
    """The source that MLX would give to Metal, which it prints when a launch is exported."""

    def traced(*inputs: mx.array) -> list[mx.array]:
        return kernel(**(launch | {"inputs": list(inputs), "verbose": True}))

    with tempfile.TemporaryDirectory() as folder, printed(Path(folder) / "text") as text:
        mx.export_function(str(Path(folder) / "kernel.mlxfn"), traced, *launch["inputs"])
        return text.read_text().split("```\n")[1]


@contextmanager
def printed(file: Path) -> Iterator[Path]:
    """A file with what is printed meanwhile, by C++ as well."""
    sys.stdout.flush()
    before = os.dup(1)
    with file.open("wb") as opened:
        os.dup2(opened.fileno(), 1)
    try:
        yield file
    finally:
        os.dup2(before, 1)
        os.close(before)
