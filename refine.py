"""The second stage: a student that has learned to copy its teacher goes on, and real images judge it, too.

A student that copies can be no better than its teacher. The paper's "R + G" (Sec. 4) fine-tunes it with two losses: to
copy (R), and to be taken for real by a discriminator (G), which learns meanwhile to tell its images from those of the
data set (discriminator.py). Two players, a step each in turn:

    the student    ‖ x̂_{τ_{s-1}} − x_{τ_{s-1}} ‖² over the S steps, plus λ · student_loss(D(x̂_{τ_0}))
    the heads      heads_loss(D(real), D(x̂_{τ_0}))

D sees its image under a little noise (--level), and its label. λ is such that at the last layer neither gradient drowns
the other (VQGAN's adaptive weight), and 0 at first (--alone), while the heads learn. By default the student reads its
own history, as when it samples, and learns to copy from there; `--judged forced` feeds it the teacher's states, as the
first stage does.

    python distill.py                                      the student of the first stage: runs/shapes/student.pt
    python refine.py                                       fine-tune it, into runs/shapes-refined/
    python refine.py --strength 0 --out runs/control       the same iterations without a judge
    python evaluate.py runs/shapes runs/shapes-refined runs/control

A run leaves student.pt, samples.png, game.png and result.json in its folder, --out. Started again, it continues.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

import data
from discriminator import GROUP, MOST, Discriminator, balance, heads_loss, student_loss
from distill import find_trajectories, own_history, predict, report
from presets import GAME, REFINERS, choose, flips
from teacher import PATHS, find_teacher, load_network, over
from training import (Fault, Player, command, fingerprint, make_folder, pick_device, positive, precision, rank,
                      recompute, share, strength, train, training_flags, whole, world, writable)


def players(student, about: dict, discriminator, game: dict):
    """The losses of the two, as functions for training.Player: the student's, (model, *batch) -> total, copying,
    judged, λ; and the heads', (model, *batch) -> loss, the share of logits with the right sign. A batch: x (b, S + 1,
    c, h, w) and y (b,), a teacher's trajectories; as many real images and their labels; noise for generated and for
    real ones; and (b,) 1 where the judge counts already, 0 before."""
    path = PATHS[about["path"]]
    t = torch.tensor(game["level"] * path.T)
    t = t if path.T == 1 else t.round()
    last = getattr(student, student.head_names[-1]).linear.weight
    generated = []  # the images just judged: what the heads learn from in their step, which is next

    def look(judge, images, noise, y):
        when = t.to(images.device)
        x = over(path.alpha(when), images) * images + over(path.sigma(when), images) * noise
        return judge(x, path.told(when), y)

    def student_plays(model, x, y, real, labels, noise, other_noise, playing):
        history = x[:, :-1] if game["judged"] == "forced" else own_history(model, about, x[:, 0], y)
        prediction = predict(model, about, history, y)
        copying, image = (prediction - x[:, 1:]).square().mean(), prediction[:, -1]
        discriminator.requires_grad_(False)
        leaf = image.detach().requires_grad_()
        judged = student_loss(look(discriminator, leaf, noise, y))
        pull = (image * torch.autograd.grad(judged, leaf)[0]).sum()  # judged's gradients, without D in their graph,
        same = pull - pull.detach() + judged.detach()  # … but not its value: that is put in here
        weight = playing[0] * balance(copying, pull, last, game["strength"])
        generated.append(image.detach())
        return copying + weight * same, copying, judged, weight

    def heads_play(model, x, y, real, labels, noise, other_noise, playing):
        discriminator.requires_grad_(True)
        images = torch.cat([real, generated.pop(0)])
        logits = look(model, images, torch.cat([other_noise, noise]), torch.cat([labels, y]))
        of_real, of_generated = logits.chunk(2)
        right = ((of_real > 0).float().mean() + (of_generated < 0).float().mean()) / 2
        return heads_loss(of_real, of_generated), right

    return student_plays, heads_play


def fits(about: dict, dataset: data.Dataset, preset: dict):
    """Raises Fault where images or settings do not go with the student that `about` describes."""
    if preset["batch"] % (GROUP * world() * preset["accumulate"]):
        raise Fault(f"a batch of {preset['batch']}, in {world()} × {preset['accumulate']} parts, is not made of "
                    f"groups of {GROUP}, which the heads compare: choose another --batch or --accumulate")
    if preset["iterations"] <= preset["alone"]:
        raise Fault(f"in the first {preset['alone']} steps nobody judges: choose fewer (--alone), or more --iterations")
    data.must_match(about, dataset)


def refine(student, about: dict, teacher, trajectories: data.Trajectories, dataset: data.Dataset, preset: dict,
           out: Path, device, seed=0):
    """Fine-tune a student into the file `out`; returns (model, about, losses), the losses as [(step, total, copying,
    judged, λ, heads', their accuracy), …]. Continues what is there. Raises Fault where data or trajectories are not the
    student's, and when a player has lost."""
    fit = {key: preset[key] for key in ("iterations", "batch", "lr", "decay")}
    how = {key: preset[key] for key in ("bf16", "accumulate", "schedule")}
    game = {key: preset[key] for key in GAME}
    fits(about, dataset, preset)
    meta = trajectories.meta
    if (meta["teacher"], meta["guidance"], trajectories.times) != (about["teacher"], about["guidance"], about["times"]):
        raise Fault("these trajectories are of another teacher or guidance than those that the student has learned: "
                    "check --teacher and --trajectories")
    about = about | dict(refined=dict(**fit, **game, seed=seed, start=fingerprint(student.state_dict()),
                                      images=len(dataset), count=len(trajectories), noise=meta["seed"]))
    torch.manual_seed(seed)
    discriminator = Discriminator(teacher, game["hidden"]).to(device)
    student.to(device).requires_grad_(True)
    student.checkpointing = recompute(preset, student, about["S"] + 1, device)
    student.pos_embed.requires_grad_(False)
    student_plays, heads_play = players(student, about, discriminator, game)

    def batch_of(step):
        rng = data.stream(seed, step)
        x, y = trajectories.batch(rng.integers(len(trajectories), size=fit["batch"]))
        real, labels = dataset.draw(fit["batch"], rng)
        noise = torch.from_numpy(rng.standard_normal((2, *real.shape), dtype=np.float32))
        return x, y, real, labels, *noise, torch.full_like(y, step >= game["alone"])

    def verdict(losses):
        recent = [row[-1] for row in losses if row[0] > game["alone"] and game["strength"]][-10:]
        if len(recent) == 10 and min(recent) > 0.99:
            return "the heads are always right, and teach nothing (try more noise, --level, or a lower --heads-lr),"
        if losses[-1][4] >= 0.9 * MOST:
            return "the weight λ is at its bound, since the heads' gradient vanishes (try a lower --heads-lr),"

    print(f"fine-tuning with {len(discriminator.heads)} heads "
          f"({sum(p.numel() for p in discriminator.parameters()) / 1e6:.1f}M parameters), "
          f"{fit['iterations']:,} iterations of {fit['batch']} on {device} in {precision(device, preset['bf16'])}, "
          f"into {out}; shown: total, copying, judged, λ, heads' loss, their accuracy")
    student, losses = train("student and heads", student, batch_of, student_plays, out, about, **fit,
                            warmup=fit["iterations"] // 20, **how, verdict=verdict,
                            rival=Player(discriminator, heads_play, game["heads_lr"]))
    return student, about, losses


def draw(losses, out: Path):
    """game.png: rows (step, total, copying, judged, λ, heads' loss, their accuracy) as curves."""
    from matplotlib.figure import Figure

    names = ("copying loss", "judged: −D(generated)", "adaptive weight λ", "heads' loss", "heads' accuracy")
    step, _, *columns = zip(*losses, strict=True)
    page = Figure((3.2 * len(columns), 2.8), layout="tight")
    for axis, name, values in zip(page.subplots(1, len(columns)), names, columns, strict=True):
        axis.plot(step, values)
        axis.set(title=name, xlabel="step")
    page.savefig(writable(out), dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=REFINERS, default="shapes", help="sets everything; flags override it (default: shapes)")
    add("--from", type=Path, dest="start", metavar="FILE", help="the student (default: runs/PRESET/student.pt)")
    add("--out", type=Path, help="folder for the results (default: runs/PRESET-refined)")
    add("--teacher", type=Path, help="checkpoint (default: runs/PRESET/teacher.pt, or the one that ships with us)")
    add("--trajectories", type=Path, help="folder, written if need be (default: runs/PRESET/trajectories)")
    add("--count", type=positive, help="trajectories to train on (default: as many as the student has learned)")
    add("--data", help="the real images, if they are no longer where the teacher saw them")
    add("--judged", choices=("own", "forced"), help="the history that the student reads: its own, or its teacher's")
    add("--level", type=share, help="the noise under which images are judged, as a share of all time")
    add("--strength", type=strength, help="of the heads' gradient, in units of the copying loss's; 0: no judge")
    add("--alone", type=whole, help="steps at first in which the student only copies, and the heads learn")
    add("--heads-lr", type=strength, help="the heads' learning rate")
    add("--hidden", type=positive, help="the heads' width")
    training_flags(add)
    args = parser.parse_args()

    if args.compile:
        raise Fault("--compile is for the first stage: λ needs the graph of a step twice")
    preset, device, runs = choose(REFINERS, args), pick_device(args.device), Path("runs") / args.preset
    out = make_folder(args.out or runs.with_name(f"{args.preset}-refined"))
    began = time.time()
    teacher, teacher_about = find_teacher(args.teacher, args.preset, runs, device)
    start = args.start or runs / "student.pt"
    if not start.exists():
        raise Fault(f"no student at {start}: make one, python distill.py --preset {args.preset}, or name one, --from")
    student, about = load_network(start, "student", device)
    dataset = data.load(args.data or about["data"], about["model"]["image_size"], about["model"]["channels"],
                        flip=flips(teacher_about, args.preset))
    if about["teacher"] != fingerprint(teacher.state_dict()):
        raise Fault(f"{start} is another teacher's student: name its own, --teacher")
    fits(about, dataset, preset)  # better refused before the work
    args.count = args.count or about["training"].get("count")  # as many as it has learned
    learned = preset | dict(steps=about["S"], trajectory=about["trajectory"])
    trajectories = find_trajectories(teacher, teacher_about, args, learned, args.trajectories or runs / "trajectories",
                                     device)
    student, about, losses = refine(student, about, teacher, trajectories, dataset, preset, out / "student.pt", device,
                                    args.seed)
    if rank() == 0:
        draw(losses, out / "game.png")
        print(f"wrote {out}/game.png: the two players' losses")
        report(teacher, student, about, losses, out, device, args, began)


if __name__ == "__main__":
    command(main)
