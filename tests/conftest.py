"""Settings that must hold before torch and matplotlib are imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for each other
os.environ.setdefault("MPLBACKEND", "agg")  # no display
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests make or ship their data, and download none
