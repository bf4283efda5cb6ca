"""Floating-point operations of the Tiny Recursive Model; counted as in `slm_jax.models.flops`."""

from slm_jax.models.trm import TRMConfig, ungraded_steps


def network_flops(config: TRMConfig) -> float:
    """Operations of one application of f to one puzzle: C_f."""
    d, slots = config.d_model, config.n_slots
    if config.mixer == "attention":
        mixer = slots * sum(config.attention().flops(d, slots, causal=False).values())
    else:
        mixer = d * sum(config.swiglu(slots).flops(slots).values())
    channel = slots * sum(config.swiglu(d).flops(d).values())
    return config.n_layers * (mixer + channel)


def head_flops(config: TRMConfig) -> float:
    """Operations of both heads on one puzzle."""
    return 2 * config.d_model * (config.vocab_size * config.seq_len + 2)


def inference_flops(config: TRMConfig, n_steps: int = 1) -> float:
    """Operations of `n_steps` supervision steps on one puzzle, without a gradient."""
    applied = config.n_cycles * (config.n_latent_steps + 1)
    return n_steps * (applied * network_flops(config) + head_flops(config))


def training_flops(config: TRMConfig, *, continue_loss: bool = False) -> float:
    """Operations of one supervision step on one puzzle in training.

    C_f x ((T - 1)(n + 1) + 3 (n + 1)) and the heads three times: the updates with a gradient
    count three times, forward and twice that backward. What `remat` recomputes is not counted.

    Args:
        config: the model.
        continue_loss: also run the next step, without a gradient, for the continue target.
    """
    forward = config.n_cycles * (config.n_latent_steps + 1)
    graded = config.n_latent_steps + 1 - ungraded_steps(config)
    total = (forward + 2 * graded) * network_flops(config) + 3 * head_flops(config)
    return total + (inference_flops(config) if continue_loss else 0.0)


def recomputed_flops(config: TRMConfig) -> float:
    """Operations on one puzzle that `remat` adds to a supervision step: f, where it has a gradient.

    An upper bound: the last product of f is not needed again.
    """
    graded = config.n_latent_steps + 1 - ungraded_steps(config)
    return graded * network_flops(config) if config.remat == "full" else 0.0
