"""What quantization costs the guide: python bench/guide_quantization.py.

A trained model, if a small one: real routing and real text. Scores conversations on phrasings that
were kept out of its training, beside the shipped Q8_0 file, for presets and for `fit:` of the
presets' sizes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

import localds
from convert import convert, open_source
from localds.catalog.resolve import DEMO
from localds.evaluate import evaluate
from localds.scores import compare, perplexity
from training.windows import conversations

PRESETS = ("Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q4_0", "Q3_K_M", "Q2_K")
FITTED = ("Q4_K_M", "Q3_K_M", "Q2_K")
COUNT, SIZE = 40, 512


def main() -> None:
    print("| type | bytes | perplexity | mean KL | same top token |")
    print("|---|---|---|---|---|")
    with localds.load(DEMO) as reference, tempfile.TemporaryDirectory() as folder:
        windows = conversations(reference, COUNT, SIZE)
        sizes = {}
        for preset in PRESETS:
            path = Path(folder) / f"{preset}.gguf"
            sizes[preset] = report(path, preset, preset, reference, windows)
        for preset in FITTED:
            path = Path(folder) / "fit.gguf"
            report(path, f"fit:{sizes[preset]}", f"fit, {preset}'s size", reference, windows)


def report(path: Path, recipe: str, name: str, reference: localds.Model, windows: object) -> int:
    convert(open_source(str(DEMO)), path, recipe=recipe, force=True)
    with localds.load(path) as model:
        scores = evaluate(model, windows, reference)
    apart = compare(scores)
    print(
        f"| {name} | {path.stat().st_size} | {perplexity(scores.nll).value:.3f} "
        f"(Q8_0 {apart.reference_perplexity.value:.3f}) | {apart.mean_kl.value:.5f} "
        f"| {100 * apart.same_top.value:.1f}% |"
    )
    return path.stat().st_size


if __name__ == "__main__":
    main()
