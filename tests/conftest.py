"""Settings of the whole suite: one thread and no waiting for the disk, for tests on a busy machine."""

import os

import learning  # noqa: F401  (sets what protobuf must see before anything imports it)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the command lines that tests start

import torch  # noqa: E402

torch.set_num_threads(1)
os.fsync = lambda handle: None  # slow on a busy disk; a test can end a process, but not cut the power
