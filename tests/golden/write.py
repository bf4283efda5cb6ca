"""Write the golden files: logits, gradients and greedy tokens of tiny `transformers` models.

    python tests/golden/write.py [CASE ...] [--out DIR]

Runs in the environment of requirements.txt, not in the package's own. Every case of cases.py
becomes DIR/<case>-init and DIR/<case>-reinit; README.md says what lies in them.
"""

import argparse
import copy
import hashlib
import json
import shutil
import sys
import zlib
from pathlib import Path

import torch
import transformers
from cases import BATCH, CASES, LEFT_PADS, LENGTH, NEW_TOKENS, VARIANTS, Case
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion

NOISE = 1e-5  # logits that should be equal differ by float32 rounding only: about 1e-6
TIE = 1e-4  # two candidates (of the router, of the greedy step) nearer than this may swap places
SEEDS = 20  # seeds to try before giving up on a case full of ties
CHECKED_FILES = ("config.json", "golden.safetensors", "model.safetensors")


def build(case: Case, variant: str, seed: int) -> transformers.PreTrainedModel:
    """Return the model of a case: float32, eval mode, eager attention and experts."""
    kwargs = copy.deepcopy(case.kwargs)  # the class writes defaults into `rope_parameters`
    config = getattr(transformers, case.config)(**kwargs)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    if variant == "reinit":
        reinitialise(model, torch.Generator().manual_seed(seed))
    return model.eval()


@torch.no_grad()
def reinitialise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Give every parameter a scale at which a wrong formula shows in the logits.

    Matrices N(0, 1/fan_in), embeddings N(0, 1), biases N(0, 0.3^2), norm weights + N(0, 0.3^2)
    around their initial 1 (or 0, where the norm multiplies by 1 + w). Mamba: conv N(0, 1/4), A_log
    and D near their initial values, dt bias such that softplus gives about 0.05 to 0.3, so that the
    state remembers a handful of tokens.
    """
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if name.endswith(("embed_tokens.weight", "embeddings.weight")):
            p.copy_(noise)
        elif name.endswith("A_log"):
            p.add_(0.2 * noise)
        elif name.endswith("conv1d.weight"):
            p.copy_(0.5 * noise)
        elif name.endswith("dt_proj.bias"):
            p.copy_(-2.0 + 0.5 * noise)
        elif p.ndim >= 2:
            p.copy_(noise * p.shape[-1] ** -0.5)
        elif name.endswith("bias"):
            p.copy_(0.3 * noise)
        else:  # norm weights and Mamba's D
            p.add_(0.3 * noise)


def gradients(
    model: transformers.PreTrainedModel, tokens: torch.Tensor, keys: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """Gradients of the mean next-token cross-entropy under the names of model.safetensors."""
    logits = model(tokens).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    grads = revert_weight_conversion(model, grads)  # fused experts become one matrix each
    if missing := [key for key in keys if key not in grads]:
        sys.exit(f"grads={missing} are not keys of model.safetensors: choose from {sorted(grads)}")
    return {f"grad.{key}": grads[key].contiguous() for key in keys}


@torch.no_grad()
def padded(
    model: transformers.PreTrainedModel, tokens: torch.Tensor, logits: torch.Tensor
) -> tuple[dict[str, torch.Tensor], float]:
    """Row 0 moved right by LEFT_PADS, row 1 unchanged; returns tensors and the error it shows.

    A causal model must give the logits of the unpadded rows again: the largest difference is the
    evidence that the family honours the mask.
    """
    padded_tokens, mask = tokens.clone(), torch.ones_like(tokens)
    padded_tokens[0, LEFT_PADS:] = tokens[0, :-LEFT_PADS]
    padded_tokens[0, :LEFT_PADS] = mask[0, :LEFT_PADS] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # as `generate` derives them
    out = model(padded_tokens, attention_mask=mask, position_ids=positions).logits
    error = max(
        (out[0, LEFT_PADS:] - logits[0, :-LEFT_PADS]).abs().max().item(),
        (out[1] - logits[1]).abs().max().item(),
    )
    tensors = {"padded_tokens": padded_tokens, "padded_mask": mask, "padded_logits": out}
    return tensors, error


@torch.no_grad()
def greedy(
    model: transformers.PreTrainedModel, tokens: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """Continuation by `generate` with the cache, how near the choices were, and the cache's error.

    The error is against one uncached forward pass over the whole sequence. With dynamic NTK it is
    large by design: cached keys keep the frequencies of the step that wrote them.
    """
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    cached = torch.stack(out.logits, dim=1)
    full = model(out.sequences).logits[:, -NEW_TOKENS - 1 : -1]
    best = cached.topk(2).values
    checks = {
        "greedy_margin": (best[..., 0] - best[..., 1]).min().item(),
        "cached_minus_full": (cached - full).abs().max().item(),
    }
    return out.sequences[:, tokens.shape[1] :], checks


@torch.no_grad()
def router_gap(model: transformers.PreTrainedModel, tokens: torch.Tensor) -> dict[str, float]:
    """Smallest distance between a chosen expert's logit and the best one not chosen."""
    if not hasattr(model.config, "output_router_logits"):
        return {}
    k = model.config.num_experts_per_tok
    routers = model(tokens, output_router_logits=True).router_logits
    sorted_logits = [r.sort(descending=True).values for r in routers]
    return {"router_gap": min((s[:, k - 1] - s[:, k]).min().item() for s in sorted_logits)}


def record(
    model: transformers.PreTrainedModel, case: Case, variant: str, seed: int
) -> tuple[dict[str, torch.Tensor], dict[str, float], dict[str, str]]:
    """Run the model; returns golden tensors, the checks made on them, and what was left out.

    Order matters: dynamic NTK remembers the longest input it has seen, so `generate` comes last.
    """
    generator = torch.Generator().manual_seed(seed + 1)

    def draw(length: int) -> torch.Tensor:
        return torch.randint(1, model.config.vocab_size, (BATCH, length), generator=generator)

    tokens = draw(LENGTH)
    with torch.no_grad():
        logits = model(tokens).logits
    tensors, left_out = {"tokens": tokens, "logits": logits}, {}
    checks = {"max_abs_logit": logits.abs().max().item(), **router_gap(model, tokens)}

    with_pads, checks["padded_minus_plain"] = padded(model, tokens, logits)
    if checks["padded_minus_plain"] <= NOISE:
        tensors |= with_pads
    else:
        left_out["padded_*"] = "left padding changes the logits of the tokens that are not padding"
    if case.long:
        tensors["tokens_long"] = draw(case.long)
        with torch.no_grad():
            tensors["logits_long"] = model(tensors["tokens_long"]).logits
    if variant == "reinit":
        tensors |= gradients(model, tokens, case.grads)
    tensors["generated"], more = greedy(model, tokens)
    return tensors, checks | more, left_out


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(name: str, variant: str, out: Path) -> Path:
    """Write one folder, with the first seed that has no near tie."""
    case, folder = CASES[name], out / f"{name}-{variant}"
    first = zlib.crc32(folder.name.encode())
    for seed in range(first, first + SEEDS):
        model = build(case, variant, seed)
        tensors, checks, left_out = record(model, case, variant, seed)
        if min(checks["greedy_margin"], checks.get("router_gap", TIE)) >= TIE:
            break
    else:
        sys.exit(f"{folder.name}: near ties with {SEEDS} seeds: choose a smaller TIE than {TIE}")

    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()  # says nothing that config.json does not
    stored = {k: v.int() if v.dtype == torch.int64 else v for k, v in tensors.items()}
    save_file({k: v.contiguous() for k, v in stored.items()}, folder / "golden.safetensors")
    meta = {
        "case": {"config": case.config, "kwargs": case.kwargs, "notes": case.notes},
        "checks": {k: float(f"{v:.2e}") for k, v in checks.items()},
        "left_out": left_out,
        "seed": seed,
        "sha256": {file: sha256(folder / file) for file in CHECKED_FILES},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1, sort_keys=True) + "\n")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names in cases.py; default: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    if unknown := [name for name in args.cases if name not in CASES]:
        parser.error(f"CASE={unknown} is not in cases.py: choose from {', '.join(CASES)}")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in args.cases or CASES:
        for variant in VARIANTS:
            folder = write(name, variant, args.out)
            size = sum(f.stat().st_size for f in folder.iterdir())
            print(f"{folder.name:24} {size / 1000:6.0f} kB", flush=True)


if __name__ == "__main__":
    main()
