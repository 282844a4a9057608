"""Every switch of every family, as small random models: what devices and formats are tested with."""

from __future__ import annotations

FACTORS = {
    "short_factor": [1.0, 1.1, 1.3, 1.2, 1.5, 1.4, 1.6, 1.9],
    "long_factor": [1.0, 2.0, 5.0, 4.0, 9.0, 12.0, 20.0, 30.0],
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, **FACTORS}
GEMMA = {"head_dim": 24, "num_key_value_heads": 2, "sliding_window": 6}

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama-grouped-tied": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 24, "num_key_value_heads": 1}),
    "llama-gelu": ("llama", {"hidden_act": "gelu", "rms_norm_eps": 1e-2}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}},
    ),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-mscale": (
        "llama",
        {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 8, "beta_slow": 2}},
    ),
    "llama-yarn-factor": ("llama", {"rope_parameters": {**YARN, "attention_factor": 0.8}}),
    "mistral": ("mistral", {"sliding_window": None, "num_key_value_heads": 2}),
    "mistral-window": ("mistral", {"sliding_window": 7, "num_key_value_heads": 2}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "num_key_value_heads": 2}),
    "smollm3-layers": ("smollm3", {"no_rope_layers": [0, 1, 0], "tie_word_embeddings": False}),
    "smollm3-window": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 5, "no_rope_layer_interval": 2},
    ),
    "qwen2": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 24, "num_key_value_heads": 2}),
    "qwen3-bias": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3-window": (
        "qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    ),
    "phi3-mini-4k": ("phi3", {"sliding_window": 11, "original_max_position_embeddings": 128}),
    "phi3-medium": ("phi3", {"num_key_value_heads": 2, "sliding_window": 15}),
    "phi3-longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
    "phi3-longrope-window": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16, "sliding_window": 6},
    ),
    "phi3-longrope-factor": (
        "phi3",
        {
            "rope_parameters": {**LONGROPE, "attention_factor": 1.4},
            "original_max_position_embeddings": 16,
        },
    ),
    "phi4-mini": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": FACTORS["short_factor"][:6],
                "long_factor": FACTORS["long_factor"][:6],
            },
            "original_max_position_embeddings": 16,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "gemma2": ("gemma2", {**GEMMA, "query_pre_attn_scalar": 20}),
    "gemma2-caps": ("gemma2", {**GEMMA, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5}),
    "gemma2-no-caps": (
        "gemma2",
        {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": ("gemma3_text", {**GEMMA, "num_hidden_layers": 6, "query_pre_attn_scalar": 20}),
    "gemma3-pattern": ("gemma3_text", {**GEMMA, "sliding_window_pattern": 2, "final_logit_softcapping": 3.0}),
    "gemma3-linear": (
        "gemma3_text",
        {
            **GEMMA,
            "sliding_window_pattern": 3,
            "attention_bias": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
}
"""Model type and switches for ``random_model``, by a name for the case."""
