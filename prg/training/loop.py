"""The training loop: deterministic, resumable step by step, for any loss on batches of images."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from prg.checkpoint import (
    Checkpoint,
    Facts,
    Trained,
    differences,
    load_checkpoint,
    load_strictly,
    read_facts,
    save_checkpoint,
)
from prg.console import is_main_process, track
from prg.errors import CheckpointError, Interrupted, RecipeError, TrainingError
from prg.images.sets import Images
from prg.machine import Precision, device_name, training_precision
from prg.recipe import Optimisation
from prg.trained import fitted_tensors
from prg.training import metrics, processes
from prg.training.fitted import Fitted
from prg.training.optimisers import MOMENTS, learning_rate, optimisers

SAVE_EVERY_S = 120.0
LOG_EVERY_STEPS = 50

Batch = tuple[Tensor, ...]
Prepare = Callable[[Tensor, Tensor | None, torch.Generator], Batch]
"""prepare(pixels uint8 [B, 3, S, S], labels int64 [B] or None, generator) -> what the loss needs.

Everything random, and whatever else does not need the model: it runs a step ahead, beside the training.
"""
Loss = Callable[[nn.Module, Batch], Tensor]
"""loss(model, batch) -> scalar."""
Validate = Callable[[nn.Module], dict[str, float]]
"""Figures of the (averaged) model on the images held out."""


@dataclass(frozen=True)
class Job:
    """One training."""

    facts: Facts
    """Of its first checkpoint, at step 0; a resumed training must have the same identity, and keeps its own."""
    model: nn.Module
    prepare: Prepare
    loss: Loss
    validate: Validate
    images: Images
    config: Optimisation
    seed: int
    checkpoint: Path
    device: torch.device
    begun: Callable[[], None]
    """Called once every check has passed: before the first step, or the next."""
    fit: Callable[[nn.Module], Fitted] = lambda model: Fitted()
    """What is fitted to the (averaged) model at the end."""

    @property
    def folder(self) -> Path:
        return self.checkpoint.parent

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.images) // self.config.batch)

    @property
    def steps(self) -> int:
        return steps_of(self.config, len(self.images))


def steps_of(config: Optimisation, count: int) -> int:
    """Steps of a training on so many images; an epoch leaves out the rest that makes no whole batch."""
    return max(1, round(config.epochs * max(1, count // config.batch)))


def not_begun(images: Images, steps: int, precision: Precision, device: torch.device) -> Trained:
    """The facts of a training before its first step."""
    n = processes.count()
    name = device_name(device) + (f", {n} processes" if n > 1 else "")
    return Trained(
        images=len(images),
        digest=images.digest,
        step=0,
        steps=steps,
        seconds=0.0,
        precision=precision,
        device=name,
        torch=torch.__version__,
    )


def check_continues(saved: Facts, now: Facts, path: Path) -> None:
    """Raise CheckpointError where a checkpoint is of another training than the one that would go on from it."""
    if saved.imported is not None:
        raise CheckpointError(
            f"{path}: was imported, so there is no training to continue; fine-tune in a new run: "
            f"prg finetune NEW --recipe … --init {path}"
        )
    before, after = saved.identity(), now.identity()
    if not now.init:  # what was begun from something goes on without it
        del before["init"], after["init"]
    changed = differences(before, after)
    if changed:
        raise CheckpointError(
            f"{path}: begun with other settings or images ({'; '.join(changed)}); "
            "use those, or another folder for a new run"
        )


def is_complete(path: Path) -> bool:
    """Whether there is a checkpoint, and it is that of the training's last step."""
    return path.exists() and read_facts(path).complete


def batch_at(count: int, size: int, seed: int, step: int) -> np.ndarray:
    """Indices of the batch of one step: each epoch is a new order, drawn from the seed alone.

    Nothing random is carried from step to step, so a resumed run is bit for bit the one that was not stopped, and
    no generator's state is saved.
    """
    size = min(size, count)
    epoch, place = divmod(step, max(1, count // size))
    order = np.random.default_rng([seed, 1, epoch]).permutation(count)
    return order[place * size : (place + 1) * size]


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """The generator of everything random in one step."""
    mixed = int(np.random.SeedSequence([seed, 2, step]).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(mixed)


class Trainer:
    """State of one training: the model, its averaged copy, the optimiser and how many steps are done."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.facts = job.facts
        self.model = job.model.to(job.device)
        self.optimisers = optimisers(self.model, job.config)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.step = 0
        self.precision = training_precision(job.config.precision, job.device)
        self.seconds = 0.0
        self.fitted = Fitted()
        self.stop = threading.Event()
        """Set by a signal to this process."""
        self.stopping = False
        """Whether any process got a signal to stop; all know it after the same step."""
        self._worker = ThreadPoolExecutor(1, "prepare")
        self._ahead: dict[int, Future[Batch]] = {}

    def close(self) -> None:
        """End the preparing thread."""
        self._worker.shutdown(cancel_futures=True)

    def resume(self) -> None:
        """Continue from the training's own checkpoint, if there is one."""
        path = self.job.checkpoint
        if not path.exists():
            return
        saved = load_checkpoint(path, self.job.device)
        check_continues(saved.facts, self.job.facts, path)
        assert saved.facts.trained is not None
        self.facts = saved.facts
        load_strictly(self.model, saved.part("model"), path)
        self.average = saved.part("average")
        self.step, self.seconds = saved.facts.trained.step, saved.facts.trained.seconds
        moments = saved.part("optimiser")
        for optimiser, p, name in self.trained():
            for moment in MOMENTS[type(optimiser)]:
                if f"{moment}.{name}" in moments:
                    optimiser.state[p][moment] = moments[f"{moment}.{name}"]
                    optimiser.state[p]["step"] = torch.tensor(float(self.step))

    def trained(self) -> Iterator[tuple[torch.optim.Optimizer, nn.Parameter, str]]:
        """(optimiser, parameter, name) of every parameter that is trained."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                yield from ((optimiser, p, names[id(p)]) for p in group["params"])

    def save(self) -> None:
        """Write the checkpoint."""
        if not is_main_process():
            return
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for optimiser, p, name in self.trained():
            for moment in MOMENTS[type(optimiser)]:
                if moment in optimiser.state[p]:
                    tensors[f"optimiser.{moment}.{name}"] = optimiser.state[p][moment]
        now = {"step": self.step, "seconds": round(self.seconds, 1)}
        assert self.job.facts.trained is not None
        trained = self.job.facts.trained.model_copy(update=now)  # on this machine, whatever it began on
        fitted = self.fitted
        tensors |= fitted_tensors(fitted.projection)
        found = {"fitted_on": fitted.on, "calibration": fitted.calibration}
        facts = self.facts.model_copy(update={"trained": trained, **found})
        save_checkpoint(self.job.checkpoint, Checkpoint(tensors, facts))

    def log(self, **figures: float) -> None:
        """Add figures of this step to metrics.jsonl."""
        if not is_main_process():
            return
        row = {
            "step": self.step,
            "epoch": round(self.step / self.job.steps_per_epoch, 3),
            "seconds": round(self.seconds, 1),
            "lr": learning_rate(self.job.config, self.step - 1, self.job.steps),
        }
        metrics.append(self.job.folder / "metrics.jsonl", row | figures)

    def batch(self, step: int) -> Batch:
        """What one step's loss needs."""
        job = self.job
        index = batch_at(len(job.images), job.config.batch, job.seed, step)
        pixels = torch.from_numpy(np.ascontiguousarray(job.images.pixels[index])).to(job.device)
        labels = None
        if job.images.labels is not None:
            labels = torch.from_numpy(job.images.labels[index]).to(job.device)
        return processes.share(job.prepare(pixels, labels, step_generator(job.seed, step, job.device)))

    def loss(self, step: int) -> Tensor:
        """The loss of one step's batch; the next step's is prepared meanwhile."""
        ready = self._ahead.pop(step, None) or self._worker.submit(self.batch, step)
        if step + 1 < self.job.steps:
            self._ahead = {step + 1: self._worker.submit(self.batch, step + 1)}
        batch = ready.result()
        with torch.autocast(self.job.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.job.loss(self.model, batch)

    def advance(self) -> float:
        """One step of optimisation; returns its loss. Raises TrainingError if the loss is not finite."""
        config = self.job.config
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(config, self.step, self.job.steps)
        loss = self.loss(self.step)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        loss, self.stopping = processes.average_gradients(self.model, loss.detach(), self.stop.is_set())
        if config.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step += 1
        decay = min(config.ema, self.step / (self.step + 10)) if config.ema else 0.0
        own = self.model.state_dict()
        torch._foreach_lerp_(list(self.average.values()), [own[k] for k in self.average], 1 - decay)
        # Last, for it waits: read before, a GPU would wait for the thousand small launches of Muon.
        value = loss.item()
        if not math.isfinite(value):
            stage = self.job.facts.stage
            raise TrainingError(
                f"{stage}: the loss is {value} at step {self.step - 1}; the checkpoint before it is kept. "
                f"Lower {stage}.lr (now {config.lr}), or set {stage}.clip"
            )
        return value

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model in evaluation mode with the averaged weights, for as long as the context lasts.

        Uncompiled: without gradients and by other batches, a compiled network would be compiled anew.
        """
        own = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        self.model.eval()
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                yield self.model
        finally:
            self.model.load_state_dict(own)
            self.model.train()


def train(job: Job) -> Trainer:
    """Train to the end, from the job's checkpoint where there is one.

    Writes checkpoint.safetensors and metrics.jsonl to the job's folder. Raises Interrupted after SIGINT or
    SIGTERM, TrainingError for a loss that is not finite, CheckpointError for a checkpoint of another run,
    ProcessError where another process trains in the same folder.
    """
    with processes.exclusive(job.folder), closing(Trainer(job)) as trainer:
        trainer.resume()
        _check_processes(job, trainer.step)
        if is_main_process():
            job.begun()
        _run(job, trainer)
    return trainer


def _run(job: Job, trainer: Trainer) -> None:
    """The steps that are left."""
    if is_main_process():
        metrics.drop_after(job.folder / "metrics.jsonl", trainer.step)
    trainer.model.train()
    started = time.monotonic() - trainer.seconds
    saved = time.monotonic()
    running: list[float] = []
    batch = min(job.config.batch, len(job.images))
    title = {"pretrain": "pretraining", "finetune": "fine-tuning"}[job.facts.stage]
    title = f"{title} in {trainer.precision}"
    with (
        processes.stop_signals(trainer.stop),
        track(title, job.steps * batch, done=trainer.step * batch) as bar,
    ):
        while trainer.step < job.steps:
            running.append(trainer.advance())
            trainer.seconds = time.monotonic() - started
            bar.advance(batch, f"loss {np.mean(running[-LOG_EVERY_STEPS:]):.4f}")
            last = trainer.step == job.steps
            if trainer.step % LOG_EVERY_STEPS == 0 or last:
                trainer.log(loss=float(np.mean(running)))
                running.clear()
            if (trainer.step % job.steps_per_epoch == 0 or last) and is_main_process():
                with trainer.averaged() as model:
                    trainer.log(**job.validate(model))
            if last and is_main_process():
                with trainer.averaged() as model:
                    trainer.fitted = job.fit(model)
            if last or trainer.stopping or time.monotonic() - saved > SAVE_EVERY_S:
                trainer.save()
                saved = time.monotonic()
            if trainer.stopping and not last:
                raise Interrupted(
                    f"stopped at step {trainer.step} of {job.steps}; the same command continues"
                )
    processes.barrier()  # the checkpoint is written


def _check_processes(job: Job, step: int) -> None:
    """Raise RecipeError for a batch that can't be shared, CheckpointError where a process sees another run."""
    n, batch = processes.count(), min(job.config.batch, len(job.images))
    if batch % n:
        stage = job.facts.stage
        raise RecipeError(
            f"{stage}.batch = {job.config.batch}: {batch} images a step can't be shared equally by {n} processes; "
            f"--set {stage}.batch to a multiple of {n}"
        )
    first = processes.on_main_process(lambda: step)
    if first != step:
        raise CheckpointError(
            f"{job.checkpoint}: at step {step} here, at {first} for process 0; "
            "all processes must see the same folder"
        )
