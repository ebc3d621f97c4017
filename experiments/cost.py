"""What distilling costs: hours of one GPU, memory and disk, for four sizes of DiT, and PixArt-α.

Matrix products are counted, and so are the bytes that training has to store. What a count cannot
say is the rate at which a GPU computes. benchmark.py measures it for one network, and here it is
taken to hold for all of them. (Small networks reach less.)

    python experiments/cost.py runs/benchmark/benchmark.json     at the rates measured there
    python experiments/cost.py --tflops 100                      at this rate; nothing is measured

The recipe is that of the preset imagenet256, the paper's as far as it is known. The columns:

    traj. h      hours to solve the teacher's ODE for all trajectories: 25 guided Euler steps each
    disk GB      of the trajectories
    train h      hours of the first stage. Recomputing activations would take a third more
    GiB          memory of its training, 16 images at a time,
    recomputed   and the same with recomputing
    GAN h        hours of the second stage
    GAN GiB      its memory, with recomputing
    teacher ms   milliseconds an image: the teacher, and
    student ms   the student in 4 steps
    history %    how much more arithmetic the student does than one without history

The table is also written to cost.json in the folder --out.
"""

import json
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import startup  # noqa: F401  before the large packages

import torch

from command_line import make_parser, number, run_program
from config import PRESETS, ModelConfig
from evaluate import count_macs, table
from experiments.benchmark import latent_config
from files import UserError, output_folder, save_json
from gan import DiscriminatorHead
from model import DiT
from text import prompt_length

SIZES = ("S/2", "B/2", "L/2", "XL/2")
PIXELS = (256, 512, 1024)  # a side; the autoencoder's latents have an eighth
AT_ONCE = 16  # images in a micro-batch
PRESET = PRESETS["imagenet256"]

# ---- 1. Counting ---------------------------------------------------------------------------------


def network_config(size: str, pixels: int) -> ModelConfig:
    """A student; its history layers are the paper's fraction of the layers, 6 of 28."""
    config = latent_config(size, history_layers=0, image_size=pixels // 8)
    return replace(config, history_layers=round(config.depth * 6 / 28))


def count_parameters(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@cache
def network_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):  # without memory
        return count_parameters(DiT(config))


@cache
def make_head(width: int, hidden: int) -> DiscriminatorHead:
    with torch.device("meta"):
        return DiscriminatorHead(width, hidden)


def gan_macs(config: ModelConfig) -> int:
    """Multiply-accumulates of an iteration of the second stage for one sample, approximately. A
    backward pass costs as much as two forward passes, or as one where no weight has a gradient."""
    steps = PRESET.student.steps
    head = make_head(config.width, PRESET.gan.hidden)
    weights = count_parameters(head) - count_parameters(head.condition)
    head_macs = config.depth * config.tokens * weights  # every token meets every weight
    teacher_macs = count_macs(replace(config, history_layers=0))
    own_inputs = count_macs(config, steps - 1)  # without gradient
    student = 3 * count_macs(config, steps)
    judging = 2 * (teacher_macs + head_macs)  # the student's image, with a gradient for it
    discriminator = 2 * (teacher_macs + 3 * head_macs)  # a real image and the student's
    return own_inputs + student + judging + discriminator


def activation_bytes(config: ModelConfig, states: int, bf16=True, checkpointing=False) -> int:
    """About what the backward pass needs of one trajectory. Measured, without torch.compile: 85
    bytes for each token, feature and layer in float32, and 51 in bfloat16. With checkpointing it is
    5 bytes, and all of them for one layer at a time."""
    layer = 51 if bf16 else 85
    words = 0
    if config.reads_text:  # by hooks on a CPU: cross-attention, and the prompt's keys and values
        layer += 6 if bf16 else 12
        words = prompt_length(config.text_width) * config.depth * (5 if bf16 else 11)
    all_layers = layer * config.depth
    if checkpointing:
        all_layers = 5 * config.depth + layer
    return (states * config.tokens * all_layers + words) * config.width


def training_bytes(config: ModelConfig, checkpointing: bool) -> int:
    """Memory of the first stage's training: for each weight 24 bytes (the weight, its gradient,
    AdamW's two moments, the EMA and the teacher), and activations."""
    stored = activation_bytes(config, PRESET.student.steps, checkpointing=checkpointing)
    return 24 * network_parameters(config) + AT_ONCE * stored


def gan_bytes(config: ModelConfig) -> int:
    """The same of the second stage, with checkpointing. The heads with their gradients and moments,
    and the activations of an image in the frozen teacher, are added."""
    heads = config.depth * count_parameters(make_head(config.width, PRESET.gan.hidden))
    image = activation_bytes(config, states=1)
    return training_bytes(config, checkpointing=True) + 16 * heads + AT_ONCE * image


# ---- 2. The estimate -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """In TFLOP/s."""

    training: float
    gan: float
    sampling: float


def measured_rates(file: Path) -> Rates:
    """From a benchmark.json. Raises UserError where it does not hold all of them."""
    try:
        content = json.loads(file.read_text())
        results, settings = content["results"], content["settings"]
        images_per_second = results["second stage"]["ours, recomputing"]["images"]
        config = latent_config(settings["size"], settings["history_layers"])
        return Rates(
            training=results["training"]["ours"]["tflops"],
            gan=2 * gan_macs(config) * images_per_second / 1e12,
            sampling=results["sampling"]["teacher"]["tflops"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} does not hold all rates ({error!r}): run experiments/benchmark.py to its end"
        ) from None


def estimate(config: ModelConfig, rates: Rates) -> dict[str, float]:
    """A row of the table. A text network has no second stage here."""
    steps, ode, trajectories = PRESET.student.steps, PRESET.ode, PRESET.trajectories
    one_state = 2 * count_macs(config) / 1e12  # TFLOP
    student = 2 * count_macs(config, steps) / 1e12
    teacher = ode.euler_steps * ode.calls_per_step * one_state
    images = PRESET.distillation.iterations * PRESET.distillation.batch
    gan_images = PRESET.gan_training.iterations * PRESET.gan_training.batch
    states = 1 + len(trajectories.kept_steps)
    plain = 2 * count_macs(replace(config, mask="none"), steps) / 1e12
    row = {
        "traj. h": trajectories.count * teacher / rates.sampling / 3600,
        "disk GB": trajectories.count * states * 2 * config.channels * config.image_size**2 / 1e9,
        "train h": images * 3 * student / rates.training / 3600,
        "GiB": training_bytes(config, checkpointing=False) / 2**30,
        "recomputed": training_bytes(config, checkpointing=True) / 2**30,
        "teacher ms": 1000 * teacher / rates.sampling,
        "student ms": 1000 * student / rates.sampling,
        "history %": 100 * (student / plain - 1),
    }
    if not config.reads_text:
        gan = 2 * gan_macs(config) / 1e12
        row["GAN h"] = gan_images * gan / rates.gan / 3600
        row["GAN GiB"] = gan_bytes(config) / 2**30
    return row


def estimate_all(rates: Rates) -> dict[str, dict]:
    rows = {}
    for size in SIZES:
        for pixels in PIXELS:
            rows[f"DiT-{size} at {pixels}"] = estimate(network_config(size, pixels), rates)
    for pixels in PIXELS:
        config = replace(network_config("XL/2", pixels), text_width=4096)  # T5's
        rows[f"PixArt-α at {pixels}"] = estimate(config, rates)
    return rows


# ---- 3. The program ------------------------------------------------------------------------------

COLUMNS = {
    "traj. h": ",.1f", "disk GB": ",.0f", "train h": ",.1f", "GiB": ",.1f", "recomputed": ",.1f",
    "GAN h": ",.1f", "GAN GiB": ",.1f", "teacher ms": ",.0f", "student ms": ",.1f",
    "history %": ".2f",
}


def parse_flags():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("file", type=Path, nargs="?", help="a benchmark.json with measured rates")
    add("--tflops", type=number(float, 0.001), help="a rate for everything, in TFLOP/s")
    add("--out", type=Path, default=Path("runs/cost"), help="folder (default: runs/cost)")
    flags = parser.parse_args()
    if (flags.file is None) == (flags.tflops is None):
        parser.error("give either a benchmark.json or --tflops")
    return flags


def main():
    flags = parse_flags()
    if flags.file is None:
        rates = Rates(flags.tflops, flags.tflops, flags.tflops)
    else:
        rates = measured_rates(flags.file)
    rows = estimate_all(rates)
    first, second = PRESET.distillation, PRESET.gan_training
    print(
        f"{PRESET.trajectories.count:,} trajectories; {first.iterations:,} iterations of "
        f"{first.batch}, and {second.iterations:,} of the second stage, on one GPU. In TFLOP/s: "
        f"training {rates.training:.3g}, second stage {rates.gan:.3g}, sampling "
        f"{rates.sampling:.3g}\n"
    )
    print(table(rows, COLUMNS))
    file = output_folder(flags.out) / "cost.json"
    save_json(file, dict(rates=vars(rates), rows=rows))
    print(f"\nwrote {file}")


if __name__ == "__main__":
    run_program(main)
