"""GGUF files for llama.cpp: the update as a LoRA for the GGUF of the base, or merged with it.

Both are written through the `gguf` package, tensor by tensor. What llama.cpp wants otherwise than
the library: other names; the rows of query and key of the Llama family with the two halves of the
rotary pairs interleaved, and so the rows of their B; Gemma's norms one larger. Configurations that
llama.cpp would compute otherwise are refused by name.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    TokenType,
    get_tensor_name_map,
)
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from milora.adapter import Factors
from milora.checkpoint import open_shards
from milora.errors import UserError
from milora.export import one_rank
from milora.merge import (
    DTYPES,
    Piece,
    Recorded,
    Rounding,
    TensorFile,
    check_weight,
    norm_of,
    pieces_of,
    rounding_of,
    summed,
)
from milora.progress import Progress

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA, "mistral": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3, "gemma3_text": MODEL_ARCH.GEMMA3,
}  # fmt: skip
# What llama.cpp takes for granted, where it is not SiLU: no GGUF says it.
ACTIVATIONS = {"gemma3_text": ("hidden_activation", ("gelu_pytorch_tanh",))}
TYPES = {
    torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
}
# How byte-level vocabularies cut text before they merge, by llama.cpp's names.
SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
OTHERWISE = "export it with --to merged and use llama.cpp's convert_hf_to_gguf.py"


def check_gguf(config: Any) -> MODEL_ARCH:
    """The architecture's name in GGUF; UserError for one that is not written here."""
    kind = getattr(config, "model_type", "")
    if kind not in ARCHITECTURES:
        raise UserError(
            f"--to gguf: models of type {kind} are not written as GGUF here "
            f"(only {', '.join(ARCHITECTURES)}): {OTHERWISE}"
        )
    return ARCHITECTURES[kind]


def write_lora(
    path: Path, config: Any, factors: Mapping[str, Factors], base: Mapping[str, Any]
) -> None:
    """A GGUF LoRA of fp32 tensors whose scale is 1, for `--lora` of llama.cpp.

    `base` is what the adapter recorded of it. Raises UserError for an architecture or a weight
    that llama.cpp does not adapt.
    """
    arch = check_gguf(config)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    factors = one_rank(factors)  # llama.cpp scales by alpha / rank, and there is one alpha
    rank = len(next(iter(factors.values())).A)
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[arch])
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, str(base["name"]))
    for name, (A, B) in factors.items():
        own = names.get_name(name)
        if own is None:
            raise UserError(f"--to gguf: llama.cpp has no place for {name}: {OTHERWISE}")
        B = _interleaved(B, name, config)
        writer.add_tensor(f"{own}.weight.lora_a", A.float().contiguous().numpy())
        writer.add_tensor(f"{own}.weight.lora_b", B.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(
    path: Path,
    source: str,
    skeleton: PreTrainedModel,
    factors: Mapping[str, Factors],
    hashes: Mapping[str, Recorded],
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    original: Path | None,
    progress: Progress,
) -> Rounding:
    """One GGUF file of the base with the update in it; see merge.merge_files for the arguments.

    Matrices keep the dtype of the files, vectors become fp32 as llama.cpp wants them. `original`
    is the GGUF file that the base came from, if it did: what it says of model and tokenizer is
    kept. Raises UserError for what cannot be said in GGUF, before anything is written.
    """
    config: Any = skeleton.config
    arch = check_gguf(config)
    shards = open_shards(source)
    pieces = pieces_of(skeleton, factors, shards, source)
    owners = {found[0].tensor: owner for owner, found in pieces.items()}
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[arch])
    if original:
        others = _copy_fields(writer, original, tokenizer)
    else:
        _describe(writer, config, name)
        _describe_tokenizer(writer, tokenizer, config.vocab_size)
        others = _rope_factors(config)
    places: dict[str, tuple[str, torch.dtype, list[int]]] = {}
    for file in sorted(set(shards.files.values())):
        with TensorFile(source, file, shards) as opened:
            for tensor in opened.order:
                if _left_out(tensor, config):
                    continue
                own = names.get_name(tensor, try_suffixes=(".weight", ".bias"))
                about = opened.header[tensor]
                if own is None or about["dtype"] not in DTYPES:
                    raise UserError(
                        f"--to gguf-merged: {tensor} ({about['dtype']}) of {source} has no place "
                        f"in a GGUF of this architecture: {OTHERWISE}"
                    )
                kind = DTYPES[about["dtype"]] if len(about["shape"]) > 1 else torch.float32
                kind = torch.float32 if kind == torch.float64 else kind
                places[tensor] = own, kind, about["shape"]
    for own, kind, shape in places.values():
        size = math.prod(shape) * kind.itemsize
        writer.add_tensor_info(own, shape, np.dtype(np.uint16), size, TYPES[kind][0])
    for own, value in others.items():
        if own not in {place[0] for place in places.values()}:
            writer.add_tensor_info(own, value.shape, value.dtype, value.nbytes)
    matrices = [kind for _, kind, shape in places.values() if len(shape) > 1]
    coarsest = max(matrices, key=lambda kind: torch.finfo(kind).eps)
    writer.add_file_type(TYPES[coarsest][1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    lost, norms = dict.fromkeys(factors, 0.0), dict[str, float]()
    for file in sorted(set(shards.files.values())):
        with TensorFile(source, file, shards) as opened:
            for tensor in (one for one in opened.order if one in places):
                _, kind, shape = places[tensor]
                weight = opened.matrix(Piece(tensor, None, slice(0, shape[0]), False))
                weight = weight.view(shape).to(kind)
                if owner := owners.get(tensor):
                    progress("merging", len(norms), len(factors), owner)
                    check_weight(owner, pieces[owner], shards, source, hashes[owner])
                    A, B = factors[owner]
                    weight, lost[owner] = summed(owner, weight, B, A)
                    norms[owner] = norm_of(factors[owner])
                if arch == MODEL_ARCH.GEMMA3 and tensor.endswith("norm.weight"):
                    weight = weight + 1
                weight = _interleaved(weight, tensor.rpartition(".")[0], config)
                writer.write_tensor_data(_raw(weight))
    for own, value in others.items():
        if own not in {place[0] for place in places.values()}:
            writer.write_tensor_data(value)
    writer.close()
    progress("merging", len(factors), len(factors))
    return rounding_of(lost, norms, [coarsest])


def _raw(weight: Tensor) -> Any:
    weight = weight.contiguous()
    return (weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight).numpy()


def _interleaved(weight: Tensor, name: str, config: Any) -> Tensor:
    """The rows of a query or key of the Llama family as GGUF has them: pair by pair."""
    part = name.rpartition(".")[2]
    if ARCHITECTURES[config.model_type] != MODEL_ARCH.LLAMA or part not in ("q_proj", "k_proj"):
        return weight
    heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
    halves = weight.view(heads, 2, -1, *weight.shape[1:])  # head, half, pair, in
    return halves.transpose(1, 2).reshape(weight.shape)


def _left_out(tensor: str, config: Any) -> bool:
    tied = config.tie_word_embeddings and tensor == "lm_head.weight"
    return tied or tensor.endswith("rotary_emb.inv_freq")


def _copy_fields(
    writer: GGUFWriter, original: Path, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What a GGUF says of model and tokenizer; returns those tensors that no weight becomes.

    Chat template and end of text are those that the run was trained with.
    """
    own = []
    if tokenizer.chat_template:
        _add_templates(writer, tokenizer)
        own.append("tokenizer.chat_template")
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(tokenizer.eos_token_id)
        own.append("tokenizer.ggml.eos_token_id")
    reader = GGUFReader(original)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in (
            "general.architecture", "general.file_type", "general.quantization_version"
        ):  # fmt: skip
            continue
        if field.name.startswith(tuple(own)):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, inner)
    return {
        tensor.name: np.array(tensor.data)
        for tensor in reader.tensors
        if tensor.name.startswith("rope_")
    }


def _describe(writer: GGUFWriter, config: Any, name: str) -> None:
    kind = config.model_type
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    context = config.max_position_embeddings
    if kind == "mistral" and config.sliding_window:
        context = min(context, config.sliding_window)  # llama.cpp does not slide it
    if kind in ("qwen2", "qwen3") and config.use_sliding_window:
        raise UserError(f"--to gguf-merged: llama.cpp has no sliding window for {kind}")
    key, known = ACTIVATIONS.get(kind, ("hidden_act", ("silu", "swish")))
    if getattr(config, key) not in known:
        raise UserError(
            f"--to gguf-merged: llama.cpp computes {kind} with {known[0]}; this model has {key} "
            f"{getattr(config, key)}"
        )
    writer.add_type("model")
    writer.add_name(name)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(head)
    writer.add_value_length(head)
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind in ("llama", "mistral"):
        writer.add_rope_dimension_count(head)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "gemma3_text":
        _check_gemma(config, head)
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _check_gemma(config: Any, head: int) -> None:
    """What llama.cpp takes for granted of Gemma 3."""
    every = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(6)]
    layers = config.layer_types
    wrong = [i for i, kind in enumerate(layers) if kind != every[i % 6]]
    large = config.num_hidden_layers == 62  # the 27B scales its queries by the whole width
    scalar = config.hidden_size // config.num_attention_heads if large else head
    if wrong or config.query_pre_attn_scalar != scalar or config.attn_logit_softcapping:
        raise UserError(
            "--to gguf-merged: llama.cpp computes Gemma 3 with full attention in every sixth layer "
            f"and queries scaled by {scalar}; this model has {layers}, "
            f"{config.query_pre_attn_scalar} and soft caps {config.attn_logit_softcapping}"
        )


def _rope(config: Any) -> dict[str, Any]:
    """The parameters of full attention's rotary positions."""
    rope = dict(config.rope_parameters.get("full_attention", config.rope_parameters))
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise UserError(
            f"--to gguf-merged: rotary positions of type {rope['rope_type']} are not written "
            f"here: {OTHERWISE}"
        )
    return rope


def _rope_factors(config: Any) -> dict[str, Any]:
    """Llama 3 stretches slow rotations: llama.cpp reads by how much from a tensor."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return {}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turns = rope["original_max_position_embeddings"] / (2 * math.pi)
    frequencies = 1 / rope["rope_theta"] ** (np.arange(0, head, 2) / head)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((turns * frequencies - low) / (high - low), 0, 1)
    stretched = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return {"rope_freqs.weight": stretched.astype(np.float32)}


def _describe_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Vocabulary, merges and special tokens of a fast tokenizer (BPE)."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    parts: dict[str, Any] = json.loads(backend.to_str()) if backend else {"model": {"type": "slow"}}
    model = parts["model"]
    if model["type"] != "BPE":
        raise UserError(f"--to gguf-merged: a tokenizer of type {model['type']}: {OTHERWISE}")
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [TokenType.UNUSED] * size
    for token, place in model["vocab"].items():
        if place >= size:  # of no row of the embedding: no token that the model knows
            continue
        tokens[place], kinds[place] = token, TokenType.NORMAL
    for added in parts["added_tokens"]:
        if added["id"] < size:
            tokens[added["id"]] = added["content"]
            special = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
            kinds[added["id"]] = special
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    if model["byte_fallback"]:
        _sentencepiece(writer, parts, tokens, kinds, merges)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split(parts["pre_tokenizer"]))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for kind in ("bos", "eos", "unk", "pad"):
        token_id = getattr(tokenizer, f"{kind}_token_id")
        if token_id is not None:
            getattr(writer, f"add_{kind}_token_id")(token_id)
    plain = tokenizer("x")["input_ids"]
    writer.add_add_bos_token(plain[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(plain[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        _add_templates(writer, tokenizer)


def _add_templates(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    found: Any = tokenizer.chat_template
    several = isinstance(found, dict)
    named = [{"name": k, "template": v} for k, v in found.items()] if several else found
    writer.add_chat_template(named)


def _split(pre: Mapping[str, Any] | None) -> str:
    steps = list(_steps(pre))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = steps[0]["pattern"].get("Regex")
        if pattern in SPLITS:
            return SPLITS[pattern]
    raise UserError(
        f"--to gguf-merged: how this tokenizer cuts text ({', '.join(kinds) or 'not at all'}) is "
        f"not known to be one of llama.cpp's ways: {OTHERWISE}"
    )


def _steps(pre: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if pre and pre["type"] == "Sequence":
        for step in pre["pretokenizers"]:
            yield from _steps(step)
    elif pre:
        yield pre


def _sentencepiece(
    writer: GGUFWriter, parts: Mapping[str, Any], tokens: list[str], kinds: list[TokenType],
    merges: list[list[str]],
) -> None:  # fmt: skip
    """Llama 2's and Gemma's: llama.cpp merges by scores, and what is merged first scores most."""
    score: dict[str, float] = {}
    for place, pair in enumerate(merges):
        score.setdefault("".join(pair), -float(place))
    for i, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x"):
            kinds[i] = TokenType.BYTE
        elif token == parts["model"]["unk_token"]:
            kinds[i] = TokenType.UNKNOWN
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([score.get(token, 0.0) for token in tokens])
    said = json.dumps([parts["normalizer"], parts["pre_tokenizer"]])
    prefix = '"Prepend"' in said or '"prepend_scheme": "first"' in said
    writer.add_add_space_prefix(prefix or '"prepend_scheme": "always"' in said)
