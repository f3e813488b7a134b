"""Which splitter a byte-level tokenizer uses (`tokenizer.ggml.pre`), told by what it does.

GGUF names the way of cutting text before merging, tokenizer.json spells it out. A published
vocabulary is known by the hash of its ids for a fixed text, the same that llama.cpp's converter
uses. Any other is known by its splitter cutting probing texts exactly as one that localds has.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from convert.config import CheckpointError
from localds.pretokenizers import SPLITTINGS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tokenizers import Tokenizer

# llama.cpp's check text, character for character: the hashes below are those of its ids.
CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n\U0001f680 (normal) \U0001f636\u200d"
    "\U0001f32b\ufe0f (multiple emojis concatenated) \u2705 \U0001f999\U0001f999 3 33 333 3333 "
    "33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "\u1780\u17b6\u1793\u17cb\u178f\u17c2\u1796\u17b7\u179f\u17c1\u179f\u17a2\u17b6\u1785"
    "\U0001f601 ?\u6211\u60f3\u5728apple\u5de5\u4f5c1314151\u5929\uff5e ------======= "
    "\u043d\u0435\u0449\u043e \u043d\u0430 \u0411\u044a\u043b\u0433\u0430\u0440\u0441\u043a\u0438 "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
PUBLISHED = {
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "877081d19cf6996e2c4ff0e1236341e9b7bde288f5311a56a937f0afbbb3aeb5": "deepseek-v3",
    "a1336059768a55c99a734006ffb02203cd450fed003e9a71886c88acf24fdbc2": "glm4",
    "9ca2dd618e8afaf09731a7cf6e2105b373ba6a1821559f258b272fe83e6eb902": "glm4",
    "cdf5f35325780597efd76153d4d1c16778f766173908894c04afc20108536267": "glm4",
    "81212dc7cdb7e0c1074ca62c5aeab0d43c9f52b8a737be7b12a777c953027890": "kimi-k2",
    "9d70134b369a70e5735009b6de918f7581b5211f7c074d1f89f753aea8248af1": "youtu",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
}
# Cuts that tell the splitters apart: case, marks, digits, scripts, white space, paths.
PROBES = (
    CHECK_TEXT,
    "getHTTPResponse camelCase ABCdef a\u0301e\u0301 x1y22z333 \u00bd\u0663\u0664 //a/b\n/\n",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3001\ud55c\uad6d\uc5b4\uff01\uff1f "
    "\u3105\u3106 \u3131 \u2026\u201c\u201d\u2014 ABC\u6f22\u5b57def \u4e00A\u4e00",
    "tabs\t\tand  spaces   \r\n\r\n  end  \u00a0\u3000x!hello #define _name $x = {};\n\n\n ",
)
# Splitters that cut alike stand under one name here; the first is what convert writes.
CANDIDATES = ("deepseek-llm", "deepseek-v3", "kimi-k2", "glm4", "youtu", "tekken", "gpt-2")


def find_pre(tokenizer: Tokenizer, bos: int | None, path: Path) -> str:
    """Name the splitter of `tokenizer`, which was read from `path`. `bos` is its bos token's id.

    Raises `CheckpointError` for one that localds does not have.
    """
    plain = tokenizer.encode(CHECK_TEXT, add_special_tokens=False).ids
    # The published hashes were taken with whatever each tokenizer puts before a text.
    for ids in (plain, [bos, *plain], tokenizer.encode(CHECK_TEXT).ids):
        pre = PUBLISHED.get(hashlib.sha256(str(ids).encode()).hexdigest())
        if pre is not None:
            return pre
    cuts = _cuts(tokenizer.pre_tokenizer.pre_tokenize_str) if tokenizer.pre_tokenizer else None
    for pre in CANDIDATES if cuts else ():
        if cuts == _cuts(SPLITTINGS[pre].build().pre_tokenize_str):
            return pre
    raise CheckpointError(
        f"{path}: the tokenizer cuts text in a way that localds does not know; if it is a variant "
        f"of a known one, name that with --pre ({', '.join(CANDIDATES)})"
    )


def _cuts(split: Callable[[str], list[tuple[str, tuple[int, int]]]]) -> list[list[str]]:
    return [[piece for piece, _ in split(text)] for text in PROBES]
