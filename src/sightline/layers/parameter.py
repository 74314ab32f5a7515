"""How checkpoint tensors find their place in a module's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from sightline.parallel import Shard


class Slot(NamedTuple):
    """Where one checkpoint tensor goes.

    target: the parameter or a view of a part of it. convert: turns the checkpoint's tensor into the target's shape
    (None: same shape). checkpoint_shape: what the checkpoint must hold when that is not the target's shape. part: what is read
    of the checkpoint's tensor; None for all.
    """

    target: Tensor
    convert: Callable[[Tensor], Tensor] | None = None
    checkpoint_shape: tuple[int, ...] | None = None
    part: tuple[slice, ...] | None = None

    @classmethod
    def of_shard(cls, target: Tensor, shard: Shard, dim: int = 0) -> Slot:
        """target holds `shard` of the checkpoint's dimension `dim`, with the padding last."""
        assert target.shape[dim] == shard.width
        if shard == Shard.whole(shard.width):
            return cls(target)
        shape = (*target.shape[:dim], shard.total, *target.shape[dim + 1 :])
        part = slice(shard.start, shard.start + shard.length)
        return cls(target.narrow(dim, 0, shard.length), None, shape, (*[slice(None)] * dim, part))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape that the checkpoint's tensor must have."""
        return self.checkpoint_shape if self.checkpoint_shape is not None else tuple(self.target.shape)


@runtime_checkable
class CustomSlots(Protocol):
    """A module whose parameters differ from the checkpoint's tensors (merged, folded or sharded ones)."""

    def slots(self, name: str) -> Iterator[tuple[str, Slot]]:
        """Checkpoint names and slots of all its parameters; `name` is the module's own full name."""
        ...


def collect_slots(model: nn.Module) -> dict[str, Slot]:
    """Checkpoint name (as `map_name` gives it) -> slot, for every parameter of the model; tied ones once."""
    slots: dict[str, Slot] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, CustomSlots):
            slots.update(module.slots(prefix))
        else:
            for name, parameter in module.named_parameters(prefix, recurse=False):
                slots[name] = Slot(parameter.data)
    return slots
