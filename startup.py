"""What every program imports first. Importing PyTorch takes seconds. Ctrl-C in that time, or a
package that cannot be imported, ends the program with one line instead of a traceback."""

import sys
from pathlib import Path


def explain(kind, error, traceback):
    """Print an exception that nothing has caught: Python calls this in place of its own."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped.", file=sys.stderr)
    elif issubclass(kind, ImportError) and not is_ours(error.name):
        said = " ".join(str(error).split())[:200]
        print(f"error: {said}: pip install -r requirements.txt", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def is_ours(module: str | None) -> bool:
    """Whether a module, such as "experiments.cost", is a file of this project."""
    file = str(module).replace(".", "/") + ".py"
    return (Path(__file__).parent / file).exists()


sys.excepthook = explain
