"""From a space to trials, and from a trial to the configuration of its run. Pure: the same space has the same trials, in the same order."""

from __future__ import annotations

import contextlib
import io
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cola_dist.arms import ARMS
from cola_dist.checks import check
from cola_dist.config import RunConfig
from cola_dist.errors import UserError
from cola_dist.settings import apply_overrides, as_options, base_of, leaves
from cola_dist.train.sweep.space import ADAPTIVE, GRID, LR_RATIO, NOT_SWEPT, OPTUNA, SETS, WARMUP_LENGTH, Range, Scalar, Space

Point = Mapping[str, Scalar]
"""A value for each field of a space."""
STRETCH = 4
"""With a budget the last phase may take so many times its steps, so that the budget ends a run and not its steps."""
_LISTED_PROBLEMS = 20


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    number: int
    """Counts all trials of the sweep in the order in which they start."""
    id: str
    """Name of its folder and of its runs in MLflow and Ray; no other sweep has the same."""
    arm: str
    domain: str
    seed: int
    params: Point


@dataclass(frozen=True)
class Plan:
    """A space, what the command line adds to it, and the sweep that they are for."""

    space: Space
    sweep: str
    """The sweep's id."""
    output: str
    """Folder that the trials' folders go to."""
    tracking_uri: str
    overrides: tuple[str, ...] = ()
    """Options of the command line that go into the base of every trial."""
    budget_seconds: float = 0.0
    """Accelerator-seconds of each trial; 0 = as many as its steps take."""

    def trials(self) -> list[Trial]:
        """All trials of a grid or random search. Arms and domains share points and seeds, so that they can be compared in pairs."""
        points = draw_points(self.space)
        return [self.trial(number, *slot[:3], points[slot[3]]) for number, slot in enumerate(self.slots(len(points)))]

    @property
    def total(self) -> int:
        """How many trials there are."""
        points = len(draw_points(self.space)) if self.space.search != OPTUNA else self.space.samples
        return points * len(self.space.arms) * len(self.space.domains) * len(self.space.seeds)

    def slots(self, points: int) -> Iterator[tuple[str, str, int, int]]:
        """(arm, domain, seed, index of the point) of each trial: every point in every arm and domain with all seeds before the next point."""
        for point, arm, domain, seed in itertools.product(range(points), self.space.arms, self.space.domains, self.space.seeds):
            yield arm, domain, seed, point

    def trial(self, number: int, arm: str, domain: str, seed: int, point: Point) -> Trial:
        """The trial of that number. Its id ends with the sweep's own last part."""
        place = "" if len(self.space.domains) == 1 else f"-{_plain(domain)}"
        return Trial(number, f"{number:03d}-{arm}{place}-s{seed}-{self.sweep.rpartition('-')[2]}", arm, domain, seed, point)

    def base(self, domain: str) -> RunConfig:
        """What all trials of a domain start from. Raises ``UserError``."""
        space = self.space
        options = [*as_options(space.fixed, "fixed"), *self.overrides, *as_options(space.domains[domain], f"domains.{domain}")]
        return _apply(base_of(space.recipe), options, f"fixed and domains.{domain}")

    def config(self, trial: Trial) -> RunConfig:
        """The configuration of a trial's run. Raises ``UserError`` where the arm and the point do not go together.

        The point comes before the arm, so that an arm is what its name says; an arm that sets a field of the point is refused, because
        its trials would not be what their parameters say.
        """
        pointed = _at_point(self.base(trial.domain), trial.params)
        config = ARMS[trial.arm](pointed)
        wanted, found = dict(leaves(pointed)), dict(leaves(config))
        for name in trial.params:
            for one in SETS.get(name, (name,)):
                if wanted[one] != found[one]:
                    raise UserError(f"arm {trial.arm} sets {one} itself: leave {name} out, or the arm")
        config = replace(config, recipe=f"{self.space.recipe}+{trial.arm}", output=self.output)
        config = replace(config, train=replace(config.train, seed=trial.seed), tracking=replace(config.tracking, uri=self.tracking_uri))
        return self._budgeted(config) if self.budget_seconds else config

    def _budgeted(self, config: RunConfig) -> RunConfig:
        if config.optim.decay == "cosine":
            raise UserError("optim.decay cosine needs to know a run's last step, which a budget decides on the way: set it to constant")
        config = replace(config, train=replace(config.train, budget_seconds=self.budget_seconds))
        if config.joint.steps:
            return replace(config, joint=replace(config.joint, steps=STRETCH * config.joint.steps))
        return replace(config, warmup=replace(config.warmup, steps=STRETCH * config.warmup.steps))

    def check(self) -> list[Trial]:
        """All trials, of an Optuna search an example of each arm and domain. Raises one ``UserError`` that lists those that cannot run."""
        self._check_rules()
        self._check_options()
        trials = self.trials() if self.space.search != OPTUNA else self._examples()
        problems: dict[str, None] = {}
        for trial in trials:
            if trial.seed == self.space.seeds[0]:  # other seeds have the same problems
                for problem in _problems(self, trial):
                    problems[f"arm {trial.arm}, domain {trial.domain}, {_words(trial.params)}: {problem}"] = None
        if problems:
            listed = [f"  - {problem}" for problem in itertools.islice(problems, _LISTED_PROBLEMS)]
            more = [f"  and {len(problems) - _LISTED_PROBLEMS} more"] if len(problems) > _LISTED_PROBLEMS else []
            raise UserError(f"{len(problems)} problem(s) in the trials of space {self.space.name}:\n" + "\n".join(listed + more))
        return trials

    def _check_rules(self) -> None:
        for key, rule, seconds in (
            ("asha", self.space.asha, "grace_seconds"),
            ("collapse", self.space.collapse, "from_seconds"),
        ):
            if rule is not None and getattr(rule, seconds) is None and not self.budget_seconds:
                raise UserError(f"space {self.space.name}: {key} needs {seconds}, or a budget to take its share of: give --budget SECONDS")
            if rule is not None and self.budget_seconds and (getattr(rule, seconds) or 0) > self.budget_seconds:
                raise UserError(
                    f"space {self.space.name}: {key}.{seconds} is {getattr(rule, seconds):g}: above the budget of {self.budget_seconds:g} s "
                    "it decides nothing: lower it, or leave it out"
                )

    def _check_options(self) -> None:
        given = [*as_options(self.space.fixed, "fixed"), *self.overrides]
        names = [word[2:].partition("=")[0].replace("-", "_") for word in given if word.startswith("--")]
        for name in ("train.seed", "train.budget_seconds"):
            if name in names:
                raise UserError(f"{name} {NOT_SWEPT[name]}")
        taken = {*self.space.fields, *(SETS[LR_RATIO] if LR_RATIO in self.space.fields else ())}
        for name in names:
            if name in taken:
                raise UserError(f"{name} is what this space tries values of: give it no value of its own")

    def _examples(self) -> list[Trial]:
        middle = {name: v.at(0.5) if isinstance(v, Range) else v[0] for name, v in self.space.fields.items()}
        return [self.trial(number, arm, domain, seed, middle) for number, (arm, domain, seed, _) in enumerate(self.slots(1))]


def draw_points(space: Space) -> list[Point]:
    """The points of a grid, or ``samples`` different ones drawn at random; more samples begin with the same points."""
    if space.search == GRID:
        choices = [values for values in space.fields.values() if not isinstance(values, Range)]
        return [dict(zip(space.fields, values, strict=True)) for values in itertools.product(*choices)]
    generator = random.Random("points of a sweep")
    points: dict[tuple[tuple[str, str], ...], Point] = {}
    while len(points) < space.samples:
        point = {name: _draw(values, generator) for name, values in space.fields.items()}
        points.setdefault(tuple((name, repr(value)) for name, value in point.items()), point)
    return list(points.values())


def _draw(values: tuple[Scalar, ...] | Range, generator: random.Random) -> Scalar:
    share = generator.random()
    return values.at(share) if isinstance(values, Range) else values[int(share * len(values))]


def _at_point(base: RunConfig, point: Point) -> RunConfig:
    own = {name: value for name, value in point.items() if name not in SETS}
    config = _apply(base, [word for name, value in own.items() for word in (f"--{name}", str(value))], "fields")
    if WARMUP_LENGTH in point:
        config = _with_warmup(config, point[WARMUP_LENGTH])
    if LR_RATIO in point:
        ratio = point[LR_RATIO]
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or ratio <= 0:
            raise UserError(f"{LR_RATIO} is {ratio!r}: it must be a positive number")
        config = replace(config, joint=replace(config.joint, lr_world=config.joint.lr_lam / ratio))
    return config


def _with_warmup(config: RunConfig, length: Scalar) -> RunConfig:
    if length == ADAPTIVE:
        return ARMS[ADAPTIVE](config)
    total = config.warmup.steps + config.joint.steps
    if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= total:
        raise UserError(
            f"{WARMUP_LENGTH} is {length!r}: it must be {ADAPTIVE!r}, or steps out of the {total} of warm-up and joint together"
        )
    warmup, joint = replace(config.warmup, steps=length, exit="steps"), replace(config.joint, steps=total - length)
    return replace(config, warmup=warmup, joint=joint)


def _apply(base: RunConfig, options: Sequence[str], where: str) -> RunConfig:
    """As ``apply_overrides``, but what tyro would print and exit with is a ``UserError`` of one line."""
    if not options:
        return base
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return apply_overrides(base, options)
    except SystemExit as error:
        lines = (line.strip("│ ") for line in said.getvalue().splitlines())
        raise UserError(f"{where}: {next((line for line in lines if line.startswith('Error')), 'a value does not fit')}") from error


def _problems(plan: Plan, trial: Trial) -> Iterator[str]:
    try:
        check(plan.config(trial))
    except UserError as error:
        lines = str(error).splitlines()
        yield from (line.removeprefix("  - ") for line in (lines[1:] if len(lines) > 1 else lines))


def _words(point: Point) -> str:
    return ", ".join(f"{name} {value}" for name, value in point.items()) or "no fields"


def _plain(label: str) -> str:
    """A label in the characters that names of folders have."""
    return "".join(letter if letter.isalnum() else "-" for letter in label)
