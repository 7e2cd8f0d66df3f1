"""Tiny text encoders for the embedded backbones: CLIP and T5 classes of transformers, with a vocabulary of scenes.

The vocabulary is closed: every word of every caption is one token, learned from nothing but the grammar of `scenes`.
"""

import json

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from src.data.scenes import COLOURS, FLOORS, POSES, SHAPES, SIZES

TEXT_TOKENS = 24  # the longest caption has 20 words and commas, and two tokens frame it
EXTRA_WORDS = ("on", "the", "of", "in", "no", "with", "without", "one", "two", "three", "person", "people", "floor", "and", "a")


def scene_words() -> list[str]:
    """Every word that a caption can hold, sorted; a few extra ones so that free prompts survive."""
    phrases = [*COLOURS, *SHAPES, *SIZES, *FLOORS, *POSES, *EXTRA_WORDS]
    return sorted({w for p in phrases for w in p.split()})


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair tokenizer in which each scene word is one token; other words fall apart into letters.

    The end token stands last: CLIP finds it by its id, and an id of 2 would switch transformers to an old pooling rule.
    """
    alphabet = [chr(c) for c in range(33, 127)]
    core = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    core.train_from_iterator([" ".join(scene_words())], trainer)
    learned = json.loads(core.to_str())["model"]
    merges = [tuple(m) for m in learned["merges"]]
    vocab = sorted({*alphabet, *(c + "</w>" for c in alphabet), *learned["vocab"]})
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(vocab)}, merges=merges, model_max_length=TEXT_TOKENS)


def clip_encoder(tokenizer: CLIPTokenizer, width: int, seed: int) -> CLIPTextModelWithProjection:
    """Two layers and the projection of a pooled vector, which SD3 reads."""
    return _clip(CLIPTextModelWithProjection, tokenizer, width, seed)


def clip_text_model(tokenizer: CLIPTokenizer, width: int, seed: int) -> CLIPTextModel:
    """Two layers without a projection, as Stable Diffusion 2 reads them."""
    return _clip(CLIPTextModel, tokenizer, width, seed)


def _clip(kind: type, tokenizer: CLIPTokenizer, width: int, seed: int) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Token embeddings start at standard deviation 0.5: at CLIP's 0.02 they drown in the positions."""
    torch.manual_seed(seed)
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=width, max_position_embeddings=TEXT_TOKENS,
        eos_token_id=eos, bos_token_id=bos, pad_token_id=eos,
    )  # fmt: skip
    model = kind(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    return model


def t5_tokenizer() -> T5TokenizerFast:
    """Unigram tokenizer over the same words, in the shape that the SD3 pipeline expects to find."""
    pieces = ["<pad>", "</s>", "<unk>", *("▁" + w for w in scene_words()), "▁", ","]
    core = Tokenizer(models.Unigram([(p, -1.0) for p in pieces], unk_id=2))
    core.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return T5TokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", extra_ids=0)


def t5_encoder(tokenizer: T5TokenizerFast, width: int, seed: int) -> T5EncoderModel:
    """Two layers, as PixArt-alpha reads them."""
    torch.manual_seed(seed)
    return T5EncoderModel(_t5_config(tokenizer, width, layers=2, head_width=32, inner=4 * width))


def silent_t5(tokenizer: T5TokenizerFast, width: int) -> T5EncoderModel:
    """One T5 layer whose output is exactly zero: the SD3 pipeline insists on a third encoder, the tiny model needs none."""
    model = T5EncoderModel(_t5_config(tokenizer, width, layers=1, head_width=8, inner=16))
    torch.nn.init.zeros_(model.encoder.final_layer_norm.weight)
    return model


def _t5_config(tokenizer: T5TokenizerFast, width: int, layers: int, head_width: int, inner: int) -> T5Config:
    return T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=head_width, d_ff=inner, num_layers=layers, num_heads=2,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
