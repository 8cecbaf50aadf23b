"""Many episodes of several models on the same starts and goals: what is asked for, checked, and run on Ray, an environment per actor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product

import ray
import torch
from ray.exceptions import RayTaskError
from ray.util import ActorPool

from cola_dist import storage
from cola_dist.errors import UserError
from cola_dist.evaluation.exported import read_run_config
from cola_dist.planning.domains import check_domain, open_domain
from cola_dist.planning.episode import Episode, Planning, run_episode
from cola_dist.planning.models import Imagination, SimulatorModel, open_learned
from cola_dist.planning.objective import SuccessClassifier, train_classifier
from cola_dist.planning.planner import PlannerName, make_planner

RANDOM, SIMULATOR = "random", "simulator"
"""References that every study has: actions without a plan, and plans made with the simulator itself."""
_LABELLED = 600
"""Frames for the success classifier, a fifth of them for its accuracy."""
_FINEST = 64
"""Side in pixels of the frames that the classifier sees, unless a model's are smaller."""


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    domain: str
    task: str
    learned: tuple[str, ...]
    """URIs of adapted models."""
    planner: PlannerName
    episodes: int
    """For each seed."""
    seeds: tuple[int, ...]
    horizon: int
    samples: int
    """Action sequences per plan; 0 = the domain's number."""
    simulator_samples: int
    """The same for plans made with the simulator; 0 = as many."""
    sampler_steps: int
    """Steps of the flow's sampler; 0 = those of each model's configuration."""
    at_once: int
    """Sequences that a learned model imagines together."""


@dataclass(frozen=True)
class Setup:
    """What an environment's actor needs."""

    request: Request
    uris: dict[str, str]
    """Learned models by the name that results have."""
    unit: str = ""
    """Of the domain's distances."""
    classifier: SuccessClassifier | None = field(default=None, repr=False)
    accuracy: float | None = None
    """Of the classifier, on frames that it was not trained on."""

    @property
    def models(self) -> tuple[str, ...]:
        """All that are compared, learned ones first: what is wrong with one of them then shows at once."""
        return (*self.uris, SIMULATOR, RANDOM)


def prepare(request: Request, with_classifier: bool) -> Setup:
    """Check all that can be checked without loading a model, and train the classifier. Raises `UserError`."""
    request = Request(**(vars(request) | {"task": check_domain(request.domain, request.task)}))
    for name in ("episodes", "horizon", "at_once"):
        if vars(request)[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} is {vars(request)[name]}: give at least 1")
    for name in ("samples", "simulator_samples", "sampler_steps"):
        if vars(request)[name] < 0:
            raise UserError(f"--{name.replace('_', '-')} is {vars(request)[name]}: give a positive number, or 0 for the default")
    if not request.seeds or len(set(request.seeds)) < len(request.seeds):
        raise UserError(f"--seeds {' '.join(map(str, request.seeds)) or 'is empty'}: give one or more different numbers")
    sides = [read_run_config(uri).data.resolution for uri in request.learned]
    domain = open_domain(request.domain, request.task)
    try:
        if not with_classifier:
            return Setup(request, names_of(request.learned), domain.unit)
        frames, done = domain.labelled(_LABELLED, seed=0)
        classifier, accuracy = train_classifier(frames, done, min([_FINEST, *sides]), seed=0)
        return Setup(request, names_of(request.learned), domain.unit, classifier, accuracy)
    finally:
        domain.close()


def names_of(uris: Sequence[str]) -> dict[str, str]:
    """A short name of each URI: its last folder, but for ``export``; numbered where several would be alike."""
    shorts = [storage.name(uri.rstrip("/").removesuffix("/export")) for uri in uris]
    seen: Counter[str] = Counter()
    names = {}
    for short, uri in zip(shorts, uris, strict=True):
        seen[short] += 1
        alike = shorts.count(short) > 1 or short in (RANDOM, SIMULATOR)
        names[f"{short}-{seen[short]}" if alike else short] = uri
    return names


class Worker:
    """One environment, and the model that it was asked for last."""

    def __init__(self, setup: Setup, opener: Callable[..., Imagination] = open_learned, threads: int = 0) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._setup, self._opener = setup, opener
        self._device = torch.device("cuda" if ray.is_initialized() and ray.get_gpu_ids() else "cpu")
        self._loaded: tuple[str, Planning | None] | None = None
        self._opened = False

    def run(self, model: str, seed: int, number: int) -> Episode:
        """Raises `UserError` for a model that does not fit."""
        request = self._setup.request
        # Not in the constructor: what a Ray actor raises there does not reach the caller as it is.
        if not self._opened:
            self._domain, self._opened = open_domain(request.domain, request.task), True
        if self._loaded is None or self._loaded[0] != model:
            self._loaded = (model, self._planning(model))
        return run_episode(self._domain, self._loaded[1], model, seed, number, self._device)

    def _planning(self, model: str) -> Planning | None:
        if model == RANDOM:
            return None
        request = self._setup.request
        samples = request.samples or self._domain.samples
        imagination: Imagination
        if model == SIMULATOR:
            samples = request.simulator_samples or samples
            imagination = SimulatorModel(open_domain(request.domain, request.task))
        else:
            uri = self._setup.uris[model]
            imagination = self._opener(uri, request.domain, self._domain.space, self._device, request.sampler_steps, request.at_once)
        classifier = self._setup.classifier
        return Planning(
            make_planner(request.planner, samples), imagination, request.horizon, classifier.to(self._device) if classifier else None
        )


def run_on_ray(setup: Setup, parallel: int, gpus: float, done: Callable[[Episode], None]) -> list[Episode]:
    """All episodes of all models, by model, seed and number. ``parallel`` environments at once, 0 = one per CPU; each has that share of ``gpus``."""
    request = setup.request
    jobs = list(product(setup.models, request.seeds, range(request.episodes)))
    count = min(len(jobs), parallel or int(ray.cluster_resources().get("CPU", 1)))
    actor = ray.remote(Worker).options(num_cpus=1, num_gpus=gpus)
    pool = ActorPool([actor.remote(setup, open_learned, 1) for _ in range(count)])
    found = []
    try:
        for episode in pool.map_unordered(lambda worker, job: worker.run.remote(*job), jobs):
            found.append(episode)
            done(episode)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    return sorted(found, key=lambda episode: (setup.models.index(episode.model), episode.seed, episode.number))
