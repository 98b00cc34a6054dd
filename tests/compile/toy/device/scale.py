"""Turns a vector into its multiple: the smallest kernel with everything that a real one has."""

import cutlass
import cutlass.cute as cute

THREADS = 128


class Scale:
    """y = factor * x over a vector whose length is known at run time."""

    def __init__(self, factor):
        self.factor = factor

    @cute.kernel
    def kernel(self, x: cute.Tensor, y: cute.Tensor, length: cutlass.Int32):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        at = block * THREADS + thread
        if at < length:
            y[at] = (x[at].to(cutlass.Float32) * self.factor).to(y.element_type)

    @cute.jit
    def __call__(self, x: cute.Tensor, y: cute.Tensor, length: cutlass.Int32, stream):
        blocks = (length + THREADS - 1) // THREADS
        self.kernel(x, y, length).launch(grid=[blocks, 1, 1], block=[THREADS, 1, 1], stream=stream)
