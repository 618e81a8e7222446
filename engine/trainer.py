"""The update: gradients summed over micro-batches and processes, and AdamW on fp32 master weights."""

import copy
import math
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from engine.console import try_with_less
from engine.forward import Scorer, make_batch, micro_batches, response_logprobs
from engine.models import Policy
from engine.processes import gather, is_main, rank, spread, world_size
from engine.sharding import local, refresh, shard, share, whole


class Trainer:
    """Weights, gradients and AdamW on fp32 master weights. One process: the scorer's weights are the sampler's own;
    masters and moments lie beside them, on the GPU or (offload) in CPU memory. Several: the scorer is a second, sharded
    copy (FSDP2: fp32 master shards), from which the sampler's replica is refreshed after each update."""

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
        keep_reference: bool = False,
    ):
        """entropy_grad: entropies are differentiable; keep_reference: the model as it is now stays in memory (KL)."""
        self.policy, self.sharded, self.micro_batch_tokens = (
            policy,
            world_size() > 1,
            micro_batch_tokens,
        )
        self.temperature, self.entropy_grad = temperature, entropy_grad
        self.reference = (
            copy.deepcopy(policy.model).requires_grad_(False) if keep_reference else None
        )
        self.scorer = shard(policy.model) if self.sharded else Scorer(policy.model)
        self.offload, self.checkpointing, self.last_backward, self.copied = (
            offload,
            checkpointing,
            False,
            set(),
        )
        self.adam_steps = 0  # that any weight has made
        model = self.scorer.model.requires_grad_(True)
        if checkpointing:
            # Renamed in late 5.x; the new name is not in early 5.x, the old one warns.
            enable = (
                getattr(model, "activation_checkpointing_enable", None)
                or model.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})
        self.params = dict(model.named_parameters())  # tied weights once
        where = (
            "cpu" if offload else policy.device
        )  # an fp32 weight that stays where it is, is its own master
        self.masters = {
            name: local(p).detach().to(where, torch.float32, copy=offload)
            for name, p in self.params.items()
        }
        # One optimizer per parameter: only one fp32 gradient exists at a time (7B: 2 GB instead of 30).
        self.adam = {
            name: torch.optim.AdamW(
                [m], lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
            )
            for name, m in self.masters.items()
        }
        if offload:
            self._copy_gradients_during_backward()

    def _copy_gradients_during_backward(self) -> None:
        """Offload: as soon as the last backward has a gradient, it leaves for pinned CPU memory on its own stream."""
        cuda, self.streams = (
            self.policy.device.type == "cuda",
            torch.get_device_module(self.policy.device),
        )
        self.stream = self.streams.Stream()  # (a CPU's does nothing)
        if cuda and self.sharded:  # torchrun leaves a process one thread; AdamW can use more
            torch.set_num_threads(
                max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"]))
            )
        # One block, because each is rounded up to a power of two (7B: 16 GiB instead of 27).
        sizes = [-(-local(p).nbytes // 16) * 16 for p in self.params.values()]
        block = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=cuda)
        self.host_grads = {
            name: part[: local(p).nbytes].view(p.dtype).view(local(p).shape)
            for (name, p), part in zip(self.params.items(), block.split(sizes))
        }
        for name, p in self.params.items():
            p.register_post_accumulate_grad_hook(lambda _, name=name: self._copy_out(name))
        # One fp32 gradient for all in turn: touching fresh memory takes longer than AdamW itself.
        self.scratch = torch.empty(max((m.numel() for m in self.masters.values()), default=0))

    def _copy_out(self, name: str) -> None:
        if self.last_backward:  # otherwise more will be added to it
            self.stream.wait_stream(self.streams.current_stream())
            with self.streams.stream(self.stream):
                self.host_grads[name].copy_(local(self.params[name].grad), non_blocking=True)
            self.copied.add(name)

    def score(
        self, prompts: list[list[int]], responses: list[list[int]], reference: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        """(logp (T_i,), entropy (T_i,)) of each row under the policy or the reference model; no gradient."""
        model = self.reference if reference else self.policy.model
        return spread(
            list(zip(prompts, responses)),
            lambda mine: response_logprobs(
                model,
                [p for p, _ in mine],
                [r for _, r in mine],
                self.temperature,
                self.policy.vocab_size,
                self.micro_batch_tokens,
            ),
        )

    def forward_backward(
        self, prompts: list[list[int]], responses: list[list[int]], tokens: list, loss_of: Callable
    ) -> tuple[float, list[Tensor], list[Tensor]]:
        """Add up the gradient of a step's loss: the sum over micro-batches, on all processes, of
        loss_of(logp (M,), entropy (M,), tokens), where `tokens` joins those of the rows (see Batch.tokens).
        Returns the loss, and each row's logp (T_i,) and entropy (T_i,) under the weights as they are."""
        mine = slice(rank(), None, world_size())

        def with_less() -> str:
            self.skip()
            self.policy.sampler.release()
            self.micro_batch_tokens = max(1, self.micro_batch_tokens // 2)
            return f"--micro-batch-tokens {self.micro_batch_tokens}"

        loss, scored = try_with_less(
            lambda: self._accumulate(
                prompts[mine], responses[mine], tokens[mine] or tokens[:1], loss_of
            ),
            None if self.sharded else with_less,
            "in the update",
            "--micro-batch-tokens, --max-new-tokens or "
            "--group-size lower, or add --offload-optimizer",
        )
        logp, entropy = zip(*spread(responses, lambda _: scored))
        return sum(gather(loss)), list(logp), list(entropy)

    def _accumulate(
        self, prompts: list, responses: list, tokens: list, loss_of: Callable
    ) -> tuple[float, list]:
        """The gradient of this process's rows; returns their loss, and of each (logp, entropy). A sharded forward is a
        collective, so a process with fewer batches gets empty ones, whose loss is 0."""
        batches = micro_batches(
            prompts, responses, self.micro_batch_tokens, self.policy.device, self.scorer.packed
        )
        total, scored = 0.0, [(torch.zeros(0), torch.zeros(0))] * len(responses)
        empty = make_batch([0], [[0]], [[0]], self.policy.device)
        empty.index = []
        batches += [empty] * (max(gather(max(len(batches), 1))) - len(batches))
        self.copied = set()  # offload: the gradients that are on their way to the CPU
        self.scorer.train(
            self.checkpointing
        )  # transformers recomputes only in training mode (dropout is off)
        for k, batch in enumerate(batches, 1):
            self.last_backward = k == len(batches)
            logp, entropy = self.scorer(
                batch, self.temperature, self.policy.vocab_size, self.entropy_grad
            )  # (M,) each
            loss = loss_of(logp, entropy, batch.tokens(tokens))
            (
                loss * world_size()
            ).backward()  # FSDP2 averages over processes, the step's loss is a sum
            total += loss.item()
            for i, row in zip(batch.index, batch.by_row(logp, entropy)):
                scored[i] = row
        self.scorer.eval()
        return total, scored

    def skip(self) -> float:
        """Drop the gradients of a step; returns NaN for its norm."""
        for p in self.params.values():
            p.grad = None
        return float("nan")

    def gradient_norm(self) -> float:
        """L2 norm of the whole gradient, over all processes; read back to the host."""
        norms = [
            torch.linalg.vector_norm(local(p.grad), dtype=torch.float32)
            for p in self.params.values()
            if p.grad is not None and local(p.grad).numel()
        ]
        square = (
            torch.stack(norms).square().sum()
            if norms
            else torch.zeros((), device=self.policy.device)
        )
        if self.sharded:
            dist.all_reduce(square)
        return square.sqrt().item()

    @torch.no_grad()
    def step(self, lr: float, clip: float) -> float:
        """One AdamW step, gradient clipped to norm `clip` (0: not), if its norm is finite; returns that norm."""
        norm = self.gradient_norm()
        live = {
            name: p for name, p in self.params.items() if p.grad is not None and math.isfinite(norm)
        }
        if self.offload:
            for name in (
                live.keys() - self.copied
            ):  # what the last micro-batch did not touch, say an expert
                self._copy_out(name)
            self.streams.synchronize()
        for name, p in live.items():
            weight, master, adam = local(p), self.masters[name], self.adam[name]
            gradient = wide = self.host_grads[name] if self.offload else local(p.grad)
            if gradient.dtype != master.dtype:
                wide = (
                    self.scratch[: master.numel()].view_as(master)
                    if self.offload
                    else torch.empty_like(master)
                )
                wide.copy_(gradient)
            master.grad = wide.mul_(min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0)
            adam.param_groups[0]["lr"] = lr
            adam.step()
            master.grad = None
            if self.offload:  # back by the same pinned memory, rounded first: half the traffic
                weight.copy_(gradient.copy_(master), non_blocking=True)
            elif master.data_ptr() != weight.data_ptr():
                weight.copy_(master)
        if self.offload:
            self.streams.synchronize()  # or the next gradients would overwrite what is still read
        if live:
            self.adam_steps += 1
            refresh(self.policy.model, self.params)
        self.skip()
        return norm

    def state(self) -> Iterator[tuple[str, Tensor | None]]:
        """Yields (name, tensor on CPU) of masters and moments, whole, on rank 0; every process must iterate."""
        for name, p in self.params.items():
            master = self.masters[name]
            parts = {
                part: t
                for part, t in self.adam[name].state.get(master, {}).items()
                if part != "step"
            }
            if self.sharded or master.data_ptr() != local(p).data_ptr():
                parts["master"] = master
            for part, tensor in parts.items():
                gathered = whole(tensor.detach(), p)
                yield f"{part}.{name}", gathered.cpu() if is_main() else None

    @torch.no_grad()
    def load_state(self, read: Callable[[str], Tensor | None], adam_steps: int) -> None:
        """Inverse of `state`: `read(name)` gives a whole tensor, or None if there is none of that name."""
        self.adam_steps = adam_steps
        for name, p in self.params.items():
            master, adam = self.masters[name], self.adam[name]
            saved = read(f"master.{name}")
            master.copy_(share(read(name) if saved is None else saved, p))
            moments = {part: read(f"{part}.{name}") for part in ("exp_avg", "exp_avg_sq")}
            if moments["exp_avg"] is not None:  # it has had a gradient
                adam.state[master] = {
                    "step": torch.tensor(float(adam_steps), device=master.device)
                } | {
                    part: torch.empty_like(master).copy_(share(moment, p))
                    for part, moment in moments.items()
                }
            local(p).copy_(master)
        refresh(self.policy.model, self.params)
