"""What every program imports first. Importing PyTorch takes seconds. Ctrl-C in that time, or a
package that cannot be imported, ends the program with one line instead of a traceback."""

import sys
from pathlib import Path


def explain(kind, error, traceback):
    """Print an exception that nothing has caught: Python calls this in place of its own."""
    is_import = issubclass(kind, ImportError) and not is_ours(error.name)
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped.", file=sys.stderr)
    elif is_import:
        said = " ".join(str(error).split())[:200]
        print(f"error: {said}: pip install -r requirements.txt", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def is_ours(module: str | None) -> bool:
    return module is not None and Path(__file__).with_name(f"{module}.py").exists()


sys.excepthook = explain
