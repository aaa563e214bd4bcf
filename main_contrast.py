"""Pre-train an image encoder without labels.

python main_contrast.py                                        # the built-in pictures, one process
python main_contrast.py --data_folder my/images --nprocs 4     # four processes on this machine
torchrun --nproc_per_node 8 main_contrast.py --dataset imagenet --data_folder path/to/imagenet
"""

import sys
from functools import partial

from options.contrast import parse


def main() -> None:
    options, origins, notes = parse(sys.argv[1:])  # before torch is imported: --help and typing errors answer at once
    from learning import parallel
    from learning.pretraining import pretrain

    try:
        parallel.launch(partial(pretrain, origins=origins, notes=notes), options)
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"main_contrast.py: {error}")


if __name__ == "__main__":
    main()
