"""Measure what a pre-trained encoder has learned.

python main_linear.py --ckpt save/NAME/current.pth                      # linear probe on the data it was trained on
python main_linear.py --ckpt save/NAME/current.pth --cache_features     # the same in a fraction of the time
python main_linear.py --ckpt save/NAME/current.pth --eval knn           # nearest neighbours, nothing to train
"""

import sys
from functools import partial

from options.linear import parse


def main() -> None:
    options, origins, notes = parse(sys.argv[1:])  # before torch is imported: --help and typing errors answer at once
    from learning import parallel
    from learning.evaluation import evaluate

    try:
        parallel.launch(partial(evaluate, origins=origins, notes=notes), options)
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"main_linear.py: {error}")
    except KeyboardInterrupt:
        sys.exit("main_linear.py: stopped; the same command with --resume auto goes on after the last whole epoch.")


if __name__ == "__main__":
    main()
