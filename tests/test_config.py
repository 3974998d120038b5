"""Settings: what is wrong is named by its key."""

import pytest

from msif_core.config import Config
from msif_core.errors import InputError

GOOD = """
workspace: runs/x
stages:
  - {name: pretrain, model: m1, documents: "a/*.jsonl"}
  - {name: finetune, model: m2, documents: "b/*.jsonl", filter: {kind: unrolled, tau: 2.0}}
"""


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_the_first_stage_is_attributed_to_by_default(tmp_path):
    assert Config.load(write(tmp_path, GOOD)).attribute_to == "pretrain"


def test_paths_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    text = GOOD.replace("model: m1", "model: ~/m1").replace('"a/*.jsonl"', '["~/a/*.jsonl"]')
    config = Config.load(write(tmp_path, text.replace("workspace: ", "workspace: ~/")))
    assert str(config.workspace).startswith("/home/someone/")
    assert config.stages[0].model == "/home/someone/m1"
    assert config.stages[0].documents == ["/home/someone/a/*.jsonl"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("workspace: [", "not valid YAML"),
        ("just text", "expected a mapping"),
        (
            GOOD.replace("workspace: ", "workspace: a\\\\b"),
            r"\n  workspace: .*DuckDB takes a backslash in a path for a slash",
        ),
        (GOOD + "colour: blue\n", r"\n  colour: unknown key; known here: workspace, stages, attribute_to, queries, "),
        (GOOD + "index: {size: 1}\n", r"\n  index.size: unknown key; known here: kind, bits, "),
        (GOOD.replace("tau: 2.0", "t: 2"), r"\n  stages.1.filter.t: unknown key; known here: kind, damping, tau, "),
        (GOOD.replace('"a/*.jsonl"', "{path: a}"), r"HubDataset.path: unknown key; known here: dataset, name, "),
        (GOOD.replace("name: pretrain, ", ""), r"\n  stages.0.name: Field required"),
        ("workspace: x\nstages: [pretrain]", r"\n  stages.0: Input should be a valid dictionary"),
        ("workspace: x\nstages: {pretrain: {model: m}}", r"\n  stages: Input should be a valid tuple"),
        ("workspace: x\nstages: []", r"\n  stages: Tuple should have at least 1 item"),
        (GOOD + "curvature: {include: '('}", r"\n  curvature.include: .*no regular expression \(missing \)"),
        (GOOD.replace("finetune", "pretrain"), "stage names must differ"),
        (GOOD + "attribute_to: nowhere\n", "attribute_to names no stage"),
        (GOOD.replace(", tau: 2.0", ""), "needs tau"),
        (GOOD + "sketch: {dimensions: 2}\n", "sketch.dimensions"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        Config.load(write(tmp_path, text))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none.yaml: no such configuration file"):
        Config.load(tmp_path / "none.yaml")
    with pytest.raises(InputError, match=f"{tmp_path}: a folder; name the configuration file in it"):
        Config.load(tmp_path)
    (tmp_path / "c.yaml").write_bytes(b"workspace: \xff")
    with pytest.raises(InputError, match=r"c.yaml: not valid YAML"):
        Config.load(tmp_path / "c.yaml")
