"""What people ask about a run ("is my loss normal?"), answered from its options and its log.jsonl.

Needs the standard library alone, so that `scripts/doctor.py` answers at once.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Of some 60 runs on the built-in pictures and CIFAR-10, those that got away from the loss of guessing kept below .98 of
# it, or fell by .013 of it and more in three epochs.
AT_CHANCE, FALLS = 0.98, 0.01
PATIENCE = 3  # epochs in a row


@dataclass(frozen=True)
class Finding:
    """A diagnosis. `well`: nothing is wrong, though it may look so. `timed`: a matter of this machine, on this day."""

    name: str
    evidence: str
    advice: str
    well: bool = False
    timed: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence}; {self.advice}"


@dataclass
class Case:
    """What there is to look at: options, those the presets would have brought (`usual`), and what the log tells.

    rows: epoch -> the numbers of its records by name, later ones in place of earlier ones, and "whole" once it is over.
    told: the names of findings that the log holds, or that have been told without.
    """

    opt: Any
    usual: Any
    images: int
    processes: int
    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)
    _read: int = 0  # bytes of the log

    def read(self, log: Path) -> None:
        """Take in what log.jsonl has more than the last time."""
        with log.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):  # it is being written
                    break
                self._read += len(line)
                self._add(json.loads(line))

    def _add(self, record: dict[str, Any]) -> None:
        if record["kind"] == "diagnosis":
            self.told.add(record["name"])
            return
        row = self.rows.setdefault(record["epoch"], {"lines": 0, "waited": 0.0})
        row |= {name: value for name, value in record.items() if isinstance(value, (int, float))}
        row["lines"] += "data_wait" in record
        row["waited"] += record.get("data_wait", 0.0)
        if record["kind"] == "epoch":
            row["whole"] = True

    @property
    def epochs(self) -> list[dict[str, float]]:
        return [row for row in self.rows.values() if "whole" in row]

    @property
    def settled(self) -> list[dict[str, float]]:
        """The last `PATIENCE` epochs after warm-up, of full memories; none if there are not as many."""
        begin = self.opt.warmup_epochs + (self.opt.mem == "bank")
        rows = [row for row in self.epochs if row["epoch"] > begin and row.get("queue_fill", 1) > 0.999]
        return rows[-PATIENCE:] if len(rows) >= PATIENCE else []

    @property
    def transforms(self) -> bool:
        return (self.opt.ft_pos, self.opt.ft_neg) != ("none", "none")

    @property
    def choices(self) -> int:
        """Among how many embeddings (SwAV: clusters) a query looks for its own; 0 where there are no negatives."""
        opt = self.opt
        if opt.mem == "none":
            return opt.prototypes if opt.method == "SwAV" else 0
        negatives = 2 * opt.batch_size // opt.accumulate - 2 if opt.mem == "batch" else opt.queue_size or 0
        return 1 + negatives * (1 + (opt.ft_neg == "append"))

    @property
    def parts(self) -> int:
        return 2 if self.opt.modal == "CMC" else 1  # whose losses are added

    @property
    def chance(self) -> float:
        """The loss of guessing, where all scores are equal: log(choices), of NCE with what its noise adds, about 1."""
        n = self.choices
        noise = (n - 1) * math.log(n / (n - 1)) if self.opt.loss == "nce" else 0.0
        return self.parts * (math.log(n) + noise) if n else math.nan

    @property
    def guessing(self) -> str:
        parts, more = f"{self.parts} x " * (self.parts > 1), " and what NCE adds" * (self.opt.loss == "nce")
        return f"{self.chance:.2f}, {parts}log({self.choices}){more}"

    @property
    def ideal(self) -> float | None:
        """The softmax loss of positives at 1 and evenly spread negatives, None where there is none of unit vectors.

        Their scores s have variance 1 / D, as if normal: exp(s / T) is exp(1 / (2 D T^2)) on average.
        """
        opt = self.opt
        if opt.mem == "none" or opt.loss == "nce" or opt.head == "linear_wo_norm":
            return None
        logit = 1 / opt.temperature - 1 / (2 * opt.feat_dim * opt.temperature**2) - math.log(self.choices - 1)
        return self.parts * (max(-logit, 0.0) + math.log1p(math.exp(-abs(logit))))

    @property
    def even(self) -> str:
        return f"{self.opt.feat_dim**-0.5:.2g}"  # feature_std of evenly spread embeddings


def expectation(case: Case) -> str:
    """What the loss is going to look like."""
    opt = case.opt
    if not case.choices:
        return f"the loss alone tells little: feature_std is {case.even} where embeddings spread, 0 if they collapse"
    says = f"guessing gives a loss of {case.guessing}"
    if opt.mem == "bank":
        says += "; the first epoch only fills the bank: its loss is 0"
    elif opt.mem == "moco" and case.ideal is not None and not (case.transforms and opt.ft_begin_epoch == 0):
        says += f"; against a queue of random vectors it begins near {case.ideal:.2g}, rises for about "
        says += f"{-(-opt.queue_size // opt.batch_size)} steps, in which embeddings replace them, and then falls"
    return says


def symptoms(case: Case) -> Iterator[str]:
    """The newest numbers of the log, each beside what it is to be compared with."""
    yield expectation(case)
    if not case.rows:
        return
    first, last = (case.rows[epoch] for epoch in (min(case.rows), max(case.rows)))
    shown = {
        "loss": f"loss {{:.3f}}, in epoch {first['epoch']} {first['loss']:.3f}",
        "contrast_acc": f"contrast accuracy {{:.1%}}, of guessing {1 / max(case.choices, 1):.2%}",
        "before_contrast_acc": "contrast accuracy before FT {:.1%}",
        "positive_mean": "mean positive score {:.3f}",
        "negative_mean": "mean negative score {:.3f}",
        "feature_std": f"feature_std {{:.4f}}, evenly spread {case.even}, collapsed 0",
        "effective_rank": f"effective rank {{:.1f}} of {case.opt.feat_dim}, collapsed 1",
        "backbone_top1": "k-NN on the backbone {:.2f} %",
        "head_top1": "k-NN on the head {:.2f} %",
    }
    newest = {name: value for row in case.rows.values() for name, value in row.items()}
    yield from (text.format(newest[name]) for name, text in shown.items() if name in newest)
    if last["lines"]:
        yield f"waiting for images {last['waited'] / last['lines']:.0%} of the time"


def at_start(case: Case) -> Iterator[Finding]:
    """What options alone tell."""
    opt, usual, epochs = case.opt, case.usual, f"--epochs {case.opt.epochs}"
    if opt.mem == "moco" and 2 * opt.queue_size > case.images:
        evidence = f"--queue_size {opt.queue_size} is more than half of the {case.images} images"
        yield Finding("long queue", evidence, "lower it: it holds too many other views of the query's own image")
    # Goyal et al., 2017: in proportion to the batch; LARS also to its root (Chen et al., 2020, appendix B.1). Rates
    # are searched in steps of 2 or 3: 4 and more is no fine tuning, it is what 4 times the batch asks for.
    ratio = opt.batch_size / usual.batch_size
    rates = [usual.learning_rate * ratio**power for power in ((1, 0.5) if opt.optimizer == "lars" else (1,))]
    if all(abs(math.log(opt.learning_rate / rate)) > math.log(3.99) for rate in rates):
        evidence = f"--learning_rate {opt.learning_rate:g} with --batch_size {opt.batch_size}, where {opt.method} on "
        evidence += f"{opt.dataset} takes {usual.learning_rate:g} with {usual.batch_size}"
        yield Finding("unscaled rate", evidence, f"in proportion to the batch it is {rates[0]:.2g}")
    # Of the longest queue's loss, .2 leaves .56 that cannot be learnt away, and .5, the highest in use, .82.
    if case.ideal is not None and case.ideal > 0.85 * case.chance:
        evidence = f"with --temperature {opt.temperature:g} the loss stays above {case.ideal:.2f}, and guessing gives "
        yield Finding("high temperature", evidence + case.guessing, "lower it: .07 to .2 are common")
    if opt.mem == "moco" and opt.bn_splits * case.processes == 1:
        evidence = "batch norm sees the whole batch, which can give the match away"
        yield Finding("whole batch", evidence, "--bn_splits splits it")
    if opt.method == "SwAV" and opt.queue_size and opt.queue_epoch >= opt.epochs:
        evidence = f"the queue is never filled: --queue_epoch {opt.queue_epoch}, {epochs}"
        yield Finding("idle queue", evidence, "lower --queue_epoch")
    if opt.warmup_epochs >= opt.epochs > 1:
        evidence = f"the full rate is never reached: --warmup_epochs {opt.warmup_epochs}, {epochs}"
        yield Finding("long warm-up", evidence, "lower --warmup_epochs")
    # On ImageNet-100 FT from the start was published as the best; on 2,500 to 5,000 images it led to one point.
    if opt.ft_pos == "extrapolate" and opt.ft_begin_epoch == 0 and case.images < 100_000:
        evidence = f"positives are extrapolated from the start, and {case.images} images take a while to be told apart"
        yield Finding("early FT", evidence, "if nothing is learned, let it begin later, with --ft_begin_epoch 2, say")
    if case.transforms and opt.ft_begin_epoch >= opt.epochs:
        evidence = f"feature transformation never begins: --ft_begin_epoch {opt.ft_begin_epoch}, {epochs}"
        yield Finding("late FT", evidence, "lower --ft_begin_epoch")


def _at_chance(case: Case) -> str:
    """Evidence that the loss stays that of guessing, or "". Just after FT began it may lie above, and fall."""
    losses, chance = [row["loss"] for row in case.settled], case.chance
    if not losses or not case.choices or min(losses) < AT_CHANCE * chance or losses[0] - losses[-1] > FALLS * chance:
        return ""
    since = f"since epoch {case.settled[0]['epoch']} the loss is {min(losses):.2f} to {max(losses):.2f}"
    return f"{since}, and guessing gives {case.guessing}"


def stalled_ft(case: Case) -> Finding | None:
    begin, evidence = case.opt.ft_begin_epoch, _at_chance(case)
    learnt = all(row["loss"] < AT_CHANCE * case.chance for row in case.epochs if row["epoch"] == begin)
    if case.transforms and evidence and case.settled[0]["epoch"] > begin and learnt:
        advice = "let it begin later (--ft_begin_epoch), when the loss has fallen without it, or lower --learning_rate"
        return Finding("FT stalled", f"{evidence}; FT began after epoch {begin}", advice)


def collapse(case: Case) -> Finding | None:
    opt, rows = case.opt, case.settled
    if case.choices and not _at_chance(case):  # negatives drive embeddings apart again: MoCo's were seen to be a point
        return None  # for four epochs, with the loss at .97, and to spread after them
    if rows and opt.head != "linear_wo_norm" and all(_is_a_point(row, opt.feat_dim) for row in rows):
        names = ("feature_std", "effective_rank", "positive_mean", "negative_mean")
        numbers = ", ".join(f"{name} {rows[-1][name]:.3g}" for name in names if name in rows[-1])
        evidence = f"since epoch {rows[0]['epoch']} all images have nearly one embedding: {numbers}"
        cure = "batch norm in the head (--head mlp_bn)" if case.choices else "the method's own --head"
        advice = f"begin anew with a lower --learning_rate, more --warmup_epochs, or {cure}"
        return Finding("collapse", evidence, advice)


def _is_a_point(row: dict[str, float], dim: int) -> bool:
    # A tenth of the even spread is a hundredth of the variance: embeddings have a mean cosine of .99. Rank 2 would be
    # two directions. Scores that all lie within .05 move logits by less than 1, down to the temperature .07.
    means = [row.get(f"before_{name}", row.get(name, 0)) for name in ("positive_mean", "negative_mean")]
    return row.get("feature_std", 1) * dim**0.5 < 0.1 or row.get("effective_rank", dim) < 1.5 or min(means) > 0.95


def stuck(case: Case) -> Finding | None:
    if evidence := _at_chance(case):
        swav = "--epsilon .03, which makes assignments sharper, or longer --freeze_prototypes"
        others = "a third of --learning_rate and three times as much, more --warmup_epochs, or --head mlp_bn"
        return Finding("stuck", evidence, f"try {swav if case.opt.method == 'SwAV' else others}")


def rises_first(case: Case) -> Finding | None:
    begin = case.opt.ft_begin_epoch if case.transforms else 0
    losses = [row["loss"] for row in case.epochs if not begin or row["epoch"] <= begin]
    peak = max(losses[:5], default=math.nan)  # by then any queue has long been filled; 1 % may be noise
    falls = len(losses) <= 5 or losses[-1] < peak
    if case.opt.mem == "moco" and losses and falls and 1.01 * losses[0] < peak < AT_CHANCE * case.chance:
        evidence = f"the loss rose from {losses[0]:.2f} to {peak:.2f}, and guessing gives {case.guessing}"
        advice = "nothing to do: the queue began with random vectors, which are easier negatives than embeddings"
        return Finding("rises first", evidence, advice, well=True)


def jumps_with_ft(case: Case) -> Finding | None:
    begin, losses = case.opt.ft_begin_epoch, {row["epoch"]: row["loss"] for row in case.epochs}
    if case.transforms and losses.get(begin, math.inf) < losses.get(begin + 1, 0):
        evidence = f"the loss rose from {losses[begin]:.2f} to {losses[begin + 1]:.2f} in epoch {begin + 1}"
        return Finding("jumps with FT", evidence, "nothing to do: positives are harder from there on", well=True)


def too_easy(case: Case) -> Finding | None:
    # MoCo v1 was seen at 95 % on ImageNet at epoch 16 and learnt on; at 99 % there is hardly a query left to learn.
    rows, leaks = case.settled, case.opt.mem == "moco" and case.opt.bn_splits * case.processes == 1
    if rows and min(row.get("contrast_acc", 0) for row in rows) > 0.99:
        evidence = f"since epoch {rows[0]['epoch']} the contrast accuracy is above 99 %"
        if leaks:
            advice = "batch norm over the whole batch gives the match away: begin anew with --bn_splits auto"
            return Finding("batch-norm leak", evidence, advice)
        return Finding("too easy", evidence, "harder are more negatives, a lower --crop_min and --ft_pos extrapolate")


def data_bound(case: Case) -> Finding | None:
    row = case.epochs[-1] if case.epochs else {"lines": 0}
    # Without a third of its time a run takes two thirds as long. After ten log lines the workers are well under way.
    if row["lines"] >= 10 and row["waited"] / row["lines"] > 1 / 3:
        evidence = f"{row['waited'] / row['lines']:.0%} of epoch {row['epoch']} went by waiting for images"
        advice = f"raise --num_workers (now {case.opt.num_workers}) or store the images smaller"
        return Finding("data-bound", evidence, advice, timed=True)


# Of a group the first that finds something speaks: the others would say the same, less precisely.
RULES: tuple[tuple[Callable[[Case], Finding | None], ...], ...] = (
    (stalled_ft, collapse, stuck, jumps_with_ft),
    (rises_first,),
    (too_easy,),
    (data_bound,),
)


def from_log(case: Case) -> Iterator[Finding]:
    """What the log tells."""
    for group in RULES:
        yield from [finding for rule in group if (finding := rule(case))][:1]


def news(case: Case, log: Path) -> list[Finding]:
    """What the log tells by now and has not told before."""
    case.read(log)
    new = [finding for finding in from_log(case) if finding.name not in case.told]
    case.told |= {finding.name for finding in new}
    return new
