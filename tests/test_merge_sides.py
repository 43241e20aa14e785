"""merge beside the weights: whose tokenizer the model gets, and which base an adapter names."""

import json

import pytest
import transformers as hf
from test_adapters import adapt, edit, llama

import lowrank_probe as lp
from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.merge_sides import other_bases

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")


@pytest.fixture
def pair(tmp_path):
    """(base, adapter) with a tokenizer of the base, and in the adapter's directory what trainers leave there."""
    base, adapter, _ = adapt(tmp_path, llama(), r=2, target_modules=["q_proj"])
    (base / "tokenizer.json").write_text("base")
    (base / "LICENSE").write_text("MIT")
    for name in ("README.md", "training_args.bin", "trainer_state.json", "eval.txt", "LICENSE"):
        (adapter / name).write_text("adapter")
    return base, adapter


def beside(directory):
    """name → content of what is neither weights nor config."""
    return {file.name: file.read_text() for file in open_checkpoint(directory).other_files if "config" not in file.name}


def test_nothing_of_an_adapter_without_a_tokenizer_of_its_own(tmp_path, pair):
    base, adapter = pair
    (adapter / "tokenizer.json").write_text("base")
    result = lp.merge(base, adapter, tmp_path / "merged")
    assert beside(tmp_path / "merged") == {"tokenizer.json": "base", "LICENSE": "MIT"}
    assert result.facts["notes"] == []


def test_a_tokenizer_that_differs_and_a_template_that_the_base_lacks(tmp_path, pair):
    base, adapter = pair
    (adapter / "tokenizer.json").write_text("adapter")
    (adapter / "chat_template.jinja").write_text("{{ x }}")
    result = lp.merge(base, adapter, tmp_path / "merged")
    found = beside(tmp_path / "merged")
    assert found == {"tokenizer.json": "adapter", "chat_template.jinja": "{{ x }}", "LICENSE": "MIT"}
    told = f"chat_template.jinja, tokenizer.json: of {adapter}; the base has none, or another one"
    assert result.facts["notes"] == [told]


def test_adapters_of_different_tokenizers_leave_the_bases(tmp_path, pair):
    base, adapter = pair
    (tmp_path / "b").mkdir()
    _, other, _ = adapt(tmp_path / "b", llama(), r=2, target_modules=["q_proj"])
    for directory, text in ((adapter, "one"), (other, "two")):
        (directory / "tokenizer.json").write_text(text)
        (directory / "merges.txt").write_text("same")
    result = lp.merge(base, [adapter, other], tmp_path / "merged")
    assert beside(tmp_path / "merged") == {"tokenizer.json": "base", "LICENSE": "MIT"}
    assert result.facts["notes"] == ["the adapters have different tokenizers (tokenizer.json): the base's is kept"]
    (other / "tokenizer.json").write_text("one")
    lp.merge(base, [adapter, other], tmp_path / "agreed")
    assert beside(tmp_path / "agreed") == {"tokenizer.json": "one", "merges.txt": "same", "LICENSE": "MIT"}


@pytest.mark.parametrize(
    ("named", "told"),
    [
        (None, False), ("", False), ("org/base", False), ("org/Base@v2", False), ("somewhere/base/", False),
        ("cache/models--org--base/snapshots/1234", False), ("org/another", True), ("org/base-instruct", True),
    ],
)  # fmt: skip
def test_another_base_than_the_adapter_names_is_a_note(tmp_path, pair, named, told):
    base, adapter = pair
    edit(adapter, base_model_name_or_path=named)
    notes = lp.merge(base, adapter, tmp_path / "merged").facts["notes"]
    expected = f"{adapter} names {named} as its base; are the weights of {base} the same?"
    assert notes == ([expected] if told else [])


def test_how_a_base_is_known(tmp_path, pair):
    base, path = pair
    edit(path, base_model_name_or_path="org/tiny")
    adapter = open_checkpoint(path)

    def noted(source):
        return bool(other_bases(open_checkpoint(source), [adapter]))

    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (base / "model.safetensors").rename(snapshot / "model.safetensors")
    (base / "config.json").rename(snapshot / "config.json")
    assert not noted(snapshot)
    assert not noted(snapshot / "model.safetensors")
    model = hf.AutoModelForCausalLM.from_pretrained(snapshot)
    assert not noted(model)
    assert not noted(model.state_dict())  # has no name to compare
    (snapshot / "config.json").write_text(
        json.dumps(json.loads((snapshot / "config.json").read_text()) | {"_name_or_path": "org/tiny"})
    )
    snapshot.rename(tmp_path / "renamed")
    assert not noted(tmp_path / "renamed")
    assert noted(tmp_path / "renamed" / "model.safetensors")  # without its config
    (tmp_path / "renamed" / "model.safetensors").rename(tmp_path / "tiny.safetensors")
    assert not noted(tmp_path / "tiny.safetensors")
