"""How the TPU kernels of state-space duality cut their arrays: see `tpu.py`."""

import dataclasses

import jax
import jax.numpy as jnp

LANES = 128


@dataclasses.dataclass(frozen=True)
class Layout:
    """How arrays are cut: heads side by side on lanes, steps in chunks."""

    shape: tuple[int, ...]  # of x
    groups: int
    n: int  # states
    chunk: int  # steps, Q
    chunks: int  # in a grid step

    @classmethod
    def of(cls, x: jax.Array, groups: int, n: int, chunk: int) -> "Layout":
        """For an input `[B, L, H, P]`; a block of it holds at most 2 MB and 4 chunks."""
        lay = cls(x.shape, groups, n, chunk, 1)
        fit = 2**21 // (chunk * lay.width * x.dtype.itemsize)
        return dataclasses.replace(lay, chunks=max(1, min(4, fit, -(-x.shape[1] // chunk))))

    @property
    def p(self) -> int:
        """Channels a head, padded to divide 128."""
        return max(8, 1 << (self.shape[3] - 1).bit_length())

    @property
    def per_tile(self) -> int:
        """Heads in 128 lanes."""
        return LANES // self.p

    @property
    def tiles(self) -> int:
        """Of 128 lanes, of a group."""
        return -(-self.shape[2] // (self.groups * self.per_tile))

    @property
    def width(self) -> int:
        """Lanes, padding included."""
        return self.groups * self.tiles * LANES

    @property
    def n_rows(self) -> int:
        """Heads, a multiple of 8."""
        heads = self.groups * self.tiles * self.per_tile
        return heads + -heads % 8

    @property
    def steps(self) -> int:
        """Of a grid step, T."""
        return self.chunk * self.chunks

    @property
    def blocks(self) -> int:
        """Grid steps in time."""
        return -(-self.shape[1] // self.steps)

    def heads(self, x: jax.Array) -> jax.Array:
        """`[..., H, P]` to `[..., width]`."""
        *rest, heads, p = x.shape
        x = x.reshape(*rest, self.groups, heads // self.groups, p)
        more = self.tiles * self.per_tile - heads // self.groups
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, self.p - p)])
        return x.reshape(*rest, self.width)

    def unheads(self, x: jax.Array) -> jax.Array:
        """The inverse of `heads`."""
        x = x.reshape(*x.shape[:-1], self.groups, self.tiles * self.per_tile, self.p)
        x = x[..., : self.shape[2] // self.groups, : self.shape[3]]
        return x.reshape(*x.shape[:-3], *self.shape[2:])

    def time(self, x: jax.Array) -> jax.Array:
        """Pads `[B, L, ...]` to whole blocks; a padded step has dt = 0."""
        more = self.blocks * self.steps - x.shape[1]
        return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))

    def lanes(self, x: jax.Array) -> jax.Array:
        """`[B, L, H, P]` to `[B, L, width]`."""
        return self.time(self.heads(x))

    def unlanes(self, x: jax.Array) -> jax.Array:
        """The inverse of `lanes`, but for the padding in time."""
        return self.unheads(x)

    def rows(self, x: jax.Array) -> jax.Array:
        """`[B, L, H]` to `[B, chunks, n_rows, Q]`."""
        x = self.time(x).reshape(x.shape[0], -1, self.chunk, self.groups, x.shape[2] // self.groups)
        x = jnp.moveaxis(x, 2, 4)
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, self.tiles * self.per_tile - x.shape[3]), (0, 0)])
        x = x.reshape(*x.shape[:2], -1, self.chunk)
        return jnp.pad(x, ((0, 0), (0, 0), (0, self.n_rows - x.shape[2]), (0, 0)))

    def projection(self, x: jax.Array) -> jax.Array:
        """`[B, L, G, N]` to `[B, G, L, N]`."""
        return jnp.swapaxes(self.time(x), 1, 2)

    def state(self, x: jax.Array) -> jax.Array:
        """`[B, H, P, N]` to `[B, N, width]`."""
        return self.heads(jnp.moveaxis(x, 3, 1))

    def unstate(self, x: jax.Array) -> jax.Array:
        """The inverse of `state`."""
        return jnp.moveaxis(self.unheads(x), 1, 3)
