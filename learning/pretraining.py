"""One pre-training run: its objects, its epochs, its checkpoints."""

import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from datasets.sources import Source
from learning import build, checkpoint, engine, parallel, resume
from learning.host import keep_freed_memory
from learning.interrupt import Interrupt
from learning.progress import Progress
from learning.run import Run, SilentRun, environment, open_folder
from options import base
from options.contrast import ContrastOptions


def pretrain(opt: ContrastOptions, *, origins: dict[str, str], notes: list[str]) -> None:
    """The whole of main_contrast.py, on every process. `origins` tells where each option's value came from."""
    keep_freed_memory()
    found = parallel.on_main(lambda: resume.find(opt))
    state = checkpoint.load(found) if found else None
    if state:
        opt, adopted, changes = resume.adopt(opt, origins, state["options"])
        origins, notes = origins | adopted, [*notes, f"Going on from {found}.", *changes]
    elif opt.resume:
        notes = [*notes, f"No run below {opt.model_path} has these options: starting anew."]
    data = build.source(opt, "train")
    opt, rules = build.resolve(opt, origins, n_data=len(data), trained_with=state)
    training = Pretraining(opt, data, partial(open_folder, opt, found, state, build.run_name(opt)))
    if state:
        training.restore(state)
    run = training.run
    run.write_json("options.json", base.to_json(opt, origins | rules))
    if not (run.folder / "environment.json").exists():  # a resumed run keeps that of its beginning
        run.write_json("environment.json", environment())
    for line in [*notes, *training.describe(origins | rules)]:
        run.log(line)
    with Interrupt(every=opt.print_freq) as interrupt:
        training.train(stop=interrupt)
    run.log(f"{training.ending()}\nEverything of this run is in {run.folder}.")


class Pretraining:
    """`opt` has no automatic value left (`build.resolve`). Weights, order and augmentation follow from `opt.seed`.

    `open_run` is called once everything else has been made, so that a mistake in the options leaves no folder behind.
    """

    def __init__(self, opt: ContrastOptions, data: Source, open_run: Callable[[], Run | SilentRun]):
        self.opt, self.data = opt, data
        self.device = parallel.device(opt.device, opt.gpu)
        self.labelled = build.labelled_sources(opt, data) if opt.knn_freq else None
        self.loader = build.train_loader(opt, data, self.device)
        self.steps_per_epoch = len(self.loader)
        self.method = build.method(opt, self.steps_per_epoch).to(self.device)
        self.optimizer = build.optimizer(opt, self.method)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=opt.amp == "fp16")
        self.run = open_run()
        warmup = {"warmup_epochs": opt.warmup_epochs, "per": opt.schedule_per}
        self.schedule = build.schedule(opt, self.steps_per_epoch, **warmup)
        self.progress = Progress(
            self.run,
            epochs=opt.epochs,
            steps_per_epoch=self.steps_per_epoch,
            batch_size=opt.batch_size,
            print_freq=opt.print_freq,
            save_score=opt.save_score,
        )
        self.step = 0

    @property
    def last_epoch(self) -> int:
        return min(self.opt.stop_epoch or self.opt.epochs, self.opt.epochs)

    def train(self, stop: Callable[[int], bool]) -> None:
        """Train to the end, or until `stop(step)` says so; save after every epoch and where it stops."""
        model = parallel.wrap(self.method)
        for epoch in range(self.step // self.steps_per_epoch, self.last_epoch):
            self._train_epoch(model, epoch, stop)
            if self.step < (epoch + 1) * self.steps_per_epoch:
                self.progress.check_finite(self.step)
                self.save("current.pth")
                break
            self._finish_epoch(epoch + 1)
        self.progress.bar.close()

    def _train_epoch(self, model: torch.nn.Module, epoch: int, stop: Callable[[int], bool]) -> None:
        self.loader.set_epoch(epoch, self.step - epoch * self.steps_per_epoch)
        self.step = engine.train_epoch(
            model,
            self.loader,
            self.optimizer,
            first_step=self.step,
            schedule=self.schedule,
            autocast=build.autocast(self.opt.amp, self.device),
            scaler=self.scaler,
            progress=self.progress,
            stop=stop,
        )

    def _finish_epoch(self, epoch: int) -> None:
        self.progress.finish_epoch(self.step, epoch)
        if self.progress.scores is not None:
            scalars = {"epoch": epoch, "queue_size": self.opt.queue_size, "temperature": self.opt.temperature}
            self.progress.scores.write(self.run.folder / "scores" / f"scores_{epoch:04}.npz", **scalars)
        keep = self.opt.save_freq and epoch % self.opt.save_freq == 0
        self.save("current.pth", *([f"ckpt_epoch_{epoch}.pth"] if keep else []))
        if self.opt.knn_freq and epoch % self.opt.knn_freq == 0:
            self._evaluate(epoch)
            self.save("current.pth")  # again: the checkpoint knows how long the log is

    def save(self, *names: str) -> None:
        """Write a checkpoint of this moment, in the middle of an epoch too, under each of the names."""
        parallel.average_running_statistics(self.method)
        position = {
            "epoch": self.step // self.steps_per_epoch,
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "processes": parallel.world_size(),
            "log_bytes": self.run.log_bytes(),
            "progress": self.progress.state_dict(),
        }
        state = {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "position": position,
            "options": dataclasses.asdict(self.opt) | {"mean": self.data.mean, "std": self.data.std},
        }
        for name in names if parallel.is_main() else ():
            checkpoint.save(self.run.folder / name, state)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` (of `save`) was written."""
        position = state["position"]
        if position["steps_per_epoch"] != self.steps_per_epoch:
            raise ValueError(
                f"The checkpoint has {position['steps_per_epoch']} steps per epoch, this run {self.steps_per_epoch}: "
                "resume with the same --batch_size and data."
            )
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:  # they came along, but the options may have been changed on purpose
            group.update(momentum=self.opt.momentum, weight_decay=self.opt.weight_decay)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.progress.load_state_dict(position["progress"], self.device)
        self.step = position["step"]

    def _evaluate(self, epoch: int) -> None:
        """k-NN accuracy of the encoder as it stands, in the log."""
        results = build.knn_accuracy(self.opt, self.method.encoder, self.labelled, self.device)
        values = {f"{feature}_{name}": value for feature, result in results.items() for name, value in result.items()}
        self.run.record("knn", epoch=epoch, step=self.step, **values)
        backbone, head = values["backbone_top1"], values["head_top1"]
        self.run.log(f"epoch {epoch}  k-NN top-1: backbone {backbone:.2f} %, head output {head:.2f} %")

    def describe(self, origins: dict[str, str]) -> Iterator[str]:
        """What will happen, in a few lines."""
        weights = sum(p.numel() for p in self.method.parameters() if p.requires_grad)
        images = f"{len(self.data)} images of {self.opt.dataset}, {self.steps_per_epoch} steps of {self.opt.batch_size}"
        yield f"Run folder {self.run.folder}"
        processes = f"{parallel.world_size()} process(es) on {self.device.type}"
        yield f"{self.opt.arch} with {weights / 1e6:.2f} M trained weights, {processes}"
        yield f"{images} per epoch, {self.opt.epochs} epochs"
        yield from base.describe(self.opt, origins)

    def ending(self) -> str:
        """What to say when `train` has returned."""
        if self.step == self.opt.epochs * self.steps_per_epoch:
            return "Done."
        again = [part for part, before in zip(sys.argv, ["", *sys.argv]) if "--resume" not in (part, before)]
        command = shlex.join(["python", *again, "--resume", str(self.run.folder)])
        return f"Stopped after step {self.step}; go on with: {command}"
