"""The whole of main_linear.py: one evaluation of one encoder, in a run folder of its own."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets import recipes
from datasets.colours import Colours
from datasets.loader import EvalLoader, TrainLoader
from datasets.sources import Source
from learning import build, checkpoint, parallel, resume, subject
from learning.evaluations import knn
from learning.evaluations.features import Cached, Live, extract
from learning.evaluations.linear import Probe
from learning.host import keep_freed_memory
from learning.run import Run, SilentRun, environment, open_folder
from models.encoder import Encoder
from options import base
from options.linear import LinearOptions

# What a resumed probe must agree on.
IDENTITY = ("use_ema", "eval", "layer", "view", "input_res", "n_class", "cache_features")
LARGE = 4e9  # bytes of features that are worth a word


def evaluate(opt: LinearOptions, *, origins: dict[str, str], notes: list[str]) -> None:
    """On every process. `origins` tells where each option's value came from. Writes results.json."""
    if opt.keep_memory:
        keep_freed_memory()
    if opt.ckpt:
        path, remarks = parallel.on_main(lambda: checkpoint.locate(opt.ckpt))
        opt, notes = dataclasses.replace(opt, ckpt=str(path)), [*notes, *remarks]
    get_encoder, trained, remarks = subject.encoder(opt)
    opt, taken = subject.complete(opt, trained)
    found = parallel.on_main(lambda: resume.find(opt)) if opt.eval == "linear" else resume.Found()
    notes = [*notes, *remarks, *found.notes]
    state = _stored(found.path, opt) if found.path else None
    if state:
        opt, adopted, changes = resume.adopt(opt, origins, state["options"])
        taken, notes = taken | adopted, [*notes, f"going on from {found.path}", *changes]
    opt, rules = build.settle(opt)
    images, network = subject.images(opt, trained), get_encoder(opt.seed)
    origins = origins | taken | rules
    open_run = partial(open_folder, opt, found, state["position"] if state else {}, _run_name(opt, network.layers[-1]))
    evaluation = Evaluation(opt, network, images, build.colours(trained, images[0]), open_run)
    run = evaluation.run
    run.write_json("options.json", base.to_json(opt, origins))
    run.write_json("environment.json", environment())
    for line in evaluation.describe(notes, "{arch}, width {width:g}, {stem} stem".format(**trained)):
        run.log(line)
    results = evaluation.linear(state) if opt.eval == "linear" else evaluation.knn()
    assert subject.fingerprint(evaluation.encoder) == evaluation.fingerprint, "the frozen encoder changed"
    about = {name: getattr(opt, name) for name in ("eval", "layer", "use_ema", "dataset", "input_res", "seed")}
    about |= {name: trained[name] for name in ("arch", "width", "stem", "head")}
    about["colours"] = evaluation.colours.space
    about["ckpt"] = str(Path(opt.ckpt).resolve()) if opt.ckpt else None
    run.write_json("results.json", about | {"encoder_sha256": evaluation.fingerprint} | results)
    run.log(f"Everything of this evaluation is in {run.folder}.")


def _stored(path: Path, opt: LinearOptions) -> dict[str, Any]:
    state = checkpoint.load(path)
    before, now = state["options"], dataclasses.asdict(opt)
    if "eval" not in before:
        raise ValueError(f"{path} is not a checkpoint of main_linear.py; --ckpt names the encoder, --resume the probe.")
    differing = [name for name in IDENTITY if before.get(name, now[name]) != now[name]]
    if differing:
        name = differing[0]
        raise ValueError(
            f"--{name} {now[name]} contradicts {path}, begun with {before[name]}; resume with its options."
        )
    return state


def _run_name(opt: LinearOptions, last: str) -> str:
    kind = opt.eval if opt.layer == last else f"{opt.layer}_{opt.eval}"
    if opt.ckpt is None:
        return f"Scratch_{kind}"
    path = Path(opt.ckpt).resolve()
    ours = path in checkpoint.newest_first(path.parent)
    return f"{path.parent.name if ours else path.name.split('.')[0]}_{kind}"


class Evaluation:
    """`opt` has no automatic value left. `images` are the training and the test images.

    `open_run` takes the bytes of a checkpoint and is called last: a mistake leaves no folder behind.
    """

    def __init__(
        self,
        opt: LinearOptions,
        encoder: Encoder,
        images: tuple[Source, Source],
        colours: Colours,
        open_run: Callable[[int], Run | SilentRun],
    ):
        self.opt, self.colours = opt, colours
        self.train, self.test = images
        self.n_class = subject.n_class(opt, self.train)
        self.device = parallel.device(opt.device, opt.gpu)
        self.autocast = build.autocast(opt.amp, self.device)
        encoder = encoder.eval().requires_grad_(False)
        self.encoder = encoder.to(self.device, memory_format=build.layout(opt))
        self.fingerprint = subject.fingerprint(self.encoder)
        self.train_batches, self.test_batches = map(self._eval_loader, images)
        if opt.eval == "linear":
            crops = self._train_loader()  # made for cached features too: it refuses a batch that does not fit
            self.train_batches = self.train_batches if opt.cache_features else crops
        picture = torch.zeros(1, 3, opt.input_res, opt.input_res, device=self.device)
        self.dim = self._features(picture).shape[1]
        weights_and_momentum = 8 * self.dim * self.n_class
        self.run = open_run(weights_and_momentum)

    def describe(self, notes: list[str], network: str) -> Iterator[str]:
        """What will happen to which `network` and where, in a few lines."""
        opt, encoder = self.opt, "momentum encoder" if self.opt.use_ema else "encoder"
        yield from (f"note: {sentence}" for sentence in dict.fromkeys((*notes, *self.train.remarks)))
        if self.n_class > len(self.train.classes):
            classes = len(self.train.classes)
            yield f"note: --n_class {opt.n_class} is more than the {classes} classes of the images: harmless"
        size = 4 * self.dim * (len(self.train) + len(self.test))
        if (opt.cache_features or opt.eval == "knn") and size > LARGE:
            yield f"note: the features of all images take {size / 1e9:.0f} GB of memory, in every process"
        origin = f"of {opt.ckpt}" if opt.ckpt else "not trained, the baseline of every other"
        yield f"{encoder} {origin}: {network}, {opt.input_res} px {self.colours.space}"
        rate = f", learning rate {opt.learning_rate:g}" if opt.eval == "linear" else ""
        yield f"--eval {opt.eval}: {self.dim} features of layer {opt.layer}{rate}"
        yield f"{len(self.train)} training and {len(self.test)} test images of {opt.dataset}, {self.n_class} classes"
        yield f"{parallel.world_size()} x {self.device.type}, seed {opt.seed}"
        yield f"run folder {self.run.folder}"

    def knn(self) -> dict[str, Any]:
        """Classify the test images by their neighbours."""
        k = min(self.opt.knn_k, len(self.train))
        votes = {"k": k, "temperature": self.opt.knn_t, "n_class": self.n_class, "layer": self.opt.layer}
        results = knn.evaluate(self.encoder, self.train_batches, self.test_batches, **votes, autocast=self.autocast)
        values = {f"{feature}_{top}": value for feature, found in results.items() for top, value in found.items()}
        self.run.record("knn", epoch=0, step=0, **values)
        for feature, found in results.items():
            self.run.log(
                f"k-NN with k = {k} on the {feature}: top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %"
            )
        return {"knn": {"k": k, **results}}

    def linear(self, state: dict[str, Any] | None) -> dict[str, Any]:
        """Train and test a linear classifier; `state` is that of the checkpoint to go on from."""
        train, test = self._batches()
        probe = self._probe(len(train))
        if state:
            self._check_encoder(state)
            probe.load_state_dict(state)
            if len(probe.history) == self.opt.epochs:
                self.run.log(f"Already complete: {self.opt.epochs} of {self.opt.epochs} epochs.")
        for epoch in probe.epochs(train, test, report=self._report, every=self.opt.print_freq):
            self._finish_epoch(epoch, probe, step=epoch * len(train))
        last, best = probe.history[-1], probe.best
        self.run.log(
            f"Linear probe, epoch {last['epoch']}: top-1 {last['test_acc']:.2f} %, top-5 {last['test_acc5']:.2f} % "
            f"(best {best['test_acc']:.2f} % in epoch {best['epoch']}; picked on the test images, so quote the last)"
        )
        guessing = math.log(self.n_class)
        if last["train_loss"] > guessing:
            self.run.log(
                f"Its training loss, {last['train_loss']:.4g}, ended above that of guessing, {guessing:.4g}: "
                f"--learning_rate {self.opt.learning_rate:g} is too large for these features; try a tenth of it."
            )
        note = "best was picked on the test images, which flatters it; last is the result"
        return {"linear": {"last": _headline(last), "best": _headline(best), "note": note}}

    def _finish_epoch(self, epoch: int, probe: Probe, *, step: int) -> None:
        results = probe.history[-1]
        self.run.record("epoch", step=step, **results)
        self.run.log(
            f"epoch {epoch}/{self.opt.epochs}  train top-1 {results['train_acc']:.2f} %  test top-1 "
            f"{results['test_acc']:.2f} %  top-5 {results['test_acc5']:.2f} %  test loss {results['test_loss']:.4f}"
        )
        position = {"epoch": epoch, "step": step, "encoder": self.fingerprint, **self.run.written()}
        state = probe.state_dict() | {"position": position, "options": dataclasses.asdict(self.opt)}
        self.run.save(state, epoch=epoch)

    def _check_encoder(self, state: dict[str, Any]) -> None:
        if state["position"]["encoder"] != self.fingerprint:
            raise ValueError(
                f"{self.opt.ckpt} is not the encoder this probe was begun on; start it anew without --resume."
            )

    def _report(self, epoch: int, step: int, values: dict[str, float]) -> None:
        self.run.record("step", epoch=epoch, step=step, **values)
        self.run.log(
            f"epoch {epoch}/{self.opt.epochs}  step {step}  loss {values['train_loss']:.4f}  "
            f"train top-1 {values['train_acc']:.2f} %  lr {values['learning_rate']:.3g}"
        )

    def _features(self, images: Tensor) -> Tensor:
        with self.autocast():
            return self.encoder.features(images, self.opt.layer)

    def _batches(self) -> tuple[Cached | Live, Iterable]:
        """Training and test features: of new crops in every epoch, or computed once with --cache_features."""
        opt, test = self.opt, Live(self._features, self.test_batches)
        if not opt.cache_features:
            return Live(self._features, self.train_batches), test
        features = extract(self._features, self.train_batches)
        return Cached(*features, batch_size=opt.batch_size, seed=opt.seed, **parallel.share()), list(test)

    def _eval_loader(self, source: Source) -> EvalLoader:
        return build.eval_loader(self.opt, source, self.device, self.colours)

    def _train_loader(self) -> TrainLoader:
        opt, source = self.opt, self.train
        randaugment = opt.aug_linear == "RA"
        view = recipes.probe(opt.input_res, (opt.crop, 1.0), self.colours, randaugment=randaugment)
        options = {"batch_size": opt.batch_size, "seed": opt.seed, "num_workers": build.workers(opt)}
        return TrainLoader(source, build.views(opt, view), **options, device=self.device, **parallel.share())

    def _probe(self, steps_per_epoch: int) -> Probe:
        opt = self.opt
        return Probe(
            self.dim,
            self.n_class,
            schedule=build.schedule(opt, steps_per_epoch),
            momentum=opt.momentum,
            weight_decay=opt.weight_decay,
            seed=opt.seed,
            device=self.device,
        )


def _headline(results: dict[str, float]) -> dict[str, float]:
    return {"epoch": results["epoch"], "top1": results["test_acc"], "top5": results["test_acc5"]}
