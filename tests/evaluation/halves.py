"""One of two processes that share an evaluation."""

from dataclasses import dataclass, field

from unet_diffusion.runtime.processes import ProcessGroup


@dataclass(frozen=True)
class Half(ProcessGroup):
    """One of two processes, which has what the other has gathered."""

    other: list = field(default_factory=list)
    own: list = field(default_factory=list)

    def gather(self, items):
        self.own.append(items)
        return [*items, *self.other[len(self.own) - 1]] if self.other else items
