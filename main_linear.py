"""Measure what a pre-trained encoder has learned.

python main_linear.py --ckpt save/NAME/current.pth                      # linear probe on the data it was trained on
python main_linear.py --ckpt save/NAME/current.pth --cache_features     # the same in a fraction of the time
python main_linear.py --ckpt save/NAME/current.pth --eval knn           # nearest neighbours, nothing to train
"""

import signal
import sys
from functools import partial

from options.linear import parse


def main() -> None:
    options, origins, notes = parse(sys.argv[1:])  # before torch is imported: --help and typing errors answer at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for Ctrl-C while PyTorch is loaded
    from learning import launch
    from learning.evaluation import evaluate

    launch.main(partial(evaluate, origins=origins, notes=notes), options)


if __name__ == "__main__":
    main()
