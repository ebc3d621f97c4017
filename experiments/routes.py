"""Other routes to the noise: how attention can find the token of x_T at its own position.

A student of x0 predictions has to read x_T, above all at the position of the token that it is about
to make. The attention that it inherits from its teacher has never looked at another state, and it
takes long to find that position (docs/results.md). The noise shortcut is one remedy. Here are two
others. Both change nothing but the attention of the history layers:

    bias         the logit of a query and a key at the same position of two states is increased by a
                 learned number, one for each head, which starts at 4
    positions    queries and keys are extended by the sinusoids of their positions. So the logit of
                 keys at the same position is increased by the learned number, in every state, and
                 that of neighbours by less

Both are trained and evaluated like the students of `ablation.py`, on the default preset, textures,
without the noise shortcut. The table has them beside those of results/ablation-textures.json.

    python experiments/routes.py --seeds 3 --images 2000

Students that are finished are kept in the folder --out, and routes.json is written there.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import startup  # noqa: F401  before the large packages

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from command_line import make_parser, positive_int, run_program
from config import PRESETS
from distill import distill, make_student
from experiments.ablation import LEGEND, Ablation, markdown, student_line
from files import output_folder, save_json
from machine import add_machine_flags, runtime_from
from model import Attention, DiT, sincos_positions
from pretrained import find_teacher
from trajectories import Trajectories, open_trajectories

PRESET = PRESETS["textures"]
ABLATION_RESULTS = Path(__file__).parent / "results" / "ablation-textures.json"
FIRST_BIAS = 4.0

# ---- 1. Two kinds of attention -------------------------------------------------------------------


class RoutedAttention(Attention):
    """Causal attention to the history, in which `bias`, one number for each head, favours some
    keys: favour(positions, i) says which, for the queries of state i. It starts with the weights of
    a plain layer."""

    def __init__(self, plain: Attention, width: int, grid_size: int, favour):
        super().__init__(width, plain.heads)
        self.load_state_dict(plain.state_dict())
        self.favour = favour
        self.bias = nn.Parameter(torch.full((plain.heads,), FIRST_BIAS))
        positions = sincos_positions(grid_size, width)[0]                   # (n, width)
        self.register_buffer("positions", F.normalize(positions, dim=-1))

    def forward(self, x, mask: str, past: list | None):
        if mask == "none":
            return super().forward(x, mask, past)
        n = x.shape[2]
        qkv = self.qkv(x)
        qkv = rearrange(qkv, "b s n (three h d) -> three b h (s n) d", three=3, h=self.heads)
        q, kv = qkv[0], qkv[1:]
        if past is not None:
            kv = torch.cat([*past, kv], dim=3)
            past[:] = [kv]
        outputs = []
        first = kv.shape[3] // n - x.shape[1]
        for i, query in enumerate(q.split(n, dim=2), start=first):
            k, v = kv[..., : (i + 1) * n, :]
            # (heads, n, (i + 1)·n), which is added to the logits
            added = rearrange(self.bias, "h -> h 1 1") * self.favour(self.positions, i)
            added = added.to(query.dtype)
            outputs.append(F.scaled_dot_product_attention(query, k, v, attn_mask=added))
        return self.proj(rearrange(outputs, "s b h n d -> b s n (h d)"))


def same_position(positions, i: int):
    """(n, (i + 1)·n): 1 where a key of an earlier state has the position of the query."""
    same = torch.eye(len(positions), device=positions.device)
    return torch.cat([same] * i + [torch.zeros_like(same)], dim=1)


def similarity(positions, i: int):
    """(n, (i + 1)·n): the scalar product of the positions of query and key, in all states. It adds
    to the logits what it adds to extend queries and keys by positions."""
    return (positions @ positions.T).repeat(1, i + 1)


ROUTES = {"bias": same_position, "positions": similarity}


def replace_attention(model: DiT, favour):
    """In all layers that read the history."""
    config = model.config
    for block in model.blocks[: config.history_layers]:
        block.attn = RoutedAttention(block.attn, config.width, config.grid_size, favour)


# ---- 2. The program ------------------------------------------------------------------------------


SETTINGS = replace(PRESET.student, noise_shortcut=False)


def run(ablation: Ablation, trajectories: Trajectories, name: str, seed: int) -> dict:
    """Train and evaluate a student. What was trained before is read."""
    training = replace(PRESET.distillation, seed=seed)
    model, record = make_student(
        ablation.teacher, ablation.teacher_record, SETTINGS, trajectories, training
    )
    replace_attention(model, ROUTES[name])
    file = output_folder(ablation.folder / name) / f"{seed}.pt"
    model, _ = distill(model, record, trajectories, file, ablation.runtime)
    return dict(seed=seed) | ablation.measure(model, record, f"{name}, seed {seed}")


def parse_flags():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--seeds", type=positive_int, default=1, help="trainings of each student (default: 1)")
    add("--images", type=positive_int, default=5000, help="of each student (default: 5000)")
    add("--out", type=Path, default=Path("runs/routes"), help="folder (default: runs/routes)")
    add_machine_flags(parser)
    return parser.parse_args()


def routes_table(students: dict[str, list[dict]]) -> str:
    """These students beside step distillation, the plain form and the noise shortcut."""
    others = json.loads(ABLATION_RESULTS.read_text())["students"]
    control = others["history_layers=0,noise_shortcut=False"]
    rows = {"plain": others["noise_shortcut=False"], "noise shortcut": others["preset"]} | students
    lines = {"no history": student_line(control, None)}
    lines |= {name: student_line(runs, control) for name, runs in rows.items()}
    return markdown(lines)


def main():
    flags = parse_flags()
    runtime = runtime_from(flags, PRESET.bf16)
    out = output_folder(flags.out)
    teacher, record = find_teacher(None, "textures", out, runtime.device)
    ablation = Ablation(PRESET, teacher, record, out, flags.images, runtime)
    ablation.evaluator(record.ode)  # it may refuse: before the work
    trajectories = open_trajectories(
        teacher, record, PRESET.trajectories, SETTINGS, out / "trajectories", runtime
    )
    students = {}
    for name in ROUTES:
        students[name] = [run(ablation, trajectories, name, i) for i in range(flags.seeds)]
    content = dict(images=flags.images, students=students)
    save_json(out / "routes.json", content)
    print(f"\n{routes_table(students)}\n{LEGEND}\nwrote {out / 'routes.json'}")


if __name__ == "__main__":
    run_program(main)
