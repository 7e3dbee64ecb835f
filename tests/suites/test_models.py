"""Synthetic presets: their shapes against transformers' configurations, and their weights."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from moebench.contracts import MoebenchError, Registry, Selection
from moebench.suites import model_plugins
from moebench.suites.models.cache import cache_dir, locked
from moebench.suites.models.synthetic import SyntheticModel

PRESETS = {descriptor.name: descriptor for descriptor in model_plugins.PRESETS}


def shape_of(name):
    return PRESETS[name].params_from().shape()


def sizes(shape):
    return shape.hidden, shape.width, shape.experts, shape.top_k, shape.layers, len(shape.moe_layers)


# Published sizes: hidden, width of an expert, experts, k, layers, MoE layers. Sources: the config.json of each
# checkpoint, or its model card where named.
PUBLISHED = {
    "olmoe-1b-7b": (2048, 1024, 64, 8, 16, 16),  # arXiv 2409.02060, table of hyperparameters
    "qwen3-30b-a3b": (2048, 768, 128, 8, 48, 48),
    "qwen3-235b-a22b": (4096, 1536, 128, 8, 94, 94),
    "qwen1.5-moe-a2.7b": (2048, 1408, 60, 4, 24, 24),
    "mixtral-8x7b": (4096, 14336, 8, 2, 32, 32),
    "mixtral-8x22b": (6144, 16384, 8, 2, 56, 56),
    "deepseek-v2-lite": (2048, 1408, 64, 6, 27, 26),
    "deepseek-v3": (7168, 2048, 256, 8, 61, 58),
    "glm-4.5-air": (4096, 1408, 128, 8, 46, 45),
    "granite-1b-a400m": (1024, 512, 32, 8, 24, 24),  # model card
    "granite-3b-a800m": (1536, 512, 40, 8, 32, 32),  # model card
    "switch-base-8": (768, 3072, 8, 1, 24, 12),  # 12 encoder and 12 decoder layers, every second one sparse
    "phi-3.5-moe": (4096, 6400, 16, 2, 32, 32),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_sizes(name):
    assert sizes(shape_of(name)) == PUBLISHED[name]


def test_every_preset_but_the_two_small_ones_is_checked():
    assert set(PRESETS) - set(PUBLISHED) == {"tiny", "small"}


# What the classes of transformers say by default; where that is not the checkpoint, the difference stands here.
DIFFERENT_DEFAULTS = {
    "olmoe-1b-7b": ("OlmoeConfig", {"intermediate_size": (2048, 1024)}),
    "qwen3-30b-a3b": ("Qwen3MoeConfig", {"num_hidden_layers": (24, 48), "norm_topk_prob": (False, True)}),
    "qwen1.5-moe-a2.7b": ("Qwen2MoeConfig", {}),
    "mixtral-8x7b": ("MixtralConfig", {}),
    "deepseek-v3": ("DeepseekV3Config", {}),
    "glm-4.5-air": ("Glm4MoeConfig", {}),
    "phi-3.5-moe": ("PhimoeConfig", {}),
    "deepseek-v2-lite": (
        "DeepseekV2Config",
        {
            "hidden_size": (4096, 2048),
            "moe_intermediate_size": (1407, 1408),
            "num_hidden_layers": (32, 27),
            "num_experts_per_tok": (None, 6),
            "first_k_dense_replace": (0, 1),
        },
    ),
    "granite-1b-a400m": (
        "GraniteMoeConfig",
        {
            "hidden_size": (4096, 1024),
            "intermediate_size": (11008, 512),
            "num_local_experts": (8, 32),
            "num_experts_per_tok": (2, 8),
            "num_hidden_layers": (32, 24),
        },
    ),
    "switch-base-8": ("SwitchTransformersConfig", {"d_ff": (2048, 3072), "encoder_sparse_step": (4, 2)}),
}


def ours_as_config(shape, names):
    """Our shape under the attribute names of transformers, for those names that the configuration has."""
    first = shape.moe_layers[0]
    ours = {
        "hidden_size": shape.hidden,
        "d_model": shape.hidden,
        "d_ff": shape.width,
        "num_experts": shape.experts,
        "n_routed_experts": shape.experts,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": shape.layers,
        "norm_topk_prob": shape.selection.renormalize,
        "routed_scaling_factor": shape.selection.scale,
        "first_k_dense_replace": first,
        "hidden_act": shape.activation,
        "shared_expert_intermediate_size": shape.shared_width,
        ("moe_intermediate_size" if "moe_intermediate_size" in names else "intermediate_size"): shape.width,
    }
    if "n_shared_experts" in names:
        ours["n_shared_experts"] = shape.shared_width // shape.width
    if "encoder_sparse_step" in names:
        ours |= {"encoder_sparse_step": shape.moe_layers[1] - first, "num_hidden_layers": shape.layers // 2}
        ours["dense_act_fn"] = shape.activation
        del ours["hidden_act"]
    if shape.selection.groups:
        ours |= {"n_group": shape.selection.groups[0], "topk_group": shape.selection.groups[1]}
    return {name: value for name, value in ours.items() if name in names}


@pytest.mark.parametrize("name", DIFFERENT_DEFAULTS)
def test_preset_against_transformers_defaults(name):
    transformers = pytest.importorskip("transformers")
    class_name, different = DIFFERENT_DEFAULTS[name]
    config = getattr(transformers, class_name)()
    # hidden_size and num_experts of some classes are aliases, so ask the object, not to_dict()
    names = {n for n in (*config.to_dict(), *config.attribute_map) if hasattr(config, n)}
    ours = ours_as_config(shape_of(name), names)
    assert len(ours) >= 5
    found = {n: (getattr(config, n), value) for n, value in ours.items() if getattr(config, n) != value}
    assert found == different


def test_deepseek_selection_is_grouped_and_biased():
    assert shape_of("deepseek-v3").selection == Selection("sigmoid", 8, True, 2.5, True, (8, 4))
    layer = SyntheticModel(PRESETS["deepseek-v3"].params_from({"hidden": 16, "width": 8, "shared_width": 8})).layer(3)
    assert layer.router_bias_E.shape == (256,)
    assert layer.router_bias_E.abs().max() < 0.1


def test_expert_bytes_of_a_layer():
    # Mixtral-8x7B: 8 experts of 3 matrices 4096 x 14336 in bfloat16
    assert shape_of("mixtral-8x7b").expert_bytes(2) == 8 * 3 * 4096 * 14336 * 2
    assert shape_of("switch-base-8").expert_bytes(4) == 8 * 2 * 768 * 3072 * 4


def test_layer_shapes_and_spread():
    model = SyntheticModel(PRESETS["qwen1.5-moe-a2.7b"].params_from({"hidden": 64, "width": 32, "shared_width": 16}))
    layer = model.layer(5)
    assert layer.gate_up.shape == (60, 64, 64)
    assert layer.down.shape == (60, 64, 32)
    assert layer.router_EH.shape == (60, 64)
    assert layer.shared.gate_up.shape == (32, 64)
    assert layer.shared.down.shape == (64, 16)
    assert layer.shared.gate_H.shape == (64,)
    assert layer.gate_up.std().item() == pytest.approx(64**-0.5, rel=0.02)
    assert layer.down.std().item() == pytest.approx(32**-0.5, rel=0.02)


def test_ungated_layers_have_one_input_matrix():
    layer = SyntheticModel(PRESETS["switch-base-8"].params_from({"hidden": 16, "width": 24})).layer(1)
    assert layer.gate_up.shape == (8, 24, 16)
    assert not layer.gated
    assert layer.activation == "relu"


def test_weights_depend_on_seed_and_layer_alone():
    def weights(layer=0, **changes):
        return SyntheticModel(PRESETS["tiny"].params_from(changes)).layer(layer).gate_up

    assert torch.equal(weights(), weights())
    assert torch.equal(weights(), weights(depth=9))
    assert not torch.equal(weights(), weights(seed=1))
    assert not torch.equal(weights(), weights(layer=1))
    torch.testing.assert_close(weights(std=2.0), 2 * weights(), rtol=1e-6, atol=0)


def test_the_hash_follows_everything_that_decides_the_weights():
    base = PRESETS["tiny"].params_from()
    changed = [{"seed": 1}, {"std": 0.5}, {"width": 16}, {"experts": 4}, {"shared_width": 8}]
    hashes = {PRESETS["tiny"].params_from(change).weights_sha256() for change in changed}
    assert len(hashes | {base.weights_sha256()}) == len(changed) + 1
    assert base.weights_sha256().startswith("seeded:")


def test_parameters_are_checked_in_one_sentence():
    with pytest.raises(MoebenchError, match="k=9 must lie between 1 and experts=8"):
        PRESETS["tiny"].params_from({"k": 9})
    with pytest.raises(MoebenchError, match="did you mean 'experts'"):
        PRESETS["tiny"].params_from({"expert": 4})
    with pytest.raises(MoebenchError, match="equal groups"):
        PRESETS["deepseek-v3"].params_from({"experts": 100})


def test_a_layer_without_experts_is_refused():
    with pytest.raises(MoebenchError, match="layer 0 holds no experts"):
        SyntheticModel(PRESETS["deepseek-v2-lite"].params_from()).layer(0)


def test_synthetic_models_have_no_hidden_states():
    with pytest.raises(MoebenchError, match="traffic=gaussian"):
        SyntheticModel(PRESETS["tiny"].params_from()).hidden_states(0, "evaluation", 4, 0)


def test_plugins_register_and_name_existing_factories():
    registry = Registry()
    registry.add(*model_plugins.DESCRIPTORS)
    for descriptor in model_plugins.DESCRIPTORS:
        assert descriptor.create() is not None, descriptor.name


def test_descriptors_and_params_import_no_torch():
    code = (
        "import sys, moebench.suites.models, moebench.suites.model_plugins as p\n"
        "[d.params_from().shape() for d in p.PRESETS]\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path / "x"))
    assert cache_dir() == tmp_path / "x"


def test_an_unwritable_cache_is_told_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MoebenchError, match="set MOEBENCH_CACHE"), locked(tmp_path / "file" / "folder"):
        pass
