from __future__ import annotations

import json
from pathlib import Path

import pytest

from smartclip_kernels.train import compare
from smartclip_kernels.train.compare import ARMS, BEGIN, END, METRICS, SOFT, CompareConfig, run, table, write_between


def metrics(value: float) -> dict[str, float]:
    return dict.fromkeys(METRICS, value)


def test_the_table_holds_mean_and_spread_and_marks_the_best() -> None:
    text = table({"a": [metrics(1.0), metrics(3.0)], "b": [metrics(5.0), metrics(5.0)]})
    rows = text.splitlines()
    assert rows[0] == "| | a | b |"
    assert len(rows) == 2 + len(METRICS)
    assert rows[2] == "| text→image R@1 | 2.0 ± 1.4 | **5.0 ± 0.0** |"


def test_only_what_is_between_the_markers_changes(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"top\n{BEGIN}\nold\n{END}\nbottom\n")
    for _ in range(2):
        write_between(page, "new\n")
        assert page.read_text() == f"top\n{BEGIN}\nnew\n{END}\nbottom\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="lacks <!-- compare:begin -->"):
        write_between(page, "new\n")
    assert page.read_text() == "no markers"


def test_the_arms_differ_in_objective_captions_and_masks_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    class Finished:
        returncode = 0

    def fake(command: list[str], **_: object) -> Finished:
        commands.append(command)
        out = Path(command[command.index("--out") + 1])
        (out / "evaluation.json").write_text(json.dumps(metrics(len(commands))))
        return Finished()

    monkeypatch.setattr("smartclip_kernels.train.compare.subprocess.run", fake)
    config = CompareConfig(runs=tmp_path)
    assert [run(config, arm, 1)["keyword mAP"] for arm in ARMS] == [1, 2, 3, 4, 5, 6]
    assert [run(config, arm, 1)["keyword mAP"] for arm in ARMS] == [1, 2, 3, 4, 5, 6], (
        "a run that is done was done again"
    )
    assert len(commands) == len(ARMS) == 6
    folders = {str(path) for path in tmp_path.iterdir()}
    words: list[set[str]] = [set(command) - folders for command in commands]
    common = words[0].intersection(*words[1:])
    assert words[0].union(*words[1:]) - common <= {"clip", "smartclip", "short", "long", "mixed", "both", *SOFT.split()}
    with pytest.raises(ValueError, match="was made with"):
        run(CompareConfig(runs=tmp_path, train="--steps 1"), "clip, both", 1)


def test_a_failed_run_says_where_its_log_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"clip, both, seed 0: exit status \d+; see .*log\.txt"):
        run(CompareConfig(runs=tmp_path, train="--nonsense 1"), "clip, both", 0)
    assert "nonsense" in (tmp_path / "clip-both-0" / "log.txt").read_text()


@pytest.mark.slow
def test_the_whole_comparison_on_a_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    options = "--batch-size 16 --chunk-size 16 --steps 2 --warmup 1"
    paths = {"--out": tmp_path / "out", "--runs": tmp_path / "runs", "--readme": page}
    words = [str(word) for pair in paths.items() for word in pair]
    monkeypatch.setattr("sys.argv", ["compare", *words, "--seeds", "1", f"--train={options}"])
    compare.main()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["results"].keys() == ARMS.keys()
    assert results["options"] == options
    assert "| keyword mAP |" in page.read_text()
