"""Training of low-rank adapters on top of a quantized model."""
