"""The Hugging Face models of the zoo benchmark: a small configuration of each architecture, and its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MODELS", "Transformer", "build_transformer", "double_transformer"]

VOCABULARY = 500
Inputs = Callable[[int], dict[str, Any]]


def tokens(batch: int, length: int = 16) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))  # 0, 1 and 2 are the special ones


def text(batch: int) -> dict[str, Any]:
    return {"input_ids": tokens(batch), "attention_mask": torch.ones(batch, 16, dtype=torch.long)}


def plain_text(batch: int) -> dict[str, Any]:
    return {"input_ids": tokens(batch)}


def causal_text(batch: int) -> dict[str, Any]:
    return {**text(batch), "use_cache": False}


def two_texts(batch: int) -> dict[str, Any]:
    return {"input_ids": tokens(batch), "decoder_input_ids": tokens(batch, 8), "use_cache": False}


def image(batch: int) -> dict[str, Any]:
    return {"pixel_values": torch.rand(batch, 3, 64, 64)}


def clip(batch: int) -> dict[str, Any]:
    return {"pixel_values": torch.rand(batch, 4, 3, 64, 64)}


def image_and_text(batch: int) -> dict[str, Any]:
    return {**image(batch), **text(batch)}


def sound(batch: int) -> dict[str, Any]:
    return {"input_values": torch.randn(batch, 4000)}


def spectrogram(batch: int) -> dict[str, Any]:
    return {"input_values": torch.randn(batch, 64, 32)}


def spectrogram_and_text(batch: int) -> dict[str, Any]:
    return {"input_features": torch.randn(batch, 80, 64), "decoder_input_ids": tokens(batch, 8), "use_cache": False}


def speech_and_text(batch: int) -> dict[str, Any]:
    return {"input_features": torch.randn(batch, 64, 80), "decoder_input_ids": tokens(batch, 8), "use_cache": False}


def series(batch: int) -> dict[str, Any]:
    return {"past_values": torch.randn(batch, 32, 2)}


# what most configurations understand
_SPECIAL: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = {
    **_SPECIAL,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 64,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "head_dim": 32}
_MOE = {**_DECODER, "moe_intermediate_size": 64, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_SEQ2SEQ = {
    **_SPECIAL,
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}
_T5 = {**_SPECIAL, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
_VISION = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "image_size": 64,
    "patch_size": 16,
}
_SOUND = {
    **_ENCODER,
    "vocab_size": 32,
    "conv_dim": [32, 32, 32],
    "conv_kernel": [10, 3, 3],
    "conv_stride": [5, 4, 4],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}
_TOWERS = {
    "text_config": {**_ENCODER, "projection_dim": 64},
    "vision_config": {**_VISION, "projection_dim": 64},
    "projection_dim": 64,
}


@dataclass(frozen=True)
class Transformer:
    """A model of ``AutoModelFor<task>`` (``AutoModel`` where the task is empty).

    Attributes:
        type: Model type, as ``AutoConfig`` knows it.
        task: What its head is for.
        inputs: Batch size -> keyword arguments.
        config: Options of the configuration.
    """

    type: str
    task: str
    inputs: Inputs
    config: dict[str, Any] = field(default_factory=dict)


def build_transformer(model: Transformer) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.for_model(model.type, **model.config)
    auto = getattr(transformers, f"AutoModelFor{model.task}" if model.task else "AutoModel")
    return auto.from_config(config)  # type: ignore[no-any-return]


def double_transformer(model: nn.Module) -> nn.Module:
    model.set_experts_implementation("batched_mm")  # the default has no kernel for double precision
    return model.double()


def _family(
    task: str, inputs: Inputs, config: dict[str, Any], types: dict[str, dict[str, Any]]
) -> dict[str, Transformer]:
    return {name: Transformer(name, task, inputs, config | options) for name, options in types.items()}


_ATTENTION_WINDOW = {"attention_window": 8}
MODELS: dict[str, Transformer] = {
    **_family(
        "SequenceClassification",
        text,
        _ENCODER,
        {
            "albert": {"embedding_size": 64},
            "bert": {},
            "big_bird": {"attention_type": "original_full"},
            "convbert": {"embedding_size": 128},
            "deberta": {"pooler_hidden_size": 128, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
            "deberta-v2": {"pooler_hidden_size": 128, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
            "distilbert": {"dim": 128, "n_layers": 3, "n_heads": 4, "hidden_dim": 256},
            "electra": {"embedding_size": 64},
            "ernie": {},
            "esm": {"mask_token_id": 3, "position_embedding_type": "rotary"},
            "ibert": {},
            "layoutlm": {},
            "longformer": _ATTENTION_WINDOW,
            "megatron-bert": {},
            "mobilebert": {"embedding_size": 64, "intra_bottleneck_size": 64, "true_hidden_size": 64},
            "modernbert": {"sep_token_id": 2, "cls_token_id": 1},
            "mpnet": {},
            "nystromformer": {"num_landmarks": 8, "segment_means_seq_len": 16},
            "rembert": {"input_embedding_size": 64, "output_embedding_size": 64},
            "roberta": {},
            "roformer": {"embedding_size": 64},
            "squeezebert": {"embedding_size": 128},
            "xlm-roberta": {},
        },
    ),
    **_family("SequenceClassification", plain_text, _ENCODER, {"fnet": {"tpu_short_seq_length": 16}}),
    **_family(
        "SequenceClassification",
        text,
        {**_SPECIAL, "d_model": 128, "n_head": 4, "d_inner": 256},
        {"funnel": {"block_sizes": [1, 1], "d_head": 32}, "xlnet": {"n_layer": 3, "use_mems_eval": False}},
    ),
    **_family(
        "CausalLM",
        causal_text,
        _DECODER,
        {
            "bloom": {"n_layer": 3, "n_head": 4},
            "codegen": {"rotary_dim": 16},
            "cohere": {},
            "gemma": {},
            "gemma2": {"query_pre_attn_scalar": 32},
            "gemma3_text": {"query_pre_attn_scalar": 32},
            "glm": {},
            "gpt2": {},
            "gpt_bigcode": {},
            "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
            "gpt_neox": {},
            "gptj": {"rotary_dim": 16},
            "granite": {},
            "llama": {},
            "mistral": {},
            "mpt": {},
            "nemotron": {},
            "olmo2": {},
            "opt": {"ffn_dim": 256, "word_embed_proj_dim": 128},
            "phi": {},
            "phi3": {},
            "qwen2": {},
            "qwen3": {},
            "smollm3": {},
            "stablelm": {},
            "starcoder2": {},
        },
    ),
    **_family(
        "CausalLM",
        causal_text,
        _ENCODER,
        {"falcon": {"ffn_hidden_size": 256, "new_decoder_architecture": True, "num_kv_heads": 2}},
    ),
    **_family(
        "CausalLM",
        causal_text,
        _MOE,
        {
            "gpt_oss": {},
            "mixtral": {},
            "olmoe": {},
            "qwen2_moe": {"shared_expert_intermediate_size": 64},
            "qwen3_moe": {},
        },
    ),
    **_family(
        "CausalLM",
        causal_text,
        {**_SPECIAL, "hidden_size": 128, "num_hidden_layers": 3},
        {
            "mamba": {"state_size": 8},
            "mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 32, "n_groups": 2, "chunk_size": 8},
            "rwkv": {"attention_hidden_size": 128, "intermediate_size": 256},
        },
    ),
    **_family(
        "Seq2SeqLM",
        two_texts,
        _SEQ2SEQ,
        {
            "bart": {},
            "blenderbot": {},
            "led": {
                "attention_window": 8,
                "max_encoder_position_embeddings": 64,
                "max_decoder_position_embeddings": 64,
            },
            "m2m_100": {},
            "marian": {"decoder_vocab_size": VOCABULARY},
            "mbart": {},
            "pegasus": {},
        },
    ),
    **_family(
        "Seq2SeqLM",
        two_texts,
        _T5,
        {"mt5": {}, "switch_transformers": {"num_experts": 4}, "t5": {}, "umt5": {}},
    ),
    **_family(
        "ImageClassification",
        image,
        _VISION,
        {
            "beit": {},
            "data2vec-vision": {},
            "deit": {"architectures": ["DeiTForImageClassification"]},
            "dinov2": {},
            "ijepa": {},
            "siglip": {"vision_config": _VISION},
            "vit": {},
            "vit_msn": {},
        },
    ),
    **_family(
        "ImageClassification",
        image,
        {"image_size": 64, "hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 2, 1]},
        {
            "convnext": {},
            "convnextv2": {},
            "poolformer": {},
            "pvt": {"num_attention_heads": [1, 2, 4, 8]},
            "regnet": {"groups_width": 16},
            "resnet": {"embedding_size": 32},
        },
    ),
    **_family(
        "ImageClassification",
        image,
        {"image_size": 64, "embed_dim": 32, "patch_size": 4},
        {
            "focalnet": {"depths": [1, 1, 2, 1], "hidden_sizes": [32, 64, 128, 256]},
            "hiera": {"image_size": [64, 64], "patch_size": [7, 7], "depths": [1, 1, 2, 1]},
            "swin": {"depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
            "swinv2": {"depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        },
    ),
    **_family(
        "ImageClassification",
        image,
        {"image_size": 64},
        {
            "mobilenet_v1": {"depth_multiplier": 0.25},
            "mobilenet_v2": {"depth_multiplier": 0.35},
            "mobilevit": {"hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 128]},
        },
    ),
    "dpt": Transformer(
        "dpt",
        "DepthEstimation",
        image,
        _VISION
        | {
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 32, 64, 64],
            "fusion_hidden_size": 32,
        },
    ),
    "segformer": Transformer(
        "segformer",
        "SemanticSegmentation",
        image,
        {"hidden_sizes": [32, 64, 96, 128], "decoder_hidden_size": 64, "num_attention_heads": [1, 2, 4, 8]},
    ),
    "upernet": Transformer(
        "upernet",
        "SemanticSegmentation",
        image,
        {
            "backbone_config": {
                "model_type": "convnext",
                "hidden_sizes": [32, 64, 96, 128],
                "depths": [1, 1, 2, 1],
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
            },
            "hidden_size": 64,
            "auxiliary_in_channels": 96,
            "auxiliary_channels": 32,
        },
    ),
    "yolos": Transformer(
        "yolos", "ObjectDetection", image, {**_VISION, "image_size": [64, 64], "num_detection_tokens": 10}
    ),
    **_family(
        "VideoClassification",
        clip,
        {**_VISION, "num_frames": 4},
        {"timesformer": {}, "videomae": {}, "vivit": {"tubelet_size": [2, 16, 16]}},
    ),
    **_family(
        "",
        image_and_text,
        _TOWERS,
        {"chinese_clip": {}, "clip": {}},
    ),
    **_family(
        "CTC",
        sound,
        _SOUND,
        {
            "data2vec-audio": {"conv_pos_kernel_size": 5},
            "hubert": {},
            "sew": {"squeeze_factor": 2},
            "unispeech": {},
            "wav2vec2": {},
            "wavlm": {},
        },
    ),
    "audio-spectrogram-transformer": Transformer(
        "audio-spectrogram-transformer",
        "AudioClassification",
        spectrogram,
        {**_VISION, "max_length": 64, "num_mel_bins": 32},
    ),
    "whisper": Transformer(
        "whisper",
        "SpeechSeq2Seq",
        spectrogram_and_text,
        _SEQ2SEQ | {"max_source_positions": 32, "max_target_positions": 32},
    ),
    "speech_to_text": Transformer(
        "speech_to_text",
        "SpeechSeq2Seq",
        speech_and_text,
        _SEQ2SEQ
        | {"max_source_positions": 64, "max_target_positions": 32, "conv_channels": 64, "input_feat_per_channel": 80},
    ),
    "patchtst": Transformer(
        "patchtst",
        "",
        series,
        {
            "num_input_channels": 2,
            "context_length": 32,
            "patch_length": 8,
            "patch_stride": 8,
            "d_model": 64,
            "ffn_dim": 128,
        },
    ),
}
