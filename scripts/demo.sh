#!/usr/bin/env bash
# The main job from nothing, on the built-in pictures: install, pre-train MoCo v2 with feature transformation (FT),
# evaluate, draw the scores. About 4 minutes on two idle CPU cores after installing.  Usage: bash scripts/demo.sh [SEED]
set -euo pipefail
cd "$(dirname "$0")/.."
extra="" source scripts/setup.sh

seed=${1:-0}
name=demo-seed$seed-$(date +%m%d-%H%M%S)
run=save/$name

# Network    ResNet-18 of base width 16 (--width 0.25) with a 3x3 stem: 0.7 M weights, hundreds of pictures a second.
# Schedule   batch 64, learning rate .03, one cosine over 24 epochs, T = .2 (MoCo v2), key momentum .99.
# Queue      K = 256, four batches: with thousands the network tells fresh keys from stale ones and learns little else.
# FT         both parts with one lambda a batch, alpha 2.0 and 1.6 as published, from epoch 9 on: it multiplies the
#            positives' gradient by 2.6, too much for a network that cannot tell the pictures apart yet.
python main_contrast.py --method MoCov2 --width 0.25 --batch_size 64 --learning_rate 0.03 --cosine --epochs 24 \
    --queue_size 256 --temperature 0.2 --key_momentum 0.99 \
    --ft_pos extrapolate --ft_neg interpolate --ft_begin_epoch 8 \
    --no_warm --amp --save_score --print_freq 39 --seed "$seed" --name "$name"

# The same two evaluations before and after training. The features of a narrow network are small: learning rate 1.
probe="--cache_features --learning_rate 1 --print_freq 1000 --save_freq 0"
for evaluation in "--eval knn" "--eval linear $probe"; do
    kind=$(echo "$evaluation" | cut -d' ' -f2)
    python main_linear.py $evaluation --seed "$seed" --width 0.25 --name "${name}_untrained_$kind" > /dev/null
    python main_linear.py $evaluation --seed "$seed" --ckpt "$run/current.pth" --name "${name}_$kind" > /dev/null
done

python scripts/plot_scores.py "$run" --labels "MoCo v2 + FT" --smooth 25 -o "$run/scores.png"
python scripts/demo_summary.py "$run"
