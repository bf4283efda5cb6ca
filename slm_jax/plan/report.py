"""What a compiled step means: memory against the chip's, least times, what to change."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from slm_kernels.aot import Target

from slm_jax.models.flops import training_flops
from slm_jax.models.trm_flops import recomputed_flops
from slm_jax.parallel import MESH_AXES
from slm_jax.plan.program import Compiled, Run
from slm_jax.slices import Slice, row_parts
from slm_jax.train.experiment import Experiment
from slm_jax.train.trm_experiment import step_flops


@dataclass(frozen=True)
class Plan:
    """A run on a slice. Bytes are of one device, seconds of one step, operations of all devices.

    Attributes:
        run: the configuration.
        where: the devices.
        mesh: devices along each axis.
        compiled: what the compiler said.
        model_flops: operations that count for the MFU.
        flops: with what the backward pass recomputes.
    """

    run: Run
    where: Slice
    mesh: Mapping[str, int]
    compiled: Compiled
    model_flops: float
    flops: float

    @property
    def share_of_hbm(self) -> float:
        """Memory of a step over the memory of a device."""
        return self.compiled.device_bytes / self.where.hbm

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds below which no program can be, by what bounds it.

        Memory: arguments are read, new values written, temporaries written and read, once. Passes
        over the same array are not counted, so this one is loose. Nor is the network between
        slices, whose speed is not known here.
        """
        c, device = self.compiled, self.where.device
        arguments = sum(c.arguments.values())
        return {
            "matrix units": self.flops / self.where.devices / device.flops,
            "memory": (2 * arguments + 2 * c.temporary_bytes) / device.bandwidth,
            "interconnect": sum(x.sent for x in c.collectives if not x.leaves_slice)
            / self.where.interconnect,
        }

    @property
    def bound(self) -> tuple[str, float]:
        """The largest of `bounds`."""
        name = max(self.bounds, key=lambda n: self.bounds[n])
        return name, self.bounds[name]

    @property
    def estimate(self) -> float | None:
        """As `estimated_seconds`."""
        return estimated_seconds(self.compiled, self.where)

    def mfu(self, seconds: float) -> float:
        """The model FLOPs utilisation of steps that take so long."""
        return self.model_flops / self.where.devices / self.where.device.flops / seconds

    def at_mfu(self, share: float) -> float:
        """Seconds of a step at this utilisation."""
        return self.mfu(1.0) / share


def estimated_seconds(compiled: Compiled, where: Slice) -> float | None:
    """Seconds that XLA expects of its own operations, and Pallas kernels take at least.

    Collectives are not in it, as if all were hidden behind other work. `None` where nothing is
    simulated, as on GPUs.
    """
    device = where.device
    if compiled.cycles is None or not isinstance(device, Target):
        return None
    kernels = sum(
        call.runs * max(call.flops / device.flops, call.bytes / device.bandwidth)
        for call in compiled.pallas
    )
    return compiled.cycles / device.clock + kernels


def make_plan(run: Run, where: Slice, compiled: Compiled) -> Plan:
    """Adds what is counted from the configuration."""
    if isinstance(run, Experiment):
        tokens = run.batch_size * run.seq_len
        model_flops = tokens * training_flops(run.model, run.seq_len, "none")
        flops = tokens * training_flops(run.model, run.seq_len)
    else:
        model_flops = step_flops(run)
        flops = model_flops + run.batch_size * recomputed_flops(run.model)
    sizes = run.mesh.resolve(where.devices)
    return Plan(run, where, dict(zip(MESH_AXES, sizes, strict=True)), compiled, model_flops, flops)


def remedies(plan: Plan) -> list[str]:
    """What makes a step that is too large for the memory smaller, the cheapest first."""
    run, c, mesh = plan.run, plan.compiled, plan.mesh
    state = sum(n for name, n in c.arguments.items() if name in ("weights", "optimizer", "average"))
    out = []
    # Gradients are as large as the weights, and stand beside them.
    held = state + c.arguments["weights"]
    if held > 0.9 * plan.where.hbm:
        if mesh["data"] > 1:
            out.append(
                f"split the weights too: --mesh.data 1 --mesh.fsdp {mesh['data'] * mesh['fsdp']}"
            )
        else:
            more = math.ceil(held / (0.5 * plan.where.hbm))
            out.append(f"take a slice with {more} times the chips, or split over --mesh.tensor")
        return out
    if run.model.remat != "full":
        out.append("recompute activations: --model.remat full")
    rows = run.batch_size // row_parts(run.mesh, plan.where.devices) // run.accumulate
    over = c.temporary_bytes / max(plan.where.hbm - held, 1.0)
    parts = next((n for n in range(2, rows + 1) if rows % n == 0 and n >= over), rows)
    if parts > 1:
        out.append(f"take smaller microbatches: --accumulate {run.accumulate * parts}")
    if isinstance(run, Experiment) and run.objective.chunk is None and run.model.vocab_size > 4096:
        chunk = math.gcd(run.seq_len, 512)
        out.append(f"hold fewer logits at a time: --objective.chunk {chunk}")
    if mesh["data"] > 1 and state > 0.2 * plan.where.hbm:
        out.append(f"split the weights: --mesh.data 1 --mesh.fsdp {mesh['data'] * mesh['fsdp']}")
    out.append("take more chips")
    return out
