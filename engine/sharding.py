"""A model cut over several processes (FSDP2), beside the whole replica that samples. One process
needs none of this."""

import copy

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from engine.forward import ForwardPass
from engine.processes import rank, world_size


def shard(model: nn.Module) -> nn.Module:
    """Return a ForwardPass on a second copy of the model, whose fp32 weights are cut by rows over
    all processes (FSDP2).

    It is cut layer by layer, so that only one is ever whole in fp32. It computes in the model's own
    dtype and adds up gradients in fp32.
    """
    param = next(model.parameters())
    # FSDP2 would choose a GPU whenever there is one.
    mesh = init_device_mesh(param.device.type, (world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=param.dtype, reduce_dtype=torch.float32)
    # Copy the modules without their weights, which then come layer by layer.
    empty = {}
    for p in model.parameters():
        empty[id(p)] = nn.Parameter(p.new_empty(0, dtype=torch.float32))
    forward_pass = ForwardPass(copy.deepcopy(model, empty))
    del empty  # it would keep every layer whole
    originals = dict(zip(forward_pass.parameters(), model.parameters()))
    kinds = model._no_split_modules or ()
    layers = [m for m in forward_pass.modules() if type(m).__name__ in kinds]
    for module in [*layers, forward_pass]:
        for p in list(module.parameters()):
            if p in originals:
                p.data = originals.pop(p).detach().float()
        fully_shard(module, mesh=mesh, mp_policy=precision)
    return forward_pass


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor; any other tensor is its own shard."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's rows of a tensor that every process has whole, cut as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    rows = -(-len(tensor) // world_size())
    first = rank() * rows
    return tensor[first : first + rows]


def whole(tensor: Tensor, like: Tensor) -> Tensor:
    """The inverse of `share` (a collective)."""
    if not isinstance(like, DTensor):
        return tensor
    sharded = DTensor.from_local(
        tensor, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
    return sharded.full_tensor()


@torch.no_grad()
def refresh(replica: nn.Module, params: dict[str, Tensor]) -> None:
    """Copy sharded weights into a whole model, in its dtype before they travel (bf16: half the
    traffic)."""
    for name, weight in replica.named_parameters():
        if isinstance(params[name], DTensor):
            weight.copy_(params[name].to(weight.dtype).full_tensor())
