"""What is computed or kept at once in training: the planner counts with the same figures.

Here because importing the rooms that keep to them imports MLX.
"""

from __future__ import annotations

SCORE_BYTES = 128 << 20
"""What the scores of one block of queries take."""

LOGIT_BYTES = 128 << 20
"""What the logits of tokens that are computed at once take."""

SLICE_BYTES = 256 << 20
"""Bytes of a matrix (not of a stack) that are written out at once."""

KEPT_BYTES = 512 << 20
"""What may be kept for the gradient of the tokens that are computed at once."""

SMALL = 4096
"""Tensors of fewer values keep the optimizer's moments in float32."""

BLOCK = 256
"""Values of a tensor that share one scale in 8-bit moments."""
