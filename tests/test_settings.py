"""Settings: one checked configuration from recipe, file and command line, and no option without effect."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_dist.checks import check
from cola_dist.config import BottleneckConfig, RunConfig
from cola_dist.errors import UserError
from cola_dist.recipes import RECIPES, small, tiny, tiny_pretrain, wan
from cola_dist.settings import Job, apply_overrides, differences, from_yaml, parse_job, to_yaml

ROOT = Path(__file__).parents[1]


def parse(*argv: str) -> Job:
    return parse_job(argv, default_recipe="tiny", prog="jobs/cotrain.py", method="cotrain")


def fields(kind: type, prefix: str = "") -> Iterator[tuple[str, type, str]]:
    """(dotted name, class that holds it, own name) of every field that holds a value."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from fields(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", kind, field.name


def changed(config: RunConfig, **sections: Mapping[str, Any] | Any) -> RunConfig:
    """A copy with fields replaced: ``changed(config, data={"frames": 1}, output="x")``."""
    new = {name: replace(getattr(config, name), **value) if isinstance(value, dict) else value for name, value in sections.items()}
    return replace(config, **new)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_sound(name: str) -> None:
    config = RECIPES[name]()
    check(config)
    assert config.recipe == name
    assert from_yaml(to_yaml(config), "config.yaml") == config


def test_help_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert end.value.code == 0
    words = {word.strip("[]") for word in capsys.readouterr().out.split()}
    missing = [name for name, _, _ in fields(RunConfig) if f"--{name.replace('_', '-')}" not in words]
    assert missing == []
    assert {"recipe", "--config", "--resume", "--dry-run", "--debug"} <= words


def test_the_default_is_the_recipe_itself() -> None:
    job = parse()
    assert job == Job(tiny(), (), False, None, False, False)
    assert parse("small").config == small()
    assert parse("small").recipe_given


def test_own_options_and_overrides_may_stand_in_any_order() -> None:
    job = parse("--train.seed", "3", "--resume", "RUN", "--data.mixture", "a", "1", "b", "2", "--dry-run", "small", "--debug")
    assert (job.resume, job.dry_run, job.debug, job.recipe_given) == ("RUN", True, True, True)
    assert job.config == changed(small(), train={"seed": 3}, data={"mixture": {"a": 1.0, "b": 2.0}})
    assert parse("--resume=RUN").resume == "RUN"


@pytest.mark.parametrize(
    ("option", "near"),
    [
        ("--data.frame", "data.frames"),
        ("--train.worker", "train.workers"),
        ("--data.rate-herz", "data.rate_hz"),
        ("--lam.bottleneck.code=4", "lam.bottleneck.codes"),
        ("--lr", None),
        ("--train.no-gpus", "train.gpus"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_name(option: str, near: str | None) -> None:
    with pytest.raises(UserError, match=r"^unknown option") as refusal:
        parse(option, "4")
    assert option in str(refusal.value)
    assert near is None or f"did you mean {near!r}?" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("data: {frame: 4}", r"unknown key 'data.frame' in .*run\.yaml \(did you mean 'data.frames'\?\)"),
        ("trian: {workers: 4}", r"unknown key 'trian' in .*run\.yaml"),
        ("lam: {bottleneck: {codez: 4}}", r"unknown key 'lam.bottleneck.codez' in .*\(did you mean 'lam.bottleneck.codes'\?\)"),
        ("data: {frames: {deep: 4}, rate: 1}", r"unknown key 'data.rate' in .*\(did you mean 'data.rate_hz'\?\)"),
        ("data:", r"section 'data' in .*run\.yaml must be a mapping"),
        ("lam: 4", r"section 'lam' in .*run\.yaml must be a mapping"),
        ("- data", r"must be a mapping of sections to fields"),
        ("data: {frames", r"cannot read configuration .*run\.yaml"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint) as refusal:
        parse("--config", str(path))
    assert "\n" not in str(refusal.value)


def test_a_missing_file_and_an_unknown_recipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read configuration .*gone\.yaml"):
        parse("--config", str(tmp_path / "gone.yaml"))
    with pytest.raises(UserError, match=r"unknown recipe 'smal' \(did you mean 'small'\?\); there are: tiny, small"):
        parse("smal")


@pytest.mark.parametrize("argv", [("tiny-pretrain",), ("--method", "pretrain"), ("--config", "FILE")])
def test_a_job_refuses_the_other_jobs_method(argv: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "pretrain.yaml").write_text(to_yaml(tiny_pretrain()))
    with pytest.raises(UserError, match=r"is for jobs/pretrain\.py, not for jobs/cotrain\.py"):
        parse(*(str(tmp_path / "pretrain.yaml") if word == "FILE" else word for word in argv))


@pytest.mark.parametrize(
    "argv", [("--data.frames", "five"), ("--data.frames",), ("--train.gpus", "maybe"), ("--data.mixture", "a", "1", "b")]
)
def test_a_value_of_the_wrong_type_ends_with_code_2_and_names_the_option(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(*argv)
    assert end.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_later_wins_recipe_then_file_then_command_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {seed: 7, workers: 4, gpus: true}\njoint: {lr_lam: 1e-4}\nworld: {pretrained: null}\noutput: elsewhere\n")
    job = parse("--train.workers", "8", "--config", str(path))
    expected = changed(
        tiny(), train={"seed": 7, "workers": 8, "gpus": True}, joint={"lr_lam": 1e-4}, world={"pretrained": None}, output="elsewhere"
    )
    assert job.config == expected
    assert apply_overrides(tiny(), job.overrides) == expected, "a resumed run applies the same options"
    assert parse("--train.seed", "1", "--train.seed=2").config.train.seed == 2


def test_spelling_with_hyphen_underscore_or_equals_is_one_option() -> None:
    for words in (("--joint.lr-lam", "0.5"), ("--joint.lr_lam", "0.5"), ("--joint.lr-lam=0.5",)):
        assert parse("--joint.lr_lam", "3", *words).config == changed(tiny(), joint={"lr_lam": 0.5})
    for words in (("--tracking.uri=",), ("--tracking.uri", "")):
        assert parse("--tracking.uri", "http://x", *words).config.tracking.uri == ""
    assert parse("--warmup.lr-lam", "-1").config.warmup.lr_lam == -1


def test_a_mixture_replaces_the_whole_default(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {mixture: {s3://bucket/b: 3, /a: 1}}")
    job = parse("--config", str(path))
    assert list(job.config.data.mixture.items()) == [("s3://bucket/b", 3.0), ("/a", 1.0)]
    assert dict(parse("--config", str(path), "--data.mixture", "c", "1").config.data.mixture) == {"c": 1.0}
    assert dict(parse("--data.mixture=c", "1").config.data.mixture) == {"c": 1.0}


PROBLEMS: list[tuple[str, dict[str, Any]]] = [
    ("data.mixture is empty", {"data": {"mixture": {}}}),
    ("data.mixture weight of a is 0", {"data": {"mixture": {"a": 0.0, "b": 1.0}}}),
    ("data.mixture weight of a is nan", {"data": {"mixture": {"a": float("nan")}}}),
    ("data.mixture weight of a is inf", {"data": {"mixture": {"a": float("inf")}}}),
    ("data.stages[0] must begin after step 0", {"data": {"stages": {0: {"a": 1.0}}}}),
    ("data.stages[-3] must begin after step 0", {"data": {"stages": {-3: {"a": 1.0}}}}),
    ("data.stages[1100] must begin after step 0 and before the run's last step 1100", {"data": {"stages": {1100: {"a": 1.0}}}}),
    ("data.stages[9] is empty", {"data": {"stages": {5: {"a": 1.0}, 9: {}}}}),
    ("data.stages[5] weight of a is 0", {"data": {"stages": {5: {"a": 0.0, "b": 1.0}}}}),
    ("data.temperature is -1", {"data": {"temperature": -1.0}}),
    ("data.temperature is 0.01", {"data": {"temperature": 0.01}}),
    ("data.temperature is inf", {"data": {"temperature": float("inf")}}),
    ("data.temperature is nan", {"data": {"temperature": float("nan")}}),
    ("data.frames is 1", {"data": {"frames": 1}}),
    ("data.rate_hz is 0", {"data": {"rate_hz": 0.0}}),
    ("data.reader_cpus is 0", {"data": {"reader_cpus": 0.0}}),
    ("data.resolution is 0", {"data": {"resolution": 0}}),
    ("data.mixture_block is 0", {"data": {"mixture_block": 0}}),
    ("data.steps_per_read is 0", {"data": {"steps_per_read": 0}}),
    ("data.prefetch_reads is 0", {"data": {"prefetch_reads": 0}}),
    ("data.decoded_cache_bytes is -1", {"data": {"decoded_cache_bytes": -1}}),
    ("data.crop_scale is 0", {"data": {"crop_scale": 0.0}}),
    ("data.crop_scale is 1.5", {"data": {"crop_scale": 1.5}}),
    ("data.max_bad_share is 2", {"data": {"max_bad_share": 2.0}}),
    ("lam.width 64 is not divisible by lam.heads 3", {"lam": {"heads": 3}}),
    ("conditioning.width 64 is not divisible by conditioning.heads 5", {"conditioning": {"heads": 5}}),
    ("world.width 64 is not divisible by world.heads 7", {"world": {"heads": 7}}),
    ("world.null_prompt is p.safetensors: only kind wan with world.text_width above 0", {"world": {"null_prompt": "p.safetensors"}}),
    ("autoencoder.tile is 64: kind pixels has no tiles, set it to 0", {"autoencoder": {"tile": 64}}),
    ("train.checkpointing_keeps is products: nothing is checkpointed without", {"train": {"checkpointing_keeps": "products"}}),
    ("world: width, heads and depth must be at least 1", {"world": {"heads": 0}}),
    ("data.resolution 32 is not divisible by lam.patch 5", {"lam": {"patch": 5}}),
    ("data.resolution 32 is not divisible by world.patch 0 x 1 pixels a place", {"world": {"patch": 0}}),
    ("lam: needs at least 1 token", {"lam": {"tokens": 0}}),
    ("lam: needs at least 1 token, 2 codes", {"lam": {"bottleneck": replace(tiny().lam.bottleneck, codes=1)}}),
    ("lam.bottleneck: codebook_weight", {"lam": {"bottleneck": replace(tiny().lam.bottleneck, commitment_weight=-1.0)}}),
    ("entropy_weight, reset_every and beta not negative", {"lam": {"bottleneck": BottleneckConfig(entropy_weight=-0.1)}}),
    ("entropy_weight, reset_every and beta not negative", {"lam": {"bottleneck": BottleneckConfig(kind="continuous", beta=-1.0)}}),
    ("beta is 1.0: kind vq does not use it, set it to 0.0002", {"lam": {"bottleneck": BottleneckConfig(beta=1.0)}}),
    ("beta is 1.0: kind cosine does not", {"lam": {"bottleneck": BottleneckConfig(kind="cosine", beta=1.0)}}),
    ("beta is 1.0: kind rotation does not", {"lam": {"bottleneck": BottleneckConfig(kind="rotation", beta=1.0)}}),
    ("reset_every is 5: kind simvq does not use it, set it to 0", {"lam": {"bottleneck": BottleneckConfig(kind="simvq", reset_every=5)}}),
    ("init is data: kind simvq does not use it, set it to uniform", {"lam": {"bottleneck": BottleneckConfig(kind="simvq", init="data")}}),
    ("reset_every is 5: kind fsq does not", {"lam": {"bottleneck": BottleneckConfig(kind="fsq", reset_every=5)}}),
    ("init is normal: kind fsq does not", {"lam": {"bottleneck": BottleneckConfig(kind="fsq", init="normal")}}),
    ("codebook_weight is 2.0: kind fsq does not", {"lam": {"bottleneck": BottleneckConfig(kind="fsq", codebook_weight=2.0)}}),
    ("commitment_weight is 2.0: kind fsq does not", {"lam": {"bottleneck": BottleneckConfig(kind="fsq", commitment_weight=2.0)}}),
    ("entropy_weight is 0.1: kind fsq does not", {"lam": {"bottleneck": BottleneckConfig(kind="fsq", entropy_weight=0.1)}}),
    ("codes is 22: for kind fsq it must be a product of levels", {"lam": {"bottleneck": BottleneckConfig(kind="fsq", codes=22)}}),
    ("entropy_weight is 0.1: kind continuous does", {"lam": {"bottleneck": BottleneckConfig(kind="continuous", entropy_weight=0.1)}}),
    ("codes is 8: kind continuous does not use it", {"lam": {"bottleneck": BottleneckConfig(kind="continuous", codes=8)}}),
    ("conditioning.dropout is 1", {"conditioning": {"dropout": 1.0}}),
    ("flow.tau_min 1.0", {"flow": {"tau_min": 1.0}}),
    ("flow.tau_shift 0.0", {"flow": {"tau_shift": 0.0}}),
    ("flow.context_max is 5", {"flow": {"context_max": 5}}),
    ("flow: sampler_steps", {"flow": {"sampler_steps": 0}}),
    ("at least one phase must have steps", {"warmup": {"steps": 0}, "joint": {"steps": 0}}),
    ("none may be negative", {"warmup": {"steps": -1}}),
    ("warmup.lr_world is 0.1: the generator is frozen", {"warmup": {"lr_world": 0.1}}),
    ("warmup.lr_lam and warmup.lr_conditioning must be positive", {"warmup": {"lr_lam": 0.0}}),
    ("joint.lr_world and joint.lr_conditioning must be positive", {"joint": {"lr_world": 0.0}}),
    ("adapt.steps is 5: method cotrain has no such phase", {"adapt": {"steps": 5}}),
    ("train.workers is 0", {"train": {"workers": 0}}),
    ("optim.global_batch 32 is not divisible by train.workers 3", {"train": {"workers": 3}}),
    ("optim.global_batch 0", {"optim": {"global_batch": 0}}),
    ("optim.micro_batch 5 does not divide a worker's share of 16", {"optim": {"micro_batch": 5}}),
    ("optim.micro_batch -1", {"optim": {"micro_batch": -1}}),
    ("optim: beta1, beta2 and ema_decay", {"optim": {"ema_decay": 1.0}}),
    ("optim: weight_decay", {"optim": {"clip_norm": 0.0}}),
    ("train: cpus_per_worker", {"train": {"max_restarts": -1}}),
    ("train: cpus_per_worker", {"train": {"collective_timeout_s": 0.0}}),
    ("train.checkpoint_every must be at least 1", {"train": {"checkpoint_every": 0}}),
    ("train.keep_checkpoints must be at least 1", {"train": {"keep_checkpoints": 0}}),
    ("train.max_nonfinite must be at least 1", {"train": {"max_nonfinite": 0}}),
    ("diagnostics.every, diagnostics.video_every and tracking.log_every", {"tracking": {"log_every": 0}}),
    ("diagnostics.clips 100 must be a multiple of diagnostics.batch 32", {"diagnostics": {"clips": 100}}),
    ("diagnostics.clips 128 must be a multiple of diagnostics.batch 1", {"diagnostics": {"batch": 1, "video_clips": 0}}),
    ("diagnostics.video_clips is 33", {"diagnostics": {"video_clips": 33}}),
    ("diagnostics.video_clips is 1", {"diagnostics": {"video_clips": 1}}),
    ("diagnostics.probe_clips is -1", {"diagnostics": {"probe_clips": -1}}),
    ("diagnostics.grace_steps is -1", {"diagnostics": {"grace_steps": -1}}),
    ("diagnostics: min_perplexity_share", {"diagnostics": {"max_usage": 1.5}}),
    ("tracking.uri is empty but output s3://bucket/runs", {"output": "s3://bucket/runs"}),
]


@pytest.mark.parametrize(("complaint", "sections"), PROBLEMS, ids=[complaint for complaint, _ in PROBLEMS])
def test_each_problem_is_found_alone(complaint: str, sections: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^1 problem") as refusal:
        check(changed(tiny(), **sections))
    head, line = str(refusal.value).split("\n")
    assert head == "1 problem(s) in the configuration:"
    assert line.startswith("  - ")
    assert complaint in line


@pytest.mark.parametrize("sections", [{"warmup": {"steps": 5}}, {"joint": {"lr_world": 0.0}}])
def test_pretraining_is_one_phase_on_the_generator(sections: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="pretraining has one phase on the generator"):
        check(changed(tiny_pretrain(), **sections))


@pytest.mark.parametrize(("tile", "nearest"), [(-1, 32), (40, 32), (250, 256)])
def test_tiles_are_whole_latents_and_overlap_in_whole_latents(tile: int, nearest: int) -> None:
    config = wan()
    config = replace(config, data=replace(config.data, mixture={"a": 1.0}), autoencoder=replace(config.autoencoder, tile=tile))
    with pytest.raises(UserError, match=f"autoencoder.tile is {tile}: it must be 0 or a multiple of 32: nearest is {nearest}"):
        check(config)
    check(replace(config, autoencoder=replace(config.autoencoder, tile=nearest)))


def test_problems_are_reported_together() -> None:
    broken = changed(tiny(), data={"frames": 1}, lam={"heads": 3}, train={"workers": 5}, diagnostics={"probe_clips": -1})
    with pytest.raises(UserError) as refusal:
        check(broken)
    lines = str(refusal.value).split("\n")
    assert lines[0] == "4 problem(s) in the configuration:"
    for place, name in enumerate(("data.frames", "lam.width", "optim.global_batch", "diagnostics.probe_clips"), start=1):
        assert lines[place].startswith(f"  - {name}")
    assert len(lines) == 5


@pytest.mark.parametrize(
    "sections",
    [
        {"output": "s3://bucket/runs", "tracking": {"uri": "http://host:5000"}},
        {"output": "file:///runs"},
        {"joint": {"steps": 0, "lr_world": 0.0}},
        {"warmup": {"steps": 0}},
        {"flow": {"context_max": 4}},
        {"optim": {"micro_batch": 4}},
        {"diagnostics": {"video_clips": 0}},
        {"data": {"decoded_cache_bytes": 0, "crop_scale": 1.0, "max_bad_share": 0.0}},
        {"data": {"stages": {1: {"a": 0.5}, 1099: {"b": 2.0, "a": 1.0}}, "temperature": 0.1}},
        {"lam": {"bottleneck": replace(tiny().lam.bottleneck, kind="cosine", entropy_weight=0.1)}},
        {"lam": {"bottleneck": replace(tiny().lam.bottleneck, kind="rotation", codes=22)}},
        {"lam": {"bottleneck": BottleneckConfig(kind="simvq", entropy_weight=0.1)}},
        {"lam": {"bottleneck": BottleneckConfig(kind="fsq", codes=1000, commitment_weight=0.0)}},
        {"lam": {"bottleneck": BottleneckConfig(kind="continuous", beta=1e-6)}},
    ],
)
def test_what_is_allowed_passes(sections: dict[str, Any]) -> None:
    check(changed(tiny(), **sections))


names = st.text("abcdefghijklmnopqrstuvwxyz0123456789:/._ ä-", min_size=1, max_size=20).filter(lambda word: not word.startswith("-"))


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(sorted(RECIPES)),
    st.dictionaries(names, st.floats(1e-9, 1e9), min_size=1, max_size=4),
    st.dictionaries(st.integers(1, 10**12), st.dictionaries(names, st.floats(1e-9, 1e9), min_size=1, max_size=4), max_size=3),
    names,
    st.one_of(st.none(), names.filter(lambda word: word != "None")),
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(0, 2**63),
    st.booleans(),
)
def test_a_saved_configuration_comes_back(
    recipe: str,
    mixture: dict[str, float],
    stages: dict[int, dict[str, float]],
    output: str,
    pretrained: str | None,
    number: float,
    seed: int,
    flag: bool,
) -> None:
    config = changed(
        RECIPES[recipe](),
        data={"mixture": mixture, "stages": stages, "rate_hz": number, "random_crop": flag},
        output=output,
        world={"pretrained": pretrained},
        train={"seed": seed, "gpus": not flag},
        tracking={"uri": ""},
    )
    back = from_yaml(to_yaml(config), "config.yaml")
    assert back == config
    assert list(back.data.mixture) == list(mixture)
    assert [list(stage) for stage in back.data.stages.values()] == [list(stage) for stage in stages.values()]
    assert differences(config, back, step=100) == []


@pytest.mark.parametrize("text", ["", "[]", "recipe: gone", "data: {}"])
def test_a_configuration_of_another_version_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"runs/x/config\.yaml is not the configuration of a run of this version"):
        from_yaml(text, "runs/x/config.yaml")


def test_a_saved_configuration_with_a_field_of_another_version_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown key 'data.gone' in runs/x/config\.yaml"):
        from_yaml(to_yaml(tiny()).replace("  frames:", "  gone:"), "runs/x/config.yaml")


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("data.mixture", {"data": {"mixture": {"embedded:hand": 0.5, "embedded:robot": 0.5}}}),
        ("data.mixture", {"data": {"mixture": {"embedded:robot": 0.5, "embedded:hand": 0.6}}}),
        ("data.temperature", {"data": {"temperature": 1.0}}),
        ("data.frames", {"data": {"frames": 6}}),
        ("lam.bottleneck.codes", {"lam": {"bottleneck": replace(tiny().lam.bottleneck, codes=64)}}),
        ("conditioning.dropout", {"conditioning": {"dropout": 0.5}}),
        ("world.pretrained", {"world": {"pretrained": None}}),
        ("flow.tau_shift", {"flow": {"tau_shift": 1.0}}),
        ("warmup.steps", {"warmup": {"steps": 10}}),
        ("joint.lr_world", {"joint": {"lr_world": 1.0}}),
        ("optim.global_batch", {"optim": {"global_batch": 64}}),
        ("train.seed", {"train": {"seed": 1}}),
    ],
)
def test_what_makes_another_run_may_not_change_on_resume(name: str, sections: dict[str, Any]) -> None:
    (line,) = differences(tiny(), changed(tiny(), **sections), step=100)
    assert line.startswith(f"{name}: ")
    assert "in the run" in line
    assert "asked for" in line


def test_what_does_not_make_another_run_may_change_on_resume() -> None:
    free = changed(
        tiny(),
        output="elsewhere",
        data={"steps_per_read": 2, "prefetch_reads": 5, "max_bad_share": 0.5, "reader_cpus": 2.0, "decoded_cache_bytes": 0},
        optim={"micro_batch": 4},
        joint={"steps": 1000},
        train={"workers": 4, "zero_stage": 3, "max_restarts": 0, "checkpoint_every": 7},
        diagnostics={"every": 10, "clips": 64},
        tracking={"uri": "http://host:5000"},
    )
    assert differences(tiny(), free, step=100) == []


def test_the_end_of_a_cosine_may_not_move() -> None:
    saved = tiny_pretrain()
    assert saved.optim.decay == "cosine"
    (line,) = differences(saved, changed(saved, joint={"steps": saved.joint.steps + 1}), step=100)
    assert line.startswith("joint.steps: ")


def attributes_read(root: Path) -> set[str]:
    """Names of all attributes that the package reads, outside the files that define and fill the configuration."""
    found: set[str] = set()
    for path in (root / "cola_dist").rglob("*.py"):
        if path.parent.name != "config" and path.name not in ("recipes.py", "settings.py"):
            tree = ast.parse(path.read_text())
            found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    return found


# Read by ``settings`` to find the recipe that a saved configuration was copied from, and to tell a wrong job or resumed run.
READ_BY_SETTINGS = {"recipe"}


def test_no_option_is_without_effect() -> None:
    read = attributes_read(ROOT)
    assert [name for name, _, own in fields(RunConfig) if own not in read | READ_BY_SETTINGS] == []


def test_an_option_without_effect_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "cola_dist" / "config").mkdir(parents=True)
    (tmp_path / "cola_dist" / "config" / "run.py").write_text("class A:\n    used: int\n    dead: int\n\nA().dead")
    (tmp_path / "cola_dist" / "loop.py").write_text("print(config.used)\nconfig.dead = 1\ndead = 2\n")
    assert attributes_read(tmp_path) == {"used"}
