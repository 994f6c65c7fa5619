"""AdamW in 9 bytes a parameter: bfloat16 weights whose lost bits are kept, and small moments.

The forward pass wants bfloat16 weights, and an optimiser cannot work with those alone: a bfloat16
number has 8 significant bits, so to a weight of 0.02 nothing below 0.00003 can be added, and
learning rates are lower than that. Float32 masters beside the weights would cost 16 bytes a
parameter. Here

    weight      bfloat16   the upper half of a 24-bit master: what the forward pass sees
    low         int8       its lower 8 bits, a signed distance from the weight
    gradient    bfloat16   as autograd leaves it
    exp_avg     bfloat16   the first moment, rounded to the nearest
    exp_avg_sq  bfloat16   the second moment, rounded stochastically

make 9 bytes: 64 GiB for 7.6e9 parameters. The arithmetic of a step is float32, chunk by chunk.
`adamw_reference` defines it, and on a GPU a Triton kernel does the same (kernels/adamw_triton.py).

Rounding is stochastic (up or down, with the probabilities that make it right on average) where
rounding to the nearest would lose what is small but steady. The second moment moves by at most a
thousandth of itself a step (1 - beta2), less than half a bfloat16 step, so rounded to the nearest
it would never shrink. A master of 1 has steps of 0.00003: rounded to the nearest, it would not
follow a learning rate of 3e-6 at all. The first moment moves by a tenth (1 - beta1), and needs no
such care.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from kernels.adamw_triton import adamw_triton
from kernels.triton_or_none import use_triton

STATES = ("low", "exp_avg", "exp_avg_sq")
CHUNK = 2**24  # elements at a time; their random bits, and each float32 temporary, take 64 MiB
# A host tensor of this size has pages of its own (the C library's largest threshold for that).
OWN_PAGES = 32 * 2**20  # bytes


# --- Bits -----------------------------------------------------------------------------------------
# A float's bits, read as an integer, are its sign and its magnitude: adding to them makes the
# magnitude larger, whatever the sign, and a carry out of the mantissa goes on into the exponent, as
# it should. So numbers can be rounded and taken apart by integer arithmetic, exactly.


def join(high: Tensor, low: Tensor) -> Tensor:
    """Returns the float32 masters of weights `high` (bfloat16) and their lower bits (int8)."""
    bits = high.view(torch.int16).to(torch.int32)
    bits.bitwise_left_shift_(8).add_(low).bitwise_left_shift_(8)
    return bits.view(torch.float32)


def split(master: Tensor, noise: Tensor | int) -> tuple[Tensor, Tensor]:
    """Returns `high` (bfloat16, the nearest to the master) and `low` (int8) of float32 masters.

    Float32 has 8 bits more than both hold together. They are rounded off: to the nearest for noise
    0x80, stochastically for noise that is uniform in 0 to 0xFF. What `join` returned is split into
    the same again, whatever the noise.
    """
    bits = (master.view(torch.int32) + noise).bitwise_right_shift_(8)
    high = (bits + 0x80).bitwise_right_shift_(8)
    low = bits.sub_(high << 8)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int8)


def round_stochastically(x: Tensor, noise: Tensor) -> Tensor:
    """Returns x (float32) in bfloat16, right on average for noise uniform in 0 to 0xFFFF."""
    bits = (x.view(torch.int32) + noise).bitwise_right_shift_(16)
    return bits.to(torch.int16).view(torch.bfloat16)


def random_low(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Returns lower bits to start from: uniform within the step that rounds to the weight.

    Masters that begin on bfloat16's grid, all low bits 0, have a dead zone: no visible weight moves
    before its master has moved half a step, for tens of optimiser steps at a rate of 3e-6. At
    random places within the step some cross over at once, and as many as should.

    A weight of 0 keeps low = 0: below it is no smaller magnitude, and its bits would become NaN's.
    """
    low = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    return low.random_(-128, 128, generator=generator).mul_(weight != 0)


def off_the_grid(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Returns float32 masters at random places within the bfloat16 steps of a float32 tensor whose
    values lie on bfloat16's grid. They round to the same bfloat16 values; zeros stay.

    This is `random_low` for masters that have all their bits, as FSDP2's float32 shards do. The
    result is new memory; besides it no more than a chunk is needed. The generator is to be on the
    tensor's device.
    """
    masters = tensor.clone(memory_format=torch.contiguous_format)
    for values in masters.view(-1).split(CHUNK):
        # Half a step is 0x8000. The ends are left out: a tie may round to the neighbour.
        noise = torch.empty_like(values, dtype=torch.int32)
        noise.random_(-0x7FFF, 0x8000, generator=generator)
        values.view(torch.int32).add_(noise.mul_(values != 0))
    return masters


# --- A step's arithmetic --------------------------------------------------------------------------


def adamw_reference(
    weight: Tensor,
    grad: Tensor,
    low: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    noise: Tensor,
    clip_factor: Tensor | None,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Takes AdamW's step number `step` on the first five, each [n], in place but for the gradient.
    Adam: arXiv 1412.6980, algorithm 1; decoupled decay: arXiv 1711.05101.

    noise [n]: random bits, int32, of which the lower 24 are used. clip_factor []: what the gradient
    is scaled with; None: not at all.
    """
    beta1, beta2 = betas
    # 1. What was stored, in float32.
    master = join(weight, low)
    gradient = grad.float()
    if clip_factor is not None:
        gradient.mul_(clip_factor)
    m, v = exp_avg.float(), exp_avg_sq.float()

    # 2. The moments.
    m.lerp_(gradient, 1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)

    # 3. Decay and step. The moments began at 0: the divisions make up for that.
    master.mul_(1 - lr * weight_decay)
    denominator = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    master.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))

    # 4. Back into few bits. Of 24 random bits, 8 are for the master, 16 for v.
    high, new_low = split(master, noise & 0xFF)
    weight.copy_(high)
    low.copy_(new_low)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(round_stochastically(v, (noise >> 8) & 0xFFFF))


# --- The optimiser --------------------------------------------------------------------------------


class CompactAdamW(torch.optim.Optimizer):
    """The mathematics of torch.optim.AdamW for bfloat16 weights, in 9 bytes a parameter.

    state[weight] is made here and always complete, so that a checkpoint is loaded into it in place:
    "step", the number of steps, a float32 scalar on the host as AdamW's; "low", "exp_avg" and
    "exp_avg_sq", shaped like the weight. (Optimizer.load_state_dict is not the way to load them: it
    casts all states to the weight's dtype.)

    states_on: where these three lie; None: beside the weights. From the host they pass through the
    weights' device at each step. As all arithmetic is done there, results are the same bits.
    seed: the random bits of a weight's step are a function of (seed, the weight's number, its
    step) alone. Nothing random has to be saved, and a resumed run goes on bit for bit.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        states_on: torch.device | None = None,
        seed: int = 0,
    ):
        """Raises ValueError for weights that are not contiguous bfloat16."""
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.seed = seed
        self.clip_factor = None  # set by `clip` for the step that follows
        for number, weight, _ in self.weights():
            if weight.dtype != torch.bfloat16 or not weight.is_contiguous():
                raise ValueError("CompactAdamW is for contiguous bfloat16 weights")
            device = states_on or weight.device
            low = torch.zeros(weight.shape, dtype=torch.int8, device=device)
            state = {
                "step": torch.zeros((), dtype=torch.float32, device="cpu"),
                "low": low,
                "exp_avg": torch.zeros(weight.shape, dtype=weight.dtype, device=device),
                "exp_avg_sq": torch.zeros(weight.shape, dtype=weight.dtype, device=device),
            }
            if weight.is_cuda and device.type == "cpu":
                for name in STATES:
                    pin(state[name])
            self.state[weight] = state
            generator = self.generator(number, weight, step=0)
            for values, part in zip(chunks(weight.detach()), chunks(low)):
                part.copy_(random_low(values, generator))

    def weights(self) -> Iterator[tuple[int, nn.Parameter, dict]]:
        """Yields (number, weight, its group's hyperparameters), always in the same order."""
        number = 0
        for group in self.param_groups:
            for weight in group["params"]:
                yield number, weight, group
                number += 1

    def generator(self, number: int, weight: Tensor, step: int) -> torch.Generator:
        """Returns the source of random bits of a weight's step."""
        mixed = (self.seed * 1_000_003 + number) * 1_000_003 + step
        return torch.Generator(weight.device).manual_seed(mixed % 2**63)

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Returns the norm of all gradients together (float32), which the next step scales to at
        most max_norm. The gradients themselves stay as they are: bfloat16 would round again.

        The caller has to look at the norm before `step`: one that is not finite spoils the weights.
        """
        norms = [
            torch.linalg.vector_norm(part, dtype=torch.float32)
            for _, weight, _ in self.weights()
            if weight.grad is not None
            for part in chunks(weight.grad)
        ]
        if not norms:
            return torch.zeros(())
        norm = torch.linalg.vector_norm(torch.stack(norms))
        self.clip_factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    @torch.no_grad()
    def step(self) -> None:
        """Takes a step with each weight that has a gradient. Others are passed over, as in AdamW:
        their number of steps stays, too."""
        for number, weight, group in self.weights():
            if weight.grad is None:
                continue
            state = self.state[weight]
            state["step"] += 1
            step = int(state["step"].item())
            generator = self.generator(number, weight, step)
            tensors = [weight, weight.grad, *(state[name] for name in STATES)]
            for parts in zip(*map(chunks, tensors)):
                self.update(*parts, step=step, group=group, generator=generator)
        self.clip_factor = None
        # Copies to the host may still be under way: whoever reads the states next must see them.
        for device in {weight.device for _, weight, _ in self.weights() if weight.is_cuda}:
            torch.cuda.synchronize(device)

    def update(
        self,
        weight: Tensor,
        grad: Tensor,
        low: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        *,
        step: int,
        group: dict,
        generator: torch.Generator,
    ) -> None:
        """Takes a step on one chunk, in place. All are [n]; the last three may be on the host.

        By default a GPU runs the Triton kernel, and a CPU the definition; KERNELS overrules it.
        """
        path = adamw_triton if use_triton(weight, instead_of_torch=True) else adamw_reference
        states = (low, exp_avg, exp_avg_sq)
        visiting = [state.to(weight.device, non_blocking=True) for state in states]
        noise = torch.empty_like(weight, dtype=torch.int32).random_(generator=generator)
        settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        path(weight, grad, *visiting, noise, self.clip_factor, step=step, **settings)
        for state, visitor in zip(states, visiting):
            if visitor is not state:
                state.copy_(visitor, non_blocking=True)


def chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Returns views of at most CHUNK elements, one after the other."""
    return tensor.reshape(-1).split(CHUNK)


def pin(tensor: Tensor) -> None:
    """Locks a host tensor's pages, so that copies to and from a GPU run at the bus's speed.

    Not by pin_memory=True, which rounds each size up to a power of two: by arithmetic the 7B would
    take nearly twice as much. Small tensors are left alone: two may lie in the same page.
    """
    if tensor.nbytes >= OWN_PAGES:
        error = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
        torch.cuda.check_error(error)
