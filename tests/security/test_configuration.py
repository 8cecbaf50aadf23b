"""Configurations and results of others, in YAML and JSON: plain values, of bounded size, or one error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cola_dist.command import run_command
from cola_dist.errors import UserError
from cola_dist.evaluation.exported import read_run_config
from cola_dist.report.judged import read_judgement
from cola_dist.report.study import read_study
from cola_dist.settings import LARGEST_YAML, apply_overrides, base_of, from_yaml, parse_job
from cola_dist.train.sweep.folder import open_sweep
from cola_dist.train.sweep.ledger import read_ledger
from cola_dist.train.sweep.space import load_space
from jobs import cotrain
from tests.security.limits import bounded


def laughs(levels: int = 30) -> str:
    """Each line stands for two of the line before."""
    lines = ["l0: &l0 [lol]"] + [f"l{level}: &l{level} [*l{level - 1}, *l{level - 1}]" for level in range(1, levels)]
    return "\n".join(lines) + f"\noutput: *l{levels - 1}\n"


def merged(levels: int = 30) -> str:
    """The same by merging mappings."""
    lines = ["l0: &l0 {a: 1}"] + [f"l{level}: &l{level} {{<<: [*l{level - 1}, *l{level - 1}]}}" for level in range(1, levels)]
    return "\n".join(lines) + "\n"


def hostile(marker: Path) -> dict[str, tuple[str, str]]:
    """Texts in YAML, and what is said of each."""
    return {
        "apply": (f"output: !!python/object/apply:os.mkdir ['{marker}']\n", "could not determine a constructor"),
        "new": (f"output: !!python/object/new:pathlib.Path ['{marker}']\n", "could not determine a constructor"),
        "name": ("output: !!python/name:os.system\n", "could not determine a constructor"),
        "laughs": (laughs(), "unfolds to more than"),
        "merged": (merged(), "unfolds to more than"),
        "itself": ("output: &a [*a]\n", "unfolds to more than"),
        "twice": ("train:\n  seed: 1\n  workers: 1\n  seed: 2\n", "key 'seed' 2 times in one mapping, which begins at line 2"),
        "twice at the top": ("output: a\ntrain: {seed: 1}\noutput: b\n", "key 'output' 2 times in one mapping, which begins at line 1"),
        "deep": ("output: " + "[" * 2000 + "\n", "nested too deeply"),
        "large": ("#" * (LARGEST_YAML + 1), f"longer than {LARGEST_YAML} bytes"),
        "number": ("train: {seed: " + "1" * 10**5 + "}\n", "integer string conversion"),
    }


@pytest.mark.parametrize("name", hostile(Path("marker")))
def test_yaml_is_plain_values_of_bounded_size(tmp_path: Path, name: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "hostile.yaml"
    text, complaint = hostile(marker)[name]
    path.write_text(text)
    (tmp_path / "lam").mkdir()
    (tmp_path / "lam" / "config.yaml").write_text(text)
    (tmp_path / "space.yaml").write_text(text)
    (tmp_path / "sweep.json").write_text("{}")
    reads: Sequence[Callable[[], object]] = (
        lambda: parse_job(["--config", str(path)], "tiny", "jobs/cotrain.py", "cotrain"),
        lambda: from_yaml(text, str(path)),
        lambda: read_run_config(str(tmp_path)),
        lambda: load_space(str(path)),
        lambda: open_sweep(f"{tmp_path}/", str(tmp_path)),
    )
    for read in reads:
        with bounded(cpu_s=10, memory=2**28), pytest.raises(UserError, match=complaint) as refused:
            read()
        assert len(str(refused.value)) < 1000
    assert not marker.exists()


def test_a_stage_on_the_command_line_is_no_bomb_either(capsys: pytest.CaptureFixture[str]) -> None:
    with bounded(cpu_s=10, memory=2**28):
        assert run_command(cotrain.main, ["--data.stages", laughs().replace("\n", " ")]) == 2
        assert run_command(cotrain.main, ["--data.stages", "{5: {a: 1}, 5: {b: 1}}"]) == 2
    assert "data.stages" in capsys.readouterr().err
    assert apply_overrides(base_of("tiny"), ["--data.stages", "{5: {a: 1}, 6: {a: 2}}"]).data.stages[6] == {"a": 2.0}


def test_anchors_that_stay_small_are_welcome(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  mixture: &both {a: 1.0, b: 2.0}\n  stages: {5: *both}\n")
    config = parse_job(["--config", str(path)], "tiny", "jobs/cotrain.py", "cotrain").config
    assert config.data.stages[5] == config.data.mixture == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize(
    "text", ["[" * 10**6, '{"a":' * 10**6, "1" * 10**5, "\x00", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")]
)
def test_json_of_results_is_data_or_one_error(tmp_path: Path, text: str) -> None:
    for name in ("results.json", "trials.json", "sweep.json"):
        (tmp_path / name).write_text(text)
    reads: Sequence[Callable[[], object]] = (
        lambda: read_judgement(str(tmp_path)),
        lambda: read_ledger(str(tmp_path / "trials.json")),
        lambda: open_sweep(f"{tmp_path}/", str(tmp_path)),
        lambda: read_study([str(tmp_path)]),
    )
    for read in reads:
        with bounded(cpu_s=10, memory=2**28), pytest.raises(UserError, match=r"\.json|sweep"):
            read()
