"""CUDA graphs: many small kernels that the GPU is told to run as a whole."""

from collections.abc import Callable

import torch


class Graphs:
    """Runs pieces of work, on a GPU from graphs; elsewhere (`enabled` is false) as they are.

    One by one, the hundreds of kernels of a decoding step take longer to launch than to run. A
    graph runs the same kernels on the same addresses again. So the key must say all else that
    changes while these graphs live, which is one rollout with one set of sampling parameters; and
    no tensor, weights included, may move in that time.
    """

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.warm: set[tuple] = set()
        self.captured: dict[tuple, torch.cuda.CUDAGraph] = {}
        # The graphs never run at the same time, so they can share memory for what lies between.
        self.pool = torch.cuda.graph_pool_handle() if enabled else None

    def round_up(self, size: int, *, most: int, least: int = 1) -> int:
        """Returns a size for which there may be a graph already: the next power of two, within
        bounds. Without graphs, the size as it is."""
        if not self.enabled:
            return size
        return min(max(least, 1 << (size - 1).bit_length()), most)

    def run(self, key: tuple, work: Callable[[], None]) -> None:
        """Runs the work eagerly the first time that its key comes, and as a graph from then on."""
        if not self.enabled or key not in self.warm:
            # Run eagerly. This compiles and allocates what may not happen during a capture.
            work()
            self.warm.add(key)
            return
        if key not in self.captured:
            # Capture, which runs nothing. If it fails or is interrupted, no graph is kept.
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                work()
            self.captured[key] = graph
        # Replay.
        self.captured[key].replay()
