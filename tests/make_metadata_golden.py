"""Write tests/golden/metadata/ with llama.cpp's converter. Needs torch and transformers.

usage: LOCALDS_LLAMA_CPP_SOURCE=path/to/llama.cpp python tests/make_metadata_golden.py [CASE ...]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from llama_converter import convert_with_llama_cpp, find_converter
from metadata_cases import CASES, GOLDEN_METADATA, their_metadata, write_case
from special_cases import SPECIAL_CASES, write_special_case

SPECIAL = "special_tokens"
SPECIAL_PROGRAM = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import gguf
for folder in sorted(Path(sys.argv[2]).iterdir()):
    writer = gguf.GGUFWriter(None, "x")
    gguf.SpecialVocab(folder).add_to_gguf(writer)
    keys = {key.removeprefix("tokenizer.ggml."): v.value for key, v in writer.kv_data[0].items()}
    keys.pop("general.architecture")
    print(json.dumps(keys))
"""


def main(names: list[str]) -> None:
    source = find_converter()
    GOLDEN_METADATA.mkdir(exist_ok=True)
    for name in names or [*CASES, SPECIAL]:
        if name == SPECIAL:
            write_special_tokens(source)
            continue
        case = CASES[name]
        with tempfile.TemporaryDirectory() as parent:
            folder = write_case(case, Path(parent))
            output = Path(parent) / "llama.gguf"
            convert_with_llama_cpp(source, folder, output, *case.options, pre=case.pre)
            keys = their_metadata(output)
        lines = (f"{json.dumps(key)}: {json.dumps(keys[key])}" for key in sorted(keys))
        text = "{\n " + ",\n ".join(lines) + "\n}\n"
        (GOLDEN_METADATA / f"{name}.json").write_text(text, encoding="utf-8")


def write_special_tokens(source: Path) -> None:
    """What llama.cpp's reader makes of the random special tokens, a line for each case."""
    with tempfile.TemporaryDirectory() as parent:
        for index in range(SPECIAL_CASES):
            folder = Path(parent) / f"{index:03}"
            folder.mkdir()
            write_special_case(index, folder)
        command = [sys.executable, "-c", SPECIAL_PROGRAM, source / "gguf-py", parent]
        lines = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    text = "[\n " + ",\n ".join(lines.splitlines()) + "\n]\n"
    (GOLDEN_METADATA / f"{SPECIAL}.json").write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
