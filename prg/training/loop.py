"""The training loop: deterministic, resumable step by step, for any loss on batches of images."""

import json
import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prg.checkpoint import (
    Checkpoint,
    CheckpointError,
    differences,
    load_checkpoint,
    load_strictly,
    read_facts,
    save_checkpoint,
)
from prg.recipe import Optimisation, RecipeError, with_defaults
from prg.training import processes
from prg.training.data import Images
from prg.training.lock import Lock
from prg.training.muon import Muon
from prg.training.precision import Precision, choose_precision
from prg.training.processes import Interrupted
from prg.training.progress import track

SAVE_EVERY_S = 120.0
LOG_EVERY_STEPS = 50
MOMENTS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    Muon: ("momentum",),
}
"""What each optimiser remembers of a parameter."""

Batch = tuple[Tensor, ...]
Prepare = Callable[[Tensor, Tensor | None, torch.Generator], Batch]
"""prepare(pixels uint8 [B, 3, S, S], labels int64 [B] or None, generator) -> what the loss needs.

Everything random, and whatever else does not need the model: it runs a step ahead, beside the training.
"""
Loss = Callable[[nn.Module, Batch], Tensor]
"""loss(model, batch) -> scalar."""
Validate = Callable[[nn.Module], dict[str, float]]
"""Figures of the (averaged) model on the validation images."""


@dataclass(frozen=True)
class Job:
    """One training run."""

    kind: str
    """pretrain or finetune: the kind of the checkpoint."""
    model: nn.Module
    prepare: Prepare
    loss: Loss
    validate: Validate
    images: Images
    config: Optimisation
    seed: int
    settings: dict[str, Any]
    """Everything the result depends on, stored in the checkpoint; a resumed run must have the same."""
    folder: Path
    device: torch.device
    begun: Callable[[], None]
    """Called once nothing stands against the run: before its first step, or its next."""
    facts: dict[str, Any]
    """Further facts for the checkpoint, such as the classes or where the weights came from."""

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.images) // self.config.batch)

    @property
    def steps(self) -> int:
        return steps_of(self.config, len(self.images))


def steps_of(config: Optimisation, count: int) -> int:
    """Steps of a training on so many images; an epoch leaves out the rest that makes no whole batch."""
    return max(1, round(config.epochs * max(1, count // config.batch)))


def refuse_other_settings(job: Job, saved: dict[str, Any]) -> None:
    """Raise CheckpointError where the job's checkpoint, of these facts, was begun with other settings or classes."""
    before, now = with_defaults(saved["settings"]), with_defaults(job.settings)
    then, today = before.pop("digests", None), now.pop("digests", None)
    differing = differences(before, now)
    classes = [{k: facts[k] for k in ("classes",) if k in facts} for facts in (saved, job.facts)]
    differing += differences(classes[0], classes[1])
    if then is not None and then != today and before.get("images") == now.get("images"):
        differing.append("the images or their labels are others, though as many")
    if differing:
        raise CheckpointError(
            f"{job.checkpoint}: begun with other settings ({'; '.join(differing)}); "
            "use those, or another folder for a new run"
        )


def is_complete(path: Path) -> bool:
    """Whether there is a checkpoint, and it is that of the training's last step."""
    if not path.exists():
        return False
    facts = read_facts(path)
    return bool(facts["step"] >= facts["steps"])


def learning_rate(config: Optimisation, step: int, steps: int) -> float:
    """Linear warm-up, then constant or half a cosine to lr_min."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - warmup) / max(1, steps - warmup)
    return config.lr_min + (config.lr - config.lr_min) * 0.5 * (1 + math.cos(math.pi * done))


def batch_at(count: int, size: int, seed: int, step: int) -> np.ndarray:
    """Indices of the batch of one step: each epoch is a new order, drawn from the seed alone.

    Nothing random is carried from step to step, so that a resumed run needs no generator's state.
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
    """State of one run: the model, its averaged copy, the optimiser and how many steps are done."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.settings = job.settings
        """Those that the run was begun with."""
        self.model = job.model.to(job.device)
        self.optimisers = optimisers(self.model, job.config)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.step = 0
        self.precision: Precision = "fp32"
        self.seconds = 0.0
        self.stop = threading.Event()
        """Set by a signal to this process."""
        self.stopping = False
        """Whether any process was told to stop; all know it after the same step."""
        self._worker = ThreadPoolExecutor(1, "prepare")
        self._ahead: dict[int, Future[Batch]] = {}

    def close(self) -> None:
        """End the preparing thread."""
        self._worker.shutdown(cancel_futures=True)

    def resume(self) -> bool:
        """Continue from the run's own checkpoint, if there is one; True if there was."""
        path = self.job.checkpoint
        if not path.exists():
            return False
        saved = load_checkpoint(path, self.job.kind, self.job.device)
        refuse_other_settings(self.job, saved.facts)
        self.settings = saved.facts["settings"]
        load_strictly(self.model, saved.part("model"), path)
        self.average = saved.part("average")
        self.step, self.seconds = saved.facts["step"], saved.facts["seconds"]
        self.precision = saved.facts["precision"]
        moments = saved.part("optimiser")
        for optimiser, p, name in self.trained():
            for moment in MOMENTS[type(optimiser)]:
                if f"{moment}.{name}" in moments:
                    optimiser.state[p][moment] = moments[f"{moment}.{name}"]
                    optimiser.state[p]["step"] = torch.tensor(float(self.step))
        return True

    def trained(self) -> Iterator[tuple[torch.optim.Optimizer, nn.Parameter, str]]:
        """(optimiser, parameter, name) of every parameter that is trained."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                yield from ((optimiser, p, names[id(p)]) for p in group["params"])

    def save(self) -> None:
        """Write the checkpoint."""
        if not processes.writes():
            return
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for optimiser, p, name in self.trained():
            for moment in MOMENTS[type(optimiser)]:
                if moment in optimiser.state[p]:
                    tensors[f"optimiser.{moment}.{name}"] = optimiser.state[p][moment]
        facts = {
            "kind": self.job.kind,
            "settings": self.settings,
            "step": self.step,
            "steps": self.job.steps,
            "precision": self.precision,
            "seconds": round(self.seconds, 1),
            "torch": torch.__version__,
            "device": device_name(self.job.device)
            + (f", {n} processes" if (n := processes.count()) > 1 else ""),
            **self.job.facts,
        }
        save_checkpoint(self.job.checkpoint, Checkpoint(tensors, facts))

    def batch(self, step: int) -> Batch:
        """What one step's loss needs."""
        job = self.job
        index = batch_at(len(job.images), job.config.batch, job.seed, step)
        pixels = torch.from_numpy(np.ascontiguousarray(job.images.pixels[index])).to(job.device)
        labels = None
        if job.images.labels is not None:
            labels = torch.from_numpy(job.images.labels[index]).to(job.device)
        return processes.share(job.prepare(pixels, labels, step_generator(job.seed, step, job.device)))

    def loss(self, step: int, precision: Precision) -> Tensor:
        """The loss of one step's batch; the next step's is prepared meanwhile."""
        ready = self._ahead.pop(step, None) or self._worker.submit(self.batch, step)
        if step + 1 < self.job.steps:
            self._ahead = {step + 1: self._worker.submit(self.batch, step + 1)}
        batch = ready.result()
        with torch.autocast(self.job.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return self.job.loss(self.model, batch)

    def advance(self) -> float:
        """One step of optimisation; returns its loss. Raises FloatingPointError if the loss is not finite."""
        config = self.job.config
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(config, self.step, self.job.steps)
        loss = self.loss(self.step, self.precision)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        loss, self.stopping = processes.average(self.model, loss.detach(), self.stop.is_set())
        if config.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step += 1
        decay = min(config.ema, self.step / (self.step + 10)) if config.ema else 0.0
        own = self.model.state_dict()
        torch._foreach_lerp_(list(self.average.values()), [own[k] for k in self.average], 1 - decay)
        value = loss.item()  # last, for it waits: meanwhile the step is already queued on a GPU
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{self.job.kind}: the loss is {value} at step {self.step - 1}; the checkpoint before it is kept. "
                f"Lower {self.job.kind}.lr (now {config.lr}), or set {self.job.kind}.clip"
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
    """Train to the end, from the run's checkpoint where there is one.

    Writes checkpoint.safetensors and metrics.jsonl to the run's folder. Raises Interrupted after SIGINT or
    SIGTERM, FloatingPointError for a loss that is not finite, CheckpointError for a checkpoint of another run,
    ProcessError where another process trains in the same folder.
    """
    lock = Lock(job.folder)
    processes.told(lock.acquire)
    try:
        with closing(Trainer(job)) as trainer:
            _train(job, trainer)
    finally:
        lock.release()
    return trainer


def _train(job: Job, trainer: Trainer) -> None:
    resumed = trainer.resume()
    _check_processes(job, trainer)
    if processes.writes():
        job.begun()
    if job.config.precision != "auto":
        trainer.precision = job.config.precision
    elif trainer.step < job.steps:
        kept = trainer.precision if resumed else None
        trainer.precision = processes.told(
            lambda: choose_precision(lambda p: trainer.loss(trainer.step, p), trainer.model, kept)
        )
    job.folder.mkdir(parents=True, exist_ok=True)
    metrics = Metrics(job.folder / "metrics.jsonl", trainer.step)
    trainer.model.train()
    started = time.monotonic() - trainer.seconds
    saved = time.monotonic()
    running: list[float] = []
    per_epoch = job.steps_per_epoch
    batch = min(job.config.batch, len(job.images))
    title = {"pretrain": "pretraining", "finetune": "fine-tuning"}[job.kind]
    shown = track(title, job.steps * batch, done=trainer.step * batch, shown=processes.writes())
    with stop_signals(trainer.stop), shown as bar:
        while trainer.step < job.steps:
            running.append(trainer.advance())
            trainer.seconds = time.monotonic() - started
            bar.advance(batch, f"loss {np.mean(running[-LOG_EVERY_STEPS:]):.4f}")
            last = trainer.step == job.steps
            if trainer.step % LOG_EVERY_STEPS == 0 or last:
                metrics.write(trainer, loss=float(np.mean(running)))
                running.clear()
            if (trainer.step % per_epoch == 0 or last) and processes.writes():
                with trainer.averaged() as model:
                    metrics.write(trainer, **job.validate(model))
            if last or trainer.stopping or time.monotonic() - saved > SAVE_EVERY_S:
                trainer.save()
                saved = time.monotonic()
            if trainer.stopping and not last:
                raise Interrupted(
                    f"stopped at step {trainer.step} of {job.steps}; the same command continues"
                )
    processes.meet()  # the checkpoint is written


def _check_processes(job: Job, trainer: Trainer) -> None:
    """Raise RecipeError for a batch that can't be shared, CheckpointError where a process sees another run."""
    n, batch = processes.count(), min(job.config.batch, len(job.images))
    if batch % n:
        raise RecipeError(
            f"{job.kind}.batch = {job.config.batch}: {batch} images a step can't be shared equally by {n} processes; "
            f"--set {job.kind}.batch to a multiple of {n}"
        )
    first = processes.told(lambda: trainer.step)
    if first != trainer.step:
        raise CheckpointError(
            f"{job.checkpoint}: at step {trainer.step} here, at {first} for process 0; "
            "all processes must see the same folder"
        )


class Metrics:
    """metrics.jsonl: one JSON object a line; a resumed run drops lines from after its checkpoint."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        if not processes.writes():
            return
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _step(line) <= step]
        path.write_text("".join(line + "\n" for line in kept))

    def write(self, trainer: Trainer, **figures: float) -> None:
        """Append one line."""
        if not processes.writes():
            return
        config = trainer.job.config
        row = {
            "step": trainer.step,
            "epoch": round(trainer.step / trainer.job.steps_per_epoch, 3),
            "seconds": round(trainer.seconds, 1),
            "lr": learning_rate(config, trainer.step - 1, trainer.job.steps),
            **figures,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _step(line: str) -> float:
    """The step of one line; infinite for a line that a kill cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return math.inf


def device_name(device: torch.device) -> str:
    """The processor's or the GPU's name, and how many threads compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    name = facts.get("model name") or platform.processor() or platform.machine()
    extensions = [f for f in ("amx_tile", "avx512f", "avx2") if f in facts.get("flags", "").split()][:1]
    return ", ".join([name, *extensions, f"{torch.get_num_threads()} threads"])


def optimisers(model: nn.Module, config: Optimisation) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the kernels between feature maps and AdamW for the rest.

    Matrices and kernels decay, biases and norms do not.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    kernels = [p for p in params if config.optimiser == "muon" and is_kernel(p)]
    chosen = {id(p) for p in kernels}
    rest = [p for p in params if id(p) not in chosen]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
    )
    return [adamw, Muon(kernels, config.lr, config.weight_decay)] if kernels else [adamw]


def is_kernel(p: nn.Parameter) -> bool:
    """A convolution's kernel, [out, in, ...], from many channels to many; those from and to RGB are not."""
    return p.dim() > 2 and min(p.shape[:2]) >= 16


@contextmanager
def stop_signals(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set the event, so that the loop ends after the step under way; a second one is not held."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: FrameType | None) -> None:
        stop.set()
        signal.signal(number, previous[signal.Signals(number)])

    previous = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
