#!/usr/bin/env bash
# The small runs that notebooks/analysis.ipynb draws, from nothing: MoCo v2 on the built-in pictures, each ten times
# shorter than anything to be proud of, but enough to see what moves the scores. What is complete is skipped, what was
# stopped goes on. Ten runs took 7 min 19 s on 2 CPU cores.  Usage: bash scripts/small_runs.sh
set -euo pipefail
cd "$(dirname "$0")/.."
extra="" source scripts/setup.sh

# As in the demo: 78 steps of 64 pictures an epoch, a queue of four batches, one cosine. The preset warms up for one epoch.
train() {
    name=$1
    shift
    echo "== $name"
    python main_contrast.py --method MoCov2 --width 0.25 --batch_size 64 --queue_size 256 --temperature 0.2 \
        --epochs 5 --learning_rate 0.03 --cosine --amp --save_score --knn_freq 5 --print_freq 26 --keep 1 \
        --seed 0 --name "$name" --model_path save/analysis --tb_path tb/analysis --resume auto "$@"
}

# The key encoder's momentum: from copying the query encoder at every step (0) to never following it (1).
for momentum in 0 0.5 0.9 0.99 0.999 1; do
    train "momentum-$momentum" --key_momentum $momentum
done

# Feature transformation beside momentum-0.99, which has none: each half of it alone, then both, from epoch 2 or at once.
train pos-from-2 --key_momentum 0.99 --ft_pos extrapolate --ft_begin_epoch 2
train neg-from-2 --key_momentum 0.99 --ft_neg interpolate --ft_begin_epoch 2
for begin in 0 2; do
    train "ft-from-$begin" --key_momentum 0.99 --ft_pos extrapolate --ft_neg interpolate --ft_begin_epoch $begin
done
echo "Now open notebooks/analysis.ipynb, or: python scripts/plot_scores.py save/analysis/momentum-*"
