"""What the tensors of a training step take, by kind: followed from storage to storage.

`Memory` is a mode of torch's dispatcher: while it is active, every storage that an operation makes
is counted until it is freed. It works for real tensors and for fake ones alike, which have shapes
and storages but no contents: so the real training code says what a card would need
(training/plan.py). It counts bytes as they are asked for; what an allocator adds, it cannot see.
"""

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# What no one has marked: activations, logits, temporaries, layers that FSDP2 has put together.
ACTIVATIONS = "other"
# What lies in the host's memory. It does not count as memory of the card.
HOST = "host"


class Memory(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, by kind.

    now: bytes by kind. peaks: for each phase, the bytes by kind at the moment of its largest total.
    """

    def __init__(self):
        super().__init__()
        self.now: dict[str, int] = defaultdict(int)
        self.peaks: dict[str, dict[str, int]] = {}
        self.current_phase = "setup"
        # By a storage's address: its kind, its bytes, and a weak reference that tells of its end.
        self.storages: dict[int, tuple[str, int, weakref.ref]] = {}

    # --- What the caller says ---

    def mark(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """Says which kind of memory these tensors are. They count from now on, if they did not."""
        for tensor in tensors:
            if tensor is not None:
                self.count(tensor, kind)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Gives a name to what happens inside."""
        before = self.current_phase
        self.enter(name)
        yield
        self.current_phase = before

    def enter(self, phase: str) -> None:
        """Begins a phase, or goes on with it."""
        self.current_phase = phase
        self.update_peak()

    # --- What torch says ---

    def __enter__(self):
        self.fake_mode = active_fake_mode()
        # FSDP frees and fills a gathered weight by resizing its storage, which is no operation.
        self.resize = torch.UntypedStorage.resize_
        memory = self

        def resize_(storage, size):
            memory.resize(storage, size)
            memory.resized(storage)

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # A DTensor's operation comes again, as operations on this rank's part of it.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        results = func(*args, **(kwargs or {}))
        for result in [results] if isinstance(results, Tensor) else tree_iter(results):
            if isinstance(result, Tensor) and not self.is_shape_inference():
                self.count(result)
        return results

    def is_shape_inference(self) -> bool:
        """Returns whether DTensor is only trying an operation out, for the shapes of its results:
        on fake tensors of its own, as large as all ranks' parts together."""
        return active_fake_mode() is not self.fake_mode

    # --- The books ---

    def count(self, tensor: Tensor, kind: str | None = None) -> None:
        """Counts a tensor's storage; a new one as activations, unless a kind is given."""
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        if tensor.device.type == "meta":  # a name and a shape, without memory
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.storages:
            if kind is not None:
                self.forget(key)
            else:
                return
        ended = weakref.ref(storage, lambda _: self.forget(key))
        self.add(key, kind or ACTIVATIONS, storage.nbytes(), ended)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Follows a storage that has another size now."""
        key = storage._cdata
        if key in self.storages:
            kind, _, ended = self.storages[key]
            self.forget(key)
            self.add(key, kind, storage.nbytes(), ended)

    def add(self, key: int, kind: str, size: int, ended: weakref.ref) -> None:
        self.storages[key] = (kind, size, ended)
        self.now[kind] += size
        self.update_peak()

    def forget(self, key: int) -> None:
        kind, size, _ = self.storages.pop(key)
        self.now[kind] -= size

    def update_peak(self) -> None:
        """Writes down the present, if it is the most of this phase."""
        peak = self.peaks.get(self.current_phase)
        if peak is None or on_card(self.now) > on_card(peak):
            self.peaks[self.current_phase] = dict(self.now)


def on_card(sizes: dict[str, int]) -> int:
    """Returns the sum of bytes by kind, without what lies on the host."""
    return sum(size for kind, size in sizes.items() if kind != HOST)
