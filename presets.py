"""The settings of every preset in one place: `--preset NAME` sets them all, flags override them.

    points      2-D spirals: a minute or two; whole trajectories can be drawn
    shapes      16×16 procedural shapes: the default, minutes on a CPU
    shapes64    the same at 64×64: minutes on a GPU
    cifar10     a folder of 32×32 images (--data), such as CIFAR-10: a GPU
"""

# A teacher: its data and network, its noise path and what the network predicts, how it is trained, and how its ODE is
# solved: `steps` Euler steps with this guidance, from `count` noises.
TEACHERS = {
    "points": dict(
        data="points", image_size=1, channels=2, flip=False, size="N/1", path="flow", predicts="v",
        iterations=4000, batch=512, lr=2e-3, decay=0.995, guidance=1.0, steps=24, count=16384),
    "shapes": dict(
        data="shapes", image_size=16, channels=3, flip=False, size="T/4", path="flow", predicts="v",
        iterations=12000, batch=256, lr=2e-3, decay=0.999, guidance=1.25, steps=24, count=10240),
    "shapes64": dict(
        data="shapes", image_size=64, channels=3, flip=False, size="S/4", path="flow", predicts="v",
        iterations=20000, batch=256, lr=5e-4, decay=0.999, guidance=2.0, steps=24, count=16384),
    "cifar10": dict(
        data=None, image_size=32, channels=3, flip=True, size="S/2", path="flow", predicts="v",
        iterations=100000, batch=256, lr=3e-4, decay=0.9995, guidance=1.5, steps=24, count=50176),
}

# A student: its S steps, its history, what it learns from and what it puts out, and how it is trained.
STUDENTS = {
    "points": dict(
        steps=4, history="causal", history_layers=6, trajectory="clean", output="state", step_heads=False, told=None,
        iterations=2000, batch=256, lr=1e-3, decay=0.995),
    "shapes": dict(
        steps=4, history="causal", history_layers=2, trajectory="states", output="direction", step_heads=False,
        told=None, iterations=700, batch=64, lr=1e-3, decay=0.99),
    "shapes64": dict(
        steps=4, history="causal", history_layers=3, trajectory="states", output="direction", step_heads=False,
        told=None, iterations=5000, batch=64, lr=3e-4, decay=0.999),
    "cifar10": dict(
        steps=4, history="causal", history_layers=3, trajectory="states", output="direction", step_heads=False,
        told=None, iterations=20000, batch=64, lr=2e-4, decay=0.999),
}


def choose(table: dict, args) -> dict:
    """The settings of args.preset with the flags that were given (those not None) put over them."""
    preset = table[args.preset]
    return preset | {key: value for key, value in vars(args).items() if key in preset and value is not None}
