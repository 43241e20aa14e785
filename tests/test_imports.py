"""What a cheap command must not pay for: the import and the help stay free of torch and its kin."""

import subprocess
import sys
from pathlib import Path

import pytest

import lowrank_probe as lp

HEAVY = ("torch", "transformers", "peft", "pandas", "numpy", "plotly", "pyarrow", "safetensors", "jinja2")
REPORT = f"import sys; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"


def python(code):
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    assert python(f"import lowrank_probe; lowrank_probe.__version__; {REPORT}").split() == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["spectrum", "--help"],
        ["merge", "--help"],
        ["eval", "--help"],
        ["--version"],
        ["budget", "--help"],
        ["budget", "--params", "70e9"],
        ["budget", "--params", "7B", "--method", "lora", "--json"],
    ],
    ids=" ".join,
)
def test_help_is_light(arguments):
    code = f"""
import sys
from lowrank_probe import cli
sys.argv = ["probe", *{arguments!r}]
try:
    cli.main()
except SystemExit as stop:
    assert not stop.code
{REPORT}
"""
    assert python(code).splitlines()[-1].split() == []


@pytest.mark.parametrize(
    "module",
    ["metrics", "layers", "errors", "options", "cli", "columns", "interrupts", "outputs", "__main__", "trajectory_runs",
     "trajectory_reports", "extraction_runs", "extraction_reports", "model_card",
     "cli_adapters", "cli_extract", "cli_shared", "model_shapes", "safetensors_headers", "tensor_info", "hub"],
)  # fmt: skip
def test_modules_that_need_no_torch(module):
    assert "torch" not in python(f"import lowrank_probe.{module}; {REPORT}").split()


def test_every_public_name_resolves_and_no_module_shadows_a_verb():
    for name in lp.__all__:
        assert getattr(lp, name) is not None
    assert set(dir(lp)) >= set(lp.__all__)
    verbs = {name for name in lp.__all__ if callable(getattr(lp, name)) and name.islower()}
    assert verbs >= {"spectrum", "load", "report", "demo", "resize", "merge", "budget"}
    assert not verbs & {file.stem for file in Path(lp.__file__).parent.glob("*.py")}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'spectrums'"):
        _ = lp.spectrums
