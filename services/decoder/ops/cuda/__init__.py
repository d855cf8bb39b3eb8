"""The `cuda` backend: kernels of our own, compiled through MLX, over a pool in GPU memory."""
