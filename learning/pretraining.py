"""One pre-training run: its objects, its epochs, its checkpoints."""

import dataclasses
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from datasets.decode import Unreadable
from datasets.sources import Source
from learning import build, checkpoint, doctor, engine, launch, parallel, resume
from learning.bad_images import BadImages
from learning.guard import Guard, NotFinite
from learning.host import keep_freed_memory
from learning.interrupt import Interrupt
from learning.progress import Progress
from learning.run import Run, SilentRun, environment, numerics, open_folder, rehearse_folder
from options import base, contrast
from options.contrast import ContrastOptions


def pretrain(opt: ContrastOptions, *, origins: dict[str, str], notes: list[str]) -> int:
    """The whole of main_contrast.py, on every process: returns its exit status.

    `origins` tells where each option's value came from.
    """
    if opt.keep_memory:
        keep_freed_memory()
    found = parallel.on_main(lambda: resume.find(opt))
    state = checkpoint.load(found.path) if found.path else None
    notes = [*notes, *found.notes]
    if state:
        opt, adopted, changes = resume.adopt(opt, origins, state["options"])
        opt.validate()
        origins, notes = origins | adopted, [*notes, f"going on from {found.path}", *changes]
    data = build.source(opt, "train")
    opt, rules = build.resolve(opt, origins, n_data=len(data), trained_with=state)
    position, opened = state["position"] if state else {}, rehearse_folder if opt.dry_run else open_folder
    if not opt.dry_run and (sentence := _nothing_to_do(opt, position)):
        parallel.on_main(lambda: print(f"{sentence} Everything is in {found.path.parent}."))
        return 0
    open_run = partial(opened, opt, found, position, build.run_name(opt))
    training = Pretraining(opt, data, open_run, state)
    del state  # as large as what it went into, on every process
    if opt.dry_run:
        training.rehearse(notes, origins | rules)
        return 0
    run = training.run
    _introduce(run, base.to_json(opt, origins | rules), training.describe(notes, rules))
    with Interrupt() as interrupt:
        training.train(stop=interrupt)
    run.log(f"{training.ending()}\nEverything of this run is in {run.folder}.")
    return interrupt.status if training.stopped else 0


def _nothing_to_do(opt: ContrastOptions, position: dict[str, Any]) -> str | None:
    """What to say of a checkpoint from which there is nothing to go on with."""
    last = min(opt.stop_epoch or opt.epochs, opt.epochs)
    trained = position["step"] // position["steps_per_epoch"] if position else -1
    if trained < last or position.get("knn_due") and opt.knn_freq:
        return None
    if trained == opt.epochs:
        return f"Already complete: {trained} of {trained} epochs. A larger --epochs trains on."
    flag = "stop_epoch" if last < opt.epochs else "epochs"
    return f"Nothing to do: {trained} epochs are trained, and --{flag} is {last}. A larger one trains on."


def _introduce(run: Run | SilentRun, options: dict[str, Any], lines: Iterator[str]) -> None:
    """What a run folder and its log begin with."""
    run.write_json("options.json", options)
    if not (run.folder / "environment.json").exists():  # a resumed run keeps that of its beginning
        run.write_json("environment.json", environment())
    for line in (*lines, f"run folder {run.folder}"):
        run.log(line)


class Pretraining:
    """`opt` has no automatic value left (`build.resolve`). Weights, order and augmentation follow from `opt.seed`.

    Goes on where `state` (of `save`) was written, if given. `open_run` takes the bytes of a checkpoint; it is
    called once everything else has been made, so that a mistake in the options leaves no folder behind.
    """

    def __init__(
        self,
        opt: ContrastOptions,
        data: Source,
        open_run: Callable[[int], Run | SilentRun],
        state: dict[str, Any] | None = None,
    ):
        self.opt, self.data = opt, data
        self.device = parallel.device(opt.device, opt.gpu)
        self.labelled = build.labelled_sources(opt, data) if opt.knn_freq else None
        self.loader = build.train_loader(opt, data, self.device)
        self.steps_per_epoch = len(self.loader) // opt.accumulate
        self.start = build.starting_trunk(opt) if opt.init and not state else None
        self.method = build.method(opt, self.steps_per_epoch, len(data), self.start).to(self.device)
        self.optimizer = build.optimizer(opt, self.method)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=opt.amp == "fp16")
        warmup = {"warmup_epochs": opt.warmup_epochs, "per": opt.schedule_per}
        self.schedule = build.schedule(opt, self.steps_per_epoch, **warmup)
        self.guard = Guard(self.method, self.optimizer, self.scaler, stop=opt.on_nan == "stop")
        self.progress = Progress(
            epochs=opt.epochs,
            steps_per_epoch=self.steps_per_epoch,
            batch_size=opt.batch_size,
            print_freq=opt.print_freq,
            save_score=opt.save_score,
            grad_norms=opt.grad_norms,
            bad_images=BadImages(self.loader.bad, data.images),
            guard=self.guard,
        )
        self.case = doctor.Case(opt, contrast.usual(opt), len(data), parallel.world_size())
        self.begun = self.step = 0
        self.fingerprint = data.fingerprint()
        self.knn_due, self.changed, self.statistics = False, [], []
        if state:
            self.restore(state)
        self.run = self.progress.run = open_run(self.checkpoint_bytes())

    def checkpoint_bytes(self) -> int:
        """What a checkpoint takes: the method's tensors, and a momentum for every trained weight."""
        trained = (p for p in self.method.parameters() if p.requires_grad)
        return sum(x.nbytes for x in (*self.method.state_dict().values(), *trained))

    @property
    def last_epoch(self) -> int:
        return min(self.opt.stop_epoch or self.opt.epochs, self.opt.epochs)

    @property
    def stopped(self) -> bool:
        """Whether training has not come to where it was to."""
        return self.step < self.last_epoch * self.steps_per_epoch

    def train(self, stop: Callable[[int], bool]) -> None:
        """Train to the end, or until `stop(step)` says so; save after every epoch and where it stops.

        FloatingPointError once no step counts any more, with the moment before that saved.
        """
        try:
            self._train(stop)
        except NotFinite as trouble:
            raise FloatingPointError(f"{trouble}{self._preserve(trouble)}") from None
        except (ChildProcessError, Unreadable):  # from the loader, so between two steps
            if parallel.world_size() == 1:  # others are elsewhere and cannot help to save
                self.save()
            raise
        finally:
            self.progress.bar.close()

    def _train(self, stop: Callable[[int], bool]) -> None:
        model = parallel.wrap(self.method)
        parallel.set_running_statistics(self.method, self.statistics)
        self._evaluate()
        for epoch in range(self.step // self.steps_per_epoch, self.last_epoch):
            self._train_epoch(model, epoch, partial(self._between_steps, stop))
            if self.step < (epoch + 1) * self.steps_per_epoch:
                self.save()
                break
            self._finish_epoch(epoch + 1)

    def _preserve(self, trouble: NotFinite) -> str:
        """Save the last sound moment with what is known of the step after it; says how to go on."""
        self.progress.rewind(trouble.step)
        self.step, name = trouble.step, f"nonfinite_step_{trouble.step}.pth"
        nonfinite = {"values": trouble.values, "index": trouble.index}
        self._write(partial(self.run.save_apart, name), nonfinite=nonfinite)
        parallel.broadcast_object(None)  # a process that ends may take the others with it: not while one is writing
        rare = ", or leave such steps out with --on_nan skip" if self.opt.on_nan == "stop" else ""
        return f"{rare}, and go on from the moment before with --resume {self.run.folder / name}"

    def _between_steps(self, stop: Callable[[int], bool], step: int) -> bool:
        """Save where --save_every_steps says so or too many images are bad, which ends the run; at the end of an epoch
        `train` will. Then what `stop` says.
        """
        self.step, every = step, self.opt.save_every_steps
        bad_images = self.progress.bad_images
        if step % self.steps_per_epoch and (bad_images.too_many or every and step % every == 0):
            self.save()
            bad_images.check(self.run)
        return stop(step)

    def _train_epoch(self, model: torch.nn.Module, epoch: int, stop: Callable[[int], bool]) -> None:
        self.loader.set_epoch(epoch, (self.step - epoch * self.steps_per_epoch) * self.opt.accumulate)
        self.step = engine.train_epoch(
            model,
            self.loader,
            self.optimizer,
            first_step=self.step,
            accumulate=self.opt.accumulate,
            schedule=self.schedule,
            autocast=build.autocast(self.opt.amp, self.device),
            guard=self.guard,
            progress=self.progress,
            stop=stop,
        )

    def _finish_epoch(self, epoch: int) -> None:
        self.progress.finish_epoch(self.step, epoch)
        if self.progress.scores is not None:
            scalars = {"epoch": epoch, "queue_size": self.opt.queue_size, "temperature": self.opt.temperature}
            self.progress.scores.write(self.run.folder / "scores" / f"scores_{epoch:04}.npz", **scalars)
        self._consult(epoch)
        self.knn_due = bool(self.opt.knn_freq) and epoch % self.opt.knn_freq == 0
        self.save()
        self.progress.bad_images.check(self.run)
        self._evaluate()

    def _consult(self, epoch: int) -> None:
        """Tell what the log shows by now, once per run: the process that writes it, which may go on from another's."""
        for finding in doctor.news(self.case, self.run.folder / "log.jsonl") if parallel.is_main() else ():
            self.run.log(f"doctor: {finding}")
            if not finding.timed:  # else the log of a run that paused would differ from that of one that did not
                told = {"name": finding.name, "evidence": finding.evidence, "advice": finding.advice}
                self.run.record("diagnosis", epoch=epoch, step=self.step, **told)

    def save(self) -> None:
        """Write a checkpoint of this moment, within an epoch too. NotFinite if its last steps do not count."""
        self.guard.check()
        epoch, beyond = divmod(self.step, self.steps_per_epoch)
        self._write(partial(self.run.save, epoch=None if beyond else epoch))

    def _write(self, write: Callable[[dict[str, Any]], None], **more: Any) -> None:
        """Let `write` have all there is to go on with; `more` goes into its position."""
        with parallel.averaged_running_statistics(self.method) as statistics:
            position = {
                "epoch": self.step // self.steps_per_epoch,
                "step": self.step,
                "steps_per_epoch": self.steps_per_epoch,
                "images": len(self.data),
                "fingerprint": self.fingerprint,
                "knn_due": self.knn_due,
                **numerics(),
                "statistics": statistics,
                "progress": self.progress.state_dict(),
                **self.run.written(),
                **more,
            }
            state = {
                "method": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "position": position,
                "options": dataclasses.asdict(self.opt) | {"mean": self.data.mean, "std": self.data.std},
            }
            write(state)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` (of `save`) was written."""
        position = state["position"]
        images, steps = position.get("images", len(self.data)), position["steps_per_epoch"]
        if (images, steps) != (len(self.data), self.steps_per_epoch):
            raise ValueError(
                f"The checkpoint is of {images} images in {steps} steps per epoch, this run has {len(self.data)} in "
                f"{self.steps_per_epoch}: resume with the same --batch_size and data."
            )
        if position.get("fingerprint", self.fingerprint) != self.fingerprint:
            raise ValueError(
                f"These are {len(self.data)} images too, but not the checkpoint's: give --data_folder as it was, or "
                "begin a new run on them, with --init to keep the backbone."
            )
        now = numerics()
        self.changed = [f"{name} {x} (before {y})" for name, x in now.items() if (y := position.get(name, x)) != x]
        self.statistics = position.get("statistics", [])
        self.knn_due = position.get("knn_due", False) and bool(self.opt.knn_freq)
        self.method.load_state_dict(state["method"])
        wanted = [_settings(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, wanted):
            group.update(settings)  # old ones came along, but the options may have been changed on purpose
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.progress.load_state_dict(position["progress"], self.device)
        self.begun = self.step = position["step"]

    def _evaluate(self) -> None:
        """If it is due, k-NN accuracy of the encoder as it stands, in the log. A checkpoint without it comes before,
        because it may take long or fail, and one with it after.
        """
        if not self.knn_due:
            return
        epoch = self.step // self.steps_per_epoch
        try:
            with parallel.averaged_running_statistics(self.method):
                results = build.knn_accuracy(self.opt, self.method.encoder, self.labelled, self.device, self.loader.bad)
        except torch.OutOfMemoryError as error:
            if parallel.world_size() > 1:  # where others wait for this process
                raise ValueError(f"No memory for k-NN; go on with --resume {self.run.folder} --knn_freq 0") from error
            self.run.log(f"epoch {epoch}  note: no memory for k-NN, which is left out; --knn_freq 0 leaves out all")
        else:
            values = {f"{part}_{name}": value for part, found in results.items() for name, value in found.items()}
            self.run.record("knn", epoch=epoch, step=self.step, **values)
            backbone, head = values["backbone_top1"], values["head_top1"]
            self.run.log(f"epoch {epoch}  k-NN top-1: backbone {backbone:.2f} %, head output {head:.2f} %")
        self.knn_due = False
        self.save()

    def describe(self, notes: list[str], rules: dict[str, str]) -> Iterator[str]:
        """What will happen where, in a few lines; `rules` names the options that were chosen automatically."""
        opt, weights = self.opt, sum(p.numel() for p in self.method.parameters() if p.requires_grad)
        yield from (f"note: {sentence}" for sentence in (*notes, *self.data.remarks))
        yield f"{opt.method} on {len(self.data)} images of {opt.dataset} at {opt.input_res} px"
        yield f"{opt.arch} with {weights / 1e6:.2f} M trained weights, {parallel.world_size()} x {self.device.type}"
        if self.start:
            yield f"backbone from {opt.init}, {self.start}"
        yield f"{opt.epochs} epochs of {self.steps_per_epoch} steps of {opt.batch_size} images"
        if rules:
            yield f"chosen automatically: {', '.join(f'{name} {getattr(opt, name)}' for name in rules)}"
        yield from (f"note: {sentence}" for sentence in self.warnings())
        if self.step < self.steps_per_epoch:
            yield doctor.expectation(self.case)
        yield from (f"doctor: {finding}" for finding in doctor.at_start(self.case))

    def warnings(self) -> Iterator[str]:
        """What works, but hardly as it was meant."""
        opt = self.opt
        if self.changed:
            yield (
                f"going on with {', '.join(self.changed)}: sums are taken in another order, so that results come close "
                "to those of a run without a pause, but not bit for bit"
            )
        if self.start and self.start.view not in (None, opt.view):
            yield f"the backbone of --init has seen {self.start.view}, this run shows it {opt.view}; see --view"

    def rehearse(self, notes: list[str], origins: dict[str, str], steps: int = 2) -> None:
        """Tell everything about this run, then train for a few steps, at most to the end of the epoch."""
        for line in [*base.table(self.opt, origins), *self.describe(notes, {}), *self.details()]:
            self.run.log(line)
        if not self.stopped:
            self.run.log(self.ending())
            return
        self.progress.print_freq = 1
        self.advance(steps)
        self.progress.bar.close()
        self.progress.bad_images.check(self.run)
        self.run.log("Dry run: everything works so far, and nothing was written. Leave out --dry_run to train.")

    def advance(self, steps: int) -> None:
        """Train for a few steps, at most to the end of the epoch, and save nothing."""
        model, end = parallel.wrap(self.method), self.step + steps
        self._train_epoch(model, self.step // self.steps_per_epoch, stop=lambda step: step == end)

    def details(self) -> Iterator[str]:
        """What a dry run tells beyond `describe`."""
        opt, rate, per_epoch, total = self.opt, self.schedule, self.steps_per_epoch, self.progress.total
        sizes = Counter()
        for name, x in self.method.state_dict().items():
            sizes[".".join(name.split(".")[: 2 if name.startswith("encoder.") else 1])] += x.numel()
        yield f"parts: {', '.join(f'{part} {size / 1e6:.2f} M' for part, size in sizes.items())}"
        classes = f"{len(self.data.classes)} classes" if self.data.labels is not None else "no labels"
        yield f"images: {len(self.data)}, {classes}, mean {self.data.mean}, std {self.data.std}"
        yield f"views: {opt.recipe}, crops of {opt.crop_min:g} to 1 of the picture, {opt.input_res} px"
        warmup = min(opt.warmup_epochs * per_epoch, total)
        yield f"steps: {total} = {opt.epochs} x {per_epoch}, {warmup} of them warm-up"
        peak = max(map(rate, range(0, total, max(total // 1000, 1))))
        yield f"learning rate: {rate(0):.3g} at first, {peak:.3g} at most, {rate(total - 1):.3g} at last"
        if opt.ft_pos != "none" or opt.ft_neg != "none":
            yield f"feature transformation: from step {opt.ft_begin_epoch * per_epoch + 1} on"
        yield f"checkpoint: about {self.checkpoint_bytes() / 1e6:.1f} MB"
        yield f"run folder: {self.run.folder}, TensorBoard below {opt.tb_path}"

    def ending(self) -> str:
        """What to say when `train` has returned."""
        epochs = self.opt.epochs
        if self.step >= epochs * self.steps_per_epoch:
            return "Done." if self.step > self.begun else f"Already complete: {epochs} of {epochs} epochs."
        dropped = {"--resume", "--stop_epoch", "--stop-epoch"}
        again = [part for part, before in zip(sys.argv, ["", *sys.argv]) if not dropped & {part, before}]
        command = shlex.join([*again, "--resume", str(self.run.folder)])
        return f"Stopped after step {self.step}; go on with: {launch.launcher()} {command}"


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """What the options say of a group of parameters. The learning rate is the schedule's, where it is not fixed."""
    names = {"momentum", "weight_decay", "fixed_lr", *["lr"] * group.get("fixed_lr", False)}
    return {name: x for name, x in group.items() if name in names}
