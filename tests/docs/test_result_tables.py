"""Generated tables: pages agree with docs/results, and tables with the small runs in results/."""

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SMALL = Path(__file__).parent / "results"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The functions, reading the results in SMALL."""
    module: Any = importlib.import_module("result_tables")
    monkeypatch.setattr(module, "RESULTS", SMALL)
    return module


def cells(table: str) -> list[list[str]]:
    """The cells of all tables in a text, without their rulers."""
    lines = re.findall(r"^\| ?(.*) \|$", table, re.MULTILINE)
    return [line.split(" | ") for line in lines]


def test_pages_agree_with_the_files(
    monkeypatch: pytest.MonkeyPatch, start_script: Callable[..., Any]
) -> None:
    pytest.importorskip("cogapp")
    monkeypatch.chdir(ROOT)
    # In a process of its own, since other tests register SAMs and datasets.
    done = start_script("cogapp", "--check", "--diff", "@docs/_site/cog.txt").finish(120)
    assert done.returncode == 0, f"cog -r @docs/_site/cog.txt\n{done.stdout}{done.stderr}"


def test_every_file_is_on_the_page_and_names_no_folder_of_a_machine(tables: Any) -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    blocks = "".join(re.findall(r"\[\[\[cog (.*) \]\]\]", page))
    files = list((ROOT / "docs" / "results").iterdir())
    assert files and {path.suffix for path in files} == {".json"}
    for path in [*files, *SMALL.iterdir()]:
        assert path.parent == SMALL or f'"{path.stem}"' in blocks, path
        assert not tables._MACHINE_PATH.findall(path.read_text()), path


def test_seeds_of_train_ppo(tables: Any) -> None:
    head, first, _, mean = cells(tables.training_runs("ppo-1", "ppo-2"))
    assert head[:3] == ["seed", "agent", "agent without search"] and head[-1] == "gap closed"
    assert first[:3] == ["1", "0.887 ± 0.043", "0.841 ± 0.063"] and first[-1] == "0.963"
    # Student's t for one degree of freedom: 12.706 * |0.9628 - 0.97| / 2.
    assert mean[0] == "mean" and mean[-1] == "0.966 ± 0.046"
    assert "over 16 episodes" in tables.training_runs("ppo-1", "ppo-2")
    assert len(cells(tables.training_runs("ppo-2"))) == 2
    with pytest.raises(ValueError, match=r"their seeds are \[1, 1\]"):
        tables.training_runs("ppo-1", "ppo-1")


def test_time_of_training(tables: Any) -> None:
    text = tables.training_time("training", "stage", "phase", "this, s", "other, s")
    rows, results = cells(text), json.loads((SMALL / "training.json").read_text())
    commit = results["sides"]["this"]["commit"]
    assert commit.endswith("-dirty") and rows[1][:2] == ["this", f"{commit[:7]}-dirty"]
    assert rows[2][0] == "other" and rows[3] == ["stage", "phase", "this, s", "other, s"]
    assert rows[4][:2] == ["training", "encode"] and rows[-1][0] == "all"
    # The parts add up to the whole; shares below 0.05% have no row.
    parts = sum(float(row[2]) for row in rows[4:-1])
    assert parts == pytest.approx(results["sides"]["this"]["total"], abs=0.5)
    assert f"Time, this / other: **{results['ratio']:.2f}x**. From `training.json`, " in text


def test_throughput(tables: Any) -> None:
    only = tables.throughput("throughput", "envs", "images", "vs reference")
    assert cells(only) == [
        ["envs", "images", "vs reference"],
        ["4", "cached", "3.89x"],
        ["4", "fresh", "1.67x"],
    ]
    assert len(cells(tables.throughput("throughput"))[0]) == 8
    assert only.endswith("From `throughput.json`, cpu (x86_64), 1 thread, torch 2.14.1+cu130.")
    against = tables.throughput_against("throughput")
    assert cells(against)[1][:5] == ["4", "cached", "32", "34", "0.95x"]
    assert "this: commit df30d68-dirty, `micro-v0`; other: commit 84a4160, `micro`. From" in against


def test_speed_of_tracking(tables: Any) -> None:
    table = cells(tables.video_speed("video-speed", "videos", "objects of each", "ratio"))
    assert table[1:] == [["1", "1", "1.03x"], ["1", "8", "1.44x"]]


def test_interactive_segmentation(tables: Any) -> None:
    head, micro, grabcut = cells(tables.interactive("interactive"))
    assert head[3:6] == ["mIoU@1", "mIoU@3", "mIoU@5"]
    assert micro == "`scenes` test|5|`micro-v0`|0.864|0.920|0.918|1.40|2.20|1|0.857".split("|")
    assert grabcut[2:5] == ["`cv2.grabCut`", "0.478", "0.479"]


def test_semantic_segmentation_over_seeds(tables: Any) -> None:
    table = {row[0].strip(): row[1:] for row in cells(tables.semantic("semantic-0", "semantic-1"))}
    assert table[""] == ["`micro-v0`, zero-shot", "`micro-v0`, head `seed`"]
    runs = [json.loads((SMALL / f"semantic-{k}.json").read_text()) for k in (0, 1)]
    first, second = (run["heads"]["seed"]["mean_iou"] for run in runs)
    # Student's t for one degree of freedom.
    half = 12.706 * abs(first - second) / 2
    assert table["mean IoU"][1] == f"{(first + second) / 2:.3f} ± {half:.3f}"
    assert table["IoU of a point"][1].strip() == "" and table["Road"][1] == "0.445 ± 0.060"
    one = {row[0]: row[1:] for row in cells(tables.semantic("semantic-0"))}
    assert one["mean IoU"][1] == f"{first:.3f}"


def test_runs_of_other_options_are_no_seeds(
    tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ppo-1", "ppo-2"):
        (tmp_path / f"{name}.json").write_text((SMALL / f"{name}.json").read_text())
    changed = json.loads((tmp_path / "ppo-2.json").read_text())
    changed["config"]["gamma"] = 0.5
    (tmp_path / "ppo-2.json").write_text(json.dumps(changed))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match=r"ppo-1 and ppo-2 differ in gamma\."):
        tables.training_runs("ppo-1", "ppo-2")


def test_files_of_other_commands_and_unknown_names(tables: Any) -> None:
    with pytest.raises(ValueError, match=r"interactive\.json: of interactive, not of throughput"):
        tables.throughput("interactive")
    with pytest.raises(ValueError, match=r"'ppo'.* Did you mean 'ppo-"):
        tables.training_runs("ppo")
    with pytest.raises(ValueError, match="Unknown column 'steps'"):
        tables.throughput("throughput", "steps")


def test_kept_files_lose_their_folders(
    tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    source = tmp_path / "results.json"
    # As agents.evaluate writes it: the path of the policy is a key.
    content = {"/a/run/policy.zip": {"mean_iou": 0.5}, "config": {"data": ["/b/coco", "runs/c"]}}
    source.write_text(json.dumps(content))
    kept = json.loads(tables.main([str(source), "kept"]).read_text())
    assert kept == {"policy.zip": {"mean_iou": 0.5}, "config": {"data": ["coco", "runs/c"]}}
    source.write_text(json.dumps({"config": {"run": ["a=/b/c,/d/e"]}}))
    with pytest.raises(ValueError, match=r"folders of this machine: /b/c, /d/e\. Run"):
        tables.main([str(source), "other"])
    assert not (tmp_path / "other.json").exists()
