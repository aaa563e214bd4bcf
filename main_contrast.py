"""Pre-train an image encoder without labels.

python main_contrast.py                                        # the built-in pictures, one process
python main_contrast.py --data_folder my/images --nprocs 4     # four processes on this machine
torchrun --nproc_per_node 8 main_contrast.py --dataset imagenet --data_folder path/to/imagenet
"""

import signal
import sys
from functools import partial

from options.contrast import parse


def main() -> None:
    options, origins, notes = parse(sys.argv[1:])  # before torch is imported: --help and typing errors answer at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for Ctrl-C while PyTorch is loaded
    from learning import launch
    from learning.pretraining import pretrain

    launch.main(partial(pretrain, origins=origins, notes=notes), options)


if __name__ == "__main__":
    main()
