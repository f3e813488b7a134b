"""A disk that fails, in a program of its own whose reads are made to."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from offloading import budget_for

SHIM = Path(__file__).parent / "native/faulty_disk.c"
COMPILER = shutil.which("cc") or shutil.which("gcc")

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs LD_PRELOAD"),
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
]

PROGRAM = """
import sys
from pathlib import Path
import numpy as np
import localds

path, budget, trigger = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
ids = [(7919 * i + 11) % 1024 for i in range(200)]
with localds.load(path) as model:
    expected = model.session(256).evaluate(ids, all_logits=True)
with localds.load(path, ram=budget) as model:
    model.offload.store.wait_warm()
    session = model.session(256)
    trigger.touch()
    print("ready", flush=True)
    try:
        session.evaluate(ids)
        print("no error", flush=True)
    except (OSError, KeyboardInterrupt) as error:
        print(type(error).__name__, error, flush=True)
    trigger.unlink()
    session.truncate(0)
    same = session.evaluate(ids, all_logits=True).view(np.uint32) == expected.view(np.uint32)
    print("same" if same.all() else "different", flush=True)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("shim") / "faulty_disk.so"
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-O1", "-o", library, SHIM], check=True)
    return library


def start(fault: str, shim: Path, guide_path: Path, folder: Path) -> subprocess.Popen[str]:
    trigger = folder / "trigger"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM, guide_path, str(budget_for(guide_path, 14)), trigger],
        env=os.environ | {"LD_PRELOAD": str(shim), "FAULT": fault, "FAULT_WHEN": str(trigger)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("error", r"layer \d+, expert \d+: reading \d+ bytes at byte \d+ failed \(Input/output"),
        ("empty", r"layer \d+, expert \d+: the file gives nothing at byte \d+"),
        ("short", "no error"),
    ],
)
def test_error_or_service(
    fault: str, expected: str, shim: Path, guide_path: Path, tmp_path: Path
) -> None:
    """A failed read is told and leaves the model usable; one that ends early goes on."""
    output, _ = start(fault, shim, guide_path, tmp_path).communicate(timeout=120)
    ready, outcome, after = output.splitlines()
    assert ready == "ready"
    assert re.search(expected, outcome), outcome
    assert after == "same"


def test_ctrl_c_ends_a_wait_for_the_disk(shim: Path, guide_path: Path, tmp_path: Path) -> None:
    process = start("slow", shim, guide_path, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline().startswith("KeyboardInterrupt")
    assert time.monotonic() - started < 1
    output, _ = process.communicate(timeout=120)
    assert output == "same\n"
