"""Hold folders that our exporter wrote against the golden files, with `transformers` as reader.

    python tests/golden/check_export.py FOLDER... [--golden DIR]

Each FOLDER holds config.json and model.safetensors. It must load with no key missing or left over,
and give the golden logits for the golden tokens. DIR is a golden folder, or a directory of them in
which the one named like FOLDER is taken. Runs in the environment of requirements.txt; the exit
status is 1 when a folder fails.
"""

import argparse
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

TOLERANCE = 1e-5  # max-abs difference of logits: float32 rounding of the same weights


def golden_folder(folder: Path, golden: Path) -> Path:
    """Return the golden folder to compare with; exits with a message where there is none."""
    for candidate in (golden, golden / folder.resolve().name):
        if (candidate / "golden.safetensors").is_file():
            return candidate
    sys.exit(f"--golden={golden} holds no golden.safetensors for {folder.name}: name its folder")


def load(folder: Path) -> tuple[transformers.PreTrainedModel, list[str]]:
    """Load FOLDER; returns the model and one line for each fault that `transformers` found.

    A tied head may be in the file or not: `transformers` reports neither as a fault. Raises
    OSError, RuntimeError or ValueError where the folder does not load at all.
    """
    if not (folder / "config.json").is_file():  # else the name would be looked up on the hub
        raise OSError("there is no config.json in it")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # report them below with the other faults
        local_files_only=True,
    )
    faults = [f"{kind}: {sorted(map(str, keys))}" for kind, keys in info.items() if keys]
    return model.eval(), faults


@torch.no_grad()
def compare(model: transformers.PreTrainedModel, golden: Path) -> list[tuple[str, float]]:
    """Return (name of the logits, max-abs difference) for every input of the golden folder."""
    stored = load_file(golden / "golden.safetensors")
    inputs = [("tokens", "logits"), ("tokens_long", "logits_long")]
    return [
        (logits, (model(stored[tokens].long()).logits - stored[logits]).abs().max().item())
        for tokens, logits in inputs
        if tokens in stored
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--golden", type=Path, default=Path(__file__).parent, metavar="DIR")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    failed = False
    for folder in args.folders:
        golden = golden_folder(folder, args.golden)
        try:
            model, faults = load(folder)
        except (OSError, RuntimeError, ValueError) as error:
            print(f"{folder.name}: FAIL does not load: {error}", file=sys.stderr)
            failed = True
            continue
        for name, difference in compare(model, golden):
            line = f"{name} max-abs difference {difference:.2e}, allowed {TOLERANCE:.0e}"
            print(f"{folder.name}: {line}")
            if not difference <= TOLERANCE:  # NaN fails too
                faults.append(line)
        for fault in faults:
            print(f"{folder.name}: FAIL {fault}", file=sys.stderr)
        failed |= bool(faults)
    sys.exit(failed)


if __name__ == "__main__":
    main()
