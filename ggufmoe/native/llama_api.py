"""llama.cpp's C interface, as far as ggufmoe uses it: structures and prototypes for a libllama without bindings.

Stands in for the module ``llama_cpp.llama_cpp``, with its names. Source: ``llama.h`` of commit 0c1e57098; a test
compares every structure and prototype with llama-cpp-python's.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char, c_char_p, c_double, c_float, c_int8, c_int32, c_int64, c_size_t, c_uint8
from ctypes import c_uint32 as c_u32
from ctypes import c_void_p as c_ptr
from typing import Any

llama_log_callback = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_ptr)
llama_progress_callback = ctypes.CFUNCTYPE(c_bool, c_float, c_ptr)
ggml_abort_callback = ctypes.CFUNCTYPE(c_bool, c_ptr)
ggml_backend_sched_eval_callback = ctypes.CFUNCTYPE(c_bool, c_ptr, c_bool, c_ptr)


class llama_batch(ctypes.Structure):  # noqa: N801
    """Tokens to compute, with their positions and sequences."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


class llama_model_kv_override_value(ctypes.Union):  # noqa: N801
    """The value of an override, by its tag."""

    _fields_ = (("val_i64", c_int64), ("val_f64", c_double), ("val_bool", c_bool), ("val_str", c_char * 128))


class llama_model_kv_override(ctypes.Structure):  # noqa: N801
    """A metadata key whose value is replaced while a model is loaded."""

    _fields_ = (("tag", c_int32), ("key", c_char * 128), ("value", llama_model_kv_override_value))


class llama_model_params(ctypes.Structure):  # noqa: N801
    """How a model is loaded."""

    _fields_ = (
        ("devices", c_ptr),
        ("tensor_buft_overrides", c_ptr),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", POINTER(c_float)),
        ("progress_callback", llama_progress_callback),
        ("progress_callback_user_data", c_ptr),
        ("kv_overrides", POINTER(llama_model_kv_override)),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    )


class llama_context_params(ctypes.Structure):  # noqa: N801
    """How a context is made."""

    _fields_ = (
        ("n_ctx", c_u32),
        ("n_batch", c_u32),
        ("n_ubatch", c_u32),
        ("n_seq_max", c_u32),
        ("n_rs_seq", c_u32),
        ("n_outputs_max", c_u32),
        ("n_outputs_max_per_seq", c_u32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_u32),
        ("defrag_thold", c_float),
        ("cb_eval", ggml_backend_sched_eval_callback),
        ("cb_eval_user_data", c_ptr),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("abort_callback", ggml_abort_callback),
        ("abort_callback_data", c_ptr),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_ptr),
        ("n_samplers", c_size_t),
        ("ctx_other", c_ptr),
    )


class llama_sampler_chain_params(ctypes.Structure):  # noqa: N801
    """How a chain of samplers is made."""

    _fields_ = (("no_perf", c_bool),)


class llama_logit_bias(ctypes.Structure):  # noqa: N801
    """What is added to a token's logit."""

    _fields_ = (("token", c_int32), ("bias", c_float))


class llama_token_data(ctypes.Structure):  # noqa: N801
    """A candidate for the next token."""

    _fields_ = (("id", c_int32), ("logit", c_float), ("p", c_float))


class llama_token_data_array(ctypes.Structure):  # noqa: N801
    """The candidates for the next token."""

    _fields_ = (
        ("data", POINTER(llama_token_data)),
        ("size", c_size_t),
        ("selected", c_int64),
        ("sorted", c_bool),
    )


_SEQUENCE = (c_ptr, c_int32)  # a llama_memory_t or llama_context *, and a llama_seq_id
PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_batch_get_one": (llama_batch, (POINTER(c_int32), c_int32)),
    "llama_context_default_params": (llama_context_params, ()),
    "llama_decode": (c_int32, (c_ptr, llama_batch)),
    "llama_free": (None, (c_ptr,)),
    "llama_get_embeddings": (POINTER(c_float), (c_ptr,)),
    "llama_get_logits": (POINTER(c_float), (c_ptr,)),
    "llama_get_memory": (c_ptr, (c_ptr,)),
    "llama_init_from_model": (c_ptr, (c_ptr, llama_context_params)),
    "llama_log_set": (None, (llama_log_callback, c_ptr)),
    "llama_memory_can_shift": (c_bool, (c_ptr,)),
    "llama_memory_clear": (None, (c_ptr, c_bool)),
    "llama_memory_seq_add": (None, (*_SEQUENCE, c_int32, c_int32, c_int32)),
    "llama_memory_seq_cp": (None, (c_ptr, c_int32, c_int32, c_int32, c_int32)),
    "llama_memory_seq_pos_max": (c_int32, _SEQUENCE),
    "llama_memory_seq_pos_min": (c_int32, _SEQUENCE),
    "llama_memory_seq_rm": (c_bool, (*_SEQUENCE, c_int32, c_int32)),
    "llama_model_default_params": (llama_model_params, ()),
    "llama_model_free": (None, (c_ptr,)),
    "llama_model_get_vocab": (c_ptr, (c_ptr,)),
    "llama_model_has_encoder": (c_bool, (c_ptr,)),
    "llama_model_is_hybrid": (c_bool, (c_ptr,)),
    "llama_model_is_recurrent": (c_bool, (c_ptr,)),
    "llama_model_load_from_file": (c_ptr, (c_char_p, llama_model_params)),
    "llama_model_n_ctx_train": (c_int32, (c_ptr,)),
    "llama_model_n_embd_out": (c_int32, (c_ptr,)),
    "llama_model_n_swa": (c_int32, (c_ptr,)),
    "llama_n_batch": (c_u32, (c_ptr,)),
    "llama_n_ctx_seq": (c_u32, (c_ptr,)),
    "llama_n_ubatch": (c_u32, (c_ptr,)),
    "llama_sampler_accept": (None, (c_ptr, c_int32)),
    "llama_sampler_apply": (None, (c_ptr, POINTER(llama_token_data_array))),
    "llama_sampler_chain_add": (None, (c_ptr, c_ptr)),
    "llama_sampler_chain_default_params": (llama_sampler_chain_params, ()),
    "llama_sampler_chain_init": (c_ptr, (llama_sampler_chain_params,)),
    "llama_sampler_free": (None, (c_ptr,)),
    "llama_sampler_init_dist": (c_ptr, (c_u32,)),
    "llama_sampler_init_dry": (
        c_ptr,
        (c_ptr, c_float, c_float, c_int32, c_int32, POINTER(c_char_p), c_size_t),
    ),
    "llama_sampler_init_grammar": (c_ptr, (c_ptr, c_char_p, c_char_p)),
    "llama_sampler_init_greedy": (c_ptr, ()),
    "llama_sampler_init_logit_bias": (c_ptr, (c_int32, c_int32, POINTER(llama_logit_bias))),
    "llama_sampler_init_min_p": (c_ptr, (c_float, c_size_t)),
    "llama_sampler_init_mirostat": (c_ptr, (c_int32, c_u32, c_float, c_float, c_int32)),
    "llama_sampler_init_mirostat_v2": (c_ptr, (c_u32, c_float, c_float)),
    "llama_sampler_init_penalties": (c_ptr, (c_int32, c_int32, c_float, c_float, c_float)),
    "llama_sampler_init_temp": (c_ptr, (c_float,)),
    "llama_sampler_init_top_k": (c_ptr, (c_int32,)),
    "llama_sampler_init_top_p": (c_ptr, (c_float, c_size_t)),
    "llama_sampler_init_typical": (c_ptr, (c_float, c_size_t)),
    "llama_sampler_init_xtc": (c_ptr, (c_float, c_float, c_size_t, c_u32)),
    "llama_sampler_sample": (c_int32, (c_ptr, c_ptr, c_int32)),
    "llama_set_embeddings": (None, (c_ptr, c_bool)),
    "llama_state_seq_get_data": (c_size_t, (c_ptr, POINTER(c_uint8), c_size_t, c_int32)),
    "llama_state_seq_get_data_ext": (c_size_t, (c_ptr, POINTER(c_uint8), c_size_t, c_int32, c_u32)),
    "llama_state_seq_get_size": (c_size_t, _SEQUENCE),
    "llama_state_seq_get_size_ext": (c_size_t, (*_SEQUENCE, c_u32)),
    "llama_state_seq_set_data": (c_size_t, (c_ptr, POINTER(c_uint8), c_size_t, c_int32)),
    "llama_state_seq_set_data_ext": (c_size_t, (c_ptr, POINTER(c_uint8), c_size_t, c_int32, c_u32)),
    "llama_synchronize": (None, (c_ptr,)),
    "llama_token_to_piece": (c_int32, (c_ptr, c_int32, c_char_p, c_int32, c_int32, c_bool)),
    "llama_tokenize": (c_int32, (c_ptr, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)),
    "llama_vocab_bos": (c_int32, (c_ptr,)),
    "llama_vocab_eos": (c_int32, (c_ptr,)),
    "llama_vocab_get_add_bos": (c_bool, (c_ptr,)),
    "llama_vocab_get_attr": (c_int32, (c_ptr, c_int32)),
    "llama_vocab_get_text": (c_char_p, (c_ptr, c_int32)),
    "llama_vocab_is_eog": (c_bool, (c_ptr, c_int32)),
    "llama_vocab_n_tokens": (c_int32, (c_ptr,)),
    "llama_vocab_type": (c_int32, (c_ptr,)),
}
"""Result and arguments of each function. Samplers are opaque."""

_TYPES = {
    name: value
    for name, value in list(globals().items())
    if name.startswith(("llama_", "ggml_")) and isinstance(value, type)
}


class LlamaApi:
    """The functions of one loaded libllama, with the types above, as attributes.

    Raises AttributeError if a function is missing.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._lib = library
        vars(self).update(_TYPES)
        for name, (restype, argtypes) in PROTOTYPES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = restype, argtypes
            setattr(self, name, function)

    @staticmethod
    def types() -> dict[str, Any]:
        """Structures and callbacks by name."""
        return dict(_TYPES)
