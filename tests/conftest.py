"""Settings of the whole suite: one thread, so that tests do not fight over the cores of a busy machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the command lines that tests start

import torch  # noqa: E402

torch.set_num_threads(1)
