"""The modules lie at the top of the repository. Two threads at most: these networks are tiny, and on a busy machine
threads that wait for one another cost more than they bring (OMP_NUM_THREADS=1 is respected)."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(min(2, torch.get_num_threads()))
