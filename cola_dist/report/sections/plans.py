"""What plans made with a model achieve, beside the simulator's plans and random actions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from cola_dist import storage
from cola_dist.evaluation.shares import wilson
from cola_dist.report.blocks import Block, Figures, Section, Table, Text
from cola_dist.report.drawing import Key, Panel, Plate, slug
from cola_dist.report.film import Shelf
from cola_dist.report.judged import Judgement
from cola_dist.report.words import listing, number, probability

_KEY = Key("share of episodes", "#0072b2", marker="o")
_REFERENCES = ("simulator", "random")
_READING = (
    "All models plan from the same starts to the same goals. In brackets Wilson's 95 % interval. p: paired over episodes, Holm-corrected over all "
    "pairs. Simulator: plans made with the simulator itself, which no model can do much better than."
)


def plans(judged: Sequence[Judgement], shelf: Shelf) -> Section:
    """Successes, tests, and each model's best and worst episode."""
    blocks: list[Block] = []
    for one in judged:
        request, models = one.found["request"], one.found["models"]
        name = f"{request['domain']}, {request['task']}"
        columns = ["model", "successes", "steps", f"nearest ({one.found['unit']})", "plan steps/s"]
        rows = [_row(model, figures) for model, figures in models.items()]
        setting = f"{request['planner']}, horizon {request['horizon']}, seeds {listing([str(seed) for seed in request['seeds']])}"
        blocks += [Figures(_plate(name, models)), Table(columns, rows, f"{name}: {setting}"), *_pairs(one.found["pairs"])]
        for word in ("best", "worst"):
            films = {
                model: (storage.join(one.uri, figures["videos"][word]), f"{word} episode of {model}; on the right the goal.")
                for model, figures in models.items()
            }
            blocks += shelf.videos(f"{name}: {word} episode, goal on the right", films)
    blocks.append(Text(_READING, small=True))
    return Section("plans", "Plans", " ".join(map(_said, judged)), blocks)


def _row(model: str, figures: Mapping[str, Any]) -> list[str]:
    share = str(wilson(figures["successes"], figures["episodes"]))
    pace = "–" if model == "random" else number(figures["plan_steps_per_s"])
    return [model, share, number(figures["steps"]), number(figures["best_distance"]), pace]


def _pairs(pairs: Sequence[Mapping[str, Any]]) -> list[Block]:
    rows = [
        [f"{pair['a']} – {pair['b']}", number(pair["difference"]), probability(pair["p"]), probability(pair["adjusted_p"]), pair["test"]]
        for pair in pairs
    ]
    return [Table(["pair", "difference of rates", "p", "corrected p", "test"], rows, "Pairs")] if rows else []


def _plate(name: str, models: Mapping[str, Mapping[str, Any]]) -> Plate:
    said = ", ".join(f"{model} {figures['successes']} of {figures['episodes']}" for model, figures in models.items())
    panel = Panel(partial(_draw, models=models), f"Share of episodes that reach the goal in {name}: {said}.")
    return Plate(slug("plans", name), f"{name}: episodes that reach the goal", [panel], [_KEY])


def _draw(axis: Axes, models: Mapping[str, Mapping[str, Any]]) -> None:
    for place, figures in enumerate(models.values()):
        axis.plot([figures["low"], figures["high"]], [place, place], color=_KEY.colour, linewidth=1.2)
        axis.plot([figures["rate"]], [place], color=_KEY.colour, marker=_KEY.marker)
    axis.set(xlim=(0, 1), xlabel="share of episodes", ylim=(len(models) - 0.5, -0.5))
    axis.set_yticks(range(len(models)), [model if len(model) <= 24 else f"{model[:23]}…" for model in models])


def _said(one: Judgement) -> str:
    request, models = one.found["request"], one.found["models"]
    told = [f"{model} {wilson(figures['successes'], figures['episodes'])}" for model, figures in models.items()]
    learned = [model for model in models if model not in _REFERENCES]
    tests = {pair["a"]: pair for pair in one.found["pairs"] if pair["b"] == "random" and pair["a"] in learned}
    better = [model for model, pair in tests.items() if pair["adjusted_p"] < 0.05 and pair["difference"] > 0]
    said = f"In {request['domain']}, {request['task']}, goals are reached by {listing(told)}."
    if not learned:
        return f"{said} No learned model was judged."
    if not better:
        return f"{said} No test puts a learned model's plans before random actions."
    return f"{said} Tests put {listing(better)} before random actions."
