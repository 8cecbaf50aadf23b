"""Whether the latent actions live: sums from ``Method.evaluate`` in, numbers and a verdict out. Torch alone."""

from cola_dist.diagnostics.monitor import Monitor

__all__ = ["Monitor"]
