"""llama.cpp's own converter, run from a source tree of the user's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from llama_cpp import VARIABLE

SOURCE_VARIABLE = "LOCALDS_LLAMA_CPP_SOURCE"
SCRIPT = "convert_hf_to_gguf.py"
# The converter knows a splitter by the hash of a published vocabulary, which small ones have not.
PROGRAM = """
import runpy, sys
source, pre = sys.argv[1:3]
sys.path[:0] = [source + "/gguf-py", source]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
sys.argv = [source + "/convert_hf_to_gguf.py", *sys.argv[3:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def find_converter() -> Path:
    """The source tree of llama.cpp. Skips the test if no variable tells where it is."""
    where = os.environ.get(SOURCE_VARIABLE)
    if where:
        if not (Path(where) / SCRIPT).is_file():
            pytest.fail(f"{SOURCE_VARIABLE} is {where}, but there is no {SCRIPT}")
        return Path(where).resolve()
    binaries = os.environ.get(VARIABLE)
    for folder in Path(binaries).resolve().parents if binaries else ():
        if (folder / SCRIPT).is_file():
            return folder
    pytest.skip(f"set {SOURCE_VARIABLE} to the source tree of llama.cpp")


def convert_with_llama_cpp(
    source: Path, folder: Path, output: Path, *options: str, pre: str, outtype: str = "f32"
) -> Path:
    """Convert the checkpoint in `folder`, telling the converter the splitter's name."""
    command = [sys.executable, "-c", PROGRAM, source, pre, folder, "--outfile", output]
    home = output.parent / "hub"
    done = subprocess.run(
        [*command, "--outtype", outtype, *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        pytest.fail(f"llama.cpp's converter: {done.stderr[-3000:].decode(errors='replace')}")
    return output
