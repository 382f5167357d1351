"""A user's script: prepare, train, evaluate, load, generate, by `import llmtrain` alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import llmtrain

config, root = sys.argv[1:]
assert "torch" not in sys.modules
overrides = ["trainer.max_steps=4", "trainer.eval_every_steps=4"]
run = llmtrain.train(config, overrides=overrides)
scores = llmtrain.evaluate(run["run"], steps=2)
model = llmtrain.load_model("latest", root_dir=root, device="cpu")
written = model.generate(["def f(", "import "], max_new_tokens=6, temperature=0.0)
decoder = llmtrain.load_decoder(run["model"] + "/config.json", run["model"] + "/model.safetensors", device="cpu")
try:
    llmtrain.train(config, overrides=["trainer.max_stesp=4"])
except llmtrain.ConfigError as error:
    refused = str(error)
again = llmtrain.train(resume="latest", overrides=["trainer.max_steps=6", "output.root_dir=" + root])
print(json.dumps({
    "steps": [run["steps"], again["steps"]],
    "loss": scores["loss"],
    "tokens": [one.tokens for one in written],
    "same": bool((decoder.model.token_embedding.weight == model.model.token_embedding.weight).all()),
    "refused": refused,
}))
"""


@pytest.mark.slow
def test_a_script_trains_evaluates_and_generates(config_file: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(config_file), str(tmp_path / "runs")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["steps"] == [4, 6]
    assert 3 < result["loss"] < 7
    assert all(1 <= tokens <= 6 for tokens in result["tokens"])
    assert result["same"]
    assert "did you mean" in result["refused"]
    assert "max_steps" in result["refused"]
