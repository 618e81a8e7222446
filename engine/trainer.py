"""Gradients summed over micro-batches and processes, and AdamW on fp32 master weights.

An update, as edge_grpo.py writes it:

    for batch in trainer.micro_batches(prompts, responses):
        logp, entropy = trainer.forward(batch)
        trainer.backward(loss of these tokens)
    grad_norm = trainer.step(lr, clip)
"""

import copy
import functools
import math
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from engine.forward import Batch, ForwardPass, make_batch, make_batches, response_logprobs
from engine.models import Policy
from engine.processes import gather, is_main, rank, spread, world_size
from engine.sharding import local, refresh, shard, share, whole


class Trainer:
    """Weights, gradients and AdamW on fp32 master weights.

    One process: the trained weights are the sampler's own. Masters and moments lie beside them on
    the GPU, or in CPU memory (offload). Several processes: the trained model is a second, sharded
    copy (FSDP2 with fp32 master shards); after each update the sampler's replica is refreshed
    from it."""

    def __init__(
        self,
        policy: Policy,
        micro_batch_tokens: int,
        *,
        temperature: float = 1.0,
        entropy_grad: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        offload: bool = False,
        checkpointing: bool = False,
        keep_initial: bool = False,
    ):
        """temperature: of every log-probability and entropy. entropy_grad: make the entropies
        differentiable. checkpointing: recompute activations in the backward pass.
        keep_initial: keep a copy of the initial model, for a KL penalty."""
        self.policy = policy
        self.micro_batch_tokens = micro_batch_tokens
        self.temperature = temperature
        self.entropy_grad = entropy_grad
        self.checkpointing = checkpointing
        self.sharded = world_size() > 1
        self.initial_model = None
        if keep_initial:
            self.initial_model = copy.deepcopy(policy.model).requires_grad_(False)
        self.forward_pass = shard(policy.model) if self.sharded else ForwardPass(policy.model)
        self.adam_steps = 0  # so far
        model = self.forward_pass.model.requires_grad_(True)
        if checkpointing:
            # transformers 5 renames the method; early 5.x has only the old name, late 5.x warns.
            enable = getattr(model, "activation_checkpointing_enable", None)
            enable = enable or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.params = dict(model.named_parameters())  # tied weights once
        self.masters = {}
        for name, p in self.params.items():
            # An fp32 weight that stays where it is serves as its own master.
            device = "cpu" if offload else policy.device
            self.masters[name] = local(p).detach().to(device, torch.float32, copy=offload)
        # One optimizer per parameter, so that only one fp32 gradient exists at a time
        # (7B: 2 GB instead of 30).
        self.adam = {}
        for name, master in self.masters.items():
            self.adam[name] = torch.optim.AdamW(
                [master], lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
            )
        self.offload = None
        if offload:
            self.offload = Offload(self.params, self.masters, policy.device)

    # --- Forward and backward -----------------------------------------------------------------

    def micro_batches(
        self, prompts: list[list[int]], responses: list[list[int]]
    ) -> Iterator[Batch]:
        """Yields this process's share of the step's rows (every W-th) as micro-batches.

        A sharded forward is a collective, so every process yields equally many: those with fewer
        batches add empty ones. Iterate to the end, and call `forward` and `backward` once for each
        batch."""
        rows = list(range(rank(), len(responses), world_size()))
        device, packed = self.policy.device, self.forward_pass.packed
        batches = make_batches(prompts, responses, rows, self.micro_batch_tokens, device, packed)
        most = max(gather(max(len(batches), 1)))
        while len(batches) < most:
            batches.append(make_batch(prompts, responses, [], device, packed))
        # transformers recomputes activations only in training mode. Dropout is off in any case.
        self.forward_pass.train(self.checkpointing)
        for number, batch in enumerate(batches, start=1):
            if self.offload and number == len(batches):
                self.offload.begin_last_backward()
            yield batch
        self.forward_pass.eval()

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """logp (M,) and entropy (M,) of the batch's response tokens. logp carries a gradient, the
        entropy only with `entropy_grad`."""
        return self.forward_pass(batch, self.temperature, self.policy.vocab_size, self.entropy_grad)

    def backward(self, loss: Tensor) -> None:
        """Backpropagates this micro-batch's part of the step's loss. The parts are summed over
        micro-batches and processes; FSDP2 averages over processes, which the factor undoes."""
        (loss * world_size()).backward()

    def add_over_processes(self, sums: dict[str, float]) -> dict[str, float]:
        """Each number of `sums`, which every process has, added up over the processes."""
        everyone = gather(dict(sums))
        return {name: sum(one[name] for one in everyone) for name in sums}

    def logprobs(
        self, prompts: list[list[int]], responses: list[list[int]], initial: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        """(logp (T_i,), entropy (T_i,)) of each row on the CPU, without a gradient, under the
        policy as it is or under the initial model."""
        model = self.initial_model if initial else self.policy.model
        logprobs = functools.partial(
            response_logprobs,
            model,
            temperature=self.temperature,
            vocab_size=self.policy.vocab_size,
            budget=self.micro_batch_tokens,
        )
        return spread(prompts, responses, logprobs)

    # --- The optimizer ------------------------------------------------------------------------

    def gradient_norm(self) -> float:
        """L2 norm of the whole gradient, over all processes. (torch.nn.utils.get_total_norm would
        round the norms of bf16 gradients to bf16.)"""
        total = torch.zeros((), device=self.policy.device)
        gradients = [local(p.grad) for p in self.params.values() if p.grad is not None]
        if gradients:
            norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
            total = torch.stack(norms).square().sum()
        if self.sharded:
            dist.all_reduce(total)
        return total.sqrt().item()

    @torch.no_grad()
    def step(self, lr: float, clip: float) -> float:
        """One AdamW step with the gradient clipped to the norm `clip` (0: no clipping). A gradient
        that is not finite changes nothing. Returns the norm before clipping."""
        norm = self.gradient_norm()
        names = [name for name, p in self.params.items() if p.grad is not None]
        if not math.isfinite(norm):
            names = []
        scale = min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0
        if self.offload:
            self.offload.finish_copies(names)
        for name in names:
            self._update_weight(name, lr, scale)
        if self.offload:
            self.offload.wait()  # the next backward pass writes to the memory that is still read
        if names:
            self.adam_steps += 1
            refresh(self.policy.model, self.params)
        self.forward_pass.zero_grad()
        return norm

    def _update_weight(self, name: str, lr: float, scale: float) -> None:
        """AdamW on one master with its gradient times `scale`, then the new weight."""
        master, adam = self.masters[name], self.adam[name]
        weight = local(self.params[name])
        if self.offload:
            master.grad = self.offload.fp32_gradient(name, master)
        else:
            master.grad = local(self.params[name].grad).to(master.dtype)
        master.grad.mul_(scale)
        adam.param_groups[0]["lr"] = lr
        adam.step()
        master.grad = None
        if self.offload:
            self.offload.copy_back(name, master, weight)
        elif master.data_ptr() != weight.data_ptr():
            weight.copy_(master)

    # --- Checkpoints --------------------------------------------------------------------------

    def state(self) -> Iterator[tuple[str, Tensor | None]]:
        """Yields (name, tensor on the CPU) of masters and moments, whole, on the main process
        (elsewhere None). Every process must iterate to the end."""
        for name, p in self.params.items():
            master = self.masters[name]
            parts = {}
            for part, tensor in self.adam[name].state.get(master, {}).items():
                if part != "step":
                    parts[part] = tensor
            if self.sharded or master.data_ptr() != local(p).data_ptr():
                parts["master"] = master
            for part, tensor in parts.items():
                gathered = whole(tensor.detach(), p)
                yield f"{part}.{name}", gathered.cpu() if is_main() else None

    @torch.no_grad()
    def load_state(self, read: Callable[[str], Tensor | None], adam_steps: int) -> None:
        """The inverse of `state`. `read(name)` gives a whole tensor, or None where there is none
        of that name (a weight that is its own master, or never had a gradient)."""
        self.adam_steps = adam_steps
        for name, p in self.params.items():
            master = self.masters[name]
            saved = read(f"master.{name}")
            if saved is None:
                saved = read(name)
            master.copy_(share(saved, p))
            state = {}
            for part in ("exp_avg", "exp_avg_sq"):
                moment = read(f"{part}.{name}")
                if moment is not None:
                    state[part] = torch.empty_like(master).copy_(share(moment, p))
            if state:
                state["step"] = torch.tensor(float(adam_steps), device=master.device)
                self.adam[name].state[master] = state
            local(p).copy_(master)
        refresh(self.policy.model, self.params)


class Offload:
    """Masters and moments in CPU memory: gradients leave for the CPU during the backward pass, and
    the new weights come back through the same memory."""

    def __init__(self, params: dict[str, Tensor], masters: dict[str, Tensor], device: torch.device):
        cuda = device.type == "cuda"
        self.params = params
        self.streams = torch.get_device_module(device)
        self.copy_stream = self.streams.Stream()  # on a CPU it does nothing
        self.in_last_backward = False
        self.copied: set[str] = set()  # gradients on their way to the CPU
        if cuda and world_size() > 1:
            # torchrun leaves each process one thread, but AdamW on the CPU can use its share.
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))
        # One pinned block for all, because each allocation is rounded up to a power of two
        # (7B: 16 GiB instead of 27). Each part begins at a multiple of 16 bytes.
        weights = {name: local(p) for name, p in params.items()}
        sizes = [math.ceil(w.nbytes / 16) * 16 for w in weights.values()]
        block = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=cuda)
        self.host_grads = {}
        for (name, w), part in zip(weights.items(), block.split(sizes)):
            self.host_grads[name] = part[: w.nbytes].view(w.dtype).view(w.shape)
        for name, p in params.items():
            p.register_post_accumulate_grad_hook(functools.partial(self._copy_if_last, name))
        # One fp32 gradient that all weights use in turn: fresh memory is slower than AdamW itself.
        largest = max((master.numel() for master in masters.values()), default=0)
        self.scratch = torch.empty(largest)

    def begin_last_backward(self) -> None:
        """From now on, copies each gradient as soon as the backward pass has made it."""
        self.in_last_backward = True
        self.copied = set()

    def _copy_if_last(self, name: str, _: Tensor) -> None:
        if self.in_last_backward:  # earlier ones are still to be added to
            self._copy(name)

    def _copy(self, name: str) -> None:
        self.copy_stream.wait_stream(self.streams.current_stream())
        with self.streams.stream(self.copy_stream):
            self.host_grads[name].copy_(local(self.params[name].grad), non_blocking=True)
        self.copied.add(name)

    def finish_copies(self, names: list[str]) -> None:
        """Waits until the gradients of `names` are on the CPU."""
        for name in names:
            if name not in self.copied:  # the last micro-batch did not touch it, say an expert
                self._copy(name)
        self.in_last_backward = False
        self.wait()

    def wait(self) -> None:
        self.streams.synchronize()

    def fp32_gradient(self, name: str, master: Tensor) -> Tensor:
        gradient = self.host_grads[name]
        if gradient.dtype == master.dtype:
            return gradient
        return self.scratch[: master.numel()].view_as(master).copy_(gradient)

    def copy_back(self, name: str, master: Tensor, weight: Tensor) -> None:
        """The new weight, through the pinned memory of its gradient: rounded first, that is half
        the traffic."""
        weight.copy_(self.host_grads[name].copy_(master), non_blocking=True)
