"""What became of the data on its way to examples, in figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class DataReport:
    """Figures of training and evaluation data together, unless a field says otherwise.

    `records` were read, `examples` came of them. `tokens` are those of the examples,
    `trained_tokens` those that count in the loss. `longest` is the longest example before it was
    cut. `truncated` examples lost `lost_tokens` at their ends, `dropped` ones would have had
    nothing to learn. `split` conversations became an example for each turn, since the template
    writes earlier turns otherwise. `valid` examples are for evaluation; `repeated` are training
    examples that were left out because the evaluation files have the same. `unused` names files of
    a test split.
    """

    records: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    lost_tokens: int = 0
    dropped: int = 0
    split: int = 0
    valid: int = 0
    repeated: int = 0
    unused: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The figures as sentences; what did not happen has none."""
        told = [
            f"{self.examples:,} examples from {self.records:,} records: {self.tokens:,} tokens, "
            f"{self.trained_tokens:,} of them trained, {self.longest:,} in the longest",
            f"{self.valid:,} examples are kept for evaluation",
        ]
        if self.truncated:
            told.append(
                f"{self.truncated:,} examples were too long and lost {self.lost_tokens:,} tokens "
                "at their ends"
            )
        if self.dropped:
            told.append(f"{self.dropped:,} examples had nothing to learn within the length")
        if self.split:
            told.append(
                f"{self.split:,} conversations became an example for each turn, since the "
                "template leaves out parts of earlier turns"
            )
        if self.repeated:
            told.append(f"{self.repeated:,} examples are in the evaluation files, too: left out")
        if self.unused:
            told.append(f"not used: {', '.join(self.unused)}")
        return told
