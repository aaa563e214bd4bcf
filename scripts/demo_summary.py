"""Say what the demo found: python scripts/demo_summary.py RUN, after the four evaluations beside RUN."""

import json
import sys
from pathlib import Path

EXPLANATION = """\
k-NN: the class most of a test picture's 200 nearest training pictures have, by cosine similarity of their features.
Linear: a linear classifier on the frozen features, after its last epoch. No label was used to train the encoder."""


def main(run: Path) -> None:
    def results(kind: str, prefix: str = "") -> dict:
        path = run.with_name(f"{run.name}_{prefix}{kind}") / "results.json"
        return json.loads(path.read_text())[kind]

    rows = [
        ("k-NN, backbone", lambda prefix: results("knn", prefix)["backbone"]["top1"]),
        ("k-NN, head output", lambda prefix: results("knn", prefix)["head"]["top1"]),
        ("linear, backbone", lambda prefix: results("linear", prefix)["last"]["top1"]),
    ]
    print(f"\n{'top-1 accuracy in %':20}{'chance':>10}{'untrained':>12}{'pre-trained':>14}{'gain':>9}")
    for name, top1 in rows:
        before, after = top1("untrained_"), top1("")
        print(f"{name:20}{10:>10.1f}{before:>12.1f}{after:>14.1f}{after - before:>+9.1f}")
    print(f"\n{EXPLANATION}\n")
    print(f"Run folder    {run}  (options, log, checkpoint, scores of every step)")
    print(f"Picture       {run}/scores.png  (positive and negative scores over training, with and without FT)")
    print("TensorBoard   tensorboard --logdir tb")
    print(f"Notebook      notebooks/visualize_scores.ipynb;  more figures: python scripts/plot_scores.py {run} --help")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
