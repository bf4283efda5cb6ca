"""The fields of a config.json, with defaults and errors that name what is wrong."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from slm_jax.errors import UserError

DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "layer_types": None,
    "lm_head_bias": False,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "norm_topk_prob": False,
    "num_experts": 1,
    "num_key_value_heads": None,
    "original_max_position_embeddings": None,
    "partial_rotary_factor": 1.0,
    "query_pre_attn_scalar": None,
    "residual_in_fp32": False,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 10_000.0,
    "router_jitter_noise": 0.01,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
"""What a field means where a class does not have it, or where config.json may leave it out."""


class Fields:
    """Fields by name; those that have no default must be there.

    Attributes:
        model_type: of the configuration, for error messages.
    """

    def __init__(
        self, model_type: str, given: Mapping[str, Any], defaults: Mapping[str, Any]
    ) -> None:
        """`given` wins over `defaults`, which win over `DEFAULTS`."""
        self.model_type = model_type
        self._values = {**DEFAULTS, **defaults, **given}

    def __getitem__(self, key: str) -> Any:
        """The field as it stands; UserError if it is missing."""
        if key not in self._values:
            raise UserError(f"config.json of model_type={self.model_type} has no {key}: add it")
        return self._values[key]

    def integer(self, key: str) -> int:
        """A field that must be a whole number above zero."""
        value = self[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.refuse(key, value, ["whole numbers above 0"])
        return value

    def refuse(self, key: str, value: Any, allowed: Sequence[Any]) -> NoReturn:
        """Raises the UserError for a value outside `allowed`."""
        raise UserError(
            f"{key}={value!r} is not supported for model_type={self.model_type}: "
            f"only {' or '.join(map(str, allowed))}"
        )
