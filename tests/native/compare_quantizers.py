"""Compares the blocks that a build for another processor makes with those made here.

Runs `PROGRAM... TYPE_ID COLUMNS`: quantize_stream, with the emulator before it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from localds import _native
from localds.ops.tensors import COMPUTED

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_quantizers import COLUMNS, importance, samples

rows = np.concatenate([x[:4] for _, x in samples()])
weights = importance()
sent = np.concatenate([weights[None], rows]).astype("<f4").tobytes()
different = []
for kind in COMPUTED:
    command = [*sys.argv[1:], str(int(kind)), str(COLUMNS)]
    blocks = subprocess.run(command, input=sent, stdout=subprocess.PIPE, check=True).stdout
    if blocks != _native.quantize(int(kind), rows, weights).tobytes():
        different.append(kind.name)
if different:
    sys.exit(f"not the same bits as here: {', '.join(different)}")
print(f"the same bits as here in {len(COMPUTED)} types")
