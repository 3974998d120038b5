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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("workspace: [", "not valid YAML"),
        ("just text", "expected a mapping"),
        (GOOD + "colour: blue\n", "colour: Extra inputs"),
        (GOOD.replace("finetune", "pretrain"), "stage names must differ"),
        (GOOD + "attribute_to: nowhere\n", "attribute_to names no stage"),
        (GOOD.replace(", tau: 2.0", ""), "needs tau"),
        (GOOD + "sketch: {dimensions: 2}\n", "sketch.dimensions"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        Config.load(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="no such configuration file"):
        Config.load(tmp_path / "none.yaml")
