# SPDX-License-Identifier: Apache-2.0
"""The loader for Tenstorrent's tt-forge-models. `make test-tt` holds its logits to their bounds."""

import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import PartitionSpec

ROOT = Path(__file__).parents[1]
LOADER = ROOT / "integrations/tt_forge_models/qwen_2_5/causal_lm/jax"


@pytest.fixture
def loaders(tmp_path, monkeypatch):
    pytest.importorskip("flax")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "tt_harness"))
    before = set(sys.modules)
    import testers

    yield testers.import_loader(tmp_path)
    for name in set(sys.modules) - before:  # The next test has a copy of its own.
        if name.startswith(("testers", "tt_forge_models", "tt-forge-models")):
            del sys.modules[name]


def test_it_requires_what_the_package_requires_but_nothing_of_the_harness():
    with open(ROOT / "pyproject.toml", "rb") as file:
        package = tomllib.load(file)["project"]["dependencies"]
    lines = (LOADER / "requirements.txt").read_text().splitlines()
    required = [line for line in lines if not line.startswith("#")]
    assert set(required) <= set(package)
    assert not [line for line in required if line.startswith(("jax>", "jax=", "flax", "numpy"))]


def test_every_size_is_there_and_can_be_split(loaders):
    for variant in loaders.ModelLoader.query_available_variants():
        model = loaders.ModelLoader(variant, load_format="dummy").load_multichip_model(
            axis_name="X", num_devices=32, train_mode=False
        )
        size = variant.value.split("_")[0]
        assert size.lower() in model.config.name.lower()
        table = model.partition_specs()["params"]["model"]["embed_tokens"]["weight"]
        assert table == PartitionSpec("X", None)
        info = loaders.ModelLoader.get_model_info(variant=variant)
        assert (info.variant, info.framework.value) == (variant, "jax")


def test_the_environment_chooses_what_the_constructor_does_not(loaders, monkeypatch):
    monkeypatch.setenv("MESHWEN_CHECKPOINT", "demo")
    monkeypatch.setenv("MESHWEN_DTYPE", "float32")
    model = loaders.ModelLoader().load_model()
    assert (model.config.vocab_size, model.param_dtype) == (1024, "float32")
    assert loaders.ModelLoader(dtype="bfloat16").load_model().param_dtype == "bfloat16"
    ids = loaders.ModelLoader().load_inputs(mesh=None)
    assert (ids.dtype, ids.shape[0]) == (np.int32, 1)
    monkeypatch.setenv("MESHWEN_LOAD_FORMAT", "none")
    with pytest.raises(ValueError, match="must be auto or dummy, not 'none'"):
        loaders.ModelLoader()


def test_data_parallelism_is_refused(loaders):
    import testers
    from tt_forge_models.config import Parallelism

    loader = loaders.ModelLoader(checkpoint="demo")
    with pytest.raises(ValueError, match="splits the model: run it tensor-parallel"):
        testers.MultiChip(loader, 2, Parallelism.DATA_PARALLEL)
