"""Maximal update parametrisation: one learning rate for every width, and for every depth.

A small model, the base, is tuned; muP says how initial weights, forward multipliers and updates of
a larger one must change so that every layer's activations move as far in a step as in the base
(Tensor Programs V, arXiv 2203.03466). CompleteP (arXiv 2505.01618) says the same for the depth.

With m = d_model / base_width, l = n_layers / base_depth (1 if not given), and every inner width
(d_ff, heads x head_dim, d_inner, dt_rank) taken to grow with d_model:

| weights                          | initial std   | Adam, Lion | Muon   | Adam's eps   |
|----------------------------------|---------------|------------|--------|--------------|
| embedding, head                  | constant      | 1          | 1      | 1 / m        |
| matrices, experts                | 1/sqrt(fan-in)| 1 / m      | m^-1/2 | 1 / (m l)    |
| router                           | x m^-1/2      | 1 / m      | 1 / m  | 1 / (m l)    |
| norms, biases, conv, A_log, D    | constant      | 1          | 1      | 1 / (m l)    |

Logits are divided by m, tied head or not; attention scores are multiplied by
base_head_dim^1/2 / head_dim; both branches of a layer are divided by l, and the output
projections keep the initial scale they have at the base depth.

- The head is table 8 of Tensor Programs V: constant weights, learning rate 1, output times 1/m.
  That form lets a tied head be the embedding.
- A router maps the width to a fixed number of logits, so it is an output matrix too, here in the
  form of table 3: weights of order 1/fan-in, learning rate 1/fan-in. At 1/sqrt(fan-in) its
  gradient would rule the stream's as the width grows. (muP for MoE: arXiv 2508.09752.)
- Mamba's `select` gives dt (hidden: its rank grows) and B, C, of fixed size. Adam's rate is
  1/fan-in for hidden and output matrices alike. The initial scale stays 1/sqrt(fan-in): the one of
  output matrices would make B and C, and with them the state's share of the output, vanish with
  the width. Neither muP nor the spectral condition holds for a selective scan as it stands
  (Vankadara et al., NeurIPS 2024, "On Feature Learning in Structured State Space Models");
  `experiments/mup_transfer.py` measures what these rules give.
- Muon's updates have entries of one size (RMS 0.2) and full rank, so a spectral norm of order
  sqrt(n), where it should be of order 1 (arXiv 2310.17813): m^-1/2. Adam's have entries of one size
  and low rank: order n, hence 1/m.
- Gradients are of order 1/m (1/(m l) inside the branches), so Adam's eps must be too
  (CompleteP, table 1).
- Weight decay keeps learning rate x decay for every weight: it is what sets the size that weights
  settle at (arXiv 2405.13698), and what CompleteP's m-fold decay at a 1/m-fold rate comes to.
- At alpha = 1, CompleteP's rate for norms and biases, l^(alpha - 1), is 1.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from flax import nnx

from slm_jax.errors import UserError
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.module import named_leaves
from slm_jax.nn.ssm import MambaConfig

# Parts of a model outside the layers.
_ENDS = ("embed", "head", "final_norm")


@dataclass(frozen=True)
class MuPConfig:
    """Which model the hyper-parameters were tuned on. Without `base_width`: standard."""

    base_width: int | None = None
    """d_model at which this is the standard parametrisation; `None` is standard at every width."""
    base_depth: int | None = None
    """n_layers of the tuned model, for CompleteP; `None` leaves the depth as it is."""
    base_head_dim: int | None = None
    """head_dim of the tuned model; `None`: wider models have more heads, not wider ones."""

    def __post_init__(self) -> None:
        for name in ("base_width", "base_depth", "base_head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1, or None")
            if value is not None and self.base_width is None:
                raise UserError(f"{name}={value} needs base_width: give the d_model tuned at")

    def width_ratio(self, d_model: int) -> float:
        """d_model over that of the base; 1 in the standard parametrisation."""
        return 1.0 if self.base_width is None else d_model / self.base_width

    def depth_ratio(self, n_layers: int) -> float:
        """n_layers over that of the base; 1 if the depth is not parametrised."""
        return 1.0 if self.base_depth is None else n_layers / self.base_depth

    def mixer(self, config: Any) -> Any:
        """A mixer's configuration with the score multiplier that its head_dim asks for.

        A `scale` given with the configuration is kept.

        Raises:
            UserError: for a Mamba layer whose dt_rank does not follow d_model.
        """
        if isinstance(config, MambaConfig) and self.base_width and config.dt_rank is not None:
            raise UserError(
                f"dt_rank={config.dt_rank} with mup.base_width={self.base_width}: leave dt_rank at "
                "None, so that it grows with d_model"
            )
        if not isinstance(config, AttentionConfig) or config.scale is not None:
            return config
        if self.base_head_dim in (None, config.head_dim):
            return config
        return replace(config, scale=self.base_head_dim**0.5 / config.head_dim)


class UpdateScale(NamedTuple):
    """What an optimiser multiplies for one weight (metadata `update_scale` of its variable).

    Attributes:
        adam: the update of Adam or Lion.
        muon: the update of Muon, if the weight is one of its matrices.
        eps: Adam's eps.
    """

    adam: float = 1.0
    muon: float = 1.0
    eps: float = 1.0


def update_scale(variable: nnx.Variable) -> UpdateScale:
    """The multipliers of a weight: all 1 unless `parametrise` has set them."""
    scale: UpdateScale = variable.get_metadata().get("update_scale", UpdateScale())
    return scale


def parametrise(model: Any, width_ratio: float, depth_ratio: float) -> None:
    """Sets the `update_scale` of every weight of a model that is being built, and scales routers.

    Args:
        model: the whole model, initialised in the standard way.
        width_ratio: see `MuPConfig.width_ratio`.
        depth_ratio: see `MuPConfig.depth_ratio`.
    """
    if width_ratio == depth_ratio == 1.0:
        return
    for name, variable in named_leaves(model).items():
        if not isinstance(variable, nnx.Param):
            continue
        eps = 1 / width_ratio
        if name.split(".")[0] not in _ENDS:
            eps /= depth_ratio
        metadata = variable.get_metadata()
        axes = metadata["axes"]
        adam = muon = 1.0
        if metadata["matrix"][0] and "vocab" not in axes:  # it reads an axis that grows
            adam, muon = 1 / width_ratio, width_ratio**-0.5
            if axes[-1] == "experts":
                muon = adam
                variable.set_value(variable.get_value() * width_ratio**-0.5)
        variable.set_metadata(update_scale=UpdateScale(adam, muon, eps))
